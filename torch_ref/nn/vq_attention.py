"""VQ-attention modules: keys quantized (`VQAttention`), queries too (`VQAttentionQK`)."""

from typing import NamedTuple

from torch import Tensor

from torch_ref.nn.attention import GatedAttention
from torch_ref.nn.quantizer import LearnableVQ, QuantizerMetrics
from torch_ref.ops.vq_attention import vq_attention
from vq_common import TransformerConfig


class VQMetrics(NamedTuple):
    """What a VQ-attention module reports of one batch."""

    loss: Tensor  # scalar, c_beta * commitment losses: add it to the training loss
    q: QuantizerMetrics | None  # None where queries are not quantized
    k: QuantizerMetrics


class VQAttention(GatedAttention):
    """Attention to quantized keys in linear time: `softmax(q k^T) v` (`math.md` 2, keys only).

    Args:
      config: see `TransformerConfig`.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.quantizer_k = LearnableVQ(config, n_code=config.n_code_k)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_metrics: bool = False
    ) -> Tensor | tuple[Tensor, VQMetrics]:
        """Map `x [B, T, d_model]` to `[B, T, d_model]`; in train mode the codebooks learn.

        Args:
          x: floats `[B, T, d_model]`.
          mask: `[B, T]` boolean, True = a real token.
          return_metrics: also return `VQMetrics`, whose loss belongs into the training loss.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        q, k, v, gate = self.project(x)
        codebook_q, loss_q, metrics_q = self._codebook_q(q, mask, return_metrics)
        codebook_k, loss_k, metrics_k = codebook(self.quantizer_k, k, mask, return_metrics)
        config = self.config
        out = vq_attention(
            q,
            k,
            v,
            codebook_q,
            codebook_k,
            is_causal=config.is_causal,
            scale=1.0,
            mask=mask,
            block_len=config.block_len,
        )
        y = self.combine(out, gate)
        if not return_metrics:
            return y
        return y, VQMetrics(config.c_beta * (loss_q + loss_k), metrics_q, metrics_k)

    def _codebook_q(
        self, q: Tensor, mask: Tensor | None, with_metrics: bool
    ) -> tuple[Tensor | None, Tensor | float, QuantizerMetrics | None]:
        return None, 0.0, None


class VQAttentionQK(VQAttention):
    """Attention between quantized queries and keys in linear time: `softmax(q^ k^T) v` (`math.md` 2).

    Args:
      config: see `TransformerConfig`.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.quantizer_q = LearnableVQ(config, n_code=config.n_code_q)

    def _codebook_q(
        self, q: Tensor, mask: Tensor | None, with_metrics: bool
    ) -> tuple[Tensor | None, Tensor | float, QuantizerMetrics | None]:
        return codebook(self.quantizer_q, q, mask, with_metrics)


def codebook(
    quantizer: LearnableVQ, x: Tensor, mask: Tensor | None, with_metrics: bool
) -> tuple[Tensor, Tensor | float, QuantizerMetrics | None]:
    """The codebook to attend with, its commitment loss and metrics.

    Only training and metrics need the codes here: attention finds its own.
    """
    if not quantizer.training and not with_metrics:
        return quantizer.codebook, 0.0, None
    found = quantizer(x, mask=mask)
    return found.codebook, found.loss, found.metrics
