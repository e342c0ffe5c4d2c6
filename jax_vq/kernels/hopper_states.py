"""Sums over the keys before every block by Mosaic GPU: little slower than they can be written.

A program follows some codes and columns of a head, whose sums stay in registers, from block to block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, hopper_one_hot
from jax_vq.kernels.hopper_one_hot import TILE
from jax_vq.kernels.tiles import BF16, F32

N_SIDE = 64  # codes and columns of a group
N_GROUP = 2  # that multiply, with codes of their own
N_CODE = N_GROUP * N_SIDE  # of a program
N_SLOT = 6  # tiles in shared memory
N_AHEAD = 4  # tiles whose codes are read ahead of time
N_OUT = 3  # sums of a group that are on their way to memory


def is_usable(n_padded: int, v: Array, block: int) -> bool:
    """Whether `block_states` can run."""
    _, length, _, width = v.shape
    fits = n_padded % N_CODE == 0 and v.dtype == BF16 and block % TILE == 0 and length >= TILE
    return fits and hopper.is_usable(length, width)


def n_part(n_padded: int, width: int) -> int:
    """Programs that share the work of a head."""
    return n_padded * width // (N_GROUP * N_SIDE * N_SIDE)


def block_states(
    codes: Array,
    v: Array,
    first_vectors: Array,
    first_numbers: Array,
    block: int,
    segment_len: int,
) -> tuple[Array, Array, Array, Array]:
    """`vq_states.block_states` without weights.

    Args:
      codes: int32 `[B, T, K]`; a token of code -1 makes all later sums NaN.
      v: `[B, T, K, V]`.
      first_vectors, first_numbers: `[B, K, S, C, V]`, `[B, K, S, C]`, sums before every segment.
      block: tokens of a block, a multiple of `TILE`.
      segment_len: tokens of a segment, a multiple of `block`.

    Returns:
      Sums before every block: `[B, K, N, C, V]` bfloat16, `[B, K, N, C]`; and with the last token of every
      segment: `[B, K, S, C, V]`, `[B, K, S, C]`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, _, n_head, width = v.shape
    n_segment, n_code = first_numbers.shape[2:]
    n_block = n_segment * (segment_len // block)
    shapes = (
        jax.ShapeDtypeStruct((batch * n_head * n_block * n_code, width), BF16),
        jax.ShapeDtypeStruct((batch, n_head, n_block, n_code), F32),
        *(jax.ShapeDtypeStruct(x.shape, F32) for x in (first_vectors, first_numbers)),
    )
    scratch = (
        hopper.swizzled(N_SLOT, TILE, N_SIDE, dtype=BF16),
        hopper.swizzled(N_GROUP * N_OUT, N_SIDE, N_SIDE, dtype=BF16),
        hopper_one_hot.slots(N_SLOT),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=N_GROUP, num_barriers=N_SLOT),
    )
    kernel = partial(_kernel, each=segment_len // TILE, n_together=block // TILE)
    run = hopper.launch(kernel, shapes, batch * n_head * n_segment * n_part(n_code, width), 3, scratch)
    token = lax.broadcasted_iota(jnp.int32, codes.shape, 1)
    missing = jnp.min(jnp.where(codes == -1, token, n_block * block), axis=1)
    states, *others = run(codes, v, first_vectors, first_numbers, missing)
    numbers, last_vectors, last_numbers = others
    return states.reshape(*numbers.shape, width), numbers, last_vectors, last_numbers


def _kernel(
    code_ref: Any,
    vector_ref: Any,
    first_ref: Any,
    first_number_ref: Any,
    missing_ref: Any,
    state_ref: Any,
    number_ref: Any,
    last_ref: Any,
    last_number_ref: Any,
    vectors: Any,
    states: Any,
    codes: Any,
    full: Any,
    empty: Any,
    *,
    each: int,
    n_together: int,
) -> None:
    """Codes and columns of a segment of a head; programs at work together read the same."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    length, n_head, width = vector_ref.shape[1:]
    n_block, n_code = number_ref.shape[2:]
    n_segment, n_chunk, n_side = last_ref.shape[2], n_code // N_CODE, width // N_SIDE
    program, group = lax.axis_index("program"), lax.axis_index("group")
    chunk, part = lax.rem(program, n_chunk), lax.rem(lax.div(program, n_chunk), n_side)
    place = lax.div(program, n_chunk * n_side)
    head, segment = lax.rem(place, n_head), lax.rem(lax.div(place, n_head), n_segment)
    batch = lax.div(place, n_head * n_segment)
    first = segment * each
    n_tile = jnp.minimum(each, pl.cdiv(length, TILE) - first)
    first_code, columns = chunk * N_CODE, pl.ds(part * N_SIDE, N_SIDE)

    @pl.when(group == N_GROUP)
    def fetch_all() -> None:
        plgpu.set_max_registers(80, action="decrease")

        def fetch(i: Any, slot: Any) -> None:
            at = pl.ds((first + i) * TILE, TILE)
            plgpu.copy_gmem_to_smem(vector_ref.at[batch, at, head, columns], vectors.at[slot], full.at[slot])

        def read(i: Any) -> Array:
            start = (first + jnp.minimum(i, n_tile - 1)) * TILE
            return hopper_one_hot.read_codes(code_ref, batch, head, start)

        def step(i: Any, ahead: Any, *, waits: bool) -> Any:
            slot = lax.rem(i, N_SLOT)
            more = read(i + N_AHEAD)
            if waits:
                plgpu.barrier_wait(empty.at[slot])
                fetch(i, slot)
            behind = jnp.maximum((first + i + 1) * TILE - length, 0)
            hopper_one_hot.write_codes(codes, slot, ahead[0], first_code, behind, jnp.int32)
            plgpu.barrier_arrive(full.at[slot])
            return *ahead[1:], more

        for slot in range(N_SLOT):
            pl.when(slot < n_tile)(partial(fetch, slot, slot))
        n_first = jnp.minimum(n_tile, N_SLOT)
        ahead = lax.fori_loop(0, n_first, partial(step, waits=False), tuple(map(read, range(N_AHEAD))))
        lax.fori_loop(n_first, n_tile, partial(step, waits=True), ahead)

    @pl.when(group < N_GROUP)
    def add_up() -> None:
        plgpu.set_max_registers(208, action="increase")
        own_code = N_SIDE * group  # in the chunk
        rows = pl.ds(first_code + own_code, N_SIDE)
        counts = part == 0
        own = hopper_one_hot.own_codes(N_SIDE, own_code)
        first_number = hopper.load(first_number_ref.at[batch, head, segment, rows], row, optimized=False)
        missing = lax.div(missing_ref[batch, head], TILE) - first
        poison = jnp.where(missing < n_tile, jnp.nan, 0).astype(F32)
        n_sound = jnp.clip(missing + 1, 0, n_tile)

        def run(total: Any) -> tuple[Array, Array]:
            def count(number: Array) -> Array:
                return first_number + jnp.sum(number, axis=1)

            def hot_codes(i: Any) -> Array:
                slot = lax.rem(i, N_SLOT)
                pl.when(i < n_tile)(lambda: plgpu.barrier_wait(full.at[slot]))
                return hopper_one_hot.one_hot(codes, slot, own)

            def when_first(i: Any, write: Any) -> None:
                """In the first tile of a block."""
                write() if n_together == 1 else pl.when(lax.rem(first + i, n_together) == 0)(write)

            def block_of(i: Any) -> Any:
                return lax.div(first + i, n_together)

            def write_state(i: Any, state: Array) -> None:
                out = states.at[group * N_OUT + lax.rem(lax.div(i, n_together), N_OUT)]
                start = ((batch * n_head + head) * n_block + block_of(i)) * n_code + first_code + own_code
                plgpu.wait_smem_to_gmem(N_OUT - 1, wait_read_only=True)
                out[...] = state
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, state_ref.at[pl.ds(start, N_SIDE), columns])

            def write_number(i: Any, number: Array) -> None:
                number_ref[batch, head, block_of(i), rows] = count(number)

            def step(i: Any, carry: Any) -> Any:
                number, hot = carry
                slot = lax.rem(i, N_SLOT)
                state = total[...].astype(BF16)
                plgpu.wgmma(total, hot, vectors.at[slot])
                when_first(i, partial(write_state, i, state))
                more, before = hot_codes(i + 1), number
                number += hopper_one_hot.partial_counts(hot)
                # A branch: what comes before it does not start after it.
                pl.when(counts)(partial(when_first, i, partial(write_number, i, before)))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[slot])
                return number, more

            first_sum = hopper.load(first_ref.at[batch, head, segment, rows, columns], wide, optimized=False)
            total[...] = first_sum
            number = hopper.filled((N_SIDE, 8), 0, F32, wide)
            carry: Any = number, hot_codes(0)
            carry = lax.fori_loop(0, n_sound, step, carry)
            total[...] = total[...] + poison
            number, _ = lax.fori_loop(n_sound, n_tile, step, carry)
            return total[...], count(number)

        total, number = pl.run_scoped(run, plgpu.ACC((N_SIDE, N_SIDE), F32))
        last_ref[batch, head, segment, rows, columns] = total

        @pl.when(counts)
        def write_last() -> None:
            last_number_ref[batch, head, segment, rows] = number

        plgpu.wait_smem_to_gmem(0)
