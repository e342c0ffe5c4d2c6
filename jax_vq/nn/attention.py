"""The projections that all four mechanisms share, and exact multi-head attention."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from jax_vq.ops.attention import dot_product_attention
from jax_vq.ops.checks import as_floats, check_x64
from vq_common import TransformerConfig


class GatedAttention(nnx.Module):
    """Projections around an attention mechanism; subclasses say which.

    LayerNorm of the input, a projection to q and one to k, v and a gate; LayerNorm without gain
    on q and k, each times `d_k ** -0.25`, so that the scale of scores is 1; SiLU on v and gate;
    output `res_proj(attention * gate)`, then dropout. Source: Transformer-VQ (Lingle 2023,
    arXiv:2309.16354), section 3.

    Args:
      config: sizes, dtypes, p_dropres, is_causal.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: float64 is asked for and jax_enable_x64 is off.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        check_x64(config.dtype, config.param_dtype)
        self.config = config
        dtypes = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
        q_width, v_width = config.n_head * config.d_k, config.n_head * config.d_v

        def linear(n_in: int, n_out: int) -> nnx.Linear:
            init = nnx.initializers.normal(n_in**-0.5)
            return nnx.Linear(n_in, n_out, use_bias=False, kernel_init=init, rngs=rngs, **dtypes)

        def norm(width: int, has_gain: bool) -> nnx.LayerNorm:
            gain = {"use_scale": has_gain, "use_bias": has_gain}
            return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs, **gain, **dtypes)

        self.input_ln = norm(config.d_model, has_gain=True)
        self.q_proj = linear(config.d_model, q_width)
        self.kvg_proj = linear(config.d_model, q_width + 2 * v_width)
        self.qk_ln = norm(config.d_k, has_gain=False)
        self.res_proj = linear(v_width, config.d_model)
        self.dropout = nnx.Dropout(config.p_dropres, deterministic=False, rngs=rngs)

    def project(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """`x [B, T, d_model]` to q, k `[B, T, H, d_k]` and v, gate `[B, T, H, d_v]`.

        Raises:
          ValueError, TypeError: x is not a float array of that shape.
        """
        x = as_floats("x", x, 3)
        config = self.config
        if x.shape[-1] != config.d_model:
            raise ValueError(f"x must be [B, T, d_model] with d_model = {config.d_model}, found {x.shape}")
        x = self.input_ln(x)
        q_width, v_width = config.n_head * config.d_k, config.n_head * config.d_v
        k, v, gate = jnp.split(self.kvg_proj(x), (q_width, q_width + v_width), axis=-1)
        q, k, v, gate = (
            rearrange(a, "b t (h d) -> b t h d", h=config.n_head) for a in (self.q_proj(x), k, v, gate)
        )
        q, k = (self.qk_ln(a) * jnp.asarray(config.d_k**-0.25, a.dtype) for a in (q, k))
        return q, k, jax.nn.silu(v), jax.nn.silu(gate)

    def combine(self, out: Array, gate: Array) -> Array:
        """The module's output `[B, T, d_model]` from attention and gate `[B, T, H, d_v]`."""
        return self.dropout(self.res_proj(rearrange(out * gate, "b t h v -> b t (h v)")))


class MultiHeadAttention(GatedAttention):
    """Exact softmax attention inside the shared projections; the baseline of the others."""

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Map `x [B, T, d_model]` to `[B, T, d_model]`; `mask [B, T]` boolean, True = a real token.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        q, k, v, gate = self.project(x)
        out = dot_product_attention(q, k, v, is_causal=self.config.is_causal, scale=1.0, mask=mask)
        return self.combine(out, gate)
