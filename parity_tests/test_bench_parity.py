"""The suite 'parity': agreement is exit code 0, anything else is 1 and named."""

import re
from typing import Any

import pytest

from bench import __main__ as command_line
from bench import counting, host, parity, registry
from bench.process import Child
from bench.suites import parity as suite
from parity_tests.test_bench import InProcess
from parity_tests.test_bench_codebook import planted

SMALL = ["parity", "--quick", "--device", "cpu", "--lengths", "512", "1024"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers inside the test process, where a mechanism can be made wrong."""
    pytest.importorskip("torch")
    right = parity.compare

    def compare(options: Any, lengths: Any, progress: Any, **settings: Any) -> Any:
        return right(options, lengths, progress, InProcess, **settings)

    monkeypatch.setattr(parity, "compare", compare)


def test_both_backends_agree_in_their_own_processes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    assert command_line.main([*SMALL, "--mechanism", "vq_qk", "--mechanism", "exact"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| vq_qk", "| exact"))]
    assert [line.endswith("| ok |") for line in rows] == [True] * 4
    for row, expected in zip(rows, (1.0, 1.0, 2.0, 2.0), strict=True):
        operations = [float(slope) for slope in re.findall(r"T\^([\d.]+)", row)[:2]]
        assert operations == pytest.approx([expected] * 2, abs=parity.SLOPE)
    assert lines[-1].startswith("parity: all 4 forms agree, within ")


def test_all_mechanisms_of_one_backend(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([*SMALL, "--backend", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "parity: all 11 forms agree, only one backend ran"


def test_a_wrong_mechanism_is_exit_code_1(
    in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(monkeypatch, "vq_k")
    asked = [*SMALL, "--backend", "torch", "--mechanism", "vq_k", "--mechanism", "exact"]
    assert command_line.main(asked) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith("| vq_k")]
    assert len(wrong) == 2
    assert all("DISAGREES" in line for line in wrong)
    assert any(line.startswith("vq_k full: torch refused: relative RMS error 1.0e-03") for line in lines)
    assert lines[-1] == "parity: 2 disagreements"


def test_operations_that_grow_too_fast_are_exit_code_1(
    in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mechanism that is right, but computes all scores on the way."""
    right = registry.MECHANISMS["vq_qk"]

    def build(*arguments: Any) -> registry.Built:
        fn = right.build(*arguments).fn

        def slow(q: Any, k: Any, v: Any, *rest: Any) -> Any:
            scores = (q[:, :, 0] @ k[:, :, 0].transpose(1, 2)).sum()
            return fn(q, k, v, *rest) + 0 * scores

        return registry.Built(slow, "planted")

    monkeypatch.setitem(registry.MECHANISMS, "vq_qk", right._replace(build=build))
    assert command_line.main([*SMALL, "--backend", "torch", "--mechanism", "vq_qk"]) == 1
    assert "torch operations grow as T^" in capsys.readouterr().out


def side(slope: float | None, memory: float | None = 1.0) -> parity.Side:
    return parity.Side(1e-7, 1e-7, slope, memory, 1, 1)


@pytest.mark.parametrize(
    "form, slopes, troubles",
    [
        (("vq_qk", True), (1.0, 1.04), []),
        (("vq_qk", True), (0.96, 1.04), ["operations grow as T^0.96 and T^1.04, more than 0.05 apart"]),
        (("vq_k", False), (1.0, None), []),
        (("vq_k", False), (0.9,), ["torch operations grow as T^0.90, not within 0.95 ... 1.05"]),
        (("hyper", True), (1.2, 1.2), []),
        (("hyper", False), (1.2,), ["torch operations grow as T^1.20, not within 0.95 ... 1.05"]),
        (("exact", True), (2.0, 2.0), []),
        (("exact", True), (1.0,), ["torch operations grow as T^1.00, not within 1.95 ... 2.05"]),
    ],
)
def test_what_exponents_may_be(form: parity.Form, slopes: Any, troubles: list[str]) -> None:
    sides = dict(zip(("torch", "jax"), map(side, slopes), strict=False))
    assert parity.exponent_troubles(form, sides) == troubles


def test_memory_may_not_grow_faster_than_operations() -> None:
    assert parity.exponent_troubles(("vq_k", True), {"jax": side(1.0, 1.1)}) == [
        "jax memory grows as T^1.10, limit 1.05"
    ]
    assert parity.exponent_troubles(("exact", True), {"jax": side(2.0, 2.0)}) == []


def test_counts_are_the_same_every_time() -> None:
    pytest.importorskip("torch")
    asked = suite.options(command_line.parser().parse_args([*SMALL, "--backend", "torch"]))
    first, second = (counting.counts("torch", "vq_k", True, asked.job, (64, 128)) for _ in range(2))
    assert first == second
    assert first.flops[1] / first.flops[0] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("version, has_emitters", [("0.10.2", True), ("0.11.0", False), ("1.0", False)])
def test_jaxlib_gets_only_flags_it_knows(
    version: str, has_emitters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "is_installed", lambda package: True)
    monkeypatch.setattr(host.importlib.metadata, "version", lambda package: version)
    assert ("fusion_emitters" in host.fast_compile_flags()) == has_emitters


def test_wrong_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Child, "__init__", lambda *_: pytest.fail("a worker was started"))
    assert command_line.main(["parity", "--backend", "torch", "--lengths", "64", "64"]) == 2
    assert "--lengths must be two or more to fit a growth, found [64, 64]" in capsys.readouterr().err
    assert command_line.main(["parity", "--device", "mps"]) == 2
    assert "jax has no mps device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["parity", "--dtype", "float16"])
