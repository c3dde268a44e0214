"""Exact phases, and their cosine and sine.

A frequency is stored in turns per position, as a fraction of 2^64 in two uint32 words. The phase is the product of
position and frequency modulo 2^64: whole turns fall off by overflow, and large positions lose no digits. Short
polynomials give the sine and cosine of the phase.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rope_jax._checks import align_ranks

# floor(2^256 / 2 pi): enough digits to know any frequency below 2^64 to 2^-65 of a turn.
_TURN_PER_RADIAN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E4107F9458EAF7AEF158


def fixed_point_turns(inv_freq: np.ndarray) -> np.ndarray:
    """Turns per position modulo 1, to the nearest 2^-64: uint32 ``[2, M]`` of ``[M]``, high word first."""
    turns = []
    for radians in inv_freq.tolist():
        numerator, denominator = radians.as_integer_ratio()  # exact: denominator is a power of two
        scaled = numerator * _TURN_PER_RADIAN // (denominator << 191)
        turns.append(((scaled + 1) >> 1) % 2**64)
    return np.array([[turn >> 32 for turn in turns], [turn & 0xFFFF_FFFF for turn in turns]], np.uint32)


def rounded_turns(inv_freq: np.ndarray) -> np.ndarray:
    """Turns modulo 1, to the nearest 2^-32: uint32 ``[M]`` of radians ``[M]``."""
    hi, lo = fixed_point_turns(inv_freq)
    return hi + (lo >> 31)


def subtract_turns(words, other) -> jax.Array:
    """The difference of fixed-point turns, uint32 ``[..., 2, M]``."""
    (hi, lo), (other_hi, other_lo) = (jnp.moveaxis(each, -2, 0) for each in (words, other))
    borrow = (lo < other_lo).astype(jnp.uint32)
    return jnp.stack([hi - other_hi - borrow, lo - other_lo], axis=-2)


def sum_of_phases(coordinates: list[jax.Array], words: list[jax.Array]) -> jax.Array:
    """The sum of ``coordinate * words`` modulo a turn, in units of 2^-32 turns; each term is up to 3 too low."""
    return functools.reduce(jnp.add, map(_phase, coordinates, words))


def _phase(positions, words) -> jax.Array:
    """The high word of ``positions * words`` modulo 2^64: the fraction of a turn in units of 2^-32.

    With ``m = upper * 2^32 + lower``, ``words = hi * 2^32 + lo``, modulo 2^32 this is ``lower * hi +
    upper * lo + (lower * lo) / 2^32``. The last term is summed from 16-bit pieces without the carries of
    the lowest, so the phase is at most 3 units, 4.4e-9 radians, too low.
    """
    positions, hi, lo = align_ranks(positions, words[..., None, 0, :], words[..., None, 1, :])
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


def scaled_coefficients(attention_factor: float) -> np.ndarray:
    """The polynomials times ``attention_factor``, float32 ``[2, 6]``, with leading terms in two parts.

    Rounding a leading term to a single float32 would cost half an ulp of the result.
    """
    rows = []
    for leading, rest in ((1.0, _COS), (2 * np.pi, _SIN)):
        exact = attention_factor * np.array([leading, *rest])
        rows.append([exact[0], exact[0] - np.float32(exact[0]), *exact[1:]])
    return np.array(rows, np.float32)


def cos_and_sin(phases, coefficients) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of uint32 phases: a quarter turn from the top bits, polynomials on at most an eighth."""
    # Without the barrier, XLA would fold the two parts of a leading coefficient into a single float32.
    coefficients = lax.optimization_barrier(coefficients)[..., None, None, :]
    if coefficients.ndim < phases.ndim + 2:  # as in align_ranks, beside the two axes of the polynomials
        coefficients = lax.expand_dims(coefficients, range(phases.ndim + 2 - coefficients.ndim))
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
    return (
        _flip_sign(jnp.where(odd, sin, cos), (quarter + 1) & 2),
        _flip_sign(jnp.where(odd, cos, sin), quarter & 2),
    )


def _flip_sign(x, two) -> jax.Array:
    """``-x`` for ``two`` = 2, ``x`` for ``two`` = 0."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) ^ (two << 30), jnp.float32)
