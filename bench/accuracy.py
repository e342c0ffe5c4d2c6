"""How far outputs are from exact attention, and quantized vectors from what they stand for."""

import numpy as np
from numpy.typing import NDArray

from vq_common import oracle
from vq_common.tolerances import relative_rms

Array = NDArray[np.float64]
CHUNK_BYTES = 2**26  # of the scores held at once


def exact_attention(
    q: Array, k: Array, v: Array, *, is_causal: bool, rows: NDArray[np.int64] | None = None
) -> Array:
    """`softmax(q k^T + mask) v` in float64, by pieces of queries; matrix products where the oracle has none.

    Args:
      rows: ascending positions of the queries that are wanted; None for all T.

    Returns:
      `[B, R, H, V]`.
    """
    n_batch, length, n_head, _ = q.shape
    rows = np.arange(length) if rows is None else rows
    out = np.empty((n_batch, len(rows), n_head, v.shape[3]))
    piece = max(CHUNK_BYTES // (8 * length), 1)
    for b in range(n_batch):
        for h in range(n_head):
            for start in range(0, len(rows), piece):
                of_piece = rows[start : start + piece]
                n_key = of_piece[-1] + 1 if is_causal else length
                score = q[b, of_piece, h] @ k[b, :n_key, h].T
                if is_causal:
                    score[np.arange(n_key) > of_piece[:, None]] = -np.inf
                p = np.exp(score - score.max(-1, keepdims=True))
                out[b, start : start + piece, h] = (p @ v[b, :n_key, h]) / p.sum(-1, keepdims=True)
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
