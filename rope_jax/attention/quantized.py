"""Quantizes keys and values to eight bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import as_dtype, check_axes, check_dtype, device_array
from rope_jax.core.nan_rows import nan_where
from rope_jax.core.serialization import serializable

EIGHT_BIT_DTYPES = tuple(map(jnp.dtype, (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)))


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """``values * scale``: eight bits per feature, and a float32 scale for the H features of a head at a token.

    Attributes:
      values: int8 or an eight-bit float, ``[..., H]``.
      scale: float32 ``[...]``.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self):
        return self.values.dtype

    def astype(self, dtype) -> jax.Array:
        """``values * scale``, multiplied in float32 and rounded once to ``dtype``."""
        return (self.values.astype(jnp.float32) * self.scale[..., None]).astype(dtype)


def is_narrow(dtype, argument: str = "dtype") -> bool:
    """True if arrays of this dtype need a scale.

    Raises:
      TypeError: if the dtype is a float of eight bits or fewer, but not supported by :func:`quantize`.
    """
    dtype = as_dtype(argument, dtype)
    if dtype in EIGHT_BIT_DTYPES:
        return True
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
        raise TypeError(f"{argument} must be one of {', '.join(map(str, EIGHT_BIT_DTYPES))}, or wider, got {dtype}")
    return False


def stored_dtype(argument: str, dtype) -> np.dtype:
    """A dtype that a cache can store. Raises TypeError for any other."""
    dtype = as_dtype(argument, dtype)
    if not (is_narrow(dtype, argument) or jnp.issubdtype(dtype, jnp.floating)):
        raise TypeError(f"{argument} must be floating or int8, got dtype {dtype}")
    return dtype


def quantize(x, dtype=jnp.int8) -> Quantized:
    """Quantizes ``x [..., H]`` to eight bits, with a scale for each group of H features.

    ``scale = max|x| / q``, ``values = round(x / scale)``, with q the largest number of the dtype: 127 for int8, 448
    for ``float8_e4m3fn``, 57344 for ``float8_e5m2``. The error of a feature is at most

    - int8: ``max|x| / 254``, half a step;
    - ``float8_e4m3fn``: the larger of ``|x| / 16`` and ``max|x| / 448 / 2^10``;
    - ``float8_e5m2``: the larger of ``|x| / 8`` and ``max|x| / 57344 / 2^17``.

    Args:
      x: floating ``[..., H]``.
      dtype: int8, ``float8_e4m3fn`` or ``float8_e5m2``.

    Returns:
      :class:`Quantized`. NaN or infinity in x makes all H features of its group NaN.

    Raises:
      TypeError: if x is not floating, or the dtype is not supported.

    Example:
      >>> import jax.numpy as jnp
      >>> quantized = quantize(jnp.array([1.0, -0.5, 0.1]))
      >>> quantized.values.tolist(), [round(x, 3) for x in quantized.astype(jnp.float32).tolist()]
      ([127, -64, 13], [1.0, -0.504, 0.102])
    """
    x = device_array("x", x)
    check_axes("x", x, "... H")
    check_dtype("x", x, jnp.floating, "floating")
    if not x.shape[-1]:
        raise ValueError(f"x must have features, got shape {x.shape}")
    if not is_narrow(dtype):
        raise TypeError(f"dtype must be one of {', '.join(map(str, EIGHT_BIT_DTYPES))}, got {jnp.dtype(dtype)}")
    is_integer = jnp.dtype(dtype) == jnp.int8
    largest = jnp.float32(127.0 if is_integer else float(jnp.finfo(dtype).max))
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / largest
    scale = nan_where(~jnp.isfinite(scale), scale)
    steps = wide / jnp.where(scale == 0, jnp.float32(1), scale)[..., None]
    # Integers cannot be NaN, so that only the scale is NaN.
    steps = jnp.where(jnp.isnan(steps), jnp.float32(0), jnp.round(steps) if is_integer else steps)
    return Quantized(jnp.clip(steps, -largest, largest).astype(dtype), scale)


def read_layer(stored, layer, dtype) -> jax.Array:
    """Keys or values of a layer as one array ``[B, K, S, H]``, of an array or :class:`Quantized`."""
    if layer is not None:
        stored = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stored)
    return stored.astype(dtype)
