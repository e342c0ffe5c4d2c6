"""Causal attention over 129 to 512 codes by Mosaic GPU: `hopper_causal` with sums in two groups' registers.

A program has 64 columns of a value and takes 64 tokens at once. Two groups add up; they hand their sums on
chunk by chunk, once the products of the tile before are done with a chunk. One group attends, and one fetches
rows of `E`, values and codes. No product finds the weights of pairs: they are picked from those rows.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, hopper_barriers, hopper_wide_fetch, sizes
from jax_vq.kernels import hopper_pieces as pieces
from jax_vq.kernels import hopper_wide_pieces as wide_pieces
from jax_vq.kernels.hopper_pieces import BLOCK, CHUNK, HALF, NOTHING
from jax_vq.kernels.tiles import BF16, F32, by_head
from jax_vq.kernels.vq_sums import Sums

MAX_CODES = 512
N_SLOT = 2  # tiles in shared memory
MIN_SEGMENT = 8192  # tokens: shorter ones were not measured with all that is beside the kernel
MIN_SHARE = 0.75  # of processors at work, counted in whole waves of programs
N_REGISTER = 176, 128, 32  # of a thread: that adds up, that attends, that fetches
# The first barrier of each kind. Rows of a slot are there, or may be overwritten; values and codes of one may
# be overwritten; sums of a chunk are there. Those of the last kind, by which sums may be, come after these.
ROWS, ROWS_EMPTY, EMPTY, READY = 0, N_SLOT, 2 * N_SLOT, 3 * N_SLOT


def segment_len(query_codes: Array, v: Array, weight: Array) -> int:
    """Tokens of a segment for `follow`; 0 where it cannot run, or attention of blocks is faster."""
    n_code, (batch, length, _, width) = weight.shape[2], v.shape
    fits = v.dtype == weight.dtype == BF16 and query_codes.shape[1] == length
    fits = fits and n_code % CHUNK == 0 and CHUNK < n_code <= MAX_CODES
    if not fits or not hopper.is_usable(length, width):
        return 0
    n_row = batch * query_codes.shape[2] * (width // HALF)
    each = sizes.segment_len(length, n_row, BLOCK)
    n_program = n_row * -(-length // each)
    share = n_program / (-(-n_program // sizes.N_PROCESSOR) * sizes.N_PROCESSOR)
    return each if each >= MIN_SEGMENT and share >= MIN_SHARE else 0


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
      query_codes: int32 `[B, T, H]`; key_codes: `[B, T, K]`, others than 0 to C - 1 are nowhere; v:
        `[B, T, K, V]`.
      weight: `[H, Cq, C]`, top: `[H, Cq]`, of `vq_tables.Tables`.
      before: of every segment of `segment_len` tokens.
      mode: int32 `[B, H, S]`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, n_head = query_codes.shape
    n_segment, n_code = mode.shape[2], weight.shape[2]
    n_chunk = n_code // CHUNK
    scratch = (
        hopper.swizzled(n_code, HALF, dtype=BF16),
        hopper.swizzled(N_SLOT, HALF, HALF, dtype=BF16),
        hopper.swizzled(HALF, HALF, dtype=BF16),
        plgpu.SMEM((N_SLOT, HALF, n_code + wide_pieces.PADDING), BF16),
        plgpu.SMEM((N_SLOT, n_code), F32),
        plgpu.SMEM((n_code,), jnp.int32),
        plgpu.SMEM((N_SLOT, wide_pieces.N_KIND, HALF), BF16),
        plgpu.SMEM((2 * (READY + 2 * n_chunk),), jnp.int32),
        plgpu.Barrier(num_arrivals=1, num_barriers=N_SLOT),
    )
    shapes = pieces.result_shapes(query_codes, v)[:2]
    kernel = partial(_kernel, n_query_code=weight.shape[1], segment_len=segment_len)
    n_program = batch * n_head * n_segment * (v.shape[3] // HALF)
    run = hopper.launch(kernel, shapes, n_program, 4, scratch, by_hand=True)
    codes = pieces.whole_blocks(query_codes, 0), pieces.whole_blocks(key_codes, NOTHING)
    out, lse = run(*codes, v, weight.reshape(-1, n_code), top.reshape(-1), *before, mode)
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
    state: Any,
    v: Any,
    out: Any,
    rows: Any,
    count: Any,
    number: Any,
    codes: Any,
    barriers: Any,
    full: Any,
    *,
    n_query_code: int,
    segment_len: int,
) -> None:
    """Some columns of a segment of a head. Programs at work together read what lies together."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    length, n_head, width = out_ref.shape[1:]
    n_key_head, n_segment, n_code = v_ref.shape[2], mode_ref.shape[2], weight_ref.shape[1]
    n_chunk, n_column = n_code // CHUNK, width // HALF
    program, group = lax.axis_index("program"), lax.axis_index("group")
    part, head, segment, example = hopper.indices_of(program, n_column, n_head, n_segment)
    key_head = lax.div(head, n_head // n_key_head)
    first = segment * segment_len
    n_tile = pl.cdiv(jnp.minimum(segment_len, length - first), HALF)
    is_wanted = mode_ref[example, head, segment] == 0
    columns = pl.ds(part * HALF, HALF)

    free = READY + n_chunk
    arrivals = [HALF] * N_SLOT + [4] * N_SLOT + [12] * N_SLOT + [8] * n_chunk + [4] * n_chunk
    hopper_barriers.set_up(barriers, arrivals)
    wait, arrive = partial(hopper_barriers.wait, barriers), partial(hopper_barriers.arrive, barriers)

    def tile_at(i: Any) -> Any:
        return pl.ds(first + i * HALF, HALF)

    def slot_of(i: Any) -> tuple[Any, Any]:
        """And how often it was used before."""
        return lax.rem(i, N_SLOT), lax.div(i, N_SLOT)

    def add_up(own_group: int) -> None:
        plgpu.set_max_registers(N_REGISTER[0], action="increase")
        own = wide_pieces.own_codes()()

        def start(c: int) -> Array:
            at = pl.ds(c * CHUNK + own_group * HALF, HALF)
            ref = sum_ref.at[example, key_head, segment, at, columns]
            return hopper.load(ref, wide, optimized=False)

        def step(i: Any, sums: Any) -> Any:
            slot, _ = slot_of(i)

            def update(totals: Any) -> None:
                for c, total in enumerate(totals):
                    wait(free, c, i - 1)
                    found = plgpu.wgmma_accumulator_load(total, wait_n=None)
                    wide_pieces.store_state(c * CHUNK + own_group * HALF)(state, found)
                    arrive(READY, c, writes=True)
                    if c == 0:
                        plgpu.barrier_wait(full.at[slot])
                    hot = wide_pieces.one_hot(own_group, c)(codes, slot, own)
                    plgpu.wgmma(total, hot, v.at[slot])
                    plgpu.wgmma_wait(0)
                arrive(EMPTY, slot)

            return pl.run_state(update)(tuple(map(plgpu.ACC.init, sums)))

        lax.fori_loop(0, n_tile, step, tuple(map(start, range(n_chunk))))

    def attend() -> None:
        plgpu.set_max_registers(N_REGISTER[1], action="increase")

        def code_of(i: Any) -> Array:
            at = tile_at(jnp.minimum(i, n_tile - 1))
            return hopper.load(query_ref.at[example, head, at], row, optimized=False)

        def near_of(i: Any) -> tuple[Array, Array]:
            slot, n_before = slot_of(i)
            wait(ROWS, slot, n_before)
            plgpu.barrier_wait(full.at[slot])
            return wide_pieces.pick_near()(rows, codes, slot)

        def step(i: Any, carry: Any) -> Any:
            code, picked, near_parts = carry
            slot = slot_of(i)[0] + pieces.unknown_zero()()
            more = code_of(i + 1)
            place = jnp.maximum(code, 0) + head * n_query_code
            largest = pieces.pick()(top_ref, place)  # long before it is used

            def add(result: Any) -> Any:
                parts = near_parts
                plgpu.wgmma(result, picked, v.at[slot])
                for k in range(2 * n_chunk):
                    weight = wide_pieces.read_rows(k)(rows, slot)
                    if k % 2 == 0:
                        wait(READY, k // 2, i)
                    at = pl.ds(k * HALF, HALF)
                    plgpu.wgmma(result, weight, state.at[at])
                    if k == 2 * n_chunk - 1:
                        arrive(ROWS_EMPTY, slot)
                    parts = wide_pieces.add_far()(parts, weight, count.at[slot, at])
                    plgpu.wgmma_wait(1)
                    if k > 0 and k % 2 == 0:
                        arrive(free, k // 2 - 1)
                near = near_of(i + 1)
                found = plgpu.wgmma_accumulator_load(result)
                arrive(free, n_chunk - 1)
                arrive(EMPTY, slot)
                return found, wide_pieces.sums_of()(parts), *near

            found, total, *near = pl.run_scoped(add, plgpu.ACC((HALF, HALF), F32))
            total = pieces.prepare_rows(out, code, found, total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[example, tile_at(i), head, columns])

            @pl.when(part == 0)
            def write() -> None:
                lse_ref[example, head, tile_at(i)] = largest + jnp.log(total)

            return more, *near

        lax.fori_loop(0, n_tile, step, (code_of(0), *near_of(0)))
        plgpu.wait_smem_to_gmem(0)

    def fetch() -> None:
        plgpu.set_max_registers(N_REGISTER[2], action="decrease")
        single = plgpu.Layout.WG_STRIDED((n_code,), vec_size=1)
        at = example, key_head, segment
        number[...] = hopper.load(number_ref.at[at], single).astype(jnp.int32)
        hopper_wide_fetch.clear_padding()(rows)
        plgpu.commit_smem()
        n_token = key_ref.shape[2]
        key_place = (example * n_key_head + key_head) * n_token
        query_place = (example * n_head + head) * n_token

        def codes_of(i: Any) -> tuple[Array, Array]:
            start = first + jnp.minimum(i, n_tile - 1) * HALF
            return hopper_wide_fetch.read_codes()(key_ref, query_ref, key_place + start, query_place + start)

        def step(i: Any, own: tuple[Array, Array]) -> tuple[Array, Array]:
            key, query = own
            slot, n_before = slot_of(i)
            more = codes_of(i + 1)
            wait(ROWS_EMPTY, slot, n_before - 1)
            hopper_wide_fetch.fetch_rows(ROWS)(weight_ref, rows, barriers, query, head * n_query_code, slot)
            wait(EMPTY, slot, n_before - 1)
            hopper_wide_fetch.write_codes()(codes, count, number, key, slot)
            at = tile_at(jnp.minimum(i, n_tile - 1))
            plgpu.copy_gmem_to_smem(v_ref.at[example, at, key_head, columns], v.at[slot], full.at[slot])
            return more

        lax.fori_loop(0, n_tile + 1, step, codes_of(0))  # the keys of a tile behind the last one are weighed

    pl.when((group == 0) & is_wanted)(partial(add_up, 0))
    pl.when((group == 1) & is_wanted)(partial(add_up, 1))
    pl.when((group == 2) & is_wanted)(attend)
    pl.when((group == 3) & is_wanted)(fetch)
