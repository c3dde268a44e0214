"""Are exact angles slower than float32 cos and sin of the same table?

    python benchmarks/angles.py

Predicted: float32 cos and sin each reduce an argument of any size, dozens of operations; ours is four integer
products, one reduction and two short polynomials. Both write 2 x 4 bytes per pair. A and B in turn, medians.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from record import save

import rope_jax

LENGTH, ROTARY_DIM, ROUNDS = 131_072, 128, 31


def main() -> None:
    frequencies = rope_jax.Standard(base=500_000.0)(ROTARY_DIM)
    inv_freq = jnp.asarray(frequencies.inv_freq, jnp.float32)

    def float32(positions):
        angles = positions[:, None].astype(jnp.float32) * inv_freq
        return jnp.cos(angles), jnp.sin(angles)

    forms = {
        "rope_jax": jax.jit(lambda positions: rope_jax.rotation(positions, frequencies)),
        "float32 cos and sin": jax.jit(float32),
    }
    positions = jnp.arange(LENGTH)
    for form in forms.values():
        jax.block_until_ready(form(positions))
    times: dict = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form(positions))
            times[name].append(1e3 * (time.perf_counter() - start))
    ratios = [b / a for a, b in zip(times["rope_jax"], times["float32 cos and sin"], strict=True)]
    quartiles = lambda values: [round(q, 2) for q in statistics.quantiles(values, n=4)]  # noqa: E731
    save(
        __file__,
        {
            "table": f"{LENGTH} positions x {ROTARY_DIM // 2} pairs",
            "milliseconds (quartiles)": {name: quartiles(values) for name, values in times.items()},
            "float32 time over rope_jax time, round by round (quartiles)": quartiles(ratios),
        },
    )


if __name__ == "__main__":
    main()
