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


def check_qkv(
    q: Any, k: Any, v: Any, is_causal: bool, *, is_grouped: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`q [B, T, H, D]`, `k [B, S, H, D]`, `v [B, S, H, V]` of one dtype; T = S when causal.

    Grouped, k and v may have fewer heads, a divisor of H.
    """
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, found {type(is_causal).__name__}")
    q, k, v = as_floats("q", q, 4), as_floats("k", k, 4), as_floats("v", v, 4)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, found q {q.dtype} and {name} {x.dtype}")
        check_device(name, x, q, "q")
    if is_grouped and q.shape[2] % k.shape[2]:
        raise ValueError(f"k must have a divisor of the heads of q, found q {shape(q)} and k {shape(k)}")
    n_head = k.shape[2] if is_grouped else q.shape[2]
    if (q.shape[0], n_head, q.shape[3]) != (k.shape[0], k.shape[2], k.shape[3]):
        what = "batch and width" if is_grouped else "batch, heads and width"
        raise ValueError(f"k must match q in {what}, found q {shape(q)} and k {shape(k)}")
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


def check_segments(segment_ids: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """`segment_ids [B, T]` integers, of queries and keys."""
    if segment_ids is None:
        return None
    segment_ids = as_integers("segment_ids", segment_ids, 2)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"segment_ids needs q as long as k, found q {shape(q)} and k {shape(k)}")
    if segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids must be [B, T] of q, found {shape(segment_ids)} and q {shape(q)}")
    check_device("segment_ids", segment_ids, q, "q")
    return segment_ids.to(torch.int32)


def check_local(q_local: Any, k_local: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """`q_local [B, T, H, E]` and `k_local [B, S, K, E]` of the dtype of q; q and k by default."""
    q_local = q if q_local is None else as_floats("q_local", q_local, 4)
    k_local = k if k_local is None else as_floats("k_local", k_local, 4)
    for name, x, like_name, like in (("q_local", q_local, "q", q), ("k_local", k_local, "k", k)):
        if x.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of {like_name}, found {x.dtype} and {like.dtype}")
        if x.shape[:3] != like.shape[:3]:
            raise ValueError(
                f"{name} must match {like_name} in batch, length and heads, found {name} {shape(x)} "
                f"and {like_name} {shape(like)}"
            )
        check_device(name, x, like, like_name)
    if q_local.shape[3] != k_local.shape[3]:
        raise ValueError(
            f"k_local must have the width of q_local, found k_local {shape(k_local)} "
            f"and q_local {shape(q_local)}"
        )
    return q_local, k_local


def check_bias(code_bias: Any, q: Tensor) -> Tensor | None:
    """`code_bias [H]` of the dtype of q or its accumulators."""
    if code_bias is None:
        return None
    code_bias = as_floats("code_bias", code_bias, 1)
    if code_bias.dtype not in (q.dtype, acc_dtype(q.dtype)):
        raise TypeError(
            f"code_bias must have the dtype of q or float32, found {code_bias.dtype} for {q.dtype}"
        )
    if code_bias.shape != q.shape[2:3]:
        raise ValueError(f"code_bias must be [H] of q, found code_bias {shape(code_bias)} and q {shape(q)}")
    check_device("code_bias", code_bias, q, "q")
    return code_bias


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
