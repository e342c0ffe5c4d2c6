"""The one table of tolerances: relative RMS error, `rms(out - oracle) / rms(oracle)`."""

from typing import Any, NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    forward: float
    gradient: float


# A relative RMS error is a few units of rounding, and grows slowly with the terms of a sum.
TOLERANCES = {
    # eps 2e-16: a different order of summation and nothing else.
    "float64": Tolerance(forward=1e-12, gradient=1e-11),
    # eps 1e-7: scores of size ~10 lose ~1e-6 in the exponent; a gradient sums two such terms.
    "float32": Tolerance(forward=3e-6, gradient=2e-5),
    # eps 8e-3: inputs are exact, weights and output are rounded once or twice; accumulators
    # are float32, so the error does not grow with the length.
    "bfloat16": Tolerance(forward=1e-2, gradient=2e-2),
}


def relative_rms(actual: Any, expected: Any) -> float:
    """`rms(actual - expected) / rms(expected)` in float64; the absolute RMS where `expected` is 0.

    Raises:
      ValueError: the shapes differ (nothing is broadcast).
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"actual {actual.shape} and expected {expected.shape} differ in shape")
    if actual.size == 0:
        return 0.0
    error = float(np.sqrt(np.mean((actual - expected) ** 2)))
    size = float(np.sqrt(np.mean(expected**2)))
    return error / size if size else error
