"""The command line: `python -m bench scaling`, `python -m bench decode`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import host, runner, session
from bench.job import DIRECTIONS, DTYPES, STEP, WINDOW_SINKS, Job, is_windowed
from bench.registry import BACKENDS, MECHANISMS, default_mechanisms
from vq_common import TransformerConfig, load_config
from vq_common.config import DEVICES

OUT = Path(__file__).resolve().parent / "results" / "local"
DECODED = ("vq_qk", "vq_k", "vq_qk_window", "exact")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    main = argparse.ArgumentParser(prog="python -m bench", description="Measure attention mechanisms.")
    suites = main.add_subparsers(dest="suite", required=True, metavar="suite")
    scaling = suites.add_parser(
        "scaling",
        help="time against sequence length",
        description="Time of a call against sequence length, of every mechanism in both backends, on "
        "q, k and v of real text. Everything is verified before it is timed: outputs, and gradients where "
        "they are timed. What is not given here is read from --config.",
    )
    add = scaling.add_argument
    add(
        "--direction",
        choices=DIRECTIONS,
        default=DIRECTIONS[0],
        help="what is timed: a forward call, the backward pass alone (the pullback of a random cotangent to "
        "q, k and v, on what an untimed forward pass saved), or both in one call; default: fwd",
    )
    form = scaling.add_mutually_exclusive_group()
    form.add_argument("--causal", action="store_true", help="only causal attention; default: both forms")
    form.add_argument("--full", action="store_true", help="only attention that is not causal")
    every = ", ".join(name for name in MECHANISMS if not is_windowed(name))
    windowed = ", ".join(name for name in MECHANISMS if is_windowed(name))
    _add_common(
        scaling,
        f"repeatable; default: {every}; with --mem-len or --n-sink also {windowed}, which are causal only",
        f"{OUT / 'scaling'}, with the direction after it unless that is fwd",
    )
    decode = suites.add_parser(
        "decode",
        help="time and memory of a token against context",
        description="Time of one token against the number of tokens before it: VQ-attention that goes on "
        "from a state of constant size, beside exact attention to a cache of all keys and values. The state "
        "comes from feeding that many tokens. Everything is verified before it is timed.",
    )
    _add_common(decode, f"repeatable; default: {', '.join(DECODED)}", str(OUT / "decode"))
    return main


def _add_common(suite: argparse.ArgumentParser, mechanisms: str, out: str) -> None:
    add = suite.add_argument
    add("--config", type=Path, default=Path("conf.yml"), metavar="FILE", help="default: conf.yml")
    add("--backend", choices=(*BACKENDS, "both"), default="both", help="default: both, of those installed")
    add("--mechanism", action="append", choices=tuple(MECHANISMS), help=mechanisms)
    add("--lengths", type=_positive, nargs="+", metavar="T", help="sequence lengths, in tokens")
    add("--dtype", choices=DTYPES, help="of q, k and v")
    add("--n-head", type=_positive, metavar="H")
    add("--d-k", type=_positive, metavar="D", help="query and key width of a head")
    add("--d-v", type=_positive, metavar="V", help="value width of a head")
    add("--n-code", type=_positive, metavar="C", help="codes of both codebooks")
    add("--block-len", type=_positive, metavar="L", help="block of causal VQ-attention")
    window = f"of the window form; with neither of the two, one block and {WINDOW_SINKS} first tokens"
    add("--mem-len", type=_natural, metavar="M", help=f"exact tokens before the block {window}")
    add("--n-sink", type=_natural, metavar="N", help="exact first tokens of the window form")
    add("--batch", type=_positive, default=1, metavar="B", help="sequences in a call; default: 1")
    add("--device", choices=DEVICES, help="a device that is named is required")
    add("--random", action="store_true", help="Gaussian q, k, v instead of real text")
    add("--resume", action="store_true", help="go on with the records in --out")
    add("--out", type=Path, metavar="DIR", help=f"default: {out}".replace(f"{host.ROOT}/", ""))
    add("--max-run-s", type=float, metavar="S", help="seconds after which no further point is started")


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {value}")
    return value


def _positive(text: str) -> int:
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
    limits = {"lengths": arguments.lengths, "max_run_s": arguments.max_run_s}
    bench = dataclasses.replace(config.bench, **{k: v for k, v in limits.items() if v is not None})
    return dataclasses.replace(config, bench=bench, **{k: v for k, v in given.items() if v is not None})


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


def options(arguments: argparse.Namespace) -> session.Options:
    """What to run.

    Raises:
      FileNotFoundError, ValueError, TypeError: an option or a key of the configuration is wrong.
    """
    config = configured(arguments)
    job = Job.of(config, batch=arguments.batch, is_random=arguments.random)
    common = {
        "job": job,
        "bench": config.bench,
        "backends": chosen_backends(arguments.backend, config.device),
        "device": config.device,
        "is_resume": arguments.resume,
        "suite": arguments.suite,
    }
    if arguments.suite == "decode":
        return session.Options(
            mechanisms=tuple(dict.fromkeys(arguments.mechanism or DECODED)),
            causal=(True,),
            out=arguments.out or OUT / "decode",
            direction=STEP,
            **common,
        )
    direction = arguments.direction
    return session.Options(
        mechanisms=tuple(dict.fromkeys(arguments.mechanism or default_mechanisms(job))),
        causal=(True,) if arguments.causal else (False,) if arguments.full else (False, True),
        out=arguments.out or OUT / (f"scaling_{direction}" if direction != "fwd" else "scaling"),
        direction=direction,
        **common,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    arguments = parser().parse_args(argv)
    try:
        return runner.run(options(arguments))
    except (FileNotFoundError, ValueError, TypeError, session.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
