"""Measures the worst error of cos and sin against exact integer arithmetic.

    python -m benchmarks.exactness            # every schedule, sampled over the whole int32 range
    python -m benchmarks.exactness --every    # besides, every one of the 2^30 phases of a quarter turn; minutes

The truth is exact integer arithmetic with mpmath's 2 pi (tests/oracles.py); for --every it is numpy's float64.
float32 is `jnp.cos(position * inv_freq)`, as most RoPE implementations compute it, at the same positions.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import rope_jax
from benchmarks.record import save
from tests import oracles
from tests.schedules import CASES, ROTARY_DIM

INT32 = np.iinfo(np.int32)
RANGES = {
    "0 to 5e3": (0, 5_000),
    "around 1e6": (10**6 - 5_000, 10**6 + 5_000),
    "around 1e7": (10**7 - 5_000, 10**7 + 5_000),
    "up to 2^31 - 1": (INT32.max - 5_000, INT32.max),
    "down to -2^31": (INT32.min, INT32.min + 5_000),
    "all of int32": (INT32.min, INT32.max),
}


def worst(got, want, factor) -> float:
    """Largest error of cos and sin, as a share of max(1, attention_factor)."""
    pairs = zip(got, want, strict=True)
    return max(float(np.abs(np.asarray(g, np.float64) - factor * w).max()) for g, w in pairs) / max(1, factor)


def sampled(count: int = 2_000) -> dict:
    rng = np.random.default_rng(0)
    table: dict = {}
    for name, (low, high) in RANGES.items():
        positions = np.append(rng.integers(low, high, count), [low, high]).astype(np.int32)
        ours, plain = {}, 0.0
        for case in CASES:
            frequencies = case.build()(ROTARY_DIM)
            want = oracles.cos_sin(positions, frequencies.inv_freq)
            factor = frequencies.attention_factor
            for fn in (rope_jax.rotation, jax.jit(rope_jax.rotation, static_argnums=1)):
                error = worst(fn(jnp.asarray(positions), frequencies), want, factor)
                ours[case.name] = max(error, ours.get(case.name, 0.0))
            angles = jnp.asarray(positions, jnp.float32)[:, None] * jnp.asarray(frequencies.inv_freq, jnp.float32)
            plain = max(plain, worst((jnp.cos(angles), jnp.sin(angles)), want, 1.0))
        table[name] = {"rope_jax": max(ours.values()), "float32": plain, "by schedule": ours}
    return table


def every_phase() -> float:
    """All 2^30 rests from minus to plus an eighth of a turn: position 1 at frequencies of 2^-32 turns each."""
    from rope_jax.core.angles import _coefficients, _polynomials

    coefficients = jnp.asarray(_coefficients(rope_jax.Frequencies([1.0])))
    turn = jax.jit(lambda phases: _polynomials(phases[None], coefficients))
    block, most = 1 << 24, 0.0
    for start in range(-(1 << 29), 1 << 29, block):
        rest = np.arange(start, start + block)
        angle = rest * (2 * np.pi * 2.0**-32)
        got = turn(jnp.asarray(rest.astype(np.uint32)))
        most = max(most, worst((got.cos[0], got.sin[0]), (np.cos(angle), np.sin(angle)), 1.0))
    return most


if __name__ == "__main__":
    result: dict = {"worst error": sampled()}
    if "--every" in sys.argv:
        result["every phase of a quarter turn, attention factor 1"] = every_phase()
    save(__file__, result)
