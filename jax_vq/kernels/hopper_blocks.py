"""Attention of blocks to the sums before them and to their keys by Mosaic GPU.

Rows of `E` go from memory to the registers that products take them from, while other products run.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper
from jax_vq.kernels import hopper_pieces as pieces
from jax_vq.kernels.hopper_pieces import BLOCK, CHUNK, HALF, NOTHING
from jax_vq.kernels.tiles import BF16, F32

MAX_CODES = 512
N_STATE = 3  # chunks of sums in shared memory
N_HOT = 2  # chunks of one-hot keys in shared memory; a chunk that is done with leaves both
N_REGISTER = 24, 232, 248  # of a thread: that fetches; of the first half of the queries; of the second


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
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, n_head = query_codes.shape
    width = v.shape[3]
    n_block = -(-length // BLOCK)
    shapes = pieces.result_shapes(query_codes, v)
    arrays = (
        pieces.whole_blocks(query_codes, 0),
        pieces.whole_blocks(key_codes, NOTHING),
        v,
        pieces.in_order_of_threads(weight),
        top.reshape(-1),
        states.vectors.reshape(-1, width),
        states.numbers.reshape(-1),
        mode,
    )
    n_each = states.numbers.shape[2] // mode.shape[2]
    kernel = partial(_kernel, n_query_code=weight.shape[1], n_state=states.numbers.shape[2], n_each=n_each)
    n_program = pieces.n_program(batch * n_head * n_block)
    scratch = (
        hopper.swizzled(N_STATE, CHUNK, width, dtype=BF16),
        hopper.swizzled(N_HOT, CHUNK, BLOCK, dtype=BF16),
        hopper.swizzled(1, BLOCK, width, dtype=BF16),
        hopper.swizzled(BLOCK // HALF, HALF, width, dtype=BF16),
        plgpu.SMEM((N_STATE, CHUNK), F32),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_STATE),
        plgpu.Barrier(num_arrivals=1, num_barriers=N_HOT),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_HOT),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=2),
    )
    out, total, largest = hopper.launch(kernel, shapes, n_program, 3, scratch, by_thread=True)(*arrays)
    return out, pieces.log_sum_exp(total, largest, length)


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
    """Every so many-th block of a head, by `pieces.items_of`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    n_head, n_key_head, n_code = query_ref.shape[1], key_ref.shape[1], 2 * weight_ref.shape[1]
    n_block, width = query_ref.shape[2] // BLOCK, out_ref.shape[3]
    n_chunk, group = n_code // CHUNK, lax.axis_index("group")
    n_own, place_of = pieces.items_of(query_ref.shape[0], n_head, n_block)

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
            plgpu.copy_gmem_to_smem(v_ref.at[example, at, key_head_of(head)], v.at[0], has_v)

        def keys_of(i: Any) -> Array:
            example, head, block = place_of(i)
            at = pl.ds(block * BLOCK, BLOCK)
            return hopper.load(key_ref.at[example, key_head_of(head), at], single)

        fetch_state(0, 0, 0)
        for slot in range(N_HOT):
            hot[slot] = hopper.filled((CHUNK, BLOCK), 0, BF16, wide)
        nobody = hopper.filled((BLOCK,), NOTHING, jnp.int32, single)

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
                pieces.scatter()(hot.at[slot], was, key - c * CHUNK)
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

        def queries_of(i: Any) -> Array:
            example, head, block = place_of(i)
            at = pl.ds(block * BLOCK + half * HALF, HALF)
            return hopper.load(query_ref.at[example, head, at], row, optimized=False)

        def rows_of(i: Any, code: Array) -> Array:
            """Of `E`, in memory."""
            return jnp.maximum(code, 0) + place_of(i)[1] * n_query_code

        def step(i: Any, carry: Any) -> Any:
            code, weight = carry
            example, head, block = place_of(i)
            zero = pieces.unknown_zero()()
            rows = rows_of(i, code)
            is_wanted = mode_ref[example, head, lax.div(block, n_each)] == 0

            def attend_block(near: Any, far: Any) -> tuple[Array, ...]:
                total, weights = None, weight
                for c in range(n_chunk):
                    k = (i + zero) * n_chunk + c
                    slot, hot_slot = lax.rem(k, N_STATE), lax.rem(k, N_HOT)
                    plgpu.barrier_wait(has_hot.at[hot_slot])
                    plgpu.wgmma(near, weights, hot.at[hot_slot, :, pl.ds(0, n_key)])
                    if c > 0:
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(empty.at[lax.rem(k - 1, N_HOT)])
                    if c == n_chunk - 2:  # not before: they stay in registers
                        more = queries_of(i + 1)
                    # Before these products: a group goes on only when nearly all of its products are done.
                    here, then = (rows, c + 1) if c + 1 < n_chunk else (rows_of(i + 1, more), 0)
                    more_weights = pieces.gather(then)(weight_ref, here)
                    plgpu.barrier_wait(has_state.at[slot])
                    plgpu.wgmma(far, weights, state.at[slot])
                    part = pieces.far_sum()(weights, count.at[slot])
                    total = part if total is None else total + part
                    weights = more_weights
                picked, part = pieces.near_weights(half)(plgpu.wgmma_accumulator_load(near, wait_n=1))
                plgpu.barrier_wait(has_v)
                plgpu.wgmma(far, picked, v.at[zero, pl.ds(0, n_key)])
                largest = pieces.pick()(top_ref, rows)
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(empty.at[lax.rem(i * n_chunk + n_chunk - 1, N_HOT)])
                result = plgpu.wgmma_accumulator_load(far)
                plgpu.barrier_arrive(v_empty)
                return result, total + part, largest, more, weights

            accumulators = plgpu.ACC((HALF, n_key), F32), plgpu.ACC((HALF, width), F32)
            result, total, largest, more, weight = pl.run_scoped(attend_block, *accumulators)
            total = pieces.prepare_rows(out.at[half], code, result, total)
            at = pl.ds(block * BLOCK + half * HALF, HALF)
            plgpu.commit_smem()

            @pl.when(is_wanted)
            def write() -> None:
                plgpu.copy_smem_to_gmem(out.at[half], out_ref.at[example, at, head])

            total_ref[example, head, at] = total
            largest_ref[example, head, at] = largest
            return more, weight

        code = queries_of(0)
        lax.fori_loop(0, n_own, step, (code, pieces.gather(0)(weight_ref, rows_of(0, code))))
        plgpu.wait_smem_to_gmem(0)

    pl.when(group == 1)(partial(attend, 0))
    pl.when(group == 2)(partial(attend, 1))
