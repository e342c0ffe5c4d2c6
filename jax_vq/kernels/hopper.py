"""What the kernels in Pallas for Mosaic GPU share. They are for the steps that read most, on Hopper.

A program of such a kernel has several groups of four warps: one fetches tiles into shared memory ahead of
time, the others multiply, so that no product waits for memory or for another group's work between products.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_vq.kernels.tiles import is_interpreted, without_64_bits
from jax_vq.ops.implementations import is_asked_for

WIDTHS = 64, 128  # of vectors: whole rows of what shared memory is swizzled by
VERSION = 0, 11  # of jax, whose interface to Mosaic GPU is unstable; others run Triton's kernels
ROWS_TOGETHER = 8  # of an array that is copied in tiles: its length is a multiple


def is_usable(length: int, width: int) -> bool:
    """Whether a kernel of this kind can take vectors of such a shape, where none by Triton was asked for."""
    is_known = jax.__version_info__[:2] == VERSION and not is_interpreted()
    return is_known and not is_asked_for("triton") and fits(length, width)


def fits(length: int, width: int) -> bool:
    """Whether vectors can be copied in tiles."""
    return length % ROWS_TOGETHER == 0 and width in WIDTHS


def launch(
    body: Callable[..., None],
    out_shapes: Any,
    n_program: int,
    n_group: int,
    scratch: Any,
    *,
    by_thread: bool = False,
    by_hand: bool = False,
) -> Callable[..., Any]:
    """A kernel as a function of its input arrays, made without 64-bit types.

    Args:
      body: takes references to the arrays, the results and `scratch`; the axes "program" and "group" tell
        which group of four warps it runs in.
      by_thread: lowered for single threads, as `hopper_pieces` are written for.
      by_hand: likewise, with no barriers but those that `body` has.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(*refs: Any) -> None:
        with jax.enable_x64(False):  # `jax.vmap` traces it anew, after the call
            body(*refs)

    lane = mgpu.LoweringSemantics.Lane
    params = plgpu.CompilerParams(
        lowering_semantics=lane,
        approx_math=True,
        reduction_scratch_bytes=0,
        unsafe_no_auto_barriers=by_hand,
    )
    call = plgpu.kernel(
        run,
        out_type=out_shapes,
        grid=(n_program,),
        grid_names=("program",),
        num_threads=n_group,
        thread_name="group",
        scratch_types=scratch,
        compiler_params=params if by_thread or by_hand else None,
    )
    return without_64_bits("mosaic_gpu", call)


def indices_of(place: Any, *sizes: int) -> tuple[Any, ...]:
    """A number as indices of axes of these sizes, of which the first runs fastest, and of one more axis."""
    found = []
    for size in sizes:
        found.append(lax.rem(place, size))
        place = lax.div(place, size)
    return *found, place


def swizzle() -> tuple[Any, Any]:
    """How a matrix lies in shared memory that a product reads."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices `[..., rows, columns]` that a product reads."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM(shape, dtype, transforms=swizzle())


def filled(shape: tuple[int, ...], value: float, dtype: Any, layout: Any) -> Array:
    """An array of one value in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    array: Array = plgpu.layout_cast(jnp.full(shape, value, dtype), layout)
    return array


def load(ref: Any, layout: Any, **options: Any) -> Array:
    """`plgpu.load`, whose index is an argument up to jax 0.10."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, **options)


def transposed(ref: Any) -> Any:
    """A matrix in shared memory, read by columns."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
