"""The record file of one run: what is done already, what is added, what the report is about."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench import host, records
from bench.job import DIRECTIONS, Job, Point
from bench.records import Record

# What a record takes from its job as it is.
SHAPE = frozenset(
    (
        *("dtype", "batch", "heads", "width", "value_width"),
        *("codes_q", "codes_k", "block_len", "input", "layer"),
    )
)


class Ledger:
    """Writes the records of one job and suite, and finds those of an earlier run.

    Args:
      path: of the .jsonl file.
      suite: name of the suite.
      job: what is measured.
      direction: of all its points.
      is_resume: go on with the file; otherwise it is moved aside.
    """

    def __init__(
        self, path: Path, suite: str, job: Job, *, direction: str = DIRECTIONS[0], is_resume: bool
    ) -> None:
        self.path, self.suite, self.job, self.direction = path, suite, job, direction
        self.notes: list[str] = []
        self.devices: dict[str, tuple[str, str]] = {}
        self._provenance = {"commit": host.commit(), "versions": host.versions()}
        if is_resume:
            if records.repair(path):
                self.notes.append(f"{path}: a torn last line was dropped")
        elif path.exists():
            old = path.with_name("records.old.jsonl")
            path.replace(old)
            self.notes.append(
                f"a new run; {old} has the records of the one before (--resume goes on with them)"
            )

    def set_device(self, backend: str, device: str, device_name: str) -> None:
        """Say what a backend runs on: a record of another device is another measurement."""
        self.devices[backend] = device, device_name

    def device(self, backend: str) -> str:
        """Name of the device that a backend runs on."""
        return self.devices[backend][1]

    def join_exact(self) -> None:
        """Write the time of exact attention into every record of this run that it was measured beside."""
        ok = [record for record in self.current() if record["status"] == "ok"]
        exact = {_pair(record): record["ms_median"] for record in ok if record["mechanism"] == "exact"}
        ids = {records.identity(record) for record in ok}
        found = records.read(self.path)
        joined = [r | {"exact_ms": exact.get(_pair(r))} if records.identity(r) in ids else r for r in found]
        if joined != found:
            records.rewrite(self.path, joined)

    def current(self) -> list[Record]:
        """The newest record of every point of this job on these devices."""
        return [
            record
            for record in records.latest(records.read(self.path))
            if (record["suite"], record["direction"]) == (self.suite, self.direction)
            and record["config_hash"] == self.job.digest
            and (record["device"], record["device_name"]) == self.devices.get(record["backend"])
        ]

    def done(self) -> dict[tuple[Any, ...], Record]:
        """The measured points, by identity."""
        return {records.identity(record): record for record in self.current() if record["status"] == "ok"}

    def identity(self, backend: str, point: Point) -> tuple[Any, ...]:
        """Of the record that a point would get."""
        return records.identity(self._base(backend, point))

    def add(self, backend: str, point: Point, *outcomes: Mapping[str, Any]) -> None:
        """Append the record of a point; of `outcomes` only `KEYS` are kept, later ones win."""
        found: Record = dict.fromkeys(records.KEYS)
        for outcome in outcomes:
            found |= {key: value for key, value in outcome.items() if key in records.KEYS}
        found |= self._base(backend, point) | self._provenance
        found["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        records.append(self.path, found)

    def _base(self, backend: str, point: Point) -> Record:
        device, device_name = self.devices[backend]
        shape = {key: value for key, value in self.job.to_json().items() if key in SHAPE}
        mem_len, n_sink = self.job.window(point.mechanism)
        return shape | {
            "mem_len": mem_len,
            "n_sink": n_sink,
            "suite": self.suite,
            "backend": backend,
            "device": device,
            "device_name": device_name,
            **point._asdict(),
            "config_hash": self.job.digest,
        }


def _pair(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record has in common with that of exact attention to the same inputs."""
    return tuple(record[key] for key in ("backend", "is_causal", "direction", "length", "commit"))


def refusals(found: Iterable[Record]) -> list[Record]:
    """Records of mechanisms that failed verification."""
    return [r for r in found if r["status"] == "failed" and str(r["reason"]).startswith("refused")]
