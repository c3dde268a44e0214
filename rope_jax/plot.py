"""Draws schedules, ropes and attention weights with matplotlib.

Each function draws into given axes or a given figure and returns it. No function opens a window, saves a file or
sets a style. The numbers come from :mod:`rope_jax.analysis` and from the library itself. Needs matplotlib, which
``import rope_jax`` does not: ``pip install "rope_jax[plot]"``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from rope_jax import analysis
from rope_jax._analysis_arguments import checked_count, checked_features
from rope_jax._checks import check_choice, check_flag, check_sequence, host_array, shown
from rope_jax.core.frequencies import Frequencies, Schedule, call_schedule, check_schedule
from rope_jax.core.rope import Rope

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase
    from matplotlib.patches import Circle
except ImportError as error:
    raise ImportError('rope_jax.plot needs matplotlib: pip install "rope_jax[plot]"') from error

# Okabe and Ito's colours, distinct for colour-blind readers; their yellow is too pale for a line on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
# Coinciding lines stay visible: the lower line shows in the gaps of the upper.
DASHES = ("-", "--", "-.", ":", (0, (4, 4)), (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)))

# ------------------------------------------------------------------------------------------- schedules


def wavelengths(
    axes: Axes, schedules: Mapping[str, Schedule], rotary_dim: int, context_length: int | None = None
) -> Axes:
    """Draws the wavelength of each pair, on a log scale: a line for each schedule.

    Pairs of frequency 0 have no point; the legend counts them.

    Args:
      axes: to draw into.
      schedules: one to seven schedules, by their name in the legend.
      rotary_dim: R.
      context_length: in tokens; draws a horizontal line. Pairs above the line complete no turn in training.

    Returns:
      The axes.

    Raises:
      TypeError: if axes are not matplotlib's, schedules are not a mapping to schedules of host frequencies, or
        context_length is not an integer.
      ValueError: if schedules are not one to seven, or context_length is below 1.

    Example:
      >>> import rope_jax, rope_jax.plot
      >>> from matplotlib.figure import Figure
      >>> schedules = {"Llama 2": rope_jax.Standard(), "Llama 3": rope_jax.Standard(base=500_000.0)}
      >>> axes = rope_jax.plot.wavelengths(Figure().subplots(), schedules, 128, context_length=8192)
      >>> [line.get_label() for line in axes.lines]
      ['Llama 2', 'Llama 3', 'training length, 8,192 tokens']
    """
    _check_kind("axes", axes, Axes)
    for i, (name, frequencies) in enumerate(_frequencies_of(schedules, rotary_dim).items()):
        tokens = analysis.wavelengths(frequencies)
        still = int(np.isinf(tokens).sum())
        axes.plot(
            np.where(np.isinf(tokens), np.nan, tokens),
            color=COLOURS[i],
            linestyle=DASHES[i],
            linewidth=2,
            label=f"{name} ({still} of {tokens.size} pairs stand still)" if still else name,
        )
    if context_length is not None:
        context_length = checked_count("context_length", context_length)
        axes.axhline(context_length, color="0.4", linewidth=1, label=f"training length, {context_length:,} tokens")
    axes.set(title="Wavelength of each pair", xlabel="pair i", ylabel="wavelength (tokens)")
    axes.set_yscale("log")
    _finish(axes)
    return axes


def decay(
    axes: Axes, schedules: Mapping[str, Schedule], rotary_dim: int, distances, *, bound: bool = False
) -> Axes:
    """Draws the mean score of equal query and key by distance: a line for each schedule.

    Args:
      axes: to draw into.
      schedules: one to seven schedules, by their name in the legend.
      rotary_dim: R.
      distances: ``[P]``, in tokens, in drawing order.
      bound: True adds RoFormer's bound, dashed, with its own axis on the right.

    Returns:
      The axes.

    Raises:
      TypeError: if axes are not matplotlib's, schedules are not a mapping to schedules of host frequencies, or
        distances are not integers or floats.
      ValueError: if schedules are not one to seven, or distances are not ``[P]`` or not finite.

    Example:
      >>> import numpy as np, rope_jax, rope_jax.plot
      >>> from matplotlib.figure import Figure
      >>> axes = rope_jax.plot.decay(Figure().subplots(), {"Llama 2": rope_jax.Standard()}, 128, np.arange(256))
      >>> float(axes.lines[0].get_ydata()[0])  # at distance 0
      1.0
    """
    _check_kind("axes", axes, Axes)
    distances, bound = host_array("distances", distances), check_flag("bound", bound)
    if distances.ndim != 1:
        raise ValueError(f"distances must have shape [P], got {distances.shape}")
    chosen = _frequencies_of(schedules, rotary_dim)
    for colour, (name, frequencies) in zip(COLOURS, chosen.items(), strict=False):
        score = analysis.mean_score(frequencies, distances)
        axes.plot(distances, score, color=colour, linewidth=1.4, label=name)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(
        title="Score of equal query and key after rotation",
        xlabel="distance (tokens)",
        ylabel="share of the score without rotation",
    )
    _finish(axes)
    if bound:
        right = axes.twinx()
        for colour, (name, frequencies) in zip(COLOURS, chosen.items(), strict=False):
            limit = analysis.decay_bound(frequencies, distances)
            right.plot(distances, limit, color=colour, linewidth=1, linestyle="--", label=name)
        right.set(ylabel="RoFormer's bound, mean of $|S_j|$ (dashed)", ylim=(0, None))
    return axes


def phase_errors(
    axes: Axes,
    frequencies: Frequencies,
    positions,
    arithmetics: Sequence[analysis.Arithmetic] = ("exact", "float32", "bfloat16"),
) -> Axes:
    """Draws the worst error of the angle over all pairs by position, on log scales: a line for each arithmetic.

    Args:
      axes: to draw into.
      frequencies: on the host.
      positions: integers ``[P]`` of at least 1, since a log scale has no 0, in drawing order.
      arithmetics: to compare, by their names in :func:`rope_jax.analysis.phase_error`.

    Returns:
      The axes.

    Raises:
      TypeError: if axes are not matplotlib's, frequencies are not on the host, positions are not integers, or
        arithmetics are no sequence.
      ValueError: if positions are not ``[P]``, a position is below 1, or arithmetics are not one to seven that
        are known.

    Example:
      >>> import numpy as np, rope_jax, rope_jax.plot
      >>> from matplotlib.figure import Figure
      >>> axes = rope_jax.plot.phase_errors(Figure().subplots(), rope_jax.Standard()(128), 2 ** np.arange(20))
      >>> axes.get_ylabel()
      'worst error of the angle (radians)'
    """
    _check_kind("axes", axes, Axes)
    arithmetics = check_sequence("arithmetics", arithmetics, "a sequence of names")
    if not 0 < len(arithmetics) <= len(COLOURS):
        raise ValueError(f"arithmetics must be 1 to {len(COLOURS)} names, got {shown(arithmetics)}")
    for arithmetic in arithmetics:
        check_choice("each of arithmetics", arithmetic, get_args(analysis.Arithmetic))
    positions = host_array("positions", positions)
    if not positions.size or positions.min() < 1:
        got = positions.min() if positions.size else "none"
        raise ValueError(f"positions must be at least 1 on a log scale, got {got}")
    for i, arithmetic in enumerate(arithmetics):
        worst = analysis.phase_error(frequencies, positions, arithmetic).max(-1)
        axes.plot(positions, worst, color=COLOURS[i], linewidth=1.8, label=arithmetic.replace("_", " "))
    axes.axhline(np.pi, color="0.4", linewidth=1, label="half a turn, the largest error")
    axes.set(
        title="Error of the angle in each arithmetic",
        xlabel="position",
        ylabel="worst error of the angle (radians)",
    )
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="mask")  # an error of 0 is a gap
    _finish(axes)
    # No error exceeds half a turn: leave room for the legend above, without ticks.
    bottom = axes.get_ylim()[0]
    axes.set_ylim(bottom, np.pi * (np.pi / bottom) ** 0.3)
    axes.set_yticks(10.0 ** np.arange(np.ceil(np.log10(bottom)), 1))
    axes.set_yticks([], minor=True)
    axes.legend(loc="upper left", frameon=False, fontsize=9, ncols=2)
    return axes


# -------------------------------------------------------------------------------------------- a rope


def clock_hands(figure: FigureBase, rope: Rope, positions) -> FigureBase:
    """Draws a clock face for each position, with a hand for each pair: ``a (cos, sin)(m theta_i)``.

    Args:
      figure: a figure or a subfigure, to fill with faces.
      rope: with at most seven pairs, so that a reader can follow the hands.
      positions: ``[P]``, or ``[P, A]`` for a rope with axes; as for :meth:`rope_jax.Rope.rotation`.

    Returns:
      The figure.

    Raises:
      TypeError: if figure is not matplotlib's, or rope is not a :class:`rope_jax.Rope`.
      ValueError: if the rope has more than seven pairs, or positions are empty or not ``[P]`` (``[P, A]``).

    Example:
      >>> import rope_jax, rope_jax.plot
      >>> from matplotlib.figure import Figure
      >>> rope = rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard(base=100.0))
      >>> figure = rope_jax.plot.clock_hands(Figure(layout="constrained"), rope, range(8))
      >>> [face.get_title() for face in figure.axes][:2]
      ['m = 0', 'm = 1']
    """
    _check_kind("figure", figure, FigureBase)
    _check_kind("rope", rope, Rope)
    if rope.num_pairs > len(COLOURS):
        raise ValueError(f"rope must have at most {len(COLOURS)} pairs for clock hands, got {rope.num_pairs}")
    positions = host_array("positions", positions)
    if positions.ndim != (1 if rope.num_axes == 1 else 2) or not len(positions):
        expected = "[P]" if rope.num_axes == 1 else f"[P, A={rope.num_axes}]"
        raise ValueError(f"positions must be {expected} with P of at least 1, got shape {positions.shape}")
    cos, sin = (np.asarray(part, np.float64) for part in rope.rotation(positions))
    radius = np.hypot(cos, sin).max()  # the attention factor
    limits = (-1.2 * radius, 1.2 * radius)

    rows = -(-len(positions) // 4)
    columns = -(-len(positions) // rows)
    faces = figure.subplots(rows, columns, squeeze=False).ravel()
    for m, face in enumerate(faces):
        face.set(xlim=limits, ylim=limits, aspect="equal")
        face.axis("off")
        if m >= len(positions):
            continue  # the last row may have fewer faces
        face.add_patch(Circle((0, 0), 1.08 * radius, fill=False, color="0.75"))
        for pair in range(rope.num_pairs):
            face.plot(
                [0, cos[m, pair]],
                [0, sin[m, pair]],
                color=COLOURS[pair],
                linewidth=2.5,
                solid_capstyle="round",
                label=f"pair {pair}" if m == 0 else None,
            )
        position = positions[m].tolist()
        face.set_title(f"m = {tuple(position) if isinstance(position, list) else position}")
    figure.suptitle("A position rotates every pair of features,\neach with its own frequency", fontsize=12)
    figure.legend(loc="outside lower center", ncols=min(rope.num_pairs, 4), frameon=False)
    return figure


def score_map(axes: Axes, q, k, rope: Rope, span: int) -> Axes:
    """Draws the score of a query at every m with a key at every n, rotated by the rope: constant along diagonals.

    The map shows ``q_m . k_n / sqrt(H)``, with q and k rotated in float32. Up to rounding and the scale, values
    equal :func:`rope_jax.analysis.score_kernel`.

    Args:
      axes: to draw into; their figure gets a colour bar.
      q: the query before its rotation, real numbers ``[H]``.
      k: the key before its rotation, real numbers ``[H]``.
      rope: without axes.
      span: positions ``0 .. span - 1`` of both, at least 1.

    Returns:
      The axes.

    Raises:
      TypeError: if axes are not matplotlib's, rope is not a :class:`rope_jax.Rope`, q or k is not real, or span is
        not an integer.
      ValueError: if q or k is not ``[H]``, the rope has axes, or span is below 1.

    Example:
      >>> import numpy as np, rope_jax, rope_jax.plot
      >>> from matplotlib.figure import Figure
      >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.Standard())
      >>> axes = rope_jax.plot.score_map(Figure().subplots(), np.ones(64), np.ones(64), rope, 48)
      >>> axes.images[0].get_array().shape
      (48, 48)
    """
    _check_kind("axes", axes, Axes)
    _check_kind("rope", rope, Rope)
    if rope.num_axes > 1:
        raise ValueError(f"rope must have one axis of positions for a map of m and n, got {rope.num_axes}")
    span = checked_count("span", span)
    q, k = checked_features("q", q, rope.head_dim), checked_features("k", k, rope.head_dim)
    repeated = [jnp.tile(jnp.asarray(x, jnp.float32), (span, 1, 1)) for x in (q, k)]
    rotated = rope(repeated[0], repeated[1], jnp.arange(span))
    queries, keys = (np.asarray(x, np.float64)[:, 0] for x in rotated)
    image = axes.imshow(queries @ keys.T / np.sqrt(rope.head_dim), cmap="viridis", origin="lower")
    axes.set(
        title="The score of a query with a key\ndepends on m - n only",
        xlabel="position n of the key",
        ylabel="position m of the query",
    )
    axes.figure.colorbar(image, ax=axes, label="score  q·k / √H", shrink=0.85)
    return axes


# -------------------------------------------------------------------------------------- a trained model


def attention_maps(figure: FigureBase, weights) -> FigureBase:
    """Draws the attention weights of all layers and heads: a row of maps for each layer, on a shared colour scale.

    Args:
      figure: a figure or a subfigure, to fill with maps.
      weights: attention weights ``[layers, N, T, S]``: for each query, its shares of the keys.

    Returns:
      The figure.

    Raises:
      TypeError: if figure is not matplotlib's, or weights are not floating.
      ValueError: if weights do not have four axes of at least 1, or a weight is negative or not finite.

    Example:
      >>> import numpy as np, rope_jax.plot
      >>> from matplotlib.figure import Figure
      >>> weights = np.tril(np.ones((2, 3, 5, 5))) / np.arange(1, 6)[:, None]  # equal weights of all keys so far
      >>> figure = rope_jax.plot.attention_maps(Figure(layout="constrained"), weights)
      >>> [axes.get_title() for axes in figure.axes[:3]]
      ['head 0', 'head 1', 'head 2']
    """
    _check_kind("figure", figure, FigureBase)
    weights = host_array("weights", weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"weights must be floating, got dtype {weights.dtype}")
    if weights.ndim != 4 or not weights.size:
        raise ValueError(f"weights must be [layers, N, T, S] and not empty, got shape {weights.shape}")
    weights = weights.astype(np.float32)
    if not np.all(np.isfinite(weights) & (weights >= 0)):
        raise ValueError(f"weights must be finite and not negative, got {weights.min()} to {weights.max()}")
    maps: Any = figure.subplots(*weights.shape[:2], squeeze=False, sharex=True, sharey=True)
    for layer, head in np.ndindex(*weights.shape[:2]):
        axes = maps[layer, head]
        image = axes.imshow(
            weights[layer, head], cmap="viridis", vmin=0, vmax=weights.max(), interpolation="nearest"
        )
        if layer == 0:
            axes.set_title(f"head {head}", fontsize=10)
        if head == 0:
            axes.set_ylabel(f"layer {layer}", fontsize=10)
    figure.suptitle("Attention weights of each head", fontsize=12)
    figure.supxlabel("position of the key", fontsize=10)
    figure.supylabel("position of the query", fontsize=10)
    figure.colorbar(image, ax=maps, label="attention weight", shrink=0.85)
    return figure


# -------------------------------------------------------------------------------------------- shared helpers


def _frequencies_of(schedules: Mapping[str, Schedule], rotary_dim: int) -> dict:
    if not isinstance(schedules, Mapping):
        raise TypeError(f"schedules must map a name to a schedule, got {type(schedules).__name__}")
    if not 0 < len(schedules) <= len(COLOURS):
        raise ValueError(f"schedules must be 1 to {len(COLOURS)}, one colour each, got {len(schedules)}")
    rotary_dim, frequencies = checked_count("rotary_dim", rotary_dim), {}
    for name, schedule in schedules.items():
        check_schedule(schedule, f"schedules[{name!r}]")
        frequencies[name] = call_schedule(schedule, rotary_dim, argument=f"schedules[{name!r}]")
    return frequencies


def _check_kind(argument: str, value, kind: type) -> None:
    if not isinstance(value, kind):
        expected = {Axes: "matplotlib Axes", FigureBase: "a matplotlib Figure or SubFigure", Rope: "a Rope"}[kind]
        raise TypeError(f"{argument} must be {expected}, got {type(value).__name__}")


def _finish(axes: Axes) -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
