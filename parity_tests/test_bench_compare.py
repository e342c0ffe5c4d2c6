"""`python -m bench compare`, and the reading of result files that every reader shares."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench import comparison, records, sources
from bench.host import ROOT
from parity_tests.bench_records import record, write

Capture = pytest.CaptureFixture[str]


def compared(tmp_path: Path, a: list[Any], b: list[Any]) -> comparison.Comparison:
    return comparison.compare(
        sources.load(write(tmp_path / "a", a)), sources.load(write(tmp_path / "b", b) / "records.jsonl")
    )


@pytest.mark.parametrize(
    "ms, verdict, ratio", [(0.8, "faster", 0.8), (1.1, "within the spread", 1.1), (1.3, "slower", 1.3)]
)
def test_the_ratio_is_b_over_a_and_says_whether_it_exceeds_both_spreads(
    tmp_path: Path, ms: float, verdict: str, ratio: float
) -> None:
    (pair,) = compared(tmp_path, [record(1.0)], [record(ms, commit="other", versions="x", time="y")]).pairs
    assert pair.verdict == verdict
    assert pair.ratio == pytest.approx(ratio)


@pytest.mark.parametrize("key", comparison.SAME)
def test_another_measurement_is_not_matched(tmp_path: Path, key: str) -> None:
    a, common = record(1.0), record(1.0, length=4)
    b = a | {key: {int: 3, bool: False}.get(type(a[key]), "other")}
    found = compared(tmp_path, [a, common], [b, common])
    assert (len(found.pairs), len(found.only_a), len(found.only_b)) == (1, 1, 1)
    assert "## Only in A" in comparison.page(found)


def test_nothing_in_common_is_an_error_that_says_what_differs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device_name is Device in A and Other in B; dtype is float32 in A"):
        compared(tmp_path, [record()], [record(device_name="Other", dtype="bfloat16")])


def test_the_page_has_times_peaks_errors_and_what_could_not_be_compared(
    tmp_path: Path, capsys: Capture
) -> None:
    skipped = {"status": "skipped", "reason": "the run has taken 113 s"}
    a = [record(2.0), record(None, length=2048, **skipped), record(1.0, length=4096, exact_error=0.25)]
    b = [
        record(1.0, peak_bytes=3 * 2**20, config_hash="f"),
        record(5.0, length=2048),
        record(1.0, length=4096, implementation="eager"),
        record(9.0, length=8192),
    ]
    folders = [str(write(tmp_path / name, found)) for name, found in (("a", a), ("b", b))]
    out = tmp_path / "deep" / "page.md"
    assert command_line.main(["compare", *folders, "--out", str(out)]) == 0
    page = capsys.readouterr().out
    assert out.read_text() == page
    assert "| 1,024 | 2 | 1 | 0.500 | faster | 1 | 3 | 3.00 |  |" in page
    assert "| 2,048 |  | 5 |  | A skipped: the run has taken 113 s | 1 | 1 | 1.00 |  |" in page
    assert "| 4,096 | 1 | 1 | 1.000 | within the spread | 1 | 1 | 1.00 | 0.250 |" in page
    assert "2 measurements in both: 1 faster, 1 within the spread" in page
    assert "mean of the ratios of time: 0.707" in page
    assert "config_hash differs in 1 of 3 pairs" in page
    assert "jax vq_qk ran xla in A and eager in B" in page
    assert "## Only in B\n\n- jax vq_qk causal: 8,192" in page


def test_committed_results_equal_themselves(capsys: Capture) -> None:
    folder = ROOT / "bench" / "results" / "h200_bfloat16_decode_window"
    assert command_line.main(["compare", str(folder), str(folder)]) == 0
    page = capsys.readouterr().out
    n = sum(r["status"] == "ok" for r in records.read(folder / "records.jsonl"))
    assert n > 0
    assert f"{n} measurements in both: {n} within the spread" in page
    assert "Only in" not in page


def test_a_point_measured_under_two_settings_counts_once_and_is_noted(tmp_path: Path) -> None:
    found = compared(tmp_path, [record(1.0), record(3.0, config_hash="f")], [record(3.0)])
    assert [pair.ratio for pair in found.pairs] == [1.0]
    assert "A has 1 of its points more than once" in comparison.page(found)


def test_the_newest_record_of_a_point_counts(tmp_path: Path) -> None:
    assert compared(tmp_path, [record(1.0), record(4.0)], [record(2.0)]).pairs[0].ratio == 0.5


def lines(*changes: Any) -> str:
    return "".join(json.dumps(record() | change) + "\n" for change in changes)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        (lines({}) + lines({})[:90], "line 2: torn or not a record; if a run was killed"),
        (lines({})[:90] + "\n" + lines({}), "line 1: not a record"),
        (
            '{"name": "other", "value": 1}\n',
            "line 1: not a record of this benchmark: it has no suite, backend",
        ),
        ("[1, 2]\n", "line 1: torn or not a record"),
        (lines({}, {"status": "fine"}), "line 2: .* one of ok, skipped, failed, found 'fine'"),
        (lines({"length": "1024"}), "length must be an integer, found '1024'"),
        (lines({"ms_median": None}), "ms_median must be a number, found None"),
        (b"\x89PNG\xff\n", "is no result of this benchmark"),
    ],
)
def test_a_torn_or_foreign_file_is_an_error(tmp_path: Path, capsys: Capture, text: Any, message: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        sources.load(path)
    assert command_line.main(["compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}")


def test_a_missing_or_ambiguous_result_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    good = write(tmp_path / "many" / "one", [record()])
    assert command_line.main(["compare", str(good), str(tmp_path / "none")]) == 2
    assert f"error: {tmp_path / 'none'} does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command_line.main(["compare", str(good), str(tmp_path / "empty")]) == 2
    assert "empty holds no records.jsonl" in capsys.readouterr().err
    write(tmp_path / "many" / "two", [record()])
    assert command_line.main(["compare", str(good), str(tmp_path / "many")]) == 2
    assert "many holds 2 results, name one:" in capsys.readouterr().err
