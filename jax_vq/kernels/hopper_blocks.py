"""Attention of blocks to the sums before them and to their keys by Mosaic GPU.

Rows of `E` go from memory to the registers that products take them from, while other products run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, sizes
from jax_vq.kernels.tiles import BF16, F32
from jax_vq.ops.implementations import runs

BLOCK = 128  # tokens, of keys and queries
HALF = 64  # queries of a group
CHUNK = 128  # codes at once
MAX_CODES = 512
N_STATE = 3  # chunks of sums in shared memory
N_HOT = 2  # chunks of one-hot keys in shared memory; a chunk that is done with leaves both
N_REGISTER = 24, 232, 248  # of a thread: that fetches; of the first half of the queries; of the second
NOTHING = -2  # the code of a key outside


def is_usable(query_codes: Array, v: Array, weight: Array, block: int) -> bool:
    """Whether `block_attention` can run."""
    n_code, (_, length, _, width) = weight.shape[2], v.shape
    fits = v.dtype == weight.dtype == BF16 and query_codes.shape[1] == length
    fits = fits and block == BLOCK and n_code % CHUNK == 0 and 2 * CHUNK <= n_code <= MAX_CODES
    return fits and hopper.is_usable(length, width)


def block_attention(
    query_codes: Array, key_codes: Array, v: Array, weight: Array, top: Array, states: Any, mode: Array
) -> tuple[Array, Array]:
    """`vq_states.block_attention` for blocks of mode 0; what it leaves for the others has no meaning.

    Args:
      states: `vq_states.States` before blocks of `BLOCK` tokens.
    """
    batch, length, n_head = query_codes.shape
    width = v.shape[3]
    n_block = -(-length // BLOCK)
    shapes = (
        jax.ShapeDtypeStruct((batch, length, n_head, width), v.dtype),
        *[jax.ShapeDtypeStruct((batch, n_head, n_block * BLOCK), F32)] * 2,
    )
    arrays = (
        _by_head(query_codes, 0),
        _by_head(key_codes, NOTHING),
        v,
        _in_order_of_threads(weight),
        top.reshape(-1),
        states.vectors.reshape(-1, width),
        states.numbers.reshape(-1),
        mode,
    )
    n_each = states.numbers.shape[2] // mode.shape[2]
    kernel = partial(_kernel, n_query_code=weight.shape[1], n_state=states.numbers.shape[2], n_each=n_each)
    n_program = min(batch * n_head * n_block, sizes.N_PROCESSOR)
    out, total, largest = _launch(kernel, shapes, n_program, width)(*arrays)
    return out, jnp.swapaxes(largest + jnp.log(total), 1, 2)[:, :length]


def _by_head(codes: Array, outside: int) -> Array:
    """`[B, T, H]` to `[B, H, T]`, with whole blocks."""
    padding = (0, 0), (0, 0), (0, -codes.shape[1] % BLOCK)
    return jnp.pad(jnp.swapaxes(codes, 1, 2), padding, constant_values=outside)


def _in_order_of_threads(weight: Array) -> Array:
    """`E [H, Cq, C]` as pairs, with what a thread has of a row, four pairs of 32 codes, side by side."""
    n_code = weight.shape[2]
    pairs = lax.bitcast_convert_type(weight.reshape(-1, n_code // 32, 4, 4, 2), jnp.uint32)
    return jnp.swapaxes(pairs, 2, 3).reshape(-1, n_code // 2)


def _launch(kernel: Any, shapes: Any, n_program: int, width: int) -> Callable[..., Any]:
    """As `hopper.launch`, but for pieces that are written thread by thread."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    call = plgpu.kernel(
        kernel,
        out_type=shapes,
        grid=(n_program,),
        grid_names=("program",),
        num_threads=3,
        thread_name="group",
        scratch_types=(
            hopper.swizzled(N_STATE, CHUNK, width, dtype=BF16),
            hopper.swizzled(N_HOT, CHUNK, BLOCK, dtype=BF16),
            hopper.swizzled(BLOCK, width, dtype=BF16),
            hopper.swizzled(BLOCK // HALF, HALF, width, dtype=BF16),
            plgpu.SMEM((N_STATE, CHUNK), F32),
            plgpu.Barrier(num_arrivals=2, num_barriers=N_STATE),
            plgpu.Barrier(num_arrivals=1, num_barriers=N_HOT),
            plgpu.Barrier(num_arrivals=2, num_barriers=N_HOT),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane, approx_math=True, reduction_scratch_bytes=0
        ),
    )

    def run(*arrays: Array) -> Any:
        runs("mosaic_gpu")
        with jax.enable_x64(False):
            return call(*arrays)

    return run


def _kernel(
    query_ref: Any,
    key_ref: Any,
    v_ref: Any,
    weight_ref: Any,
    top_ref: Any,
    state_ref: Any,
    count_ref: Any,
    mode_ref: Any,
    out_ref: Any,
    total_ref: Any,
    largest_ref: Any,
    state: Any,
    hot: Any,
    v: Any,
    out: Any,
    count: Any,
    has_state: Any,
    has_hot: Any,
    empty: Any,
    has_v: Any,
    v_empty: Any,
    *,
    n_query_code: int,
    n_state: int,
    n_each: int,
) -> None:
    """Every so many-th block of a head. Heads run fastest: programs at work read what lies together."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    n_head, n_key_head, n_code = query_ref.shape[1], key_ref.shape[1], 2 * weight_ref.shape[1]
    n_block, width = query_ref.shape[2] // BLOCK, out_ref.shape[3]
    n_chunk, n_item = n_code // CHUNK, query_ref.shape[0] * n_head * n_block
    n_program = min(n_item, sizes.N_PROCESSOR)
    program, group = lax.axis_index("program"), lax.axis_index("group")
    n_own = lax.div(n_item - program + n_program - 1, n_program)

    def place_of(i: Any) -> tuple[Any, Any, Any]:
        """Example, head and block of the program's i-th item; the last one again after it."""
        item = program + jnp.minimum(i, n_own - 1) * n_program
        rest = lax.div(item, n_head)
        return lax.div(rest, n_block), lax.rem(item, n_head), lax.rem(rest, n_block)

    def key_head_of(head: Any) -> Any:
        return lax.div(head, n_head // n_key_head)

    @pl.when(group == 0)
    def fetch_all() -> None:
        plgpu.set_max_registers(N_REGISTER[0], action="decrease")

        def fetch_state(i: Any, c: Any, slot: Any) -> None:
            example, head, block = place_of(i)
            start = ((example * n_key_head + key_head_of(head)) * n_state + block) * n_code + c * CHUNK
            at = pl.ds(start, CHUNK)
            plgpu.copy_gmem_to_smem(state_ref.at[at], state.at[slot], has_state.at[slot])
            plgpu.copy_gmem_to_smem(count_ref.at[at], count.at[slot], has_state.at[slot])

        def fetch_v(i: Any) -> None:
            example, head, block = place_of(i)
            at = pl.ds(block * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(v_ref.at[example, at, key_head_of(head)], v, has_v)

        def keys_of(i: Any) -> Array:
            example, head, block = place_of(i)
            at = pl.ds(block * BLOCK, BLOCK)
            return hopper.load(key_ref.at[example, key_head_of(head), at], single)

        fetch_state(0, 0, 0)
        for slot in range(N_HOT):
            hot[slot] = plgpu.layout_cast(jnp.zeros((CHUNK, BLOCK), BF16), wide)
        nobody = plgpu.layout_cast(jnp.full((BLOCK,), NOTHING, jnp.int32), single)

        def step(i: Any, keys: Any) -> Any:
            last, key = keys
            more = keys_of(i + 1)
            for c in range(n_chunk):
                k = i * n_chunk + c
                slot = lax.rem(k, N_HOT)
                if c < N_HOT:
                    pl.when(i > 0)(partial(plgpu.barrier_wait, empty.at[slot]))
                else:
                    plgpu.barrier_wait(empty.at[slot])
                old = c - N_HOT  # the chunk of the keys that were here
                was = key - old * CHUNK if old >= 0 else last - (old + n_chunk) * CHUNK
                _scatter()(hot.at[slot], was, key - c * CHUNK)
                plgpu.commit_smem()
                plgpu.barrier_arrive(has_hot.at[slot])
                then = lax.rem(k + 1, N_STATE)
                if c + 1 < n_chunk:
                    fetch_state(i, c + 1, then)
                else:
                    pl.when(i + 1 < n_own)(partial(fetch_state, i + 1, 0, then))
                if c == min(N_HOT, n_chunk - 1):
                    pl.when(i > 0)(partial(plgpu.barrier_wait, v_empty))
                    fetch_v(i)
            return key, more

        lax.fori_loop(0, n_own, step, (nobody, keys_of(0)))

    def attend(half: int) -> None:
        plgpu.set_max_registers(N_REGISTER[1 + half], action="increase")
        n_key = (half + 1) * HALF  # that these queries see some of

        def queries_of(i: Any) -> tuple[Array, Array]:
            """Codes, and rows of `E` in memory."""
            example, head, block = place_of(i)
            at = pl.ds(block * BLOCK + half * HALF, HALF)
            code = hopper.load(query_ref.at[example, head, at], row, optimized=False)
            return code, jnp.maximum(code, 0) + head * n_query_code

        def rows_of(rows: Array, c: int) -> Array:
            return _gather(c)(weight_ref, rows)

        def step(i: Any, carry: Any) -> Any:
            code, rows, weight = carry
            example, head, block = place_of(i)
            more, more_rows = queries_of(i + 1)
            largest = _pick()(top_ref, rows)

            def attend_block(near: Any, far: Any) -> tuple[Array, Array, Array]:
                total, weights = None, weight
                for c in range(n_chunk):
                    k = i * n_chunk + c
                    slot, hot_slot = lax.rem(k, N_STATE), lax.rem(k, N_HOT)
                    if c > 0:
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[lax.rem(k - 1, N_HOT)])
                    # Before the products: a group goes on only when nearly all of its products are done.
                    more_weights = rows_of(rows, c + 1) if c + 1 < n_chunk else rows_of(more_rows, 0)
                    plgpu.barrier_wait(has_hot.at[hot_slot])
                    plgpu.wgmma(near, weights, hot.at[hot_slot, :, pl.ds(0, n_key)])
                    plgpu.barrier_wait(has_state.at[slot])
                    plgpu.wgmma(far, weights, state.at[slot])
                    part = _far_sum()(weights, count.at[slot])
                    total = part if total is None else total + part
                    weights = more_weights
                picked, part = _near_weights(half)(plgpu.wgmma_accumulator_load(near, wait_n=1))
                plgpu.barrier_wait(has_v)
                plgpu.wgmma(far, picked, v.at[pl.ds(0, n_key)])
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(empty.at[lax.rem(i * n_chunk + n_chunk - 1, N_HOT)])
                result = plgpu.wgmma_accumulator_load(far)
                plgpu.barrier_arrive(v_empty)
                return result, total + part, weights

            accumulators = plgpu.ACC((HALF, n_key), F32), plgpu.ACC((HALF, width), F32)
            result, total, weight = pl.run_scoped(attend_block, *accumulators)
            total = jnp.where(code < 0, jnp.nan, total)
            result = result * lax.broadcast_in_dim(1 / total, result.shape, [0])
            at = pl.ds(block * BLOCK + half * HALF, HALF)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[half] = result.astype(BF16)
            total_ref[example, head, at] = total
            largest_ref[example, head, at] = largest
            plgpu.commit_smem()

            @pl.when(mode_ref[example, head, lax.div(block, n_each)] == 0)
            def write() -> None:
                plgpu.copy_smem_to_gmem(out.at[half], out_ref.at[example, at, head])

            return more, more_rows, weight

        code, rows = queries_of(0)
        lax.fori_loop(0, n_own, step, (code, rows, rows_of(rows, 0)))
        plgpu.wait_smem_to_gmem(0)

    pl.when(group == 1)(partial(attend, 0))
    pl.when(group == 2)(partial(attend, 1))


# Pieces that are written for a thread. Of `[64, N]` it has two rows, eight apart, as pairs of columns.


def _number(x: int) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.c(x, ir.IntegerType.get_signless(32))


def _address(ref: Any, offset: Any) -> Any:
    """A pointer so many bytes behind the start of an array."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def _fragment(registers: Any, layout: Any, shape: tuple[int, ...]) -> Any:
    from jax.experimental.mosaic import gpu as mgpu

    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _sums_of_rows(parts: list[Any]) -> Any:
    """Of a sum of each row by thread, those of four threads that share it."""
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    sums = np.empty(2, dtype=object)
    for h, x in enumerate(parts):
        for distance in (1, 2):
            x = arith.addf(x, utils.shfl_bfly(x, distance))
        sums[h] = vector.from_elements(ir.VectorType.get((1,), x.type), [x])
    return _fragment(sums, fragmented_array.WGMMA_LAYOUT.reduce((1,)), (HALF,))


def _scatter() -> Any:
    """One-hot keys in place of others: a thread clears an entry and sets one, instead of writing a column."""
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    tiled = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    @plgpu.inline_mgpu(arg_types=(tiled, single, single))
    def run(_: Any, hot_ref: Any, old: Any, new: Any) -> None:
        token = arith.remui(utils.thread_idx(), _number(BLOCK))
        half, place = arith.shrui(token, _number(6)), arith.andi(token, _number(63))
        for code, value in ((old, 0), (new, 0x3F80)):  # bits of 0 and 1
            code = vector.extract(code.registers.reshape(-1)[0], [], [0])
            row = arith.andi(code, _number(7))
            tile = arith.addi(arith.shli(arith.shrui(code, _number(3)), _number(1)), half)
            column = arith.xori(arith.shli(place, _number(1)), arith.shli(row, _number(4)))  # swizzled
            offset = arith.addi(
                arith.shli(tile, _number(10)), arith.addi(arith.shli(row, _number(7)), column)
            )
            is_here = arith.cmpi(arith.CmpIPredicate.ult, code, _number(CHUNK))
            offset = arith.select(is_here, offset, _number(0))
            bits = utils.c(value, ir.IntegerType.get_signless(16))
            arguments = [_address(hot_ref, offset), bits, is_here]
            ptx, void = "@$2 st.shared.b16 [$0], $1;", ir.Type.parse("!llvm.void")
            llvm.inline_asm(void, arguments, ptx, "r,h,b", has_side_effects=True)

    return run


def _gather(c: int) -> Any:
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
        quarter = arith.andi(utils.thread_idx(), _number(3))
        start = arith.extui(i64, arith.addi(arith.shli(quarter, _number(4)), _number(2 * CHUNK * c)))
        registers = np.empty(CHUNK // 4, dtype=object)
        for h, x in enumerate(rows.registers.reshape(-1)):
            at = arith.muli(arith.extui(i64, vector.extract(x, [], [0])), utils.c(n_byte, i64))
            address = _address(weight_ref, arith.addi(start, at))
            for i in range(CHUNK // 32):
                ptx = f"ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4 + {64 * i}];"
                words = llvm.inline_asm(four, [address], ptx, "=r,=r,=r,=r,l", has_side_effects=True)
                for p in range(4):
                    word = utils.bitcast(llvm.extractvalue(i32, words, [p]), pair)
                    registers[2 * (4 * i + p) + h] = word
        return _fragment(registers, fragmented_array.WGMMA_LAYOUT, (HALF, CHUNK))

    return run


def _pick() -> Any:
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
            at = arith.extui(i64, arith.shli(vector.extract(x, [], [0]), _number(2)))
            number = llvm.load(f32, _address(ref, at))
            numbers[h] = vector.from_elements(ir.VectorType.get((1,), f32), [number])
        return _fragment(numbers, fragmented_array.WGMMA_LAYOUT.reduce((1,)), (HALF,))

    return run


def _far_sum() -> Any:
    """Weights of a chunk times counts, by row in float32: a few numbers at once, while products run."""
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(wide, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((HALF,), F32, layout=row),
    )
    def run(_: Any, weight: Any, count_ref: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        pair, zero = ir.VectorType.get((2,), f32), utils.c(0.0, f32)
        start = arith.shli(arith.andi(utils.thread_idx(), _number(3)), _number(3))
        registers, sums = weight.registers.reshape(-1), [[zero, zero], [zero, zero]]
        for k in range(CHUNK // 8):
            count = llvm.load(pair, _address(count_ref, arith.addi(start, _number(32 * k))), alignment=8)
            for h in range(2):
                bits = utils.bitcast(registers[2 * k + h], i32)
                for j, x in enumerate((arith.shli(bits, _number(16)), arith.andi(bits, _number(-(2**16))))):
                    number = llvm.extractelement(count, _number(j))
                    sums[h][j] = llvm.intr_fma(arith.bitcast(f32, x), number, sums[h][j])
        return _sums_of_rows([arith.addf(*x) for x in sums])

    return run


def _near_weights(half: int) -> Any:
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
        thread = arith.remui(utils.thread_idx(), _number(128))
        lane, warp = arith.andi(thread, _number(31)), arith.shrui(thread, _number(5))
        first_row = arith.addi(arith.shli(warp, _number(4)), arith.shrui(lane, _number(2)))
        less = arith.subi(first_row, arith.shli(arith.andi(lane, _number(3)), _number(1)))
        ahead = llvm.inline_asm(i32, [less], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
        sums = [[zero, zero], [zero, zero]]
        registers = np.empty(shape[1] // 4, dtype=object)
        for k in range(shape[1] // 8):
            for h in range(2):
                two = [vector.extract(weight.registers.reshape(-1)[2 * k + h], [], [j]) for j in range(2)]
                for j in range(2):
                    last = 8 * k - HALF * half - 8 * h + j  # key less query
                    if last > -7:
                        is_seen = arith.cmpi(arith.CmpIPredicate.sge, ahead, _number(last))
                        two[j] = arith.select(is_seen, two[j], zero)
                    sums[h][j] = arith.addf(sums[h][j], two[j])
                ptx = "cvt.rn.bf16x2.f32 $0, $1, $2;"
                bits = llvm.inline_asm(i32, two[::-1], ptx, "=r,f,f", has_side_effects=False)
                registers[2 * k + h] = utils.bitcast(bits, pair)
        picked = _fragment(registers, fragmented_array.WGMMA_LAYOUT, shape)
        return picked, _sums_of_rows([arith.addf(*x) for x in sums])

    return run
