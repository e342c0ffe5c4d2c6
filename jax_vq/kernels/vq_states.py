"""Causal attention over more codes than registers hold: what came before each block goes through memory.

One kernel follows a segment and writes the sums by code before each block of it. Another one takes every
tile of queries by itself, over the sums before its block and the keys of the block.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import hopper_blocks, hopper_states, sizes
from jax_vq.kernels.tiles import (
    F32,
    NARROW,
    Rows,
    as_columns,
    by_head,
    columns,
    contained,
    dot,
    in_parts,
    launch,
    loop,
    lower_triangle,
    one_hot,
    place_of,
    poisoned,
    power_of_two,
    read_numbers,
    read_rows,
    read_vectors,
    spoiled,
    tokens,
    write_attention,
)
from jax_vq.kernels.vq_sums import Sums, before_segments, read_sums, segment_sums


class States(NamedTuple):
    """Sums over the keys before each block."""

    vectors: Array  # [B, K, N, C, V] in the dtype of v
    numbers: Array  # [B, K, N, C] float32


def block_states(
    codes: Array,
    v: Array,
    first: Sums,
    block: int,
    weights: Array | None = None,
    numbers: Array | None = None,
    *,
    is_gradient: bool = False,
) -> tuple[States, Sums]:
    """The sums before every block of `block` tokens, a multiple of 16, and those of every segment.

    With weights, of `weights * v` and `weights * numbers` over the tokens after every block instead.

    There are as many segments as leave a program for each processor; sums by segment are found first only
    where there are several.

    Args:
      codes: int32 `[B, T, K]`; a token of code -1 makes all later sums NaN.
      v: `[B, T, K, V]`.
      first: sums before the sequence, as one segment; with weights, after it.
      weights, numbers: float32 `[B, T, K]`.
      is_gradient: a token of code -1 adds nothing; other sizes of tiles.
    """
    batch, length, n_head, width = v.shape
    n_code = first.numbers.shape[3]
    size = sizes.size_of("grad_states" if is_gradient else "states", n_code)
    tile, chunk = min(size.tile, block & -block), min(size.chunk, n_code)
    n_column = min(power_of_two(width), size.columns)
    n_part = pl.cdiv(n_code, chunk) * pl.cdiv(width, n_column)
    by_hopper = weights is None and not is_gradient and hopper_states.is_usable(n_code, v, block)
    if by_hopper:
        n_part = hopper_states.n_part(n_code)
    step = math.lcm(block, sizes.size_of("sums", n_code).tile)
    each = sizes.segment_len(length, batch * n_head * n_part, step)
    before = first
    if each < length:
        sums = segment_sums(codes, v, n_code, each, weights, numbers)
        before = before_segments(sums, first, is_reverse=weights is not None)
    if by_hopper:
        *states, last_sum, last_number = hopper_states.block_states(codes, v, *before, block, each)
    else:
        n_segment, n_block = before.numbers.shape[2], each // block
        kernel = partial(
            _states_kernel,
            tile=tile,
            n_tile=block // tile,
            n_block=n_block,
            chunk=chunk,
            n_column=n_column,
            has_weights=weights is not None,
            is_gradient=is_gradient,
        )
        shape = batch, n_head, n_segment * n_block, n_code
        shapes = (
            *(jax.ShapeDtypeStruct((*shape, width), v.dtype), jax.ShapeDtypeStruct(shape, F32)),
            *(jax.ShapeDtypeStruct(x.shape, F32) for x in before),
        )
        run = launch(kernel, shapes, (n_segment, batch * n_head, n_part), size.n_warp, size.n_stage)
        more = () if weights is None else (weights, numbers)
        *states, last_sum, last_number = run(by_head(codes), v, *map(by_head, more), *before)
    if each >= length:
        sums = Sums(last_sum - first.vectors, last_number - first.numbers)
    return States(*states), sums


def _states_kernel(
    code_ref: Any,
    v_ref: Any,
    *refs: Any,
    tile: int,
    n_tile: int,
    n_block: int,
    chunk: int,
    n_column: int,
    has_weights: bool,
    is_gradient: bool,
) -> None:
    *more_refs, sum_ref, number_ref, state_ref, count_ref, last_sum_ref, last_number_ref = refs
    _, length, n_head, width = v_ref.shape
    segment, batch, head, _ = place_of(n_head, n_head)
    n_part = pl.cdiv(width, n_column)
    first = (pl.program_id(2) // n_part) * chunk
    cols = columns(pl.program_id(2) % n_part, n_column, width)
    at = pl.ds(first, chunk)
    there = None if cols[1] is None else jnp.broadcast_to(cols[1][None, :], (chunk, n_column))
    dtype = v_ref.dtype

    def write(value_ref: Any, count_ref: Any, here: Any, total: Array, number: Array) -> None:
        plt.store(value_ref.at[batch, head, here, at, cols[0]], total, mask=there)
        count = jnp.sum(number, axis=1) if has_weights else jnp.max(number, axis=1)
        plt.store(count_ref.at[batch, head, here, at], count)

    def step(i: Any, sums: Any) -> Any:
        total, number = sums
        now = n_block * n_tile - 1 - i if has_weights else i

        @pl.when(lax.rem(i, lax.full_like(i, n_tile)) == 0)
        def keep() -> None:
            here = segment * n_block + lax.div(now, lax.full_like(i, n_tile))
            write(state_ref, count_ref, here, total.astype(dtype), number)

        rows = tokens((segment * n_block * n_tile + now) * tile, tile, length)
        code = read_numbers(code_ref, batch, rows, head, -2)
        v = read_vectors(v_ref, batch, rows, head, cols)
        if not is_gradient:
            v = poisoned(v, code)
        hot, terms = one_hot(code, first, chunk, dtype), jnp.ones((tile, NARROW), dtype)
        if has_weights:
            weight, value = (read_numbers(ref, batch, rows, head, 0.0) for ref in more_refs)
            hot = jnp.where(hot > 0, weight.astype(dtype)[None, :], jnp.zeros_like(hot))
            terms = in_parts(as_columns(value), dtype)
        return total + dot(hot, v), number + dot(hot, terms)

    total, number = read_sums(sum_ref, number_ref, (batch, head, segment), first, chunk, cols)
    if has_weights:
        number = jnp.where(lax.broadcasted_iota(jnp.int32, number.shape, 1) == 0, number, 0.0)
    total, number = loop(n_block * n_tile, step, (total, number))
    write(last_sum_ref, last_number_ref, segment, total, number)


def read_values(
    state_ref: Any, count_ref: Any, place: tuple[Any, Any, Any], first: Any, size: int, cols: Rows
) -> tuple[Array, Array]:
    """In a kernel, `States` at (batch, head, block) of the codes from `first` on: `[C, V]`, `[C]`."""
    at = pl.ds(first, size)
    ref = state_ref.at[*place, at, cols[0]]
    if cols[1] is None:
        value = plt.load(ref)
    else:
        value = plt.load(ref, mask=jnp.broadcast_to(cols[1][None, :], (size, cols[0].size)), other=0)
    return value, plt.load(count_ref.at[*place, at])


def read_state(
    state_ref: Any, count_ref: Any, place: tuple[Any, Any, Any], first: Any, size: int, cols: Rows
) -> tuple[Array, Array]:
    """`read_values` with counts as `in_parts`, `[C, NARROW]`."""
    value, count = read_values(state_ref, count_ref, place, first, size, cols)
    return value, in_parts(as_columns(count), value.dtype)


def block_attention(
    query_codes: Array,
    key_codes: Array,
    v: Array,
    weight: Array,
    top: Array,
    states: States,
    mode: Array,
    block: int,
) -> tuple[Array, Array]:
    """Output and log-sum-exp of the segments of mode 0, and of mode 1: those with a NaN or inf.

    The others are left as they are.

    Args:
      query_codes: int32 `[B, T, H]`; key_codes: `[B, T, K]`; v: `[B, T, K, V]`.
      weight: `[H, Cq, C]`, top: `[H, Cq]`, of `vq_tables.Tables`.
      mode: int32 `[B, H, S]`.
      block: tokens of a block.
    """
    batch, length, n_head = query_codes.shape
    width, n_code = v.shape[3], weight.shape[2]
    size = sizes.size_of("blocks", n_code)
    n_column = min(power_of_two(width), size.columns)
    kernel = partial(
        _block_kernel,
        tile=size.tile,
        n_tile=block // size.tile,
        n_block=states.numbers.shape[2] // mode.shape[2],
        chunk=size.chunk,
        n_column=n_column,
    )
    shapes = (
        jax.ShapeDtypeStruct((batch, length, n_head, width), v.dtype),
        jax.ShapeDtypeStruct((batch, n_head, length), F32),
    )
    grid = pl.cdiv(length, size.tile), batch * n_head, pl.cdiv(width, n_column)
    codes = query_codes, key_codes
    arrays = *map(by_head, codes), v, weight, top, *states, mode
    if hopper_blocks.is_usable(query_codes, v, weight, block):
        out, lse = hopper_blocks.block_attention(*codes, v, weight, top, states, mode)
        found = out, by_head(lse)
    else:
        found = launch(kernel, shapes, grid, size.n_warp, size.n_stage)(*arrays)
    aliases = {len(arrays): 0, len(arrays) + 1: 1}
    careful = launch(partial(kernel, contains=True), shapes, grid, size.n_warp, size.n_stage, aliases)
    out, lse = careful(*arrays, *found)
    return out, by_head(lse)


def _block_kernel(
    query_ref: Any,
    key_ref: Any,
    v_ref: Any,
    weight_ref: Any,
    top_ref: Any,
    state_ref: Any,
    count_ref: Any,
    mode_ref: Any,
    *refs: Any,
    tile: int,
    n_tile: int,
    n_block: int,
    chunk: int,
    n_column: int,
    contains: bool = False,
) -> None:
    """Tiles of segments without a NaN or inf; or with one, which is kept from the rows before it."""
    out_ref, lse_ref = refs[-2:]
    length, n_head, width = out_ref.shape[1:]
    n_key_head, n_code, dtype = v_ref.shape[2], weight_ref.shape[2], v_ref.dtype
    here, batch, head, key_head = place_of(n_head, n_key_head)
    block, cols = here // n_tile, columns(pl.program_id(2), n_column, width)

    @pl.when(plt.load(mode_ref.at[batch, head, block // n_block]) == int(contains))
    def run() -> None:
        rows = tokens(here * tile, tile, length)
        query = read_numbers(query_ref, batch, rows, head, 0)

        def keys_at(i: Any) -> tuple[Array, Array]:
            rows = tokens(i * tile, tile, length)
            key = read_numbers(key_ref, batch, rows, key_head, -2)
            return key, read_vectors(v_ref, batch, rows, key_head, cols)

        def weights_of(key: Array) -> Array:
            """`E` of every pair of a query and a key."""

            def more(c: Any, picked: Array) -> Array:
                weight = read_rows(weight_ref, head, query, c * chunk, chunk)
                return picked + dot(weight, one_hot(key, c * chunk, chunk, dtype))

            return loop(n_code // chunk, more, jnp.zeros((tile, tile), F32))

        def far(c: Any, carry: Any) -> Any:
            out, total, near = carry
            weight = read_rows(weight_ref, head, query, c * chunk, chunk)
            value, count = read_state(state_ref, count_ref, (batch, key_head, block), c * chunk, chunk, cols)
            total += jnp.sum(dot(weight, count), axis=1)
            return out + dot(weight, value), total, near + dot(weight, one_hot(key, c * chunk, chunk, dtype))

        def attend(out: Array, near: Array, key: Array, v: Array, sees: Array) -> Array:
            """With keys of these weights, `sees [T, T]` of them."""
            if not contains:
                return out + dot(near.astype(dtype), v)
            seen, bad = contained(v, key)
            return spoiled(out + dot(near.astype(dtype), seen), sees, bad)

        key, v = keys_at(here)
        lower = lower_triangle(tile)
        zero = jnp.zeros((tile, n_column), F32), jnp.zeros((tile,), F32), jnp.zeros((tile, tile), F32)
        out, total, near = loop(n_code // chunk, far, zero)
        near = jnp.where(lower, near, 0)
        out, total = attend(out, near, key, v, lower), total + jnp.sum(near, axis=1)

        def earlier(i: Any, carry: Any) -> Any:
            out, total = carry
            key, v = keys_at(i)
            near = weights_of(key)
            return attend(out, near, key, v, jnp.ones_like(lower)), total + jnp.sum(near, axis=1)

        if n_tile > 1:
            out, total = lax.fori_loop(block * n_tile, here, earlier, (out, total))
        top = plt.load(top_ref.at[head, jnp.maximum(query, 0)])
        write_attention(out_ref, lse_ref, batch, rows, head, cols, query, out, total, top)
