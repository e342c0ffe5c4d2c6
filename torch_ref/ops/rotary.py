"""Rotary positions and a short causal convolution: how the exact part of a module knows order."""

import math

import numpy as np
import torch
from torch import Tensor

from torch_ref.ops.numerics import acc_dtype

TURN = 1024  # positions are split at it, so that an angle keeps its precision at a million tokens


def rotary(x: Tensor, position: Tensor, *, theta: float = 10000.0) -> Tensor:
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
    slow, fast = (
        torch.tensor(a, dtype=acc, device=x.device)
        for a in (np.fmod(TURN * frequency, 2 * math.pi), frequency)
    )
    quotient, rest = position // TURN, position % TURN
    angle = quotient[..., None].to(acc) * slow + rest[..., None].to(acc) * fast
    cos, sin = torch.cos(angle)[:, :, None], torch.sin(angle)[:, :, None]
    first, second, last = x.to(acc).split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin, last
    return torch.cat(turned, dim=-1).to(x.dtype)


def causal_conv(x: Tensor, weight: Tensor, before: Tensor, start: Tensor) -> Tensor:
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
    index = torch.arange(length, dtype=torch.int32, device=x.device)
    weight = weight.to(acc)
    around = torch.cat([before.to(x.dtype), x], dim=1)
    total = x.to(acc) * weight[0]
    for n in range(1, weight.shape[0]):
        shifted = around[:, n_before - n : n_before - n + length].to(acc)
        is_inside = (index - n >= start)[..., None]
        total = total + torch.where(is_inside, shifted, 0) * weight[n]
    return total.to(x.dtype)
