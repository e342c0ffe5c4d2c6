"""Gradients of causal attention over codes: what they are, and which call has a kernel.

With `E` and `top` of `vq_causal.py` the weight of key j for query i is `P_ij = E[z_q(i), z_k(j)] r_i` with
`r_i = exp(top[z_q(i)] - lse_i)`. Queries need the sums `u_s`, `n_s` of values and counts per key code of
the keys before a tile; keys, per query code of the queries after it, `G_c = sum r_i d_out_i` and
`g_c = sum r_i D_i`:

    dS_ij  = P_ij (d_out_i . v_j - D_i)                       inside a tile
    d_q_i  = scale sum_s (E[z_q(i), s] r_i (d_out_i . u_s - D_i n_s) + sum_{j of s} dS_ij) codebook_k[s]
    d_v_j  = sum_c E[c, z_k(j)] G_c + sum_i P_ij d_out_i
    d_k_j  = scale sum_c (E[c, z_k(j)] (G_c . v_j - g_c) + sum_{i of c} dS_ij) codebook_q[c]

(`math.md` 2). The kernels are in `vq_states_grad.py`; heads whose scores differ by more than `MAX_RANGE` go
the plain way.
"""

import jax.numpy as jnp
from jax import Array, lax

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import F32, power_of_two
from jax_vq.kernels.vq_causal import first_sums
from jax_vq.kernels.vq_causal import why_not as why_not_forward
from jax_vq.kernels.vq_states_grad import RowData, block_gradients
from jax_vq.kernels.vq_sums import padded_codes
from jax_vq.kernels.vq_tables import Tables
from jax_vq.ops.implementations import Kernel
from jax_vq.ops.quantize import lookup
from jax_vq.ops.vq_blocks import Form, Keys
from jax_vq.ops.vq_causal import Books, Queries
from jax_vq.ops.vq_causal_grad import Gradients
from jax_vq.ops.vq_causal_grad import causal_gradients as plain_gradients
from jax_vq.ops.vq_state import VQState, coded_of


def why_not(
    asked: str | None, queries: Queries, keys: Keys, books: Books, state: VQState, form: Form, *rest: Array
) -> str | None:
    """Why `causal_gradients` cannot run, or None."""
    if form.has_exact:
        return "gradients with an exact window or sinks: the kernel is for codes alone"
    reason = why_not_forward(asked, queries, keys, books, state, form)
    if reason is not None:
        return reason
    if keys.v.dtype != jnp.bfloat16:
        return f"gradients of {keys.v.dtype}: the kernel is for bfloat16"
    n_code = books.q.shape[1]
    if n_code > sizes.MAX_CODES:
        return f"gradients of {n_code} query codes: the kernel is for at most {sizes.MAX_CODES}"
    width = max(books.k.shape[2], keys.v.shape[3])
    if width > sizes.MAX_WIDTH:
        return f"gradients of width {width}: the kernel is for at most {sizes.MAX_WIDTH}"
    return None


def causal_gradients(
    queries: Queries,
    keys: Keys,
    books: Books,
    state: VQState,
    form: Form,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> Gradients:
    """`ops.vq_causal_grad.causal_gradients`."""
    n_padded, _ = padded_codes(books.k.shape[1])
    tables = Tables.of(books, n_padded, keys.v.dtype)
    return lax.cond(
        jnp.any(tables.is_wide),
        lambda: plain_gradients(queries, keys, books, state, form, out, lse, d_out, d_lse),
        lambda: narrow_gradients(queries, keys, books, state, tables, out, lse, d_out, d_lse),
    )


def narrow_gradients(
    queries: Queries,
    keys: Keys,
    books: Books,
    state: VQState,
    tables: Tables,
    out: Array,
    lse: Array,
    d_out: Array,
    d_lse: Array,
) -> Gradients:
    """Gradients where no head is wide, see `Tables`."""
    n_key_head = keys.v.shape[2]
    n_head, dtype = queries.codes.shape[2], keys.v.dtype
    delta = jnp.sum(out.astype(F32) * d_out.astype(F32), axis=-1) - d_lse
    top = lookup(tables.top, queries.codes)
    rows = RowData(queries.codes, d_out, jnp.exp(top - lse), delta)
    width = books.k.shape[2]
    scale = jnp.asarray(books.scale, F32)
    book_q, book_k = (
        jnp.pad(book * scale, ((0, 0), (0, n - book.shape[1]), (0, power_of_two(width) - width))).astype(
            dtype
        )
        for book, n in ((books.q, padded_codes(books.q.shape[1])[0]), (books.k, tables.weight.shape[2]))
    )
    weight = jnp.pad(tables.weight, ((0, 0), (0, book_q.shape[1] - books.q.shape[1]), (0, 0)))
    first = first_sums(coded_of(state), weight.shape[2])
    d_q, d_k, d_v = block_gradients(rows, keys, weight, book_q, book_k, first, width)
    n_rep = n_head // n_key_head
    if n_rep > 1:
        d_k, d_v = (
            jnp.sum(x.reshape(*x.shape[:2], n_key_head, n_rep, -1).astype(F32), axis=3) for x in (d_k, d_v)
        )
    # All keys are seen through codes: a bias moves nothing but the log-sum-exp.
    bias = None if books.bias is None else jnp.sum(d_lse, axis=(0, 1))
    return Gradients(d_q, d_k.astype(dtype), d_v.astype(dtype), None, None, bias)


KERNELS = {"causal_gradients": Kernel(causal_gradients, why_not)}
