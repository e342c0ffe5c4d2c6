"""Codebook learning in both backends: arrays, inputs and definitions that its tests share."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import jax_vq
import torch_ref
from parity_tests.support import to_jax, to_torch
from vq_common import oracle
from vq_common.cases import round_to

Array = NDArray[Any]
BATCH, LENGTH, N_HEAD, WIDTH, N_CODE = 2, 37, 3, 5, 7


class Backend(NamedTuple):
    """One package and its arrays."""

    ops: Any
    array: Any  # NumPy to this backend: floats in the named dtype

    def state(self, count: Array, total: Array, dtype: str) -> Any:
        """A `CodebookState`."""
        return self.ops.CodebookState(self.array(count, dtype), self.array(total, dtype))


def backend_of(name: str, device: torch.device) -> Backend:
    """The backend 'jax' or 'torch'."""
    if name == "jax":
        return Backend(jax_vq, to_jax)
    return Backend(torch_ref, partial(to_torch, device=device))


def vectors(seed: int = 0, dtype: str = "float64", batch: int = BATCH, length: int = LENGTH) -> Array:
    """Points around a few centres, `[B, T, H, D]`."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(N_HEAD, 5, WIDTH))
    picked = rng.integers(5, size=(batch, length, N_HEAD))
    return round_to(centres[np.arange(N_HEAD), picked] + 0.1 * rng.normal(size=(*picked.shape, WIDTH)), dtype)


def padding(kind: str, batch: int = BATCH, length: int = LENGTH) -> NDArray[np.bool_] | None:
    """A mask for 'some' padded tokens or 'all' of them; None for 'none'."""
    if kind == "none":
        return None
    mask = np.random.default_rng(5).random((batch, length)) > 0.3
    return mask & (kind == "some")


def assert_rows_are_among(codebook: Array, real: Array) -> None:
    """Every code `[H, C, D]` is one of the vectors `[N, H, D]` of its head."""
    for h in range(codebook.shape[0]):
        distance = np.abs(codebook[h, :, None] - real[None, :, h]).max(-1).min(1)
        np.testing.assert_allclose(distance, 0, atol=1e-6)


def lloyd(x: Array, draws: Array, n_iter: int, mask: NDArray[np.bool_] | None) -> Array:
    """Lloyd's algorithm code by code: the codebook `[H, C, D]`."""
    real = x.reshape(-1, *x.shape[2:]) if mask is None else x[mask]  # [N, H, D]
    codebook = np.take_along_axis(real, (draws * len(real)).astype(int).T[:, :, None], axis=0).swapaxes(0, 1)
    for _ in range(n_iter):
        codebook = lloyd_step(real, codebook)
    return codebook


def lloyd_step(real: Array, codebook: Array) -> Array:
    """Every code moves to the mean of its vectors `[N, H, D]`; one without a vector stays."""
    codes = oracle.nearest_codes(real[None], codebook)[0]
    new = codebook.copy()
    for h, c in np.ndindex(codebook.shape[:2]):
        if (codes[:, h] == c).any():
            new[h, c] = real[codes[:, h] == c, h].mean(0)
    return new


def objective(x: Array, codebook: Array, mask: NDArray[np.bool_] | None) -> float:
    """Mean squared distance of the real vectors to their nearest codes."""
    return oracle.commitment_loss(x, oracle.take_codes(codebook, oracle.nearest_codes(x, codebook)), mask)
