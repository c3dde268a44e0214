import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import CASES, IDS, ROTARY_DIM

import rope_jax

LAYOUTS = ["half", "interleaved"]
INT32 = 2**31 - 1
# A rotated head of size 1: products and sums of the rotation (3 roundings) and cos/sin (2 each).
ROTATION_ERROR = 8 * oracles.EPS32
ropes = st.builds(
    rope_jax.Rope,
    head_dim=st.just(16),
    schedule=st.sampled_from(
        [rope_jax.Standard(), rope_jax.Llama3(factor=8.0, original_length=64), rope_jax.Linear(factor=3.0)]
    ),
    rotary_dim=st.sampled_from([2, 6, 8, 16]),
    layout=st.sampled_from(LAYOUTS),
)
positions = st.integers(-INT32, INT32)


def heads(seed, count=2):
    x = np.random.default_rng(seed).normal(size=(1, count, 16))
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def at(rope, x, m):
    return np.asarray(rope(x, x, jnp.array([m], jnp.int32))[0], np.float64)


class TestRotationsAreRotations:
    @given(ropes, positions, st.integers(0, 99))
    def test_norm_is_kept(self, rope, m, seed):
        x = heads(seed)
        np.testing.assert_allclose(np.linalg.norm(at(rope, x, m), axis=-1), 1, atol=ROTATION_ERROR)

    @given(ropes, st.integers(-(2**30), 2**30), st.integers(-(2**29), 2**29), st.integers(-(2**29), 2**29))
    def test_scores_depend_on_the_difference_only(self, rope, m, n, shift):
        q, k = heads(1), heads(2)
        score = lambda m, n: np.sum(at(rope, q, m) * at(rope, k, n), axis=-1)
        np.testing.assert_allclose(score(m, n), score(m + shift, n + shift), atol=4 * ROTATION_ERROR)

    @given(ropes, st.integers(-(2**30), 2**30), st.integers(-(2**30), 2**30 - 1))
    def test_rotations_compose(self, rope, m, n):
        x = heads(3)
        twice = at(rope, jnp.asarray(at(rope, x, m), jnp.float32), n)
        np.testing.assert_allclose(twice, at(rope, x, m + n), atol=3 * ROTATION_ERROR)

    @given(ropes, positions)
    def test_inverse_inverts(self, rope, m):
        x = heads(4)
        there = rope(x, x, jnp.array([m], jnp.int32))
        for back in rope.inverse(*there, jnp.array([m], jnp.int32)):
            np.testing.assert_allclose(back, x, atol=3 * ROTATION_ERROR)

    @given(ropes, positions)
    def test_layouts_are_equal_up_to_the_permutation(self, rope, m):
        x, width = heads(6), 2 * rope.num_pairs
        half, interleaved = (dataclasses.replace(rope, layout=name) for name in LAYOUTS)
        order = [*range(0, width, 2), *range(1, width, 2), *range(width, 16)]  # interleaved -> half
        np.testing.assert_array_equal(at(half, x[..., order], m), at(interleaved, x, m)[..., order])

    @given(ropes, st.lists(positions, min_size=3, max_size=3))
    def test_vmap_is_broadcasting(self, rope, token_positions):
        x, token_positions = (
            jnp.stack([heads(seed) for seed in range(3)]),
            jnp.array(token_positions, jnp.int32)[:, None],
        )
        whole = rope(x, x, token_positions)[0]
        np.testing.assert_allclose(jax.vmap(rope)(x, x, token_positions)[0], whole, atol=ROTATION_ERROR)

    @given(ropes, positions)
    def test_jit_is_eager(self, rope, m):
        x = heads(5)
        jitted = jax.jit(rope)(x, x, jnp.array([m], jnp.int32))[0]
        np.testing.assert_allclose(jitted, at(rope, x, m), atol=ROTATION_ERROR)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_rope_against_the_oracle(case, layout):
    """q and k from positions, in float64 from the paper's frequencies to the turned features."""
    rope = rope_jax.Rope(ROTARY_DIM + 16, case.build(), rotary_dim=ROTARY_DIM, layout=layout)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 6, 4, 80)), rng.normal(size=(2, 6, 1, 80))
    token_positions = rng.integers(0, 100_000, (2, 6))
    got = rope(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), jnp.asarray(token_positions, jnp.int32))
    inv_freq, a = case.oracle(ROTARY_DIM)
    cos, sin = (a * part.reshape(2, 6, -1) for part in oracles.cos_sin(token_positions, inv_freq))
    # The paper's frequencies in float64 agree to 64 roundings: at 1e5 that is 1e5 * 64 * 2^-53 = 7e-10 radians.
    for rotated, x in zip(got, (q, k), strict=True):
        np.testing.assert_allclose(
            rotated, oracles.rotate_features(x, cos, sin, layout), atol=a * np.abs(x).max() * ROTATION_ERROR
        )


def test_inverse_includes_the_attention_factor():
    rope = rope_jax.Rope(16, rope_jax.Yarn(factor=32.0, original_length=512))
    x, m = heads(0), jnp.array([12_345])
    assert rope.frequencies().attention_factor > 1.3
    for back in rope.inverse(*rope(x, x, m), m):
        np.testing.assert_allclose(back, x, atol=4 * ROTATION_ERROR)


def test_is_a_value():
    yarn = rope_jax.Yarn(factor=2.0, original_length=8)
    alternating = lambda: rope_jax.Sections(sections=[8, 8], schedule=yarn, order="strided")
    build = lambda: rope_jax.Rope(64, alternating(), rotary_dim=32, start=4, blocks=2)
    rope = build()
    assert rope == build() and hash(rope) == hash(build()) and pickle.loads(pickle.dumps(rope)) == rope
    assert eval(repr(rope), vars(rope_jax)) == rope
    whole = rope_jax.Rope(64, rope_jax.Standard())
    assert whole == rope_jax.Rope(64, rope_jax.Standard(), rotary_dim=64)
    assert dataclasses.replace(whole, head_dim=128).num_pairs == 64
    for change in (
        dict(layout="interleaved", blocks=1),
        dict(rotary_dim=60, schedule=yarn, blocks=1),
        dict(schedule=rope_jax.Standard()),
        dict(start=0),
        dict(blocks=1),
    ):
        assert dataclasses.replace(rope, **change) != rope


def test_any_hashable_callable_is_a_schedule():
    def slow(rotary_dim):
        return rope_jax.Frequencies(rope_jax.core.geometric(rotary_dim, 100.0) / 7)

    got = rope_jax.Rope(8, slow).rotation(jnp.array([7]))
    np.testing.assert_allclose(got.cos[0, 0], np.cos(1.0), atol=2e-7)


def test_axes_rotate_an_image():
    rope = rope_jax.Rope(8, rope_jax.Sections(sections=(2, 2)))
    x = jnp.ones((6, 1, 8))
    q, _ = rope(x, x, rope_jax.grid_positions(2, 3))
    inv_freq = rope_jax.Standard()(8).inv_freq
    grid = np.asarray(rope_jax.grid_positions(2, 3))
    cos, sin = np.empty((6, 4)), np.empty((6, 4))
    for pair, axis in enumerate((0, 0, 1, 1)):
        cos[:, [pair]], sin[:, [pair]] = oracles.cos_sin(grid[:, axis], inv_freq[[pair]])
    np.testing.assert_allclose(q, oracles.rotate_features(x, cos, sin, "half"), atol=1.5 * ROTATION_ERROR)


def test_context_length_goes_to_the_schedule():
    rope = rope_jax.Rope(64, rope_jax.DynamicNTK(factor=2.0, original_length=16))
    x = jnp.ones((2, 3, 1, 64))
    token_positions = jnp.arange(3)[None]
    got, _ = rope(x, x, token_positions, context_length=jnp.array([8, 64]))
    for row, length in enumerate((8, 64)):
        want, _ = rope(x[:1], x[:1], token_positions, context_length=length)
        np.testing.assert_allclose(got[row], want[0], atol=4e-6)
        back, _ = rope.inverse(want, want, token_positions, context_length=length)
        np.testing.assert_allclose(back, x[:1], atol=1e-6)
    with pytest.raises(ValueError, match="context_length must be left out: Standard does not depend on it"):
        rope_jax.Rope(64, rope_jax.Standard())(x, x, token_positions, context_length=8)


def test_no_leaks_and_no_hidden_state():
    with jax.checking_leaks():
        rope = rope_jax.Rope(
            8, rope_jax.LongRope(short_factor=[1] * 4, long_factor=[2] * 4, original_length=4, factor=2)
        )
        x = jnp.ones((1, 2, 1, 8))
        f = jax.jit(
            lambda x, n: jax.grad(lambda x: jnp.sum(rope(x, x, jnp.arange(2)[None], context_length=n)[0]))(x)
        )
        f(x, jnp.array([3]))
    # Two bases in one process: the result of a rope does not depend on earlier calls of another.
    first, second = (rope_jax.Rope(8, rope_jax.Standard(base=b)) for b in (1e4, 5e5))
    token_positions = jnp.arange(2)[None] + 1000
    alone = [np.asarray(r(x, x, token_positions)[0]) for r in (first, second)]
    again = [np.asarray(r(x, x, token_positions)[0]) for r in (second, first)]
    np.testing.assert_array_equal(alone[0], again[1])
    assert np.abs(alone[0] - alone[1]).max() > 0.1


class Unhashable:
    __hash__ = None

    def __call__(self, rotary_dim):
        return rope_jax.Standard()(rotary_dim)

    def __repr__(self):
        return "<Unhashable>"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: rope_jax.Rope(7, rope_jax.Standard()),
            ValueError,
            "rotary_dim must be even, .* head_dim=7, got 7",
        ),
        (lambda: rope_jax.Rope(8, rope_jax.Standard(), rotary_dim=10), ValueError, "head_dim=8, got 10"),
        (lambda: rope_jax.Rope(8, rope_jax.Standard(), rotary_dim=0), ValueError, "got 0"),
        (
            lambda: rope_jax.Rope(8, rope_jax.Standard(), layout="neox"),
            ValueError,
            "layout must be one of .*'neox'",
        ),
        (
            lambda: rope_jax.Rope(8, rope_jax.Sections(sections=(1, 1))).frequencies(),
            ValueError,
            r"Sections: sections must add up to R/2 = 4, got \(1, 1\)",
        ),
        (
            lambda: rope_jax.Rope(8, rope_jax.Sections(sections=(5, -1))),
            ValueError,
            r"Sections: sections must be numbers of pairs, for two axes or more, got \(5, -1\)",
        ),
        (lambda: rope_jax.Rope(8, rope_jax.Standard), TypeError, "schedule must be a schedule like Standard()"),
        (
            lambda: rope_jax.Rope(8, lambda r: rope_jax.Frequencies([1.0])).frequencies(),
            ValueError,
            "schedule must give R/2 = 4 freq",
        ),
        (
            lambda: rope_jax.Rope(8, rope_jax.Standard())(
                jnp.ones((2, 3, 1, 8)), jnp.ones((2, 4, 1, 8)), jnp.arange(3)
            ),
            ValueError,
            "k must have shape .* with T=3",
        ),
        (
            lambda: rope_jax.Rope(8, rope_jax.Standard())(
                jnp.ones((2, 3, 1, 8)), jnp.ones((2, 3, 1, 8)), jnp.arange(4)
            ),
            ValueError,
            "positions must have shape .* with T=3",
        ),
        (lambda: rope_jax.Rope(8, Unhashable()), TypeError, "schedule must be hashable, got <Unhashable>"),
        (lambda: rope_jax.Rope(8, 10_000.0), TypeError, "schedule must be a schedule .* got float"),
        (
            lambda: rope_jax.Rope(8, rope_jax.Standard()(8)),
            TypeError,
            "schedule must be a schedule .* got Frequencies: pass lambda rotary_dim: frequencies",
        ),
        (
            lambda: rope_jax.Rope(8, lambda r: np.ones(r // 2)).frequencies(),
            TypeError,
            "must return Frequencies, got ndarray",
        ),
        (
            lambda: rope_jax.Rope(8, rope_jax.Standard())(
                jnp.ones((1, 3, 2, 16)), jnp.ones((1, 3, 2, 16)), jnp.arange(3)
            ),
            ValueError,
            r"q must have shape \[\.\.\., T, N, H\] with H=8, got \(1, 3, 2, 16\)",
        ),
        (
            lambda: rope_jax.Rope(8, rope_jax.Standard()).rotate(
                jnp.ones((3, 2, 8)), rope_jax.Rope(4, rope_jax.Standard()).rotation(jnp.arange(3))
            ),
            ValueError,
            "rotation.cos must have shape .* with R/2=4, got \\(3, 2\\)",
        ),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()
