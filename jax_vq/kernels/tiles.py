"""What the GPU kernels share: tiles of tokens, and products.

A program gets every array whole and reads tiles of it, whose sizes are powers of two; what lies outside is
masked. Sums over tokens per code are products with one-hot codes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.ops.implementations import runs
from jax_vq.ops.numerics import N_PART

NARROW = 16  # columns of the narrowest product

Rows = tuple[Any, Any]  # a slice of an axis, and which of its entries there are; None: all
F32, BF16 = jnp.float32, jnp.bfloat16
HIGH_BITS = np.int32(-(2**16))  # of a float32 number: those that bfloat16 has


def is_interpreted() -> bool:
    """Whether kernels run step by step as XLA code, for want of a GPU."""
    return jax.default_backend() == "cpu"


def launch(
    kernel: Callable[..., None],
    out_shape: Any,
    grid: tuple[int, ...],
    n_warp: int,
    n_stage: int,
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """A kernel as a function of its input arrays: compiled, or interpreted where there is no GPU.

    `aliases` are inputs whose memory, with what is in it, outputs take.

    A kernel is made without 64-bit types, also where jax has them: Triton got a loop inside a loop wrong
    whose counter had 64 bits.
    """
    call = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        input_output_aliases=aliases or {},
        compiler_params=plt.CompilerParams(num_warps=n_warp, num_stages=n_stage),
        interpret=is_interpreted(),
    )
    return without_64_bits("triton", call)


def barrier() -> None:
    """Have a program's threads wait for one another, and see what they wrote."""
    if not is_interpreted():
        plt.debug_barrier()


def without_64_bits(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is made without 64-bit types; while `what_runs` asks, it says its language's name."""

    def run(*arrays: Array) -> Any:
        runs(name)
        with jax.enable_x64(False):
            return call(*arrays)

    return run


def power_of_two(n: int, low: int = NARROW) -> int:
    """The least power of two that is at least n and `low`."""
    return max(1 << (n - 1).bit_length(), low)


def place_of(n_head: int, n_key_head: int) -> tuple[Any, Any, Any, Any]:
    """Segment, example, head and key head of a program, from the first two axes of the grid."""
    head = pl.program_id(1) % n_head
    return pl.program_id(0), pl.program_id(1) // n_head, head, head // (n_head // n_key_head)


def tokens(start: Any, size: int, length: int) -> Rows:
    """The tokens from `start` on."""
    return pl.ds(start, size), start + jnp.arange(size, dtype=jnp.int32) < length


def columns(block: Any, size: int, width: int) -> Rows:
    """A block of the features of a vector; all of them are there where blocks fit."""
    fits = width % size == 0
    return pl.ds(block * size, size), None if fits else tokens(block * size, size, width)[1]


def inside(rows: Rows, cols: Rows) -> Array:
    """`[T, D]`: which entries of a block there are."""
    shape = rows[1].shape[0], cols[0].size
    there = jnp.broadcast_to(rows[1][:, None], shape)
    return there if cols[1] is None else there & cols[1][None, :]


def read_vectors(ref: Any, batch: Any, rows: Rows, head: Any, cols: Rows) -> Array:
    """`ref[batch, rows, head, cols]` of `[B, T, H, D]`, 0 outside."""
    return plt.load(ref.at[batch, rows[0], head, cols[0]], mask=inside(rows, cols), other=0)


def write_vectors(ref: Any, batch: Any, rows: Rows, head: Any, cols: Rows, x: Array) -> None:
    """The inverse of `read_vectors`."""
    plt.store(ref.at[batch, rows[0], head, cols[0]], x.astype(ref.dtype), mask=inside(rows, cols))


def by_head(x: Array) -> Array:
    """`[B, T, H]` as kernels have numbers of tokens, `[B, H, T]`: a tile of a head lies together. Or back."""
    return jnp.swapaxes(x, 1, 2)


def read_numbers(ref: Any, batch: Any, rows: Rows, head: Any, other: Any) -> Array:
    """`ref[batch, head, rows]` of `[B, H, T]`, `other` outside."""
    return plt.load(ref.at[batch, head, rows[0]], mask=rows[1], other=other)


def write_numbers(ref: Any, batch: Any, rows: Rows, head: Any, x: Array) -> None:
    """The inverse of `read_numbers`."""
    plt.store(ref.at[batch, head, rows[0]], x, mask=rows[1])


def read_rows(ref: Any, head: Any, codes: Array, first: int, size: int) -> Array:
    """`ref[head, codes, first : first + size]` of `[H, Cq, C]`; a code under 0 reads row 0."""
    shape = codes.shape[0], size
    rows = jnp.broadcast_to(jnp.maximum(codes, 0)[:, None], shape)
    return plt.load(ref.at[head, rows, first + lax.broadcasted_iota(jnp.int32, shape, 1)])


def write_attention(
    out_ref: Any,
    lse_ref: Any,
    batch: Any,
    rows: Rows,
    head: Any,
    cols: Rows,
    query: Array,
    out: Array,
    total: Array,
    top: Array,
) -> None:
    """Output `out / total` and log-sum-exp of a tile; NaN for a query without a code."""
    share = jnp.where(query < 0, jnp.nan, 1 / total)
    write_vectors(out_ref, batch, rows, head, cols, out * share[:, None])
    write_numbers(lse_ref, batch, rows, head, jnp.where(query < 0, jnp.nan, top + jnp.log(total)))


def poisoned(v: Array, key: Array) -> Array:
    """`v [T, V]` with NaN for a key that is not finite, whose code is -1."""
    return jnp.where((key == -1)[:, None], jnp.full_like(v, jnp.nan), v)


def contained(v: Array, key: Array) -> tuple[Array, Array]:
    """`v [T, V]` with 0 for what is not finite, and where that was; zero times NaN is NaN, and would leak."""
    bad = ~(jnp.abs(v.astype(F32)) < jnp.inf) | (key == -1)[:, None]
    return jnp.where(bad, jnp.zeros_like(v), v), bad


def spoiled(out: Array, sees: Array, bad: Array) -> Array:
    """`out [T, V]` with NaN for the rows that see, `[T, T]`, a value that `contained` took away."""
    return jnp.where(dot(sees.astype(BF16), bad.astype(BF16)) > 0, jnp.nan, out)


def dot(x: Array, y: Array) -> Array:
    """`x @ y` in float32."""
    return _product(x, y, 1, 0)


def dot_t(x: Array, y: Array) -> Array:
    """`x @ y.T` in float32."""
    return _product(x, y, 1, 1)


def t_dot(x: Array, y: Array) -> Array:
    """`x.T @ y` in float32."""
    return _product(x, y, 0, 0)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=lax.Precision.DEFAULT, preferred_element_type=F32)


def one_hot(codes: Array, first: int, size: int, dtype: Any, axis: int = 0) -> Array:
    """`[C, T]`: whether a token has a code, of `size` codes from `first` on; `[T, C]` with axis 1."""
    shape = (codes.shape[0], size) if axis else (size, codes.shape[0])
    code = first + lax.broadcasted_iota(jnp.int32, shape, axis)
    return (code == jnp.expand_dims(codes, axis)).astype(dtype)


def parts_of(x: Array, dtype: Any) -> list[Array]:
    """As bfloat16 arrays for a kernel's products: three that sum to x for float32 values, else x rounded.

    By bits and no cast: interpreted, XLA would take a cast to and fro for nothing.
    """
    if dtype != F32:
        return [x.astype(dtype)]
    high = _high(x)
    middle = _high(x - high)
    return [part.astype(BF16) for part in (high, middle, x - high - middle)]


def _high(x: Array) -> Array:
    """The leading eight bits of float32 numbers."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & HIGH_BITS, F32)


def dot_parts(xs: list[Array], ys: list[Array], product: Callable[[Array, Array], Array] = dot) -> Array:
    """`sum(xs) @ sum(ys)` in float32, without products of parts that are under its rounding.

    The largest comes last: a tensor core cuts off what a sum cannot hold, at every step of 16 terms.
    """
    pairs = [(x, y) for j, y in enumerate(ys) for i, x in enumerate(xs) if i + j < N_PART]
    first, *more = reversed(pairs)
    return sum((product(*pair) for pair in more), product(*first))


def in_parts(x: Array, dtype: Any) -> Array:
    """`[N, NARROW]` float32 of equal columns, in a half type: its columns sum to x, 24 bits in three."""
    column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    high = x.astype(dtype).astype(F32)
    middle = (x - high).astype(dtype).astype(F32)
    low = jnp.where(column == 2, x - high - middle, 0.0)
    return jnp.where(column == 0, high, jnp.where(column == 1, middle, low)).astype(dtype)


def as_columns(x: Array) -> Array:
    """`[N]` as `[N, NARROW]` of equal columns."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], NARROW))


def lower_triangle(size: int, *, is_strict: bool = False) -> Array:
    """`[N, N]`: whether key j (axis 1) is not after query i (axis 0); strict: before it."""
    row = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return column < row if is_strict else column <= row


def loop(n_step: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Fold `step(i, carry)` over `range(n_step)`."""
    return lax.fori_loop(np.int32(0), np.int32(n_step), step, carry)
