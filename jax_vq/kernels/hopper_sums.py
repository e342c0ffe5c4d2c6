"""Sums over tokens per code by Mosaic GPU: as fast as the vectors can be read."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, hopper_one_hot
from jax_vq.kernels.hopper_one_hot import FAR, TILE
from jax_vq.kernels.tiles import BF16, F32, by_head

CHUNK = 128  # codes come in whole chunks
N_SLOT = 6  # tiles in shared memory
N_AHEAD = 2  # tiles whose codes are read ahead of time


def is_usable(n_padded: int, vectors: Array, segment_len: int) -> bool:
    """Whether `segment_sums` can run."""
    _, length, _, width = vectors.shape
    fits = n_padded % CHUNK == 0 and vectors.dtype == BF16 and length >= TILE and segment_len % TILE == 0
    return fits and hopper.is_usable(length, width)


def segment_sums(codes: Array, vectors: Array, n_padded: int, segment_len: int) -> tuple[Array, Array]:
    """`vq_sums.segment_sums` without weights: sums by code, and how many tokens have each.

    Two groups multiply one-hot codes, which stay in registers, with a tile of vectors; each has half of a
    program's codes, and their sums in registers.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, n_head, width = vectors.shape
    n_segment = pl.cdiv(length, segment_len)
    shape = batch, n_head, n_segment, n_padded
    n_row = CHUNK if n_padded % (2 * CHUNK) == 0 else CHUNK // 2
    n_program = batch * n_head * n_segment * (n_padded // (2 * n_row))
    shapes = jax.ShapeDtypeStruct((*shape, width), F32), jax.ShapeDtypeStruct(shape, F32)
    scratch = (
        hopper.swizzled(N_SLOT, TILE, width, dtype=BF16),
        plgpu.SMEM((N_SLOT, 3 * TILE), BF16),
        plgpu.SMEM((TILE,), jnp.int32),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=2, num_barriers=N_SLOT),
        plgpu.Barrier(num_arrivals=1),
    )
    kernel = partial(_kernel, segment_len=segment_len, n_row=n_row)
    total, number = hopper.launch(kernel, shapes, n_program, 3, scratch)(by_head(codes), vectors)
    return total, number


def _kernel(
    code_ref: Any,
    vector_ref: Any,
    sum_ref: Any,
    number_ref: Any,
    vectors: Any,
    codes: Any,
    missing: Any,
    full: Any,
    empty: Any,
    done: Any,
    *,
    segment_len: int,
    n_row: int,
) -> None:
    """Some codes of a segment of a head, `n_row` for each of two groups.

    Codes run fastest, then heads: programs at work together read the same, or what lies side by side.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wide, row, column = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    length, n_head, width = vector_ref.shape[1:]
    n_segment, n_code = sum_ref.shape[2:4]
    program, group = lax.axis_index("program"), lax.axis_index("group")
    n_chunk = n_code // (2 * n_row)
    chunk, head, segment, batch = hopper.indices_of(program, n_chunk, n_head, n_segment)
    first_code = chunk * (2 * n_row)
    first = segment * segment_len
    n_tile = pl.cdiv(jnp.minimum(segment_len, length - first), TILE)

    @pl.when(group == 2)
    def fetch_all() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def fetch(i: Any, slot: Any) -> None:
            at = pl.ds(first + i * TILE, TILE)
            plgpu.copy_gmem_to_smem(vector_ref.at[batch, at, head], vectors.at[slot], full.at[slot])

        def read(i: Any) -> Array:
            start = first + jnp.minimum(i, n_tile - 1) * TILE
            return _read_codes(code_ref, batch, head, start)

        def step(i: Any, carry: Any, *, waits: bool) -> Any:
            *ahead, is_missing = carry
            slot = lax.rem(i, N_SLOT)
            more = read(i + N_AHEAD)
            if waits:
                plgpu.barrier_wait(empty.at[slot])
                fetch(i, slot)
            behind = jnp.maximum(first + (i + 1) * TILE - length, 0)
            _write_codes(codes, slot, ahead[0], first_code, behind)
            is_bad = _is_inside(behind) & (ahead[0] == -1)
            is_missing = jnp.maximum(is_missing, jnp.where(is_bad, 1, 0))
            plgpu.barrier_arrive(full.at[slot])
            return *ahead[1:], more, is_missing

        for slot in range(N_SLOT):
            pl.when(slot < n_tile)(partial(fetch, slot, slot))
        carry: Any = *(read(i) for i in range(N_AHEAD)), hopper.filled((TILE,), 0, jnp.int32, row)
        n_first = jnp.minimum(n_tile, N_SLOT)
        carry = lax.fori_loop(0, n_first, partial(step, waits=False), carry)
        carry = lax.fori_loop(n_first, n_tile, partial(step, waits=True), carry)
        missing[...] = carry[-1]
        plgpu.barrier_arrive(done)

    @pl.when(group < 2)
    def add_up() -> None:
        plgpu.set_max_registers(232, action="increase")
        own = hopper_one_hot.own_codes(n_row, n_row * group)

        def run(total: Any) -> tuple[Array, Array]:
            def step(i: Any, number: Array) -> Array:
                slot = lax.rem(i, N_SLOT)
                plgpu.barrier_wait(full.at[slot])
                hot = hopper_one_hot.one_hot(codes.at[slot, pl.ds(TILE, TILE)], own)
                plgpu.wgmma(total, hot, vectors.at[slot])
                more = hopper_one_hot.partial_counts(hot)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[slot])
                return number + more

            number = lax.fori_loop(0, n_tile, step, hopper.filled((n_row, 8), 0, F32, wide))
            return total[...], jnp.sum(number, axis=1)

        total, number = pl.run_scoped(run, plgpu.ACC((n_row, width), F32))
        plgpu.barrier_wait(done)
        is_missing = lax.broadcast_in_dim(hopper.load(missing, column).astype(F32), own.shape, [1])
        is_missing = lax.broadcast_in_dim(jnp.max(is_missing, axis=1), total.shape, [0])
        at = pl.ds(first_code + n_row * group, n_row)
        sum_ref[batch, head, segment, at] = jnp.where(is_missing > 0, jnp.nan, total)
        number_ref[batch, head, segment, at] = number


def _read_codes(ref: Any, batch: Any, head: Any, start: Any) -> Array:
    """`[T]` of `[B, K, T]` from `start` on; at the end of the sequence, of its last whole tile."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    at = pl.ds(jnp.minimum(start, ref.shape[2] - TILE), TILE)
    return hopper.load(ref.at[batch, head, at], plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _is_inside(behind: Any) -> Array:
    """Which of the codes that were read are of the tile, of which so many tokens are behind the end."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    row = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=row) >= behind


def _write_codes(codes: Any, slot: Any, code: Array, first_code: Any, behind: Any) -> None:
    """Codes from a first one on, shifted to where the tile starts; what is behind the end is `FAR`.

    A tile is the middle third of a slot.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @pl.when(behind > 0)
    def clear() -> None:
        far = hopper.filled((TILE,), FAR, BF16, plgpu.Layout.WGMMA.reduce(1))
        codes[slot, pl.ds(2 * TILE - behind, TILE)] = far

    # bfloat16 has the integers up to 256, and rounds no code of another program to one of this.
    own = jnp.where(_is_inside(behind), (code - first_code).astype(F32), np.float32(FAR))
    codes[slot, pl.ds(TILE - behind, TILE)] = own.astype(BF16)
