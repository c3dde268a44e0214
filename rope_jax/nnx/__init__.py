"""The layer for Flax NNX, with the fields, numbers and parameter tree of the linen layer."""

from rope_jax.nnx.parameters import from_linen, to_linen
from rope_jax.nnx.norm import RMSNorm
from rope_jax.nnx.attention import RotaryAttention

__all__ = [
    "RMSNorm",
    "RotaryAttention",
    "from_linen",
    "to_linen",
]
