"""Causal attention over up to 128 codes for float32 values by Mosaic GPU: `vq_causal_f32` among groups.

All is transposed, outputs and sums `[V, ...]`: a product takes its first factor from registers, so that the
sums by code of 64 columns stay in those of the group that follows them, and only what they are multiplied
with goes through shared memory. Another group prepares that for two of them, a tile of 64 tokens ahead: rows
of `E`, one-hot keys and weights of pairs in three bfloat16 parts, and denominators.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, hopper_parts
from jax_vq.kernels import hopper_pieces as pieces
from jax_vq.kernels.hopper_pieces import BLOCK, CHUNK, HALF, NOTHING
from jax_vq.kernels.tiles import BF16, F32
from jax_vq.kernels.vq_sums import Sums
from jax_vq.ops.numerics import N_PART

N_SIDE = 2  # groups that multiply
WIDTH = N_SIDE * HALF  # columns of a program
N_SLOT = 2  # tiles in shared memory
# Registers of a thread: that prepares, that multiplies. Three groups have 504: one more, and they wait.
N_REGISTER = 104, 200
# Parts that are multiplied, as `tiles.dot_parts` does: the largest come last.
PAIRS = sorted(((p, q) for p in range(N_PART) for q in range(N_PART - p)), key=sum, reverse=True)


def is_usable(query_codes: Array, v: Array, weight: Array, segment_len: int) -> bool:
    """Whether `follow` can run."""
    _, length, _, width = v.shape
    fits = v.dtype == F32 and weight.dtype == BF16 and query_codes.shape[1] == length
    fits = fits and weight.shape[2] == CHUNK and segment_len % HALF == 0 and width % WIDTH == 0
    return fits and hopper.is_usable(length, WIDTH)


def follow(
    query_codes: Array,
    key_codes: Array,
    v: Array,
    weight: Array,
    top: Array,
    before: Sums,
    mode: Array,
    segment_len: int,
) -> tuple[Array, Array]:
    """`hopper_causal.follow` of float32 values; `weight` is `[3 * H, Cq, 128]`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, n_head = query_codes.shape
    width, n_segment, n_query_code = v.shape[3], mode.shape[2], weight.shape[1]
    shapes = pieces.result_shapes(query_codes, v)
    scratch = (
        hopper_parts.swizzled_values(N_SIDE),
        hopper.swizzled(N_SLOT, N_PART, HALF, CHUNK, dtype=BF16),
        hopper.swizzled(N_SLOT, CHUNK, HALF, dtype=BF16),
        hopper.swizzled(N_SLOT, N_PART, HALF, HALF, dtype=BF16),
        plgpu.SMEM((N_SLOT, HALF), F32),
        plgpu.SMEM((CHUNK,), F32),
        plgpu.Barrier(num_arrivals=1, num_barriers=N_SIDE),
        plgpu.Barrier(num_arrivals=1, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=N_SIDE, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=1, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=N_SIDE, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=1, num_barriers=N_SIDE),
    )
    n_program = batch * n_head * (width // WIDTH) * n_segment
    run = hopper.launch(
        partial(_kernel, segment_len=segment_len), shapes, n_program, 3, scratch, by_thread=True
    )
    parts = jnp.swapaxes(weight.reshape(N_PART, n_head, n_query_code, CHUNK), 0, 1)
    keys = jnp.pad(
        pieces.whole_blocks(key_codes, NOTHING), ((0, 0), (0, 0), (0, BLOCK)), constant_values=NOTHING
    )
    codes = pieces.whole_blocks(query_codes, 0), keys
    sums = jnp.swapaxes(before.vectors, 3, 4)
    out, total, largest = run(*codes, v, parts, top.reshape(-1), sums, before.numbers, mode)
    return out, pieces.log_sum_exp(total, largest, length)


def _kernel(
    query_ref: Any,
    key_ref: Any,
    v_ref: Any,
    weight_ref: Any,
    top_ref: Any,
    sum_ref: Any,
    number_ref: Any,
    mode_ref: Any,
    out_ref: Any,
    total_ref: Any,
    largest_ref: Any,
    v: Any,
    rows: Any,
    hot: Any,
    near: Any,
    share: Any,
    count: Any,
    has_v: Any,
    has_rows: Any,
    rows_done: Any,
    has_near: Any,
    near_done: Any,
    turn: Any,
    *,
    segment_len: int,
) -> None:
    """Some columns of a segment of a head. Heads run fastest, then columns."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, row, column = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    length, n_head, width = out_ref.shape[1:]
    n_key_head, n_segment, n_part = v_ref.shape[2], mode_ref.shape[2], width // WIDTH
    program, group = lax.axis_index("program"), lax.axis_index("group")
    head, part, segment, example = hopper.indices_of(program, n_head, n_part, n_segment)
    key_head = lax.div(head, n_head // n_key_head)
    first = segment * segment_len
    n_tile = pl.cdiv(jnp.minimum(segment_len, length - first), HALF)
    is_wanted = mode_ref[example, head, segment] == 0

    def tile_at(i: Any) -> Any:
        return pl.ds(first + i * HALF, HALF)

    @pl.when((group == 0) & is_wanted)
    def prepare() -> None:
        plgpu.set_max_registers(N_REGISTER[0], action="decrease")

        def fetch(i: Any, codes: Array) -> None:
            hopper_parts.fetch_rows()(codes, weight_ref.at[head], rows.at[lax.rem(i, N_SLOT)])

        def keys_of(i: Any) -> Array:
            at = pl.ds(first + jnp.minimum(i, n_tile - 1) * HALF, BLOCK)
            return hopper.load(key_ref.at[example, key_head, at], single)

        def queries_of(i: Any) -> Array:
            return hopper_parts.read_codes()(query_ref.at[example, head, tile_at(jnp.minimum(i, n_tile - 1))])

        def weigh(slot: Any, p: int) -> Array:
            """A part of the weights of pairs, causal; its sums by row, once with those of keys before."""

            def run(picked: Any) -> Array:
                plgpu.wgmma(picked, rows.at[slot, p], hot.at[slot])
                far = hopper_parts.far_sum()(rows.at[slot], count) if p == N_PART - 1 else 0
                near[slot, p], total = pieces.near_weights(0)(plgpu.wgmma_accumulator_load(picked))
                return total + far

            total: Array = pl.run_scoped(run, plgpu.ACC((HALF, HALF), F32))
            return total

        def step(i: Any, carry: Any) -> Any:
            slot, (before, last, new, query) = lax.rem(i, N_SLOT), carry
            hopper_parts.wait_for_rows()()
            plgpu.commit_smem()
            plgpu.barrier_arrive(has_rows.at[slot])

            @pl.when(i + 1 < n_tile)
            def fetch_more() -> None:
                pl.when(i + 1 >= N_SLOT)(lambda: plgpu.barrier_wait(rows_done.at[lax.rem(i + 1, N_SLOT)]))
                fetch(i + 1, query)

            more, query = keys_of(i + 1), queries_of(i + 2)
            code = hopper.load(query_ref.at[example, head, tile_at(i)], row, optimized=False)
            largest = pieces.pick()(top_ref, jnp.maximum(code, 0) + head * weight_ref.shape[2])
            pl.when(i >= N_SLOT)(lambda: plgpu.barrier_wait(near_done.at[slot]))
            hopper_parts.scatter()(hot.at[slot], count, before, last, new)
            plgpu.commit_smem()
            total = sum(weigh(slot, p) for p in reversed(range(N_PART)))
            total = jnp.where(code < 0, jnp.nan, total)
            share[slot] = 1 / total
            plgpu.commit_smem()
            plgpu.barrier_arrive(has_near.at[slot])

            @pl.when(part == 0)
            def write() -> None:
                total_ref[example, head, tile_at(i)] = total
                largest_ref[example, head, tile_at(i)] = largest

            return last, new, more, query

        fetch(0, queries_of(0))
        for slot in range(N_SLOT):
            hot[slot] = hopper.filled((CHUNK, HALF), 0, BF16, wide)
        count[...] = hopper.load(number_ref.at[example, key_head, segment], row, optimized=False)
        plgpu.commit_smem()
        nobody = hopper.filled((BLOCK,), NOTHING, jnp.int32, single)
        lax.fori_loop(0, n_tile, step, (nobody, nobody, keys_of(0), queries_of(1)))

    @pl.when((group > 0) & is_wanted)
    def attend() -> None:
        plgpu.set_max_registers(N_REGISTER[1], action="increase")
        side = group - 1
        columns = pl.ds(part * WIDTH + side * HALF, HALF)

        def fetch(i: Any) -> None:
            plgpu.copy_gmem_to_smem(
                v_ref.at[example, tile_at(i), key_head, columns], v.at[side], has_v.at[side]
            )

        def step(i: Any, state: Array) -> Array:
            slot = lax.rem(i, N_SLOT)
            parts = hopper_parts.split(CHUNK)(state)
            plgpu.barrier_wait(has_rows.at[slot])
            # In turn, or both would multiply at once, and then split at once.
            pl.when((side > 0) | (i > 0))(lambda: plgpu.barrier_wait(turn.at[side]))
            *small, (high, weight) = ((parts[p], rows.at[slot, q]) for p, q in PAIRS)
            # The largest by halves, which are added where sums are rounded.
            halves = [(high[:, at : at + HALF], weight.at[:, pl.ds(at, HALF)]) for at in (0, HALF)]
            result = _product(HALF, *small, halves[0])
            result += _product(HALF, halves[1])
            plgpu.barrier_arrive(turn.at[1 - side])
            plgpu.barrier_arrive(rows_done.at[slot])
            plgpu.barrier_wait(has_v.at[side])
            values = hopper_parts.transposed_parts()(v.at[side])
            plgpu.barrier_wait(has_near.at[slot])
            result += _product(HALF, *((values[p], near.at[slot, q]) for p, q in PAIRS))
            result *= lax.broadcast_in_dim(hopper.load(share.at[slot], column), result.shape, [1])
            hopper_parts.write_transposed()(v.at[side], result)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v.at[side], out_ref.at[example, tile_at(i), head, columns])
            state += _product(CHUNK, *((x, hot.at[slot]) for x in reversed(values)))
            plgpu.barrier_arrive(near_done.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(i + 1 < n_tile)(partial(fetch, i + 1))
            return state

        fetch(0)
        at = example, key_head, segment, columns
        lax.fori_loop(0, n_tile, step, hopper.load(sum_ref.at[at], wide, optimized=False))
        plgpu.wait_smem_to_gmem(0)


def _product(n_column: int, *pairs: tuple[Any, Any]) -> Array:
    """Of matrices in registers with others, row by row, in shared memory; summed from zero in this order."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(result: Any) -> Array:
        for x, y in pairs:
            plgpu.wgmma(result, x, hopper.transposed(y))
        return plgpu.wgmma_accumulator_load(result)

    product: Array = pl.run_scoped(run, plgpu.ACC((HALF, n_column), F32))
    return product
