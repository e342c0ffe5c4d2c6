"""The report of the suite 'codebook': time, memory and error against the number of codes."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import fit, page, plot
from bench.extras import MAX_ROWS
from bench.markdown import bullets, mebibytes, milliseconds, table
from bench.records import Record
from bench.registry import MECHANISMS, position
from bench.report import VERIFIED, provenance, provenance_list

TEXT = (
    "One forward call at a fixed length, the median of repeats, quantization included; the time to find the "
    "codes alone beside it. Codebooks have as many codes for queries as for keys and are fitted by k-means "
    "on other tokens than those that are measured. Errors are relative RMS: of quantized q and k to "
    "themselves before, and of the output to exact attention in float64 over the whole sequence, at up to "
    f"{MAX_ROWS} queries. {VERIFIED}"
)
FIGURES = (
    *("ms_median", "ms_p20", "ms_p80", "quantize_ms", "quantize_error_q", "quantize_error_k"),
    *("exact_error", "temp_bytes", "peak_bytes"),
)
NAME = ("backend", "mechanism", "is_causal", "length", "codes_k")


def write(out: Path, found: Sequence[Record], notes: Sequence[str]) -> list[str]:
    """Write codebook.md, codebook.png and summary.json into `out`; lines that say so, and the verdict."""
    verdict = fit.verdict(found, has_exponents=False)
    about = "time and error against the number of codes"
    image, line = page.image(out / "codebook.png", about, lambda path: _plot(path, found))
    missing = page.not_measured(found, _where)
    page.write(out / "codebook.md", [*_head(found, notes, verdict), image, *_tables(found), missing])
    summary = {
        "provenance": provenance(found),
        "points": [{key: r[key] for key in (*NAME, *FIGURES)} for r in _measured(found)],
        "not_measured": [
            {key: r[key] for key in (*NAME, "status", "reason")} for r in found if r["status"] != "ok"
        ],
        "verdict": verdict,
    }
    page.summarize(out, summary)
    return [line, f"tables: {out / 'codebook.md'}", f"records: {out / 'records.jsonl'}", verdict]


def _head(found: Sequence[Record], notes: Sequence[str], verdict: str) -> Iterator[str]:
    yield "# VQ-attention against the number of codes"
    yield verdict
    yield bullets(notes)
    yield provenance_list(found)
    yield "- tokens: " + ", ".join(f"{length:,}" for length in sorted({r["length"] for r in found}))
    yield TEXT


def _measured(found: Iterable[Record]) -> list[Record]:
    """What has figures, in the order of the registry, then of codes."""
    return sorted(
        (r for r in found if r["status"] == "ok"),
        key=lambda r: (r["is_causal"], position(r["mechanism"]), r["backend"], r["codes_k"]),
    )


def _tables(found: Sequence[Record]) -> Iterator[str]:
    head = [
        "mechanism",
        "backend",
        "codes",
        "ms",
        "20th ... 80th percentile",
        "quantization, ms",
        "error of q",
    ]
    head += ["error of k", "error of output", "temporaries, MiB", "peak, MiB"]
    for is_causal in (False, True):
        rows = [_row(r) for r in _measured(found) if r["is_causal"] == is_causal]
        if rows:
            yield f"## {'Causal' if is_causal else 'Not causal'}"
            yield table(head, rows)


def _row(r: Record) -> list[str]:
    return [
        MECHANISMS[r["mechanism"]].title,
        r["backend"],
        _codes(r),
        milliseconds(r["ms_median"]),
        f"{milliseconds(r['ms_p20'])} ... {milliseconds(r['ms_p80'])}",
        milliseconds(r["quantize_ms"]),
        *("" if r[key] is None else f"{r[key]:.3g}" for key in ("quantize_error_q", "quantize_error_k")),
        "" if r["exact_error"] is None else f"{r['exact_error']:.3g}",
        mebibytes(r["temp_bytes"]),
        mebibytes(r["peak_bytes"]),
    ]


def _codes(r: Record) -> str:
    return f"{r['codes_k']:,}" if MECHANISMS[r["mechanism"]].quantized else ""


def _where(r: Record) -> str:
    codes = f" at {_codes(r)} codes" if _codes(r) else ""
    return f"{r['backend']} {fit.curve_name(r['mechanism'], r['is_causal'])}, {r['status']}{codes}"


def _plot(path: Path, found: Sequence[Record]) -> None:
    """Times above, with those of quantization, and errors below; one column per form.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    measured = _measured(found)
    forms = sorted({r["is_causal"] for r in measured}) or [False]
    figure = Figure(figsize=(6.2 * len(forms), 8.4), layout="constrained")
    panels = figure.subplots(2, len(forms), sharex=True, squeeze=False)
    for column, is_causal in enumerate(forms):
        upper, lower = panels[0][column], panels[1][column]
        names = dict.fromkeys((r["mechanism"], r["backend"]) for r in measured if r["is_causal"] == is_causal)
        for mechanism, backend in names:
            of_name = [
                r
                for r in measured
                if (r["mechanism"], r["backend"], r["is_causal"]) == (mechanism, backend, is_causal)
            ]
            _lines(upper, lower, of_name)
        upper.set_title("causal" if is_causal else "not causal")
        lower.set_xlabel("codes of each codebook")
        codes = sorted({r["codes_k"] for r in measured})
        for panel in (upper, lower):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(codes, [str(n) for n in codes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=7)
    panels[0][0].set_ylabel("one forward call, ms (dotted: quantization)")
    panels[1][0].set_ylabel("relative RMS error")
    figure.suptitle(plot.subtitle(found, has_codes=False), fontsize=9)
    figure.savefig(path, dpi=150)


def _lines(upper: Any, lower: Any, of_name: Sequence[Record]) -> None:
    first = of_name[0]
    mechanism, backend = first["mechanism"], first["backend"]
    color, (line, marker) = plot.COLORS[mechanism], plot.STYLES[backend]
    label = f"{MECHANISMS[mechanism].title}, {backend}"
    look = {"color": color, "markersize": 4}
    if not MECHANISMS[mechanism].quantized:
        upper.axhline(first["ms_median"], linestyle=line, color=color, label=label)
        return

    def draw(panel: Any, key: str, style: str, text: str | None) -> None:
        points = [(r["codes_k"], r[key]) for r in of_name if r[key]]
        if points:
            panel.plot(*zip(*points, strict=True), style, marker=marker, label=text, **look)

    draw(upper, "ms_median", line, label)
    draw(upper, "quantize_ms", ":", None)
    draw(lower, "exact_error", line, f"output, {label}")
    if "codebook_q" in MECHANISMS[mechanism].arrays:
        draw(lower, "quantize_error_q", ":", f"quantized q, {backend}")
        draw(lower, "quantize_error_k", "-.", f"quantized k, {backend}")
