"""Sections of a report: a group's tables, and where every figure is from."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from bench import fit, markdown, report, sources
from bench.groups import Curve, Group, title
from bench.markdown import milliseconds
from bench.records import Record
from bench.sources import Source

FORMS = {True: "Causal", False: "Not causal"}
X_NAMES = {"length": "tokens", "codes_k": "codes"}


def provenance(found: Sequence[Source]) -> str:
    """A row for every file: what it holds, and the device, commit, versions and settings behind it."""
    keys = ("suite", "device_name", "dtype", "direction", "config_hash", "commit", "versions")
    rows = []
    for source in found:
        values = [", ".join(dict.fromkeys(str(r[key]) for r in source.records)) for key in keys]
        n_ok = sum(record["status"] == "ok" for record in source.records)
        same, varying = sources.shared(
            source.records, ("batch", "heads", "width", "value_width", "codes_k", "block_len", "input")
        )
        config = [f"{key} {value}" for key, value in same.items()] + [f"{key} varies" for key in varying]
        times = sorted(str(record["time"]) for record in source.records)
        measured = f"{n_ok} of {len(source.records)}"
        rows.append(
            [source.name, values[0], measured, *values[1:4], ", ".join(config), *values[4:], times[-1]]
        )
    head = ["file", "suite", "measured", "device", "dtype", "direction", "setting", "config_hash", "commit"]
    return markdown.table([*head, "versions", "newest record"], rows)


def section(group: Group) -> Iterable[str]:
    """The tables of a group."""
    yield f"### {group.title}"
    if group.suite != "codebook":
        yield fit.verdict(group.records) + "."
    for is_causal in group.forms:
        curves = group.curves(is_causal)
        yield f"#### {FORMS[is_causal]}"
        if group.suite == "accuracy":
            yield _trade(group, curves)
        elif group.suite == "memory":
            yield "Peak, MiB:"
            yield _matrix(group, curves, lambda r: r["peak_bytes"], markdown.mebibytes)
        else:
            yield "Milliseconds:"
            yield _matrix(group, curves, lambda r: r["ms_median"], milliseconds)
        if group.x_key == "length" and group.suite != "accuracy":
            yield _exponents(group, curves)
        if group.suite in ("scaling", "decode") and any(map(group.faster, group.records)):
            yield "Times faster than exact attention, in the same run:"
            beside = [curve for curve in curves if curve.values(group.faster)]
            yield _matrix(group, beside, group.faster, markdown.ratio)
        yield "Every point:"
        yield _points(group, curves)
    yield report.not_measured(group.records).replace("## ", "#### ", 1)


def _matrix(
    group: Group,
    curves: Sequence[Curve],
    read: Callable[[Record], float | None],
    write: Callable[[float | None], str],
) -> str:
    columns = [curve.values(read) for curve in curves]
    places = sorted({x for column in columns for x in column})
    rows = [[f"{x:,}", *(write(column.get(x)) for column in columns)] for x in places]
    return markdown.table([X_NAMES[group.x_key], *(curve.label for curve in curves)], rows)


def _exponents(group: Group, curves: Sequence[Curve]) -> str:
    """How figures grow with length, and from where on a mechanism is faster than exact attention."""
    rows = []
    for curve in curves:
        growth = [_growth(curve.values(read)) for read in (_ms, _peak)]
        row = [title(curve.mechanism), curve.backend, curve.variant, *growth, group.crossover(curve)]
        rows.append(row)
    head = ["mechanism", "backend", "variant", "exponent of time", "exponent of peak bytes"]
    return markdown.filled([*head, "faster than exact from"], rows)


def _ms(record: Record) -> float | None:
    return record["ms_median"]


def _peak(record: Record) -> float | None:
    return record["peak_bytes"]


def _growth(values: dict[int, float]) -> str:
    """'0.97 (4,096 ... 262,144)', fitted as in every other table."""
    lengths = fit.fit_lengths(x for x, value in values.items() if value > 0)
    if len(lengths) < 2:
        return ""
    slope = fit.exponent(lengths, [values[x] for x in lengths])
    return f"{slope:.2f} ({lengths[0]:,} ... {lengths[-1]:,})"


def _points(group: Group, curves: Sequence[Curve]) -> str:
    head = ["mechanism", "backend", "variant", "kernel", "tokens", "codes", "ms (p20 ... p80)"]
    head += ["times faster than exact", "finding codes, ms", "dispatch, ms", "floor, ms", "floor / time"]
    head += ["GB/s", "of copy", "TFLOP/s", "of matmul", "peak, MiB", "compiler's temporaries, MiB"]
    head += ["observed, MiB", "state, bytes", "error of q", "error of k", "error to exact", "error of rows"]
    points = [(curve, record) for curve in curves for record in curve.points.values()]
    rows = [[curve.mechanism, curve.backend, curve.variant, *_cells(group, r)] for curve, r in points]
    return markdown.filled(head, rows)


def _cells(group: Group, r: Record) -> list[str]:
    second = r["ms_median"] / 1e3
    bandwidth = _over(r["definition_bytes"], 1e9 * second)
    rate = _over(r["definition_flops"], 1e12 * second)
    spread = " ... ".join(milliseconds(r[key]) for key in ("ms_p20", "ms_p80"))
    return [
        str(r["implementation"] or ""),
        f"{r['length']:,}",
        f"{r['codes_k']:,}" if group.x_key == "codes_k" else "",
        f"{milliseconds(r['ms_median'])} ({spread})",
        markdown.ratio(group.faster(r)),
        *(milliseconds(r[key]) for key in ("quantize_ms", "dispatch_ms", "floor_ms")),
        markdown.percent(_over(r["floor_ms"], r["ms_median"])),
        milliseconds(bandwidth),
        markdown.percent(_over(bandwidth, r["copy_gb_s"])),
        milliseconds(rate),
        markdown.percent(_over(rate, r["matmul_tflop_s"])),
        *(markdown.mebibytes(r[key]) for key in ("peak_bytes", "temp_bytes", "observed_bytes")),
        markdown.count(r["state_bytes"]),
        *(markdown.error(r[key]) for key in ("quantize_error_q", "quantize_error_k")),
        *(markdown.error(r[key]) for key in ("exact_error", "row_error")),
    ]


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def trade(group: Group, curves: Iterable[Curve]) -> dict[tuple[str, int], list[Record]]:
    """Records with an error to exact attention by curve, whatever the layer, and length."""
    found: dict[tuple[str, int], list[Record]] = {}
    for curve in curves:
        for record in curve.points.values():
            if record["exact_error"] is not None:
                found.setdefault((_without_layer(curve), record["length"]), []).append(record)
    return found


def _without_layer(curve: Curve) -> str:
    parts = [part for part in curve.label.split(", ") if not part.startswith("layer ")]
    return ", ".join(parts)


def median(found: Iterable[Record], key: str) -> float:
    """Of a figure that all have."""
    return float(statistics.median(record[key] for record in found))


def _trade(group: Group, curves: Sequence[Curve]) -> str:
    """Error against time; what no other mechanism beats in both is marked."""
    found = trade(group, curves)
    figures = {name: (median(of, "ms_median"), median(of, "exact_error")) for name, of in found.items()}
    rows = []
    for (label, length), of in sorted(found.items(), key=lambda item: (item[0][1], figures[item[0]])):
        ms, error = figures[label, length]
        rivals = [figures[name] for name in figures if name[1] == length and name != (label, length)]
        is_beaten = any(t <= ms and e <= error and (t, e) != (ms, error) for t, e in rivals)
        spread = [pick(record["exact_error"] for record in of) for pick in (min, max)]
        faster = [value for value in map(group.faster, of) if value]
        rows.append(
            [
                label,
                f"{length:,}",
                f"{len(of)}",
                markdown.error(error),
                " ... ".join(map(markdown.error, spread)),
                milliseconds(ms),
                markdown.ratio(statistics.median(faster) if faster else None),
                "" if is_beaten else "yes",
            ]
        )
    head = ["mechanism", "tokens", "layers", "median error", "least ... most", "median ms"]
    return markdown.filled([*head, "times faster than exact", "beaten by none"], rows)
