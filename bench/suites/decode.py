"""`python -m bench decode`: time and memory of one token against the context before it."""

import argparse

from bench import runner, session
from bench.arguments import OUT, add_common, session_options
from bench.job import STEP

HELP = "time and memory of a token against context"
DESCRIPTION = (
    "Time of one token against the number of tokens before it: VQ-attention that goes on from a state of "
    "constant size, beside exact attention to a cache of all keys and values. The state comes from feeding "
    "that many tokens. Everything is verified before it is timed."
)
DECODED = ("vq_qk", "vq_k", "vq_qk_window", "exact")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    add_common(parser, f"repeatable; default: {', '.join(DECODED)}", str(OUT / "decode"))


def options(arguments: argparse.Namespace) -> session.Options:
    """What to run; errors as of `session_options`."""
    return session.Options(
        mechanisms=tuple(dict.fromkeys(arguments.mechanism or DECODED)),
        causal=(True,),
        out=arguments.out or OUT / "decode",
        direction=STEP,
        **session_options(arguments),
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the suite; its exit code."""
    return runner.run(options(arguments))
