"""`python -m bench capture`: q, k, v of pretrained models, for the suite `accuracy`."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench import accuracy, captures, host, models
from bench.arguments import positive
from bench.models import MODELS, Source
from bench.progress import Progress
from vq_common.tolerances import relative_rms

HELP = "q, k, v of pretrained models, for the suite accuracy"
DESCRIPTION = (
    "Runs pretrained models that packages carry on the plays of Shakespeare and keeps q, k and v of some of "
    "their attention layers, outside the tree: windows of tragedies to evaluate on, of comedies to fit "
    "codebooks on. Needs the extra 'capture', and the packages with the weights and the text."
)
N_FIT = 8192  # tokens that codebooks are fitted on
N_EVALUATED = 2048  # tokens that are evaluated on, in whole windows
LIMIT = 1e-4  # of the relative RMS difference between the model's own output and that of the arrays


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    add = parser.add_argument
    add("--model", action="append", choices=tuple(MODELS), help="repeatable; default: all")
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of layers, from 0; negative ones count from the last; default: the first, the middle "
        "and the last",
    )
    lengths = ", ".join(f"{model.length:,} ({name})" for name, model in MODELS.items())
    add("--length", type=positive, metavar="T", help=f"tokens of a window; default: {lengths}")
    add("--out", type=Path, metavar="DIR", help="default: vq-attention/captures in the user's cache")


def run(arguments: argparse.Namespace) -> int:
    """Run the suite; its exit code.

    Raises:
      ValueError: a package is not installed, or a model has no such layer or length.
    """
    names = tuple(dict.fromkeys(arguments.model or MODELS))
    out = arguments.out or captures.default_folder()
    if out.resolve().is_relative_to(host.ROOT):
        raise ValueError(f"captures are large: --out must be outside {host.ROOT}, found {out}")
    models.check_installed(names)
    with Progress() as progress:
        for name in names:
            progress.line(f"{name}: reading the model")
            source = models.load(name)
            length = arguments.length or MODELS[name].length
            _write(out, name, source, _layers(name, source, arguments.layers), length, progress)
        progress.line(f"captures: {out}")
    return 0


def _layers(name: str, source: Source, asked: list[int] | None) -> list[int]:
    n_layer = source.n_layer
    wrong = [number for number in asked or [] if not -n_layer <= number < n_layer]
    if wrong:
        raise ValueError(f"{name} has layers 0 to {n_layer - 1}, found {', '.join(map(str, wrong))}")
    return sorted({number % n_layer for number in asked or (0, n_layer // 2, n_layer - 1)})


def _write(out: Path, name: str, source: Source, layers: list[int], length: int, progress: Progress) -> None:
    if length > source.max_length:
        raise ValueError(f"{name} takes at most {source.max_length:,} tokens, found {length:,}")
    model = MODELS[name]
    counts = {
        models.EVALUATED: max(N_EVALUATED // length, 1),
        models.FITTED: -(-N_FIT // length),
    }
    pieces = {
        kind: models.record(source, kind, layers, count=count, length=length, now=progress.now)
        for kind, count in counts.items()
    }
    errors = {}
    found = {}
    for number in layers:
        evaluated, fitted = (pieces[kind][number] for kind in (models.EVALUATED, models.FITTED))
        errors[number] = _check(f"{name}/{number}", evaluated, model.is_causal)
        found[number] = _arrays(evaluated, "") | {
            key: x for key, x in _arrays(fitted, "fit_").items() if key != "fit_v"
        }
        progress.line(f"{name}/{number}: its own attention is met within {errors[number]:.0e}")
    first = found[layers[0]]
    about = {
        "model": name,
        "package": model.package,
        "weights": model.weights,
        "text": f"Shakespeare, {models.TEXT}: {models.EVALUATED} to evaluate on, {models.FITTED} to fit on",
        "versions": host.versions((model.package, models.TEXT, "transformers", "torch")),
        "is_causal": model.is_causal,
        "length": length,
        "windows": counts[models.EVALUATED],
        "fit_windows": counts[models.FITTED],
        "query_heads": first["q"].shape[2],
        "key_heads": first["k"].shape[2],
        "width": first["q"].shape[3],
        "value_width": first["v"].shape[3],
        "has_rotated": "q_local" in first,
        "n_layer": source.n_layer,
        "attention_error": {str(number): error for number, error in errors.items()},
    }
    captures.write(out, name, about, found)


def _arrays(found: captures.Arrays, prefix: str) -> captures.Arrays:
    """As a capture names them."""
    if "q_before" not in found:
        return {f"{prefix}{name}": found[name] for name in ("q", "k", "v")}
    rotated = {f"{prefix}{name}_local": found[name] for name in ("q", "k")}
    return (
        {f"{prefix}{name}": found[f"{name}_before"] for name in ("q", "k")}
        | rotated
        | {f"{prefix}v": found["v"]}
    )


def _check(layer: str, found: captures.Arrays, is_causal: bool) -> float:
    """Relative RMS difference of attention on the first window's arrays to what the model computed."""
    n_head = found["q"].shape[2]
    q, k, v = (found[name][:1].astype(np.float64) for name in ("q", "k", "v"))
    k, v = (np.repeat(x, n_head // x.shape[2], axis=2) for x in (k, v))
    out: Any = accuracy.exact_attention(q, k, v, is_causal=is_causal)
    error = relative_rms(out, found["out"][:1])
    if not error <= LIMIT:
        raise ValueError(f"{layer}: what was captured is not its attention: error {error:.1e}, limit {LIMIT}")
    return error
