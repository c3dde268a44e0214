"""RMSNorm as an NNX module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rope_jax.attention.norm import rms_norm
from rope_jax.nnx.parameters import named


class RMSNorm(nnx.Module):
    """``scale * x / sqrt(mean(x^2) + epsilon)`` over the last axis, as :class:`rope_jax.attention.RMSNorm`.

    Args:
      num_features: size of the last axis.
      axis: the logical name of the last axis.
      epsilon: added to the mean square.
      unit_offset: whether the factor is ``1 + scale`` instead of ``scale``.
      param_dtype: dtype of the scale.
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: str = "embed",
        epsilon: float = 1e-6,
        unit_offset: bool = False,
        param_dtype: Any = jnp.float32,
    ):
        self.epsilon, self.unit_offset = epsilon, unit_offset
        start = nnx.initializers.zeros_init() if unit_offset else nnx.initializers.ones_init()
        self.scale = nnx.Param(named(start, (axis,))(None, (num_features,), param_dtype))

    def __call__(self, x) -> jax.Array:
        """``x [..., D]`` normalized, in x's dtype."""
        return rms_norm(x, self.scale[...], epsilon=self.epsilon, unit_offset=self.unit_offset)
