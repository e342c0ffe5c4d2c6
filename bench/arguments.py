"""Options that the suites share, and what they change of the configuration."""

import argparse
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bench import host
from bench.job import DTYPES, WINDOW_SINKS, Job
from bench.registry import BACKENDS, MECHANISMS
from vq_common import TransformerConfig, load_config
from vq_common.config import DEVICES

OUT = Path(__file__).resolve().parent / "results" / "local"

# What --quick makes of the configuration, where no other option says something else.
QUICK = {
    **dict.fromkeys(("n_code", "n_code_q", "n_code_k", "block_len"), 32),
    "d_model": 64,
    "n_head": 2,
    "d_k": 16,
    "d_v": 16,
}
QUICK_BENCH = {
    "lengths": (256, 1024),
    "n_repeat": 3,
    "max_repeat_s": 0.1,
    "n_kmeans": 2,
    "block_size": 32,
    "n_sample": 32,
    "min_seq_len": 256,
}


def add_common(
    suite: argparse.ArgumentParser, mechanisms: str, out: str, left_out: Collection[str] = ()
) -> None:
    """Add the options of a suite that measures, all but those of `left_out`, which are None then."""

    def add(name: str, **settings: Any) -> None:
        if name in left_out:
            suite.set_defaults(**{name.removeprefix("--").replace("-", "_"): None})
        else:
            suite.add_argument(name, **settings)

    add("--config", type=Path, default=Path("conf.yml"), metavar="FILE", help="default: conf.yml")
    add("--backend", choices=(*BACKENDS, "both"), default="both", help="default: both, of those installed")
    add("--mechanism", action="append", choices=tuple(MECHANISMS), help=mechanisms)
    add("--lengths", type=positive, nargs="+", metavar="T", help="sequence lengths, in tokens")
    add("--dtype", choices=DTYPES, help="of q, k and v")
    add("--n-head", type=positive, metavar="H")
    add("--d-k", type=positive, metavar="D", help="query and key width of a head")
    add("--d-v", type=positive, metavar="V", help="value width of a head")
    add("--n-code", type=positive, metavar="C", help="codes of both codebooks")
    add("--block-len", type=positive, metavar="L", help="block of causal VQ-attention")
    window = f"of the window form; with neither of the two, one block and {WINDOW_SINKS} first tokens"
    add("--mem-len", type=natural, metavar="M", help=f"exact tokens before the block {window}")
    add("--n-sink", type=natural, metavar="N", help="exact first tokens of the window form")
    add("--batch", type=positive, default=1, metavar="B", help="sequences in a call; default: 1")
    add("--device", choices=DEVICES, help="a device that is named is required")
    add("--random", action="store_true", help="Gaussian q, k, v instead of real text")
    add("--quick", action="store_true", help="small sizes and short sequences: a look in under a minute")
    add("--resume", action="store_true", help="go on with the records in --out")
    add("--out", type=Path, metavar="DIR", help=f"default: {out}".replace(f"{host.ROOT}/", ""))
    add("--max-run-s", type=float, metavar="S", help="seconds after which no further point is started")
    add("--max-point-s", type=float, metavar="S", help="seconds a call may be predicted to take")


def add_forms(suite: argparse.ArgumentParser) -> None:
    """Add the options that `forms` reads."""
    form = suite.add_mutually_exclusive_group()
    form.add_argument("--causal", action="store_true", help="only causal attention; default: both forms")
    form.add_argument("--full", action="store_true", help="only attention that is not causal")


def forms(arguments: argparse.Namespace) -> tuple[bool, ...]:
    """Values of is_causal that are asked for."""
    return (True,) if arguments.causal else (False,) if arguments.full else (False, True)


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {value}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def configured(arguments: argparse.Namespace) -> TransformerConfig:
    """The configuration of --config, with what the other options change.

    Raises:
      FileNotFoundError, ValueError, TypeError: see `load_config`.
    """
    config = load_config(arguments.config)
    given = {
        "dtype": arguments.dtype,
        "n_head": arguments.n_head,
        "d_k": arguments.d_k,
        "d_v": arguments.d_v,
        "n_code": arguments.n_code,
        "n_code_q": arguments.n_code,
        "n_code_k": arguments.n_code,
        "block_len": arguments.block_len,
        "mem_len": arguments.mem_len,
        "n_sink": arguments.n_sink,
        "device": arguments.device,
    }
    limits = {name: getattr(arguments, name) for name in ("lengths", "max_run_s", "max_point_s")}
    sizes, bench_sizes = (QUICK, QUICK_BENCH) if arguments.quick else ({}, {})
    bench = dataclasses.replace(config.bench, **bench_sizes | _given(limits))
    return dataclasses.replace(config, bench=bench, **sizes | _given(given))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def chosen_backends(backend: str, device: str) -> tuple[str, ...]:
    """The backends to run: those asked for, or of both those that are installed.

    Raises:
      ValueError: one that is needed is not installed, or cannot have the device.
    """
    asked = BACKENDS if backend == "both" else (backend,)
    there = tuple(name for name in asked if host.is_installed(name))
    if not there:
        raise ValueError(f"{' and '.join(asked)} not installed: pip install 'vq-attention[{asked[0]}]'")
    if device == "mps" and "jax" in there:
        raise ValueError("jax has no mps device: add --backend torch")
    for name in asked:
        if name not in there:
            print(f"{name} is not installed: only {there[0]} runs, and nothing is compared")
    return there


def session_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every suite that measures tells `session.Options`, of these options.

    Raises:
      FileNotFoundError, ValueError, TypeError: an option or a key of the configuration is wrong.
    """
    config = configured(arguments)
    return {
        "job": Job.of(config, batch=arguments.batch, is_random=arguments.random),
        "bench": config.bench,
        "backends": chosen_backends(arguments.backend, config.device),
        "device": config.device,
        "is_resume": arguments.resume,
        "suite": arguments.suite,
    }
