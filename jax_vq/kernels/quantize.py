"""Nearest codes in one pass: a product with the codebook whose scores never leave the chip."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import hopper_codes, sizes
from jax_vq.kernels.tiles import (
    F32,
    NARROW,
    columns,
    dot,
    dot_parts,
    launch,
    loop,
    parts_of,
    power_of_two,
    read_vectors,
    tokens,
    write_numbers,
)
from jax_vq.ops.implementations import Kernel
from jax_vq.ops.numerics import N_PART, split

UNUSED = 1e38  # half the squared length of a code that is none: never the nearest
LIST_TILE = 1024  # codes of a tile that is looked through for open ones
MANTISSA = 23  # bits of a float32 number
ROUNDING = 2.0**-20  # of a sum that a tensor core adds up, more than it is off
SQUARE_ERROR = 1.01  # of the root of a sum of bfloat16 squares, more than it is off
F16_STEP = 2.0**-24  # between the least float16 numbers
BRIEF = 2**19  # vectors times chunks of codes, up to which a float16 codebook gains nothing


class Near(NamedTuple):
    """A codebook that most codes are found by; codes and D are padded."""

    book: Array  # [H, C, D] float16
    half: Array  # [H, C] float32, `|c|^2 / 2`
    off: Array  # [2 * H] float32: how far a score is off at most, relative to |x| and besides

    @classmethod
    def of(cls, codebook: Array, n_padded: int) -> "Near":
        book = _padded(codebook.astype(F32), n_padded)
        square = jnp.sum(book**2, axis=-1)
        near = lax.reduce_precision(book, exponent_bits=5, mantissa_bits=10)  # a cast to and fro would vanish
        rest = jnp.sum((book - near) ** 2, axis=-1)
        rest = jnp.max(jnp.where(jnp.isfinite(square), rest, jnp.inf), axis=-1)
        most = jnp.max(square, axis=-1)
        relative = SQUARE_ERROR * (jnp.sqrt(rest) + ROUNDING * jnp.sqrt(most))
        besides = jnp.sqrt(codebook.shape[2] * most) * F16_STEP + ROUNDING * most
        half = jnp.where(jnp.arange(n_padded) < codebook.shape[1], square / 2, UNUSED)
        return cls(near.astype(jnp.float16), half, jnp.concatenate([relative, besides]))

    def bias(self) -> Array:
        """`[H, NARROW, C]` bfloat16 that sum to `-|c|^2 / 2`."""
        return jnp.pad(jnp.stack(split(-self.half), axis=1), ((0, 0), (0, NARROW - N_PART), (0, 0)))


def _padded(codebook: Array, n_padded: int) -> Array:
    """`[H, C, D]` with zeros for the codes and features that are added."""
    _, n_code, width = codebook.shape
    return jnp.pad(codebook, ((0, 0), (0, n_padded - n_code), (0, power_of_two(width) - width)))


def finite_codes(x: Array, codebook: Array) -> Array:
    """`ops.vq_attention.finite_codes`: int32 `[B, T, H]`, -1 for a vector with NaN or inf.

    Scores are products of x with the codebook in float32, summed in another order than XLA sums them:
    codes are the same where the two best scores differ by more than rounding. The codebook in float16 does
    for a vector unless what that leaves of it, at most `|x| |c - float16(c)|` of a score, could change which
    code is best, or a score is not finite. Those vectors are listed, some 2 % of Gaussian ones, and a second
    kernel gathers them and takes in all bits. Of few vectors that is all there is.
    """
    batch, length, n_head, _ = x.shape
    n_code, n_row = codebook.shape[1], batch * n_head
    size = sizes.size_of("codes", n_code)
    chunk = min(power_of_two(n_code), size.chunk)
    n_chunk = pl.cdiv(n_code, chunk)
    whole = jnp.swapaxes(_padded(codebook, n_chunk * chunk), 1, 2)
    codes = jax.ShapeDtypeStruct((batch, length, n_head), jnp.int32)
    if n_chunk * length * n_row <= BRIEF:
        every = sizes.size_of("every_code", n_code)
        n_tile = sizes.n_tile_resident(length, n_row, every.tile)
        at_once = min(chunk, every.chunk)
        kernel = partial(_exact_kernel, tile=every.tile, chunk=at_once, n_code=n_code, n_tile=n_tile)
        grid = pl.cdiv(pl.cdiv(length, every.tile), n_tile), n_row
        return launch(kernel, codes, grid, every.n_warp, every.n_stage)(x, whole)
    near = Near.of(codebook, n_chunk * chunk)
    by_hopper = hopper_codes.is_usable(x, n_chunk * chunk)
    tile = LIST_TILE if by_hopper else size.tile
    n_tile = sizes.n_tile(length, n_row, tile)
    grid = pl.cdiv(pl.cdiv(length, tile), n_tile), n_row
    listed = (
        codes,
        jax.ShapeDtypeStruct((n_row, grid[0], (n_tile + 1) * tile), jnp.int32),
        jax.ShapeDtypeStruct((n_row, grid[0]), jnp.int32),
    )
    if by_hopper:
        rounding = 2.0 ** ((chunk - 1).bit_length() - MANTISSA)
        found = hopper_codes.first_codes(x, near.book, near.half, near.off, rounding)
        found = launch(partial(_list_kernel, tile=tile, n_tile=n_tile), listed, grid, 8, 1)(found)
    else:
        kernel, how = partial(_first_kernel, tile=tile, n_tile=n_tile, chunk=chunk), size[3:]
        arrays = x, jnp.swapaxes(near.book, 1, 2), near.bias(), near.off
        known = _best_of_all_but_the_last(kernel, grid, how, arrays, chunk)
        found = launch(partial(kernel, is_last=True), listed, grid, *how)(*arrays, *known)
    few = sizes.size_of("settle", n_code)
    settle = partial(_exact_kernel, tile=few.tile, chunk=min(chunk, few.chunk), n_code=n_code)
    return launch(settle, codes, grid, few.n_warp, few.n_stage, {4: 0})(x, whole, *found[1:], found[0])


def _best_of_all_but_the_last(
    kernel: Any, grid: tuple[int, int], how: tuple[int, int], arrays: tuple[Array, ...], chunk: int
) -> tuple[Array, ...]:
    """`Best` and where the last codes start, from one call after another, each of a chunk of codes.

    A chunk stays on the chip for all vectors of a program. What is known of a vector is kept head by head
    meanwhile, so that a program reads numbers that lie side by side. Nothing where there is one chunk.
    """
    x, book, *_ = arrays
    n_step = book.shape[2] // chunk - 1
    if not n_step:
        return ()
    batch, length, n_head, _ = x.shape
    shape = batch * n_head, length
    best = Best(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (F32, F32, jnp.int32)))
    run = launch(kernel, best, grid, *how, {4 + i: i for i in range(len(best))})
    nothing = jnp.full(shape, -jnp.inf, F32)

    def first(i: Any) -> Array:
        return jnp.full(n_head, i * chunk, jnp.int32)

    def step(i: Any, found: Any) -> Any:
        return tuple(run(*arrays, *found, first(i)))

    found = lax.fori_loop(0, n_step, step, (nothing, nothing, jnp.zeros(shape, jnp.int32)))
    return *found, first(n_step)


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

    def merged(self, new: "Best") -> "Best":
        """With later codes."""
        second = jnp.maximum(jnp.maximum(self.second, new.second), jnp.minimum(self.score, new.score))
        code = jnp.where(new.score > self.score, new.code, self.code)
        return Best(jnp.maximum(self.score, new.score), second, code)

    def is_open(self, reach: Array, n_bit: int) -> Array:
        """Whether another code may be the best of all; also of scores that are not finite.

        Args:
          reach: how far a score may be off, besides its last bits.
          n_bit: of a score, which a code took.
        """
        rounding = (jnp.abs(self.score) + jnp.abs(self.second)) * 2.0 ** (n_bit - MANTISSA)
        return ~(self.score - self.second > 2 * reach + rounding)


def _best(score: Array, first: Any) -> Best:
    """Of `[T, C]` scores of codes from `first` on.

    A code's number takes the last bits of its score, so that one maximum gives both.
    """
    last = np.int32(score.shape[1] - 1)
    code = lax.broadcasted_iota(jnp.int32, score.shape, 1)
    score = lax.bitcast_convert_type(lax.bitcast_convert_type(score, jnp.int32) & ~last | code, F32)
    best = jnp.max(score, axis=1)
    second = jnp.max(jnp.where(score == best[:, None], -jnp.inf, score), axis=1)
    return Best(best, second, first + (lax.bitcast_convert_type(best, jnp.int32) & last))


def _first_kernel(
    x_ref: Any,
    book_ref: Any,
    bias_ref: Any,
    off_ref: Any,
    *refs: Any,
    tile: int,
    n_tile: int,
    chunk: int,
    is_last: bool = False,
) -> None:
    """Codes by `Near`, and at last a list of the vectors that it leaves open.

    With more inputs these are a chunk of the codes, from a first one on: better or worse than those before.
    """
    _, length, n_head, width = x_ref.shape
    known_refs = refs[: len(Best._fields)] if len(refs) > 3 else ()
    group, row = pl.program_id(0), pl.program_id(1)
    batch, head = row // n_head, row % n_head
    cols = columns(0, book_ref.shape[1], width)
    start = plt.load(refs[len(known_refs)].at[head]) if known_refs else 0
    at = pl.ds(start, chunk)
    # Read as a product takes it: a transposition would be made anew for every tile.
    book, bias = plt.load(book_ref.at[head, :, at]), plt.load(bias_ref.at[head, :, at])
    ones = jnp.ones((cols[0].size, NARROW), x_ref.dtype)
    relative, besides = (plt.load(off_ref.at[i * n_head + head]) for i in range(2))

    def step(i: Any, n_open: Any) -> Any:
        rows = tokens((group * n_tile + i) * tile, tile, length)
        x = read_vectors(x_ref, batch, rows, head, cols)
        # Of this tile, so that it is no constant: products with one would be kept in registers.
        there = jnp.broadcast_to(rows[1][:, None], (tile, NARROW)).astype(bias_ref.dtype)
        found = _best(dot(there, bias) + dot(x.astype(book.dtype), book), start)
        if known_refs:
            known = (plt.load(ref.at[row, rows[0]], mask=rows[1], other=0) for ref in known_refs)
            found = Best(*known).merged(found)
        if not is_last:
            for ref, now in zip(refs[-3:], found, strict=True):
                plt.store(ref.at[row, rows[0]], now, mask=rows[1])
            return n_open
        code_ref, list_ref, _ = refs[-3:]
        write_numbers(code_ref, batch, rows, head, found.code)
        square = jnp.max(dot(x * x, ones), axis=1)
        reach = jnp.sqrt(square) * relative + besides
        is_open = found.is_open(reach, (chunk - 1).bit_length()) & rows[1]
        return _add_to_list(list_ref, (row, group), is_open, rows[0].start, n_open, n_tile * tile)

    n_open = loop(n_tile, step, jnp.int32(0))
    if is_last:
        plt.store(refs[-1].at[row, group], n_open)


def _add_to_list(ref: Any, place: tuple[Any, Any], is_open: Array, first: Any, n_open: Any, end: int) -> Any:
    """Write the open tokens of a tile behind those before it, the others behind `end`; their number."""
    number, each = is_open.astype(jnp.int32), jnp.arange(is_open.shape[0], dtype=jnp.int32)
    entry = jnp.where(is_open, n_open + jnp.cumsum(number) - 1, end + each)
    plt.store(ref.at[*place, entry], first + each)
    return n_open + jnp.sum(number)


def _list_kernel(
    found_ref: Any, code_ref: Any, list_ref: Any, number_ref: Any, *, tile: int, n_tile: int
) -> None:
    """Codes of `hopper_codes`, and a list of the vectors that it leaves open."""
    _, length, n_head = code_ref.shape
    group, row = pl.program_id(0), pl.program_id(1)

    def step(i: Any, n_open: Any) -> Any:
        rows = tokens((group * n_tile + i) * tile, tile, length)
        found = plt.load(found_ref.at[row, rows[0]], mask=rows[1], other=0)
        write_numbers(code_ref, row // n_head, rows, row % n_head, jnp.where(found < 0, -1 - found, found))
        return _add_to_list(list_ref, (row, group), found < 0, rows[0].start, n_open, n_tile * tile)

    plt.store(number_ref.at[row, group], loop(n_tile, step, jnp.int32(0)))


def _exact_kernel(
    x_ref: Any,
    book_ref: Any,
    *refs: Any,
    tile: int,
    chunk: int,
    n_code: int,
    n_tile: int | None = None,
) -> None:
    """Codes by all bits of the codebook: of the listed vectors, or of `n_tile` tiles."""
    code_ref = refs[-1]
    _, length, n_head, width = x_ref.shape
    n_column, n_padded = book_ref.shape[1:]
    group, row = pl.program_id(0), pl.program_id(1)
    batch, head = row // n_head, row % n_head

    def read_book(c: Any) -> tuple[list[Array], Array]:
        at = pl.ds(c * chunk, chunk)
        book = plt.load(book_ref.at[head, :, at])
        half = jnp.sum(book.astype(F32) ** 2, axis=0) / 2
        there = c * chunk + jnp.arange(chunk, dtype=jnp.int32) < n_code
        return parts_of(book, book.dtype), jnp.where(there, half, UNUSED)

    book = read_book(jnp.int32(0)) if n_padded == chunk else None

    def find(x: Array) -> Array:
        def more(c: Any, known: Any) -> Any:
            parts, half = book or read_book(c)
            score = dot_parts([x], parts) - half[None, :]
            best = jnp.max(score, axis=1)
            column = lax.broadcasted_iota(jnp.int32, score.shape, 1)
            code = c * chunk + jnp.min(jnp.where(score == best[:, None], column, chunk - 1), axis=1)
            is_better = best > known[0]
            return jnp.where(is_better, best, known[0]), jnp.where(is_better, code, known[1])

        start = jnp.full((tile,), -jnp.inf, F32), jnp.zeros((tile,), jnp.int32)
        _, code = loop(n_padded // chunk, more, start)
        finite = jnp.min((jnp.abs(x.astype(F32)) < jnp.inf).astype(jnp.int32), axis=1)
        return jnp.where(finite > 0, code, -1)

    if n_tile is not None:
        first = group * n_tile

        def of_tile(i: Any, carry: Any) -> Any:
            rows = tokens((first + i) * tile, tile, length)
            x = read_vectors(x_ref, batch, rows, head, columns(0, n_column, width))
            write_numbers(code_ref, batch, rows, head, find(x))
            return carry

        loop(n_tile, of_tile, 0)
        return
    list_ref, number_ref, _, _ = refs
    n_listed = plt.load(number_ref.at[row, group])
    feature = lax.broadcasted_iota(jnp.int32, (tile, n_column), 1)

    def of_list(i: Any, carry: Any) -> Any:
        entry = jnp.minimum(i * tile + jnp.arange(tile, dtype=jnp.int32), n_listed - 1)
        token = plt.load(list_ref.at[row, group, entry])
        at = jnp.broadcast_to(token[:, None], feature.shape)
        x = plt.load(x_ref.at[batch, at, head, jnp.minimum(feature, width - 1)])
        plt.store(code_ref.at[batch, token, head], find(jnp.where(feature < width, x, jnp.zeros_like(x))))
        return carry

    lax.fori_loop(0, pl.cdiv(n_listed, tile), of_list, 0)


KERNELS = {"finite_codes": Kernel(finite_codes, why_not), "nearest_codes": Kernel(nearest_codes, why_not)}
