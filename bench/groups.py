"""Records of any files in groups that belong in one table, and the curves of a group."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bench import fit, sources
from bench.records import Record
from bench.registry import MECHANISMS, position
from bench.sources import Source

SETTING = ("device_name", "dtype", "direction", "input", "batch", "heads", "width", "value_width")
VARIANTS = ("codes_q", "codes_k", "block_len", "mem_len", "n_sink", "layer")
SHORT = {"batch": "B", "heads": "H", "width": "D", "value_width": "V", "input": "input"}


class Curve(NamedTuple):
    """One mechanism of one backend and form; `variant` says what else sets it apart in its group."""

    backend: str
    mechanism: str
    is_causal: bool
    variant: str
    points: dict[int, Record]  # by tokens, or by codes in the suite 'codebook'

    @property
    def label(self) -> str:
        """As 'vq_qk jax' or 'vq_qk jax, codes_k 512'."""
        return f"{self.mechanism} {self.backend}{', ' if self.variant else ''}{self.variant}"

    def values(self, read: Callable[[Record], float | None]) -> dict[int, float]:
        """A figure of every point that has it."""
        found = {x: read(record) for x, record in self.points.items()}
        return {x: value for x, value in found.items() if value is not None}

    @property
    def ms(self) -> dict[int, float]:
        """Median milliseconds of every point."""
        return self.values(lambda record: record["ms_median"])


class Group(NamedTuple):
    """Records of one file, suite, device, dtype, direction and shape: only these share a table."""

    source: Source
    suite: str
    records: tuple[Record, ...]

    @property
    def title(self) -> str:
        """Its setting and its file."""
        r = self.records[0]
        shape = ", ".join(f"{SHORT[key]} {r[key]}" for key in SETTING if key in SHORT)
        return f"{r['device_name']}, {r['dtype']}, {r['direction']}, {shape} ({self.source.name})"

    @property
    def x_key(self) -> str:
        """What runs along its curves."""
        return "codes_k" if self.suite == "codebook" else "length"

    @property
    def forms(self) -> list[bool]:
        """Causal or not, of what has a figure."""
        return sorted({record["is_causal"] for record in self.records if record["status"] == "ok"})

    def curves(self, is_causal: bool) -> list[Curve]:
        """All curves of a form, in the order of the registry."""
        measured = [r for r in self.records if r["status"] == "ok" and r["is_causal"] == is_causal]
        found: dict[tuple[str, str, str], dict[int, Record]] = {}
        for record in sorted(measured, key=lambda r: (position(r["mechanism"]), r["backend"], r[self.x_key])):
            alike = [r for r in measured if r["mechanism"] == record["mechanism"]]
            name = record["mechanism"], record["backend"], self._variant(record, alike)
            found.setdefault(name, {})[record[self.x_key]] = record
        return [Curve(name[1], name[0], is_causal, name[2], points) for name, points in found.items()]

    def _variant(self, record: Record, alike: Sequence[Record]) -> str:
        along = {"codes_q", "codes_k"} if self.suite == "codebook" else set()
        varying = [key for key in sources.shared(alike, VARIANTS)[1] if key not in along]
        if self.suite == "codebook":
            varying += sources.shared(alike, ("length",))[1]
        elif not varying:
            varying = sources.shared(alike, ("config_hash",))[1]
        if {"codes_q", "codes_k"} <= set(varying) and record["codes_q"] == record["codes_k"]:
            varying.remove("codes_q")
        return ", ".join(f"{key} {record[key]}" for key in varying)

    def exact_ms(self, record: Record) -> float | None:
        """Of exact attention beside a record: what it says itself, or its file's own measurement."""
        if record["exact_ms"] is not None:
            return float(record["exact_ms"])
        keys = ("backend", "is_causal", "length", "layer")
        beside = [
            r["ms_median"]
            for r in self.records
            if r["mechanism"] == "exact" and r["status"] == "ok" and all(r[k] == record[k] for k in keys)
        ]
        return beside[-1] if beside else None

    def faster(self, record: Record) -> float | None:
        """Time of exact attention over that of a record; None for exact attention or without a figure."""
        exact = None if record["mechanism"].startswith("exact") else self.exact_ms(record)
        return exact / record["ms_median"] if exact and record["ms_median"] else None

    def crossover(self, curve: Curve) -> str:
        """From which length on a curve is faster than exact attention, for people."""
        exact = curve.values(self.exact_ms)
        if curve.mechanism.startswith("exact") or self.x_key != "length":
            return ""
        name, beside = (curve.backend, curve.mechanism, True), (curve.backend, "exact", True)
        return fit.crossovers({name: curve.ms, beside: exact})[0].text


def groups(found: Iterable[Source]) -> dict[str, list[Group]]:
    """All groups by suite, in the order of the files."""
    by_setting: dict[tuple[Any, ...], list[Record]] = {}
    of_path = {}
    for source in found:
        of_path[source.path] = source
        for record in source.records:
            setting = tuple(record[key] for key in SETTING)
            by_setting.setdefault((record["suite"], source.path, setting), []).append(record)
    by_suite: dict[str, list[Group]] = {}
    for (suite, path, _), records in by_setting.items():
        by_suite.setdefault(suite, []).append(Group(of_path[path], suite, tuple(records)))
    return by_suite


def title(mechanism: str) -> str:
    """As the registry names it, or as it is called."""
    return MECHANISMS[mechanism].title if mechanism in MECHANISMS else mechanism
