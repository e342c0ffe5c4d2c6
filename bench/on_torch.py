"""The torch side of a worker: arrays, timing, and the modules that prepare inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

import torch_ref
from bench import host, measure, resident
from bench.cost_torch import TrackMemory
from bench.job import Job
from bench.registry import DIFFERENTIABLE
from vq_common import TransformerConfig


def _bytes_free_on_mps() -> int:
    return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())


DEVICES = {
    "cpu": measure.Device(lambda result: None, host.free_bytes, host.cpu_name),
    "cuda": measure.Device(
        lambda result: torch.cuda.synchronize(),
        lambda: int(torch.cuda.mem_get_info()[0]),
        lambda: torch.cuda.get_device_name(),
    ),
    "mps": measure.Device(lambda result: torch.mps.synchronize(), _bytes_free_on_mps, host.cpu_name),
}


def _graph(fn: Callable[..., Any], arrays: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The output of `fn` with its graph, what it is differentiated by, and the cotangent."""
    *inputs, d_out = arrays
    primals = tuple(x.detach().requires_grad_() for x in inputs[: len(DIFFERENTIABLE)])
    return fn(*primals, *inputs[len(DIFFERENTIABLE) :]), primals, d_out


def _pull(out: Tensor, primals: tuple[Tensor, ...], d_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, primals, d_out, retain_graph=True)


def forward_and_backward(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`(*arrays, d_out)` to the output of `fn(*arrays)` and the pullback of d_out to q, k and v."""

    def both(*arrays: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, primals, d_out = _graph(fn, arrays)
        return out.detach(), torch.autograd.grad(out, primals, d_out)

    return both


class Backend:
    """torch on one device.

    Raises:
      ValueError: the device that is asked for is not there.
    """

    name = "torch"
    keeps_peak = False  # the peak of memory can be reset

    def __init__(self, device: str, job: Job) -> None:
        there = {
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available() and job.dtype != "float64",
            "cpu": True,
        }
        self.kind = next(kind for kind in there if there[kind]) if device == "auto" else device
        if not there[self.kind]:
            raise ValueError(f"torch {torch.__version__} sees no {device} device")
        self.device = DEVICES[self.kind]
        self.job = job
        self._copied: Tensor | None = None

    def array(self, x: NDArray[Any], dtype: str) -> Tensor:
        """A NumPy array on the device; bfloat16 comes as its bits."""
        if dtype == "bfloat16" and x.dtype == np.uint16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.kind)
        return torch.from_numpy(x).to(dtype=getattr(torch, dtype), device=self.kind)

    def numpy(self, x: Tensor) -> NDArray[np.float64]:
        """A tensor as float64."""
        return x.detach().cpu().to(torch.float64).numpy()

    def primal(self, x: Tensor) -> Tensor:
        """An array that gradients are taken of."""
        return x.detach().requires_grad_()

    def compile(
        self,
        fn: Callable[..., Any],
        arrays: tuple[Tensor, ...],
        direction: str = "fwd",
        *,
        is_timed: bool = True,
    ) -> measure.Program:
        """The eager function; nothing is compiled.

        The last one of the arrays is the cotangent where there is one. 'bwd' goes through one and
        the same graph again and again.
        """
        if direction == "fwd":
            return measure.Program(torch.no_grad()(fn))
        if direction == "fwd+bwd":
            return measure.Program(forward_and_backward(fn))
        return measure.Program(_pull, prepare=lambda *arrays: _graph(fn, arrays))

    def compile_step(self, step: Callable[..., Any], kept: Any, arrays: tuple[Tensor, ...]) -> Any:
        """The eager `(kept, *arrays) -> (out, kept)`."""
        return measure.Program(torch.inference_mode()(step), held_bytes=self.n_bytes(kept))

    def feeder(self, feed: Callable[..., Any]) -> Callable[..., Any]:
        """`(kept, *arrays) -> kept`."""
        return torch.inference_mode()(feed)

    def n_bytes(self, tree: Any) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in tree_leaves(tree) if isinstance(x, Tensor))

    def times(self, program: measure.Program, arrays: tuple[Tensor, ...]) -> measure.Timed:
        """Repeated calls, on CUDA by events.

        The peak is the allocator's on CUDA; elsewhere one more warm-up call is followed storage
        by storage, which does not see the workspace of single operations.
        """
        job, synchronize = self.job, self.device.synchronize

        def call() -> Any:
            return program.run(*arguments)

        sizes = {"n_repeat": job.n_repeat, "max_repeat_s": job.max_repeat_s}
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
            arguments = program.arguments(arrays)
            call_s = measure.warm_up(call, synchronize, max(job.n_warmup, 1))
            peak = int(torch.cuda.max_memory_allocated())
            dispatch_ms = measure.dispatch(call, synchronize, measure.batch_size(call_s))
            event = partial(torch.cuda.Event, enable_timing=True)
            times = measure.time_events(call, event, synchronize, call_s=call_s, **sizes)
            return measure.Timed(times, "device events", peak, dispatch_ms)
        with TrackMemory() as tracker:
            arguments = program.arguments(arrays)
            synchronize(call())
        peak = sum(x.untyped_storage().nbytes() for x in arrays) + tracker.peak + program.held_bytes
        call_s = measure.warm_up(call, synchronize, job.n_warmup - 1)
        if self.kind == "cpu":
            return measure.Timed(measure.time_calls(call, synchronize, **sizes), "host clock", peak)
        n_inner = measure.batch_size(call_s)
        dispatch_ms = measure.dispatch(call, synchronize, n_inner)
        times = measure.time_calls(call, synchronize, n_inner=n_inner, **sizes)
        return measure.Timed(times, "host clock, enqueued calls", peak, dispatch_ms)

    def copy(self, x: Tensor) -> Tensor:
        """An array written anew, for the rate at which memory is read and written."""
        if self._copied is None or self._copied.shape != x.shape:
            self._copied = torch.empty_like(x)
        return torch.add(x, 1, out=self._copied)

    def matmul(self, x: Tensor) -> Tensor:
        """`x [N, N]` times itself."""
        return x @ x

    def observed_bytes(self, program: measure.Program, arrays: tuple[Tensor, ...]) -> int | None:
        """Most bytes seen in use in a call: of the allocator, on a CPU of the process beyond those before.

        None on MPS, which counts no peak.
        """
        if self.kind == "mps":
            return None
        arguments = program.arguments(arrays)
        self.device.synchronize(program.run(*arguments))
        if self.kind == "cpu":
            return resident.growth(lambda: program.run(*arguments))
        torch.cuda.reset_peak_memory_stats()
        self.device.synchronize(program.run(*arguments))
        return int(torch.cuda.max_memory_allocated())

    def release(self) -> None:
        """Give cached memory back, so that the other backend's process can have it."""
        self._copied = None
        if self.kind == "cuda":
            torch.cuda.empty_cache()
        elif self.kind == "mps":
            torch.mps.empty_cache()

    def projector(self, config: TransformerConfig) -> Callable[[NDArray[np.float32]], tuple[Any, ...]]:
        """`x [B, T, d_model]` to q, k, v of a seeded module, NumPy to NumPy."""
        torch.manual_seed(self.job.seed)
        module = torch_ref.VQAttentionQK(config).to(self.kind)

        def project(x: NDArray[np.float32]) -> tuple[Any, ...]:
            with torch.no_grad():
                q, k, v, _ = module.project(torch.from_numpy(x).to(self.kind))
            return tuple(array.cpu().numpy() for array in (q, k, v))

        return project

    def fit_codebook(self, x: NDArray[np.float32], draws: NDArray[np.float32]) -> NDArray[np.float32]:
        """A codebook `[H, C, D]` of `x [B, T, H, D]` by k-means."""
        vectors, numbers = (torch.from_numpy(array).to(self.kind) for array in (x, draws))
        state = torch_ref.kmeans(vectors, numbers, n_iter=self.job.n_kmeans)
        return torch_ref.codebook_of(state).cpu().numpy()

    def nearest_codes(self, x: Tensor, codebook: Tensor) -> Tensor:
        """The op, for timing quantization apart."""
        return torch_ref.nearest_codes(x, codebook)
