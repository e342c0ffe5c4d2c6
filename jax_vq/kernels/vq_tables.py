"""Scores between codes, as the kernels read them: `E = exp(A - max)`, made once a call."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import (
    F32,
    N_PART,
    Rows,
    columns,
    dot_parts,
    dot_t,
    inside,
    launch,
    parts_of,
    power_of_two,
    tokens,
)
from jax_vq.kernels.vq_sums import padded_codes
from jax_vq.ops.numerics import split
from jax_vq.ops.vq_causal import Books

MAX_RANGE = 60.0  # of scores: weights of 1e-26, and products with them, are far from the ends of float32
N_ROW = 16  # query codes of a program: small, so that a table of few codes is made by many


class Tables(NamedTuple):
    """What all programs read of the scores between codes; key codes are padded."""

    score: Array  # [H, Cq, C] float32
    weight: Array  # [H, Cq, C] `E`, 0 for padding; [3 * H, Cq, C], parts of it, where v is float32
    top: Array  # [H, Cq] float32
    spread: Array  # [H, Cq] float32: how far the least score is from the largest

    @property
    def is_wide(self) -> Array:
        """`[H]` whether scores of one code differ too much for `E`."""
        return ~jnp.all(self.spread <= MAX_RANGE, axis=-1)

    @classmethod
    def of(cls, books: Books, n_padded: int, dtype: Any) -> "Tables":
        """Of values of a type: in one kernel, or as plain XLA where that is slow or has no room."""
        chunk = padded_codes(books.k.shape[1])[1]
        if dtype == F32 or n_padded > chunk or books.q.shape[2] > sizes.MAX_WIDTH:
            return _by_xla(books, n_padded, dtype)
        n_head, n_query_code, _ = books.q.shape
        shape = n_head, n_query_code, n_padded
        shapes = (
            jax.ShapeDtypeStruct(shape, F32),
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct(shape[:2], F32),
            jax.ShapeDtypeStruct(shape[:2], F32),
        )
        kernel = partial(_table_kernel, scale=books.scale)
        grid = pl.cdiv(n_query_code, N_ROW), n_head
        biases = () if books.bias is None else (books.bias,)
        return cls(*launch(kernel, shapes, grid, 8, 1)(books.q, books.k, *biases))


def _by_xla(books: Books, n_padded: int, dtype: Any) -> Tables:
    table = books.table if books.bias is None else books.table + books.bias[:, None, None]
    top = jnp.max(table, axis=-1)
    spread = top - jnp.min(table, axis=-1)
    padding = (0, 0), (0, 0), (0, n_padded - table.shape[2])
    table = jnp.pad(table, padding, constant_values=-jnp.inf)
    weight = jnp.exp(table - top[..., None])
    weight = jnp.concatenate(split(weight, N_PART)) if dtype == F32 else weight.astype(dtype)
    return Tables(table, weight, top, spread)


def _table_kernel(q_ref: Any, k_ref: Any, *refs: Any, scale: float) -> None:
    """Of some query codes of a head: scores in float32, `E`, the largest score, and how far the least is."""
    *bias_refs, score_ref, weight_ref, top_ref, spread_ref = refs
    head, (n_head, n_query_code, n_padded) = pl.program_id(1), score_ref.shape
    n_key_head, n_code, width = k_ref.shape
    rows = tokens(pl.program_id(0) * N_ROW, N_ROW, n_query_code)
    codes = tokens(jnp.int32(0), n_padded, n_code)
    cols = columns(0, power_of_two(width), width)

    def read(ref: Any, at: Any, lines: Rows) -> Array:
        return plt.load(ref.at[at, lines[0], cols[0]], mask=inside(lines, cols), other=0)

    query = parts_of(read(q_ref, head, rows) * scale, F32)
    key = parts_of(read(k_ref, head // (n_head // n_key_head), codes), F32)
    score = dot_parts(key, query, dot_t)  # [C, Cq]: so many key codes are the first factor of a product
    if bias_refs:
        score += plt.load(bias_refs[0].at[head])
    is_code = jnp.broadcast_to(codes[1][:, None], score.shape)
    score = jnp.where(is_code, score, -jnp.inf)
    top = jnp.max(score, axis=0)
    least = jnp.min(jnp.where(is_code, score, jnp.inf), axis=0)
    there = jnp.broadcast_to(rows[1][:, None], score.shape[::-1])
    weight = jnp.exp(score - top[None, :]).astype(weight_ref.dtype)
    plt.store(score_ref.at[head, rows[0], codes[0]], score.T, mask=there)
    plt.store(weight_ref.at[head, rows[0], codes[0]], weight.T, mask=there)
    plt.store(top_ref.at[head, rows[0]], top, mask=rows[1])
    plt.store(spread_ref.at[head, rows[0]], top - least, mask=rows[1])
