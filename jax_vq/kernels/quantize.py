"""Nearest codes in one pass: a product with the codebook whose scores never leave the chip."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels import exact_codes, hopper_codes, sizes
from jax_vq.kernels.tiles import (
    F32,
    NARROW,
    by_head,
    columns,
    dot,
    launch,
    loop,
    power_of_two,
    read_vectors,
    tokens,
)
from jax_vq.ops.implementations import Kernel
from jax_vq.ops.numerics import N_PART, split

UNUSED = 1e38  # half the squared length of a code that is none: never the nearest
LIST_TILE, LIST_WARPS = 1024, 8  # codes of a tile that is looked through for open ones
MANTISSA = 23  # bits of a float32 number
ROUNDING = 2.0**-20  # of a sum that a tensor core adds up, more than it is off
SQUARE_ERROR = 1.01  # of the root of a sum of bfloat16 squares, more than it is off
BRIEF = 2**19  # vectors times chunks of codes, up to which a float16 codebook gains nothing


class Near(NamedTuple):
    """A codebook that most codes are found by; codes and D are padded."""

    book: Array  # [H, C, D] float16
    half: Array  # [H, C] float32, `|c|^2 / 2`
    off: Array  # [3 * H] float32: how far a score is off, relative to |x| and besides; the largest |c|

    @classmethod
    def of(cls, codebook: Array, n_padded: int) -> "Near":
        _, n_code, width = codebook.shape
        padding = (0, 0), (0, n_padded - n_code), (0, power_of_two(width) - width)
        book = jnp.pad(codebook.astype(F32), padding)
        square = jnp.sum(book**2, axis=-1)
        near = lax.reduce_precision(book, exponent_bits=5, mantissa_bits=10)  # a cast to and fro would vanish
        rest = jnp.sum((book - near) ** 2, axis=-1)
        rest = jnp.max(jnp.where(jnp.isfinite(square), rest, jnp.inf), axis=-1)
        most = jnp.max(square, axis=-1)
        relative = SQUARE_ERROR * (jnp.sqrt(rest) + ROUNDING * jnp.sqrt(most))
        besides = jnp.sqrt(width * most) * hopper_codes.F16_STEP + ROUNDING * most
        half = jnp.where(jnp.arange(n_padded) < n_code, square / 2, UNUSED)
        return cls(near.astype(jnp.float16), half, jnp.concatenate([relative, besides, jnp.sqrt(most)]))

    def bias(self) -> Array:
        """`[H, NARROW, C]` bfloat16 that sum to `-|c|^2 / 2`."""
        return jnp.pad(jnp.stack(split(-self.half), axis=1), ((0, 0), (0, NARROW - N_PART), (0, 0)))


def finite_codes(vectors: Sequence[Array], codebooks: Sequence[Array]) -> tuple[Array, ...]:
    """`ops.vq_attention.finite_codes`: int32 `[B, T, H]` of each array, -1 for a vector with NaN or inf.

    Scores are products of x with the codebook in float32, summed in another order than XLA sums them:
    codes are the same where the two best scores differ by more than rounding. The codebook in float16 does
    for a vector unless what that leaves of it, at most `|x| |c - float16(c)|` of a score, could change which
    code is best, or a score is not finite. Those vectors are listed, some 2 % of Gaussian ones, and a second
    kernel gathers them and takes in all bits. Of few vectors that is all there is, in one kernel for all
    arrays.
    """
    pairs = list(zip(vectors, codebooks, strict=True))
    if all(_is_brief(*pair) for pair in pairs):
        found = exact_codes.of_all(vectors, codebooks)
    else:
        found = [_codes(*pair) for pair in pairs]
    return tuple(map(by_head, found))


def _chunk(n_code: int) -> int:
    """Codes at once."""
    return min(power_of_two(n_code), sizes.size_of("codes", n_code).chunk)


def _is_brief(x: Array, codebook: Array) -> bool:
    batch, length, n_head, _ = x.shape
    n_code = codebook.shape[1]
    return pl.cdiv(n_code, _chunk(n_code)) * batch * length * n_head <= BRIEF


def _codes(x: Array, codebook: Array) -> Array:
    """`[B, H, T]` by a codebook in float16, and by all bits where that leaves a vector open."""
    batch, length, n_head, _ = x.shape
    n_code, n_row = codebook.shape[1], batch * n_head
    chunk = _chunk(n_code)
    n_padded = pl.cdiv(n_code, chunk) * chunk
    near = Near.of(codebook, n_padded)
    if hopper_codes.is_usable(x, n_padded):
        found = hopper_codes.first_codes(x, *near)[:, :length]
    else:
        found = _first_codes(x, near, chunk)
    n_group = pl.cdiv(length, LIST_TILE)
    shapes = (
        jax.ShapeDtypeStruct((n_row, length + LIST_TILE), jnp.int32),
        jax.ShapeDtypeStruct((n_row,), jnp.int32),
    )
    run = launch(_list_kernel, shapes, (n_group, n_row), LIST_WARPS, 1, {1: 1})
    listed = run(found, jnp.zeros((n_row,), jnp.int32))
    return exact_codes.of_listed(x, codebook, listed, found.reshape(batch, n_head, length))


def _first_codes(x: Array, near: Near, chunk: int) -> Array:
    """`hopper_codes.first_codes` by Triton."""
    batch, length, n_head, _ = x.shape
    shape = batch * n_head, length
    size = sizes.size_of("codes", near.half.shape[1])
    n_tile = sizes.n_tile(length, shape[0], size.tile)
    grid = pl.cdiv(pl.cdiv(length, size.tile), n_tile), shape[0]
    kernel, how = partial(_first_kernel, tile=size.tile, n_tile=n_tile, chunk=chunk), size[3:]
    arrays = x, jnp.swapaxes(near.book, 1, 2), near.bias(), near.off
    known = _best_of_all_but_the_last(kernel, grid, how, arrays, chunk)
    run = launch(partial(kernel, is_last=True), jax.ShapeDtypeStruct(shape, jnp.int32), grid, *how)
    found: Array = run(*arrays, *known)
    return found


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
    return jnp.maximum(finite_codes((x,), (codebook,))[0], 0)


def why_not_finite(asked: str | None, vectors: Sequence[Array], codebooks: Sequence[Array]) -> str | None:
    """Why `finite_codes` cannot run, or None."""
    reasons = (why_not(asked, *pair) for pair in zip(vectors, codebooks, strict=True))
    return next((reason for reason in reasons if reason is not None), None)


def why_not(asked: str | None, x: Array, codebook: Array) -> str | None:
    """Why `nearest_codes` cannot run, or None."""
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
    """Codes by `Near`, at last `-1 - code` of the vectors that it leaves open.

    With more inputs these are a chunk of the codes, from a first one on: better or worse than those before.
    """
    _, length, n_head, width = x_ref.shape
    known_refs = refs[: len(Best._fields)] if len(refs) > len(Best._fields) else ()
    group, row = pl.program_id(0), pl.program_id(1)
    batch, head = row // n_head, row % n_head
    cols = columns(0, book_ref.shape[1], width)
    start = plt.load(refs[len(known_refs)].at[head]) if known_refs else 0
    at = pl.ds(start, chunk)
    # Read as a product takes it: a transposition would be made anew for every tile.
    book, bias = plt.load(book_ref.at[head, :, at]), plt.load(bias_ref.at[head, :, at])
    ones = jnp.ones((cols[0].size, NARROW), x_ref.dtype)
    relative, besides = (plt.load(off_ref.at[i * n_head + head]) for i in range(2))

    def step(i: Any, carry: Any) -> Any:
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
            return carry
        square = jnp.max(dot(x * x, ones), axis=1)
        reach = jnp.sqrt(square) * relative + besides
        code = jnp.where(found.is_open(reach, (chunk - 1).bit_length()), -1 - found.code, found.code)
        plt.store(refs[-1].at[row, rows[0]], code, mask=rows[1])
        return carry

    loop(n_tile, step, 0)


def _list_kernel(found_ref: Any, _: Any, list_ref: Any, number_ref: Any) -> None:
    """Put the open vectors of a tile on the list of their head, in any order."""
    first, row, length = pl.program_id(0) * LIST_TILE, pl.program_id(1), found_ref.shape[1]
    rows = tokens(first, LIST_TILE, length)
    is_open = plt.load(found_ref.at[row, rows[0]], mask=rows[1], other=0) < 0
    number, each = is_open.astype(jnp.int32), jnp.arange(LIST_TILE, dtype=jnp.int32)
    start = plt.atomic_add(number_ref, (row,), jnp.sum(number))
    # The others have entries of their own: interpreted, a masked store writes back what was there.
    entry = jnp.where(is_open, start + jnp.cumsum(number) - 1, length + each)
    plt.store(list_ref.at[row, entry], first + each, mask=is_open)


KERNELS = {
    "finite_codes": Kernel(finite_codes, why_not_finite),
    "nearest_codes": Kernel(nearest_codes, why_not),
}
