"""Float64 NumPy definition of attention over codes, `math.md` 2 and 3: dense, slow, obvious.

One softmax over the keys that a query sees. A pair (i, j) is exact or coded:

    exact:  score_ij = scale q_local_i . k_local_j
    coded:  score_ij = scale q^_i . k^_j + code_bias

B batch, T queries, S keys, H query heads, K key heads, D width, V value width, C codes; query
head h reads key head h // (H / K).
"""

from typing import Any, NamedTuple

import numpy as np

from vq_common.oracle import (
    Array,
    Codes,
    Mask,
    default_scale,
    nearest_codes,
    probabilities,
    score_gradient,
    take_codes,
    visible,
    weighted_values,
)


class VQGradients(NamedTuple):
    """One field per input; None for an optional one that was not given."""

    q: Array
    k: Array
    v: Array
    q_local: Array | None = None
    k_local: Array | None = None
    code_bias: Array | None = None


class Pairs(NamedTuple):
    """What the softmax over all pairs is made of, at H heads."""

    q_hat: Array  # [B, T, H, D]
    k_hat: Array  # [B, S, H, D]
    q_local: Array  # [B, T, H, D']
    k_local: Array  # [B, S, H, D']
    is_exact: Mask  # [B, 1, T, S]
    is_coded: Mask  # [B, 1, T, S]
    scale: float
    p: Array  # [B, H, T, S], the softmax


def quantized(q: Array, k: Array, codebook_q: Array | None, codebook_k: Array) -> tuple[Array, Array]:
    """`(q^, k^)`: every vector replaced by its nearest code; q stays where codebook_q is None."""
    k_hat = take_codes(codebook_k, nearest_codes(k, codebook_k))
    if codebook_q is None:
        return q, k_hat
    return take_codes(codebook_q, nearest_codes(q, codebook_q)), k_hat


def documents(segment_ids: Codes) -> Codes:
    """Number of each token's document, `[B, T]`: every run of equal ids is one of its own."""
    is_first = segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.pad(np.cumsum(is_first, axis=1), ((0, 0), (1, 0)))


def document_starts(document: Codes, mask: Mask | None = None) -> Codes:
    """Index of the first real token of each token's document, `[B, T]`; T where there is none."""
    n_batch, length = document.shape
    start = np.full((n_batch, length), length)
    for b in range(n_batch):
        for number in np.unique(document[b]):
            is_member = document[b] == number
            is_real = is_member if mask is None else is_member & mask[b]
            start[b, is_member] = np.min(np.flatnonzero(is_real), initial=length)
    return start


def exact_pairs(position: Codes, block_len: int, mem_len: int, n_sink: int) -> Mask:
    """Pairs `[B, T, T]` that are exact if they are visible; `position [B, T]` inside the document.

    Sinks are the first `n_sink` positions; the window of query i, where there is one, starts
    `mem_len` keys before its block.
    """
    index = np.arange(position.shape[1])
    is_sink = position[:, None, :] < n_sink
    window_start = index - position % block_len - mem_len
    is_near = (index >= window_start[:, :, None]) & (mem_len > 0)
    return is_sink | is_near


def attention_pairs(
    q: Array,
    k: Array,
    codebook_q: Array | None,
    codebook_k: Array,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Mask | None = None,
    segment_ids: Codes | None = None,
    block_len: int = 128,
    mem_len: int = 0,
    n_sink: int = 0,
    q_local: Array | None = None,
    k_local: Array | None = None,
    code_bias: Array | None = None,
) -> Pairs:
    """Exact and coded pairs and their one softmax.

    Raises:
      ValueError: exact pairs without `is_causal`.
    """
    if (mem_len or n_sink) and not is_causal:
        raise ValueError(f"mem_len and n_sink need is_causal, found {mem_len} and {n_sink}")
    n_batch, q_len, n_head, _ = q.shape
    q_hat, k_hat = quantized(q, k, codebook_q, codebook_k)
    q_local, k_local = q if q_local is None else q_local, k if k_local is None else k_local
    k_hat, k_local = for_query_heads(k_hat, n_head), for_query_heads(k_local, n_head)

    document = documents(np.zeros((n_batch, q_len), int) if segment_ids is None else segment_ids)
    is_visible = visible(q_len, k.shape[1], is_causal=is_causal, mask=mask) > 0
    is_exact = np.zeros((n_batch, 1, q_len, k.shape[1]), bool)
    if segment_ids is not None:
        is_visible = is_visible & (document[:, None, :, None] == document[:, None, None, :])
    if is_causal:
        position = np.arange(q_len) - document_starts(document, mask)
        is_exact = is_visible & exact_pairs(position, block_len, mem_len, n_sink)[:, None]
    is_coded = is_visible & ~is_exact

    factor = default_scale(q, scale)
    coded = factor * np.einsum("bthd,bshd->bhts", q_hat, k_hat)
    if code_bias is not None:
        coded = coded + code_bias[:, None, None]
    exact = factor * np.einsum("bthd,bshd->bhts", q_local, k_local)
    p, _ = probabilities(np.where(is_exact, exact, coded), is_visible.astype(np.float64))
    return Pairs(q_hat, k_hat, q_local, k_local, is_exact, is_coded, factor, p)


def vq_attention(
    q: Array, k: Array, v: Array, codebook_q: Array | None, codebook_k: Array, **options: Any
) -> Array:
    """Attention over codes with exact pairs, `[B, T, H, V]`; options are those of `attention_pairs`."""
    pairs = attention_pairs(q, k, codebook_q, codebook_k, **options)
    return weighted_values(pairs.p, for_query_heads(v, q.shape[2]))


def vq_attention_gradients(
    q: Array, k: Array, v: Array, codebook_q: Array | None, codebook_k: Array, d_out: Array, **options: Any
) -> VQGradients:
    """Straight-through gradients of `sum(d_out * vq_attention(...))`: those with respect to q^ and k^.

    What a missing `q_local` or `k_local` would get goes to q or k.
    """
    pairs = attention_pairs(q, k, codebook_q, codebook_k, **options)
    n_key_head = k.shape[2]
    d_score = score_gradient(pairs.p, for_query_heads(v, q.shape[2]), d_out)
    d_coded, d_exact = d_score * pairs.is_coded, d_score * pairs.is_exact

    d_q = pairs.scale * np.einsum("bhts,bshd->bthd", d_coded, pairs.k_hat)
    d_k = to_key_heads(pairs.scale * np.einsum("bhts,bthd->bshd", d_coded, pairs.q_hat), n_key_head)
    d_q_local = pairs.scale * np.einsum("bhts,bshd->bthd", d_exact, pairs.k_local)
    d_k_local = to_key_heads(pairs.scale * np.einsum("bhts,bthd->bshd", d_exact, pairs.q_local), n_key_head)
    is_given = {name: options.get(name) is not None for name in ("q_local", "k_local", "code_bias")}
    return VQGradients(
        q=d_q if is_given["q_local"] else d_q + d_q_local,
        k=d_k if is_given["k_local"] else d_k + d_k_local,
        v=to_key_heads(np.einsum("bhts,bthv->bshv", pairs.p, d_out), n_key_head),
        q_local=d_q_local if is_given["q_local"] else None,
        k_local=d_k_local if is_given["k_local"] else None,
        code_bias=d_coded.sum((0, 2, 3)) if is_given["code_bias"] else None,
    )


def for_query_heads(x: Array, n_head: int) -> Array:
    """`[B, S, K, ...]` to `[B, S, H, ...]`: every key head as often as query heads read it."""
    return np.repeat(x, n_head // x.shape[2], axis=2)


def to_key_heads(gradient: Array, n_key_head: int) -> Array:
    """Gradients `[B, S, H, ...]` of repeated heads, summed to `[B, S, K, ...]`."""
    n_batch, length, n_head, *rest = gradient.shape
    return gradient.reshape(n_batch, length, n_key_head, n_head // n_key_head, *rest).sum(3)
