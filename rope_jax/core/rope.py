"""A layer's rotation as a value: schedule, and the features that make a pair."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_axes, check_dtype, check_integer, device_array, shown
from rope_jax.core.angles import Rotation, leading_axes, rotation, rotation_change
from rope_jax.core.frequencies import Frequencies, FrequencyChoice, Schedule, call_schedule, check_schedule
from rope_jax.core.primitive import Layout, RotateBackend
from rope_jax.core.rotate import check_pairing, check_token_axis, rotate_all
from rope_jax.core.schedules import repr_without_defaults


@dataclasses.dataclass(frozen=True)
class Rope:
    """Schedule and pairs of features of a layer's rotation: hashable, picklable, equal by value.

    ``rope(q, k, positions)`` rotates queries and keys, so that ``q_m . k_n`` depends on ``m - n`` only
    (RoFormer, section 3.2). Rotations compose, ``R(m) R(n) = R(m + n)``, if the attention factor is 1.

    Attributes:
      head_dim: H, the features of one head.
      schedule: maps rotary_dim to :class:`Frequencies`: ``Standard()``, ``Yarn(...)``, or your own.
      rotary_dim: R, the number of features to rotate, even; None for all from ``start`` on.
      layout: the two features of a pair, ``"half"`` or ``"interleaved"``.
      start: the first feature to rotate.
      blocks: the R features are so many equal blocks, and the halves of a pair lie in one block; see
        :func:`rotate`.

    Raises:
      ValueError: if rotary_dim is odd, below 2 or over ``head_dim - start``, R/2 is not a multiple of blocks, or
        the layout is unknown.
      TypeError: if the schedule is not callable and hashable.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.Llama3(factor=8.0, original_length=8192))
      >>> q, k = jnp.ones((2, 5, 8, 64)), jnp.ones((2, 5, 2, 64))  # [B, T, N, H], [B, T, K, H]
      >>> q, k = jax.jit(rope)(q, k, jnp.arange(5)[None])
      >>> q.shape, k.shape
      ((2, 5, 8, 64), (2, 5, 2, 64))
      >>> video = rope_jax.Rope(128, rope_jax.Axial(sizes=(44, 42, 42)), layout="interleaved")  # Wan
      >>> video(q.repeat(2, -1), k.repeat(2, -1), jnp.zeros((5, 3), int))[0].shape  # positions [T, A]
      (2, 5, 8, 128)
    """

    head_dim: int
    schedule: Schedule
    rotary_dim: int | None = None
    layout: Layout = "half"
    start: int = 0
    blocks: int = 1

    __repr__ = repr_without_defaults

    def __post_init__(self):
        for name in ("head_dim", "start", "blocks"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name)))
        if self.rotary_dim is not None:
            object.__setattr__(self, "rotary_dim", check_integer("rotary_dim", self.rotary_dim))
        check_pairing(self.layout, self.start, self.blocks)
        most = self.head_dim - self.start
        rotary_dim = most if self.rotary_dim is None else self.rotary_dim
        if not 2 <= rotary_dim <= most or rotary_dim % 2:
            before = f" - start {self.start}" if self.start else ""
            raise ValueError(
                f"rotary_dim must be even, from 2 to head_dim={self.head_dim}{before}, got {rotary_dim}"
            )
        # All features are stored as None: both spellings compare equal, and replace(head_dim=...) keeps them all.
        object.__setattr__(self, "rotary_dim", None if rotary_dim == most else rotary_dim)
        if rotary_dim // 2 % self.blocks:
            raise ValueError(f"blocks must divide R/2 = {rotary_dim // 2}, got {self.blocks}")
        check_schedule(self.schedule)
        try:
            hash(self.schedule)
        except TypeError:
            raise TypeError(f"schedule must be hashable, got {shown(self.schedule)}") from None

    @property
    def num_pairs(self) -> int:
        """R/2."""
        return (self.rotary_dim or self.head_dim - self.start) // 2

    @property
    def feature_pairs(self) -> np.ndarray:
        """The two features of each pair: integers ``[2, R/2]``."""
        first = np.arange(self.num_pairs)
        if self.layout == "interleaved":
            return self.start + np.stack([2 * first, 2 * first + 1])
        half = self.num_pairs // self.blocks
        first = first % half + first // half * 2 * half
        return self.start + np.stack([first, first + half])

    @functools.cached_property
    def _axes_and_heads(self) -> tuple[int, int | None]:
        """A and N of the frequencies, once for each rope: every call asks for them."""
        frequencies = self.frequencies(1 if self.needs_context_length else None)
        return frequencies.num_axes, frequencies.num_heads

    @property
    def num_axes(self) -> int:
        """A, the position axes of the frequencies; 1 for text."""
        return self._axes_and_heads[0]

    @property
    def num_heads(self) -> int | None:
        """N, the heads with frequencies of their own; None if all heads share the frequencies."""
        return self._axes_and_heads[1]

    @property
    def needs_context_length(self) -> bool:
        """True if the schedule depends on the context length and its field ``context_length`` is None."""
        return getattr(self.schedule, "context_length", 0) is None

    def frequencies(self, context_length: int | jax.Array | None = None) -> Frequencies | FrequencyChoice:
        """The schedule's frequencies; ``context_length`` only for schedules that depend on the context length."""
        if context_length is None:
            return call_schedule(self.schedule, 2 * self.num_pairs)
        if not hasattr(self.schedule, "context_length"):
            raise ValueError(
                f"context_length must be left out: {type(self.schedule).__name__} does not depend on it"
            )
        return call_schedule(self.schedule, 2 * self.num_pairs, context_length)

    def rotation(self, positions, *, context_length: int | jax.Array | None = None) -> Rotation:
        """Cos and sin at the positions: compute them once and pass them to every layer.

        Args:
          positions: as for :func:`rope_jax.rotation`.
          context_length: for :class:`DynamicNTK` and :class:`LongRope`, in tokens: an integer, or integers ``[]``
            or ``[B]``, which may be traced.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.DynamicNTK(factor=2.0, original_length=16))
          >>> rope.rotation(jnp.zeros((2, 3), int), context_length=jnp.array([8, 24])).cos.shape
          (2, 3, 32)
        """
        return rotation(positions, self.frequencies(context_length))

    def rotate(
        self, x, rotation: Rotation, *, token_axis: int = -3, implementation: RotateBackend | None = None
    ) -> jax.Array:
        """Rotates ``x [..., T, N, H]`` by a given rotation; options as for :func:`rotate`."""
        (rotated,) = self.rotate_all([x], rotation, token_axis=token_axis, implementation=implementation)
        return rotated

    def rotate_all(
        self,
        xs: Sequence,
        rotation: Rotation,
        *,
        token_axis: int = -3,
        implementation: RotateBackend | None = None,
    ) -> list[jax.Array]:
        """Rotates arrays ``[..., T, N, H]`` of equal T together, in a single launch if a kernel is used."""
        xs = [device_array("x", x) for x in xs]
        for x in xs:
            check_axes("x", x, _axes_of("N", token_axis), H=self.head_dim)
        if isinstance(rotation, Rotation):
            heads = {} if self.num_heads is None else {"N": self.num_heads}
            if rotation.per_head != bool(heads):
                raise ValueError(f"rotation must have per_head={bool(heads)}, as the rope, got {rotation.per_head}")
            axes = "... T N R/2" if heads else "... T R/2"
            check_axes("rotation.cos", rotation.cos, axes, **heads, **{"R/2": self.num_pairs})
        return rotate_all(
            xs,
            rotation,
            layout=self.layout,
            start=self.start,
            blocks=self.blocks,
            token_axis=token_axis,
            implementation=implementation,
        )

    def __call__(
        self,
        q,
        k,
        positions,
        *,
        context_length: int | jax.Array | None = None,
        token_axis: int = -3,
        implementation: RotateBackend | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Rotates ``q [..., T, N, H]`` and ``k [..., T, K, H]`` to ``positions [..., T]``; dtypes are kept.

        Positions are ``[..., T, A]`` if the schedule has A axes. With ``token_axis=-2``, q is ``[..., N, T, H]``
        and k ``[..., K, T, H]``.
        """
        rotation = self._checked_rotation(q, k, positions, context_length, token_axis)
        q, k = self.rotate_all([q, k], rotation, token_axis=token_axis, implementation=implementation)
        return q, k

    def rerotate(self, k, positions, *, old_context_length, new_context_length) -> jax.Array:
        """Rotates keys again, from the frequencies of ``old_context_length`` to the frequencies of
        ``new_context_length``.

        For schedules that choose among fixed frequencies, such as :class:`LongRope`. The change of angle is exact
        at every int32 position; k is rounded once more, to its dtype.

        Args:
          k: ``[B, S, K, H]``, rotated to ``positions`` with the frequencies of ``old_context_length``.
          positions: integers ``[B or 1, S]``, or ``[B or 1, S, A]``.
          old_context_length: integers, ``[]`` or ``[B]``; may be traced.
          new_context_length: likewise.

        Raises:
          ValueError: if the frequencies of the schedule change with every context length.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> schedule = rope_jax.LongRope(
          ...     short_factor=(1.0, 1.0), long_factor=(2.0, 4.0), factor=4.0, original_length=16
          ... )
          >>> rope = rope_jax.Rope(head_dim=4, schedule=schedule)
          >>> k, positions = jnp.ones((1, 3, 1, 4)), jnp.arange(14, 17)[None]
          >>> short = rope.rotate(k, rope.rotation(positions, context_length=16))
          >>> long = rope.rotate(k, rope.rotation(positions, context_length=17))
          >>> moved = rope.rerotate(short, positions, old_context_length=16, new_context_length=17)
          >>> bool(jnp.allclose(moved, long, atol=1e-6))
          True
        """
        old, new = self.frequencies(old_context_length), self.frequencies(new_context_length)
        if not (old.on_host and new.on_host):
            raise ValueError(
                f"schedule must choose among fixed frequencies, got {type(self.schedule).__name__}: "
                "store unrotated keys, with init_cache(rotated=False)"
            )
        k, positions = device_array("k", k), device_array("positions", positions)
        check_axes("k", k, "... S K H", H=self.head_dim)
        check_dtype("k", k, jnp.floating, "floating")
        check_dtype("positions", positions, jnp.integer, "integer")
        leading_axes(positions, self.num_axes)
        return self.rotate(k, rotation_change(positions, old, new))

    def inverse(
        self,
        q,
        k,
        positions,
        *,
        context_length: int | jax.Array | None = None,
        token_axis: int = -3,
        implementation: RotateBackend | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Inverts ``rope(q, k, positions)``, including the attention factor.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> rope = rope_jax.Rope(head_dim=4, schedule=rope_jax.Standard())
          >>> q = jnp.ones((1, 3, 2, 4)); positions = jnp.array([7, 8, 9])
          >>> bool(jnp.allclose(rope.inverse(*rope(q, q, positions), positions)[0], q, atol=1e-6))
          True
        """
        rotation = self._checked_rotation(q, k, positions, context_length, token_axis).inverse()
        q, k = self.rotate_all([q, k], rotation, token_axis=token_axis, implementation=implementation)
        return q, k

    def _checked_rotation(self, q, k, positions, context_length, token_axis: int) -> Rotation:
        q, k = device_array("q", q), device_array("k", k)
        check_axes("q", q, _axes_of("N", token_axis), H=self.head_dim)
        length = q.shape[token_axis]
        check_axes("k", k, _axes_of("K", token_axis), T=length, H=self.head_dim)
        positions = device_array("positions", positions)
        given = positions.shape[-1 if self.num_axes == 1 else -2 :][:1]
        other = -5 - token_axis  # the axis of heads
        if given != (length,) and given == q.shape[other:][:1] == k.shape[other:][:1]:
            raise ValueError(
                f"positions must be of T={length} tokens, got {given[0]}, as axis {other} of q and k has: "
                f"pass token_axis={other} if that is the axis of tokens"
            )
        leading_axes(positions, self.num_axes, T=length)
        return self.rotation(positions, context_length=context_length)


def _axes_of(heads: str, token_axis: int) -> str:
    check_token_axis(token_axis)
    return f"... T {heads} H" if token_axis == -3 else f"... {heads} T H"
