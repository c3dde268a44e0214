"""A layer's rotation as a value: schedule, layout and position axes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, device_array
from rope_jax.core.angles import Rotation, rotation, rotation_change
from rope_jax.core.frequencies import Frequencies, FrequencyChoice, Schedule
from rope_jax.core.primitive import Layout, RotateBackend
from rope_jax.core.rotate import rotate_all


@dataclasses.dataclass(frozen=True)
class Rope:
    """Schedule, layout and position axes of a layer's rotation: hashable, picklable, equal by value.

    ``rope(q, k, positions)`` rotates queries and keys, so that ``q_m . k_n`` depends on ``m - n`` only
    (RoFormer, section 3.2). Rotations compose, ``R(m) R(n) = R(m + n)``, if the attention factor is 1.

    Attributes:
      head_dim: H, the features of one head.
      schedule: maps rotary_dim to :class:`Frequencies`: ``Standard()``, ``Yarn(...)``, or your own.
      rotary_dim: R, the number of leading features to rotate, even; None for all of H.
      layout: the two features of a pair, ``"half"`` or ``"interleaved"``.
      axes: for positions ``[..., T, A]``, the axis of each of the R/2 pairs.

    Raises:
      ValueError: if rotary_dim is odd, below 2 or over head_dim, axes does not have R/2 entries, or the layout is
        unknown.
      TypeError: if the schedule is not callable and hashable.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.Llama3(factor=8.0, original_length=8192))
      >>> q, k = jnp.ones((2, 5, 8, 64)), jnp.ones((2, 5, 2, 64))  # [B, T, N, H], [B, T, K, H]
      >>> q, k = jax.jit(rope)(q, k, jnp.arange(5)[None])
      >>> q.shape, k.shape
      ((2, 5, 8, 64), (2, 5, 2, 64))
    """

    head_dim: int
    schedule: Schedule
    rotary_dim: int | None = None
    layout: Layout = "half"
    axes: tuple[int, ...] | None = None

    def __post_init__(self):
        rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if not 2 <= rotary_dim <= self.head_dim or rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, from 2 to head_dim={self.head_dim}, got {rotary_dim}")
        # The whole head is stored as None: both spellings compare equal, and replace(head_dim=...) keeps it whole.
        object.__setattr__(self, "rotary_dim", None if rotary_dim == self.head_dim else rotary_dim)
        if not callable(self.schedule) or isinstance(self.schedule, type):
            raise TypeError(f"schedule must be a schedule like Standard(), got {self.schedule!r}")
        try:
            hash(self.schedule)
        except TypeError:
            raise TypeError(f"schedule must be hashable, got {self.schedule!r}") from None
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {get_args(Layout)}, got {self.layout!r}")
        if self.axes is not None:
            object.__setattr__(self, "axes", tuple(int(axis) for axis in self.axes))
            if len(self.axes) != self.num_pairs or min(self.axes) < 0:
                raise ValueError(
                    f"axes must name a position axis, 0 or above, for each of the R/2 = {self.num_pairs} "
                    f"pairs, got {self.axes}"
                )

    @property
    def num_pairs(self) -> int:
        """R/2."""
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def needs_context_length(self) -> bool:
        """True if the schedule depends on the context length and its field ``context_length`` is None."""
        return getattr(self.schedule, "context_length", 0) is None

    def frequencies(self, context_length: int | jax.Array | None = None) -> Frequencies | FrequencyChoice:
        """The schedule's frequencies; ``context_length`` only for schedules that depend on the context length."""
        if context_length is None:
            frequencies = self.schedule(2 * self.num_pairs)
        elif hasattr(self.schedule, "context_length"):
            frequencies = cast(Any, self.schedule)(2 * self.num_pairs, context_length)
        else:
            raise ValueError(
                f"context_length must be left out: {type(self.schedule).__name__} does not depend on it"
            )
        if frequencies.num_pairs != self.num_pairs:
            raise ValueError(
                f"schedule must give R/2 = {self.num_pairs} frequencies, got {frequencies.num_pairs} "
                f"from {self.schedule!r}"
            )
        return frequencies

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
        return rotation(positions, self.frequencies(context_length), axes=self.axes)

    def rotate(self, x, rotation: Rotation, *, implementation: RotateBackend | None = None) -> jax.Array:
        """Rotates ``x [..., T, N, H]`` by a given rotation; ``implementation`` as for :func:`rotate`."""
        (rotated,) = self.rotate_all([x], rotation, implementation=implementation)
        return rotated

    def rotate_all(
        self, xs: Sequence, rotation: Rotation, *, implementation: RotateBackend | None = None
    ) -> list[jax.Array]:
        """Rotates arrays ``[..., T, N, H]`` of equal T together, in a single launch if a kernel is used."""
        xs = [jnp.asarray(x) for x in xs]
        for x in xs:
            check_axes("x", x, "... T N H", H=self.head_dim)
        if isinstance(rotation, Rotation):
            check_axes("rotation.cos", rotation.cos, "... T R/2", **{"R/2": self.num_pairs})
        return rotate_all(xs, rotation, layout=self.layout, implementation=implementation)

    def __call__(
        self,
        q,
        k,
        positions,
        *,
        context_length: int | jax.Array | None = None,
        implementation: RotateBackend | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Rotates ``q [..., T, N, H]`` and ``k [..., T, K, H]`` to ``positions [..., T]``; dtypes are kept."""
        rotation = self._checked_rotation(q, k, positions, context_length)
        q, k = self.rotate_all([q, k], rotation, implementation=implementation)
        return q, k

    def rerotate(self, k, positions, *, old_context_length, new_context_length) -> jax.Array:
        """Rotates keys again, from the frequencies of ``old_context_length`` to the frequencies of
        ``new_context_length``.

        For schedules that choose among fixed frequencies, such as :class:`LongRope`. The change of angle is exact
        at every int32 position; k is rounded once more, to its dtype.

        Args:
          k: ``[B, S, K, H]``, rotated to ``positions`` with the frequencies of ``old_context_length``.
          positions: integers ``[B or 1, S]``.
          old_context_length: integers, ``[]`` or ``[B]``; may be traced.
          new_context_length: likewise.

        Raises:
          ValueError: if the frequencies of the schedule change with every context length, or the rope has axes.

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
        if self.axes is not None:
            raise ValueError(f"axes must be None to rotate keys again, got {self.axes}")
        positions = device_array("positions", positions)
        return self.rotate(k, rotation_change(positions, old, new))

    def inverse(
        self,
        q,
        k,
        positions,
        *,
        context_length: int | jax.Array | None = None,
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
        rotation = self._checked_rotation(q, k, positions, context_length).inverse()
        q, k = self.rotate_all([q, k], rotation, implementation=implementation)
        return q, k

    def _checked_rotation(self, q, k, positions, context_length) -> Rotation:
        check_axes("q", q, "... T N H", H=self.head_dim)
        check_axes("k", k, "... T K H", T=q.shape[-3], H=self.head_dim)
        positions = device_array("positions", positions)
        check_axes("positions", positions, "... T" if self.axes is None else "... T A", T=q.shape[-3])
        return self.rotation(positions, context_length=context_length)
