"""The work that a definition needs, whatever computes it, and the least time a device takes for it."""

from typing import Any, NamedTuple

from bench.job import STEP, Job, Point, is_exact, is_windowed

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2}
FORWARD = {"fwd": 1, "bwd": 0, "fwd+bwd": 1}
BACKWARD = {"fwd": 0, "bwd": 1, "fwd+bwd": 1}


class Ceilings(NamedTuple):
    """What a device reached in this run: see the keys of the same names in `records.KEYS`."""

    copy_gb_s: float
    matmul_tflop_s: float


def definition_bytes(job: Job, point: Point) -> int:
    """Every input read once and every output written once; codebooks, a few MiB, are not counted.

    Forward: q, k, v and the output. Backward: q, k, v and the cotangent, and three gradients.
    """
    rows = job.batch * job.heads * point.length * ITEMSIZE[job.dtype]
    qk, v = 2 * rows * job.width, rows * job.value_width
    forward = qk + 2 * v
    backward = 2 * (qk + v) + v
    n_bytes = {"fwd": forward, "bwd": backward, "fwd+bwd": backward + v}
    return n_bytes[point.direction]


def definition_flops(job: Job, point: Point) -> int:
    """Operations of the matrix products, a multiply and an add counted as two.

    Of a head and a query: exact attention `2 (D + V)` for each key it sees, that is half of all
    when causal; HyperAttention the same for each key of its blocks and samples, at every level;
    VQ-attention `2 D C` to find a code of C, then one product with the `[Ck, V]` values by code, where
    q is exact another with the `[Ck, D]` codes, and those of exact attention in its window.
    Not causal, with both quantized, the output of a code is shared by its queries: the products
    are of codes alone. Backward, every product of the attention has two, and finding codes has none.
    """
    rows = job.batch * job.heads * point.length
    attention, codes = _products(job, point)
    forward, backward = FORWARD[point.direction], BACKWARD[point.direction]
    return int((forward + 2 * backward) * attention + forward * rows * codes)


def _products(job: Job, point: Point) -> tuple[float, int]:
    """Operations of the attention in all, and of finding codes for each token."""
    rows = job.batch * job.heads * point.length
    a_key = 2 * (job.width + job.value_width)
    if is_exact(point.mechanism):
        n_key = (point.length + 1) / 2 if point.is_causal else point.length
        return rows * n_key * a_key, 0
    if point.mechanism == "hyper":
        return rows * _hyper_keys(job, point) * a_key, 4 * job.n_projection * job.width
    if point.mechanism == "exact_window":
        return rows * _window_keys(job, point) * a_key, 0
    codes_q = job.codes_q if point.mechanism.startswith("vq_qk") else 0
    codes = 2 * job.width * (codes_q + job.codes_k)
    if codes_q and not point.is_causal:
        return job.batch * job.heads * codes_q * job.codes_k * a_key, codes
    n_key = _window_keys(job, point)
    read = 2 * job.codes_k * (job.value_width + (0 if codes_q else job.width))
    return rows * (read + n_key * a_key), codes


def _window_keys(job: Job, point: Point) -> float:
    """Exact keys that a query sees on average: its block up to itself, the window, the sinks."""
    if not is_windowed(point.mechanism):
        return 0.0
    mem_len, n_sink = job.window(point.mechanism)
    return min(mem_len + (job.block_len + 1) / 2 + n_sink, (point.length + 1) / 2)


def _hyper_keys(job: Job, point: Point) -> float:
    """Keys that a query of HyperAttention multiplies with: at every level a block and the samples."""
    a_level = job.block_size + job.n_sample
    if not point.is_causal:
        return min(a_level, point.length)
    n_key, length = 0.0, point.length
    while length > job.min_seq_len:
        length = -(-length // 2)
        n_key += min(a_level, length) / 2  # the later half of the queries, to the earlier half of the keys
    return n_key + (length + 1) / 2


def record(job: Job, point: Point, ceilings: Ceilings | None) -> dict[str, Any]:
    """The keys of a record that say how fast a point can be; none for a step, whose inputs are its state."""
    if ceilings is None or point.direction == STEP:
        return {}
    n_bytes, n_flop = definition_bytes(job, point), definition_flops(job, point)
    floor_s = max(n_bytes / (1e9 * ceilings.copy_gb_s), n_flop / (1e12 * ceilings.matmul_tflop_s))
    return {
        "definition_bytes": n_bytes,
        "definition_flops": n_flop,
        "floor_ms": 1e3 * floor_s,
        **ceilings._asdict(),
    }
