"""Weights and codebook state in one safetensors file, of one naming in both backends.

Names are dotted paths of attributes; a matrix is `weight [out, in]`, as in PyTorch. So a file
that jax wrote loads in `torch_ref`, and back.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vq_common.weights import check_weights, whole_file

# What Flax calls a layer's `weight`; that of Linear is transposed.
_WEIGHTS = {nnx.Linear: "kernel", nnx.LayerNorm: "scale", nnx.RMSNorm: "scale", nnx.Embed: "embedding"}


class _Entry(NamedTuple):
    variable: nnx.Variable
    is_matrix: bool  # stored transposed


def save_weights(module: nnx.Module, path: str | Path) -> None:
    """Write the parameters and state of `module` to a safetensors file.

    Random streams are not part of it. The file appears whole or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    arrays = {name: _stored(entry) for name, entry in _entries(module).items()}
    with whole_file(path) as partial:
        save_file(arrays, partial)


def load_weights(module: nnx.Module, path: str | Path) -> None:
    """Read a file of `save_weights`, of either backend, into `module`, in place.

    A wider type of the module takes a narrower one of the file; never the reverse.

    Raises:
      ValueError, TypeError: not such a file, a name is missing or left over, a shape differs, a
        value would lose precision; the module is then unchanged.
      OSError: the file cannot be read.
    """
    entries = _entries(module)
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    expected = {
        name: (_stored_shape(entry), str(entry.variable[...].dtype)) for name, entry in entries.items()
    }
    check_weights(path, expected, {name: (a.shape, str(a.dtype)) for name, a in arrays.items()})
    for name, entry in entries.items():
        array = arrays[name].T if entry.is_matrix else arrays[name]
        entry.variable[...] = jnp.asarray(array, entry.variable[...].dtype)


def _entries(module: nnx.Module) -> dict[str, _Entry]:
    entries = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if isinstance(variable, nnx.RngState):
            continue
        owner, leaf = _at(module, path[:-1]), path[-1]
        is_weight = leaf == _weight_name(owner)
        name = ".".join(map(str, (*path[:-1], "weight" if is_weight else leaf)))
        entries[name] = _Entry(_at(module, path), is_weight and leaf == "kernel")
    return entries


def _weight_name(layer: Any) -> str | None:
    return next((name for kind, name in _WEIGHTS.items() if isinstance(layer, kind)), None)


def _at(module: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        module = getattr(module, part) if isinstance(part, str) else module[part]
    return module


def _stored(entry: _Entry) -> np.ndarray:
    array = np.asarray(entry.variable[...])
    return np.asarray(array.T if entry.is_matrix else array, order="C")


def _stored_shape(entry: _Entry) -> tuple[int, ...]:
    shape = entry.variable[...].shape
    return shape[::-1] if entry.is_matrix else shape
