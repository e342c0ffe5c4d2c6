"""Saved weights: bitwise round trips within and between backends, nested modules, and errors."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flax import nnx
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import jax_vq
import torch_ref
from parity_tests.modules import HYPER, jax_module, make_config, torch_module
from parity_tests.support import DTYPES
from vq_common import TransformerConfig
from vq_common.module_oracle import MECHANISMS, weight_dtype, weight_shapes


class Backend(NamedTuple):
    save: Callable[[Any, Path], None]
    load: Callable[[Any, Path], None]
    module: Callable[..., Any]
    pair: Callable[[TransformerConfig], Any]  # a user's module with attention modules inside


class JaxPair(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.first = jax_vq.VQAttentionQK(config, rngs=rngs)
        self.layers = nnx.List(
            [jax_vq.VQAttention(config, rngs=rngs), jax_vq.HyperAttention(config, rngs=rngs)]
        )
        self.embedding = nnx.Embed(5, config.d_model, rngs=rngs)
        self.out = nnx.Linear(config.d_model, 3, rngs=rngs)


class TorchPair(torch.nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.first = torch_ref.VQAttentionQK(config)
        self.layers = torch.nn.ModuleList([torch_ref.VQAttention(config), torch_ref.HyperAttention(config)])
        self.embedding = torch.nn.Embedding(5, config.d_model)
        self.out = torch.nn.Linear(config.d_model, 3)


SEEDS = itertools.count()
JAX = Backend(
    jax_vq.save_weights,
    jax_vq.load_weights,
    lambda mechanism, config: jax_module(mechanism, config, seed=next(SEEDS)),
    lambda config: JaxPair(config, nnx.Rngs(next(SEEDS))),
)
TORCH = Backend(torch_ref.save_weights, torch_ref.load_weights, torch_module, TorchPair)
BACKENDS = pytest.mark.parametrize("backend", [JAX, TORCH], ids=["jax", "torch"])
WAYS = pytest.mark.parametrize(
    "one, other",
    [(JAX, JAX), (TORCH, TORCH), (JAX, TORCH), (TORCH, JAX)],
    ids=["jax", "torch", "jax_to_torch", "torch_to_jax"],
)


def assert_same(first: Path, second: Path) -> None:
    """Two files hold the same names, types and bits."""
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_round_trip(mechanism: str, dtype: str, one: Backend, other: Backend, tmp_path: Path) -> None:
    """A new module's weights, read by another new one and saved again."""
    config = make_config(dtype, param_dtype=dtype, mem_len=3, conv_width=4)
    one.save(one.module(mechanism, config), tmp_path / "first")
    module = other.module(mechanism, config)
    other.save(module, tmp_path / "before")
    other.load(module, tmp_path / "first")
    other.save(module, tmp_path / "second")
    assert_same(tmp_path / "first", tmp_path / "second")

    saved, before = load_file(tmp_path / "first"), load_file(tmp_path / "before")
    shapes = weight_shapes(mechanism, config, n_projection=HYPER["n_projection"])
    assert {name: array.shape for name, array in saved.items()} == shapes
    for name, array in saved.items():
        assert str(array.dtype) == weight_dtype(name, config)
    assert (saved["q_proj.weight"] != before["q_proj.weight"]).mean() > 0.9


@WAYS
def test_nested_modules(one: Backend, other: Backend, tmp_path: Path) -> None:
    """A user's module with attention modules in attributes and lists, beside other layers."""
    config = make_config("float32")
    one.save(one.pair(config), tmp_path / "first")
    module = other.pair(config)
    other.load(module, tmp_path / "first")
    other.save(module, tmp_path / "second")
    assert_same(tmp_path / "first", tmp_path / "second")
    names = {
        *(f"first.{name}" for name in weight_shapes("VQAttentionQK", config)),
        *(f"layers.0.{name}" for name in weight_shapes("VQAttention", config)),
        *(f"layers.1.{name}" for name in weight_shapes("HyperAttention", config)),
        "embedding.weight",
        "out.weight",
        "out.bias",
    }
    assert load_file(tmp_path / "first").keys() == names


@BACKENDS
def test_a_wider_module_takes_a_narrower_file(backend: Backend, tmp_path: Path) -> None:
    half = make_config("bfloat16", param_dtype="bfloat16")
    backend.save(backend.module("VQAttention", half), tmp_path / "half")
    module = backend.module("VQAttention", make_config("float64"))
    backend.load(module, tmp_path / "half")
    backend.save(module, tmp_path / "double")
    narrow, wide = load_file(tmp_path / "half"), load_file(tmp_path / "double")
    for name, array in narrow.items():
        assert str(wide[name].dtype) == ("bool" if name.endswith("is_fitted") else "float64")
        np.testing.assert_array_equal(wide[name], array.astype(wide[name].dtype))


Arrays = dict[str, NDArray[Any]]


def _without(arrays: Arrays) -> Arrays:
    return {name: a for name, a in arrays.items() if name != "q_proj.weight"}


def _misspelt(arrays: Arrays) -> Arrays:
    return {name.replace("q_proj", "q_porj"): a for name, a in arrays.items()}


def _transposed(arrays: Arrays) -> Arrays:
    return arrays | {"q_proj.weight": np.ascontiguousarray(arrays["q_proj.weight"].T)}


def _wide(arrays: Arrays) -> Arrays:
    return arrays | {"q_proj.weight": arrays["q_proj.weight"].astype(np.float64)}


@BACKENDS
@pytest.mark.parametrize(
    "change, error, messages",
    [
        (_without, ValueError, ["missing q_proj.weight"]),
        (lambda a: a | {"more": np.ones(3)}, ValueError, ["left over more"]),
        (
            _misspelt,
            ValueError,
            [
                "missing q_proj.weight, did you mean 'q_porj.weight'?",
                "left over q_porj.weight, did you mean 'q_proj.weight'?",
            ],
        ),
        (_transposed, ValueError, ["q_proj.weight is (23, 33), the module has (33, 23)"]),
        (_wide, TypeError, ["q_proj.weight is float64", "lose precision", "float32"]),
        (
            lambda a: a | {"quantizer_k.is_fitted": np.ones(())},
            TypeError,
            ["quantizer_k.is_fitted is float64"],
        ),
    ],
    ids=["missing", "left_over", "misspelt", "misshapen", "too_wide", "not_boolean"],
)
def test_a_file_that_does_not_fit(
    backend: Backend, change: Any, error: type[Exception], messages: list[str], tmp_path: Path
) -> None:
    """One error that names what is wrong; the module stays as it was."""
    config = make_config("float32")
    backend.save(backend.module("VQAttention", config), tmp_path / "good")
    save_file(change(load_file(tmp_path / "good")), tmp_path / "bad")
    module = backend.module("VQAttention", config)
    backend.save(module, tmp_path / "before")
    with pytest.raises(error) as caught:
        backend.load(module, tmp_path / "bad")
    for message in (str(tmp_path / "bad"), *messages):
        assert message in str(caught.value)
    backend.save(module, tmp_path / "after")
    assert_same(tmp_path / "before", tmp_path / "after")


@BACKENDS
def test_a_file_of_another_mechanism(backend: Backend, tmp_path: Path) -> None:
    config = make_config("float32")
    backend.save(backend.module("VQAttentionQK", config), tmp_path / "file")
    with pytest.raises(ValueError, match=r"left over quantizer_q.count.*; left over quantizer_q.is_fitted"):
        backend.load(backend.module("VQAttention", config), tmp_path / "file")


@BACKENDS
def test_nothing_is_left_where_a_file_cannot_be_written(backend: Backend, tmp_path: Path) -> None:
    module = backend.module("MultiHeadAttention", make_config("float32"))
    with pytest.raises(FileNotFoundError, match="no_such_folder is not a directory"):
        backend.save(module, tmp_path / "no_such_folder" / "weights")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        backend.save(module, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@BACKENDS
def test_a_file_that_cannot_be_read(backend: Backend, tmp_path: Path) -> None:
    module = backend.module("MultiHeadAttention", make_config("float32"))
    with pytest.raises(FileNotFoundError):
        backend.load(module, tmp_path / "absent")
    (tmp_path / "text").write_text("no weights here", encoding="utf-8")
    with pytest.raises(ValueError, match="text is not a safetensors file"):
        backend.load(module, tmp_path / "text")


@BACKENDS
def test_saving_replaces_a_file(backend: Backend, tmp_path: Path) -> None:
    """Also under a path given as text."""
    (tmp_path / "weights").write_text("an old file", encoding="utf-8")
    backend.save(backend.module("MultiHeadAttention", make_config("float32")), str(tmp_path / "weights"))  # type: ignore[arg-type]
    assert "res_proj.weight" in load_file(tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
