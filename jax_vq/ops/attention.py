"""Exact attention, its log-sum-exp, and the merge of partial attentions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_vq.ops.checks import as_floats, check_mask, check_qkv, check_scale
from jax_vq.ops.numerics import acc_dtype, chunk_len, contain_nonfinite, einsum, poison_values


def dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Exact softmax attention, `softmax(scale * q k^T + mask) v`.

    Without `return_lse` this is the framework's own kernel (`exact_implementation` names it).
    With it, in float64, which that kernel computes in float32, and in float16 on a CPU, which it
    does not take, it is a plain softmax over chunks of queries: linear memory, differentiable in
    both results.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, S, H, D]`, `[B, S, H, V]`, of the dtype of q.
      is_causal: query i sees keys j <= i; needs T = S.
      scale: factor on the scores, default `D ** -0.5`.
      mask: `[B, S]` boolean, True = a real key.
      return_lse: also return the log-sum-exp of the scores.

    Returns:
      out `[B, T, H, V]` in the dtype of v, 0 for a query that sees no key; with `return_lse`
      also lse `[B, T, H]` in float32 (float64 for float64), -inf for such a query.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    q, k, v = check_qkv(q, k, v, is_causal)
    mask = check_mask(mask, k, "k")
    scale = check_scale(scale, q.shape[-1])
    if return_lse or exact_implementation(q, v) == "plain":
        out, lse = _plain_attention(q, k, v, mask, is_causal, scale)
        return (out, lse) if return_lse else out
    return _framework_attention(q, k, v, mask, is_causal, scale)


def exact_implementation(q: Array, v: Array) -> str:
    """What `dot_product_attention` runs for these shapes: 'cudnn', 'xla' or 'plain', our own.

    cuDNN takes half types on a GPU, widths up to 128 that are multiples of 8.
    """
    on_gpu = jax.default_backend() == "gpu"
    if q.dtype == jnp.float64 or (q.dtype == jnp.float16 and not on_gpu):
        return "plain"
    width = max(q.shape[-1], v.shape[-1])
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = width % 8 == 0 and width <= 128
    return "cudnn" if on_gpu and is_half and fits else "xla"


@partial(jax.jit, static_argnums=(4, 5))
def _framework_attention(
    q: Array, k: Array, v: Array, mask: Array | None, is_causal: bool, scale: float
) -> Array:
    length, width, value_width = q.shape[1], q.shape[-1], v.shape[-1]
    implementation = exact_implementation(q, v)
    bias_mask, seen = None, None
    if mask is not None:
        seen = _sees_a_key(mask, length, is_causal)
        k, v = jnp.where(mask[:, :, None, None], k, 0), jnp.where(mask[:, :, None, None], v, 0)
        # A row that sees no key sees all of them, so that its softmax is finite; it is zeroed below.
        bias_mask = (mask[:, None, :] | ~seen[:, :, None])[:, None]
    first = None
    if is_causal:
        v, first = contain_nonfinite(poison_values(k, v), axis=1)
        k = jnp.where(jnp.isfinite(k), k, 0)
    padded = max(width, value_width)
    q, k = (jnp.pad(x, ((0, 0),) * 3 + ((0, padded - width),)) for x in (q, k))
    v = jnp.pad(v, ((0, 0),) * 3 + ((0, padded - value_width),))
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            q, k, v, mask=bias_mask, scale=scale, is_causal=is_causal, implementation=implementation
        )[..., :value_width]
    if seen is not None:
        out = jnp.where(seen[:, :, None, None], out, 0)
    if first is not None:
        out = jnp.where(jnp.arange(length)[None, :, None, None] >= first, jnp.nan, out)
    return out


def _sees_a_key(mask: Array, length: int, is_causal: bool) -> Array:
    """Whether query i sees a real key: `[B, T]`."""
    if not is_causal:
        return jnp.broadcast_to(jnp.any(mask, axis=1, keepdims=True), (mask.shape[0], length))
    return jnp.cumsum(mask, axis=1, dtype=jnp.int32) > 0


@partial(jax.jit, static_argnums=(4, 5))
def _plain_attention(
    q: Array, k: Array, v: Array, mask: Array | None, is_causal: bool, scale: float
) -> tuple[Array, Array]:
    batch, length, n_head, _ = q.shape
    k_len = k.shape[1]
    acc = acc_dtype(q.dtype)
    first = None
    if mask is not None:
        k, v = jnp.where(mask[:, :, None, None], k, 0), jnp.where(mask[:, :, None, None], v, 0)
    if is_causal:
        v, first = contain_nonfinite(poison_values(k, v), axis=1)
        k = jnp.where(jnp.isfinite(k), k, 0)

    @jax.checkpoint
    def attend(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, position = chunk
        visible = jnp.ones((1, 1, 1, k_len), bool) if mask is None else mask[:, None, None, :]
        if is_causal:
            visible = visible & (jnp.arange(k_len)[None, None, None, :] <= position[None, None, :, None])
        score = einsum("bthd,bshd->bhts", rows, k) * jnp.asarray(scale, acc)
        p, lse = masked_softmax(score, visible)
        out = einsum("bhts,bshv->bthv", p.astype(v.dtype), v).astype(v.dtype)
        if first is not None:
            out = jnp.where(position[None, :, None, None] >= first, jnp.nan, out)
        return out, jnp.moveaxis(lse, 1, 2)

    position = jnp.arange(length)
    size = chunk_len(q, length, 4 * batch * n_head * k_len)
    n_full = length // size
    if n_full <= 1 and length == size:
        return attend((q, position))
    head = n_full * size
    chunks = jnp.moveaxis(q[:, :head].reshape(batch, n_full, size, *q.shape[2:]), 1, 0)
    out, lse = jax.lax.map(attend, (chunks, position[:head].reshape(n_full, size)))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, head, n_head, v.shape[-1])
    lse = jnp.moveaxis(lse, 0, 1).reshape(batch, head, n_head)
    if head == length:
        return out, lse
    rest_out, rest_lse = attend((q[:, head:], position[head:]))
    return jnp.concatenate([out, rest_out], 1), jnp.concatenate([lse, rest_lse], 1)


def masked_softmax(score: Array, visible: Array) -> tuple[Array, Array]:
    """Softmax over the last axis of the visible scores, and its log-sum-exp.

    A row with nothing visible gives zeros and -inf, with zero gradients.
    """
    score = jnp.where(visible, score, -jnp.inf)
    top = jnp.max(score, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
    mass = jnp.exp(score - top)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    is_seen = total != 0
    total = jnp.where(is_seen, total, 1)
    lse = jnp.where(is_seen, jnp.log(total) + top, -jnp.inf)
    return jnp.where(is_seen, mass / total, 0), lse[..., 0]


def merge_attention(out1: Array, lse1: Array, out2: Array, lse2: Array) -> tuple[Array, Array]:
    """Two partial attentions over disjoint sets of keys as one (`math.md` 4).

    `lse = logaddexp(lse1, lse2)`, `out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2`.

    Args:
      out1, out2: `[B, T, H, V]` of one dtype.
      lse1, lse2: `[B, T, H]`, -inf where that part saw no key.

    Returns:
      out `[B, T, H, V]` in that dtype and lse `[B, T, H]`; 0 and -inf where neither saw a key.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    out1, out2 = as_floats("out1", out1, 4), as_floats("out2", out2, 4)
    lse1, lse2 = as_floats("lse1", lse1, 3), as_floats("lse2", lse2, 3)
    if out1.shape != out2.shape:
        raise ValueError(f"out2 must have the shape of out1, found {out2.shape} and {out1.shape}")
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if lse.shape != out1.shape[:-1]:
            raise ValueError(f"{name} must be [B, T, H] of out1, found {lse.shape} and {out1.shape}")
    if out1.dtype != out2.dtype:
        raise TypeError(f"out2 must have the dtype of out1, found {out2.dtype} and {out1.dtype}")
    if lse1.dtype != lse2.dtype:
        raise TypeError(f"lse2 must have the dtype of lse1, found {lse2.dtype} and {lse1.dtype}")
    top = jax.lax.stop_gradient(jnp.maximum(lse1, lse2))
    top = jnp.where(jnp.isneginf(top), 0, top)
    mass1, mass2 = jnp.exp(lse1 - top), jnp.exp(lse2 - top)
    total = mass1 + mass2
    is_seen = total != 0
    total = jnp.where(is_seen, total, 1)
    part1, part2 = (mass1 / total)[..., None], (mass2 / total)[..., None]
    out = part1 * out1.astype(part1.dtype) + part2 * out2.astype(part2.dtype)
    return out.astype(out1.dtype), jnp.where(is_seen, jnp.log(total) + top, -jnp.inf)
