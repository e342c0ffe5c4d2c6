"""HyperAttention as a module: it draws the directions once and the samples at every call."""

import torch
from torch import Tensor

from torch_ref.nn.attention import GatedAttention
from torch_ref.ops.checks import check_at_least
from torch_ref.ops.hyper_attention import hyper_attention, sample_set_sizes
from torch_ref.ops.numerics import acc_dtype
from vq_common import TransformerConfig


class HyperAttention(GatedAttention):
    """Attention inside blocks of a hash order plus sampled keys (`math.md` 4).

    Args:
      config: see `TransformerConfig`.
      block_size, n_projection, n_sample, min_seq_len: as in `hyper_attention`.
    """

    directions: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        *,
        block_size: int = 256,
        n_projection: int = 7,
        n_sample: int = 256,
        min_seq_len: int = 4096,
    ):
        super().__init__(config)
        self.block_size = check_at_least("block_size", block_size, 1)
        self.n_sample = check_at_least("n_sample", n_sample, 0)
        self.min_seq_len = check_at_least("min_seq_len", min_seq_len, 1)
        n_projection = check_at_least("n_projection", n_projection, 1)
        acc = acc_dtype(getattr(torch, config.dtype))
        shape = config.n_head, n_projection, config.d_k
        self.register_buffer("directions", torch.randn(shape, dtype=acc))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, sample_ids: Tensor | None = None) -> Tensor:
        """Map `x [B, T, d_model]` to `[B, T, d_model]`.

        Args:
          x: floats `[B, T, d_model]`.
          mask: `[B, T]` boolean, True = a real token.
          sample_ids: which keys are sampled, see `hyper_attention`; drawn when None.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        q, k, v, gate = self.project(x, mask)
        if sample_ids is None:
            sample_ids = self.draw_samples(x.shape[0], x.shape[1])
        out = hyper_attention(
            q,
            k,
            v,
            self.directions,
            sample_ids,
            is_causal=self.config.is_causal,
            scale=1.0,
            mask=mask,
            block_size=self.block_size,
            min_seq_len=self.min_seq_len,
        )
        return self.combine(out, gate)

    def draw_samples(self, batch: int, length: int) -> Tensor:
        """Uniform `sample_ids`, int32 `[B, R, N, H]`, for sequences of `length`."""
        sizes = sample_set_sizes(length, self.config.is_causal, self.min_seq_len)
        shape = batch, len(sizes), self.n_sample, self.config.n_head
        device = self.directions.device
        share = torch.rand(shape, device=device)
        size = torch.tensor(sizes, dtype=torch.int32, device=device)[None, :, None, None]
        return torch.minimum((share * size).to(torch.int32), size - 1)
