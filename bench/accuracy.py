"""How far outputs are from exact attention, and quantized vectors from what they stand for."""

import numpy as np
from numpy.typing import NDArray

from vq_common import oracle
from vq_common.tolerances import relative_rms

Array = NDArray[np.float64]
CHUNK_BYTES = 2**26  # of the scores held at once


def exact_attention(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    """`softmax(q k^T + mask) v`, `[B, T, H, V]` in float64, dense and by pieces of queries."""
    n_batch, length, n_head, _ = q.shape
    out = np.empty((n_batch, length, n_head, v.shape[3]))
    piece = max(CHUNK_BYTES // (8 * length), 1)
    for b in range(n_batch):
        for h in range(n_head):
            for start in range(0, length, piece):
                stop = min(start + piece, length)
                n_key = stop if is_causal else length
                score = q[b, start:stop, h] @ k[b, :n_key, h].T
                if is_causal:
                    score[np.arange(n_key) > np.arange(start, stop)[:, None]] = -np.inf
                p = np.exp(score - score.max(-1, keepdims=True))
                out[b, start:stop, h] = (p @ v[b, :n_key, h]) / p.sum(-1, keepdims=True)
    return out


def quantize_error(x: Array, codebook: Array) -> float:
    """Relative RMS error of the nearest codes of `x [B, T, H, D]`; codebook `[H, C, D]`."""
    found = np.empty_like(x)
    piece = max(CHUNK_BYTES // (x.shape[0] * codebook[0].nbytes), 1)
    for h in range(x.shape[2]):
        for start in range(0, x.shape[1], piece):
            part = np.s_[:, start : start + piece, h : h + 1]
            codes = oracle.nearest_codes(x[part], codebook[h : h + 1])
            found[part] = oracle.take_codes(codebook[h : h + 1], codes)
    return relative_rms(found, x)
