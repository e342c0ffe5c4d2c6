"""`python -m bench tune`: it verifies what it times, and its table is what the kernels read."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import tuning
from bench.__main__ import main
from jax_vq.kernels import sizes, tiles, vq_full
from jax_vq.kernels.sizes import Size
from jax_vq.ops import implementations

QUICK = ["tune", "--quick", "--kernel", "answer"]


def test_the_fastest_size_is_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sizes.json"
    assert main([*QUICK, "--out", str(path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " ms" in line]
    rows = {(row.kernel, row.n_code): row.size for row in sizes.read(path)}
    assert len(lines) == 2
    assert f"tile {rows['answer', 16].tile}, " in lines[0]  # the fastest comes first
    # All other rows are kept as they were.
    kept = {(row.kernel, row.n_code): row.size for row in sizes.read(sizes.PATH)}
    assert {name: size for name, size in rows.items() if name != ("answer", 16)} == kept


def test_a_size_that_gives_something_else_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = vq_full.full_attention

    def wrong(*arguments: Any) -> Any:
        is_tried = "answer" in sizes._TRIED
        return right(*arguments) * (jnp.asarray(1.1 if is_tried else 1.0, jnp.bfloat16))

    monkeypatch.setattr(vq_full, "full_attention", wrong)
    path = tmp_path / "sizes.json"
    assert main([*QUICK, "--out", str(path)]) == 1
    found = capsys.readouterr().out
    assert found.count("relative RMS difference 1.0e-01, limit 2e-02") == 2
    assert "no size is right" in found
    assert not path.exists()


def test_codes_may_change_where_they_tie_alone() -> None:
    call = tuning.Call("codes", 8, jnp.asarray, ())
    codes = jnp.zeros((1, 1000, 1), jnp.int32)
    assert tuning.difference(call, codes, codes) is None
    assert tuning.difference(call, codes.at[0, 3].set(1), codes) == "0.1% of the codes change"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a machine without a GPU")
def test_times_of_a_cpu_are_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert "nothing can be tuned here: Triton compiles for a GPU" in capsys.readouterr().err
    assert main([*QUICK, "--install"]) == 2
    assert "--install needs real times" in capsys.readouterr().err


@pytest.mark.parametrize("row", sizes.read(sizes.PATH), ids=lambda row: f"{row.kernel}-{row.n_code}")
def test_the_size_in_use_is_tried_once(row: sizes.Row) -> None:
    """Else a worse one would take its place."""
    assert tuning.candidates(row.kernel, row.n_code, 128).count(row.size) == 1
    other = row.size._replace(n_warp=16)
    with sizes.trying(row.kernel, other):
        assert tuning.candidates(row.kernel, row.n_code, 128).count(other) == 1


def test_the_size_in_use_stays_where_another_is_hardly_faster() -> None:
    call, used = tuning.Call("answer", 128, jnp.asarray, ()), sizes.size_of("answer", 128)
    other = tuning.Tried(used._replace(tile=2 * used.tile), 1.0)
    assert tuning.chosen(call, [other, tuning.Tried(used, 1.01)]).size == used
    assert tuning.chosen(call, [other, tuning.Tried(used, 1.1)]) == other
    assert tuning.chosen(call, [other]) == other


def test_an_unknown_kernel_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--quick", "--kernel", "codez"]) == 2
    assert "--kernel must be one of answer, blocks, causal, causal_float32, codes" in capsys.readouterr().err


def test_a_size_is_of_the_least_row_that_is_enough() -> None:
    rows = {row.n_code: row.size for row in sizes.read(sizes.PATH) if row.kernel == "codes"}
    small, large = min(rows), max(rows)
    assert sizes.size_of("codes", 3) == rows[small]
    assert sizes.size_of("codes", small + 1) == sizes.size_of("codes", large + 1) == rows[large]
    with sizes.trying("codes", rows[large]):
        assert sizes.size_of("codes", 3) == rows[large]
    assert sizes.size_of("codes", 3) == rows[small]


def test_sizes_are_tried_with_triton_alone() -> None:
    """Kernels by Mosaic GPU have none: beside them any size would win."""
    seen = []

    def step(x: jax.Array) -> jax.Array:
        seen.append(implementations.is_asked_for("triton"))
        return x

    tuning._lowered(tuning.Call("codes", 128, step, (jnp.ones(1),)), Size(64, 128, 128, 4, 1))
    assert seen == [True]


@pytest.mark.parametrize("n_code", [16, 200])
def test_every_call_lowers_for_a_gpu(n_code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a kernel may read what is no argument of it."""
    if jax.__version_info__ >= (0, 11) and jax.default_backend() != "gpu":
        pytest.skip("this jax lowers for a GPU that is there, or named")
    calls = list(tuning.calls(tuning.Shape(150, 1, 16), n_code))
    assert len({call.kernel for call in calls}) == len(calls)
    monkeypatch.setattr(tiles, "is_interpreted", lambda: False)
    for call in calls:
        with implementations.asking("triton"):
            traced = jax.jit(lambda *arrays, run=call.run: run(*arrays)).trace(*call.arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "triton" in text, call.kernel
