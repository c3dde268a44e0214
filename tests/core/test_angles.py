import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from schedules import CASES, IDS, ROTARY_DIM

import rope_jax

BOUND = 1.2e-7  # the contract: one float32 ulp at 1, times max(1, attention_factor)
INT32 = np.iinfo(np.int32)


def sampled_positions():
    rng = np.random.default_rng(0)
    near = lambda m: np.clip(rng.integers(m - 1000, m + 1000, 60), INT32.min, INT32.max)
    return np.concatenate(
        [
            rng.integers(0, 5_000, 300),
            *(near(m) for m in (0, 10**6, 10**7, -(10**6), INT32.max, INT32.min)),
            rng.integers(INT32.min, INT32.max, 300),
            [0, 1, -1, INT32.max, INT32.min],
        ]
    ).astype(np.int32)


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_exact_over_the_whole_int32_range(case, mode):
    positions = sampled_positions()
    frequencies = case.build()(ROTARY_DIM)
    fn = lambda m: rope_jax.rotation(m, frequencies)
    got = (jax.jit(fn) if mode == "jit" else fn)(jnp.asarray(positions))
    assert got.cos.dtype == got.sin.dtype == jnp.float32
    a = frequencies.attention_factor
    for part, want in zip(got, oracles.cos_sin(positions, frequencies.inv_freq), strict=True):
        assert np.abs(np.asarray(part, np.float64) - a * want).max() <= BOUND * max(1, a)


def test_the_oracle_agrees_with_mpmath():
    rng = np.random.default_rng(1)
    inv_freq = rope_jax.Standard(base=5e5)(128).inv_freq
    positions = rng.integers(INT32.min, INT32.max, 40)
    cos, sin = oracles.cos_sin(positions, inv_freq)
    for row, m in enumerate(positions):
        for i in (0, 1, 17, 63):
            want = oracles.mp_cos_sin(int(m), inv_freq[i])
            assert abs(cos[row, i] - want[0]) < 1e-14 and abs(sin[row, i] - want[1]) < 1e-14


def test_borders_of_octants():
    """All borders between octants and their neighbours, from frequencies that are binary fractions of a turn."""
    phases = np.array([k * 2**29 + d for k in range(8) for d in range(-40, 41)]) % 2**32
    # One position, one frequency per phase: the turns 2^-32 * phase, given in radians.
    inv_freq = phases * 2.0**-32 * 2 * np.pi
    got = rope_jax.rotation(jnp.array([1, -1]), rope_jax.Frequencies(inv_freq))
    for part, want in zip(got, oracles.cos_sin([1, -1], inv_freq), strict=True):
        assert np.abs(np.asarray(part, np.float64) - want).max() <= BOUND


def test_position_zero_is_the_identity_exactly():
    got = rope_jax.rotation(jnp.array([0]), rope_jax.Standard()(64))
    assert np.all(np.asarray(got.cos) == 1.0) and np.all(np.asarray(got.sin) == 0.0)


def test_large_frequencies_and_negative_ones():
    inv_freq = [3e6, 2.0**63, -1.0, 0.0, 5e-324, 1e-30]
    positions = [7, -7, INT32.max, INT32.min]
    got = rope_jax.rotation(jnp.array(positions, jnp.int32), rope_jax.Frequencies(inv_freq))
    for part, want in zip(got, oracles.cos_sin(positions, inv_freq), strict=True):
        assert np.abs(np.asarray(part, np.float64) - want).max() <= BOUND


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32])
def test_every_integer_dtype(dtype):
    info = np.iinfo(dtype)
    positions = np.array([info.min, info.min + 1, 0, 1, info.max - 1, info.max], dtype)
    inv_freq = rope_jax.Standard()(16).inv_freq
    got = rope_jax.rotation(jnp.asarray(positions), rope_jax.Frequencies(inv_freq))
    for part, want in zip(got, oracles.cos_sin(positions, inv_freq), strict=True):
        assert np.abs(np.asarray(part, np.float64) - want).max() <= BOUND


def test_x64_changes_no_bit_and_allows_int64():
    inv_freq = rope_jax.Standard(base=5e5)(64).inv_freq
    frequencies = rope_jax.Frequencies(inv_freq)
    positions = sampled_positions()
    want = rope_jax.rotation(jnp.asarray(positions), frequencies)
    with jax.enable_x64(True):
        for dtype in (jnp.int32, jnp.int64):
            got = rope_jax.rotation(jnp.asarray(positions, dtype), frequencies)
            np.testing.assert_array_equal(got.cos, want.cos)
            np.testing.assert_array_equal(got.sin, want.sin)
            assert got.cos.dtype == jnp.float32
        far = [2**40 + 12345, -(2**40) - 1, 2**33]
        got = rope_jax.rotation(jnp.array(far), frequencies)
        for part, exact in zip(got, oracles.cos_sin(far, inv_freq), strict=True):
            assert np.abs(np.asarray(part, np.float64) - exact).max() <= BOUND + 2.0**41 * 2.0**-62


def test_independent_of_matmul_precision_and_free_of_dots():
    frequencies = rope_jax.Yarn(factor=4.0, original_length=4096)(64)
    fn = lambda m: rope_jax.rotation(m, frequencies)
    positions = jnp.asarray(sampled_positions())
    want = jax.jit(fn)(positions)
    with jax.default_matmul_precision("bfloat16"):
        got = jax.jit(fn)(positions)
        learned = jax.make_jaxpr(lambda m, f: rope_jax.rotation(m, rope_jax.Frequencies(f)))
        for jaxpr in (jax.make_jaxpr(fn)(positions), learned(positions, jnp.ones(4))):
            assert "dot_general" not in str(jaxpr) and "mul" in str(jaxpr)
    np.testing.assert_array_equal(got.cos, want.cos)
    np.testing.assert_array_equal(got.sin, want.sin)


@pytest.mark.full  # bit for bit only as optimised programs
def test_vmap_and_broadcast_are_the_same():
    frequencies = rope_jax.Standard()(32)
    positions = jnp.arange(24).reshape(2, 3, 4) * 1_000_003
    whole = rope_jax.rotation(positions, frequencies)
    rows = jax.vmap(jax.vmap(lambda m: rope_jax.rotation(m, frequencies)))(positions)
    np.testing.assert_array_equal(whole.cos, rows.cos)
    np.testing.assert_array_equal(whole.sin, rows.sin)


class TestFloatPath:
    def test_error_is_what_the_docstring_states(self):
        inv_freq = rope_jax.Standard()(64).inv_freq
        positions = np.concatenate([np.arange(50), [1000, 10_000, 123_457]])
        learned = rope_jax.Frequencies(jnp.asarray(inv_freq, jnp.float32), 1.5)
        for given, exact in (
            (jnp.asarray(positions, jnp.float32), rope_jax.Frequencies(inv_freq, 1.5)),
            (jnp.asarray(positions), learned),
        ):
            got = rope_jax.rotation(given, exact)
            bound = 1.5 * (np.abs(positions[:, None] * inv_freq) * 2.0**-23 + 2 * BOUND)
            for part, want in zip(got, oracles.cos_sin(positions, inv_freq), strict=True):
                assert part.dtype == jnp.float32
                assert np.all(np.abs(np.asarray(part, np.float64) - 1.5 * want) <= bound)

    def test_float64_positions_keep_their_digits(self):
        inv_freq = rope_jax.Standard()(16).inv_freq
        with jax.enable_x64(True):
            got = rope_jax.rotation(jnp.array([1e9 + 1], jnp.float64), rope_jax.Frequencies(inv_freq))
        assert got.cos.dtype == jnp.float32
        want, _ = oracles.cos_sin([10**9 + 1], inv_freq)
        # float64 angle of up to 1e9 radians, then one float32 rounding
        assert np.abs(np.asarray(got.cos, np.float64) - want).max() <= 1e9 * 2.0**-52 + 2.0**-24

    def test_is_differentiable_in_frequencies_and_positions(self):
        positions, inv_freq = jnp.array([0.5, 3.0]), jnp.array([1.0, 0.1])

        def loss(m, f):
            cos, sin = rope_jax.rotation(m, rope_jax.Frequencies(f, 2.0))
            return jnp.sum(cos + 3 * sin)

        dm, df = jax.grad(loss, argnums=(0, 1))(positions, inv_freq)
        angle = np.outer(positions, inv_freq)
        slope = 2 * (-np.sin(angle) + 3 * np.cos(angle))
        np.testing.assert_allclose(dm, slope @ np.asarray(inv_freq), rtol=1e-5)
        np.testing.assert_allclose(df, np.asarray(positions) @ slope, rtol=1e-5)

    def test_frequencies_per_row(self):
        inv_freq = jnp.array([[1.0, 0.5], [0.25, 2.0]])
        got = rope_jax.rotation(jnp.array([[1, 2, 3], [4, 5, 6]]), rope_jax.Frequencies(inv_freq, num_batch_axes=1))
        want = np.array([[1, 2, 3], [4, 5, 6]])[..., None] * np.asarray(inv_freq)[:, None]
        np.testing.assert_allclose(got.sin, np.sin(want), atol=1e-6)


def dealt(frequencies, axes):
    """The frequencies of one ladder, where pair i reads the position axis ``axes[i]``."""
    is_read = np.arange(max(axes) + 1)[:, None] == np.array(axes)
    return dataclasses.replace(frequencies, inv_freq=np.where(is_read, frequencies.inv_freq, 0))


class TestAxes:
    def test_each_pair_reads_its_axis(self):
        grid = rope_jax.grid_positions(3, 5)
        frequencies = rope_jax.Standard()(8)
        axes = (0, 1, 1, 0)
        got = rope_jax.rotation(grid, dealt(frequencies, axes))
        for pair, axis in enumerate(axes):
            one = rope_jax.rotation(grid[:, axis], frequencies)
            np.testing.assert_array_equal(got.cos[:, pair], one.cos[:, pair])
            np.testing.assert_array_equal(got.sin[:, pair], one.sin[:, pair])

    def test_one_axis_is_plain(self):
        frequencies = rope_jax.Standard()(8)
        plain = rope_jax.rotation(jnp.arange(6), frequencies)
        one_row = rope_jax.Frequencies(frequencies.inv_freq[None])
        np.testing.assert_array_equal(rope_jax.rotation(jnp.arange(6), one_row).sin, plain.sin)


STANDARD8 = rope_jax.Standard()(8)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rope_jax.rotation(jnp.arange(3), np.ones(4)), TypeError, "frequencies must be .* got ndarray"),
        (
            lambda: rope_jax.rotation(jnp.arange(3), rope_jax.Standard()),
            TypeError,
            "call a schedule with rotary_dim",
        ),
        (
            lambda: rope_jax.rotation(jnp.arange(3, dtype=jnp.bfloat16), STANDARD8),
            TypeError,
            "positions must be integers, float32 or float64, got dtype bfloat16",
        ),
        (lambda: rope_jax.rotation(jnp.array([True]), STANDARD8), TypeError, "positions must be .* got dtype bool"),
        (lambda: rope_jax.rotation(3, STANDARD8), ValueError, r"positions must have shape \[\.\.\., T\], got \(\)"),
        (
            lambda: rope_jax.rotation([2**31], STANDARD8),
            ValueError,
            "positions must fit in int32, got .* 2147483648",
        ),
        (lambda: rope_jax.rotation(np.array([-(2**40)]), STANDARD8), ValueError, "positions must fit in int32"),
        (
            lambda: rope_jax.rotation(jnp.zeros(3, int), dealt(STANDARD8, (0, 1, 1, 0))),
            ValueError,
            r"positions must be \[\.\.\., T, A=2\] for frequencies of 2 position axes, got shape \(3,\): "
            "pass a coordinate for each axis",
        ),
        (
            lambda: rope_jax.rotation(jnp.zeros((3, 2), int), dealt(STANDARD8, (0, 1, 2, 0))),
            ValueError,
            r"positions must be \[\.\.\., T, A=3\] .* got shape \(3, 2\)",
        ),
        (
            lambda: rope_jax.rotation(
                jnp.zeros((3, 4), int), rope_jax.Frequencies(jnp.ones((2, 8)), num_batch_axes=1)
            ),
            ValueError,
            r"positions before T and frequencies before R/2 must have the same axes, got \(3,\) and \(2,\)",
        ),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()
