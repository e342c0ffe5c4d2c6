"""Pieces of `hopper_causal_wide` that are written thread by thread: rows of `E` and codes in shared memory.

A row takes 16 bytes more than it has, so that eight rows of a column lie in different banks.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_vq.kernels import hopper
from jax_vq.kernels.hopper_barriers import scalar
from jax_vq.kernels.hopper_pieces import HALF, add_products, fragment, sums_of_rows, two_numbers
from jax_vq.kernels.hopper_threads import first_row, in_row, integer, pointer, row_of_thread
from jax_vq.kernels.tiles import BF16, F32

PADDING = 8  # entries behind a row
N_KIND = 3  # of codes of a tile: those that each group adds up, and where a row of `E` has them


def own_codes() -> Any:
    """The place of a thread's two rows among codes that a group adds up, twice each: `[64]` as pairs."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    row = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((HALF,), jnp.int32, layout=row))
    def run(_: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        first, registers = first_row(arith.remui(utils.thread_idx(), integer(128))), np.empty(2, dtype=object)
        for h, own in enumerate((first, arith.addi(first, integer(8)))):
            number = arith.sitofp(f32, own)
            ptx = "cvt.rn.bf16x2.f32 $0, $1, $1;"
            pair: Any = llvm.inline_asm(i32, [number], ptx, "=r,f", has_side_effects=True)
            registers[h] = vector.from_elements(ir.VectorType.get((1,), i32), [pair])
        layout = fragmented_array.WGMMA_LAYOUT.reduce((1,))
        registers = registers.reshape(layout.registers_shape((HALF,)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return run


def _eight_words(address: Any) -> list[Any]:
    """32 bytes of shared memory."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i32 = ir.IntegerType.get_signless(32)
    four, words = llvm.StructType.get_literal([i32] * 4), []
    for k in (0, 16):
        ptx = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {k}];"
        found = llvm.inline_asm(four, [address], ptx, "=r,=r,=r,=r,r", has_side_effects=True)
        words += [llvm.extractvalue(i32, found, [p]) for p in range(4)]
    return words


def one_hot(group: int, c: int) -> Any:
    """`[64, 64]`: whether a token has the code of a row, of those that a group adds up of a chunk.

    Of codes `[2, N_KIND, 64]` of a tile in shared memory, its slot, and `own_codes`.
    """
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    wide, row, splat = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), splat, row),
        return_type=plgpu.ShapeDtypeStruct((HALF, HALF), BF16, layout=wide),
    )
    def run(_: Any, codes: Any, slot: Any, own: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        start = arith.addi(arith.muli(scalar(slot), integer(2 * HALF * N_KIND)), integer(2 * HALF * group))
        words = _eight_words(pointer(codes, arith.addi(start, arith.shli(in_row(), integer(5)))))
        chunk_start = int(np.float32(HALF * c).view(np.uint32)) >> 16  # in bfloat16
        registers = np.empty(HALF // 4, dtype=object)
        for h, x in enumerate(own.registers.reshape(-1)):
            x = vector.extract(x, [], [0])
            if c > 0:
                ptx, twice = "add.rn.bf16x2 $0, $1, $2;", integer(chunk_start * 0x10001)
                x = llvm.inline_asm(i32, [x, twice], ptx, "=r,r,r", has_side_effects=False)
            for k, word in enumerate(words):
                ptx = "set.eq.bf16x2.bf16x2 $0, $1, $2;"
                bits = llvm.inline_asm(i32, [word, x], ptx, "=r,r,r", has_side_effects=False)
                registers[2 * k + h] = utils.bitcast(bits, pair)
        return fragment(registers, fragmented_array.WGMMA_LAYOUT, (HALF, HALF))

    return run


def store_state(start_row: int) -> Any:
    """Sums `[64, 64]` in bfloat16 to rows of shared memory, from one on: 16 bytes a thread."""
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(hopper.swizzle()), plgpu.Layout.WGMMA))
    def run(_: Any, state: Any, total: Any) -> None:
        i32, void = ir.IntegerType.get_signless(32), ir.Type.parse("!llvm.void")
        thread = arith.remui(utils.thread_idx(), integer(128))
        lane, row = arith.andi(thread, integer(31)), row_of_thread(thread)
        unit = arith.xori(arith.shrui(lane, integer(4)), arith.andi(lane, integer(7)))  # swizzled
        start = arith.addi(arith.shli(row, integer(7)), arith.shli(unit, integer(4)))
        registers = total.registers.reshape(-1)
        for i in range(HALF // 16):
            words: list[Any] = []
            for p in range(4):  # eight columns, two rows of each
                k, h = 2 * i + p // 2, p % 2
                two = [vector.extract(registers[2 * k + h], [], [j]) for j in range(2)]
                ptx = "cvt.rn.bf16x2.f32 $0, $1, $2;"
                words.append(llvm.inline_asm(i32, two[::-1], ptx, "=r,f,f", has_side_effects=False))
            address = pointer(state, arith.xori(start, integer(32 * i)))
            ptx = f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0 + {128 * start_row}], {{$1, $2, $3, $4}};"
            llvm.inline_asm(void, [address, *words], ptx, "r,r,r,r,r", has_side_effects=True)

    return run


def read_rows(c: int) -> Any:
    """64 codes of rows of `E` in shared memory, `[2, 64, C + PADDING]`, as a product takes them."""
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    wide, splat = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), splat),
        return_type=plgpu.ShapeDtypeStruct((HALF, HALF), BF16, layout=wide),
    )
    def run(_: Any, rows: Any, slot: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        four = llvm.StructType.get_literal([i32] * 4)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        pitch = 2 * ir.MemRefType(rows.type).shape[2]
        thread = arith.remui(utils.thread_idx(), integer(128))
        lane, row = arith.andi(thread, integer(31)), row_of_thread(thread)
        start = arith.addi(arith.muli(scalar(slot), integer(HALF * pitch)), arith.muli(row, integer(pitch)))
        address = pointer(rows, arith.addi(start, arith.shli(arith.shrui(lane, integer(4)), integer(4))))
        registers = np.empty(HALF // 4, dtype=object)
        for j in range(HALF // 16):
            place = f"[$4 + {2 * HALF * c + 32 * j}]"
            ptx = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, {place};"
            words = llvm.inline_asm(four, [address], ptx, "=r,=r,=r,=r,r", has_side_effects=True)
            for p in range(4):
                registers[4 * j + p] = utils.bitcast(llvm.extractvalue(i32, words, [p]), pair)
        return fragment(registers, fragmented_array.WGMMA_LAYOUT, (HALF, HALF))

    return run


def pick_near() -> Any:
    """Weights of the keys of a tile in bfloat16, causal, and parts of their sums by row in float32.

    Of rows of `E` `[2, 64, C + PADDING]` in shared memory, codes `[2, N_KIND, 64]`, and the slot of both.
    """
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    picked = plgpu.ShapeDtypeStruct((HALF, HALF), BF16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=(picked, _parts_type()),
    )
    def run(_: Any, rows: Any, codes: Any, slot: Any) -> Any:
        i16, i32, f32 = *(ir.IntegerType.get_signless(n) for n in (16, 32)), ir.F32Type.get()
        pair, zero = ir.VectorType.get((2,), ir.BF16Type.get()), utils.c(0.0, f32)
        pitch, slot = 2 * ir.MemRefType(rows.type).shape[2], scalar(slot)
        start = arith.addi(arith.muli(slot, integer(2 * HALF * N_KIND)), integer(2 * HALF * (N_KIND - 1)))
        words = _eight_words(pointer(codes, arith.addi(start, arith.shli(in_row(), integer(5)))))
        row = first_row(arith.remui(utils.thread_idx(), integer(128)))
        less = arith.subi(row, arith.shli(in_row(), integer(1)))
        ahead: Any = llvm.inline_asm(i32, [less], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
        offset = arith.addi(arith.muli(slot, integer(HALF * pitch)), arith.muli(row, integer(pitch)))
        base = llvm.ptrtoint(i32, pointer(rows, offset))
        sums, registers = [[zero, zero], [zero, zero]], np.empty(HALF // 4, dtype=object)
        for k, word in enumerate(words):
            at = [arith.addi(base, arith.andi(word, integer(0xFFFF)))]
            at.append(arith.addi(base, arith.shrui(word, integer(16))))
            for h in range(2):
                two: list[Any] = []
                for j in range(2):
                    last = 8 * k - 8 * h + j  # key less query, but for what a thread has
                    load = f"ld.shared.b16 $0, [$1 + {8 * pitch * h}];"
                    ptx = f"{{ .reg .pred p; setp.ge.s32 p, $2, {last}; mov.b16 $0, 0; @p {load} }}"
                    two.append(llvm.inline_asm(i16, [at[j], ahead], ptx, "=h,r,r", has_side_effects=True))
                bits = llvm.inline_asm(i32, two, "mov.b32 $0, {$1, $2};", "=r,h,h", has_side_effects=False)
                for j, x in enumerate(two_numbers(bits)):
                    sums[h][j] = arith.addf(sums[h][j], x)
                registers[2 * k + h] = utils.bitcast(bits, pair)
        return fragment(registers, fragmented_array.WGMMA_LAYOUT, (HALF, HALF)), _as_parts(sums)

    return run


def add_far() -> Any:
    """Parts of sums by row, and those of weights of 64 codes times counts in float32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(wide, wide, plgpu.RefType()), return_type=_parts_type())
    def run(_: Any, parts: Any, weight: Any, counts: Any) -> Any:
        return _as_parts(add_products(_numbers_of(parts), weight, counts))

    return run


def sums_of() -> Any:
    """The sums by row of their parts."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    row = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,), return_type=plgpu.ShapeDtypeStruct((HALF,), F32, layout=row)
    )
    def run(_: Any, parts: Any) -> Any:
        return sums_of_rows(_numbers_of(parts))

    return run


def _parts_type() -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.ShapeDtypeStruct((HALF, 8), F32, layout=plgpu.Layout.WGMMA)


def _numbers_of(parts: Any) -> list[list[Any]]:
    from jaxlib.mlir.dialects import vector

    return [[vector.extract(x, [], [j]) for j in range(2)] for x in parts.registers.reshape(-1)]


def _as_parts(sums: list[list[Any]]) -> Any:
    from jax.experimental.mosaic.gpu import fragmented_array
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    registers = np.empty(2, dtype=object)
    for h, x in enumerate(sums):
        registers[h] = vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), x)
    return fragment(registers, fragmented_array.WGMMA_LAYOUT, (HALF, 8))
