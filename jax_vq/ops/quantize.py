"""Vector quantization: nearest codes, straight-through gradients, codebook learning (`math.md` 1)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_vq.ops.checks import (
    as_floats,
    as_integers,
    check_at_least,
    check_between,
    check_codebook,
    check_mask,
    check_range,
)
from jax_vq.ops.implementations import check_implementation, run, traced
from jax_vq.ops.numerics import (
    acc_dtype,
    chunk_len,
    einsum,
    is_code,
    read_chunk,
    scan_chunks,
    split,
    write_chunk,
)


def nearest_codes(x: Any, codebook: Any, *, implementation: str | None = None) -> Array:
    """Index of the nearest code, `argmin_c |x - codebook[c]|^2`, ties to the lowest index.

    Computed as `argmax_c (x . codebook[c] - |codebook[c]|^2 / 2)` in float32 (float64 for
    float64) at highest matmul precision, in chunks of time: no `T x C` array is kept.

    Args:
      x: vectors `[B, T, H, D]`.
      codebook: `[H, C, D]`, of the dtype of x or float32.
      implementation: as in `vq_attention`.

    Returns:
      int32 codes `[B, T, H]`; which one for a vector with NaN or inf is not said.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, a codebook with NaN or inf.
    """
    x = as_floats("x", x, 4)
    codebook = check_codebook("codebook", codebook, x, "x")
    asked = check_implementation(implementation)
    return traced(_nearest_codes)(lax.stop_gradient(x), lax.stop_gradient(codebook), asked)


@partial(jax.jit, static_argnums=2)
def _nearest_codes(x: Array, codebook: Array, implementation: str | None = None) -> Array:
    return run(implementation, "nearest_codes", _assign_all, x, codebook)


def _assign_all(x: Array, codebook: Array) -> Array:
    batch, length, n_head, width = x.shape
    chunk = chunk_len(x, length, 4 * batch * n_head * (codebook.shape[1] + width))

    def step(codes: Array, start: Array | int, size: int) -> Array:
        return write_chunk(codes, assign(read_chunk(x, start, size), codebook), start)

    return scan_chunks(step, jnp.zeros((batch, length, n_head), jnp.int32), length, chunk)


def assign(x: Array, codebook: Array) -> Array:
    """`nearest_codes` of one chunk, unchecked: `[B, T, H, D]` to int32 `[B, T, H]`."""
    acc = acc_dtype(x.dtype)
    codebook = codebook.astype(acc)
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "gpu":
        score = scores_by_terms(x, codebook)
    else:
        score = einsum("bthd,hcd->bthc", x.astype(acc), codebook)
    score = score - jnp.sum(codebook**2, axis=-1)[None, None] / 2
    return jnp.argmax(score, axis=-1).astype(jnp.int32)


def scores_by_terms(x: Array, codebook: Array) -> Array:
    """`x . codebook[c]` of bfloat16 x `[B, T, H, D]` and a float32 codebook `[H, C, D]`: `[B, T, H, C]`.

    By bfloat16 products, each of them exact: many times faster where matrix units multiply bfloat16 but not
    float32.
    """
    least, *rest = (einsum("bthd,hcd->bthc", x, term) for term in reversed(split(codebook)))
    return sum(rest, least)


def take_codes(codebook: Any, codes: Any) -> Array:
    """`codebook[h, codes[b, t, h]]`.

    Args:
      codebook: `[H, C, D]`.
      codes: integers `[B, T, H]` in [0, C).

    Returns:
      `[B, T, H, D]` in the dtype of the codebook. Under jit, where values cannot be checked, a
      code out of range gives NaN.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, a code out of range.
    """
    codebook, codes = as_floats("codebook", codebook, 3), as_integers("codes", codes, 3)
    n_head, n_code, _ = codebook.shape
    if codes.shape[2] != n_head:
        raise ValueError(
            f"codes must be [B, T, H] of codebook [H, C, D], found codes {codes.shape} "
            f"and codebook {codebook.shape}"
        )
    check_range("codes", codes, n_code)
    codes = jnp.where(codes < 0, n_code, codes)
    return codebook.at[jnp.arange(n_head)[None, None, :], codes].get(mode="fill", fill_value=jnp.nan)


def lookup(codebook: Array, codes: Array) -> Array:
    """`take_codes`, unchecked, for codes known to be in range."""
    return codebook[jnp.arange(codebook.shape[0])[None, None], codes]


def straight_through(x: Array, quantized: Array) -> Array:
    """`x + stop_gradient(quantized - x)`: the value of `quantized`, the gradient of `x`.

    Both `[B, T, H, D]` of one dtype.

    Raises:
      ValueError, TypeError: they differ in shape or dtype.
    """
    _check_pair(x, quantized)
    return x + lax.stop_gradient(quantized - x)


def commitment_loss(x: Array, quantized: Array, *, mask: Array | None = None) -> Array:
    """Mean over real vectors of `|x - stop_gradient(quantized)|^2`.

    Args:
      x, quantized: `[B, T, H, D]` of one dtype.
      mask: `[B, T]` boolean, True = a real token.

    Returns:
      A scalar in float32 (float64 for float64); 0 when no token is real.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    _check_pair(x, quantized)
    mask = check_mask(mask, x, "x")
    acc = acc_dtype(x.dtype)
    difference = x.astype(acc) - lax.stop_gradient(quantized).astype(acc)
    if mask is None:
        return jnp.mean(jnp.sum(difference**2, axis=-1))
    real = mask[:, :, None]
    square = jnp.sum(jnp.where(real[..., None], difference, 0) ** 2, axis=-1)
    return jnp.sum(square) / jnp.maximum(jnp.sum(mask, dtype=acc) * x.shape[2], 1)


def _check_pair(x: Array, quantized: Array) -> None:
    x, quantized = as_floats("x", x, 4), as_floats("quantized", quantized, 4)
    if x.shape != quantized.shape:
        raise ValueError(f"quantized must have the shape of x, found {quantized.shape} and {x.shape}")
    if x.dtype != quantized.dtype:
        raise TypeError(f"quantized must have the dtype of x, found {quantized.dtype} and {x.dtype}")


class CodebookState(NamedTuple):
    """Moving averages of a codebook: `codebook = sum / max(count, EPS)`."""

    count: Array  # type: ignore[assignment]  # [H, C] float32
    sum: Array  # [H, C, D] float32


EPS = 1e-6
MAX_TERMS = 2**14  # of one matrix product; from 2**15 on it is wrong on some Apple GPUs


def codebook_of(state: CodebookState) -> Array:
    """The codebook `[H, C, D]` of a state."""
    return state.sum / jnp.maximum(state.count, EPS)[..., None]


def code_statistics(x: Array, codes: Array, n_code: int, *, mask: Array | None = None) -> CodebookState:
    """Counts and sums of the real vectors of every code, of one batch.

    One-hot products in chunks of time, accumulated in float32 (float64 for float64).
    Args as in `ema_update`.
    """
    batch, length, n_head, width = x.shape
    acc = acc_dtype(x.dtype)
    chunk = min(chunk_len(x, length, 4 * batch * n_head * (n_code + width)), MAX_TERMS)

    def step(state: CodebookState, start: Array | int, size: int) -> CodebookState:
        chosen = is_code(read_chunk(codes, start, size), n_code)
        vectors = read_chunk(x, start, size).astype(acc)
        if mask is not None:
            real = read_chunk(mask, start, size)[:, :, None, None]
            chosen, vectors = chosen & real, jnp.where(real, vectors, 0)
        total = jnp.sum(einsum("bthc,bthd->bhcd", chosen.astype(acc), vectors), axis=0)
        return CodebookState(state.count + jnp.sum(chosen, (0, 1), dtype=acc), state.sum + total)

    zero = CodebookState(jnp.zeros((n_head, n_code), acc), jnp.zeros((n_head, n_code, width), acc))
    return scan_chunks(step, zero, length, chunk)


def ema_update(
    state: CodebookState,
    x: Any,
    codes: Any,
    draws: Any,
    *,
    decay: float = 0.99,
    threshold: float = 0.1,
    mask: Any = None,
) -> CodebookState:
    """One step of codebook learning by exponential moving averages, dead codes replaced.

    `count <- decay * count + (1 - decay) * n`, `sum <- decay * sum + (1 - decay) * m` with the
    counts n and sums m of this batch. A code whose count is then under `threshold` is dead:
    it becomes a random real vector of the batch, with count 1. A batch without a real token
    changes nothing, nor does a vector with NaN or inf. Source: van den Oord et al. 2017,
    appendix A.1; `math.md` 1.

    Args:
      state: `count [H, C]`, `sum [H, C, D]`.
      x: vectors `[B, T, H, D]`.
      codes: integers `[B, T, H]` in [0, C).
      draws: uniform numbers in [0, 1), `[H, C]`: which vector replaces a dead code.
      decay: in [0, 1].
      threshold: count under which a code is dead; 0 turns replacement off.
      mask: `[B, T]` boolean, True = a real token.

    Returns:
      The new state; no gradient flows through it.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, a code out of range.
    """
    x, codes, draws = as_floats("x", x, 4), as_integers("codes", codes, 3), as_floats("draws", draws, 2)
    mask = check_mask(mask, x, "x")
    count, total = as_floats("state.count", state.count, 2), as_floats("state.sum", state.sum, 3)
    n_head, n_code = count.shape
    if total.shape != (n_head, n_code, x.shape[3]) or x.shape[2] != n_head:
        raise ValueError(f"state must be [H, C], [H, C, D] of x, found sum {total.shape} and x {x.shape}")
    if codes.shape != x.shape[:3]:
        raise ValueError(f"codes must be [B, T, H] of x, found codes {codes.shape} and x {x.shape}")
    if draws.shape != count.shape:
        raise ValueError(f"draws must be [H, C], found draws {draws.shape} and count {count.shape}")
    if total.dtype != count.dtype:
        raise TypeError(
            f"state.sum must have the dtype of state.count, found {total.dtype} and {count.dtype}"
        )
    decay, threshold = check_between("decay", decay, 0, 1), check_between("threshold", threshold, 0)
    check_range("codes", codes, n_code)
    return _ema_update(state, lax.stop_gradient(x), codes, draws, decay, threshold, mask)


@jax.jit
def _ema_update(
    state: CodebookState,
    x: Array,
    codes: Array,
    draws: Array,
    decay: Array,
    threshold: Array,
    mask: Array | None,
) -> CodebookState:
    acc = state.count.dtype
    decay = jnp.asarray(decay, acc)
    mask = usable_tokens(x, mask)
    batch = code_statistics(x, codes, state.count.shape[1], mask=mask)
    new = jax.tree.map(lambda old, now: decay * old + (1 - decay) * now.astype(acc), state, batch)
    dead = new.count < jnp.asarray(threshold, acc)
    drawn = draw_vectors(x, draws, mask).astype(acc)
    new = CodebookState(jnp.where(dead, 1, new.count), jnp.where(dead[..., None], drawn, new.sum))
    return jax.tree.map(partial(jnp.where, jnp.any(mask)), new, state)


def usable_tokens(x: Array, mask: Array | None) -> Array:
    """Real tokens whose vectors are finite, `[B, T]`: one NaN would spoil every code of its head."""
    finite = jnp.all(jnp.isfinite(x), axis=(2, 3))
    return finite if mask is None else finite & mask


def draw_vectors(x: Array, draws: Array, mask: Array) -> Array:
    """The real vectors at the positions `floor(draws * n_real)` of the batch, head by head.

    `x [B, T, H, D]`, `draws [H, C]` in [0, 1), `mask [B, T]`; returns `[H, C, D]`.
    """
    batch, length, n_head, width = x.shape
    n_token = batch * length
    n_real = jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1)
    order = jnp.argsort(~mask.reshape(n_token), stable=True)
    rank = jnp.minimum((draws * jnp.asarray(n_real, draws.dtype)).astype(jnp.int32), n_real - 1)
    return x.reshape(n_token, n_head, width)[order[rank], jnp.arange(n_head)[:, None]]


def kmeans(x: Any, draws: Any, *, n_iter: int = 10, mask: Any = None) -> CodebookState:
    """A codebook fitted to the real vectors of a batch by Lloyd's algorithm, head by head.

    Args:
      x: vectors `[B, T, H, D]`.
      draws: uniform numbers in [0, 1), `[H, C]`: which vectors the codes start from.
      n_iter: Lloyd iterations; 0 keeps the drawn vectors.
      mask: `[B, T]` boolean, True = a real token.

    Returns:
      The state whose codebook has the cluster means. A code that ends without a vector keeps
      its place, with count 1.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    x, draws = as_floats("x", x, 4), as_floats("draws", draws, 2)
    n_iter = check_at_least("n_iter", n_iter, 0)
    mask = check_mask(mask, x, "x")
    if draws.shape[0] != x.shape[2]:
        raise ValueError(f"draws must be [H, C] of x [B, T, H, D], found draws {draws.shape} and x {x.shape}")
    return _kmeans(lax.stop_gradient(x), draws, n_iter, mask)


@partial(jax.jit, static_argnums=2)
def _kmeans(x: Array, draws: Array, n_iter: int, mask: Array | None) -> CodebookState:
    acc = acc_dtype(x.dtype)
    mask = usable_tokens(x, mask)
    x = jnp.where(mask[:, :, None, None], x, 0)
    start = draw_vectors(x, draws, mask).astype(acc)

    def iterate(state: CodebookState, _: None) -> tuple[CodebookState, None]:
        codebook = codebook_of(state)
        found = code_statistics(x, _nearest_codes(x, codebook), draws.shape[1], mask=mask)
        empty = found.count == 0
        count = jnp.where(empty, 1, found.count)
        return CodebookState(count, jnp.where(empty[..., None], codebook, found.sum)), None

    state, _ = lax.scan(iterate, CodebookState(jnp.ones(draws.shape, acc), start), length=n_iter)
    return state
