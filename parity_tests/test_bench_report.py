"""`python -m bench report`: pages of any result files, the original's tables, a README's tables."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench import combined, groups, plot, published, readme, registry, sections, sources
from bench.host import ROOT
from parity_tests.bench_records import record, write

Capture = pytest.CaptureFixture[str]
FLOOR = {
    "floor_ms": 0.5,
    "definition_bytes": 10**9,
    "definition_flops": 4 * 10**11,
    "copy_gb_s": 4000.0,
    "matmul_tflop_s": 800.0,
    "dispatch_ms": 0.02,
}


def page_of(tmp_path: Path, *files: list[Any]) -> str:
    """The report of files `a`, `b`, ... that hold these records."""
    folders = [write(tmp_path / "in" / name, found) for name, found in zip("abc", files, strict=False)]
    combined.write(tmp_path / "out", sources.load_all(folders))
    return (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_scaling_has_times_ratios_exponents_and_the_share_of_the_floor(tmp_path: Path) -> None:
    linear = [record(2.0 * 2**i, length=4096 * 2**i, **(FLOOR if i == 0 else {})) for i in range(3)]
    exact = [record(1.0 * 4**i, length=4096 * 2**i, mechanism="exact") for i in range(3)]
    page = page_of(tmp_path, [*linear, *exact])
    assert "| tokens | vq_qk jax | exact jax |" in page
    assert "| 16,384 | 8 | 16 |" in page
    assert "| 16,384 | 2.00 |" in page
    assert "| VQ-attention, queries and keys | jax | 1.00 (4,096 ... 16,384) |" in page
    assert "| 8,192 |\n" in page  # faster than exact from
    cells = "2 (1.8 ... 2.2) | 0.50 | 0.02 | 0.5 | 25 % | 500 | 12.5 % | 200 | 25 % | 1 |"
    assert cells in page
    assert "backends not compared: only jax ran" in page
    assert (tmp_path / "out" / "report-scaling.png").stat().st_size > 5000


def test_exact_ms_of_a_record_goes_before_the_file(tmp_path: Path) -> None:
    found = [record(2.0, exact_ms=8.0), record(1.0, mechanism="exact")]
    (group,) = groups.groups([sources.load(write(tmp_path, found))])["scaling"]
    assert [group.faster(r) for r in group.records] == [4.0, None]


def test_files_devices_dtypes_and_shapes_are_never_mixed(tmp_path: Path) -> None:
    found = [record(), record(device_name="Other"), record(dtype="bfloat16"), record(heads=3)]
    files = [sources.load(write(tmp_path / name, found)) for name in "ab"]
    # A record's identity has no dtype and no shape: config_hash stands for them.
    assert [len(group.records) for group in groups.groups(files)["scaling"]] == [1] * 4
    distinct = [r | {"config_hash": str(i)} for i, r in enumerate(found)]
    (whole,) = [sources.load(write(tmp_path / "c", distinct))]
    assert len(groups.groups([whole])["scaling"]) == 4


def test_curves_of_two_configurations_are_told_apart(tmp_path: Path) -> None:
    found = [record(codes_q=C, codes_k=C, config_hash=str(C)) for C in (7, 70)]
    (group,) = groups.groups([sources.load(write(tmp_path, found))])["scaling"]
    assert [curve.label for curve in group.curves(True)] == ["vq_qk jax, codes_k 7", "vq_qk jax, codes_k 70"]


def test_every_suite_has_a_section(tmp_path: Path) -> None:
    decode = [record(0.1, suite="decode", direction="step", state_bytes=4096)]
    sizes = (128, 512)
    codebook = [
        record(C / 100, suite="codebook", codes_q=C, codes_k=C, config_hash=str(C), quantize_error_k=1 / C)
        for C in sizes
    ]
    memory = [record(suite="memory", length=T, peak_bytes=T * 2**20) for T in (256, 512)]
    page = page_of(tmp_path, decode, codebook, memory)
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert titles[1:] == [combined.TITLES[suite] for suite in ("decode", "codebook", "memory")]
    assert "| codes | vq_qk jax |\n| --- | ---: |\n| 128 | 1.28 |\n| 512 | 5.12 |" in page
    assert "7.8e-03" in page
    assert "| 512 | 512 |" in page
    assert "| 1.00 (256 ... 512) |" in page
    assert "| 4,096 |" in page
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        f"report-{suite}.png" for suite in ("decode", "codebook", "memory")
    }


def test_every_mechanism_has_a_color_of_its_own() -> None:
    assert list(plot.COLORS) == list(registry.MECHANISMS)
    assert len(set(plot.COLORS.values())) == len(plot.COLORS)


def test_accuracy_says_what_no_other_mechanism_beats(tmp_path: Path) -> None:
    figures = {"vq_qk": (1.0, 0.5), "vq_k": (2.0, 0.3), "hyper": (3.0, 0.4)}
    found = [
        record(ms, suite="accuracy", mechanism=mechanism, layer=f"model/{i}", exact_error=error + i / 100)
        for mechanism, (ms, error) in figures.items()
        for i in range(3)
    ]
    page = page_of(tmp_path, found)
    assert "| vq_qk jax | 1,024 | 3 | 0.510 | 0.500 ... 0.520 | 1 | yes |" in page
    assert "| vq_k jax | 1,024 | 3 | 0.310 | 0.300 ... 0.320 | 2 | yes |" in page
    assert "| hyper jax | 1,024 | 3 | 0.410 | 0.400 ... 0.420 | 3 |  |" in page


def test_provenance_and_what_was_not_measured(tmp_path: Path) -> None:
    page = page_of(tmp_path, [record(), record(None, length=2048, status="skipped", reason="no memory")])
    assert f"{(tmp_path / 'in' / 'a').as_posix()} | scaling | 1 of 2 | Device | float32 | fwd |" in page
    assert "| 0123456789ab | c0ffee | python=3.11.9 jax=0.10.2 | 2026-01-02T03:04:05Z |" in page
    assert "- jax vq_qk causal, skipped at 2,048: no memory" in page


SHAPE = {"heads": 1, "width": 512, "value_width": 512, "codes_q": 128, "codes_k": 128, "length": 16384}


def test_published_tables_stand_beside_records_of_their_shape_only(tmp_path: Path) -> None:
    sweep = SHAPE | {"codes_q": 4096, "codes_k": 4096, "config_hash": "sweep"}
    page = page_of(tmp_path, [record(9.0, **SHAPE, quantize_ms=2.0), record(50.0, **sweep)])
    section = page[page.index("## Beside the original's published tables") :]
    assert "measured on other hardware, without a valid baseline" in section
    assert "with quantization not timed" in section
    assert "| tokens | published, causal | published, full | jax, float32, Device, causal |" in section
    assert "| 16,384 | 5.2 | 3.9 | 9 | 7 |" in section
    assert "| 65,536 | 19.8 | 15.0 |  |  |" in section
    assert "| 4,096 | 93 | 84 | 50 |" in section
    # Finding codes alone took longer than a whole call: there is no rest.
    assert "attention alone |" not in page_of(tmp_path, [record(1.0, **SHAPE, quantize_ms=2.0)])
    for change in ({"heads": 2}, {"width": 256}, {"batch": 2}, {"direction": "bwd"}, {"mechanism": "vq_k"}):
        source = sources.load(write(tmp_path / "other", [record(9.0, **SHAPE | change)]))
        assert published.section([source]) == "", change


def test_a_report_without_matplotlib_has_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(tmp_path, [record()])
    assert "No plot: matplotlib is not installed." in page
    assert "| 1,024 | 1 |" in page


def test_the_command_reads_folders_of_folders_and_refuses_wrong_files(
    tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert command_line.main(["report", str(ROOT / "bench" / "results"), "--out", str(out)]) == 0
    assert f"report: {out / 'report.md'}" in capsys.readouterr().out
    assert "h200_bfloat16_kernels_fwd+bwd" in (out / "report.md").read_text()
    assert command_line.main(["report"]) == 2
    assert "error: name result files, or a page with --readme" in capsys.readouterr().err
    torn = write(tmp_path / "torn", [record()]) / "records.jsonl"
    torn.write_bytes(torn.read_bytes()[:-9])
    assert command_line.main(["report", str(torn), "--out", str(out)]) == 2
    assert "line 1: torn" in capsys.readouterr().err


# --- tables of a page --------------------------------------------------------------------------


def test_the_readme_is_what_committed_results_give() -> None:
    """A figure that was typed, or results that changed: `python -m bench report --readme README.md`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.BLOCK.findall(text)) >= 2
    assert readme.generated(text, ROOT) == text


def test_how_fast_has_no_figure_outside_its_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## How fast\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    typed = re.sub(r"`[^`]*`|\]\([^)]*\)|H[12]00", "", readme.BLOCK.sub("", section))
    assert re.findall(r"\d[\d.,]*", typed) == []


def marked(words: str, inside: str = "typed\n") -> str:
    return f"before\n<!-- bench:speed {words} -->\n{inside}<!-- /bench:speed -->\nafter\n"


def test_what_is_between_markers_is_replaced_and_nothing_else(tmp_path: Path, capsys: Capture) -> None:
    exact = [record(1.0 * 4**i, length=4096 * 2**i, mechanism="exact") for i in range(3)]
    write(tmp_path / "r", [*(record(2.0 * 2**i, length=4096 * 2**i) for i in range(3)), *exact])
    page = tmp_path / "page.md"
    page.write_text(marked("r jax vq_qk"))
    assert command_line.main(["report", "--readme", str(page)]) == 0
    assert "1 tables from markers, rewritten" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:speed r jax vq_qk -->\n")
    assert text.endswith("<!-- /bench:speed -->\nafter\n")
    assert "typed" not in text
    assert "| tokens | exact causal, ms | vq_qk causal, ms | times faster |" in text
    assert "| 16,384 | 16 | 8 | 2.00 |" in text
    assert "| faster from |  |  | 8,192 |" in text
    assert readme.generated(text.replace("| 8 |", "| 7 |"), tmp_path) == text
    assert command_line.main(["report", "--readme", str(page)]) == 0
    assert "nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        (marked("r jax"), "needs a folder, a backend and mechanisms, found 'r jax'"),
        (marked("r torch vq_qk"), "r has no figure of exact, vq_qk in torch"),
        (marked("r jax hyper"), "r has no figure of hyper in jax"),
        (marked("r jax vq_qk").replace("bench:speed", "bench:quality"), "no table is called 'quality'"),
        (marked("r jax vq_qk").replace("<!-- /bench:speed -->", ""), "has no <!-- /bench:NAME -->"),
        (marked("r jax vq_qk") + marked("two jax vq_qk"), "two has several devices"),
    ],
)
def test_a_wrong_marker_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "r", [record(), record(mechanism="exact")])
    write(tmp_path / "two", [record(), record(mechanism="exact"), record(dtype="x", config_hash="x")])
    with pytest.raises(ValueError, match=re.escape(message)):
        readme.generated(text, tmp_path)


def test_the_median_of_layers() -> None:
    assert sections.median([record(ms) for ms in (1.0, 5.0, 2.0)], "ms_median") == 2.0
