"""`python -m bench memory`: peak memory against sequence length."""

import argparse
import dataclasses

from bench import memory_page, runner, session
from bench.arguments import OUT, add_common, add_forms, forms, session_options
from bench.extras import OBSERVED
from bench.registry import OWN_KERNEL

HELP = "peak memory against sequence length"
DESCRIPTION = (
    "Most bytes in use at once in a call against sequence length, of every mechanism in both backends, "
    "forward and forward with backward: as reserved by the compiler or tracked, and as observed while calls "
    "ran. Everything is verified first, gradients too. Calls are timed once; for times see `scaling`."
)
DIRECTIONS = ("fwd", "fwd+bwd")
QUICK = ("vq_qk", "exact")  # jax compiles the backward pass of the others for many seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    parser.add_argument("--direction", choices=DIRECTIONS, help="default: both")
    add_forms(parser)
    add_common(parser, f"repeatable; default: all, with --quick {', '.join(QUICK)}", str(OUT / "memory"))


def options(arguments: argparse.Namespace) -> list[session.Options]:
    """What to run, a direction after the other; errors as of `session_options`."""
    common = session_options(arguments)
    default = QUICK if arguments.quick else OWN_KERNEL
    job = dataclasses.replace(common.pop("job"), n_repeat=1)
    return [
        session.Options(
            job=job,
            mechanisms=tuple(dict.fromkeys(arguments.mechanism or default)),
            causal=forms(arguments),
            out=arguments.out or OUT / "memory",
            direction=direction,
            extras=(OBSERVED,),
            title=direction,
            **common,
        )
        for direction in DIRECTIONS
        if arguments.direction in (None, direction)
    ]


def run(arguments: argparse.Namespace) -> int:
    """Run the suite; its exit code."""
    return runner.run_all(options(arguments), memory_page.write)
