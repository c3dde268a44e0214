"""RMSNorm: scales features to root mean square 1, times a learned scale.

``flax.linen.RMSNorm`` promotes dtypes implicitly, which strict promotion forbids.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax._checks import align_ranks, check_kinds, check_name
from rope_jax.core.explicit import beside
from rope_jax.core.named import named
from rope_jax.core.primitive import wide_dtype


class RMSNorm(nn.Module, kw_only=True):
    """``scale * x / sqrt(mean(x^2) + epsilon)`` over the last axis (Zhang and Sennrich 2019, section 4).

    With ``unit_offset`` the factor is ``1 + scale``, and ``scale`` is initialized to 0 (as in Gemma). Computed in
    float32 (float64 if x is float64), and rounded to x's dtype at the end.

    Attributes:
      axis: the logical name of the last axis.
      epsilon: added to the mean square.
      unit_offset: whether the factor is ``1 + scale`` instead of ``scale``.
      param_dtype: dtype of the scale.
    """

    axis: str
    epsilon: float = 1e-6
    unit_offset: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x) -> jax.Array:
        """``x [..., D]`` normalized, in x's dtype."""
        # A model has several norms in each layer: the usual kinds are seen without a call.
        is_usual = type(self.axis) is str and type(self.unit_offset) is bool and type(self.epsilon) is float
        if not (is_usual and 0 < self.epsilon < math.inf and self.param_dtype in (jnp.float32, jnp.bfloat16)):
            check_kinds(self, flags=["unit_offset"], positive=["epsilon"], dtypes=["param_dtype"])
            check_name("axis", self.axis)
        start = nn.initializers.zeros_init() if self.unit_offset else nn.initializers.ones_init()
        init = named(start, (self.axis,))
        scale: Any = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        return rms_norm(x, scale, epsilon=self.epsilon, unit_offset=self.unit_offset)


def rms_norm(x, scale, *, epsilon: float, unit_offset: bool) -> jax.Array:
    """``x [..., D]`` normalized and scaled, as :class:`RMSNorm` does."""
    wide = wide_dtype(x)

    @jax.checkpoint  # the backward pass stores only x, and recomputes the intermediate values
    def normed(x, scale):
        scale = beside(x, scale).astype(wide)
        if unit_offset:
            scale = 1 + scale
        y = x.astype(wide)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.asarray(epsilon, wide))
        y, scale = align_ranks(y, scale)
        return (y * scale).astype(x.dtype)

    return normed(x, scale)
