"""`python -m bench tune`: choose the tile sizes of the GPU kernels by measuring them."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from bench import host
from bench.arguments import OUT, positive
from bench.progress import Progress

HELP = "tile sizes of the GPU kernels"
DESCRIPTION = (
    "Times every kernel at a few sizes of its tiles, for several numbers of codes, verifies that each gives "
    "what the size in use gives, and writes the table of the fastest; the one in use stays unless another is "
    "faster by more than times differ by chance. With --install it replaces the table in use."
)
CODES = (128, 512)
SHAPE = {"length": 65_536, "n_head": 16, "width": 128}
QUICK_CODES, QUICK_SHAPE, N_QUICK = (16,), {"length": 150, "n_head": 1, "width": 16}, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add = parser.add_argument
    add("--codes", type=positive, nargs="+", metavar="C", help=f"default: {' '.join(map(str, CODES))}")
    add("--kernel", action="append", metavar="NAME", help="repeatable; default: all")
    add("--length", type=positive, metavar="T", help=f"tokens; default: {SHAPE['length']:,}")
    add("--n-head", type=positive, metavar="H", help=f"default: {SHAPE['n_head']}")
    add("--width", type=positive, metavar="D", help=f"of keys and values; default: {SHAPE['width']}")
    add("--out", type=Path, metavar="FILE", help="default: bench/results/local/sizes.json")
    add("--install", action="store_true", help="write the table that the kernels read")
    add(
        "--quick",
        action="store_true",
        help="two sizes of each kernel on a tiny shape, interpreted on a CPU: its times mean nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when a kernel has no size that is right.

    Raises:
      ValueError: jax is not installed, the kernels cannot run here, or there is no such kernel.
    """
    if not host.is_installed("jax"):
        raise ValueError("the kernels are of jax, which is not installed: pip install 'vq-attention[jax]'")
    tuning = importlib.import_module("bench.tuning")
    implementations = importlib.import_module("jax_vq.ops.implementations")
    reason = implementations.why_not_here("triton" if arguments.quick else None)
    if reason is not None:
        raise ValueError(f"nothing can be tuned here: {reason}")
    if arguments.quick and arguments.install:
        raise ValueError("--install needs real times: leave --quick out")
    path = tuning.sizes.PATH if arguments.install else arguments.out or OUT / "sizes.json"
    sizes = QUICK_SHAPE if arguments.quick else SHAPE
    given = {name: getattr(arguments, name) or value for name, value in sizes.items()}
    codes = tuple(arguments.codes or (QUICK_CODES if arguments.quick else CODES))
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        return _tune(tuning, tuning.Shape(**given), codes, arguments, path, progress)


def _tune(
    tuning: Any,
    shape: Any,
    codes: tuple[int, ...],
    arguments: argparse.Namespace,
    path: Path,
    progress: Progress,
) -> int:
    table = tuning.sizes.read(tuning.sizes.PATH)
    known = {row.kernel for row in table}
    asked = set(arguments.kernel or known)
    if asked - known:
        raise ValueError(f"--kernel must be one of {', '.join(sorted(known))}, found {min(asked - known)}")
    found: list[Any] = []
    backend = tuning.timer()
    is_wrong = False
    for n_code in sorted(set(codes)):
        for call in tuning.calls(shape, n_code):
            if call.kernel not in asked:
                continue
            name = f"{call.kernel} {n_code:,} codes"
            progress.now(name)
            sizes = tuning.candidates(call.kernel, n_code, shape.width)
            sizes = sizes[:N_QUICK] if arguments.quick else sizes
            tried = list(tuning.attempts(call, sizes, tuning.expected(call), backend))
            timed = sorted((one for one in tried if one.ms is not None), key=lambda one: one.ms)
            for one in (*timed, *(one for one in tried if one.ms is None)):
                result = f"{one.ms:.4g} ms" if one.reason is None else one.reason
                progress.line(f"{name}: {_text(one.size)}: {result}")
            if not timed:
                is_wrong = True
                progress.line(f"{name}: no size is right, the one in use is kept")
                continue
            best = tuning.chosen(call, timed)
            found.append((tuning.Row(call.kernel, n_code, best.size), best.ms))
            new = {(row.kernel, row.n_code) for row, _ in found}
            kept = [row for row in table if (row.kernel, row.n_code) not in new]
            tuning.write(path, found, shape, kept)
    progress.line(f"table: {path}")
    return 1 if is_wrong else 0


def _text(size: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in size._asdict().items())
