"""Every rotary form of the table: cos, sin and rotated features against the form's own formula.

``pytest -s`` prints the worst difference of each form.
"""

import functools

import forms
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from forms import FORMS, NAMES
from mpmath import mpf

import rope_jax

EPS32 = 2.0**-24

walk = pytest.mark.parametrize("form", FORMS, ids=NAMES)


@functools.cache
def computed(index):
    """What rope_jax gives for a form: the expression, coordinates, cos + i sin, the oracle's factors, tolerances."""
    form = FORMS[index]
    written = form.write()
    positions, coordinates = forms.tokens(form)
    rotation = written.rotation(positions)
    assert rotation.cos.dtype == rotation.sin.dtype == jnp.float32
    got = np.float64(rotation.cos) + 1j * np.float64(rotation.sin)
    factors, sizes = forms.expected(form, coordinates)
    assert got.shape == factors.shape, (got.shape, factors.shape)
    return written, positions, rotation, got, factors, sizes


@walk
def test_cos_and_sin(form):
    _, positions, _, got, factors, sizes = computed(FORMS.index(form))
    worst = forms.differences(got, factors)
    # A row at position 0 must be exact, a form without an offset that is; nothing hides in the tolerance near 0.
    near = np.abs(np.float64(positions)).reshape(len(positions), -1).max(axis=1) < 2000
    near = near if len(near) == len(got) else np.ones(len(got), bool)
    far = f"{worst[~near].max():8.1e}" if not near.all() else "       -"
    print(f"\n{NAMES[FORMS.index(form)]:95} cos, sin near {worst[near].max():8.1e} far {far}", end="")
    assert np.all(worst <= forms.tolerance(form, factors, sizes))


@walk
def test_exact_for_the_float64_frequencies(form):
    """1.2e-7 at every coordinate, without the rounding of frequencies: mpmath's angle of the library's own numbers."""
    if form.learned or form.floats:
        pytest.skip("frequencies are learned or positions are not integers: the float path")
    written, positions, _, got, _, _ = computed(FORMS.index(form))
    if not isinstance(written, rope_jax.Rope):
        pytest.skip("the expression is not a Rope")
    frequencies = written.frequencies()
    inv_freq = np.asarray(frequencies.inv_freq)
    inv_freq = inv_freq[None] if inv_freq.ndim == 1 else inv_freq  # [..., A, R/2]
    phase = np.zeros(inv_freq.shape[-1]) if frequencies.phase is None else frequencies.phase
    coordinates = np.asarray(positions).reshape(len(positions), -1).tolist()
    with mpmath.workdps(forms.DIGITS):
        exact = np.vectorize(mpf, otypes=[object])
        angles = np.array(
            [
                sum(c * row for c, row in zip(p, np.moveaxis(exact(inv_freq), -2, 0), strict=True))
                for p in coordinates
            ]
        ) + exact(phase)
        want = np.vectorize(lambda angle: complex(mpmath.expj(angle)), otypes=[complex])(angles)
    worst = forms.differences(got, want).max()
    print(f"   own {worst:8.1e}", end="")
    assert worst <= forms.BOUND


@walk
def test_rotated_features(form):
    written, _, rotation, _, factors, sizes = computed(FORMS.index(form))
    x = np.random.default_rng(4).normal(size=(len(factors), form.heads or 2, written.head_dim)).astype(np.float32)
    got = np.float64(written.rotate(jnp.asarray(x), rotation))
    prepared = form.prepare(np.float64(x))
    want = forms.rotated(prepared, factors, form.pairs)
    # Two products and a sum are rounded, and so is x where it is prepared.
    allowed = np.zeros(want.shape)
    close = forms.tolerance(form, factors, sizes) + 2 * EPS32 * np.maximum(1, np.abs(factors))
    for i, (first, second) in enumerate(form.pairs):
        bound = close[..., i] if factors.ndim == 3 else close[:, None, i]
        length = np.abs(prepared[..., first]) + np.abs(prepared[..., second])
        allowed[..., first] = allowed[..., second] = bound * length
    allowed += form.prepared_rounding * np.abs(prepared).max()
    worst = np.abs(got - want)
    print(f"   features {worst.max():8.1e}", end="")
    assert np.all(worst <= allowed)


def test_the_pairs_of_a_form_share_no_feature():
    for form in FORMS:
        features = [feature for pair in form.pairs for feature in pair]
        assert len(set(features)) == len(features), form.name
