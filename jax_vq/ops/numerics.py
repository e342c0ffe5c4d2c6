"""Accumulator types, chunking and containment of non-finite values."""

import re
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

Carry = TypeVar("Carry")

CHUNK_BYTES = 16 * 2**20  # of temporaries on a CPU: more falls out of its caches
GPU_FACTOR = 32  # a GPU needs more work at once: half of it takes 11 % longer, twice as much saves 3 %
N_PART = 3  # bfloat16 numbers that hold a float32: all of its bits


def acc_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Type of scores, statistics and accumulators: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def precision_for(dtype: jnp.dtype) -> lax.Precision:
    """Highest for float32 and float64 (no TF32); half types multiply exactly anyway."""
    return lax.Precision.HIGHEST if dtype in (jnp.float32, jnp.float64) else lax.Precision.DEFAULT


def einsum(spec: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` of two arrays of one type, accumulated and returned in `acc_dtype`."""
    options = {"precision": precision_for(x.dtype), "preferred_element_type": acc_dtype(x.dtype)}
    if x.dtype.itemsize > 2 or jax.default_backend() != "cpu":
        return jnp.einsum(spec, x, y, **options)
    # Half types on a CPU: x on the left. XLA has no such product whose left operand is not contracted
    # over its last axis; it casts them, but not where it swaps axes of a table [K, C, D] itself, and then
    # ends with "Unsupported element type for DotThunk". jnp.einsum takes the order that gives `found`.
    left, right, out = re.split(",|->", spec)
    shared = [axis for axis in out if axis in left and axis in right]
    found = "".join([*shared, *(axis for axis in left + right if axis in out and axis not in shared)])
    product = jnp.einsum(f"{left},{right}->{found}", x, y, **options)
    return jnp.transpose(product, [found.index(axis) for axis in out])


def split(x: Array, n_part: int = N_PART) -> list[Array]:
    """Float32 as bfloat16 arrays that sum to it, to so many terms.

    To the nearest, so that what a term leaves over is small. `reduce_precision` and no cast: XLA takes a cast
    to and fro for nothing.
    """
    parts = []
    for _ in range(n_part):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def is_code(codes: Array, n_code: int) -> Array:
    """One-hot codes as booleans: `[...]` to `[..., C]`, all False for a code out of range."""
    return codes[..., None] == lax.broadcasted_iota(codes.dtype, (*codes.shape, n_code), codes.ndim)


def chunk_len(like: Array, length: int, bytes_per_token: int, multiple: int = 1) -> int:
    """Tokens to work on at once: at most about `CHUNK_BYTES`, a power of two times `multiple`.

    So a length that is a power of two has no shorter chunk, which would be compiled apart.

    A GPU, which jax compiles for when there is one, gets `GPU_FACTOR` times as much.
    """
    budget = CHUNK_BYTES if jax.default_backend() == "cpu" else CHUNK_BYTES * GPU_FACTOR
    n_part = max(budget // max(bytes_per_token, 1) // multiple, 1)
    return min(2 ** (n_part.bit_length() - 1), -(-length // multiple)) * multiple


def scan_chunks(
    step: Callable[[Carry, Array | int, int], Carry],
    carry: Carry,
    length: int,
    chunk: int,
    *,
    is_reverse: bool = False,
) -> Carry:
    """Fold `step(carry, start, size)` over the chunks of `[0, length)`; only the last is shorter."""
    n_full, rest = divmod(length, chunk)
    if rest and is_reverse:
        carry = step(carry, n_full * chunk, rest)
    if n_full == 1:
        carry = step(carry, 0, chunk)
    elif n_full > 1:
        starts = jnp.arange(n_full, dtype=jnp.int32) * chunk
        carry, _ = lax.scan(lambda c, start: (step(c, start, chunk), None), carry, starts, reverse=is_reverse)
    if rest and not is_reverse:
        carry = step(carry, n_full * chunk, rest)
    return carry


def read_chunk(x: Array, start: Array | int, size: int) -> Array:
    """`x[:, start : start + size]`.

    The barrier ties x to the loop: XLA on a CPU casts half types to slice them, and would else
    move the cast of all of x in front of the loop.
    """
    x, start = lax.optimization_barrier((x, start))
    return row_major(lax.dynamic_slice_in_dim(x, start, size, axis=1))


def write_chunk(x: Array, chunk: Array, start: Array | int) -> Array:
    """`x` with `chunk` at `x[:, start:]`, in place under jit."""
    return lax.dynamic_update_slice_in_dim(x, row_major(chunk), start, axis=1)


def row_major(x: Array) -> Array:
    """x, laid out in memory as it is indexed.

    XLA on a GPU would else lay out the whole array that a loop reads or writes as the products
    inside the loop like it best, at the price of a copy of all of it.
    """
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def is_finite_row(x: Array) -> Array:
    """Whether a whole vector is finite: `[..., D]` to `[...]`."""
    return jnp.all(jnp.isfinite(x), axis=-1)


def poison_values(k: Array, v: Array) -> Array:
    """`v [..., V]` with NaN for every key of `k [..., D]` that is not finite.

    A code hides a NaN or inf of its key; its values carry it to the rows that attend to it.
    """
    return jnp.where(is_finite_row(k)[..., None], v, jnp.nan)


def contain_nonfinite(v: Array, axis: int) -> tuple[Array, Array]:
    """Prepare values for a causal product over `axis`: zero times NaN is NaN, and would leak.

    Returns:
      v with 0 for every NaN or inf, and the first index along `axis` (kept, with size 1) of
      one: the product is NaN for the rows from there on.
    """
    bad = ~jnp.isfinite(v)
    first = jnp.where(jnp.any(bad, axis, keepdims=True), jnp.argmax(bad, axis, keepdims=True), v.shape[axis])
    return jnp.where(bad, 0, v), first
