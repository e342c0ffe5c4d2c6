"""Operations and memory of a call, found without running it: only shapes and dtypes are needed.

Operations: 2 for a multiply-add of a matrix product; 1 for every element of other arithmetic (of
the larger of its operands and results); n log2 n for a sort; nothing for what only moves data. jax
counts them in the jaxpr, torch in a dispatch mode on meta tensors, where a fused attention kernel
appears as the products that it replaces.

Memory: what the compiled program needs beside its arguments and results (jax), and the most bytes
that an eager call keeps alive beside its arguments (torch).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

# jax primitives that compute nothing.
_MOVES = frozenset(
    """
    broadcast_in_dim concatenate convert_element_type copy dynamic_slice dynamic_update_slice gather iota
    layout_constraint optimization_barrier pad reshape rev scatter select_n slice split squeeze stack
    stop_gradient transpose
    """.split()  # noqa: SIM905
)


def abstract(backend: str, shape: tuple[int, ...], dtype: str) -> Any:
    """An array of a backend that has a shape and a dtype and no data."""
    if backend == "jax":
        import jax

        return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype))
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def jax_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Operations of `fn(*args)`; args are arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: a `while` loop, whose trip count is not known before it runs.
    """
    import jax

    return _count_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def _count_jaxpr(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "while":
        raise ValueError("a while loop has no trip count before it runs: its operations cannot be counted")
    inner = [_count_jaxpr(jaxpr) for jaxpr in inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if inner:
        return sum(inner) * (params["length"] if name == "scan" else 1)
    shapes_in = [getattr(x.aval, "shape", ()) for x in equation.invars]
    shapes_out = [x.aval.shape for x in equation.outvars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(shapes_out[0]) * math.prod(shapes_in[0][axis] for axis in contracted)
    if name == "sort":
        return sort_operations(math.prod(shapes_in[0]), shapes_in[0][params["dimension"]])
    return 0 if name in _MOVES else max(map(math.prod, shapes_in + shapes_out))


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation: of a jit, a scan, a custom rule, ..."""
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def sort_operations(size: int, length: int) -> int:
    """`n log2 n` for each of the sorts of `length` that make up `size`."""
    return size * max(length - 1, 1).bit_length()


def jax_memory(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes of temporaries of the compiled `fn(*args)`, beside arguments and results.

    Raises:
      RuntimeError: the compiler does not tell.
    """
    import jax

    from bench.host import NO_AUTOTUNING

    memory = jax.jit(fn).lower(*args).compile(NO_AUTOTUNING).memory_analysis()
    if memory is None:
        raise RuntimeError(f"jax says nothing of the memory of programs compiled for {jax.default_backend()}")
    return int(memory.temp_size_in_bytes)


def torch_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Operations of `fn(*args)`; args are tensors, whose data is not read."""
    from bench.cost_torch import CountOperations, on_meta_tensors

    counter = CountOperations()
    on_meta_tensors(counter, fn, *args)
    return counter.total


def torch_peak_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Most bytes alive at once in an eager `fn(*args)`, results included, arguments not.

    Workspace inside a single operation (of a sort, of a fused kernel) is not seen.
    """
    from bench.cost_torch import TrackMemory, on_meta_tensors

    tracker = TrackMemory()
    on_meta_tensors(tracker, fn, *args)
    return tracker.peak
