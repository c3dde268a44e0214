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

REPORT: dict[str, dict] = {}
COLUMNS = {
    "near": "cos, sin near 0",
    "far": "cos, sin far",
    "own": "far, given float64 frequencies",
    "features": "features",
}


@pytest.fixture(autouse=True, scope="module")
def report():
    yield
    print("\n" + " | ".join([f"{'worst difference to mpmath':90}", *COLUMNS.values()]))
    for name, row in REPORT.items():
        cells = [
            f"{row[key]:{len(title)}.1e}" if row.get(key) is not None else " " * len(title)
            for key, title in COLUMNS.items()
        ]
        print(" | ".join([f"{name:90}", *cells]))


def note(form, **worst):
    REPORT.setdefault(NAMES[FORMS.index(form)], {}).update(worst)


EXACT = [form for form in FORMS if not (form.learned or form.floats or form.by_hand)]
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
    near = np.abs(np.float64(positions)).reshape(len(positions), -1).max(axis=1) < 2000
    near = near if len(near) == len(got) else np.ones(len(got), bool)
    note(form, near=worst[near].max(), far=None if near.all() else worst[~near].max())
    assert np.all(worst <= forms.tolerance(form, factors, sizes))


@pytest.mark.parametrize("form", EXACT, ids=lambda form: NAMES[FORMS.index(form)])
def test_exact_for_the_float64_frequencies(form):
    """1.2e-7 at every coordinate, without the rounding of frequencies: mpmath's angle of the library's own numbers."""
    written, positions, _, got, _, _ = computed(FORMS.index(form))
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
    note(form, own=worst)
    assert worst <= forms.BOUND


@walk
def test_rotated_features(form):
    written, _, rotation, _, factors, sizes = computed(FORMS.index(form))
    x = np.random.default_rng(4).normal(size=(len(factors), form.heads or 2, written.head_dim)).astype(np.float32)
    got = np.float64(written.rotate(jnp.asarray(x), rotation))
    prepared = form.prepare(np.float64(x))
    want = forms.rotated(prepared, factors, form.pairs)
    worst = np.abs(got - want)
    note(form, features=worst.max())
    close = forms.tolerance(form, factors, sizes)
    assert np.all(worst <= forms.allowed(form, prepared, factors, close))


def test_the_pairs_of_a_form_share_no_feature():
    for form in FORMS:
        features = [feature for pair in form.pairs for feature in pair]
        assert len(set(features)) == len(features), form.name


def test_ropes_print_as_they_are_written():
    """``eval(repr(rope)) == rope``, unless a schedule is a function written by hand."""
    printed = 0
    for form in FORMS:
        written = form.write()
        if isinstance(written, rope_jax.Rope) and "<function" not in (text := repr(written)):
            assert eval(text, vars(rope_jax)) == written, form.name
            printed += 1
    assert printed > len(FORMS) / 2
