"""The commands of `python -m bench`: a module each, with `HELP`, `DESCRIPTION`, `add_arguments`, `run`."""

SUITES = ("scaling", "decode", "codebook", "memory", "parity", "capture", "accuracy")  # what measures
READERS = ("compare", "report")  # what reads results
MAKERS = ("tune",)  # what writes a part of the packages
