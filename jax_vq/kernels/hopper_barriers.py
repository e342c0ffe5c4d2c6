"""Barriers in shared memory by hand, for kernels by Mosaic GPU: warps arrive, not threads.

`n` of them are int32 `[2 n]`.
"""

from typing import Any

import jax.numpy as jnp

from jax_vq.kernels.hopper_threads import integer, pointer

WARPS = 4  # of a group


def _run(ptx: str, constraints: str, *arguments: Any) -> None:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, list(arguments), ptx, constraints, has_side_effects=True)


def set_up(ref: Any, counts: list[int]) -> None:
    """Barriers that wait for so many arrivals, for all groups of a program from here on."""
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import arith

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_: Any, barriers: Any) -> None:
        is_first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), integer(0))
        with utils.when(is_first):
            for k, count in enumerate(counts):
                at = pointer(barriers, integer(8 * k))
                _run("mbarrier.init.shared::cta.b64 [$0], $1;", "r,r", at, integer(count))
            _run("fence.mbarrier_init.release.cluster;", "")
            _run("fence.proxy.async.shared::cta;", "")
        _run("bar.sync 0;", "")

    run(ref)


def scalar(x: Any) -> Any:
    """The register of a number that all threads have."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    x = x.registers.reshape(-1)[0]
    return vector.extract(x, [], [0]) if isinstance(x.type, ir.VectorType) else x


def _at(barriers: Any, first: int, slot: Any) -> Any:
    """The address of a barrier, `slot` after the first one of its kind."""
    from jaxlib.mlir.dialects import arith

    return pointer(barriers, arith.addi(integer(8 * first), arith.shli(slot, integer(3))))


def _call(body: Any, ref: Any, *numbers: Any) -> None:
    """Run `body(barriers, numbers)` with scalars that may depend on a loop."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(splat,) * len(numbers)))
    def run(_: Any, barriers: Any, *given: Any) -> None:
        body(barriers, *map(scalar, given))

    run(ref, *(jnp.asarray(x, jnp.int32) for x in numbers))


def arrive(ref: Any, first: int, slot: Any = 0, *, writes: bool = False) -> None:
    """By each warp of a group, once its threads are here; products see what they wrote, if they did."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    def body(barriers: Any, slot: Any) -> None:
        if writes:
            _run("fence.proxy.async.shared::cta;", "")
        _run("bar.warp.sync 0xffffffff;", "")
        lane = arith.andi(utils.thread_idx(), integer(31))
        is_first = arith.cmpi(arith.CmpIPredicate.eq, lane, integer(0))
        ptx = "@$1 mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
        _run(ptx, "r,b", _at(barriers, first, slot), is_first)

    _call(body, ref, slot)


def wait(ref: Any, first: int, slot: Any, phase: Any) -> None:
    """Until the phase of this number is over, of those counted from 0; -1 is over from the start."""
    from jaxlib.mlir.dialects import arith

    def body(barriers: Any, slot: Any, phase: Any) -> None:
        test = "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;"
        ptx = f"{{ .reg .pred p; WAIT_${{:uid}}: {test} @!p bra WAIT_${{:uid}}; }}"
        _run(ptx, "r,r", _at(barriers, first, slot), arith.andi(phase, integer(1)))

    _call(body, ref, slot, phase)
