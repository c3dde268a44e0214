"""Are exact angles slower than float32 cos and sin of the same table?

    python benchmarks/angles.py

Predicted: float32 cos and sin each reduce an argument of any size, dozens of operations; ours is four integer
products, one reduction and two short polynomials. Both write 2 x 4 bytes per pair. A and B in turn, medians.
A table of a few rows is all launch and no arithmetic: there the number of kernels counts, not the operations.
"""

import statistics
import time

import jax
import jax.numpy as jnp
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
    for form in forms.values():
        jax.block_until_ready(form(positions))
    times: dict = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form(positions))
            times[name].append(1e3 * (time.perf_counter() - start))
    ratios = [b / a for a, b in zip(times["rope_jax"], times["float32 cos and sin"], strict=True)]
    return {
        "milliseconds (quartiles)": {name: quartiles(values) for name, values in times.items()},
        "float32 time over rope_jax time, round by round (quartiles)": quartiles(ratios),
    }


if __name__ == "__main__":
    tables = {f"{length} x {ROTARY_DIM // 2}": compare(length, rounds) for length, rounds in ROUNDS.items()}
    save(__file__, {"positions x pairs": tables})
