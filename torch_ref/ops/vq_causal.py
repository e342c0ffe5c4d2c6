"""Causal VQ-attention: a scan over super-blocks that carries what their queries see through codes.

A query takes far keys from the counts and mean values at the start of its block, near ones one by
one, in one softmax. With the count `n_is` of the keys of code s that query i sees through codes,
`w_is = exp(a_is) / l_i` is the weight of each, near or far (`math.md` 2 and 3).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ref.ops.numerics import (
    acc_dtype,
    chunk_len,
    contain_nonfinite,
    einsum,
    is_finite_row,
    read_chunk,
    scan_chunks,
    write_chunk,
)
from torch_ref.ops.quantize import lookup
from torch_ref.ops.vq_blocks import (
    Form,
    Keys,
    Near,
    Past,
    add_up,
    after,
    from_rows,
    keys_around,
    read_far,
    read_near,
    to_rows,
)
from torch_ref.ops.vq_state import Coded, VQState, coded_of


class Queries(NamedTuple):
    """Queries of a call, whole."""

    q: Any  # [B, T, H, D]; None where its codes say all
    codes: Any  # [B, T, H] int32, -1 for a query that is not finite; None: keys only
    q_local: Any  # [B, T, H, D]; None without exact keys


class Books(NamedTuple):
    """Codebooks in the accumulator type, and the scores between them."""

    q: Any  # [H, Cq, D]; None: keys only
    k: Tensor  # [K, C, D]
    table: Any  # [H, Cq, C] scaled scores; None: keys only
    bias: Any  # [H] or None, added to every coded score
    scale: float

    @classmethod
    def of(cls, codebook_q: Tensor | None, codebook_k: Tensor, bias: Tensor | None, scale: float) -> "Books":
        acc = acc_dtype(codebook_k.dtype)
        codebook_k = codebook_k.to(acc)
        bias = None if bias is None else bias.to(acc)
        if codebook_q is None:
            return cls(None, codebook_k, None, bias, scale)
        codebook_q = codebook_q.to(acc)
        n_head, (n_key_head, n_code, width) = codebook_q.shape[0], codebook_k.shape
        grouped = codebook_q.reshape(n_key_head, -1, width) * scale
        table = einsum("kcd,ksd->kcs", grouped, codebook_k).reshape(n_head, -1, n_code)
        return cls(codebook_q, codebook_k, table, bias, scale)

    def score(self, q: Any, codes: Any) -> Tensor:
        """Coded scores `[B, N, H, C]` of queries `[B, N, H, D]` or of their codes `[B, N, H]`."""
        if self.table is not None:
            score = lookup(self.table, codes)
        else:
            batch, length, n_head, width = q.shape
            grouped = q.reshape(batch, length, self.k.shape[0], -1, width).to(self.k.dtype)
            scaled = self.k * self.scale
            score = einsum("btkrd,ksd->btkrs", grouped, scaled).reshape(batch, length, n_head, -1)
        return score if self.bias is None else score + self.bias[None, None, :, None]


class Weights(NamedTuple):
    """Softmax weights of one super-block."""

    coded: Tensor  # [B, K, G, R * L, C] of one key of each code
    far_count: Tensor  # [B, K, G, R * L or 1, C] far keys of each code that the row sees
    near: Tensor  # [B, K, G, R * L, W] of every near key
    lse: Tensor  # [B, K, G, R * L] log-sum-exp of the scores, -inf where no key is seen


def causal_attention(
    queries: Queries, keys: Keys, books: Books, state: VQState, form: Form
) -> tuple[Tensor, Tensor, Coded]:
    """Output `[B, T, H, V]`, log-sum-exp `[B, T, H]` and the far keys of the tokens to come."""
    batch, length = keys.v.shape[:2]
    n_head, n_key_head = query_heads(queries), books.k.shape[0]
    step_len = super_block_len(queries, keys, books, form)

    def step(carry: tuple[Coded, Tensor, Tensor], start: int, size: int) -> tuple[Coded, Tensor, Tensor]:
        coded, out, lse = carry
        around = keys_around(keys, state, start, size)
        far = read_far(around, coded, books.k.shape[1], form, start)
        near = read_near(keys, around, state, far, n_head // n_key_head, books.k.shape[1], form, start)
        past = add_up(coded, far, form)
        score, q_local = query_rows(queries, books, form, start, size)
        weights = softmax_weights(score, exact_scores(q_local, near, form), past, near)
        sound = finite_queries(queries, form, start, size)
        answer = from_rows(attend(weights, past, near, form), form.part_len)[:, :size]
        answer = torch.where(sound[..., None], answer, torch.nan)
        row_lse = torch.where(sound, from_rows(weights.lse, form.part_len)[:, :size], torch.nan)
        out, lse = write_chunk(out, answer, start), write_chunk(lse, row_lse, start)
        return after(past, far, coded, start), out, lse

    out = keys.v.new_zeros((batch, length, n_head, keys.v.shape[-1]))
    lse = keys.v.new_zeros((batch, length, n_head), dtype=books.k.dtype)
    coded, out, lse = scan_chunks(step, (coded_of(state), out, lse), length, step_len)
    return out, lse, coded


def query_heads(queries: Queries) -> int:
    """H."""
    return int((queries.codes if queries.q is None else queries.q).shape[2])


def super_block_len(queries: Queries, keys: Keys, books: Books, form: Form) -> int:
    """Tokens of one scan step: whole blocks whose temporaries take about `CHUNK_BYTES`.

    A token needs a few rows of C scores, its row of near weights and its vectors; a block also
    the C x V state at its start.
    """
    batch, length, n_key_head, value_width = keys.v.shape
    n_code, d_k = books.k.shape[1:]
    n_near = form.overhang + form.part_len + form.n_sink
    rows = query_heads(queries) * (4 * n_code + 2 * n_near * (2 if form.has_exact else 1))
    token_bytes = 4 * batch * (rows + query_heads(queries) * 3 * (d_k + value_width))
    block_bytes = 4 * batch * n_key_head * (2 * n_code + n_near) * (d_k + value_width)
    return chunk_len(keys.v, length, token_bytes + block_bytes // form.part_len, form.part_len)


def query_rows(
    queries: Queries, books: Books, form: Form, start: int, size: int
) -> tuple[Tensor, Tensor | None]:
    """Coded scores `[B, K, G, R * L, C]` and local queries of a super-block."""

    def read(x: Tensor | None) -> Tensor | None:
        return None if x is None else read_chunk(x, start, size)

    score = books.score(read(queries.q), read(queries.codes))
    n_key_head = books.k.shape[0]
    q_local = read(queries.q_local) if form.has_exact else None
    rows = None if q_local is None else to_rows(q_local, form.part_len, n_key_head)
    return to_rows(score, form.part_len, n_key_head), rows


def finite_queries(queries: Queries, form: Form, start: int, size: int) -> Tensor:
    """`[B, N, H]`, which queries of a super-block are finite; the scores of others have no meaning."""
    if queries.codes is not None:
        sound = read_chunk(queries.codes, start, size) >= 0
    else:
        sound = is_finite_row(read_chunk(queries.q, start, size))
    if form.has_exact:
        sound = sound & is_finite_row(read_chunk(queries.q_local, start, size))
    return sound


def exact_scores(q_local: Tensor | None, near: Near, form: Form) -> Tensor | None:
    """Scores of near keys `[B, K, G, R * L, W]`, -inf where a key is not seen exactly."""
    if near.k_local is None:
        return None
    score = einsum("bkgld,bkgmd->bkglm", q_local, near.k_local)
    return torch.where(near.exact, score * form.scale, -torch.inf)


def softmax_weights(
    score: Tensor, exact: Tensor | None, past: Past, near: Near, lse: Tensor | None = None
) -> Weights:
    """Weights from coded and exact scores; `lse` where it is known already.

    The maximum is over codes with keys alone: a code not seen yet never underflows a row.
    """
    acc, dtype = score.dtype, near.values.dtype
    far_count = past.count[:, :, :-1, None].to(acc)
    if near.sees_far is not None:
        far_count = torch.where(near.sees_far[..., None], far_count, 0)
    count = far_count
    if near.one_hot is not None:
        count = count + sum_seen(near.coded, near.one_hot, dtype)
    if lse is None:
        top = torch.where(count > 0, score, -torch.inf).amax(-1)
        top = top if exact is None else torch.maximum(top, exact.amax(-1))
        top = torch.where(torch.isneginf(top), 0, top)
        mass = torch.where(count > 0, torch.exp(score - top[..., None]), 0)
        total = (mass * count).sum(-1)
        near_mass = None if exact is None else torch.exp(exact - top[..., None])
        total = total if near_mass is None else total + near_mass.sum(-1)
        lse = top + torch.log(total)
        share = (1 / torch.where(total == 0, 1, total))[..., None]
        weight = mass * share
        near_weight = None if near_mass is None else near_mass * share
    else:
        base = torch.where(torch.isneginf(lse), 0, lse)[..., None]
        weight = torch.where(count > 0, torch.exp(score - base), 0)
        near_weight = None if exact is None else torch.exp(exact - base)
    if near.one_hot is not None:
        picked = einsum("bkglc,bkgmc->bkglm", weight.to(dtype), near.one_hot.to(dtype))
        picked = torch.where(near.coded, picked, 0)
        near_weight = picked if near_weight is None else near_weight + picked
    return Weights(weight, far_count, near_weight, lse)


def attend(weights: Weights, past: Past, near: Near, form: Form) -> Tensor:
    """Output rows `[B, K, G, R * L, V]`; NaN in a value reaches the rows that see it."""
    dtype = near.values.dtype
    mean = past.mean[:, :, :-1].to(dtype)
    out = einsum("bkglc,bkgcv->bkglv", (weights.coded * weights.far_count).to(dtype), mean)
    if near.sees_far is not None:
        out = torch.where(near.sees_far[..., None], out, 0)
    near_weight = weights.near.to(dtype)
    if near.exact is None and near.coded.shape[0] == 1:  # no documents: a row sees all keys before it
        values, first_bad = contain_nonfinite(near.values, axis=3)
        out = out + einsum("bkglm,bkgmv->bkglv", near_weight, values)
        row = torch.arange(form.part_len, dtype=first_bad.dtype, device=out.device)
        if form.is_strict:
            row = row - 1
        row = row.tile(out.shape[3] // form.part_len)
        return torch.where(row[None, None, None, :, None] >= first_bad, torch.nan, out).to(dtype)
    bad = ~torch.isfinite(near.values)
    out = out + einsum("bkglm,bkgmv->bkglv", near_weight, torch.where(bad, 0, near.values))
    seen = near.coded if near.exact is None else near.coded | near.exact
    return torch.where(sum_seen(seen, bad, dtype) > 0, torch.nan, out).to(dtype)


def sum_seen(seen: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """How many near keys of `x [B, K, G, W, .]`, boolean, every row of `seen` sees."""
    if seen.shape[0] == seen.shape[2] == 1:
        return einsum("lm,bkgmc->bkglc", seen[0, 0, 0].to(dtype), x.to(dtype))
    return einsum("bglm,bkgmc->bkglc", seen[:, 0].to(dtype), x.to(dtype))
