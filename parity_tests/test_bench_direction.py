"""The benchmark of gradients, and of the window form: verified, refused where wrong, recorded truthfully."""

from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench import arguments as bench_arguments
from bench import fit, predict, records, registry, runner, verify
from bench.job import Point
from bench.suites import scaling
from parity_tests.test_bench import InProcess, of, options, small_job, write_config
from vq_common import BenchConfig

DIRECTIONS = ("bwd", "fwd+bwd")
SHORT = BenchConfig(lengths=(64, 96), max_point_s=1e6, max_run_s=1e6, n_repeat=1)
ONE_LENGTH = BenchConfig(lengths=(64,), max_point_s=1e6, max_run_s=1e6, n_repeat=1)


@pytest.fixture(params=registry.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend whose worker runs inside the test process."""
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    return str(request.param)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_every_mechanism_meet_the_oracle(tmp_path: Path, backend: str, direction: str) -> None:
    asked = options(
        tmp_path,
        backends=(backend,),
        job=small_job(batch=2, input="random"),
        bench=ONE_LENGTH,
        mechanisms=registry.default_mechanisms(small_job(mem_len=1)),
        causal=(False, True),
        direction=direction,
    )
    assert runner.run(asked, InProcess) == 0
    found = of(tmp_path, status="ok")
    assert len(found) == 11
    assert {r["direction"] for r in found} == {direction}
    limit = verify.limit("float32", "gradients")
    assert all(0 < r["gradient_error"] <= limit for r in found)
    assert all((r["oracle_error"] is None) == (direction == "bwd") for r in found)
    assert all(r["ms_p20"] <= r["ms_median"] <= r["ms_p80"] and r["peak_bytes"] > 0 for r in found)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_gradients_in_other_dtypes(tmp_path: Path, direction: str, dtype: str) -> None:
    pytest.importorskip("torch")
    asked = options(tmp_path, job=small_job(dtype=dtype), bench=ONE_LENGTH, direction=direction)
    assert runner.run(asked, InProcess) == 0
    assert all(r["gradient_error"] <= verify.limit(dtype, "gradients") for r in of(tmp_path))


def detached(x: Any) -> Any:
    import jax

    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x.detach()


@pytest.mark.parametrize("direction, which", [("fwd+bwd", 0), ("fwd+bwd", 1), ("fwd+bwd", 2), ("bwd", 0)])
def test_a_wrong_gradient_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, direction: str, which: int
) -> None:
    right = registry.MECHANISMS["vq_qk"]

    def build(*arguments: Any) -> registry.Built:
        built = right.build(*arguments)

        def wrong(*arrays: Any) -> Any:
            """The right output; one gradient is 0.1% too large."""
            x = arrays[which]
            return built.fn(*arrays[:which], x + 1e-3 * (x - detached(x)), *arrays[which + 1 :])

        return registry.Built(wrong, "planted")

    monkeypatch.setitem(registry.MECHANISMS, "vq_qk", right._replace(build=build))
    asked = options(tmp_path, backends=(backend,), bench=ONE_LENGTH, direction=direction)
    assert runner.run(asked, InProcess) == 1
    (refused,) = of(tmp_path, mechanism="vq_qk")
    name = ("d_q", "d_k", "d_v")[which]
    assert refused["reason"] == f"refused: relative RMS error 1.0e-03 of {name} to the oracle, limit 2e-05"
    assert refused["gradient_error"] == pytest.approx(1e-3, rel=0.05)
    assert len(of(tmp_path, mechanism="exact", status="ok")) == 1


def test_directions_are_different_points_of_one_file(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for direction in ("fwd", *DIRECTIONS):
        asked = options(
            tmp_path, bench=SHORT, mechanisms=("exact",), direction=direction, is_resume=direction != "fwd"
        )
        assert runner.run(asked, InProcess) == 0
    found = of(tmp_path)
    assert [r["direction"] for r in found] == ["fwd", "fwd", "bwd", "bwd", "fwd+bwd", "fwd+bwd"]
    assert len({r["config_hash"] for r in found}) == 1
    assert "forward and backward pass together" in (tmp_path / "scaling.md").read_text()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_both_backends_agree_in_gradients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], direction: str
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    config = write_config(tmp_path / "small.yml")
    asked = ["scaling", "--config", str(config), "--mechanism", "vq_qk", "--causal", "--device", "cpu"]
    out = tmp_path / "out"
    assert command_line.main([*asked, "--direction", direction, "--out", str(out)]) == 0
    found = of(out)
    assert len(found) == 4
    assert all(
        r["status"] == "ok" and 0 < r["twin_error"] <= verify.twin_limit("float32", direction) for r in found
    )
    compared = {"bwd": "gradients", "fwd+bwd": "outputs and gradients"}[direction]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"backends agree: {compared} within ")


def test_memory_of_exact_attention_knows_its_direction() -> None:
    job = small_job()
    seen = [predict.Seen(512, 1.0, implementation="xla")]
    points = [Point("exact", True, 8192, direction) for direction in ("fwd", "fwd+bwd", "bwd")]
    scores = 4 * job.heads * 8192**2
    need = [predict.memory_bytes(job, point, seen) / scores for point in points]
    assert need == pytest.approx([3, 5, 6], rel=0.01)
    flash = [predict.memory_bytes(job, point, [seen[0]._replace(implementation="flash")]) for point in points]
    assert flash[1] == flash[2] == 2 * flash[0]


# --- the window form -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, recorded", [({}, (16, 4)), ({"mem_len": 8}, (8, 0)), ({"n_sink": 3, "mem_len": 5}, (5, 3))]
)
def test_window_mechanisms_record_what_they_used(
    tmp_path: Path, given: dict[str, int], recorded: tuple[int, int]
) -> None:
    pytest.importorskip("torch")
    mechanisms = ("vq_qk", "vq_qk_window", "vq_k_window")
    asked = options(tmp_path, job=small_job(**given), bench=SHORT, mechanisms=mechanisms)
    assert runner.run(asked, InProcess) == 0
    found = {r["mechanism"]: (r["mem_len"], r["n_sink"]) for r in of(tmp_path, status="ok", length=96)}
    assert found == {"vq_qk": (0, 0), "vq_qk_window": recorded, "vq_k_window": recorded}


def test_a_window_that_is_not_causal_is_unsupported(tmp_path: Path) -> None:
    asked = options(tmp_path, bench=SHORT, mechanisms=("vq_qk_window",), causal=(False,))
    assert runner.run(asked, InProcess) == 0
    assert {r["reason"] for r in of(tmp_path, status="skipped")} == {
        "an exact window is of causal attention only"
    }


def test_the_window_form_runs_by_default_only_when_it_is_configured() -> None:
    plain = ("vq_qk", "vq_k", "hyper", "exact")
    assert registry.default_mechanisms(small_job()) == plain
    for given in ({"mem_len": 8}, {"n_sink": 2}):
        found = registry.default_mechanisms(small_job(**given))
        assert set(found) - set(plain) == {"vq_qk_window", "vq_k_window", "exact_window"}


def test_verification_sees_coded_pairs_too() -> None:
    job = small_job(block_len=128).at_verification("vq_qk_window", True, 64)
    assert (job.block_len, *job.window("vq_qk_window")) == (16, 16, 4)
    assert small_job(block_len=128).at_verification("vq_qk", True, 64) == small_job(block_len=128)


def test_options_of_directions_and_windows(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "small.yml"))
    base = ["scaling", "--config", config, "--backend", "torch"]
    given = ["--direction", "bwd", "--mem-len", "9", "--n-sink", "0"]
    found = scaling.options(command_line.parser().parse_args([*base, *given]))
    assert (found.direction, found.job.mem_len, found.job.n_sink) == ("bwd", 9, 0)
    assert found.out == bench_arguments.OUT / "scaling_bwd"
    assert "vq_qk_window" in found.mechanisms
    plain = scaling.options(command_line.parser().parse_args(base))
    assert (plain.direction, plain.out) == ("fwd", bench_arguments.OUT / "scaling")
    assert plain.job.digest != found.job.digest


def test_a_verdict_names_what_was_compared() -> None:
    found: list[records.Record] = []
    for name in registry.BACKENDS:
        record: records.Record = dict.fromkeys(records.KEYS)
        found.append(record | {"backend": name, "mechanism": "exact", "is_causal": True, "length": 64})
        found[-1] |= {"status": "ok", "dtype": "float32", "ms_median": 1.0, "twin_error": 3e-5}
    for direction, expected in (
        ("bwd", "agree: gradients within 3.0e-05 (limit 4e-05)"),
        ("fwd", "DISAGREE"),
    ):
        assert expected in fit.verdict([r | {"direction": direction} for r in found])
