"""What a mechanism must give: the float64 oracle on the first tokens of the same inputs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import inputs
from bench.inputs import Store
from bench.job import Job
from vq_common import oracle
from vq_common.tolerances import TOLERANCES, relative_rms

Array = NDArray[np.float64]

MAX_LENGTH = 1024
MAX_PRODUCTS = 6 * 10**8  # of the dense oracle, which NumPy computes slowly
TIE = 1e-4  # gap, relative to the vectors, under which rounding may decide


def verified_length(job: Job, shortest: int) -> int:
    """Tokens to verify on: the shortest length that is asked for, less where the oracle is slow."""
    length = MAX_LENGTH
    width = job.batch * job.heads * (job.width + job.value_width)
    while length > 64 and width * length**2 > MAX_PRODUCTS:
        length //= 2
    return min(length, shortest)


def limit(dtype: str) -> float:
    """Largest relative RMS error to the oracle."""
    return TOLERANCES[dtype].forward


def twin_limit(dtype: str) -> float:
    """Largest relative RMS difference of two backends that both meet the oracle."""
    return 2 * limit(dtype)


def write_inputs(store: Store, length: int) -> None:
    """Write `verify_q`, `verify_k`, `verify_v`: the first tokens, without vectors on a tie."""
    arrays = {name: store.read_float64(name, length) for name in ("q", "k", "v")}
    directions = store.read("directions").astype(np.float64)
    kept = {name: store.read_tokens(name, length) for name in ("q", "k", "v")}
    for name in ("q", "k"):
        source = clear_source(arrays[name], store.read(f"codebook_{name}").astype(np.float64), directions)
        kept[name] = np.take_along_axis(kept[name], source[..., None], axis=1)
    for name, x in kept.items():
        store.write(f"verify_{name}", x)


def clear_source(x: Array, codebook: Array, directions: Array) -> NDArray[np.int64]:
    """For every vector the token `[B, T, H]` to take it from: the last one up to it without a tie.

    A tie between two codes or two sides of a hash plane may fall either way in float32; what
    follows is then another result, not a rounding error.
    """
    size = np.linalg.norm(x, axis=-1)
    is_tie = _code_gap(x, codebook) <= TIE * size**2
    product = np.abs(np.einsum("bthd,hpd->bthp", x, directions)) / np.linalg.norm(directions, axis=-1)
    is_tie |= (product <= TIE * size[..., None]).any(-1)
    index = np.arange(x.shape[1])[None, :, None]
    last_clear = np.maximum.accumulate(np.where(is_tie, -1, index), axis=1)
    first_clear = np.argmin(is_tie, axis=1)[:, None]
    source: NDArray[np.int64] = np.where(last_clear < 0, first_clear, last_clear)
    return source


def _code_gap(x: Array, codebook: Array) -> Array:
    """`oracle.code_gap` by pieces of time; two equal codes are no tie, both give one result."""
    codebook = np.stack([_without_copies(codes) for codes in codebook])
    piece = max(2**24 // (x.shape[0] * codebook.size), 1)
    return np.concatenate(
        [oracle.code_gap(x[:, i : i + piece], codebook) for i in range(0, x.shape[1], piece)], axis=1
    )


def _without_copies(codes: Array) -> Array:
    """Codes `[C, D]` where later copies of a code are moved far away."""
    first = np.unique(codes, axis=0, return_index=True)[1]
    moved = np.full_like(codes, 1e6)
    moved[first] = codes[first]
    return moved


def read_inputs(store: Store, job: Job, length: int, is_causal: bool) -> dict[str, NDArray[Any]]:
    """Everything that a mechanism may take, as stored; samples are those of `job`."""
    names = ("codebook_q", "codebook_k", "directions")
    arrays = {name: store.read(name) for name in names}
    arrays |= {name: store.read(f"verify_{name}") for name in ("q", "k", "v")}
    arrays["sample_ids"] = inputs.sample_ids(job, length, is_causal)
    return arrays


def expected(mechanism: str, store: Store, length: int, is_causal: bool) -> Array:
    """The oracle's output `[B, T, H, V]` for `read_inputs`."""
    job = store.job.at_verification(mechanism, is_causal, length)
    raw = read_inputs(store, job, length, is_causal)
    q, k, v = (store.to_float64(raw[name]) for name in ("q", "k", "v"))
    if mechanism in ("vq_qk", "vq_k"):
        k = _quantize(k, raw["codebook_k"])
        q = _quantize(q, raw["codebook_q"]) if mechanism == "vq_qk" else q
    if mechanism == "hyper":
        weight = oracle.hyper_weight(
            q,
            k,
            raw["directions"].astype(np.float64),
            raw["sample_ids"].astype(np.int64),
            is_causal=is_causal,
            block_size=job.block_size,
            min_seq_len=job.min_seq_len,
        )
    else:
        weight = oracle.visible(length, length, is_causal=is_causal)
    return oracle.softmax_attention(q, k, v, weight, 1.0).out


def _quantize(x: Array, codebook: NDArray[Any]) -> Array:
    """The nearest codes, by pieces of time: the oracle compares every vector with every code."""
    codebook = codebook.astype(np.float64)
    piece = max(2**24 // (x.shape[0] * codebook.size), 1)
    pieces = [x[:, i : i + piece] for i in range(0, x.shape[1], piece)]
    return np.concatenate(
        [oracle.take_codes(codebook, oracle.nearest_codes(part, codebook)) for part in pieces], axis=1
    )


def error(out: Array, reference: Array) -> float:
    """Relative RMS error; infinite for another shape or for NaN."""
    if out.shape != reference.shape:
        return float("inf")
    figure = relative_rms(out, reference)
    return figure if np.isfinite(figure) else float("inf")
