"""Weights of causal attention where scores of one code differ too much to be relative to their maximum."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plt

from jax_vq.kernels.tiles import lower_triangle, read_rows


def wide_weights(
    score_ref: Any, head: Any, query: Array, key: Array, counts: list[Array], chunk: int
) -> tuple[list[Array], Array, Array]:
    """In a kernel, weights of all codes and of the keys of a tile, and the score that they are relative to.

    That is the largest of the keys that a query sees.

    Args:
      score_ref: `[H, Cq, C]`.
      query, key: codes of a tile, `[T]`.
      counts: of the keys before the tile, `[C]` of every chunk of codes.

    Returns:
      `[T, C]` of every chunk, `[T, T]`, `[T]`.
    """
    far, shape = [], (query.shape[0], key.shape[0])
    for c, count in enumerate(counts):
        score = read_rows(score_ref, head, query, c * chunk, chunk)
        far.append(jnp.where(count[None, :] > 0, score, -jnp.inf))
    pair = (
        jnp.broadcast_to(jnp.maximum(query, 0)[:, None], shape),
        jnp.broadcast_to(jnp.maximum(key, 0)[None, :], shape),
    )
    is_seen = lower_triangle(query.shape[0]) & (key >= 0)[None, :]
    near = jnp.where(is_seen, plt.load(score_ref.at[head, *pair]), -jnp.inf)
    top = jnp.max(near, axis=1)
    for score in far:
        top = jnp.maximum(top, jnp.max(score, axis=1))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    return [jnp.exp(score - top[:, None]) for score in far], jnp.exp(near - top[:, None]), top
