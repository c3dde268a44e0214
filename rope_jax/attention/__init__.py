"""A layer of rotary attention, and its parts: masks, biases, caches, plans, kernels."""

from rope_jax.attention.norm import RMSNorm
from rope_jax.attention.bias import ALiBi, PositionBias, T5Bias, relative_buckets
from rope_jax.attention.quantized import Quantized, quantize
from rope_jax.attention.slots import Eviction
from rope_jax.attention.cache import KVCache
from rope_jax.attention.empty_cache import init_cache
from rope_jax.attention.plan import Plan, make_plan
from rope_jax.attention.cross_plan import make_cross_plan
from rope_jax.attention.sharding import cache_partition_spec
from rope_jax.attention.facts import Facts
from rope_jax.attention.paths import AttentionBackend, Explanation, explain
from rope_jax.attention.attend import attend, attention_weights
from rope_jax.attention.zigzag import zigzag_inverse, zigzag_sequence_index
from rope_jax.attention.ring import ring_attention
from rope_jax.attention.layer import RotaryAttention
from rope_jax.attention.adapter import rotary_attention_fn

__all__ = [
    "ALiBi",
    "AttentionBackend",
    "Eviction",
    "Explanation",
    "Facts",
    "KVCache",
    "Plan",
    "PositionBias",
    "Quantized",
    "RMSNorm",
    "RotaryAttention",
    "T5Bias",
    "attend",
    "attention_weights",
    "cache_partition_spec",
    "explain",
    "init_cache",
    "make_cross_plan",
    "make_plan",
    "quantize",
    "relative_buckets",
    "ring_attention",
    "rotary_attention_fn",
    "zigzag_inverse",
    "zigzag_sequence_index",
]
