"""Causal attention over codes in one pass over tokens: every segment at once, tile by tile.

With `E[c, s] = exp(A[c, s] - max_s A[c, s])` and the sums `u_s`, `n_s` over the keys before a tile, query i
of code c has

    l_i = sum_s E[c, s] n_s + sum_{j <= i in tile} E[c, z_k(j)]
    o_i = (sum_s E[c, s] u_s + sum_{j <= i in tile} E[c, z_k(j)] v_j) / l_i

Weights are relative to the largest score of a query code, not of the keys that a query sees. Where scores
of one code differ by more than `MAX_RANGE` they could underflow: such a head takes a slower loop, which
subtracts the right maximum (`math.md` 2). A segment with a NaN or inf takes one that keeps it from the rows
before.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import hopper_causal, hopper_causal_f32, hopper_causal_wide, sizes, vq_window
from jax_vq.kernels.tiles import (
    F32,
    NARROW,
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
from jax_vq.kernels.vq_before import before_segments, modes
from jax_vq.kernels.vq_causal_f32 import causal_kernel as float32_kernel
from jax_vq.kernels.vq_states import block_attention, block_states
from jax_vq.kernels.vq_sums import Sums, padded_codes, read_sums, segment_sums
from jax_vq.kernels.vq_tables import Tables
from jax_vq.kernels.vq_wide import wide_weights
from jax_vq.ops.implementations import Kernel
from jax_vq.ops.vq_blocks import Form, Keys
from jax_vq.ops.vq_causal import Books, Queries
from jax_vq.ops.vq_causal import causal_attention as plain_attention
from jax_vq.ops.vq_state import Coded, VQState, coded_of

N_FOLLOWED = 16  # blocks of a program that most often has nothing to do
MAX_LENGTH = 2**24  # tokens, which float32 counts exactly


def why_not(
    asked: str | None, queries: Queries, keys: Keys, books: Books, state: VQState, form: Form
) -> str | None:
    """Why `causal_attention` cannot run, or None."""
    n_code = books.k.shape[1]
    if queries.codes is None:
        return "keys only: the kernel is for quantized queries"
    if not form.has_exact and (keys.documents is not None or form.is_strict):
        return "padding, documents or a state to return: the kernel is for one whole sequence"
    if keys.v.dtype not in (jnp.bfloat16, jnp.float32):
        return f"values of {keys.v.dtype}: the kernel is for bfloat16 and float32"
    if keys.v.dtype == jnp.float32 and form.has_exact:
        return "values of float32 with an exact window or sinks: the kernel is for bfloat16"
    if keys.v.dtype == jnp.float32 and n_code > sizes.MAX_CODES_FLOAT32:
        return f"{n_code} key codes with values of float32: the kernel is for {sizes.MAX_CODES_FLOAT32}"
    if n_code > sizes.MAX_CODES:
        return f"{n_code} key codes: the kernel is for at most {sizes.MAX_CODES}"
    if keys.v.shape[1] > MAX_LENGTH:
        return f"{keys.v.shape[1]} tokens: the kernel counts to {MAX_LENGTH}"
    return vq_window.why_not(queries, keys, n_code, form) if form.has_exact else None


def first_sums(coded: Coded, n_padded: int) -> Sums:
    """Sums over the keys before a call, as one segment."""
    padding = (0, 0), (0, 0), (0, n_padded - coded.count.shape[2])
    count = jnp.pad(coded.count, padding).astype(F32)[:, :, None]
    mean = jnp.pad(coded.mean, (*padding, (0, 0)))[:, :, None]
    return Sums(mean * count[..., None], count)


def coded_after(first: Coded, sums: Sums) -> Coded:
    """The keys before a call and in it."""
    n_code = first.count.shape[2]
    count = first.count + jnp.sum(sums.numbers[..., :n_code].astype(jnp.int32), axis=2, dtype=jnp.int32)
    total = jnp.sum(sums.vectors[..., :n_code, :], axis=2)
    drift = total - (count - first.count)[..., None].astype(F32) * first.mean
    return Coded(count, first.mean + drift / jnp.maximum(count, 1)[..., None].astype(F32), first.start)


def causal_attention(
    queries: Queries, keys: Keys, books: Books, state: VQState, form: Form
) -> tuple[Array, Array, Coded]:
    """`ops.vq_causal.causal_attention`."""
    if form.has_exact:
        return _with_window(queries, keys, books, state, form)
    n_padded, chunk = padded_codes(books.k.shape[1])
    first = first_sums(coded_of(state), n_padded)
    tables = Tables.of(books, n_padded, keys.v.dtype)
    run = _by_segments if n_padded == chunk else partial(_by_blocks, max_bytes=sizes.MAX_STATE_BYTES)
    if hopper_causal_wide.segment_len(queries.codes, keys.v, tables.weight):
        run = _by_two_groups
    out, lse, sums = run(queries.codes, keys, tables, first)
    return out, lse, coded_after(coded_of(state), sums)


def _by_segments(query_codes: Array, keys: Keys, tables: Tables, first: Sums) -> tuple[Array, Array, Sums]:
    """Programs that follow a segment each, with the sums by code in registers."""
    batch, length, _, width = keys.v.shape
    n_head, n_code = tables.top.shape[0], first.numbers.shape[3]
    size = sizes.size_of(sizes.of_values("causal", keys.v.dtype), n_code)
    tile = sizes.size_of(sizes.of_values("sums", keys.v.dtype), n_code).tile
    n_row = batch * n_head * sizes.n_beside(size, width)
    each = sizes.segment_len(length, n_row, max(size.tile, tile))
    sums = segment_sums(keys.codes, keys.v, n_code, each)
    before, is_bad = before_segments(sums, first)
    coded, mode = (query_codes, keys.codes, keys.v), modes(tables, is_bad)
    arrays = *coded, *tables[:3], *before, mode
    by_mosaic = hopper_causal_f32 if keys.v.dtype == F32 else hopper_causal
    if by_mosaic.is_usable(query_codes, keys.v, tables.weight, each):
        results = by_mosaic.follow(*coded, tables.weight, tables.top, before, mode, each)
    else:
        results = _follow(arrays, size, padded_codes(n_code)[1], each)
    out, lse = _follow(arrays, size, padded_codes(n_code)[1], each, results)
    return out, lse, sums


def _by_two_groups(query_codes: Array, keys: Keys, tables: Tables, first: Sums) -> tuple[Array, Array, Sums]:
    """Programs that follow a segment each, with sums of over 128 codes in the registers of two groups.

    By blocks where a sum is not finite or a head has wide scores.
    """
    each = hopper_causal_wide.segment_len(query_codes, keys.v, tables.weight)
    sums = segment_sums(keys.codes, keys.v, first.numbers.shape[3], each)
    before, is_bad = before_segments(sums, first)
    mode, coded = modes(tables, is_bad), (query_codes, keys.codes, keys.v)
    out, lse = lax.cond(
        jnp.any(mode > 0),
        lambda: _by_blocks(query_codes, keys, tables, first, max_bytes=sizes.MAX_RARE_BYTES)[:2],
        lambda: hopper_causal_wide.follow(*coded, tables.weight, tables.top, before, mode, each),
    )
    return out, lse, sums


def _by_blocks(
    query_codes: Array, keys: Keys, tables: Tables, first: Sums, *, max_bytes: int
) -> tuple[Array, Array, Sums]:
    """The sums before each block through memory, `max_bytes` of it; then every tile of queries by itself."""
    batch, length, n_key_head, width = keys.v.shape
    n_code = first.numbers.shape[3]
    block = sizes.block_len(n_code, batch * length * n_key_head, width * keys.v.dtype.itemsize, max_bytes)
    states, sums = block_states(keys.codes, keys.v, first, block)
    mode = modes(tables, jnp.any(~jnp.isfinite(sums.vectors), axis=-1).astype(jnp.int32))
    coded = query_codes, keys.codes, keys.v
    results = block_attention(*coded, tables.weight, tables.top, states, mode, block)
    # Heads with wide scores are left: most often there are none, so that a program goes for several blocks.
    n_program = pl.cdiv(states.numbers.shape[2], N_FOLLOWED)
    mode = 2 * tables.is_wide.astype(jnp.int32)[None, :, None]
    mode = jnp.broadcast_to(mode, (batch, tables.top.shape[0], n_program))
    arrays, size = (*coded, *tables[:3], *states, mode), sizes.size_of("causal", n_code)
    out, lse = _follow(arrays, size, padded_codes(n_code)[1], block, results)
    return out, lse, sums


def _follow(arrays: Any, size: sizes.Size, chunk: int, each: int, results: Any = ()) -> tuple[Array, Array]:
    """Output and log-sum-exp of segments of mode 0, or with their results of all others.

    Args:
      arrays: of a kernel; the last one, modes, is of its programs, which follow equal numbers of segments.
      each: tokens of a segment; the sums before each one are given.
    """
    query_codes, key_codes, v, *others = arrays
    batch, length, n_head = query_codes.shape
    width = v.shape[3]
    n_column = min(power_of_two(width), size.columns)
    kernel = partial(
        float32_kernel if v.dtype == F32 else _causal_kernel,
        tile=size.tile,
        n_tile=each // size.tile,
        chunk=chunk,
        n_column=n_column,
        is_careful=bool(results),
    )
    shapes = (
        jax.ShapeDtypeStruct((batch, length, n_head, width), v.dtype),
        jax.ShapeDtypeStruct((batch, n_head, length), F32),
    )
    grid = arrays[-1].shape[2], batch * n_head, pl.cdiv(width, n_column)
    aliases = {len(arrays) + i: i for i in range(len(results))}
    n_stage = 1 if results else size.n_stage
    run = launch(kernel, shapes, grid, size.n_warp, n_stage, aliases)
    arrays = by_head(query_codes), by_head(key_codes), v, *others
    out, lse = run(*arrays, *results[:1], *map(by_head, results[1:]))
    return out, by_head(lse)


def _with_window(
    queries: Queries, keys: Keys, books: Books, state: VQState, form: Form
) -> tuple[Array, Array, Coded]:
    """With exact keys; of a whole sequence, so that nobody asks for the keys that later tokens see."""
    n_padded, _ = padded_codes(books.k.shape[1])
    batch, _, n_key_head, width = keys.v.shape
    shape = batch, n_key_head, 1, n_padded
    nothing = Sums(jnp.zeros((*shape, width), F32), jnp.zeros(shape, F32))
    coded = keys._replace(codes=vq_window.coded_keys(keys, form))
    states, sums = block_states(coded.codes, keys.v, nothing, vq_window.spacing(form))
    tables = Tables.of(books, n_padded, keys.v.dtype)
    out, lse = lax.cond(
        jnp.any(tables.is_wide) | vq_window.is_irregular(keys, sums, form),
        lambda: plain_attention(queries, keys, books, state, form)[:2],
        lambda: vq_window.window_attention(queries, coded, tables.weight, tables.top, states, form),
    )
    return out, lse, coded_of(state)


def _causal_kernel(
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
    """Segments of mode 0, or of all others: those have their own kernel, which needs more of a processor.

    Either leaves what the other one writes as it is.
    """
    out_ref, lse_ref = refs[-2:]
    length, n_head, width = out_ref.shape[1:]
    n_key_head, n_code, dtype = v_ref.shape[2], weight_ref.shape[2], v_ref.dtype
    program, batch, head, key_head = place_of(n_head, n_key_head)
    cols = columns(pl.program_id(2), n_column, width)
    firsts, n_segment = range(0, n_code, chunk), pl.cdiv(sum_ref.shape[2], mode_ref.shape[2])
    lower = lower_triangle(tile)

    def quick(query: Array, hots: list[Array], sums: Any) -> tuple[Array, Array, Array, Array]:
        """Output before its division, denominator, weights of the tile and what they are relative to."""
        out, picked = jnp.zeros((tile, n_column), F32), jnp.zeros((tile, tile), F32)
        total = jnp.zeros((tile,), F32)
        for first, hot, (value, number) in zip(firsts, hots, sums, strict=True):
            weight = read_rows(weight_ref, head, query, first, chunk)
            picked += dot(weight, hot)
            out += dot(weight, value.astype(dtype))
            total += jnp.sum(dot(weight, in_parts(number, dtype)), axis=1)
        return out, total, jnp.where(lower, picked, 0), plt.load(top_ref.at[head, jnp.maximum(query, 0)])

    def wide(query: Array, key: Array, sums: Any) -> tuple[Array, Array, Array, Array]:
        """The same relative to the largest score of the keys that a query sees."""
        counts = [jnp.max(number, axis=1) for _, number in sums]
        far, near, top = wide_weights(score_ref, head, query, key, counts, chunk)
        out, total = jnp.zeros((tile, n_column), F32), jnp.zeros((tile,), F32)
        for weight, count, (value, _) in zip(far, counts, sums, strict=True):
            out += dot(weight.astype(dtype), value.astype(dtype))
            total += jnp.sum(weight * count[None, :], axis=1)
        return out, total, near, top

    def step(i: Any, sums: Any, segment: Any, contains: bool, is_wide: bool) -> Any:
        rows = tokens((segment * n_tile + i) * tile, tile, length)
        query = read_numbers(query_ref, batch, rows, head, 0)
        key = read_numbers(key_ref, batch, rows, key_head, -2)
        v = read_vectors(v_ref, batch, rows, key_head, cols)
        hots = [one_hot(key, first, chunk, dtype) for first in firsts]
        out, total, near, top = wide(query, key, sums) if is_wide else quick(query, hots, sums)
        seen = v
        if contains:
            seen, bad = contained(v, key)
            v = poisoned(v, key)
        out += dot(near.astype(dtype), seen)
        if contains:
            out = spoiled(out, lower, bad)
        total += jnp.sum(near, axis=1)
        write_attention(out_ref, lse_ref, batch, rows, head, cols, query, out, total, top)
        ones = jnp.ones((tile, NARROW), dtype)
        return [
            (value + dot(hot, v), number + dot(hot, ones))
            for hot, (value, number) in zip(hots, sums, strict=True)
        ]

    def follow(segment: Any, wanted: int) -> None:
        place = batch, key_head, segment
        sums = [read_sums(sum_ref, number_ref, place, first, chunk, cols) for first in firsts]
        loop(n_tile, partial(step, segment=segment, contains=wanted > 0, is_wide=wanted == 2), sums)

    mode = plt.load(mode_ref.at[batch, head, program])
    for wanted in (1, 2) if is_careful else (0,):

        @pl.when(mode == wanted)
        def run(wanted: int = wanted) -> None:
            if n_segment == 1:
                follow(program, wanted)
            else:
                first, last = program * n_segment, np.int32(sum_ref.shape[2] - 1)
                loop(n_segment, lambda i, _: follow(jnp.minimum(first + i, last), wanted), None)


KERNELS = {"causal_attention": Kernel(causal_attention, why_not)}
