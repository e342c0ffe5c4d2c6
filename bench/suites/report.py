"""`python -m bench report`: one report of any result files, and the tables of a README."""

import argparse
from pathlib import Path

from bench import combined, readme, sources
from bench.arguments import OUT

HELP = "one report of any result files"
DESCRIPTION = (
    "One Markdown page with plots from any set of result files: a section for every suite, ratios to exact "
    "attention, exponents, where every figure is from, and the original's published tables beside records "
    "at their shapes. With --readme, the tables between a page's markers, from the results that these name."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add = parser.add_argument
    add("files", type=Path, nargs="*", metavar="FILE", help="a records.jsonl, or a folder with some below it")
    add("--out", type=Path, default=OUT / "report", metavar="DIR", help="default: bench/results/local/report")
    add("--readme", type=Path, metavar="FILE", help="rewrite what is between its <!-- bench:... --> markers")


def run(arguments: argparse.Namespace) -> int:
    """Write the report, and the tables of the page that is asked for; 0.

    Raises:
      ValueError: there is nothing to do.
    """
    if not arguments.files and arguments.readme is None:
        raise ValueError("name result files, or a page with --readme")
    if arguments.files:
        for line in combined.write(arguments.out, sources.load_all(arguments.files)):
            print(line)
    if arguments.readme is not None:
        print(readme.rewrite(arguments.readme))
    return 0
