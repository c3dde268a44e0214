"""Turn the pairs, and turn them back."""

from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_dtype
from rope_jax.core.angles import Rotation
from rope_jax.core.primitive import Layout, RotateBackend, turn


def rotate(
    x, rotation: Rotation, *, layout: Layout = "half", implementation: RotateBackend | None = None
) -> jax.Array:
    """Turns each pair ``(x1, x2)`` into ``(x1 cos - x2 sin, x2 cos + x1 sin)`` (RoFormer, equation 34).

    Pairs are features ``(i, i + R/2)`` for ``"half"``, ``(2i, 2i + 1)`` for ``"interleaved"``. Features from
    R on pass through bit for bit. Computed in float32 (float64 for float64), rounded once to x's dtype.

    The derivative in x is the rotation itself and its transpose the inverse rotation; nothing as large as x
    is saved for it, unless the rotation is differentiated too.

    Args:
      x: floating ``[..., T, N, H]``: queries, or keys with K in the place of N.
      rotation: cos and sin ``[..., T, R/2]``; the axes before T broadcast against those of x.
      layout: which two features make a pair.
      implementation: ``"xla"`` for XLA's own program, ``"pallas"`` for the TPU kernel. None takes the kernel where
        it is made for the case: on a TPU, bfloat16 or float32, 128 tokens or more, heads of a multiple of 16
        features up to 1,024, whose smallest block fits on the chip, for one device or inside ``shard_map``.

    Returns:
      ``[..., T, N, H]`` in x's dtype.

    Raises:
      TypeError: if x or the rotation is not floating, or the latter no :class:`Rotation`.
      ValueError: if the shapes do not go together (T above all: x as ``[B, N, T, H]`` shows here), R is over
        H, the layout or implementation is unknown, H is odd with interleaved pairs, or the kernel is asked for
        where it cannot be (while lowering, since only then the chip is known).

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> quarter_turn = rope_jax.Rotation(cos=jnp.array([[0.0]]), sin=jnp.array([[1.0]]))
      >>> rope_jax.rotate(jnp.array([[[3.0, 4.0, 5.0]]]), quarter_turn).tolist()
      [[[-4.0, 3.0, 5.0]]]
    """
    (turned,) = rotate_all([x], rotation, layout=layout, implementation=implementation)
    return turned


def rotate_all(
    xs: Sequence, rotation: Rotation, *, layout: Layout = "half", implementation: RotateBackend | None = None
) -> list[jax.Array]:
    """:func:`rotate` of several arrays, queries and keys, by one rotation.

    Where there is a kernel and they share all axes but N, it is one launch, whether all are needed or not.
    """
    xs = [jnp.asarray(x) for x in xs]
    if not isinstance(rotation, Rotation):
        raise TypeError(f"rotation must be a Rotation, as rope.rotation(positions), got {type(rotation).__name__}")
    cos, sin = (jnp.asarray(part) for part in rotation)
    for name, part in (("rotation.cos", cos), ("rotation.sin", sin)):
        check_dtype(name, part, jnp.floating, "floating")
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
    if implementation not in (None, *get_args(RotateBackend)):
        raise ValueError(f"implementation must be None or one of {get_args(RotateBackend)}, got {implementation!r}")
    for x in xs:
        _check(x, cos, sin, layout)
    return turn(xs, cos, sin, layout=layout, implementation=implementation)


def _check(x, cos, sin, layout: Layout) -> None:
    """Raises unless x ``[..., T, N, H]`` and the parts of its rotation ``[..., T, R/2]`` go together."""
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
