"""Rows at the timed length: what is right on the first tokens and wrong later is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import registry, rows, runner
from bench.extras import OBSERVED
from bench.job import Point
from parity_tests.test_bench import InProcess, of, options, small_job
from vq_common import BenchConfig


@pytest.fixture(params=registry.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_at_a_longer_length_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str
) -> None:
    """The calls that were not verified as a whole, 3 % too large."""
    right = registry.MECHANISMS["vq_qk"]

    def build(*arguments: Any) -> registry.Built:
        built = right.build(*arguments)

        def call(q: Any, *rest: Any) -> Any:
            out = built.fn(q, *rest)
            return out if q.shape[1] == 64 else 1.03 * out

        return built._replace(fn=call)

    monkeypatch.setitem(registry.MECHANISMS, "vq_qk", right._replace(build=build))
    job, mechanisms = small_job(dtype=dtype), ("vq_qk", "vq_k")
    asked = options(tmp_path, backends=(backend,), job=job, mechanisms=mechanisms)
    assert runner.run(asked, InProcess) == 1
    wrong = of(tmp_path, status="failed")
    assert [(r["mechanism"], r["length"]) for r in wrong] == [("vq_qk", 128), ("vq_qk", 256)]
    assert all(r["reason"].startswith("refused: relative RMS error") for r in wrong)
    assert all("of rows at this length" in r["reason"] and r["row_error"] > 3e-3 for r in wrong)
    assert len(of(tmp_path, status="ok")) == 4
    assert "failed at 128, 256: refused" in (tmp_path / "scaling.md").read_text()


def test_a_row_is_compared_where_there_is_an_output(tmp_path: Path, backend: str) -> None:
    for direction, is_compared in (("fwd", True), ("fwd+bwd", True), ("bwd", False)):
        folder = tmp_path / direction
        bench = BenchConfig(lengths=(65,))
        asked = options(
            folder, backends=(backend,), bench=bench, mechanisms=("vq_k", "hyper"), direction=direction
        )
        assert runner.run(asked, InProcess) == 0
        (vq_k,), (hyper,) = of(folder, mechanism="vq_k"), of(folder, mechanism="hyper")
        assert hyper["row_error"] is None
        assert (vq_k["row_error"] is not None) == is_compared
        line = "Rows of the output at each length:"
        assert (line in (folder / "scaling.md").read_text()) == is_compared


def test_no_row_is_compared_where_memory_is_observed(tmp_path: Path, backend: str) -> None:
    asked = options(tmp_path, backends=(backend,), bench=BenchConfig(lengths=(65,)), extras=(OBSERVED,))
    assert runner.run(asked, InProcess) == 0
    found = of(tmp_path, status="ok")
    assert len(found) == 2
    assert all(r["row_error"] is None for r in found)


def test_no_row_is_compared_where_a_call_or_the_definition_takes_long(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    job = small_job(max_repeat_s=0.0)
    asked = options(tmp_path, job=job, mechanisms=("vq_qk",), bench=BenchConfig(lengths=(65,)))
    assert runner.run(asked, InProcess) == 0
    assert [r["row_error"] for r in of(tmp_path, status="ok")] == [None]


def test_heads_are_the_first_and_the_last_as_far_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    job, point = small_job(batch=3), Point("vq_qk", True, 64)
    a_head = 64 * (job.codes_q + job.codes_k) * job.width
    for n_product, expected in ((2 * a_head, [(0, 0), (2, 1)]), (a_head, [(0, 0)]), (a_head - 1, [])):
        monkeypatch.setattr(rows, "MAX_PRODUCTS", n_product)
        assert rows.heads(point, job) == expected
    assert rows.heads(Point("exact", True, 2**20), small_job(heads=1)) == [(0, 0)]


def test_of_a_tie_the_backend_chooses_and_of_nothing_else() -> None:
    codebook = np.array([[1.0, 0], [-1, 0], [0, 3]])
    x = np.array([[1e-6, 1], [1e-6, 1], [1e-6, 1], [0.5, 0], [0, 2]])
    found = rows.nearest_codes(x, codebook, np.array([0, 1, 2, 1, 2]))
    assert found.tolist() == [0, 1, 0, 0, 2]


def test_queries_are_spread_and_none_is_on_a_tie() -> None:
    codebook = np.array([[1.0, 0], [-1, 0]])
    q = np.tile([[1.0, 0]], (1000, 1))
    q[500:] = [[0, 1]]
    q[-1] = [-1, 0]
    picked = rows.spread(np.asarray, q, codebook)
    assert picked[0] < 100
    assert picked[-1] == 999
    assert (picked[:-1] < 500).all()
    assert rows.N_ROW <= len(picked) < 2 * rows.N_ROW
    assert rows.spread(np.asarray, q, None)[-2] > 800
