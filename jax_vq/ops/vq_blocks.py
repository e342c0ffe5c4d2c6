"""Blocks of causal VQ-attention: which keys a block sees one by one, and which through a state.

A sequence is cut into blocks of `part_len` tokens, and G blocks make a super-block, the work of
one scan step. A block sees its own keys and the `overhang` tokens before it one by one: near keys,
to which sinks are added. All older keys are far: it sees them through counts and mean values per
code. So far keys are those of the super-block delayed by `overhang` tokens, up to the block.

Axes: B batch, K key heads, G blocks, L tokens of a block, W near keys, C key codes. R query heads
share a key head: they are rows of one block, `[B, K, G, R * L, ...]`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_vq.ops.numerics import einsum, is_code, poison_values, read_chunk
from jax_vq.ops.vq_state import Coded, Documents, VQState, take_tokens


class Form(NamedTuple):
    """Everything static about one call; hashable."""

    scale: float
    block_len: int = 1  # L of the definition: where windows start
    mem_len: int = 0
    n_sink: int = 0
    is_causal: bool = True
    is_strict: bool = False  # a query does not see its own key
    part_len: int = 1  # tokens of a block here
    overhang: int = 0
    has_segments: bool = False  # documents may begin after the first token
    is_whole: bool = False  # one document without padding, from its start, and no state asked for
    implementation: str | None = None  # as asked for

    @property
    def has_exact(self) -> bool:
        """Whether some near keys are exact."""
        return self.mem_len > 0 or self.n_sink > 0

    @property
    def has_near_codes(self) -> bool:
        """Whether some near keys are seen through their code: not where windows and blocks fit."""
        return not self.mem_len or (self.part_len, self.overhang) != (self.block_len, self.mem_len)


class Keys(NamedTuple):
    """Keys and values of a call, whole."""

    codes: Array  # [B, T, K] int32, -1 for a key that is not finite
    v: Array  # [B, T, K, V]
    k_local: Any  # [B, T, K, D]; None without exact keys
    documents: Any  # of type `Documents`; None: one document, no padding


class Far(NamedTuple):
    """The keys of a super-block's G delayed blocks, as the blocks after them see them."""

    one_hot: Array  # [B, K, G, L, C] bool: the key is there and will be seen through this code
    codes: Array  # [B, K, G, L]
    values: Array  # [B, K, G, L, V]
    keep: Array  # [B or 1, G + 1, G + 1]: block g (G: what follows) sees delayed block c - 1 (-1: before)
    start: Any  # [B, G + 1] document of the far keys of a block; None without documents


class Near(NamedTuple):
    """The keys that the blocks of a super-block see one by one."""

    values: Array  # [B, K, G, W, V]
    one_hot: Any  # [B, K, G, W, C] bool; None where all are exact
    k_local: Any  # [B, K, G, W, D]; None where none is exact
    coded: Array  # [B or 1, 1, G or 1, R * L, W] bool: seen through its code
    exact: Any  # likewise: seen exactly
    sees_far: Any  # [B, 1, G, R * L]: the far keys are of its document; None where all are
    sink_index: Any  # [B, G, n_sink] tokens that are sinks outside the window


def read_around(x: Array, before: Array, start: Array | int, size: int) -> Array:
    """`x[:, start - W : start + size]`, with `before [B, W, ...]` in front of x."""
    window = before.shape[1]
    chunk = read_chunk(x, start, size)
    if not window:
        return chunk
    offset = jnp.arange(window, dtype=jnp.int32) + start
    picked = jnp.take(x, jnp.clip(offset - window, 0, x.shape[1] - 1), axis=1)
    older = jnp.take(before, jnp.clip(offset, 0, window - 1), axis=1)
    is_older = (offset < window).reshape(1, window, *(1,) * (x.ndim - 2))
    return jnp.concatenate([jnp.where(is_older, older, picked), chunk], axis=1)


def keys_around(keys: Keys, state: VQState, start: Array | int, size: int) -> Keys:
    """The keys of the super-block at `[start, start + size)` and of the tokens before it.

    Padded keys and values are 0, values of a key that is not finite NaN; document starts count
    from the first token of the super-block.
    """
    codes = read_around(keys.codes, state.window_codes, start, size)
    v = read_around(keys.v, state.window_v, start, size)
    v = jnp.where((codes < 0)[..., None], jnp.nan, v)
    k_local = None if keys.k_local is None else read_around(keys.k_local, state.window_k, start, size)
    v = v if k_local is None else poison_values(k_local, v)
    if keys.documents is None:
        return Keys(codes, v, k_local, None)
    begin = read_around(keys.documents.start, state.window_start, start, size) - start
    real = read_around(keys.documents.real, state.window_real, start, size)
    there = real[:, :, None, None]
    v = jnp.where(there, v, 0)
    k_local = None if k_local is None else jnp.where(there, k_local, 0)
    return Keys(codes, v, k_local, Documents(begin, real, keys.documents.position))


def read_far(around: Keys, coded: Coded, n_code: int, form: Form, start: Array | int) -> Far:
    """The far keys of the super-block that `keys_around` read at `start`, after `coded`."""
    size = around.v.shape[1] - form.overhang
    n_block = -(-size // form.part_len)
    one_hot = is_code(around.codes[:, :size], n_code)  # the padding of the last block is never far
    if around.documents is None:
        keep = jnp.tril(jnp.ones((1, n_block + 1, n_block + 1), jnp.bool_))
        begin = None
    else:
        documents = around.documents
        first = (coded.start - start)[:, None]
        ends = [min((g + 1) * form.part_len, size) - 1 for g in range(n_block)]
        begin = jnp.concatenate([first, documents.start[:, jnp.asarray(ends)]], axis=1)
        keep = jnp.tril(jnp.ones((1, n_block + 1, n_block + 1), jnp.bool_))
        position = _index(form, size) - documents.start[:, :size]
        is_far = documents.real[:, :size] & (position >= form.n_sink)
        if form.has_segments:
            keep = keep & (begin[:, :, None] == begin[:, None])
            last = jnp.repeat(begin[:, 1:], form.part_len, axis=1)[:, :size]
            is_far = is_far & (documents.start[:, :size] == last)
        one_hot = one_hot & is_far[:, :, None, None]
    one_hot, codes, v = (
        to_blocks(x, form.part_len) for x in (one_hot, around.codes[:, :size], around.v[:, :size])
    )
    return Far(one_hot, codes, v, keep, begin)


def read_near(
    keys: Keys,
    around: Keys,
    state: VQState,
    far: Far,
    n_rep: int,
    n_code: int,
    form: Form,
    start: Array | int,
) -> Near:
    """The near keys of the super-block that `keys_around` read of `keys` at `start`."""
    part_len, overhang = form.part_len, form.overhang
    values = to_windows(around.v, part_len, overhang)
    one_hot = None
    if form.has_near_codes:
        one_hot = to_windows(is_code(around.codes, n_code), part_len, overhang)
    row = jnp.arange(part_len, dtype=jnp.int32)[:, None]
    column = jnp.arange(overhang + part_len, dtype=jnp.int32)[None] - overhang
    visible = (column < row if form.is_strict else column <= row)[None, None]
    if around.documents is None:
        return Near(values, one_hot, None, as_rows(visible, n_rep), None, None, None)
    documents = around.documents
    queries = to_blocks(documents.start[:, overhang:, None], part_len)[:, 0]  # [B, G, L]
    owner = jnp.where(documents.real, documents.start, NOWHERE)
    owner = to_windows(owner[:, :, None], part_len, overhang, NOWHERE)[:, 0]  # [B, G, W]
    visible = visible & (queries[..., None] == owner[:, :, None])
    sees_far = None
    if form.has_segments and far.start is not None:
        sees_far = as_rows((queries == far.start[:, :-1, None])[..., None], n_rep)[..., 0]
    if not form.has_exact:
        return Near(values, one_hot, None, as_rows(visible, n_rep), None, sees_far, None)

    block = (jnp.arange(queries.shape[1], dtype=jnp.int32) * part_len)[None, :, None]
    token = block + column[None]  # [1, G, W] index of a near key in the super-block
    exact = (token - owner < form.n_sink)[:, :, None]
    if form.mem_len:
        index = block + row.T[None]
        window = index - (index - queries) % form.block_len - form.mem_len
        exact = exact | (token[:, :, None] >= window[..., None])
    coded, exact = visible & ~exact, visible & exact
    k_local = to_windows(around.k_local, part_len, overhang)
    if not form.n_sink:
        return Near(values, one_hot, k_local, as_rows(coded, n_rep), as_rows(exact, n_rep), sees_far, None)

    sink = far.start[:, :-1, None] + jnp.arange(form.n_sink, dtype=jnp.int32)[None, None]  # [B, G, n_sink]
    outside = sink < block - overhang
    sink_index = sink + start
    sink_k, sink_v, sink_owner = read_sinks(keys, state, sink_index)
    seen = outside[:, :, None] & (queries[..., None] == sink_owner[:, :, None] - start)
    return Near(
        values=jnp.concatenate([sink_v, values], axis=3),
        one_hot=None if one_hot is None else jnp.pad(one_hot, (*((0, 0),) * 3, (form.n_sink, 0), (0, 0))),
        k_local=jnp.concatenate([sink_k, k_local], axis=3),
        coded=as_rows(jnp.pad(coded, (*((0, 0),) * 3, (form.n_sink, 0))), n_rep),
        exact=as_rows(jnp.concatenate([seen, exact], axis=3), n_rep),
        sees_far=sees_far,
        sink_index=jnp.where(outside & (sink_owner != NOWHERE), sink_index, -1),
    )


NOWHERE = -(2**31)  # the document of a key that is not there


def _index(form: Form, size: int) -> Array:
    """Indices of the delayed tokens of a super-block."""
    return jnp.arange(size, dtype=jnp.int32)[None] - form.overhang


def read_sinks(keys: Keys, state: VQState, index: Array) -> tuple[Array, Array, Array]:
    """Local keys and values `[B, K, G, N, .]`, documents `[B, G, N]` of tokens at `index [B, G, N]`."""
    length = keys.v.shape[1]
    place = index + state.position[:, None, None]  # in the document of the state; before it: of an older one
    old = jnp.clip(place, 0, state.sink_real.shape[1] - 1)
    new = jnp.clip(index, 0, length - 1)
    is_old = index < 0

    def pick(before: Array, x: Array) -> Array:
        older, newer = take_tokens(before, old), take_tokens(x, new)
        return jnp.where(is_old.reshape(*is_old.shape, *(1,) * (older.ndim - 3)), older, newer)

    real = pick(state.sink_real, keys.documents.real) & (~is_old | (place >= 0))
    owner = jnp.where(is_old, -state.position[:, None, None], take_tokens(keys.documents.start, new))
    sink_k, sink_v, codes = (
        pick(state.sink_k, keys.k_local),
        pick(state.sink_v, keys.v),
        jnp.where(is_old[..., None], 0, take_tokens(keys.codes, new)),
    )
    sink_v = poison_values(sink_k, jnp.where((codes < 0)[..., None], jnp.nan, sink_v))
    there = real[..., None, None]
    sink_k, sink_v = (jnp.moveaxis(jnp.where(there, x, 0), 3, 1) for x in (sink_k, sink_v))
    return sink_k, sink_v, jnp.where(real, owner, NOWHERE)


class Past(NamedTuple):
    """The far keys of every block, and in the last row those of the next super-block."""

    count: Array  # type: ignore[assignment]  # [B, K, G + 1, C] int32
    mean: Array  # [B, K, G + 1, C, V]


def add_up(coded: Coded, far: Far, form: Form) -> Past:
    """The far keys of every block, from those before the super-block and its delayed blocks.

    Means move by their difference to the mean before: a sum over a long sequence would lose
    precision.
    """
    acc = coded.mean.dtype
    n_key = jnp.sum(far.one_hot, axis=3, dtype=jnp.int32)  # [B, K, G, C]
    total = einsum("bkglc,bkglv->bkgcv", far.one_hot.astype(far.values.dtype), far.values)
    first_count, first_mean = coded.count[:, :, None], coded.mean[:, :, None]
    if not form.has_segments:
        count = first_count + running_sum(n_key)
        drift = running_sum(total - n_key[..., None].astype(acc) * first_mean)
        return Past(count, first_mean + drift / jnp.maximum(count, 1)[..., None].astype(acc))
    keep, is_first = far.keep[:, :, 1:], far.keep[:, None, :, :1]
    first_count = jnp.where(is_first, first_count, 0)
    first_mean = jnp.where(is_first[..., None], first_mean, 0)
    new = einsum("bgc,bkcs->bkgs", keep.astype(acc), n_key.astype(acc))  # exact: a step has under 2**24 keys
    count = first_count + new.astype(jnp.int32)
    drift = keep_sum(keep, total) - new[..., None] * first_mean
    return Past(count, first_mean + drift / jnp.maximum(count, 1)[..., None].astype(acc))


def keep_sum(keep: Array, x: Array) -> Array:
    """Sum over blocks c of `x [B, K, C, ..., .]` that `keep [B, G, C]` picks; NaN only where picked."""
    acc = x.dtype
    bad = ~jnp.isfinite(x)
    total = einsum("bgc,bkcsv->bkgsv", keep.astype(acc), jnp.where(bad, 0, x))
    n_bad = einsum("bgc,bkcsv->bkgsv", keep.astype(acc), bad.astype(acc))
    return jnp.where(n_bad > 0, jnp.nan, total)


def after(past: Past, far: Far, coded: Coded, start: Array | int) -> Coded:
    """The far keys of the next super-block."""
    begin = coded.start if far.start is None else far.start[:, -1] + start
    return Coded(past.count[:, :, -1], past.mean[:, :, -1], begin)


def running_sum(x: Array) -> Array:
    """Sums over the first 0, 1, ..., G entries of axis 2."""
    total = jnp.cumsum(x, axis=2, dtype=x.dtype)
    return jnp.concatenate([jnp.zeros_like(total[:, :, :1]), total], axis=2)


def to_blocks(x: Array, part_len: int) -> Array:
    """`[B, N, K, ...]` to `[B, K, G, L, ...]`, padded with zeros to whole blocks."""
    batch, length, n_head, *rest = x.shape
    n_block = -(-length // part_len)
    x = jnp.pad(x, ((0, 0), (0, n_block * part_len - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, n_block, part_len, n_head, *rest), 3, 1)


def from_blocks(x: Array) -> Array:
    """`[B, K, G, L, ...]` to `[B, G * L, K, ...]`."""
    batch, n_head, n_block, part_len, *rest = x.shape
    return jnp.moveaxis(x, 1, 3).reshape(batch, n_block * part_len, n_head, *rest)


def to_windows(x: Array, part_len: int, overhang: int, fill: int = 0) -> Array:
    """`[B, overhang + N, K, ...]` to `[B, K, G, overhang + L, ...]`: blocks with the tokens before them."""
    if not overhang:
        return to_blocks(x, part_len)
    n_block = -(-(x.shape[1] - overhang) // part_len)
    n_shift = -(-overhang // part_len) + 1
    short = (n_block + n_shift - 1) * part_len - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, max(short, 0))) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    blocks = to_blocks(x[:, : (n_block + n_shift - 1) * part_len], part_len)
    shifted = [lax.slice_in_dim(blocks, c, c + n_block, axis=2) for c in range(n_shift)]
    return jnp.concatenate(shifted, axis=3)[:, :, :, : overhang + part_len]


def from_windows(x: Array, part_len: int, overhang: int) -> Array:
    """The transpose of `to_windows`: sums what windows have in common, `[B, overhang + G * L, K, ...]`."""
    if not overhang:
        return from_blocks(x)
    n_block, n_shift = x.shape[2], -(-overhang // part_len) + 1
    pad = n_shift * part_len - x.shape[3]
    x = jnp.pad(x, (*((0, 0),) * 3, (0, pad), *((0, 0),) * (x.ndim - 4)))
    total: Array | int = 0
    for c in range(n_shift):
        part = lax.slice_in_dim(x, c * part_len, (c + 1) * part_len, axis=3)
        edges = (c, n_shift - 1 - c)
        total = total + jnp.pad(part, (*((0, 0),) * 2, edges, *((0, 0),) * (x.ndim - 3)))
    return from_blocks(jnp.asarray(total))[:, : overhang + n_block * part_len]


def as_rows(mask: Array, n_rep: int) -> Array:
    """`[B, G, L, W]` to `[B, 1, G, R * L, W]`: the same for every head."""
    return jnp.tile(mask, (1, 1, n_rep, 1))[:, None]


def to_rows(x: Array, part_len: int, n_head: int) -> Array:
    """`[B, N, K * R, ...]` of queries to `[B, K, G, R * L, ...]`."""
    batch, length, n_query, *rest = x.shape
    x = to_blocks(x.reshape(batch, length, n_head, n_query // n_head, *rest), part_len)
    x = jnp.swapaxes(x, 3, 4)
    return x.reshape(*x.shape[:3], -1, *rest)


def from_rows(x: Array, part_len: int) -> Array:
    """`[B, K, G, R * L, ...]` to `[B, G * L, K * R, ...]`."""
    batch, n_head, n_block, n_row, *rest = x.shape
    x = jnp.swapaxes(x.reshape(batch, n_head, n_block, n_row // part_len, part_len, *rest), 3, 4)
    x = from_blocks(x)
    return x.reshape(batch, n_block * part_len, -1, *rest)
