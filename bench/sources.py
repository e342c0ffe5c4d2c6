"""Result files, read for people: whole, of this benchmark, older ones with null for what they lack."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import records
from bench.records import KEYS, Record

FILE = "records.jsonl"

# Keys of every version; a file of an earlier one may lack the others.
REQUIRED = (
    *("suite", "backend", "mechanism", "implementation", "device", "device_name", "dtype", "is_causal"),
    *("direction", "batch", "heads", "length", "width", "value_width", "codes_q", "codes_k", "block_len"),
    *("input", "status", "reason", "timing", "ms_median", "ms_p20", "ms_p80"),
    *("config_hash", "commit", "versions", "time"),
)
NUMBERS = ("length", "batch", "heads", "width", "value_width", "codes_q", "codes_k")
STATUSES = ("ok", "skipped", "failed")


class Source(NamedTuple):
    """The newest record of every point of a file."""

    path: Path
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """How tables name it: its folder, or the file where it is not called `FILE`."""
        return (self.path.parent if self.path.name == FILE else self.path).as_posix()


def find(path: Path) -> list[Path]:
    """The result files that a path means: itself, the one in a folder, or all below a folder.

    Raises:
      FileNotFoundError: there is none.
    """
    if path.is_file():
        return [path]
    if (path / FILE).is_file():
        return [path / FILE]
    found = sorted(path.rglob(FILE)) if path.is_dir() else []
    if not found:
        what = f"holds no {FILE}" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; a result is a {FILE} of `python -m bench` or its folder")
    return found


def load(path: Path) -> Source:
    """The records of one file or of a folder that holds one.

    Raises:
      FileNotFoundError: there is none.
      ValueError: there are several, or the file is empty, torn or no result of this benchmark.
    """
    paths = find(path)
    if len(paths) > 1:
        raise ValueError(f"{path} holds {len(paths)} results, name one: {', '.join(map(str, paths))}")
    return _load_file(paths[0])


def load_all(paths: Iterable[Path]) -> list[Source]:
    """Every file that `paths` mean, each once, in this order; errors as of `load`."""
    files = [file for path in paths for file in find(path)]
    unique = {file.resolve(): file for file in files}
    return [_load_file(file) for file in unique.values()]


def _load_file(path: Path) -> Source:
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no result of this benchmark: {error}") from error
    found = records.read(path)
    n_line = len(data.splitlines())
    if len(found) < n_line:
        raise ValueError(
            f"{path}, line {n_line}: torn or not a record; if a run was killed while it wrote, run it again "
            f"with --resume, which drops that line"
        )
    if not found:
        raise ValueError(f"{path} is empty: it has no record")
    whole = [_whole(path, number, record) for number, record in enumerate(found, 1)]
    return Source(path, tuple(records.latest(whole)))


def _whole(path: Path, number: int, record: Record) -> Record:
    """A record with every key.

    Raises:
      ValueError: it is none of this benchmark's.
    """
    trouble = _trouble(record)
    if trouble:
        raise ValueError(f"{path}, line {number}: not a record of this benchmark: {trouble}")
    whole = dict.fromkeys(KEYS) | record
    return whole | {key: whole[key] or 0 for key in ("mem_len", "n_sink")}


def _trouble(record: Record) -> str:
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        return f"it has no {', '.join(missing)}"
    if record["status"] not in STATUSES:
        return f"status must be one of {', '.join(STATUSES)}, found {record['status']!r}"
    for key in NUMBERS:
        if not isinstance(record[key], int):
            return f"{key} must be an integer, found {record[key]!r}"
    if record["status"] == "ok" and not isinstance(record["ms_median"], int | float):
        return f"ms_median must be a number, found {record['ms_median']!r}"
    return ""


def shared(found: Sequence[Record], keys: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Of `keys`: the values that all records share, and the keys in which they differ."""
    same: dict[str, Any] = {}
    varying = []
    for key in keys:
        values = list(dict.fromkeys(record[key] for record in found))
        if len(values) == 1:
            same[key] = values[0]
        elif values:
            varying.append(key)
    return same, varying
