"""Every bad input gives its error, in both backends alike: type, argument and shapes, before any compute."""

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.utils._python_dispatch import TorchDispatchMode

import jax_vq
import torch_ref
from parity_tests.error_cases import ERRORS, VALID, B, Bad, C, D, H, T, X, f32, mistyped, wrong
from parity_tests.support import to_numpy

CONFIG = jax_vq.TransformerConfig(d_model=15, n_head=H, n_code=C, block_len=4)
COMPUTE = {"mm", "bmm", "addmm", "exp", "argmax", "sort", "cumsum", "gather", "index", "native_layer_norm"}


def name_of(bad: Bad) -> str:
    return f"{bad.op} {bad.message}".strip().replace("…", "...")


def raises(bad: Bad) -> Any:
    return pytest.raises(bad.error, match=re.escape(bad.message).replace("…", ".*"))


def call(package: Any, op: str, arguments: dict[str, Any]) -> Any:
    arguments = dict(arguments)
    if op == "ema_update":
        arguments = {
            "state": package.CodebookState(arguments.pop("count"), arguments.pop("sum")),
            **arguments,
        }
    return getattr(package, op)(**arguments)


def on_jax(value: Any) -> Any:
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def on_torch(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


class NoCompute(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in COMPUTE
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", VALID)
@pytest.mark.parametrize("package, convert", [(jax_vq, on_jax), (torch_ref, on_torch)], ids=["jax", "torch"])
def test_the_unchanged_call_is_valid(package: Any, convert: Callable[[Any], Any], op: str) -> None:
    call(package, op, {name: convert(value) for name, value in VALID[op].items()})


@pytest.mark.parametrize("bad", ERRORS, ids=name_of)
def test_jax(bad: Bad) -> None:
    arguments = {name: on_jax(value) for name, value in {**VALID[bad.op], **bad.changes}.items()}
    with raises(bad):
        call(jax_vq, bad.op, arguments)


@pytest.mark.parametrize("bad", [bad for bad in ERRORS if not bad.is_value], ids=name_of)
def test_jax_while_it_traces(bad: Bad) -> None:
    arguments = {name: on_jax(value) for name, value in {**VALID[bad.op], **bad.changes}.items()}
    arrays = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    with raises(bad):
        jax.eval_shape(lambda traced: call(jax_vq, bad.op, {**arguments, **traced}), arrays)


@pytest.mark.parametrize("bad", ERRORS, ids=name_of)
def test_torch(bad: Bad) -> None:
    arguments = {name: on_torch(value) for name, value in {**VALID[bad.op], **bad.changes}.items()}
    with raises(bad), NoCompute():
        call(torch_ref, bad.op, arguments)


# --- modules -------------------------------------------------------------------------------------

MODULES = ("MultiHeadAttention", "VQAttention", "VQAttentionQK", "HyperAttention")
SHORT_MASK, INTEGER_MASK = np.ones((B, T - 1), bool), np.ones((B, T), np.int32)
ON_MODULES = (
    wrong("", "x must be [B, T, d_model] with d_model = 15, found (2, 9, 14)", x=f32(B, T, 14)),
    wrong("", "x must have 3 axes, found shape (9, 15)", x=f32(T, 15)),
    wrong("", "x must not be empty, found shape (0, 9, 15)", x=f32(0, T, 15)),
    mistyped("", "x must be one of …, found …int32", x=np.ones((B, T, 15), np.int32)),
    mistyped("", "x must be a…, found list", x=[[[0.0]]]),
    wrong("", "mask must be …, found mask (2, 8) and …", mask=SHORT_MASK),
    wrong("", "mask must have 2 axes, found shape (9,)", mask=np.ones(T, bool)),
    mistyped("", "mask must be boolean …, found …int32", mask=INTEGER_MASK),
    mistyped("", "mask must be a…, found list", mask=[[True]]),
)
ON_QUANTIZERS = (
    wrong("", "codebook must be …, found codebook (3, 6, 5) and x (2, 9, 3, 6)", x=f32(B, T, H, D + 1)),
    wrong("", "codebook must be …, found codebook (3, 6, 5) and x (2, 9, 4, 5)", x=f32(B, T, H + 1, D)),
    wrong("", "x must have 4 axes, found shape (2, 9, 5)", x=f32(B, T, D)),
    mistyped("", "x must be one of …, found …int32", x=X.astype("int32")),
    mistyped("", "codebook must have the dtype of x …, found …float32 for …float64", x=X.astype("float64")),
    mistyped("", "x must be a…, found list", x=X.tolist()),
    wrong("", "mask must be …, found mask (2, 8) and x (2, 9, 3, 5)", mask=SHORT_MASK),
    mistyped("", "mask must be boolean …, found …int32", mask=INTEGER_MASK),
    mistyped("", "mask must be a…, found list", mask=[[True]]),
)
SETTINGS = (
    wrong("LearnableVQ", "n_code must be an int >= 1, found 0", n_code=0),
    mistyped("LearnableVQ", "n_code must be an int >= 1, found True (bool)", n_code=True),
    wrong("HyperAttention", "block_size must be an int >= 1, found 0", block_size=0),
    mistyped("HyperAttention", "n_projection must be an int >= 1, found 1.5 (float)", n_projection=1.5),
    wrong("HyperAttention", "n_sample must be an int >= 0, found -1", n_sample=-1),
    mistyped("HyperAttention", "min_seq_len must be an int >= 1, found None (NoneType)", min_seq_len=None),
)


def make(backend: str, name: str, **settings: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A module and how to make its arrays."""
    if backend == "jax":
        return getattr(jax_vq, name)(CONFIG, rngs=nnx.Rngs(0), **settings), on_jax
    return getattr(torch_ref, name)(CONFIG, **settings), on_torch


each_backend = pytest.mark.parametrize("backend", ["jax", "torch"])


@each_backend
@pytest.mark.parametrize("bad", ON_MODULES, ids=name_of)
@pytest.mark.parametrize("name", MODULES)
def test_modules(backend: str, name: str, bad: Bad) -> None:
    module, convert = make(backend, name)
    arguments = {"x": f32(B, T, 15), "mask": None} | bad.changes
    with raises(bad):
        module(**{key: convert(value) for key, value in arguments.items()})


@each_backend
@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("bad", ON_QUANTIZERS, ids=name_of)
def test_quantizer(backend: str, is_training: bool, bad: Bad) -> None:
    """The error leaves the codebook as it was."""
    module, convert = make(backend, "LearnableVQ")
    module.train() if is_training else module.eval()
    before = to_numpy(module.codebook)
    arguments = {"x": X, "mask": None} | bad.changes
    with raises(bad):
        module(**{key: convert(value) for key, value in arguments.items()})
    np.testing.assert_array_equal(to_numpy(module.codebook), before)


@each_backend
@pytest.mark.parametrize("bad", SETTINGS, ids=name_of)
def test_settings(backend: str, bad: Bad) -> None:
    with raises(bad):
        make(backend, bad.op, **bad.changes)


# --- JAX without 64 bits -------------------------------------------------------------------------


def test_an_array_of_64_bits_without_x64_is_an_error_and_no_cast() -> None:
    q, codes = np.zeros((B, T, H, D)), np.zeros((H, C, D))
    is_wide = "is float64 and would become float32: enable jax_enable_x64 or cast it"
    with jax.enable_x64(False):
        with pytest.raises(TypeError, match=f"q {is_wide}"):
            jax_vq.dot_product_attention(q, q, q)
        with pytest.raises(TypeError, match=f"codebook_k {is_wide}"):
            jax_vq.vq_attention(*[q.astype("float32")] * 3, None, codes)
        with pytest.raises(TypeError, match=f"x {is_wide}"):
            jax_vq.nearest_codes(q, codes)
        with pytest.raises(TypeError, match="codes is int64 and would become int32"):
            jax_vq.take_codes(codes.astype("float32"), np.zeros((B, T, H), np.int64))


@pytest.mark.parametrize(
    "name, field", [*product(MODULES, ("dtype", "param_dtype")), ("LearnableVQ", "dtype")]
)
def test_a_float64_module_without_x64_is_an_error(name: str, field: str) -> None:
    config = jax_vq.TransformerConfig(d_model=15, n_head=H, n_code=C, **{field: "float64"})
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64 needs jax_enable_x64, which is off"):
        getattr(jax_vq, name)(config, rngs=nnx.Rngs(0))
