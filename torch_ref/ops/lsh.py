"""Angular locality-sensitive hashing: sign bits in Gray-code order (`math.md` 4)."""

from typing import Any

import torch
from torch import Tensor

from torch_ref.ops.checks import as_floats, as_integers, check_device, is_concrete, shape
from torch_ref.ops.numerics import acc_dtype, einsum

MAX_PROJECTIONS = 30


def angular_hash(x: Any, directions: Any) -> Tensor:
    """Bin of every vector: the position in Gray-code order of the signs of `x . directions`.

    Bit p of the word is set where `x . directions[h, p] > 0`; words that follow each other in
    Gray-code order differ in one sign, so vectors of neighbouring bins point in similar ways.

    Args:
      x: `[B, T, H, D]`.
      directions: `[H, P, D]` with P in 1..30, of the dtype of x or float32, finite.

    Returns:
      int32 bins in [0, 2**P), `[B, T, H]`. Products are float32 (float64 for float64) at highest
      precision. No gradient. A product that is NaN counts as not positive.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, directions with NaN or inf.
    """
    x = as_floats("x", x, 4)
    return _angular_hash(x, check_directions(directions, x, "x"))


def _angular_hash(x: Tensor, directions: Tensor) -> Tensor:
    acc = acc_dtype(x.dtype)
    product = einsum("bthd,hpd->bthp", x.to(acc), directions.to(acc))
    bit = 1 << torch.arange(directions.shape[1], dtype=torch.int32, device=x.device)
    word = torch.where(product > 0, bit, 0).sum(-1, dtype=torch.int32)
    return gray_rank(word)


def gray_code(index: Tensor) -> Tensor:
    """The `index`-th word of the reflected Gray code, elementwise; neighbours differ in one bit.

    Args:
      index: non-negative integers of any shape.

    Raises:
      TypeError: not integers.
    """
    _check_integers("index", index)
    return index ^ (index >> 1)


def gray_rank(word: Tensor) -> Tensor:
    """The inverse of `gray_code`: `gray_rank(gray_code(i)) == i`, elementwise.

    Bit b of the result is the parity of the bits of `word` from b upwards.

    Args:
      word: non-negative integers of any shape.

    Raises:
      TypeError: not integers.
    """
    _check_integers("word", word)
    shift = 1
    while shift < torch.iinfo(word.dtype).bits:
        word = word ^ (word >> shift)
        shift *= 2
    return word


def check_directions(directions: Any, x: Tensor, name: str) -> Tensor:
    """`directions [H, P, D]` for `x [B, T, H, D]`, P in 1..30, finite."""
    directions = as_floats("directions", directions, 3)
    if directions.dtype not in (x.dtype, acc_dtype(x.dtype)):
        raise TypeError(
            f"directions must have the dtype of {name} or float32, found {directions.dtype} for {x.dtype}"
        )
    if (directions.shape[0], directions.shape[2]) != x.shape[2:]:
        raise ValueError(
            f"directions must be [H, P, D] of {name} [B, T, H, D], found directions {shape(directions)} "
            f"and {name} {shape(x)}"
        )
    if directions.shape[1] > MAX_PROJECTIONS:
        raise ValueError(
            f"directions must hold 1 to {MAX_PROJECTIONS} projections P, found {shape(directions)}"
        )
    check_device("directions", directions, x, name)
    if is_concrete(directions) and not bool(torch.isfinite(directions).all()):
        raise ValueError(f"directions {shape(directions)} holds NaN or inf")
    return directions


def _check_integers(name: str, x: Any) -> None:
    as_integers(name, x, getattr(x, "ndim", 0))
