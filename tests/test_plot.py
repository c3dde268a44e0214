import importlib
import io
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import rope_jax
from rope_jax import plot

LENGTH = 8192
SCHEDULES = {
    "Llama 2": rope_jax.Standard(),
    "YaRN": rope_jax.Yarn(factor=4.0, original_length=LENGTH),
    "p-RoPE": rope_jax.Proportional(proportion=0.25),
}
ORACLES = {
    "Llama 2": oracles.standard(64, 1e4),
    "YaRN": oracles.yarn(64, 1e4, 4.0, LENGTH),
    "p-RoPE": oracles.proportional(64, 1e4, 0.25, 1.0),
}


def drawn(axes):
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def can_be_drawn(figure):
    figure.savefig(
        io.BytesIO(), format="png"
    )  # warnings are errors here; canvas.draw() of a bare Figure does nothing


def test_wavelengths():
    axes = Figure(layout="constrained").subplots()
    assert plot.wavelengths(axes, SCHEDULES, 64, context_length=LENGTH) is axes
    names = ["Llama 2", "YaRN", "p-RoPE (24 of 32 pairs stand still)"]
    for name, (inv_freq, _) in zip(names, ORACLES.values(), strict=True):
        # a pair that stands still has no point
        want = [2 * math.pi / f if f else math.nan for f in inv_freq]
        np.testing.assert_allclose(drawn(axes)[name], want, rtol=1e-13)
    assert np.array_equal(axes.lines[0].get_xdata(), range(32))
    assert legend(axes) == [*names, "training length, 8,192 tokens"]
    assert list(axes.lines[-1].get_ydata()) == [LENGTH, LENGTH]
    assert axes.get_yscale() == "log" and axes.get_xscale() == "linear"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("pair i", "wavelength (tokens)") and axes.get_title()
    assert [to_hex(line.get_color()).upper() for line in axes.lines[:3]] == ["#0072B2", "#E69F00", "#009E73"]
    assert len({line.get_linestyle() for line in axes.lines[:3]}) == 3
    can_be_drawn(axes.figure)
    assert legend(plot.wavelengths(Figure().subplots(), SCHEDULES, 64)) == names


def test_decay():
    distances = np.array([0, 1, 7, -50, 1000])
    axes = plot.decay(Figure(layout="constrained").subplots(), SCHEDULES, 64, distances, bound=True)
    (right,) = (other for other in axes.figure.axes if other is not axes)
    for name, (inv_freq, a) in ORACLES.items():
        cos, sin = oracles.cos_sin(distances, inv_freq)
        np.testing.assert_allclose(drawn(axes)[name], a * a * cos.mean(-1), atol=1e-12)
        np.testing.assert_allclose(drawn(right)[name], np.abs(np.cumsum(cos + 1j * sin, -1)).mean(-1), atol=1e-10)
    for left_line, right_line in zip(axes.lines, right.lines, strict=False):
        assert np.array_equal(left_line.get_xdata(), distances) and np.array_equal(
            right_line.get_xdata(), distances
        )
        assert left_line.get_color() == right_line.get_color()
        assert left_line.get_linestyle() == "-" and right_line.get_linestyle() == "--"
    assert legend(axes) == list(SCHEDULES) and axes.get_xlabel() == "distance (tokens)"
    assert axes.get_ylabel() == "share of the score without rotation" and "bound" in right.get_ylabel()
    assert right.get_ylim()[0] == 0
    can_be_drawn(axes.figure)
    assert len(plot.decay(Figure().subplots(), SCHEDULES, 64, distances).figure.axes) == 1


def test_phase_errors():
    frequencies, positions = rope_jax.Standard()(64), np.array([1, 3, 100, 5000, 2**20 + 1])
    axes = plot.phase_errors(
        Figure(layout="constrained").subplots(), frequencies, positions, ("exact", "float32", "bfloat16_table")
    )
    cos, sin = oracles.cos_sin(positions, frequencies.inv_freq)
    rotation = rope_jax.rotation(positions, frequencies)
    bfloat16 = (np.asarray(part.astype(jnp.bfloat16), np.float64) for part in rotation)
    products = np.outer(positions, frequencies.inv_freq.astype(np.float32)).astype(np.float32).astype(np.float64)
    given = {
        "exact": np.asarray(rotation.cos, np.float64) + 1j * np.asarray(rotation.sin, np.float64),
        "float32": np.exp(1j * products),
        "bfloat16 table": next(bfloat16) + 1j * next(bfloat16),
    }
    for name, z in given.items():
        worst = [max(abs(math.atan2(e.imag, e.real)) for e in row) for row in z * (cos - 1j * sin)]
        np.testing.assert_allclose(drawn(axes)[name], worst, rtol=1e-6, atol=positions[-1] * 2.0**-62 + 2.0**-50)
        assert np.array_equal(next(line for line in axes.lines if line.get_label() == name).get_xdata(), positions)
    assert legend(axes) == [*given, "half a turn, the largest error"]
    assert axes.lines[-1].get_ydata()[0] == math.pi < axes.get_ylim()[1] and max(axes.get_yticks()) == 1
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_title()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("position", "worst error of the angle (radians)")
    # The legend stands in the room above half a turn.
    can_be_drawn(axes.figure)
    box = axes.get_legend().get_window_extent().transformed(axes.transData.inverted())
    assert box.y0 > math.pi
    standard = legend(plot.phase_errors(Figure().subplots(), frequencies, positions))
    assert standard[:-1] == ["exact", "float32", "bfloat16"]


@pytest.mark.parametrize("a", [1.0, 1.5])
def test_clock_hands(a):
    positions = [0, 3, 1000, -2, 10**6]
    schedule = rope_jax.Yarn(factor=1.0, original_length=64, base=100.0, attention_factor=a)
    rope = rope_jax.Rope(head_dim=8, schedule=schedule, layout="interleaved")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    assert plot.clock_hands(figure, rope, positions) is figure
    shown = [face for face in figure.axes if face.lines]
    assert [face.get_title() for face in shown] == [f"m = {m}" for m in positions]
    cos, sin = oracles.cos_sin(positions, oracles.standard(8, 100.0)[0])
    for row, face in enumerate(shown):
        assert len(face.lines) == 4
        for pair, hand in enumerate(face.lines):
            np.testing.assert_allclose(hand.get_xdata(), [0, a * cos[row, pair]], atol=3e-7)
            np.testing.assert_allclose(hand.get_ydata(), [0, a * sin[row, pair]], atol=3e-7)
            assert hand.get_color() == plot.COLOURS[pair]
        assert face.get_xlim()[1] > face.patches[0].get_radius() > a and face.get_aspect() == 1
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == [f"pair {i}" for i in range(4)]
    can_be_drawn(figure)
    lowest = min(face.get_window_extent().y0 for face in shown)
    assert key.get_window_extent().y1 <= lowest  # no hand behind the legend


def test_clock_hands_on_a_grid():
    rope = rope_jax.Rope(8, rope_jax.Axial(sizes=(4, 4), schedule=rope_jax.Standard()))
    figure = plot.clock_hands(Figure().subfigures(1, 2)[0], rope, [[0, 2], [3, 0]])
    faces = figure.axes
    assert [face.get_title() for face in faces] == ["m = (0, 2)", "m = (3, 0)"]
    tips = [[hand.get_ydata()[1] for hand in face.lines] for face in faces]
    want = [[0, 0, math.sin(2), math.sin(0.02)], [math.sin(3), math.sin(0.03), 0, 0]]
    np.testing.assert_allclose(tips, want, atol=2e-7)


def test_score_map():
    rope = rope_jax.Rope(24, rope_jax.Standard(), rotary_dim=16)
    q, k = np.random.default_rng(0).normal(size=(2, 24))
    axes = Figure(layout="constrained").subplots()
    assert plot.score_map(axes, q, k, rope, 20) is axes
    (image,) = axes.images
    kernel = rope_jax.analysis.score_kernel(q, k, rope, np.subtract.outer(range(20), range(20)))
    table = np.asarray(image.get_array())  # [m, n]: queries upwards
    # rounded to float32: q, k, cos and sin, and the products
    np.testing.assert_allclose(table, kernel / math.sqrt(24), atol=8 * oracles.EPS32 * np.abs(q) @ np.abs(k))
    assert np.abs(table - table.T).max() > 0.1 and image.origin == "lower" and image.get_cmap().name == "viridis"
    assert axes.get_xlabel() == "position n of the key" and axes.get_ylabel() == "position m of the query"
    assert axes.get_title() and axes.figure.axes[1].get_ylabel() == "score  q·k / √H"
    can_be_drawn(axes.figure)


def test_attention_maps():
    weights = np.random.default_rng(0).dirichlet(np.ones(7), size=(2, 3, 5)).astype(np.float32)  # [2, 3, 5, 7]
    figure = Figure(layout="constrained")
    assert plot.attention_maps(figure, jnp.asarray(weights)) is figure
    *maps, bar = figure.axes
    assert len(maps) == 6
    for one, (layer, head) in zip(maps, np.ndindex(2, 3), strict=True):
        (image,) = one.images
        np.testing.assert_array_equal(image.get_array(), weights[layer, head])
        assert image.get_clim() == (0, weights.max()) and image.origin == "upper"
        assert one.get_title() == (f"head {head}" if layer == 0 else "")
        assert one.get_ylabel() == (f"layer {layer}" if head == 0 else "")
    assert bar.get_ylabel() == "attention weight" and figure.get_suptitle()
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("position of the key", "position of the query")
    can_be_drawn(figure)
    # one layer, one head, in bfloat16
    one = plot.attention_maps(Figure(), jnp.full((1, 1, 2, 2), 0.5, jnp.bfloat16)).axes[0]
    assert np.asarray(one.images[0].get_array()).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "rope_jax.plot")
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure", "matplotlib.patches"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python keeps for a module that must not be imported
    with pytest.raises(ImportError, match=r'rope_jax\.plot needs matplotlib: pip install "rope_jax\[plot\]"'):
        importlib.import_module("rope_jax.plot")


def test_does_not_import_pyplot():
    code = (
        "import sys\n"
        "from matplotlib.figure import Figure\n"
        "import rope_jax.plot\n"
        "rope_jax.plot.wavelengths(Figure().subplots(), {'Llama 2': rope_jax.Standard()}, 64)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


AXES = Figure().subplots()
FIGURE = Figure()
EIGHT = {str(i): rope_jax.Standard() for i in range(8)}
ROPE = rope_jax.Rope(8, rope_jax.Standard())
GRID = rope_jax.Rope(8, rope_jax.Sections(sections=(2, 2)))
FEW = rope_jax.Standard()(8)
X = np.ones(8)
W = np.full((1, 1, 2, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: plot.wavelengths(FIGURE, SCHEDULES, 64), TypeError, "axes must be matplotlib Axes, got Figure"),
        (lambda: plot.wavelengths(AXES, [FEW], 64), TypeError, "schedules must map a name to a schedule, got list"),
        (lambda: plot.wavelengths(AXES, {}, 64), ValueError, "schedules must be 1 to 7, one colour each, got 0"),
        (lambda: plot.decay(AXES, EIGHT, 64, [1]), ValueError, "schedules must be 1 to 7, one colour each, got 8"),
        (
            lambda: plot.wavelengths(AXES, {"a": lambda _: X}, 8),
            TypeError,
            r"schedules\['a'\] must return Frequencies, got ndarray",
        ),
        (lambda: plot.wavelengths(AXES, SCHEDULES, 64, 0), ValueError, "context_length must be at least 1, got 0"),
        (
            lambda: plot.wavelengths(AXES, SCHEDULES, 64, 1.5),
            TypeError,
            "context_length must be an integer",
        ),
        (lambda: plot.decay(FIGURE, SCHEDULES, 64, [1]), TypeError, "axes must be matplotlib Axes, got Figure"),
        (lambda: plot.decay(AXES, SCHEDULES, 64, 3), ValueError, r"distances must have shape \[P\], got \(\)"),
        (lambda: plot.decay(AXES, SCHEDULES, 64, [np.inf]), ValueError, "distances must be finite"),
        (lambda: plot.phase_errors(None, FEW, [1]), TypeError, "axes must be matplotlib Axes, got NoneType"),
        (lambda: plot.phase_errors(AXES, FEW, [0, 1]), ValueError, "positions must be at least 1 .* got 0"),
        (lambda: plot.phase_errors(AXES, FEW, []), ValueError, "positions must be at least 1 .* got none"),
        (
            lambda: plot.phase_errors(AXES, FEW, [1], "exact"),
            TypeError,
            "arithmetics must be a sequence of names, got 'exact'",
        ),
        (lambda: plot.phase_errors(AXES, FEW, [1], []), ValueError, "arithmetics must be 1 to 7 names, got \\[\\]"),
        (
            lambda: plot.phase_errors(AXES, FEW, [1], ["tf32"]),
            ValueError,
            "arithmetics must be one of .* got 'tf32'",
        ),
        (
            lambda: plot.clock_hands(AXES, ROPE, [1]),
            TypeError,
            "figure must be a matplotlib Figure or SubFigure, got Axes",
        ),
        (lambda: plot.clock_hands(FIGURE, FEW, [1]), TypeError, "rope must be a Rope, got Frequencies"),
        (
            lambda: plot.clock_hands(FIGURE, rope_jax.Rope(16, rope_jax.Standard()), [1]),
            ValueError,
            "rope must have at most 7 pairs for clock hands, got 8",
        ),
        (lambda: plot.clock_hands(FIGURE, ROPE, []), ValueError, r"positions must be \[P\] .* got shape \(0,\)"),
        (
            lambda: plot.clock_hands(FIGURE, GRID, [1, 2]),
            ValueError,
            r"positions must be \[P, A=2\] with P of at least 1, got shape \(2,\)",
        ),
        (lambda: plot.score_map(FIGURE, X, X, ROPE, 4), TypeError, "axes must be matplotlib Axes, got Figure"),
        (lambda: plot.score_map(AXES, X, X, FEW, 4), TypeError, "rope must be a Rope, got Frequencies"),
        (
            lambda: plot.score_map(AXES, X, X, GRID, 4),
            ValueError,
            "rope must have one axis of positions for a map of m and n, got 2",
        ),
        (lambda: plot.score_map(AXES, X, X, ROPE, 0), ValueError, "span must be at least 1, got 0"),
        (
            lambda: plot.score_map(AXES, X, X[:6], ROPE, 4),
            ValueError,
            r"k must have shape \[H\] with H=8, got \(6,\)",
        ),
        (lambda: plot.score_map(AXES, 1j * X, X, ROPE, 4), TypeError, "q must be real numbers"),
        (
            lambda: plot.attention_maps(AXES, W),
            TypeError,
            "figure must be a matplotlib Figure or SubFigure, got Axes",
        ),
        (
            lambda: plot.attention_maps(FIGURE, W[0]),
            ValueError,
            r"weights must be \[layers, N, T, S\] .* \(1, 2, 2\)",
        ),
        (lambda: plot.attention_maps(FIGURE, W[:0]), ValueError, r"and not empty, got shape \(0, 1, 2, 2\)"),
        (lambda: plot.attention_maps(FIGURE, W > 0), TypeError, "weights must be floating, got dtype bool"),
        (lambda: plot.attention_maps(FIGURE, -W), ValueError, "weights must be finite and not negative, got -0.5"),
        (
            lambda: plot.attention_maps(FIGURE, W * np.nan),
            ValueError,
            "weights must be finite and not negative, got nan",
        ),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()
