"""What pieces that are written thread by thread start from: constants, addresses, the rows of a thread."""

from typing import Any


def integer(x: int) -> Any:
    """A constant of 32 bits."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.c(x, ir.IntegerType.get_signless(32))


def pointer(ref: Any, offset: Any) -> Any:
    """A pointer so many bytes behind the start of an array."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def first_row(thread: Any) -> Any:
    """Of the two, eight apart, that a thread of a group has of a product."""
    from jaxlib.mlir.dialects import arith

    lane, warp = arith.andi(thread, integer(31)), arith.shrui(thread, integer(5))
    return arith.addi(arith.shli(warp, integer(4)), arith.shrui(lane, integer(2)))


def row_of_thread(thread: Any) -> Any:
    """One of 64, for the first 16 threads of each warp, and once more for the others."""
    from jaxlib.mlir.dialects import arith

    first = arith.shli(arith.shrui(thread, integer(5)), integer(4))
    return arith.addi(first, arith.andi(thread, integer(15)))


def in_row() -> Any:
    """Which one of the four threads that share a row."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    return arith.andi(utils.thread_idx(), integer(3))
