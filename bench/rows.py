"""Some rows of what is timed against their definition, in float64.

Long sequences run other kernels than the short ones that `verify` compares as a whole; here a few
queries are compared at the length itself. HyperAttention is left out: its rows depend on a sort of all keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench import registry, verify
from bench.job import Job, Point, is_exact
from vq_common import oracle

N_ROW = 8  # queries of a head
MAX_PRODUCTS = 2**37  # of the distances to all codes; a head that needs more is not compared
PIECE_BYTES = 2**26  # of distances held at once

Array = NDArray[np.float64]
Codes = NDArray[np.int64]


class Head(NamedTuple):
    """One head of one sequence, with the queries that are compared."""

    rows: NDArray[np.int64]  # [R]
    q: Array  # [R, D]
    k: Array  # [T, D]
    v: Array  # [T, V]
    # 'q', 'k': codebook [C, D], and the codes [R] or [T] of the backend
    quantized: dict[str, tuple[Array, Codes]]


def heads(point: Point, job: Job) -> list[tuple[int, int]]:
    """The first sequence and head and the last, as far as that is not too much work."""
    mechanism = registry.MECHANISMS[point.mechanism]
    if point.mechanism == "hyper" or point.direction == "bwd":
        return []
    n_code = sum(job.codes_q if name == "q" else job.codes_k for name, _ in mechanism.quantized)
    n_head = MAX_PRODUCTS // max(point.length * n_code * job.width, 1)
    ends = dict.fromkeys([(0, 0), (job.batch - 1, job.heads - 1)])
    return list(ends)[:n_head]


def error(backend: Any, point: Point, job: Job, out: Any, arrays: tuple[Any, ...]) -> float:
    """Relative RMS error of some rows of `out [B, T, H, V]`, of `heads`.

    Args:
      backend: an `on_jax.Backend` or `on_torch.Backend`.
      arrays: those of the mechanism.
    """
    mechanism = registry.MECHANISMS[point.mechanism]
    named = dict(zip(mechanism.arrays, arrays, strict=True))
    codes = {name: backend.nearest_codes(named[name], named[book]) for name, book in mechanism.quantized}
    books = {name: backend.numpy(named[book]) for name, book in mechanism.quantized}
    found, expected = [], []
    for b, h in heads(point, job):
        q, k, v = (named[name][b, :, h] for name in registry.DIFFERENTIABLE)
        rows = spread(backend.numpy, q, books["q"][h] if "q" in books else None)
        at = {"q": rows, "k": slice(None)}
        quantized = {
            name: (books[name][h], backend.numpy(codes[name][b, :, h]).astype(np.int64)[at[name]])
            for name in books
        }
        head = Head(rows, backend.numpy(q[rows]), backend.numpy(k), backend.numpy(v), quantized)
        expected.append(definition(head, point, job))
        found.append(backend.numpy(out[b, rows, h]))
    return verify.error(np.concatenate(found), np.concatenate(expected))


def spread(numpy: Callable[[Any], Array], q: Any, codebook: Array | None) -> NDArray[np.int64]:
    """Queries of `q [T, D]`, evenly spread, the last one included; one whose code is a tie gives way."""
    length = q.shape[0]
    rows = np.unique(np.linspace(0, length - 1, min(4 * N_ROW, length)).astype(np.int64))
    if codebook is not None:
        x = numpy(q[rows])
        gap = verify.code_gap(x[None, :, None], codebook[None])[0, :, 0]
        is_clear = gap > verify.TIE * (x**2).sum(1)
        rows = rows[is_clear] if is_clear.any() else rows
    return rows[:: -max(len(rows) // N_ROW, 1)][::-1].copy()


def definition(head: Head, point: Point, job: Job) -> Array:
    """Rows `[R, V]` of one softmax over coded and exact keys, `math.md` 2 and 3, with scale 1."""
    rows, index, q_hat = head.rows[:, None], np.arange(len(head.k)), head.q
    is_visible = (index <= rows) | (not point.is_causal)
    if "q" in head.quantized:
        codebook, codes = head.quantized["q"]
        q_hat = codebook[nearest_codes(head.q, codebook, codes)]
    mem_len, n_sink = job.window(point.mechanism)
    start = rows - rows % job.block_len - mem_len
    is_near = (index < n_sink) | ((index >= start) & (mem_len > 0)) | is_exact(point.mechanism)
    score = np.full(is_near.shape, -np.inf)
    if "k" in head.quantized:
        codebook, codes = head.quantized["k"]
        score = (q_hat @ codebook.T)[:, nearest_codes(head.k, codebook, codes)]
    else:
        is_visible = is_visible & is_near
    if is_near.any():
        score = np.where(is_near, head.q @ head.k.T, score)
    p, _ = oracle.probabilities(score, is_visible.astype(np.float64))
    return p @ head.v


def nearest_codes(x: Array, codebook: Array, codes: Codes) -> Codes:
    """The nearest codes `[T]` of `x [T, D]`; where those of the backend are as near but for rounding, those.

    Either code of a tie is right, and of many keys some are on one.
    """
    found = np.empty_like(codes)
    piece = max(PIECE_BYTES // (8 * len(codebook)), 1)
    for start in range(0, len(x), piece):
        of = slice(start, start + piece)
        distance = _distances(x[of], codebook)
        nearest = distance.min(1)
        own = np.take_along_axis(distance, codes[of, None], axis=1)[:, 0]
        is_tie = own - nearest <= verify.TIE * (x[of] ** 2).sum(1)
        found[of] = np.where(is_tie, codes[of], distance.argmin(1))
    return found


def _distances(x: Array, codebook: Array) -> Array:
    """Half the squared distances `[T, C]`, less what all codes have in common."""
    return (codebook**2).sum(1) / 2 - x @ codebook.T
