"""Rotary position embeddings for JAX and Flax: pure functions, exact at every position.

A position ``m`` rotates pair ``i`` of a head's features by the angle ``m * theta_i``, so that the score of a query
at ``m`` with a key at ``n`` depends on ``m - n`` alone (Su et al. 2021, RoFormer, section 3.2).

Data flows one way::

    positions ───────────────────┐
                                 ├─ rotation ─> Rotation ─ rotate ─> q, k ─> KVCache ─> attend ─> y
    schedule(R) ─> Frequencies ──┘        \\__ plan (once a step) ____________________/

Storeys, each importing only from those before it: :mod:`rope_jax.core` (the rotation), :mod:`rope_jax.attention`
(a layer), :mod:`rope_jax.nnx` (the layer for Flax NNX), :mod:`rope_jax.models`, :mod:`rope_jax.generation`,
:mod:`rope_jax.interop` (Hugging Face files), :mod:`rope_jax.analysis` and :mod:`rope_jax.plot`. The names below are
the most used; each storey has more.

Axes, used in every docstring and shape comment:

====  ==================  ====  ===============================================
B     batch               H     head_dim
T     query length        R     rotary_dim, even, at most H
S     key/value length    A     position axes (1 for text, 2 for images, ...)
N     query heads         D     model width
K     key/value heads     V     vocabulary (decoder and generation only)
====  ==================  ====  ===============================================
"""

import importlib

from rope_jax.core import (
    Affine,
    Axial,
    DynamicNTK,
    Frequencies,
    Linear,
    Llama3,
    LongRope,
    Negated,
    NTKAware,
    Proportional,
    Rope,
    Rotation,
    Sections,
    Standard,
    Yarn,
    grid_positions,
    positions_from_mask,
    positions_from_segments,
    rotate,
    rotation,
)
from rope_jax.attention import KVCache, RotaryAttention, attend, init_cache
from rope_jax.models import Decoder
from rope_jax.generation import generate
from rope_jax.interop import convert_layout, from_hf_config, load_hf
from rope_jax import analysis, attention, core, generation, interop, models

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Axial",
    "Decoder",
    "DynamicNTK",
    "Frequencies",
    "KVCache",
    "Linear",
    "Llama3",
    "LongRope",
    "NTKAware",
    "Negated",
    "Proportional",
    "Rope",
    "RotaryAttention",
    "Rotation",
    "Sections",
    "Standard",
    "Yarn",
    "analysis",
    "attend",
    "attention",
    "convert_layout",
    "core",
    "from_hf_config",
    "generate",
    "generation",
    "grid_positions",
    "init_cache",
    "interop",
    "load_hf",
    "models",
    "nnx",
    "positions_from_mask",
    "positions_from_segments",
    "rotate",
    "rotation",
]


def __getattr__(name: str):
    if name == "nnx":  # loaded at first use: not everyone who imports rope_jax uses flax.nnx
        return importlib.import_module("rope_jax.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
