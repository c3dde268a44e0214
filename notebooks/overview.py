"""Draws the README's picture: pairs as clock hands, and scores that depend on m - n only.

python notebooks/overview.py [FILE.png]
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import rope_jax
from rope_jax import plot


def main(target: Path) -> None:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), wspace=0.06)
    plot.clock_hands(left, rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard(base=100.0)), range(8))

    rng = np.random.default_rng(1)
    key = rng.normal(size=64)
    query = key + 0.5 * rng.normal(size=64)  # alike, so that near tokens score high
    axes = plot.score_map(right.subplots(), query, key, rope_jax.Rope(64, rope_jax.Standard()), span=48)
    axes.set_title("")
    right.suptitle(
        "so the score of a query with a key\ndepends on m - n only", fontsize=12
    )  # on a line with the left
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
