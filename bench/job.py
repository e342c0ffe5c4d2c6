"""What is measured: a `Job` is one configuration, a `Point` one place on one of its curves."""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

from vq_common import TransformerConfig

DTYPES = ("float64", "float32", "bfloat16")
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
STEP = "step"  # what the suite 'decode' times in place of a direction
WINDOW_SINKS = 4  # exact first tokens of the window form, where the configuration has no exact part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a measurement depends on besides its point; flat, so that it travels as JSON.

    Attributes:
      d_model: width of the module whose projections give q, k and v.
      batch, heads, width, value_width: B, H, D, V of q, k `[B, T, H, D]` and v `[B, T, H, V]`.
      codes_q, codes_k: codes of the codebooks `[H, C, D]`.
      block_len: L of causal VQ-attention.
      mem_len, n_sink: exact tokens before the block, and exact first tokens, of the window form.
      block_size, n_projection, n_sample, min_seq_len: of HyperAttention.
      n_kmeans: Lloyd iterations that fit the codebooks.
      seed: of every draw.
      dtype: one of `DTYPES`.
      input: 'real' (bytes of Python's standard library), 'random' (Gaussian) or 'captured'.
      n_warmup, n_repeat, max_repeat_s: see `BenchConfig`.
      layer: where q, k and v are from, as 'smollm2-135m/12'; codebooks are then fitted on other text.
      capture: digest of what is captured of that layer.
    """

    d_model: int
    batch: int
    heads: int
    width: int
    value_width: int
    codes_q: int
    codes_k: int
    block_len: int
    mem_len: int
    n_sink: int
    block_size: int
    n_projection: int
    n_sample: int
    min_seq_len: int
    n_kmeans: int
    seed: int
    dtype: str
    input: str
    n_warmup: int
    n_repeat: int
    max_repeat_s: float
    layer: str | None = None
    capture: str | None = None

    @classmethod
    def of(cls, config: TransformerConfig, *, batch: int, is_random: bool) -> "Job":
        """The job of a configuration.

        Raises:
          ValueError: there is no tolerance to verify its dtype by.
        """
        if config.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {config.dtype}")
        bench = config.bench
        return cls(
            d_model=config.d_model,
            batch=batch,
            heads=config.n_head,
            width=config.d_k,
            value_width=config.d_v,
            codes_q=config.n_code_q,
            codes_k=config.n_code_k,
            block_len=config.block_len,
            mem_len=config.mem_len,
            n_sink=config.n_sink,
            block_size=bench.block_size,
            n_projection=bench.n_projection,
            n_sample=bench.n_sample,
            min_seq_len=bench.min_seq_len,
            n_kmeans=bench.n_kmeans,
            seed=bench.seed,
            dtype=config.dtype,
            input="random" if is_random else "real",
            n_warmup=bench.n_warmup,
            n_repeat=bench.n_repeat,
            max_repeat_s=bench.max_repeat_s,
        )

    @classmethod
    def from_json(cls, mapping: dict[str, Any]) -> "Job":
        return cls(**mapping)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """Twelve hex digits that change with any attribute."""
        given = {key: value for key, value in self.to_json().items() if value is not None}
        text = json.dumps(given, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def has_exact_part(self) -> bool:
        """Whether the configuration sets a window or sinks."""
        return self.mem_len > 0 or self.n_sink > 0

    def window(self, mechanism: str) -> tuple[int, int]:
        """`(mem_len, n_sink)` of a mechanism: those of the job, one block and 4 where it has none."""
        if not is_windowed(mechanism):
            return 0, 0
        return (self.mem_len, self.n_sink) if self.has_exact_part else (self.block_len, WINDOW_SINKS)

    def at_verification(self, mechanism: str, is_causal: bool, length: int) -> "Job":
        """The job that `length` tokens are verified with: HyperAttention's sizes are cut where needed.

        At the full sizes a short sequence would be one block, or exact as a whole. So are those of
        an exact window.
        """
        quarter = max(length // 4, 1)
        if is_windowed(mechanism):
            mem_len, n_sink = self.window(mechanism)
            return dataclasses.replace(
                self,
                block_len=min(self.block_len, quarter),
                mem_len=min(mem_len, quarter),
                n_sink=min(n_sink, quarter),
            )
        if mechanism != "hyper":
            return self
        return dataclasses.replace(
            self,
            block_size=min(self.block_size, quarter),
            n_sample=min(self.n_sample, quarter),
            min_seq_len=min(self.min_seq_len, 2 * quarter) if is_causal else self.min_seq_len,
        )


def is_exact(mechanism: str) -> bool:
    """Whether a mechanism is exact attention, by the framework's best kernel or one that is named."""
    return mechanism.startswith("exact") and not is_windowed(mechanism)


def is_windowed(mechanism: str) -> bool:
    """Whether a mechanism has an exact window."""
    return mechanism.endswith("_window")


class Point(NamedTuple):
    """One measurement of a job in one backend: a call on `length` tokens, or the last of them alone."""

    mechanism: str
    is_causal: bool
    length: int
    direction: str = "fwd"  # one of `DIRECTIONS`, or `STEP`

    @property
    def curve(self) -> str:
        """How messages name the curve, as 'vq_qk causal'."""
        return f"{self.mechanism} {'causal' if self.is_causal else 'full'}"
