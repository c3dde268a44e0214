"""Schedules made of other schedules: the matrices that they deal, written out by hand, and what they refuse."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import rope_jax
from rope_jax import Affine, Axial, Linear, Negated, Rope, Sections, Standard
from rope_jax.core import FrequencyChoice

LONG = rope_jax.LongRope(short_factor=(1.0,) * 4, long_factor=(2, 3, 4, 5), factor=4.0, original_length=16)


def axes_of(frequencies):
    """The axis of each pair; each column has one entry."""
    assert np.all(np.count_nonzero(frequencies.inv_freq, axis=0) == 1)
    return np.argmax(frequencies.inv_freq != 0, axis=0).tolist()


class TestAxial:
    @pytest.mark.parametrize("sizes", [(16, 56, 56), (44, 42, 42), (32, 32), (8,), (2, 6)])
    def test_each_axis_has_its_own_ladder(self, sizes):
        inv_freq = Axial(sizes=sizes, schedule=Standard(base=300.0))(sum(sizes)).inv_freq
        want = np.zeros((len(sizes), sum(sizes) // 2))
        first = 0
        for axis, size in enumerate(sizes):
            for i in range(size // 2):
                want[axis, first + i] = 300.0 ** (-2 * i / size)
            first += size // 2
        np.testing.assert_allclose(inv_freq, want, rtol=64 * 2.0**-53)

    def test_columns_before_rows(self):
        inv_freq = Axial(sizes=(4, 8), schedule=Standard(base=100.0), axes=(1, 0))(12).inv_freq
        np.testing.assert_allclose(
            inv_freq, [[0, 0, *100.0 ** -np.array([0, 0.25, 0.5, 0.75])], [1, 0.1, 0, 0, 0, 0]], rtol=1e-14
        )

    def test_two_runs_of_one_axis(self):
        inv_freq = Axial(sizes=(2, 4, 2), axes=(0, 1, 0))(8).inv_freq
        np.testing.assert_allclose(inv_freq, [[1, 0, 0, 1], [0, 1, 0.01, 0]], rtol=1e-14)

    def test_a_schedule_for_each_axis_and_pairs_at_rest(self):
        schedules = [Standard(base=100.0), None, Linear(factor=4.0, base=100.0)]
        inv_freq = Axial(sizes=(4, 2, 4), schedule=schedules)(10).inv_freq
        np.testing.assert_allclose(inv_freq, [[1, 0.1, 0, 0, 0], [0, 0, 0, 0.25, 0.025]], rtol=1e-14)
        assert Axial(sizes=(4, 2, 4), schedule=schedules, axes=(0, 1, 2))(10).num_axes == 3
        assert np.all(Axial(sizes=(4, 4), schedule=(None, None))(8).inv_freq == 0)

    def test_alternating(self):
        inv_freq = Axial(sizes=(6, 6), schedule=Standard(base=1000.0), alternating=True)(12).inv_freq
        np.testing.assert_allclose(inv_freq, [[1, 0, 0.1, 0, 0.01, 0], [0, 1, 0, 0.1, 0, 0.01]], rtol=1e-14)

    def test_the_attention_factor_is_that_of_the_schedules(self):
        yarn = rope_jax.Yarn(factor=4.0, original_length=64)
        frequencies = Axial(sizes=(8, 8), schedule=(yarn, None))(16)
        assert frequencies.attention_factor == yarn(8).attention_factor != 1

    @pytest.mark.parametrize(
        ("call", "error", "says"),
        [
            (lambda: Axial(sizes=(3, 5)), ValueError, r"sizes must be even numbers of features, at least 2, got \(3, 5\)"),
            (lambda: Axial(sizes=(0, 8)), ValueError, r"at least 2, got \(0, 8\)"),
            (lambda: Axial(sizes=4), TypeError, "Axial: sizes must be a sequence of integers, got 4"),
            (lambda: Axial(sizes=4.0), TypeError, "Axial: sizes must be a sequence of integers, got 4.0"),
            (lambda: Axial(sizes=(4.5, 2)), TypeError, "Axial: sizes must be a sequence of integers"),
            (lambda: Axial(sizes=(True, 2)), TypeError, "Axial: sizes must be a sequence of integers"),
            (lambda: Axial(sizes=(4, 4))(10), ValueError, r"sizes must add up to rotary_dim 10, got \(4, 4\)"),
            (lambda: Axial(sizes=(4, 4), axes=(0,)), ValueError, r"an axis 0, 1, \.\.\. for each of 2 runs, got \(0,\)"),
            (lambda: Axial(sizes=(4, 4), axes=(0, 2)), ValueError, r"for each of 2 runs, got \(0, 2\)"),
            (lambda: Axial(sizes=(4, 4), axes=(0, -1)), ValueError, r"for each of 2 runs, got \(0, -1\)"),
            (lambda: Axial(sizes=(4, 4), axes=(1, 1)), ValueError, r"for each of 2 runs, got \(1, 1\)"),
            (lambda: Axial(sizes=(4, 4), schedule=(Standard(),)), ValueError, "schedule must be one, or one for each of 2 runs, got 1"),
            (lambda: Axial(sizes=(4, 8), alternating=True), ValueError, r"sizes must be equal if alternating, got \(4, 8\)"),
            (
                lambda: Axial(sizes=(4, 4), schedule=(Standard(), rope_jax.Yarn(factor=4.0, original_length=64)))(8),
                ValueError,
                r"schedules must have one attention factor, got \[1.0, 1.13",
            ),
            (lambda: Axial(sizes=(4, 4), schedule=Axial(sizes=(2, 2)))(8), ValueError, "must give host Frequencies of one axis"),
            (lambda: Axial(sizes=(4, 4), schedule=Affine(schedule=Standard(), offset=1))(8), ValueError, "must give host Frequencies of one axis"),
            (
                lambda: Axial(sizes=(8, 8), schedule=lambda r: FrequencyChoice((Standard()(r),) * 2, jnp.array(0)))(16),
                ValueError,
                "must give host Frequencies of one axis",
            ),
        ],
    )  # fmt: skip
    def test_refusals(self, call, error, says):
        with pytest.raises(error, match=says):
            call()


class TestSections:
    @pytest.mark.parametrize(
        ("order", "sections", "axes"),
        [
            ("runs", (2, 1, 1), [0, 0, 1, 2]),
            ("runs", (1, 0, 2), [0, 2, 2]),
            ("strided", (2, 2, 2), [0, 1, 2, 0, 1, 2]),
            ("strided", (4, 2, 2), [0, 1, 2, 0, 1, 2, 0, 0]),
            ("strided", (24, 20, 20), [0, 1, 2] * 20 + [0] * 4),  # Qwen3-VL
            ("strided", (3, 3), [0, 1] * 3),
            ("alternating", (20, 22, 22), [1, 2] * 22 + [0] * 20),  # Ernie 4.5 VL
            ("alternating", (1, 3, 1), [1, 2, 1, 1, 0]),
            ("alternating", (0, 2, 2), [1, 2, 1, 2]),
        ],
    )
    def test_orders(self, order, sections, axes):
        schedule = Sections(sections=sections, schedule=Standard(base=1e6), order=order)
        assert schedule.axis_of_pair == tuple(axes)
        rotary_dim = 2 * len(axes)
        inv_freq, _ = oracles.standard(rotary_dim, 1e6)
        want = np.zeros((len(sections), len(axes)))
        want[axes, np.arange(len(axes))] = inv_freq
        np.testing.assert_allclose(schedule(rotary_dim).inv_freq, want, rtol=64 * 2.0**-53)
        assert axes_of(schedule(rotary_dim)) == axes

    def test_equal_coordinates_are_text(self):
        ladder = rope_jax.Yarn(factor=4.0, original_length=64)
        text = np.random.default_rng(0).integers(-(2**31), 2**31, 20).astype(np.int32)
        got = Rope(16, Sections(sections=(3, 3, 2), schedule=ladder)).rotation(np.stack([text] * 3, -1))
        for part, want in zip(got, Rope(16, ladder).rotation(text), strict=True):
            np.testing.assert_array_equal(part, want)

    def test_context_lengths_go_to_the_inner_schedule(self):
        schedule = Sections(sections=(3, 1), schedule=LONG)
        assert schedule(8, 17).inv_freq[0, :3].tolist() == LONG(8, 17).inv_freq[:3].tolist()
        rope, at = Rope(8, schedule), jnp.array([[[5, 9]], [[5, 9]]])
        assert rope.needs_context_length and rope.num_axes == 2
        got = jax.jit(lambda n: rope.rotation(at, context_length=n))(jnp.array([16, 17]))
        for row, length in enumerate((16, 17)):
            cos, _ = oracles.mp_waves([[5, 9]], schedule(8, length).inv_freq)
            factor = LONG(8, length).attention_factor
            np.testing.assert_allclose(got.cos[row], factor * cos, atol=2e-7 * factor)
        fixed = Sections(sections=(3, 1), schedule=dataclasses.replace(LONG, context_length=17))
        assert not Rope(8, fixed).needs_context_length and fixed(8) == schedule(8, 17)
        with pytest.raises(ValueError, match="context_length must be left out: Sections does not depend on it"):
            Rope(8, Sections(sections=(3, 1))).frequencies(7)

    @pytest.mark.parametrize("x64", [False, True])
    def test_traced_frequencies_of_each_row(self, x64):
        dynamic = rope_jax.DynamicNTK(factor=2.0, original_length=16)
        sections = Sections(sections=(3, 1), schedule=dynamic)
        at = jnp.array([[[5, 9]], [[5, 9]]], jnp.int32)
        with jax.enable_x64(x64):
            lengths = jnp.array([64, 640], jnp.int32)
            for schedule, scale, offset in (
                (sections, 1, 0),
                (Affine(schedule=sections, scale=(0.5, 2), offset=(1, -0.25)), [0.5, 2], [1, -0.25]),
                (Sections(sections=(3, 1), schedule=Affine(schedule=dynamic, scale=0.5, offset=1.5)), 0.5, 1.5),
            ):
                for context_length in (lengths, lengths[0]):
                    got = jax.jit(lambda n, s=schedule: Rope(8, s).rotation(at, context_length=n))(context_length)
                    for row, length in enumerate((64, 640) if context_length.ndim else (64, 64)):
                        theta, _ = oracles.dynamic_ntk(8, 1e4, 2.0, 16, length)
                        read = (np.array([5.0, 9.0]) * scale + offset)[[0, 0, 0, 1]]
                        np.testing.assert_allclose(got.cos[row, 0], np.cos(read * theta), atol=1e-5)
                        np.testing.assert_allclose(got.sin[row, 0], np.sin(read * theta), atol=1e-5)

    @pytest.mark.parametrize(
        ("call", "error", "says"),
        [
            (lambda: Sections(sections=(4,)), ValueError, r"numbers of pairs, for two axes or more, got \(4,\)"),
            (lambda: Sections(sections=(0, 0)), ValueError, r"for two axes or more, got \(0, 0\)"),
            (lambda: Sections(sections=4), TypeError, "Sections: sections must be a sequence of integers, got 4"),
            (lambda: Sections(sections=(2, 2), order="rows"), ValueError, r"order must be one of \('runs', 'strided', 'alternating'\), got 'rows'"),
            (lambda: Sections(sections=(1, 3), order="strided"), ValueError, r"sections must suit the order 'strided', got \(1, 3\)"),
            (lambda: Sections(sections=(2, 2))(6), ValueError, r"sections must add up to R/2 = 3, got \(2, 2\)"),
            (lambda: Sections(sections=(2, 2), schedule=Axial(sizes=(4, 4)))(8), ValueError, "Sections: schedule must have one position axis, got Axial"),
        ],
    )  # fmt: skip
    def test_refusals(self, call, error, says):
        with pytest.raises(error, match=says):
            call()


class TestAffine:
    @pytest.mark.parametrize("size", [14, 1000])
    def test_centres_of_patches(self, size):
        """Centres of ``size`` patches in [-1, 1], from integers: (2 m + 1) / size - 1."""
        axial = Axial(sizes=(8, 8), schedule=Standard(base=100.0))
        schedule = Affine(schedule=axial, scale=2 / size, offset=1 / size - 1)
        grid = np.array([[0, 0], [size - 1, 0], [3, size // 2]])
        cos, sin = oracles.mp_waves((2 * grid + 1) / size - 1, axial(16).inv_freq)
        got = Rope(16, schedule).rotation(grid)
        for part, want in zip(got, (cos, sin), strict=True):
            assert np.abs(np.asarray(part, np.float64) - want).max() <= 1.2e-7

    def test_scale_and_offset_of_each_axis_at_far_positions(self):
        inner = Sections(sections=(2, 2, 2), order="strided")
        schedule = Affine(schedule=inner, scale=(0.5, 3.0, -1.25), offset=(1e3, 0.0, -0.125))
        frequencies = schedule(12)
        at = np.random.default_rng(0).integers(-(2**31), 2**31, (30, 3)).astype(np.int32)
        cos, sin = oracles.mp_waves(at * [0.5, 3.0, -1.25] + [1e3, 0.0, -0.125], inner(12).inv_freq)
        got = rope_jax.rotation(at, frequencies)
        # The frequencies are rounded to float64 after the scale: 2^-53 of up to 3 * 2^31 radians.
        for part, want in zip(got, (cos, sin), strict=True):
            assert np.abs(np.asarray(part, np.float64) - want).max() <= 1.2e-7 + 3 * 2.0**31 * 2.0**-53

    def test_only_a_scale_has_no_phase(self):
        assert Affine(schedule=Standard(), scale=0.25)(8) == rope_jax.Frequencies(Standard()(8).inv_freq / 4)

    def test_affine_of_affine_and_negated(self):
        inner = Affine(schedule=Standard(base=100.0), scale=3.0, offset=0.5)
        frequencies = Negated(schedule=Affine(schedule=inner, scale=2.0, offset=-1.0))(4)
        at = np.arange(-3, 9)
        angle = -((3 * (2 * at - 1) + 0.5)[:, None] * [1, 0.1])
        got = rope_jax.rotation(at, frequencies)
        np.testing.assert_allclose(got.cos, np.cos(angle), atol=1.5e-7)
        np.testing.assert_allclose(got.sin, np.sin(angle), atol=1.5e-7)

    def test_a_choice_of_frequencies(self):
        rope, at = Rope(8, Affine(schedule=LONG, scale=0.5, offset=2.0)), jnp.array([[7], [7]])
        assert rope.needs_context_length
        got = jax.jit(lambda n: rope.rotation(at, context_length=n))(jnp.array([16, 17]))
        for row, length in enumerate((16, 17)):
            inner = LONG(8, length)
            np.testing.assert_allclose(
                got.cos[row, 0], inner.attention_factor * np.cos(5.5 * inner.inv_freq), atol=3e-7
            )

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: Affine(schedule=Standard(), scale=np.inf), "Affine: scale must be finite, got inf"),
            (lambda: Affine(schedule=Standard(), offset=(0.0, np.nan)), "Affine: offset must be finite, got nan"),
            (lambda: Affine(schedule=Standard(), scale=(1, 2))(8), r"scale must be one, or one for each of A=1 axes, got \[1.0, 2.0\]"),
            (
                lambda: Affine(schedule=Axial(sizes=(4, 4)), offset=(1, 2, 3))(8),
                r"offset must be one, or one for each of A=2 axes, got \[1.0, 2.0, 3.0\]",
            ),
        ],
    )  # fmt: skip
    def test_refusals(self, call, says):
        with pytest.raises(ValueError, match=says):
            call()


SAID = [
    Rope(128, Axial(sizes=(16, 56, 56)), layout="interleaved"),
    Rope(128, Sections(sections=(24, 20, 20), schedule=Standard(base=5e6), order="strided")),
    Rope(64, Axial(sizes=(16, 8, 8), schedule=(Standard(), None, Linear(factor=2.0)), axes=(2, 1, 0)), rotary_dim=32, start=16),
    Rope(72, Affine(schedule=Axial(sizes=(36, 36)), scale=(0.5, 2.0), offset=0.25), blocks=2),
]  # fmt: skip


@pytest.mark.parametrize("rope", SAID, ids=["flux", "qwen3_vl", "rests", "patches"])
def test_what_is_printed_is_what_was_said(rope):
    assert eval(repr(rope), vars(rope_jax)) == rope and pickle.loads(pickle.dumps(rope)) == rope
    assert hash(pickle.loads(pickle.dumps(rope))) == hash(rope) and len({rope, dataclasses.replace(rope)}) == 1


def test_lists_and_tuples_are_alike():
    assert Axial(sizes=[4, 4], axes=[1, 0], schedule=[Standard(), None]) == Axial(
        sizes=(4, 4), axes=(1, 0), schedule=(Standard(), None)
    )
    assert Sections(sections=[2, 2]) == Sections(sections=np.array([2, 2]))
    one, two = Affine(schedule=Standard(), scale=[1, 2]), Affine(schedule=Standard(), scale=np.array([1.0, 2.0]))
    assert one == two and hash(one) == hash(two)
