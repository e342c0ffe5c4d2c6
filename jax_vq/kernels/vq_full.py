"""Attention that is not causal: sums by segment, added up, then for every query the answer of its code."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import (
    F32,
    by_head,
    columns,
    launch,
    power_of_two,
    read_numbers,
    tokens,
    write_vectors,
)
from jax_vq.kernels.vq_causal import MAX_LENGTH
from jax_vq.kernels.vq_sums import segment_sums
from jax_vq.ops.implementations import Kernel
from jax_vq.ops.vq_blocks import Keys
from jax_vq.ops.vq_causal import Books, Queries
from jax_vq.ops.vq_full import Seen, answers


def why_not_count(asked: str | None, keys: Keys, books: Books) -> str | None:
    """Why `count_keys` cannot run, or None."""
    if keys.documents is not None:
        return "padding: the kernel is for whole sequences"
    if keys.v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"values of {keys.v.dtype}: the kernel is for bfloat16 and float32"
    if keys.v.shape[1] > MAX_LENGTH:
        return f"{keys.v.shape[1]} tokens: the kernel counts to {MAX_LENGTH}"
    return None


def count_keys(keys: Keys, books: Books) -> Seen:
    """`ops.vq_full.count_keys`."""
    batch, length, n_head, width = keys.v.shape
    n_code = books.k.shape[1]
    size = sizes.size_of(sizes.of_values("sums", keys.v.dtype), n_code)
    each = sizes.segment_len(length, batch * n_head * sizes.n_beside(size, width), size.tile)
    sums = segment_sums(keys.codes, keys.v, n_code, each)
    count = jnp.sum(sums.numbers[..., :n_code].astype(jnp.int32), axis=2, dtype=jnp.int32)
    total = jnp.sum(sums.vectors[..., :n_code, :], axis=2)
    return Seen(count, total / _at_least_one(count)[..., None])


def _at_least_one(count: Array) -> Array:
    return jnp.maximum(count, 1).astype(F32)


def why_not_answer(asked: str | None, queries: Queries, keys: Keys, books: Books, seen: Seen) -> str | None:
    """Why `full_attention` cannot run, or None."""
    if queries.codes is None:
        return "keys only: the kernel is for quantized queries"
    if keys.v.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"values of {keys.v.dtype}: the kernel is for float32 and half types"
    return None


def full_attention(queries: Queries, keys: Keys, books: Books, seen: Seen) -> Array:
    """`ops.vq_full.full_attention`."""
    batch, length, n_head = queries.codes.shape
    rows = answers(books, seen, keys.v.dtype)
    width, size = rows.shape[-1], sizes.size_of("answer", rows.shape[2])
    n_column = min(power_of_two(width), size.columns)
    run = launch(
        partial(_answer_kernel, tile=size.tile, n_column=n_column),
        jax.ShapeDtypeStruct((batch, length, n_head, width), rows.dtype),
        (pl.cdiv(length, size.tile), batch * n_head, pl.cdiv(width, n_column)),
        size.n_warp,
        size.n_stage,
    )
    return run(by_head(queries.codes), rows)


def _answer_kernel(code_ref: Any, row_ref: Any, out_ref: Any, *, tile: int, n_column: int) -> None:
    _, length, n_head, width = out_ref.shape
    batch, head = pl.program_id(1) // n_head, pl.program_id(1) % n_head
    cols = columns(pl.program_id(2), n_column, width)
    rows = tokens(pl.program_id(0) * tile, tile, length)
    code = read_numbers(code_ref, batch, rows, head, 0)
    column = cols[0].start + jax.lax.broadcasted_iota(jnp.int32, (tile, n_column), 1)
    row = jnp.broadcast_to(jnp.maximum(code, 0)[:, None], column.shape)
    column = column if cols[1] is None else jnp.minimum(column, width - 1)
    answer = plt.load(row_ref.at[batch, head, row, column])
    answer = jnp.where((code < 0)[:, None], jnp.full_like(answer, jnp.nan), answer)
    write_vectors(out_ref, batch, rows, head, cols, answer)


KERNELS = {
    "count_keys": Kernel(count_keys, why_not_count),
    "full_attention": Kernel(full_attention, why_not_answer),
}
