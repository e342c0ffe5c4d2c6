"""Which code runs a step of an op: plain XLA, or kernels that `jax_vq.kernels` adds for where they can run.

A step is a function of this package; a kernel takes its name, its arguments and its results.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

NAMES = ("xla", "triton")  # what `implementation` may be, beside None


class Kernel(NamedTuple):
    """A step by other means."""

    run: Callable[..., Any]
    why_not: Callable[..., str | None]  # (asked, *arguments of the step); None: it can run


class Heard(NamedTuple):
    """What is said of a call while it is traced."""

    reasons: dict[str, str | None]  # by step: why it runs as plain XLA
    names: set[str]  # of all that runs: "xla", "triton", "mosaic_gpu"


CAPABILITY = "9.0"  # of the GPUs that the kernels are made for

_KERNELS: dict[str, Callable[[], Kernel | None]] = {}
_LISTENERS: list[Heard] = []
_ASKED: list[str | None] = []  # by the calls whose kernels are being traced, the innermost last


def add_kernel(step: str, load: Callable[[], Kernel | None]) -> None:
    """Have a kernel where a step can use it; it is loaded then, and None where it cannot be."""
    _KERNELS[step] = load


def check_implementation(asked: Any) -> str | None:
    """`implementation`: None or one of `NAMES`."""
    if asked is not None and asked not in NAMES:
        raise ValueError(f"implementation must be None or one of {', '.join(NAMES)}, found {asked!r}")
    return asked


def run(asked: str | None, step: str, plain: Callable[..., Any], *arguments: Any) -> Any:
    """A step by its kernel, or by `plain` where that cannot run: never an error for want of a kernel.

    Compiled for a CPU in a process with a GPU, `plain` runs too.
    """
    kernel, reason = _find(asked, step, *arguments)
    for heard in _LISTENERS:
        heard.reasons[step] = reason
    if kernel is None:
        runs("xla")
        return plain(*arguments)

    def by_kernel() -> Any:
        with asking(asked):
            return kernel.run(*arguments)

    if jax.default_backend() == "cpu":
        return by_kernel()
    return lax.platform_dependent(cuda=by_kernel, default=partial(plain, *arguments))


def _find(asked: str | None, step: str, *arguments: Any) -> tuple[Kernel | None, str | None]:
    """The kernel that can run a step, or why none can."""
    reason = "implementation='xla' was asked for" if asked == "xla" else why_not_here(asked)
    if reason is not None:
        return None, reason
    kernel = _KERNELS[step]() if step in _KERNELS else None
    if kernel is None:
        return None, "there is no kernel"
    reason = kernel.why_not(asked, *arguments)
    return (kernel, None) if reason is None else (None, reason)


def runs(name: str) -> None:
    """Say that what is being traced runs by this."""
    for heard in _LISTENERS:
        heard.names.add(name)


@contextmanager
def asking(name: str | None) -> Iterator[None]:
    """Have kernels that are traced meanwhile run for a call that asked for an implementation."""
    _ASKED.append(name)
    try:
        yield
    finally:
        _ASKED.pop()


def is_asked_for(name: str) -> bool:
    """Within a kernel: whether its call asked for an implementation by name."""
    return bool(_ASKED) and _ASKED[-1] == name


def why_not_here(asked: str | None) -> str | None:
    """Why no kernel runs on this process's device; a CPU interprets one that is asked for by name."""
    platform = jax.default_backend()
    if platform == "cpu":
        return None if asked == "triton" else "Triton compiles for a GPU, and this is a CPU"
    found = getattr(jax.devices()[0], "compute_capability", None)
    if platform != "gpu" or found != CAPABILITY:
        return f"the kernels are made for compute capability {CAPABILITY}, and this is {platform} {found}"
    return None


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under `jax.jit`; while `why_xla` asks, the one inside, which is traced every time."""
    is_jitted = hasattr(function, "lower")
    inside: Callable[..., Any] = getattr(function, "__wrapped__", function) if is_jitted else function
    return inside if _LISTENERS else function


def why_xla(function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, str | None]:
    """Why the steps of a call run as plain XLA on this machine; None for a step that a kernel runs.

    Nothing is computed or compiled. Of a function that jax has compiled and that is called inside, nothing is
    known: name the one inside.

    Args:
      function: `vq_attention`, `nearest_codes`, or what calls them; for the backward pass its gradient.
      arguments: arrays or `jax.ShapeDtypeStruct`.
      options: of the call.

    Returns:
      Reasons by step, such as `{"finite_codes": None, "causal_attention": "keys only: ..."}`.

    Raises:
      ValueError, TypeError: what the call itself raises.
    """
    return _heard(function, *arguments, **options).reasons


def what_runs(function: Callable[..., Any], *arguments: Any, **options: Any) -> set[str]:
    """What the steps of a call run by, some of "xla", "triton" and "mosaic_gpu"; as `why_xla`."""
    return _heard(function, *arguments, **options).names


def _heard(function: Callable[..., Any], *arguments: Any, **options: Any) -> Heard:
    heard = Heard({}, set())
    _LISTENERS.append(heard)
    try:
        jax.eval_shape(partial(traced(function), **options), *arguments)
    finally:
        _LISTENERS.pop()
    return heard
