"""Operations and memory of a mechanism against length, from shapes alone: nothing is computed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench import cost, registry
from bench.inputs import sample_sizes
from bench.job import Job


class Counts(NamedTuple):
    """Of a forward call, at each length."""

    flops: list[int]
    n_bytes: list[int]  # of temporaries (jax, as compiled) or of what is alive beside arguments (torch)


def counts(backend: str, mechanism: str, is_causal: bool, job: Job, lengths: Sequence[int]) -> Counts:
    """Operations and bytes of a forward call at each of `lengths`."""
    flops = {"jax": cost.jax_flops, "torch": cost.torch_flops}[backend]
    memory = {"jax": cost.jax_memory, "torch": cost.torch_peak_bytes}[backend]
    calls = []
    for length in lengths:
        shapes = registry.array_shapes(job, length, len(sample_sizes(length, is_causal, job.min_seq_len)))
        names = registry.MECHANISMS[mechanism].arrays
        arrays = tuple(cost.abstract(backend, *shapes[name]) for name in names)
        calls.append((registry.build(mechanism, backend, job, is_causal, arrays).fn, *arrays))
    # Most of the time is XLA's, which compiles several programs side by side.
    with ThreadPoolExecutor(len(calls) if backend == "jax" else 1) as pool:
        n_bytes = list(pool.map(lambda call: memory(*call), calls))
    return Counts([flops(*call) for call in calls], n_bytes)
