"""Gradients of causal VQ-attention, exact through the whole history in linear time (`math.md` 2).

With `P_ij` the weight of key j for query i, `D_i = d_out_i . out_i` and
`dS_ij = P_ij (d_out_i . v_j - D_i)` the gradient of a score, every gradient is a sum of
`P_ij` or `dS_ij` over pairs. Near pairs are summed one by one. For far pairs, queries need the
counts and means of the forward pass, and keys sums over the queries to come: a scan from the right
carries them (`vq_far_grad.py`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ref.ops.numerics import einsum, read_chunk, scan_chunks, write_chunk
from torch_ref.ops.quantize import lookup
from torch_ref.ops.vq_blocks import (
    Form,
    Keys,
    Near,
    Past,
    add_up,
    after,
    from_blocks,
    from_rows,
    from_windows,
    keys_around,
    read_far,
    read_near,
    to_rows,
)
from torch_ref.ops.vq_causal import (
    Books,
    Queries,
    Weights,
    exact_scores,
    query_heads,
    query_rows,
    softmax_weights,
    super_block_len,
)
from torch_ref.ops.vq_far_grad import ByKey, Rows, far_gradients, nothing_later
from torch_ref.ops.vq_state import Coded, VQState, coded_of, widen, window_len


class Gradients(NamedTuple):
    """Of everything that has a gradient; None where there is no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_local: Any
    k_local: Any
    bias: Any


class Sinks(NamedTuple):
    """Gradients of the sinks of every block of a call, and which tokens they are."""

    k_local: Tensor  # [B, blocks, n_sink, K, D]
    v: Tensor  # [B, blocks, n_sink, K, V]
    index: Tensor  # type: ignore[assignment]  # [B, blocks, n_sink], negative where there is none


def causal_gradients(
    queries: Queries,
    keys: Keys,
    books: Books,
    state: VQState,
    form: Form,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
) -> Gradients:
    """Gradients of `sum(out * d_out) + sum(lse * d_lse)`; arguments as `causal_attention`."""
    batch, length, n_key_head, value_width = keys.v.shape
    n_code, width = books.k.shape[1:]
    n_head, acc, dtype = query_heads(queries), books.k.dtype, keys.v.dtype
    n_rep = n_head // n_key_head
    if queries.codes is None:
        # One block a step: the sums per key code are large, and there only once.
        part_len = min(length, max(n_code, form.part_len))
        form = form._replace(part_len=part_len, overhang=window_len(form.block_len, form.mem_len))
        state, step_len = widen(state, form.overhang), part_len
    else:
        at_least = -(-2 * n_code // form.part_len) * form.part_len  # else saved states outweigh values
        step_len = max(super_block_len(queries, keys, books, form), at_least)
    states = states_before(keys, state, books, form, step_len)

    def step(carry: Any, start: int, size: int) -> Any:
        total, sinks, tail, later = carry
        coded = states[start // step_len]
        around = keys_around(keys, state, start, size)
        far = read_far(around, coded, n_code, form, start)
        near = read_near(keys, around, state, far, n_rep, n_code, form, start)
        past = add_up(coded, far, form)
        score, q_local = query_rows(queries, books, form, start, size)
        rows = read_rows(queries, books, form, (out, lse, d_out, d_lse), start, size)
        weights = softmax_weights(score, exact_scores(q_local, near, form), past, near, rows.lse)

        d_score = score_gradients(weights, rows, near)
        d_code, d_q_local = row_gradients(d_score, weights, rows, past, near, form)
        of_near = near_gradients(d_score, weights, rows, near, q_local, form)
        of_far, later = far_gradients(weights, rows, far, near, later, books, form)

        if sinks is not None:
            block = start // form.part_len
            news = (
                *(torch.movedim(x[:, :, :, : form.n_sink], 1, 3) for x in (of_near.k_local, of_near.v)),
                near.sink_index,
            )
            sinks = Sinks(*(write_chunk(old, new, block) for old, new in zip(sinks, news, strict=True)))
        own, tail = own_gradients(of_near, of_far, tail, form, size)
        d_q = einsum("bkglc,kcd->bkgld", d_code.to(dtype), books.k.to(dtype))
        d_q = d_q * form.scale
        news = Gradients(
            q=from_rows(d_q, form.part_len)[:, :size],
            k=own.k,
            v=own.v,
            q_local=None if d_q_local is None else from_rows(d_q_local, form.part_len)[:, :size],
            k_local=own.k_local,
            bias=None,
        )
        bias = total.bias
        if bias is not None:
            per_row = d_code.sum((0, 2, 4)).reshape(n_key_head, n_rep, form.part_len)
            bias = bias + per_row.sum(-1).reshape(n_head)
        total = Gradients(*(add_chunk(x, new, start) for x, new in zip(total, news, strict=True)))
        return total._replace(bias=bias), sinks, tail, later

    def zeros(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(x.shape)

    has_exact = form.has_exact
    total = Gradients(
        q=d_out.new_zeros((batch, length, n_head, width)),
        k=d_out.new_zeros((batch, length, n_key_head, width)),
        v=d_out.new_zeros(keys.v.shape),
        q_local=zeros(queries.q_local) if has_exact else None,
        k_local=zeros(keys.k_local) if has_exact else None,
        bias=zeros(books.bias),
    )
    sinks = None
    if form.n_sink:
        places = batch, -(-length // form.part_len), form.n_sink
        sinks = Sinks(
            d_out.new_zeros((*places, n_key_head, keys.k_local.shape[-1]), dtype=acc),
            d_out.new_zeros((*places, n_key_head, value_width), dtype=acc),
            d_out.new_full(places, -1, dtype=torch.int32),
        )
    tail = ByKey(
        *(
            None if x is None else x.new_zeros((batch, form.overhang, *x.shape[2:]), dtype=acc)
            for x in (total.k, total.v, total.k_local)
        )
    )
    later = nothing_later(batch, books, n_rep, value_width)
    total, sinks, _, _ = scan_chunks(step, (total, sinks, tail, later), length, step_len, is_reverse=True)
    if sinks is not None:
        total = total._replace(
            v=add_sinks(total.v, sinks.v, sinks.index),
            k_local=add_sinks(total.k_local, sinks.k_local, sinks.index),
        )
    return total


def add_chunk(x: Tensor | None, chunk: Tensor | None, start: int) -> Tensor | None:
    """x with a chunk written at `start`; what has none stays."""
    return x if x is None or chunk is None else write_chunk(x, chunk.to(x.dtype), start)


def add_sinks(x: Tensor, sinks: Tensor, index: Tensor) -> Tensor:
    """`x [B, T, K, .]` plus what every block gives to its sinks, summed in the type of accumulators."""
    is_here = (index >= 0)[..., None, None]
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    place = batch, index.clamp(min=0).long()
    total = x.to(sinks.dtype).index_put(place, torch.where(is_here, sinks, 0), accumulate=True)
    return total.to(x.dtype)


def states_before(keys: Keys, state: VQState, books: Books, form: Form, step_len: int) -> list[Coded]:
    """What every super-block sees through codes before it."""
    saved: list[Coded] = []

    def step(coded: Coded, start: int, size: int) -> Coded:
        saved.append(Coded(*(x.clone() for x in coded)))  # a view would keep the states of all blocks
        far = read_far(keys_around(keys, state, start, size), coded, books.k.shape[1], form, start)
        return after(add_up(coded, far, form), far, coded, start)

    scan_chunks(step, coded_of(state), keys.v.shape[1], step_len)
    return saved


def read_rows(
    queries: Queries,
    books: Books,
    form: Form,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    start: int,
    size: int,
) -> Rows:
    """`Rows` of a super-block from out, lse and their gradients."""
    acc, n_key_head = books.k.dtype, books.k.shape[0]
    out, lse, d_out, d_lse = (read_chunk(x, start, size) for x in results)
    delta = (out.to(acc) * d_out.to(acc)).sum(-1) - d_lse
    codes = None if queries.codes is None else read_chunk(queries.codes, start, size)
    vectors = read_chunk(queries.q, start, size) if codes is None else lookup(books.q, codes).to(d_out.dtype)

    def rows(x: Tensor) -> Tensor:
        return to_rows(x, form.part_len, n_key_head)

    # A row of the padding of the last block, of +inf, has no weight; so has one that sees no key.
    lse = rows(torch.where(torch.isneginf(lse), torch.inf, lse))
    n_row = torch.arange(lse.shape[2] * form.part_len, device=lse.device).reshape(-1, form.part_len)
    is_there = (n_row < size).tile((1, lse.shape[3] // form.part_len))
    lse = torch.where(is_there[None, None], lse, torch.inf)
    return Rows(
        rows(d_out), rows(delta)[..., None], lse, rows(vectors), None if codes is None else rows(codes)
    )


def score_gradients(weights: Weights, rows: Rows, near: Near) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of near scores `[B, K, G, R * L, W]`: of coded pairs, of exact pairs."""
    d_weight = einsum("bkglv,bkgmv->bkglm", rows.d_out, near.values)
    d_score = weights.near * (d_weight - rows.delta)
    coded = None if near.one_hot is None else torch.where(near.coded, d_score, 0)
    return coded, None if near.exact is None else torch.where(near.exact, d_score, 0)


def row_gradients(
    d_score: tuple[Tensor | None, Tensor | None],
    weights: Weights,
    rows: Rows,
    past: Past,
    near: Near,
    form: Form,
) -> tuple[Tensor, Tensor | None]:
    """Of coded scores per key code `[B, K, G, R * L, C]`, and of local queries."""
    dtype = rows.d_out.dtype
    coded, exact = d_score
    weight = weights.coded * weights.far_count
    change = einsum("bkglv,bkgcv->bkglc", rows.d_out, past.mean[:, :, :-1].to(dtype)) - rows.delta
    d_code = torch.where(weight > 0, weight * change, 0)
    if coded is not None:
        d_code = d_code + einsum("bkglm,bkgmc->bkglc", coded.to(dtype), near.one_hot.to(dtype))
    if exact is None:
        return d_code, None
    d_q_local = einsum("bkglm,bkgmd->bkgld", exact.to(dtype), near.k_local)
    return d_code, d_q_local * form.scale


def near_gradients(
    d_score: tuple[Tensor | None, Tensor | None],
    weights: Weights,
    rows: Rows,
    near: Near,
    q_local: Tensor | None,
    form: Form,
) -> ByKey:
    """Of near keys, from the queries of their block: `[B, K, G, W, .]`."""
    dtype = rows.d_out.dtype
    coded, exact = d_score
    d_v = einsum("bkglm,bkglv->bkgmv", weights.near.to(dtype), rows.d_out)
    scale = form.scale
    d_k = d_v.new_zeros((*d_v.shape[:-1], rows.vectors.shape[-1]))
    if coded is not None:
        d_k = einsum("bkglm,bkgld->bkgmd", coded.to(dtype), rows.vectors) * scale
    if exact is None:
        return ByKey(d_k, d_v, None)
    return ByKey(d_k, d_v, einsum("bkglm,bkgld->bkgmd", exact.to(dtype), q_local) * scale)


def own_gradients(of_near: ByKey, of_far: ByKey, tail: ByKey, form: Form, size: int) -> tuple[ByKey, ByKey]:
    """Of the tokens of a super-block, complete, and of those before it so far.

    `tail` has what later super-blocks gave to the last tokens of this one.
    """
    own: list[Any] = []
    before: list[Any] = []
    for near, far, later in zip(of_near, of_far, tail, strict=True):
        if near is None:
            own.append(None)
            before.append(None)
            continue
        total = from_windows(near[:, :, :, form.n_sink :], form.part_len, form.overhang)
        if far is not None:
            far = from_blocks(far)
            total[:, : far.shape[1]] += far
        if form.overhang:
            total[:, size : size + form.overhang] += later
        own.append(total[:, form.overhang : form.overhang + size])
        before.append(total[:, : form.overhang])
    return ByKey(*own), ByKey(*before)
