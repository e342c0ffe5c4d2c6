"""Rotary positions and a short causal convolution: how the exact part of a module knows order."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_vq.ops.numerics import acc_dtype

TURN = 1024  # positions are split at it, so that an angle keeps its precision at a million tokens


def rotary(x: Array, position: Array, *, theta: float = 10000.0) -> Array:
    """Rotate pairs of features by angles that grow with the position.

    Features d and `d + D // 2` turn by `position * theta ** (-2 d / D)`; an odd last one stays.
    Products of two rotated vectors depend on the difference of their positions alone. Source:
    Su et al. 2021, arXiv:2104.09864, with the halves paired as in GPT-NeoX and Llama.

    Args:
      x: `[B, T, H, D]`.
      position: int32 `[B, T]`, at least 0.
      theta: base of the wavelengths.

    Returns:
      As x.
    """
    half = x.shape[-1] // 2
    acc = acc_dtype(x.dtype)
    frequency = theta ** (-np.arange(half) / max(half, 1))
    slow, fast = (np.asarray(a, acc) for a in (np.fmod(TURN * frequency, 2 * math.pi), frequency))
    quotient, rest = position // TURN, position % TURN
    angle = quotient[..., None].astype(acc) * jnp.asarray(slow)[None, None]
    angle = angle + rest[..., None].astype(acc) * jnp.asarray(fast)[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second, last = (a.astype(acc) for a in jnp.split(x, (half, 2 * half), axis=-1))
    turned = first * cos - second * sin, second * cos + first * sin, last
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def causal_conv(x: Array, weight: Array, before: Array, start: Array) -> Array:
    """Depthwise convolution over a token and those before it, inside its document.

    `y_t = sum_n weight[n] x_{t - n}` over `t - n >= start_t`.

    Args:
      x: `[B, T, C]`, 0 for padding.
      weight: `[N, C]`, the token's own first.
      before: `[B, N - 1, C]` the tokens before x.
      start: `[B, T]` where a token's document starts; negative for before x.

    Returns:
      `[B, T, C]` in the dtype of x.
    """
    length, n_before = x.shape[1], before.shape[1]
    acc = acc_dtype(x.dtype)
    index = jnp.arange(length, dtype=jnp.int32)[None]
    weight = weight.astype(acc)
    around = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    total = x.astype(acc) * weight[None, None, 0]
    for n in range(1, weight.shape[0]):
        shifted = around[:, n_before - n : n_before - n + length].astype(acc)
        is_inside = (index - n >= start)[..., None]
        total = total + jnp.where(is_inside, shifted, 0) * weight[None, None, n]
    return total.astype(x.dtype)
