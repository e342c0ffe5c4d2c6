"""Argument checks of the public ops: shapes and types at trace time, values where concrete."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_vq.ops.numerics import acc_dtype

FLOATS = ("float64", "float32", "bfloat16", "float16")


def as_array(name: str, x: Any, ndim: int) -> Array:
    """`x` as a jax array of `ndim` axes; nothing is cast."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be an array, found {type(x).__name__}")
    array = jnp.asarray(x)
    if array.dtype != x.dtype:
        raise TypeError(
            f"{name} is {x.dtype} and would become {array.dtype}: enable jax_enable_x64 or cast it"
        )
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, found shape {array.shape}")
    return array


def as_floats(name: str, x: Any, ndim: int) -> Array:
    """A floating-point array without an empty axis."""
    array = as_array(name, x, ndim)
    if array.dtype.name not in FLOATS:
        raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, found {array.dtype}")
    if 0 in array.shape:
        raise ValueError(f"{name} must not be empty, found shape {array.shape}")
    return array


def as_integers(name: str, x: Any, ndim: int) -> Array:
    """An integer array."""
    array = as_array(name, x, ndim)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, found {array.dtype}")
    return array


def check_qkv(
    q: Any, k: Any, v: Any, is_causal: bool, *, is_grouped: bool = False
) -> tuple[Array, Array, Array]:
    """`q [B, T, H, D]`, `k [B, S, H, D]`, `v [B, S, H, V]` of one dtype; T = S when causal.

    Grouped, k and v may have fewer heads, a divisor of H.
    """
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, found {type(is_causal).__name__}")
    q, k, v = as_floats("q", q, 4), as_floats("k", k, 4), as_floats("v", v, 4)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, found q {q.dtype} and {name} {x.dtype}")
    if is_grouped and q.shape[2] % k.shape[2]:
        raise ValueError(f"k must have a divisor of the heads of q, found q {q.shape} and k {k.shape}")
    n_head = k.shape[2] if is_grouped else q.shape[2]
    if (q.shape[0], n_head, q.shape[3]) != (k.shape[0], k.shape[2], k.shape[3]):
        what = "batch and width" if is_grouped else "batch, heads and width"
        raise ValueError(f"k must match q in {what}, found q {q.shape} and k {k.shape}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v must match k in batch, length and heads, found k {k.shape} and v {v.shape}")
    if is_causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"k must be as long as q when is_causal, found q {q.shape} and k {k.shape}")
    return q, k, v


def check_mask(mask: Any, x: Array, name: str) -> Array | None:
    """`mask [B, S]`, boolean, for `x [B, S, ...]`."""
    if mask is None:
        return None
    mask = as_array("mask", mask, 2)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean (True = a real key), found {mask.dtype}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be [B, S] of {name}, found mask {mask.shape} and {name} {x.shape}")
    return mask


def check_codebook(name: str, codebook: Any, x: Array, x_name: str) -> Array:
    """`codebook [H, C, D]` for `x [B, T, H, D]`, in the dtype of x or its accumulators, finite."""
    codebook = as_floats(name, codebook, 3)
    if codebook.dtype not in (x.dtype, acc_dtype(x.dtype)):
        raise TypeError(
            f"{name} must have the dtype of {x_name} or float32, found {codebook.dtype} for {x.dtype}"
        )
    if (codebook.shape[0], codebook.shape[2]) != x.shape[2:]:
        raise ValueError(
            f"{name} must be [H, C, D] of {x_name} [B, T, H, D], found {name} {codebook.shape} "
            f"and {x_name} {x.shape}"
        )
    if is_concrete(codebook) and not np.isfinite(np.asarray(codebook)).all():
        raise ValueError(f"{name} {codebook.shape} holds NaN or inf")
    return codebook


def check_range(name: str, ids: Array, size: int) -> None:
    """Concrete `ids` lie in [0, size)."""
    if is_concrete(ids) and ids.size:
        values = np.asarray(ids)  # not jnp: under jit that would be traced
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= size:
            raise ValueError(f"{name} {ids.shape} must lie in [0, {size}), found {low} ... {high}")


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


def check_segments(segment_ids: Any, q: Array, k: Array) -> Array | None:
    """`segment_ids [B, T]` integers, of queries and keys."""
    if segment_ids is None:
        return None
    segment_ids = as_integers("segment_ids", segment_ids, 2)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"segment_ids needs q as long as k, found q {q.shape} and k {k.shape}")
    if segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids must be [B, T] of q, found {segment_ids.shape} and q {q.shape}")
    return segment_ids.astype(jnp.int32)


def check_local(q_local: Any, k_local: Any, q: Array, k: Array) -> tuple[Array, Array]:
    """`q_local [B, T, H, E]` and `k_local [B, S, K, E]` of the dtype of q; q and k by default."""
    q_local = q if q_local is None else as_floats("q_local", q_local, 4)
    k_local = k if k_local is None else as_floats("k_local", k_local, 4)
    for name, x, like_name, like in (("q_local", q_local, "q", q), ("k_local", k_local, "k", k)):
        if x.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of {like_name}, found {x.dtype} and {like.dtype}")
        if x.shape[:3] != like.shape[:3]:
            raise ValueError(
                f"{name} must match {like_name} in batch, length and heads, found {name} {x.shape} "
                f"and {like_name} {like.shape}"
            )
    if q_local.shape[3] != k_local.shape[3]:
        raise ValueError(
            f"k_local must have the width of q_local, found k_local {k_local.shape} "
            f"and q_local {q_local.shape}"
        )
    return q_local, k_local


def check_bias(code_bias: Any, q: Array) -> Array | None:
    """`code_bias [H]` of the dtype of q or its accumulators."""
    if code_bias is None:
        return None
    code_bias = as_floats("code_bias", code_bias, 1)
    if code_bias.dtype not in (q.dtype, acc_dtype(q.dtype)):
        raise TypeError(
            f"code_bias must have the dtype of q or float32, found {code_bias.dtype} for {q.dtype}"
        )
    if code_bias.shape != q.shape[2:3]:
        raise ValueError(f"code_bias must be [H] of q, found code_bias {code_bias.shape} and q {q.shape}")
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


def check_x64(*dtypes: str) -> None:
    """`float64` among dtypes needs jax_enable_x64."""
    if "float64" in dtypes and not jax.config.read("jax_enable_x64"):
        raise ValueError("config: dtype float64 needs jax_enable_x64, which is off")


def is_concrete(x: Array) -> bool:
    """Whether the values of x can be looked at: not under a transformation."""
    return not isinstance(x, jax.core.Tracer)
