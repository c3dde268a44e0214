"""Rotary position embeddings for JAX and Flax: pure functions, exact at every position.

A position ``m`` turns pair ``i`` of a head's features by the angle ``m * theta_i``, so that the score of
a query at ``m`` with a key at ``n`` depends on ``m - n`` alone (Su et al. 2021, RoFormer, section 3.2).

Data flows one way, and the modules stand in that order::

    positions ───────────────────┐
                                 ├─ rotation ─> Rotation ─ rotate ─> q, k ─> KVCache ─> attention ─> y
    schedule(R) ─> Frequencies ──┘

Axes, used in every docstring and shape comment:

====  ==================  ====  ===============================================
B     batch               H     head_dim
T     query length        R     rotary_dim, even, at most H
S     key/value length    A     position axes (1 for text, 2 for images, ...)
N     query heads         D     model width
K     key/value heads     V     vocabulary (decoder and generation only)
====  ==================  ====  ===============================================
"""

from rope_jax._positions import grid_positions, positions_from_mask, positions_from_segments
from rope_jax._frequencies import (
    Axial,
    DynamicNTK,
    Frequencies,
    FrequencyChoice,
    Linear,
    Llama3,
    LongRope,
    NTKAware,
    Proportional,
    Reversed,
    Schedule,
    Standard,
    Yarn,
    geometric,
)
from rope_jax._angles import Rotation, rotation
from rope_jax._turn import Layout
from rope_jax._rotation import rotate
from rope_jax._rope import Rope
from rope_jax._encodings import (
    ALiBi,
    LearnedPositions,
    PositionBias,
    PositionEmbedding,
    Sinusoidal,
    T5Bias,
    relative_buckets,
)
from rope_jax._layout import convert_layout
from rope_jax._cache import KVCache, init_cache
from rope_jax._sharding import cache_spec
from rope_jax._attend import attend, attention_weights
from rope_jax._ring import ring_attention, zigzag_order, zigzag_slots
from rope_jax._attention import RotaryAttention
from rope_jax._adapter import rotary_attention_fn
from rope_jax._decoder import Decoder
from rope_jax._generate import Generation, generate, sample
from rope_jax._recipe import LayerRecipe, QueryTemperature, Recipe
from rope_jax._huggingface import from_hf_config
from rope_jax._to_huggingface import to_hf_config
from rope_jax._checkpoint import Checkpoint, load_hf
from rope_jax import analysis as analysis  # rope_jax.plot is imported by name: it needs matplotlib

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "Axial",
    "Checkpoint",
    "Decoder",
    "DynamicNTK",
    "Frequencies",
    "FrequencyChoice",
    "Generation",
    "KVCache",
    "LayerRecipe",
    "Layout",
    "LearnedPositions",
    "Linear",
    "Llama3",
    "LongRope",
    "NTKAware",
    "PositionBias",
    "PositionEmbedding",
    "Proportional",
    "QueryTemperature",
    "Recipe",
    "Reversed",
    "Rope",
    "RotaryAttention",
    "Rotation",
    "Schedule",
    "Sinusoidal",
    "Standard",
    "T5Bias",
    "Yarn",
    "attend",
    "attention_weights",
    "cache_spec",
    "convert_layout",
    "from_hf_config",
    "generate",
    "geometric",
    "grid_positions",
    "init_cache",
    "load_hf",
    "positions_from_mask",
    "positions_from_segments",
    "relative_buckets",
    "ring_attention",
    "rotary_attention_fn",
    "rotate",
    "rotation",
    "sample",
    "to_hf_config",
    "zigzag_order",
    "zigzag_slots",
]
