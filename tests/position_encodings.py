"""The encodings beside RoPE, their formulas in plain Python, and a sequence fed in pieces: shared by several tests."""

import itertools
from fractions import Fraction

import mpmath
import numpy as np
from decoders import ROPE, D

import rope_jax

B, N, T = 2, 4, 10
ENCODINGS = {
    "none": {},
    "rope": dict(rope=ROPE),
    "sinusoidal": dict(position_embedding=rope_jax.models.Sinusoidal(base=100.0)),
    "learned": dict(position_embedding=rope_jax.models.LearnedPositions(num_positions=70)),
    "t5": dict(position_bias=rope_jax.attention.T5Bias(num_buckets=6, max_distance=9)),
    "alibi": dict(position_bias=rope_jax.attention.ALiBi()),
    "rope+alibi": dict(rope=ROPE, position_bias=rope_jax.attention.ALiBi()),
}
# Each of them in turn; and where they are alike to the code, the two forms of adding to x and to the scores at once.
ENCODINGS["learned+t5"] = ENCODINGS["learned"] | ENCODINGS["t5"]
ENCODINGS["rope+sinusoidal+alibi"] = ENCODINGS["rope+alibi"] | ENCODINGS["sinusoidal"]


def distances(length=T):
    """float64 ``[T, T]``: how far each query stands behind each key."""
    return np.subtract.outer(np.arange(length), np.arange(length))


def sinusoidal(position, width, base):
    """Vaswani et al. 2017, section 3.5, at 60 digits."""
    with mpmath.workdps(60):
        angles = [mpmath.mpf(position) / mpmath.mpf(base) ** (mpmath.mpf(2 * i) / width) for i in range(width // 2)]
        return [float(part(angle)) for angle in angles for part in (mpmath.sin, mpmath.cos)]


def t5_bucket(distance, causal, num_buckets, max_distance):
    """Raffel et al. 2020, section 2.1, without a logarithm: ``floor(log(d/e) / log(M/e) * s) >= j`` is this power."""
    if not causal:
        half = num_buckets // 2
        return t5_bucket(abs(distance), True, half, max_distance) + (half if distance < 0 else 0)
    distance, exact = max(distance, 0), num_buckets // 2
    if distance < exact:
        return distance
    shared = num_buckets - exact
    for j in reversed(range(shared)):
        if Fraction(distance, exact) ** shared >= Fraction(max_distance, exact) ** j:
            return exact + j
    raise AssertionError


def alibi_slopes(heads):
    """Press et al. 2022, section 3: a geometric sequence from 2^(-8/n) with that ratio; and, by the authors' code,
    for other numbers of heads that of the power of two below, and every other one of twice as many."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    if power == heads:
        return [2 ** (-8 / heads) * (2 ** (-8 / heads)) ** i for i in range(heads)]
    return alibi_slopes(power) + alibi_slopes(2 * power)[::2][: heads - power]


def reference(name, params, length=T):
    """What the encoding of that name adds to the embeddings ``[T, D]`` and to the scores ``[N, T, S]``."""
    added, bias = 0.0, 0.0
    if "sinusoidal" in name:
        added = np.array([sinusoidal(m, D, 100) for m in range(length)])
    if "learned" in name:
        added = np.asarray(params["params"]["position_embedding"]["table"], np.float64)[:length]
    if "t5" in name:
        table = np.asarray(params["params"]["position_bias"]["table"], np.float64)
        buckets = np.vectorize(lambda d: t5_bucket(d, True, 6, 9))(distances(length))
        bias = np.moveaxis(table[buckets], -1, 0)
    if "alibi" in name:
        bias = -np.array(alibi_slopes(N))[:, None, None] * abs(distances(length))
    return added, bias


LEFT_AND_RIGHT = np.array([[0] * 3 + [1] * 7, [1] * 4 + [0] + [1] * 3 + [0] * 2], bool)  # and one with a hole
CUTS = ([7, 8, 9, T], [3, 6, 9, T], range(1, T + 1))  # prefill and decode, chunks, one by one


def in_pieces(step, cache, x, mask, cuts):
    outs = []
    for start, stop in itertools.pairwise([0, *cuts]):
        y, cache = step(x[:, start:stop], None if mask is None else mask[:, start:stop], cache)
        outs.append(y)
    return np.concatenate(outs, axis=1), cache
