"""`python -m bench codebook`: time, memory and error against the number of codes."""

import argparse
import dataclasses

from bench import codes_page, runner, session
from bench.arguments import OUT, add_common, add_forms, forms, positive, session_options
from bench.extras import ERRORS
from bench.registry import MECHANISMS

HELP = "time, memory and error against the number of codes"
DESCRIPTION = (
    "Time and memory of a forward call of VQ-attention at a fixed length against the number of codes, the "
    "time and the error of quantization, and the error of the output to exact attention, which is measured "
    "once beside it. Everything is verified before it is timed. --n-code is the list --codes here."
)
LENGTH, CODES = 16_384, (128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_LENGTH, QUICK_CODES = 1024, (16, 64)
QUANTIZED = tuple(name for name, mechanism in MECHANISMS.items() if mechanism.quantized)
DEFAULT = ("vq_qk", "vq_k")
FIT_TIMES = 8  # text that codebooks are fitted on, in measured lengths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    parser.add_argument("--length", type=positive, metavar="T", help=f"tokens; default: {LENGTH:,}")
    default = ", ".join(map(str, CODES))
    parser.add_argument(
        "--codes", type=positive, nargs="+", metavar="C", help=f"codes of both codebooks; default: {default}"
    )
    add_forms(parser)
    names = f"repeatable, one with codes; default: {', '.join(DEFAULT)}; exact is always measured"
    add_common(parser, names, str(OUT / "codebook"), left_out=("--lengths", "--n-code"))


def options(arguments: argparse.Namespace) -> list[session.Options]:
    """What to run: one job for each number of codes, exact attention with the first.

    Raises:
      ValueError: a mechanism without codes; and errors as of `session_options`.
    """
    mechanisms = tuple(dict.fromkeys(arguments.mechanism or DEFAULT))
    for name in mechanisms:
        if name not in QUANTIZED:
            raise ValueError(f"--mechanism must be one with codes: {', '.join(QUANTIZED)}; found {name}")
    arguments.lengths = [arguments.length or (QUICK_LENGTH if arguments.quick else LENGTH)]
    common = session_options(arguments)
    job = common.pop("job")
    held_out = FIT_TIMES * job.batch * arguments.lengths[0]
    n_codes = sorted(set(arguments.codes or (QUICK_CODES if arguments.quick else CODES)))
    return [
        session.Options(
            job=dataclasses.replace(job, codes_q=n_code, codes_k=n_code),
            mechanisms=(*mechanisms, "exact") if n_code == n_codes[0] else mechanisms,
            causal=forms(arguments),
            out=arguments.out or OUT / "codebook",
            extras=(ERRORS,),
            held_out=held_out,
            title=f"{n_code:,} codes",
            **common,
        )
        for n_code in n_codes
    ]


def run(arguments: argparse.Namespace) -> int:
    """Run the suite; its exit code."""
    return runner.run_all(options(arguments), codes_page.write)
