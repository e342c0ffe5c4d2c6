"""What a run found, for people: a Markdown page, a plot, a summary in JSON."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import fit, page, plot
from bench.fit import Name
from bench.markdown import bullets, milliseconds, ratio, table
from bench.records import Record
from bench.registry import MECHANISMS

PROVENANCE = (
    *("device_name", "dtype", "input", "direction", "batch", "heads", "width", "value_width"),
    *("codes_q", "codes_k", "block_len", "timing", "commit", "versions", "config_hash"),
)


class Wording(NamedTuple):
    """How a suite is told of."""

    title: str
    image: str
    figures: str  # what the tables hold; `{call}` is what is timed


CALLS = {
    "fwd": "forward call",
    "bwd": "backward pass, on what the forward pass before it saved",
    "fwd+bwd": "forward and backward pass together",
}
VERIFIED = "Every mechanism met the float64 oracle on these inputs before it was timed."
WORDING = {
    "scaling": Wording(
        "Scaling of attention mechanisms with sequence length",
        "time against length",
        "Milliseconds of one {call}, the median of repeats. Quantization is part of a forward call. "
        + VERIFIED,
    ),
    "decode": Wording(
        "Decoding: one token against the context before it",
        "time per token against context",
        "Milliseconds of one token, the median of repeats (20th and 80th percentile in brackets), its "
        "quantization and what it adds to the state or the cache included. A context of T is T tokens with "
        f"the one that is timed. {VERIFIED}",
    ),
}


def write(out: Path, found: Sequence[Record], notes: Sequence[str] = (), suite: str = "scaling") -> list[str]:
    """Write the suite's .md and .png and summary.json into `out`; lines that say what was written."""
    image, line = page.image(out / f"{suite}.png", WORDING[suite].image, lambda path: plot.write(path, found))
    page.write(out / f"{suite}.md", _sections(found, fit.curves(found), image, notes, suite))
    page.summarize(out, summary(found))
    return [
        line,
        *memory_lines(found),
        f"tables: {out / f'{suite}.md'}",
        f"records: {out / 'records.jsonl'}",
    ]


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
        "state_bytes": [item._asdict() for item in states(found)],
        "verdict": fit.verdict(found),
    }


def provenance(found: Iterable[Record]) -> dict[str, list[Any]]:
    """Every value that the records have of what makes figures comparable."""
    found = list(found)
    values = {key: list(dict.fromkeys(r[key] for r in found if r[key] is not None)) for key in PROVENANCE}
    ran = [record for record in found if record["status"] == "ok"]
    kernels = {f"{r['backend']} {r['mechanism']}: {r['implementation']}" for r in ran}
    return values | {"implementations": sorted(kernels)}


def provenance_list(found: Iterable[Record], keys: Collection[str] | None = None) -> str:
    """`provenance` in Markdown, of `keys` or whole."""
    values = provenance(found)
    return bullets(f"{key}: {', '.join(map(str, values[key]))}" for key in values if not keys or key in keys)


def _sections(
    found: Sequence[Record],
    measured: dict[Name, dict[int, float]],
    image: str,
    notes: Sequence[str],
    suite: str,
) -> Iterable[str]:
    wording = WORDING[suite]
    direction = found[0]["direction"] if found else "fwd"
    yield f"# {wording.title}"
    yield fit.verdict(found)
    yield bullets(notes)
    yield provenance_list(found)
    yield wording.figures.format(call=CALLS.get(direction, ""))
    compared = [record["row_error"] for record in found if record["row_error"] is not None]
    if compared:
        worst = f"{max(compared):.1e}"
        yield f"Rows of the output at each length: relative RMS error to float64 of at most {worst}."
    yield image
    for is_causal in sorted({name[2] for name in measured}):
        names = [name for name in measured if name[2] == is_causal]
        if suite == "decode":
            yield "## Milliseconds of a token"
            yield _token_table(found, names)
        else:
            yield f"## {'Causal' if is_causal else 'Not causal'}"
            yield _time_table(measured, names)
        yield _curve_table(measured, names)
    ratios = {(*item[:3], item.length): item.ratio for item in fit.ratios(measured)}
    if ratios:
        yield "## Times faster than exact attention"
        yield _ratio_table(ratios, list(measured))
    kept = memory_lines(found)
    if kept:
        yield "## Bytes kept between tokens"
        yield bullets(kept)
    yield not_measured(found)


class State(NamedTuple):
    """What a stream keeps between two tokens."""

    backend: str
    mechanism: str
    n_bytes: dict[int, int]  # by context


def states(found: Iterable[Record]) -> list[State]:
    """Of all that was measured token by token."""
    n_bytes: dict[tuple[str, str], dict[int, int]] = {}
    for record in sorted(found, key=lambda r: r["length"]):
        if record["state_bytes"] is not None and record["status"] == "ok":
            n_bytes.setdefault((record["backend"], record["mechanism"]), {})[record["length"]] = record[
                "state_bytes"
            ]
    return [State(*name, of_length) for name, of_length in n_bytes.items()]


def memory_lines(found: Iterable[Record]) -> list[str]:
    """A line for every stream: its bytes, or those of its shortest and longest context."""
    lines = []
    for backend, mechanism, n_bytes in states(found):
        kind = "cache of keys and values" if mechanism == "exact" else "state"
        low, high = min(n_bytes), max(n_bytes)
        text = f"{n_bytes[low]:,} bytes at every length"
        if len(set(n_bytes.values())) > 1:
            text = f"{n_bytes[low]:,} bytes at {low:,} tokens, {n_bytes[high]:,} at {high:,}"
        lines.append(f"{backend} {mechanism} {kind}: {text}")
    return lines


def _token_table(found: Sequence[Record], names: Sequence[Name]) -> str:
    """Time of a token with its spread, and the bytes of the cache that exact attention needs."""
    cells = {
        (r["backend"], r["mechanism"], r["length"]): f"{milliseconds(r['ms_median'])} "
        f"({milliseconds(r['ms_p20'])} ... {milliseconds(r['ms_p80'])})"
        for r in found
        if r["status"] == "ok"
    }
    caches = {r["length"]: r["state_bytes"] for r in found if r["mechanism"] == "exact" and r["state_bytes"]}
    lengths = sorted({length for *_, length in cells})
    rows = [
        [
            f"{length:,}",
            f"{caches[length]:,}" if length in caches else "",
            *(cells.get((*name[:2], length), "") for name in names),
        ]
        for length in lengths
    ]
    return table(
        ["context", "cache, bytes", *(f"{mechanism} {backend}" for backend, mechanism, _ in names)], rows
    )


def _time_table(measured: dict[Name, dict[int, float]], names: Sequence[Name]) -> str:
    lengths = sorted(set().union(*(measured[name] for name in names)))
    rows = [
        [f"{length:,}", *(milliseconds(measured[name].get(length)) for name in names)] for length in lengths
    ]
    return table(["tokens", *(f"{mechanism} {backend}" for backend, mechanism, _ in names)], rows)


def _curve_table(measured: dict[Name, dict[int, float]], names: Sequence[Name]) -> str:
    slopes = {item[:3]: item for item in fit.fits(measured)}
    crossings = {item[:3]: item.text for item in fit.crossovers(measured)}
    rows = []
    for name in names:
        item = slopes.get(name)
        slope = f"{item.exponent:.2f}" if item else ""
        over = f"{item.lengths[0]:,} ... {item.lengths[-1]:,}" if item else ""
        rows.append([MECHANISMS[name[1]].title, name[0], slope, over, crossings.get(name, "")])
    return table(["mechanism", "backend", "exponent", "fitted over", "faster than exact from"], rows)


def _ratio_table(ratios: dict[tuple[Any, ...], float], names: Sequence[Name]) -> str:
    names = [name for name in names if any(key[:3] == name for key in ratios)]
    lengths = sorted({key[3] for key in ratios})
    rows = [[f"{length:,}", *(ratio(ratios.get((*name, length))) for name in names)] for length in lengths]
    return table(["tokens", *(f"{fit.curve_name(*name[1:])} {name[0]}" for name in names)], rows)


def not_measured(found: Sequence[Record]) -> str:
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
