"""Rotates the pairs of features of queries and keys."""

from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_dtype
from rope_jax.core.angles import Rotation
from rope_jax.core.primitive import Layout, RotateBackend, rotate_arrays


def rotate(
    x, rotation: Rotation, *, layout: Layout = "half", implementation: RotateBackend | None = None
) -> jax.Array:
    """Rotates each pair: ``(x1, x2)`` becomes ``(x1 cos - x2 sin, x2 cos + x1 sin)`` (RoFormer, equation 34).

    Pairs are features ``(i, i + R/2)`` for ``"half"``, ``(2i, 2i + 1)`` for ``"interleaved"``. Features from
    R on pass through bit for bit. Computed in float32 (float64 for float64), rounded once to x's dtype.

    The derivative in x is the rotation itself, and the transpose is the inverse rotation. Neither saves anything as
    large as x, unless the rotation is differentiated too.

    Args:
      x: floating ``[..., T, N, H]``: queries, or keys with K heads instead of N.
      rotation: cos and sin ``[..., T, R/2]``; the axes before T broadcast against the axes of x.
      layout: the two features of a pair, ``"half"`` or ``"interleaved"``.
      implementation: ``"xla"`` for XLA's program, ``"pallas"`` for the TPU kernel. On a TPU, for a single device or
        inside ``shard_map``, None selects the kernel if x is bfloat16 or float32, T is at least 128, H is a
        multiple of 16 up to 1,024, and the smallest block of all heads fits on the chip; otherwise XLA.

    Returns:
      ``[..., T, N, H]`` in x's dtype.

    Raises:
      TypeError: if x or the rotation is not floating, or ``rotation`` is not a :class:`Rotation`.
      ValueError: if the shapes do not match (for example x as ``[B, N, T, H]``), R is over H, H is odd with
        interleaved pairs, or the layout or implementation is unknown. ``"pallas"`` raises while lowering if the
        chip, the shapes or the dtypes do not suit the kernel.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> quarter_turn = rope_jax.Rotation(cos=jnp.array([[0.0]]), sin=jnp.array([[1.0]]))
      >>> rope_jax.rotate(jnp.array([[[3.0, 4.0, 5.0]]]), quarter_turn).tolist()
      [[[-4.0, 3.0, 5.0]]]
    """
    (rotated,) = rotate_all([x], rotation, layout=layout, implementation=implementation)
    return rotated


def rotate_all(
    xs: Sequence, rotation: Rotation, *, layout: Layout = "half", implementation: RotateBackend | None = None
) -> list[jax.Array]:
    """:func:`rotate` of several arrays, such as queries and keys, by a shared rotation.

    If a kernel is used and the arrays share all axes but N, they are rotated in a single launch.
    """
    xs = [jnp.asarray(x) for x in xs]
    if not isinstance(rotation, Rotation):
        raise TypeError(
            f"rotation must be a Rotation, as rope.rotation(positions) gives, got {type(rotation).__name__}"
        )
    cos, sin = (jnp.asarray(part) for part in rotation)
    for name, part in (("rotation.cos", cos), ("rotation.sin", sin)):
        check_dtype(name, part, jnp.floating, "floating")
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    if implementation not in (None, *get_args(RotateBackend)):
        raise ValueError(f"implementation must be None or one of {get_args(RotateBackend)}, got {implementation!r}")
    for x in xs:
        _check_shapes(x, cos, sin, layout)
    return rotate_arrays(xs, cos, sin, layout=layout, implementation=implementation)


def _check_shapes(x, cos, sin, layout: Layout) -> None:
    """Raises unless x ``[..., T, N, H]`` and ``cos, sin [..., T, R/2]`` have matching shapes."""
    check_dtype("x", x, jnp.floating, "floating")
    check_axes("x", x, "... T N H")
    *leading, length, _, head_dim = x.shape
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
    if layout == "interleaved" and head_dim % 2:
        raise ValueError(f"head_dim H must be even for interleaved pairs, got {head_dim}")
