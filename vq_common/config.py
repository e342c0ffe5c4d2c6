"""The one configuration of both backends: `TransformerConfig`, read from `conf.yml`."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vq_common.fields import check_names, choice, flag, integer, integers, number, section, validate

DTYPES = ("float64", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cuda", "mps", "cpu")

# Keys of the original project's conf.yml that nothing here reads, and why: a file of that
# project still loads, and each key it sets is reported once.
UNUSED_KEYS = {
    "update_len": "gradients are exact through the whole history, not through a window of updates",
    "grad_thru_cache": "gradients always flow through the history",
    "agg_cache": "the history is always kept",
    "d_ff": "there is no feed-forward layer",
    "n_block_per_update": "gradients are exact through the whole history, not through a window of updates",
    "n_device": "a module runs where its input is",
    "n_layer": "modules are single layers",
    "n_vocab": "modules take vectors, not tokens",
    "no_emb": "modules take vectors, not tokens",
    "pe_abs": "there is no absolute position embedding",
    "pe_lam": "there is no sinusoidal position embedding",
    "p_dropemb": "there is no embedding",
    "p_dropsin": "there is no sinusoidal position embedding",
    "p_droplyr": "modules are single layers",
    "p_nucleus": "nothing is sampled from the model",
    "e_tie": "there is no embedding",
    "e_preln": "the input LayerNorm is always there",
    "e_scale": "there is no embedding",
    "is_train": "train and eval are modes of a module: module.train(), module.eval()",
    "quantize_q": "VQAttentionQK quantizes queries and keys, VQAttention keys only",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What `python -m bench` runs.

    Attributes:
      lengths: sequence lengths T, in tokens.
      n_warmup, n_repeat: untimed and timed calls of each point.
      max_repeat_s: seconds after which a point stops repeating (at least one timed call).
      max_point_s: seconds a single call may be predicted to take before the point is skipped.
      max_run_s: seconds after which no further point is started.
      max_memory_fraction: part of the free memory that a point may be predicted to need.
      block_size, n_projection, n_sample, min_seq_len: HyperAttention, as in `math.md` 4.
      n_kmeans: Lloyd iterations that fit the codebooks.
      seed: of every random draw.
    """

    lengths: tuple[int, ...] = integers(tuple(1024 * 2**i for i in range(9)))
    n_warmup: int = integer(1, low=0)
    n_repeat: int = integer(10)
    max_repeat_s: float = number(0.5)
    max_point_s: float = number(12.0)
    max_run_s: float = number(205.0)
    max_memory_fraction: float = number(0.6, high=1.0)
    block_size: int = integer(256)
    n_projection: int = integer(7)
    n_sample: int = integer(256, low=0)
    min_seq_len: int = integer(4096)
    n_kmeans: int = integer(10)
    seed: int = integer(0, low=0)

    def __post_init__(self) -> None:
        validate(self, "bench")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer settings for code that trains a module.

    Attributes:
      learning_rate, weight_decay: of AdamW.
      n_step: optimizer steps.
      seed: of initialisation and of every random stream.
    """

    learning_rate: float = number(3e-4)
    weight_decay: float = number(0.1)
    n_step: int = integer(500)
    seed: int = integer(0, low=0)

    def __post_init__(self) -> None:
        validate(self, "train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and settings of an attention module; immutable, checked on construction.

    Attributes:
      d_model: width of the module's input and output.
      n_head: number of heads H.
      d_k, d_v: query/key width D and value width V of one head; default d_model / n_head.
      n_code: number of codes, of both codebooks unless n_code_q or n_code_k says otherwise.
      sequence_len, global_batch_size: of the examples and the benchmark; modules take any.
      block_len: tokens in one block L of the causal form; without mem_len a speed knob only.
      mem_len: tokens M before the block that stay exact, and the block with them; 0: none.
      n_sink: first tokens of a document that stay exact.
      code_bias: what the learned offset on scores of quantized keys starts from, where some are exact.
      rope_theta: base of the rotary positions of the exact part.
      conv_width: tokens of the causal convolution of q, k and v: 4, or 0 for none.
      is_causal: whether a token attends only to itself and earlier ones.
      p_dropres: dropout rate on a module's output.
      c_beta: weight of the commitment loss.
      c_gamma: decay of the codebooks' moving averages, per training step.
      c_dead: count under which a code is dead and is replaced by a vector of the batch.
      codebook_init: 'kmeans' or 'data' (a draw of vectors), on the first training batch.
      dtype, param_dtype: of computation and of parameters.
      device: for scripts and the benchmark; auto takes the fastest there is.
      bench, train: sections of their own.

    Raises:
      ValueError, TypeError: an unknown key, a wrong type or an impossible value, naming the
        key, what was found, what is allowed and the nearest known name.
    """

    d_model: int = integer(1024)
    n_head: int = integer(1)
    d_k: int = integer(None)
    d_v: int = integer(None)
    n_code: int = integer(128)
    n_code_q: int = integer(None)
    n_code_k: int = integer(None)
    sequence_len: int = integer(1024)
    global_batch_size: int = integer(4)
    block_len: int = integer(128)
    mem_len: int = integer(0, low=0)
    n_sink: int = integer(0, low=0)
    code_bias: float = number(-4.0, low=-math.inf)
    rope_theta: float = number(10000.0, low=1.0)
    conv_width: int = integer(0, low=0)
    is_causal: bool = flag(True)
    p_dropres: float = number(0.0, high=1.0)
    c_beta: float = number(1e-4)
    c_gamma: float = number(0.99, high=1.0)
    c_dead: float = number(0.1)
    codebook_init: str = choice("kmeans", ("kmeans", "data"))
    dtype: str = choice("float32", DTYPES)
    param_dtype: str = choice("float32", DTYPES)
    device: str = choice("auto", DEVICES)
    bench: BenchConfig = section(BenchConfig)
    train: TrainConfig = section(TrainConfig)

    def __post_init__(self) -> None:
        validate(self, "config")
        for name in ("d_k", "d_v"):
            if getattr(self, name) is None:
                if self.d_model % self.n_head:
                    raise ValueError(
                        f"config: {name} is not given and d_model = {self.d_model} is no multiple of "
                        f"n_head = {self.n_head}: give {name} or change one of the two"
                    )
                object.__setattr__(self, name, self.d_model // self.n_head)
        for name in ("n_code_q", "n_code_k"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.n_code)
        if self.p_dropres == 1.0:
            raise ValueError("config: p_dropres must be under 1, found 1.0: nothing would be kept")
        if self.device == "mps" and "float64" in (self.dtype, self.param_dtype):
            raise ValueError(
                f"config: dtype = {self.dtype} and param_dtype = {self.param_dtype} must not be float64 "
                f"with device = mps, which has none"
            )
        if self.conv_width not in (0, 4):
            raise ValueError(f"config: conv_width must be 0 or 4, found {self.conv_width}")
        if self.has_exact_part and not self.is_causal:
            raise ValueError(
                f"config: mem_len = {self.mem_len} and n_sink = {self.n_sink} must be 0 "
                f"with is_causal = false"
            )

    @property
    def has_exact_part(self) -> bool:
        """Whether some keys are attended to exactly."""
        return self.mem_len > 0 or self.n_sink > 0


def _accept_original_keys(cls: type) -> None:
    """Let `cls(**mapping)` take the original project's keys and name a misspelt one."""
    construct = cls.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def __init__(self: Any, **mapping: Any) -> None:  # noqa: N807
        _check_keys(mapping, "config")
        for name in sorted(UNUSED_KEYS.keys() & mapping.keys()):
            warnings.warn(f"config: {name} has no effect: {UNUSED_KEYS[name]}", stacklevel=2)
        if mapping.get("device") == "gpu":
            warnings.warn("config: device = gpu, the original's word, is read as cuda", stacklevel=2)
            mapping["device"] = "cuda"
        construct(self, **{name: value for name, value in mapping.items() if name not in UNUSED_KEYS})

    cls.__init__ = __init__  # type: ignore[misc]


def _check_keys(mapping: Iterable[Any], where: str) -> None:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    check_names((name for name in mapping if name not in UNUSED_KEYS), known, where)


_accept_original_keys(TransformerConfig)


def load_config(path: str | Path = "conf.yml") -> TransformerConfig:
    """Read a YAML file of `TransformerConfig` keys.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError, TypeError: not a mapping, a key given twice, or what TransformerConfig refuses.
    """
    with open(path, encoding="utf-8") as file:
        try:
            mapping = yaml.load(file, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{path}: must be a mapping of keys, found {type(mapping).__name__}")
    _check_keys(mapping, str(path))
    return TransformerConfig(**mapping)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"{str(key_node.start_mark).strip()}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)
