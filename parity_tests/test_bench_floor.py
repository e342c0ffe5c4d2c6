"""What a device could do at best, what it did, and what a killed run leaves."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import device_time, floor, records, registry, runner, worker
from bench.host import ROOT
from bench.job import STEP, Point
from parity_tests.test_bench import fake, of, options, small_job, write_config  # noqa: F401

CEILINGS = floor.Ceilings(copy_gb_s=1.0, matmul_tflop_s=1.0)


def flops(mechanism: str, is_causal: bool, length: int = 64, direction: str = "fwd", **changes: Any) -> int:
    return floor.definition_flops(small_job(**changes), Point(mechanism, is_causal, length, direction))


def test_bytes_of_the_definition() -> None:
    job = dataclasses.replace(small_job(), value_width=5, dtype="bfloat16", batch=3)
    rows = 3 * job.heads * 64 * 2  # bytes of one column
    of_direction = {"fwd": 2 * 8 + 2 * 5, "bwd": 4 * 8 + 3 * 5, "fwd+bwd": 4 * 8 + 4 * 5}
    for direction, columns in of_direction.items():
        point = Point("vq_qk", True, 64, direction)
        assert floor.definition_bytes(job, point) == rows * columns


def test_operations_of_the_definition() -> None:
    """B 1, H 2, D 8, V 8, 7 codes, blocks of 16, T 64."""
    rows, width, codes = 2 * 64, 8, 7
    find = 2 * width * codes
    assert flops("exact", False) == rows * 64 * 4 * width
    assert flops("exact", True) == rows * (65 / 2) * 4 * width
    assert flops("exact_flash", True) == flops("exact", True)
    assert flops("vq_qk", True) == rows * (2 * find + 2 * codes * width)
    assert flops("vq_k", True) == rows * (find + 4 * codes * width)
    assert flops("vq_k", False) == flops("vq_k", True)
    assert flops("vq_qk", False) == rows * 2 * find + 2 * codes * codes * 4 * width
    window = flops("vq_qk_window", True, mem_len=4, n_sink=2) - flops("vq_qk", True)
    assert window == rows * (4 + 17 / 2 + 2) * 4 * width


def test_operations_of_hyper_attention() -> None:
    """Not causal a block and samples for each query; causal that for half of them at each level."""
    sizes = {"block_size": 4, "n_sample": 4, "min_seq_len": 16, "n_projection": 3}
    rows, width = 2 * 64, 8
    hashes = 2 * 2 * 3 * width
    assert flops("hyper", False, **sizes) == rows * (8 * 4 * width + hashes)
    assert flops("hyper", True, **sizes) == rows * ((8 / 2 + 8 / 2 + 17 / 2) * 4 * width + hashes)


def test_backward_has_two_products_for_one_and_finds_no_codes() -> None:
    assert flops("exact", True, direction="bwd") == 2 * flops("exact", True)
    assert flops("exact", True, direction="fwd+bwd") == 3 * flops("exact", True)
    rows, width, codes = 2 * 64, 8, 7
    assert flops("vq_qk", True, direction="bwd") == rows * 2 * 2 * codes * width
    both = flops("vq_qk", True, direction="fwd+bwd")
    assert both == flops("vq_qk", True) + flops("vq_qk", True, direction="bwd")


def test_the_floor_is_the_longer_of_the_two() -> None:
    job, point = small_job(), Point("exact", False, 64)
    n_bytes, n_flop = floor.definition_bytes(job, point), floor.definition_flops(job, point)
    slow_copy, slow_product = floor.Ceilings(1e-3, 1e3), floor.Ceilings(1e6, 1e-6)
    assert floor.record(job, point, slow_copy)["floor_ms"] == pytest.approx(n_bytes / 1e3)
    assert floor.record(job, point, slow_product)["floor_ms"] == pytest.approx(n_flop / 1e3)
    assert floor.record(job, point, None) == {}
    assert floor.record(job, Point("exact", True, 64, STEP), CEILINGS) == {}


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_worker_measures_its_device(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(backend)
    monkeypatch.setattr(worker, "CPU_MATMUL", 256)
    monkeypatch.setattr(worker, "COPY_BYTES", 2**20)
    job = small_job()
    setup = {"backend": backend, "device": "cpu", "folder": str(tmp_path), "length": 64, "job": job.to_json()}
    found = worker.start(setup).handle({"do": "ceilings"})
    assert found["status"] == "ok"
    assert 1e-2 < found["copy_gb_s"] < 1e5
    assert 1e-6 < found["matmul_tflop_s"] < 1e3


def test_records_hold_the_floor_and_the_time_of_exact_attention(tmp_path: Path, fake: Any) -> None:  # noqa: F811
    fake.mishaps = {("exact", 256): {"status": "failed", "reason": "out of memory", "is_memory": True}}
    assert runner.run(options(tmp_path, causal=(False, True)), fake) == 0
    for record in of(tmp_path, status="ok"):
        expected = None if record["length"] == 256 else fake.ms["exact"] * record["length"]
        assert record["exact_ms"] == expected
        assert (record["copy_gb_s"], record["matmul_tflop_s"]) == (10.0, 0.5)
        assert record["floor_ms"] < record["ms_median"]
    assert not (tmp_path / "records.new").exists()


def test_what_is_faster_than_its_floor_is_doubted(
    tmp_path: Path,
    fake: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.ms = fake.ms | {"vq_qk": 1e-9}
    runner.run(options(tmp_path), fake)
    assert "doubtful: torch vq_qk causal" in capsys.readouterr().out
    assert "doubtful: torch vq_qk causal" in (tmp_path / "scaling.md").read_text()
    assert "doubtful: torch exact" not in (tmp_path / "scaling.md").read_text()


# --- time on the device ----------------------------------------------------------------------


def test_kernels_are_counted_to_their_calls() -> None:
    """Two calls of two kernels, on two streams: from the first start to the last end."""
    kernels = [(5e6, 8e6), (0.0, 1e6), (2e6, 3e6), (4e6, 9e6)]
    assert device_time.by_call(kernels, 2) == [3.0, 5.0]
    assert device_time.by_call(kernels, 3) is None
    assert device_time.by_call([], 2) is None


@pytest.mark.gpu("jax")
def test_jax_calls_are_timed_on_the_device(tmp_path: Path) -> None:
    from bench.measure import Program
    from bench.on_jax import Backend

    backend = Backend("cuda", small_job(n_repeat=3))
    x = backend.array(np.ones((512, 512), "float32"), "float32")
    backend.device.synchronize(backend.matmul(x))
    timed = backend.times(Program(backend.matmul), (x,))
    assert timed.timing == "device profiler"
    assert len(timed.times_ms) == 3
    assert timed.dispatch_ms is not None


# --- exact kernels ---------------------------------------------------------------------------


def test_a_named_kernel_is_the_one_that_runs() -> None:
    torch = pytest.importorskip("torch")
    arrays = tuple(torch.ones(1, 64, 2, 8) for _ in range(3))
    for kernel in ("math", "flash"):
        built = registry.build(f"exact_{kernel}", "torch", small_job(), True, arrays)
        assert built.implementation == kernel
        assert torch.allclose(built.fn(*arrays), torch.ones(()))
    with pytest.raises(registry.UnavailableError, match="cudnn runs here on no float32"):
        registry.build("exact_cudnn", "torch", small_job(), True, arrays)


def test_a_kernel_is_measured_where_there_is_one(tmp_path: Path, fake: Any) -> None:  # noqa: F811
    fake.ms = fake.ms | {"exact_xla": 0.1, "exact_cudnn": 0.1}
    asked = options(tmp_path, mechanisms=("exact_xla", "exact_cudnn"), backends=("jax", "torch"))
    assert runner.run(asked, fake) == 0
    assert {(r["backend"], r["mechanism"]) for r in of(tmp_path)} == {
        ("jax", "exact_xla"),
        ("jax", "exact_cudnn"),
        ("torch", "exact_cudnn"),
    }


# --- a killed run ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_loses_at_most_the_point_it_was_at(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config, out = write_config(tmp_path / "small.yml"), tmp_path / "out"
    command = [sys.executable, "-m", "bench", "scaling", "--config", str(config), "--backend", "torch"]
    command += [
        "--device",
        "cpu",
        "--causal",
        "--mechanism",
        "vq_qk",
        "--mechanism",
        "exact",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    path, deadline = out / "records.jsonl", time.monotonic() + 60
    while not records.read(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = records.read(path)
    assert before
    torn = json.dumps(before[0])[:100]
    with open(path, "a", encoding="utf-8") as file:
        file.write(torn)
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a torn last line was dropped" in done.stdout
    after = records.read(path)
    assert [(r["mechanism"], r["length"]) for r in after[: len(before)]] == [
        (r["mechanism"], r["length"]) for r in before
    ]
    assert len({records.identity(record) for record in after}) == len(after) == 4
    assert [r["time"] for r in after[: len(before)]] == [r["time"] for r in before]
