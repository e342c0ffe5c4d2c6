"""Exact attention, its log-sum-exp, and the merge of partial attentions."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_ref.ops.checks import as_floats, check_mask, check_qkv, check_scale, shape
from torch_ref.ops.numerics import chunk_len, contain_nonfinite, einsum, poison_values


def dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention, `softmax(scale * q k^T + mask) v`.

    Without `return_lse` this is the framework's own kernel (`scaled_dot_product_attention`).
    With it, it is a plain softmax over chunks of queries: linear memory, differentiable in
    both results.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, S, H, D]`, `[B, S, H, V]`, of the dtype of q.
      is_causal: query i sees keys j <= i; needs T = S.
      scale: factor on the scores, default `D ** -0.5`.
      mask: `[B, S]` boolean, True = a real key.
      return_lse: also return the log-sum-exp of the scores.

    Returns:
      out `[B, T, H, V]` in the dtype of v, 0 for a query that sees no key; with `return_lse`
      also lse `[B, T, H]` in float32 (float64 for float64), -inf for such a query.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    q, k, v = check_qkv(q, k, v, is_causal)
    mask = check_mask(mask, k, "k")
    scale = check_scale(scale, q.shape[-1])
    if return_lse:
        return _plain_attention(q, k, v, mask, is_causal, scale)
    return _framework_attention(q, k, v, mask, is_causal, scale)


def _framework_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    length = q.shape[1]
    seen, visible, first = None, None, None
    if mask is not None:
        seen = _sees_a_key(mask, length, is_causal)
        k, v = torch.where(mask[:, :, None, None], k, 0), torch.where(mask[:, :, None, None], v, 0)
        # A row that sees no key sees all of them, so that its softmax is finite; it is zeroed below.
        visible = mask[:, None, :] | ~seen[:, :, None]
        if is_causal:
            past = torch.ones((length, length), dtype=torch.bool, device=q.device).tril()
            visible = (mask[:, None, :] & past) | ~seen[:, :, None]
        visible = visible[:, None]
    if is_causal:
        v, first = contain_nonfinite(poison_values(k, v), axis=1)
        k = torch.where(torch.isfinite(k), k, 0)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        scale=scale,
        is_causal=is_causal and visible is None,
    ).transpose(1, 2)
    if seen is not None:
        out = torch.where(seen[:, :, None, None], out, 0)
    if first is not None:
        position = torch.arange(length, device=q.device)[None, :, None, None]
        out = torch.where(position >= first, torch.nan, out)
    return out


def _sees_a_key(mask: Tensor, length: int, is_causal: bool) -> Tensor:
    """Whether query i sees a real key: `[B, T]`."""
    if not is_causal:
        return mask.any(1, keepdim=True).expand(mask.shape[0], length)
    return mask.to(torch.int32).cumsum(1, dtype=torch.int32) > 0


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, n_head, _ = q.shape
    k_len = k.shape[1]
    first = None
    if mask is not None:
        k, v = torch.where(mask[:, :, None, None], k, 0), torch.where(mask[:, :, None, None], v, 0)
    if is_causal:
        v, first = contain_nonfinite(poison_values(k, v), axis=1)
        k = torch.where(torch.isfinite(k), k, 0)

    def attend(rows: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        visible = torch.ones((1, 1, 1, k_len), dtype=torch.bool, device=q.device)
        if mask is not None:
            visible = visible & mask[:, None, None, :]
        if is_causal:
            keys = torch.arange(k_len, device=q.device)
            visible = visible & (keys[None, None, None, :] <= position[None, None, :, None])
        score = einsum("bthd,bshd->bhts", rows, k) * scale
        p, lse = masked_softmax(score, visible)
        out = einsum("bhts,bshv->bthv", p, v.to(p.dtype)).to(v.dtype)
        if first is not None:
            out = torch.where(position[None, :, None, None] >= first, torch.nan, out)
        return out, lse.transpose(1, 2)

    position = torch.arange(length, device=q.device)
    size = chunk_len(q, length, 4 * batch * n_head * k_len)
    if size >= length:
        return attend(q, position)
    parts = [
        checkpoint(attend, q[:, start : start + size], position[start : start + size], use_reentrant=False)
        for start in range(0, length, size)
    ]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, 1), torch.cat(lse, 1)


def masked_softmax(score: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis of the visible scores, and its log-sum-exp.

    A row with nothing visible gives zeros and -inf, with zero gradients.
    """
    score = torch.where(visible, score, -torch.inf)
    top = score.amax(-1, keepdim=True)
    top = torch.where(torch.isneginf(top), 0, top).detach()
    mass = torch.exp(score - top)
    total = mass.sum(-1, keepdim=True)
    is_seen = total != 0
    total = torch.where(is_seen, total, 1)
    lse = torch.where(is_seen, torch.log(total) + top, -torch.inf)
    return torch.where(is_seen, mass / total, 0), lse[..., 0]


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial attentions over disjoint sets of keys as one (`math.md` 4).

    `lse = logaddexp(lse1, lse2)`, `out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2`.

    Args:
      out1, out2: `[B, T, H, V]` of one dtype.
      lse1, lse2: `[B, T, H]`, -inf where that part saw no key.

    Returns:
      out `[B, T, H, V]` in that dtype and lse `[B, T, H]`; 0 and -inf where neither saw a key.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    out1, out2 = as_floats("out1", out1, 4), as_floats("out2", out2, 4)
    lse1, lse2 = as_floats("lse1", lse1, 3), as_floats("lse2", lse2, 3)
    if out1.shape != out2.shape:
        raise ValueError(f"out2 must have the shape of out1, found {shape(out2)} and {shape(out1)}")
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if lse.shape != out1.shape[:-1]:
            raise ValueError(f"{name} must be [B, T, H] of out1, found {shape(lse)} and {shape(out1)}")
    if out1.dtype != out2.dtype:
        raise TypeError(f"out2 must have the dtype of out1, found {out2.dtype} and {out1.dtype}")
    if lse1.dtype != lse2.dtype:
        raise TypeError(f"lse2 must have the dtype of lse1, found {lse2.dtype} and {lse1.dtype}")
    top = torch.maximum(lse1, lse2).detach()
    top = torch.where(torch.isneginf(top), 0, top)
    mass1, mass2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = mass1 + mass2
    is_seen = total != 0
    total = torch.where(is_seen, total, 1)
    part1, part2 = (mass1 / total)[..., None], (mass2 / total)[..., None]
    out = part1 * out1.to(part1.dtype) + part2 * out2.to(part2.dtype)
    return out.to(out1.dtype), torch.where(is_seen, torch.log(total) + top, -torch.inf)
