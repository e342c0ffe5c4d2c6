"""Pieces of a kernel by Mosaic GPU for float32 values, written thread by thread like `hopper_pieces`.

A float32 number is the sum of three bfloat16 parts, cut off bit by bit (`tiles.parts_of`).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_vq.kernels import hopper
from jax_vq.kernels.hopper_pieces import BLOCK, CHUNK, HALF, fragment, sums_of_rows, two_numbers
from jax_vq.kernels.hopper_threads import integer, pointer
from jax_vq.kernels.tiles import BF16, F32, HIGH_BITS
from jax_vq.ops.numerics import N_PART

CHUNK_BYTES = 2 * HALF * CHUNK  # of a part of the rows of `E` of a tile
ROW_BYTES = 128  # of a matrix in shared memory, which lies in tiles of eight such rows
TILE_BYTES = 8 * ROW_BYTES
N_AT_ONCE = 16  # bytes


def swizzled_values(n: int) -> Any:
    """Shared memory for `n` tiles of float32 values, 64 tokens by 64 columns."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM((n, HALF, HALF), F32, transforms=_value_transforms())


def _value_transforms() -> tuple[Any, Any]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(ROW_BYTES)


def _parts_of_pair(pair: list[Any]) -> list[Any]:
    """Three registers of two bfloat16 numbers each."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    two = ir.VectorType.get((2,), ir.BF16Type.get())
    parts = []
    for p in range(N_PART):
        bits = [arith.bitcast(i32, x) for x in pair]
        word = llvm.inline_asm(i32, bits, "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", has_side_effects=False)
        parts.append(utils.bitcast(word, two))
        if p + 1 < N_PART:
            high = [arith.bitcast(f32, arith.andi(x, integer(int(HIGH_BITS)))) for x in bits]
            pair = [arith.subf(x, y) for x, y in zip(pair, high, strict=True)]
    return parts


def split(n_column: int) -> Any:
    """Parts of `[64, N]` float32, as products take them from registers."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import vector

    wide, shape = plgpu.Layout.WGMMA, (HALF, n_column)

    @plgpu.inline_mgpu(
        arg_types=(wide,), return_type=(plgpu.ShapeDtypeStruct(shape, BF16, layout=wide),) * N_PART
    )
    def run(_: Any, x: Any) -> Any:
        pairs = x.registers.reshape(-1)
        registers = np.empty((N_PART, len(pairs)), dtype=object)
        for i, pair in enumerate(pairs):
            registers[:, i] = _parts_of_pair([vector.extract(pair, [], [j]) for j in range(2)])
        return tuple(fragment(part, fragmented_array.WGMMA_LAYOUT, shape) for part in registers)

    return run


def transposed_parts() -> Any:
    """Parts of values `[T, V]` in shared memory, as `[V, T]` in registers."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    shape = HALF, HALF

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_value_transforms()),),
        return_type=(plgpu.ShapeDtypeStruct(shape, BF16, layout=plgpu.Layout.WGMMA),) * N_PART,
    )
    def run(_: Any, value_ref: Any) -> Any:
        pairs = [[llvm.load(ir.F32Type.get(), x) for x in pair] for pair in _pairs_of_tokens(value_ref)]
        registers = np.empty((N_PART, len(pairs)), dtype=object)
        for i, pair in enumerate(pairs):
            registers[:, i] = _parts_of_pair(pair)
        return tuple(fragment(part, fragmented_array.WGMMA_LAYOUT, shape) for part in registers)

    return run


def write_transposed() -> Any:
    """The way back: `[V, T]` in registers to `[T, V]` in shared memory; a thread writes where it read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import llvm, vector

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_value_transforms()), plgpu.Layout.WGMMA))
    def run(_: Any, value_ref: Any, result: Any) -> None:
        for addresses, pair in zip(_pairs_of_tokens(value_ref), result.registers.reshape(-1), strict=True):
            for j, address in enumerate(addresses):
                llvm.store(vector.extract(pair, [], [j]), address)

    return run


def _pairs_of_tokens(value_ref: Any) -> list[list[Any]]:
    """Where in `[T, V]` the numbers are that a thread has of `[V, T]`, in pairs; no two threads collide."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    lane, warp = _lane_and_warp()
    column = arith.addi(arith.shli(warp, integer(4)), arith.shrui(lane, integer(2)))
    token = arith.shli(arith.andi(lane, integer(3)), integer(1))
    starts: list[list[Any]] = [[], []]
    for h in range(2):
        at = arith.addi(column, integer(8 * h))
        tile = arith.shli(arith.shrui(at, integer(5)), integer(10))
        place = arith.shli(arith.andi(at, integer(31)), integer(2))
        for j in range(2):
            row = arith.addi(token, integer(j))
            offset = arith.xori(place, arith.shli(row, integer(4)))  # swizzled
            offset = arith.addi(arith.addi(offset, tile), arith.shli(row, integer(7)))
            starts[h].append(pointer(value_ref, offset))
    i8 = ir.IntegerType.get_signless(8)
    return [
        [utils.getelementptr(start, [2 * TILE_BYTES * k], i8) for start in starts[h]]
        for k in range(HALF // 8)
        for h in range(2)
    ]


def _lane_and_warp() -> tuple[Any, Any]:
    """Of a thread in its group: looked up anew, or what follows is kept in registers for the whole kernel."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    i32 = ir.IntegerType.get_signless(32)
    thread = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
    warp = arith.andi(arith.shrui(thread, integer(5)), integer(3))
    return arith.andi(thread, integer(31)), warp


def read_codes() -> Any:
    """Codes of a tile, each in two lanes of the warp that `fetch_rows` has fetch its row."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((BLOCK,), jnp.int32, layout=single),
    )
    def run(_: Any, code_ref: Any) -> Any:
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        lane, warp = _lane_and_warp()
        place = arith.shli(arith.andi(lane, integer(14)), integer(2))
        place = arith.addi(place, arith.addi(arith.andi(lane, integer(1)), arith.shli(warp, integer(1))))
        code = llvm.load(i32, pointer(code_ref, arith.extui(i64, arith.shli(place, integer(2)))))
        registers = np.empty(1, dtype=object)
        registers[0] = vector.from_elements(ir.VectorType.get((1,), i32), [code])
        layout = fragmented_array.WGStridedFragLayout((BLOCK,), 1)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return run


def fetch_rows() -> Any:
    """Start to copy rows of the parts of `E`, of codes by `read_codes`; a code under 0 gets row 0.

    Sixteen threads take a row.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    tiled = plgpu.RefType(hopper.swizzle())

    @plgpu.inline_mgpu(arg_types=(single, plgpu.RefType(), tiled))
    def run(_: Any, codes: Any, weight_ref: Any, row_ref: Any) -> None:
        void, i64 = ir.Type.parse("!llvm.void"), ir.IntegerType.get_signless(64)
        n_byte = 2 * CHUNK * ir.MemRefType(weight_ref.type).shape[1]  # of a part
        lane, warp = _lane_and_warp()
        piece, half = arith.andi(lane, integer(15)), arith.shrui(lane, integer(4))
        row = arith.addi(arith.shli(warp, integer(1)), half)
        place = arith.shli(arith.xori(arith.andi(piece, integer(7)), row), integer(4))  # swizzled
        tile = arith.shli(arith.shrui(piece, integer(3)), integer(10))
        target = pointer(row_ref, arith.addi(arith.addi(place, tile), arith.shli(row, integer(7))))
        source = arith.extui(i64, arith.shli(piece, integer(4)))
        known = vector.extract(codes.registers.reshape(-1)[0], [], [0])
        known = arith.maxsi(known, integer(0))
        for k in range(HALF // 8):
            arguments = integer(-1), known, arith.addi(half, integer(2 * k)), integer(31)
            code = nvvm.shfl_sync(*arguments, nvvm.ShflKind.idx)
            at = arith.extui(i64, arith.shli(code, integer(8)))
            address = pointer(weight_ref, arith.addi(source, at))
            for p in range(N_PART):
                to = 2 * TILE_BYTES * k + CHUNK_BYTES * p
                ptx = f"cp.async.cg.shared.global [$0 + {to}], [$1 + {n_byte * p}], {N_AT_ONCE};"
                llvm.inline_asm(void, [target, address], ptx, "r,l", has_side_effects=True)

    return run


def wait_for_rows() -> Any:
    """Until what a thread fetched is there."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    @plgpu.inline_mgpu()
    def run(_: Any) -> None:
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], "cp.async.wait_all;", "~{memory}", has_side_effects=True)

    return run


def scatter() -> Any:
    """One-hot keys `[128, 64]` in place of others, and counts with keys of a tile between.

    Of codes `[128]` that were here, that are counted, and new ones, of which the first 64 are meant; others
    than 0 to 127 are nowhere.
    """
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    tiled = plgpu.RefType(hopper.swizzle())

    @plgpu.inline_mgpu(arg_types=(tiled, plgpu.RefType(), single, single, single))
    def run(_: Any, hot_ref: Any, count_ref: Any, old: Any, counted: Any, new: Any) -> None:
        void, ult = ir.Type.parse("!llvm.void"), arith.CmpIPredicate.ult
        token = arith.remui(utils.thread_idx(), integer(BLOCK))
        is_token = arith.cmpi(ult, token, integer(HALF))

        def code_of(codes: Any) -> tuple[Any, Any]:
            code = vector.extract(codes.registers.reshape(-1)[0], [], [0])
            is_here = arith.andi(is_token, arith.cmpi(ult, code, integer(CHUNK)))
            return arith.select(is_here, code, integer(0)), is_here

        for codes, value in ((old, 0), (new, 0x3F80)):  # bits of 0 and 1
            code, is_here = code_of(codes)
            row = arith.andi(code, integer(7))
            offset = arith.xori(arith.shli(token, integer(1)), arith.shli(row, integer(4)))  # swizzled
            offset = arith.addi(arith.shli(code, integer(7)), offset)
            bits = utils.c(value, ir.IntegerType.get_signless(16))
            arguments = [pointer(hot_ref, offset), bits, is_here]
            llvm.inline_asm(void, arguments, "@$2 st.shared.b16 [$0], $1;", "r,h,b", has_side_effects=True)
        code, is_here = code_of(counted)
        arguments = [
            pointer(count_ref, arith.shli(code, integer(2))),
            utils.c(1.0, ir.F32Type.get()),
            is_here,
        ]
        ptx = "@$2 red.shared.add.f32 [$0], $1;"
        llvm.inline_asm(void, arguments, ptx, "r,f,b", has_side_effects=True)

    return run


def far_sum() -> Any:
    """Weights times counts, by row in float32, of the parts of rows of `E` in shared memory."""
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    row = plgpu.Layout.WGMMA.reduce(1)
    tiled = plgpu.RefType(hopper.swizzle())

    @plgpu.inline_mgpu(
        arg_types=(tiled, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((HALF,), F32, layout=row),
    )
    def run(_: Any, row_ref: Any, count_ref: Any) -> Any:
        i32, f32, i8 = ir.IntegerType.get_signless(32), ir.F32Type.get(), ir.IntegerType.get_signless(8)
        four, words = ir.VectorType.get((4,), f32), ir.VectorType.get((4,), i32)
        lane, warp = _lane_and_warp()
        line, quarter = arith.shrui(lane, integer(2)), arith.andi(lane, integer(3))
        first = arith.addi(arith.shli(warp, integer(12)), arith.shli(line, integer(7)))
        sums = [[utils.c(0.0, f32)] * 2 for _ in range(2)]
        for c in range(CHUNK // 32):  # eight codes of 32 are a thread's
            piece = arith.xori(arith.addi(quarter, integer(4 * (c % 2))), line)  # swizzled
            start = arith.addi(first, arith.shli(piece, integer(4)))
            start = pointer(row_ref, arith.addi(start, integer(TILE_BYTES * (c // 2))))
            at = pointer(count_ref, arith.addi(arith.shli(quarter, integer(5)), integer(128 * c)))
            count = [
                llvm.load(four, utils.getelementptr(at, [16 * n], i8), alignment=N_AT_ONCE) for n in range(2)
            ]
            for p in reversed(range(N_PART)):
                for h in range(2):
                    address = utils.getelementptr(start, [CHUNK_BYTES * p + 2 * TILE_BYTES * h], i8)
                    weight = llvm.load(words, address, alignment=N_AT_ONCE)
                    for n in range(4):
                        for j, x in enumerate(two_numbers(llvm.extractelement(weight, integer(n)))):
                            number = llvm.extractelement(count[n // 2], integer(2 * (n % 2) + j))
                            sums[h][j] = llvm.intr_fma(x, number, sums[h][j])
        return sums_of_rows(sums)

    return run
