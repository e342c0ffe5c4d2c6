"""The suite 'memory': both directions, what is observed beside what is compiled, exponents."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as command_line
from bench import extras, memory_page, registry, resident, runner, session
from bench.suites import memory
from parity_tests.test_bench import InProcess, fake, of, options, record, write_config  # noqa: F401
from parity_tests.test_bench_codebook import planted
from vq_common import BenchConfig

LENGTHS = (64, 128, 256)


def runs(out: Path, **changes: Any) -> list[session.Options]:
    bench = BenchConfig(lengths=LENGTHS, max_point_s=1e6, max_run_s=1e6, n_repeat=1)
    asked = options(out, bench=bench, suite="memory", extras=(extras.OBSERVED,), **changes)
    return [asked._replace(direction=direction) for direction in memory.DIRECTIONS]


def test_peaks_of_both_directions_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert runner.run_all(runs(tmp_path), memory_page.write, InProcess) == 0
    found = of(tmp_path, suite="memory", status="ok")
    assert len(found) == 2 * 2 * 3
    peaks = {(r["direction"], r["mechanism"], r["length"]): r["peak_bytes"] for r in found}
    assert all(peaks["fwd+bwd", m, T] > peaks["fwd", m, T] > 0 for m in ("vq_qk", "exact") for T in LENGTHS)
    if sys.platform == "linux":
        assert all(r["observed_bytes"] is not None for r in found)
    page = (tmp_path / "memory.md").read_text()
    assert page.count("## Forward ") == 2
    assert page.count("| grows as |") >= 2
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    growth = json.loads((tmp_path / "summary.json").read_text())["growth"]
    slopes = {(x["direction"], x["mechanism"]): x["exponent"] for x in growth if x["figure"] == "peak_bytes"}
    assert slopes.keys() == {(d, m) for d in memory.DIRECTIONS for m in ("vq_qk", "exact")}
    assert all(0.3 < slope < 1.2 for slope in slopes.values())


def test_a_wrong_mechanism_is_refused_in_both_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    planted(monkeypatch, "vq_qk")
    assert runner.run_all(runs(tmp_path), memory_page.write, InProcess) == 1
    assert [r["status"] for r in of(tmp_path, mechanism="vq_qk")] == ["failed"] * 2
    assert len(of(tmp_path, mechanism="exact", status="ok")) == 6


def test_resume_goes_on_with_the_direction_that_is_missing(tmp_path: Path, fake: Any) -> None:  # noqa: F811
    fake.mishaps = {("vq_qk", 256): KeyboardInterrupt()}
    assert runner.run_all(runs(tmp_path), memory_page.write, fake) == 130
    before = of(tmp_path)
    assert {r["direction"] for r in before} == {"fwd"}
    fake.mishaps, fake.measured = {}, []
    assert runner.run_all(runs(tmp_path, is_resume=True), memory_page.write, fake) == 0
    assert of(tmp_path)[: len(before)] == before
    assert len(fake.measured) == 12 - len(before)
    assert len(of(tmp_path, status="ok")) == 12


def test_a_backend_that_keeps_its_peak_gets_a_process_for_every_curve(tmp_path: Path, fake: Any) -> None:  # noqa: F811
    class Keeps(fake):
        def __init__(self, setup: dict[str, Any]) -> None:
            super().__init__(setup)
            self.answers[0]["keeps_peak"] = True

    assert runner.run_all(runs(tmp_path)[:1], memory_page.write, Keeps) == 0
    assert [x[1:] for x in Keeps.measured] == [(m, T) for m in ("vq_qk", "exact") for T in LENGTHS]
    assert Keeps.started == 1 + 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_the_growth_of_a_process_is_that_of_the_call() -> None:
    size = 2**26

    def call() -> Any:
        return np.ones(size, np.uint8), np.ones(size // 2, np.uint8)

    for _ in range(2):  # a second time too: what a call took before is given back
        found = resident.growth(call)
        assert found is not None
        assert found == pytest.approx(1.5 * size, rel=0.05)
    small = resident.growth(lambda: None)
    assert small is not None
    assert small < size / 20


def test_a_system_that_does_not_tell_gives_none(tmp_path: Path) -> None:
    assert resident.growth(lambda: None, tmp_path / "absent") is None
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert resident.growth(lambda: None, tmp_path) is None


def test_exponents_of_memory() -> None:
    found = [
        record("jax", "vq_k", T, 1.0, direction=direction, peak_bytes=7 * T**power)
        | {"observed_bytes": None, "temp_bytes": None}
        for direction, power in (("fwd", 1), ("fwd+bwd", 2))
        for T in (4096, 8192, 16384)
    ]
    slopes = {item.direction: round(item.exponent, 9) for item in memory_page.growths(found)}
    assert slopes == {"fwd": 1.0, "fwd+bwd": 2.0}


def test_options_of_the_memory_suite(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "small.yml"))

    def parsed(*more: str) -> list[session.Options]:
        words = ["memory", "--config", config, "--backend", "torch", *more]
        return memory.options(command_line.parser().parse_args(words))

    assert [x.direction for x in parsed()] == ["fwd", "fwd+bwd"]
    assert [x.direction for x in parsed("--direction", "fwd")] == ["fwd"]
    assert parsed()[0].mechanisms == registry.OWN_KERNEL
    assert parsed()[0].job.n_repeat == 1
    with pytest.raises(SystemExit):
        parsed("--direction", "bwd")
    quick = parsed("--quick", "--lengths", "32", "--n-head", "1")[0]
    assert (quick.bench.lengths, quick.job.heads, quick.job.width) == ((32,), 1, 16)
    assert quick.mechanisms == memory.QUICK
