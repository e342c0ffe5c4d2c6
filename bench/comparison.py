"""Two result files side by side: which measurement became faster, which slower, by more than its spread."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bench import markdown, sources
from bench.records import Record
from bench.sources import Source

# What makes two records the same measurement, whenever and from whichever commit they are.
SAME = (
    *("suite", "backend", "device_name", "mechanism", "is_causal", "direction", "dtype", "input", "layer"),
    *("batch", "heads", "width", "value_width", "codes_q", "codes_k", "block_len", "mem_len", "n_sink"),
    "length",
)
NAMES = {"is_causal": "form", "length": "tokens", "device_name": "device"}

Key = tuple[Any, ...]


class Pair(NamedTuple):
    """One measurement of both files."""

    a: Record
    b: Record

    @property
    def ratio(self) -> float | None:
        """Median time of B over that of A; None where one has none."""
        return _over(self.a["ms_median"], self.b["ms_median"]) if self.is_measured else None

    @property
    def is_measured(self) -> bool:
        return bool(self.a["status"] == self.b["status"] == "ok")

    @property
    def verdict(self) -> str:
        """'faster' or 'slower' where 20th to 80th percentiles of A and B do not overlap."""
        if not self.is_measured:
            return "; ".join(f"{name} {_reason(r)}" for name, r in self._named() if r["status"] != "ok")
        spreads = [r[key] for r in self for key in ("ms_p20", "ms_p80")]
        if None in spreads:
            return "no spread recorded"
        if self.b["ms_p80"] < self.a["ms_p20"]:
            return "faster"
        return "slower" if self.b["ms_p20"] > self.a["ms_p80"] else "within the spread"

    def _named(self) -> Iterable[tuple[str, Record]]:
        return zip("AB", self, strict=True)


class Comparison(NamedTuple):
    """What two files have in common, and what either has alone."""

    a: Source
    b: Source
    pairs: tuple[Pair, ...]
    only_a: tuple[Record, ...]
    only_b: tuple[Record, ...]
    notes: tuple[str, ...]


def compare(a: Source, b: Source) -> Comparison:
    """Match the records of two files.

    Raises:
      ValueError: they have no measurement in common.
    """
    of_a, of_b = _by_key(a), _by_key(b)
    both = sorted(of_a.keys() & of_b.keys(), key=lambda key: [(value is not None, value) for value in key])
    pairs = tuple(Pair(of_a[key], of_b[key]) for key in both)
    if not pairs:
        raise ValueError(f"no measurement of {a.path} is in {b.path} too: {_difference(a, b)}")
    return Comparison(
        a,
        b,
        pairs,
        tuple(record for key, record in of_a.items() if key not in of_b),
        tuple(record for key, record in of_b.items() if key not in of_a),
        tuple(_notes(a, b, pairs, {a.path: len(of_a), b.path: len(of_b)})),
    )


def page(found: Comparison) -> str:
    """The comparison in Markdown."""
    same, varying = sources.shared([record for pair in found.pairs for record in pair], SAME)
    sections = [
        f"# B over A\n\n- A: {_origin(found.a)}\n- B: {_origin(found.b)}",
        "; ".join(f"{NAMES.get(key, key)} {_value(key, value)}" for key, value in same.items() if value),
        _summary(found.pairs),
        "\n".join(f"- {note}" for note in found.notes),
        _table(found.pairs, varying),
        _alone("A", found.only_a),
        _alone("B", found.only_b),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _by_key(source: Source) -> dict[Key, Record]:
    """The last record of every measurement."""
    return {tuple(record[key] for key in SAME): record for record in source.records}


def _difference(a: Source, b: Source) -> str:
    """In which keys no value of A is one of B."""
    apart = []
    for key in SAME:
        values = [sorted({str(record[key]) for record in source.records}) for source in (a, b)]
        if not set(values[0]) & set(values[1]):
            apart.append(f"{key} is {', '.join(values[0])} in A and {', '.join(values[1])} in B")
    return "; ".join(apart) or "shapes, mechanisms and lengths combine differently"


def _notes(a: Source, b: Source, pairs: Sequence[Pair], n_measurement: Mapping[Any, int]) -> Iterable[str]:
    apart = sum(pair.a["config_hash"] != pair.b["config_hash"] for pair in pairs)
    if apart:
        yield (
            f"config_hash differs in {apart} of {len(pairs)} pairs: a setting that no key names "
            f"(repeats, HyperAttention's sizes, the seed, ...) is another one"
        )
    kernels = [pair for pair in pairs if pair.is_measured and _kernels(pair)[0] != _kernels(pair)[1]]
    yield from dict.fromkeys(
        f"{pair.a['backend']} {pair.a['mechanism']} ran {' in A and '.join(_kernels(pair))} in B"
        for pair in kernels
    )
    for name, source in (("A", a), ("B", b)):
        n_double = len(source.records) - n_measurement[source.path]
        if n_double:
            yield f"{name} has {n_double} of its points more than once, by config_hash: the last one counts"


def _kernels(pair: Pair) -> tuple[str, str]:
    return str(pair.a["implementation"]), str(pair.b["implementation"])


def _summary(pairs: Sequence[Pair]) -> str:
    ratios = [pair.ratio for pair in pairs if pair.ratio]
    if not ratios:
        return "No measurement has a figure in both."
    verdicts = [pair.verdict for pair in pairs if pair.is_measured]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return (
        f"{len(verdicts)} measurements in both: {counts}. Geometric mean of the ratios of time: {mean:.3f}. "
        f"Faster and slower: 20th to 80th percentiles do not overlap."
    )


def _table(pairs: Sequence[Pair], varying: Sequence[str]) -> str:
    head = [NAMES.get(key, key) for key in varying]
    head += ["A, ms", "B, ms", "B / A", "B is", "peak A, MiB", "peak B, MiB", "peak B / A"]
    head += ["error A", "error B"]
    rows = [
        [
            *(_value(key, pair.a[key]) for key in varying),
            *(markdown.milliseconds(r["ms_median"]) for r in pair),
            "" if pair.ratio is None else f"{pair.ratio:.3f}",
            pair.verdict,
            *(markdown.mebibytes(r["peak_bytes"]) for r in pair),
            markdown.ratio(_over(pair.a["peak_bytes"], pair.b["peak_bytes"])),
            *(markdown.error(r["exact_error"]) for r in pair),
        ]
        for pair in pairs
    ]
    return markdown.filled(head, rows)


def _over(a: float | None, b: float | None) -> float | None:
    return None if not a or b is None else b / a


def _value(key: str, value: Any) -> str:
    if key == "is_causal":
        return "causal" if value else "full"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def _reason(record: Record) -> str:
    return f"{record['status']}: {record['reason']}"


def _origin(source: Source) -> str:
    """A file with the commits and versions of its records."""
    same = [dict.fromkeys(str(record[key]) for record in source.records) for key in ("commit", "versions")]
    return f"{source.name}, commit {', '.join(same[0])}, {'; '.join(same[1])}"


def _alone(name: str, found: Sequence[Record]) -> str:
    """What one file alone has, one line for every curve."""
    if not found:
        return ""
    varying = [key for key in sources.shared(found, SAME)[1] if key != "length"]
    curves: dict[str, list[int]] = {}
    for record in found:
        keys = dict.fromkeys(("backend", "mechanism", "is_causal", *varying))
        label = " ".join(_value(key, record[key]) for key in keys if record[key] is not None)
        curves.setdefault(label, []).append(record["length"])
    lines = [
        f"- {label}: {', '.join(f'{T:,}' for T in sorted(lengths))}" for label, lengths in curves.items()
    ]
    return f"## Only in {name}\n\n" + "\n".join(lines)
