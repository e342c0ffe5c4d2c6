"""VQ-attention modules: keys quantized (`VQAttention`), queries too (`VQAttentionQK`)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_ref.nn.attention import GatedAttention
from torch_ref.nn.quantizer import LearnableVQ, QuantizerMetrics
from torch_ref.ops.checks import as_floats, check_mask, check_segments
from torch_ref.ops.numerics import acc_dtype
from torch_ref.ops.rotary import rotary
from torch_ref.ops.vq_attention import vq_attention
from torch_ref.ops.vq_state import VQState, find_documents, init_state
from vq_common import TransformerConfig


class VQMetrics(NamedTuple):
    """What a VQ-attention module reports of one batch."""

    loss: Tensor  # scalar, c_beta * commitment losses: add it to the training loss
    q: QuantizerMetrics | None  # None where queries are not quantized
    k: QuantizerMetrics


class AttentionState(NamedTuple):
    """What a VQ-attention module remembers of earlier tokens; its size does not depend on their number."""

    attention: VQState
    tail: Tensor  # [B, conv_width - 1, channels], what the convolution of later tokens needs


class VQAttention(GatedAttention):
    """Attention to quantized keys in linear time: `softmax(q k^T) v` (`math.md` 2, keys only).

    With `mem_len` or `n_sink` in the configuration the last tokens and the first of a document
    are attended to exactly, with rotary positions, and `code_bias`, learned per head, is added to
    the scores of all others (`math.md` 3).

    Args:
      config: see `TransformerConfig`.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.quantizer_k = LearnableVQ(config, n_code=config.n_code_k)
        if config.has_exact_part:
            param_dtype = getattr(torch, config.param_dtype)
            self.code_bias = nn.Parameter(torch.full((config.n_head,), config.code_bias, dtype=param_dtype))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        state: AttentionState | None = None,
        return_state: bool = False,
        return_metrics: bool = False,
    ) -> Any:
        """Map `x [B, T, d_model]` to `[B, T, d_model]`; in train mode the codebooks learn.

        Args:
          x: floats `[B, T, d_model]`.
          mask: `[B, T]` boolean, True = a real token.
          segment_ids: `[B, T]` integers: a run of one id is a document.
          state: of earlier calls, see `init_state`.
          return_state: also return the state after x.
          return_metrics: also return `VQMetrics`, whose loss belongs into the training loss.

        Returns:
          The output, and after it the state and the metrics where they are asked for.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit, a state without `is_causal`.
        """
        config = self.config
        before = None if state is None else state.attention
        x = as_floats("x", x, 3)
        mask, segment_ids = check_mask(mask, x, "x"), check_segments(segment_ids, x, x)
        documents = find_documents(x, mask, segment_ids, before)
        (q, k, v, gate), tail = self.project_after(x, mask, documents, None if state is None else state.tail)
        codebook_q, loss_q, metrics_q = self._codebook_q(q, mask, return_metrics)
        codebook_k, loss_k, metrics_k = codebook(self.quantizer_k, k, mask, return_metrics)
        local: dict[str, Any] = {}
        if config.has_exact_part:
            position = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) - documents.start
            theta = config.rope_theta
            local = {
                "q_local": rotary(q, position, theta=theta),
                "k_local": rotary(k, position, theta=theta),
                "code_bias": self.code_bias.to(acc_dtype(q.dtype)),
                "mem_len": config.mem_len,
                "n_sink": config.n_sink,
            }
        found = vq_attention(
            q,
            k,
            v,
            codebook_q,
            codebook_k,
            is_causal=config.is_causal,
            scale=1.0,
            mask=mask,
            segment_ids=segment_ids,
            block_len=config.block_len,
            state=before,
            return_state=return_state,
            **local,
        )
        out, after = found if return_state else (found, None)
        results: list[Any] = [self.combine(out, gate)]
        if return_state:
            results.append(AttentionState(after, tail))
        if return_metrics:
            results.append(VQMetrics(config.c_beta * (loss_q + loss_k), metrics_q, metrics_k))
        return results[0] if len(results) == 1 else tuple(results)

    def init_state(self, batch: int) -> AttentionState:
        """The state of `batch` sequences before their first token.

        Raises:
          ValueError: the configuration is not causal.
        """
        config = self.config
        if not config.is_causal:
            raise ValueError("init_state needs is_causal = true in the configuration")
        state = init_state(
            batch,
            self.quantizer_k.codebook,
            config.d_v,
            dtype=self.dtype,
            block_len=config.block_len,
            mem_len=config.mem_len,
            n_sink=config.n_sink,
        )
        return AttentionState(state, self.no_tail(batch))

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """The next token: `x [B, 1, d_model]` to its output and the new state."""
        out, after = self(x, state=state, return_state=True)
        return out, after

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
