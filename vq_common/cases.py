"""Named cases: the sizes that tests, parity and benchmarks share, and their inputs.

Sizes are small distinct primes where possible, so that a swapped axis cannot pass.
"""

import dataclasses
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one attention call; `k_len` None means self-attention.

    Attributes:
      name: of the case; also seeds its inputs.
      tags: 'ci' runs everywhere, 'gradient' is small enough for dense gradients.
    """

    name: str
    batch: int = 2
    q_len: int = 63
    k_len: int | None = None
    n_head: int = 3
    d_k: int = 11
    d_v: int = 13
    n_code_q: int = 17
    n_code_k: int = 19
    block_len: int = 16
    is_causal: bool = False
    is_padded: bool = False
    keys_only: bool = False
    tags: tuple[str, ...] = ("ci", "gradient")

    @property
    def length(self) -> int:
        """Key length S."""
        return self.q_len if self.k_len is None else self.k_len


def _both_ways(**sizes: object) -> tuple[Case, ...]:
    name = str(sizes.pop("name"))
    return tuple(
        Case(name=f"{name}_{'causal' if causal else 'full'}", is_causal=causal, **sizes)  # type: ignore[arg-type]
        for causal in (False, True)
    )


CASES: tuple[Case, ...] = (
    *_both_ways(name="small"),
    *_both_ways(name="one_token", q_len=1),
    *_both_ways(name="two_tokens_one_head", q_len=2, n_head=1),
    *_both_ways(name="padded", is_padded=True),
    *_both_ways(name="keys_only", keys_only=True, q_len=61),
    *_both_ways(name="keys_only_padded", keys_only=True, is_padded=True, batch=3),
    *_both_ways(name="more_codes_than_tokens", q_len=5, n_code_q=23, n_code_k=29),
    *_both_ways(name="one_query_code", n_code_q=1, n_code_k=2, q_len=29),
    *_both_ways(name="odd_1000", q_len=1000, batch=1, block_len=64, n_code_k=37, tags=("ci",)),
    *_both_ways(name="prime_1021", q_len=1021, n_head=2, block_len=32, is_padded=True, tags=("ci",)),
    Case(name="cross_short_queries", q_len=7, k_len=53),
    Case(name="cross_padded", q_len=59, k_len=31, is_padded=True),
    Case(name="cross_keys_only", q_len=23, k_len=47, keys_only=True),
)


def cases(tag: str = "ci") -> tuple[Case, ...]:
    """The cases that carry `tag`."""
    return tuple(case for case in CASES if tag in case.tags)


class Inputs(NamedTuple):
    """Float64 arrays whose values the case's dtype represents exactly."""

    q: Array  # [B, T, H, D]
    k: Array  # [B, S, H, D]
    v: Array  # [B, S, H, V]
    codebook_q: Array | None  # [H, Cq, D]
    codebook_k: Array  # [H, Ck, D]
    mask: NDArray[np.bool_] | None  # [B, S]
    d_out: Array  # [B, T, H, V], the cotangent of the output


def case_inputs(case: Case, dtype: str = "float64") -> Inputs:
    """Reproducible inputs of a case, rounded to `dtype` so that no backend rounds them again.

    Queries and keys are a codebook entry plus noise: most are near one code, as after training.
    A padded case masks a prefix of one sequence, a suffix of another and scattered keys.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    heads, width = case.n_head, case.d_k
    codebook_q = rng.normal(size=(heads, case.n_code_q, width))
    codebook_k = rng.normal(size=(heads, case.n_code_k, width))

    def near(codebook: Array, length: int) -> Array:
        picked = rng.integers(codebook.shape[1], size=(case.batch, length, heads))
        noise = rng.normal(size=(case.batch, length, heads, width))
        return codebook[np.arange(heads), picked] + 0.5 * noise

    q = near(codebook_q, case.q_len)
    k = near(codebook_k, case.length)
    v = rng.normal(size=(case.batch, case.length, heads, case.d_v))
    d_out = rng.normal(size=(case.batch, case.q_len, heads, case.d_v))
    mask = _padding(rng, case) if case.is_padded else None

    def rounded(x: Array) -> Array:
        return round_to(x, dtype)

    return Inputs(
        q=rounded(q),
        k=rounded(k),
        v=rounded(v),
        codebook_q=None if case.keys_only else rounded(codebook_q),
        codebook_k=rounded(codebook_k),
        mask=mask,
        d_out=rounded(d_out),
    )


def _padding(rng: np.random.Generator, case: Case) -> NDArray[np.bool_]:
    mask = rng.random((case.batch, case.length)) > 0.2
    mask[0, : case.length // 3] = False
    mask[-1, -(case.length // 3) :] = False
    if case.batch > 2:
        mask[1] = False
    return mask


def round_to(x: Array, dtype: str) -> Array:
    """`x` rounded to the nearest value of `dtype`, as float64."""
    if dtype != "bfloat16":
        return np.asarray(x, dtype).astype(np.float64)
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
