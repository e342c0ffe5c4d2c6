"""Attention over vector-quantized queries and keys in linear time, in JAX (Flax NNX)."""

from jax_vq import kernels as kernels  # adds its kernels to the ops
from jax_vq.nn.attention import MultiHeadAttention
from jax_vq.nn.hyper_attention import HyperAttention
from jax_vq.nn.quantizer import LearnableVQ
from jax_vq.nn.vq_attention import VQAttention, VQAttentionQK
from jax_vq.ops.attention import dot_product_attention, merge_attention
from jax_vq.ops.hyper_attention import hyper_attention, n_sample_sets, sample_set_sizes
from jax_vq.ops.implementations import why_xla
from jax_vq.ops.lsh import angular_hash, gray_code, gray_rank
from jax_vq.ops.quantize import (
    CodebookState,
    codebook_of,
    commitment_loss,
    ema_update,
    kmeans,
    nearest_codes,
    straight_through,
    take_codes,
)
from jax_vq.ops.vq_attention import vq_attention, vq_attention_step
from jax_vq.ops.vq_state import VQState, init_state
from jax_vq.weights import load_weights, save_weights
from vq_common import TransformerConfig, load_config

__all__ = [
    "CodebookState",
    "HyperAttention",
    "LearnableVQ",
    "MultiHeadAttention",
    "TransformerConfig",
    "VQAttention",
    "VQAttentionQK",
    "VQState",
    "angular_hash",
    "codebook_of",
    "commitment_loss",
    "dot_product_attention",
    "ema_update",
    "gray_code",
    "gray_rank",
    "hyper_attention",
    "init_state",
    "kmeans",
    "load_config",
    "load_weights",
    "merge_attention",
    "n_sample_sets",
    "nearest_codes",
    "sample_set_sizes",
    "save_weights",
    "straight_through",
    "take_codes",
    "vq_attention",
    "vq_attention_step",
    "why_xla",
]
