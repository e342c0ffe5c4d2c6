"""The report of the suite 'memory': peaks against length, as compiled and as observed."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import fit, page, plot
from bench.markdown import bullets, mebibytes, table
from bench.records import Record
from bench.registry import MECHANISMS
from bench.report import CALLS, VERIFIED, provenance, provenance_list

TITLES = {
    "peak_bytes": "Peak, MiB: inputs, output and temporaries, as the compiler reserves them (jax), as the "
    "allocator counts them (torch on cuda), as the sum of live storages (torch elsewhere)",
    "observed_bytes": "Observed, MiB: the allocator's peak (cuda), or what the process grew by during a call "
    "(cpu), inputs not counted",
    "temp_bytes": "Temporaries, MiB, as the compiler reserves them",
}


class Growth(NamedTuple):
    """`bytes ~ T ** exponent` over `lengths`."""

    figure: str  # a key of `TITLES`
    direction: str
    backend: str
    mechanism: str
    is_causal: bool
    exponent: float
    lengths: tuple[int, ...]


def curves(found: Iterable[Record], figure: str, direction: str) -> dict[fit.Name, dict[int, int]]:
    """Bytes by length of every curve, where there are any."""
    of_direction = (r for r in found if r["direction"] == direction and r[figure])
    return fit.curves(of_direction, figure)


def growths(found: Sequence[Record]) -> list[Growth]:
    """The exponent of every figure of every curve."""
    return [
        Growth(figure, direction, *item)
        for direction in _directions(found)
        for figure in TITLES
        for item in fit.fits(curves(found, figure, direction))
    ]


def write(out: Path, found: Sequence[Record], notes: Sequence[str]) -> list[str]:
    """Write memory.md, memory.png and summary.json into `out`; lines that say so, and the verdict."""
    verdicts = [f"{direction}: {_verdict(found, direction)}" for direction in _directions(found)]
    verdict = "; ".join(verdicts) or fit.verdict(found)
    image, line = page.image(out / "memory.png", "memory against length", lambda path: _plot(path, found))
    missing = page.not_measured(found, _where)
    page.write(out / "memory.md", [*_head(found, notes, verdict), image, *_tables(found), missing])
    summary = {
        "provenance": provenance(found),
        "growth": [item._asdict() for item in growths(found)],
        "verdict": verdict,
    }
    page.summarize(out, summary)
    return [line, f"tables: {out / 'memory.md'}", f"records: {out / 'records.jsonl'}", verdict]


def _directions(found: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(r["direction"] for r in found))


def _verdict(found: Sequence[Record], direction: str) -> str:
    return fit.verdict([r for r in found if r["direction"] == direction], has_exponents=False)


def _head(found: Sequence[Record], notes: Sequence[str], verdict: str) -> Iterator[str]:
    yield "# Memory of attention mechanisms against sequence length"
    yield verdict
    yield bullets(notes)
    yield provenance_list(found)
    yield f"Most bytes in use at once in one call. {VERIFIED}"


def _tables(found: Sequence[Record]) -> Iterator[str]:
    slopes = {item[:5]: item for item in growths(found)}
    for direction in _directions(found):
        for is_causal in (False, True):
            tables = {
                figure: {
                    name: curve
                    for name, curve in curves(found, figure, direction).items()
                    if name[2] == is_causal
                }
                for figure in TITLES
            }
            if any(tables.values()):
                yield f"## {CALLS[direction].capitalize()}, {'causal' if is_causal else 'not causal'}"
            for figure, of_name in tables.items():
                if of_name:
                    yield f"{TITLES[figure]}:"
                    yield _table(of_name, [slopes.get((figure, direction, *name)) for name in of_name])


def _table(of_name: dict[fit.Name, dict[int, int]], slopes: Sequence[Growth | None]) -> str:
    """A column per curve; the last row has the exponents."""
    lengths = sorted(set().union(*of_name.values()))
    rows = [
        [f"{length:,}", *(mebibytes(curve.get(length)) for curve in of_name.values())] for length in lengths
    ]
    rows.append(["grows as", *("" if item is None else f"T^{item.exponent:.2f}" for item in slopes)])
    return table(["tokens", *(f"{mechanism} {backend}" for backend, mechanism, _ in of_name)], rows)


def _where(r: Record) -> str:
    curve = fit.curve_name(r["mechanism"], r["is_causal"])
    return f"{r['backend']} {curve} {r['direction']}, {r['status']} at {r['length']:,}"


def _plot(path: Path, found: Sequence[Record]) -> None:
    """A row per direction, a column per form; peaks as lines, what was observed as dots.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    directions = _directions(found) or ["fwd"]
    forms = sorted({r["is_causal"] for r in found if r["status"] == "ok"}) or [False]
    figure = Figure(figsize=(6.2 * len(forms), 4.6 * len(directions)), layout="constrained")
    panels = figure.subplots(len(directions), len(forms), sharex=True, squeeze=False)
    for row, direction in zip(panels, directions, strict=True):
        for panel, is_causal in zip(row, forms, strict=True):
            _panel(panel, found, direction, is_causal)
        row[0].set_ylabel(f"{direction}: MiB (dotted: observed)")
    for panel in panels[-1]:
        panel.set_xlabel("sequence length T, tokens")
    figure.suptitle(plot.subtitle(found), fontsize=9)
    figure.savefig(path, dpi=150)


def _panel(panel: Any, found: Sequence[Record], direction: str, is_causal: bool) -> None:
    lengths: set[int] = set()
    for figure in ("peak_bytes", "observed_bytes"):
        for (framework, mechanism, form), curve in curves(found, figure, direction).items():
            if form != is_causal:
                continue
            lengths |= curve.keys()
            line, marker = plot.STYLES[framework]
            is_peak = figure == "peak_bytes"
            panel.loglog(
                list(curve),
                [n_bytes / 2**20 for n_bytes in curve.values()],
                line if is_peak else ":",
                marker=marker,
                markersize=4 if is_peak else 2,
                color=plot.COLORS[mechanism],
                label=f"{MECHANISMS[mechanism].title}, {framework}" if is_peak else None,
            )
    panel.set_title("causal" if is_causal else "not causal")
    panel.set_xticks(sorted(lengths), [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in sorted(lengths)])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7)
