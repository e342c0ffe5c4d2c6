"""Attention over codes: softmax attention to quantized keys in linear time (`math.md` 2 and 3).

With `q^`, `k^` the nearest codes, `o = softmax(scale q^ k^T + mask) v` needs only, per key
code s, the number `n_s` of keys that a query sees and the mean `u_s` of their values:

    o_i = sum_s n_s exp(a_is) u_s / sum_s n_s exp(a_is),   a_is = scale q^_i . codebook_k[s]

This file checks the arguments and ties forward and backward passes together. `vq_causal.py` and
`vq_causal_grad.py` have the causal form, `vq_full.py` the other, `vq_blocks.py` says which keys
are near, `vq_state.py` what is remembered.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_ref.ops.attention import merge_attention
from torch_ref.ops.checks import (
    check_at_least,
    check_bias,
    check_codebook,
    check_local,
    check_mask,
    check_qkv,
    check_scale,
    check_segments,
)
from torch_ref.ops.numerics import chunk_len, is_finite_row, read_chunk, scan_chunks, write_chunk
from torch_ref.ops.quantize import assign
from torch_ref.ops.vq_blocks import Form, Keys
from torch_ref.ops.vq_causal import Books, Queries, causal_attention
from torch_ref.ops.vq_causal_grad import causal_gradients
from torch_ref.ops.vq_full import Seen, count_keys, full_attention, full_gradients
from torch_ref.ops.vq_state import (
    Coded,
    Documents,
    VQState,
    check_state,
    empty_state,
    find_documents,
    next_state,
    window_len,
)


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
    segment_ids: Any = None,
    block_len: int = 128,
    mem_len: int = 0,
    n_sink: int = 0,
    q_local: Any = None,
    k_local: Any = None,
    code_bias: Any = None,
    state: VQState | None = None,
    return_state: bool = False,
) -> Any:
    """Softmax attention between nearest codes, `softmax(scale q^ k^T + mask) v`, exact and linear in T.

    With `mem_len` or `n_sink` some keys stay exact, in the same softmax: query i of a block that
    starts at b sees the keys `j >= b - mem_len` (if `mem_len > 0`) and the first `n_sink` of its
    document by `scale q_local_i . k_local_j`, all others through codes. Blocks of `block_len`
    tokens count from the first real token of a document.

    Gradients are straight-through, exact and linear in T: those of the dense form with respect
    to `q^`, `k^`, v, q_local, k_local and code_bias. Codebooks get none, and none flows through a
    state. Without `codebook_q` the backward pass of a token and head costs `4 Ck D V`
    multiply-adds instead of about `4 (Cq + Ck) (D + V)`.

    Args:
      q: `[B, T, H, D]`.
      k, v: `[B, S, K, D]`, `[B, S, K, V]`, of the dtype of q; H a multiple of K, and query head h
        sees key head `h // (H // K)`.
      codebook_q: `[H, Cq, D]`, of the dtype of q or float32; None leaves queries as they are.
      codebook_k: `[K, Ck, D]`, likewise.
      is_causal: query i sees keys j <= i; needs T = S.
      scale: factor on the scores, default `D ** -0.5`.
      mask: `[B, S]` boolean, True = a real key.
      segment_ids: `[B, T]` integers that fit in 32 bits; every run of one id is a document, and a
        query sees keys of its own alone. Needs T = S.
      block_len: tokens in a block of the causal form. Without `mem_len` it changes the speed, not
        the result.
      mem_len: exact tokens M before the block; 0: no window at all, own block included. Causal only.
      n_sink: exact first tokens of a document. Causal only.
      q_local, k_local: `[B, T, H, E]`, `[B, S, K, E]`, what exact scores are made of, default q
        and k; without exact keys they have no effect.
      code_bias: `[H]`, added to every coded score; of the dtype of q or float32.
      state: what earlier calls saw, see `VQState`; None: nothing. Causal only.
      return_state: return the state after these tokens too. Causal only.

    Returns:
      `[B, T, H, V]` in the dtype of v; 0 for a query that sees no key. NaN or inf in a query, key
      or value gives NaN in the rows that attend to it and in no other. With `return_state`, that
      and a `VQState`.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, a codebook with NaN or inf, a window,
        sinks or a state without `is_causal`.
    """
    q, k, v = check_qkv(q, k, v, is_causal, is_grouped=True)
    if codebook_q is not None:
        codebook_q = check_codebook("codebook_q", codebook_q, q, "q")
    codebook_k = check_codebook("codebook_k", codebook_k, k, "k")
    mask, segment_ids = check_mask(mask, k, "k"), check_segments(segment_ids, q, k)
    block_len = check_at_least("block_len", block_len, 1)
    mem_len, n_sink = check_at_least("mem_len", mem_len, 0), check_at_least("n_sink", n_sink, 0)
    for name, is_set in (
        ("mem_len", mem_len > 0),
        ("n_sink", n_sink > 0),
        ("state", state is not None),
        ("return_state", return_state),
    ):
        if is_set and not is_causal:
            raise ValueError(f"{name} needs is_causal=True: there is no order otherwise")
    q_local, k_local = check_local(q_local, k_local, q, k)
    code_bias = check_bias(code_bias, q)
    form = Form(
        scale=check_scale(scale, q.shape[-1]),
        block_len=block_len,
        mem_len=mem_len,
        n_sink=n_sink,
        is_causal=is_causal,
        part_len=min(block_len, q.shape[1]),
        overhang=mem_len,
        has_segments=segment_ids is not None,
    )
    if not form.has_exact:
        q_local = k_local = None
    is_aligned = mask is None and segment_ids is None and state is None and not return_state
    if not is_aligned:
        form = form._replace(overhang=window_len(block_len, mem_len))
    if state is not None:
        check_state(state, k if k_local is None else k_local, v, codebook_k, block_len, mem_len, n_sink)
    arrays = q, k, v, q_local, k_local, code_bias, codebook_q, codebook_k, mask, segment_ids, state
    out, after = _vq_attention(form, return_state, *arrays)
    return (out, after) if return_state else out


def vq_attention_step(
    q: Any,
    k: Any,
    v: Any,
    codebook_q: Any,
    codebook_k: Any,
    state: VQState,
    *,
    scale: float | None = None,
    block_len: int = 128,
    mem_len: int = 0,
    n_sink: int = 0,
    q_local: Any = None,
    k_local: Any = None,
    code_bias: Any = None,
) -> tuple[Tensor, VQState]:
    """Causal `vq_attention` of the next tokens, usually one: the output and the state after them.

    Arguments, results and errors as in `vq_attention`.
    """
    options = {"scale": scale, "block_len": block_len, "mem_len": mem_len, "n_sink": n_sink}
    options |= {"q_local": q_local, "k_local": k_local, "code_bias": code_bias}
    arrays = q, k, v, codebook_q, codebook_k
    out: tuple[Tensor, VQState] = vq_attention(
        *arrays, is_causal=True, state=state, return_state=True, **options
    )
    return out


def _vq_attention(
    form: Form,
    return_state: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_local: Tensor | None,
    k_local: Tensor | None,
    code_bias: Tensor | None,
    codebook_q: Tensor | None,
    codebook_k: Tensor,
    mask: Tensor | None,
    segment_ids: Tensor | None,
    state: VQState | None,
) -> tuple[Tensor, VQState | None]:
    shape = q.shape[:2]
    books = codebook_q, codebook_k
    if not form.is_causal and not form.has_segments:
        documents = None if mask is None else Documents(mask, mask, mask)
        return _full(form, q, k, v, code_bias, *books, documents), None
    if not form.is_causal:
        return _both_ways(form, q, k, v, code_bias, books, mask, segment_ids), None
    has_documents = mask is not None or segment_ids is not None or form.has_exact or return_state
    documents = find_documents(q, mask, segment_ids, state) if has_documents else None
    before = state
    if before is None:
        width = (k if k_local is None else k_local).shape[3]
        heads, widths = codebook_k.shape[:2], (width, v.shape[3])
        with v.device:
            before = empty_state(shape[0], heads, widths, v.dtype, form.overhang, form.n_sink)
    before = VQState(*(x.detach() for x in before))
    arrays = q, k, v, q_local, k_local, code_bias, *books, documents, before
    out, _, coded, codes = _causal(form, *arrays)
    if not return_state:
        return out, None
    k_local, v = (k if k_local is None else k_local).detach(), v.detach()
    return out, next_state(before, coded, codes, k_local, v, documents, segment_ids)


def _both_ways(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code_bias: Tensor | None,
    books: tuple[Tensor | None, Tensor],
    mask: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    """Not causal, with documents: the keys up to a query, and those after it from the other end."""
    parts = []
    for step in (1, -1):
        x = [a if a is None or step > 0 else a.flip(1) for a in (q, k, v, mask, segment_ids)]
        documents = find_documents(q, x[3], x[4], None)
        heads, widths = books[1].shape[:2], (k.shape[3], v.shape[3])
        with v.device:
            state = empty_state(q.shape[0], heads, widths, v.dtype, 0, 0)
        one_way = form._replace(is_causal=True, is_strict=step < 0)
        out, lse, _, _ = _causal(one_way, *x[:3], None, None, code_bias, *books, documents, state)
        parts += [out, lse] if step > 0 else [out.flip(1), lse.flip(1)]
    return merge_attention(*parts)[0].to(v.dtype)


def finite_codes(vectors: tuple[Tensor, ...], codebooks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Nearest codes of each array, int32 `[B, T, H]`; -1 for a vector with NaN or inf."""

    def find(x: Tensor, codebook: Tensor) -> Tensor:
        batch, length, n_head, width = x.shape
        chunk = chunk_len(x, length, 4 * batch * n_head * (codebook.shape[1] + width))

        def step(codes: Tensor, start: int, size: int) -> Tensor:
            part = read_chunk(x, start, size)
            return write_chunk(codes, torch.where(is_finite_row(part), assign(part, codebook), -1), start)

        return scan_chunks(step, x.new_zeros((batch, length, n_head), dtype=torch.int32), length, chunk)

    return tuple(map(find, vectors, codebooks))


def _read(
    form: Form,
    q: Tensor | None,
    codes_q: Tensor | None,
    codes_k: Tensor,
    v: Tensor,
    q_local: Tensor | None,
    k_local: Tensor | None,
    code_bias: Tensor | None,
    codebook_q: Tensor | None,
    codebook_k: Tensor,
    documents: Documents | None,
) -> tuple[Queries, Keys, Books]:
    return (
        Queries(q, codes_q, q_local),
        Keys(codes_k, v, k_local, documents),
        Books.of(codebook_q, codebook_k, code_bias, form.scale),
    )


def _quantized(
    q: Tensor, k: Tensor, codebook_q: Tensor | None, codebook_k: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """q where it stays as it is, else its codes; the codes of k."""
    pairs = ((k,), (codebook_k,)) if codebook_q is None else ((k, q), (codebook_k, codebook_q))
    codes_k, *codes_q = finite_codes(*pairs)
    return (None, codes_q[0], codes_k) if codes_q else (q, None, codes_k)


def _causal(form: Form, *arrays: Any) -> tuple[Tensor, Tensor, Coded, Tensor]:
    *inputs, documents, state = arrays
    out, lse, *coded, codes, _ = _Causal.apply(form, *inputs, *(documents or NO_DOCUMENTS), *state)
    return out, lse, Coded(*coded), codes


def _documents(found: Any) -> Documents | None:
    """What is flat among the arguments of an `autograd.Function`, put together again."""
    return None if found[0] is None else Documents(*found)


NO_DOCUMENTS = (None,) * len(Documents._fields)


class _Causal(torch.autograd.Function):
    """`q, k, v, q_local, k_local, code_bias, codebook_q, codebook_k, *documents, *state`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form: Form, *arrays: Any) -> tuple[Any, ...]:
        q, k, v, q_local, k_local, code_bias, codebook_q, codebook_k = arrays[:8]
        x = _quantized(q, k, codebook_q, codebook_k)
        documents, state = _documents(arrays[8:11]), VQState(*arrays[11:])
        rest = v, q_local, k_local, code_bias, codebook_q, codebook_k, documents
        queries, keys, books = _read(form, *x, *rest)
        out, lse, coded = causal_attention(queries, keys, books, state, form)
        return out, lse, *coded, keys.codes, queries.codes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        out, lse, *coded, codes_k, codes_q = output
        ctx.form, q, _, *rest = inputs
        ctx.mark_non_differentiable(*coded, codes_k, *(() if codes_q is None else (codes_q,)))
        ctx.save_for_backward(q if codes_q is None else None, codes_q, codes_k, *rest, out, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Any, ...]:
        *saved, out, lse = ctx.saved_tensors
        arrays, state = (*saved[:9], _documents(saved[9:12])), VQState(*saved[12:])
        queries, keys, books = _read(ctx.form, *arrays)
        d_out, d_lse = (x.contiguous() for x in d_outs[:2])  # a broadcast one fails on some macOS
        found = causal_gradients(queries, keys, books, state, ctx.form, out, lse, d_out, d_lse)
        bias = None if found.bias is None else found.bias.to(saved[6].dtype)
        return None, *found[:5], bias, *(None,) * (5 + len(state))


def _full(form: Form, *arrays: Any) -> Tensor:
    *inputs, documents = arrays
    return _Full.apply(form, *inputs, *(documents or NO_DOCUMENTS))[0]


class _Full(torch.autograd.Function):
    """`q, k, v, code_bias, codebook_q, codebook_k, *documents`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form: Form, *arrays: Any) -> tuple[Any, ...]:
        q, k, v, code_bias, codebook_q, codebook_k = arrays[:6]
        x = _quantized(q, k, codebook_q, codebook_k)
        rest = v, None, None, code_bias, codebook_q, codebook_k, _documents(arrays[6:])
        queries, keys, books = _read(form, *x, *rest)
        seen = count_keys(keys, books)
        out = full_attention(queries, keys, books, seen)
        return out, *seen, keys.codes, queries.codes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        out, *seen, codes_k, codes_q = output
        ctx.form, q, _, v, *rest = inputs
        ctx.mark_non_differentiable(*seen, codes_k, *(() if codes_q is None else (codes_q,)))
        x = q if codes_q is None else None, codes_q, codes_k
        ctx.save_for_backward(*x, v, None, None, *rest, out, *seen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Any, ...]:
        *saved, out, count, mean = ctx.saved_tensors
        arrays = *saved[:9], _documents(saved[9:])
        d_out = d_outs[0].contiguous()  # a broadcast one fails on some macOS
        found = full_gradients(*_read(ctx.form, *arrays), ctx.form, Seen(count, mean), out, d_out)
        bias = None if found.bias is None else found.bias.to(saved[6].dtype)
        return None, *found[:3], bias, *(None,) * 5
