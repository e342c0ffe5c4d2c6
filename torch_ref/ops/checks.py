"""Argument checks of the public ops: shapes and types, and values where they can be looked at."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from torch_ref.ops.numerics import acc_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_array(name: str, x: Any, ndim: int) -> Tensor:
    """`x` as a tensor of `ndim` axes; nothing is cast."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, found {type(x).__name__}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, found shape {shape(x)}")
    return x


def as_floats(name: str, x: Any, ndim: int) -> Tensor:
    """A floating-point tensor without an empty axis."""
    x = as_array(name, x, ndim)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {', '.join(map(str, FLOATS))}, found {x.dtype}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, found shape {shape(x)}")
    return x


def as_integers(name: str, x: Any, ndim: int) -> Tensor:
    """An integer tensor."""
    x = as_array(name, x, ndim)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, found {x.dtype}")
    return x


def check_qkv(q: Any, k: Any, v: Any, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`q [B, T, H, D]`, `k [B, S, H, D]`, `v [B, S, H, V]` of one dtype; T = S when causal."""
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, found {type(is_causal).__name__}")
    q, k, v = as_floats("q", q, 4), as_floats("k", k, 4), as_floats("v", v, 4)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, found q {q.dtype} and {name} {x.dtype}")
        check_device(name, x, q, "q")
    if (q.shape[0], q.shape[2], q.shape[3]) != (k.shape[0], k.shape[2], k.shape[3]):
        raise ValueError(f"k must match q in batch, heads and width, found q {shape(q)} and k {shape(k)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v must match k in batch, length and heads, found k {shape(k)} and v {shape(v)}")
    if is_causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"k must be as long as q when is_causal, found q {shape(q)} and k {shape(k)}")
    return q, k, v


def check_mask(mask: Any, x: Tensor, name: str) -> Tensor | None:
    """`mask [B, S]`, boolean, for `x [B, S, ...]`."""
    if mask is None:
        return None
    mask = as_array("mask", mask, 2)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True = a real key), found {mask.dtype}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be [B, S] of {name}, found mask {shape(mask)} and {name} {shape(x)}")
    check_device("mask", mask, x, name)
    return mask


def check_codebook(name: str, codebook: Any, x: Tensor, x_name: str) -> Tensor:
    """`codebook [H, C, D]` for `x [B, T, H, D]`, in the dtype of x or its accumulators, finite."""
    codebook = as_floats(name, codebook, 3)
    if codebook.dtype not in (x.dtype, acc_dtype(x.dtype)):
        raise TypeError(
            f"{name} must have the dtype of {x_name} or float32, found {codebook.dtype} for {x.dtype}"
        )
    if (codebook.shape[0], codebook.shape[2]) != x.shape[2:]:
        raise ValueError(
            f"{name} must be [H, C, D] of {x_name} [B, T, H, D], found {name} {shape(codebook)} "
            f"and {x_name} {shape(x)}"
        )
    check_device(name, codebook, x, x_name)
    if is_concrete(codebook) and not bool(torch.isfinite(codebook).all()):
        raise ValueError(f"{name} {shape(codebook)} holds NaN or inf")
    return codebook


def check_device(name: str, x: Tensor, other: Tensor, other_name: str) -> None:
    """Both tensors are on one device."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device} and {other_name} on {other.device}")


def check_range(name: str, ids: Tensor, size: int) -> None:
    """Concrete `ids` lie in [0, size)."""
    if is_concrete(ids) and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(f"{name} {shape(ids)} must lie in [0, {size}), found {low} ... {high}")


def check_at_least(name: str, value: Any, low: int) -> int:
    """A Python int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int >= {low}, found {value!r} ({type(value).__name__})")
    if value < low:
        raise ValueError(f"{name} must be an int >= {low}, found {value}")
    return int(value)


def check_between(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A Python number in `[low, high]`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, found {value!r} ({type(value).__name__})")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], found {value}")
    return float(value)


def check_scale(scale: Any, width: int) -> float:
    """The factor on scores; `width ** -0.5` when None."""
    if scale is None:
        return float(width**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a Python number or None, found {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, found {scale}")
    return float(scale)


def is_concrete(x: Tensor) -> bool:
    """Whether the values of x can be looked at: not a fake tensor, not under a transformation."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return not (isinstance(x, FakeTensor) or x.is_meta or is_wrapped or torch.compiler.is_compiling())


def shape(x: Tensor) -> tuple[int, ...]:
    """The shape as messages show it."""
    return tuple(x.shape)
