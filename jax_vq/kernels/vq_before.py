"""The sums before every segment, and how each segment is worked on, in one pass over the sums of each."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_vq.kernels.tiles import F32, columns, launch, loop, place_of, power_of_two, tokens
from jax_vq.kernels.vq_sums import Sums
from jax_vq.kernels.vq_tables import MAX_RANGE, Tables

N_CODE = 8  # of a program
N_COLUMN = 128  # of a value, of a program
AT_ONCE = 8  # segments whose sums are read before the first of them is added


def before_segments(sums: Sums, first: Sums) -> tuple[Sums, Array]:
    """`vq_sums.before_segments`, and `[B, K, S, N]` int32: 1 where a sum of a segment is not finite."""
    batch, n_head, n_segment, n_code, width = sums.vectors.shape
    n_column = min(power_of_two(width), N_COLUMN)
    n_part = pl.cdiv(width, n_column)
    shapes = (
        *(jax.ShapeDtypeStruct(x.shape, F32) for x in sums),
        jax.ShapeDtypeStruct((batch, n_head, n_segment, n_part * n_code), jnp.int32),
    )
    grid = n_code // N_CODE, batch * n_head, n_part
    *before, is_bad = launch(_kernel, shapes, grid, 4, 1)(*sums)
    # Most often `first` is nothing, which XLA knows.
    before = (x + start for x, start in zip(before, first, strict=True))
    return Sums(*before), is_bad


def modes(tables: Tables, is_bad: Array) -> Array:
    """How `[B, H, S]` segments are worked on: 0; 1 with a NaN or inf; 2 in heads with wide scores."""
    batch, _, n_segment, _ = is_bad.shape
    n_head = tables.spread.shape[0]
    shape = jax.ShapeDtypeStruct((batch, n_head, n_segment), jnp.int32)
    mode: Array = launch(_mode_kernel, shape, (n_segment, batch * n_head), 1, 1)(tables.spread, is_bad)
    return mode


def _mode_kernel(spread_ref: Any, bad_ref: Any, mode_ref: Any) -> None:
    segment, batch, head, key_head = place_of(spread_ref.shape[0], bad_ref.shape[1])
    codes, flags = (tokens(0, power_of_two(ref.shape[-1]), ref.shape[-1]) for ref in (spread_ref, bad_ref))
    spread = plt.load(spread_ref.at[head, codes[0]], mask=codes[1], other=0)
    is_bad = plt.load(bad_ref.at[batch, key_head, segment, flags[0]], mask=flags[1], other=0)
    mode = jnp.maximum(jnp.max(jnp.where(spread <= MAX_RANGE, jnp.int32(0), jnp.int32(2))), jnp.max(is_bad))
    plt.store(mode_ref.at[batch, head, segment], mode)


def _kernel(sum_ref: Any, number_ref: Any, before_ref: Any, before_number_ref: Any, bad_ref: Any) -> None:
    n_head, n_segment, _, width = sum_ref.shape[1:]
    batch, head, part = pl.program_id(1) // n_head, pl.program_id(1) % n_head, pl.program_id(2)
    first, n_code = pl.program_id(0) * N_CODE, sum_ref.shape[3]
    codes, flags = pl.ds(first, N_CODE), pl.ds(part * n_code + first, N_CODE)
    cols = columns(part, min(power_of_two(width), N_COLUMN), width)
    shape = N_CODE, cols[0].size

    def step(i: Any, carry: Any) -> Any:
        total, number = carry
        read = []
        for k in range(AT_ONCE):
            segment = i * AT_ONCE + k
            row = jnp.broadcast_to(segment < n_segment, (N_CODE,))
            there = jnp.broadcast_to(row[:, None], shape)
            there = there if cols[1] is None else there & cols[1][None, :]
            place = batch, head, segment
            value = plt.load(sum_ref.at[*place, codes, cols[0]], mask=there, other=0)
            read.append((place, row, there, value, plt.load(number_ref.at[*place, codes], mask=row, other=0)))
        for place, row, there, value, count in read:
            plt.store(before_ref.at[*place, codes, cols[0]], total, mask=there)
            plt.store(before_number_ref.at[*place, codes], number, mask=row)
            is_bad = jnp.max((~(jnp.abs(value) < jnp.inf)).astype(jnp.int32), axis=1)
            plt.store(bad_ref.at[*place, flags], is_bad, mask=row)
            total, number = total + value, number + count
        return total, number

    loop(pl.cdiv(n_segment, AT_ONCE), step, (jnp.zeros(shape, F32), jnp.zeros((N_CODE,), F32)))
