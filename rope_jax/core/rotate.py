"""Rotates the pairs of features of queries and keys."""

from collections.abc import Sequence
from typing import get_args

import chex
import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._checks import check_axes, check_choice, check_dtype, check_integer, device_array
from rope_jax.core.angles import Rotation
from rope_jax.core.primitive import Layout, RotateBackend, join_unrotated, rotate_arrays


def rotate(
    x,
    rotation: Rotation,
    *,
    layout: Layout = "half",
    start: int = 0,
    blocks: int = 1,
    token_axis: int = -3,
    implementation: RotateBackend | None = None,
) -> jax.Array:
    """Rotates each pair: ``(x1, x2)`` becomes ``(x1 cos - x2 sin, x2 cos + x1 sin)`` (RoFormer, equation 34).

    Pairs are features ``(i, i + R/2)`` for ``"half"``, ``(2i, 2i + 1)`` for ``"interleaved"``, of the R features
    from ``start`` on. Other features pass through bit for bit. Computed in float32 (float64 for float64), rounded
    once to x's dtype.

    The derivative in x is the rotation itself, and the transpose is the inverse rotation. Neither saves anything as
    large as x, unless the rotation is differentiated too.

    Args:
      x: floating ``[..., T, N, H]``: queries, or keys with K heads instead of N. ``[..., N, T, H]`` if
        ``token_axis`` is -2.
      rotation: cos and sin ``[..., T, R/2]``; the axes before T broadcast against the axes of x. If ``per_head``,
        ``[..., T, M, R/2]``: frequencies for each of M heads, where N is a multiple of M, and head n takes those of
        head ``n // (N/M)``.
      layout: the two features of a pair, ``"half"`` or ``"interleaved"``.
      start: the first feature to rotate.
      blocks: the R features are so many blocks of equal size, and the halves of a pair lie in one block (Gemma 4's
        vision tower has 2, for rows and columns); for ``"half"``.
      token_axis: the axis T of x: -3, or -2 with heads before tokens.
      implementation: ``"xla"`` for XLA's program, ``"pallas"`` for the TPU kernel, ``"plain"`` for operations of
        JAX alone: see :func:`rope_jax.attention.explain`. On a TPU, for a single device or
        inside ``shard_map``, None selects the kernel if x is bfloat16 or float32, T is at least 128, H is a
        multiple of 16 up to 1,024, ``start`` is 0, and the smallest block of all heads fits on the chip; otherwise
        XLA. With frequencies for each head, and with blocks, None selects XLA.

    Returns:
      As x, in x's dtype.

    Raises:
      TypeError: if x or the rotation is not floating, or ``rotation`` is not a :class:`Rotation`.
      ValueError: if the shapes do not match (for example x as ``[B, N, T, H]`` without ``token_axis=-2``),
        ``start + R`` is over H, H is odd with interleaved pairs, R/2 is not a multiple of ``blocks``, or the layout
        or implementation is unknown. ``"pallas"`` raises while lowering if the chip, the shapes or the dtypes do
        not suit the kernel.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> quarter_turn = rope_jax.Rotation(cos=jnp.array([[0.0]]), sin=jnp.array([[1.0]]))
      >>> rope_jax.rotate(jnp.array([[[3.0, 4.0, 5.0]]]), quarter_turn).tolist()
      [[[-4.0, 3.0, 5.0]]]
      >>> rope_jax.rotate(jnp.array([[[3.0, 4.0, 5.0]]]), quarter_turn, start=1).tolist()
      [[[3.0, -5.0, 4.0]]]
    """
    options: dict = dict(layout=layout, start=start, blocks=blocks, token_axis=token_axis)
    (rotated,) = rotate_all([x], rotation, implementation=implementation, **options)
    return rotated


def rotate_all(
    xs: Sequence,
    rotation: Rotation,
    *,
    layout: Layout = "half",
    start: int = 0,
    blocks: int = 1,
    token_axis: int = -3,
    implementation: RotateBackend | None = None,
) -> list[jax.Array]:
    """:func:`rotate` of several arrays, such as queries and keys, by a shared rotation.

    If a kernel is used, the arrays share all axes but N, and tokens are before heads, a single launch rotates all.
    """
    xs = [device_array("x", x) for x in xs]
    if not isinstance(rotation, Rotation):
        raise TypeError(
            f"rotation must be a Rotation, as rope.rotation(positions) gives, got {type(rotation).__name__}"
        )
    rotation = Rotation(jnp.asarray(rotation.cos), jnp.asarray(rotation.sin), rotation.per_head)
    for name, part in (("rotation.cos", rotation.cos), ("rotation.sin", rotation.sin)):
        check_dtype(name, part, jnp.floating, "floating")
    check_pairing(layout, start, blocks)
    check_token_axis(token_axis)
    check_choice("implementation", implementation, get_args(RotateBackend), optional=True)
    for x in xs:
        _check_shapes(x, rotation, layout, start, blocks, token_axis)
    options: dict = dict(layout=layout, start=start, blocks=blocks, token_axis=token_axis)
    rotated = rotate_unchecked(xs, rotation, implementation=implementation, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(rotated, xs)
    return rotated


def rotate_unchecked(
    xs, rotation: Rotation, *, layout: Layout, start: int, blocks: int, token_axis: int = -3, implementation=None
) -> list[jax.Array]:
    """:func:`rotate_all` for arguments that are known to be right."""
    if blocks == 1 and not rotation.per_head and token_axis == -3:
        return rotate_arrays(xs, *rotation, layout=layout, start=start, implementation=implementation)
    if implementation is None and (blocks > 1 or rotation.per_head):
        implementation = "xla"
    rotated = []
    for x in xs:
        view, parts = _as_tokens_and_heads(x, rotation, token_axis)
        if blocks == 1:
            (out,) = rotate_arrays([view], *parts, layout=layout, start=start, implementation=implementation)
        else:
            rotary_dim = 2 * rotation.cos.shape[-1]
            cut = lax.slice_in_dim(view, start, start + rotary_dim, axis=view.ndim - 1)
            cut = cut.reshape(*view.shape[:-1], blocks, 1, rotary_dim // blocks)
            parts = [part.reshape(*part.shape[:-1], 1, blocks, part.shape[-1] // blocks) for part in parts]
            (out,) = rotate_arrays([cut], *parts, layout=layout, implementation=implementation)
            out = join_unrotated(view, [out.reshape(*view.shape[:-1], rotary_dim)], start, rotary_dim)
        if token_axis == -2:  # axes of size 1 first: a mesh of explicit axes allows no other reshape
            out = lax.squeeze(out, [out.ndim - 2])
        rotated.append(out.reshape(x.shape))
    return rotated


def _as_tokens_and_heads(x, rotation: Rotation, token_axis: int) -> tuple[jax.Array, list[jax.Array]]:
    """x with axes that read as ``[..., T, N, H]``, not transposed, and cos and sin as ``[..., T, R/2]``."""
    if not rotation.per_head:
        if token_axis == -3:
            return x, list(rotation)
        # [..., N, T, H] is N rows of T tokens with one head.
        return x[..., None, :], [part[..., None, :, :] for part in rotation]
    num_heads = rotation.cos.shape[-2]
    group = x.shape[-5 - token_axis] // num_heads
    if token_axis == -3:
        # [..., T, M, G, H] is T rows of M tokens with the G heads of a group.
        return x.reshape(*x.shape[:-2], num_heads, group, x.shape[-1]), list(rotation)
    # [..., M, G, T, H] is M rows of G rows of T tokens with one head.
    *leading, _, length, head_dim = x.shape
    parts = [part.swapaxes(-3, -2)[..., None, :, :] for part in rotation]
    return x.reshape(*leading, num_heads, group, length, head_dim)[..., None, :], parts


def check_token_axis(token_axis: int) -> None:
    """Raises unless the axis T is -3 or -2."""
    if check_integer("token_axis", token_axis) not in (-3, -2):
        raise ValueError(f"token_axis must be -3 for [..., T, N, H] or -2 for [..., N, T, H], got {token_axis}")


def check_pairing(layout: Layout, start: int, blocks: int) -> None:
    """Raises unless the layout is known, and start and blocks are integers in range."""
    check_choice("layout", layout, get_args(Layout))
    check_integer("start", start, 0)
    if check_integer("blocks", blocks, 1) > 1 and layout == "interleaved":
        raise ValueError(f"blocks must be 1 with interleaved pairs, which are neighbours anyway, got {blocks}")


def _check_shapes(x, rotation: Rotation, layout: Layout, start: int, blocks: int, token_axis: int) -> None:
    """Raises unless x ``[..., T, N, H]`` matches ``cos, sin [..., T, R/2]`` or ``[..., T, M, R/2]``."""
    cos, sin = rotation
    check_dtype("x", x, jnp.floating, "floating")
    check_axes("x", x, "... T N H" if token_axis == -3 else "... N T H")
    length, heads, head_dim = x.shape[token_axis], x.shape[-5 - token_axis], x.shape[-1]
    if rotation.per_head:
        check_axes("rotation.cos", cos, "... T M R/2", T=length)
        if not cos.shape[-2] or heads % cos.shape[-2]:
            raise ValueError(
                f"x must have a multiple of M={cos.shape[-2]} heads, as rotation [..., T, M, R/2] = {cos.shape}, "
                f"got N={heads}"
            )
    else:
        check_axes("rotation.cos", cos, "... T R/2", T=length)
    if sin.shape != cos.shape:
        raise ValueError(f"rotation.sin must have the shape of rotation.cos {cos.shape}, got {sin.shape}")
    leading, num_pairs = x.shape[:-3], cos.shape[-1]
    own = cos.shape[: -3 if rotation.per_head else -2]
    if len(own) > len(leading) or any(c not in (1, n) for c, n in zip(own[::-1], leading[::-1], strict=False)):
        raise ValueError(
            f"rotation [..., T, R/2] = {cos.shape} must broadcast against x [..., T, N, H] = {x.shape} before T"
        )
    if not 1 <= num_pairs <= (head_dim - start) // 2:
        raise ValueError(
            f"rotary_dim R must be from 2 to head_dim H={head_dim}{f' - start {start}' if start else ''}, "
            f"got R={2 * num_pairs}"
        )
    if num_pairs % blocks:
        raise ValueError(f"blocks must divide R/2 = {num_pairs}, got {blocks}")
    if layout == "interleaved" and head_dim % 2:
        raise ValueError(f"head_dim H must be even for interleaved pairs, got {head_dim}")
