"""The projections that all four mechanisms share, and exact multi-head attention."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from jax_vq.ops.attention import dot_product_attention
from jax_vq.ops.checks import as_floats, check_mask, check_x64
from jax_vq.ops.rotary import causal_conv
from jax_vq.ops.vq_state import Documents, find_documents, last_tokens
from vq_common import TransformerConfig


class GatedAttention(nnx.Module):
    """Projections around an attention mechanism; subclasses say which.

    LayerNorm of the input, a projection to q and one to k, v and a gate; with `conv_width` a
    causal depthwise convolution of q, k and v, at first the identity; LayerNorm without gain
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
        if config.conv_width:
            own = jnp.zeros((config.conv_width, 2 * q_width + v_width), dtypes["param_dtype"])
            self.conv_weight = nnx.Param(own.at[0].set(1))
        self.dropout = nnx.Dropout(config.p_dropres, deterministic=False, rngs=rngs)

    def project(self, x: Array, mask: Array | None = None) -> tuple[Array, Array, Array, Array]:
        """`x [B, T, d_model]` to q, k `[B, T, H, d_k]` and v, gate `[B, T, H, d_v]`.

        Raises:
          ValueError, TypeError: x is not a float array of that shape.
        """
        return self.project_after(x, mask, None, None)[0]

    def project_after(
        self, x: Array, mask: Array | None, documents: Documents | None, before: Array | None
    ) -> tuple[tuple[Array, Array, Array, Array], Array]:
        """`project`, and what the convolution of later tokens needs: `[B, conv_width - 1, channels]`.

        Args:
          documents: of x; found from the mask when None.
          before: what this function returned for the tokens before x; None when there are none.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        x = as_floats("x", x, 3)
        mask = check_mask(mask, x, "x")
        config = self.config
        if x.shape[-1] != config.d_model:
            raise ValueError(f"x must be [B, T, d_model] with d_model = {config.d_model}, found {x.shape}")
        x = self.input_ln(x)
        q_width, v_width = config.n_head * config.d_k, config.n_head * config.d_v
        kv, gate = jnp.split(self.kvg_proj(x), (q_width + v_width,), axis=-1)
        qkv = jnp.concatenate([self.q_proj(x), kv], axis=-1)
        before = self.no_tail(x.shape[0]) if before is None else before
        if config.conv_width:
            qkv = qkv if mask is None else jnp.where(mask[..., None], qkv, 0)
            start = (documents or find_documents(x, mask, None, None)).start
            before, qkv = last_tokens(before, qkv), causal_conv(qkv, self.conv_weight[...], before, start)
        q, k, v, gate = (
            rearrange(a, "b t (h d) -> b t h d", h=config.n_head)
            for a in (*jnp.split(qkv, (q_width, 2 * q_width), axis=-1), gate)
        )
        q, k = (self.qk_ln(a) * jnp.asarray(config.d_k**-0.25, a.dtype) for a in (q, k))
        return (q, k, jax.nn.silu(v), jax.nn.silu(gate)), before

    def no_tail(self, batch: int) -> Array:
        """What the convolution sees before the first token: `[B, conv_width - 1, channels]`."""
        config = self.config
        channels = config.n_head * (2 * config.d_k + config.d_v)
        return jnp.zeros((batch, max(config.conv_width - 1, 0), channels), config.dtype)

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
        q, k, v, gate = self.project(x, mask)
        out = dot_product_attention(q, k, v, is_causal=self.config.is_causal, scale=1.0, mask=mask)
        return self.combine(out, gate)
