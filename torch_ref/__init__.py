"""Attention over vector-quantized queries and keys in linear time, in PyTorch: CUDA, MPS and CPU."""

from torch_ref.nn.attention import MultiHeadAttention
from torch_ref.nn.hyper_attention import HyperAttention
from torch_ref.nn.quantizer import LearnableVQ
from torch_ref.nn.vq_attention import VQAttention, VQAttentionQK
from torch_ref.ops.attention import dot_product_attention, merge_attention
from torch_ref.ops.hyper_attention import hyper_attention, n_sample_sets, sample_set_sizes
from torch_ref.ops.lsh import angular_hash, gray_code, gray_rank
from torch_ref.ops.quantize import (
    CodebookState,
    codebook_of,
    commitment_loss,
    ema_update,
    kmeans,
    nearest_codes,
    straight_through,
    take_codes,
)
from torch_ref.ops.vq_attention import vq_attention, vq_attention_step
from torch_ref.ops.vq_state import VQState, init_state
from torch_ref.weights import load_weights, save_weights
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
]
