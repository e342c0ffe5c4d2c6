"""What a suite may ask of a worker beside time: how far quantization is off."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import registry, verify
from bench.accuracy import exact_attention
from bench.job import Point
from vq_common.tolerances import relative_rms

ERRORS = "errors"  # quantize_error_q, quantize_error_k and exact_error
OBSERVED = "observed"  # observed_bytes
MAX_ROWS = 256  # queries that are compared with exact attention
MAX_SCORES = 2**22  # of one head, in float64

Array = NDArray[np.float64]


def errors(backend: Any, point: Point, out: Any, arrays: tuple[Any, ...]) -> dict[str, float | None]:
    """Relative RMS errors of the output `[B, T, H, V]` of what was timed in a forward call.

    Args:
      backend: an `on_jax.Backend` or `on_torch.Backend`.
      arrays: those of the mechanism.
    """
    mechanism = registry.MECHANISMS[point.mechanism]
    named = dict(zip(mechanism.arrays, arrays, strict=True))
    found: dict[str, float | None] = {"quantize_error_q": None, "quantize_error_k": None}
    for name, codebook in mechanism.quantized:
        codes = backend.numpy(backend.nearest_codes(named[name], named[codebook])).astype(np.int64)
        quantized = backend.numpy(named[codebook])[np.arange(codes.shape[2]), codes]
        found[f"quantize_error_{name}"] = relative_rms(quantized, backend.numpy(named[name]))
    rows = _rows(point.length)
    q, k, v = (backend.numpy(named[name]) for name in registry.DIFFERENTIABLE)
    exact = exact_attention(q, k, v, is_causal=point.is_causal, rows=rows)
    return found | {"exact_error": verify.error(backend.numpy(out)[:, rows], exact)}


def _rows(length: int) -> NDArray[np.int64]:
    """Queries, evenly spread, the last one included."""
    n_row = max(min(MAX_ROWS, MAX_SCORES // length, length), 1)
    return np.linspace(length - 1, 0, n_row).astype(np.int64)[::-1]
