"""Scaling curves without a clock: operations and temporary memory against T, in both backends.

Everything is traced or compiled from shapes alone; nothing is computed.
"""

import functools

import pytest

from bench import cost, fit, on_jax, on_torch, registry
from bench.inputs import sample_sizes
from bench.job import Job

LENGTHS = (4096, 8192, 16384, 32768, 65536)
SHORT = (1024, 2048, 4096)  # torch traces every step of a backward pass, one by one
DIRECTIONS = ("fwd", "fwd+bwd")
CURVES = [(name, is_causal) for name in ("vq_qk", "vq_k", "hyper") for is_causal in (False, True)]
WINDOWED = [("vq_qk_window", True), ("vq_k_window", True)]
BACKWARD = [(name, is_causal) for name in ("vq_qk", "vq_k") for is_causal in (False, True)]
EXACT = [("exact", False), ("exact", True)]
SLOPE = 0.05  # how far a fitted exponent may be from its integer
BACKENDS_APART = 0.1
GIB = 2**30

JOB = Job(
    d_model=256,
    batch=1,
    heads=4,
    width=64,
    value_width=64,
    codes_q=128,
    codes_k=128,
    block_len=128,
    mem_len=0,
    n_sink=0,
    block_size=256,
    n_projection=7,
    n_sample=256,
    min_seq_len=4096,
    n_kmeans=1,
    seed=0,
    dtype="float32",
    input="random",
    n_warmup=0,
    n_repeat=1,
    max_repeat_s=1.0,
)
LARGE = Job(**(JOB.to_json() | {"heads": 16, "width": 128, "value_width": 128, "dtype": "bfloat16"}))


def _traced(
    measure,
    backend: str,
    mechanism: str,
    is_causal: bool,
    length: int,
    job: Job = JOB,
    direction: str = "fwd",
) -> int:
    shapes = registry.array_shapes(job, length, len(sample_sizes(length, is_causal, job.min_seq_len)))
    arrays = tuple(cost.abstract(backend, *shapes[name]) for name in registry.MECHANISMS[mechanism].arrays)
    fn = registry.build(mechanism, backend, job, is_causal, arrays).fn
    if direction == "fwd+bwd":
        fn = {"jax": on_jax, "torch": on_torch}[backend].forward_and_backward(fn)
        arrays = *arrays, cost.abstract(backend, *shapes["d_out"])
    return measure(fn, *arrays)


@functools.cache
def _flops_exponent(backend: str, mechanism: str, is_causal: bool, direction: str = "fwd") -> float:
    measure = {"jax": cost.jax_flops, "torch": cost.torch_flops}[backend]
    lengths = SHORT if (backend, direction) == ("torch", "fwd+bwd") else LENGTHS
    flops = [_traced(measure, backend, mechanism, is_causal, T, direction=direction) for T in lengths]
    return fit.exponent(lengths, flops)


@functools.cache
def _memory_exponent(backend: str, mechanism: str, is_causal: bool, direction: str = "fwd") -> float:
    measure = {"jax": cost.jax_memory, "torch": cost.torch_peak_bytes}[backend]
    lengths = LENGTHS[::2] if backend == "jax" else LENGTHS  # jax compiles each
    if (backend, direction) == ("torch", "fwd+bwd"):
        lengths = SHORT
    n_bytes = [_traced(measure, backend, mechanism, is_causal, T, direction=direction) for T in lengths]
    return fit.exponent(lengths, n_bytes)


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("mechanism, is_causal", CURVES + EXACT)
def test_operations_grow_as_they_should(backend: str, mechanism: str, is_causal: bool) -> None:
    slope = _flops_exponent(backend, mechanism, is_causal)
    if (mechanism, is_causal) == ("hyper", True):  # T log T
        assert 1.0 - SLOPE <= slope <= 1.25
    else:
        assert slope == pytest.approx(2.0 if mechanism == "exact" else 1.0, abs=SLOPE)


@pytest.mark.parametrize("mechanism, is_causal", CURVES + EXACT)
def test_operations_of_both_backends_grow_alike(mechanism: str, is_causal: bool) -> None:
    apart = _flops_exponent("jax", mechanism, is_causal) - _flops_exponent("torch", mechanism, is_causal)
    assert abs(apart) <= BACKENDS_APART


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("mechanism, is_causal", CURVES)
def test_memory_grows_no_faster_than_the_sequence(backend: str, mechanism: str, is_causal: bool) -> None:
    assert _memory_exponent(backend, mechanism, is_causal) <= 1.0 + SLOPE


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mechanism, is_causal", BACKWARD + WINDOWED)
def test_operations_of_a_backward_pass_and_of_a_window_are_linear(
    backend: str, mechanism: str, is_causal: bool, direction: str
) -> None:
    slope = _flops_exponent(backend, mechanism, is_causal, direction)
    assert slope == pytest.approx(1.0, abs=SLOPE)


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("mechanism", ["vq_qk", "exact"])
def test_a_backward_pass_is_counted(backend: str, mechanism: str) -> None:
    measure = {"jax": cost.jax_flops, "torch": cost.torch_flops}[backend]
    forward, both = (_traced(measure, backend, mechanism, True, 4096, direction=d) for d in DIRECTIONS)
    assert 2 < both / forward < 6


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("mechanism, is_causal", BACKWARD + WINDOWED)
def test_memory_of_a_backward_pass_grows_no_faster(backend: str, mechanism: str, is_causal: bool) -> None:
    assert _memory_exponent(backend, mechanism, is_causal, "fwd+bwd") <= 1.0 + SLOPE


def test_temporaries_of_a_long_backward_pass_stay_under_three_gib() -> None:
    n_bytes = _traced(cost.jax_memory, "jax", "vq_qk", True, 65_536, LARGE, "fwd+bwd")
    assert n_bytes < 3 * GIB


def test_temporaries_of_a_long_causal_call_stay_under_one_gib() -> None:
    half, full = (_traced(cost.jax_memory, "jax", "vq_qk", True, T, LARGE) for T in (131_072, 262_144))
    assert full < GIB
    assert full <= 2 * half
