"""One-hot codes of a tile of tokens in registers, for kernels by Mosaic GPU that sum by code.

The group that fetches writes the codes of a tile into the middle third of a slot; the others make one-hot
codes of them.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper
from jax_vq.kernels.tiles import BF16, F32

TILE = 128  # tokens at once
FAR = 1024  # the code of a token outside


def slots(n_slot: int) -> Any:
    """Shared memory for the codes of so many tiles."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM((n_slot, 3 * TILE), BF16)


def read_codes(ref: Any, batch: Any, head: Any, start: Any) -> Array:
    """`[T]` of `[B, T, K]` from `start` on; at the end of the sequence, of its last whole tile."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    at = pl.ds(jnp.minimum(start, ref.shape[1] - TILE), TILE)
    return hopper.load(ref.at[batch, at, head], plgpu.Layout.WGMMA.reduce(1), optimized=False)


def is_inside(behind: Any) -> Array:
    """Which of the codes that were read are of the tile, of which so many tokens are behind the end."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    row = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=row) >= behind


def write_codes(codes: Any, slot: Any, code: Array, first_code: Any, behind: Any, dtype: Any) -> None:
    """Codes from a first one on, shifted to where the tile starts; what is behind the end is `FAR`.

    They are worked out in a type, float32 or int32: which needs fewer instructions depends on the kernel.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @pl.when(behind > 0)
    def clear() -> None:
        far = hopper.filled((TILE,), FAR, BF16, plgpu.Layout.WGMMA.reduce(1))
        codes[slot, pl.ds(2 * TILE - behind, TILE)] = far

    # bfloat16 has the integers up to 256, and rounds no code of another program to one of this.
    own = jnp.where(is_inside(behind), (code - first_code).astype(dtype), np.dtype(dtype).type(FAR))
    codes[slot, pl.ds(TILE - behind, TILE)] = own.astype(F32).astype(BF16)


def own_codes(n_row: int, first: Any) -> Array:
    """`[C, T]`: the code of each row, from a first one on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    own = plgpu.broadcasted_iota(jnp.int32, (n_row, TILE), 0, layout=plgpu.Layout.WGMMA) + first
    return own.astype(F32).astype(BF16)


def one_hot(codes: Any, slot: Any, own: Array) -> Array:
    """`[C, T]` bfloat16: whether a token has the code of a row."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    code = hopper.load(codes.at[slot, pl.ds(TILE, TILE)], plgpu.Layout.WGMMA.reduce(0))
    code = lax.broadcast_in_dim(code, own.shape, [1])
    return jnp.maximum(1 - jnp.abs(code - own), 0)  # on pairs of bfloat16, unlike a comparison


def partial_counts(hot: Array) -> Array:
    """`[C, 8]` float32 whose rows sum to how many tokens have a code."""
    while hot.shape[1] > 8:  # counts up to 16, which bfloat16 has
        half = hot.shape[1] // 2
        hot = hot[:, :half] + hot[:, half:]
    return hot.astype(F32)
