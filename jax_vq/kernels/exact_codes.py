"""Nearest codes by all bits of the codebook: of few vectors, or of those that a list names.

A program splits a chunk of codes into parts for products once, and goes over all of its tiles of vectors with
them. With several chunks, the best score and code of a vector so far are in memory.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import (
    F32,
    barrier,
    columns,
    dot_parts,
    inside,
    launch,
    loop,
    parts_of,
    power_of_two,
    tokens,
)


def of_all(vectors: Sequence[Array], codebooks: Sequence[Array]) -> list[Array]:
    """Codes `[B, H, T]` of each array, by one kernel: -1 for a vector with NaN or inf."""
    size = sizes.size_of("every_code", max(book.shape[1] for book in codebooks))
    n_row = sum(x.shape[0] * x.shape[2] for x in vectors)
    length = max(x.shape[1] for x in vectors)
    n_tile = sizes.n_tile_resident(length, n_row, size.tile)
    kernel = partial(_all_kernel, n_array=len(vectors), tile=size.tile, chunk=size.chunk, n_tile=n_tile)
    found = [jax.ShapeDtypeStruct(_shape(x), kind) for kind in (jnp.int32, F32) for x in vectors]
    grid = pl.cdiv(pl.cdiv(length, size.tile), n_tile), n_row
    codes = launch(kernel, found, grid, size.n_warp, size.n_stage)(*vectors, *codebooks)
    return list(codes[: len(vectors)])


def of_listed(x: Array, codebook: Array, listed: tuple[Array, Array], codes: Array) -> Array:
    """`codes [B, H, T]` with those of some vectors found anew.

    Args:
      listed: `[B * H, N]` tokens of each head, and how many of them count.
    """
    size = sizes.size_of("settle", codebook.shape[1])
    n_row = x.shape[0] * x.shape[2]
    grid = max(sizes.N_RESIDENT // n_row, 1), n_row
    found = [jax.ShapeDtypeStruct(codes.shape, kind) for kind in (jnp.int32, F32)]
    kernel = partial(_listed_kernel, tile=size.tile, chunk=size.chunk)
    run = launch(kernel, found, grid, size.n_warp, size.n_stage, {4: 0})
    found_codes: Array = run(x, codebook, *listed, codes)[0]
    return found_codes


def _shape(x: Array) -> tuple[int, int, int]:
    batch, length, n_head, _ = x.shape
    return batch, n_head, length


def _all_kernel(*refs: Any, n_array: int, tile: int, chunk: int, n_tile: int) -> None:
    """Some tiles of a head of one of the arrays."""
    start = pl.program_id(0) * (n_tile * tile)

    def tokens_of(i: Any, length: int) -> tuple[Array, Array]:
        token = start + i * tile + jnp.arange(tile, dtype=jnp.int32)
        return token, token < length

    first = 0
    for own_refs in (refs[i::n_array] for i in range(n_array)):
        batch, length, n_head, _ = own_refs[0].shape
        row = pl.program_id(1) - first
        first += batch * n_head

        @pl.when((row >= 0) & (row < batch * n_head))
        def run(own_refs: Any = own_refs, row: Any = row, length: int = length) -> None:
            _find(own_refs, row, partial(tokens_of, length=length), np.int32(n_tile), tile, chunk)


def _listed_kernel(
    x_ref: Any,
    book_ref: Any,
    list_ref: Any,
    number_ref: Any,
    _: Any,
    code_ref: Any,
    best_ref: Any,
    *,
    tile: int,
    chunk: int,
) -> None:
    """Every so many-th tile of the list of a head."""
    program, row, n_program = pl.program_id(0), pl.program_id(1), pl.num_programs(0)
    number = plt.load(number_ref.at[row])

    def tokens_of(i: Any) -> tuple[Array, Array]:
        entry = (program + i * n_program) * tile + jnp.arange(tile, dtype=jnp.int32)
        there = entry < number
        return plt.load(list_ref.at[row, entry], mask=there, other=x_ref.shape[1]), there

    n_own = pl.cdiv(pl.cdiv(number, tile) - program, n_program)
    _find((x_ref, book_ref, code_ref, best_ref), row, tokens_of, n_own, tile, chunk)


def _find(
    refs: Sequence[Any],
    row: Any,
    tokens_of: Callable[[Any], tuple[Array, Array]],
    n_tile: Any,
    tile: int,
    chunk: int,
) -> None:
    """Write the codes of a head's tiles: `tokens_of` gives those of one, and which of them there are.

    Those that there are not lie behind the sequence.
    """
    x_ref, book_ref, code_ref, best_ref = refs
    n_head, n_code, width = book_ref.shape
    batch, head = row // n_head, row % n_head
    n_column, chunk = power_of_two(width), min(power_of_two(n_code), chunk)
    n_chunk = pl.cdiv(n_code, chunk)

    def of_chunk(c: Any, carry: Any) -> Any:
        codes, cols = tokens(c * chunk, chunk, n_code), columns(0, n_column, width)
        book = plt.load(book_ref.at[head, codes[0], cols[0]], mask=inside(codes, cols), other=0)
        half = jnp.where(codes[1], jnp.sum(book.astype(F32) ** 2, axis=1) / 2, jnp.inf)
        parts = [part.T for part in parts_of(book, book.dtype)]
        if n_chunk > 1:
            barrier()

        def of_tile(i: Any, carry: Any) -> Any:
            token, there = tokens_of(i)
            feature = lax.broadcasted_iota(jnp.int32, (tile, n_column), 1)
            at = batch, jnp.broadcast_to(token[:, None], feature.shape), head, feature
            x = plt.load(x_ref.at[at], mask=there[:, None] & (feature < width), other=0)
            score = dot_parts([x], parts) - half[None, :]
            best = jnp.max(score, axis=1)
            column = lax.broadcasted_iota(jnp.int32, score.shape, 1)
            code = c * chunk + jnp.min(jnp.where(score == best[:, None], column, chunk - 1), axis=1)
            known, known_code = jnp.full_like(best, -jnp.inf), jnp.zeros_like(code)
            if n_chunk > 1:
                is_known = there & (c > 0)
                known = plt.load(best_ref.at[batch, head, token], mask=is_known, other=-jnp.inf)
                known_code = plt.load(code_ref.at[batch, head, token], mask=is_known, other=0)
                plt.store(best_ref.at[batch, head, token], jnp.maximum(best, known), mask=there)
            code = jnp.where(best > known, code, known_code)
            finite = jnp.min((jnp.abs(x.astype(F32)) < jnp.inf).astype(jnp.int32), axis=1)
            plt.store(code_ref.at[batch, head, token], jnp.where(finite > 0, code, -1), mask=there)
            return carry

        return lax.fori_loop(np.int32(0), n_tile, of_tile, carry)

    loop(n_chunk, of_chunk, 0)
