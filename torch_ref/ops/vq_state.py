"""What causal VQ-attention remembers of the tokens before a call, and the documents of its tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ref.ops.checks import as_floats, check_at_least, check_device, shape
from torch_ref.ops.numerics import acc_dtype


class VQState(NamedTuple):
    """All that later queries can see of earlier tokens; its size does not depend on their number.

    B batch, K key heads, C key codes, V value width, W = `mem_len + block_len - 1` (0 without a
    window), N = `n_sink`. Positions count from the first real token of a document. A document's
    start is relative to the next token, so it is negative.
    """

    count: Tensor  # type: ignore[assignment]  # [B, K, C] int32: keys before the window, per code
    mean: Tensor  # [B, K, C, V] their mean value, in the accumulator type
    window_k: Tensor  # [B, W, K, D] the last tokens: local keys
    window_v: Tensor  # [B, W, K, V]
    window_codes: Tensor  # [B, W, K] int32, -1 for a key that is not finite
    window_start: Tensor  # [B, W] int32 start of the token's document
    window_real: Tensor  # [B, W] whether there is such a key
    sink_k: Tensor  # [B, N, K, D] first tokens of the current document: local keys
    sink_v: Tensor  # [B, N, K, V]
    sink_real: Tensor  # [B, N]
    position: Tensor  # [B] int32 tokens of the current document so far
    segment: Tensor  # [B] int32 segment id of the last token


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
    dtype = codebook_k.dtype if dtype is None else dtype
    heads = codebook_k.shape[:2]
    with codebook_k.device:
        return empty_state(batch, heads, (width, value_width), dtype, window_len(block_len, mem_len), n_sink)


def window_len(block_len: int, mem_len: int) -> int:
    """Tokens that a state keeps one by one: what the next query can see exactly, at most."""
    return mem_len + block_len - 1 if mem_len else 0


def state_layout(
    batch: int, heads: tuple[int, int], widths: tuple[int, int], dtype: Any, window: int, n_sink: int
) -> VQState:
    """Shape and dtype of every field, from (key heads, codes), widths of (local keys, values), W and N."""
    (n_head, n_code), (width, value_width) = heads, widths
    ids, flag = torch.int32, torch.bool
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
    """`init_state` from the sizes that `state_layout` takes; on the default device, see `torch.device`."""
    layout: Any = state_layout(batch, heads, widths, dtype, window, n_sink)
    state = VQState(*(torch.zeros(size, dtype=kind) for size, kind in layout))
    return state._replace(window_codes=state.window_codes - 1)


def check_state(
    state: Any, k_local: Tensor, v: Tensor, codebook_k: Tensor, block_len: int, mem_len: int, n_sink: int
) -> None:
    """`state` is a `VQState` of this call's sizes."""
    if not isinstance(state, VQState):
        raise TypeError(f"state must be a VQState, found {type(state).__name__}")
    widths = k_local.shape[3], v.shape[3]
    window = window_len(block_len, mem_len)
    expected: Any = state_layout(v.shape[0], codebook_k.shape[:2], widths, v.dtype, window, n_sink)
    for name, found, (size, dtype) in zip(VQState._fields, state, expected, strict=True):
        if found.shape != size:
            raise ValueError(
                f"state.{name} must be {size} for v {shape(v)}, codebook_k {shape(codebook_k)}, "
                f"block_len {block_len}, mem_len {mem_len} and n_sink {n_sink}, "
                f"found {shape(found)}"
            )
        if found.dtype != dtype:
            raise TypeError(f"state.{name} must be {dtype}, found {found.dtype}")
        check_device(f"state.{name}", found, v, "v")


def widen(state: VQState, window: int) -> VQState:
    """`state` with a window of at least that many tokens; the new ones are not there."""
    n_more = window - state.window_codes.shape[1]
    if n_more <= 0:
        return state

    def pad(x: Tensor, fill: int = 0) -> Tensor:
        return torch.cat([x.new_full((x.shape[0], n_more, *x.shape[2:]), fill), x], 1)

    return state._replace(
        window_k=pad(state.window_k),
        window_v=pad(state.window_v),
        window_codes=pad(state.window_codes, -1),
        window_start=pad(state.window_start),
        window_real=pad(state.window_real),
    )


class Documents(NamedTuple):
    """To which document tokens belong, named by its start: the index of its first real token."""

    start: Tensor  # [B, T] int32, negative where a document began before this call
    real: Tensor  # [B, T] whether a token is a key that can be seen
    position: Tensor  # [B] tokens of the last document so far, 0 when none was real


def find_documents(
    x: Tensor, mask: Tensor | None, segment_ids: Tensor | None, state: VQState | None
) -> Documents:
    """The documents of tokens `x [B, T, ...]`: runs of one segment id, from their first real token on."""
    shape = batch, length = x.shape[:2]
    index = torch.arange(length, dtype=torch.int32, device=x.device)[None].expand(shape)
    if mask is None and segment_ids is None:
        old = x.new_zeros((batch,), dtype=torch.int32) if state is None else state.position
        start = (-old[:, None]).expand(shape)
        return Documents(start, x.new_ones(shape, dtype=torch.bool), old + length)
    real = x.new_ones(shape, dtype=torch.bool) if mask is None else mask
    position = x.new_zeros((batch,), dtype=torch.int32) if state is None else state.position
    is_new = index == 0
    if segment_ids is not None:
        before = segment_ids[:, :1] if state is None else state.segment[:, None].to(segment_ids.dtype)
        is_new = segment_ids != torch.cat([before, segment_ids[:, :-1]], 1)
        is_new = is_new | ((index == 0) & (position == 0)[:, None])
    elif state is not None:
        is_new = is_new & (position == 0)[:, None]
    n_real = torch.cumsum(real.to(torch.int32), 1, dtype=torch.int32)
    n_before = n_real - real.to(torch.int32)  # real tokens of this call before a token
    run_start = _running_max(torch.where(is_new, index, -1))
    n_skipped = torch.gather(n_before, 1, run_start.clamp(min=0).long())
    continues = run_start < 0
    n_seen = torch.where(continues, n_before, n_before - n_skipped)
    is_first = real & (n_seen == 0) & ~continues
    start = _running_max(torch.where(is_first | is_new, index, -1))
    start = torch.where(start < 0, -position[:, None], start)
    has_begun = continues[:, -1] | (n_seen[:, -1] + real[:, -1].to(torch.int32) > 0)
    return Documents(start, real, torch.where(has_begun, length - start[:, -1], 0))


def _running_max(x: Tensor) -> Tensor:
    """The maximum of `x [B, T]` up to each token, in log T steps: MPS has no cummax."""
    shift = 1
    while shift < x.shape[1]:
        x = torch.cat([x[:, :shift], torch.maximum(x[:, shift:], x[:, :-shift])], 1)
        shift *= 2
    return x


class Coded(NamedTuple):
    """The keys that queries see through codes alone, of one document."""

    count: Tensor  # type: ignore[assignment]  # [B, K, C] int32
    mean: Tensor  # [B, K, C, V]
    start: Tensor  # [B] start of the document


def coded_of(state: VQState) -> Coded:
    """The coded keys of a state."""
    return Coded(state.count, state.mean, -state.position)


def next_state(
    state: VQState,
    coded: Coded,
    codes: Tensor,
    k_local: Tensor,
    v: Tensor,
    documents: Documents,
    segment_ids: Tensor | None,
) -> VQState:
    """The state after `[B, T]` tokens, given the coded keys before the new window."""
    length = v.shape[1]
    start = documents.start[:, -1]
    is_current = coded.start == start
    count = torch.where(is_current[:, None, None], coded.count, 0)
    mean = torch.where(is_current[:, None, None, None], coded.mean, 0)
    place = torch.arange(state.sink_real.shape[1], dtype=torch.int32, device=v.device)
    index = start[:, None] + place[None]

    def sinks(old: Tensor, new: Tensor) -> Tensor:
        trailing = (1,) * (old.ndim - 2)
        picked = take_tokens(new, index.clamp(0, length - 1))
        return torch.where((index < 0).reshape(*index.shape, *trailing), old, picked)

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
        segment=state.segment if segment_ids is None else segment_ids[:, -1].to(torch.int32),
    )


def last_tokens(before: Tensor, x: Tensor) -> Tensor:
    """The last W of `before [B, W, ...]` followed by `x [B, T, ...]`."""
    window, length = before.shape[1], x.shape[1]
    if length >= window:
        return x[:, length - window :]
    return torch.cat([before[:, length:], x], 1)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`x[b, index[b, ...]]` for `x [B, T, ...]` and `index [B, ...]`."""
    batch = torch.arange(x.shape[0], device=x.device).reshape(-1, *(1,) * (index.ndim - 1))
    return x[batch, index.long()]
