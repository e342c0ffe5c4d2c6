"""Result files for tests: records whose figures are made up."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.records import KEYS, Record

BASE: dict[str, Any] = {
    "suite": "scaling",
    "backend": "jax",
    "mechanism": "vq_qk",
    "implementation": "xla",
    "device": "cuda",
    "device_name": "Device",
    "dtype": "float32",
    "is_causal": True,
    "direction": "fwd",
    "batch": 1,
    "heads": 2,
    "length": 1024,
    "width": 8,
    "value_width": 16,
    "codes_q": 7,
    "codes_k": 7,
    "block_len": 32,
    "mem_len": 0,
    "n_sink": 0,
    "input": "real",
    "status": "ok",
    "timing": "device events",
    "peak_bytes": 2**20,
    "config_hash": "0123456789ab",
    "commit": "c0ffee",
    "versions": "python=3.11.9 jax=0.10.2",
    "time": "2026-01-02T03:04:05Z",
}


def record(ms: float | None = 1.0, **changes: Any) -> Record:
    """A record of `ms` milliseconds, its percentiles a tenth below and above."""
    spread = {} if ms is None else {"ms_median": ms, "ms_p20": 0.9 * ms, "ms_p80": 1.1 * ms}
    return dict.fromkeys(KEYS) | BASE | spread | changes


def write(folder: Path, found: Iterable[Record]) -> Path:
    """Write records.jsonl into a folder; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(item) + "\n" for item in found)
    (folder / "records.jsonl").write_text(text, encoding="utf-8")
    return folder
