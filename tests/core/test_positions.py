import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import rope_jax


def count(mask, segments):
    """Counts token by token."""
    out = np.zeros(mask.shape, np.int32)
    for b in range(mask.shape[0]):
        seen = 0
        for t in range(mask.shape[1]):
            if t and segments[b, t] != segments[b, t - 1]:
                seen = 0
            if mask[b, t]:
                out[b, t] = seen
                seen += 1
    return out


few_shapes = st.sampled_from([(1, 1), (2, 7), (3, 12)])  # each shape compiles anew
all_shapes = st.tuples(st.integers(1, 3), st.integers(1, 12))


@pytest.mark.parametrize(
    "shapes", [few_shapes, pytest.param(all_shapes, marks=pytest.mark.full)], ids=["few", "all"]
)
@given(data=st.data())
def test_positions_count_real_tokens_within_runs(data, shapes):
    shape = data.draw(shapes)
    mask = data.draw(hnp.arrays(bool, shape))
    segments = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 2)))
    want = count(mask, segments)
    for fn in (rope_jax.positions_from_mask, jax.jit(rope_jax.positions_from_mask)):
        got = fn(jnp.asarray(mask), jnp.asarray(segments))
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        rope_jax.positions_from_mask(jnp.asarray(mask)), count(mask, np.zeros(shape, int))
    )
    np.testing.assert_array_equal(
        jax.jit(rope_jax.positions_from_segments)(segments), count(np.ones(shape, bool), segments)
    )


def test_segments_and_padding():
    got = rope_jax.positions_from_mask([0, 1, 1, 0, 1, 1], [1, 1, 1, 2, 2, 2])
    assert got.tolist() == [0, 0, 1, 0, 0, 1]


def test_padding_on_either_side():
    assert rope_jax.positions_from_mask([[0, 0, 1, 1], [1, 1, 0, 0]]).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


def test_no_tokens():
    assert rope_jax.positions_from_mask(jnp.zeros((2, 0), bool)).shape == (2, 0)
    assert rope_jax.positions_from_segments(jnp.zeros((2, 0), int)).shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: rope_jax.positions_from_mask(jnp.ones(3)),
            TypeError,
            "mask must be bool or integer, got .*float32",
        ),
        (lambda: rope_jax.positions_from_mask(True), ValueError, r"mask must have shape \[\.\.\., T\], got \(\)"),
        (lambda: rope_jax.positions_from_mask([1, 1], [1, 1, 1]), ValueError, r"segment_ids .* \(2,\), got \(3,\)"),
        (lambda: rope_jax.positions_from_segments([1.0]), TypeError, "segment_ids must be integer, got .*float32"),
        (lambda: rope_jax.positions_from_segments(3), ValueError, "segment_ids must have shape"),
        (
            lambda: rope_jax.positions_from_segments(np.array([0, 2**32])),
            ValueError,
            "segment_ids must fit in int32",
        ),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()
