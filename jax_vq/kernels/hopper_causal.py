"""Causal attention over up to 128 codes by Mosaic GPU: `vq_causal`, with its work shared out among groups.

One group follows the sums by code and hands them on, with one-hot keys of a tile and the counts before it, to
two others, which have 64 queries of the tile each. So the products of one run under the work between those
of another.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper
from jax_vq.kernels import hopper_pieces as pieces
from jax_vq.kernels.hopper_pieces import BLOCK, CHUNK, HALF, NOTHING
from jax_vq.kernels.tiles import BF16, F32, by_head
from jax_vq.kernels.vq_sums import Sums

N_SLOT = 3  # tiles of values in shared memory
N_STATE = 2  # sums there
# Registers of a thread: that follows the sums, of the first half of the queries, of the second.
N_REGISTER = 168, 152, 184


def is_usable(query_codes: Array, v: Array, weight: Array, segment_len: int) -> bool:
    """Whether `follow` can run."""
    _, length, _, width = v.shape
    fits = v.dtype == weight.dtype == BF16 and query_codes.shape[1] == length
    fits = fits and weight.shape[2] == CHUNK and segment_len % BLOCK == 0
    return fits and hopper.is_usable(length, width)


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
    """Output and log-sum-exp of segments of mode 0; those of the others are left as they are.

    Args:
      query_codes: int32 `[B, T, H]`; key_codes: `[B, T, K]`; v: `[B, T, K, V]`.
      weight: `[H, Cq, 128]`, top: `[H, Cq]`, of `vq_tables.Tables`.
      before: of every segment of `segment_len` tokens.
      mode: int32 `[B, H, S]`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, n_head = query_codes.shape
    width, n_segment = v.shape[3], mode.shape[2]
    shapes = pieces.result_shapes(query_codes, v)[:2]
    scratch = (
        hopper.swizzled(N_SLOT, BLOCK, width, dtype=BF16),
        hopper.swizzled(CHUNK, BLOCK, dtype=BF16),
        hopper.swizzled(N_STATE, CHUNK, width, dtype=BF16),
        hopper.swizzled(BLOCK // HALF, HALF, width, dtype=BF16),
        plgpu.SMEM((CHUNK,), jnp.int32),
        plgpu.Barrier(num_arrivals=1, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=2),
    )
    kernel = partial(_kernel, n_query_code=weight.shape[1], segment_len=segment_len)
    run = hopper.launch(kernel, shapes, batch * n_head * n_segment, 3, scratch, by_thread=True)
    codes = pieces.whole_blocks(query_codes, 0), pieces.whole_blocks(key_codes, NOTHING)
    out, lse = run(*codes, v, pieces.in_order_of_threads(weight), top.reshape(-1), *before, mode)
    return out, by_head(lse)[:, :length]


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
    lse_ref: Any,
    v: Any,
    hot: Any,
    state: Any,
    out: Any,
    count: Any,
    full: Any,
    empty: Any,
    ready: Any,
    done: Any,
    *,
    n_query_code: int,
    segment_len: int,
) -> None:
    """A segment of a head. Heads run fastest: programs at work together read what lies together."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    length, n_head, width = out_ref.shape[1:]
    n_key_head, n_segment = v_ref.shape[2], mode_ref.shape[2]
    program, group = lax.axis_index("program"), lax.axis_index("group")
    head, segment, example = hopper.indices_of(program, n_head, n_segment)
    key_head = lax.div(head, n_head // n_key_head)
    first = segment * segment_len
    n_tile = pl.cdiv(jnp.minimum(segment_len, length - first), BLOCK)
    is_wanted = mode_ref[example, head, segment] == 0

    def tile_at(i: Any) -> Any:
        return pl.ds(first + i * BLOCK, BLOCK)

    @pl.when((group == 0) & is_wanted)
    def follow_sums() -> None:
        plgpu.set_max_registers(N_REGISTER[0], action="increase")

        def fetch(i: Any) -> None:
            slot = lax.rem(i, N_SLOT)
            plgpu.copy_gmem_to_smem(v_ref.at[example, tile_at(i), key_head], v.at[slot], full.at[slot])

        def keys_of(i: Any) -> Array:
            at = tile_at(jnp.minimum(i, n_tile - 1))
            return hopper.load(key_ref.at[example, key_head, at], single)

        for i in range(N_SLOT):
            pl.when(i < n_tile)(partial(fetch, i))
        hot[...] = hopper.filled((CHUNK, BLOCK), 0, BF16, wide)
        at = example, key_head, segment
        sums = hopper.load(sum_ref.at[at], wide, optimized=False)
        count[...] = hopper.load(number_ref.at[at], row, optimized=False).astype(jnp.int32)
        plgpu.commit_smem()

        def step(i: Any, carry: Any) -> Any:
            sums, old, new = carry
            slot, more = lax.rem(i, N_SLOT), keys_of(i + 1)
            pl.when(i > 0)(partial(plgpu.barrier_wait, done))
            # First, since it has the group wait for all of its warps: none still multiplies with `hot`.
            state[lax.rem(i, N_STATE)] = sums.astype(BF16)
            pieces.scatter(counts=True)(hot, old, new, count)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(full.at[slot])

            def update(total: Any) -> None:
                plgpu.wgmma(total, hot, v.at[slot])

            sums = pl.run_state(update)(plgpu.ACC.init(sums))

            @pl.when((i > 0) & (i + N_SLOT - 1 < n_tile))
            def fetch_more() -> None:
                plgpu.barrier_wait(empty.at[lax.rem(i + N_SLOT - 1, N_SLOT)])
                fetch(i + N_SLOT - 1)

            return sums, new, more

        nobody = hopper.filled((BLOCK,), NOTHING, jnp.int32, single)
        lax.fori_loop(0, n_tile, step, (sums, nobody, keys_of(0)))

    def attend(half: int) -> None:
        n_register = N_REGISTER[1 + half]
        plgpu.set_max_registers(n_register, action="increase" if n_register > N_REGISTER[0] else "decrease")
        n_key = (half + 1) * HALF  # that these queries see some of

        def at_tile(i: Any) -> Any:
            return pl.ds(first + i * BLOCK + half * HALF, HALF)

        def code_of(i: Any) -> Array:
            at = at_tile(jnp.minimum(i, n_tile - 1))
            return hopper.load(query_ref.at[example, head, at], row, optimized=False)

        def rows_of(code: Array) -> tuple[Array, Array]:
            """Largest scores, and rows of `E`."""
            rows = jnp.maximum(code, 0) + head * n_query_code
            return pieces.pick()(top_ref, rows), pieces.gather(0)(weight_ref, rows)

        def step(i: Any, carry: Any) -> Any:
            code, largest, weight = carry
            more = code_of(i + 1)  # long before its rows are read
            slot = lax.rem(i, N_SLOT)
            plgpu.barrier_wait(ready)

            def weigh(near: Any) -> tuple[Array, Array]:
                plgpu.wgmma(near, weight, hot.at[:, pl.ds(0, n_key)])
                total = pieces.far_sum()(weight, count)
                picked, part = pieces.near_weights(half)(plgpu.wgmma_accumulator_load(near))
                plgpu.barrier_arrive(done)
                return picked, total + part

            picked, total = pl.run_scoped(weigh, plgpu.ACC((HALF, n_key), F32))
            plgpu.barrier_wait(full.at[slot])

            def add(result: Any) -> Array:
                plgpu.wgmma(result, weight, state.at[lax.rem(i, N_STATE)])
                plgpu.wgmma(result, picked, v.at[slot, pl.ds(0, n_key)])
                found = plgpu.wgmma_accumulator_load(result)
                plgpu.barrier_arrive(empty.at[slot])
                return found

            found = pl.run_scoped(add, plgpu.ACC((HALF, width), F32))
            # While the output is written: under a product, ptxas would have all products wait.
            more_rows = rows_of(more)
            total = pieces.prepare_rows(out.at[half], code, found, total)
            lse_ref[example, head, at_tile(i)] = largest + jnp.log(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out.at[half], out_ref.at[example, at_tile(i), head])
            return more, *more_rows

        code = code_of(0)
        lax.fori_loop(0, n_tile, step, (code, *rows_of(code)))
        plgpu.wait_smem_to_gmem(0)

    pl.when((group == 1) & is_wanted)(partial(attend, 0))
    pl.when((group == 2) & is_wanted)(partial(attend, 1))
