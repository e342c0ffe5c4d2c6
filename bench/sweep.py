"""Many jobs in one run: layers, codebooks and windows, with the same worker processes throughout."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bench.accuracy import Array, exact_attention, quantize_error
from bench.captures import Arrays
from bench.inputs import Store
from bench.job import Job, is_windowed
from bench.pool import Answer, Pool, StartWorker
from bench.process import ChildDied, Worker
from bench.registry import MECHANISMS
from vq_common.tolerances import relative_rms


class Layer(NamedTuple):
    """Something to measure on.

    Attributes:
      name: as 'smollm2-135m/12'.
      is_causal: of its attention.
      length: tokens of a window.
      shape: B, H, D, V.
      digest: of what is captured; None: made of the module.
      read: the arrays `attended` gives; None: likewise.
      about: where it is from, for people.
    """

    name: str
    is_causal: bool
    length: int
    shape: tuple[int, int, int, int]
    digest: str | None
    read: Callable[[], Arrays] | None
    about: str


class Task(NamedTuple):
    """One job of a sweep and what is measured of it."""

    layer: Layer
    job: Job
    mechanisms: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.layer.name}, {self.job.codes_k} codes, window {self.job.mem_len} + {self.job.n_sink}"


def job_of(layer: Layer, job: Job) -> Job:
    """The job of a layer; sizes of HyperAttention are cut so that it is not exact on these lengths."""
    batch, heads, width, value_width = layer.shape
    return dataclasses.replace(
        job,
        batch=batch,
        heads=heads,
        width=width,
        value_width=value_width,
        input="real" if layer.read is None else "captured",
        layer=layer.name,
        capture=layer.digest,
        block_size=min(job.block_size, max(layer.length // 16, 1)),
        n_sample=min(job.n_sample, max(layer.length // 16, 1)),
        min_seq_len=min(job.min_seq_len, max(layer.length // 4, 1)),
    )


def tasks(
    layer: Layer, job: Job, mechanisms: tuple[str, ...], codes: tuple[int, ...], windows: tuple[int, ...]
) -> list[Task]:
    """Every mechanism at every number of codes and window that changes it, each once."""
    job = job_of(layer, job)
    found = []
    for i, n_code in enumerate(codes):
        for j, mem_len in enumerate(windows):
            chosen = tuple(
                name
                for name in mechanisms
                if (i == 0 or MECHANISMS[name].quantized)
                and (j == 0 or is_windowed(name))
                and (layer.is_causal or not is_windowed(name))
            )
            sized = dataclasses.replace(job, codes_q=n_code, codes_k=n_code, mem_len=mem_len)
            found += [Task(layer, sized, chosen)] if chosen else []
    return found


class Lent:
    """A worker that is not ended by who uses it, but forgotten when it died."""

    def __init__(self, worker: Worker, forget: Callable[[], None]) -> None:
        self._worker, self._forget = worker, forget

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._worker.send(message)
        except ChildDied:
            self._forget()
            raise

    def receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            return self._worker.receive(timeout_s)
        except ChildDied:
            self._forget()
            raise

    def close(self) -> None:
        """Leave it to the next job."""


class Workers:
    """Starts a worker of a backend once, and gives the same one to job after job.

    Args:
      start_worker: a worker from its setup, as of `Pool`.
    """

    def __init__(self, start_worker: StartWorker) -> None:
        self._start = start_worker
        self._living: dict[str, Worker] = {}

    def __call__(self, setup: dict[str, Any]) -> Worker:
        backend = setup["backend"]
        lent = Lent(self._living[backend], lambda: self._drop(backend)) if backend in self._living else None
        if lent is not None:
            try:
                lent.send({"do": "use", **setup})
                return lent
            except ChildDied:
                lent = None
        self._living[backend] = self._start(setup)
        return Lent(self._living[backend], lambda: self._drop(backend))

    def close(self) -> None:
        """End all of them."""
        for backend in list(self._living):
            self._drop(backend)

    def _drop(self, backend: str) -> None:
        worker = self._living.pop(backend, None)
        if worker is not None:
            worker.close()


class Judge:
    """Errors of a measured call, from what its worker left in the store.

    Args:
      store: of the job.
      is_causal: of its attention.
      known: exact attention of this layer, kept from one job to the next.
    """

    def __init__(self, store: Store, is_causal: bool, known: dict[str, tuple[Array, Array]]) -> None:
        self._store, self._is_causal, self._known = store, is_causal, known
        self._quantize_errors: dict[tuple[str, int], float] = {}

    def errors(self, mechanism: str, length: int, out: str) -> dict[str, float | None]:
        """`exact_error`, `quantize_error_q` and `quantize_error_k` of a record."""
        quantized = dict(MECHANISMS[mechanism].quantized)
        found: dict[str, float | None] = {
            f"quantize_error_{name}": self._quantize_error(name, quantized[name], length)
            if name in quantized
            else None
            for name in ("q", "k")
        }
        return found | {"exact_error": relative_rms(self._store.read(out), self._exact(length))}

    def _exact(self, length: int) -> Array:
        """Exact attention on the values that every backend gets, of a length."""
        q, k, v = (self._store.read_float64(name, length) for name in ("q", "k", "v"))
        inputs = np.concatenate([x.reshape(-1) for x in (q, k, v)])
        name = str(length)
        if name not in self._known or not np.array_equal(self._known[name][0], inputs):
            self._known[name] = inputs, exact_attention(q, k, v, is_causal=self._is_causal)
        return self._known[name][1]

    def _quantize_error(self, name: str, codebook: str, length: int) -> float:
        if (name, length) not in self._quantize_errors:
            x = self._store.read_float64(name, length)
            codes = self._store.read(codebook).astype(np.float64)
            self._quantize_errors[name, length] = quantize_error(x, codes)
        return self._quantize_errors[name, length]


class JudgedPool(Pool):
    """A pool whose answers to 'measure' have the errors of the output too."""

    def __init__(
        self, setups: Mapping[str, dict[str, Any]], start_worker: StartWorker, deadline: float, judge: Judge
    ) -> None:
        super().__init__(setups, start_worker, deadline)
        self._judge = judge

    def ask(self, backend: str, message: dict[str, Any]) -> Answer:
        """The answer of one worker, with `exact_error` where something was measured."""
        answer = super().ask(backend, message)
        if message["do"] == "measure" and answer["status"] == "ok":
            answer |= self._judge.errors(message["mechanism"], message["length"], answer["out"])
        return answer
