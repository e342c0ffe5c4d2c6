"""Sizes of the kernels' tiles: a table by number of codes, which `python -m bench tune` makes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MAX_WIDTH = 128  # of vectors that are read whole
MAX_CODES = 512  # of keys that causal attention is for; of queries too, for its gradients
MAX_CODES_FLOAT32 = 128
MIN_VECTORS = 64  # that codes are found of: fewer fill no tile
N_PROCESSOR = 132  # of an H200
N_RESIDENT = 2 * N_PROCESSOR  # programs at once that keep a chunk of codes on the chip
MAX_STATE_BYTES = 2**33
MAX_RARE_BYTES = 2**29  # of states that are seldom computed: room for them is kept all the same
MAX_TILES = 32  # of vectors that a program finds the codes of, with the codebook read once

PATH = Path(__file__).with_name("sizes.json")


class Size(NamedTuple):
    """How a kernel cuts its work."""

    tile: int  # tokens at once
    chunk: int  # codes at once
    columns: int  # features of a value at once
    n_warp: int
    n_stage: int  # of loads that are under way


class Row(NamedTuple):
    """The size of a kernel for up to so many codes."""

    kernel: str
    n_code: int
    size: Size


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [
        Row(row["kernel"], row["n_code"], Size(*(row[name] for name in Size._fields)))
        for row in sorted(rows, key=lambda row: row["n_code"])
    ]


_TABLE = read(PATH)
_TRIED: dict[str, Size] = {}


def size_of(kernel: str, n_code: int) -> Size:
    """The size of a kernel: the row for the least number of codes that is enough, else for the largest."""
    if kernel in _TRIED:
        return _TRIED[kernel]
    rows = [row for row in _TABLE if row.kernel == kernel]
    return next((row.size for row in rows if row.n_code >= n_code), rows[-1].size)


def of_values(kernel: str, dtype: Any) -> str:
    """The name that a kernel's sizes have for values of a type: float32, in parts, has its own."""
    return f"{kernel}_float32" if dtype == "float32" else kernel


@contextmanager
def trying(kernel: str, size: Size) -> Iterator[None]:
    """Have a kernel cut its work otherwise, in what is traced meanwhile."""
    _TRIED[kernel] = size
    try:
        yield
    finally:
        del _TRIED[kernel]


def block_len(n_code: int, n_vector: int, vector_bytes: int, max_bytes: int) -> int:
    """Tokens between two states, which take at most so many bytes for `n_vector` tokens and heads."""
    block = max(size_of("states", n_code).tile, size_of("blocks", n_code).tile)
    while n_vector * n_code * vector_bytes > max_bytes * block:
        block *= 2
    return block


def part_len(length: int, step: int, state_bytes: int) -> int:
    """Tokens at once, where states of `step` of them take so much: whole steps in equal parts.

    They take at most `MAX_STATE_BYTES`.
    """
    n_step = -(-length // step)
    n_part = -(-n_step // max(MAX_STATE_BYTES // state_bytes, 1))
    return -(-n_step // n_part) * step


def n_tile(length: int, n_row: int, tile: int) -> int:
    """Tiles of a program that finds codes: more than one only where that leaves programs for all."""
    return min(max(length * n_row // (4 * N_PROCESSOR * tile), 1), MAX_TILES)


def n_tile_resident(length: int, n_row: int, tile: int) -> int:
    """Tiles of a program, for programs that all run at once and keep codes on the chip."""
    return -(-length * n_row // (N_RESIDENT * tile))


def n_beside(size: Size, width: int) -> int:
    """Programs of a segment for values of a width; two of four warps share a processor."""
    return max(-(-width // size.columns) * size.n_warp // 8, 1)


def segment_len(length: int, n_row: int, tile: int) -> int:
    """Tokens of a segment: whole tiles."""
    whole = -(-length // tile)
    return -(-whole // n_segment(length, n_row, tile)) * tile


def n_segment(length: int, n_row: int, tile: int) -> int:
    """Segments of a sequence that are worked on at once, `n_row` programs each: about one for a processor."""
    return min(max(N_PROCESSOR // n_row, 1), -(-length // tile))
