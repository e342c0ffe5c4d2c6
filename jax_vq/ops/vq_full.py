"""VQ-attention that is not causal: a reduction over keys, then one row of output per query code.

All queries see the same counts and mean values per key code (`math.md` 2). Gradients are the same
sums the other way round: over queries first, then one lookup per key.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jax_vq.ops.numerics import chunk_len, einsum, is_code, read_chunk, scan_chunks, write_chunk
from jax_vq.ops.quantize import MAX_TERMS
from jax_vq.ops.vq_blocks import Form, Keys, to_blocks
from jax_vq.ops.vq_causal import Books, Queries, query_heads
from jax_vq.ops.vq_causal_grad import Gradients
from jax_vq.ops.vq_far_grad import ByKeyCode, nothing_later, pull_keys

SUM_LEN = 1024  # keys summed in one matrix product: a longer sum loses float32 precision


class Seen(NamedTuple):
    """The keys that all queries see, per key code."""

    count: Array  # type: ignore[assignment]  # [B, K, C] int32
    mean: Array  # [B, K, C, V] mean value


def read_values(keys: Keys, start: Array | int, size: int) -> tuple[Array, Array]:
    """Codes `[B, N, K]`, -2 for padding, and values of a chunk, NaN for a key that is not finite."""
    codes, v = read_chunk(keys.codes, start, size), read_chunk(keys.v, start, size)
    v = jnp.where((codes < 0)[..., None], jnp.nan, v)
    if keys.documents is None:
        return codes, v
    real = read_chunk(keys.documents.real, start, size)[..., None]
    return jnp.where(real, codes, -2), jnp.where(real[..., None], v, 0)


def count_keys(keys: Keys, books: Books) -> Seen:
    """Counts and mean values of all keys.

    Means move by their difference: a sum over a long sequence would lose precision.
    """
    batch, length, n_head, value_width = keys.v.shape
    n_code = books.k.shape[1]

    def step(seen: Seen, start: Array | int, size: int) -> Seen:
        codes, values = read_values(keys, start, size)
        chosen = is_code(codes, n_code)
        one_hot, values = (to_blocks(x, min(SUM_LEN, size)) for x in (chosen.astype(values.dtype), values))
        total = jnp.sum(einsum("bkglc,bkglv->bkgcv", one_hot, values), axis=2)
        n_key = jnp.sum(chosen, axis=1, dtype=jnp.int32)
        count = seen.count + n_key
        drift = total - n_key[..., None].astype(total.dtype) * seen.mean
        return Seen(count, seen.mean + drift / jnp.maximum(count, 1)[..., None].astype(total.dtype))

    zero = Seen(
        jnp.zeros((batch, n_head, n_code), jnp.int32),
        jnp.zeros((batch, n_head, n_code, value_width), books.k.dtype),
    )
    token_bytes = 4 * batch * n_head * (2 * n_code + 2 * value_width)
    return scan_chunks(step, zero, length, chunk_len(keys.v, length, token_bytes))


def code_weights(score: Array, count: Array) -> Array:
    """Softmax weight of one key of every code, `exp(a_s) / sum_s n_s exp(a_s)`: `[..., C]`.

    The maximum is over codes with keys (n > 0) alone. 0 for every code where there is no key.
    """
    top = jnp.max(jnp.where(count > 0, score, -jnp.inf), axis=-1, keepdims=True)
    mass = jnp.where(count > 0, jnp.exp(score - jnp.where(jnp.isneginf(top), 0, top)), 0)
    total = jnp.sum(mass * count, axis=-1, keepdims=True)
    return mass / jnp.where(total == 0, 1, total)


def by_key_head(x: Array, n_head: int) -> Array:
    """`[B, N, K * R, ...]` to `[B, K, R * N, ...]`: the rows of a key head."""
    batch, length, n_query, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, length, n_head, n_query // n_head, *rest), 1, 3)
    return x.reshape(batch, n_head, -1, *rest)


def by_query_head(x: Array, n_rep: int) -> Array:
    """The inverse: `[B, K, R * N, ...]` to `[B, N, K * R, ...]`."""
    batch, n_head, n_row, *rest = x.shape
    x = jnp.moveaxis(x.reshape(batch, n_head, n_rep, n_row // n_rep, *rest), 3, 1)
    return x.reshape(batch, n_row // n_rep, n_head * n_rep, *rest)


def table_weights(books: Books, seen: Seen) -> Array:
    """Weights of all query codes `[B, K, X, C]`, X = R * Cq."""
    n_head, n_code, _ = books.k.shape
    table = books.table if books.bias is None else books.table + books.bias[:, None, None]
    return code_weights(table.reshape(1, n_head, -1, n_code), seen.count[:, :, None].astype(table.dtype))


def chunk_for(queries: Queries, keys: Keys, books: Books, length: int) -> int:
    """Tokens of one step over queries or keys."""
    n_code, width = books.k.shape[1:]
    token = 2 * n_code + width + keys.v.shape[-1]
    return chunk_len(keys.v, length, 4 * keys.v.shape[0] * query_heads(queries) * token)


def answers(books: Books, seen: Seen, dtype: jnp.dtype) -> Array:
    """The output of every query code, `[B, H, Cq, V]`."""
    weight = table_weights(books, seen) * seen.count[:, :, None].astype(books.k.dtype)
    rows = einsum("bkxs,bksv->bkxv", weight, seen.mean).astype(dtype)
    return rows.reshape(rows.shape[0], books.q.shape[0], -1, rows.shape[-1])


def full_attention(queries: Queries, keys: Keys, books: Books, seen: Seen) -> Array:
    """Output `[B, T, H, V]` from what all queries see."""
    x = queries.codes if queries.q is None else queries.q
    (batch, length, n_head), n_key_head = x.shape[:3], books.k.shape[0]
    dtype = keys.v.dtype
    count = seen.count[:, :, None].astype(books.k.dtype)
    rows = None if queries.codes is None else answers(books, seen, dtype)

    def step(out: Array, start: Array | int, size: int) -> Array:
        if rows is not None:
            codes = read_chunk(queries.codes, start, size)
            answer = take_rows(rows, codes)
            answer = jnp.where((codes < 0)[..., None], jnp.nan, answer)
        else:
            score = by_key_head(books.score(read_chunk(queries.q, start, size), None), n_key_head)
            weight = code_weights(score, count) * count
            answer = einsum("bkns,bksv->bknv", weight, seen.mean).astype(dtype)
            answer = by_query_head(answer, n_head // n_key_head)
        return write_chunk(out, answer, start)

    out = jnp.zeros((batch, length, n_head, keys.v.shape[-1]), dtype)
    return scan_chunks(step, out, length, chunk_for(queries, keys, books, length))


def take_rows(rows: Array, codes: Array) -> Array:
    """`rows[b, h, codes[b, n, h]]`: `[B, H, X, .]` and `[B, N, H]` to `[B, N, H, .]`."""
    batch_ids, head_ids = jnp.arange(rows.shape[0])[:, None, None], jnp.arange(rows.shape[1])[None, None]
    return rows[batch_ids, head_ids, jnp.maximum(codes, 0)]


def full_gradients(
    queries: Queries, keys: Keys, books: Books, form: Form, seen: Seen, out: Array, d_out: Array
) -> Gradients:
    """Gradients of `sum(out * d_out)`; arguments as `full_attention`, and what it returned."""
    batch, length, n_head = d_out.shape[:3]
    n_key_head, n_code, width = books.k.shape
    n_rep, acc, dtype = n_head // n_key_head, books.k.dtype, keys.v.dtype
    scale = jnp.asarray(form.scale, acc)
    count = seen.count[:, :, None].astype(acc)
    weight_of_code = None if queries.codes is None else table_weights(books, seen)
    by_code = None if weight_of_code is None else weight_of_code.reshape(batch, n_head, -1, n_code)

    def over_queries(carry: Any, start: Array | int, size: int) -> Any:
        d_q, sums, bias = carry
        part_out, part_d = read_chunk(out, start, size), read_chunk(d_out, start, size)
        delta = jnp.sum(part_out.astype(acc) * part_d.astype(acc), axis=-1, keepdims=True)
        if by_code is not None:
            codes = read_chunk(queries.codes, start, size)
            weight = by_key_head(take_rows(by_code, codes), n_key_head)
        else:
            q = read_chunk(queries.q, start, size)
            weight = code_weights(by_key_head(books.score(q, None), n_key_head), count)
        rows, row_delta = by_key_head(part_d, n_key_head), by_key_head(delta, n_key_head)
        change = einsum("bknv,bksv->bkns", rows, seen.mean.astype(dtype)) - row_delta
        d_code = jnp.where(weight * count > 0, weight * count * change, 0)
        chunk = einsum("bkns,ksd->bknd", d_code.astype(dtype), books.k.astype(dtype)) * scale
        d_q = write_chunk(d_q, by_query_head(chunk, n_rep).astype(dtype), start)
        if by_code is not None:
            one_hot = is_code(codes, books.q.shape[1]).astype(dtype)
            d_sum, delta_sum = sums
            d_sum = d_sum + einsum("bthc,bthv->bhcv", one_hot, part_d).reshape(d_sum.shape)
            delta_sum = delta_sum + einsum("bthc,bthv->bhcv", one_hot.astype(acc), delta).reshape(
                delta_sum.shape
            )
            sums = d_sum, delta_sum
        else:
            of_q = by_key_head(q, n_key_head)
            weighted = (weight.astype(dtype)[..., None] * of_q[:, :, :, None]).reshape(*of_q.shape[:3], -1)
            product = einsum("bknx,bknv->bkxv", weighted, rows).reshape(sums.product.shape)
            sums = ByKeyCode(
                sums.d_out + einsum("bkns,bknv->bksv", weight.astype(dtype), rows),
                sums.product + product,
                sums.delta + einsum("bkns,bknd->bksd", (weight * row_delta).astype(dtype), of_q),
            )
        if bias is not None:
            bias = bias + jnp.sum(by_query_head(d_code, n_rep), axis=(0, 1, 3))
        return d_q, sums, bias

    first = nothing_later(batch, books, n_rep, keys.v.shape[-1])
    sums: Any = first if isinstance(first, ByKeyCode) else (first.d_out, first.delta)
    bias = None if books.bias is None else jnp.zeros_like(books.bias)
    d_q = jnp.zeros((batch, length, n_head, width), dtype)
    chunk = chunk_for(queries, keys, books, length)
    chunk = min(chunk, MAX_TERMS if by_code is not None else n_code)
    d_q, sums, bias = scan_chunks(over_queries, (d_q, sums, bias), length, chunk)

    def over_keys(carry: tuple[Array, Array], start: Array | int, size: int) -> tuple[Array, Array]:
        codes, values = read_values(keys, start, size)
        values = jnp.swapaxes(values, 1, 2)
        one_hot = jnp.swapaxes(is_code(codes, n_code), 1, 2)  # [B, K, N, C]
        if weight_of_code is not None:
            d_sum, delta_sum = sums
            at_key = einsum("bkns,bkxs->bknx", one_hot.astype(acc), weight_of_code)
            d_v = einsum("bknx,bkxv->bknv", at_key.astype(dtype), d_sum.astype(dtype))
            change = einsum("bknv,bkxv->bknx", values, d_sum.astype(dtype)) - jnp.swapaxes(delta_sum, 2, 3)
            d_score = jnp.where(at_key > 0, at_key * change, 0)
            grouped = books.q.reshape(n_key_head, -1, width)
            d_k = einsum("bknx,kxd->bknd", d_score.astype(dtype), grouped.astype(dtype))
        else:
            d_k, d_v = pull_keys(one_hot, values, sums)
        news = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (d_k * scale, d_v))
        return tuple(write_chunk(x, new, start) for x, new in zip(carry, news, strict=True))  # type: ignore[return-value]

    zero = jnp.zeros((*keys.v.shape[:3], width), dtype), jnp.zeros(keys.v.shape, dtype)
    chunk = chunk_for(queries, keys, books, keys.v.shape[1])
    chunk = chunk if by_code is not None else min(chunk, n_code)
    d_k, d_v = scan_chunks(over_keys, zero, keys.v.shape[1], chunk)
    return Gradients(d_q, d_k, d_v, None, None, bias)
