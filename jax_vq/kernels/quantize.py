"""Nearest codes in one pass: a product with the codebook whose scores never leave the chip."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import sizes
from jax_vq.kernels.tiles import (
    F32,
    N_PART,
    columns,
    dot_t,
    launch,
    loop,
    power_of_two,
    read_numbers,
    read_vectors,
    split,
    tokens,
    write_numbers,
)
from jax_vq.ops.implementations import Kernel


def finite_codes(x: Array, codebook: Array) -> Array:
    """`ops.vq_attention.finite_codes`: int32 `[B, T, H]`, -1 for a vector with NaN or inf.

    Scores are products of x with the codebook in float32, summed in another order than XLA sums them:
    codes are the same where the two best scores differ by more than rounding. Two of the codebook's three
    terms do for a tile of vectors unless the third one, at most `|x| |c_3|` of a score, could change which
    code is best, or a score is not finite: such a tile is left to a second kernel, which takes in all.
    """
    batch, length, n_head, width = x.shape
    n_code, n_row = codebook.shape[1], x.shape[0] * n_head
    size = sizes.size_of("codes", n_code)
    chunk = min(power_of_two(n_code), size.chunk)
    small = sizes.size_of("codes", chunk)
    by_chunks = n_code > chunk and sizes.n_tile(length, n_row, small.tile) > 1
    size = small if by_chunks else size
    per_program = sizes.n_tile(length, n_row, size.tile)
    n_padded = pl.cdiv(n_code, chunk) * chunk
    padding = (0, 0), (0, n_padded - n_code), (0, power_of_two(width) - width)
    half = jnp.sum(codebook.astype(F32) ** 2, axis=-1) / 2
    half = jnp.pad(half, padding[:2], constant_values=jnp.inf)
    parts = split(jnp.pad(codebook.astype(F32), padding), 1 if codebook.dtype == jnp.bfloat16 else N_PART)
    last = jnp.max(jnp.sum(parts[-1].astype(F32) ** 2, axis=-1), axis=-1)  # [H] largest |c_3|^2
    grid = pl.cdiv(pl.cdiv(length, size.tile), per_program), n_row
    codes = jax.ShapeDtypeStruct((batch, length, n_head), jnp.int32)
    is_open = jax.ShapeDtypeStruct((n_row, grid[0] * per_program), jnp.int32)
    kernel = partial(_codes_kernel, tile=size.tile, n_tile=per_program, chunk=chunk)
    arrays = x, jnp.concatenate(parts), half
    if by_chunks:
        score = jax.ShapeDtypeStruct(codes.shape, F32)
        results = score, score, codes, is_open
        run = launch(kernel, results, grid, size.n_warp, size.n_stage, {5: 0, 6: 1, 7: 2})
        found = _by_chunks(run, x, parts, half, last, chunk, results)
    else:
        found = launch(kernel, (codes, is_open), grid, size.n_warp, size.n_stage)(*arrays, last)
    settle = launch(partial(kernel, settles=True), codes, grid, size.n_warp, 1, {len(arrays): 0})
    return settle(*arrays, *found)


def _by_chunks(
    run: Any, x: Array, parts: list[Array], half: Array, last: Array, chunk: int, results: Any
) -> tuple[Array, Array]:
    """Codes, and which tiles are open, from one call of a kernel after another, each of a chunk of codes.

    A program keeps its chunk on the chip for all its vectors; where it takes in all chunks for every tile of
    vectors, that is what it waits for.
    """

    def part(array: Array, c: Any) -> Array:
        return lax.dynamic_slice_in_dim(array, c * chunk, chunk, axis=1)

    def step(c: Any, found: Any) -> Any:
        first = jnp.full((x.shape[2],), c * chunk, jnp.int32)
        book = jnp.concatenate([part(term, c) for term in parts])
        return tuple(run(x, book, part(half, c), last, first, *found[:3]))

    fills = -jnp.inf, -jnp.inf, 0, 0
    start = tuple(jnp.full(like.shape, fill, like.dtype) for like, fill in zip(results, fills, strict=True))
    found = lax.fori_loop(0, half.shape[1] // chunk, step, start)
    return found[2], found[3]


def nearest_codes(x: Array, codebook: Array) -> Array:
    """`ops.quantize.nearest_codes`, of checked arguments."""
    return jnp.maximum(finite_codes(x, codebook), 0)


def why_not(asked: str | None, x: Array, codebook: Array) -> str | None:
    """Why `finite_codes` cannot run, or None."""
    if x.dtype != jnp.bfloat16:
        return f"nearest codes of {x.dtype}: the kernel is for bfloat16"
    if x.shape[3] > sizes.MAX_WIDTH:
        return f"width {x.shape[3]}: the kernel is for at most {sizes.MAX_WIDTH}"
    if asked is None and x.shape[0] * x.shape[1] < sizes.MIN_VECTORS:
        return f"{x.shape[0] * x.shape[1]} vectors a head: the kernel is for {sizes.MIN_VECTORS} or more"
    return None


class Best(NamedTuple):
    """Of the codes so far, for each vector of a tile."""

    score: Array
    second: Array  # the best score of all other codes
    code: Array

    def merged(self, new: "Best", first: Any) -> "Best":
        """With later codes, which are counted from `first` on."""
        second = jnp.maximum(jnp.maximum(self.second, new.second), jnp.minimum(self.score, new.score))
        code = jnp.where(new.score > self.score, new.code + first, self.code)
        return Best(jnp.maximum(self.score, new.score), second, code)


def _codes_kernel(
    x_ref: Any,
    part_ref: Any,
    half_ref: Any,
    *refs: Any,
    tile: int,
    n_tile: int,
    chunk: int,
    settles: bool = False,
) -> None:
    """All tiles by the first terms of the codebook, or those that this left open by all terms.

    With more refs the codebook is one chunk of it, whose codes are better or worse than those before.
    """
    _, length, n_head, width = x_ref.shape
    n_part, (n_code, n_column) = part_ref.shape[0] // n_head, part_ref.shape[1:]
    group, row = pl.program_id(0), pl.program_id(1)
    batch, head = row // n_head, row % n_head
    cols = columns(0, n_column, width)
    n_term = n_part if settles else max(n_part - 1, 1)

    def book(c: Any) -> Any:
        at = pl.ds(c * chunk, chunk)
        parts = [plt.load(part_ref.at[p * n_head + head, at, :]) for p in range(n_term)]
        return parts, plt.load(half_ref.at[head, at])

    def best(x: Array, parts: list[Array], half: Array) -> Best:
        score = sum((dot_t(x, part) for part in parts[1:]), dot_t(x, parts[0])) - half[None, :]
        code = lax.argmax(score, 1, jnp.int32)
        is_best = lax.broadcasted_iota(jnp.int32, score.shape, 1) == code[:, None]
        return Best(jnp.max(score, axis=1), jnp.max(jnp.where(is_best, -jnp.inf, score), axis=1), code)

    whole = book(0) if n_code == chunk and not settles else None

    def find(x: Array) -> Best:
        if n_code == chunk:
            return best(x, *(whole or book(0)))

        def more(c: Any, old: Best) -> Best:
            return old.merged(best(x, *book(c)), c * chunk)

        nothing = jnp.full((tile,), -jnp.inf, F32)
        return loop(n_code // chunk, more, Best(nothing, nothing, jnp.zeros((tile,), jnp.int32)))

    first_code = plt.load(refs[1].at[head]) if len(refs) > 3 else 0

    def rows_of(i: Any) -> Any:
        return tokens((group * n_tile + i) * tile, tile, length)

    def first(i: Any, carry: Any) -> Any:
        last_ref, *before, code_ref, open_ref = refs
        rows = rows_of(i)
        x = read_vectors(x_ref, batch, rows, head, cols)
        found = find(x)
        if before:
            _, *old, score_ref, second_ref = before
            found = Best(*(read_numbers(ref, batch, rows, head, 0) for ref in old)).merged(found, first_code)
            write_numbers(score_ref, batch, rows, head, found.score)
            write_numbers(second_ref, batch, rows, head, found.second)
        is_open = ~(jnp.abs(found.score) < jnp.inf)
        if n_part > 1:
            reach = jnp.sqrt(jnp.sum(x.astype(F32) ** 2, axis=1) * plt.load(last_ref.at[head]))
            is_open = is_open | (found.score - found.second <= 2 * reach)
        write_numbers(code_ref, batch, rows, head, found.code)
        plt.store(open_ref.at[row, group * n_tile + i], jnp.max((is_open & rows[1]).astype(jnp.int32)))
        return carry

    def settle(i: Any, carry: Any) -> Any:
        _, open_ref, code_ref = refs

        @pl.when(plt.load(open_ref.at[row, group * n_tile + i]) > 0)
        def run() -> None:
            rows = rows_of(i)
            x = read_vectors(x_ref, batch, rows, head, cols)
            finite = jnp.min((jnp.abs(x.astype(F32)) < jnp.inf).astype(jnp.int32), axis=1)
            write_numbers(code_ref, batch, rows, head, jnp.where(finite > 0, find(x).code, -1))

        return carry

    loop(n_tile, settle if settles else first, 0)


KERNELS = {"finite_codes": Kernel(finite_codes, why_not), "nearest_codes": Kernel(nearest_codes, why_not)}
