"""Causal attention over codes for float32 values: the kernel of `vq_causal.py` in bfloat16 parts.

A tensor core has no float32 products. A float32 number is the sum of three bfloat16 ones, so that a product
with one-hot codes is three products, and one of two matrices six: what is left out is under its rounding
(`tiles.dot_parts`). Sums over a tile start from zero and are added to what came before by the other cores,
which round; a tensor core cuts off.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels.tiles import (
    BF16,
    F32,
    N_PART,
    NARROW,
    as_columns,
    columns,
    contained,
    dot,
    dot_parts,
    dot_t,
    in_parts,
    loop,
    lower_triangle,
    one_hot,
    parts_of,
    place_of,
    poisoned,
    read_numbers,
    read_rows,
    read_vectors,
    spoiled,
    tokens,
    write_attention,
)
from jax_vq.kernels.vq_sums import read_sums
from jax_vq.kernels.vq_wide import wide_weights


def causal_kernel(
    query_ref: Any,
    key_ref: Any,
    v_ref: Any,
    score_ref: Any,
    weight_ref: Any,
    top_ref: Any,
    sum_ref: Any,
    number_ref: Any,
    mode_ref: Any,
    *refs: Any,
    tile: int,
    n_tile: int,
    chunk: int,
    n_column: int,
    is_careful: bool = False,
) -> None:
    """Segments of mode 0, or of all others, of one chunk of codes; `weight_ref [N * H, Cq, C]`, N parts."""
    out_ref, lse_ref = refs[-2:]
    length, n_head, width = out_ref.shape[1:]
    segment, batch, head, key_head = place_of(n_head, v_ref.shape[2])
    cols = columns(pl.program_id(2), n_column, width)
    lower = lower_triangle(tile)

    def quick(query: Array, key: Array, value: Array, number: Array) -> tuple[Array, Array, Array, Array]:
        """Output of the sums before its division, denominator, weights of the tile, and their top."""
        weight = [read_rows(weight_ref, p * n_head + head, query, 0, chunk) for p in range(N_PART)]
        hot = one_hot(key, 0, chunk, BF16, axis=1)
        near = jnp.where(lower, dot_parts(weight, [hot], dot_t), 0)
        total = jnp.sum(dot_parts(weight, [in_parts(as_columns(number), BF16)]), axis=1)
        out = dot_parts(weight, parts_of(value, F32))
        return out, total, near, plt.load(top_ref.at[head, jnp.maximum(query, 0)])

    def wide(query: Array, key: Array, value: Array, number: Array) -> tuple[Array, Array, Array, Array]:
        """The same relative to the largest score of the keys that a query sees."""
        (weight,), near, top = wide_weights(score_ref, head, query, key, [number], chunk)
        out = dot_parts(parts_of(weight, F32), parts_of(value, F32))
        return out, jnp.sum(weight * number[None, :], axis=1), near, top

    def step(i: Any, sums: Any, contains: bool, is_wide: bool) -> Any:
        rows = tokens((segment * n_tile + i) * tile, tile, length)
        query = read_numbers(query_ref, batch, rows, head, 0)
        key = read_numbers(key_ref, batch, rows, key_head, -2)
        v = read_vectors(v_ref, batch, rows, key_head, cols)
        out, total, near, top = (wide if is_wide else quick)(query, key, *sums)
        seen = v
        if contains:
            seen, bad = contained(v, key)
            v = poisoned(v, key)
        out += dot_parts(parts_of(near, F32), parts_of(seen, F32))
        if contains:
            out = spoiled(out, lower, bad)
        total += jnp.sum(near, axis=1)
        write_attention(out_ref, lse_ref, batch, rows, head, cols, query, out, total, top)
        value, number = sums
        hot = one_hot(key, 0, chunk, BF16)
        count = jnp.max(dot(hot, jnp.ones((tile, NARROW), BF16)), axis=1)
        return value + dot_parts([hot], parts_of(v, F32)), number + count

    mode = plt.load(mode_ref.at[batch, head, segment])
    for wanted in (1, 2) if is_careful else (0,):

        @pl.when(mode == wanted)
        def run(wanted: int = wanted) -> None:
            place = batch, key_head, segment
            value, number = read_sums(sum_ref, number_ref, place, 0, chunk, cols)
            sums = value, jnp.max(number, axis=1)
            loop(n_tile, partial(step, contains=wanted > 0, is_wide=wanted == 2), sums)
