"""Causal attention with an exact window and sinks, in one softmax with all older keys through their codes.

The queries of a block see the keys of the window one by one, as flash attention does, and through codes what
came before the window: the sums of `vq_states` at its start. Sinks are never in those.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import hopper_window, sizes
from jax_vq.kernels.tiles import (
    F32,
    NARROW,
    Rows,
    by_head,
    columns,
    dot,
    dot_t,
    launch,
    place_of,
    power_of_two,
    read_numbers,
    read_rows,
    read_vectors,
    tokens,
    write_attention,
)
from jax_vq.kernels.vq_states import States, read_state
from jax_vq.kernels.vq_sums import Sums
from jax_vq.ops.vq_blocks import Form, Keys
from jax_vq.ops.vq_causal import Queries

MAX_SINK = 128
NO_CODE = -2  # of a key that is not seen through codes


def why_not(queries: Queries, keys: Keys, n_code: int, form: Form) -> str | None:
    """Why an exact part cannot run in the kernel, or None."""
    if not form.is_whole:
        return "padding, documents or a state: the kernel of the window is for one whole sequence"
    if not form.mem_len:
        return "sinks without a window: the kernel is for both"
    if form.n_sink > MAX_SINK:
        return f"{form.n_sink} sinks: the kernel is for at most {MAX_SINK}"
    if spacing(form) % NARROW:
        return (
            f"block_len {form.block_len} and mem_len {form.mem_len}: the kernel is for multiples of {NARROW}"
        )
    n_byte = keys.v.size * keys.v.dtype.itemsize // spacing(form) * n_code
    if n_byte > sizes.MAX_STATE_BYTES:
        return f"states of {n_byte / 2**30:.1f} GiB: the kernel is for at most {sizes.MAX_STATE_BYTES >> 30}"
    if keys.k_local.shape[3] > sizes.MAX_WIDTH:
        return f"local keys of width {keys.k_local.shape[3]}: the kernel is for at most {sizes.MAX_WIDTH}"
    return None


def spacing(form: Form) -> int:
    """Tokens between two states: windows start at multiples of it."""
    return math.gcd(form.block_len, form.mem_len)


def coded_keys(keys: Keys, form: Form) -> Array:
    """Key codes of all but the sinks."""
    is_sink = jnp.arange(keys.codes.shape[1])[None, :, None] < form.n_sink
    return jnp.where(is_sink, NO_CODE, keys.codes)


def is_irregular(keys: Keys, sums: Sums, form: Form) -> Array:
    """Whether a value is not finite, or a key was not when its code was looked for."""
    sinks = keys.v[:, : form.n_sink]
    is_bad = ~jnp.all(jnp.isfinite(sums.vectors)) | ~jnp.all(jnp.isfinite(sinks))
    return is_bad | jnp.any(keys.codes[:, : form.n_sink] < 0)


def window_attention(
    queries: Queries, keys: Keys, weight: Array, top: Array, states: States, form: Form
) -> tuple[Array, Array]:
    """Output and log-sum-exp, where nothing `is_irregular`.

    Args:
      keys: their codes are `coded_keys`.
      weight: `[H, Cq, C]`, top: `[H, Cq]`, of `vq_tables.Tables`.
      states: before every `spacing(form)` tokens, without the sinks.
    """
    if hopper_window.is_usable(queries, keys, weight, form):
        return hopper_window.window_attention(queries, keys, weight, top, states, form)
    batch, length, n_head = queries.codes.shape
    width, n_code = keys.v.shape[3], weight.shape[2]
    size = sizes.size_of("window", n_code)
    n_column = min(power_of_two(width), size.columns)
    step = spacing(form)
    tile = min(size.tile, step & -step)
    kernel = partial(
        _window_kernel, form=form, tile=tile, chunk=min(size.chunk, n_code), n_column=n_column, step=step
    )
    shapes = (
        jax.ShapeDtypeStruct((batch, length, n_head, width), keys.v.dtype),
        jax.ShapeDtypeStruct((batch, n_head, length), F32),
    )
    grid = pl.cdiv(length, tile), batch * n_head, pl.cdiv(width, n_column)
    run = launch(kernel, shapes, grid, size.n_warp, size.n_stage)
    arrays = by_head(queries.codes), queries.q_local, keys.k_local, keys.v, weight, top
    out, lse = run(*arrays, *states)
    return out, by_head(lse)


def _window_kernel(
    query_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    weight_ref: Any,
    top_ref: Any,
    state_ref: Any,
    count_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    form: Form,
    tile: int,
    chunk: int,
    n_column: int,
    step: int,
) -> None:
    length, n_head, width = out_ref.shape[1:]
    n_key_head, n_code, dtype = v_ref.shape[2], weight_ref.shape[2], v_ref.dtype
    here, batch, head, key_head = place_of(n_head, n_key_head)
    cols = columns(pl.program_id(2), n_column, width)
    local = columns(0, power_of_two(q_ref.shape[3]), q_ref.shape[3])
    rows = tokens(here * tile, tile, length)
    query = read_numbers(query_ref, batch, rows, head, 0)
    q = read_vectors(q_ref, batch, rows, head, local)
    start = here * tile // form.block_len * form.block_len - form.mem_len  # of the window

    def far(c: Any, carry: Any) -> Any:
        out, total = carry
        weight = read_rows(weight_ref, head, query, c * chunk, chunk)
        place = batch, key_head, start // step
        value, count = read_state(state_ref, count_ref, place, c * chunk, chunk, cols)
        return out + dot(weight, value), total + jnp.sum(dot(weight, count), axis=1)

    def exact(at: Rows, seen: Array | None, carry: Any) -> Any:
        """Keys one by one; a score that is not finite comes of a query or a key that is not."""
        out, total, top = carry
        k = read_vectors(k_ref, batch, at, key_head, local)
        v = read_vectors(v_ref, batch, at, key_head, cols)
        score = dot_t(q, k) * form.scale
        score = jnp.where(jnp.abs(score) < jnp.inf, score, jnp.nan)
        score = score if seen is None else jnp.where(seen, score, -jnp.inf)
        new = jnp.maximum(top, jnp.max(score, axis=1))
        weight, old = jnp.exp(score - new[:, None]), jnp.exp(top - new)
        out = out * old[:, None] + dot(weight.astype(dtype), v)
        return out, total * old + jnp.sum(weight, axis=1), new

    zero = jnp.zeros((tile, n_column), F32), jnp.zeros((tile,), F32)
    n_chunk = jnp.where(start > 0, jnp.int32(n_code // chunk), jnp.int32(0))
    out, total = lax.fori_loop(jnp.int32(0), n_chunk, far, zero)
    top = jnp.where(total > 0, plt.load(top_ref.at[head, jnp.maximum(query, 0)]), -jnp.inf)
    carry, n_key = (out, total, top), min(tile, chunk)
    for own in range(0, tile, n_key):
        row, column = (lax.broadcasted_iota(jnp.int32, (tile, n_key), axis) for axis in (0, 1))
        carry = exact(tokens(here * tile + own, n_key, length), own + column <= row, carry)
    first = jnp.maximum(start, 0)

    def earlier(i: Any, carry: Any) -> Any:
        return exact(tokens(first + i * n_key, n_key, length), None, carry)

    carry = lax.fori_loop(jnp.int32(0), (here * tile - first) // n_key, earlier, carry)
    if form.n_sink:
        n_sink = power_of_two(form.n_sink)
        seen = lax.broadcasted_iota(jnp.int32, (tile, n_sink), 1) < jnp.minimum(start, form.n_sink)
        carry = exact(tokens(0, n_sink, length), seen, carry)
    out, total, top = carry
    write_attention(out_ref, lse_ref, batch, rows, head, cols, query, out, total, top)
