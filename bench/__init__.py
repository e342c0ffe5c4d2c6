"""`python -m bench`: measured curves of every mechanism in every backend, verified before they are timed."""
