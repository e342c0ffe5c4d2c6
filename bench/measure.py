"""The measuring core: warm-up, repetition, synchronization, spread. Knows no framework."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[], Any]

# On a device that runs behind the host, calls are enqueued together until they fill this time.
BATCH_S = 0.02
MAX_BATCH = 100


class Device(NamedTuple):
    """All that differs between kinds of device."""

    synchronize: Callable[[Any], None]  # wait until a result, and all work before it, is done
    free_bytes: Callable[[], int]  # memory that can still be taken
    name: Callable[[], str]


class Program(NamedTuple):
    """A function that is ready to be timed on arrays of the shapes it was made for.

    A backward pass alone is run on what the forward pass saved: `prepare` makes that of the arrays.
    """

    run: Callable[..., Any]
    compile_s: float | None = None  # None: nothing is compiled
    peak_bytes: int | None = None  # inputs, output and temporaries, where known before the call
    temp_bytes: int | None = None  # the temporaries alone
    prepare: Callable[..., tuple[Any, ...]] | None = None  # arrays to arguments of run, not timed
    held_bytes: int = 0  # kept between calls, beside the arguments

    def arguments(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `run` takes."""
        return arrays if self.prepare is None else self.prepare(*arrays)


class Spread(NamedTuple):
    """Milliseconds of one call over the repeats."""

    ms_median: float
    ms_p20: float
    ms_p80: float
    n_repeat: int


class Timed(NamedTuple):
    """Repeated calls of a program."""

    times_ms: list[float]
    timing: str  # how, see `records.KEYS`
    peak_bytes: int | None = None
    dispatch_ms: float | None = None  # of the host, to enqueue one call


def spread(times_ms: list[float]) -> Spread:
    """Median and quantiles of repeats."""
    low, middle, high = np.percentile(times_ms, (20, 50, 80))
    return Spread(float(middle), float(low), float(high), len(times_ms))


def warm_up(call: Call, synchronize: Callable[[Any], None], n_warmup: int) -> float:
    """Run untimed calls; seconds that the last one took, 0 when there is none."""
    seconds = 0.0
    for _ in range(n_warmup):
        start = time.perf_counter()
        synchronize(call())
        seconds = time.perf_counter() - start
    return seconds


def time_calls(
    call: Call,
    synchronize: Callable[[Any], None],
    *,
    n_repeat: int,
    max_repeat_s: float,
    n_inner: int = 1,
) -> list[float]:
    """Milliseconds of a call, `n_repeat` times or until `max_repeat_s` have passed, at least once.

    Each time is that of `n_inner` calls, enqueued together and waited for once, divided by
    their number: the time of the device when it is the slower of the two.
    """
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < n_repeat and (not times or time.perf_counter() - begin < max_repeat_s):
        start = time.perf_counter()
        for _ in range(n_inner):
            result = call()
        synchronize(result)
        times.append(1e3 * (time.perf_counter() - start) / n_inner)
    return times


def dispatch(call: Call, synchronize: Callable[[Any], None], n_inner: int) -> float:
    """Milliseconds of the host to enqueue a call, over `n_inner` that nobody waits for meanwhile."""
    start = time.perf_counter()
    for _ in range(n_inner):
        result = call()
    seconds = time.perf_counter() - start
    synchronize(result)
    return 1e3 * seconds / n_inner


def batch_size(call_s: float) -> int:
    """Calls to enqueue together so that they take about `BATCH_S`; one where that is not known."""
    return min(max(math.ceil(BATCH_S / call_s), 1), MAX_BATCH) if call_s > 0 else 1


def time_events(
    call: Call,
    make_event: Callable[[], Any],
    synchronize: Callable[[Any], None],
    *,
    n_repeat: int,
    max_repeat_s: float,
    call_s: float,
) -> list[float]:
    """Milliseconds of single calls by events on the device's own clock, all enqueued before waiting."""
    if call_s > 0:
        n_repeat = min(n_repeat, max(int(max_repeat_s / call_s), 1))
    pairs = []
    for _ in range(n_repeat):
        start, end = make_event(), make_event()
        start.record()
        result = call()
        end.record()
        pairs.append((start, end))
    synchronize(result)
    return [float(start.elapsed_time(end)) for start, end in pairs]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any framework says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    signs = ("resource_exhausted", "out of memory", "can't allocate memory", "not enough memory")
    return any(sign in text for sign in signs)


def first_line(text: str) -> str:
    """The first line of an error's text, cut where it is very long."""
    return text.splitlines()[0][:300] if text else "unknown"
