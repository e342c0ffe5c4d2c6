"""Pieces of kernels by Mosaic GPU that are written thread by thread, for what its operations lack.

A group of four warps holds `[64, N]` for a product so that a thread has two rows, eight apart, as pairs of
columns; four threads have a row. Kernels with such pieces are launched `by_thread`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, sizes
from jax_vq.kernels.hopper_threads import first_row, in_row, integer, pointer
from jax_vq.kernels.tiles import BF16, F32, HIGH_BITS, by_head

HALF = 64  # rows of a product
CHUNK = 128  # codes at once
BLOCK = 128  # tokens at once
NOTHING = -2  # the code of a key outside


def whole_blocks(codes: Array, outside: int) -> Array:
    """Codes `[B, T, H]` `by_head`, with whole blocks."""
    padding = (0, 0), (0, 0), (0, -codes.shape[1] % BLOCK)
    return jnp.pad(by_head(codes), padding, constant_values=outside)


def result_shapes(query_codes: Array, v: Array) -> tuple[Any, ...]:
    """Of the output `[B, T, H, V]`, and of what `log_sum_exp` takes."""
    batch, length, n_head = query_codes.shape
    numbers = jax.ShapeDtypeStruct((batch, n_head, -(-length // BLOCK) * BLOCK), F32)
    return jax.ShapeDtypeStruct((batch, length, n_head, v.shape[3]), v.dtype), numbers, numbers


def log_sum_exp(total: Array, largest: Array, length: int) -> Array:
    """`[B, T, H]`, of `[B, H, T]` sums of weights relative to the largest score of a query code."""
    return by_head(largest + jnp.log(total))[:, :length]


def items_of(n_example: int, n_head: int, n_block: int) -> tuple[Any, Callable[[Any], tuple[Any, Any, Any]]]:
    """How many blocks of a head are a program's, of `n_program`, and where its i-th one is.

    That is example, head and block, of the last one again after it. Heads run fastest: programs at work read
    what lies together.
    """
    n_item = n_example * n_head * n_block
    n, program = n_program(n_item), lax.axis_index("program")
    n_own = pl.cdiv(n_item - program, n)

    def place_of(i: Any) -> tuple[Any, Any, Any]:
        item = program + jnp.minimum(i, n_own - 1) * n
        rest = lax.div(item, n_head)
        return lax.div(rest, n_block), lax.rem(item, n_head), lax.rem(rest, n_block)

    return n_own, place_of


def n_program(n_item: int) -> int:
    """Programs that share out so many items: one for each processor."""
    return min(n_item, sizes.N_PROCESSOR)


def prepare_rows(out: Any, code: Array, result: Array, total: Array) -> Array:
    """Put `result / total` where it is copied from, NaN for a query without a code; returns such a total."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    total = jnp.where(code < 0, jnp.nan, total)
    result = result * lax.broadcast_in_dim(1 / total, result.shape, [0])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out[...] = result.astype(BF16)
    return total


def in_order_of_threads(weight: Array) -> Array:
    """`E [H, Cq, C]` as pairs, with what a thread has of a row, four pairs of 32 codes, side by side."""
    n_code = weight.shape[2]
    pairs = lax.bitcast_convert_type(weight.reshape(-1, n_code // 32, 4, 4, 2), jnp.uint32)
    return jnp.swapaxes(pairs, 2, 3).reshape(-1, n_code // 2)


def unknown_zero() -> Any:
    """0, which the compiler does not know: it finds addresses with it in a loop, and others before.

    Those take registers for the whole loop, and what is spilled comes back behind all loads under way.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    @plgpu.inline_mgpu(
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def run(_: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        zero = llvm.inline_asm(i32, [], "mov.b32 $0, 0;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(zero, (), is_signed=True)

    return run


def fragment(registers: Any, layout: Any, shape: tuple[int, ...]) -> Any:
    """A float array of registers."""
    from jax.experimental.mosaic import gpu as mgpu

    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def sums_of_rows(parts: list[list[Any]]) -> Any:
    """The sums by row of their parts: a thread has two of each row, and four threads share it."""
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    sums = np.empty(2, dtype=object)
    for h, x in enumerate([arith.addf(*pair) for pair in parts]):
        for distance in (1, 2):
            x = arith.addf(x, utils.shfl_bfly(x, distance))
        sums[h] = vector.from_elements(ir.VectorType.get((1,), x.type), [x])
    return fragment(sums, fragmented_array.WGMMA_LAYOUT.reduce((1,)), (HALF,))


def scatter(*, counts: bool = False) -> Any:
    """One-hot keys in place of others: a thread clears an entry and sets one, instead of writing a column.

    Of `[C, T]`, codes `[T]` that were here, and new ones; others than 0 to C - 1 are nowhere. With `counts`,
    `[C]` int32 also takes in the codes that were here; shared memory adds integers by itself, but no floats.
    """
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    tiled = plgpu.RefType(hopper.swizzle())

    @plgpu.inline_mgpu(arg_types=(tiled, single, single, *((plgpu.RefType(),) if counts else ())))
    def run(_: Any, hot_ref: Any, old: Any, new: Any, *count_ref: Any) -> None:
        void = ir.Type.parse("!llvm.void")
        token = arith.remui(utils.thread_idx(), integer(BLOCK))
        half, place = arith.shrui(token, integer(6)), arith.andi(token, integer(63))
        for code, value in ((old, 0), (new, 0x3F80)):  # bits of 0 and 1
            code = vector.extract(code.registers.reshape(-1)[0], [], [0])
            is_here = arith.cmpi(arith.CmpIPredicate.ult, code, integer(CHUNK))
            code = arith.select(is_here, code, integer(0))
            row = arith.andi(code, integer(7))
            tile = arith.addi(arith.shli(arith.shrui(code, integer(3)), integer(1)), half)
            column = arith.xori(arith.shli(place, integer(1)), arith.shli(row, integer(4)))  # swizzled
            offset = arith.addi(
                arith.shli(tile, integer(10)), arith.addi(arith.shli(row, integer(7)), column)
            )
            bits = utils.c(value, ir.IntegerType.get_signless(16))
            arguments = [pointer(hot_ref, offset), bits, is_here]
            llvm.inline_asm(void, arguments, "@$2 st.shared.b16 [$0], $1;", "r,h,b", has_side_effects=True)
            for ref in count_ref if value == 0 else ():
                arguments, ptx = [pointer(ref, arith.shli(code, integer(2))), is_here], "red.shared.add.u32"
                llvm.inline_asm(void, arguments, f"@$1 {ptx} [$0], 1;", "r,b", has_side_effects=True)

    return run


def gather(c: int) -> Any:
    """A chunk of rows of `E` as a product takes them: 16 bytes at once, and nothing waits for them here.

    Loads of what never changes (`nc`) would be moved to where the product is.
    """
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), row),
        return_type=plgpu.ShapeDtypeStruct((HALF, CHUNK), BF16, layout=wide),
    )
    def run(_: Any, weight_ref: Any, rows: Any) -> Any:
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        pair, four = ir.VectorType.get((2,), ir.BF16Type.get()), llvm.StructType.get_literal([i32] * 4)
        n_byte = 4 * ir.MemRefType(weight_ref.type).shape[1]
        start = arith.extui(i64, arith.addi(arith.shli(in_row(), integer(4)), integer(2 * CHUNK * c)))
        registers = np.empty(CHUNK // 4, dtype=object)
        for h, x in enumerate(rows.registers.reshape(-1)):
            at = arith.muli(arith.extui(i64, vector.extract(x, [], [0])), utils.c(n_byte, i64))
            address = pointer(weight_ref, arith.addi(start, at))
            for i in range(CHUNK // 32):
                ptx = f"ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4 + {64 * i}];"
                words = llvm.inline_asm(four, [address], ptx, "=r,=r,=r,=r,l", has_side_effects=True)
                for p in range(4):
                    word = utils.bitcast(llvm.extractvalue(i32, words, [p]), pair)
                    registers[2 * (4 * i + p) + h] = word
        return fragment(registers, fragmented_array.WGMMA_LAYOUT, (HALF, CHUNK))

    return run


def pick() -> Any:
    """A number of each row, from memory."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    row = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), row),
        return_type=plgpu.ShapeDtypeStruct((HALF,), F32, layout=row),
    )
    def run(_: Any, ref: Any, rows: Any) -> Any:
        f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
        numbers = np.empty(2, dtype=object)
        for h, x in enumerate(rows.registers.reshape(-1)):
            at = arith.extui(i64, arith.shli(vector.extract(x, [], [0]), integer(2)))
            number = llvm.load(f32, pointer(ref, at))
            numbers[h] = vector.from_elements(ir.VectorType.get((1,), f32), [number])
        return fragment(numbers, fragmented_array.WGMMA_LAYOUT.reduce((1,)), (HALF,))

    return run


def far_sum() -> Any:
    """Weights of a chunk times counts, by row in float32: a few numbers at once, while products run."""
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(wide, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((HALF,), F32, layout=row),
    )
    def run(_: Any, weight: Any, count_ref: Any) -> Any:
        zero = utils.c(0.0, ir.F32Type.get())
        return sums_of_rows(add_products([[zero, zero], [zero, zero]], weight, count_ref))

    return run


def add_products(sums: list[list[Any]], weight: Any, count_ref: Any) -> list[list[Any]]:
    """Two parts of sums of each row, with weights `[64, C]` times counts `[C]`, float32 or int32, added."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    f32, kind = ir.F32Type.get(), ir.MemRefType(count_ref.type).element_type
    pair, start = ir.VectorType.get((2,), kind), arith.shli(in_row(), integer(3))
    sums = [[*parts] for parts in sums]
    for k, words in enumerate(weight.registers.reshape(-1, 2)):
        count = llvm.load(pair, pointer(count_ref, arith.addi(start, integer(32 * k))), alignment=8)
        for h, word in enumerate(words):
            for j, x in enumerate(two_numbers(word)):
                number = llvm.extractelement(count, integer(j))
                number = number if kind == f32 else arith.sitofp(f32, number)
                sums[h][j] = llvm.intr_fma(x, number, sums[h][j])
    return sums


def two_numbers(word: Any) -> list[Any]:
    """Two bfloat16 numbers in float32."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    bits = utils.bitcast(word, ir.IntegerType.get_signless(32))
    two = arith.shli(bits, integer(16)), arith.andi(bits, integer(int(HIGH_BITS)))
    return [arith.bitcast(ir.F32Type.get(), x) for x in two]


def near_weights(half: int) -> Any:
    """Weights of keys in bfloat16, causal, and their sums by row in float32.

    By hand, so that what a thread compares is not kept in registers for the whole kernel.
    """
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    wide, row, shape = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), (HALF, HALF * (half + 1))

    @plgpu.inline_mgpu(
        arg_types=(wide,),
        return_type=(
            plgpu.ShapeDtypeStruct(shape, BF16, layout=wide),
            plgpu.ShapeDtypeStruct((HALF,), F32, layout=row),
        ),
    )
    def run(_: Any, weight: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        pair, zero = ir.VectorType.get((2,), ir.BF16Type.get()), utils.c(0.0, f32)
        thread = arith.remui(utils.thread_idx(), integer(128))
        less = arith.subi(first_row(thread), arith.shli(arith.andi(thread, integer(3)), integer(1)))
        ahead = llvm.inline_asm(i32, [less], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
        sums = [[zero, zero], [zero, zero]]
        registers = np.empty(shape[1] // 4, dtype=object)
        for k in range(shape[1] // 8):
            for h in range(2):
                two = [vector.extract(weight.registers.reshape(-1)[2 * k + h], [], [j]) for j in range(2)]
                for j in range(2):
                    last = 8 * k - HALF * half - 8 * h + j  # key less query
                    if last > -7:
                        is_seen = arith.cmpi(arith.CmpIPredicate.sge, ahead, integer(last))
                        two[j] = arith.select(is_seen, two[j], zero)
                    sums[h][j] = arith.addf(sums[h][j], two[j])
                ptx = "cvt.rn.bf16x2.f32 $0, $1, $2;"
                bits = llvm.inline_asm(i32, two[::-1], ptx, "=r,f,f", has_side_effects=False)
                registers[2 * k + h] = utils.bitcast(bits, pair)
        picked = fragment(registers, fragmented_array.WGMMA_LAYOUT, shape)
        return picked, sums_of_rows(sums)

    return run


def limited(size: int) -> Any:
    """Scores of so many keys, -inf for those from each row's limit on, and NaN for what is not finite."""
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, math, vector

    wide, row, shape = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), (HALF, size)

    @plgpu.inline_mgpu(arg_types=(wide, row), return_type=plgpu.ShapeDtypeStruct(shape, F32, layout=wide))
    def run(_: Any, score: Any, limit: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        nan, least, infinite = (utils.c(x, f32) for x in (float("nan"), -float("inf"), float("inf")))
        column = arith.shli(in_row(), integer(1))
        ahead = []
        for x in limit.registers.reshape(-1):
            less = arith.subi(vector.extract(x, [], [0]), column)
            ahead += [llvm.inline_asm(i32, [less], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)]
        registers = np.empty(size // 4, dtype=object)
        for k in range(size // 8):
            for h in range(2):
                two = [vector.extract(score.registers.reshape(-1)[2 * k + h], [], [j]) for j in range(2)]
                for j in range(2):
                    is_finite = arith.cmpf(arith.CmpFPredicate.OLT, math.absf(two[j]), infinite)
                    is_seen = arith.cmpi(arith.CmpIPredicate.sgt, ahead[h], integer(8 * k + j))
                    two[j] = arith.select(is_seen, arith.select(is_finite, two[j], nan), least)
                registers[2 * k + h] = vector.from_elements(ir.VectorType.get((2,), f32), two)
        return fragment(registers, fragmented_array.WGMMA_LAYOUT, shape)

    return run
