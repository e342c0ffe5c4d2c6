"""One backend in its own process: reads commands and writes answers, one JSON object a line.

The first line is a setup (see `start`); then `{"do": "prepare" | "fill" | "verify" | "measure", ...}`.
Every answer has `status`: 'ok', 'skipped' or 'failed' with a `reason`.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import inputs, measure, registry, verify
from bench.inputs import Store
from bench.job import Job, Point
from bench.prepare import Preparer

Answer = dict[str, Any]


class Worker:
    """One backend on one device, with the arrays of the length it works on.

    Args:
      backend: an `on_jax.Backend` or `on_torch.Backend`.
      store: where inputs are.
    """

    def __init__(self, backend: Any, store: Store) -> None:
        self.backend, self.store, self.job = backend, store, store.job
        self._arrays: dict[str, Any] = {}
        self._length = 0
        self._verified: dict[tuple[str, bool, int], measure.Program] = {}
        self._quantize_ms: dict[tuple[str, int], float] = {}
        self._prepares: Preparer | None = None

    def hello(self) -> Answer:
        """What runs here."""
        backend = self.backend
        return {"status": "ok", "device": backend.kind, "device_name": backend.device.name(), **self._free()}

    def handle(self, message: dict[str, Any]) -> Answer:
        """Answer one command; an error is an answer too."""
        try:
            command: Callable[..., Answer] = getattr(self, message.pop("do"))
            return command(**message)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            is_memory = measure.is_out_of_memory(error)
            del error
            self._forget()
            reason = f"out of memory: {_first_line(text)}" if is_memory else _first_line(text)
            return {"status": "failed", "reason": reason, "is_memory": is_memory}

    def prepare(self) -> Answer:
        """Create the inputs and fit the codebooks."""
        self._preparer().create()
        return {"status": "ok"}

    def fill(self, length: int, filled: int) -> Answer:
        """Prepare tokens up to `length`; `filled` are there, perhaps by a process before this one."""
        return {"status": "ok", "filled": self._preparer().fill(length, filled)}

    def verify(self, mechanism: str, is_causal: bool, length: int) -> Answer:
        """Run a mechanism once on the inputs that the oracle gets, and write what comes out."""
        job = self.job.at_verification(mechanism, is_causal, length)
        raw = verify.read_inputs(self.store, job, length, is_causal)
        arrays = self._on_device(raw, mechanism, job)
        built = registry.build(mechanism, self.backend.name, job, is_causal, arrays)
        program = self.backend.compile(built.fn, arrays)
        if job == self.job:
            self._verified[mechanism, is_causal, length] = program
        out = self.backend.numpy(program.run(*arrays))
        name = f"out_{self.backend.name}_{mechanism}_{'causal' if is_causal else 'full'}"
        self.store.write(name, out)
        start = time.perf_counter()
        self.backend.device.synchronize(program.run(*arrays))
        ms = 1e3 * (time.perf_counter() - start)
        return {"status": "ok", "out": name, "ms": ms, "implementation": built.implementation, **self._free()}

    def measure(self, mechanism: str, is_causal: bool, length: int, max_bytes: int) -> Answer:
        """Time a point; one that needs more than `max_bytes`, where that shows first, is skipped."""
        if length != self._length:
            self._forget()
            self._length = length
        arrays = self._point_arrays(Point(mechanism, is_causal, length))
        built = registry.build(mechanism, self.backend.name, self.job, is_causal, arrays)
        program = self._verified.pop((mechanism, is_causal, length), None)
        program = program or self.backend.compile(built.fn, arrays)
        if program.peak_bytes is not None and program.peak_bytes > max_bytes:
            reason = f"needs {program.peak_bytes / 2**30:.1f} GiB, {max_bytes / 2**30:.1f} GiB may be used"
            return {"status": "skipped", "reason": reason, **self._free()}
        times, peak = self.backend.times(program, arrays)
        answer = {
            "status": "ok",
            "implementation": built.implementation,
            "timing": self.backend.timing,
            **measure.spread(times)._asdict(),
            "compile_s": program.compile_s,
            "quantize_ms": self._quantization_ms(mechanism, length),
            "peak_bytes": peak,
            "temp_bytes": program.temp_bytes,
        }
        del program, arrays
        self.backend.release()
        return answer | self._free()

    def _quantization_ms(self, mechanism: str, length: int) -> float | None:
        """Milliseconds to find the codes that the mechanism finds inside its timed call."""
        pairs = registry.MECHANISMS[mechanism].quantized
        if not pairs:
            return None
        total = 0.0
        for name, codebook in pairs:
            if (name, length) not in self._quantize_ms:
                self._quantize_ms[name, length] = self._codes_ms(name, codebook)
            total += self._quantize_ms[name, length]
        return total

    def _codes_ms(self, name: str, codebook: str) -> float:
        arrays = self._arrays[name], self._arrays[codebook]
        program = measure.Program(self.backend.nearest_codes)
        self.backend.device.synchronize(program.run(*arrays))
        times, _ = self.backend.times(program, arrays)
        return measure.spread(times).ms_median

    def _point_arrays(self, point: Point) -> tuple[Any, ...]:
        names = registry.MECHANISMS[point.mechanism].arrays
        for name in names:
            if name == "sample_ids":
                ids = inputs.sample_ids(self.job, point.length, point.is_causal)
                self._arrays[name] = self.backend.array(ids, "int32")
            elif name not in self._arrays:
                is_token = name in ("q", "k", "v")
                raw = self.store.read_tokens(name, point.length) if is_token else self.store.read(name)
                self._arrays[name] = self._array(name, raw, self.job)
        return tuple(self._arrays[name] for name in names)

    def _preparer(self) -> Preparer:
        if self._prepares is None:
            self._prepares = Preparer(self.store, self.backend)
        return self._prepares

    def _on_device(self, raw: dict[str, Any], mechanism: str, job: Job) -> tuple[Any, ...]:
        return tuple(self._array(name, raw[name], job) for name in registry.MECHANISMS[mechanism].arrays)

    def _array(self, name: str, raw: np.ndarray[Any, Any], job: Job) -> Any:
        _, dtype = registry.array_shapes(job, 0, 0)[name]
        return self.backend.array(raw, dtype)

    def _forget(self) -> None:
        self._arrays.clear()
        self._length = 0
        self.backend.release()

    def _free(self) -> Answer:
        return {"free_bytes": self.backend.device.free_bytes()}


def _first_line(text: str) -> str:
    return text.splitlines()[0][:300] if text else "unknown"


def start(setup: dict[str, Any]) -> Worker:
    """The worker of a setup: `backend`, `device`, `folder`, `length`, `job`.

    Raises:
      ValueError: the backend has no such device.
    """
    job = Job.from_json(setup["job"])
    store = Store(setup["folder"], job, setup["length"])
    backend = importlib.import_module(f"bench.on_{setup['backend']}").Backend(setup["device"], job)
    return Worker(backend, store)


def main() -> None:
    """Serve commands until the input ends."""
    # Libraries write to stdout; the answers go where they cannot.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, lambda answer: print(json.dumps(answer), file=answers, flush=True))


def serve(commands: Any, reply: Callable[[Answer], None]) -> None:
    """Answer every line of `commands`; the first one is the setup."""
    setup = json.loads(next(commands))
    try:
        worker = start(setup)
        reply(worker.hello())
    except (ValueError, ImportError) as error:
        reply({"status": "failed", "reason": _first_line(str(error))})
        return
    for line in commands:
        reply(worker.handle(json.loads(line)))


if __name__ == "__main__":
    main()
