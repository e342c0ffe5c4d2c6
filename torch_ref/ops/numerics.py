"""Accumulator types, chunking and containment of non-finite values."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Carry = TypeVar("Carry")

CHUNK_BYTES = 16 * 2**20  # of temporaries on a CPU: more falls out of its caches
GPU_FACTOR = 16  # a GPU needs more work at once


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of scores, statistics and accumulators: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def einsum(spec: str, x: Tensor, y: Tensor) -> Tensor:
    """`torch.einsum` of two tensors of one type, accumulated and returned in `acc_dtype`."""
    acc = acc_dtype(x.dtype)
    return torch.einsum(spec, x.to(acc), y.to(acc))


def is_code(codes: Tensor, n_code: int) -> Tensor:
    """One-hot codes as booleans: `[...]` to `[..., C]`, all False for a code out of range."""
    return codes[..., None] == torch.arange(n_code, dtype=codes.dtype, device=codes.device)


def chunk_len(like: Tensor, length: int, bytes_per_token: int, multiple: int = 1) -> int:
    """Tokens to work on at once: at most about `CHUNK_BYTES`, a power of two times `multiple`.

    So a length that is a power of two has no shorter chunk, which would be compiled apart.

    A GPU, which `like` lies on or not, gets `GPU_FACTOR` times as much.
    """
    budget = CHUNK_BYTES if like.device.type == "cpu" else CHUNK_BYTES * GPU_FACTOR
    n_part = max(budget // max(bytes_per_token, 1) // multiple, 1)
    return min(2 ** (n_part.bit_length() - 1), -(-length // multiple)) * multiple


def scan_chunks(
    step: Callable[[Carry, int, int], Carry],
    carry: Carry,
    length: int,
    chunk: int,
    *,
    is_reverse: bool = False,
) -> Carry:
    """Fold `step(carry, start, size)` over the chunks of `[0, length)`; only the last is shorter."""
    starts = range(0, length, chunk)
    for start in reversed(starts) if is_reverse else starts:
        carry = step(carry, start, min(chunk, length - start))
    return carry


def read_chunk(x: Tensor, start: int, size: int) -> Tensor:
    """`x[:, start : start + size]`."""
    return x[:, start : start + size]


def write_chunk(x: Tensor, chunk: Tensor, start: int) -> Tensor:
    """`x` with `chunk` at `x[:, start:]`, in place."""
    x[:, start : start + chunk.shape[1]] = chunk
    return x


def is_finite_row(x: Tensor) -> Tensor:
    """Whether a whole vector is finite: `[..., D]` to `[...]`."""
    return torch.isfinite(x).all(-1)


def poison_values(k: Tensor, v: Tensor) -> Tensor:
    """`v [..., V]` with NaN for every key of `k [..., D]` that is not finite.

    A code hides a NaN or inf of its key; its values carry it to the rows that attend to it.
    """
    return torch.where(is_finite_row(k)[..., None], v, torch.nan)


def contain_nonfinite(v: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Prepare values for a causal product over `axis`: zero times NaN is NaN, and would leak.

    Returns:
      v with 0 for every NaN or inf, and the first index along `axis` (kept, with size 1) of
      one: the product is NaN for the rows from there on.
    """
    bad = ~torch.isfinite(v)
    shape = [1] * v.ndim
    shape[axis] = v.shape[axis]
    index = torch.arange(v.shape[axis], dtype=torch.int32, device=v.device).reshape(shape)
    first = torch.where(bad, index, v.shape[axis]).amin(axis, keepdim=True)
    return torch.where(bad, 0, v), first
