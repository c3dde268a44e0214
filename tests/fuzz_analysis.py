"""Calls of the functions that explain and draw, with a right value for each argument."""

import functools

import matplotlib.figure
import numpy as np

import rope_jax
from rope_jax import analysis, plot

ROPE = rope_jax.Rope(8, rope_jax.Standard())
SCHEDULE = {"*frequencies": rope_jax.Standard(), "rotary_dim": 8}
FREQUENCIES = {"*frequencies": rope_jax.Standard()(8), "rotary_dim": None}
VECTORS = {"*q": np.ones(8), "*k": np.ones(8), "*rope": ROPE}


def drawn(draw):
    """The drawing function on an empty figure."""

    @functools.wraps(draw)
    def call(*args, **kwargs):
        figure = matplotlib.figure.Figure()
        return draw(
            figure if draw in (plot.clock_hands, plot.attention_maps) else figure.subplots(), *args, **kwargs
        )

    return call


CALLS = {
    "wavelengths": (analysis.wavelengths, SCHEDULE, {}),
    "wavelengths of frequencies": (analysis.wavelengths, FREQUENCIES, {}),
    "turns": (analysis.turns, SCHEDULE | {"*context_length": 64}, {}),
    "incomplete_pairs": (analysis.incomplete_pairs, SCHEDULE | {"*context_length": 64}, {}),
    "effective_context": (analysis.effective_context, SCHEDULE, {}),
    "aliases": (analysis.aliases, SCHEDULE | {"*context_length": 64, "count": 2}, {}),
    "decay_bound": (analysis.decay_bound, SCHEDULE | {"*distances": np.arange(4)}, {}),
    "mean_score": (analysis.mean_score, SCHEDULE | {"*distances": np.arange(4)}, {}),
    "phase_error": (analysis.phase_error, SCHEDULE | {"*positions": np.arange(4), "*arithmetic": "float32"}, {}),
    "score_kernel": (analysis.score_kernel, VECTORS | {"*distances": np.arange(4), "context_length": None}, {}),
    "plot.attention_maps": (drawn(plot.attention_maps), {"*weights": np.full((1, 2, 3, 3), 0.5)}, {}),
    "plot.clock_hands": (drawn(plot.clock_hands), {"*rope": ROPE, "*positions": np.arange(3)}, {}),
    "plot.decay": (
        drawn(plot.decay),
        {"*schedules": {"a": rope_jax.Standard()}, "*rotary_dim": 8, "*distances": np.arange(4), "bound": False},
        {},
    ),
    "plot.phase_errors": (
        drawn(plot.phase_errors),
        {
            "*frequencies": rope_jax.Standard()(8),
            "*positions": np.arange(1, 4),
            "arithmetics": ("exact", "float32"),
        },
        {},
    ),
    "plot.score_map": (drawn(plot.score_map), VECTORS | {"*span": 4}, {}),
    "plot.wavelengths": (
        drawn(plot.wavelengths),
        {"*schedules": {"a": rope_jax.Standard()}, "*rotary_dim": 8, "context_length": 64},
        {},
    ),
}
