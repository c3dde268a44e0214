import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_jax.core import diffusion_positions, grid_positions, multimodal_positions

LIMIT = 2**31 - 1


def loop(segments, steps, rule, start=0):
    """Token by token: the positions, and the position of the next token."""
    rows, steps = [], iter(steps)
    num_axes = max(len(segment) if isinstance(segment, tuple) else 1 for segment in segments)
    for segment in segments:
        if not isinstance(segment, tuple):
            for _ in range(segment):
                rows.append([start] * num_axes)
                start += 1
            continue
        step, largest = Fraction(next(steps)), 0
        for first, *others in itertools.product(*map(range, segment)):
            rows.append([start + math.floor(step * first), *(start + i for i in others)])
            largest = max(largest, *rows[-1])
        if rule == "all":
            start = largest + 1
        elif rule == "plane":
            start += max(segment[-1], segment[-2] if num_axes > 1 else 0)
        else:
            start += rule(segment)
    return rows, start


ROWS = [
    [7],
    [(1, 4, 6)],
    [5, (1, 4, 6), 4, (3, 4, 2), 6],
    [2, (9, 2, 3), (1, 1, 1), 1, (4, 2, 2)],
    [0, (2, 2, 2), 0, (5, 1, 1)],
    [3, (4, 6), 2, (5, 1)],
    [3, (4,), 2, (5,)],
    [1, (2, 3, 2, 2), 1],
]


@pytest.mark.parametrize("segments", ROWS, ids=str)
@pytest.mark.parametrize("rule", ["all", "plane", math.prod, lambda sizes: 1])
@pytest.mark.parametrize("step", [1, 2, Fraction(7, 3), 0.25])
def test_text_and_media_token_by_token(segments, rule, step):
    num_grids = sum(isinstance(segment, tuple) for segment in segments)
    num_axes = max([len(segment) for segment in segments if isinstance(segment, tuple)], default=3)
    steps = [step, 1, 5][:num_grids]
    got, end = multimodal_positions(segments, steps=steps, resume=rule, num_axes=num_axes)
    rows, next_position = loop([*segments, (1,) * num_axes], [*steps, 1], rule)
    assert got.dtype == jnp.int32 and got.shape[1] == num_axes
    # The oracle learns the number of axes from a grid of one cell at the end.
    assert (
        got.tolist() == rows[:-1] and [end] * num_axes == rows[-1] and next_position == end + 1 and type(end) is int
    )


def test_the_two_rules_differ_after_a_long_video():
    assert multimodal_positions([(9, 2, 3), 1])[0][-1].tolist() == [9, 9, 9]
    assert multimodal_positions([(9, 2, 3), 1], resume="plane")[0][-1].tolist() == [3, 3, 3]
    assert multimodal_positions([(9, 2, 3)])[1] == 9 and multimodal_positions([(9, 2, 3)], resume="plane")[1] == 3


def test_a_float_step_is_a_float32_product():
    times = multimodal_positions([(40, 1, 1)], steps=0.7)[0][:, 0]
    np.testing.assert_array_equal(times, np.floor(np.arange(40, dtype=np.float32) * np.float32(0.7)))
    assert times[10] == 7


def test_one_step_for_all_grids():
    grids = [(3, 1, 2), 2, (2, 2, 1)]
    for steps, same in ((4, [4, 4]), (None, [1, 1]), (np.array([2.0, 3.0]), [2, 3])):
        np.testing.assert_array_equal(
            multimodal_positions(grids, steps=steps)[0], multimodal_positions(grids, steps=same)[0]
        )


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
@pytest.mark.parametrize("resume", ["all", "plane"])
def test_a_row_continues_from_its_next_position(cut, resume):
    row = [5, (1, 4, 6), 4, (7, 4, 2), 6]
    whole, end = multimodal_positions(row, resume=resume)
    first, middle = multimodal_positions(row[:cut], resume=resume)
    second, last = multimodal_positions(row[cut:], resume=resume, offset=middle)
    np.testing.assert_array_equal(jnp.concatenate([first, second]), whole)
    assert last == end


def test_decoding_rows_that_stand_at_different_positions():
    ends = jnp.array([[8, 31, -4]])
    token = jax.jit(lambda ends: multimodal_positions([2], offset=ends))
    for fn in (token, lambda ends: multimodal_positions([2], offset=ends)):
        positions, after = fn(ends)
        assert positions.shape == (1, 3, 2, 3) and positions.dtype == after.dtype == jnp.int32
        np.testing.assert_array_equal(positions[0, :, :, 0], [[8, 9], [31, 32], [-4, -3]])
        np.testing.assert_array_equal(after, ends + 2)
    one, after = token(jnp.array(5))
    assert one.tolist() == [[5] * 3, [6] * 3] and after == 7


def test_the_ends_of_int32():
    positions, end = multimodal_positions([1], offset=LIMIT - 1)
    assert positions.tolist() == [[LIMIT - 1] * 3] and end == LIMIT
    assert multimodal_positions([0], offset=3)[0].shape == (0, 3)


# --------------------------------------------------------------------------------------- diffusion transformers


def ids(text, *pictures, picture_first=False):
    parts = [pictures[0], text, *pictures[1:]] if picture_first else [text, *pictures]
    return [row for part in parts for row in part]


def cells(frames, height, width):
    return itertools.product(range(frames), range(height), range(width))


def flux(n, *sizes):
    pictures = [[[k + t, i, j] for t, i, j in cells(*size)] for k, size in enumerate(sizes)]
    return ids([[0, 0, 0]] * n, *pictures)


def flux2(n, *sizes):
    pictures = [[[10 * k + t, i, j, 0] for t, i, j in cells(*size)] for k, size in enumerate(sizes)]
    return ids([[0, 0, 0, m] for m in range(n)], *pictures)


def qwen_image(n, *sizes):
    pictures = [
        [[k + t, i - (h - h // 2), j - (w - w // 2)] for t, i, j in cells(f, h, w)]
        for k, (f, h, w) in enumerate(sizes)
    ]
    first = max(side // 2 for _, *sides in sizes for side in sides)
    return ids([[first + m] * 3 for m in range(n)], *pictures)


def lumina2(n, size):
    return ids([[m, 0, 0] for m in range(n)], [[n + t, i, j] for t, i, j in cells(*size)])


def z_image(n, size):
    while n % 32:
        n += 1
    picture = [[n + 1 + t, i, j] for t, i, j in cells(*size)]
    while len(picture) % 32:
        picture.append([0, 0, 0])
    return ids([[1 + m, 0, 0] for m in range(n)], picture, picture_first=True)


@pytest.mark.parametrize("oracle", [flux, flux2, qwen_image, lumina2, z_image], ids=lambda oracle: oracle.__name__)
@pytest.mark.parametrize("num_text_tokens", [0, 1, 6, 32, 33])
@pytest.mark.parametrize(
    "pictures", [[(1, 4, 5)], [(2, 4, 4)], [(1, 3, 2), (1, 6, 9)], [(3, 2, 2), (1, 2, 2), (2, 1, 1)]], ids=str
)
def test_ids_of_diffusion_transformers(oracle, num_text_tokens, pictures):
    most = {"flux": 2, "lumina2": 1, "z_image": 1}.get(oracle.__name__, 3)
    if len(pictures) > most:
        with pytest.raises(ValueError, match=f"sizes must be pictures, at most {most} for .*, got {len(pictures)}"):
            diffusion_positions(oracle.__name__, num_text_tokens, *pictures)
        return
    got = diffusion_positions(oracle.__name__, num_text_tokens, *pictures)
    assert got.dtype == jnp.int32 and got.tolist() == oracle(num_text_tokens, *pictures)
    if all(frames == 1 for frames, *_ in pictures):
        flat = diffusion_positions(oracle.__name__, num_text_tokens, *(size[1:] for size in pictures))
        np.testing.assert_array_equal(flat, got)


def test_wan_is_a_grid():
    assert grid_positions(2, 3, 4).tolist() == [list(cell) for cell in cells(2, 3, 4)]


row, diffuse = multimodal_positions, diffusion_positions


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: row([]), ValueError, r"segments must be lengths of text and sizes of grids, .* got \[\]"),
        (lambda: row(5), ValueError, "segments must be lengths of text and sizes of grids, .* got 5"),
        (lambda: row([5, -1]), ValueError, "segments must be at least 0, got -1"),
        (lambda: row([5, 1.0]), TypeError, "segments must be an integer, got 1.0"),
        (lambda: row([5, True]), TypeError, "segments must be an integer, got True"),
        (
            lambda: row([5, (1, 0, 2)]),
            ValueError,
            "segments must be one or more lengths of at least 1, got .*1, 0, 2",
        ),
        (lambda: row([5, (1, 2, 2.0)]), TypeError, "segments must be an integer, got 2.0"),
        (lambda: row([5, ()]), ValueError, "segments must be one or more lengths of at least 1"),
        (
            lambda: row([5, (4, 6)]),
            ValueError,
            r"segments must be lengths of text or A=num_axes=3 sizes, got \(4, 6\)",
        ),
        (lambda: row([(1, 4, 6)], num_axes=2), ValueError, r"A=num_axes=2 sizes, got \(1, 4, 6\)"),
        (lambda: row([5], num_axes=0), ValueError, "num_axes must be at least 1, got 0"),
        (
            lambda: row([(1, 1, 1), 2, (1, 1, 1)], steps=[1]),
            ValueError,
            "steps must be one number or one for each of 2 grids, got 1",
        ),
        (lambda: row([(1, 1, 1)], steps=0), ValueError, "steps must be positive, got 0"),
        (lambda: row([(1, 1, 1)], steps=[-1.5]), ValueError, "steps must be positive, got -1.5"),
        (lambda: row([(1, 1, 1)], steps=["1"]), TypeError, "steps must be a real number, got '1'"),
        (lambda: row([(1, 1, 1)], steps=[float("nan")]), ValueError, "steps must be finite, got nan"),
        (lambda: row([5], resume="max"), ValueError, "resume must be 'all', 'plane' or a function .* got 'max'"),
        (lambda: row([(1, 1, 1)], resume=lambda s: 0), ValueError, r"resume\(sizes\) must be at least 1, got 0"),
        (lambda: row([(1, 1, 1)], resume=lambda s: 1.0), TypeError, r"resume\(sizes\) must be an integer, got 1.0"),
        (lambda: row([5], offset=1.5), TypeError, "offset must be an integer, got 1.5"),
        (lambda: row([5], offset=jnp.ones(2)), TypeError, "offset must be integer, got dtype float32"),
        (lambda: row([5], offset=LIMIT - 4), ValueError, r"positions must fit in int32, got .* to 2147483648"),
        (lambda: row([5], offset=jnp.array([0, LIMIT - 4])), ValueError, r"positions must fit in int32"),
        (lambda: row([(3, 1, 1)], steps=2**30), ValueError, "positions must fit in int32"),
        (
            lambda: diffuse("sd3", 4, (2, 2)),
            ValueError,
            r"model must be one of \('flux', 'flux2', 'lumina2', 'qwen_image', 'z_image'\), got 'sd3'",
        ),
        (lambda: diffuse("flux", 4), ValueError, "sizes must be pictures, at least one, got 0"),
        (lambda: diffuse("flux", -1, (2, 2)), ValueError, "num_text_tokens must be at least 0, got -1"),
        (
            lambda: diffuse("flux", 4, 2, 2),
            ValueError,
            r"sizes must be \(height, width\) or .* for each picture, got 2",
        ),
        (lambda: diffuse("flux", 4, (2, 2, 2, 2)), ValueError, r"sizes must be \(height, width\) or \(frames"),
        (lambda: diffuse("flux2", 4, (2, 0)), ValueError, r"sizes must be one or more lengths of at least 1"),
        (lambda: diffuse("flux2", 4, (2, 1.0)), TypeError, "sizes must be an integer, got 1.0"),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()
