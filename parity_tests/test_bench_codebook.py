"""The suite 'codebook': a job for each number of codes, errors of quantization, one file of records."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as command_line
from bench import codes_page, extras, registry, runner, session
from bench.accuracy import exact_attention
from bench.inputs import Store
from bench.prepare import Preparer
from bench.suites import codebook
from parity_tests.test_bench import (  # noqa: F401
    Clock,
    FakeBackend,
    InProcess,
    fake,
    of,
    options,
    small_job,
    too_late,
    write_config,
)
from vq_common import BenchConfig, oracle

CODES = (3, 6, 12)
LENGTH = 96


def runs(out: Path, **changes: Any) -> list[session.Options]:
    bench = BenchConfig(lengths=(LENGTH,), max_point_s=1e6, max_run_s=1e6, n_repeat=1)
    return [
        options(
            out,
            bench=bench,
            suite="codebook",
            job=small_job(codes_q=n_code, codes_k=n_code),
            mechanisms=("vq_qk", "vq_k", "exact") if n_code == CODES[0] else ("vq_qk", "vq_k"),
            extras=(extras.ERRORS,),
            held_out=256,
            **changes,
        )
        for n_code in CODES
    ]


def planted(monkeypatch: pytest.MonkeyPatch, mechanism: str) -> None:
    """Make a mechanism wrong."""
    right = registry.MECHANISMS[mechanism]

    def build(*arguments: Any) -> registry.Built:
        built = right.build(*arguments)
        return registry.Built(lambda *arrays: built.fn(*arrays) * 1.001, "planted")

    monkeypatch.setitem(registry.MECHANISMS, mechanism, right._replace(build=build))


def test_a_sweep_measures_times_and_errors(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert runner.run_all(runs(tmp_path, causal=(False, True)), codes_page.write, InProcess) == 0
    found = of(tmp_path, suite="codebook", status="ok")
    assert len(found) == 2 * (3 * 2 + 1)
    for is_causal in (False, True):
        swept = [r for r in found if (r["mechanism"], r["is_causal"]) == ("vq_qk", is_causal)]
        assert [(r["codes_q"], r["codes_k"]) for r in swept] == [(n, n) for n in CODES]
        for key in ("quantize_error_q", "quantize_error_k"):
            errors = [r[key] for r in swept]
            assert errors == sorted(errors, reverse=True)
            assert 0 < errors[-1] < errors[0] < 1.5
        assert all(0 < r["exact_error"] < 1.5 and r["quantize_ms"] > 0 for r in swept)
    assert {r["quantize_error_q"] for r in found if r["mechanism"] == "vq_k"} == {None}
    exact = [r for r in found if r["mechanism"] == "exact"]
    assert len(exact) == 2
    assert all(r["exact_error"] < 3e-6 and r["quantize_error_k"] is None for r in exact)
    page = (tmp_path / "codebook.md").read_text()
    assert page.count("| VQ-attention, queries and keys | torch |") == 2 * 3
    assert len(json.loads((tmp_path / "summary.json").read_text())["points"]) == len(found)
    assert (tmp_path / "codebook.png").stat().st_size > 10_000


def test_a_wrong_mechanism_is_refused_at_every_number_of_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    planted(monkeypatch, "vq_k")
    assert runner.run_all(runs(tmp_path), codes_page.write, InProcess) == 1
    refused = of(tmp_path, mechanism="vq_k")
    assert [(r["status"], r["codes_k"]) for r in refused] == [("failed", n) for n in CODES]
    assert all(r["reason"].startswith("refused: relative RMS error 1.0e-03") for r in refused)
    assert len(of(tmp_path, status="ok")) == 3 + 1


def test_an_interrupt_keeps_all_jobs_and_resume_goes_on(tmp_path: Path, fake: Any) -> None:  # noqa: F811
    asked = runs(tmp_path)
    assert runner.run_all(asked[:1], codes_page.write, fake) == 0
    first = of(tmp_path)
    fake.mishaps, fake.started = {("vq_k", LENGTH): KeyboardInterrupt()}, 0
    resumed = [options._replace(is_resume=True) for options in asked]
    assert runner.run_all(resumed, codes_page.write, fake) == 130
    assert fake.started == 2  # one finds the first job done, the third never began
    assert of(tmp_path)[: len(first)] == first
    assert {r["codes_k"] for r in of(tmp_path)} == set(CODES[:2])
    fake.mishaps, fake.measured = {}, []
    assert runner.run_all(resumed, codes_page.write, fake) == 0
    assert len(fake.measured) == 3
    fake.measured, fake.started = [], 0
    assert runner.run_all(resumed, codes_page.write, fake) == 0
    assert (fake.measured, fake.started) == ([], 1)
    assert not (tmp_path / "records.old.jsonl").exists()
    assert runner.run_all(asked, codes_page.write, fake) == 0
    assert len(of(tmp_path)) == 7


@pytest.mark.parametrize("step", ["ceilings", "prepare", "fill", "verify", "measure"])
def test_the_end_of_the_run_in_any_step_skips_the_rest(
    tmp_path: Path,
    fake: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    monkeypatch.setattr(session, "time", Clock())
    asked = runs(tmp_path)
    assert runner.run_all(asked, codes_page.write, too_late(fake, step, CODES[1])) == 0
    assert len(of(tmp_path)) == sum(len(session.plan(options)) for options in asked)
    assert {r["codes_k"] for r in of(tmp_path, status="ok")} == {CODES[0]}
    skipped = of(tmp_path, status="skipped")
    assert {r["codes_k"] for r in skipped} == set(CODES[1:])
    assert all("max_run_s is 1e+06" in r["reason"] for r in skipped)
    assert len(of(tmp_path, status="failed")) == (step == "measure")
    assert (tmp_path / "codebook.md").exists()


def test_tables_from_codes_to_codes_that_are_too_large_are_skipped(tmp_path: Path, fake: Any) -> None:  # noqa: F811
    huge = runs(tmp_path)[0]._replace(mechanisms=("vq_qk", "vq_k"))
    bench = huge.bench
    fraction = 12 * 2 * 3 * 3 / 2**40  # less than one table and its inputs
    asked = huge._replace(bench=BenchConfig(lengths=bench.lengths, max_memory_fraction=fraction))
    assert runner.run_all([asked], codes_page.write, fake) == 0
    assert {r["status"] for r in of(tmp_path)} == {"skipped"}
    assert "GiB may be used" in of(tmp_path)[0]["reason"]
    assert "## Not measured" in (tmp_path / "codebook.md").read_text()


@pytest.mark.parametrize("kind", ["real", "random"])
def test_codebooks_are_fitted_on_other_tokens_than_are_measured(tmp_path: Path, kind: str) -> None:
    job = small_job(input=kind)
    found = {}
    for held_out in (0, 512):
        preparer = Preparer(Store(tmp_path, job, LENGTH), FakeBackend(), held_out)
        positions = preparer._fit_positions()
        found[held_out] = positions
        assert len(np.unique(positions)) == len(positions) == (held_out or LENGTH)
    assert found[0].max() < LENGTH <= found[512].min()


def test_exact_rows_are_rows_of_exact_attention() -> None:
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 31, 3, 5))
    rows = np.array([0, 7, 30])
    for is_causal in (False, True):
        weight = oracle.visible(31, 31, is_causal=is_causal)
        whole = oracle.softmax_attention(q, k, v, weight, 1.0).out
        np.testing.assert_allclose(
            exact_attention(q, k, v, is_causal=is_causal, rows=rows), whole[:, rows], rtol=1e-12
        )


def test_options_of_the_codebook_suite(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "small.yml"))

    def parsed(*more: str) -> list[session.Options]:
        words = ["codebook", "--config", config, "--backend", "torch", *more]
        return codebook.options(command_line.parser().parse_args(words))

    found = parsed("--codes", "8", "4", "8", "--length", "64", "--causal")
    assert [(x.job.codes_q, x.job.codes_k, x.bench.lengths) for x in found] == [
        (4, 4, (64,)),
        (8, 8, (64,)),
    ]
    assert [x.mechanisms for x in found] == [("vq_qk", "vq_k", "exact"), ("vq_qk", "vq_k")]
    assert [x.job.codes_k for x in parsed()] == list(codebook.CODES)
    assert parsed()[0].bench.lengths == (16_384,)
    assert len({x.job.digest for x in parsed()}) == 7
    with pytest.raises(ValueError, match=r"must be one with codes: vq_qk, .*; found hyper"):
        parsed("--mechanism", "hyper")
    for wrong in (["--codes", "0"], ["--length", "-3"], ["--lengths", "64"]):
        with pytest.raises(SystemExit):
            parsed(*wrong)
