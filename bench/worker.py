"""One backend in its own process: reads commands and writes answers, one JSON object a line.

The first line is a setup (see `start`); then `{"do": "ceilings" | "prepare" | "fill" | "verify" | "measure",
...}`. Every answer has `status`: 'ok', 'skipped' or 'failed' with a `reason`.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench import counting, extras, inputs, measure, registry, rows, verify
from bench.decode import Decoder
from bench.floor import Ceilings
from bench.inputs import Store
from bench.job import STEP, Job, Point
from bench.measure import Program
from bench.prepare import Preparer

Answer = dict[str, Any]

COPY_BYTES = 2**30  # of float32 that are copied on a GPU; a quarter on a CPU
GPU_MATMUL, CPU_MATMUL = 16_384, 1024  # rows of a square product


class Worker:
    """One backend on one device, with the arrays of the length it works on.

    Args:
      backend: an `on_jax.Backend` or `on_torch.Backend`.
      store: where inputs are.
      asked: what is found beside times, see `extras`.
      held_out: see `Preparer`.
    """

    def __init__(self, backend: Any, store: Store, asked: Sequence[str] = (), held_out: int = 0) -> None:
        self._extras, self._held_out = asked, held_out
        self.backend = backend
        self._begin(store)

    def _begin(self, store: Store) -> None:
        self.store, self.job = store, store.job
        self._arrays: dict[str, Any] = {}
        self._loaded = 0, ""  # the length and direction of the arrays
        self._verified: dict[Point, Program] = {}
        self._decoder = Decoder(self.backend)
        self._quantize_ms: dict[tuple[str, int], float] = {}
        self._prepares: Preparer | None = None

    def hello(self) -> Answer:
        """What runs here."""
        backend = self.backend
        device = {"device": backend.kind, "device_name": backend.device.name()}
        return {"status": "ok", "keeps_peak": backend.keeps_peak, **device, **self._free()}

    def handle(self, message: dict[str, Any]) -> Answer:
        """Answer one command; an error is an answer too."""
        try:
            command: Callable[..., Answer] = getattr(self, message.pop("do"))
            return command(**message)
        except registry.UnavailableError as error:
            return {"status": "skipped", "reason": measure.first_line(str(error))}
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            is_memory = measure.is_out_of_memory(error)
            del error
            self._forget()
            reason = f"out of memory: {measure.first_line(text)}" if is_memory else measure.first_line(text)
            return {"status": "failed", "reason": reason, "is_memory": is_memory}

    def use(self, **setup: Any) -> Answer:
        """Go on with another job or store, of a setup with the same backend and device."""
        job = Job.from_json(setup["job"])
        self.backend.job = job
        self._begin(Store(setup["folder"], job, setup["length"]))
        return self.hello()

    def prepare(self) -> Answer:
        """Create the inputs and fit the codebooks."""
        self._preparer().create()
        return {"status": "ok"}

    def ceilings(self) -> Answer:
        """How fast this device copies and multiplies: the best of repeated calls, see `floor.Ceilings`."""
        backend, is_cpu = self.backend, self.backend.kind == "cpu"
        size = CPU_MATMUL if is_cpu else GPU_MATMUL
        rng = np.random.default_rng(0)
        x = backend.array(np.tile(rng.standard_normal((size, 256), np.float32), size // 256), self.job.dtype)
        matmul_ms = min(self._compiled_times(backend.matmul, x))
        n_copied = COPY_BYTES // 4 // (4 if is_cpu else 1)
        x = backend.array(np.ones(n_copied, np.float32), "float32")
        copy_ms = min(self._compiled_times(backend.copy, x))
        del x
        backend.release()
        rates = Ceilings(8 * n_copied / (1e6 * copy_ms), 2 * size**3 / (1e9 * matmul_ms))
        return {"status": "ok", **rates._asdict()}

    def fill(self, length: int, filled: int) -> Answer:
        """Prepare tokens up to `length`; `filled` are there, perhaps by a process before this one."""
        return {"status": "ok", "filled": self._preparer().fill(length, filled)}

    def verify(
        self, mechanism: str, is_causal: bool, length: int, direction: str = "fwd", *, is_timed: bool = False
    ) -> Answer:
        """Run what is to be timed once on the inputs that the oracle gets, and write what comes out.

        Args:
          is_timed: whether `length` is to be timed too: the program is kept for that.
        """
        job = self.job.at_verification(mechanism, is_causal, length)
        raw = verify.read_inputs(self.store, job, length, is_causal)
        found: Answer = {"status": "ok"}
        if direction == STEP:
            ready = self._decoder.at(
                mechanism,
                job,
                length,
                lambda name, start, stop: self._array(name, raw[name][:, start:stop], job),
                tuple(self._array(name, raw[name], job) for name in _codebooks(mechanism)),
            )
            program, arrays, found["implementation"] = ready.program, ready.arrays, ready.implementation
            found["feed_s"] = ready.feed_s
        else:
            names = registry.MECHANISMS[mechanism].arrays
            arrays = tuple(self._array(name, raw[name], job, direction) for name in names)
            built = registry.build(mechanism, self.backend.name, job, is_causal, arrays)
            if direction != "fwd":
                arrays = *arrays, self._array("d_out", raw["d_out"], job)
            is_kept = is_timed and job == self.job
            program = self.backend.compile(built.fn, arrays, direction, is_timed=is_kept)
            found["implementation"] = built.implementation
            if is_kept:
                self._verified[Point(mechanism, is_causal, length, direction)] = program
        arguments = program.arguments(arrays)
        parts = verify.named(direction, program.run(*arguments))
        prefix = f"out_{self.backend.name}_{mechanism}_{'causal' if is_causal else 'full'}"
        for part, x in parts.items():
            self.store.write(f"{prefix}_{part}", self.backend.numpy(x))
        start = time.perf_counter()
        self.backend.device.synchronize(program.run(*arguments))
        ms = 1e3 * (time.perf_counter() - start)
        outs = {part: f"{prefix}_{part}" for part in parts}
        return found | {"outs": outs, "ms": ms, **self._free()}

    def count(self, mechanism: str, is_causal: bool, lengths: Sequence[int]) -> Answer:
        """Operations and bytes of a forward call at each length, from shapes."""
        found = counting.counts(self.backend.name, mechanism, is_causal, self.job, lengths)
        return {"status": "ok", **found._asdict()}

    def measure(
        self, mechanism: str, is_causal: bool, length: int, max_bytes: int, direction: str = "fwd"
    ) -> Answer:
        """Time a point; one that needs more than `max_bytes`, where that shows first, is skipped."""
        point = Point(mechanism, is_causal, length, direction)
        if (length, direction) != self._loaded:
            self._forget()
            self._loaded = length, direction
        return (
            self._measure_step(point, max_bytes)
            if direction == STEP
            else self._measure_call(point, max_bytes)
        )

    def _measure_call(self, point: Point, max_bytes: int) -> Answer:
        arrays = self._point_arrays(point)
        built = registry.build(point.mechanism, self.backend.name, self.job, point.is_causal, arrays)
        if point.direction != "fwd":
            arrays = *arrays, self._load("d_out", lambda: inputs.cotangent(self.job, point.length))
        program = self._verified.pop(point, None)
        program = program or self.backend.compile(built.fn, arrays, point.direction)
        answer = self._time(program, arrays, max_bytes)
        if answer["status"] == "ok":
            answer |= self._look_at_output(point, program, arrays, answer["ms_median"])
        del program, arrays
        if answer["status"] == "ok":
            answer["implementation"] = built.implementation
            is_timed = point.direction != "bwd"
            answer["quantize_ms"] = self._quantization_ms(point.mechanism, point.length) if is_timed else None
        self.backend.release()
        return answer | self._free()

    def _look_at_output(self, point: Point, program: Program, arrays: tuple[Any, ...], ms: float) -> Answer:
        """What is asked for of the output, by one more call of so many ms; refused where rows are wrong.

        Rows are not compared where that call takes long for them alone, nor where memory is observed,
        of which this takes some.
        """
        has_rows = ms <= 1e3 * self.job.max_repeat_s and extras.OBSERVED not in self._extras
        has_rows = has_rows and bool(rows.heads(point, self.job))
        has_errors, has_file = extras.ERRORS in self._extras, self.job.layer is not None
        if not (has_rows or has_errors or has_file):
            return {}
        out = verify.named(point.direction, program.run(*program.arguments(arrays)))["out"]
        of_mechanism = arrays[: len(registry.MECHANISMS[point.mechanism].arrays)]
        found: Answer = {}
        if has_rows:
            error = rows.error(self.backend, point, self.job, out, of_mechanism)
            found["row_error"] = error
            if error > verify.limit(self.job.dtype):
                limit = f"limit {verify.limit(self.job.dtype):.0e}"
                reason = f"refused: relative RMS error {error:.1e} of rows at this length to float64, {limit}"
                return found | {"status": "failed", "reason": reason}
        if has_errors:
            found |= extras.errors(self.backend, point, out, of_mechanism)
        if has_file:
            found["out"] = f"whole_{self.backend.name}"
            self.store.write(found["out"], self.backend.numpy(out))
        return found

    def _measure_step(self, point: Point, max_bytes: int) -> Answer:
        codebooks = _codebooks(point.mechanism)
        ready = self._decoder.at(
            point.mechanism,
            self.job,
            point.length,
            lambda name, start, stop: self._array(name, self.store.read_tokens(name, stop, start), self.job),
            tuple(self._load(name, partial(self.store.read, name)) for name in codebooks),
        )
        answer = self._time(ready.program, ready.arrays, max_bytes)
        answer |= {key: getattr(ready, key) for key in ("implementation", "state_bytes", "feed_s")}
        del ready
        self.backend.release()
        return answer | {"quantize_ms": None} | self._free()

    def _time(self, program: Program, arrays: tuple[Any, ...], max_bytes: int) -> Answer:
        if program.peak_bytes is not None and program.peak_bytes > max_bytes:
            reason = f"needs {program.peak_bytes / 2**30:.1f} GiB, {max_bytes / 2**30:.1f} GiB may be used"
            return {"status": "skipped", "reason": reason}
        is_observed = extras.OBSERVED in self._extras
        observed = self.backend.observed_bytes(program, arrays) if is_observed else None
        timed = self.backend.times(program, arrays)
        return {
            "status": "ok",
            "observed_bytes": observed,
            "timing": timed.timing,
            **measure.spread(timed.times_ms)._asdict(),
            "compile_s": program.compile_s,
            "peak_bytes": timed.peak_bytes,
            "dispatch_ms": timed.dispatch_ms,
            "temp_bytes": program.temp_bytes,
        }

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
        return measure.spread(self._compiled_times(self.backend.nearest_codes, *arrays)).ms_median

    def _compiled_times(self, fn: Callable[..., Any], *arrays: Any) -> list[float]:
        """Milliseconds of repeated calls, after one that compiles."""
        self.backend.device.synchronize(fn(*arrays))
        return self.backend.times(Program(fn), arrays).times_ms

    def _point_arrays(self, point: Point) -> tuple[Any, ...]:
        """The arguments of a mechanism, on the device while points of this length go on."""

        def read(name: str) -> Any:
            is_token = name in registry.DIFFERENTIABLE
            return self.store.read_tokens(name, point.length) if is_token else self.store.read(name)

        names = registry.MECHANISMS[point.mechanism].arrays
        if "sample_ids" in names:
            ids = inputs.sample_ids(self.job, point.length, point.is_causal)
            self._arrays["sample_ids"] = self._array("sample_ids", ids, self.job)
        return tuple(self._load(name, partial(read, name), point.direction) for name in names)

    def _load(self, name: str, read: Callable[[], Any], direction: str = "fwd") -> Any:
        if name not in self._arrays:
            self._arrays[name] = self._array(name, read(), self.job, direction)
        return self._arrays[name]

    def _preparer(self) -> Preparer:
        if self._prepares is None:
            self._prepares = Preparer(self.store, self.backend, self._held_out)
        return self._prepares

    def _array(self, name: str, raw: np.ndarray[Any, Any], job: Job, direction: str = "fwd") -> Any:
        _, dtype = registry.array_shapes(job, 0, 0)[name]
        array = self.backend.array(raw, dtype)
        is_primal = direction in ("bwd", "fwd+bwd") and name in registry.DIFFERENTIABLE
        return self.backend.primal(array) if is_primal else array

    def _forget(self) -> None:
        self._arrays.clear()
        self._loaded = 0, ""
        self.backend.release()

    def _free(self) -> Answer:
        return {"free_bytes": self.backend.device.free_bytes()}


def _codebooks(mechanism: str) -> tuple[str, ...]:
    """Names of the codebooks of a mechanism, those of queries first."""
    return tuple(codebook for _, codebook in registry.MECHANISMS[mechanism].quantized)


def start(setup: dict[str, Any]) -> Worker:
    """The worker of a setup: `backend`, `device`, `folder`, `length`, `job`, `extras`, `held_out`.

    Raises:
      ValueError: the backend has no such device.
    """
    job = Job.from_json(setup["job"])
    store = Store(setup["folder"], job, setup["length"])
    backend = importlib.import_module(f"bench.on_{setup['backend']}").Backend(setup["device"], job)
    return Worker(backend, store, setup.get("extras", ()), setup.get("held_out", 0))


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
        reply({"status": "failed", "reason": measure.first_line(str(error))})
        return
    for line in commands:
        reply(worker.handle(json.loads(line)))


if __name__ == "__main__":
    main()
