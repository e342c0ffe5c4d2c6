"""The jax side of a worker: arrays, compilation, timing, and the modules that prepare inputs."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

import jax_vq
from bench import device_time, host, measure, resident
from bench.job import Job
from bench.registry import DIFFERENTIABLE
from vq_common import TransformerConfig


def _bytes_free_on_gpu() -> int:
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))


def _peak_bytes_on_gpu() -> int:
    return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))


DEVICES = {
    "cpu": measure.Device(jax.block_until_ready, host.free_bytes, host.cpu_name),
    "cuda": measure.Device(jax.block_until_ready, _bytes_free_on_gpu, lambda: jax.devices()[0].device_kind),
}


def _pullback(fn: Callable[..., Any], inputs: Any) -> tuple[Any, Any]:
    """The output and the pullback to the first three of `inputs`: q, k and v."""
    primals, rest = inputs[: len(DIFFERENTIABLE)], inputs[len(DIFFERENTIABLE) :]
    out, pull = jax.vjp(lambda *primals: fn(*primals, *rest), *primals)
    return out, pull


def forward_and_backward(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`(*arrays, d_out)` to the output of `fn(*arrays)` and the pullback of d_out to q, k and v."""

    def both(*arrays: Any) -> tuple[Any, tuple[Any, ...]]:
        out, pull = _pullback(fn, arrays[:-1])
        return out, pull(arrays[-1])

    return both


def _compile(
    fn: Callable[..., Any],
    arrays: tuple[Any, ...],
    donated: tuple[int, ...] = (),
    options: Mapping[str, int] | None = None,
) -> tuple[measure.Program, Any]:
    """A program for these arrays or their shapes, and the shapes of what it returns."""
    start = time.perf_counter()
    traced = jax.jit(fn, donate_argnums=donated).trace(*arrays)
    compiled = traced.lower().compile(options)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is None:
        return measure.Program(compiled, seconds), traced.out_info
    temp = int(memory.temp_size_in_bytes)
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return measure.Program(compiled, seconds, int(peak) + temp, temp), traced.out_info


class Backend:
    """jax on one device.

    Raises:
      ValueError: the device that is asked for is not there.
    """

    name = "jax"

    def __init__(self, device: str, job: Job) -> None:
        jax.config.update("jax_enable_x64", job.dtype == "float64")
        if device not in ("auto", *DEVICES):
            raise ValueError(f"jax runs on {', '.join(DEVICES)}, not on {device}")
        if device != "auto":
            jax.config.update("jax_platforms", device)
        try:
            platform = jax.default_backend()
        except RuntimeError as error:
            raise ValueError(f"jax {jax.__version__} sees no {device} device: {error}") from error
        self.kind = "cuda" if platform == "gpu" else platform
        if self.kind not in DEVICES:
            raise ValueError(f"jax runs on {platform} here, which is none of {', '.join(DEVICES)}")
        self.device = DEVICES[self.kind]
        self.job = job
        self._nearest_codes = jax.jit(jax_vq.nearest_codes)
        self.keeps_peak = self.kind != "cpu"
        precision = "highest" if job.dtype in ("float32", "float64") else "default"
        self._copy = jax.jit(lambda x: x + 1)
        self._matmul = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))

    def array(self, x: NDArray[Any], dtype: str) -> jax.Array:
        """A NumPy array on the device; bfloat16 comes as its bits."""
        array = jnp.asarray(x)
        if dtype == "bfloat16" and x.dtype == np.uint16:
            return jax.lax.bitcast_convert_type(array, jnp.bfloat16)
        return array.astype(dtype)

    def numpy(self, x: jax.Array) -> NDArray[np.float64]:
        """An array as float64."""
        return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, np.float64)

    def primal(self, x: jax.Array) -> jax.Array:
        """An array that gradients are taken of."""
        return x

    def compile(
        self,
        fn: Callable[..., Any],
        arrays: tuple[jax.Array, ...],
        direction: str = "fwd",
        *,
        is_timed: bool = True,
    ) -> measure.Program:
        """Compile for these arrays, of which the last one is the cotangent where there is one.

        'bwd' is two programs: the first returns the pullback, a pytree of what the forward pass
        saved; the second, which is the one to time, calls it.

        What is not timed is compiled without a search for the fastest products.
        """
        options = None if is_timed else host.NO_AUTOTUNING
        if direction == "bwd":
            return self._compile_backward(fn, arrays, options)
        both = forward_and_backward(fn) if direction == "fwd+bwd" else fn
        return _compile(both, arrays, options=options)[0]

    def _compile_backward(
        self, fn: Callable[..., Any], arrays: tuple[jax.Array, ...], options: Mapping[str, int] | None
    ) -> measure.Program:
        *inputs, d_out = arrays
        save, pull = _compile(lambda *inputs: _pullback(fn, inputs)[1], tuple(inputs), options=options)
        program, _ = _compile(lambda pull, d_out: pull(d_out), (pull, d_out), options=options)
        peaks = [part.peak_bytes for part in (save, program) if part.peak_bytes is not None]
        return program._replace(
            compile_s=(save.compile_s or 0.0) + (program.compile_s or 0.0),
            peak_bytes=max(peaks, default=None),
            prepare=lambda *arrays: (save.run(*arrays[:-1]), arrays[-1]),
        )

    def compile_step(self, step: Callable[..., Any], kept: Any, arrays: tuple[jax.Array, ...]) -> Any:
        """Compile `(kept, *arrays) -> (out, kept)`, which takes the memory of what it is given to keep."""
        return _compile(step, (kept, *arrays), donated=(0,))[0]

    def feeder(self, feed: Callable[..., Any]) -> Callable[..., Any]:
        """`(kept, *arrays) -> kept`, compiled for every shape that comes, in the same memory."""
        return jax.jit(feed, donate_argnums=0)

    def n_bytes(self, tree: Any) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    def times(self, program: measure.Program, arrays: tuple[jax.Array, ...]) -> measure.Timed:
        """Repeated calls; the peak of memory is what the compiler reserves.

        On a GPU by the profiler, where it can tell the calls apart; the first of them is left out,
        whose kernels wait for the host.
        """
        job, synchronize = self.job, self.device.synchronize
        arguments = program.arguments(arrays)

        def call() -> Any:
            return program.run(*arguments)

        call_s = measure.warm_up(call, synchronize, job.n_warmup)
        sizes = {"n_repeat": job.n_repeat, "max_repeat_s": job.max_repeat_s}
        if self.kind == "cpu":
            times = measure.time_calls(call, synchronize, **sizes)
            return measure.Timed(times, "host clock", program.peak_bytes)
        n_inner = measure.batch_size(call_s)
        dispatch_ms = measure.dispatch(call, synchronize, n_inner)
        n_call = 1 + min(job.n_repeat, max(int(job.max_repeat_s / call_s), 1))
        spans = device_time.spans_ms(call, synchronize, n_call)
        if spans is not None:
            return measure.Timed(spans[1:], "device profiler", program.peak_bytes, dispatch_ms)
        times = measure.time_calls(call, synchronize, n_inner=n_inner, **sizes)
        return measure.Timed(times, "host clock, enqueued calls", program.peak_bytes, dispatch_ms)

    def copy(self, x: jax.Array) -> jax.Array:
        """A new array, for the rate at which memory is read and written."""
        return self._copy(x)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x [N, N]` times itself, as precise as the mechanisms multiply its type."""
        return self._matmul(x)

    def observed_bytes(self, program: measure.Program, arrays: tuple[jax.Array, ...]) -> int | None:
        """Most bytes seen in use in a call: of the allocator, on a CPU of the process beyond those before.

        The allocator's peak is the highest since the process started: None where a call before this
        one took more.
        """
        arguments = program.arguments(arrays)

        def call() -> Any:
            return self.device.synchronize(program.run(*arguments))

        if self.kind == "cpu":
            call()
            return resident.growth(call)
        before = _peak_bytes_on_gpu()
        call()
        after = _peak_bytes_on_gpu()
        return after if after > before else None

    def release(self) -> None:
        """Give cached memory back; jax keeps none that another call could not take."""

    def projector(self, config: TransformerConfig) -> Callable[[NDArray[np.float32]], tuple[Any, ...]]:
        """`x [B, T, d_model]` to q, k, v of a seeded module, NumPy to NumPy."""
        module = jax_vq.VQAttentionQK(config, rngs=nnx.Rngs(self.job.seed))

        def project(x: NDArray[np.float32]) -> tuple[Any, ...]:
            q, k, v, _ = module.project(jnp.asarray(x))
            return tuple(np.asarray(array) for array in (q, k, v))

        return project

    def fit_codebook(self, x: NDArray[np.float32], draws: NDArray[np.float32]) -> NDArray[np.float32]:
        """A codebook `[H, C, D]` of `x [B, T, H, D]` by k-means."""
        state = jax_vq.kmeans(jnp.asarray(x), jnp.asarray(draws), n_iter=self.job.n_kmeans)
        return np.asarray(jax_vq.codebook_of(state), np.float32)

    def nearest_codes(self, x: jax.Array, codebook: jax.Array) -> jax.Array:
        """The op, compiled once for every shape: for timing quantization apart."""
        return self._nearest_codes(x, codebook)
