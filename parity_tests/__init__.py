"""Every test: both backends against the oracle and against each other."""
