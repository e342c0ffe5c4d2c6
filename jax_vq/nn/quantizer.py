"""`LearnableVQ`: a codebook that follows its inputs by moving averages (`math.md` 1)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jax_vq.ops.checks import as_floats, check_at_least, check_codebook, check_mask, check_x64
from jax_vq.ops.numerics import acc_dtype
from jax_vq.ops.quantize import (
    CodebookState,
    code_statistics,
    codebook_of,
    commitment_loss,
    ema_update,
    kmeans,
    nearest_codes,
    straight_through,
    take_codes,
)
from vq_common import TransformerConfig


class EmaState(nnx.Variable):
    """State of a codebook: saved with the weights, without gradient, unknown to an optimizer."""


class QuantizerMetrics(NamedTuple):
    """How well a codebook serves one batch; scalars, means over heads."""

    usage: Array  # part of the codes that some vector of the batch took, in [0, 1]
    entropy: Array  # of the codes taken, in nats; log C when all are taken equally
    relative_error: Array  # rms(x - quantized) / rms(x)


class Quantized(NamedTuple):
    """What `LearnableVQ` returns."""

    codebook: Array  # [H, C, D], the one these codes refer to
    codes: Array  # [B, T, H] int32
    vectors: Array  # [B, T, H, D], straight-through
    loss: Array  # scalar, mean |x - quantized|^2, not yet weighted by c_beta
    metrics: QuantizerMetrics


class LearnableVQ(nnx.Module):
    """Vector quantization with one learned codebook per head.

    In train mode (`use_running_average` False, as after `module.train()`) a call fits the
    codebook to its first batch, by k-means or a draw of vectors, and from then on moves it by
    `ema_update` after use. In eval mode (`module.eval()`) nothing changes. Until fitted, the
    codes are random vectors of the length that queries and keys have.

    Args:
      config: sizes (n_head, d_k), c_gamma, c_dead, codebook_init.
      n_code: number of codes C, default `config.n_code`.
      rngs: streams `params` (first codes) and `codebook` (which vectors replace dead codes).

    Raises:
      ValueError: float64 is asked for and jax_enable_x64 is off.
    """

    def __init__(self, config: TransformerConfig, *, n_code: int | None = None, rngs: nnx.Rngs):
        check_x64(config.dtype)
        self.config = config
        self.use_running_average = False
        self.rngs = rngs["codebook"].fork()
        n_code = check_at_least("n_code", config.n_code if n_code is None else n_code, 1)
        shape = config.n_head, n_code
        acc = acc_dtype(jnp.dtype(config.dtype))
        # Drawn flat: on a CPU the same draw with three axes takes XLA ten times longer to compile.
        first = jax.random.normal(rngs.params(), (math.prod(shape) * config.d_k,), acc) * config.d_k**-0.25
        self.count = EmaState(jnp.ones(shape, acc))
        self.sum = EmaState(first.reshape(*shape, config.d_k))
        self.is_fitted = EmaState(jnp.zeros((), jnp.bool_))

    @property
    def codebook(self) -> Array:
        """The codebook `[H, C, D]`."""
        return codebook_of(self.state)

    @property
    def state(self) -> CodebookState:
        """The moving averages."""
        return CodebookState(self.count[...], self.sum[...])

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Class method used by `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Array, mask: Array | None = None) -> Quantized:
        """Quantize `x [B, T, H, D]`; `mask [B, T]` boolean, True = a real token.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        x = as_floats("x", x, 4)
        mask = check_mask(mask, x, "x")
        if not self.use_running_average:
            check_codebook("codebook", self.codebook, x, "x")
            self._fit_once(x, mask)
        state = self.state
        codebook = codebook_of(state)
        codes = nearest_codes(x, codebook)
        quantized = take_codes(codebook.astype(x.dtype), codes)
        if not self.use_running_average:
            draws = jax.random.uniform(self.rngs(), state.count.shape, state.count.dtype)
            gamma, dead = self.config.c_gamma, self.config.c_dead
            self._store(ema_update(state, x, codes, draws, decay=gamma, threshold=dead, mask=mask))
        return Quantized(
            codebook=codebook,
            codes=codes,
            vectors=straight_through(x, quantized),
            loss=commitment_loss(x, quantized, mask=mask),
            metrics=quantizer_metrics(x, quantized, codes, codebook.shape[1], mask=mask),
        )

    def _fit_once(self, x: Array, mask: Array | None) -> None:
        draws = jax.random.uniform(self.rngs(), self.count[...].shape, self.count[...].dtype)
        n_iter = 10 if self.config.codebook_init == "kmeans" else 0
        dtype = draws.dtype

        def fit() -> CodebookState:
            return jax.tree.map(lambda a: a.astype(dtype), kmeans(x, draws, n_iter=n_iter, mask=mask))

        any_real = jnp.ones((), jnp.bool_) if mask is None else jnp.any(mask)
        is_first = any_real & ~self.is_fitted[...]
        self._store(lax.cond(is_first, fit, lambda: self.state))
        self.is_fitted[...] = self.is_fitted[...] | any_real

    def _store(self, state: CodebookState) -> None:
        self.count[...], self.sum[...] = state


def quantizer_metrics(
    x: Array, quantized: Array, codes: Array, n_code: int, *, mask: Array | None = None
) -> QuantizerMetrics:
    """Metrics of one batch: `x`, `quantized` `[B, T, H, D]`, `codes [B, T, H]`, `mask [B, T]`."""
    acc = acc_dtype(x.dtype)
    x, error = lax.stop_gradient(x.astype(acc)), lax.stop_gradient(x.astype(acc) - quantized.astype(acc))
    if mask is not None:
        x, error = (jnp.where(mask[:, :, None, None], a, 0) for a in (x, error))
    count = code_statistics(x, codes, n_code, mask=mask).count
    p = count / jnp.maximum(jnp.sum(count, axis=-1, keepdims=True), 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    size = jnp.sum(x**2, axis=(0, 1, 3))
    relative = jnp.sqrt(jnp.sum(error**2, axis=(0, 1, 3)) / jnp.where(size > 0, size, 1))
    return QuantizerMetrics(jnp.mean(count > 0, dtype=acc), jnp.mean(entropy), jnp.mean(relative))
