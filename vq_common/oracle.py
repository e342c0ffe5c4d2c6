"""Float64 NumPy definitions: dense, slow, obvious. Attention over codes: `vq_oracle.py`.

Every attention here is one formula, a softmax in which key j counts `weight[i, j]` times:

    o_i = sum_j weight_ij exp(scale q_i . k_j) v_j / sum_j weight_ij exp(scale q_i . k_j)

with weight 0 or 1 for a mask, and a multiplicity for HyperAttention's samples. B batch, T
queries, S keys, H heads, D width, V value width, C codes; arrays are `[B, T, H, D]`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Attention(NamedTuple):
    out: Array  # [B, T, H, V]
    lse: Array  # [B, T, H], -inf where a query sees no key


class Gradients(NamedTuple):
    q: Array
    k: Array
    v: Array


def visible(q_len: int, k_len: int, *, is_causal: bool = False, mask: Mask | None = None) -> Array:
    """Weights `[B or 1, 1, T, S]`: 1 where query i may see key j, else 0."""
    weight = np.ones((1, 1, q_len, k_len))
    if is_causal:
        weight = weight * np.tril(np.ones((q_len, k_len)))
    if mask is not None:
        weight = weight * mask[:, None, None, :]
    return weight


def softmax_attention(q: Array, k: Array, v: Array, weight: Array, scale: float) -> Attention:
    """Weighted softmax attention; a query that sees no key gives 0. `weight` is `[B, H, T, S]`."""
    p, lse = probabilities(scale * np.einsum("bthd,bshd->bhts", q, k), weight)
    return Attention(weighted_values(p, v), np.moveaxis(lse, 1, 2))


def softmax_attention_gradients(
    q: Array, k: Array, v: Array, weight: Array, scale: float, d_out: Array
) -> Gradients:
    """Gradients of `sum(d_out * softmax_attention(...).out)`."""
    p, _ = probabilities(scale * np.einsum("bthd,bshd->bhts", q, k), weight)
    d_score = scale * score_gradient(p, v, d_out)
    return Gradients(
        q=np.einsum("bhts,bshd->bthd", d_score, k),
        k=np.einsum("bhts,bthd->bshd", d_score, q),
        v=np.einsum("bhts,bthv->bshv", p, d_out),
    )


def probabilities(score: Array, weight: Array) -> tuple[Array, Array]:
    """Softmax over keys of `score [B, H, T, S]`, key j counted `weight` times, and its log-sum-exp.

    Rows of weight 0 alone are 0, their log-sum-exp is -inf.
    """
    weight = np.broadcast_to(weight, score.shape)
    score = np.where(weight > 0, score, -np.inf)
    top = np.max(score, axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0.0, top)
    mass = weight * np.exp(score - top)
    total = np.sum(mass, axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0]) + top[..., 0]
    return np.where(total > 0, mass / np.where(total > 0, total, 1.0), 0.0), lse


def score_gradient(p: Array, v: Array, d_out: Array) -> Array:
    """Gradient of `sum(d_out * p v)` with respect to the scores that p is the softmax of."""
    d_p = np.einsum("bthv,bshv->bhts", d_out, np.where(_seen_by_any(p, v), v, 0))
    return p * (d_p - np.sum(p * d_p, axis=-1, keepdims=True))


def weighted_values(p: Array, v: Array) -> Array:
    """`p v`, without the values that no query sees."""
    return np.einsum("bhts,bshv->bthv", p, np.where(_seen_by_any(p, v), v, 0))


def _seen_by_any(p: Array, v: Array) -> Mask:
    return np.moveaxis(np.any(p != 0, axis=2), 1, 2)[..., None] & np.ones(v.shape, bool)


# --- vector quantization -------------------------------------------------------------------


def nearest_codes(x: Array, codebook: Array) -> Codes:
    """`argmin_c |x - codebook[c]|^2`, ties to the lowest index: `[B, T, H]`."""
    distance = ((x[:, :, :, None, :] - codebook[None, None]) ** 2).sum(-1)
    return np.argmin(distance, axis=-1)


def code_gap(x: Array, codebook: Array) -> Array:
    """Difference of the two smallest `|x - codebook[c]|^2 / 2`; inf for a single code."""
    distance = ((x[:, :, :, None, :] - codebook[None, None]) ** 2).sum(-1) / 2
    if distance.shape[-1] == 1:
        return np.full(distance.shape[:-1], np.inf)
    two = np.partition(distance, 1, axis=-1)
    return two[..., 1] - two[..., 0]


def take_codes(codebook: Array, codes: Codes) -> Array:
    """`codebook[h, codes[b, t, h]]`: `[B, T, H, D]`."""
    return codebook[np.arange(codebook.shape[0])[None, None, :], codes]


def commitment_loss(x: Array, quantized: Array, mask: Mask | None = None) -> float:
    """Mean over real vectors of `|x - quantized|^2`; 0 when there is none."""
    square = ((x - quantized) ** 2).sum(-1)
    real = np.ones(square.shape) if mask is None else mask[:, :, None] * np.ones(square.shape)
    return float((square * real).sum() / max(real.sum(), 1.0))


class Ema(NamedTuple):
    count: Array  # type: ignore[assignment]  # [H, C]
    sum: Array  # [H, C, D]


def ema_update(
    count: Array,
    total: Array,
    x: Array,
    codes: Codes,
    draws: Array,
    *,
    decay: float,
    threshold: float,
    mask: Mask | None = None,
) -> Ema:
    """One moving-average step of `math.md` 1, code by code, dead codes replaced."""
    count, total = np.array(count), np.array(total)
    n_batch, length, n_head, _ = x.shape
    real = [(b, t) for b in range(n_batch) for t in range(length) if mask is None or mask[b, t]]
    if not real:
        return Ema(count, total)
    for h in range(n_head):
        for c in range(count.shape[1]):
            members = [x[b, t, h] for b, t in real if codes[b, t, h] == c]
            count[h, c] = decay * count[h, c] + (1 - decay) * len(members)
            total[h, c] = decay * total[h, c] + (1 - decay) * np.sum(members, axis=0)
            if count[h, c] < threshold:
                b, t = real[min(int(draws[h, c] * len(real)), len(real) - 1)]
                count[h, c], total[h, c] = 1.0, x[b, t, h]
    return Ema(count, total)


# --- exact attention ----------------------------------------------------------------------


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Mask | None = None,
) -> Attention:
    """Exact attention and its log-sum-exp."""
    weight = visible(q.shape[1], k.shape[1], is_causal=is_causal, mask=mask)
    return softmax_attention(q, k, v, weight, default_scale(q, scale))


def merge_attention(first: Attention, second: Attention) -> Attention:
    """Two partial attentions over disjoint keys as one, `math.md` 4."""
    lse = np.logaddexp(first.lse, second.lse)
    top = np.where(np.isneginf(lse), 0.0, lse)
    out = np.exp(first.lse - top)[..., None] * first.out + np.exp(second.lse - top)[..., None] * second.out
    return Attention(out, lse)


def default_scale(q: Array, scale: float | None) -> float:
    """`scale`, or `D ** -0.5` of `q [B, T, H, D]`."""
    return q.shape[-1] ** -0.5 if scale is None else scale


# --- HyperAttention ------------------------------------------------------------------------


def gray_code(index: int) -> int:
    """The index-th word of the reflected Gray code; neighbours differ in one bit."""
    return index ^ (index >> 1)


def angular_hash(x: Array, directions: Array) -> Codes:
    """Position in Gray-code order of the sign bits of `x . direction`: `[B, T, H]`.

    `directions` is `[H, P, D]`; bit p is set where the product with direction p is positive.
    """
    n_projection = directions.shape[1]
    position = np.empty(2**n_projection, np.int64)
    for index in range(2**n_projection):
        position[gray_code(index)] = index
    signs = np.einsum("bthd,hpd->bthp", x, directions) > 0
    return position[(signs * 2 ** np.arange(n_projection)).sum(-1)]


def hyper_weight(
    q: Array,
    k: Array,
    directions: Array,
    sample_ids: Codes,
    *,
    is_causal: bool = False,
    mask: Mask | None = None,
    block_size: int = 256,
    min_seq_len: int = 4096,
) -> Array:
    """How often query i counts key j: weights `[B, H, T, S]` of HyperAttention, `math.md` 4.

    `sample_ids [B, R, N, H]` holds one draw for every unmasked sub-problem: R = 1 when not
    causal; when causal, level by level and left to right, R = 2**depth - 1 with depth the
    fewest halvings that leave pieces of at most `min_seq_len`.
    """
    n_batch, q_len, n_head, _ = q.shape
    k_len = k.shape[1]
    real = np.ones((n_batch, k_len), bool) if mask is None else mask
    weight = np.zeros((n_batch, n_head, q_len, k_len))
    for b in range(n_batch):
        for h in range(n_head):
            bins_q = angular_hash(q[b, None, :, None, h], directions[h, None])[0, :, 0]
            bins_k = angular_hash(k[b, None, :, None, h], directions[h, None])[0, :, 0]
            ids = sample_ids[b, :, :, h]
            if is_causal:
                weight[b, h] = _causal_weight(bins_q, bins_k, ids, real[b], block_size, min_seq_len)
            else:
                weight[b, h] = _unmasked_weight(bins_q, bins_k, ids[0], real[b], block_size, q_len)
    return weight


def hyper_depth(length: int, min_seq_len: int) -> int:
    """Halvings of a causal sequence until its pieces have at most `min_seq_len` tokens."""
    depth = 0
    while -(-length // 2**depth) > min_seq_len:
        depth += 1
    return depth


def _causal_weight(
    bins_q: Codes, bins_k: Codes, ids: Codes, real: Mask, block_size: int, min_seq_len: int
) -> Array:
    length = len(bins_q)
    depth = hyper_depth(length, min_seq_len)
    leaf = -(-length // 2**depth)
    weight = np.zeros((length, length))
    node = 0
    for level in range(depth):
        half = leaf * 2 ** (depth - level - 1)
        for piece in range(2**level):
            start = piece * 2 * half
            left, right = slice(start, start + half), slice(start + half, start + 2 * half)
            weight[right, left] = _unmasked_weight(
                bins_q[right], bins_k[left], ids[node], real[left], block_size, half
            )
            node += 1
    for start in range(0, length, leaf):
        rows = slice(start, start + leaf)
        size = len(bins_q[rows])
        weight[rows, rows] = np.tril(np.ones((size, size))) * real[rows]
    return weight


def _unmasked_weight(
    bins_q: Codes, bins_k: Codes, ids: Codes, real: Mask, block_size: int, q_slots: int
) -> Array:
    """One unmasked sub-problem: 1 for a key of the query's own block, S / N a sample outside it.

    Keys sort by bin, padded ones last; a sample is a position in that order. The sorted orders
    are cut into the same number of equal blocks; a sequence that ends inside the sub-problem
    leaves fewer queries than the `q_slots` that are cut.
    """
    q_len, k_len = len(bins_q), len(bins_k)
    weight = np.zeros((q_len, k_len))
    if q_len == 0:
        return weight
    n_block = -(-k_len // block_size)
    order_q = np.argsort(bins_q, kind="stable")
    order_k = np.lexsort((bins_k, ~real))
    block_q, block_k = np.empty(q_len, int), np.empty(k_len, int)
    block_q[order_q] = np.arange(q_len) // -(-q_slots // n_block)
    block_k[order_k] = np.arange(k_len) // -(-k_len // n_block)
    weight += (block_q[:, None] == block_k[None, :]) * real
    for j in order_k[ids]:
        weight[:, j] += (block_q != block_k[j]) * real[j] * k_len / len(ids)
    return weight


def hyper_attention(
    q: Array,
    k: Array,
    v: Array,
    directions: Array,
    sample_ids: Codes,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Mask | None = None,
    block_size: int = 256,
    min_seq_len: int = 4096,
) -> Attention:
    """HyperAttention for given directions and samples: softmax attention under `hyper_weight`."""
    weight = hyper_weight(
        q,
        k,
        directions,
        sample_ids,
        is_causal=is_causal,
        mask=mask,
        block_size=block_size,
        min_seq_len=min_seq_len,
    )
    return softmax_attention(q, k, v, weight, default_scale(q, scale))
