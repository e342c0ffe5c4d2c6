"""The decoding benchmark: streams that are verified, constant states, one compilation for all steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as command_line
from bench import arguments as bench_arguments
from bench import decode, registry, report, runner, session, verify
from bench.inputs import random_qkv
from bench.job import STEP, Job, Point
from bench.suites import decode as decode_suite
from parity_tests.test_bench import InProcess, fake, of, options, small_job, write_config  # noqa: F401
from vq_common import BenchConfig

MECHANISMS = ("vq_qk", "vq_k", "vq_qk_window", "exact")
LENGTHS = (48, 97)


@pytest.fixture(params=registry.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend whose worker runs inside the test process."""
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    return str(request.param)


def decoding(out: Path, **changes: Any) -> session.Options:
    bench = BenchConfig(lengths=LENGTHS, max_point_s=1e6, max_run_s=1e6, n_repeat=3)
    asked = options(out, bench=bench, mechanisms=MECHANISMS, suite="decode", direction=STEP)
    return asked._replace(**changes)


def cache_bytes(job: Job, length: int) -> int:
    itemsize = {"float32": 4, "bfloat16": 2}[job.dtype]
    return itemsize * job.batch * length * job.heads * (job.width + job.value_width)


@pytest.mark.standard_promotion  # inside jax.nn.dot_product_attention
@pytest.mark.parametrize("backend, dtype", [("jax", "float32"), ("torch", "float32"), ("torch", "bfloat16")])
def test_every_stream_is_verified_timed_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str
) -> None:
    pytest.importorskip(backend)
    monkeypatch.setattr(decode, "FEED_LEN", 32)
    job = small_job(dtype=dtype, batch=2, input="random")
    assert runner.run(decoding(tmp_path, backends=(backend,), job=job), InProcess) == 0
    found = of(tmp_path, suite="decode", direction=STEP, status="ok")
    assert len(found) == len(MECHANISMS) * len(LENGTHS)
    assert all(0 < r["oracle_error"] <= verify.limit(dtype) and r["verified_length"] == 48 for r in found)
    assert all(r["ms_p20"] <= r["ms_median"] <= r["ms_p80"] and r["feed_s"] > 0 for r in found)
    assert all(r["quantize_ms"] is None and r["peak_bytes"] > r["state_bytes"] for r in found)
    for mechanism in MECHANISMS:
        short, long = (
            next(r["state_bytes"] for r in found if (r["mechanism"], r["length"]) == (mechanism, length))
            for length in LENGTHS
        )
        if mechanism == "exact":
            assert 0 <= short - cache_bytes(job, LENGTHS[0]) <= 4
            assert 0 <= long - cache_bytes(job, LENGTHS[1]) <= 4
        else:
            assert short == long
    page = (tmp_path / "decode.md").read_text()
    assert page.count("bytes at every length") == 3
    assert "| context | cache, bytes |" in page
    assert "## Times faster than exact attention" in page
    assert {"decode.md", "decode.png", "summary.json", "records.jsonl"} == {
        p.name for p in tmp_path.iterdir()
    }


def test_a_wrong_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    right = decode.build

    def build(mechanism: str, *arguments: Any) -> decode.Stream:
        stream = right(mechanism, *arguments)
        if mechanism != "vq_qk":
            return stream

        def step(*arrays: Any) -> Any:
            out, kept = stream.step(*arrays)
            return out * 1.001, kept

        return stream._replace(step=step)

    monkeypatch.setattr(decode, "build", build)
    asked = decoding(tmp_path, backends=(backend,), mechanisms=("vq_qk", "exact"))
    assert runner.run(asked, InProcess) == 1
    (refused,) = of(tmp_path, mechanism="vq_qk")
    assert refused["reason"].startswith("refused: relative RMS error 1.0e-03 to the oracle")
    assert len(of(tmp_path, mechanism="exact", status="ok")) == 2


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_steps_go_on_from_the_context(backend: str, mechanism: str) -> None:
    """Tokens 41 to 60 one by one, each equal to the last row of the whole: not only the first step."""
    worker_module = __import__(f"bench.on_{backend}", fromlist=["Backend"])
    job = small_job(input="random")
    engine = worker_module.Backend("cpu", job)
    q, k, v = random_qkv(job, np.arange(60)[None])
    rng = np.random.default_rng(0)
    books = {name: rng.normal(size=(job.heads, 7, 8)).astype(np.float32) for name in ("q", "k")}
    names = [name for name, _ in registry.MECHANISMS[mechanism].quantized]
    codebooks = tuple(engine.array(books[name], "float32") for name in names)

    def of_token(start: int, stop: int) -> tuple[Any, ...]:
        return tuple(engine.array(x[:, start:stop], "float32") for x in (q, k, v))

    stream = decode.build(mechanism, engine, job, 60, (*of_token(0, 1), *codebooks))
    kept = stream.feed(stream.start(), *of_token(0, 40), *codebooks)
    outs = []
    for i in range(40, 60):
        out, kept = stream.step(kept, *of_token(i, i + 1), *codebooks)
        outs.append(engine.numpy(out))
    arrays = (*of_token(0, 60), *codebooks)
    whole = engine.numpy(registry.build(mechanism, backend, job, True, arrays).fn(*arrays))
    assert verify.error(np.concatenate(outs, 1), whole[:, 40:]) <= verify.twin_limit("float32")


def test_jax_compiles_one_step_for_all_tokens_and_contexts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jax_vq = pytest.importorskip("jax_vq")
    traced: list[int] = []
    right = jax_vq.vq_attention

    def counted(q: Any, *arguments: Any, **settings: Any) -> Any:
        traced.append(q.shape[1])
        return right(q, *arguments, **settings)

    monkeypatch.setattr(jax_vq, "vq_attention", counted)
    monkeypatch.setattr(decode, "FEED_LEN", 32)
    bench = BenchConfig(lengths=(64, 96, 128), max_point_s=1e6, max_run_s=1e6, n_repeat=20)
    asked = decoding(tmp_path, backends=("jax",), mechanisms=("vq_qk",), bench=bench)
    assert runner.run(asked._replace(job=small_job(n_repeat=20, max_repeat_s=60.0)), InProcess) == 0
    assert all(r["n_repeat"] == 20 for r in of(tmp_path))
    assert traced.count(1) == 1
    assert sorted(traced) == [1, 31, 32]


def test_both_backends_decode_in_their_own_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    config, out = write_config(tmp_path / "small.yml"), tmp_path / "out"
    asked = ["decode", "--config", str(config), "--device", "cpu", "--batch", "2", "--out", str(out)]
    assert command_line.main([*asked, "--mechanism", "vq_qk_window", "--lengths", "32", "64"]) == 0
    found = of(out, status="ok")
    assert [(r["backend"], r["length"]) for r in found] == [
        (backend, length) for length in (32, 64) for backend in ("jax", "torch")
    ]
    assert len({r["state_bytes"] for r in found}) == 1
    assert {(r["mem_len"], r["n_sink"], r["batch"]) for r in found} == {(16, 4, 2)}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("backends agree: outputs within ")
    assert f"torch vq_qk_window state: {found[0]['state_bytes']:,} bytes at every length" in lines


def test_decoding_resumes_and_keeps_what_ctrl_c_left(tmp_path: Path, fake: Any) -> None:  # noqa: F811
    asked = decoding(tmp_path, mechanisms=("vq_qk", "exact"))
    fake.mishaps = {("exact", 97): KeyboardInterrupt()}
    assert runner.run(asked, fake) == 130
    before = of(tmp_path)
    assert 0 < len(before) < 4
    fake.mishaps, fake.measured = {}, []
    assert runner.run(asked._replace(is_resume=True), fake) == 0
    assert len(fake.measured) == 4 - len(before)
    assert of(tmp_path)[: len(before)] == before


def test_what_has_no_step_is_unsupported() -> None:
    point = Point("hyper", True, 64, STEP)
    assert registry.unsupported("torch", small_job(), point) == (
        "HyperAttention has no step: it sorts whole sequences"
    )


def test_a_report_of_no_decoding_is_written(tmp_path: Path) -> None:
    report.write(tmp_path, [], suite="decode")
    assert "nothing was measured" in (tmp_path / "decode.md").read_text()


def test_options_of_decoding(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "small.yml"))
    asked = command_line.parser().parse_args(["decode", "--config", config, "--backend", "torch"])
    found = decode_suite.options(asked)
    assert (found.suite, found.direction, found.causal) == ("decode", STEP, (True,))
    assert (found.mechanisms, found.out) == (MECHANISMS, bench_arguments.OUT / "decode")
