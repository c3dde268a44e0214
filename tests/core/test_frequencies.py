import dataclasses
import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedules import CASES, IDS, LONG, ROTARY_DIM, SHORT

import rope_jax


@pytest.mark.parametrize("case", CASES, ids=IDS)
class TestEverySchedule:
    def test_equals_the_paper(self, case):
        frequencies = case.build()(ROTARY_DIM)
        inv_freq, attention_factor = case.oracle(ROTARY_DIM)
        # A dozen roundings, and powers whose exponent (up to log2(base) = 20) enlarges a rounding twentyfold.
        np.testing.assert_allclose(frequencies.inv_freq, inv_freq, rtol=64 * 2.0**-53)
        assert math.isclose(frequencies.attention_factor, attention_factor, rel_tol=8 * 2.0**-53)

    def test_is_host_float64_of_half_the_rotary_dim(self, case):
        for rotary_dim in (ROTARY_DIM, 2 * (ROTARY_DIM // 2)):
            inv_freq = case.build()(rotary_dim).inv_freq
            assert type(inv_freq) is np.ndarray and inv_freq.dtype == np.float64
            assert inv_freq.shape == (rotary_dim // 2,)
            turning = inv_freq[inv_freq != 0] if case.name == "proportional" else inv_freq
            assert np.all(turning > 0) and np.all(turning <= 1)

    def test_is_a_value(self, case):
        one, two = case.build(), case.build()
        assert one == two and hash(one) == hash(two) and eval(repr(one), vars(rope_jax.core)) == one
        assert pickle.loads(pickle.dumps(one)) == one
        assert one(ROTARY_DIM) == two(ROTARY_DIM) and hash(one(ROTARY_DIM)) == hash(two(ROTARY_DIM))
        changed = dataclasses.replace(one, base=one.base + 1)
        assert changed != one and changed(ROTARY_DIM) != one(ROTARY_DIM)
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.base = 3.0

    def test_factor_one_is_standard(self, case):
        np.testing.assert_allclose(
            case.neutral(ROTARY_DIM).inv_freq,
            rope_jax.Standard(base=3e3)(ROTARY_DIM).inv_freq,
            rtol=4 * 2.0**-53,
        )
        assert case.neutral(ROTARY_DIM).attention_factor == 1.0

    def test_rebuilt_it_is_traced_once(self, case):
        traces = []

        @lambda f: jax.jit(f, static_argnums=0)
        def f(rope, q, positions):
            traces.append(rope)
            return rope(q, q, positions)

        for _ in range(3):
            rope = rope_jax.Rope(ROTARY_DIM, case.build())
            f(rope, jnp.ones((1, 2, 1, ROTARY_DIM)), jnp.arange(2)[None])
        assert len(traces) == 1

    def test_odd_or_empty_rotary_dim(self, case):
        for rotary_dim in (7, 0, -2):
            with pytest.raises(ValueError, match=f"rotary_dim must be .*got {rotary_dim}"):
                case.build()(rotary_dim)


class TestTracedLength:
    def test_dynamic_ntk_follows_each_row_in_one_compilation(self):
        schedule = rope_jax.DynamicNTK(factor=3.0, original_length=1024)
        traces = []

        @jax.jit
        def f(length):
            traces.append(length)
            return schedule(ROTARY_DIM, length).inv_freq

        for lengths in ([1, 1023], [1024, 1025], [5000, 1_000_000]):
            got = f(jnp.array(lengths))
            for row, length in zip(np.asarray(got), lengths, strict=True):
                want = schedule(ROTARY_DIM, length).inv_freq
                # log1p, exp of an exponent up to ln(3000) = 8, and two products: under 16 roundings.
                np.testing.assert_allclose(row, want, rtol=16 * 2.0**-24)
        assert len(traces) == 1

    def test_longrope_chooses_per_row_and_stays_exact(self):
        schedule = rope_jax.LongRope(
            short_factor=SHORT, long_factor=LONG, original_length=100, factor=8.0, attention_factor=1.25
        )
        positions = jnp.array([2**31 - 1, -5, 0, 1_000_003])
        lengths = [100, 101, 7, 1 << 20]
        rotation = jax.jit(lambda length: rope_jax.rotation(positions, schedule(ROTARY_DIM, length)))
        got = rotation(jnp.array(lengths))
        for row, length in enumerate(lengths):
            want = rope_jax.rotation(positions, schedule(ROTARY_DIM, length))
            np.testing.assert_allclose(got.cos[row], want.cos, atol=2 * 1.2e-7 * 1.25)
            np.testing.assert_allclose(got.sin[row], want.sin, atol=2 * 1.2e-7 * 1.25)
        rotation(jnp.array([3, 3, 3, 101]))
        assert rotation._cache_size() == 1

    def test_each_option_keeps_its_attention_factor(self):
        options = (rope_jax.Frequencies([0.5], 2.0), rope_jax.Frequencies([0.25], 3.0))
        rotation = rope_jax.rotation(
            jnp.zeros((2, 1), int), rope_jax.core.FrequencyChoice(options, jnp.array([1, 0]))
        )
        assert rotation.cos.ravel().tolist() == [3.0, 2.0]

    def test_an_index_outside_is_nan(self):
        options = (rope_jax.Frequencies([0.5]), rope_jax.Frequencies([0.25]))
        for positions in (jnp.zeros((4, 1), int), jnp.zeros((4, 1))):
            choice = rope_jax.core.FrequencyChoice(options, jnp.array([0, 1, 2, -1]))
            assert np.isnan(rope_jax.rotation(positions, choice).cos).ravel().tolist() == [0, 0, 1, 1]

    def test_a_choice_crosses_jit(self):
        choice = rope_jax.core.FrequencyChoice(
            (rope_jax.Frequencies([0.5]), rope_jax.Frequencies([0.25])), jnp.array([1])
        )
        got = jax.jit(rope_jax.rotation)(jnp.array([[4]]), choice)
        np.testing.assert_allclose(got.cos, np.cos(1.0), atol=1.2e-7)

    def test_no_length_anywhere_is_an_error(self):
        for schedule in (
            rope_jax.DynamicNTK(factor=2.0, original_length=64),
            rope_jax.LongRope(short_factor=SHORT, long_factor=LONG, original_length=64, factor=2.0),
        ):
            with pytest.raises(ValueError, match=f"{type(schedule).__name__} needs a context_length"):
                schedule(ROTARY_DIM)
            with pytest.raises(ValueError, match="context_length must be at least 1 token, got 0"):
                schedule(ROTARY_DIM, 0)
            with pytest.raises(
                TypeError, match=r"context_length must be an integer or an integer array, got \[3\]"
            ):
                schedule(ROTARY_DIM, [3])
            with pytest.raises(ValueError, match="context_length must be at least 1 token, got -5"):
                dataclasses.replace(schedule, context_length=-5)
            np.testing.assert_array_equal(
                rope_jax.rotation(np.arange(2)[None], schedule(ROTARY_DIM, np.array([3]))).cos.shape, (1, 2, 32)
            )
            with pytest.raises(ValueError, match="context_length must be at least 1 token, got "):
                schedule(ROTARY_DIM, jnp.array([-3, 40]))
            with pytest.raises(TypeError, match="context_length must be integer, got dtype float32"):
                schedule(ROTARY_DIM, jnp.float32(3))


class TestYarn:
    def test_attention_factor_in_every_spelling(self):
        def factor(**kwargs):
            return rope_jax.Yarn(factor=40.0, original_length=4096, **kwargs)(ROTARY_DIM).attention_factor

        g = lambda m: 0.1 * m * math.log(40.0) + 1
        assert factor() == g(1)
        assert factor(attention_factor=1.7) == 1.7
        assert factor(mscale=0.707, mscale_all_dim=0.5) == g(0.707) / g(0.5)
        assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
        assert (
            factor(mscale=0.707) == factor(mscale=0.707, mscale_all_dim=0.0) == g(1)
        )  # 0 counts as not given, as in the reference
        assert factor(mscale=0.707, mscale_all_dim=0.5, attention_factor=1.7) == 1.7

    def test_ends_that_meet_make_a_step(self):
        # One pair band: everything below keeps its speed, everything above is interpolated, nothing is NaN.
        schedule = rope_jax.Yarn(factor=4.0, original_length=64, base=1e6, beta_fast=64, beta_slow=32)
        inv_freq = schedule(8).inv_freq
        ladder = rope_jax.core.geometric(8, 1e6)
        np.testing.assert_allclose(inv_freq[1:], ladder[1:] / 4)
        assert np.all(np.isfinite(inv_freq))


def test_llama3_with_equal_factors_is_a_step():
    # As Llama 4 Scout has it: pairs of at least a turn within the original length keep their speed.
    inv_freq = rope_jax.Llama3(factor=16.0, original_length=8192, high_freq_factor=1.0)(128).inv_freq
    ladder = rope_jax.core.geometric(128, 5e5)
    once = 8192 * ladder >= 2 * math.pi
    assert 0 < once.sum() < 64
    np.testing.assert_array_equal(inv_freq, np.where(once, ladder, ladder / 16))


def test_a_field_that_is_no_number():
    for value in ("4", None, True, [4.0]):
        with pytest.raises(TypeError, match="Yarn: factor must be a number, got"):
            rope_jax.Yarn(factor=value, original_length=4096)


class TestFrequencies:
    def test_is_a_value(self):
        one = rope_jax.Frequencies([1.0, 0.5], 1.5)
        assert one == rope_jax.Frequencies(np.array([1.0, 0.5]), 1.5)
        assert one != rope_jax.Frequencies([1.0, 0.5]) and one != rope_jax.Frequencies([1.0, 0.25], 1.5)
        assert one != "frequencies" and len({one, rope_jax.Frequencies([1.0, 0.5], 1.5)}) == 1
        copy = pickle.loads(pickle.dumps(one))
        assert copy == one
        for value in (one, copy):
            with pytest.raises(ValueError, match="read-only"):
                value.inv_freq[0] = 2.0
        assert repr(one) == "Frequencies([1. , 0.5], attention_factor=1.5)"

    def test_does_not_share_the_array_it_was_made_from(self):
        source = np.array([1.0, 0.5])
        frequencies = rope_jax.Frequencies(source)
        source[0] = 9.0
        assert frequencies.inv_freq[0] == 1.0

    def test_learned_ones_have_no_hash(self):
        learned = rope_jax.Frequencies(jnp.ones(4))
        assert repr(learned) == "Frequencies(<jax float32[4]>, attention_factor=1.0)"
        with pytest.raises(TypeError, match="cannot be hashed or compared"):
            hash(learned)
        with pytest.raises(TypeError, match="cannot be hashed or compared"):
            assert learned == learned

    @pytest.mark.parametrize("bad", [[], [[[[1.0]]]], [[1.0], []], [math.nan], [math.inf], [2.0**64], 1.0])
    def test_bad_frequencies(self, bad):
        with pytest.raises(ValueError, match="inv_freq must be"):
            rope_jax.Frequencies(bad)

    @pytest.mark.parametrize(
        ("bad", "says"),
        [(0.0, "positive and finite"), (-1.0, "positive and finite"), (math.nan, "finite"), (math.inf, "finite")],
    )
    def test_bad_factors(self, bad, says):
        with pytest.raises(ValueError, match=f"attention_factor must be {says}, got {bad}"):
            rope_jax.Frequencies([1.0], bad)

    def test_bad_jax_arrays(self):
        with pytest.raises(TypeError, match="inv_freq must be floating, got dtype int32"):
            rope_jax.Frequencies(jnp.ones(3, int))
        with pytest.raises(
            ValueError,
            match=r"inv_freq must be \[R/2\], \[A, R/2\] or \[N, A, R/2\], .* got shape \(\) and num_batch_axes=0",
        ):
            rope_jax.Frequencies(jnp.float32(1))

    def test_bad_choices(self):
        index = jnp.array([0])
        for options in (
            (),
            (rope_jax.Frequencies([1.0]), rope_jax.Frequencies([1.0, 2.0])),
            (rope_jax.Frequencies(jnp.ones(2)), rope_jax.Frequencies(jnp.ones(2))),
        ):
            with pytest.raises(ValueError, match="options must be one or more host Frequencies"):
                rope_jax.core.FrequencyChoice(options, index)


YARN = dict(factor=2.0, original_length=64)
LLAMA3 = dict(factor=2.0, original_length=64)
LONGROPE = dict(short_factor=SHORT, long_factor=LONG, original_length=64, factor=2.0, context_length=3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rope_jax.Standard(base=0.0), "Standard: base must be positive and finite, got 0.0"),
        (lambda: rope_jax.Standard(base=math.inf), "Standard: base must be positive and finite, got inf"),
        (
            lambda: rope_jax.Standard(base=np.float32(math.inf)),
            "Standard: base must be positive and finite, got inf",
        ),
        (lambda: rope_jax.Standard(base=10**400), "Standard: base must be positive and finite, got an integer of"),
        (lambda: rope_jax.Yarn(factor=2.0, original_length=64, mscale=-0.5), "Yarn: mscale must be at least 0 and"),
        (lambda: rope_jax.Linear(factor=0.5), "Linear: factor must be at least 1 and finite, got 0.5"),
        (lambda: rope_jax.Linear(factor=math.nan), "Linear: factor must be at least 1 and finite, got nan"),
        (lambda: rope_jax.NTKAware(factor=0.5), "NTKAware: factor must be at least 1"),
        (lambda: rope_jax.NTKAware(factor=2.0)(2), "rotary_dim must be at least 4 for an NTK-aware base, got 2"),
        (lambda: rope_jax.DynamicNTK(factor=0.5, original_length=8), "DynamicNTK: factor must be at least 1"),
        (lambda: rope_jax.DynamicNTK(factor=2, original_length=0), "original_length must be at least 1"),
        (lambda: rope_jax.Yarn(**YARN | {"factor": 0.9}), "Yarn: factor must be at least 1"),
        (lambda: rope_jax.Yarn(**YARN, beta_fast=1, beta_slow=2), "Yarn: beta_fast must be at least 2"),
        (lambda: rope_jax.Yarn(**YARN, beta_slow=0), "Yarn: beta_slow must be positive"),
        (lambda: rope_jax.Yarn(**YARN, base=1.0), "Yarn: base must be above 1, got 1.0"),
        (lambda: rope_jax.Yarn(**YARN, attention_factor=-1.0), "Yarn: attention_factor must be positive"),
        (lambda: rope_jax.LongRope(**LONGROPE | {"factor": 0.5}), "LongRope: factor must be at least 1"),
        (
            lambda: rope_jax.LongRope(**LONGROPE | {"short_factor": [0.0]}),
            "LongRope: short_factor must hold positive",
        ),
        (lambda: rope_jax.LongRope(**LONGROPE)(8), "short_factor must have R/2 = 4 numbers .* got 32"),
        (lambda: rope_jax.Llama3(**LLAMA3 | {"factor": 0.5}), "Llama3: factor must be at least 1"),
        (
            lambda: rope_jax.Llama3(**LLAMA3, high_freq_factor=0.5),
            "high_freq_factor must be at least 1.0 and finite, got 0.5",
        ),
        (lambda: rope_jax.Proportional(proportion=0.0), "Proportional: proportion must be positive"),
        (lambda: rope_jax.Proportional(proportion=1.5), "proportion must be at most 1, got 1.5"),
        (lambda: rope_jax.core.geometric(8, -1.0), "base must be positive and finite, got -1.0"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("field", "says"), [("mscale", "a number"), ("mscale_all_dim", "a number"), ("truncate", "True or False")]
)
def test_yarn_takes_no_array(field, says):
    with pytest.raises(TypeError, match=f"Yarn: {field} must be {says}, got ndarray int64 of shape"):
        rope_jax.Yarn(factor=2.0, original_length=64, **{field: np.zeros((2, 9), np.int64)})


def test_misspelled_hyperparameter():
    with pytest.raises(TypeError, match="orignal_length"):
        rope_jax.Yarn(factor=2.0, orignal_length=64)


class TestSchedulesOfSchedules:
    def test_negated_rotates_backwards(self):
        forward = rope_jax.Yarn(factor=4.0, original_length=32_768, base=1e6)
        backward = rope_jax.Negated(schedule=forward)(ROTARY_DIM)
        assert backward == rope_jax.Frequencies(-forward(ROTARY_DIM).inv_freq, forward(ROTARY_DIM).attention_factor)
        positions = jnp.array([0, 1, -7, 1_000_003, 2**31 - 1])
        ours = rope_jax.rotation(positions, backward)
        # 1.2e-7 on either side, of a factor above 1.
        atol = 2 * 1.2e-7 * backward.attention_factor
        theirs = rope_jax.rotation(positions, forward(ROTARY_DIM))
        np.testing.assert_allclose(ours.cos, theirs.cos, atol=atol)
        np.testing.assert_allclose(ours.sin, -theirs.sin, atol=atol)
        assert np.max(np.abs(theirs.sin)) > 1

    def test_negated_passes_the_context_length_on(self):
        inner = rope_jax.LongRope(short_factor=SHORT, long_factor=LONG, original_length=100, factor=8.0)
        rope = rope_jax.Rope(ROTARY_DIM, rope_jax.Negated(schedule=inner))
        assert rope.frequencies(101).inv_freq.tolist() == (-inner(ROTARY_DIM, 101).inv_freq).tolist()
        rotation = jax.jit(lambda length: rope.rotation(jnp.array([[3], [3]]), context_length=length))(
            jnp.array([100, 101])
        )
        for row, length in enumerate((100, 101)):
            want = rope_jax.rotation(jnp.array([-3]), inner(ROTARY_DIM, length))
            np.testing.assert_allclose(rotation.sin[row], want.sin, atol=4 * 1.2e-7)
        with pytest.raises(ValueError, match="context_length must be left out: Negated does not depend on it"):
            rope_jax.Rope(8, rope_jax.Negated(schedule=rope_jax.Standard())).frequencies(7)

    def test_axial_repeats_the_frequencies_for_each_axis(self):
        for num_axes, rotary_dim in [(1, 8), (2, 72), (3, 12)]:
            sizes = (rotary_dim // num_axes,) * num_axes
            got = rope_jax.Axial(sizes=sizes, schedule=rope_jax.Linear(factor=2.0, base=100.0))(rotary_dim)
            pairs = rotary_dim // num_axes // 2
            want = np.zeros((num_axes, num_axes, pairs))
            for axis in range(num_axes):
                want[axis, axis] = [100.0 ** (-i / pairs) / 2.0 for i in range(pairs)]
            np.testing.assert_allclose(got.inv_freq, want.reshape(num_axes, -1), rtol=8 * 2.0**-53)

    def test_axial_rotates_by_rows_and_columns(self):
        rope = rope_jax.Rope(8, rope_jax.Axial(sizes=(4, 4), schedule=rope_jax.Standard(base=100.0)))
        grid = np.array([[row, column] for row in range(3) for column in range(5)])
        angles = np.concatenate([grid[:, :1] * [1.0, 0.1], grid[:, 1:] * [1.0, 0.1]], axis=1)
        rotation = rope.rotation(rope_jax.grid_positions(3, 5))
        np.testing.assert_allclose(rotation.cos, np.cos(angles), atol=1.2e-7)
        np.testing.assert_allclose(rotation.sin, np.sin(angles), atol=1.2e-7)

    @pytest.mark.parametrize("inner", [rope_jax.Standard(base=3e3), rope_jax.Proportional(proportion=0.5)])
    @pytest.mark.parametrize(
        "outer",
        [
            functools.partial(rope_jax.Axial, sizes=[4, 8], axes=[1, 0]),
            functools.partial(rope_jax.Sections, sections=[2, 1, 1], order="strided"),
            functools.partial(rope_jax.Affine, scale=[0.5, 2], offset=-1),
            rope_jax.Negated,
        ],
        ids=["Axial", "Sections", "Affine", "Negated"],
    )
    def test_they_are_values(self, outer, inner):
        one, two = outer(schedule=inner), outer(schedule=inner)
        assert one == two and hash(one) == hash(two) and eval(repr(one), vars(rope_jax.core)) == one
        assert pickle.loads(pickle.dumps(one)) == one and one != outer(schedule=rope_jax.Standard())

    def test_axial_refuses(self):
        with pytest.raises(ValueError, match=r"Axial: sizes must add up to rotary_dim 6, got \(4, 4\)"):
            rope_jax.Axial(sizes=(4, 4), schedule=rope_jax.Standard())(6)
        with pytest.raises(
            ValueError, match=r"Axial: sizes must be even numbers of features, at least 2, got \(\)"
        ):
            rope_jax.Axial(sizes=(), schedule=rope_jax.Standard())
        with pytest.raises(ValueError, match="Axial: schedule must give host Frequencies"):
            schedule = lambda rotary_dim: rope_jax.Frequencies(jnp.ones(rotary_dim // 2))
            rope_jax.Axial(sizes=(4, 4), schedule=schedule)(8)

    def test_longrope_has_a_factor_for_each_list(self):
        schedule = rope_jax.LongRope(
            short_factor=SHORT, long_factor=LONG, original_length=100, factor=8.0, attention_factor=1.1
        )
        assert schedule(ROTARY_DIM, 101).attention_factor == 1.1
        schedule = dataclasses.replace(schedule, long_attention_factor=1.3)
        assert [schedule(ROTARY_DIM, length).attention_factor for length in (100, 101)] == [1.1, 1.3]
        rotation = rope_jax.rotation(jnp.zeros((2, 1), int), schedule(ROTARY_DIM, jnp.array([100, 101])))
        np.testing.assert_allclose(rotation.cos[:, 0, 0], [1.1, 1.3], atol=1.3 * 1.2e-7)
        with pytest.raises(ValueError, match="LongRope: long_attention_factor must be positive"):
            dataclasses.replace(schedule, long_attention_factor=0.0)
