import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax
from rope_jax.core import packed_grid_positions

LIMIT = 2**31 - 1


def loop(sizes, origin, step, centered, block=1, prefix=0):
    """Cell by cell, with exact fractions; the blocks by sorting."""
    rows = []
    for cell in itertools.product(*map(range, sizes)):
        centre = [(n + n % 2) // 2 if c else 0 for n, c in zip(sizes, centered, strict=True)]
        rows.append(
            (
                (*cell[:-2], *(i // block for i in cell[-2:]), *cell[-2:]),
                [
                    o + math.floor(Fraction(s) * (i - c))
                    for o, s, i, c in zip(origin, step, cell, centre, strict=True)
                ],
            )
        )
    return [[0] * len(sizes)] * prefix + [position for _, position in sorted(rows)]


def test_grid_runs_row_by_row():
    grid = rope_jax.grid_positions(2, 3, 4)
    assert grid.dtype == jnp.int32
    want = [[i, j, k] for i in range(2) for j in range(3) for k in range(4)]
    assert grid.tolist() == want


@pytest.mark.parametrize("sizes", [(1,), (5,), (4, 6), (2, 4, 2), (2, 1, 4, 6)])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("step", [1, 3, -2, 0, Fraction(3, 7), 0.75])
def test_origin_step_and_centre(sizes, centered, step):
    num_axes = len(sizes)
    origin = [7, -3, 0, 100][:num_axes]
    got = rope_jax.grid_positions(*sizes, origin=origin, step=step, centered=centered, num_prefix_tokens=2)
    assert got.dtype == jnp.int32
    assert got.tolist() == loop(sizes, origin, [step] * num_axes, [centered] * num_axes, prefix=2)


def test_each_axis_has_its_own_options():
    got = rope_jax.grid_positions(2, 3, 4, origin=(5, 0, -1), step=(2, 1, 0.5), centered=(False, True, False))
    assert got.tolist() == loop((2, 3, 4), (5, 0, -1), (2, 1, Fraction(1, 2)), (False, True, False))
    wide = rope_jax.grid_positions(1, 3, origin=np.array([1, 2], np.int64), step=np.array([1, 2]))
    assert wide.tolist() == [[1, 2], [1, 4], [1, 6]]


def test_a_centred_axis_is_mostly_negative():
    """Qwen-Image: [-(n - n // 2), n // 2)."""
    for n in range(1, 9):
        assert rope_jax.grid_positions(n, centered=True)[:, 0].tolist() == list(range(-(n - n // 2), n // 2))


@pytest.mark.parametrize(("size", "target"), [(7, 3), (3, 7), (49, 49), (49, 1), (70, 69), (98, 54)])
def test_resizing_floors_exactly(size, target):
    """A product with 54 / 98 is floored wrongly in float32, and in float64."""
    got = rope_jax.grid_positions(size, 2, resize_to=(target, None))
    assert got[::2, 0].tolist() == [i * target // size for i in range(size)]
    assert got[:2, 1].tolist() == [0, 1]


def test_a_float_step_is_a_float32_product():
    got = rope_jax.grid_positions(100, step=0.7)[:, 0]
    np.testing.assert_array_equal(got, np.floor(np.arange(100, dtype=np.float32) * np.float32(0.7)))
    assert got[10] == 7 and math.floor(10 * Fraction(float(np.float32(0.7)))) == 6


def test_frames_replace_the_first_axis():
    got = rope_jax.grid_positions(3, 1, 2, frames=[0, 5, -7], origin=(1, 0, 0), step=(9, 1, 1))
    assert got.tolist() == [[1, 0, 0], [1, 0, 1], [6, 0, 0], [6, 0, 1], [-6, 0, 0], [-6, 0, 1]]


@pytest.mark.parametrize(("sizes", "block"), [((4, 6), 2), ((3, 6), 3), ((2, 4, 4), 2), ((2, 3, 2, 4), 2)])
def test_blocks(sizes, block):
    if len(sizes) == 4:
        assert sizes[-2] % block == 0
    num_axes = len(sizes)
    got = rope_jax.grid_positions(*sizes, block=block, origin=1)
    assert got.tolist() == loop(sizes, [1] * num_axes, [1] * num_axes, [False] * num_axes, block)


def test_a_traced_origin_leaves_prefix_tokens_at_rest():
    move = jax.jit(lambda origin: rope_jax.grid_positions(2, 2, origin=origin, num_prefix_tokens=1, centered=True))
    for origin in (3, [4, -5]):
        want = rope_jax.grid_positions(2, 2, origin=origin, num_prefix_tokens=1, centered=True)
        for given in (jnp.asarray(origin), np.asarray(origin)):
            np.testing.assert_array_equal(move(given), want)
        known = rope_jax.grid_positions(2, 2, origin=jnp.asarray(origin), num_prefix_tokens=1, centered=True)
        np.testing.assert_array_equal(known, want)
        assert want[0].tolist() == [0, 0] and known.dtype == move(jnp.asarray(origin)).dtype == jnp.int32


def test_grids_reach_the_ends_of_int32():
    assert rope_jax.grid_positions(3, origin=LIMIT - 2)[:, 0].tolist() == [LIMIT - 2, LIMIT - 1, LIMIT]
    assert rope_jax.grid_positions(2, origin=-LIMIT - 1)[0, 0] == -LIMIT - 1


@pytest.mark.parametrize("options", [{}, dict(block=2), dict(origin=(3, -1), num_prefix_tokens=2, centered=True)])
def test_packed_pictures(options):
    sizes = [(2, 4), (6, 2), (2, 2)]
    positions, segment_ids = packed_grid_positions(sizes, **options)
    origin, prefix = options.get("origin", (0, 0)), options.get("num_prefix_tokens", 0)
    want, ids = [], []
    for k, size in enumerate(sizes):
        centered = [options.get("centered", False)] * 2
        rows = loop(size, origin, (1, 1), centered, options.get("block", 1), prefix)
        want += rows
        ids += [k] * len(rows)
    assert positions.tolist() == want and segment_ids.tolist() == ids
    assert positions.dtype == segment_ids.dtype == jnp.int32
    traced = jax.jit(lambda origin: packed_grid_positions(sizes, **{**options, "origin": origin}))
    np.testing.assert_array_equal(traced(jnp.asarray(origin))[0], want)


def test_packed_pictures_are_resized_each_by_its_own_size():
    positions, _ = packed_grid_positions(np.array([[2, 3], [8, 1]]), resize_to=4)
    want = [[4 * i // h, 4 * j // w] for h, w in [(2, 3), (8, 1)] for i in range(h) for j in range(w)]
    assert positions.tolist() == want


grid, packed = rope_jax.grid_positions, packed_grid_positions


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: grid(), ValueError, r"sizes must be one or more lengths of at least 1, got \(\)"),
        (lambda: grid(3, 0), ValueError, r"got \(3, 0\)"),
        (lambda: grid(3, -2), ValueError, r"sizes must be one or more lengths of at least 1, got \(3, -2\)"),
        (lambda: grid(2.0), TypeError, "sizes must be an integer, got 2.0"),
        (lambda: grid(True), TypeError, "sizes must be an integer, got True"),
        (lambda: grid((2, 3)), TypeError, r"sizes must be an integer, got \(2, 3\)"),
        (
            lambda: grid(2, 3, origin=(1, 2, 3)),
            ValueError,
            r"origin must be one value or A=2 values, got \(1, 2, 3\)",
        ),
        (lambda: grid(2, 3, origin=0.5), TypeError, "origin must be an integer, got 0.5"),
        (lambda: grid(2, origin=jnp.ones(())), TypeError, "origin must be integer, got dtype float32"),
        (
            lambda: grid(2, 3, origin=jnp.ones(3, int)),
            ValueError,
            r"origin must have shape \[\] or \[A=2\], got \(3,\)",
        ),
        (lambda: grid(3, origin=LIMIT - 1), ValueError, r"positions must fit in int32, got .* to 2147483648"),
        (lambda: grid(3, origin=2**70), ValueError, r"positions must fit in int32"),
        (lambda: grid(3, origin=-LIMIT - 2), ValueError, r"positions must fit in int32, got .* from -2147483649"),
        (lambda: grid(5, step=2**30), ValueError, r"positions must fit in int32"),
        (lambda: grid(2, step="a"), TypeError, "step must be a real number, got 'a'"),
        (lambda: grid(2, step=True), TypeError, "step must be a real number, got True"),
        (lambda: grid(2, step=float("nan")), ValueError, "step must be finite, got nan"),
        (lambda: grid(2, step=2.0**31), ValueError, r"step must be a number between -2\^31 and 2\^31, got"),
        (lambda: grid(2, step=None), ValueError, r"step must be a number between .* got None"),
        (
            lambda: jax.jit(lambda s: grid(2, step=s))(2.0),
            TypeError,
            "step must be known when the program is traced",
        ),
        (lambda: grid(2, 2, step=(1, 2, 3)), ValueError, r"step must be one value or A=2 values"),
        (
            lambda: grid(2, step=2, resize_to=4),
            ValueError,
            "pass step or resize_to for an axis, not both, got 2 and 4",
        ),
        (lambda: grid(2, resize_to=0), ValueError, "resize_to must be at least 1, got 0"),
        (lambda: grid(2, resize_to=1.5), TypeError, "resize_to must be an integer, got 1.5"),
        (lambda: grid(2, centered=1), TypeError, "centered must be True or False, or A=1 of them, got 1"),
        (lambda: grid(2, 2, frames=[1]), ValueError, r"frames must be sizes\[0\]=2 integers, got \[1\]"),
        (lambda: grid(2, 2, frames=2), ValueError, r"frames must be sizes\[0\]=2 integers, got 2"),
        (lambda: grid(1, 2, frames=[0.5]), TypeError, "frames must be an integer, got 0.5"),
        (
            lambda: grid(4, 6, block=4),
            ValueError,
            r"block must divide the last two of A >= 2 sizes, got 4 and .*4, 6",
        ),
        (lambda: grid(4, block=2), ValueError, "block must divide the last two of A >= 2 sizes"),
        (lambda: grid(4, 4, block=0), ValueError, "block must be at least 1, got 0"),
        (lambda: grid(4, num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be at least 0, got -1"),
        (
            lambda: packed([]),
            ValueError,
            r"sizes must be one or more grids, \[\(height, width\), \.\.\.\], got \[\]",
        ),
        (lambda: packed(3), ValueError, "sizes must be one or more grids"),
        (lambda: packed([3, 4]), ValueError, r"sizes must be one or more grids, .* got \[3, 4\]"),
        (lambda: packed([(2, 2), (1, 2, 2)]), ValueError, "sizes must have the same number of axes A in each grid"),
        (lambda: packed([(2, 2), (0, 2)]), ValueError, r"got \(0, 2\)"),
        (lambda: packed([(2, 2)], blocks=2), TypeError, "unexpected keyword argument 'blocks'"),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_grid_of_too_many_cells_is_an_error_at_once():
    with pytest.raises(
        ValueError, match=r"sizes must be a grid of fewer than 2\^31 cells, got \[1099511627776, 2\]"
    ):
        rope_jax.core.packed_grid_positions([[2**40, 2]])
    with pytest.raises(ValueError, match=r"sizes must be a grid of fewer than 2\^31 cells"):
        rope_jax.grid_positions(2**16, 2**15)
    with pytest.raises(ValueError, match=r"num_prefix_tokens must be below 2\^31, got 2147483648"):
        rope_jax.grid_positions(2, 2, num_prefix_tokens=2**31)
