"""Kernels of the gradients of causal attention over codes.

In the notation of `vq_causal_grad.py`, sums by code go through memory (`vq_states.py`): `u_s`, `n_s` over the
keys before each block, and `G_c`, `g_c` over the queries after it. One kernel then takes every block by
itself: its queries over chunks of key codes, the pairs inside of it, its keys over chunks of query codes.
With `k^_j = codebook_k[z_k(j)]` and `q^_i` likewise, pairs need no sums by code:

    d_q_i = scale (sum_s E[z_q(i), s] r_i (d_out_i . u_s - D_i n_s) codebook_k[s] + sum_j dS_ij k^_j)
    d_k_j = scale (sum_c E[c, z_k(j)] (G_c . v_j - g_c) codebook_q[c] + sum_i dS_ij q^_i)

A sequence whose sums would take too much memory goes part by part.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import (
    F32,
    by_head,
    columns,
    dot,
    dot_t,
    launch,
    loop,
    lower_triangle,
    one_hot,
    place_of,
    power_of_two,
    read_numbers,
    read_rows,
    read_vectors,
    t_dot,
    tokens,
    write_vectors,
)
from jax_vq.kernels.vq_states import block_states, read_values
from jax_vq.kernels.vq_sums import Sums, before_segments, segment_sums
from jax_vq.ops.numerics import read_chunk, scan_chunks, write_chunk
from jax_vq.ops.vq_blocks import Keys


class RowData(NamedTuple):
    """What the backward pass knows of every query, `[B, T, H, ...]`."""

    codes: Array  # int32
    d_out: Array  # [..., V]
    share: Array  # float32 `r`
    delta: Array  # float32 `D`, less the gradient of the log-sum-exp


def block_gradients(
    rows: RowData, keys: Keys, weight: Array, book_q: Array, book_k: Array, first: Sums, width: int
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values, `[B, T, H, ...]` by query head.

    Args:
      weight: `[H, Cq, Ck]`, `E` of `vq_tables.Tables`; codes are padded to whole chunks.
      book_q: `[H, Cq, D]`, book_k: `[K, Ck, D]`, scaled; D is padded to a power of two, from `width`.
      first: sums over the keys before the call, as one segment.
    """
    batch, length, n_head, value_width = rows.d_out.shape
    (n_code_q, n_code_k), n_key_head, dtype = weight.shape[1:], keys.v.shape[2], keys.v.dtype
    shape = batch, n_head, 1, n_code_q
    last = Sums(jnp.zeros((*shape, value_width), F32), jnp.zeros(shape, F32))
    books = weight, jnp.swapaxes(weight, 1, 2), book_q, book_k
    tokenwise = *rows, keys.codes, keys.v
    tile, sums_tile = (sizes.size_of(name, max(weight.shape[1:])).tile for name in ("grad_blocks", "sums"))
    step_len = max(tile, sums_tile)
    n_row = batch * (n_head * n_code_q + n_key_head * n_code_k)
    part = sizes.part_len(length, step_len, step_len // tile * n_row * value_width * dtype.itemsize)
    if part >= length:
        return _part_gradients(tokenwise, books, first, last, width)
    sums = segment_sums(keys.codes, keys.v, n_code_k, part)
    before = before_segments(sums, first)
    sums = segment_sums(rows.codes, rows.d_out, n_code_q, part, rows.share, rows.delta)
    after = before_segments(sums, last, is_reverse=True)

    def of_part(sums: Sums, start: Array | int) -> Sums:
        return Sums(*(lax.dynamic_slice_in_dim(x, start // part, 1, axis=2) for x in sums))

    def step(found: tuple[Array, Array, Array], start: Array | int, size: int) -> tuple[Array, Array, Array]:
        here = [read_chunk(x, start, size) for x in tokenwise]
        news = _part_gradients(here, books, of_part(before, start), of_part(after, start), width)
        d_q, d_k, d_v = (write_chunk(x, new, start) for x, new in zip(found, news, strict=True))
        return d_q, d_k, d_v

    zero = jnp.zeros((batch, length, n_head, width), dtype)
    zeros = zero, zero, jnp.zeros((batch, length, n_head, value_width), dtype)
    return scan_chunks(step, zeros, length, part)


def _part_gradients(
    tokenwise: Any, books: tuple[Array, ...], before: Sums, after: Sums, width: int
) -> tuple[Array, Array, Array]:
    """Gradients of a part of a sequence, from the sums over the keys before it and the queries after it."""
    query_codes, d_out, share, delta, key_codes, v = tokenwise
    batch, length, n_head, value_width = d_out.shape
    size = sizes.size_of("grad_blocks", max(books[0].shape[1:]))
    earlier, _ = block_states(key_codes, v, before, size.tile, is_gradient=True)
    later, _ = block_states(query_codes, d_out, after, size.tile, share, delta, is_gradient=True)
    run = launch(
        partial(_gradient_kernel, tile=size.tile, chunk=size.chunk),
        tuple(jax.ShapeDtypeStruct((batch, length, n_head, n), v.dtype) for n in (width, width, value_width)),
        (pl.cdiv(length, size.tile), batch * n_head, 1),
        size.n_warp,
        size.n_stage,
    )
    of_queries = by_head(query_codes), d_out, by_head(share), by_head(delta)
    d_q, d_k, d_v = run(*of_queries, by_head(key_codes), v, *books, *earlier, *later)
    return d_q, d_k, d_v


def _gradient_kernel(
    query_ref: Any,
    d_out_ref: Any,
    share_ref: Any,
    delta_ref: Any,
    key_ref: Any,
    v_ref: Any,
    weight_ref: Any,
    weight_t_ref: Any,
    book_q_ref: Any,
    book_k_ref: Any,
    value_ref: Any,
    count_ref: Any,
    later_ref: Any,
    number_ref: Any,
    d_q_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
    *,
    tile: int,
    chunk: int,
) -> None:
    length, n_head, width = d_out_ref.shape[1:]
    n_key_head, dtype = v_ref.shape[2], v_ref.dtype
    n_code_q, n_code_k = weight_ref.shape[1:]
    chunk_q, chunk_k, d_width = min(chunk, n_code_q), min(chunk, n_code_k), book_q_ref.shape[2]
    block, batch, head, key_head = place_of(n_head, n_key_head)
    cols = columns(pl.program_id(2), power_of_two(width), width)
    d_cols = columns(pl.program_id(2), d_width, d_q_ref.shape[3])
    at = tokens(block * tile, tile, length)
    query = read_numbers(query_ref, batch, at, head, 0)
    key = read_numbers(key_ref, batch, at, key_head, -2)
    share, delta = (read_numbers(ref, batch, at, head, 0.0)[:, None] for ref in (share_ref, delta_ref))
    d_out = read_vectors(d_out_ref, batch, at, head, cols)
    v = read_vectors(v_ref, batch, at, key_head, cols)

    def read_book(ref: Any, head: Any, first: Any, size: int) -> Array:
        return plt.load(ref.at[head, pl.ds(first, size), :])

    def of_queries(c: Any, carry: Any) -> Any:
        d_q, near = carry
        weight = read_rows(weight_ref, head, query, c * chunk_k, chunk_k)
        place = batch, key_head, block
        value, count = read_values(value_ref, count_ref, place, c * chunk_k, chunk_k, cols)
        near += dot(weight, one_hot(key, c * chunk_k, chunk_k, dtype))
        d_code = weight.astype(F32) * share * (dot_t(d_out, value) - delta * count[None, :])
        book = read_book(book_k_ref, key_head, c * chunk_k, chunk_k)
        return d_q + dot(d_code.astype(dtype), book), near

    def of_keys(c: Any, carry: Any) -> Any:
        d_k, d_v = carry
        weight = read_rows(weight_t_ref, head, key, c * chunk_q, chunk_q)
        place = batch, head, block
        value, number = read_values(later_ref, number_ref, place, c * chunk_q, chunk_q, cols)
        d_weight = dot_t(v, value) - number[None, :]
        d_v += dot(weight, value)  # while this runs, the next product is made ready
        d_code = weight.astype(F32) * d_weight
        book = read_book(book_q_ref, head, c * chunk_q, chunk_q)
        return d_k + dot(d_code.astype(dtype), book), d_v

    lower = lower_triangle(tile)
    zero = jnp.zeros((tile, d_width), F32), jnp.zeros((tile, tile), F32)
    d_q, near = loop(n_code_k // chunk_k, of_queries, zero)
    near = jnp.where(lower, near * share, 0)
    d_near = jnp.where(lower, near * (dot_t(d_out, v) - delta), 0).astype(dtype)
    d_q += dot(d_near, read_rows(book_k_ref, key_head, key, 0, d_width))
    write_vectors(d_q_ref, batch, at, head, d_cols, d_q)
    d_v = t_dot(near.astype(dtype), d_out)
    d_k = t_dot(d_near, read_rows(book_q_ref, head, query, 0, d_width))
    d_k, d_v = loop(n_code_q // chunk_q, of_keys, (d_k, d_v))
    write_vectors(d_k_ref, batch, at, head, d_cols, d_k)
    write_vectors(d_v_ref, batch, at, head, cols, d_v)
