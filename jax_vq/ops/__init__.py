"""Pure functions: no state, no randomness."""
