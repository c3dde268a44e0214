"""Times exact cos and sin beside float32 ones of the same table.

    python -m benchmarks.angles

Predicted: float32 cos and sin each reduce an argument of any size, dozens of operations; ours is four integer
products, one reduction and two short polynomials. Both write 2 x 4 bytes per pair. At 131,072 x 64 it should be at
least twice as fast. A table of a few rows is all launch and no arithmetic: there the number of kernels counts, not
the operations.
"""

import functools
import statistics
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import matplotlib.figure
from matplotlib import ticker

import rope_jax
from benchmarks.clock import in_turns, ratios
from benchmarks.record import publish
from rope_jax.plot import COLOURS

ROTARY_DIM = 128
ROUNDS = {1: 2001, 64: 2001, 4096: 401, 131_072: 41}  # by the number of positions
OURS, PLAIN = "rope_jax", "float32 cos and sin"
TABLES, TIMES = "positions x pairs", "milliseconds (quartiles)"
RATIO = "float32 time over rope_jax time, round by round (quartiles)"


def compare(length: int, rounds: int) -> dict:
    frequencies = rope_jax.Standard(base=500_000.0)(ROTARY_DIM)
    inv_freq = jnp.asarray(frequencies.inv_freq, jnp.float32)

    def float32(positions):
        angles = positions[:, None].astype(jnp.float32) * inv_freq
        return jnp.cos(angles), jnp.sin(angles)

    forms = {OURS: jax.jit(lambda positions: rope_jax.rotation(positions, frequencies)), PLAIN: jax.jit(float32)}
    positions = jnp.arange(length)
    for ours, plain in zip(*(form(positions) for form in forms.values()), strict=True):
        # float32 is off by an ulp or two of its largest angle, a radian per position
        assert jnp.abs(ours - plain).max() < 1e-6 + length * 2.0**-22, "they compute different angles"
    times = in_turns({name: functools.partial(form, positions) for name, form in forms.items()}, rounds)
    return {
        TIMES: {name: [round(q, 4) for q in statistics.quantiles(each, n=4)] for name, each in times.items()},
        RATIO: [round(q, 4) for q in ratios(times, PLAIN, OURS)],
    }


def measure(rounds: Mapping[int, int] = ROUNDS) -> dict:
    """Quartiles for each length, in so many rounds."""
    return {TABLES: {f"{length} x {ROTARY_DIM // 2}": compare(length, count) for length, count in rounds.items()}}


def table(kept: dict) -> str:
    rows = [
        f"| {TABLES} | {OURS} | `jnp.cos` and `jnp.sin` in float32 | their time over ours |",
        "|---|---|---|---|",
    ]
    for name, each in kept["result"][TABLES].items():
        ours, plain = (each[TIMES][form][1] for form in (OURS, PLAIN))
        low, middle, high = each[RATIO]
        rows.append(f"| {name} | {ours:.3g} ms | {plain:.3g} ms | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(rows)


def draw(kept: dict) -> matplotlib.figure.Figure:
    """Time by the number of positions."""
    rows = kept["result"][TABLES]
    lengths = [int(name.split()[0]) for name in rows]
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for form, colour, marker in zip((OURS, PLAIN), COLOURS, "os", strict=False):
        low, middle, high = zip(*(each[TIMES][form] for each in rows.values()), strict=True)
        axes.plot(lengths, middle, marker=marker, color=colour, label=form)
        axes.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=f"positions, of {ROTARY_DIM // 2} pairs each", ylabel="milliseconds, quartiles")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    publish(__file__, measure(), table, draw)
