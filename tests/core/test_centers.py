import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rope_jax.core import augment_centers, patch_centers


@pytest.mark.parametrize("sizes", [(1,), (4, 6), (7, 3), (2, 3, 5)])
@pytest.mark.parametrize("normalize", ["own", "longer", "shorter", "area"])
def test_centres_patch_by_patch(sizes, normalize):
    got = patch_centers(*sizes, normalize=normalize)
    assert got.dtype == jnp.float32
    want = []
    for cell in np.ndindex(*sizes):
        row = []
        for i, n in zip(cell, sizes, strict=True):
            middle = i + 0.5  # in patches from the edge
            if normalize == "own":
                row.append(middle / (n / 2) - 1)
            elif normalize == "longer":
                row.append(middle / (max(sizes) / 2) - 1)
            elif normalize == "shorter":
                row.append(middle / (min(sizes) / 2) - 1)
            else:
                row.append((middle - n / 2) / (math.prod(sizes) ** (1 / len(sizes)) / 2))
        want.append(row)
    np.testing.assert_allclose(got, want, rtol=2**-24, atol=2**-24)


def test_own_centres_are_symmetric():
    np.testing.assert_array_equal(patch_centers(5, 4)[::-1], -patch_centers(5, 4))


def draws(num, **ranges):
    """Augmented coordinates of the points -1, 0, 1 on two axes: ``[num, 3, 2]``."""
    points = jnp.array([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])
    keys = jax.random.split(jax.random.key(1), num)
    return np.asarray(jax.jit(jax.vmap(lambda key: augment_centers(key, points, **ranges)))(keys), np.float64)


def test_without_ranges_nothing_changes():
    centers = patch_centers(3, 4)
    np.testing.assert_array_equal(augment_centers(jax.random.key(0), centers), centers)


def quantiles(values):
    return np.quantile(values, [0, 0.25, 0.5, 0.75, 1])


def test_a_shift_is_uniform_on_each_axis():
    got = draws(4000, shift=0.3)
    np.testing.assert_allclose(got[:, 2] - got[:, 0], 2, atol=1e-6)
    for axis in range(2):
        np.testing.assert_allclose(quantiles(got[:, 1, axis]), [-0.3, -0.15, 0, 0.15, 0.3], atol=0.015)
    assert abs(np.corrcoef(got[:, 1].T)[0, 1]) < 0.05


@pytest.mark.parametrize(("name", "common"), [("jitter", False), ("rescale", True)])
def test_factors_are_log_uniform(name, common):
    got = draws(4000, **{name: 4.0})
    np.testing.assert_array_equal(got[:, 1], 0)
    np.testing.assert_array_equal(got[:, 0], -got[:, 2])
    for axis in range(2):
        np.testing.assert_allclose(quantiles(np.log2(got[:, 2, axis])), [-2, -1, 0, 1, 2], atol=0.1)
    correlation = np.corrcoef(got[:, 2].T)[0, 1]
    assert correlation > 0.999 if common else abs(correlation) < 0.05


def test_the_shift_comes_before_the_factors():
    """With the same key, a range does not change the draws of the others."""
    shift, jitter, rescale = (draws(20, **each) for each in (dict(shift=0.5), dict(jitter=2.0), dict(rescale=3.0)))
    together = draws(20, shift=0.5, jitter=2.0, rescale=3.0)
    np.testing.assert_allclose(together, shift * jitter[:, 2:] * rescale[:, 2:], atol=1e-5)


def test_a_draw_depends_on_the_key_alone():
    centers = jnp.zeros((2, 3, 2))
    first, again, other = (augment_centers(jax.random.key(k), centers, shift=1.0) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (2, 3, 2) and len(np.unique(first)) == 2 and not np.any(first == other)


def test_ranges_may_be_traced():
    centers, key = patch_centers(2, 2), jax.random.key(0)
    ranges = dict(shift=0.1, jitter=1.5, rescale=2.0)
    got = jax.jit(lambda ranges: augment_centers(key, centers, **ranges))(ranges)
    np.testing.assert_allclose(got, augment_centers(key, centers, **ranges), atol=1e-6)
    assert augment_centers(key, centers.astype(jnp.bfloat16), **ranges).dtype == jnp.bfloat16


key = jax.random.key(0)
zeros = np.zeros((1, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: patch_centers(), ValueError, r"sizes must be one or more lengths of at least 1, got \(\)"),
        (lambda: patch_centers(0, 2), ValueError, r"got \(0, 2\)"),
        (lambda: patch_centers(2.5), TypeError, "sizes must be an integer, got 2.5"),
        (
            lambda: patch_centers(2, normalize="max"),
            ValueError,
            r"normalize must be one of \('own', 'longer', 'shorter', 'area'\), got 'max'",
        ),
        (
            lambda: augment_centers(key, jnp.zeros((1, 2), int)),
            TypeError,
            "centers must be floating, got dtype int32",
        ),
        (
            lambda: augment_centers(key, jnp.zeros(2)),
            ValueError,
            r"centers must have shape \[\.\.\., T, A\], got \(2,\)",
        ),
        (lambda: augment_centers(key, zeros, shift=-0.1), ValueError, "shift must be at least 0, got -0.1"),
        (lambda: augment_centers(key, zeros, jitter=0.5), ValueError, "jitter must be at least 1, got 0.5"),
        (lambda: augment_centers(key, zeros, rescale=0.5), ValueError, "rescale must be at least 1, got 0.5"),
        (lambda: augment_centers(key, zeros, shift="a"), TypeError, "shift must be a real number, got 'a'"),
        (lambda: augment_centers(key, zeros, rescale=float("inf")), ValueError, "rescale must be finite, got inf"),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()
