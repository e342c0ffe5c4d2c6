"""Sums over tokens per code, segment by segment: what a scan over segments starts from."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import hopper_sorted, hopper_sums, sizes
from jax_vq.kernels.tiles import (
    BF16,
    F32,
    NARROW,
    Rows,
    as_columns,
    by_head,
    columns,
    dot,
    dot_parts,
    in_parts,
    launch,
    loop,
    one_hot,
    parts_of,
    place_of,
    power_of_two,
    read_numbers,
    read_vectors,
    tokens,
)


class Sums(NamedTuple):
    """Of every segment, head and code; codes are padded to whole chunks."""

    vectors: Array  # [B, K, S, C, V] float32, NaN in a column where a vector is not finite
    numbers: Array  # [B, K, S, C] float32


def padded_codes(n_code: int) -> tuple[int, int]:
    """Codes in whole chunks, and in one chunk."""
    chunk = min(power_of_two(n_code), sizes.size_of("sums", n_code).chunk)
    return -(-n_code // chunk) * chunk, chunk


def segment_sums(
    codes: Array,
    vectors: Array,
    n_code: int,
    segment_len: int,
    weights: Array | None = None,
    numbers: Array | None = None,
) -> Sums:
    """Sums over the tokens of each segment of `weights * vectors` and `weights * numbers`, by code.

    Args:
      codes: int32 `[B, T, K]`; a token of code -1 has no vector: it makes all sums of its segment NaN.
      vectors: `[B, T, K, V]`, bfloat16 or float32.
      segment_len: tokens of a segment, a multiple of the tile.
      weights, numbers: float32 `[B, T, K]`, by default 1.
    """
    batch, length, n_head, width = vectors.shape
    size = sizes.size_of(sizes.of_values("sums", vectors.dtype), n_code)
    n_padded, chunk = padded_codes(n_code)
    for kernel in (hopper_sorted, hopper_sums):
        if weights is None and kernel.is_usable(n_padded, vectors, segment_len):
            return Sums(*kernel.segment_sums(codes, vectors, n_padded, segment_len))
    n_column = min(power_of_two(width), size.columns)
    n_segment = pl.cdiv(length, segment_len)
    run = launch(
        partial(
            _sums_kernel,
            tile=size.tile,
            n_tile=segment_len // size.tile,
            chunk=chunk,
            n_column=n_column,
            has_weights=weights is not None,
        ),
        Sums(
            jax.ShapeDtypeStruct((batch, n_head, n_segment, n_padded, width), F32),
            jax.ShapeDtypeStruct((batch, n_head, n_segment, n_padded), F32),
        ),
        (n_segment, batch * n_head, (n_padded // chunk) * pl.cdiv(width, n_column)),
        size.n_warp,
        size.n_stage,
    )
    more = () if weights is None else (weights, numbers)
    return run(by_head(codes), vectors, *map(by_head, more))


def read_sums(
    sum_ref: Any, number_ref: Any, place: tuple[Any, Any, Any], first: int, size: int, cols: Rows
) -> tuple[Array, Array]:
    """In a kernel, `Sums` at (batch, head, segment) of the codes from `first` on: `[C, V]`, `[C, NARROW]`."""
    at = pl.ds(first, size)
    ref, there = sum_ref.at[*place, at, cols[0]], None
    if cols[1] is not None:
        there = jnp.broadcast_to(cols[1][None, :], (size, cols[0].size))
    total = plt.load(ref) if there is None else plt.load(ref, mask=there, other=0)
    return total.astype(F32), as_columns(plt.load(number_ref.at[*place, at]))


def before_segments(sums: Sums, first: Sums, *, is_reverse: bool = False) -> Sums:
    """The sums over all earlier segments, or later ones, and `first` (of S = 1)."""
    return Sums(*(_exclusive(x, is_reverse) + start for x, start in zip(sums, first, strict=True)))


def _exclusive(x: Array, is_reverse: bool) -> Array:
    """Sums over the entries of axis 2 before each one; no difference of sums, which a NaN would spoil."""
    zero = jnp.zeros_like(x[:, :, :1])
    x = jnp.concatenate([x[:, :, 1:], zero] if is_reverse else [zero, x[:, :, :-1]], axis=2)
    return jax.lax.cumsum(x, axis=2, reverse=is_reverse)


def _sums_kernel(
    code_ref: Any,
    vector_ref: Any,
    *refs: Any,
    tile: int,
    n_tile: int,
    chunk: int,
    n_column: int,
    has_weights: bool,
) -> None:
    *more_refs, sum_ref, number_ref = refs
    _, length, n_head, width = vector_ref.shape
    segment, batch, head, _ = place_of(n_head, n_head)
    n_part = pl.cdiv(width, n_column)
    first = (pl.program_id(2) // n_part) * chunk
    cols = columns(pl.program_id(2) % n_part, n_column, width)

    def step(i: Any, carry: Any) -> Any:
        total, number, bad = carry
        rows = tokens((segment * n_tile + i) * tile, tile, length)
        code = read_numbers(code_ref, batch, rows, head, -2)
        x = read_vectors(vector_ref, batch, rows, head, cols)
        hot = one_hot(code, first, chunk, BF16)
        if has_weights:
            weight, value = (read_numbers(ref, batch, rows, head, 0.0) for ref in more_refs)
            hot = hot * weight.astype(BF16)[None, :]
            terms = in_parts(as_columns(value), BF16)
        else:
            terms = jnp.ones((tile, NARROW), BF16)
        bad = jnp.maximum(bad, jnp.max((code == -1).astype(jnp.int32)))
        return total + dot_parts([hot], parts_of(x, x.dtype)), number + dot(hot, terms), bad

    zero = jnp.zeros((chunk, n_column), F32), jnp.zeros((chunk, NARROW), F32), jnp.int32(0)
    total, number, bad = loop(n_tile, step, zero)
    number = jnp.sum(number, axis=1) if has_weights else jnp.max(number, axis=1)
    total = jnp.where(bad > 0, jnp.nan, total)
    at = pl.ds(first, chunk)
    there = None if cols[1] is None else jnp.broadcast_to(cols[1][None, :], total.shape)
    plt.store(sum_ref.at[batch, head, segment, at, cols[0]], total, mask=there)
    plt.store(number_ref.at[batch, head, segment, at], number)
