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

BOUND = 1.2e-7  # the contract, at every int32 coordinate
EPS32, EPS64 = 2.0**-24, 2.0**-53
INT32 = np.iinfo(np.int32)

walk = pytest.mark.parametrize("form", FORMS, ids=NAMES)


def sampled(form):
    """Tokens near the origin, around a million and at both ends of int32; or within the reach of the form."""
    rng = np.random.default_rng(3)
    if form.floats:
        coordinates = rng.uniform(-form.reach, form.reach, (16, form.num_axes)).astype(np.float32)
    elif form.reach:
        coordinates = rng.integers(0, form.reach, (16, form.num_axes))
    else:
        draw = lambda low, high, rows: rng.integers(low, high, (rows, form.num_axes), endpoint=True)
        near = [draw(0, 0, 1), draw(0, 40, 5), draw(-40, 40, 4)]
        million = [draw(10**6 - 1000, 10**6 + 1000, 3), draw(-(10**6), 10**6, 2)]
        ends = [draw(INT32.max - 1000, INT32.max, 3), draw(INT32.min, INT32.min + 1000, 2)]
        coordinates = np.concatenate([*near, *million, *ends])
    positions = coordinates if form.floats else coordinates.astype(np.int32)
    return (positions[:, 0] if form.num_axes == 1 else positions), coordinates.tolist()


def tokens(form):
    positions, coordinates = form.tokens() if form.tokens else sampled(form)
    if form.tokens and form.num_axes == 1:
        positions = positions[:, 0]
    return jnp.asarray(positions), coordinates


def expected(form, coordinates):
    """Factors ``[T, (N,) R/2]`` of the oracle, and the sum of ``|position * frequency|`` over the axes."""
    with mpmath.workdps(forms.DIGITS):
        evaluate = lambda p: np.array(form.oracle([mpf(c) for c in p]), object)
        zero = evaluate([0] * form.num_axes)
        is_factor = isinstance(zero.flat[0], mpmath.mpc)
        if not is_factor and not form.tokens:
            units = np.eye(form.num_axes, dtype=int).tolist()
            slopes = np.array([np.abs(np.float64(evaluate(unit) - zero)) for unit in units])
        factors, sizes = [], []
        for token in coordinates:
            if token is None:
                factors.append(np.ones(zero.shape))
                sizes.append(np.zeros(zero.shape))
                continue
            value = evaluate(token)
            to_complex = np.vectorize(lambda v: complex(v if is_factor else mpmath.expj(v)), otypes=[complex])
            factors.append(to_complex(value))
            if is_factor:
                sizes.append(np.full(zero.shape, float(max(map(abs, token)))))
            elif form.tokens:
                sizes.append(np.abs(np.float64(value)))
            else:
                sizes.append(np.abs(np.float64(zero)) + np.tensordot(np.abs(np.float64(token)), slopes, axes=1))
    return np.array(factors), np.array(sizes)


def tolerance(form, factors, sizes):
    """float32's last place; the roundings of frequencies to float64, or of the float32 path; those of the expression."""
    if form.learned or form.floats:
        angle = sizes * (form.num_axes + 1) * EPS32
    else:
        angle = sizes * 8 * EPS64
    size = np.maximum(1, np.abs(factors))
    return size * (BOUND + angle + form.rounding)


@functools.cache
def computed(index):
    """What rope_jax gives for a form: the expression, coordinates, cos + i sin, the oracle's factors, tolerances."""
    form = FORMS[index]
    written = form.write()
    positions, coordinates = tokens(form)
    rotation = written.rotation(positions)
    assert rotation.cos.dtype == rotation.sin.dtype == jnp.float32
    got = np.float64(rotation.cos) + 1j * np.float64(rotation.sin)
    factors, sizes = expected(form, coordinates)
    assert got.shape == factors.shape, (got.shape, factors.shape)
    return written, positions, rotation, got, factors, sizes


def differences(got, want):
    return np.maximum(np.abs(got.real - want.real), np.abs(got.imag - want.imag))


@walk
def test_cos_and_sin(form):
    _, positions, _, got, factors, sizes = computed(FORMS.index(form))
    worst = differences(got, factors)
    # A row at position 0 must be exact, a form without an offset that is; nothing hides in the tolerance near 0.
    near = np.abs(np.float64(positions)).reshape(len(positions), -1).max(axis=1) < 2000
    near = near if len(near) == len(got) else np.ones(len(got), bool)
    far = f"{worst[~near].max():8.1e}" if not near.all() else "       -"
    print(f"\n{NAMES[FORMS.index(form)]:95} cos, sin near {worst[near].max():8.1e} far {far}", end="")
    assert np.all(worst <= tolerance(form, factors, sizes))


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
    worst = differences(got, want).max()
    print(f"   own {worst:8.1e}", end="")
    assert worst <= BOUND


def rotated(x, factors, pairs):
    """x ``[T, N, H]`` with each pair of features multiplied as a complex number by its factor, in float64."""
    y = np.array(x, np.float64)
    for i, (first, second) in enumerate(pairs):
        factor = factors[..., i] if factors.ndim == 3 else factors[:, None, i]
        y[..., first] = x[..., first] * factor.real - x[..., second] * factor.imag
        y[..., second] = x[..., second] * factor.real + x[..., first] * factor.imag
    return y


@walk
def test_rotated_features(form):
    written, _, rotation, _, factors, sizes = computed(FORMS.index(form))
    x = np.random.default_rng(4).normal(size=(len(factors), form.heads or 2, written.head_dim)).astype(np.float32)
    got = np.float64(written.rotate(jnp.asarray(x), rotation))
    prepared = form.prepare(np.float64(x))
    want = rotated(prepared, factors, form.pairs)
    # Two products and a sum are rounded, and so is x where it is prepared.
    allowed = np.zeros(want.shape)
    close = tolerance(form, factors, sizes) + 2 * EPS32 * np.maximum(1, np.abs(factors))
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
