"""Pieces of `hopper_causal_wide` for the group that fetches, written thread by thread."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_vq.kernels.hopper_barriers import scalar
from jax_vq.kernels.hopper_pieces import CHUNK, HALF
from jax_vq.kernels.hopper_threads import integer, pointer, row_of_thread
from jax_vq.kernels.hopper_wide_pieces import N_KIND, PADDING


def read_codes() -> Any:
    """Of a thread: the code of a key, and that of a query, 16 of each warp.

    Of `[B, K, T]` and `[B, H, T]` in memory, at a place of each.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    single, splat = plgpu.Layout.WG_STRIDED((CHUNK,), vec_size=1), plgpu.Layout.WG_SPLAT(())
    numbers = plgpu.ShapeDtypeStruct((CHUNK,), jnp.int32, layout=single)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), splat, splat), return_type=(numbers, numbers)
    )
    def run(_: Any, keys: Any, queries: Any, key_place: Any, query_place: Any) -> Any:
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        thread, found = arith.remui(utils.thread_idx(), integer(128)), []
        for ref, place, own in (
            (keys, key_place, arith.andi(thread, integer(HALF - 1))),
            (queries, query_place, row_of_thread(thread)),
        ):
            at = arith.shli(arith.extui(i64, arith.addi(scalar(place), own)), utils.c(2, i64))
            ptx = "ld.global.b32 $0, [$1];"
            code: Any = llvm.inline_asm(i32, [pointer(ref, at)], ptx, "=r,l", has_side_effects=True)
            code = vector.from_elements(ir.VectorType.get((1,), i32), [code])
            registers, layout = np.array([code], dtype=object), single.to_mgpu()
            found.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True))
        return tuple(found)

    return run


def fetch_rows(first: int) -> Any:
    """Ask for a row of `E` by each thread that has a query, 64 of them; the barrier takes as many arrivals.

    Of weights `[H Cq, C]`, rows `[2, 64, C + PADDING]`, barriers, codes, the row of code 0, and a slot.
    """
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    single, splat = plgpu.Layout.WG_STRIDED((CHUNK,), vec_size=1), plgpu.Layout.WG_SPLAT(())
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ref, ref, ref, single, splat, splat))
    def run(_: Any, weight: Any, rows: Any, barriers: Any, code: Any, first_row: Any, slot: Any) -> None:
        i64, void = ir.IntegerType.get_signless(64), ir.Type.parse("!llvm.void")
        n_code, pitch = ir.MemRefType(weight.type).shape[1], 2 * ir.MemRefType(rows.type).shape[2]
        code, slot = vector.extract(code.registers.reshape(-1)[0], [], [0]), scalar(slot)
        thread = arith.remui(utils.thread_idx(), integer(128))
        is_query = arith.cmpi(arith.CmpIPredicate.ult, arith.andi(thread, integer(31)), integer(16))
        row = arith.addi(scalar(first_row), arith.maxsi(code, integer(0)))
        source = pointer(weight, arith.muli(arith.extui(i64, row), utils.c(2 * n_code, i64)))
        place = arith.addi(arith.muli(slot, integer(HALF)), row_of_thread(thread))
        target = pointer(rows, arith.muli(place, integer(pitch)))
        barrier = pointer(barriers, arith.addi(integer(8 * first), arith.shli(slot, integer(3))))
        with utils.when(is_query):
            ptx = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {2 * n_code};"
            llvm.inline_asm(void, [barrier], ptx, "r", has_side_effects=True)
            copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
            ptx = f"{copy} [$0], [$1], {2 * n_code}, [$2];"
            llvm.inline_asm(void, [target, source, barrier], ptx, "r,l,r", has_side_effects=True)

    return run


def clear_padding() -> Any:
    """Zeros behind the rows of `E` `[2, 64, C + PADDING]`: the weight of a key outside the table."""
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_: Any, rows: Any) -> None:
        pitch = 2 * ir.MemRefType(rows.type).shape[2]
        thread = arith.remui(utils.thread_idx(), integer(128))  # of as many rows
        at = arith.addi(arith.muli(thread, integer(pitch)), integer(pitch - 2 * PADDING))
        void, ptx = ir.Type.parse("!llvm.void"), "st.shared.v4.b32 [$0], {$1, $1, $1, $1};"
        llvm.inline_asm(void, [pointer(rows, at), integer(0)], ptx, "r,r", has_side_effects=True)
        utils.warpgroup_barrier()

    return run


def write_codes() -> Any:
    """Codes of the keys of a tile, as groups take them, and counts before it in float32.

    The counts take in the tile then. Of codes `[2, N_KIND, 64]` bfloat16, `[2, C]` float32 counts to read and
    `[C]` int32 to add to, codes of threads, and a slot.
    """
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    single, splat = plgpu.Layout.WG_STRIDED((CHUNK,), vec_size=1), plgpu.Layout.WG_SPLAT(())
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ref, ref, ref, single, splat))
    def run(_: Any, codes: Any, counts: Any, number: Any, code: Any, slot: Any) -> None:
        i16, i32, f32 = *(ir.IntegerType.get_signless(n) for n in (16, 32)), ir.F32Type.get()
        void = ir.Type.parse("!llvm.void")
        four = llvm.StructType.get_literal([i32] * 4)
        n_code = ir.MemRefType(number.type).shape[0]
        code, slot = vector.extract(code.registers.reshape(-1)[0], [], [0]), scalar(slot)
        thread = arith.remui(utils.thread_idx(), integer(128))

        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, integer(n_code // 4))):
            at = arith.shli(thread, integer(4))
            ptx = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
            words = llvm.inline_asm(four, [pointer(number, at)], ptx, "=r,=r,=r,=r,r", has_side_effects=True)
            numbers = [arith.sitofp(f32, llvm.extractvalue(i32, words, [p])) for p in range(4)]
            target = pointer(counts, arith.addi(at, arith.muli(slot, integer(4 * n_code))))
            ptx = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
            llvm.inline_asm(void, [target, *numbers], ptx, "r,f,f,f,f", has_side_effects=True)
        utils.warpgroup_barrier()
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, integer(HALF))):
            is_here = arith.cmpi(arith.CmpIPredicate.ult, code, integer(n_code))
            safe = arith.select(is_here, code, integer(0))
            ptx = "@$1 red.shared.add.u32 [$0], 1;"
            address = pointer(number, arith.shli(safe, integer(2)))
            llvm.inline_asm(void, [address, is_here], ptx, "r,b", has_side_effects=True)
            # A thread of a product has pairs of columns eight apart: side by side here.
            pair = arith.andi(arith.shrui(thread, integer(1)), integer(3))
            place = arith.addi(arith.shli(pair, integer(4)), arith.andi(thread, integer(1)))
            place = arith.addi(place, arith.shli(arith.shrui(thread, integer(3)), integer(1)))
            place = arith.addi(place, arith.muli(slot, integer(HALF * N_KIND)))
            address = pointer(codes, arith.shli(place, integer(1)))
            low = arith.andi(code, integer(HALF - 1))
            half = arith.andi(arith.shrui(code, integer(6)), integer(1))
            own = arith.addi(low, arith.shli(arith.shrui(code, integer(7)), integer(6)))
            for group in range(2):
                is_own = arith.andi(is_here, arith.cmpi(arith.CmpIPredicate.eq, half, integer(group)))
                value = arith.sitofp(f32, arith.select(is_own, own, integer(-1)))
                store = f"st.shared.b16 [$0 + {2 * HALF * group}], x;"
                ptx = f"{{ .reg .b16 x; cvt.rn.bf16.f32 x, $1; {store} }}"
                llvm.inline_asm(void, [address, value], ptx, "r,f", has_side_effects=True)
            ptx = f"st.shared.b16 [$0 + {2 * HALF * (N_KIND - 1)}], $1;"
            place = arith.select(is_here, code, integer(n_code))  # or the zeros behind a row
            twice = arith.trunci(i16, arith.shli(place, integer(1)))
            llvm.inline_asm(void, [address, twice], ptx, "r,h", has_side_effects=True)
        utils.warpgroup_barrier()

    return run
