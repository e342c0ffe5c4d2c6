"""Attention over codes: softmax attention to quantized keys in linear time (`math.md` 2).

With `q^`, `k^` the nearest codes, `o = softmax(scale q^ k^T + mask) v` needs only, per key
code s, the number `n_s` of keys that a query sees and the mean `u_s` of their values:

    o_i = sum_s n_s exp(a_is) u_s / sum_s n_s exp(a_is),   a_is = scale q^_i . codebook_k[s]

Not causal, there is one `(n, u)`. Causal, the sequence is cut into blocks of L tokens: a query
takes earlier blocks from `(n, u)` at the start of its block and its own block key by key. The
loop steps over super-blocks of many blocks, so that a step is a few large matrix products.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ref.ops.attention import masked_softmax
from torch_ref.ops.checks import check_at_least, check_codebook, check_mask, check_qkv, check_scale
from torch_ref.ops.numerics import (
    acc_dtype,
    chunk_len,
    contain_nonfinite,
    einsum,
    is_code,
    is_finite_row,
    poison_values,
    read_chunk,
    scan_chunks,
    write_chunk,
)
from torch_ref.ops.quantize import assign, lookup, straight_through

SUM_LEN = 1024  # keys summed in one matrix product: a longer sum loses float32 precision


class VQState(NamedTuple):
    """The keys a query has seen, per key code."""

    count: Tensor  # type: ignore[assignment]  # [B, H, Ck] int32
    mean: Tensor  # [B, H, Ck, V] mean value, in the accumulator type


def vq_attention(
    q: Any,
    k: Any,
    v: Any,
    codebook_q: Any,
    codebook_k: Any,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Any = None,
    block_len: int = 128,
) -> Tensor:
    """Softmax attention between nearest codes, `softmax(scale q^ k^T + mask) v`, exact and linear in T.

    Gradients are straight-through: those of the dense form with respect to `q^`, `k^` and v. The
    backward pass is that dense form, quadratic in T in time and memory; codebooks get none.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, S, H, D]`, `[B, S, H, V]`, of the dtype of q.
      codebook_q: `[H, Cq, D]`, of the dtype of q or float32; None leaves queries as they are.
      codebook_k: `[H, Ck, D]`, likewise.
      is_causal: query i sees keys j <= i; needs T = S.
      scale: factor on the scores, default `D ** -0.5`.
      mask: `[B, S]` boolean, True = a real key.
      block_len: tokens in a block of the causal form; changes the speed, not the result.

    Returns:
      `[B, T, H, V]` in the dtype of v; 0 for a query that sees no key. NaN or inf in a query, key
      or value gives NaN in the rows that attend to it and in no other.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, a codebook with NaN or inf.
    """
    q, k, v = check_qkv(q, k, v, is_causal)
    if codebook_q is not None:
        codebook_q = check_codebook("codebook_q", codebook_q, q, "q")
    codebook_k = check_codebook("codebook_k", codebook_k, k, "k")
    mask = check_mask(mask, k, "k")
    block_len = min(check_at_least("block_len", block_len, 1), q.shape[1])
    scale = check_scale(scale, q.shape[-1])
    return _VQAttention.apply(q, k, v, codebook_q, codebook_k, mask, is_causal, scale, block_len)


class _VQAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        codebook_q: Tensor | None,
        codebook_k: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        block_len: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, codebook_q, codebook_k, mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        acc = acc_dtype(q.dtype)
        codebook_k = codebook_k.to(acc)
        queries = Queries.of(codebook_q, codebook_k, scale)
        if is_causal:
            return causal_attention(q, k, v, mask, queries, codebook_k, block_len)
        return full_attention(q, k, v, mask, queries, codebook_k)

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, codebook_q, codebook_k, mask = ctx.saved_tensors
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            out = dense_vq_attention(q, k, v, codebook_q, codebook_k, mask, ctx.is_causal, ctx.scale)
        d_outs = tuple(d_out.contiguous() for d_out in d_outs)  # a broadcast one fails on some macOS
        return *torch.autograd.grad(out, (q, k, v), d_outs), *(None,) * 6


def dense_vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook_q: Tensor | None,
    codebook_k: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The definition: straight-through vectors and a `T x S` softmax. Arguments as `vq_attention`."""
    acc = acc_dtype(q.dtype)
    q_hat = q.to(acc)
    if codebook_q is not None:
        q_hat = straight_through(q_hat, lookup(codebook_q.to(acc), assign(q, codebook_q)))
    k_hat = straight_through(k.to(acc), lookup(codebook_k.to(acc), assign(k, codebook_k)))
    visible = torch.ones((1, 1, q.shape[1], k.shape[1]), dtype=torch.bool, device=q.device)
    if is_causal:
        visible = visible.tril()
    if mask is not None:
        visible = visible & mask[:, None, None]
        v = torch.where(mask[:, :, None, None], v, 0)
    score = einsum("bthd,bshd->bhts", q_hat, k_hat) * scale
    p, _ = masked_softmax(score, visible)
    return einsum("bhts,bshv->bthv", p, v.to(acc)).to(v.dtype)


class Queries(NamedTuple):
    """How a query scores the key codes: through a table of its own codes, or by itself."""

    codebook: Tensor | None  # [H, Cq, D]
    table: Tensor  # [H, Cq, Ck] scores of query codes; without them scaled key codes [H, Ck, D]

    @classmethod
    def of(cls, codebook_q: Tensor | None, codebook_k: Tensor, scale: float) -> "Queries":
        scaled = codebook_k * scale
        if codebook_q is None:
            return cls(None, scaled)
        codebook_q = codebook_q.to(codebook_k.dtype)
        return cls(codebook_q, einsum("hcd,hsd->hcs", codebook_q, scaled))

    def score(self, q: Tensor) -> Tensor:
        """Scores `[B, T, H, Ck]` of queries `[B, T, H, D]` against every key code."""
        if self.codebook is None:
            return einsum("bthd,hsd->bths", q.to(self.table.dtype), self.table)
        score = lookup(self.table, assign(q, self.codebook))
        return torch.where(is_finite_row(q)[..., None], score, torch.nan)


def code_weights(score: Tensor, count: Tensor) -> Tensor:
    """Softmax weight of one key of every code, `exp(a_s) / sum_s n_s exp(a_s)`: `[..., Ck]`.

    The maximum is over codes with keys (n > 0) alone: a code not seen yet never underflows a row.
    0 for every code where there is no key at all.
    """
    top = torch.where(count > 0, score, -torch.inf).amax(-1, keepdim=True)
    mass = torch.where(count > 0, torch.exp(score - torch.where(torch.isneginf(top), 0, top)), 0)
    total = (mass * count).sum(-1, keepdim=True)
    return mass / torch.where(total == 0, 1, total)


def read_keys(k: Tensor, v: Tensor, mask: Tensor | None, codebook_k: Tensor) -> tuple[Tensor, Tensor]:
    """One-hot codes `[B, S, H, Ck]` (boolean) and values `[B, S, H, V]`, without padded keys."""
    chosen = is_code(assign(k, codebook_k), codebook_k.shape[1])
    v = poison_values(k, v)
    if mask is None:
        return chosen, v
    real = mask[:, :, None, None]
    return chosen & real, torch.where(real, v, 0)


def empty_state(codebook_k: Tensor, v: Tensor) -> VQState:
    """The state that has seen no key, for `codebook_k [H, Ck, D]` and `v [B, S, H, V]`."""
    shape = v.shape[0], v.shape[2], codebook_k.shape[1]
    return VQState(
        v.new_zeros(shape, dtype=torch.int32), v.new_zeros((*shape, v.shape[3]), dtype=codebook_k.dtype)
    )


def add_keys(state: VQState, count: Tensor, total: Tensor) -> VQState:
    """`state` after more keys, `count [B, H, Ck]` of them with value sums `total [B, H, Ck, V]`.

    Means move by their difference: a sum over a long sequence would lose precision.
    """
    after = state.count + count
    drift = total - count[..., None].to(total.dtype) * state.mean
    return VQState(after, state.mean + drift / after.clamp(min=1)[..., None].to(total.dtype))


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, queries: Queries, codebook_k: Tensor
) -> Tensor:
    """The non-causal form: a reduction over keys, one row per query code, a gather."""
    batch, length, n_head, width = q.shape
    n_code, value_width = codebook_k.shape[1], v.shape[-1]
    acc = codebook_k.dtype
    token_bytes = 4 * batch * n_head * (2 * n_code + width + value_width)

    def add(state: VQState, start: int, size: int) -> VQState:
        real = None if mask is None else read_chunk(mask, start, size)
        chosen, values = read_keys(read_chunk(k, start, size), read_chunk(v, start, size), real, codebook_k)
        one_hot, values = (to_blocks(x, min(SUM_LEN, size)) for x in (chosen.to(v.dtype), values))
        total = einsum("bhglc,bhglv->bhgcv", one_hot, values).sum(2)
        return add_keys(state, chosen.sum(1, dtype=torch.int32), total)

    state = scan_chunks(add, empty_state(codebook_k, v), k.shape[1], chunk_len(k, k.shape[1], token_bytes))
    count = state.count[:, None].to(acc)

    def attend(score: Tensor) -> Tensor:
        weight = code_weights(score, count) * count
        return einsum("bths,bhsv->bthv", weight, state.mean).to(v.dtype)

    rows = None if queries.codebook is None else attend(queries.table.transpose(0, 1)[None])

    def step(out: Tensor, start: int, size: int) -> Tensor:
        chunk = read_chunk(q, start, size)
        if rows is None:
            answer = attend(queries.score(chunk))
        else:
            batch_ids = torch.arange(batch, device=q.device)[:, None, None]
            head_ids = torch.arange(n_head, device=q.device)[None, None]
            answer = rows[batch_ids, assign(chunk, queries.codebook).long(), head_ids]
            answer = torch.where(is_finite_row(chunk)[..., None], answer, torch.nan)
        return write_chunk(out, answer, start)

    out = v.new_zeros((batch, length, n_head, value_width))
    return scan_chunks(step, out, length, chunk_len(q, length, token_bytes))


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, queries: Queries, codebook_k: Tensor, block_len: int
) -> Tensor:
    """The causal form: a scan over super-blocks that carries the state of all earlier keys."""
    super_len = super_block_len(q, v, codebook_k.shape[1], block_len)

    def step(carry: tuple[VQState, Tensor], start: int, size: int) -> tuple[VQState, Tensor]:
        state, out = carry
        real = None if mask is None else read_chunk(mask, start, size)
        part_q, part_k, part_v = (read_chunk(x, start, size) for x in (q, k, v))
        state, chunk = super_block(state, part_q, part_k, part_v, real, queries, codebook_k, block_len)
        return state, write_chunk(out, chunk, start)

    carry = empty_state(codebook_k, v), torch.zeros_like(v)
    return scan_chunks(step, carry, q.shape[1], super_len)[1]


def super_block_len(q: Tensor, v: Tensor, n_code: int, block_len: int) -> int:
    """Tokens of one scan step: whole blocks whose temporaries take about `CHUNK_BYTES`.

    A token needs a few rows of C scores, its row of the block's L x L weights and its vectors; a
    block also the C x V state at its start.
    """
    batch, length, n_head, d_k = q.shape
    width = d_k + v.shape[-1]
    token_bytes = 4 * batch * n_head * (4 * n_code + 2 * block_len + 3 * width)
    block_bytes = 4 * batch * n_head * 2 * n_code * width
    return chunk_len(q, length, token_bytes + block_bytes // block_len, block_len)


def super_block(
    state: VQState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    queries: Queries,
    codebook_k: Tensor,
    block_len: int,
) -> tuple[VQState, Tensor]:
    """Causal attention of N tokens after `state`, all their blocks at once.

    With the counts `n_i` of the keys that query i sees, its own block included, w is the weight
    of one key of each code. Earlier blocks contribute `w n u`; the own block contributes w of each
    key's code, picked by a product with the one-hot codes and masked to j <= i.

    Args:
      state: of all earlier tokens.
      q, k, v: `[B, N, H, D]`, `[B, N, H, D]`, `[B, N, H, V]`.
      mask: `[B, N]` or None.

    Returns:
      The state after these tokens and their outputs `[B, N, H, V]`.
    """
    acc, dtype = codebook_k.dtype, v.dtype
    chosen, values = (to_blocks(x, block_len) for x in read_keys(k, v, mask, codebook_k))
    score = to_blocks(queries.score(q), block_len)  # [B, H, G, L, C]
    one_hot = chosen.to(dtype)
    is_past = torch.ones((block_len, block_len), dtype=dtype, device=q.device).tril()

    block_count = chosen.sum(3, dtype=torch.int32)  # [B, H, G, C]
    block_sum = einsum("bhglc,bhglv->bhgcv", one_hot, values)
    drift = block_sum - block_count[..., None].to(acc) * state.mean[:, :, None]
    before = state.count[:, :, None] + exclusive_cumsum(block_count)
    mean = state.mean[:, :, None] + exclusive_cumsum(drift) / before.clamp(min=1)[..., None].to(acc)

    before = before[:, :, :, None].to(acc)
    weight = code_weights(score, before + einsum("lm,bhgmc->bhglc", is_past, one_hot))
    out = einsum("bhglc,bhgcv->bhglv", (weight * before).to(dtype), mean.to(dtype))
    near = einsum("bhglc,bhgmc->bhglm", weight.to(dtype), one_hot).to(dtype)
    values, first_bad = contain_nonfinite(values, axis=3)
    out = out + einsum("bhglm,bhgmv->bhglv", near * is_past[None, None, None], values)
    position = torch.arange(block_len, dtype=first_bad.dtype, device=q.device)[:, None]
    out = torch.where(position >= first_bad, torch.nan, out).to(dtype)

    state = add_keys(state, block_count.sum(2, dtype=torch.int32), block_sum.sum(2))
    return state, from_blocks(out)[:, : q.shape[1]]


def to_blocks(x: Tensor, block_len: int) -> Tensor:
    """`[B, N, H, ...]` to `[B, H, G, L, ...]`, padded with zeros to whole blocks."""
    batch, length, n_head, *rest = x.shape
    n_block = -(-length // block_len)
    x = torch.cat([x, x.new_zeros((batch, n_block * block_len - length, n_head, *rest))], 1)
    return x.reshape(batch, n_block, block_len, n_head, *rest).movedim(3, 1)


def from_blocks(x: Tensor) -> Tensor:
    """`[B, H, G, L, ...]` to `[B, G * L, H, ...]`."""
    batch, n_head, n_block, block_len, *rest = x.shape
    return x.movedim(1, 3).reshape(batch, n_block * block_len, n_head, *rest)


def exclusive_cumsum(x: Tensor) -> Tensor:
    """Sums over axis 2 of all earlier entries."""
    total = torch.cumsum(x, 2, dtype=x.dtype)
    return torch.cat([torch.zeros_like(total[:, :, :1]), total[:, :, :-1]], 2)
