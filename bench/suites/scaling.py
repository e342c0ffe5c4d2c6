"""`python -m bench scaling`: time against sequence length."""

import argparse

from bench import runner, session
from bench.arguments import OUT, add_common, add_forms, forms, session_options
from bench.job import DIRECTIONS, is_windowed
from bench.registry import MECHANISMS, default_mechanisms, kernel_of

HELP = "time against sequence length"
DESCRIPTION = (
    "Time of a call against sequence length, of every mechanism in both backends, on q, k and v of real "
    "text. Everything is verified before it is timed: outputs, and gradients where they are timed. What is "
    "not given here is read from --config."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    parser.add_argument(
        "--direction",
        choices=DIRECTIONS,
        default=DIRECTIONS[0],
        help="what is timed: a forward call, the backward pass alone (the pullback of a random cotangent to "
        "q, k and v, on what an untimed forward pass saved), or both in one call; default: fwd",
    )
    add_forms(parser)
    named = [name for name in MECHANISMS if kernel_of(name) is not None]
    windowed = [name for name in MECHANISMS if is_windowed(name)]
    every = [name for name in MECHANISMS if name not in (*named, *windowed)]
    add_common(
        parser,
        f"repeatable; default: {', '.join(every)}; with --mem-len or --n-sink also {', '.join(windowed)}, "
        f"which are causal only; 'exact' takes the best kernel that runs, {', '.join(named)} that one",
        f"{OUT / 'scaling'}, with the direction after it unless that is fwd",
    )


def options(arguments: argparse.Namespace) -> session.Options:
    """What to run; errors as of `session_options`."""
    common = session_options(arguments)
    direction = arguments.direction
    return session.Options(
        mechanisms=tuple(dict.fromkeys(arguments.mechanism or default_mechanisms(common["job"]))),
        causal=forms(arguments),
        out=arguments.out or OUT / (f"scaling_{direction}" if direction != "fwd" else "scaling"),
        direction=direction,
        **common,
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the suite; its exit code."""
    return runner.run(options(arguments))
