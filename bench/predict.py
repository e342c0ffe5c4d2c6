"""What a point will take, from shorter ones: time, memory, and whether that is too much."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from bench.job import STEP, Job, Point, is_exact
from bench.registry import MECHANISMS

UNIT = 2048  # tokens, about where exact attention takes as long as the linear mechanisms
# float32 arrays [B, H, T, T] that an exact kernel keeps which stores its scores.
SCORES = {"fwd": 3, "fwd+bwd": 5, "bwd": 6}
TABLES = 3  # float32 arrays [B, H, Cq, Ck] of attention from codes to codes
TIME_MARGIN = 1.2  # a prediction is a shorter length, scaled; the next cache is slower


class Seen(NamedTuple):
    """A call of the same curve that ran."""

    length: int
    ms: float
    compile_s: float = 0.0
    peak_bytes: int | None = None
    implementation: str = ""
    feed_s: float = 0.0  # to take in the tokens before a step


class Limits(NamedTuple):
    """What a point may take, and what the run has used."""

    max_point_s: float
    max_run_s: float
    max_bytes: int
    elapsed_s: float = 0.0


def work(job: Job, point: Point) -> float:
    """How the work of a point grows with its length: 1 at `UNIT` tokens.

    Exact attention is quadratic; so is causal HyperAttention up to `min_seq_len`, from where it
    grows as T log T. All others are linear. HyperAttention's share is about three times that of the
    other linear ones. A step is linear where it is exact, else the same at every length.

    A backward pass grows as the forward one does.
    """
    units = point.length / UNIT
    if point.direction == STEP:
        return units if point.mechanism == "exact" else 1.0
    if is_exact(point.mechanism):
        return units**2
    if point.mechanism == "hyper" and point.is_causal:
        piece = min(point.length, job.min_seq_len) / UNIT
        return units * piece * (1 + math.log2(max(point.length / job.min_seq_len, 1)))
    return 3 * units if point.mechanism == "hyper" else units


def milliseconds(job: Job, point: Point, seen: Sequence[Seen]) -> float:
    """Of one call, from the longest shorter call that was seen, else the shortest; 0 when none was."""
    if not seen:
        return 0.0
    shorter = [s for s in seen if s.length <= point.length]
    near = max(shorter, key=lambda s: s.length) if shorter else min(seen, key=lambda s: s.length)
    return near.ms * work(job, point) / work(job, point._replace(length=near.length)) * TIME_MARGIN


def memory_bytes(job: Job, point: Point, seen: Sequence[Seen]) -> int:
    """Of one call, from the longest seen call with a figure, else from a model.

    The model: inputs and output, with their gradients where they are asked for, the same again in
    float32, for an exact kernel that keeps its scores a few arrays `[B, H, T, T]` of float32, and
    between quantized queries and keys a few `[B, H, Cq, Ck]`.
    Of a step: keys and values twice, where all are kept.
    """
    itemsize = {"float64": 8, "float32": 4, "bfloat16": 2}[job.dtype]
    rows = job.batch * job.heads * point.length
    if point.direction == STEP:
        is_kept = point.mechanism == "exact"
        return rows * 2 * (job.width + job.value_width) * itemsize if is_kept else 0
    implementation = max(seen, key=lambda s: s.length).implementation if seen else ""
    is_quadratic = is_exact(point.mechanism) and implementation in ("xla", "math", "")
    peaks = {s.length: s.peak_bytes for s in seen if s.peak_bytes}
    if peaks:
        longest = max(peaks)
        return int(peaks[longest] * (point.length / longest) ** (2 if is_quadratic else 1))
    n_array = 2 if point.direction == "fwd" else 4  # of width D and of width V
    tokens = rows * n_array * (job.width + job.value_width) * (itemsize + 4)
    if "codebook_q" in MECHANISMS[point.mechanism].arrays:
        tokens += TABLES * 4 * job.batch * job.heads * job.codes_q * job.codes_k
    return tokens + (SCORES[point.direction] * 4 * rows * point.length if is_quadratic else 0)


def skip_reason(job: Job, point: Point, seen: Sequence[Seen], limits: Limits) -> str | None:
    """Why a point is not to be tried, or None."""
    call_s = milliseconds(job, point, seen) / 1e3
    if call_s > limits.max_point_s:
        return f"predicted {call_s:.1f} s a call, max_point_s is {limits.max_point_s:g}"
    n_bytes = memory_bytes(job, point, seen)
    if n_bytes > limits.max_bytes:
        return f"predicted {n_bytes / 2**30:.1f} GiB, {limits.max_bytes / 2**30:.1f} GiB may be used"
    compile_s = max((s.compile_s for s in seen), default=0.0)
    feed_s = max((s.feed_s * max(point.length / s.length, 1) for s in seen), default=0.0)
    whole_s = compile_s + feed_s + call_s * (job.n_warmup + 1)
    if limits.elapsed_s + whole_s > limits.max_run_s:
        return f"the run has taken {limits.elapsed_s:.0f} s, max_run_s is {limits.max_run_s:g}"
    return None
