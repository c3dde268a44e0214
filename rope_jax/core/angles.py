"""Cosine and sine at a position, exact for every integer position.

A frequency is stored in turns per position, as a fraction of 2^64 in two uint32 words. The phase is the product of
position and frequency modulo 2^64: whole turns fall off by overflow, and large positions lose no digits. Short
polynomials give the sine and cosine of the phase.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from rope_jax._checks import check_axes, device_array
from rope_jax.core.frequencies import Frequencies, FrequencyChoice


class Rotation(NamedTuple):
    """``attention_factor`` times the cosine and the sine of the angle of each pair.

    Attributes:
      cos: float32 ``[..., T, R/2]``.
      sin: float32 ``[..., T, R/2]``.
    """

    cos: jax.Array
    sin: jax.Array

    def inverse(self) -> "Rotation":
        """The inverse rotation: the negated angle, and 1/a for the attention factor a.

        Example:
          >>> import jax.numpy as jnp, rope_jax
          >>> rotation = rope_jax.Rotation(jnp.array([[0.0]]), jnp.array([[2.0]]))  # a quarter turn, a = 2
          >>> [float(part[0, 0]) for part in rotation.inverse()]
          [0.0, -0.5]
        """
        square = self.cos * self.cos + self.sin * self.sin  # attention_factor^2
        return Rotation(self.cos / square, -self.sin / square)


def rotation(
    positions, frequencies: Frequencies | FrequencyChoice, *, axes: Sequence[int] | None = None
) -> Rotation:
    """``a * (cos, sin)(m * theta_i)`` for every position m and pair i (RoFormer, section 3.2.2).

    Integer positions and host frequencies: the error is at most ``1.2e-7 * max(1, a)`` at every int32
    position, for any matmul precision and with x64 on or off. With x64, int64 positions add
    ``|m| * 2^-62`` radians.

    Float positions, or frequencies in a jax array (learned, traced): the angle is computed in float32, with an
    error up to ``|m * theta_i| * 2^-23`` radians. Both positions and frequencies are then differentiable.

    Args:
      positions: integers or float32/float64 ``[..., T]``, or ``[..., T, A]`` with ``axes``; in the unit
        of the frequencies.
      frequencies: :class:`Frequencies` or a :class:`FrequencyChoice`, as schedules return them. Traced frequencies
        and the index of a choice have the axes of the positions before T: ``[B, R/2]`` for positions ``[B, T]``.
      axes: for each of the R/2 pairs, the index of its position axis, in ``[0, A)``.

    Returns:
      :class:`Rotation` of float32 ``[..., T, R/2]``.

    Raises:
      TypeError: if positions are bool, bfloat16 or float16, or frequencies are of another type.
      ValueError: if host positions do not fit in the integer dtype, ``axes`` does not have R/2 entries in
        ``[0, A)``, or the leading axes do not broadcast.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> cos, sin = rope_jax.rotation(jnp.array([2_147_483_647]), rope_jax.Standard()(128))
      >>> cos.shape, f"{cos[0, 0]:.6f}"  # cos(2147483647)
      ((1, 64), '-0.688837')
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
    check_axes("positions", positions, "... T" if axes is None else "... T A")
    leading = positions.shape[: -1 if axes is None else -2]
    try:
        jnp.broadcast_shapes(leading, frequencies.leading_shape)
    except ValueError:
        raise ValueError(
            "positions before T and frequencies before R/2 must have the same axes, "
            f"got {leading} and {frequencies.leading_shape}"
        ) from None

    # From here on positions are [..., T, R/2], or [..., T, 1] if all pairs share a position.
    positions = positions[..., None] if axes is None else _select_axes(positions, axes, frequencies.num_pairs)
    if is_integer and frequencies.on_host:
        words, coefficients = _lookup(frequencies, fixed_point_turns), _lookup(frequencies, _coefficients)
        return _exact_rotation(positions, words, coefficients)
    return _float_rotation(positions, frequencies)


def rotation_change(positions, old, new) -> Rotation:
    """The rotation from ``old`` to ``new`` frequencies: ``(a'/a) (cos, sin)(m (theta'_i - theta_i))``.

    As exact as :func:`rotation` at every int32 position, since frequencies are subtracted as 64-bit fixed-point
    turns.

    Args:
      positions: integers ``[..., T]``.
      old: host frequencies, or a choice among host frequencies.
      new: likewise, with the same number of pairs.

    Returns:
      :class:`Rotation` of float32 ``[..., T, R/2]``.
    """
    (old_hi, old_lo), (new_hi, new_lo) = (
        jnp.moveaxis(_lookup(frequencies, fixed_point_turns), -2, 0) for frequencies in (old, new)
    )
    words = jnp.stack([new_hi - old_hi - (new_lo < old_lo).astype(jnp.uint32), new_lo - old_lo], axis=-2)
    new_factor, old_factor = (
        _lookup(frequencies, lambda f: np.array(f.attention_factor, np.float32)) for frequencies in (new, old)
    )
    factor = (new_factor / old_factor)[..., None, None]
    one = Frequencies(np.ones(1))
    turn = _polynomials(_phases(positions[..., None], words), jnp.asarray(_coefficients(one)))
    return Rotation(factor * turn.cos, factor * turn.sin)


def _select_axes(positions, axes: Sequence[int], num_pairs: int) -> jax.Array:
    """``[..., T, A] -> [..., T, R/2]``: the position of each pair, from its axis."""
    num_axes = positions.shape[-1]
    if len(axes) != num_pairs or not all(0 <= axis < num_axes for axis in axes):
        raise ValueError(
            f"axes must name one position axis in [0, A={num_axes}) for each of the R/2={num_pairs} pairs, "
            f"got {len(axes)} entries: {tuple(axes)}"
        )
    return positions[..., np.array(axes)]


def _lookup(
    frequencies: Frequencies | FrequencyChoice, table: Callable[[Frequencies], np.ndarray | jax.Array]
) -> jax.Array:
    """``table`` of the frequencies, or of the chosen option in each row: ``[..., *table]``."""
    if isinstance(frequencies, Frequencies):
        return jnp.asarray(table(frequencies))
    tables = jnp.asarray(np.stack([table(option) for option in frequencies.options]))
    # An index out of range reads NaN coefficients, so its row becomes NaN.
    return tables.at[frequencies.index].get(mode="fill", wrap_negative_indices=False)


# --------------------------------------------------------------------------------------- the exact path


def _cos_sin(positions, words, coefficients) -> Rotation:
    return _polynomials(_phases(positions, words), coefficients)


@jax.jit
def _cos_sin_call(positions, words, coefficients) -> Rotation:
    with set_xla_metadata(inlineable=None):  # only this call stays whole; calls inside it are inlined
        return _cos_sin(positions, words, coefficients)


def _cos_sin_not_inlined(positions, words, coefficients) -> Rotation:
    """A call that XLA does not inline: inlined, XLA for CPUs evaluates the angles again for each head."""
    with set_xla_metadata(inlineable="false"):
        return _cos_sin_call(positions, words, coefficients)


@jax.jit
def _exact_rotation(positions, words, coefficients) -> Rotation:
    return lax.platform_dependent(positions, words, coefficients, cpu=_cos_sin_not_inlined, default=_cos_sin)


# floor(2^256 / 2 pi): enough digits to know any frequency below 2^64 to 2^-65 of a turn.
_TURN_PER_RADIAN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E4107F9458EAF7AEF158


def fixed_point_turns(frequencies: Frequencies) -> np.ndarray:
    """Turns per position modulo 1, to the nearest 2^-64: uint32 ``[2, R/2]``, high word first."""
    turns = []
    for inv_freq in frequencies.inv_freq.tolist():
        numerator, denominator = inv_freq.as_integer_ratio()  # exact: denominator is a power of two
        scaled = numerator * _TURN_PER_RADIAN // (denominator << 191)
        turns.append(((scaled + 1) >> 1) % 2**64)
    return np.array([[turn >> 32 for turn in turns], [turn & 0xFFFF_FFFF for turn in turns]], np.uint32)


def _phases(positions, words) -> jax.Array:
    """The high word of ``positions * words`` modulo 2^64: the fraction of a turn in units of 2^-32.

    With ``m = upper * 2^32 + lower``, ``words = hi * 2^32 + lo``, modulo 2^32 this is ``lower * hi +
    upper * lo + (lower * lo) / 2^32``. The last term is summed from 16-bit pieces without the carries of
    the lowest, so the phase is at most 3 units, 4.4e-9 radians, too low.
    """
    hi, lo = words[..., None, 0, :], words[..., None, 1, :]
    lower = positions.astype(jnp.uint32)
    if positions.dtype.itemsize == 8:
        upper = (positions >> 32).astype(jnp.uint32)
    else:
        upper = jnp.where(positions < 0, jnp.uint32(0xFFFF_FFFF), jnp.uint32(0))  # two's complement
    m1, m0, lo1, lo0 = lower >> 16, lower & 0xFFFF, lo >> 16, lo & 0xFFFF
    return lower * hi + upper * lo + m1 * lo1 + (m1 * lo0 >> 16) + (m0 * lo1 >> 16)


def _minimax(function, degree: int) -> np.ndarray:
    """Coefficients of a polynomial close to ``function(v)``, for squares v of up to an eighth of a turn."""
    chebyshev = np.polynomial.Chebyshev.interpolate(function, degree, domain=[0, 1 / 64])
    return chebyshev.convert(kind=np.polynomial.Polynomial).coef


# cos(2 pi t) = 1 + v C(v), sin(2 pi t) = t (2 pi + v S(v)) with v = t^2, to 1e-10 for |t| <= 1/8.
_COS = _minimax(lambda v: (np.cos(2 * np.pi * np.sqrt(v)) - 1) / v, 3)
_SIN = _minimax(lambda v: (np.sin(2 * np.pi * np.sqrt(v)) / np.sqrt(v) - 2 * np.pi) / v, 3)


def _coefficients(frequencies: Frequencies) -> np.ndarray:
    """The polynomials times ``attention_factor``, float32 ``[2, 6]``, with leading terms in two parts.

    Rounding a leading term to a single float32 would cost half an ulp of the result.
    """
    rows = []
    for leading, rest in ((1.0, _COS), (2 * np.pi, _SIN)):
        exact = frequencies.attention_factor * np.array([leading, *rest])
        rows.append([exact[0], exact[0] - np.float32(exact[0]), *exact[1:]])
    return np.array(rows, np.float32)


def _polynomials(phases, coefficients) -> Rotation:
    """Cosine and sine of uint32 phases: a quarter turn from the top bits, polynomials on at most an eighth."""
    # Without the barrier, XLA would fold the two parts of a leading coefficient into a single float32.
    coefficients = lax.optimization_barrier(coefficients)[..., None, None, :]
    quarter = (phases + jnp.uint32(1 << 29)) >> 30
    rest = (phases - (quarter << 30)).astype(jnp.int32)
    t = rest.astype(jnp.float32) * jnp.float32(2.0**-32)
    v = t * t

    def series(row):
        leading, correction, c0, c1, c2, c3 = (coefficients[..., row, :, :, i] for i in range(6))
        return leading, correction + v * (c0 + v * (c1 + v * (c2 + v * c3)))

    cos_leading, cos_rest = series(0)
    sin_leading, sin_rest = series(1)
    cos = cos_leading + cos_rest
    sin = t * sin_leading + t * sin_rest
    odd = (quarter & 1) == 1
    # Quarters 1 and 2 have a negative cosine, 2 and 3 a negative sine: bit 1 of each, moved to the sign bit.
    return Rotation(
        cos=_flip_sign(jnp.where(odd, sin, cos), (quarter + 1) & 2),
        sin=_flip_sign(jnp.where(odd, cos, sin), quarter & 2),
    )


def _flip_sign(x, two) -> jax.Array:
    """``-x`` for ``two`` = 2, ``x`` for ``two`` = 0."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) ^ (two << 30), jnp.float32)


# --------------------------------------------------------------------------------------- the float path


def _float_rotation(positions, frequencies: Frequencies | FrequencyChoice) -> Rotation:
    dtypes = [positions.dtype]
    if isinstance(frequencies, Frequencies) and not frequencies.on_host:
        dtypes.append(frequencies.inv_freq.dtype)
    dtype = np.dtype(np.float64 if jnp.float64 in dtypes else np.float32)
    inv_freq = _lookup(frequencies, lambda f: f.inv_freq.astype(dtype))[..., None, :]
    factor = _lookup(frequencies, lambda f: np.array(f.attention_factor, dtype))[..., None, None]
    angles = positions.astype(dtype) * inv_freq
    return Rotation((factor * jnp.cos(angles)).astype(jnp.float32), (factor * jnp.sin(angles)).astype(jnp.float32))
