"""What a mechanism must give: the float64 oracle on the first tokens of the same inputs."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench import inputs, registry
from bench.inputs import Store
from bench.job import STEP, Job
from vq_common import oracle, vq_oracle
from vq_common.tolerances import TOLERANCES, relative_rms

Array = NDArray[np.float64]

GRADIENTS = ("d_q", "d_k", "d_v")
MAX_LENGTH = 1024
MAX_BYTES = 2**29  # of the distances of one head to all codes
MAX_PRODUCTS = 6 * 10**8  # of the dense oracle, which NumPy computes slowly
TIE = 1e-4  # gap, relative to the vectors, under which rounding may decide


def verified_length(job: Job, shortest: int, direction: str = "fwd") -> int:
    """Tokens to verify on: the shortest length that is asked for, less where the oracle is slow."""
    length = MAX_LENGTH
    width = job.batch * job.heads * (job.width + job.value_width)
    n_pass = 4 if direction in ("bwd", "fwd+bwd") else 1  # gradients are as many products again
    distances = 8 * job.batch * max(job.codes_q, job.codes_k) * job.width
    while length > 64 and (n_pass * width * length**2 > MAX_PRODUCTS or distances * length > MAX_BYTES):
        length //= 2
    return min(length, shortest)


def limit(dtype: str, part: str = "out") -> float:
    """Largest relative RMS error to the oracle, of an output or a gradient."""
    return TOLERANCES[dtype].forward if part == "out" else TOLERANCES[dtype].gradient


def twin_limit(dtype: str, direction: str = "fwd") -> float:
    """Largest relative RMS difference of two backends that both meet the oracle."""
    return 2 * limit(dtype, "out" if direction in ("fwd", STEP) else "gradients")


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
    is_tie = code_gap(x, codebook) <= TIE * size**2
    product = np.abs(np.einsum("bthd,hpd->bthp", x, directions)) / np.linalg.norm(directions, axis=-1)
    is_tie |= (product <= TIE * size[..., None]).any(-1)
    index = np.arange(x.shape[1])[None, :, None]
    last_clear = np.maximum.accumulate(np.where(is_tie, -1, index), axis=1)
    first_clear = np.argmin(is_tie, axis=1)[:, None]
    source: NDArray[np.int64] = np.where(last_clear < 0, first_clear, last_clear)
    return source


def code_gap(x: Array, codebook: Array) -> Array:
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
    arrays["d_out"] = inputs.cotangent(job, length)
    return arrays


def named(direction: str, result: Any) -> dict[str, Any]:
    """The parts of what a call of a direction returns: 'out', 'd_q', 'd_k', 'd_v'."""
    if direction == "bwd":
        return dict(zip(GRADIENTS, result, strict=True))
    if direction == "fwd+bwd":
        return {"out": result[0], **dict(zip(GRADIENTS, result[1], strict=True))}
    return {"out": result}


def expected(
    mechanism: str, store: Store, length: int, is_causal: bool, direction: str = "fwd"
) -> dict[str, Array]:
    """What `named` should give for `read_inputs`; a step gives the last token `[B, 1, H, V]`."""
    job = store.job.at_verification(mechanism, is_causal, length)
    raw = read_inputs(store, job, length, is_causal)
    arrays = {name: store.to_float64(raw[name]) for name in ("q", "k", "v", "d_out")}
    arrays |= {name: raw[name].astype(np.float64) for name in ("codebook_q", "codebook_k", "directions")}
    arrays["sample_ids"] = raw["sample_ids"].astype(np.int64)
    has_out, has_gradients = direction != "bwd", direction in ("bwd", "fwd+bwd")
    is_vq = mechanism.startswith("vq")
    heads = []
    for h in range(job.heads):
        arrays_h = {name: _head(name, x, h) for name, x in arrays.items()}
        define = _vq_definition if is_vq else _weighted_definition
        out, gradients = define(mechanism, job, is_causal, arrays_h)
        found = {"out": out()} if has_out else {}
        if has_gradients:
            found |= dict(zip(GRADIENTS, gradients()[:3], strict=True))
        heads.append(found)
    whole = {part: np.concatenate([found[part] for found in heads], axis=2) for part in heads[0]}
    return {part: x[:, -1:] for part, x in whole.items()} if direction == STEP else whole


def _head(name: str, x: NDArray[Any], h: int) -> NDArray[Any]:
    """An array of one head alone: the definitions are dense in all heads at once."""
    if name == "sample_ids":
        return x[..., h : h + 1]
    return x[h : h + 1] if name in ("codebook_q", "codebook_k", "directions") else x[:, :, h : h + 1]


def _vq_definition(mechanism: str, job: Job, is_causal: bool, x: dict[str, Any]) -> tuple[Any, Any]:
    """Output and gradients of attention over codes, each when it is called."""
    has_query_codes = "codebook_q" in registry.MECHANISMS[mechanism].arrays
    inputs = x["q"], x["k"], x["v"], x["codebook_q"] if has_query_codes else None, x["codebook_k"]
    options = {"is_causal": is_causal, "scale": 1.0, **registry.vq_options(mechanism, job)}
    return (
        partial(vq_oracle.vq_attention, *inputs, **options),
        partial(vq_oracle.vq_attention_gradients, *inputs, x["d_out"], **options),
    )


def _weighted_definition(mechanism: str, job: Job, is_causal: bool, x: dict[str, Any]) -> tuple[Any, Any]:
    """The same of exact attention, a window of it and HyperAttention: a softmax with weights."""
    q, k, v = x["q"], x["k"], x["v"]
    if mechanism == "hyper":
        sizes = {"block_size": job.block_size, "min_seq_len": job.min_seq_len}
        weight = oracle.hyper_weight(q, k, x["directions"], x["sample_ids"], is_causal=is_causal, **sizes)
    else:
        weight = oracle.visible(q.shape[1], k.shape[1], is_causal=is_causal)
    if mechanism == "exact_window":
        position = np.arange(q.shape[1])[None]
        weight = weight * vq_oracle.exact_pairs(position, job.block_len, *job.window(mechanism))[:, None]
    return (
        lambda: oracle.softmax_attention(q, k, v, weight, 1.0).out,
        lambda: oracle.softmax_attention_gradients(q, k, v, weight, 1.0, x["d_out"]),
    )


class Errors(NamedTuple):
    """Relative RMS errors to the oracle."""

    out: float | None
    gradient: float | None  # the largest of q, k and v
    wrong: str | None  # what is over its limit, for people


def compare(found: Mapping[str, Array], reference: Mapping[str, Array], dtype: str) -> Errors:
    """How far the parts of a result are from the oracle, and the part that is wrong, if one is."""
    errors = {part: error(found[part], reference[part]) for part in reference}
    gradients = [errors[part] for part in GRADIENTS if part in errors]
    wrong = next((part for part, x in errors.items() if x > limit(dtype, part)), None)
    reason = None
    if wrong is not None:
        of = "" if wrong == "out" else f" of {wrong}"
        reason = f"relative RMS error {errors[wrong]:.1e}{of} to the oracle, limit {limit(dtype, wrong):.0e}"
    return Errors(errors.get("out"), max(gradients, default=None), reason)


def error(out: Array, reference: Array) -> float:
    """Relative RMS error; infinite for another shape or for NaN."""
    if out.shape != reference.shape:
        return float("inf")
    figure = relative_rms(out, reference)
    return figure if np.isfinite(figure) else float("inf")
