"""The projections that all four mechanisms share, and exact multi-head attention."""

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor, nn

from torch_ref.ops.attention import dot_product_attention
from torch_ref.ops.checks import as_floats, check_mask, shape
from torch_ref.ops.rotary import causal_conv
from torch_ref.ops.vq_state import Documents, find_documents, last_tokens
from vq_common import TransformerConfig


class GatedAttention(nn.Module):
    """Projections around an attention mechanism; subclasses say which.

    LayerNorm of the input, a projection to q and one to k, v and a gate; with `conv_width` a
    causal depthwise convolution of q, k and v, at first the identity; LayerNorm without gain
    on q and k, each times `d_k ** -0.25`, so that the scale of scores is 1; SiLU on v and gate;
    output `res_proj(attention * gate)`, then dropout. Source: Transformer-VQ (Lingle 2023,
    arXiv:2309.16354), section 3.

    Args:
      config: sizes, dtypes, p_dropres, is_causal.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        param_dtype = getattr(torch, config.param_dtype)
        q_width, v_width = config.n_head * config.d_k, config.n_head * config.d_v

        def linear(n_in: int, n_out: int) -> nn.Linear:
            layer = nn.Linear(n_in, n_out, bias=False, dtype=param_dtype)
            nn.init.normal_(layer.weight, std=n_in**-0.5)
            return layer

        self.input_ln = nn.LayerNorm(config.d_model, eps=1e-6, dtype=param_dtype)
        self.q_proj = linear(config.d_model, q_width)
        self.kvg_proj = linear(config.d_model, q_width + 2 * v_width)
        self.res_proj = linear(v_width, config.d_model)
        if config.conv_width:
            own = torch.zeros((config.conv_width, 2 * q_width + v_width), dtype=param_dtype)
            own[0] = 1
            self.conv_weight = nn.Parameter(own)
        self.dropout = nn.Dropout(config.p_dropres)

    def project(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`x [B, T, d_model]` to q, k `[B, T, H, d_k]` and v, gate `[B, T, H, d_v]`.

        Raises:
          ValueError, TypeError: x is not a float array of that shape.
        """
        return self.project_after(x, mask, None, None)[0]

    def project_after(
        self, x: Tensor, mask: Tensor | None, documents: Documents | None, before: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
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
            raise ValueError(f"x must be [B, T, d_model] with d_model = {config.d_model}, found {shape(x)}")
        x = self._norm(x.to(self.dtype), self.input_ln)
        q_width, v_width = config.n_head * config.d_k, config.n_head * config.d_v
        kv, gate = self._linear(x, self.kvg_proj).split((q_width + v_width, v_width), dim=-1)
        qkv = torch.cat([self._linear(x, self.q_proj), kv], dim=-1)
        before = self.no_tail(x.shape[0]) if before is None else before
        if config.conv_width:
            qkv = qkv if mask is None else torch.where(mask[..., None], qkv, 0)
            start = (documents or find_documents(x, mask, None, None)).start
            before, qkv = last_tokens(before, qkv), causal_conv(qkv, self.conv_weight, before, start)
        q, k, v, gate = (
            rearrange(a, "b t (h d) -> b t h d", h=config.n_head)
            for a in (*qkv.split((q_width, q_width, v_width), dim=-1), gate)
        )
        q, k = (F.layer_norm(a, (config.d_k,), eps=1e-6) * config.d_k**-0.25 for a in (q, k))
        return (q, k, F.silu(v), F.silu(gate)), before

    def no_tail(self, batch: int) -> Tensor:
        """What the convolution sees before the first token: `[B, conv_width - 1, channels]`."""
        config = self.config
        channels = config.n_head * (2 * config.d_k + config.d_v)
        shape = batch, max(config.conv_width - 1, 0), channels
        return self.q_proj.weight.new_zeros(shape, dtype=self.dtype)

    def combine(self, out: Tensor, gate: Tensor) -> Tensor:
        """The module's output `[B, T, d_model]` from attention and gate `[B, T, H, d_v]`."""
        return self.dropout(self._linear(rearrange(out * gate, "b t h v -> b t (h v)"), self.res_proj))

    def _linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight.to(self.dtype))

    def _norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        weight, bias = layer.weight.to(self.dtype), layer.bias.to(self.dtype)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


class MultiHeadAttention(GatedAttention):
    """Exact softmax attention inside the shared projections; the baseline of the others."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `x [B, T, d_model]` to `[B, T, d_model]`; `mask [B, T]` boolean, True = a real token.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        q, k, v, gate = self.project(x, mask)
        out = dot_product_attention(q, k, v, is_causal=self.config.is_causal, scale=1.0, mask=mask)
        return self.combine(out, gate)
