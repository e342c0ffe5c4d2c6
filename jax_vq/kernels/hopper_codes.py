"""Nearest codes by a float16 codebook in Mosaic GPU: groups multiply in turn, and take maxima meanwhile.

A product starts from `middle - |c|^2 / 2`, of a middle for each vector that is so large that `middle + score`
has one sign and exponent for all codes. Such numbers compare as integers, of which one instruction takes the
largest of three, and the number of a code takes the place of sign and exponent without a loss.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, sizes
from jax_vq.kernels.hopper_threads import integer
from jax_vq.kernels.tiles import BF16, F32

ROWS = 64  # vectors of a product
CHUNK = 128  # codes of a product, and a power of two
PART = 8  # codes side by side that a thread has two of: slices of so many are whole registers
N_CLASS = 8  # of parts, by their number modulo that
N_BIT = 9  # of sign and exponent, and of the number of a code
LEAST = -(2**31)
ERROR = 3 * 2.0**-20  # of `middle + score`, relative to it: more than a tensor core's sum is off
MARGIN = 1.01  # of a length in float32, more than it is off
F16_STEP = 2.0**-24  # between the least float16 numbers
TINY, TOO_LONG = 1e-37, 2.0**31  # squared; parts of shorter vectors are in the range of float16
N_GROUP = 3  # that multiply
MAX_CODES = 512  # whose codebook shared memory holds
MAX_PROGRAMS = 64  # of a head
START = 3  # tiles that take as long as the start of a program
BARRIER = 8  # the first one of those by number that nothing else here uses


def is_usable(x: Array, n_padded: int) -> bool:
    """Whether `first_codes` can run."""
    _, length, _, width = x.shape
    fits = x.dtype == BF16 and n_padded % CHUNK == 0 and n_padded <= MAX_CODES and length >= ROWS
    return fits and hopper.is_usable(length, width)


def first_codes(x: Array, book: Array, half: Array, off: Array) -> Array:
    """Codes by `quantize.Near`, and which of them another code could beat.

    Args:
      x: `[B, T, H, D]` bfloat16.
      book, half: `[H, C, D]` float16, `[H, C]` float32.
      off: `[3 * H]`, how far a score is off at most, relative to |x| and besides, and the largest |c|.

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
    kernel = partial(_kernel, n_program=n_program)
    shape = jax.ShapeDtypeStruct((batch * n_head, n_tile * ROWS), jnp.int32)
    run = hopper.launch(kernel, shape, batch * n_head * n_program, N_GROUP + 1, scratch, by_thread=True)
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


def _largest(*numbers: Array) -> Array:
    return reduce(jnp.maximum, numbers)


def _best_two(best: Array, second: Array, *more: Array) -> tuple[Array, Array]:
    """Of an even number of more."""
    for x, y in zip(more[::2], more[1::2], strict=True):
        high, low = jnp.maximum(x, y), jnp.minimum(x, y)
        second = _largest(second, low, jnp.minimum(best, high))
        best = jnp.maximum(best, high)
    return best, second


class Known(NamedTuple):
    """Of the codes so far, int32 `[T, 8]`: of every eighth code, so that no other thread is asked.

    A score is in two maxima: of a class of parts, and of a run of successive parts. Two scores that share
    both are one, so the second best of all is the second best of the classes or of the runs, which are few.
    """

    classes: tuple[Array, ...]  # the largest number of each
    best: Array  # of runs, with the code that a run starts at
    second: Array

    @classmethod
    def none(cls, floor: Array, least: Array) -> "Known":
        """With a number that none is less than, and `LEAST`."""
        return cls((floor,) * N_CLASS, least, least)

    def merged(self, number: Array, first: Any, floor: Array, shift: Array) -> "Known":
        """With `[T, CHUNK]` numbers of codes from `first` on.

        `shift` is `2**N_BIT`, but no constant: a multiplication does not take turns with the maxima.
        """
        parts = [lax.slice(number, (0, at), (number.shape[0], at + PART)) for at in range(0, CHUNK, PART)]
        classes = tuple(_largest(*parts[i::N_CLASS], known) for i, known in enumerate(self.classes))
        runs = (_largest(*parts[i : i + N_CLASS], floor) for i in range(0, len(parts), N_CLASS))
        marked = [run * shift + (first + i * (N_CLASS * PART) + LEAST) for i, run in enumerate(runs)]
        return Known(classes, *_best_two(self.best, self.second, *marked))

    def best_two(self, shift: Array) -> tuple[Array, Array]:
        """Of all codes. The best has the number of its code but for the last three bits; it may be wrong
        where there are two best ones.
        """
        first, *rest = (known * shift + (i * PART + LEAST) for i, known in enumerate(self.classes))
        other, *rest = rest
        top, second = _best_two(jnp.maximum(first, other), jnp.minimum(first, other), *rest)
        return self.best | (top & (N_CLASS * PART - 1)), jnp.maximum(self.second, second)


def _turn(how: str) -> Any:
    """Wait for the turn of a group (`sync`), or let it have its turn (`arrive`)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()),))
    def run(_: Any, group: Any) -> None:
        barrier = arith.addi(group.registers.item(), integer(BARRIER))
        void, ptx = ir.Type.parse("!llvm.void"), f"barrier.cta.{how} $0, 256;"
        llvm.inline_asm(void, [barrier], ptx, "r,~{memory}", has_side_effects=True)

    return run


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
) -> None:
    """Some tiles of a head. Heads run fastest: programs at work together read what lies together."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, column = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)
    batch, _, n_head, width = x_ref.shape
    n_slot, n_chunk, n_tile = vectors.shape[0], book.shape[0], code_ref.shape[1] // ROWS
    program, group = lax.axis_index("program"), lax.axis_index("group")
    head, example, place = hopper.indices_of(program, n_head, batch)
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
        relative, besides, longest = (off_ref[i * n_head + head] for i in range(3))
        longest, shift = longest * MARGIN + relative, jnp.where(relative < 0, 0, 1 << N_BIT)
        following = lax.rem(group + 1, N_GROUP)

        def merge(k: Any, known: Known, x: Array, middle: Array, floor: Array) -> Known:
            start = lax.broadcast_in_dim(hopper.load(bias.at[k], column), (ROWS, CHUNK), (1,))

            def product(total: Any) -> None:
                _turn("sync")(group)
                plgpu.wgmma(total, x, hopper.transposed(book.at[k]))
                _turn("arrive")(following)

            start += lax.broadcast_in_dim(middle, start.shape, (0,))
            number = _bits(pl.run_state(product)(plgpu.ACC.init(start)))
            return known.merged(number, k * CHUNK, lax.broadcast_in_dim(floor, (ROWS, PART), (0,)), shift)

        def find(i: Any) -> None:
            slot = lax.rem(i, n_slot)
            plgpu.barrier_wait(full.at[slot])
            raw = hopper.load(vectors.at[slot], wide)
            plgpu.barrier_arrive(empty.at[slot])
            square = jnp.sum(raw.astype(F32) ** 2, axis=1)
            x = raw.astype(jnp.float16)
            # No score is larger, also of what float16 makes of tiny numbers.
            root = square * lax.rsqrt(jnp.maximum(square, TINY))
            size = (root * MARGIN + F16_STEP * width**0.5) * longest + longest * longest
            floor = (_bits(size) & 0x7F800000) + (2 << 23)
            middle = _float(floor + (1 << 22))
            least = hopper.filled((ROWS, PART), LEAST, jnp.int32, wide)
            known = Known.none(lax.broadcast_in_dim(floor, (ROWS, PART), (0,)), least)
            # A loop: unrolled, biases are read too early, and registers do not last.
            known = lax.fori_loop(0, n_chunk, partial(merge, x=x, middle=middle, floor=floor), known)
            # Of the eight that are left a thread has two, and four threads have a vector.
            best, second = known.best_two(shift)
            best |= plgpu.broadcasted_iota(jnp.int32, best.shape, 1, layout=wide)
            top = jnp.max(best, axis=1)
            is_top = best == lax.broadcast_in_dim(top, best.shape, (0,))
            second = jnp.max(jnp.where(is_top, second, best), axis=1)
            code = top & (2**N_BIT - 1)
            top, second = (_float((x >> N_BIT) + (floor + (1 << 22))) for x in (top, second))
            gap = top - second - (2 * besides + (top + second) * ERROR)
            is_settled = (gap > 0) & (gap * gap > square * (4 * relative * relative)) & (square < TOO_LONG)
            code = jnp.where(is_settled, code, -1 - code)
            code_ref[example * n_head + head, pl.ds((first + i) * ROWS, ROWS)] = code

        @pl.when(group == N_GROUP - 1)
        def start_turns() -> None:
            _turn("arrive")(following)

        @pl.loop(0, pl.cdiv(n_own, N_GROUP))
        def find_in_turn(i: Any) -> None:
            i = i * N_GROUP + group
            pl.when(i < n_own)(partial(find, i))

            @pl.when(i >= n_own)
            def pass_on() -> None:
                for _ in range(n_chunk):
                    _turn("sync")(group)
                    _turn("arrive")(following)

        @pl.when(group == 0)
        def end_turns() -> None:
            _turn("sync")(group)
