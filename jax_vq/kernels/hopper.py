"""What the kernels in Pallas for Mosaic GPU share. They are for the steps that read most, on Hopper.

A program of such a kernel has several groups of four warps: one fetches tiles into shared memory ahead of
time, the others multiply, so that no product waits for memory or for another group's work between products.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jax_vq.kernels.tiles import is_interpreted
from jax_vq.ops.implementations import is_asked_for, runs

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
) -> Callable[..., Any]:
    """A kernel as a function of its input arrays, made without 64-bit types.

    Args:
      body: takes references to the arrays, the results and `scratch`; the axes "program" and "group" tell
        which group of four warps it runs in.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    call = plgpu.kernel(
        body,
        out_type=out_shapes,
        grid=(n_program,),
        grid_names=("program",),
        num_threads=n_group,
        thread_name="group",
        scratch_types=scratch,
    )

    def run(*arrays: Array) -> Any:
        runs("mosaic_gpu")
        with jax.enable_x64(False):
            return call(*arrays)

    return run


def swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices `[..., rows, columns]` that a product reads."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: Any, layout: Any, **options: Any) -> Array:
    """`plgpu.load`, whose index is an argument up to jax 0.10."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    has_index = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
    return plgpu.load(ref, *(((),) if has_index else ()), layout=layout, **options)


def transposed(ref: Any) -> Any:
    """A matrix in shared memory, read by columns."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
