"""Time on a GPU's own clock of calls that jax makes, by its profiler."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Span = tuple[float, float]  # start and end, ns


def spans_ms(call: Callable[[], Any], synchronize: Callable[[Any], None], n_call: int) -> list[float] | None:
    """Milliseconds from the first kernel's start to the last kernel's end, of each of `n_call` calls.

    All calls are enqueued before waiting. None where the profiler saw no kernels, or not as many
    of each call as of the others.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(n_call):
                result = call()
            synchronize(result)
        kernels: list[Span] = []
        for path in Path(folder).rglob("*.xplane.pb"):
            kernels += _kernels(jax.profiler.ProfileData.from_file(str(path)))
    return by_call(kernels, n_call)


def _kernels(profile: Any) -> Iterable[Span]:
    for plane in profile.planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from ((event.start_ns, event.start_ns + event.duration_ns) for event in line.events)


def by_call(kernels: Iterable[Span], n_call: int) -> list[float] | None:
    """Milliseconds of each call, whose kernels follow those of the one before."""
    ordered = sorted(kernels)
    n_kernel, rest = divmod(len(ordered), n_call)
    if rest or not n_kernel:
        return None
    calls = [ordered[i : i + n_kernel] for i in range(0, len(ordered), n_kernel)]
    return [1e-6 * (max(end for _, end in call) - call[0][0]) for call in calls]
