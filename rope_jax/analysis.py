"""Analyses schedules in numbers: wavelengths, attention scores by distance, errors of arithmetics.

Functions take :class:`rope_jax.Frequencies`, or a schedule and ``rotary_dim=``. A schedule that depends on the
context length must have its field ``context_length``.

Everything is numpy float64 on the host and nothing is traced. Phases are computed as in :func:`rope_jax.rotation`:
in 64-bit fixed-point turns, so that whole turns fall off by overflow. The error at distance d is ``|d| 2^-62``
radians, below 1e-9 for every int32.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from rope_jax._analysis_arguments import checked_count, checked_distances, checked_features, host_of
from rope_jax._checks import check_choice, host_array
from rope_jax.core.angles import fixed_point_turns, rotation
from rope_jax.core.frequencies import Frequencies, Schedule
from rope_jax.core.rope import Rope

Arithmetic = Literal["exact", "float32", "bfloat16", "bfloat16_table"]
"""The arithmetic of an angle, for :func:`phase_error`."""

# ------------------------------------------------------------------------------------ single pairs


def wavelengths(frequencies: Frequencies | Schedule, *, rotary_dim: int | None = None) -> np.ndarray:
    """The wavelength of each pair, in tokens per turn: ``2 pi / |theta_i|`` (Peng et al. 2023, YaRN, section 3.2).

    Args:
      frequencies: on the host, radians per token; or a schedule with rotary_dim.
      rotary_dim: R, of a schedule; left out beside frequencies.

    Returns:
      float64 ``[R/2]``, in tokens; inf for a pair of frequency 0.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies` or a schedule.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.wavelengths(rope_jax.Standard()(4)).round(2).tolist()
      [6.28, 628.32]
      >>> rope_jax.analysis.wavelengths(rope_jax.Standard(), rotary_dim=4).round(2).tolist()
      [6.28, 628.32]
    """
    with np.errstate(divide="ignore", over="ignore"):  # inf is the documented result
        return 2 * np.pi / np.abs(host_of(frequencies, rotary_dim).inv_freq)


def turns(frequencies: Frequencies | Schedule, context_length: int, *, rotary_dim: int | None = None) -> np.ndarray:
    """Turns of each pair over a context length: ``context_length |theta_i| / 2 pi``, YaRN's ratio r (section 3.2).

    Args:
      frequencies: on the host, radians per token; or a schedule with rotary_dim.
      context_length: in tokens, at least 1.
      rotary_dim: R, of a schedule; left out beside frequencies.

    Returns:
      float64 ``[R/2]``, in turns, with their fraction.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies` or a schedule, or context_length is
        not an integer.
      ValueError: if context_length is below 1, or 2^63 or more.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.turns(rope_jax.Standard()(4), 1000).round(2).tolist()
      [159.15, 1.59]
    """
    context_length = checked_count("context_length", context_length)
    return context_length * np.abs(host_of(frequencies, rotary_dim).inv_freq) / (2 * np.pi)


def incomplete_pairs(
    frequencies: Frequencies | Schedule, context_length: int, *, rotary_dim: int | None = None
) -> np.ndarray:
    """True for pairs without a complete turn within a context length: ``turns < 1``.

    A model trained on this context length has not seen all angles of these pairs, and meets new angles in longer
    text. YaRN interpolates these pairs fully (Peng et al. 2023, section 3.2, ``r < alpha = 1``). Pairs of frequency
    0 count too, although their angle never changes.

    Args:
      frequencies: on the host, radians per token; or a schedule with rotary_dim.
      context_length: in tokens, at least 1.
      rotary_dim: R, of a schedule; left out beside frequencies.

    Returns:
      bool ``[R/2]``.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies` or a schedule, or context_length is
        not an integer.
      ValueError: if context_length is below 1, or 2^63 or more.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> int(rope_jax.analysis.incomplete_pairs(rope_jax.Standard(base=500_000.0)(128), 8192).sum())  # Llama 3
      29
    """
    return turns(frequencies, context_length, rotary_dim=rotary_dim) < 1


def effective_context(frequencies: Frequencies | Schedule, *, rotary_dim: int | None = None) -> np.ndarray:
    """Half a wavelength, ``pi / |theta_i|``: the largest distance that a single pair identifies.

    If query and key are equal in pair i, the pair adds ``cos(d theta_i)`` times a positive constant to the score
    (RoFormer, section 3.2.2). This term falls strictly with ``|d|`` up to half a wavelength and rises after, so
    the pair alone cannot tell ``|d|`` from ``wavelength - |d|``. An angle between query and key shifts the range
    by as much. A pair of frequency 0 gives inf and carries no information on distance.

    Args:
      frequencies: on the host, radians per token; or a schedule with rotary_dim.
      rotary_dim: R, of a schedule; left out beside frequencies.

    Returns:
      float64 ``[R/2]``, in tokens; inf for a pair of frequency 0.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies` or a schedule.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.effective_context(rope_jax.Standard()(4)).round(2).tolist()
      [3.14, 314.16]
    """
    return wavelengths(frequencies, rotary_dim=rotary_dim) / 2


# ---------------------------------------------------------------------------------- scores by distance


def mean_score(frequencies: Frequencies | Schedule, distances, *, rotary_dim: int | None = None) -> np.ndarray:
    """The share of a score after rotation, averaged over pairs: ``a^2 mean_i cos(d theta_i)``.

    Equals ``q_m . k_n / q . k`` with ``d = m - n``, for equal query and key with the same norm in every pair (from
    RoFormer, equation 35). At distance 0 the value is ``a^2``.

    The error is at most ``a^2 (|d| 2^-62 + (R + 16) 2^-53)``; the fraction of a float distance adds
    ``a^2 max_i |theta_i| 2^-53``.

    Args:
      frequencies: on the host, radians per token; a is their attention_factor. Or a schedule with rotary_dim.
      distances: integers or floats of any shape, below 2^63, in tokens; negative ones too.
      rotary_dim: R, of a schedule; left out beside frequencies.

    Returns:
      float64 of the shape of distances.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies` or a schedule, or distances not
        integers or floats.
      ValueError: if a distance is not finite, or is 2^63 or more.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.mean_score(rope_jax.Standard()(128), [0, 1, 100, 10_000]).round(3).tolist()
      [1.0, 0.97, 0.477, -0.028]
    """
    frequencies = host_of(frequencies, rotary_dim)
    return frequencies.attention_factor**2 * _mean_cos(frequencies, checked_distances(distances))


def decay_bound(frequencies: Frequencies | Schedule, distances, *, rotary_dim: int | None = None) -> np.ndarray:
    """RoFormer's bound of the score by distance: ``1/(R/2) sum_j |S_j|``, ``S_j = sum_(i<j) e^(i d theta_i)``.

    The sums run over ``j = 1 .. R/2`` and the first j pairs (Su et al. 2021, section 3.4.3). Multiplied by R/2 and
    by the largest step of ``q_i conj(k_i)`` between neighbouring pairs (and from the last pair to 0), the value
    bounds ``|q_m . k_n|``. The paper has no attention factor, and none is applied. At distance 0 the value is
    ``(R/2 + 1) / 2``.

    Args:
      frequencies: on the host, radians per token; or a schedule with rotary_dim.
      distances: integers or floats of any shape, below 2^63, in tokens; negative ones too.
      rotary_dim: R, of a schedule; left out beside frequencies.

    Returns:
      float64 of the shape of distances; as exact as :func:`mean_score`, times ``R/2``.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies` or a schedule, or distances not
        integers or floats.
      ValueError: if a distance is not finite, or is 2^63 or more.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.decay_bound(rope_jax.Standard()(128), [0, 50, 250]).round(1).tolist()
      [32.5, 12.6, 6.5]
    """
    frequencies, distances = host_of(frequencies, rotary_dim), checked_distances(distances)
    partial, total = np.zeros(distances.shape, complex), np.zeros(distances.shape)
    for angle in _angles(frequencies, distances):
        partial += np.exp(1j * angle)
        total += np.abs(partial)
    return total / frequencies.num_pairs


def aliases(
    frequencies: Frequencies | Schedule, context_length: int, count: int = 1, *, rotary_dim: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The distances most easily confused with distance 0: the highest peaks of :func:`mean_score`.

    A peak is a whole distance in ``1 .. context_length - 1``, after the first rise of the score, whose neighbours
    have no higher score. Peaks at negative distances are the same.

    Args:
      frequencies: on the host, radians per token; or a schedule with rotary_dim.
      context_length: in tokens, at least 1.
      count: the largest number of peaks to return, at least 1.
      rotary_dim: R, of a schedule; left out beside frequencies.

    Returns:
      distances, int64 ``[C]``, in tokens, and their similarity, float64 ``[C]``: ``mean_i cos(d theta_i)``, which
      is 1 at distance 0. Most similar first, nearest first among equals. C is ``count`` or, if smaller, the number
      of peaks: 0 if the score only falls.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies` or a schedule, or context_length or
        count is not an integer.
      ValueError: if context_length or count is below 1, or context_length above 2^31.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> distances, similarity = rope_jax.analysis.aliases(rope_jax.Standard()(128), 4096, count=2)
      >>> distances.tolist(), similarity.round(3).tolist()
      ([12, 18], [0.662, 0.619])
    """
    context_length, count = checked_count("context_length", context_length), checked_count("count", count)
    if context_length > 2**31:
        raise ValueError(f"context_length must be at most 2^31, as positions are int32, got {context_length}")
    score = _mean_cos(host_of(frequencies, rotary_dim), np.arange(context_length))
    rises = np.diff(score) > 0
    stops_rising = np.append(~rises, True)  # [d]: not higher at d + 1, or d is the last distance
    peaks = 1 + np.flatnonzero(rises & stops_rising[1:])
    best = peaks[np.argsort(-score[peaks], kind="stable")][:count]
    return best, score[best]


def score_kernel(q, k, rope: Rope, distances, *, context_length: int | None = None) -> np.ndarray:
    """``q_m . k_n`` of one query and one key by their distance ``d = m - n``, before any scale.

    With pairs of features as complex numbers: ``a^2 Re sum_i q_i conj(k_i) e^(i d theta_i)`` (RoFormer,
    equation 35), plus ``sum_j q_j k_j`` over the unrotated features from rotary_dim on.

    Args:
      q: the query before its rotation, real numbers ``[H]``.
      k: the key before its rotation, real numbers ``[H]``.
      rope: the schedule, and the features that are rotated.
      distances: integers or floats ``[...]``, below 2^63, in tokens; ``[..., A]`` for a rope of A axes.
      context_length: an integer, for schedules that depend on the context length.

    Returns:
      float64 ``[...]``. The angles are as exact as in :func:`mean_score`.

    Raises:
      TypeError: if rope is not a :class:`rope_jax.Rope` of host frequencies, q or k are not real, or distances not
        integers or floats.
      ValueError: if q or k is not ``[H]``, distances do not have the A axes of the rope, or a distance is not
        finite, or is 2^63 or more.

    Example:
      >>> import numpy as np, rope_jax, rope_jax.analysis
      >>> rope = rope_jax.Rope(head_dim=4, schedule=rope_jax.Standard())
      >>> rope_jax.analysis.score_kernel(np.ones(4), np.ones(4), rope, [0, 1, -1]).round(4).tolist()
      [4.0, 3.0805, 3.0805]
    """
    if not isinstance(rope, Rope):
        raise TypeError(f"rope must be a Rope, got {type(rope).__name__}")
    q, k = checked_features("q", q, rope.head_dim), checked_features("k", k, rope.head_dim)
    distances = checked_distances(distances)
    frequencies = host_of(rope.frequencies(context_length), one_axis=False)
    if rope.num_axes > 1 and (not distances.ndim or distances.shape[-1] != rope.num_axes):
        raise ValueError(
            f"distances must be [..., A={rope.num_axes}] for a rope of {rope.num_axes} axes, "
            f"got shape {distances.shape}"
        )
    first, second = rope.feature_pairs
    weights = (q[first] + 1j * q[second]) * np.conj(k[first] + 1j * k[second])

    total = np.zeros(distances.shape if rope.num_axes == 1 else distances.shape[:-1])
    for weight, angle in zip(weights, _angles(frequencies, distances), strict=True):
        total += (weight * np.exp(1j * angle)).real
    unrotated = np.setdiff1d(np.arange(rope.head_dim), rope.feature_pairs)
    return frequencies.attention_factor**2 * total + q[unrotated] @ k[unrotated]


# ----------------------------------------------------------------------------------------- errors of arithmetics


def phase_error(
    frequencies: Frequencies | Schedule, positions, arithmetic: Arithmetic, *, rotary_dim: int | None = None
) -> np.ndarray:
    """The error of each angle in an arithmetic: ``|angle - m theta_i - phase_i|``, wrapped to ``[0, pi]``.

    - ``"exact"``: the angle of cos and sin from :func:`rope_jax.rotation`.
    - ``"bfloat16_table"``: the angle of the same cos and sin, rounded to bfloat16 as in a stored table.
    - ``"float32"``: ``float32(m) * float32(theta_i)``, rounded to float32, as in most libraries; their cos and sin
      add a rounding.
    - ``"bfloat16"``: both factors and their product rounded to bfloat16, as in a model cast as a whole.

    The true angle comes from integer arithmetic, with an error up to ``|m| 2^-62 + 2^-50`` radians.

    Args:
      frequencies: on the host, radians per position; or a schedule with rotary_dim.
      positions: integers ``[P]``; for ``"exact"`` and ``"bfloat16_table"`` they must fit in int32 unless x64 is on.
      arithmetic: a name from the list above.
      rotary_dim: R, of a schedule; left out beside frequencies.

    Returns:
      float64 ``[P, R/2]``, in radians. Random angles have a mean error of ``pi/2``.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies` or a schedule, or positions not integers.
      ValueError: if positions are not ``[P]`` or do not fit, or the arithmetic is unknown.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> for arithmetic in ("exact", "float32", "bfloat16"):
      ...     error = rope_jax.analysis.phase_error(rope_jax.Standard()(128), [1_000_000], arithmetic)
      ...     print(arithmetic, f"{error.max():.0e}")
      exact 5e-08
      float32 5e-02
      bfloat16 3e+00
    """
    check_choice("arithmetic", arithmetic, get_args(Arithmetic))
    positions = host_array("positions", positions)
    if positions.dtype.kind not in "iu":
        raise TypeError(f"positions must be integers, got dtype {positions.dtype}")
    if positions.ndim != 1:
        raise ValueError(f"positions must have shape [P], got {positions.shape}")
    frequencies = host_of(frequencies, rotary_dim)
    phase = np.zeros(frequencies.num_pairs) if frequencies.phase is None else np.asarray(frequencies.phase)
    true = np.stack(list(_angles(frequencies, checked_distances(positions, "positions"))), axis=-1)
    if arithmetic in ("exact", "bfloat16_table"):
        cos, sin = (np.asarray(part) for part in rotation(positions, frequencies))
        if arithmetic == "bfloat16_table":
            cos, sin = cos.astype(jnp.bfloat16), sin.astype(jnp.bfloat16)
        angles = np.arctan2(sin.astype(np.float64), cos.astype(np.float64))
    else:
        kind = np.float32 if arithmetic == "float32" else jnp.bfloat16
        position, inv_freq, offset = (
            np.asarray(x).astype(np.float32).astype(kind) for x in (positions, frequencies.inv_freq, phase)
        )
        angles = (position[:, None] * inv_freq + offset).astype(np.float64)
    # As complex numbers: numpy's cos and sin reduce even a huge float64 exactly, unlike a remainder by 2 pi.
    return np.abs(np.angle(np.exp(1j * angles) * np.exp(-1j * true) * np.exp(-1j * phase)))


# ------------------------------------------------------------------------------------------- shared helpers


def _mean_cos(frequencies: Frequencies, distances: np.ndarray) -> np.ndarray:
    total = np.zeros(distances.shape)
    for angle in _angles(frequencies, distances):
        total += np.cos(angle)
    return total / frequencies.num_pairs


def _angles(frequencies: Frequencies, distances: np.ndarray) -> Iterator:
    """Yields ``d . theta_i`` without whole turns, pair by pair, so that many distances need little memory.

    float64 ``[*distances]`` in radians; without the last axis, if there are several position axes. The error is
    ``sum_a |d_a| 2^-62`` radians from the 64 bits of a frequency, and ``6.3 * 2^-53`` from float64.
    """
    if frequencies.num_axes == 1:
        distances = distances[..., None]
    whole = np.trunc(distances) if distances.dtype == np.float64 else distances
    fraction = distances - whole  # exact
    whole = whole.astype(np.int64).astype(np.uint64)
    for wave_vector in np.atleast_2d(frequencies.inv_freq).T:
        high, low = fixed_point_turns(wave_vector).astype(np.uint64)
        # In 2^-64 turns, modulo a turn, from -1/2 turn to 1/2.
        phase = np.multiply(whole, (high << 32) | low).sum(axis=-1, dtype=np.uint64).astype(np.int64)
        yield phase * (2 * np.pi * 2.0**-64) + (fraction * wave_vector).sum(axis=-1)
