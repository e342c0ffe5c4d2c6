"""Whole calls at the lengths that kernels are for, beside plain XLA in float32: outputs and gradients.

Other tests make kernels run on short sequences; here each runs because of the shape.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

import jax_vq
from jax_vq.ops import implementations
from vq_common.tolerances import TOLERANCES

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="kernels run there")
LENGTH = 2**18
WINDOW = {"block_len": 512, "mem_len": 512, "n_sink": 4}

Pair = tuple[Array, ...]


def call(arrays: Pair, d_out: Array, books: Pair, dtype: str, **options: Any) -> Pair:
    """The output and the gradients of q, k and v, computed in `dtype`."""
    primals = [x.astype(dtype) for x in arrays]
    out, pull = jax.vjp(lambda *qkv: jax_vq.vq_attention(*qkv, *books, **options), *primals)
    return out, *pull(d_out.astype(dtype))


def inputs(n_code: int, n_head: int, width: int, dtype: str, spread: float) -> tuple[Pair, Array, Pair]:
    """q, k, v; what is pulled back; codebooks. Scores have the standard deviation `spread` squared."""
    keys = jax.random.split(jax.random.key(n_code), 6)
    shape = 1, LENGTH, n_head, width
    q, k, v, d_out = (jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys[:4])
    books = (spread * jax.random.normal(key, (n_head, n_code, width), jnp.float32) for key in keys[4:])
    return (spread * q, spread * k, v), d_out, tuple(books)


@jax.jit
def errors(found: Pair, expected: Pair) -> list[Array]:
    """Relative RMS of each, on the device: the arrays have gigabytes."""

    def rms(x: Array) -> Array:
        return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))

    return [rms(x.astype(jnp.float32) - y) / rms(y) for x, y in zip(found, expected, strict=True)]


@on_gpu
@pytest.mark.parametrize(
    "dtype, n_code, shape, spread, options",
    [
        ("bfloat16", 128, (16, 128), 1.0, {"is_causal": True}),
        ("bfloat16", 128, (16, 128), 5.0, {"is_causal": True}),
        ("bfloat16", 128, (16, 128), 1.0, {"is_causal": False}),
        ("bfloat16", 512, (16, 128), 1.0, {"is_causal": True}),
        ("bfloat16", 512, (16, 128), 5.0, {"is_causal": True}),
        ("bfloat16", 512, (16, 128), 1.0, {"is_causal": False}),
        ("bfloat16", 512, (16, 128), 1.0, {"is_causal": True, **WINDOW}),
        ("float32", 128, (1, 512), 1.0, {"is_causal": True}),
        ("float32", 128, (1, 512), 1.0, {"is_causal": False}),
    ],
)
def test_long_calls_are_those_of_plain_xla(
    dtype: str, n_code: int, shape: tuple[int, int], spread: float, options: dict[str, Any]
) -> None:
    """Scores of a spread of 5 are wide: kernels leave them to others."""
    given = inputs(n_code, *shape, dtype, spread)
    run = {name: partial(call, implementation=name, **options) for name in (None, "xla")}
    qkv, _, books = given
    ran = implementations.what_runs(partial(jax_vq.vq_attention, **options), *qkv, *books)
    assert ran & {"mosaic_gpu", "triton"}
    found = jax.jit(partial(run[None], dtype=dtype))(*given)
    expected = jax.jit(partial(run["xla"], dtype="float32"))(*given)
    limit = TOLERANCES[dtype]
    n_rounded = 2 if dtype == "float32" else 1  # results that are each rounded so
    for name, error in zip(("out", "d_q", "d_k", "d_v"), errors(found, expected), strict=True):
        assert error <= n_rounded * (limit.forward if name == "out" else limit.gradient), (name, float(error))
