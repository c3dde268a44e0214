"""Frequencies of several position axes, of several heads, and with phases."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import rope_jax
from rope_jax.core import FrequencyChoice
from rope_jax.core.angles import rotation_change

BOUND = 1.2e-7  # the contract, times max(1, attention_factor)
INT32 = np.iinfo(np.int32)
EDGES = [0, 1, -1, INT32.max, INT32.min, INT32.max - 1, 10**6, -(10**7)]


def coordinates(num_axes, count=24, seed=0):
    """Positions over all of int32 ``[T, A]``, with its ends on every axis."""
    rng = np.random.default_rng(seed)
    at_random = rng.integers(INT32.min, INT32.max, (count, num_axes), endpoint=True)
    return np.concatenate([at_random, np.array(EDGES)[:, None].repeat(num_axes, 1)]).astype(np.int32)


def dense(*shape, seed=1):
    """Frequencies of a dense matrix ``[..., A, R/2]``: of both signs, over six decades."""
    rng = np.random.default_rng(seed)
    return rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(-6, 0.3, shape)


def assert_exact(got, want, factor=1.0, bound=BOUND):
    for part, exact in zip(got, want, strict=True):
        assert part.dtype == jnp.float32 and part.shape == exact.shape
        assert np.abs(np.asarray(part, np.float64) - factor * exact).max() <= bound * max(1, factor)


def of_heads(positions, inv_freq, phase=None):
    """The oracle ``[T, N, R/2]`` of ``inv_freq [N, A, R/2]``."""
    phases = [None] * len(inv_freq) if phase is None else phase
    each = [oracles.mp_waves(positions, matrix, p) for matrix, p in zip(inv_freq, phases, strict=True)]
    return tuple(np.stack(parts, axis=1) for parts in zip(*each, strict=True))


class TestExactPath:
    @pytest.mark.parametrize("mode", ["eager", "jit"])
    @pytest.mark.parametrize("num_axes", [2, 3, 7])
    def test_dense_matrices_over_all_int32(self, num_axes, mode):
        positions, inv_freq = coordinates(num_axes), dense(num_axes, 5)
        call = functools.partial(rope_jax.rotation, frequencies=rope_jax.Frequencies(inv_freq, 1.25))
        got = (jax.jit(call) if mode == "jit" else call)(jnp.asarray(positions))
        assert_exact(got, oracles.mp_waves(positions, inv_freq), 1.25)

    def test_more_than_seven_axes_add_what_the_docstring_states(self):
        positions, inv_freq = coordinates(12, 60), dense(12, 4)
        got = rope_jax.rotation(jnp.asarray(positions), rope_jax.Frequencies(inv_freq))
        assert_exact(got, oracles.mp_waves(positions, inv_freq), bound=BOUND + 5 * 4.4e-9)

    def test_a_matrix_for_each_head(self):
        positions, inv_freq = coordinates(2), dense(3, 2, 4)
        got = rope_jax.rotation(jnp.asarray(positions), rope_jax.Frequencies(inv_freq))
        assert_exact(got, of_heads(positions, inv_freq))
        text = rope_jax.rotation(jnp.asarray(positions[:, 0]), rope_jax.Frequencies(inv_freq[:, :1]))
        assert_exact(text, of_heads(positions[:, :1], inv_freq[:, :1]))

    def test_leading_axes(self):
        positions, inv_freq = coordinates(2, 22), dense(3, 2, 4)
        rows = jnp.asarray(positions).reshape(2, 3, 5, 2)
        for frequencies in (
            rope_jax.Frequencies(inv_freq),
            rope_jax.Frequencies(inv_freq[0], phase=[0.1, 1, 2, 3]),
        ):
            whole = rope_jax.rotation(jnp.asarray(positions), frequencies)
            got = rope_jax.rotation(rows, frequencies)
            mapped = jax.vmap(jax.vmap(functools.partial(rope_jax.rotation, frequencies=frequencies)))(rows)
            for part, row, each in zip(whole, got, mapped, strict=True):
                assert row.shape == (2, 3, 5, *part.shape[1:])
                np.testing.assert_array_equal(row.reshape(part.shape), part)
                np.testing.assert_allclose(each, row, atol=2 * BOUND)

    @pytest.mark.parametrize("num_axes", [1, 3])
    def test_phases(self, num_axes):
        positions, inv_freq = coordinates(num_axes), dense(num_axes, 6)
        phase = np.array([0.0, 1e-9, -3.0, 1e6, 2.0**40, -7e18])
        given = inv_freq[0] if num_axes == 1 else inv_freq
        at = positions[:, 0] if num_axes == 1 else positions
        got = rope_jax.rotation(jnp.asarray(at), rope_jax.Frequencies(given, 1.5, phase))
        assert_exact(got, oracles.mp_waves(positions, inv_freq, phase), 1.5)

    def test_phases_of_each_head(self):
        positions, inv_freq, phase = coordinates(2), dense(3, 2, 4), dense(3, 4, seed=2)
        got = rope_jax.rotation(jnp.asarray(positions), rope_jax.Frequencies(inv_freq, phase=phase))
        assert_exact(got, of_heads(positions, inv_freq, phase))

    @pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.uint32])
    def test_every_integer_dtype(self, dtype):
        info = np.iinfo(dtype)
        positions = np.array([[info.min, info.max], [info.max, info.max - 1], [1, info.min]], dtype)
        got = rope_jax.rotation(jnp.asarray(positions), rope_jax.Frequencies(dense(2, 5)))
        assert_exact(got, oracles.mp_waves(positions, dense(2, 5)))

    def test_x64_changes_no_bit_and_allows_int64(self):
        positions, frequencies = coordinates(3), rope_jax.Frequencies(dense(3, 5), phase=dense(5))
        want = rope_jax.rotation(jnp.asarray(positions), frequencies)
        with jax.enable_x64(True):
            for dtype in (jnp.int32, jnp.int64):
                got = rope_jax.rotation(jnp.asarray(positions, dtype), frequencies)
                jax.tree.map(np.testing.assert_array_equal, got, want)
            far = np.array([[2**40 + 12345, -(2**41), 7], [3, 2**33, -(2**40) - 1]])
            got = rope_jax.rotation(jnp.array(far), frequencies)
        bound = BOUND + 2.0**42 * 2.0**-62
        assert_exact(got, oracles.mp_waves(far, frequencies.inv_freq, frequencies.phase), bound=bound)

    def test_one_entry_in_each_column_is_bit_for_bit_the_rotation_of_one_axis(self):
        ladder, positions = rope_jax.Yarn(factor=4.0, original_length=64)(16), coordinates(3)
        axes = [2, 0, 1, 1, 0, 2, 2, 0]
        inv_freq = np.where(np.arange(3)[:, None] == axes, ladder.inv_freq, 0)
        frequencies = rope_jax.Frequencies(inv_freq, ladder.attention_factor)
        got = rope_jax.rotation(jnp.asarray(positions), frequencies)
        for pair, axis in enumerate(axes):
            one = rope_jax.rotation(jnp.asarray(positions[:, axis]), ladder)
            for part, each in zip(got, one, strict=True):
                np.testing.assert_array_equal(part[:, pair], each[:, pair])

    def test_gathered_and_summed_coordinates_are_alike(self):
        """A column of two entries makes all columns sums: the other columns differ by the lost low word at most."""
        positions, inv_freq = coordinates(2), np.array([[1.0, 0.0, 0.1, 0.0], [0.0, 0.3, 0.0, 0.0]])
        mixed = np.concatenate([inv_freq, [[0.5], [0.25]]], axis=1)
        gathered = rope_jax.rotation(jnp.asarray(positions), rope_jax.Frequencies(inv_freq))
        summed = rope_jax.rotation(jnp.asarray(positions), rope_jax.Frequencies(mixed))
        for part, each in zip(gathered, summed, strict=True):
            np.testing.assert_allclose(part, each[:, :4], atol=2 * BOUND)
        programs = [
            str(
                jax.make_jaxpr(lambda m, f=f: rope_jax.rotation(m, rope_jax.Frequencies(f)))(jnp.asarray(positions))
            )
            for f in (inv_freq, mixed)
        ]
        assert "gather" in programs[0] and "gather" not in programs[1]
        assert not any("dot_general" in program for program in programs)

    def test_one_entry_columns_of_each_head(self):
        positions = coordinates(2)
        inv_freq = np.zeros((2, 2, 3))
        inv_freq[0, 0], inv_freq[1, 1] = [1.0, 0.1, 0.01], [0.5, 0.0, 0.02]  # a head of rows, a head of columns
        got = rope_jax.rotation(jnp.asarray(positions), rope_jax.Frequencies(inv_freq))
        for head in (0, 1):
            one = rope_jax.rotation(jnp.asarray(positions[:, head]), rope_jax.Frequencies(inv_freq[head, head]))
            for part, each in zip(got, one, strict=True):
                np.testing.assert_array_equal(part[:, head], each)

    def test_pairs_at_rest(self):
        got = rope_jax.rotation(jnp.asarray(coordinates(2)), rope_jax.Frequencies([[0.0, 1.0], [0.0, 1.0]], 1.25))
        assert np.all(np.asarray(got.cos[:, 0]) == 1.25) and np.all(np.asarray(got.sin[:, 0]) == 0.0)


class TestChoices:
    @pytest.mark.parametrize("with_phase", [False, True])
    @pytest.mark.parametrize("shape", [(2, 4), (3, 2, 4)])
    def test_each_row_chooses(self, shape, with_phase):
        options = tuple(
            rope_jax.Frequencies(dense(*shape, seed=seed), 1 + seed, dense(*shape[:-2], 4, seed=9 + seed))
            if with_phase
            else rope_jax.Frequencies(dense(*shape, seed=seed), 1 + seed)
            for seed in range(3)
        )
        positions, index = jnp.asarray(coordinates(2, 4)), jnp.array([2, 0, 1, 5])
        rotate_to = jax.jit(lambda m, index: rope_jax.rotation(m, FrequencyChoice(options, index)))
        got = rotate_to(positions[None], index)
        for row, chosen in enumerate((2, 0, 1)):
            want = rope_jax.rotation(positions, options[chosen])
            for part, each in zip(got, want, strict=True):
                np.testing.assert_allclose(part[row], each, atol=2 * BOUND * (1 + chosen))
        assert np.isnan(got.cos[3]).all() and np.isnan(got.sin[3]).all()
        choice = FrequencyChoice(options, index)
        assert (choice.num_pairs, choice.num_axes, choice.num_heads) == (
            4,
            2,
            shape[0] if len(shape) == 3 else None,
        )

    def test_a_column_is_gathered_only_if_it_is_one_axis_in_every_option(self):
        one, other = (np.where(np.arange(2)[:, None] == axes, [1.0, 0.3], 0) for axes in ([0, 1], [1, 1]))
        positions = coordinates(2)
        options = (rope_jax.Frequencies(one), rope_jax.Frequencies(other))
        for index in (0, 1):
            got = rope_jax.rotation(jnp.asarray(positions), FrequencyChoice(options, jnp.array(index)))
            assert_exact(got, oracles.mp_waves(positions, options[index].inv_freq))

    def test_options_of_unlike_shapes(self):
        for unlike in (
            (rope_jax.Frequencies([[1.0, 2.0]]), rope_jax.Frequencies([1.0, 2.0])),
            (rope_jax.Frequencies([1.0]), rope_jax.Frequencies([1.0], phase=[0.5])),
        ):
            with pytest.raises(ValueError, match="options must be one or more host Frequencies of one shape"):
                FrequencyChoice(unlike, jnp.array(0))


class TestChange:
    """From old to new frequencies, against mpmath at the difference of both."""

    @pytest.mark.parametrize("shape", [(2, 4), (3, 2, 4)])
    def test_axes_heads_and_phases(self, shape):
        old, new = (
            rope_jax.Frequencies(dense(*shape, seed=s), 1.0 + s, dense(*shape[:-2], 4, seed=9 + s)) for s in (0, 1)
        )
        positions = coordinates(2)
        got = rotation_change(jnp.asarray(positions), old, new)
        cos, sin = (
            (oracles.mp_waves if len(shape) == 2 else of_heads)(positions, f.inv_freq, f.phase) for f in (old, new)
        )
        turn = (sin[0] + 1j * sin[1]) * (cos[0] - 1j * cos[1])
        assert_exact(got, (turn.real, turn.imag), 2.0)

    def test_a_phase_of_only_one(self):
        plain, moved = rope_jax.Frequencies([0.3, 0.1]), rope_jax.Frequencies([0.3, 0.1], phase=[1.0, 2.0])
        for old, new, sign in ((plain, moved, 1), (moved, plain, -1)):
            got = rotation_change(jnp.arange(5), old, new)
            assert_exact(got, [np.tile(f(sign * np.array([1.0, 2.0])), (5, 1)) for f in (np.cos, np.sin)])

    @pytest.mark.parametrize("wrap", ["sections", "affine", "both"])
    def test_rerotate(self, wrap):
        inner = rope_jax.LongRope(short_factor=(1.0,) * 4, long_factor=(2, 3, 4, 5), factor=4.0, original_length=16)
        schedule = inner if wrap == "affine" else rope_jax.Sections(sections=(3, 1), schedule=inner)
        if wrap != "sections":
            schedule = rope_jax.Affine(schedule=schedule, scale=0.5, offset=3.25)
        rope = rope_jax.Rope(8, schedule)
        k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 1, 8)), jnp.float32)
        at = np.random.default_rng(1).integers(0, 10**6, (2, 7) if wrap == "affine" else (2, 7, 2))
        short, long = (rope.rotate(k, rope.rotation(at, context_length=length)) for length in (16, 17))
        moved = rope.rerotate(short, at, old_context_length=16, new_context_length=jnp.array([17, 16]))
        np.testing.assert_allclose(moved[0], long[0], atol=16 * oracles.EPS32)
        np.testing.assert_allclose(moved[1], short[1], atol=16 * oracles.EPS32)


class TestFloatPath:
    @pytest.mark.parametrize("how", ["float positions", "learned"])
    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
    def test_error_is_what_the_docstring_states(self, shape, how):
        inv_freq, phase = dense(*shape), dense(*shape[:-2], 4, seed=3)
        positions = np.random.default_rng(0).integers(-1000, 1000, (20, 3))
        given = jnp.asarray(positions, jnp.float32 if how == "float positions" else jnp.int32)
        exact = inv_freq if how == "float positions" else np.asarray(inv_freq, np.float32)
        frequencies = rope_jax.Frequencies(inv_freq if how == "float positions" else jnp.asarray(exact), 1.5, phase)
        got = rope_jax.rotation(given, frequencies)
        want = (oracles.mp_waves if len(shape) == 2 else of_heads)(positions, exact, phase)
        size = np.abs(positions) @ np.abs(exact) + np.abs(phase)[..., None, :]  # [(N,) T, R/2]
        size = size if len(shape) == 2 else size.swapaxes(0, 1)
        for part, each in zip(got, want, strict=True):
            assert part.dtype == jnp.float32 and part.shape == each.shape
            bound = 1.5 * (size * (3 + 2) * 2.0**-24 + 2 * BOUND)  # three axes and a phase
            assert np.all(np.abs(np.asarray(part, np.float64) - 1.5 * each) <= bound)

    @pytest.mark.parametrize("integers", [False, True])
    @pytest.mark.parametrize("heads", [(), (3,)])
    def test_gradients_of_matrices_phases_and_positions(self, heads, integers):
        """By central differences in float64, of numpy."""
        rng = np.random.default_rng(0)
        inv_freq, phase = rng.uniform(-1, 1, (*heads, 2, 4)), rng.uniform(-3, 3, (*heads, 4))
        positions = rng.integers(-5, 5, (6, 2)) + (0 if integers else 0.25)
        weight = rng.normal(size=(2, 6, *heads, 4))

        def loss(f, p, m):
            cos, sin = rope_jax.rotation(m, rope_jax.Frequencies(f, 1.5, p))
            return jnp.sum(cos * jnp.asarray(weight[0], cos.dtype) + sin * jnp.asarray(weight[1], sin.dtype))

        def exact(f, p, m):
            angle = np.einsum("ta,...ai->t...i", m, f) + p
            return 1.5 * np.sum(np.cos(angle) * weight[0] + np.sin(angle) * weight[1])

        arguments = [inv_freq, phase, positions.astype(np.float64)]
        got = jax.grad(loss, argnums=(0, 1) if integers else (0, 1, 2))(
            jnp.asarray(inv_freq, jnp.float32),
            jnp.asarray(phase, jnp.float32),
            jnp.asarray(positions, jnp.int32 if integers else jnp.float32),
        )
        for i, gradient in enumerate(got):
            want = np.empty_like(arguments[i])
            for index in np.ndindex(want.shape):
                step = np.zeros_like(want)
                step[index] = 1e-5
                up, down = (
                    exact(*(a + s * step if j == i else a for j, a in enumerate(arguments))) for s in (1, -1)
                )
                want[index] = (up - down) / 2e-5
            np.testing.assert_allclose(gradient, want, atol=2e-4)

    def test_a_learned_phase_keeps_the_frequencies_exact(self):
        positions, inv_freq = coordinates(2), dense(2, 4)
        phase = jnp.asarray([0.5, -2.0, 3.0, 100.0])
        frequencies = lambda p: rope_jax.Frequencies(inv_freq, 1.5, p)
        got = jax.jit(lambda p: rope_jax.rotation(jnp.asarray(positions), frequencies(p)))(phase)
        assert_exact(got, oracles.mp_waves(positions, inv_freq, phase), 1.5, bound=LEARNED_PHASE)
        weight = np.random.default_rng(0).normal(size=(2, len(positions), 4))
        loss = lambda p: sum(
            jnp.sum(part * jnp.asarray(w, jnp.float32))
            for part, w in zip(rope_jax.rotation(jnp.asarray(positions), frequencies(p)), weight, strict=True)
        )
        cos, sin = oracles.mp_waves(positions, inv_freq, phase)
        np.testing.assert_allclose(
            jax.grad(loss)(phase), 1.5 * (weight[1] * cos - weight[0] * sin).sum(0), atol=2e-4
        )

    def test_phases_of_any_floating_dtype(self):
        positions = jnp.arange(3)
        for phase in (jnp.array([0.5, 2.0], jnp.bfloat16), jnp.array([0.5, 2.0], jnp.float16)):
            got = rope_jax.rotation(positions, rope_jax.Frequencies([0.3, 0.1], phase=phase))
            assert_exact(
                got, oracles.mp_waves(np.arange(3)[:, None], [[0.3, 0.1]], [0.5, 2.0]), bound=LEARNED_PHASE
            )
        with jax.enable_x64(True):
            phase = jnp.array([1e9, -1e9], jnp.float64)
            got = rope_jax.rotation(positions, rope_jax.Frequencies([0.3, 0.1], phase=phase))
        want = oracles.mp_waves(np.arange(3)[:, None], [[0.3, 0.1]], [1e9, -1e9])
        assert_exact(got, want, bound=LEARNED_PHASE)

    @pytest.mark.parametrize("shape", [(2, 4), (2, 2, 4), (2, 3, 2, 4)])
    def test_frequencies_of_each_row(self, shape):
        """``num_batch_axes`` tells ``[B, R/2]`` from ``[A, R/2]``, and ``[B, A, R/2]`` from ``[N, A, R/2]``."""
        rng = np.random.default_rng(0)
        inv_freq, phase = (
            rng.uniform(-1, 1, shape),
            rng.uniform(-1, 1, (*shape[:-2], 4) if len(shape) > 2 else (2, 4)),
        )
        frequencies = rope_jax.Frequencies(
            jnp.asarray(inv_freq, jnp.float32), 1.0, jnp.asarray(phase, jnp.float32), 1
        )
        assert frequencies.num_axes == (1 if len(shape) == 2 else 2) and frequencies.leading_shape == (2,)
        assert frequencies.num_heads == (3 if len(shape) == 4 else None)
        positions = rng.integers(0, 9, (2, 5) if len(shape) == 2 else (2, 5, 2))
        got = rope_jax.rotation(positions, frequencies)
        for row in (0, 1):
            m = positions[row].reshape(5, -1)
            angle = np.einsum("ta,...ai->t...i", m, inv_freq[row].reshape(*shape[1:-2], m.shape[1], 4)) + phase[row]
            np.testing.assert_allclose(got.cos[row], np.cos(angle), atol=1e-5)
            np.testing.assert_allclose(got.sin[row], np.sin(angle), atol=1e-5)
        with pytest.raises(ValueError, match=r"must have the same axes, got \(3,\) and \(2,\)"):
            rope_jax.rotation(np.zeros((3, *positions.shape[1:]), int), frequencies)


# One product of two rotations in float32 beside the contract.
LEARNED_PHASE = 3e-7


class TestValues:
    def test_axes_heads_and_phases_count(self):
        one = rope_jax.Frequencies([[1.0, 0.5]], phase=[0.0, 1.0])
        assert (
            one == rope_jax.Frequencies(np.array([[1.0, 0.5]]), phase=(0, 1))
            and len({one, dataclasses.replace(one)}) == 1
        )
        for other in (
            rope_jax.Frequencies([[1.0, 0.5]]),
            rope_jax.Frequencies([1.0, 0.5], phase=[0.0, 1.0]),
            rope_jax.Frequencies([[1.0, 0.5]], phase=[0.0, 1.5]),
            rope_jax.Frequencies([[[1.0, 0.5]]], phase=[[0.0, 1.0]]),
        ):
            assert one != other
        copy = pickle.loads(pickle.dumps(one))
        assert copy == one and hash(copy) == hash(one)
        with pytest.raises(ValueError, match="read-only"):
            copy.phase[0] = 1.0

    def test_repr(self):
        shown = repr(rope_jax.Frequencies([[1.0, 0.0], [0.0, 0.5]], phase=[0.0, 1.0]))
        assert "phase=[0., 1.]" in shown and "[[1. , 0. ]" in shown
        batched = rope_jax.Frequencies(jnp.ones((2, 3)), num_batch_axes=1)
        assert repr(batched) == "Frequencies(<jax float32[2, 3]>, attention_factor=1.0, num_batch_axes=1)"

    def test_sizes(self):
        for shape, axes, heads in (((4,), 1, None), ((1, 4), 1, None), ((3, 4), 3, None), ((5, 3, 4), 3, 5)):
            for make in (np.ones, jnp.ones):
                frequencies = rope_jax.Frequencies(make(shape))
                assert (frequencies.num_pairs, frequencies.num_axes, frequencies.num_heads) == (4, axes, heads)
                assert frequencies.on_host is (make is np.ones)
        assert not rope_jax.Frequencies(np.ones(4), phase=jnp.ones(4)).on_host

    def test_a_learned_phase_has_no_hash(self):
        with pytest.raises(TypeError, match="cannot be hashed or compared"):
            hash(rope_jax.Frequencies([1.0], phase=jnp.ones(1)))


FREQUENCIES = (
    "inv_freq must be \\[R/2\\], \\[A, R/2\\] or \\[N, A, R/2\\], after num_batch_axes axes of a jax array, "
)
TWO_AXES = rope_jax.Frequencies([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rope_jax.Frequencies(np.ones((1, 2, 3, 4))), ValueError, FREQUENCIES + r"got shape \(1, 2, 3, 4\) and num_batch_axes=0"),
        (lambda: rope_jax.Frequencies(np.ones((0, 4))), ValueError, FREQUENCIES + r"got shape \(0, 4\)"),
        (lambda: rope_jax.Frequencies(np.ones((2, 4)), num_batch_axes=1), ValueError, FREQUENCIES + ".* and num_batch_axes=1"),
        (lambda: rope_jax.Frequencies(jnp.ones(4), num_batch_axes=1), ValueError, FREQUENCIES + ".* and num_batch_axes=1"),
        (lambda: rope_jax.Frequencies(jnp.ones(4), num_batch_axes=-1), ValueError, "num_batch_axes must be at least 0, got -1"),
        (
            lambda: rope_jax.Frequencies(np.ones((2, 4)), phase=jnp.ones(4), num_batch_axes=1),
            ValueError,
            FREQUENCIES + ".* and num_batch_axes=1",
        ),
        (lambda: rope_jax.Frequencies([[1.0], [1.0, 2.0]]), ValueError, "inv_freq must be numbers of one shape"),
        (lambda: rope_jax.Frequencies([1.0], phase=[np.inf]), ValueError, "phase must be finite numbers below 2\\^64"),
        (lambda: rope_jax.Frequencies([1.0], phase=[1.0, 2.0]), ValueError, r"phase must have shape \(1,\), got \(2,\)"),
        (
            lambda: rope_jax.Frequencies(np.ones((3, 2, 4)), phase=np.ones(4)),
            ValueError,
            r"phase must have shape \(3, 4\), got \(4,\)",
        ),
        (lambda: rope_jax.Frequencies([1.0], phase=jnp.ones(1, int)), TypeError, "phase must be floating, got dtype int32"),
        (
            lambda: rope_jax.rotation(jnp.zeros((4, 3), int), TWO_AXES),
            ValueError,
            r"positions must be \[\.\.\., T, A=2\] for frequencies of 2 position axes, got shape \(4, 3\): pass a coordinate",
        ),
        (lambda: rope_jax.rotation(jnp.zeros(2, int), TWO_AXES), ValueError, r"A=2\] .* got shape \(2,\)"),
        (lambda: rope_jax.rotation(jnp.zeros((3, 2), jnp.bfloat16), TWO_AXES), TypeError, "got dtype bfloat16"),
        (
            lambda: rope_jax.rotation(jnp.zeros((3, 4, 2), int), FrequencyChoice((TWO_AXES,) * 2, jnp.zeros(2, int))),
            ValueError,
            r"must have the same axes, got \(3,\) and \(2,\)",
        ),
        (lambda: rope_jax.Rotation(jnp.ones((1, 1)), jnp.ones((1, 1))).prepend_identity(-1), ValueError, "num_tokens must be at least 0, got -1"),
        (lambda: rope_jax.Rotation(jnp.ones((1, 1)), jnp.ones((1, 1))).prepend_identity(1.5), TypeError, "num_tokens must be an integer, got 1.5"),
        (lambda: rope_jax.Frequencies(np.ones(2) * 1j), TypeError, "inv_freq must be real numbers, got dtype complex128"),
        (lambda: rope_jax.Frequencies(["1.0", "2"]), TypeError, "inv_freq must be real numbers, got dtype <U3"),
        (lambda: FrequencyChoice((rope_jax.Frequencies([1.0]),) * 2, jnp.array([True])), TypeError, "index must be integers, got dtype bool"),
        (lambda: FrequencyChoice(([1.0],), jnp.array([0])), ValueError, "options must be one or more host Frequencies"),
    ],
)  # fmt: skip
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("heads", [False, True])
def test_prepend_identity(heads, num_tokens):
    frequencies = rope_jax.Frequencies(dense(3, 2, 4) if heads else dense(2, 4), 1.5)
    positions = jnp.asarray(coordinates(2, 4).reshape(2, 6, 2))
    rotation = rope_jax.rotation(positions, frequencies)
    longer = rotation.prepend_identity(num_tokens)
    for part, before, identity in zip(longer, rotation, (1.0, 0.0), strict=True):
        assert part.dtype == jnp.float32 and part.shape[1] == 6 + num_tokens
        assert np.all(np.asarray(part[:, :num_tokens]) == identity)
        np.testing.assert_array_equal(part[:, num_tokens:], before)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6 + num_tokens, 3, 8)), jnp.float32)
    rotated = rope_jax.rotate(x, longer)
    np.testing.assert_array_equal(rotated[:, :num_tokens], x[:, :num_tokens])
    np.testing.assert_array_equal(rotated[:, num_tokens:], rope_jax.rotate(x[:, num_tokens:], rotation))
