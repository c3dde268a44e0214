"""Turn the pairs, and turn them back.

There is no custom derivative here. ``lax.split`` transposes to ``concatenate`` and back, so the transpose
that JAX derives is the same program with the sine negated: the inverse rotation of the cotangent, from the
residuals cos and sin alone. Forward mode, reverse mode and any order of both hold everywhere.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._angles import Rotation
from rope_jax._checks import check_axes, check_dtype

Layout = Literal["half", "interleaved"]
"""Which two features make a pair: i and i + R/2 (GPT-NeoX, Llama in transformers), or 2i and 2i + 1 (GPT-J)."""


def rotate(x, rotation: Rotation, *, layout: Layout = "half") -> jax.Array:
    """Turns each pair ``(x1, x2)`` into ``(x1 cos - x2 sin, x2 cos + x1 sin)`` (RoFormer, equation 34).

    Pairs are features ``(i, i + R/2)`` for ``"half"``, ``(2i, 2i + 1)`` for ``"interleaved"``. Features from
    R on pass through bit for bit. Computed in float32 (float64 for float64), rounded once to x's dtype.

    The derivative in x is the rotation itself and its transpose the inverse rotation; nothing as large as x
    is saved for it, unless the rotation is differentiated too.

    Args:
      x: floating ``[..., T, N, H]``: queries, or keys with K in the place of N.
      rotation: cos and sin ``[..., T, R/2]``; the axes before T broadcast against those of x.
      layout: which two features make a pair.

    Returns:
      ``[..., T, N, H]`` in x's dtype.

    Raises:
      TypeError: if x is not floating.
      ValueError: if the shapes do not go together (T above all: x as ``[B, N, T, H]`` shows here), R is over
        H, the layout is unknown, or H is odd with interleaved pairs.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> quarter_turn = rope_jax.Rotation(cos=jnp.array([[0.0]]), sin=jnp.array([[1.0]]))
      >>> rope_jax.rotate(jnp.array([[[3.0, 4.0, 5.0]]]), quarter_turn).tolist()
      [[[-4.0, 3.0, 5.0]]]
    """
    x = jnp.asarray(x)
    check_dtype("x", x, jnp.floating, "floating")
    check_axes("x", x, "... T N H")
    *leading, length, _, head_dim = x.shape
    cos, sin = rotation
    check_axes("rotation.cos", cos, "... T R/2", T=length)
    num_pairs = cos.shape[-1]
    if sin.shape != cos.shape:
        raise ValueError(f"rotation.sin must have the shape of rotation.cos {cos.shape}, got {sin.shape}")
    if cos.ndim >= x.ndim or any(c not in (1, n) for c, n in zip(cos.shape[-3::-1], leading[::-1], strict=False)):
        raise ValueError(
            f"rotation [..., T, R/2] = {cos.shape} must broadcast against x [..., T, N, H] = {x.shape} before T"
        )
    if not 1 <= num_pairs <= head_dim // 2:
        raise ValueError(f"rotary_dim R must be from 2 to head_dim H={head_dim}, got R={2 * num_pairs}")

    # A pair lies along `axis` of a view of the features, so that no copy and no transpose is needed.
    # half: [H/g, g], where the first R/2 features fill `rows` rows of g and their partners as many after them;
    # interleaved: [H/2, 2], a pair in each row.
    if layout == "half":
        columns = math.gcd(num_pairs, head_dim)
        rows, axis = num_pairs // columns, x.ndim - 1
        cos, sin = (part.reshape(*part.shape[:-1], 1, rows, columns) for part in (cos, sin))
        turning = 2 * rows
    elif layout == "interleaved":
        if head_dim % 2:
            raise ValueError(f"head_dim H must be even for interleaved pairs, got {head_dim}")
        columns, rows, axis = 2, 1, x.ndim
        cos, sin = (part[..., None, :, None] for part in (cos, sin))
        turning = num_pairs
    else:
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")

    view = x.reshape(*leading, length, x.shape[-2], head_dim // columns, columns)
    pairs, *rest = _split(view, turning, x.ndim - 1)
    first, second = lax.split(pairs, (rows, rows), axis)

    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    first, second, cos, sin = (part.astype(dtype) for part in (first, second, cos, sin))
    turned = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
    if layout == "half":
        return lax.concatenate([*turned, *rest], axis).reshape(x.shape)
    return lax.concatenate([lax.concatenate(turned, axis), *rest], axis - 1).reshape(x.shape)


def _split(x, size: int, axis: int) -> list[jax.Array]:
    """The first ``size`` entries along ``axis``, and the rest where there is one."""
    rest = x.shape[axis] - size
    return list(lax.split(x, (size, rest), axis)) if rest else [x]
