"""What does a schedule do, in numbers?

How far each pair turns, what that does to the score of a query and a key by their distance, and how wrong an
arithmetic is. Everything is numpy float64 on the host; nothing is traced, and nothing here is used to turn
anything. Phases are formed as in :func:`rope_jax.rotation`, in 64-bit fixed-point turns, where whole turns fall off
by overflow: a distance d costs ``|d| 2^-62`` radians, below 1e-9 for every int32.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from rope_jax.core.angles import _words, rotation
from rope_jax.core.frequencies import Frequencies, FrequencyChoice
from rope_jax.core.rope import Rope

Arithmetic = Literal["exact", "float32", "bfloat16", "bfloat16_table"]
"""How an angle is formed, for :func:`phase_error`."""

# ------------------------------------------------------------------------------------ one pair by itself


def wavelengths(frequencies: Frequencies) -> np.ndarray:
    """Tokens in which each pair turns once: ``2 pi / |theta_i|`` (Peng et al. 2023, YaRN, section 3.2).

    Args:
      frequencies: on the host, radians per token.

    Returns:
      float64 ``[R/2]``, in tokens; inf for a pair that does not turn.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies`.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.wavelengths(rope_jax.Standard()(4)).round(2).tolist()
      [6.28, 628.32]
    """
    with np.errstate(divide="ignore", over="ignore"):  # inf is the answer, not an accident
        return 2 * np.pi / np.abs(_host(frequencies).inv_freq)


def turns(frequencies: Frequencies, context_length: int) -> np.ndarray:
    """Turns that each pair makes over a context_length: ``context_length |theta_i| / 2 pi``, YaRN's ratio r (section 3.2).

    Args:
      frequencies: on the host, radians per token.
      context_length: in tokens, at least 1.

    Returns:
      float64 ``[R/2]``, in turns, whole ones and the fraction of the last.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies`, or context_length is not an integer.
      ValueError: if context_length is below 1.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.turns(rope_jax.Standard()(4), 1000).round(2).tolist()
      [159.15, 1.59]
    """
    return _count("context_length", context_length, "tokens") * np.abs(_host(frequencies).inv_freq) / (2 * np.pi)


def unturned(frequencies: Frequencies, context_length: int) -> np.ndarray:
    """Which pairs make no whole turn within a context_length: ``turns < 1``.

    A model that was trained on this context_length has not seen all their angles, and meets new ones on longer text.
    They are the pairs that YaRN interpolates fully (Peng et al. 2023, section 3.2, ``r < alpha = 1``). A pair
    that stands still is one of them too, though it never meets a new angle.

    Args:
      frequencies: on the host, radians per token.
      context_length: in tokens, at least 1.

    Returns:
      bool ``[R/2]``.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies`, or context_length is not an integer.
      ValueError: if context_length is below 1.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> int(rope_jax.analysis.unturned(rope_jax.Standard(base=500_000.0)(128), 8192).sum())  # Llama 3
      29
    """
    return turns(frequencies, context_length) < 1


def effective_context(frequencies: Frequencies) -> np.ndarray:
    """Half a wavelength, ``pi / |theta_i|``: up to there a pair's part of the score tells how far a token is.

    Where a query and a key are alike in pair i, its part is ``cos(d theta_i)`` times a positive constant
    (RoFormer, section 3.2.2). It falls strictly with ``|d|`` from 0 to half a wavelength; from there it rises,
    and every value comes back: the pair alone cannot tell ``|d|`` from ``wavelength - |d|``. A query and a key
    that differ by an angle shift that range by as much. A pair that stands still, with inf, tells nothing.

    Args:
      frequencies: on the host, radians per token.

    Returns:
      float64 ``[R/2]``, in tokens; inf for a pair that does not turn.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies`.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.effective_context(rope_jax.Standard()(4)).round(2).tolist()
      [3.14, 314.16]
    """
    return wavelengths(frequencies) / 2


# ---------------------------------------------------------------------------------- all pairs, by distance


def mean_score(frequencies: Frequencies, distances) -> np.ndarray:
    """``a^2 mean_i cos(d theta_i)``: what rotation leaves of a score at distance d, on average over the pairs.

    It is ``q_m . k_n / q . k`` with ``d = m - n``, for a query and a key that are alike and as long in one pair
    as in the other (from RoFormer, equation 35). At distance 0 it is ``a^2``.

    The error is at most ``a^2 (|d| 2^-62 + (R + 16) 2^-53)``; the fraction of a float distance adds
    ``a^2 max_i |theta_i| 2^-53``.

    Args:
      frequencies: on the host, radians per token; a is their attention_factor.
      distances: integers or floats of any shape, below 2^63, in tokens; negative ones too.

    Returns:
      float64 of the shape of distances.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies`, or distances not integers or floats.
      ValueError: if a distance is not finite, or is 2^63 or more.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.mean_score(rope_jax.Standard()(128), [0, 1, 100, 10_000]).round(3).tolist()
      [1.0, 0.97, 0.477, -0.028]
    """
    return _host(frequencies).attention_factor ** 2 * _mean_cos(frequencies, _distances(distances))


def decay_bound(frequencies: Frequencies, distances) -> np.ndarray:
    """RoFormer's bound of the score by distance: ``1/(R/2) sum_j |S_j|``, ``S_j = sum_(i<j) e^(i d theta_i)``.

    The sums run over ``j = 1 .. R/2`` and the first j pairs (Su et al. 2021, section 3.4.3). It bounds
    ``|q_m . k_n|``, times R/2 and times the largest step of ``q_i conj(k_i)`` from one pair to the next (to 0
    behind the last). The attention factor, which that paper does not know, is left out. At distance 0 it is
    ``(R/2 + 1) / 2``.

    Args:
      frequencies: on the host, radians per token.
      distances: integers or floats of any shape, below 2^63, in tokens; negative ones too.

    Returns:
      float64 of the shape of distances; as exact as :func:`mean_score`, times ``R/2``.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies`, or distances not integers or floats.
      ValueError: if a distance is not finite, or is 2^63 or more.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> rope_jax.analysis.decay_bound(rope_jax.Standard()(128), [0, 50, 250]).round(1).tolist()
      [32.5, 12.6, 6.5]
    """
    distances = _distances(distances)
    partial, total = np.zeros(distances.shape, complex), np.zeros(distances.shape)
    for angle in _angles(frequencies, distances):
        partial += np.exp(1j * angle)
        total += np.abs(partial)
    return total / frequencies.num_pairs


def aliases(frequencies: Frequencies, context_length: int, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """At which distances within a context_length, other than those around 0, does a token look most like at distance 0?

    The highest peaks of :func:`mean_score` over the whole distances ``1 .. context_length - 1``, behind the first
    distance from which it rises: those that neither neighbour within the context_length exceeds. Negative distances
    have the same.

    Args:
      frequencies: on the host, radians per token.
      context_length: in tokens, at least 1.
      count: how many to return, at least 1.

    Returns:
      distances, int64 ``[C]``, in tokens, and their similarity, float64 ``[C]``: ``mean_i cos(d theta_i)``, which
      is 1 at distance 0. The most similar comes first, of equals the nearest. C is ``count``, or the number of
      peaks where there are fewer: 0 where the score only falls.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies`, or context_length or count not an integer.
      ValueError: if context_length or count is below 1.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> distances, similarity = rope_jax.analysis.aliases(rope_jax.Standard()(128), 4096, count=2)
      >>> distances.tolist(), similarity.round(3).tolist()
      ([12, 18], [0.662, 0.619])
    """
    context_length, count = _count("context_length", context_length, "tokens"), _count("count", count, "peaks")
    score = _mean_cos(frequencies, np.arange(context_length))
    rises = np.diff(score) > 0
    ends = np.append(~rises, True)  # [d]: no higher at d + 1, or nothing there
    peaks = 1 + np.flatnonzero(rises & ends[1:])
    best = peaks[np.argsort(-score[peaks], kind="stable")][:count]
    return best, score[best]


def score_kernel(q, k, rope: Rope, distances, *, context_length: int | None = None) -> np.ndarray:
    """``q_m . k_n`` of one query and one key by their distance ``d = m - n``, before any scale.

    With the pairs of features as complex numbers it is ``a^2 Re sum_i q_i conj(k_i) e^(i d theta_i)`` (RoFormer,
    equation 35), plus ``sum_j q_j k_j`` over the features from rotary_dim on, which stay as they are.

    Args:
      q: the query before its rotation, real numbers ``[H]``.
      k: the key before its rotation, real numbers ``[H]``.
      rope: whose schedule, layout, rotary_dim and axes are used.
      distances: integers or floats ``[...]``, below 2^63, in tokens; for a rope with axes ``[..., A]``.
      context_length: for a schedule that depends on it, as for :meth:`rope_jax.Rope.rotation`, an integer.

    Returns:
      float64 ``[...]``. The angles are as exact as in :func:`mean_score`.

    Raises:
      TypeError: if rope is not a :class:`rope_jax.Rope` of host frequencies, q or k are not real, or distances not
        integers or floats.
      ValueError: if q or k is not ``[H]``, distances have not the A axes that the rope reads, or one is not
        finite, or is 2^63 or more.

    Example:
      >>> import numpy as np, rope_jax, rope_jax.analysis
      >>> rope = rope_jax.Rope(head_dim=4, schedule=rope_jax.Standard())
      >>> rope_jax.analysis.score_kernel(np.ones(4), np.ones(4), rope, [0, 1, -1]).round(4).tolist()
      [4.0, 3.0805, 3.0805]
    """
    if not isinstance(rope, Rope):
        raise TypeError(f"rope must be a Rope, got {type(rope).__name__}")
    q, k = _features("q", q, rope.head_dim), _features("k", k, rope.head_dim)
    distances = _distances(distances)
    if rope.axes is not None and (not distances.ndim or distances.shape[-1] <= max(rope.axes)):
        raise ValueError(
            f"distances must be [..., A] with A of at least {max(rope.axes) + 1}, as axes {rope.axes} of the rope "
            f"read them, got shape {distances.shape}"
        )
    frequencies = _host(rope.frequencies(context_length))
    num_pairs = rope.num_pairs
    if rope.layout == "half":
        first, second = slice(num_pairs), slice(num_pairs, 2 * num_pairs)
    else:
        first, second = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
    weights = (q[first] + 1j * q[second]) * np.conj(k[first] + 1j * k[second])

    total = np.zeros(distances.shape if rope.axes is None else distances.shape[:-1])
    for weight, angle in zip(weights, _angles(frequencies, distances, rope.axes), strict=True):
        total += (weight * np.exp(1j * angle)).real
    return frequencies.attention_factor**2 * total + q[2 * num_pairs :] @ k[2 * num_pairs :]


# ----------------------------------------------------------------------------------------- arithmetics


def phase_error(frequencies: Frequencies, positions, arithmetic: Arithmetic) -> np.ndarray:
    """How far an arithmetic turns a pair from where it belongs, ``|angle - m theta_i|``, wrapped to ``[0, pi]``.

    ``"exact"``: the angle of the cos and the sin that :func:`rope_jax.rotation` gives. ``"bfloat16_table"``: of the
    same two, rounded to bfloat16, as a library may keep them. ``"float32"``: what most libraries compute,
    ``float32(m) * float32(theta_i)``, rounded to float32; its own cos and sin add a rounding. ``"bfloat16"``: those
    two factors and their product each rounded to bfloat16, as where a whole model is cast.

    The true angle comes from integer arithmetic, and is right to ``|m| 2^-62 + 2^-50`` radians.

    Args:
      frequencies: on the host, radians per position.
      positions: integers ``[P]``; for ``"exact"`` and ``"bfloat16_table"`` as :func:`rope_jax.rotation` takes them,
        int32 where x64 is off.
      arithmetic: one of the four above.

    Returns:
      float64 ``[P, R/2]``, in radians. ``pi/2`` is the mean of angles that have nothing to do with the true one.

    Raises:
      TypeError: if frequencies are not host :class:`rope_jax.Frequencies`, or positions not integers.
      ValueError: if positions are not ``[P]``, do not fit, or the arithmetic is unknown.

    Example:
      >>> import rope_jax, rope_jax.analysis
      >>> for arithmetic in ("exact", "float32", "bfloat16"):
      ...     error = rope_jax.analysis.phase_error(rope_jax.Standard()(128), [131_071], arithmetic)
      ...     print(arithmetic, f"{error.max():.0e}")
      exact 5e-08
      float32 3e-03
      bfloat16 3e+00
    """
    if arithmetic not in get_args(Arithmetic):
        raise ValueError(f"arithmetic must be one of {get_args(Arithmetic)}, got {arithmetic!r}")
    positions = np.asarray(positions)
    if positions.dtype.kind not in "iu":
        raise TypeError(f"positions must be integers, got dtype {positions.dtype}")
    if positions.ndim != 1:
        raise ValueError(f"positions must have shape [P], got {positions.shape}")
    true = np.stack(list(_angles(frequencies, _distances(positions, "positions"))), axis=-1)
    if arithmetic in ("exact", "bfloat16_table"):
        cos, sin = (np.asarray(part) for part in rotation(positions, frequencies))
        if arithmetic == "bfloat16_table":
            cos, sin = cos.astype(jnp.bfloat16), sin.astype(jnp.bfloat16)
        given = np.arctan2(sin.astype(np.float64), cos.astype(np.float64))
    else:
        factors = positions.astype(np.float32)[:, None], frequencies.inv_freq.astype(np.float32)
        if arithmetic == "bfloat16":
            factors = factors[0].astype(jnp.bfloat16), factors[1].astype(jnp.bfloat16)
        given = (factors[0] * factors[1]).astype(np.float64)
    # As complex numbers: numpy's cos and sin reduce even a huge float64 exactly, a remainder by 2 pi does not.
    return np.abs(np.angle(np.exp(1j * given) * np.exp(-1j * true)))


# ------------------------------------------------------------------------------------------- the shared


def _mean_cos(frequencies: Frequencies, distances: np.ndarray) -> np.ndarray:
    total = np.zeros(distances.shape)
    for angle in _angles(frequencies, distances):
        total += np.cos(angle)
    return total / frequencies.num_pairs


def _angles(frequencies: Frequencies, distances: np.ndarray, axes: tuple[int, ...] | None = None) -> Iterator:
    """``d theta_i`` less whole turns, pair by pair, so that a long row of distances needs little memory.

    float64 ``[*distances]`` in radians, or without the last axis, which ``axes`` picks from. Right to ``|d| 2^-62``
    radians, which comes from the frequency's 64 bits, and ``6.3 * 2^-53`` from float64.
    """
    whole = np.trunc(distances) if distances.dtype == np.float64 else distances
    fraction = distances - whole  # exact
    whole = whole.astype(np.int64).astype(np.uint64)
    high, low = _words(_host(frequencies)).astype(np.uint64)
    for i, (word, inv_freq) in enumerate(zip((high << 32) | low, frequencies.inv_freq, strict=True)):
        pick = ... if axes is None else (..., axes[i])
        phase = np.multiply(whole[pick], word).astype(np.int64)  # in 2^-64 turns, from -1/2 turn to 1/2
        yield phase * (2 * np.pi * 2.0**-64) + fraction[pick] * inv_freq


def _host(frequencies) -> Frequencies:
    if isinstance(frequencies, Frequencies) and frequencies.on_host:
        return frequencies
    if isinstance(frequencies, Frequencies):
        came = "Frequencies of a jax array; make them from numpy.asarray(array)"
    elif isinstance(frequencies, FrequencyChoice):
        came = "FrequencyChoice; take one of its options"
    else:
        came = f"{type(frequencies).__name__}; call a schedule with rotary_dim, or wrap numbers as Frequencies"
    raise TypeError(f"frequencies must be host Frequencies, got {came}")


def _distances(distances, argument: str = "distances") -> np.ndarray:
    """int64 or float64."""
    distances = np.asarray(distances)
    if distances.dtype.kind not in "iuf":
        raise TypeError(f"{argument} must be integers or floats, got dtype {distances.dtype}")
    if distances.dtype.kind == "f":
        distances = distances.astype(np.float64)
    if distances.dtype.kind != "i" and not np.all(np.abs(distances) < 2**63):  # nan fails too
        raise ValueError(f"{argument} must be finite and below 2^63, got {distances.min()} to {distances.max()}")
    return distances if distances.dtype == np.float64 else distances.astype(np.int64)


def _features(argument: str, x, head_dim: int) -> np.ndarray:
    x = np.asarray(x)
    if not (x.dtype.kind in "iu" or jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(f"{argument} must be real numbers, got dtype {x.dtype}")
    if x.shape != (head_dim,):
        raise ValueError(f"{argument} must have shape [H] with H={head_dim}, got {x.shape}")
    return x.astype(np.float64)


def _count(argument: str, value, unit: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{argument} must be an integer number of {unit}, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")
    return int(value)
