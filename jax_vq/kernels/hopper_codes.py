"""Nearest codes by a float16 codebook in Mosaic GPU: a group multiplies while another one takes maxima."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, sizes
from jax_vq.kernels.tiles import BF16, F32

ROWS = 64  # vectors of a product
CHUNK = 128  # codes of a product, and a power of two
PART = 8  # codes side by side that a thread has two of: slices of so many are whole registers
N_GROUP = 3  # that multiply
MAX_CODES = 512  # whose codebook shared memory holds
MAX_PROGRAMS = 64  # of a head
START = 3  # tiles that take as long as the start of a program


def is_usable(x: Array, n_padded: int) -> bool:
    """Whether `first_codes` can run."""
    _, length, _, width = x.shape
    fits = x.dtype == BF16 and n_padded % CHUNK == 0 and n_padded <= MAX_CODES and length >= ROWS
    return fits and hopper.is_usable(length, width)


def first_codes(x: Array, book: Array, half: Array, off: Array, rounding: float) -> Array:
    """Codes by `quantize.Near`, and which of them another code could beat.

    Args:
      x: `[B, T, H, D]` bfloat16.
      book, half: `[H, C, D]` float16, `[H, C]` float32.
      off: `[2 * H]`, how far a score is off at most, relative to |x| and besides.
      rounding: of the last bits of a score, relative to it.

    Returns:
      int32 `[B * H, T]` and some more at the end: codes, `-1 - code` where another may be the best.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, n_head, width = x.shape
    n_chunk, n_tile = book.shape[1] // CHUNK, -(-length // ROWS)
    n_slot = N_GROUP * (2 if book.shape[1] * width < MAX_CODES * hopper.WIDTHS[-1] else 1)
    n_program = _n_program(batch * n_head, n_tile)
    scratch = (
        hopper.swizzled(n_slot, ROWS, width, dtype=BF16),
        hopper.swizzled(n_chunk, CHUNK, width, dtype=jnp.float16),
        plgpu.SMEM((n_chunk, CHUNK), F32),
        plgpu.Barrier(num_barriers=n_slot),
        plgpu.Barrier(num_barriers=n_slot),
        plgpu.Barrier(num_arrivals=1 + n_chunk),
    )
    kernel = partial(_kernel, n_program=n_program, rounding=rounding)
    shape = jax.ShapeDtypeStruct((batch * n_head, n_tile * ROWS), jnp.int32)
    run = hopper.launch(kernel, shape, batch * n_head * n_program, N_GROUP + 1, scratch)
    codes: Array = run(x, book, -half.reshape(n_head, n_chunk, CHUNK), off)
    return codes


def _n_program(n_row: int, n_tile: int) -> int:
    """Programs of a head, of which each processor takes one after the other, that end about together."""

    def cost(n: int) -> int:
        return -(-n_row * n // sizes.N_PROCESSOR) * (-(-n_tile // n) + START)

    return min(range(1, max(min(MAX_PROGRAMS, n_tile // N_GROUP), 1) + 1), key=cost)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, F32)


def _best(score: Array, one: Array) -> tuple[Array, Array]:
    """The best and second best of every eighth code: `[T, C]` to two `[T, 8]`, without another thread.

    The number of the code, but for its last three bits, takes bits of the score. With `one`, which is 1 but
    no constant, that is a multiplication and does not take turns with the maxima: 8 % of the time.
    """
    slices = ((first, lax.slice(score, (0, first), (ROWS, first + PART))) for first in range(0, CHUNK, PART))
    start, other, *rest = (_float((_bits(part) & -CHUNK) * one + first) for first, part in slices)
    best, second = jnp.maximum(start, other), jnp.minimum(start, other)
    for part in rest:
        second = jnp.maximum(second, jnp.minimum(best, part))
        best = jnp.maximum(best, part)
    return best, second


def _kernel(
    x_ref: Any,
    book_ref: Any,
    bias_ref: Any,
    off_ref: Any,
    code_ref: Any,
    vectors: Any,
    book: Any,
    bias: Any,
    full: Any,
    empty: Any,
    has_book: Any,
    *,
    n_program: int,
    rounding: float,
) -> None:
    """Some tiles of a head. Heads run fastest: programs at work together read what lies together."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, column = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)
    batch, _, n_head, _ = x_ref.shape
    n_slot, n_chunk, n_tile = vectors.shape[0], book.shape[0], code_ref.shape[1] // ROWS
    program, group = lax.axis_index("program"), lax.axis_index("group")
    head, example = lax.rem(program, n_head), lax.rem(lax.div(program, n_head), batch)
    place = lax.div(program, n_head * batch)
    first = lax.div(place * n_tile, n_program)
    n_own = lax.div((place + 1) * n_tile, n_program) - first

    @pl.when(group == N_GROUP)
    def fetch_all() -> None:
        plgpu.set_max_registers(32, action="decrease")
        plgpu.copy_gmem_to_smem(bias_ref.at[head], bias, has_book)
        for k in range(n_chunk):
            plgpu.copy_gmem_to_smem(book_ref.at[head, pl.ds(k * CHUNK, CHUNK)], book.at[k], has_book)

        def fetch(i: Any) -> None:
            slot, at = lax.rem(i, n_slot), pl.ds((first + i) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(x_ref.at[example, at, head], vectors.at[slot], full.at[slot])

        n_first = jnp.minimum(n_own, n_slot)
        pl.loop(0, n_first)(fetch)

        @pl.loop(n_first, n_own)
        def fetch_more(i: Any) -> None:
            plgpu.barrier_wait(empty.at[lax.rem(i, n_slot)])
            fetch(i)

    @pl.when(group < N_GROUP)
    def find_all() -> None:
        plgpu.set_max_registers(160, action="increase")
        plgpu.barrier_wait(has_book)
        relative, besides = off_ref[head], off_ref[n_head + head]
        one = jnp.where(relative < 0, 0, 1)

        def of_chunk(x: Array, k: Any) -> tuple[Array, Array]:
            start = lax.broadcast_in_dim(hopper.load(bias.at[k], column), (ROWS, CHUNK), (1,))

            def product(total: Any) -> None:
                plgpu.wgmma(total, x, hopper.transposed(book.at[k]))

            return _best(pl.run_state(product)(plgpu.ACC.init(start)), one)

        def merge(k: Any, known: Any, x: Array) -> Any:
            best, second, offset = known
            new, new_second = of_chunk(x, k)
            offset = jnp.where(new > best, lax.convert_element_type(k * CHUNK, F32), offset)
            second = jnp.maximum(jnp.maximum(second, new_second), jnp.minimum(best, new))
            return jnp.maximum(best, new), second, offset

        @pl.loop(0, lax.div(n_own - group + N_GROUP - 1, N_GROUP))
        def find(i: Any) -> None:
            i = i * N_GROUP + group
            slot = lax.rem(i, n_slot)
            plgpu.barrier_wait(full.at[slot])
            raw = hopper.load(vectors.at[slot], wide)
            plgpu.barrier_arrive(empty.at[slot])
            square = jnp.sum(raw.astype(F32) ** 2, axis=1)
            x = raw.astype(jnp.float16)
            if n_chunk == 1:
                (best, second), offset = of_chunk(x, 0), None
            else:  # a loop: unrolled, biases are read too early, and registers do not last
                start = tuple(hopper.filled((ROWS, PART), x, F32, wide) for x in (-jnp.inf, -jnp.inf, 0))
                best, second, offset = lax.fori_loop(0, n_chunk, partial(merge, x=x), start)
            # Of the eight that are left a thread has two, and four threads have a vector.
            best = _float(_bits(best) | plgpu.broadcasted_iota(jnp.int32, best.shape, 1, layout=wide))
            top = jnp.max(best, axis=1)
            is_top = best == lax.broadcast_in_dim(top, best.shape, (0,))
            second = jnp.max(jnp.where(is_top, second, best), axis=1)
            code = _bits(top) & (CHUNK - 1)
            if offset is not None:
                code += jnp.max(jnp.where(is_top, offset, 0), axis=1).astype(jnp.int32)
            gap = top - second - (2 * besides + (jnp.abs(top) + jnp.abs(second)) * rounding)
            is_settled = (gap > 0) & (gap * gap > square * (4 * relative * relative))  # without a root
            code = jnp.where(is_settled, code, -1 - code)
            code_ref[example * n_head + head, pl.ds((first + i) * ROWS, ROWS)] = code
