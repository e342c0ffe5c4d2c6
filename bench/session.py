"""The steps of a run: start the workers, verify, measure."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench import fit, floor, host, predict, registry, verify
from bench.extras import OBSERVED
from bench.inputs import Store, token_bytes
from bench.job import Job, Point
from bench.ledger import Ledger
from bench.pool import Answer, Pool
from bench.progress import Progress
from vq_common import BenchConfig

Key = tuple[str, str, bool]  # backend, mechanism, is_causal
DISK_FRACTION = 0.9  # of the free disk that inputs may take


class RunError(Exception):
    """A run cannot start; the message is for the user."""


class Options(NamedTuple):
    """What the user asked for, checked."""

    job: Job
    bench: BenchConfig
    backends: tuple[str, ...]
    mechanisms: tuple[str, ...]
    causal: tuple[bool, ...]
    device: str
    out: Path
    is_resume: bool
    suite: str = "scaling"
    direction: str = "fwd"
    extras: tuple[str, ...] = ()  # what records hold beside time, see `extras`
    title: str = ""  # of this one of several runs
    held_out: int = 0  # tokens of other text that codebooks are fitted on; 0: those that are measured
    is_timed: bool = True  # whether something is measured when it is verified


def plan(options: Options) -> list[tuple[str, Point]]:
    """All points, pairs side by side; a kernel that only one framework has is planned in that one.

    Every second length comes first, then those between and the longest, each time with the least
    work first: an interrupt, or the end of the time, leaves curves over a wide range.
    """
    lengths = sorted(set(options.bench.lengths))
    first = lengths[:-1:2]
    points = [
        Point(mechanism, is_causal, length, options.direction)
        for length in lengths
        for mechanism in options.mechanisms
        for is_causal in options.causal
    ]
    points.sort(key=lambda point: (point.length not in first, predict.work(options.job, point)))
    pairs = ((backend, point) for point in points for backend in options.backends)
    return [(backend, point) for backend, point in pairs if registry.has_kernel(backend, point.mechanism)]


class Session:
    """The state of a run: `start`, `verify` and `measure`, in this order, or all of it by `run`."""

    def __init__(
        self, options: Options, pool: Pool, ledger: Ledger, progress: Progress, store: Store, begin: float
    ) -> None:
        self.options, self.pool, self.ledger, self.progress = options, pool, ledger, progress
        self.job, self.store, self.begin = options.job, store, begin
        self.points = plan(options)
        self.notes: list[str] = []
        self._free: dict[str, int] = {}
        self._done: dict[tuple[Any, ...], Any] = {}
        self.verified: dict[Key, dict[str, Any]] = {}
        self.refused: dict[Key, str] = {}  # and why
        self.unavailable: dict[Key, str] = {}  # kernels that cannot run here, and why
        self._seen: dict[Key, list[predict.Seen]] = {}
        self._no_memory: dict[Key, int] = {}
        self._filled = 0
        self._ceilings: dict[str, floor.Ceilings] = {}
        self._keeps_peak: set[str] = set()  # backends whose highest peak lasts as long as their process
        self._in_process: dict[str, Key] = {}

    def run(self) -> bool:
        """Start, verify and measure; whether Ctrl-C ended it.

        Raises:
          RunError: a backend has not the device, or there are no inputs.
        """
        try:
            self.start()
            self.verify()
            self.measure()
        except KeyboardInterrupt:
            self.progress.line("interrupted: what was measured is kept, --resume goes on")
            return True
        return False

    # --- start -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the workers, find what is done, fit the codebooks.

        Raises:
          RunError: a backend has not the device, or there are no inputs.
        """
        self.progress.now(f"starting {' and '.join(self.options.backends)}")
        on_cpu = []
        for backend, hello in self.pool.start_all(self.options.backends).items():
            if hello["status"] != "ok":
                raise RunError(f"{backend}: {hello['reason']}")
            self.ledger.set_device(backend, hello["device"], hello["device_name"])
            self._free[backend] = hello["free_bytes"]
            self._keeps_peak |= {backend} if hello.get("keeps_peak") else set()
            self.progress.line(f"{backend} on {hello['device']} ({hello['device_name']})")
            on_cpu += [backend] if hello["device"] == "cpu" else []
        if on_cpu and self.options.device == "auto" and host.has_nvidia_gpu():
            self._note(
                f"warning: this machine has an NVIDIA GPU, but {' and '.join(on_cpu)} sees none and runs on "
                f"the CPU; with --device cuda that is an error"
            )
        self._done = self.ledger.done()
        if OBSERVED in self.options.extras and self._keeps_peak:
            self.points.sort(key=lambda item: (registry.position(item[1].mechanism), item[1][1:]))
        if self._pending() and not self._is_over():
            self._find_ceilings()
            self._prepare()

    def _find_ceilings(self) -> None:
        """The best rates that any backend reaches on each kind of device."""
        self.progress.now("measuring how fast the device copies and multiplies")
        found: dict[str, list[floor.Ceilings]] = {}
        for backend in self.options.backends:
            answer = self.pool.ask(backend, {"do": "ceilings"})
            if answer["status"] != "ok":
                self._note(f"{backend}: the device's own rates could not be measured: {answer['reason']}")
                continue
            rates = floor.Ceilings(answer["copy_gb_s"], answer["matmul_tflop_s"])
            found.setdefault(self.ledger.device(backend), []).append(rates)
        for device, reached in found.items():
            copy, matmul = map(max, zip(*reached, strict=True))
            self._ceilings[device] = floor.Ceilings(copy, matmul)
            self.progress.line(f"{device}: copies {copy:,.0f} GB/s, multiplies {matmul:,.3g} TFLOP/s")

    def _pending(self) -> list[tuple[str, Point]]:
        return [item for item in self.points if self.ledger.identity(*item) not in self._done]

    def _is_over(self) -> bool:
        """Whether the time of the run has passed: what is left is skipped, and nothing prepared for it.

        A worker that has not answered soon after is ended by `Pool`, which says nothing of what it did.
        """
        return time.monotonic() - self.begin > self.options.bench.max_run_s

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.line(text)

    def _prepare(self) -> None:
        sources = {"real": "Python's standard library", "random": "Gaussian noise"}
        source = sources.get(self.job.input, self.job.layer)
        self.progress.now(f"preparing inputs from {source}")
        answer = self.pool.ask(self._preparing, {"do": "prepare"})
        if answer["status"] != "ok" and not self._is_over():
            raise RunError(f"inputs could not be prepared: {answer['reason']}")

    @property
    def _preparing(self) -> str:
        """The backend whose module gives q, k and v: torch where it runs, which has nothing to compile."""
        return self.options.backends[-1]

    def _fill(self, length: int) -> str | None:
        """Have the inputs of a length; why there are none, or None."""
        if length <= self._filled:
            return None
        need = token_bytes(self.job) * (length - self._filled)
        free = shutil.disk_usage(self.options.out).free
        if need > DISK_FRACTION * free:
            return f"its inputs take {need / 2**30:.1f} GiB more on disk, {free / 2**30:.1f} GiB are free"
        self.progress.now(f"preparing {length:,} tokens")
        message = {"do": "fill", "length": length, "filled": self._filled}
        answer = self.pool.ask(self._preparing, message)
        if answer["status"] != "ok":
            return f"its inputs could not be prepared: {answer['reason']}"
        self._filled = int(answer["filled"])
        return None

    # --- verify ----------------------------------------------------------------------------

    def verify(self) -> None:
        """Compare every mechanism that is to be timed with the oracle, and both backends with each other.

        Raises:
          RunError: there are no inputs.
        """
        forms = dict.fromkeys(
            (point.mechanism, point.is_causal)
            for backend, point in self._pending()
            if not registry.unsupported(backend, self.job, point)
        )
        if not forms or self._is_over():
            return
        shortest = min(self.options.bench.lengths)
        length = verify.verified_length(self.job, shortest, self.options.direction)
        trouble = self._fill(length)
        if trouble and self._is_over():
            return
        if trouble:
            raise RunError(f"nothing can be verified: {trouble}")
        verify.write_inputs(self.store, length)
        for mechanism, is_causal in forms:
            if not self._is_over():
                self._verify_form(mechanism, is_causal, length)

    def _verify_form(self, mechanism: str, is_causal: bool, length: int) -> None:
        name = fit.curve_name(mechanism, is_causal)
        self.progress.now(f"verifying {name}")
        direction = self.options.direction
        point = Point(mechanism, is_causal, length, direction)
        backends = [
            backend
            for backend in self.options.backends
            if registry.has_kernel(backend, mechanism) and not registry.unsupported(backend, self.job, point)
        ]
        expected: dict[str, verify.Array] = {}
        is_timed = self.options.is_timed and length in self.options.bench.lengths
        answers = self.pool.ask_all(
            backends,
            {"do": "verify", **point._asdict(), "is_timed": is_timed},
            lambda: expected.update(verify.expected(mechanism, self.store, length, is_causal, direction)),
        )
        results = {
            backend: {part: self.store.read(file) for part, file in answer["outs"].items()}
            for backend, answer in answers.items()
            if answer["status"] == "ok"
        }
        twin_error = None
        if len(results) == 2:
            first, second = results.values()
            twin_error = max(verify.error(first[part], second[part]) for part in expected)
        for backend, answer in answers.items():
            key = backend, mechanism, is_causal
            if answer["status"] == "skipped":
                self.unavailable[key] = answer["reason"]
                continue
            if backend not in results and self._is_over():
                continue
            found = {"verified_length": length, "implementation": answer.get("implementation")}
            reason: str | None = f"could not be verified: {answer.get('reason')}"
            if backend in results:
                errors = verify.compare(results[backend], expected, self.job.dtype)
                found |= {"oracle_error": errors.out, "gradient_error": errors.gradient}
                reason = errors.wrong
            if reason is None:
                self.verified[key] = found | {"twin_error": twin_error}
                self._free[backend] = answer["free_bytes"]
                # Behind the host a call on few tokens is the host's time, and says nothing of a long one.
                ms = answer["ms"] if self.ledger.devices[backend][0] == "cpu" else 0.0
                self._remember(key, {"ms_median": ms, **point._asdict(), **answer})
                continue
            reason = f"refused: {reason}"
            self.refused[key] = reason
            self._note(f"{backend} {name} {reason}")
            shortest = point._replace(length=min(self.options.bench.lengths))
            self.ledger.add(backend, shortest, found, {"status": "failed", "reason": reason})

    # --- measure ---------------------------------------------------------------------------

    def measure(self) -> None:
        """Measure what is not done; say of the rest why not."""
        for backend, point in self.points:
            key = backend, point.mechanism, point.is_causal
            known = self._done.get(self.ledger.identity(backend, point))
            if known is not None:
                self._remember(key, known)
            if known is not None or key in self.refused:
                self.progress.point(None)
            else:
                self._renew(key)
                self._measure(key, backend, point)

    def _renew(self, key: Key) -> None:
        """Give a curve a process of its own where the peaks of another one would hide its own."""
        backend = key[0]
        if OBSERVED in self.options.extras and backend in self._keeps_peak and not self._is_over():
            self._fill(max(self.options.bench.lengths))
            if self._in_process.get(backend) != key:
                self.pool.end(backend)
            self._in_process[backend] = key

    def _measure(self, key: Key, backend: str, point: Point) -> None:
        label = f"{backend:<5} {point.curve:<19} {point.length:>9,}"
        reason = self._reason_to_skip(key, backend, point) or self._fill(point.length)
        if reason:
            answer: Answer = {"status": "skipped", "reason": reason}
        else:
            self.progress.now(f"{backend} {point.curve} {point.length:,}")
            message = {"do": "measure", **point._asdict(), "max_bytes": self._max_bytes(backend)}
            answer = self.pool.ask(backend, message)
            if answer.get("is_memory") and self._end_others(backend):
                answer = self.pool.ask(backend, message)
            self._free[backend] = answer.get("free_bytes", self._free[backend])
        bounds = floor.record(self.job, point, self._ceilings.get(self.ledger.device(backend)))
        self.ledger.add(backend, point, self.verified.get(key, {}), bounds, answer)
        if answer["status"] == "ok" and answer["ms_median"] < bounds.get("floor_ms", 0.0):
            self._note(f"doubtful: {label.strip()} is faster than its floor, {bounds['floor_ms']:.3g} ms")
        if answer["status"] == "ok":
            self._remember(key, answer | {"length": point.length})
            self.progress.point(f"{label}  {_summary(answer)}")
            return
        if answer.get("is_memory"):
            self._no_memory[key] = min(point.length, self._no_memory.get(key, point.length))
        self.progress.point(f"{label}  {answer['status']}: {answer['reason']}")

    def _end_others(self, backend: str) -> bool:
        """End the processes of other backends on the same GPU, which keep memory that they used once."""
        others = [other for other in self.options.backends if other != backend]
        if not others or self.ledger.devices[backend][0] == "cpu":
            return False
        for other in others:
            self.pool.end(other)
        return True

    def _reason_to_skip(self, key: Key, backend: str, point: Point) -> str | None:
        reason = registry.unsupported(backend, self.job, point) or self.unavailable.get(key)
        if reason:
            return reason
        if point.length >= self._no_memory.get(key, point.length + 1):
            return f"{self._no_memory[key]:,} tokens ran out of memory"
        bench = self.options.bench
        limits = predict.Limits(
            max_point_s=bench.max_point_s,
            max_run_s=bench.max_run_s,
            max_bytes=self._max_bytes(backend),
            elapsed_s=time.monotonic() - self.begin,
        )
        return predict.skip_reason(self.job, point, self._seen.get(key, []), limits)

    def _max_bytes(self, backend: str) -> int:
        return int(self.options.bench.max_memory_fraction * self._free[backend])

    def _remember(self, key: Key, measured: Mapping[str, Any]) -> None:
        seen = predict.Seen(
            measured["length"],
            measured["ms_median"],
            measured.get("compile_s") or 0.0,
            measured.get("peak_bytes"),
            measured["implementation"],
            measured.get("feed_s") or 0.0,
        )
        self._seen.setdefault(key, []).append(seen)


def _summary(answer: Answer) -> str:
    parts = [f"{answer['ms_p20']:.3g} ... {answer['ms_p80']:.3g} ms", answer["implementation"]]
    if answer["compile_s"] is not None:
        parts.append(f"compiled in {answer['compile_s']:.1f} s")
    if answer["peak_bytes"] is not None:
        parts.append(f"peak {answer['peak_bytes'] / 2**20:,.0f} MiB")
    return f"{answer['ms_median']:>10,.2f} ms  ({', '.join(parts)})"
