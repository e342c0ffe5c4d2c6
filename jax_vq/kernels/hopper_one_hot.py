"""One-hot codes of a tile of tokens in registers, for kernels by Mosaic GPU that sum by code."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jax_vq.kernels import hopper
from jax_vq.kernels.tiles import BF16, F32

TILE = 128  # tokens at once
FAR = 1024  # the code of a token outside


def own_codes(n_row: int, first: Any) -> Array:
    """`[C, T]`: the code of each row, from a first one on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    own = plgpu.broadcasted_iota(jnp.int32, (n_row, TILE), 0, layout=plgpu.Layout.WGMMA) + first
    return own.astype(F32).astype(BF16)


def one_hot(codes: Any, own: Array) -> Array:
    """`[C, T]` bfloat16: whether a token, of those in shared memory, has the code of a row."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    code = hopper.load(codes, plgpu.Layout.WGMMA.reduce(0))
    code = lax.broadcast_in_dim(code, own.shape, [1])
    return jnp.maximum(1 - jnp.abs(code - own), 0)  # on pairs of bfloat16, unlike a comparison


def partial_counts(hot: Array) -> Array:
    """`[C, 8]` float32 whose rows sum to how many tokens have a code."""
    while hot.shape[1] > 8:  # counts up to 16, which bfloat16 has
        half = hot.shape[1] // 2
        hot = hot[:, :half] + hot[:, half:]
    return hot.astype(F32)
