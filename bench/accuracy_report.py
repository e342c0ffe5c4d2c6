"""What the suite `accuracy` found, for people: a table and a plot, error against time."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import page
from bench.markdown import bullets, table
from bench.plot import COLORS, label_log_x
from bench.records import Record
from bench.registry import MECHANISMS
from bench.report import provenance_list

MARKERS = "osD^vP*X"
INTRODUCTION = """\
Relative RMS error of the output against exact attention in float64 on the same q, k and v, and the median
time of one forward call, quantization included. Codebooks are fitted by k-means on q and k of other text
than what is evaluated, as they enter the scores (rotated, where a model rotates them). The window alone is
the window form with one code at weight 0: exact keys of the own block, {mem_len} before it and the sinks.
Key heads that several query heads share are repeated for each. A row in bold is on the front: nothing else
of its layer, backend and length is both faster and closer. Every mechanism met the float64 oracle of its
own definition before it was timed."""


def write(out: Path, found: Sequence[Record], about: Iterable[str], notes: Sequence[str]) -> list[str]:
    """Write accuracy.md and accuracy.png into `out`; lines that say what was written."""
    measured = [record for record in found if record["status"] == "ok"]
    image, line = page.image(out / "accuracy.png", "error against time", lambda path: plot(path, measured))
    windows = sorted({r["mem_len"] for r in found if r["mem_len"]})
    sections = [
        "# Accuracy of attention mechanisms on captured layers",
        bullets((*about, *notes)),
        provenance_list(found, ("device_name", "dtype", "block_len", "timing", "commit", "versions")),
        INTRODUCTION.format(mem_len=" or ".join(map(str, windows)) or "M"),
        image,
    ]
    for (layer, length, backend), records in groups(measured):
        form = "causal" if records[0]["is_causal"] else "not causal"
        sections += [f"## {layer}, {length:,} tokens, {form}, {backend}", _table(records)]
    page.write(out / "accuracy.md", [*sections, page.not_measured(found, _where)])
    return [line, f"tables: {out / 'accuracy.md'}", f"records: {out / 'records.jsonl'}"]


def groups(found: Iterable[Record]) -> list[tuple[tuple[str, int, str], list[Record]]]:
    """Records that are to be compared with each other, the best first."""

    def key(record: Record) -> tuple[str, int, str]:
        return record["layer"], record["length"], record["backend"]

    ordered = sorted(found, key=lambda r: (key(r), r["exact_error"]))
    return [(name, list(records)) for name, records in itertools.groupby(ordered, key)]


def front(records: Sequence[Record]) -> list[Record]:
    """Those that no other one beats in both time and error, the fastest first."""
    chosen: list[Record] = []
    for record in sorted(records, key=lambda r: (r["ms_median"], r["exact_error"])):
        if not chosen or record["exact_error"] < chosen[-1]["exact_error"]:
            chosen.append(record)
    return chosen


def settings(record: Record) -> str:
    """What of the sweep matters to a mechanism, as '512 codes, window 128 + 4'."""
    parts = [f"{record['codes_k']} codes"] if MECHANISMS[record["mechanism"]].quantized else []
    if record["mem_len"] or record["n_sink"]:
        parts.append(f"window {record['mem_len']} + {record['n_sink']}")
    return ", ".join(parts)


def _where(record: Record) -> str:
    parts = record["layer"], record["backend"], record["mechanism"], settings(record), record["status"]
    return ", ".join(filter(None, parts))


def _table(records: Sequence[Record]) -> str:
    best = {id(record) for record in front(records)}
    exact = next((r["ms_median"] for r in records if r["mechanism"] == "exact"), None)
    head = ["mechanism", "sizes", "error", "ms", "times faster than exact", "error of q^", "error of k^"]
    rows = []
    for record in records:
        title = MECHANISMS[record["mechanism"]].title
        ratio = "" if exact is None else f"{exact / record['ms_median']:.2f}"
        rows.append(
            [
                f"**{title}**" if id(record) in best else title,
                settings(record),
                _figure(record["exact_error"]),
                f"{record['ms_median']:.2f}",
                ratio,
                *(_figure(record[f"quantize_error_{name}"]) for name in ("q", "k")),
            ]
        )
    return table(head, rows, n_name=2)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


def plot(path: Path, found: Sequence[Record]) -> None:
    """A panel for every layer, backend and length: error against time, its front as a line.

    Exact attention, whose error is rounding, is a vertical line.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = groups(found)
    n_column = min(3, max(len(panels), 1))
    n_row = max(-(-len(panels) // n_column), 1)
    size = (4.6 * n_column, 3.9 * n_row + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(n_row, n_column, squeeze=False)
    sizes = sorted({settings(r) for r in found if r["mechanism"] != "exact"})
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((layer, length, backend), records) in zip(axes.flat, panels, strict=False):
        inexact = [r for r in records if r["mechanism"] != "exact"]
        for r in inexact:
            marker = MARKERS[sizes.index(settings(r)) % len(MARKERS)]
            label = ", ".join(filter(None, (MECHANISMS[r["mechanism"]].title, settings(r))))
            style = {"color": COLORS[r["mechanism"]], "marker": marker, "linestyle": "none", "label": label}
            handles.setdefault(label, axis.plot(r["ms_median"], r["exact_error"], **style)[0])
        best = front(inexact)
        curve = [r["ms_median"] for r in best], [r["exact_error"] for r in best]
        axis.plot(*curve, color="#bbbbbb", linewidth=1, zorder=0)
        for r in records:
            if r["mechanism"] == "exact":
                handles["exact"] = axis.axvline(
                    r["ms_median"], color=COLORS["exact"], label="exact attention"
                )
        axis.set_xscale("log")
        label_log_x(axis)
        if inexact:
            axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        form = "causal" if records[0]["is_causal"] else "not causal"
        axis.set_title(f"{layer}, T {length:,}, {form}, {backend}", fontsize=9)
        axis.set_xlabel("one forward call, ms")
    axes[0][0].set_ylabel("relative RMS error to exact attention")
    if handles:
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=2, fontsize=7)
    figure.savefig(path, dpi=110)
