"""Counts and mean values per key code of attention that is not causal: sums by segment, added up."""

import jax.numpy as jnp
from jax import Array

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import F32, why_not_here
from jax_vq.kernels.vq_causal import MAX_LENGTH, segment_len
from jax_vq.kernels.vq_sums import segment_sums
from jax_vq.ops.implementations import Kernel, add_kernel
from jax_vq.ops.vq_blocks import Keys
from jax_vq.ops.vq_causal import Books
from jax_vq.ops.vq_full import Seen


def why_not(asked: str | None, keys: Keys, books: Books) -> str | None:
    """Why `count_keys` cannot run, or None."""
    if keys.documents is not None:
        return "padding: the kernel is for whole sequences"
    if keys.v.dtype != jnp.bfloat16:
        return f"values of {keys.v.dtype}: the kernel is for bfloat16"
    if keys.v.shape[1] > MAX_LENGTH:
        return f"{keys.v.shape[1]} tokens: the kernel counts to {MAX_LENGTH}"
    return why_not_here(asked)


def count_keys(keys: Keys, books: Books) -> Seen:
    """`ops.vq_full.count_keys`."""
    batch, length, n_head, _ = keys.v.shape
    n_code = books.k.shape[1]
    each = segment_len(length, batch * n_head, sizes.SUMS.tile)
    sums = segment_sums(keys.codes, keys.v, n_code, each)
    count = jnp.sum(sums.numbers[..., :n_code].astype(jnp.int32), axis=2, dtype=jnp.int32)
    total = jnp.sum(sums.vectors[..., :n_code, :], axis=2)
    return Seen(count, total / _at_least_one(count)[..., None])


def _at_least_one(count: Array) -> Array:
    return jnp.maximum(count, 1).astype(F32)


add_kernel("count_keys", Kernel(count_keys, why_not))
