"""Gradients of causal attention over codes: one pass over tokens for queries, one from the right for keys.

With `E` and `top` of `vq_causal.py` the weight of key j for query i is `P_ij = E[z_q(i), z_k(j)] r_i` with
`r_i = exp(top[z_q(i)] - lse_i)`. Queries need the sums `u_s`, `n_s` of values and counts per key code of
the keys before a tile; keys, per query code of the queries after it, `G_c = sum r_i d_out_i` and
`g_c = sum r_i D_i`:

    dS_ij  = P_ij (d_out_i . v_j - D_i)                       inside a tile
    d_q_i  = scale sum_s (E[z_q(i), s] r_i (d_out_i . u_s - D_i n_s) + sum_{j of s} dS_ij) codebook_k[s]
    d_v_j  = sum_c E[c, z_k(j)] G_c + sum_i P_ij d_out_i
    d_k_j  = scale sum_c (E[c, z_k(j)] (G_c . v_j - g_c) + sum_{i of c} dS_ij) codebook_q[c]

(`math.md` 2). More codes than registers hold go another way, `vq_states_grad.py`; heads whose scores differ
by more than `MAX_RANGE` the plain one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import (
    F32,
    NARROW,
    as_columns,
    columns,
    dot,
    dot_t,
    in_parts,
    launch,
    loop,
    lower_triangle,
    one_hot,
    place_of,
    power_of_two,
    read_numbers,
    read_rows,
    read_vectors,
    tokens,
    write_vectors,
)
from jax_vq.kernels.vq_causal import Tables, first_sums, segment_len
from jax_vq.kernels.vq_causal import why_not as why_not_forward
from jax_vq.kernels.vq_states_grad import RowData, block_gradients
from jax_vq.kernels.vq_sums import Sums, before_segments, padded_codes, read_sums, segment_sums
from jax_vq.ops.implementations import Kernel
from jax_vq.ops.quantize import lookup
from jax_vq.ops.vq_blocks import Form, Keys
from jax_vq.ops.vq_causal import Books, Queries
from jax_vq.ops.vq_causal_grad import Gradients
from jax_vq.ops.vq_causal_grad import causal_gradients as plain_gradients
from jax_vq.ops.vq_state import VQState, coded_of


def why_not(
    asked: str | None, queries: Queries, keys: Keys, books: Books, state: VQState, form: Form, *rest: Array
) -> str | None:
    """Why `causal_gradients` cannot run, or None."""
    if form.has_exact:
        return "gradients with an exact window or sinks: the kernel is for codes alone"
    reason = why_not_forward(asked, queries, keys, books, state, form)
    if reason is not None:
        return reason
    if keys.v.dtype != jnp.bfloat16:
        return f"gradients of {keys.v.dtype}: the kernel is for bfloat16"
    n_code = books.q.shape[1]
    if n_code > sizes.MAX_CODES:
        return f"gradients of {n_code} query codes: the kernel is for at most {sizes.MAX_CODES}"
    width = max(books.k.shape[2], keys.v.shape[3])
    if width > sizes.MAX_WIDTH:
        return f"gradients of width {width}: the kernel is for at most {sizes.MAX_WIDTH}"
    return None


def causal_gradients(
    queries: Queries,
    keys: Keys,
    books: Books,
    state: VQState,
    form: Form,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> Gradients:
    """`ops.vq_causal_grad.causal_gradients`."""
    n_padded, _ = padded_codes(books.k.shape[1])
    tables = Tables.of(books, n_padded, keys.v.dtype)
    return lax.cond(
        jnp.any(tables.is_wide),
        lambda: plain_gradients(queries, keys, books, state, form, out, lse, d_out, d_lse),
        lambda: narrow_gradients(queries, keys, books, state, tables, out, lse, d_out, d_lse),
    )


def narrow_gradients(
    queries: Queries,
    keys: Keys,
    books: Books,
    state: VQState,
    tables: Tables,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> Gradients:
    """Gradients where no head is wide, see `Tables`."""
    n_key_head = keys.v.shape[2]
    n_head, dtype = queries.codes.shape[2], keys.v.dtype
    delta = jnp.sum(out.astype(F32) * d_out.astype(F32), axis=-1) - d_lse
    top = lookup(tables.top, queries.codes)
    rows = RowData(queries.codes, d_out, jnp.exp(top - lse), delta)
    width = books.k.shape[2]
    scale = jnp.asarray(books.scale, F32)
    book_q, book_k = (
        jnp.pad(book * scale, ((0, 0), (0, n - book.shape[1]), (0, power_of_two(width) - width))).astype(
            dtype
        )
        for book, n in ((books.q, padded_codes(books.q.shape[1])[0]), (books.k, tables.weight.shape[2]))
    )
    weight = jnp.pad(tables.weight, ((0, 0), (0, book_q.shape[1] - books.q.shape[1]), (0, 0)))
    first = first_sums(coded_of(state), weight.shape[2])
    way = block_gradients if max(weight.shape[1:]) > sizes.MAX_CODES_IN_REGISTERS else segment_gradients
    d_q, d_k, d_v = way(rows, keys, weight, book_q, book_k, first, width)
    n_rep = n_head // n_key_head
    if n_rep > 1:
        d_k, d_v = (
            jnp.sum(x.reshape(*x.shape[:2], n_key_head, n_rep, -1).astype(F32), axis=3) for x in (d_k, d_v)
        )
    # All keys are seen through codes: a bias moves nothing but the log-sum-exp.
    bias = None if books.bias is None else jnp.sum(d_lse, axis=(0, 1))
    return Gradients(d_q, d_k.astype(dtype), d_v.astype(dtype), None, None, bias)


def segment_gradients(
    rows: RowData, keys: Keys, weight: Array, book_q: Array, book_k: Array, first: Sums, width: int
) -> tuple[Array, Array, Array]:
    """`block_gradients`, by programs that follow a segment with its sums in registers."""
    batch, length, n_head, _ = rows.d_out.shape
    n_code_q, n_code_k = weight.shape[1:]
    used = (sizes.size_of(name, n_code_k).tile for name in ("sums", "grad_queries", "grad_keys"))
    each = segment_len(length, batch * n_head, max(used))
    values = before_segments(segment_sums(keys.codes, keys.v, n_code_k, each), first)
    d_q = _of_queries(rows, keys, weight, book_k, values, each, width)
    sums = segment_sums(rows.codes, rows.d_out, n_code_q, each, rows.share, rows.delta)
    later = before_segments(sums, None, is_reverse=True)
    d_k, d_v = _of_keys(rows, keys, jnp.swapaxes(weight, 1, 2), book_q, later, each, width)
    return d_q, d_k, d_v


def _of_queries(
    rows: RowData, keys: Keys, weight: Array, book: Array, values: Sums, each: int, width: int
) -> Array:
    """Gradients of queries `[B, T, H, D]`."""
    batch, length, n_head, _ = rows.d_out.shape
    size = sizes.size_of("grad_queries", weight.shape[2])
    run = launch(
        partial(_query_gradient_kernel, tile=size.tile, n_tile=each // size.tile),
        jax.ShapeDtypeStruct((batch, length, n_head, width), keys.v.dtype),
        (pl.cdiv(length, each), batch * n_head, 1),
        size.n_warp,
        size.n_stage,
    )
    d_q: Array = run(*rows, keys.codes, keys.v, weight, book, *values)
    return d_q


def _of_keys(
    rows: RowData, keys: Keys, weight: Array, book: Array, later: Sums, each: int, width: int
) -> tuple[Array, Array]:
    """Gradients of keys and of values, `[B, T, H, ...]` by query head."""
    batch, length, n_head, value_width = rows.d_out.shape
    size = sizes.size_of("grad_keys", weight.shape[1])
    run = launch(
        partial(_key_gradient_kernel, tile=size.tile, n_tile=each // size.tile),
        (
            jax.ShapeDtypeStruct((batch, length, n_head, width), keys.v.dtype),
            jax.ShapeDtypeStruct((batch, length, n_head, value_width), keys.v.dtype),
        ),
        (pl.cdiv(length, each), batch * n_head, 1),
        size.n_warp,
        size.n_stage,
    )
    d_k, d_v = run(*rows, keys.codes, keys.v, weight, book, *later)
    return d_k, d_v


def _query_gradient_kernel(
    query_ref: Any,
    d_out_ref: Any,
    share_ref: Any,
    delta_ref: Any,
    key_ref: Any,
    v_ref: Any,
    weight_ref: Any,
    book_ref: Any,
    sum_ref: Any,
    number_ref: Any,
    d_q_ref: Any,
    *,
    tile: int,
    n_tile: int,
) -> None:
    length, n_head, width = d_out_ref.shape[1:]
    n_key_head, n_code, dtype = v_ref.shape[2], weight_ref.shape[2], v_ref.dtype
    segment, batch, head, key_head = place_of(n_head, n_key_head)
    cols = columns(pl.program_id(2), power_of_two(width), width)
    d_cols = columns(pl.program_id(2), book_ref.shape[2], d_q_ref.shape[3])
    lower = lower_triangle(tile)
    book = plt.load(book_ref.at[key_head, :, :])

    def step(i: Any, carry: Any) -> Any:
        total, number = carry
        rows = tokens((segment * n_tile + i) * tile, tile, length)
        query = read_numbers(query_ref, batch, rows, head, 0)
        key = read_numbers(key_ref, batch, rows, key_head, -2)
        share = read_numbers(share_ref, batch, rows, head, 0.0)[:, None]
        delta = read_numbers(delta_ref, batch, rows, head, 0.0)[:, None]
        d_out = read_vectors(d_out_ref, batch, rows, head, cols)
        v = read_vectors(v_ref, batch, rows, key_head, cols)
        hot = one_hot(key, 0, n_code, dtype)
        weight = read_rows(weight_ref, head, query, 0, n_code)
        near = jnp.where(lower, dot(weight, hot) * share, 0)
        d_near = jnp.where(lower, near * (dot_t(d_out, v) - delta), 0)
        count = jnp.max(number, axis=1)[None, :]
        d_code = weight.astype(F32) * share * (dot_t(d_out, total.astype(dtype)) - delta * count)
        d_code += dot_t(d_near.astype(dtype), hot)
        write_vectors(d_q_ref, batch, rows, head, d_cols, dot(d_code.astype(dtype), book))
        ones = jnp.ones((tile, NARROW), dtype)
        return total + dot(hot, v), number + dot(hot, ones)

    loop(n_tile, step, read_sums(sum_ref, number_ref, (batch, key_head, segment), 0, n_code, cols))


def _key_gradient_kernel(
    query_ref: Any,
    d_out_ref: Any,
    share_ref: Any,
    delta_ref: Any,
    key_ref: Any,
    v_ref: Any,
    weight_ref: Any,
    book_ref: Any,
    sum_ref: Any,
    number_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
    *,
    tile: int,
    n_tile: int,
) -> None:
    length, n_head, width = d_out_ref.shape[1:]
    n_key_head, n_code, dtype = v_ref.shape[2], weight_ref.shape[2], v_ref.dtype
    segment, batch, head, key_head = place_of(n_head, n_key_head)
    cols = columns(pl.program_id(2), power_of_two(width), width)
    d_cols = columns(pl.program_id(2), book_ref.shape[2], d_k_ref.shape[3])
    later = ~lower_triangle(tile, is_strict=True)  # [key, query]: the query is not before the key
    book = plt.load(book_ref.at[head, :, :])

    def step(i: Any, carry: Any) -> Any:
        total, number = carry
        rows = tokens((segment * n_tile + n_tile - 1 - i) * tile, tile, length)
        query = read_numbers(query_ref, batch, rows, head, -2)
        key = read_numbers(key_ref, batch, rows, key_head, 0)
        share = read_numbers(share_ref, batch, rows, head, 0.0)
        delta = read_numbers(delta_ref, batch, rows, head, 0.0)
        d_out = read_vectors(d_out_ref, batch, rows, head, cols)
        v = read_vectors(v_ref, batch, rows, key_head, cols)
        hot = one_hot(query, 0, n_code, dtype)
        shared = hot * share.astype(dtype)[None, :]
        weight = read_rows(weight_ref, head, key, 0, n_code)
        near = jnp.where(later, dot(weight, shared), 0)
        d_near = jnp.where(later, near * (dot_t(v, d_out) - delta[None, :]), 0)
        half = total.astype(dtype)
        d_v = dot(weight, half) + dot(near.astype(dtype), d_out)
        write_vectors(d_v_ref, batch, rows, head, cols, d_v)
        d_code = weight.astype(F32) * (dot_t(v, half) - jnp.sum(number, axis=1)[None, :])
        d_code += dot_t(d_near.astype(dtype), hot)
        write_vectors(d_k_ref, batch, rows, head, d_cols, dot(d_code.astype(dtype), book))
        return total + dot(shared, d_out), number + dot(shared, in_parts(as_columns(delta), dtype))

    total, number = read_sums(sum_ref, number_ref, (batch, head, segment), 0, n_code, cols)
    column = lax.broadcasted_iota(jnp.int32, number.shape, 1)
    loop(n_tile, step, (total, jnp.where(column == 0, number, 0.0)))


KERNELS = {"causal_gradients": Kernel(causal_gradients, why_not)}
