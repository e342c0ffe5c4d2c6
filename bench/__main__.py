"""The command line: `python -m bench <suite>`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from bench import session
from bench.suites import MAKERS, READERS, SUITES


def suite(name: str) -> Any:
    """The module of a suite."""
    return importlib.import_module(f"bench.suites.{name}")


def parser() -> argparse.ArgumentParser:
    """All suites, the commands that read what they wrote, and their options."""
    main = argparse.ArgumentParser(prog="python -m bench", description="Measure attention mechanisms.")
    commands = main.add_subparsers(dest="suite", required=True, metavar="suite")
    for name in (*SUITES, *READERS, *MAKERS):
        module = suite(name)
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION))
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite; its exit code."""
    arguments = parser().parse_args(argv)
    try:
        return int(suite(arguments.suite).run(arguments))
    except (FileNotFoundError, ValueError, TypeError, session.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
