"""Cosine and sine of the angle of each pair at a position, exact for every integer position."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from rope_jax._checks import align_ranks, check_axes, check_integer, device_array
from rope_jax.core.explicit import by_xla, spec_of
from rope_jax.core.frequencies import Frequencies, FrequencyChoice
from rope_jax.core.phases import (
    cos_and_sin,
    fixed_point_turns,
    rounded_turns,
    scaled_coefficients,
    subtract_turns,
    sum_of_phases,
)
from rope_jax.core.whole import keep_whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """``attention_factor`` times the cosine and the sine of the angle of each pair: ``cos, sin = rotation``.

    Attributes:
      cos: float32 ``[..., T, R/2]``, or ``[..., T, N, R/2]`` with frequencies for each head.
      sin: float32, likewise.
      per_head: whether heads have frequencies of their own.
    """

    cos: jax.Array
    sin: jax.Array
    per_head: bool = dataclasses.field(default=False, metadata={"static": True})

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.cos, self.sin))

    def inverse(self) -> "Rotation":
        """The inverse rotation: the negated angle, and 1/a for the attention factor a.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> rotation = rope_jax.Rotation(jnp.array([[0.0]]), jnp.array([[2.0]]))  # a quarter turn, a = 2
          >>> [float(part[0, 0]) for part in rotation.inverse()]
          [0.0, -0.5]
        """
        square = self.cos * self.cos + self.sin * self.sin  # attention_factor^2
        return Rotation(self.cos / square, -self.sin / square, self.per_head)

    def prepend_identity(self, num_tokens: int) -> "Rotation":
        """With tokens in front that are not rotated: class, register or prefix tokens.

        Args:
          num_tokens: how many tokens to add, at least 0.

        Raises:
          TypeError: if num_tokens is not an integer.
          ValueError: if num_tokens is negative.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> half_turn = rope_jax.Rotation(jnp.array([[-1.0]]), jnp.array([[0.0]]))
          >>> half_turn.prepend_identity(2).cos.ravel().tolist()
          [1.0, 1.0, -1.0]
        """
        count, token_axis = check_integer("num_tokens", num_tokens, 0), -3 if self.per_head else -2

        def pad(part, value):
            part = jnp.asarray(part)
            widths = [(0, 0, 0)] * part.ndim
            widths[token_axis] = (count, 0, 0)
            return lax.pad(part, jnp.asarray(value, part.dtype), widths)

        return Rotation(pad(self.cos, 1), pad(self.sin, 0), self.per_head)


def rotation(positions, frequencies: Frequencies | FrequencyChoice) -> Rotation:
    """``a * (cos, sin)(m . theta_i + phase_i)`` for every position m and pair i (RoFormer, section 3.2.2).

    Text has one position axis: ``m * theta_i``. With A axes, each pair has a wave vector: ``m . theta_i = sum_a m_a
    theta_ai`` (Heo et al. 2024, "Rotary Position Embedding for Vision Transformer", section 3.2).

    Integer positions and host frequencies: the error is at most ``1.2e-7 * max(1, a)`` at every int32
    position, for any matmul precision and with x64 on or off, if no pair reads more than 7 axes; each further axis
    adds ``4.4e-9``. With x64, int64 positions add ``|m| * 2^-62`` radians. A phase in a jax array is added by a
    product in float32, and the bound is then ``3e-7 * max(1, a)``.

    Float positions, or frequencies in a jax array (learned, traced): the angle is computed in float32, with an
    error up to ``(A + 1) 2^-24 sum_a |m_a * theta_ai|`` radians; a phase counts as one more axis. Both positions
    and frequencies are then differentiable.

    Args:
      positions: integers or float32/float64 ``[..., T]``, or ``[..., T, A]`` for frequencies of A axes; in the unit
        of the frequencies.
      frequencies: :class:`Frequencies` or a :class:`FrequencyChoice`, as schedules return them. Batch axes, and
        the index of a choice, are the axes of the positions before T: ``[B, R/2]`` for positions ``[B, T]``.

    Returns:
      :class:`Rotation` of float32 ``[..., T, R/2]``, or ``[..., T, N, R/2]`` with frequencies for each head.

    Raises:
      TypeError: if positions are bool, bfloat16 or float16, or frequencies are of another type.
      ValueError: if host positions do not fit in the integer dtype, positions do not have the A axes of the
        frequencies, or the leading axes do not broadcast.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> cos, sin = rope_jax.rotation(jnp.array([2_147_483_647]), rope_jax.Standard()(128))
      >>> cos.shape, f"{cos[0, 0]:.6f}"  # cos(2147483647)
      ((1, 64), '-0.688837')
      >>> diagonal = rope_jax.Frequencies([[1.0, 0.0], [1.0, 0.1]])  # the first pair reads the sum of both axes
      >>> rope_jax.rotation(rope_jax.grid_positions(4, 6), diagonal).cos.shape
      (24, 2)
    """
    if not isinstance(frequencies, Frequencies | FrequencyChoice):
        raise TypeError(
            f"frequencies must be Frequencies or FrequencyChoice, got {type(frequencies).__name__}; "
            "call a schedule with rotary_dim, or wrap a learned array as Frequencies(array)"
        )
    positions = device_array("positions", positions)
    is_integer = jnp.issubdtype(positions.dtype, jnp.integer)
    if not is_integer and positions.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"positions must be integers, float32 or float64, got dtype {positions.dtype}")
    leading = leading_axes(positions, frequencies.num_axes)
    try:
        jnp.broadcast_shapes(leading, frequencies.leading_shape)
    except ValueError:
        raise ValueError(
            "positions before T and frequencies before R/2 must have the same axes, "
            f"got {leading} and {frequencies.leading_shape}"
        ) from None

    coordinates, columns = _coordinates(positions, frequencies)
    first = _first(frequencies)
    if is_integer and not isinstance(first.inv_freq, jax.Array):
        coefficients = _lookup(frequencies, lambda f: scaled_coefficients(f.attention_factor))
        result = _exact_rotation(coordinates, *_words(frequencies, columns), coefficients)
        if isinstance(first.phase, jax.Array):
            result = _add_phase(result, first.phase)
    else:
        result = _float_rotation(coordinates, frequencies, columns)
    return _split_heads(result, frequencies)


def _options(frequencies: Frequencies | FrequencyChoice) -> tuple[Frequencies, ...]:
    return (frequencies,) if isinstance(frequencies, Frequencies) else frequencies.options


def _first(frequencies: Frequencies | FrequencyChoice) -> Frequencies:
    return _options(frequencies)[0]


def _split_heads(rotation: Rotation, frequencies) -> Rotation:
    """``[..., T, N R/2]`` as ``[..., T, N, R/2]``, if heads have frequencies of their own."""
    if frequencies.num_heads is None:
        return rotation
    sizes = frequencies.num_heads, frequencies.num_pairs
    cos, sin = (part.reshape(*part.shape[:-1], *sizes) for part in rotation)
    return Rotation(cos, sin, per_head=True)


def leading_axes(positions, num_axes: int, *, argument: str = "positions", **sizes: int) -> tuple[int, ...]:
    """The axes ``[...]`` of positions ``[..., T]`` for one axis, else ``[..., T, A]``.

    Raises:
      ValueError: if positions have other axes.
    """
    if num_axes == 1:
        check_axes(argument, positions, "... T", **sizes)
        return positions.shape[:-1]
    if positions.ndim < 2 or positions.shape[-1] != num_axes:
        raise ValueError(
            f"{argument} must be [..., T, A={num_axes}] for frequencies of {num_axes} position axes, "
            f"got shape {positions.shape}: pass a coordinate for each axis"
        )
    check_axes(argument, positions, "... T A", **sizes)
    return positions.shape[:-2]


def rotation_change(positions, old, new) -> Rotation:
    """The rotation from ``old`` to ``new`` frequencies: ``(a'/a) (cos, sin)(m . (theta'_i - theta_i))``.

    As exact as :func:`rotation` at every int32 position, since frequencies are subtracted as 64-bit fixed-point
    turns.

    Args:
      positions: integers ``[..., T]``, or ``[..., T, A]``.
      old: host frequencies, or a choice among host frequencies.
      new: likewise, of the same shape.

    Returns:
      :class:`Rotation` as of :func:`rotation`.
    """
    every_axis = [_of_axis(axis) for axis in range(new.num_axes)]
    (old_words, old_phase), (new_words, new_phase) = (_words(each, every_axis) for each in (old, new))
    phase = None
    if old_phase is not None or new_phase is not None:
        old_phase, new_phase = (jnp.uint32([0]) if each is None else each for each in (old_phase, new_phase))
        phase = new_phase - old_phase
    words = list(map(subtract_turns, new_words, old_words))
    new_factor, old_factor = (
        _lookup(frequencies, lambda f: np.array(f.attention_factor, np.float32)) for frequencies in (new, old)
    )
    factor = (new_factor / old_factor)[..., None, None]
    cos, sin = _cos_sin(_all_coordinates(positions, new.num_axes), words, phase, scaled_coefficients(1.0))
    return _split_heads(Rotation(factor * cos, factor * sin), new)


# ----------------------------------------------------------------------------------- which coordinate a pair reads

Column = Callable[[Any], Any]
"""From an array ``[..., A, M]`` to the entries ``[..., M]`` that multiply one of the summed coordinates."""


def _coordinates(positions, frequencies) -> tuple[list[jax.Array], list[Column]]:
    """The coordinates ``[..., T, M or 1]`` whose multiples are summed, and the entries that multiply them.

    M counts the pairs of all heads with frequencies of their own. If each pair reads one axis at most, its
    coordinate is gathered, and nothing is summed.
    """
    num_axes = frequencies.num_axes
    if num_axes > 1 and (axes := _single_axes(frequencies)) is not None:
        return [positions[..., axes]], [lambda matrix: matrix[..., axes, np.arange(axes.size)]]
    return _all_coordinates(positions, num_axes), [_of_axis(axis) for axis in range(num_axes)]


def _all_coordinates(positions, num_axes: int) -> list[jax.Array]:
    return [positions[..., None]] if num_axes == 1 else [positions[..., a, None] for a in range(num_axes)]


def _of_axis(axis: int) -> Column:
    return lambda matrix: matrix[..., axis, :]


def _phase(frequencies: Frequencies):
    """The phases of all heads side by side: ``[..., M]``."""
    phase = frequencies.phase
    assert phase is not None
    return phase if frequencies.num_heads is None else phase.reshape(*phase.shape[:-2], -1)


def _single_axes(frequencies) -> np.ndarray | None:
    """The axis that each pair reads, ``[M]``; None if a pair reads several, or the frequencies are not known."""
    if isinstance(_first(frequencies).inv_freq, jax.Array):
        return None
    read = np.any([_matrix(option) != 0 for option in _options(frequencies)], axis=0)
    return np.argmax(read, axis=0) if np.all(read.sum(axis=0) <= 1) else None


def _matrix(frequencies: Frequencies):
    """Frequencies of all heads side by side: ``[..., A, M]``."""
    inv_freq, num_heads = frequencies.inv_freq, frequencies.num_heads
    if num_heads is not None:
        inv_freq = inv_freq.swapaxes(-3, -2)
        return inv_freq.reshape(*inv_freq.shape[:-2], num_heads * frequencies.num_pairs)
    return inv_freq if inv_freq.ndim - frequencies.num_batch_axes == 2 else inv_freq[..., None, :]


def _lookup(
    frequencies: Frequencies | FrequencyChoice, table: Callable[[Frequencies], np.ndarray | jax.Array]
) -> jax.Array:
    """``table`` of the frequencies, or of the chosen option in each row: ``[..., *table]``."""
    if isinstance(frequencies, Frequencies):
        return jnp.asarray(table(frequencies))
    tables = jnp.asarray(np.stack([table(option) for option in frequencies.options]))
    # An index out of range reads NaN coefficients, so its row becomes NaN.
    take = by_xla(
        lambda tables, index: tables.at[index].get(mode="fill", wrap_negative_indices=False),
        PartitionSpec(*spec_of(frequencies.index), *[None] * (tables.ndim - 1)),
    )
    return take(tables, frequencies.index)


# --------------------------------------------------------------------------------------- the exact path


def _words(frequencies, columns: list[Column]) -> tuple[list[jax.Array], jax.Array | None]:
    """The fixed-point turns of each coordinate, uint32 ``[..., 2, M]``, and of the phase ``[..., M]``."""

    def turns(column: Column) -> jax.Array:
        return _lookup(frequencies, lambda f: fixed_point_turns(column(_matrix(f))))

    phase = None
    if isinstance(_first(frequencies).phase, np.ndarray):
        phase = _lookup(frequencies, lambda f: rounded_turns(_phase(f)))
    return [turns(column) for column in columns], phase


def _cos_sin(coordinates, words, phase, coefficients) -> Rotation:
    phases = sum_of_phases(coordinates, words)
    if phase is not None:
        phases, phase = align_ranks(phases, phase[..., None, :])
        phases += phase
    return Rotation(*cos_and_sin(phases, coefficients))


# Inlined, XLA for CPUs evaluates the angles again for each head.
_whole_cos_sin = keep_whole(_cos_sin)


@jax.jit
def _exact_rotation(coordinates, words, phase, coefficients) -> Rotation:
    arguments = coordinates, words, phase, coefficients
    return lax.platform_dependent(*arguments, cpu=_whole_cos_sin, default=_cos_sin)


def _add_phase(rotation: Rotation, phase) -> Rotation:
    """Rotates further by phases ``[R/2]`` or ``[N, R/2]`` in a jax array, differentiable in them."""
    phase = phase.astype(jnp.float64 if phase.dtype == jnp.float64 else jnp.float32).ravel()
    cos, sin, _ = align_ranks(
        *(part.astype(jnp.float32) for part in (jnp.cos(phase), jnp.sin(phase))), rotation.cos
    )
    return Rotation(rotation.cos * cos - rotation.sin * sin, rotation.sin * cos + rotation.cos * sin)


# --------------------------------------------------------------------------------------- the float path


def _float_rotation(coordinates, frequencies, columns: list[Column]) -> Rotation:
    arrays = [coordinates[0]]
    if isinstance(frequencies, Frequencies):
        arrays += [part for part in (frequencies.inv_freq, frequencies.phase) if isinstance(part, jax.Array)]
    dtype = np.dtype(np.float64 if any(array.dtype == jnp.float64 for array in arrays) else np.float32)
    matrix = _lookup(frequencies, lambda f: _matrix(f).astype(dtype))
    factor = _lookup(frequencies, lambda f: np.array(f.attention_factor, dtype))[..., None, None]
    terms = [
        functools.reduce(jnp.multiply, align_ranks(coordinate.astype(dtype), column(matrix)[..., None, :]))
        for coordinate, column in zip(coordinates, columns, strict=True)
    ]
    if _first(frequencies).phase is not None:
        terms.append(_lookup(frequencies, lambda f: _phase(f).astype(dtype))[..., None, :])
    angles = functools.reduce(jnp.add, align_ranks(*terms))
    angles, factor = align_ranks(angles, factor)
    return Rotation((factor * jnp.cos(angles)).astype(jnp.float32), (factor * jnp.sin(angles)).astype(jnp.float32))
