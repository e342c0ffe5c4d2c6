"""Float64 NumPy definitions of the modules' forward pass in eval mode: slow and obvious.

Weights are a mapping from the names of a saved file to arrays; a matrix is `weight [out, in]`.
`x` is `[B, T, d_model]`, `mask` is `[B, T]` with True for a real token.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vq_common import oracle, vq_oracle
from vq_common.cases import round_to
from vq_common.config import TransformerConfig
from vq_common.oracle import Array, Codes, Mask

Weights = Mapping[str, Array]

MECHANISMS = ("VQAttentionQK", "VQAttention", "HyperAttention", "MultiHeadAttention")


class Projected(NamedTuple):
    q: Array  # [B, T, H, D]
    k: Array  # [B, T, H, D]
    v: Array  # [B, T, H, V]
    gate: Array  # [B, T, H, V]


def weight_shapes(
    mechanism: str, config: TransformerConfig, *, n_projection: int = 7
) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything in a saved file of a module of class `mechanism`."""
    heads, q_width, v_width = config.n_head, config.n_head * config.d_k, config.n_head * config.d_v
    shapes: dict[str, tuple[int, ...]] = {
        "input_ln.weight": (config.d_model,),
        "input_ln.bias": (config.d_model,),
        "q_proj.weight": (q_width, config.d_model),
        "kvg_proj.weight": (q_width + 2 * v_width, config.d_model),
        "res_proj.weight": (config.d_model, v_width),
    }
    if config.conv_width:
        shapes["conv_weight"] = (config.conv_width, 2 * q_width + v_width)
    if config.has_exact_part and mechanism.startswith("VQ"):
        shapes["code_bias"] = (heads,)
    if mechanism == "HyperAttention":
        shapes["directions"] = (heads, n_projection, config.d_k)
    quantizers = {"VQAttention": ("k",), "VQAttentionQK": ("q", "k")}.get(mechanism, ())
    for name in quantizers:
        n_code = config.n_code_q if name == "q" else config.n_code_k
        shapes[f"quantizer_{name}.count"] = (heads, n_code)
        shapes[f"quantizer_{name}.sum"] = (heads, n_code, config.d_k)
        shapes[f"quantizer_{name}.is_fitted"] = ()
    return shapes


def random_weights(
    mechanism: str, config: TransformerConfig, rng: np.random.Generator, *, n_projection: int = 7
) -> dict[str, Array]:
    """Weights of a trained module, as values that the dtypes of `config` hold exactly.

    Parameters are of `param_dtype`; counts, sums and directions are of its accumulators.
    """
    shapes = weight_shapes(mechanism, config, n_projection=n_projection)
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.endswith("proj.weight"):
            weights[name] *= shape[1] ** -0.5
        elif name == "input_ln.weight":
            weights[name] = 1 + 0.3 * weights[name]
        elif name.endswith(".count"):
            weights[name] = rng.uniform(0.5, 3.0, size=shape)
        elif name.endswith(".sum"):
            weights[name] *= config.d_k**-0.25 * weights[name.replace(".sum", ".count")][:, :, None]
        elif name.endswith(".is_fitted"):
            weights[name] = np.ones(shape)
    return {name: round_to(a, weight_dtype(name, config)) for name, a in weights.items()}


def weight_dtype(name: str, config: TransformerConfig) -> str:
    """The dtype that a saved file has for `name`."""
    if name.endswith(".is_fitted"):
        return "bool"
    if name == "directions" or name.startswith("quantizer_"):
        return "float64" if config.dtype == "float64" else "float32"
    return config.param_dtype


def module(
    mechanism: str,
    weights: Weights,
    x: Array,
    config: TransformerConfig,
    *,
    mask: Mask | None = None,
    segment_ids: Codes | None = None,
    sample_ids: Any = None,
    block_size: int = 256,
    min_seq_len: int = 4096,
) -> Array:
    """`res_proj(attention * gate)`, `[B, T, d_model]`; the last three are HyperAttention's."""
    q, k, v, gate = project(weights, x, config, mask, segment_ids)
    is_causal = config.is_causal
    if mechanism == "MultiHeadAttention":
        out = oracle.dot_product_attention(q, k, v, is_causal=is_causal, scale=1.0, mask=mask).out
    elif mechanism == "HyperAttention":
        out = oracle.hyper_attention(
            q,
            k,
            v,
            weights["directions"],
            sample_ids,
            is_causal=is_causal,
            scale=1.0,
            mask=mask,
            block_size=block_size,
            min_seq_len=min_seq_len,
        ).out
    else:
        codebook_q = codebook(weights, "quantizer_q") if mechanism == "VQAttentionQK" else None
        codebook_k = codebook(weights, "quantizer_k")
        options: dict[str, Any] = {}
        if config.has_exact_part:
            position = np.maximum(np.arange(x.shape[1]) - starts(x, mask, segment_ids), 0)
            options = {name: getattr(config, name) for name in ("block_len", "mem_len", "n_sink")}
            options["q_local"] = rotary(q, position, config.rope_theta)
            options["k_local"] = rotary(k, position, config.rope_theta)
            options["code_bias"] = weights["code_bias"]
        out = vq_oracle.vq_attention(
            q,
            k,
            v,
            codebook_q,
            codebook_k,
            is_causal=is_causal,
            scale=1.0,
            mask=mask,
            segment_ids=segment_ids,
            **options,
        )
    return _merge_heads(out * gate) @ weights["res_proj.weight"].T


def project(
    weights: Weights,
    x: Array,
    config: TransformerConfig,
    mask: Mask | None = None,
    segment_ids: Codes | None = None,
) -> Projected:
    """Queries, keys, values and gate of a module."""
    x = layer_norm(x) * weights["input_ln.weight"] + weights["input_ln.bias"]
    heads = config.n_head
    widths = np.array([config.d_k, config.d_v, config.d_v]) * heads
    parts = weights["q_proj.weight"], *np.split(weights["kvg_proj.weight"], np.cumsum(widths[:-1]))
    *qkv, gate = (x @ part.T for part in parts)
    if config.conv_width:
        joined = causal_conv(
            np.concatenate(qkv, axis=-1), weights["conv_weight"], mask, starts(x, mask, segment_ids)
        )
        qkv = np.split(joined, np.cumsum([widths[0], widths[0]]), axis=-1)
    q, k, v, gate = (_split_heads(a, heads) for a in (*qkv, gate))
    factor = q.shape[-1] ** -0.25
    return Projected(layer_norm(q) * factor, layer_norm(k) * factor, silu(v), silu(gate))


def starts(x: Array, mask: Mask | None, segment_ids: Codes | None) -> Codes:
    """Where every token's document starts, `[B, T]`: at its first real token."""
    document = vq_oracle.documents(np.zeros(x.shape[:2], int) if segment_ids is None else segment_ids)
    return vq_oracle.document_starts(document, mask)


def causal_conv(x: Array, weight: Array, mask: Mask | None, start: Codes) -> Array:
    """`y_t = sum_n weight[n] x_{t-n}` over the real tokens from the document's start on."""
    out = np.zeros(x.shape)
    for b, t, n in np.ndindex(*x.shape[:2], len(weight)):
        if n == 0 or t - n >= start[b, t]:
            is_real = mask is None or mask[b, t - n]
            out[b, t] += weight[n] * x[b, t - n] * is_real
    return out


def rotary(x: Array, position: Codes, theta: float) -> Array:
    """Features d and d + D // 2 of x as a complex number, turned by `position * theta^(-2 d / D)`."""
    half = x.shape[-1] // 2
    angle = position[:, :, None, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def codebook(weights: Weights, name: str) -> Array:
    """The codebook `[H, C, D]` of the quantizer `name`."""
    count, total = weights[f"{name}.count"], weights[f"{name}.sum"]
    return total / np.maximum(count, 1e-6)[:, :, None]


def layer_norm(x: Array) -> Array:
    """Zero mean and unit variance over the last axis, `eps` 1e-6, without gain."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def silu(x: Array) -> Array:
    """`x sigmoid(x)`."""
    return x / (1 + np.exp(-x))


def _split_heads(x: Array, n_head: int) -> Array:
    return x.reshape(*x.shape[:2], n_head, -1)


def _merge_heads(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1)
