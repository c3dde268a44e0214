"""RMSNorm as an NNX module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rope_jax._checks import as_float_dtype, check_axes, check_integer, check_kinds, check_name
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

    Raises:
      TypeError: if an argument is of another kind.
      ValueError: if ``num_features`` or ``epsilon`` is not positive.
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
        check_kinds(self, flags=["unit_offset"], positive=["epsilon"])
        num_features = check_integer("num_features", num_features, least=1)
        check_name("axis", axis)
        param_dtype = as_float_dtype("param_dtype", param_dtype)
        start = nnx.initializers.zeros_init() if unit_offset else nnx.initializers.ones_init()
        self.scale = nnx.Param(named(start, (axis,))(None, (num_features,), param_dtype))

    def __call__(self, x) -> jax.Array:
        """``x [..., D]`` normalized, in x's dtype. Raises ValueError if D is not ``num_features``."""
        check_axes("x", x, "... D", D=self.scale.shape[-1])
        return rms_norm(x, self.scale[...], epsilon=self.epsilon, unit_offset=self.unit_offset)
