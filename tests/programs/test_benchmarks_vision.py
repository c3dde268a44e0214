"""benchmarks/vision.py at a size that takes seconds, its boards by the rules of chess, and its committed results."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax
from benchmarks import record, vision

RESULTS = Path(vision.__file__).parent / "results"
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax needs it. As a setting, not as a context, so that threads have it too."""
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


def attacks(attacker, start, end):
    """By the rules of chess without blocking: lists of moves, not differences."""
    steps = range(-30, 31)
    moves = {
        "rook": {(0, step) for step in steps} | {(step, 0) for step in steps},
        "bishop": {(step, sign * step) for step in steps for sign in (-1, 1)},
        "knight": {(a * i, b * j) for a, b in ((1, 2), (2, 1)) for i, j in itertools.product((-1, 1), repeat=2)},
    }
    return tuple(np.subtract(end, start).tolist()) in moves[attacker] - {(0, 0)}


@pytest.mark.parametrize("side", [8, 13])
def test_exactly_one_piece_is_attacked_and_gives_the_label(side):
    boards = vision.boards(np.random.default_rng(0), side, 600)
    names = list(vision.ATTACKERS)
    for pieces, positions, label, attacker, distance in zip(*boards.values(), strict=True):
        assert (
            len({tuple(each) for each in positions.tolist()}) == 9
            and 0 <= positions.min() <= positions.max() < side
        )
        assert pieces[0] == vision.NUM_COLOURS + attacker and sorted(pieces[1:].tolist()) == list(range(8))
        attacked = [attacks(names[attacker], positions[0], end) for end in positions[1:]]
        assert attacked == [True] + [False] * 7 and pieces[1] == label
        assert distance == abs(positions[1] - positions[0]).max()
    for column in ("attacker", "label"):
        counts = np.bincount(boards[column])
        assert len(counts) == len(np.unique(boards[column])) and counts.min() > 40  # 75 and 200 are expected


def test_mixed_wave_vectors_are_orthogonal_axes_at_an_angle_of_each_head():
    schedule = vision.Mixed(4, 3)
    vectors = schedule(16).inv_freq
    assert vectors.shape == (4, 2, 8)
    lengths = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(lengths, np.tile(10 ** (-np.arange(4) / 4), (4, 2)))
    np.testing.assert_allclose((vectors[..., :4] * vectors[..., 4:]).sum(axis=1), 0, atol=1e-12)
    angles = np.arctan2(vectors[:, 1], vectors[:, 0])
    assert np.ptp(angles[:, :4], axis=1).max() < 1e-12 and len(np.unique(angles[:, 0])) == 4
    straight = vision.Mixed(4, None)(16).inv_freq
    axial = rope_jax.Axial(sizes=(8, 8), schedule=rope_jax.Standard(base=10.0))(16).inv_freq
    np.testing.assert_allclose(straight, np.broadcast_to(axial, straight.shape), atol=1e-15)


def outputs(encoding, positions, order=slice(None)):
    model = vision.VisionTransformer(encoding)
    board = vision.boards(np.random.default_rng(1), 8, 3)
    at = board["positions"]
    params = vision.nn.unbox(model.init(jax.random.key(0), board["pieces"], at))
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    return np.asarray(model.apply(params, board["pieces"][:, order], positions(at)[:, order]))


@pytest.mark.parametrize("encoding", vision.NAMES)
def test_what_each_encoding_sees(encoding):
    """Shifts leave the rotary models alone, a mirror image does not; the order of tokens never matters."""
    plain = outputs(encoding, lambda at: at)
    backwards = outputs(encoding, lambda at: at, slice(None, None, -1))
    np.testing.assert_allclose(backwards, plain, atol=1e-4)
    swapped = abs(outputs(encoding, lambda at: at[..., ::-1]) - plain).max()
    shifted = abs(outputs(encoding, lambda at: (at + np.array([1, 2])) % 8) - plain).max()
    moved = abs(outputs(encoding, lambda at: at + np.array([1, 2])) - plain).max()
    assert (swapped > 1e-2) == (shifted > 1e-2) == (encoding != "none")
    assert (moved < 1e-4) == (encoding != "absolute")


def cubic(old, new):
    """Keys' cubic interpolation (a = -1/2) between the centres of cells, as a matrix ``[new, old]``."""
    apart = abs((np.arange(new)[:, None] + 0.5) * old / new - 0.5 - np.arange(old))
    near = 1.5 * apart**3 - 2.5 * apart**2 + 1
    far = -0.5 * apart**3 + 2.5 * apart**2 - 4 * apart + 2
    weights = np.where(apart < 1, near, np.where(apart < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def test_a_larger_board_resizes_the_table(monkeypatch):
    board = vision.boards(np.random.default_rng(1), 12, 3)
    given = board["pieces"], board["positions"]
    model = vision.VisionTransformer("absolute", side=12)
    params = vision.nn.unbox(model.init(jax.random.key(0), *given))["params"]
    table = np.random.default_rng(0).normal(size=(8, 8, 64))
    got = model.apply({"params": params | {"table": jnp.asarray(table, jnp.float32)}}, *given)
    by_hand = np.einsum("ar, bc, rcd -> abd", cubic(8, 12), cubic(8, 12), table)
    monkeypatch.setattr(vision, "SIDE", 12)  # a table of that size is taken as it is
    want = model.apply({"params": params | {"table": jnp.asarray(by_hand, jnp.float32)}}, *given)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_loss_falls():
    _, losses = vision.train(vision.VisionTransformer("axial"), steps=120)
    assert losses.shape == (120,) and losses[-20:].mean() < losses[:20].mean() - 0.05


@pytest.mark.full
def test_the_study_runs(monkeypatch):
    monkeypatch.setattr(vision, "SIDES", (8, 24))
    result = vision.measure(steps=2, seeds=2, count=400)
    kept = {"command": "python -m benchmarks.vision", **record.machine(), "result": result}
    assert vision.table(kept).count("\n") == 1 + len(vision.ATTACKERS) * len(vision.NAMES)
    assert kept["command"] in vision.whole_table(kept) and "Means of 2 seeds" in vision.whole_table(kept)
    vectors = [reading["wave vectors"] for reading in result["encodings"]["mixed"]]
    for seed, layer in np.ndindex(2, 2):  # two steps change little of what a seed and layer starts with
        start = vision.Mixed(4, 1000 * seed + layer)(16).inv_freq
        np.testing.assert_allclose(vectors[seed][layer], start, atol=0.02)
    for encoding, readings in result["encodings"].items():
        assert len(readings) == 2 and readings[0]["loss"] != readings[1]["loss"]
        assert all(("interpolated" in reading) == (encoding in vision.ROTARY) for reading in readings)
        for reading in readings:
            small, large = (reading["shares"][side]["rook"] for side in ("8", "24"))
            assert small["all"] == small["near"] and set(large) == {"all", "near", "far"}
            assert set(reading["shares"]["24"]["knight"]) == {"all", "near"}


def test_interpolated_coordinates():
    """On an 8 x 8 board they are the same; on 16 x 16 those of the cells, halved."""
    model = vision.VisionTransformer("axial")
    board = vision.boards(np.random.default_rng((7, 16)), 16, 900)
    params = vision.nn.unbox(model.init(jax.random.key(0), board["pieces"], board["positions"]))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    plain, scaled = (vision.shares(model, params, 8, 900, interpolated) for interpolated in (False, True))
    assert all(scaled[name]["all"] == pytest.approx(plain[name]["all"], abs=0.01) for name in vision.ATTACKERS)
    answers = np.asarray(model.apply(params, board["pieces"], board["positions"] / np.float32(2))).argmax(axis=-1)
    right = answers == board["label"]
    for number, (name, found) in enumerate(vision.shares(model, params, 16, 900, True).items()):
        assert found["all"] == pytest.approx(right[board["attacker"] == number].mean(), abs=0.01), name


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "vision.json").read_text())


def test_the_committed_picture_can_be_drawn_again(committed, tmp_path):
    figure = vision.draw(committed)
    figure.savefig(tmp_path / "vision.png")
    assert [axes.get_xlabel() for axes in figure.axes] == ["side of the board (cells)"] * 3
    assert figure.axes[0].get_ylabel() and figure.get_suptitle() == vision.FINDING


def test_the_committed_table_is_that_of_the_committed_numbers(committed):
    assert (RESULTS / "vision.md").read_text() == vision.whole_table(committed)
    assert (RESULTS / "vision.png").read_bytes().startswith(b"\x89PNG")
    assert committed["command"] == "python -m benchmarks.vision"
    config = committed["result"]["config"]
    assert config == dict(
        steps=vision.STEPS, batch=vision.BATCH, learning_rate=vision.LEARNING_RATE, tests=vision.NUM_TESTS
    )
    assert {len(readings) for readings in committed["result"]["encodings"].values()} == {vision.SEEDS}


def test_the_committed_numbers_say_what_the_title_says(committed):
    def mean(encoding, side, attacker, key="shares"):
        return vision.means(committed, encoding, key, side, attacker)[0]

    bishops = {encoding: mean(encoding, 8, "bishop") for encoding in vision.NAMES}
    assert (
        min(bishops["mixed"], bishops["aligned"])
        > 0.95
        > 0.7
        > max(bishops[e] for e in ("axial", "absolute", "none"))
    )
    for encoding in ("axial", "mixed", "aligned", "absolute"):
        assert all(
            mean(encoding, 24, attacker) < mean(encoding, 8, attacker) - 0.05 for attacker in vision.ATTACKERS
        )
    for side in vision.SIDES:
        assert all(abs(mean("none", side, attacker) - 1 / 8) < 0.03 for attacker in vision.ATTACKERS)
