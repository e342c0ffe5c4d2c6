"""Gradients that far keys of causal VQ-attention get: sums over all later queries (`math.md` 2).

A scan from the right carries the sums. With query codes they are per query code c, and a key of
code s takes its part by `exp(a_cs - l_i)`; without them they are per key code, and larger.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ref.ops.numerics import einsum, is_code
from torch_ref.ops.vq_blocks import Far, Form, Near
from torch_ref.ops.vq_causal import Books, Weights


class Rows(NamedTuple):
    """What the backward pass knows of the queries of a super-block, `[B, K, G, R * L, ...]`."""

    d_out: Tensor  # [..., V]
    delta: Tensor  # [..., 1] D_i, less the gradient of the log-sum-exp
    lse: Tensor  # [...]
    vectors: Tensor  # [..., D] quantized queries, or the queries themselves
    codes: Tensor | None  # [...] int32


class ByQueryCode(NamedTuple):
    """Sums over later queries per query code; X = R * Cq, each with the factor `exp(low - l_i)`."""

    low: Tensor  # [B, K, X] the least l_i, inf without a query: no factor overflows
    d_out: Tensor  # [B, K, X, V]
    delta: Tensor  # [B, K, X, 1]


class ByKeyCode(NamedTuple):
    """Sums over later queries per key code, each with the factor `w_is`."""

    d_out: Tensor  # [B, K, C, V]
    product: Tensor  # [B, K, C, D, V] of queries and d_out
    delta: Tensor  # [B, K, C, D] of queries and D_i


Later = ByQueryCode | ByKeyCode


class ByKey(NamedTuple):
    """Gradients of keys `[..., D]` and values `[..., V]`."""

    k: Tensor
    v: Tensor
    k_local: Any  # None without exact keys


def nothing_later(batch: int, books: Books, n_rep: int, value_width: int) -> Later:
    """The sums over no query."""
    (n_head, n_code, width) = books.k.shape
    if books.q is None:
        shapes = (n_code, value_width), (n_code, width, value_width), (n_code, width)
        return ByKeyCode(*(books.k.new_zeros((batch, n_head, *shape)) for shape in shapes))
    n_sum = n_rep * books.q.shape[1]
    zero = [books.k.new_zeros((batch, n_head, n_sum, width)) for width in (value_width, 1)]
    return ByQueryCode(books.k.new_full((batch, n_head, n_sum), torch.inf), *zero)


def far_gradients(
    weights: Weights, rows: Rows, far: Far, near: Near, later: Later, books: Books, form: Form
) -> tuple[ByKey, Later]:
    """Of far keys `[B, K, G, L, .]` from all later queries, and the sums for the super-block before."""
    if isinstance(later, ByQueryCode):
        per_query = sums_by_query_code(rows, near, later, far, books, form)
        return _by_query_code(per_query, far, books, form), ByQueryCode(*(x[:, :, 0] for x in per_query))
    per_key = sums_by_key_code(weights, rows, near, later, far)
    return _by_key_code(per_key, far, form), ByKeyCode(*(x[:, :, 0] for x in per_key))


def sums_by_query_code(
    rows: Rows, near: Near, later: ByQueryCode, far: Far, books: Books, form: Form
) -> ByQueryCode:
    """Sums that the tokens before the super-block, and those of every delayed block, get: axis 2 of G + 1."""
    dtype = rows.d_out.dtype
    batch, n_head, n_block = rows.lse.shape[:3]

    def split(x: Tensor) -> Tensor:
        return x.reshape(batch, n_head, n_block, -1, form.part_len, *x.shape[4:])

    chosen = is_code(rows.codes, books.q.shape[1]) & torch.isfinite(rows.lse)[..., None]
    if near.sees_far is not None:
        chosen = chosen & near.sees_far[..., None]
    chosen, row_lse = split(chosen), split(rows.lse)[..., None]
    low = torch.where(chosen, row_lse, torch.inf).amin(4)  # [B, K, G, R, Cq]
    share = torch.where(chosen, torch.exp(low[..., None, :] - row_lse), 0)
    d_out = einsum("bkgrlc,bkgrlv->bkgrcv", share.to(dtype), split(rows.d_out))
    delta = einsum("bkgrlc,bkgrlv->bkgrcv", share, split(rows.delta))

    def join(x: Tensor, last: Tensor) -> Tensor:
        return torch.cat([x.reshape(batch, n_head, n_block, *last.shape[2:]), last[:, :, None]], 2)

    low, d_out, delta = join(low, later.low), join(d_out, later.d_out), join(delta, later.delta)
    gives = far.keep.transpose(1, 2)[:, None, :, :, None]  # [B, 1, to G + 1, from G + 1, 1]
    least = torch.where(gives, low[:, :, None], torch.inf).amin(3)
    factor = torch.where(
        gives & torch.isfinite(low)[:, :, None], torch.exp(least[:, :, :, None] - low[:, :, None]), 0
    )
    return ByQueryCode(
        least,
        einsum("bkpgx,bkgxv->bkpxv", factor, d_out),
        einsum("bkpgx,bkgxv->bkpxv", factor, delta),
    )


def _by_query_code(sums: ByQueryCode, far: Far, books: Books, form: Form) -> ByKey:
    dtype = far.values.dtype
    n_head, n_code, width = books.k.shape
    table = books.table if books.bias is None else books.table + books.bias[:, None, None]
    table = table.reshape(n_head, -1, n_code).transpose(1, 2)  # [K, C, X]
    low, d_out, delta = (x[:, :, 1:] for x in sums)
    heads = torch.arange(n_head, device=table.device)[None, :, None, None]
    score = table[heads, far.codes.clamp(min=0).long()]
    is_there = far.one_hot.any(-1, keepdim=True) & torch.isfinite(low)[:, :, :, None]
    share = torch.where(is_there, torch.exp(score - low[:, :, :, None]), 0)  # [B, K, G, L, X], at most 1
    d_v = einsum("bkglx,bkgxv->bkglv", share.to(dtype), d_out.to(dtype))
    change = einsum("bkglv,bkgxv->bkglx", far.values, d_out.to(dtype)) - delta.transpose(3, 4)
    d_score = torch.where(is_there, share * change, 0)
    grouped = books.q.reshape(n_head, -1, width)
    d_k = einsum("bkglx,kxd->bkgld", d_score.to(dtype), grouped.to(dtype))
    return ByKey(d_k * form.scale, d_v, None)


def sums_by_key_code(weights: Weights, rows: Rows, near: Near, later: ByKeyCode, far: Far) -> ByKeyCode:
    """As `sums_by_query_code`, for a super-block of one block."""
    dtype = rows.d_out.dtype
    weight = weights.coded
    if near.sees_far is not None:
        weight = torch.where(near.sees_far[..., None], weight, 0)
    weight, d_out, delta, q = (x[:, :, 0] for x in (weight, rows.d_out, rows.delta, rows.vectors))
    weighted = (weight.to(dtype)[..., None] * q[:, :, :, None]).reshape(*q.shape[:3], -1)
    product = einsum("bklx,bklv->bkxv", weighted, d_out)
    own = ByKeyCode(
        einsum("bklc,bklv->bkcv", weight.to(dtype), d_out),
        product.reshape(later.product.shape),
        einsum("bklc,bkld->bkcd", (weight * delta).to(dtype), q),
    )
    gives = far.keep.transpose(1, 2)  # [B, to 2, from 2]

    def join(first: Tensor, second: Tensor) -> Tensor:
        at = (slice(None), None, slice(None), *(None,) * (first.ndim - 2))
        picked = (
            torch.where(gives[:, :, 0][at], first[:, :, None], 0),
            torch.where(gives[:, :, 1][at], second[:, :, None], 0),
        )
        return picked[0] + picked[1]

    return ByKeyCode(*(join(x, y) for x, y in zip(own, later, strict=True)))


def _by_key_code(sums: ByKeyCode, far: Far, form: Form) -> ByKey:
    last = ByKeyCode(*(x[:, :, 1] for x in sums))
    d_k, d_v = pull_keys(far.one_hot[:, :, 0], far.values[:, :, 0], last)
    return ByKey((d_k * form.scale)[:, :, None], d_v[:, :, None], None)


def pull_keys(one_hot: Tensor, values: Tensor, sums: ByKeyCode) -> tuple[Tensor, Tensor]:
    """Gradients of keys, unscaled, and values `[B, K, N, .]` from the sums per key code."""
    dtype = values.dtype
    chosen = one_hot.to(dtype)
    d_v = einsum("bknc,bkcv->bknv", chosen, sums.d_out.to(dtype))
    spread = torch.where(one_hot[..., None], values[:, :, :, None], 0).reshape(*values.shape[:3], -1)
    by_value = sums.product.transpose(3, 4).reshape(*sums.product.shape[:2], spread.shape[-1], -1)
    d_k = einsum("bknx,bkxd->bknd", spread, by_value.to(dtype))
    return d_k - einsum("bknc,bkcd->bknd", chosen, sums.delta.to(dtype)), d_v
