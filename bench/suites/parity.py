"""`python -m bench parity`: whether both backends agree; what continuous integration calls."""

import argparse
from pathlib import Path

from bench import parity, registry, session
from bench.arguments import chosen_backends, positive
from bench.fit import curve_name
from bench.job import DTYPES, Job
from bench.markdown import table
from bench.progress import Progress
from bench.verify import twin_limit
from vq_common import BenchConfig, TransformerConfig
from vq_common.config import DEVICES

HELP = "whether both backends agree; exit code 1 when not"
DESCRIPTION = (
    "Outputs and gradients of q, k and v of every mechanism in both backends against the float64 oracle and "
    "each other, and how operations and memory grow with the length, counted and compiled from shapes. "
    "Nothing is timed: the same code gives the same table. Exit code 1 when anything disagrees."
)
RUN_S = 1800.0  # after which a backend that does not answer is stopped
VERIFIED, QUICK_VERIFIED = 389, 97  # tokens; no block divides them
LENGTHS, QUICK_LENGTHS = (1024, 2048, 4096, 8192, 16384), (512, 2048)
SIZES = {"d_model": 64, "n_head": 3, "d_k": 24, "d_v": 24, "n_code": 29, "block_len": 32}
QUICK_SIZES = {"d_model": 24, "n_head": 2, "d_k": 8, "d_v": 8, "n_code": 7, "block_len": 16}
HYPER = {"block_size": 64, "n_sample": 64, "min_seq_len": 1024}
QUICK_HYPER = {"block_size": 16, "n_sample": 16, "min_seq_len": 512}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    add = parser.add_argument
    add("--backend", choices=(*registry.BACKENDS, "both"), default="both", help="default: both, as installed")
    add("--mechanism", action="append", choices=tuple(registry.MECHANISMS), help="repeatable; default: all")
    add("--lengths", type=positive, nargs="+", metavar="T", help="tokens that are counted at, two or more")
    add("--dtype", choices=DTYPES, default="float32", help="of q, k and v; default: float32")
    add("--device", choices=DEVICES, default="auto", help="a device that is named is required")
    add("--quick", action="store_true", help="tiny sizes, two lengths, XLA optimizes nothing")


def options(arguments: argparse.Namespace) -> session.Options:
    """What to verify.

    Raises:
      ValueError: an option is wrong, or a backend is not installed.
    """
    if len(set(lengths(arguments))) < 2:
        raise ValueError(f"--lengths must be two or more to fit a growth, found {arguments.lengths}")
    is_quick = arguments.quick
    bench = BenchConfig(
        lengths=(QUICK_VERIFIED if is_quick else VERIFIED,),
        n_kmeans=2,
        max_run_s=RUN_S,
        **QUICK_HYPER if is_quick else HYPER,
    )
    config = TransformerConfig(dtype=arguments.dtype, bench=bench, **QUICK_SIZES if is_quick else SIZES)
    return session.Options(
        job=Job.of(config, batch=2, is_random=False),
        bench=bench,
        backends=chosen_backends(arguments.backend, arguments.device),
        mechanisms=tuple(dict.fromkeys(arguments.mechanism or registry.OWN_KERNEL)),
        causal=(False, True),
        device=arguments.device,
        out=Path(),
        is_resume=False,
        suite=arguments.suite,
        direction="fwd+bwd",
        is_timed=False,
    )


def lengths(arguments: argparse.Namespace) -> tuple[int, ...]:
    """Where operations and memory are counted."""
    default = QUICK_LENGTHS if arguments.quick else LENGTHS
    return tuple(sorted(set(arguments.lengths or default)))


def run(arguments: argparse.Namespace) -> int:
    """Run the suite; its exit code."""
    asked, counted = options(arguments), lengths(arguments)
    with Progress() as progress:
        progress.begin(len(asked.mechanisms) * len(asked.causal))
        rows = parity.compare(asked, counted, progress, is_fast=arguments.quick)
    for line in report(asked, rows, counted):
        print(line)
    return 1 if any(row.troubles for row in rows) else 0


def report(asked: session.Options, rows: list[parity.Row], counted: tuple[int, ...]) -> list[str]:
    """The table, what is wrong, and the verdict."""
    job, backends = asked.job, asked.backends
    head = ["mechanism"]
    for text in ("output", "gradients", "operations", "memory"):
        head += [f"{text} {backend}" for backend in backends]
    cells = []
    for row in rows:
        sides = [row.sides.get(backend) for backend in backends]
        cells.append(
            [
                curve_name(row.mechanism, row.is_causal),
                *(_error(side and side.out_error) for side in sides),
                *(_error(side and side.gradient_error) for side in sides),
                *(_growth(side and side.flops_exponent, side and side.flops, "") for side in sides),
                *(_growth(side and side.memory_exponent, side and side.n_bytes, "B") for side in sides),
                _error(row.twin_error),
                "DISAGREES" if row.troubles else "ok",
            ]
        )
    shape = (
        f"B {job.batch}, H {job.heads}, D {job.width}, V {job.value_width}, {job.codes_k} codes, {job.dtype}"
    )
    troubles = [
        f"{curve_name(row.mechanism, row.is_causal)}: {text}" for row in rows for text in row.troubles
    ]
    not_run = [
        f"not run: {backend} {curve_name(row.mechanism, row.is_causal)}: {reason}"
        for row in rows
        for backend, reason in row.not_run.items()
    ]
    worst = max((row.twin_error for row in rows if row.twin_error is not None), default=None)
    limit = twin_limit(job.dtype, asked.direction)
    apart = (
        "only one backend ran" if worst is None else f"within {worst:.1e} of each other (limit {limit:.0e})"
    )
    verdict = f"parity: all {len(rows)} forms agree, {apart}"
    if troubles:
        verdict = f"parity: {len(troubles)} disagreements"
    return [
        f"errors: relative RMS to the float64 oracle, on {asked.bench.lengths[0]} tokens ({shape}); twin: "
        "between the backends, the largest of output and gradients",
        f"growth: fitted over {', '.join(f'{T:,}' for T in counted)} tokens of a forward call, and the "
        "figure of the longest; operations, and bytes of temporaries (jax: compiled, torch: tracked)",
        table([*head, "twin", ""], cells),
        *not_run,
        *troubles,
        verdict,
    ]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _growth(exponent: float | None, figure: int | None, unit: str) -> str:
    return "" if exponent is None or figure is None else f"T^{exponent:.2f} {figure:.2g}{unit}"
