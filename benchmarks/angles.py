"""Are exact angles slower than float32 cos and sin of the same table?

    python benchmarks/angles.py

Predicted: float32 cos and sin each reduce an argument of any size, dozens of operations; ours is four integer
products, one reduction and two short polynomials. Both write 2 x 4 bytes per pair. A and B in turn, medians.
A table of a few rows is all launch and no arithmetic: there the number of kernels counts, not the operations.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
from clock import in_turns, ratios
from record import save

import rope_jax

ROTARY_DIM = 128
ROUNDS = {1: 2001, 64: 2001, 4096: 401, 131_072: 41}  # by the number of positions


def quartiles(values) -> list[float]:
    return [round(q, 4) for q in statistics.quantiles(values, n=4)]


def compare(length: int, rounds: int) -> dict:
    frequencies = rope_jax.Standard(base=500_000.0)(ROTARY_DIM)
    inv_freq = jnp.asarray(frequencies.inv_freq, jnp.float32)

    def float32(positions):
        angles = positions[:, None].astype(jnp.float32) * inv_freq
        return jnp.cos(angles), jnp.sin(angles)

    forms = {
        "rope_jax": jax.jit(lambda positions: rope_jax.rotation(positions, frequencies)),
        "float32 cos and sin": jax.jit(float32),
    }
    positions = jnp.arange(length)
    times = in_turns({name: functools.partial(form, positions) for name, form in forms.items()}, rounds)
    return {
        "milliseconds (quartiles)": {name: quartiles(values) for name, values in times.items()},
        "float32 time over rope_jax time, round by round (quartiles)": [
            round(q, 4) for q in ratios(times, "float32 cos and sin", "rope_jax")
        ],
    }


if __name__ == "__main__":
    tables = {f"{length} x {ROTARY_DIM // 2}": compare(length, rounds) for length, rounds in ROUNDS.items()}
    save(__file__, {"positions x pairs": tables})
