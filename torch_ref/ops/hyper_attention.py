"""HyperAttention: exact attention inside blocks of a hash order, sampled outside (`math.md` 4).

Queries and keys are sorted by `angular_hash` and both orders are cut into the same number of
equal blocks. With S keys and N samples, query i counts a real key j of its own block once and,
for every sample that falls on a real key j outside it, that key S / N times:

    o_i = sum_j w_ij exp(scale q_i . k_j) v_j / sum_j w_ij exp(scale q_i . k_j)

In expectation over uniform samples the sum below the line is that of exact attention.

Causal, the sequence is halved `depth` times. At every level the queries of each right half
attend to the keys of the left half as above, all pieces of the level in one call; the pieces
that remain attend exactly. Heads fold into the batch: inside, arrays are `[M, T, D]`, with one
row of M per sequence, head and piece.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_ref.ops.attention import dot_product_attention, masked_softmax, merge_attention
from torch_ref.ops.checks import (
    as_integers,
    check_at_least,
    check_device,
    check_mask,
    check_qkv,
    check_range,
    check_scale,
    shape,
)
from torch_ref.ops.lsh import MAX_PROJECTIONS, angular_hash, check_directions
from torch_ref.ops.numerics import acc_dtype, einsum

SCORE_BYTES = 16 * 2**20
LAST_BIN = 2**MAX_PROJECTIONS


def hyper_attention(
    q: Any,
    k: Any,
    v: Any,
    directions: Any,
    sample_ids: Any,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
    block_size: int = 256,
    min_seq_len: int = 4096,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """HyperAttention (Han et al. 2023, arXiv:2310.05869) for given directions and samples.

    Time and memory are linear in the length (`T log T` when causal), also for the gradients in
    q, k and v; the hash has none.

    Causal, no key and no value of a later token enters an output: a change of `k[t]` or `v[t]`
    leaves all outputs before t as they are, exactly. A change of `q[t]` does too, as long as
    its bin stays; when the bin changes, the queries of the same right half are cut into other
    blocks, so an earlier query of that half may attend to other keys, all of them earlier still.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, S, H, D]`, `[B, S, H, V]`, of the dtype of q.
      directions: hash directions `[H, P, D]`, P in 1..30, of the dtype of q or float32.
      sample_ids: integers `[B, R, N, H]`: N keys drawn for each of the R sub-problems of
        `sample_set_sizes`, as positions in the sorted order of its keys, padded keys last. N may be 0.
      is_causal: query i sees keys j <= i; needs T = S.
      scale: factor on the scores, default `D ** -0.5`.
      mask: `[B, S]` boolean, True = a real key.
      block_size: largest number of keys in a block; at least S (not causal) makes it exact.
      min_seq_len: causal pieces of at most this length are exact.
      return_lse: also return the log-sum-exp of the scores, `log sum_j w_ij exp(score_ij)`.

    Returns:
      out `[B, T, H, V]` in the dtype of v, 0 for a query that sees no key; with `return_lse`
      also lse `[B, T, H]` in float32 (float64 for float64), -inf for such a query.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, a sample out of range.
    """
    q, k, v = check_qkv(q, k, v, is_causal)
    directions = check_directions(directions, q, "q")
    mask = check_mask(mask, k, "k")
    block_size = check_at_least("block_size", block_size, 1)
    sizes = sample_set_sizes(k.shape[1], is_causal, min_seq_len)
    sample_ids = _check_sample_ids(sample_ids, k, sizes)
    scale = check_scale(scale, q.shape[-1])
    out, lse = _hyper_attention(
        q, k, v, directions, sample_ids, mask, is_causal, scale, block_size, int(min_seq_len)
    )
    return (out, lse) if return_lse else out


def n_sample_sets(length: int, is_causal: bool, min_seq_len: int) -> int:
    """R of `sample_ids`: 1 when not causal, else `2**depth - 1`, so 0 when nothing is halved.

    `length` is S; depth is the fewest halvings that leave pieces of at most `min_seq_len`.
    """
    return len(sample_set_sizes(length, is_causal, min_seq_len))


def sample_set_sizes(length: int, is_causal: bool, min_seq_len: int) -> tuple[int, ...]:
    """The number of keys of every sub-problem: sample r is a position in `[0, sizes[r])`.

    When causal the order is level by level, left to right.

    Raises:
      ValueError, TypeError: length or min_seq_len is not an int of at least 1.
    """
    length = check_at_least("length", length, 1)
    min_seq_len = check_at_least("min_seq_len", min_seq_len, 1)
    if not is_causal:
        return (length,)
    depth, leaf = _halvings(length, min_seq_len)
    return tuple(leaf * 2 ** (depth - level - 1) for level in range(depth) for _ in range(2**level))


def _halvings(length: int, min_seq_len: int) -> tuple[int, int]:
    """Depth of the halving and length of the pieces it leaves; they cover at least `length`."""
    depth = 0
    while -(-length // 2**depth) > min_seq_len:
        depth += 1
    return depth, -(-length // 2**depth)


def _check_sample_ids(sample_ids: Any, k: Tensor, sizes: tuple[int, ...]) -> Tensor:
    sample_ids = as_integers("sample_ids", sample_ids, 4)
    batch, n_set, _, n_head = sample_ids.shape
    if (batch, n_set, n_head) != (k.shape[0], len(sizes), k.shape[2]):
        raise ValueError(
            f"sample_ids must be [B, R, N, H] of k [B, S, H, D] with R = {len(sizes)}, "
            f"found sample_ids {shape(sample_ids)} and k {shape(k)}"
        )
    check_device("sample_ids", sample_ids, k, "k")
    for size in sorted(set(sizes)):
        first, count = sizes.index(size), sizes.count(size)
        check_range("sample_ids", sample_ids[:, first : first + count], size)
    return sample_ids


def _hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    sample_ids: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    block_size: int,
    min_seq_len: int,
) -> tuple[Tensor, Tensor]:
    batch, length, n_head, _ = q.shape
    if mask is not None:
        k, v = torch.where(mask[:, :, None, None], k, 0), torch.where(mask[:, :, None, None], v, 0)
    bins_q, bins_k = angular_hash(q, directions), angular_hash(k, directions)
    if mask is not None:
        bins_k = torch.where(mask[:, :, None], bins_k, LAST_BIN)
    q, bins_q, keys = _fold(q), _fold(bins_q), Keys(_fold(k), _fold(v), _fold(bins_k))
    ids = _fold(torch.movedim(sample_ids.to(torch.int32), 3, 2))
    if is_causal:
        out, lse = _causal_attention(q, bins_q, keys, ids, scale, block_size, min_seq_len)
    else:
        out, lse = _unmasked_attention(q, bins_q, keys, ids[:, 0], scale, block_size)
    out = torch.movedim(out.reshape(batch, n_head, length, v.shape[-1]), 1, 2)
    return out.to(v.dtype), torch.movedim(lse.reshape(batch, n_head, length), 1, 2)


def _fold(x: Tensor) -> Tensor:
    """`[B, T, H, ...]` to `[B * H, T, ...]`."""
    x = torch.movedim(x, 2, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


class Keys(NamedTuple):
    """Keys and values, 0 where padded, and their bins, `LAST_BIN` where padded."""

    k: Tensor  # [M, S, D]
    v: Tensor  # [M, S, V]
    bins: Tensor  # [M, S] int32


def _causal_attention(
    q: Tensor, bins_q: Tensor, keys: Keys, ids: Tensor, scale: float, block_size: int, min_seq_len: int
) -> tuple[Tensor, Tensor]:
    """Causal form: `q [M, T, D]`, `ids [M, R, N]` to out `[M, T, V]` (accumulator type), lse `[M, T]`."""
    n_row, length, _ = q.shape
    depth, leaf = _halvings(length, min_seq_len)
    total = leaf * 2**depth
    q, bins_q = _pad(q, total), _pad(bins_q, total, LAST_BIN)
    keys = Keys(_pad(keys.k, total), _pad(keys.v, total), _pad(keys.bins, total, LAST_BIN))
    out, lse = _exact_pieces(_cut(q, 2**depth), Keys(*(_cut(x, 2**depth) for x in keys)), scale)
    for level in range(depth):
        n_piece = 2**level
        left = Keys(*(_cut(x, 2 * n_piece)[0::2] for x in keys))
        right_q, right_bins = (_cut(x, 2 * n_piece)[1::2] for x in (q, bins_q))
        drawn = ids[:, n_piece - 1 : 2 * n_piece - 1].reshape(n_row * n_piece, ids.shape[2])
        past_out, past_lse = _unmasked_attention(right_q, right_bins, left, drawn, scale, block_size)
        out, lse = _merge_right(out, lse, past_out.to(lse.dtype), past_lse)
    return out.reshape(n_row, total, -1)[:, :length], lse.reshape(n_row, total)[:, :length]


def _merge_right(out: Tensor, lse: Tensor, past_out: Tensor, past_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces with `past_out [M, T / 2, V]`, `past_lse [M, T / 2]` merged into their right halves."""
    out, lse = out.reshape(-1, 2, *past_out.shape[1:]), lse.reshape(-1, 2, *past_lse.shape[1:])
    right_out, right_lse = merge_attention(
        out[:, 1, :, None], lse[:, 1, :, None], past_out[:, :, None], past_lse[:, :, None]
    )
    return torch.stack([out[:, 0], right_out[:, :, 0]], 1), torch.stack([lse[:, 0], right_lse[:, :, 0]], 1)


def _exact_pieces(q: Tensor, keys: Keys, scale: float) -> tuple[Tensor, Tensor]:
    """Exact causal attention of every piece to itself, in the accumulator type."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, real = q[:, :, None], k[:, :, None], v[:, :, None], bins < LAST_BIN
        out, lse = dot_product_attention(q, k, v, is_causal=True, scale=scale, mask=real, return_lse=True)
        return out[:, :, 0].to(lse.dtype), lse[:, :, 0]

    length = q.shape[1]
    pieces = chunk_sizes(len(q), 1, length, length, acc_dtype(q.dtype).itemsize).pieces
    return map_chunks(attend, (q, *keys), 0, pieces)


def _unmasked_attention(
    q: Tensor, bins_q: Tensor, keys: Keys, ids: Tensor, scale: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """One sub-problem per row: `q [M, T, D]`, `ids [M, N]` to out `[M, T, V]`, lse `[M, T]`."""
    n_row, k_len = keys.bins.shape
    n_block = -(-k_len // block_size)
    order_q, order_k = _argsort(bins_q), _argsort(keys.bins)
    keys = Keys(*(_take(x, order_k) for x in keys))
    far = Keys(*(_take(x, ids) for x in keys))
    q, k, v = (_blocks(x, n_block) for x in (_take(q, order_q), keys.k, keys.v))
    bins = _blocks(keys.bins, n_block, LAST_BIN)
    block = torch.arange(n_block, dtype=ids.dtype, device=ids.device)[None, :, None]
    is_outside = (ids // k.shape[2])[:, None] != block
    seen = torch.cat([bins < LAST_BIN, is_outside & (far.bins < LAST_BIN)[:, None]], 2)
    weight = math.log(k_len / max(ids.shape[1], 1))
    out, lse = _block_attention(q, k, v, seen, far.k, far.v, scale, weight)
    unsort = _argsort(order_q)
    return _take(out.reshape(n_row, -1, v.shape[-1]), unsort), _take(lse.reshape(n_row, -1), unsort)


def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, far_k: Tensor, far_v: Tensor, scale: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys of the own block and the samples of the row, chunk by chunk.

    `q [M, G, Lq, D]`, `k [M, G, Lk, D]`, `v [M, G, Lk, V]`, samples `[M, N, D]` and `[M, N, V]`,
    `seen [M, G, Lk + N]`; `weight` is added to the scores of samples.
    """
    n_row, n_block, rows, _ = q.shape
    block_len, n_sample = k.shape[2], far_k.shape[1]
    acc = acc_dtype(q.dtype)
    sizes = chunk_sizes(n_row, n_block, rows, block_len + n_sample, acc.itemsize)
    bias = torch.cat([q.new_zeros(block_len, dtype=acc), q.new_full((n_sample,), weight, dtype=acc)])

    def attend_pieces(
        q: Tensor, k: Tensor, v: Tensor, seen: Tensor, far_k: Tensor, far_v: Tensor
    ) -> tuple[Tensor, Tensor]:
        def attend_blocks(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
            k, v = _append(k, far_k), _append(v, far_v)

            def attend_rows(q: Tensor) -> tuple[Tensor, Tensor]:
                score = einsum("mgqd,mgkd->mgqk", q, k) * scale
                p, lse = masked_softmax(score + bias[None, None, None], seen[:, :, None])
                return einsum("mgqk,mgkv->mgqv", p, v.to(p.dtype)).to(v.dtype), lse

            return map_chunks(attend_rows, (q,), 2, sizes.rows)

        return map_chunks(attend_blocks, (q, k, v, seen), 1, sizes.blocks)

    return map_chunks(attend_pieces, (q, k, v, seen, far_k, far_v), 0, sizes.pieces)


class ChunkSizes(NamedTuple):
    """How much is attended at once."""

    pieces: int
    blocks: int
    rows: int


def chunk_sizes(pieces: int, blocks: int, rows: int, keys: int, itemsize: int) -> ChunkSizes:
    """The most whole pieces, else blocks of a piece, else rows of a block in `SCORE_BYTES` of scores."""
    budget = max(SCORE_BYTES // (itemsize * keys), 1)
    return ChunkSizes(
        pieces=min(max(budget // (blocks * rows), 1), pieces),
        blocks=min(max(budget // rows, 1), blocks),
        rows=min(budget, rows),
    )


def map_chunks(
    attend: Callable[..., tuple[Tensor, Tensor]], arrays: tuple[Tensor, ...], axis: int, size: int
) -> tuple[Tensor, Tensor]:
    """`attend(*arrays)` by chunks of at most `size` along `axis`; the backward pass recomputes them."""
    length = arrays[0].shape[axis]
    n_chunk = -(-length // size)
    if n_chunk == 1:
        return attend(*arrays)
    size = -(-length // n_chunk)
    parts = [
        checkpoint(
            attend, *(x.narrow(axis, start, min(size, length - start)) for x in arrays), use_reentrant=False
        )
        for start in range(0, length, size)
    ]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, axis), torch.cat(lse, axis)


def _argsort(x: Tensor) -> Tensor:
    """Stable order of int32 `[M, T]` along axis 1."""
    return torch.argsort(x.contiguous(), dim=1, stable=True).to(torch.int32)


def _take(x: Tensor, ids: Tensor) -> Tensor:
    """Entries `ids [M, N]` along axis 1 of `[M, T]` or `[M, T, D]`."""
    ids = ids.to(torch.int64)
    return torch.take_along_dim(x, ids if x.ndim == 2 else ids[..., None], dim=1)


def _cut(x: Tensor, n_piece: int) -> Tensor:
    """`[M, T, ...]` to `[M * n_piece, T / n_piece, ...]`."""
    return x.reshape(x.shape[0] * n_piece, -1, *x.shape[2:])


def _blocks(x: Tensor, n_block: int, value: int = 0) -> Tensor:
    """`[M, T, ...]` to `[M, n_block, ceil(T / n_block), ...]`, filled up with `value`."""
    size = -(-x.shape[1] // n_block)
    return _pad(x, n_block * size, value).reshape(x.shape[0], n_block, size, *x.shape[2:])


def _append(x: Tensor, far: Tensor) -> Tensor:
    """The samples `[M, N, D]` of a piece after the keys of each of its blocks `[M, G, L, D]`."""
    far = far[:, None].expand(*x.shape[:2], *far.shape[1:])
    return torch.cat([x, far], 2)


def _pad(x: Tensor, length: int, value: int = 0, axis: int = 1) -> Tensor:
    """`x` filled up to `length` along `axis`."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    return torch.cat([x, x.new_full((*x.shape[:axis], missing, *x.shape[axis + 1 :]), value)], axis)
