"""Sums over the keys before every block by Mosaic GPU: little slower than they can be written.

A program follows some codes of a head, whose sums stay in registers, from block to block. One group fetches,
one multiplies and writes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, hopper_one_hot
from jax_vq.kernels.hopper_one_hot import FAR, TILE
from jax_vq.kernels.tiles import BF16, F32, by_head

N_CODE = 64  # of a program, with all columns: whole rows are written
CHUNK = 256  # codes that bfloat16 tells apart
N_SLOT = 4  # tiles in shared memory
N_OUT = 3  # sums that are on their way to memory


def is_usable(n_padded: int, v: Array, block: int) -> bool:
    """Whether `block_states` can run."""
    _, length, _, width = v.shape
    fits = n_padded % (2 * N_CODE) == 0 and v.dtype == BF16 and block % TILE == 0 and length >= TILE
    return fits and hopper.is_usable(length, width)


def n_part(n_padded: int) -> int:
    """Programs that share the work of a head."""
    return n_padded // N_CODE


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
        hopper.swizzled(N_SLOT, TILE, width, dtype=BF16),
        hopper.swizzled(N_OUT, N_CODE, width, dtype=BF16),
        plgpu.SMEM((N_SLOT, TILE), BF16),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_SLOT),
        plgpu.Barrier(num_barriers=N_SLOT),
    )
    kernel = partial(_kernel, each=segment_len // TILE, n_together=block // TILE)
    run = hopper.launch(kernel, shapes, batch * n_head * n_segment * n_part(n_code), 2, scratch)
    token = lax.broadcasted_iota(jnp.int32, codes.shape, 1)
    missing = jnp.min(jnp.where(codes == -1, token, n_block * block), axis=1)
    relative = by_chunk(codes, n_code)
    states, *others = run(relative, v, first_vectors, first_numbers, missing)
    numbers, last_vectors, last_numbers = others
    return states.reshape(*numbers.shape, width), numbers, last_vectors, last_numbers


def by_chunk(codes: Array, n_code: int) -> Array:
    """`[B, T, K]` to `[B, K, N, T]` bfloat16, whole tiles: codes from the first one of each chunk on.

    A code of another chunk is rounded to none of this. So the copy engine brings codes as they are used.
    """
    first = jnp.arange(0, n_code, CHUNK, dtype=codes.dtype)[None, None, :, None]
    relative = (by_head(codes)[:, :, None] - first).astype(BF16)
    padding = *((0, 0),) * 3, (0, -codes.shape[1] % TILE)
    return jnp.pad(relative, padding, constant_values=FAR)


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
    """Codes of a segment of a head; programs at work together read the same."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    length, n_head, width = vector_ref.shape[1:]
    n_block, n_code = number_ref.shape[2:]
    n_segment, n_chunk = last_ref.shape[2], n_part(n_code)
    program, group = lax.axis_index("program"), lax.axis_index("group")
    chunk, head, segment, batch = hopper.indices_of(program, n_chunk, n_head, n_segment)
    first_code = chunk * N_CODE
    first = segment * each
    n_tile = jnp.minimum(each, pl.cdiv(length, TILE) - first)

    @pl.when(group == 1)
    def fetch_all() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def fetch(i: Any, slot: Any) -> None:
            at = pl.ds((first + i) * TILE, TILE)
            own = code_ref.at[batch, head, lax.div(first_code, CHUNK), at]
            plgpu.copy_gmem_to_smem(own, codes.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(vector_ref.at[batch, at, head], vectors.at[slot], full.at[slot])

        for slot in range(N_SLOT):
            pl.when(slot < n_tile)(partial(fetch, slot, slot))

        @pl.loop(jnp.minimum(n_tile, N_SLOT), n_tile)
        def refill(i: Any) -> None:
            slot = lax.rem(i, N_SLOT)
            plgpu.barrier_wait(empty.at[slot])
            fetch(i, slot)

    @pl.when(group == 0)
    def add_up() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(first_code, N_CODE)
        own = hopper_one_hot.own_codes(N_CODE, lax.rem(first_code, CHUNK))
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
                return hopper_one_hot.one_hot(codes.at[slot], own)

            def write(i: Any, state: Array, number: Array) -> None:
                block = lax.div(first + i, n_together)
                out = states.at[lax.rem(block, N_OUT)]
                start = ((batch * n_head + head) * n_block + block) * n_code + first_code
                plgpu.wait_smem_to_gmem(N_OUT - 1, wait_read_only=True)
                out[...] = state
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, state_ref.at[pl.ds(start, N_CODE)])
                number_ref[batch, head, block, rows] = count(number)

            def step(i: Any, carry: Any) -> Any:
                number, hot = carry
                slot = lax.rem(i, N_SLOT)
                state = total[...].astype(BF16)
                plgpu.wgmma(total, hot, vectors.at[slot])
                is_first = lax.rem(first + i, n_together) == 0  # tile of a block
                pl.when(is_first)(partial(write, i, state, number))
                more = hot_codes(i + 1)
                number += hopper_one_hot.partial_counts(hot)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[slot])
                return number, more

            total[...] = hopper.load(first_ref.at[batch, head, segment, rows], wide, optimized=False)
            carry: Any = hopper.filled((N_CODE, 8), 0, F32, wide), hot_codes(0)
            carry = lax.fori_loop(0, n_sound, step, carry)
            total[...] = total[...] + poison
            number, _ = lax.fori_loop(n_sound, n_tile, step, carry)
            return total[...], count(number)

        total, number = pl.run_scoped(run, plgpu.ACC((N_CODE, width), F32))
        last_ref[batch, head, segment, rows] = total
        last_number_ref[batch, head, segment, rows] = number
        plgpu.wait_smem_to_gmem(0)
