"""The suites of `python -m bench`: one module each, with `HELP`, `DESCRIPTION`, `add_arguments` and `run`."""

SUITES = ("scaling", "decode", "codebook", "memory", "parity", "capture", "accuracy")
