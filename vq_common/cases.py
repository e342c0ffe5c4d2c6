"""Named cases: the sizes that tests, parity and benchmarks share, and their inputs.

Sizes are small distinct primes where possible, so that a swapped axis cannot pass.
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LOCAL_WIDTH = 7  # D' of a case with local vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one attention call; `k_len` None means self-attention.

    Attributes:
      name: of the case; also seeds its inputs.
      n_kv_head: key heads K; None for as many as query heads.
      n_segment: packed documents in a sequence; 0 for no `segment_ids`.
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
    mem_len: int = 0
    n_sink: int = 0
    has_local: bool = False
    has_bias: bool = False
    n_kv_head: int | None = None
    n_segment: int = 0
    tags: tuple[str, ...] = ("ci", "gradient")

    @property
    def length(self) -> int:
        """Key length S."""
        return self.q_len if self.k_len is None else self.k_len

    @property
    def n_key_head(self) -> int:
        """Key heads K."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def is_pure(self) -> bool:
        """Whether q, k, v, codebooks and a mask are all that enters, `math.md` 2."""
        return self.n_key_head == self.n_head and not (
            self.mem_len or self.n_sink or self.has_local or self.has_bias or self.n_segment
        )

    @property
    def options(self) -> dict[str, Any]:
        """The settings of its call that are no arrays."""
        names = ("is_causal", "block_len", "mem_len", "n_sink")
        return {name: getattr(self, name) for name in names}


def _both_ways(**sizes: object) -> tuple[Case, ...]:
    name = str(sizes.pop("name"))
    return tuple(
        Case(name=f"{name}_{'causal' if causal else 'full'}", is_causal=causal, **sizes)  # type: ignore[arg-type]
        for causal in (False, True)
    )


def _windows() -> tuple[Case, ...]:
    """Exact windows (block_len, mem_len) and sinks: `math.md` 3."""
    sizes = {"q_len": 67, "is_causal": True}
    return (
        *(
            Case(
                name=f"window_{block_len}_{mem_len}{'_sinks' if n_sink else ''}",
                block_len=block_len,
                mem_len=mem_len,
                n_sink=n_sink,
                **sizes,  # type: ignore[arg-type]
            )
            for block_len, mem_len in ((16, 16), (7, 13), (64, 1))
            for n_sink in (0, 3)
        ),
        Case(name="sinks", n_sink=5, is_causal=True),
        Case(name="window_keys_only", q_len=61, block_len=7, mem_len=13, keys_only=True, is_causal=True),
        Case(name="window_bias_local", block_len=8, mem_len=5, has_local=True, has_bias=True, is_causal=True),
    )


def _packed() -> tuple[Case, ...]:
    """Packed documents, alone and with everything else."""
    window = {"q_len": 59, "n_segment": 5, "block_len": 5, "mem_len": 3, "n_sink": 2, "is_causal": True}
    return (
        *_both_ways(name="segments", n_segment=5, q_len=53),
        Case(name="segments_window_sinks", **window),  # type: ignore[arg-type]
        Case(name="segments_everything", batch=3, has_local=True, has_bias=True, is_padded=True, **window),  # type: ignore[arg-type]
    )


def _grouped() -> tuple[Case, ...]:
    """Fewer key heads than query heads."""
    pair = {"n_head": 4, "n_kv_head": 2, "q_len": 47}
    return (
        *_both_ways(name="grouped", **pair),
        *_both_ways(name="grouped_keys_only", keys_only=True, **pair),
        *_both_ways(name="one_key_head", n_kv_head=1, q_len=43),
        Case(
            name="grouped_window_segments",
            n_segment=3,
            block_len=5,
            mem_len=7,
            is_causal=True,
            **pair,  # type: ignore[arg-type]
        ),
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
    *_windows(),
    *_packed(),
    *_grouped(),
    Case(
        name="one_token_everything",
        q_len=1,
        n_head=4,
        n_kv_head=2,
        is_causal=True,
        mem_len=5,
        n_sink=2,
        has_local=True,
        has_bias=True,
        n_segment=1,
    ),
)


def cases(tag: str = "ci") -> tuple[Case, ...]:
    """The cases that carry `tag`."""
    return tuple(case for case in CASES if tag in case.tags)


class Inputs(NamedTuple):
    """Float64 arrays whose values the case's dtype represents exactly."""

    q: Array  # [B, T, H, D]
    k: Array  # [B, S, K, D]
    v: Array  # [B, S, K, V]
    codebook_q: Array | None  # [H, Cq, D]
    codebook_k: Array  # [K, Ck, D]
    mask: NDArray[np.bool_] | None  # [B, S]
    d_out: Array  # [B, T, H, V], the cotangent of the output
    segment_ids: NDArray[np.int32] | None = None  # [B, T]
    q_local: Array | None = None  # [B, T, H, D']
    k_local: Array | None = None  # [B, S, K, D']
    code_bias: Array | None = None  # [H]


def case_inputs(case: Case, dtype: str = "float64") -> Inputs:
    """Reproducible inputs of a case, rounded to `dtype` so that no backend rounds them again.

    Queries and keys are a codebook entry plus noise: most are near one code, as after training.
    A padded case masks a prefix of one sequence, a suffix of another and scattered keys.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    heads, key_heads, width = case.n_head, case.n_key_head, case.d_k
    codebook_q = rng.normal(size=(heads, case.n_code_q, width))
    codebook_k = rng.normal(size=(key_heads, case.n_code_k, width))

    def near(codebook: Array, length: int) -> Array:
        n_head, n_code, _ = codebook.shape
        picked = rng.integers(n_code, size=(case.batch, length, n_head))
        noise = rng.normal(size=(case.batch, length, n_head, width))
        return codebook[np.arange(n_head), picked] + 0.5 * noise

    def rounded(x: Array) -> Array:
        return round_to(x, dtype)

    q = near(codebook_q, case.q_len)
    k = near(codebook_k, case.length)
    v = rng.normal(size=(case.batch, case.length, key_heads, case.d_v))
    d_out = rng.normal(size=(case.batch, case.q_len, heads, case.d_v))
    mask = _padding(rng, case) if case.is_padded else None
    segment_ids = _segments(rng, case) if case.n_segment else None
    q_local = k_local = code_bias = None
    if case.has_local:
        q_local = rounded(rng.normal(size=(case.batch, case.q_len, heads, LOCAL_WIDTH)))
        k_local = rounded(rng.normal(size=(case.batch, case.length, key_heads, LOCAL_WIDTH)))
    if case.has_bias:
        code_bias = rounded(rng.normal(size=heads))
    return Inputs(
        q=rounded(q),
        k=rounded(k),
        v=rounded(v),
        codebook_q=None if case.keys_only else rounded(codebook_q),
        codebook_k=rounded(codebook_k),
        mask=mask,
        d_out=rounded(d_out),
        segment_ids=segment_ids,
        q_local=q_local,
        k_local=k_local,
        code_bias=code_bias,
    )


def _padding(rng: np.random.Generator, case: Case) -> NDArray[np.bool_]:
    mask = rng.random((case.batch, case.length)) > 0.2
    mask[0, : case.length // 3] = False
    mask[-1, -(case.length // 3) :] = False
    if case.batch > 2:
        mask[1] = False
    return mask


def _segments(rng: np.random.Generator, case: Case) -> NDArray[np.int32]:
    """Ids of `n_segment` runs of random lengths, one of them 1; the last run has the id of the first."""
    n_run = min(case.n_segment, case.q_len)
    ids = np.empty((case.batch, case.q_len), np.int32)
    for row in ids:
        single = int(rng.integers(1, max(case.q_len - 1, 2)))
        others = np.setdiff1d(np.arange(1, case.q_len), (single, single + 1))
        cuts = np.r_[single, single + 1, rng.permutation(others)][: n_run - 1]
        numbers = rng.permutation(n_run)
        numbers[-1] = numbers[0 if n_run > 2 else -1]
        row[:] = numbers[np.searchsorted(np.sort(cuts), np.arange(case.q_len), side="right")]
    return ids


def round_to(x: Array, dtype: str) -> Array:
    """`x` rounded to the nearest value of `dtype`, as float64."""
    if dtype != "bfloat16":
        return np.asarray(x, dtype).astype(np.float64)
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
