"""Sums over tokens per code by Mosaic GPU without products: tokens are sorted by code, then vectors added.

A vector is read and added once, however many codes there are, where a product with one-hot codes multiplies
most of them by zero; float32 vectors need no parts.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jax_vq.kernels import hopper, hopper_order, hopper_runs, sizes
from jax_vq.kernels.hopper_order import N_WARP
from jax_vq.kernels.hopper_pieces import BLOCK, NOTHING
from jax_vq.kernels.tiles import BF16, F32, by_head

N_GROUP = N_WARP // 4
N_AHEAD = 4  # blocks of codes that a group reads ahead of time
COLUMNS = 128  # of a program
MIN_CODES = 257  # of bfloat16 vectors: for fewer a product is as fast
MAX_CODES = 32 * N_WARP  # a thread for each
MIN_TOKENS = 2**11  # of bfloat16, of a program: for fewer, sorting and writing take the time
MIN_TOKENS_FLOAT32 = 2**7
MAX_TOKENS = 2**15  # of a program, whose order is in shared memory


def is_usable(n_padded: int, vectors: Array, segment_len: int) -> bool:
    """Whether `segment_sums` can run, and is faster than products."""
    _, length, _, width = vectors.shape
    n_least = MIN_CODES if vectors.dtype == BF16 else 1
    has_codes = n_least <= n_padded <= MAX_CODES and n_padded % 32 == 0
    fits = vectors.dtype in (BF16, F32) and (width <= COLUMNS or width % COLUMNS == 0)
    is_long = min(segment_len, length) >= min_tokens(vectors.dtype)
    return has_codes and fits and is_long and hopper.is_usable(length, min(width, COLUMNS))


def segment_sums(codes: Array, vectors: Array, n_padded: int, segment_len: int) -> tuple[Array, Array]:
    """`vq_sums.segment_sums` without weights: sums by code, and how many tokens have each.

    A program has a segment, or a part of one where segments are long or few; sums of parts are added.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, n_head, width = vectors.shape
    n_segment, n_column = pl.cdiv(length, segment_len), pl.cdiv(width, COLUMNS)
    n_part = parts_of_segment(segment_len, batch * n_head * n_segment * n_column, min_tokens(vectors.dtype))
    part_len = pl.cdiv(segment_len, n_part * BLOCK) * BLOCK
    shape = batch, n_head, n_segment, n_part, n_padded
    shapes = jax.ShapeDtypeStruct((*shape, width), F32), jax.ShapeDtypeStruct(shape, F32)
    scratch = (
        plgpu.SMEM((N_WARP, n_padded), jnp.int32),
        plgpu.SMEM((hopper_order.n_start(n_padded),), jnp.int32),
        plgpu.SMEM((part_len,), jnp.int16),
        plgpu.SMEM((part_len,), jnp.int16),
        plgpu.SMEM((N_WARP, min(width, COLUMNS)), F32),
    )
    kernel = partial(_kernel, segment_len=segment_len, part_len=part_len)
    n_program = batch * n_head * n_segment * n_part * n_column
    call = hopper.launch(kernel, shapes, n_program, N_GROUP, scratch, by_thread=True)
    # Blocks start where segments do.
    more = -length % BLOCK if segment_len % BLOCK == 0 else BLOCK
    padding = (0, 0), (0, 0), (0, more)
    total, number = call(jnp.pad(by_head(codes), padding, constant_values=NOTHING), vectors)
    if n_part == 1:
        return total[:, :, :, 0], number[:, :, :, 0]
    return jnp.sum(total, axis=3), jnp.sum(number, axis=3)


def min_tokens(dtype: Any) -> int:
    """Tokens of a program that are enough for it to be faster than one with products."""
    return MIN_TOKENS if dtype == BF16 else MIN_TOKENS_FLOAT32


def parts_of_segment(segment_len: int, n_program: int, n_least: int) -> int:
    """Parts of a segment, of at least so many tokens, where so many programs would have whole ones."""
    n_wanted = min(sizes.N_PROCESSOR // n_program, segment_len // n_least)
    return max(n_wanted, pl.cdiv(segment_len, MAX_TOKENS), 1)


def _kernel(
    code_ref: Any,
    vector_ref: Any,
    sum_ref: Any,
    number_ref: Any,
    place: Any,
    start: Any,
    rank: Any,
    order: Any,
    cut: Any,
    *,
    segment_len: int,
    part_len: int,
) -> None:
    """A part of a segment of a head, and some columns.

    Columns run fastest, then heads: programs at work together read what lies side by side.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
    n_head, n_segment, n_part, n_code, width = sum_ref.shape[1:]
    program, group = lax.axis_index("program"), lax.axis_index("group")
    sizes_of_axes = pl.cdiv(width, COLUMNS), n_head, n_part, n_segment
    column, head, part, segment, batch = hopper.indices_of(program, *sizes_of_axes)
    first = segment * segment_len + part * part_len
    last = jnp.minimum(jnp.minimum(first + part_len, (segment + 1) * segment_len), vector_ref.shape[1])
    n_each = N_GROUP * N_AHEAD * BLOCK
    n_round = pl.cdiv(jnp.maximum(last - first, 0), n_each)

    def tokens(i: Any, k: int) -> Array:
        """A block of a round's: every group has `N_AHEAD` of them."""
        start = ((i * N_AHEAD + k) * N_GROUP + group) * BLOCK
        return plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=single) + start

    def read(i: Any) -> list[Array]:
        """Codes of a round; nothing behind the end."""
        found = []
        for k in range(N_AHEAD):
            start = first + ((i * N_AHEAD + k) * N_GROUP + group) * BLOCK
            at = pl.ds(jnp.minimum(start, code_ref.shape[2] - BLOCK), BLOCK)
            code = hopper.load(code_ref.at[batch, head, at], single)
            found.append(jnp.where(tokens(i, k) < last - first, code, NOTHING))
        return found

    def pass_over(visit: Any) -> None:
        def step(i: Any, ahead: Any) -> Any:
            more = read(i + 1)
            for k, code in enumerate(ahead):
                visit(code, tokens(i, k))
            return more

        lax.fori_loop(0, n_round, step, read(0))

    hopper_order.clear(n_code)(place, start)
    pass_over(partial(hopper_order.count(n_code), place, start, rank))
    hopper_order.starts(n_code)(place, start, number_ref.at[batch, head, segment, part])
    pass_over(partial(hopper_order.put(n_code), place, rank, order))
    columns = pl.ds(column * COLUMNS, min(width, COLUMNS))
    vectors = vector_ref.at[batch, pl.ds(first, BLOCK), head, columns]
    hopper_runs.add_up(n_code)(vectors, order, start, cut, sum_ref.at[batch, head, segment, part, :, columns])
