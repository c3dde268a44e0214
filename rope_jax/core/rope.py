"""What is one layer's whole recipe, as a value?"""

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
    """Schedule, pairing and position axes of one layer's rotation: hashable, picklable, equal by value.

    ``rope(q, k, positions)`` turns queries and keys, so that ``q_m . k_n`` depends on ``m - n`` only
    (RoFormer, section 3.2). Turns add up, ``R(m) R(n) = R(m + n)``, where the attention factor is 1.

    Attributes:
      head_dim: H, the features of one head.
      schedule: maps rotary_dim to :class:`Frequencies`: ``Standard()``, ``Yarn(...)``, or your own.
      rotary_dim: R, the leading features that are turned, even; all of them where it is None.
      layout: which two features make a pair.
      axes: for positions ``[..., T, A]``, which axis each of the R/2 pairs reads.

    Raises:
      ValueError: if rotary_dim is odd, below 2 or over head_dim, axes has not R/2 entries, or the layout is
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
        # "All of it" is kept as None, so that equal recipes are equal and replace(head_dim=...) means what it says.
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
                    f"axes must name a position axis, 0 or above, for each of R/2 = {self.num_pairs} "
                    f"pairs, got {self.axes}"
                )

    @property
    def num_pairs(self) -> int:
        """R/2."""
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def needs_context_length(self) -> bool:
        """Whether its frequencies depend on the context_length of the sequence, and the schedule has none of its own."""
        return getattr(self.schedule, "context_length", 0) is None

    def frequencies(self, context_length: int | jax.Array | None = None) -> Frequencies | FrequencyChoice:
        """The schedule's frequencies; ``context_length`` is for the schedules that depend on it, and only for them."""
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
        """Cos and sin at the positions, to be computed once and handed to every layer.

        Args:
          positions: as for :func:`rope_jax.rotation`.
          context_length: for :class:`DynamicNTK` and :class:`LongRope`, the number of tokens that the frequencies
            are for: an integer, or integers ``[]`` or ``[B]`` that may be traced.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.DynamicNTK(factor=2.0, original_length=16))
          >>> rope.rotation(jnp.zeros((2, 3), int), context_length=jnp.array([8, 24])).cos.shape
          (2, 3, 32)
        """
        return rotation(positions, self.frequencies(context_length), axes=self.axes)

    def rotate(self, x, rotation: Rotation, *, implementation: RotateBackend | None = None) -> jax.Array:
        """Turns ``x [..., T, N, H]`` by a rotation that is at hand; ``implementation`` as in :func:`rotate`."""
        (turned,) = self.rotate_all([x], rotation, implementation=implementation)
        return turned

    def rotate_all(
        self, xs: Sequence, rotation: Rotation, *, implementation: RotateBackend | None = None
    ) -> list[jax.Array]:
        """Turns queries and keys, and whatever else has their T, together: one launch where there is a kernel."""
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
        """``q [..., T, N, H]`` and ``k [..., T, K, H]`` turned to ``positions [..., T]``; dtypes are kept."""
        turn = self._checked_rotation(q, k, positions, context_length)
        q, k = self.rotate_all([q, k], turn, implementation=implementation)
        return q, k

    def rerotate(self, k, positions, *, old_context_length, new_context_length) -> jax.Array:
        """Keys that were turned by the frequencies for one context_length, as if turned by those for another.

        For a schedule that chooses among fixed frequencies, :class:`LongRope`. The change of angle is exact at
        every int32 position; k is rounded once more, to its dtype.

        Args:
          k: ``[B, S, K, H]``, turned to ``positions`` for ``old_context_length``.
          positions: integers ``[B or 1, S]``.
          old_context_length: integers, ``[]`` or ``[B]``; may be traced.
          new_context_length: likewise.

        Raises:
          ValueError: if the schedule's frequencies change with every context_length: keep such keys unrotated.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> schedule = rope_jax.LongRope(
          ...     short_factor=(1.0, 1.0), long_factor=(2.0, 4.0), factor=4.0, original_length=16
          ... )
          >>> rope = rope_jax.Rope(head_dim=4, schedule=schedule)
          >>> k, positions = jnp.ones((1, 3, 1, 4)), jnp.arange(14, 17)[None]
          >>> short, long = (rope.rotate(k, rope.rotation(positions, context_length=context_length)) for context_length in (16, 17))
          >>> moved = rope.rerotate(short, positions, old_context_length=16, new_context_length=17)
          >>> bool(jnp.allclose(moved, long, atol=1e-6))
          True
        """
        old, new = self.frequencies(old_context_length), self.frequencies(new_context_length)
        if not (old.on_host and new.on_host):
            raise ValueError(
                f"schedule must choose among fixed frequencies, got {type(self.schedule).__name__}: store its keys "
                "unrotated, init_cache(rotated=False)"
            )
        if self.axes is not None:
            raise ValueError(f"axes must be None: keys of several position axes do not move, got {self.axes}")
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
        """Undoes ``rope(q, k, positions)``, the attention factor included.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> rope = rope_jax.Rope(head_dim=4, schedule=rope_jax.Standard())
          >>> q = jnp.ones((1, 3, 2, 4)); positions = jnp.array([7, 8, 9])
          >>> bool(jnp.allclose(rope.inverse(*rope(q, q, positions), positions)[0], q, atol=1e-6))
          True
        """
        turn = self._checked_rotation(q, k, positions, context_length).inverse()
        q, k = self.rotate_all([q, k], turn, implementation=implementation)
        return q, k

    def _checked_rotation(self, q, k, positions, context_length) -> Rotation:
        check_axes("q", q, "... T N H", H=self.head_dim)
        check_axes("k", k, "... T K H", T=q.shape[-3], H=self.head_dim)
        positions = device_array("positions", positions)
        check_axes("positions", positions, "... T" if self.axes is None else "... T A", T=q.shape[-3])
        return self.rotation(positions, context_length=context_length)
