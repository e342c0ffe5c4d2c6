"""What a run found, for people: a Markdown page, a plot, a summary in JSON."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import fit, plot
from bench.fit import Name
from bench.records import Record
from bench.registry import MECHANISMS

PROVENANCE = (
    *("device_name", "dtype", "input", "batch", "heads", "width", "value_width", "codes_q", "codes_k"),
    *("block_len", "timing", "commit", "versions", "config_hash"),
)


def write(out: Path, found: Sequence[Record], notes: Sequence[str] = ()) -> list[str]:
    """Write scaling.md, scaling.png and summary.json into `out`; lines that say what was written."""
    measured = fit.curves(found)
    lines = []
    try:
        plot.write(out / "scaling.png", found)
        image = "![time against length](scaling.png)"
        lines.append(f"plot: {out / 'scaling.png'}")
    except ImportError:
        image = "No plot: matplotlib is not installed."
        lines.append("no plot: matplotlib is not installed (pip install matplotlib)")
    page = "\n\n".join(section for section in _sections(found, measured, image, notes) if section)
    (out / "scaling.md").write_text(page + "\n", encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")
    return [*lines, f"tables: {out / 'scaling.md'}", f"records: {out / 'records.jsonl'}"]


def summary(found: Sequence[Record]) -> dict[str, Any]:
    """The figures of the report: provenance, fits, ratios, crossovers, skipped points, agreement."""
    measured = fit.curves(found)
    agreement = fit.agreement(found)
    return {
        "provenance": provenance(found),
        "fits": [item._asdict() for item in fit.fits(measured)],
        "ratios": [item._asdict() for item in fit.ratios(measured)],
        "crossovers": [item._asdict() for item in fit.crossovers(measured)],
        "not_measured": [
            {key: record[key] for key in ("backend", "mechanism", "is_causal", "length", "status", "reason")}
            for record in found
            if record["status"] != "ok"
        ],
        "agreement": None if agreement is None else agreement._asdict(),
        "exponent_limit": fit.EXPONENT_LIMIT,
        "verdict": fit.verdict(found),
    }


def provenance(found: Iterable[Record]) -> dict[str, list[Any]]:
    """Every value that the records have of what makes figures comparable."""
    found = list(found)
    values = {key: list(dict.fromkeys(r[key] for r in found if r[key] is not None)) for key in PROVENANCE}
    ran = [record for record in found if record["status"] == "ok"]
    kernels = {f"{r['backend']} {r['mechanism']}: {r['implementation']}" for r in ran}
    return values | {"implementations": sorted(kernels)}


def _sections(
    found: Sequence[Record], measured: dict[Name, dict[int, float]], image: str, notes: Sequence[str]
) -> Iterable[str]:
    yield "# Scaling of attention mechanisms with sequence length"
    yield fit.verdict(found)
    yield "\n".join(f"- {note}" for note in notes)
    yield "\n".join(f"- {key}: {', '.join(map(str, values))}" for key, values in provenance(found).items())
    yield (
        "Milliseconds of one forward call, the median of repeats. Quantization is part of the call. Every "
        "mechanism met the float64 oracle on these inputs before it was timed."
    )
    yield image
    for is_causal in sorted({name[2] for name in measured}):
        yield f"## {'Causal' if is_causal else 'Not causal'}"
        names = [name for name in measured if name[2] == is_causal]
        yield _time_table(measured, names)
        yield _curve_table(measured, names)
    ratios = {(*item[:3], item.length): item.ratio for item in fit.ratios(measured)}
    if ratios:
        yield "## Times faster than exact attention"
        yield _ratio_table(ratios, list(measured))
    yield _not_measured(found)


def _time_table(measured: dict[Name, dict[int, float]], names: Sequence[Name]) -> str:
    lengths = sorted(set().union(*(measured[name] for name in names)))
    rows = [
        [f"{length:,}", *(_milliseconds(measured[name].get(length)) for name in names)] for length in lengths
    ]
    return _table(["tokens", *(f"{mechanism} {backend}" for backend, mechanism, _ in names)], rows)


def _curve_table(measured: dict[Name, dict[int, float]], names: Sequence[Name]) -> str:
    slopes = {item[:3]: item for item in fit.fits(measured)}
    crossings = {item[:3]: item.text for item in fit.crossovers(measured)}
    rows = []
    for name in names:
        item = slopes.get(name)
        slope = f"{item.exponent:.2f}" if item else ""
        over = f"{item.lengths[0]:,} ... {item.lengths[-1]:,}" if item else ""
        rows.append([MECHANISMS[name[1]].title, name[0], slope, over, crossings.get(name, "")])
    return _table(["mechanism", "backend", "exponent", "fitted over", "faster than exact from"], rows)


def _ratio_table(ratios: dict[tuple[Any, ...], float], names: Sequence[Name]) -> str:
    names = [name for name in names if any(key[:3] == name for key in ratios)]
    lengths = sorted({key[3] for key in ratios})
    rows = [[f"{length:,}", *(_ratio(ratios.get((*name, length))) for name in names)] for length in lengths]
    return _table(["tokens", *(f"{fit.curve_name(*name[1:])} {name[0]}" for name in names)], rows)


def _not_measured(found: Sequence[Record]) -> str:
    """Points without a figure, those of one curve and one kind of reason on one line."""
    missing = [record for record in found if record["status"] != "ok"]
    if not missing:
        return ""

    def kind(record: Record) -> tuple[Any, ...]:
        return record["backend"], record["mechanism"], record["is_causal"], record["status"]

    lines = ["## Not measured", ""]
    for (backend, mechanism, is_causal, status), group in itertools.groupby(sorted(missing, key=kind), kind):
        records = sorted(group, key=lambda record: record["length"])
        lengths = ", ".join(f"{record['length']:,}" for record in records)
        curve = fit.curve_name(mechanism, is_causal)
        lines.append(f"- {backend} {curve}, {status} at {lengths}: {records[0]['reason']}")
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, figures to the right of a first column of names."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
