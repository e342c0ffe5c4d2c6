"""Tile sizes of the kernels, by shape: measured on an H200, see `NOTES.md` beside this file."""

from typing import NamedTuple

MAX_WIDTH = 128  # of vectors that are read whole
MIN_VECTORS = 64  # that codes are found of: fewer fill no tile
MAX_CODES_GRAD = 128
MAX_CODES = 512  # of keys that causal attention is for
N_PROGRAM = 4 * 132  # programs that keep all processors of an H200 busy


class CodesSize(NamedTuple):
    """How nearest codes are found."""

    tile: int  # tokens at once
    n_tile: int  # tiles of a program
    chunk: int  # codes at once
    n_warp: int
    n_stage: int


def of_codes(length: int, n_row: int, n_code: int) -> CodesSize:
    """For `n_row` heads of all examples."""
    if n_code > 128:
        return CodesSize(tile=256, n_tile=1, chunk=128, n_warp=8, n_stage=2)
    n_tile = min(max(length * n_row // (64 * N_PROGRAM), 1), 32)
    return CodesSize(tile=64, n_tile=n_tile, chunk=128, n_warp=4, n_stage=3)


class SumsSize(NamedTuple):
    """How values are summed by code, segment by segment."""

    tile: int
    chunk: int
    columns: int
    n_warp: int
    n_stage: int


SUMS = SumsSize(tile=64, chunk=128, columns=128, n_warp=8, n_stage=3)


class AnswerSize(NamedTuple):
    """How queries read the answer of their code."""

    tile: int
    columns: int
    n_warp: int


ANSWER = AnswerSize(tile=64, columns=128, n_warp=4)


class CausalSize(NamedTuple):
    """How a segment is attended to, tile by tile."""

    tile: int
    chunk: int
    columns: int
    n_warp: int
    n_stage: int


def of_causal(n_code: int) -> CausalSize:
    """By the number of key codes."""
    if n_code > 128:
        return CausalSize(tile=64, chunk=128, columns=64, n_warp=8, n_stage=1)
    return CausalSize(tile=128, chunk=128, columns=128, n_warp=8, n_stage=2)


def n_segment(length: int, n_row: int, tile: int) -> int:
    """Segments of a sequence that are worked on at once: about one program for each processor."""
    wanted = max(N_PROGRAM // 4 // n_row, 1)
    return min(wanted, -(-length // tile))


class GradSize(NamedTuple):
    """How gradients of a segment are found, tile by tile."""

    tile: int
    n_warp: int
    n_stage: int


GRAD_QUERIES = GradSize(tile=64, n_warp=8, n_stage=2)
GRAD_KEYS = GradSize(tile=32, n_warp=8, n_stage=2)
