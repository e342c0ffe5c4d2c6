"""`python -m bench compare A B`: ratios between two result files."""

import argparse
from pathlib import Path

from bench import comparison, sources

HELP = "ratios between two result files"
DESCRIPTION = (
    "Time and memory of B over those of A, for every measurement that both have: the same suite, backend, "
    "device, mechanism, form, direction, dtype and shape, whatever the commit and the versions."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    for name in "AB":
        parser.add_argument(name, type=Path, help="a records.jsonl or a folder that holds one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there too")


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; 0."""
    found = comparison.compare(sources.load(arguments.A), sources.load(arguments.B))
    page = comparison.page(found)
    print(page, end="")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page, encoding="utf-8")
    return 0
