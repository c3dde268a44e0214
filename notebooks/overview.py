"""Draws the README's picture: pairs as clock hands, and scores that depend on m - n only.

python notebooks/overview.py [FILE.png]
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import rope_jax

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]
POSITIONS = 8  # clock faces
SPAN = 48  # positions in the heat map


def clock_hands(figure) -> None:
    """One face per position: every pair of features is a hand that turns at its own speed."""
    rope = rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard(base=100.0))
    turn = rope.rotation(jnp.arange(POSITIONS))
    figure.suptitle("A position turns every pair of features,\neach at its own speed", fontsize=12)
    for m, face in enumerate(figure.subplots(2, POSITIONS // 2).flat):
        face.add_patch(plt.Circle((0, 0), 1.08, fill=False, color="0.75"))
        for pair, colour in enumerate(COLOURS):
            tip = float(turn.cos[m, pair]), float(turn.sin[m, pair])
            label = f"pair {pair}" if m == 0 else None
            face.plot([0, tip[0]], [0, tip[1]], color=colour, linewidth=2.5, solid_capstyle="round", label=label)
        face.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", title=f"m = {m}")
        face.axis("off")
    figure.legend(loc="lower center", ncols=len(COLOURS), frameon=False)


def scores(figure) -> None:
    """q_m . k_n of one query and one key at all pairs of positions: constant along every diagonal."""
    rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.Standard())
    rng = np.random.default_rng(1)
    key = rng.normal(size=64)
    query = key + 0.5 * rng.normal(size=64)  # alike, so that near tokens score high
    stay = jnp.ones((SPAN, 1, 1))
    q, k = (stay * jnp.asarray(x, jnp.float32) for x in (query, key))
    q, k = rope(q, k, jnp.arange(SPAN))
    table = np.einsum("mnh,snh->ms", q, k) / np.sqrt(64)
    axes = figure.subplots()
    image = axes.imshow(table, cmap="viridis", origin="lower")
    axes.set(xlabel="position n of the key", ylabel="position m of the query")
    figure.suptitle("so the score of a query with a key\ndepends on m - n only", fontsize=12)
    figure.colorbar(image, label="score  q·k / √H", shrink=0.85)


def main(target: Path) -> None:
    figure = plt.figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), wspace=0.06)
    clock_hands(left)
    scores(right)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
