"""`LearnableVQ`: a codebook that follows its inputs by moving averages (`math.md` 1)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_ref.ops.checks import as_floats, check_at_least, check_codebook, check_mask
from torch_ref.ops.numerics import acc_dtype
from torch_ref.ops.quantize import (
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


class QuantizerMetrics(NamedTuple):
    """How well a codebook serves one batch; scalars, means over heads."""

    usage: Tensor  # part of the codes that some vector of the batch took, in [0, 1]
    entropy: Tensor  # of the codes taken, in nats; log C when all are taken equally
    relative_error: Tensor  # rms(x - quantized) / rms(x)


class Quantized(NamedTuple):
    """What `LearnableVQ` returns."""

    codebook: Tensor  # [H, C, D], the one these codes refer to
    codes: Tensor  # [B, T, H] int32
    vectors: Tensor  # [B, T, H, D], straight-through
    loss: Tensor  # scalar, mean |x - quantized|^2, not yet weighted by c_beta
    metrics: QuantizerMetrics


class LearnableVQ(nn.Module):
    """Vector quantization with one learned codebook per head.

    In train mode (as after `module.train()`) a call fits the
    codebook to its first batch, by k-means or a draw of vectors, and from then on moves it by
    `ema_update` after use. In eval mode (`module.eval()`) nothing changes. Until fitted, the
    codes are random vectors of the length that queries and keys have.

    Args:
      config: sizes (n_head, d_k), c_gamma, c_dead, codebook_init.
      n_code: number of codes C, default `config.n_code`.
    """

    count: Tensor
    sum: Tensor
    is_fitted: Tensor

    def __init__(self, config: TransformerConfig, *, n_code: int | None = None):
        super().__init__()
        self.config = config
        n_code = check_at_least("n_code", config.n_code if n_code is None else n_code, 1)
        shape = config.n_head, n_code
        acc = acc_dtype(getattr(torch, config.dtype))
        first = torch.randn((*shape, config.d_k), dtype=acc) * config.d_k**-0.25
        self.register_buffer("count", torch.ones(shape, dtype=acc))
        self.register_buffer("sum", first)
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool))

    @property
    def codebook(self) -> Tensor:
        """The codebook `[H, C, D]`."""
        return codebook_of(self.state)

    @property
    def state(self) -> CodebookState:
        """The moving averages."""
        return CodebookState(self.count, self.sum)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize `x [B, T, H, D]`; `mask [B, T]` boolean, True = a real token.

        Raises:
          ValueError, TypeError: shapes or dtypes that do not fit.
        """
        x = as_floats("x", x, 4)
        mask = check_mask(mask, x, "x")
        if self.training:
            check_codebook("codebook", self.codebook, x, "x")
            self._fit_once(x, mask)
        state = self.state
        codebook = codebook_of(state)
        codes = nearest_codes(x, codebook)
        quantized = take_codes(codebook.to(x.dtype), codes)
        if self.training:
            draws = torch.rand_like(self.count)
            gamma, dead = self.config.c_gamma, self.config.c_dead
            self._store(ema_update(state, x, codes, draws, decay=gamma, threshold=dead, mask=mask))
        return Quantized(
            codebook=codebook,
            codes=codes,
            vectors=straight_through(x, quantized),
            loss=commitment_loss(x, quantized, mask=mask),
            metrics=quantizer_metrics(x, quantized, codes, codebook.shape[1], mask=mask),
        )

    def _fit_once(self, x: Tensor, mask: Tensor | None) -> None:
        if bool(self.is_fitted) or (mask is not None and not bool(mask.any())):
            return
        n_iter = 10 if self.config.codebook_init == "kmeans" else 0
        self._store(kmeans(x, torch.rand_like(self.count), n_iter=n_iter, mask=mask))
        self.is_fitted.fill_(True)

    def _store(self, state: CodebookState) -> None:
        # New tensors, not in place: the graph of this call may hold the old ones.
        self.count, self.sum = (a.to(self.count.dtype) for a in state)


def quantizer_metrics(
    x: Tensor, quantized: Tensor, codes: Tensor, n_code: int, *, mask: Tensor | None = None
) -> QuantizerMetrics:
    """Metrics of one batch: `x`, `quantized` `[B, T, H, D]`, `codes [B, T, H]`, `mask [B, T]`."""
    acc = acc_dtype(x.dtype)
    x, error = x.detach().to(acc), (x.to(acc) - quantized.to(acc)).detach()
    if mask is not None:
        x, error = (torch.where(mask[:, :, None, None], a, 0) for a in (x, error))
    count = code_statistics(x, codes, n_code, mask=mask).count
    p = count / count.sum(-1, keepdim=True).clamp(min=1)
    entropy = -torch.where(p > 0, p * torch.log(torch.where(p > 0, p, 1)), 0).sum(-1)
    size = (x**2).sum((0, 1, 3))
    relative = torch.sqrt((error**2).sum((0, 1, 3)) / torch.where(size > 0, size, 1))
    return QuantizerMetrics((count > 0).to(acc).mean(), entropy.mean(), relative.mean())
