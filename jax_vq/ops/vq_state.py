"""What causal VQ-attention remembers of the tokens before a call, and the documents of its tokens."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_vq.ops.checks import as_floats, check_at_least
from jax_vq.ops.numerics import acc_dtype


class VQState(NamedTuple):
    """All that later queries can see of earlier tokens; its size does not depend on their number.

    B batch, K key heads, C key codes, V value width, W = `mem_len + block_len - 1` (0 without a
    window), N = `n_sink`. Positions count from the first real token of a document. A document's
    start is relative to the next token, so it is negative.
    """

    count: Array  # type: ignore[assignment]  # [B, K, C] int32: keys before the window, per code
    mean: Array  # [B, K, C, V] their mean value, in the accumulator type
    window_k: Array  # [B, W, K, D] the last tokens: local keys
    window_v: Array  # [B, W, K, V]
    window_codes: Array  # [B, W, K] int32, -1 for a key that is not finite
    window_start: Array  # [B, W] int32 start of the token's document
    window_real: Array  # [B, W] whether there is such a key
    sink_k: Array  # [B, N, K, D] first tokens of the current document: local keys
    sink_v: Array  # [B, N, K, V]
    sink_real: Array  # [B, N]
    position: Array  # [B] int32 tokens of the current document so far
    segment: Array  # [B] int32 segment id of the last token


def init_state(
    batch: int,
    codebook_k: Any,
    value_width: int,
    *,
    local_width: int | None = None,
    dtype: Any = None,
    block_len: int = 128,
    mem_len: int = 0,
    n_sink: int = 0,
) -> VQState:
    """The state that has seen nothing.

    Args:
      batch: B.
      codebook_k: `[K, C, D]`.
      value_width: V.
      local_width: width of `k_local`, default D.
      dtype: of k and v, default that of codebook_k.
      block_len, mem_len, n_sink: as in `vq_attention`.

    Raises:
      ValueError, TypeError: a size under 1, or a codebook of another shape.
    """
    codebook_k = as_floats("codebook_k", codebook_k, 3)
    batch, value_width = check_at_least("batch", batch, 1), check_at_least("value_width", value_width, 1)
    block_len, mem_len = check_at_least("block_len", block_len, 1), check_at_least("mem_len", mem_len, 0)
    n_sink = check_at_least("n_sink", n_sink, 0)
    width = codebook_k.shape[2] if local_width is None else check_at_least("local_width", local_width, 1)
    dtype = codebook_k.dtype if dtype is None else jnp.dtype(dtype)
    heads = codebook_k.shape[:2]
    return empty_state(batch, heads, (width, value_width), dtype, window_len(block_len, mem_len), n_sink)


def window_len(block_len: int, mem_len: int) -> int:
    """Tokens that a state keeps one by one: what the next query can see exactly, at most."""
    return mem_len + block_len - 1 if mem_len else 0


def state_layout(
    batch: int, heads: tuple[int, int], widths: tuple[int, int], dtype: Any, window: int, n_sink: int
) -> VQState:
    """Shape and dtype of every field, from (key heads, codes), widths of (local keys, values), W and N."""
    (n_head, n_code), (width, value_width) = heads, widths
    ids, flag = jnp.dtype(jnp.int32), jnp.dtype(jnp.bool_)
    fields: Any = VQState
    return fields(
        count=((batch, n_head, n_code), ids),
        mean=((batch, n_head, n_code, value_width), acc_dtype(dtype)),
        window_k=((batch, window, n_head, width), dtype),
        window_v=((batch, window, n_head, value_width), dtype),
        window_codes=((batch, window, n_head), ids),
        window_start=((batch, window), ids),
        window_real=((batch, window), flag),
        sink_k=((batch, n_sink, n_head, width), dtype),
        sink_v=((batch, n_sink, n_head, value_width), dtype),
        sink_real=((batch, n_sink), flag),
        position=((batch,), ids),
        segment=((batch,), ids),
    )


def empty_state(
    batch: int, heads: tuple[int, int], widths: tuple[int, int], dtype: Any, window: int, n_sink: int
) -> VQState:
    """`init_state` from the sizes that `state_layout` takes."""
    layout: Any = state_layout(batch, heads, widths, jnp.dtype(dtype), window, n_sink)
    state = VQState(*(jnp.zeros(shape, kind) for shape, kind in layout))
    return state._replace(window_codes=state.window_codes - 1)


def check_state(
    state: Any, k_local: Array, v: Array, codebook_k: Array, block_len: int, mem_len: int, n_sink: int
) -> None:
    """`state` is a `VQState` of this call's sizes."""
    if not isinstance(state, VQState):
        raise TypeError(f"state must be a VQState, found {type(state).__name__}")
    widths = k_local.shape[3], v.shape[3]
    window = window_len(block_len, mem_len)
    expected: Any = state_layout(v.shape[0], codebook_k.shape[:2], widths, v.dtype, window, n_sink)
    for name, found, (shape, dtype) in zip(VQState._fields, state, expected, strict=True):
        if found.shape != shape:
            raise ValueError(
                f"state.{name} must be {shape} for v {v.shape}, codebook_k {codebook_k.shape}, "
                f"block_len {block_len}, mem_len {mem_len} and n_sink {n_sink}, "
                f"found {found.shape}"
            )
        if found.dtype != dtype:
            raise TypeError(f"state.{name} must be {dtype}, found {found.dtype}")


def widen(state: VQState, window: int) -> VQState:
    """`state` with a window of at least that many tokens; the new ones are not there."""
    n_more = window - state.window_codes.shape[1]
    if n_more <= 0:
        return state

    def pad(x: Array, fill: int = 0) -> Array:
        edges = ((0, 0), (n_more, 0)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, edges, constant_values=jnp.asarray(fill, x.dtype))

    return state._replace(
        window_k=pad(state.window_k),
        window_v=pad(state.window_v),
        window_codes=pad(state.window_codes, -1),
        window_start=pad(state.window_start),
        window_real=pad(state.window_real),
    )


class Documents(NamedTuple):
    """To which document tokens belong, named by its start: the index of its first real token."""

    start: Array  # [B, T] int32, negative where a document began before this call
    real: Array  # [B, T] whether a token is a key that can be seen
    position: Array  # [B] tokens of the last document so far, 0 when none was real


def find_documents(
    x: Array, mask: Array | None, segment_ids: Array | None, state: VQState | None
) -> Documents:
    """The documents of tokens `x [B, T, ...]`: runs of one segment id, from their first real token on."""
    shape = batch, length = x.shape[:2]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], shape)
    if mask is None and segment_ids is None:
        old = jnp.zeros((batch,), jnp.int32) if state is None else state.position
        start = jnp.broadcast_to(-old[:, None], shape)
        return Documents(start, jnp.ones(shape, jnp.bool_), old + length)
    real = jnp.ones(shape, jnp.bool_) if mask is None else mask
    position = jnp.zeros((batch,), jnp.int32) if state is None else state.position
    is_new = index == 0
    if segment_ids is not None:
        before = segment_ids[:, :1] if state is None else state.segment[:, None].astype(segment_ids.dtype)
        is_new = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
        is_new = is_new | ((index == 0) & (position == 0)[:, None])
    elif state is not None:
        is_new = is_new & (position == 0)[:, None]
    n_real = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    n_before = n_real - real.astype(jnp.int32)  # real tokens of this call before a token
    run_start = lax.cummax(jnp.where(is_new, index, -1), axis=1)
    n_skipped = jnp.take_along_axis(n_before, jnp.maximum(run_start, 0), axis=1)
    continues = run_start < 0
    n_seen = jnp.where(continues, n_before, n_before - n_skipped)
    is_first = real & (n_seen == 0) & ~continues
    start = lax.cummax(jnp.where(is_first | is_new, index, -1), axis=1)
    start = jnp.where(start < 0, -position[:, None], start)
    has_begun = continues[:, -1] | (n_seen[:, -1] + real[:, -1].astype(jnp.int32) > 0)
    return Documents(start, real, jnp.where(has_begun, length - start[:, -1], 0))


class Coded(NamedTuple):
    """The keys that queries see through codes alone, of one document."""

    count: Array  # type: ignore[assignment]  # [B, K, C] int32
    mean: Array  # [B, K, C, V]
    start: Array  # [B] start of the document


def coded_of(state: VQState) -> Coded:
    """The coded keys of a state."""
    return Coded(state.count, state.mean, -state.position)


def next_state(
    state: VQState,
    coded: Coded,
    codes: Array,
    k_local: Array,
    v: Array,
    documents: Documents,
    segment_ids: Array | None,
) -> VQState:
    """The state after `[B, T]` tokens, given the coded keys before the new window."""
    length = v.shape[1]
    start = documents.start[:, -1]
    is_current = coded.start == start
    count = jnp.where(is_current[:, None, None], coded.count, 0)
    mean = jnp.where(is_current[:, None, None, None], coded.mean, 0)
    index = start[:, None] + jnp.arange(state.sink_real.shape[1], dtype=jnp.int32)[None]

    def sinks(old: Array, new: Array) -> Array:
        trailing = (1,) * (old.ndim - 2)
        picked = take_tokens(new, jnp.clip(index, 0, length - 1))
        return jnp.where((index < 0).reshape(*index.shape, *trailing), old, picked)

    is_there = (index < length) & (documents.position > 0)[:, None]
    return VQState(
        count=count,
        mean=mean,
        window_k=last_tokens(state.window_k, k_local),
        window_v=last_tokens(state.window_v, v),
        window_codes=last_tokens(state.window_codes, codes),
        window_start=last_tokens(state.window_start, documents.start) - length,
        window_real=last_tokens(state.window_real, documents.real),
        sink_k=sinks(state.sink_k, k_local),
        sink_v=sinks(state.sink_v, v),
        sink_real=sinks(state.sink_real, documents.real) & is_there,
        position=documents.position,
        segment=state.segment if segment_ids is None else segment_ids[:, -1].astype(jnp.int32),
    )


def last_tokens(before: Array, x: Array) -> Array:
    """The last W of `before [B, W, ...]` followed by `x [B, T, ...]`."""
    window, length = before.shape[1], x.shape[1]
    if length >= window:
        return x[:, length - window :]
    return jnp.concatenate([before[:, length:], x], axis=1)


def take_tokens(x: Array, index: Array) -> Array:
    """`x[b, index[b, ...]]` for `x [B, T, ...]` and `index [B, ...]`."""
    batch = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (index.ndim - 1))
    return x[batch, index]
