"""Independent references for the tests: mpmath and Python integers, numpy float64 and complex128.

Nothing here imports rope_jax, and no formula is written as in the library.
"""

import math

import mpmath
import numpy as np

EPS32 = 2.0**-24  # unit roundoff of float32
EPS16 = 2.0**-8  # of bfloat16

_TURN_BITS = 512
with mpmath.workprec(_TURN_BITS + 64):
    _PER_TURN = int(mpmath.floor(mpmath.ldexp(1 / (2 * mpmath.pi), _TURN_BITS)))


def cos_sin(positions, inv_freq):
    """cos and sin of ``position * inv_freq`` in float64 for exact integers and float64 frequencies, ``[T, R/2]``.

    The product and its reduction modulo a turn are exact Python integers; 2 pi comes from mpmath.
    """
    positions = [int(m) for m in np.asarray(positions).ravel()]
    turns = np.empty((len(positions), len(inv_freq)))
    for i, frequency in enumerate(np.asarray(inv_freq, np.float64).tolist()):
        numerator, denominator = frequency.as_integer_ratio()
        step = numerator * _PER_TURN // denominator
        turns[:, i] = [((m * step) % (1 << _TURN_BITS)) / (1 << _TURN_BITS) for m in positions]
    return np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)


def mp_cos_sin(position: int, frequency: float):
    """The same for one angle, by mpmath alone, at 60 digits."""
    with mpmath.workdps(60):
        angle = mpmath.mpf(position) * mpmath.mpf(frequency)
        return float(mpmath.cos(angle)), float(mpmath.sin(angle))


def rotate_features(x, cos, sin, layout):
    """x ``[..., T, N, H]`` rotated as complex numbers: ``(x1 + i x2) * (cos + i sin)``, in complex128."""
    x = np.asarray(x, np.float64)
    factor = (np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64))[..., None, :]
    pairs = factor.shape[-1]
    first = slice(0, pairs) if layout == "half" else slice(0, 2 * pairs, 2)
    second = slice(pairs, 2 * pairs) if layout == "half" else slice(1, 2 * pairs, 2)
    rotated = (x[..., first] + 1j * x[..., second]) * factor
    y = x.copy()
    y[..., first], y[..., second] = rotated.real, rotated.imag
    return y


def attention_weights(q, k, allowed, *, scale=None, logit_cap=None, bias=0.0):
    """Weights of one row, by query head, in float64 ``[N, T, S]``: q ``[T, N, H]``, k ``[S, K, H]``.

    ``allowed`` and ``bias`` are ``[T, S]`` or ``[N, T, S]``.
    """
    q, k = (np.asarray(a, np.float64) for a in (q, k))
    shape = (q.shape[1], q.shape[0], k.shape[0])
    allowed, bias = np.broadcast_to(allowed, shape), np.broadcast_to(np.asarray(bias, np.float64), shape)
    out = np.zeros(shape)
    group = q.shape[1] // k.shape[1]
    for n, t in np.ndindex(shape[:2]):
        scores = np.array([q[t, n] @ k[s, n // group] for s in range(k.shape[0])])
        scores *= 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if logit_cap:
            scores = logit_cap * np.tanh(scores / logit_cap)
        scores = scores + bias[n, t]
        weights = np.where(allowed[n, t], np.exp(scores - scores[allowed[n, t]].max()), 0)
        out[n, t] = weights / weights.sum()
    return out


def attention(q, k, v, allowed, **options):
    """Attention of one row over values ``[S, K, H]``: ``[T, N, H]``."""
    weights = attention_weights(q, k, allowed, **options)
    group = q.shape[1] // k.shape[1]
    v = np.asarray(v, np.float64)
    return np.stack([weights[n] @ v[:, n // group] for n in range(len(weights))], axis=1)


# ------------------------------------------------------- schedules, one pair at a time, as in the papers


def _ladder(dim, base):
    return [base ** (-2 * i / dim) for i in range(dim // 2)]


def standard(dim, base):
    return _ladder(dim, base), 1.0


def linear(dim, base, factor):
    return [f / factor for f in _ladder(dim, base)], 1.0


def ntk(dim, base, factor):
    return _ladder(dim, base * factor ** (dim / (dim - 2))), 1.0


def dynamic_ntk(dim, base, factor, original_length, length):
    stretch = factor * max(length, original_length) / original_length - (factor - 1)
    return ntk(dim, base, stretch)


def yarn(dim, base, factor, original_length, beta_fast=32, beta_slow=1, truncate=True, attention_factor=None):
    def pair_index(turns):
        return dim / 2 * math.log(original_length / (turns * 2 * math.pi), base)

    low, high = pair_index(beta_fast), pair_index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    out = []
    for i, f in enumerate(_ladder(dim, base)):
        share = min(max((i - low) / (high - low), 0), 1)
        out.append(f * (1 - share) + f / factor * share)
    return out, 0.1 * math.log(factor) + 1 if attention_factor is None else attention_factor


def longrope(dim, base, divisors, factor, original_length):
    ladder = [1 / (d * base ** (2 * i / dim)) for i, d in enumerate(divisors)]
    return ladder, math.sqrt(1 + math.log(factor, original_length))


def llama3(dim, base, factor, original_length, low_freq_factor, high_freq_factor):
    out = []
    for f in _ladder(dim, base):
        wavelength = 2 * math.pi / f
        if wavelength > original_length / low_freq_factor:
            out.append(f / factor)
        elif wavelength < original_length / high_freq_factor:
            out.append(f)
        else:
            smooth = (original_length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            out.append((1 - smooth) * f / factor + smooth * f)
    return out, 1.0


def proportional(dim, base, proportion, factor):
    turning = int(proportion * dim // 2)
    return [f / factor if i < turning else 0.0 for i, f in enumerate(_ladder(dim, base))], 1.0


def mp_waves(positions, inv_freq, phase=None):
    """cos and sin of ``sum_a positions[t, a] inv_freq[a, i] + phase[i]`` by mpmath at 60 digits: float64 ``[T, M]``."""
    positions, inv_freq = np.asarray(positions), np.asarray(inv_freq, np.float64)
    phase = np.zeros(inv_freq.shape[1]) if phase is None else np.asarray(phase, np.float64)
    cos, sin = np.empty((2, len(positions), inv_freq.shape[1]))
    with mpmath.workdps(60):
        for t, coordinates in enumerate(positions.tolist()):
            for i, wave in enumerate(inv_freq.T.tolist()):
                angle = mpmath.mpf(float(phase[i]))
                for m, theta in zip(coordinates, wave, strict=True):
                    angle += mpmath.mpf(m) * mpmath.mpf(theta)
                cos[t, i], sin[t, i] = float(mpmath.cos(angle)), float(mpmath.sin(angle))
    return cos, sin


def rotate_pairs(x, angles, first, second, factor=1.0):
    """Rotates features ``first[i], second[i]`` of x ``[T, N, H]`` by ``angles [T, N, R/2]``: float64, a pair at a time."""
    y = np.array(x, np.float64)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        rotated = (x[..., a].astype(np.float64) + 1j * x[..., b]) * factor * np.exp(1j * angles[..., i])
        y[..., a], y[..., b] = rotated.real, rotated.imag
    return y
