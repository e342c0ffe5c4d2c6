"""The benchmark's own machinery: records, resume, interrupt, refusal, prediction, fits, devices, options.

Most runs here use a worker inside the test process whose times are made up; two use real ones.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bench import __main__ as command_line
from bench import arguments as bench_arguments
from bench import fit, host, inputs, measure, predict, records, registry, report, runner, session, verify
from bench import worker as worker_module
from bench.inputs import Store
from bench.job import Job, Point
from bench.ledger import Ledger
from bench.prepare import Preparer
from bench.process import Child, ChildDied
from bench.suites import scaling
from vq_common import BenchConfig, TransformerConfig

LENGTHS = (64, 128, 256)


def small_job(**changes: Any) -> Job:
    config = TransformerConfig(
        d_model=24, n_head=2, d_k=8, d_v=8, n_code=7, block_len=16, bench=BenchConfig(n_repeat=1, n_kmeans=2)
    )
    return dataclasses.replace(Job.of(config, batch=1, is_random=False), **changes)


def options(out: Path, **changes: Any) -> session.Options:
    bench = BenchConfig(lengths=LENGTHS, max_point_s=1e6, max_run_s=1e6)
    default = session.Options(
        job=small_job(),
        bench=bench,
        backends=("torch",),
        mechanisms=("vq_qk", "exact"),
        causal=(True,),
        device="cpu",
        out=out,
        is_resume=False,
    )
    return default._replace(**changes)


class FakeBackend:
    """Projections and codebooks without a framework."""

    def projector(self, config: TransformerConfig) -> Any:
        rng = np.random.default_rng(0)
        weights = [
            rng.normal(size=(config.d_model, config.n_head, width)).astype(np.float32)
            for width in (config.d_k, config.d_k, config.d_v)
        ]
        return lambda x: tuple(np.einsum("btd,dhk->bthk", x, weight) / 5 for weight in weights)

    def fit_codebook(self, x: Any, draws: Any) -> Any:
        ids = (draws * x.shape[1]).astype(int)
        return np.stack([x[0, row, head] for head, row in enumerate(ids)])


class FakeWorker:
    """Answers like a worker whose calls take `ms[mechanism] * T`; class attributes plan its mishaps."""

    ms: ClassVar[dict[str, float]] = {"vq_qk": 0.1, "vq_k": 0.1, "hyper": 0.1, "exact": 0.1}
    mishaps: ClassVar[dict[Any, Any]] = {}  # (mechanism, length) to an answer or an exception
    wrong: ClassVar[set[str]] = set()  # mechanisms whose output is off
    measured: ClassVar[list[tuple[str, Any, int]]] = []
    started: ClassVar[int] = 0
    kept: ClassVar[list[tuple[int, bool]]] = []  # lengths that are verified, and whether they are timed too

    def __init__(self, setup: dict[str, Any]) -> None:
        type(self).started += 1
        self.backend = setup["backend"]
        self.store = Store(setup["folder"], Job.from_json(setup["job"]), setup["length"])
        self.answers: list[Any] = [
            {"status": "ok", "device": "cpu", "device_name": "fake", "free_bytes": 2**40}
        ]

    def send(self, message: dict[str, Any]) -> None:
        rest = {key: value for key, value in message.items() if key != "do"}
        self.answers.append(getattr(self, f"_{message['do']}")(**rest))

    def receive(self, timeout_s: float) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        found: dict[str, Any] = answer
        return found

    def close(self) -> None:
        pass

    def _ceilings(self) -> dict[str, Any]:
        return {"status": "ok", "copy_gb_s": 10.0, "matmul_tflop_s": 0.5}

    def _prepare(self) -> dict[str, Any]:
        Preparer(self.store, FakeBackend()).create()
        return {"status": "ok"}

    def _fill(self, length: int, filled: int) -> dict[str, Any]:
        return {"status": "ok", "filled": Preparer(self.store, FakeBackend()).fill(length, filled)}

    def _verify(
        self, mechanism: str, is_causal: bool, length: int, direction: str, *, is_timed: bool
    ) -> dict[str, Any]:
        type(self).kept.append((length, is_timed))
        found = verify.expected(mechanism, self.store, length, is_causal, direction)
        for part, x in found.items():
            self.store.write(f"{self.backend}_{part}", x * 1.001 if mechanism in self.wrong else x)
        outs = {part: f"{self.backend}_{part}" for part in found}
        ok = {"status": "ok", "outs": outs, "implementation": "fake", "free_bytes": 2**40}
        return ok | {"ms": self.ms[mechanism] * length}

    def _measure(self, mechanism: str, is_causal: bool, length: int, max_bytes: int, direction: str) -> Any:
        self.measured.append((self.backend, mechanism, length))
        if (mechanism, length) in self.mishaps:
            return self.mishaps[mechanism, length]
        spread = dict.fromkeys(("ms_median", "ms_p20", "ms_p80"), self.ms[mechanism] * length)
        rest = {"n_repeat": 1, "compile_s": None, "quantize_ms": None, "peak_bytes": 1000 * length}
        return {"status": "ok", "implementation": "fake", "timing": "host clock"} | spread | rest


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    class Fresh(FakeWorker):
        mishaps: ClassVar[dict[Any, Any]] = {}
        wrong: ClassVar[set[str]] = set()
        measured: ClassVar[list[tuple[str, Any, int]]] = []
        kept: ClassVar[list[tuple[int, bool]]] = []
        started = 0

    monkeypatch.setattr(host, "has_nvidia_gpu", lambda: False)
    return Fresh


class Clock:
    """`time` of a module whose clock can be set forward."""

    ahead: ClassVar[float] = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def too_late(kind: Any, step: str, n_code: int) -> Any:
    """Workers of a kind that do not answer in a step of a job with so many codes, which sets the clock on."""
    Clock.ahead = 0.0

    class Late(kind):  # type: ignore[misc]
        def __init__(self, setup: dict[str, Any]) -> None:
            super().__init__(setup)
            self.n_code = setup["job"]["codes_k"]

        def send(self, message: dict[str, Any]) -> None:
            if message["do"] == "use":
                self.n_code = message["job"]["codes_k"]
            self.is_late = (message["do"], self.n_code) == (step, n_code)
            super().send(message)

        def receive(self, timeout_s: float) -> dict[str, Any]:
            found: dict[str, Any] = super().receive(timeout_s)
            if getattr(self, "is_late", False):
                Clock.ahead = 1e7
                raise ChildDied("no answer within 1 s: stopped")
            return found

    return Late


def of(path: Path, **wanted: Any) -> list[records.Record]:
    found = records.read(path / "records.jsonl")
    return [r for r in found if all(r[key] == value for key, value in wanted.items())]


# --- a run -----------------------------------------------------------------------------------


def test_a_run_measures_every_point_and_writes_its_report(
    tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options(tmp_path, backends=("jax", "torch"), causal=(False, True))
    assert runner.run(asked, fake) == 0
    found = records.read(tmp_path / "records.jsonl")
    assert len(found) == 2 * 2 * 2 * 3
    assert all(record["status"] == "ok" and record["oracle_error"] == 0 for record in found)
    assert {"records.jsonl", "scaling.md", "scaling.png", "summary.json"} == {
        p.name for p in tmp_path.iterdir()
    }
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == "backends agree: outputs within 0.0e+00 (limit 6e-06); not compared: exponents"
    assert json.loads((tmp_path / "summary.json").read_text())["verdict"] == verdict


def test_every_second_length_comes_first(tmp_path: Path, fake: Any) -> None:
    bench = BenchConfig(lengths=(64, 65, 66, 67, 68), max_run_s=1e6)
    runner.run(options(tmp_path, mechanisms=("exact",), bench=bench), fake)
    assert [length for _, _, length in fake.measured] == [64, 66, 65, 67, 68]


def test_only_a_program_that_is_timed_later_is_verified_as_it_will_run(tmp_path: Path, fake: Any) -> None:
    for length, is_timed in ((64, True), (2 * verify.MAX_LENGTH, False)):
        bench = BenchConfig(lengths=(length,), max_point_s=1e6, max_run_s=1e6)
        runner.run(options(tmp_path, mechanisms=("vq_qk",), bench=bench), fake)
        assert fake.kept.pop() == (min(length, verify.MAX_LENGTH), is_timed)


def test_what_is_not_timed_is_compiled_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    on_jax = pytest.importorskip("bench.on_jax", exc_type=ImportError)
    asked: list[Any] = []
    compiled = on_jax._compile

    def noted(*args: Any, options: Any) -> Any:
        asked.append(options)
        return compiled(*args, options=options)

    monkeypatch.setattr(on_jax, "_compile", noted)
    backend = on_jax.Backend("cpu", small_job())
    array = backend.array(np.ones((1, 4, 2, 3), np.float32), "float32")
    for direction, n_part in (("fwd", 1), ("bwd", 2)):
        for is_timed, options in ((True, None), (False, host.NO_AUTOTUNING)):
            arrays = (array,) * (3 if direction == "fwd" else 4)
            program = backend.compile(lambda q, k, v: q * k + v, arrays, direction, is_timed=is_timed)
            program.run(*program.arguments(arrays))
            assert [asked.pop() for _ in range(n_part)] == [options] * n_part
    assert not asked


def test_work_orders_the_points_of_a_pass(tmp_path: Path) -> None:
    bench = BenchConfig(lengths=(4096, 8192, 16384, 32768, 65536, 131072, 262144))
    first = [(point.mechanism, point.length) for _, point in session.plan(options(tmp_path, bench=bench))]
    assert first[:4] == [("vq_qk", 4096), ("exact", 4096), ("vq_qk", 16384), ("vq_qk", 65536)]
    assert first[4:7] == [("exact", 16384), ("exact", 65536), ("vq_qk", 8192)]


def test_a_wrong_mechanism_is_refused_and_never_timed(
    tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.wrong = {"vq_qk"}
    assert runner.run(options(tmp_path), fake) == 1
    assert {mechanism for _, mechanism, _ in fake.measured} == {"exact"}
    (refused,) = of(tmp_path, mechanism="vq_qk")
    assert refused["status"] == "failed"
    assert refused["reason"] == "refused: relative RMS error 1.0e-03 to the oracle, limit 3e-06"
    assert refused["oracle_error"] == pytest.approx(1e-3)
    assert "torch vq_qk causal refused" in capsys.readouterr().out


def test_resume_measures_only_what_is_missing(tmp_path: Path, fake: Any) -> None:
    fake.mishaps = {("exact", 256): KeyboardInterrupt()}
    assert runner.run(options(tmp_path), fake) == 130
    before = of(tmp_path)
    assert [(r["mechanism"], r["length"]) for r in before] == [("exact", 64), ("vq_qk", 64), ("exact", 128)]
    assert (tmp_path / "scaling.md").exists()
    fake.mishaps, fake.measured = {}, []
    assert runner.run(options(tmp_path, is_resume=True), fake) == 0
    assert fake.measured == [("torch", "exact", 256), ("torch", "vq_qk", 128), ("torch", "vq_qk", 256)]
    assert of(tmp_path)[:3] == before
    fake.measured = []
    assert runner.run(options(tmp_path, is_resume=True), fake) == 0
    assert fake.measured == []


def test_resume_is_of_one_configuration_and_a_new_run_keeps_the_old_records(
    tmp_path: Path, fake: Any
) -> None:
    runner.run(options(tmp_path, mechanisms=("exact",)), fake)
    other = options(tmp_path, mechanisms=("exact",), job=small_job(seed=1), is_resume=True)
    runner.run(other, fake)
    assert len(fake.measured) == len(of(tmp_path)) == 6
    runner.run(options(tmp_path, mechanisms=("exact",)), fake)
    assert len(of(tmp_path)) == 3
    assert len(records.read(tmp_path / "records.old.jsonl")) == 6


def test_an_out_of_memory_is_recorded_and_ends_its_curve_alone(tmp_path: Path, fake: Any) -> None:
    no_memory = {"status": "failed", "reason": "out of memory: 9 GiB", "is_memory": True}
    fake.mishaps = {("exact", 64): no_memory}
    assert runner.run(options(tmp_path), fake) == 0
    assert of(tmp_path, mechanism="exact", length=64)[0]["reason"] == "out of memory: 9 GiB"
    later = of(tmp_path, mechanism="exact", status="skipped")
    assert [r["reason"] for r in later] == ["64 tokens ran out of memory"] * 2
    assert len(of(tmp_path, mechanism="vq_qk", status="ok")) == 3
    assert "failed at 64" in (tmp_path / "scaling.md").read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_another_backend_keeps_of_a_gpu_is_taken_back(tmp_path: Path, fake: Any, device: str) -> None:
    """Out of memory beside the other process, and measured without it."""
    alive: set[str] = set()

    class Sharing(fake):
        def __init__(self, setup: dict[str, Any]) -> None:
            super().__init__(setup)
            self.answers[0]["device"] = device
            alive.add(self.backend)

        def close(self) -> None:
            alive.discard(self.backend)

        def _measure(self, **point: Any) -> Any:
            if point["length"] == 256 and len(alive) > 1 and self.backend == "torch":
                return {"status": "failed", "reason": "out of memory: 9 GiB", "is_memory": True}
            return super()._measure(**point)

    both = options(tmp_path, mechanisms=("exact",), backends=("jax", "torch"))
    assert runner.run(both, Sharing) == 0
    (record,) = of(tmp_path, backend="torch", length=256)
    assert record["status"] == ("failed" if device == "cpu" else "ok")
    assert len(of(tmp_path, backend="jax", status="ok")) == 3


def test_a_worker_that_dies_is_replaced(tmp_path: Path, fake: Any) -> None:
    fake.mishaps = {("vq_qk", 64): ChildDied("killed by SIGSEGV")}
    assert runner.run(options(tmp_path), fake) == 0
    assert fake.started == 2
    assert [r["reason"] for r in of(tmp_path, status="failed")] == ["killed by SIGSEGV"]
    assert len(of(tmp_path, status="ok")) == 5


def test_what_takes_too_long_is_skipped_with_the_reason(tmp_path: Path, fake: Any) -> None:
    bench = BenchConfig(lengths=(64, 4096), max_point_s=10.0, max_run_s=1e6)
    fake.ms = {"vq_qk": 0.1, "exact": 100.0}
    runner.run(options(tmp_path, bench=bench), fake)
    (skipped,) = of(tmp_path, status="skipped")
    assert (skipped["mechanism"], skipped["length"]) == ("exact", 4096)
    assert skipped["reason"] == f"predicted {6.4 * 64**2 * 1.2:.1f} s a call, max_point_s is 10"


def test_on_a_gpu_what_verification_took_does_not_skip_a_point(tmp_path: Path, fake: Any) -> None:
    class Gpu(fake):  # type: ignore[misc]
        def __init__(self, setup: dict[str, Any]) -> None:
            super().__init__(setup)
            self.answers[0]["device"] = "cuda"

        def _verify(self, *arguments: Any, **named: Any) -> dict[str, Any]:
            return {**super()._verify(*arguments, **named), "ms": 30.0}

    limits = {"lengths": (4096,), "max_point_s": 0.5, "max_run_s": 1e6}
    runner.run(options(tmp_path / "gpu", bench=BenchConfig(**limits)), Gpu)
    assert {r["status"] for r in of(tmp_path / "gpu", mechanism="exact")} == {"ok"}
    limits["lengths"] = (4096, 8192)
    runner.run(options(tmp_path / "both", bench=BenchConfig(**limits)), Gpu)
    assert {r["length"] for r in of(tmp_path / "both", mechanism="exact", status="skipped")} == {8192}


def test_no_point_starts_after_the_end_of_the_run(tmp_path: Path, fake: Any) -> None:
    bench = BenchConfig(lengths=LENGTHS, max_run_s=0.0)
    assert runner.run(options(tmp_path, bench=bench), fake) == 0
    assert fake.measured == []
    assert {r["status"] for r in of(tmp_path)} == {"skipped"}
    assert "max_run_s is 0" in of(tmp_path)[0]["reason"]


def test_a_kernel_that_cannot_do_a_shape_is_skipped_not_refused(tmp_path: Path, fake: Any) -> None:
    asked = options(tmp_path, backends=("jax",), mechanisms=("exact",), job=small_job(value_width=4))
    assert runner.run(asked, fake) == 0
    assert of(tmp_path)[0]["reason"] == "jax.nn.dot_product_attention needs d_k == d_v, found 8 and 4"


def test_a_gpu_that_a_backend_does_not_see_gives_a_warning(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "has_nvidia_gpu", lambda: True)
    runner.run(options(tmp_path, mechanisms=("exact",), device="auto"), fake)
    assert "warning: this machine has an NVIDIA GPU, but torch sees none" in capsys.readouterr().out


# --- real workers ----------------------------------------------------------------------------


class InProcess:
    """A real worker without its process."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.worker = worker_module.start(setup)
        self.answers = [self.worker.hello()]

    def send(self, message: dict[str, Any]) -> None:
        self.answers.append(self.worker.handle(dict(message)))

    def receive(self, timeout_s: float) -> dict[str, Any]:
        return self.answers.pop(0)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "dtype, kind", [("float32", "real"), ("float32", "random"), ("bfloat16", "real"), ("float64", "real")]
)
def test_torch_meets_the_oracle_in_every_mechanism(tmp_path: Path, dtype: str, kind: str) -> None:
    pytest.importorskip("torch")
    asked = options(
        tmp_path,
        job=small_job(dtype=dtype, input=kind, batch=2),
        bench=BenchConfig(lengths=(96,)),
        mechanisms=(*registry.default_mechanisms(small_job(mem_len=1)), "exact_math"),
        causal=(False, True),
    )
    assert runner.run(asked, InProcess) == 0
    found = of(tmp_path, status="ok")
    assert len(found) == 13
    (reason,) = {r["reason"] for r in of(tmp_path, status="skipped")}
    assert reason == "an exact window is of causal attention only"
    assert all(0 < r["oracle_error"] <= verify.limit(dtype) for r in found)
    of_rows = {r["mechanism"]: r["row_error"] for r in found}
    assert of_rows.pop("hyper") is None
    assert all(0 < error <= verify.limit(dtype) for error in of_rows.values())
    assert all((r["quantize_ms"] is not None) == r["mechanism"].startswith("vq") for r in found)
    assert all(r["peak_bytes"] > 0 and r["ms_p20"] <= r["ms_median"] <= r["ms_p80"] for r in found)


def test_a_wrong_kernel_planted_in_the_registry_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    right = registry.MECHANISMS["vq_qk"]

    def build(*arguments: Any) -> registry.Built:
        built = right.build(*arguments)
        return registry.Built(lambda *arrays: built.fn(*arrays).roll(1, 1), "planted")

    monkeypatch.setitem(registry.MECHANISMS, "vq_qk", right._replace(build=build))
    assert runner.run(options(tmp_path), InProcess) == 1
    (refused,) = of(tmp_path, mechanism="vq_qk")
    assert refused["reason"].startswith("refused: relative RMS error")
    assert len(of(tmp_path, mechanism="exact", status="ok")) == 3


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_a_kernel_that_this_device_has_not_is_skipped(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    asked = options(tmp_path, backends=(backend,), mechanisms=("exact", "exact_cudnn"))
    assert runner.run(asked, InProcess) == 0
    assert len(of(tmp_path, mechanism="exact", status="ok")) == 3
    skipped = of(tmp_path, mechanism="exact_cudnn", status="skipped")
    assert len(skipped) == 3
    assert all(r["reason"].startswith("cudnn runs here on no float32") for r in skipped)


def test_an_error_inside_a_worker_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    right = registry.MECHANISMS["exact"]

    def build(backend: str, job: Job, is_causal: bool, arrays: Any) -> registry.Built:
        if arrays[0].shape[1] == 128:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")
        return right.build(backend, job, is_causal, arrays)

    monkeypatch.setitem(registry.MECHANISMS, "exact", right._replace(build=build))
    assert runner.run(options(tmp_path, mechanisms=("exact",)), InProcess) == 0
    (failed,) = of(tmp_path, status="failed")
    assert failed["length"] == 128
    assert failed["reason"].startswith("out of memory: RuntimeError: RESOURCE_EXHAUSTED")


def write_config(path: Path) -> Path:
    path.write_text(
        "d_model: 24\nn_head: 2\nd_k: 8\nd_v: 8\nn_code: 7\nblock_len: 16\n"
        "bench: {lengths: [64, 128], n_repeat: 1, n_kmeans: 2}\n"
    )
    return path


def test_both_backends_in_their_own_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    config = write_config(tmp_path / "small.yml")
    asked = ["scaling", "--config", str(config), "--mechanism", "vq_qk", "--causal", "--device", "cpu"]
    assert command_line.main([*asked, "--out", str(tmp_path / "out")]) == 0
    found = of(tmp_path / "out")
    assert [(r["backend"], r["length"]) for r in found] == [
        (backend, length) for length in (64, 128) for backend in ("jax", "torch")
    ]
    assert all(r["status"] == "ok" and r["twin_error"] <= verify.twin_limit("float32") for r in found)
    assert found[0]["compile_s"] > 0
    assert found[1]["compile_s"] is None
    assert capsys.readouterr().out.splitlines()[-1].startswith("backends agree: outputs within ")


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config = write_config(tmp_path / "small.yml")
    lengths = [str(64 * i) for i in range(1, 400)]
    asked = ["--config", str(config), "--backend", "torch", "--mechanism", "exact", "--causal"]
    # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
    start = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('bench', run_name='__main__', alter_sys=True)"
    )
    command = [
        sys.executable,
        "-c",
        start,
        "scaling",
        *asked,
        "--out",
        str(tmp_path),
        "--lengths",
        *lengths,
    ]
    environment = os.environ | {"PYTHONPATH": str(host.ROOT)}
    process = subprocess.Popen(
        command,
        cwd=host.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(of(tmp_path)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "interrupted: what was measured is kept" in printed
    assert 3 <= len(of(tmp_path)) < len(lengths)
    assert (tmp_path / "scaling.md").exists()
    assert not (tmp_path / "inputs").exists()


@pytest.fixture
def setup(tmp_path: Path) -> dict[str, Any]:
    job = small_job().to_json()
    return {"backend": "torch", "device": "cpu", "folder": str(tmp_path), "length": 64, "job": job}


def test_a_killed_process_says_so(setup: dict[str, Any]) -> None:
    child = Child(setup)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildDied, match="killed by SIGKILL"):
        child.receive(30)
    child.close()


def test_a_process_that_does_not_answer_is_stopped(setup: dict[str, Any]) -> None:
    child = Child(setup)
    with pytest.raises(ChildDied, match="no answer within 0 s"):
        child.receive(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_backend_that_cannot_start_says_why(setup: dict[str, Any]) -> None:
    child = Child(setup | {"backend": "numpy"})
    answer = child.receive(60)
    child.close()
    assert answer == {"status": "failed", "reason": "No module named 'bench.on_numpy'"}


# --- records ---------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path / "records.jsonl", "scaling", small_job(), is_resume=True)
    found.set_device("torch", "cpu", "fake")
    return found


def test_records_have_the_documented_keys_and_come_back(ledger: Ledger) -> None:
    ledger.add("torch", Point("exact", True, 64), {"status": "ok", "ms_median": 1.5, "unknown": 1})
    (record,) = records.read(ledger.path)
    assert list(record) == list(records.KEYS)
    assert (record["ms_median"], record["length"], record["heads"]) == (1.5, 64, 2)
    assert record["versions"].startswith("python=")
    assert list(ledger.done().values()) == [record]
    with pytest.raises(ValueError, match="'mechanism'"):
        records.append(ledger.path, {key: None for key in records.KEYS if key != "mechanism"})


def test_the_last_record_of_a_point_counts(ledger: Ledger) -> None:
    point = Point("exact", True, 64)
    ledger.add("torch", point, {"status": "skipped", "reason": "no time"})
    assert ledger.done() == {}
    ledger.add("torch", point, {"status": "ok", "ms_median": 2.0})
    assert [r["status"] for r in ledger.current()] == ["ok"]
    ledger.set_device("torch", "cuda", "another")
    assert ledger.current() == []


@pytest.mark.parametrize("torn", [b'{"suite": "sca', b'{"suite": "scaling"}', b"\xff\xfe\n"])
def test_a_torn_last_line_is_dropped(ledger: Ledger, torn: bytes) -> None:
    ledger.add("torch", Point("exact", True, 64), {"status": "ok"})
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + torn)
    assert len(records.read(ledger.path)) == 1
    resumed = Ledger(ledger.path, "scaling", small_job(), is_resume=True)
    assert "torn" in resumed.notes[0]
    assert ledger.path.read_bytes() == whole
    assert not records.repair(ledger.path)


def test_a_damaged_line_inside_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 2: not a record"):
        records.read(path)


# --- fits ------------------------------------------------------------------------------------


def record(backend: str, mechanism: str, length: int, ms: float | None, **changes: Any) -> records.Record:
    found: records.Record = dict.fromkeys(records.KEYS)
    found |= {"backend": backend, "mechanism": mechanism, "is_causal": True, "length": length}
    found |= {"status": "ok" if ms else "skipped", "ms_median": ms, "dtype": "float32", "twin_error": 1e-7}
    return found | {"direction": "fwd"} | changes


def curve(backend: str, mechanism: str, slope: float, factor: float, **changes: Any) -> list[records.Record]:
    lengths = [1024 * 2**i for i in range(7)]
    return [record(backend, mechanism, T, factor * T**slope, **changes) for T in lengths]


def test_exponents_of_power_laws_are_exact() -> None:
    short = [record("jax", "exact", T, 50.0) for T in (1, 2)]  # overhead: not fitted
    found = fit.fits(
        fit.curves([*curve("jax", "exact", 2.0, 1e-6), *short, *curve("jax", "vq_qk", 1.0, 1e-3)])
    )
    assert [(item.mechanism, round(item.exponent, 12)) for item in found] == [("vq_qk", 1.0), ("exact", 2.0)]
    assert found[1].lengths == (4096, 8192, 16384, 32768, 65536)
    assert fit.fit_lengths([1024, 2048, 4096, 8192]) == (1024, 2048, 4096, 8192)


def test_the_crossover_is_where_the_curves_meet() -> None:
    exact = curve("jax", "exact", 2.0, 1.0)
    (found,) = fit.crossovers(fit.curves([*exact, *curve("jax", "vq_qk", 1.0, 5000.0)]))
    assert found.length == pytest.approx(5000.0)
    for factor, text in ((1e6, "beyond 65,536"), (1.0, "below 1,024")):
        (found,) = fit.crossovers(fit.curves([*exact, *curve("jax", "vq_qk", 1.0, factor)]))
        assert (found.length, found.text) == (None, text)
    (found,) = fit.crossovers(
        fit.curves([*curve("torch", "exact", 2.0, 1.0), *curve("jax", "vq_qk", 1.0, 1.0)])
    )
    assert (found.length, found.text) == (None, "no common length")
    ratios = fit.ratios(fit.curves([*exact, *curve("jax", "vq_qk", 1.0, 1024.0)]))
    assert [round(item.ratio, 9) for item in ratios[:3]] == [1.0, 2.0, 4.0]


def test_the_verdict_says_what_agrees_and_what_could_not_be_compared() -> None:
    both = [*curve("jax", "vq_qk", 1.0, 1.0), *curve("torch", "vq_qk", 1.1, 1.0)]
    agree = "backends agree: outputs within 1.0e-07 (limit 6e-06), exponents within 0.10 (limit 0.25)"
    assert fit.verdict(both) == agree
    apart = [*curve("jax", "vq_qk", 1.0, 1.0), *curve("torch", "vq_qk", 1.3, 1.0)]
    assert fit.verdict(apart).startswith("backends DISAGREE: outputs")
    assert fit.verdict(apart).endswith("(limit 0.25, most apart in vq_qk causal)")
    waiting = [
        r | {"dispatch_ms": 0.9 * r["ms_median"]} for r in apart
    ]  # times of the host, not of the device
    assert fit.verdict(waiting).startswith("backends agree: outputs")
    assert fit.verdict(waiting).endswith("not compared: exponents")
    assert fit.verdict([r | {"dispatch_ms": 0.1 * r["ms_median"]} for r in apart]) == fit.verdict(apart)
    outputs = [r | {"twin_error": 1e-5} for r in both]
    assert fit.verdict(outputs).startswith("backends DISAGREE: outputs within 1.0e-05 (limit 6e-06)")
    reason = {"status": "failed", "reason": "refused: error", "twin_error": None}
    refused = [*both, record("jax", "hyper", 1024, None, **reason)]
    expected = "; refused: jax hyper causal; not compared: outputs of hyper causal; exponents of hyper causal"
    assert fit.verdict(refused) == agree.replace("agree", "DISAGREE") + expected
    assert fit.verdict(curve("jax", "vq_qk", 1.0, 1.0)) == "backends not compared: only jax ran"
    assert fit.verdict([]) == "backends not compared: nothing was measured"


def test_a_report_of_nothing_is_written(tmp_path: Path) -> None:
    report.write(tmp_path, [])
    assert "nothing was measured" in (tmp_path / "scaling.md").read_text()


def test_without_matplotlib_there_are_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines = report.write(tmp_path, [])
    assert lines[0].startswith("no plot: matplotlib is not installed")
    assert not (tmp_path / "scaling.png").exists()


# --- prediction ------------------------------------------------------------------------------

ROOMY = predict.Limits(max_point_s=10.0, max_run_s=100.0, max_bytes=2**40)


@pytest.mark.parametrize(
    "mechanism, is_causal, length, factor",
    [
        ("vq_qk", True, 8192, 2),
        ("exact", False, 8192, 4),
        ("hyper", False, 8192, 2),
        ("hyper", True, 8192, 4),
        ("hyper", True, 16384, 12),
    ],
)
def test_times_grow_as_the_mechanism_does(
    mechanism: str, is_causal: bool, length: int, factor: float
) -> None:
    job = small_job(min_seq_len=4096)
    short, long = (predict.work(job, Point(mechanism, is_causal, T)) for T in (4096, length))
    assert long / short == pytest.approx(factor)


def test_predictions_use_the_longest_shorter_call() -> None:
    seen = [predict.Seen(1024, 10.0), predict.Seen(4096, 30.0), predict.Seen(65536, 900.0)]
    point = Point("vq_qk", True, 8192)
    assert predict.milliseconds(small_job(), point, seen) == pytest.approx(60.0 * predict.TIME_MARGIN)
    assert predict.milliseconds(small_job(), point, []) == 0.0


def test_reasons_to_skip() -> None:
    job, point = small_job(), Point("exact", True, 8192)
    seen = [predict.Seen(4096, 1000.0, compile_s=5.0, peak_bytes=2**30, implementation="xla")]
    assert predict.skip_reason(job, point, seen, ROOMY) is None
    assert predict.skip_reason(job, point, seen, ROOMY._replace(max_point_s=4.0)) == (
        "predicted 4.8 s a call, max_point_s is 4"
    )
    assert predict.skip_reason(job, point, seen, ROOMY._replace(max_bytes=3 * 2**30)) == (
        "predicted 4.0 GiB, 3.0 GiB may be used"
    )
    assert predict.skip_reason(job, point, seen, ROOMY._replace(elapsed_s=90.0)) == (
        "the run has taken 90 s, max_run_s is 100"
    )
    linear = [seen[0]._replace(implementation="flash")]
    assert predict.memory_bytes(job, point, linear) == 2 * 2**30
    scores = 3 * 4 * job.heads * point.length**2
    unseen = predict.memory_bytes(job, point, [predict.Seen(512, 1.0, implementation="xla")])
    assert scores < unseen < 1.01 * scores


# --- measuring -------------------------------------------------------------------------------


class FakeDevice:
    """A device behind the host: calls are enqueued, `synchronize` waits for them."""

    def __init__(self) -> None:
        self.enqueued = 0
        self.waits: list[int] = []
        self.device = measure.Device(self.synchronize, lambda: 123, lambda: "fake device")

    def call(self) -> int:
        self.enqueued += 1
        return self.enqueued

    def synchronize(self, result: int) -> None:
        assert result == self.enqueued, "waited for something else than the last call"
        self.waits.append(self.enqueued)
        time.sleep(0.002 * (result - sum(self.waits[-2:-1])))


def test_timing_waits_for_the_device_once_a_batch() -> None:
    fake = FakeDevice()
    seconds = measure.warm_up(fake.call, fake.device.synchronize, 2)
    assert fake.waits == [1, 2]
    assert 0.002 <= seconds < 0.2
    times = measure.time_calls(fake.call, fake.device.synchronize, n_repeat=3, max_repeat_s=60.0, n_inner=4)
    assert fake.waits[2:] == [6, 10, 14]
    assert all(2.0 <= ms < 100 for ms in times)


def test_repeats_end_with_their_time_but_not_before_the_first() -> None:
    fake = FakeDevice()
    times = measure.time_calls(fake.call, fake.device.synchronize, n_repeat=5, max_repeat_s=0.0)
    assert len(times) == 1
    assert measure.batch_size(0.0) == 1
    assert measure.batch_size(0.005) == 4
    assert measure.batch_size(1e-9) == measure.MAX_BATCH


def test_events_time_single_calls_and_wait_once() -> None:
    clock = iter(range(100))

    class Event:
        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    fake = FakeDevice()
    times = measure.time_events(
        fake.call, Event, fake.device.synchronize, n_repeat=9, max_repeat_s=1.0, call_s=0.25
    )
    assert times == [1.0] * 4
    assert fake.waits == [4]
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0, 100.0]) == (3.5, 2.0, 5.0, 6)


def test_device_functions_of_the_torch_side() -> None:
    torch = pytest.importorskip("torch")
    from bench import on_torch

    assert set(on_torch.DEVICES) == {"cpu", "cuda", "mps"}
    cpu = on_torch.DEVICES["cpu"]
    cpu.synchronize(torch.ones(1))
    assert cpu.free_bytes() > 2**20
    assert "cores" in cpu.name()
    missing = "cuda" if torch.backends.mps.is_available() else "mps"
    with pytest.raises(ValueError, match=f"torch .* sees no {missing} device"):
        on_torch.Backend(missing, small_job())


@pytest.mark.parametrize(
    "error, is_memory",
    [
        (MemoryError(), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), True),
        (ValueError("k must match q"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, is_memory: bool) -> None:
    assert measure.is_out_of_memory(error) is is_memory


# --- inputs ----------------------------------------------------------------------------------


def test_the_text_is_real_and_long_enough() -> None:
    text = inputs.stdlib_text(262_144)
    assert len(text) == 262_144
    assert b"import" in text.tobytes()
    with pytest.raises(RuntimeError, match="ask for shorter --lengths"):
        inputs.stdlib_text(10**10)


def test_vectors_depend_on_the_last_bytes() -> None:
    job = small_job()
    tables = inputs.embedding_tables(job)
    text = np.frombuffer(b"abcdxbcd", np.uint8)
    x = inputs.embed(tables, text, np.arange(8))
    assert not np.array_equal(x[3], x[7])
    np.testing.assert_array_equal(x[0], tables[0][ord("a")] + tables[1][0] + tables[2][0] + tables[3][0])


@pytest.mark.parametrize("kind", ["real", "random"])
def test_inputs_do_not_depend_on_how_they_are_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(inputs, "CHUNK", 32)
    monkeypatch.setattr("bench.prepare.CHUNK", 32)
    found = []
    for n_core, stops in ((1, (100,)), (16, (10, 40, 100))):
        monkeypatch.setattr("bench.host.n_core", lambda n_core=n_core: n_core)
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        preparer = Preparer(Store(folder, small_job(batch=2, input=kind), 100), FakeBackend())
        preparer.create()
        filled = 0
        for stop in stops:
            filled = preparer.fill(stop, filled)
        assert filled == 100
        found.append(preparer.store.read_float64("k", 100))
    np.testing.assert_array_equal(*found)
    assert np.all(np.abs(found[0]).sum((2, 3)) > 0)


def test_bfloat16_bits_are_the_nearest_values() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_array_equal(inputs.to_bfloat16(x), x.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(inputs.from_bfloat16(inputs.to_bfloat16(x)), x.astype(ml_dtypes.bfloat16))


def test_samples_fit_the_definition() -> None:
    torch_ref = pytest.importorskip("torch_ref")
    for length in (63, 64, 65, 1000):
        for is_causal in (False, True):
            sizes = torch_ref.sample_set_sizes(length, is_causal, 64)
            assert inputs.sample_sizes(length, is_causal, 64) == tuple(sizes)
    ids = inputs.sample_ids(small_job(min_seq_len=64, n_sample=50), 1000, True)
    assert ids.shape == (1, 15, 50, 2)
    assert ids.dtype == np.int32
    assert ids[:, 7:].max() < 125 <= ids[:, 0].max() < 512


def test_vectors_on_a_tie_are_not_verified_on() -> None:
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(1, 5, 3))
    x = rng.normal(size=(1, 6, 1, 3))
    x[0, 0, 0] = x[0, 3, 0] = (codebook[0, 0] + codebook[0, 1]) / 2
    codebook[0, 2:] += 100
    source = verify.clear_source(x, codebook, rng.normal(size=(1, 1, 3)))
    assert source[0, :, 0].tolist() == [1, 1, 2, 2, 4, 5]
    twice = np.concatenate([codebook, codebook], axis=1)
    assert verify.clear_source(x, twice, rng.normal(size=(1, 1, 3)))[0, 4, 0] == 4


def test_a_missing_or_misshapen_output_is_infinitely_wrong() -> None:
    good = np.ones((1, 2, 1, 3))
    assert verify.error(good, good) == 0
    assert verify.error(good * np.nan, good) == math.inf
    assert verify.error(good[:, :1], good) == math.inf


# --- the command line ------------------------------------------------------------------------


def parse(*arguments: str) -> session.Options:
    return scaling.options(command_line.parser().parse_args(["scaling", *arguments]))


def test_options_change_the_configuration() -> None:
    config = str(host.ROOT / "conf.yml")
    found = parse(
        "--config", config, "--lengths", "64", "128", "--n-code", "9", "--full", "--backend", "torch"
    )
    assert found.bench.lengths == (64, 128)
    assert (found.job.codes_q, found.job.codes_k, found.job.heads) == (9, 9, 4)
    assert (found.causal, found.backends) == ((False,), ("torch",))
    assert found.mechanisms == ("vq_qk", "vq_k", "hyper", "exact")
    assert found.job.digest != parse("--config", config, "--backend", "torch").job.digest


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "no/such.yml"], "No such file"),
        (["--lengths", "0"], "must be at least 1, found 0"),
        (["--mechanism", "flash"], "invalid choice: 'flash'"),
        (["--causal", "--full"], "not allowed with argument"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--max-run-s", "-1"], "max_run_s must be a finite number >= 0.0, found -1.0"),
        (["--max-point-s", "-1"], "max_point_s must be a finite number >= 0.0, found -1.0"),
        (["--device", "mps", "--backend", "jax"], "jax has no mps device: add --backend torch"),
        (["--device", "cuda", "--dtype", "float64", "--d-k", "x"], "argument --d-k: invalid"),
    ],
)
def test_bad_options_are_errors_before_work_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    config = ["--config", str(write_config(tmp_path / "small.yml"))] if "--config" not in arguments else []
    out = tmp_path / "out"
    try:
        code = command_line.main(["scaling", *config, *arguments, "--out", str(out)])
    except SystemExit as error:
        code = int(str(error))
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_backend_leaves_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "is_installed", lambda name: name == "torch")
    assert bench_arguments.chosen_backends("both", "auto") == ("torch",)
    assert "jax is not installed: only torch runs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="jax not installed: pip install"):
        bench_arguments.chosen_backends("jax", "auto")


def test_a_device_that_is_named_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    config = write_config(tmp_path / "small.yml")
    asked = ["scaling", "--config", str(config), "--device", "cuda", "--backend", "torch"]
    assert command_line.main([*asked, "--out", str(tmp_path / "out")]) == 2
    assert "error: torch: torch" in capsys.readouterr().err
    assert not (tmp_path / "out" / "records.jsonl").exists()
