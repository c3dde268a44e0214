import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest
from schedules import CASES, IDS, ROTARY_DIM

import rope_jax
from rope_jax import analysis

U = 2.0**-53  # unit roundoff of float64
FAR = np.array([0, 1, -1, 7, -64, 4095, 10**6, -(10**6) - 1, 2**31 - 1, -(2**31), 2**40 + 1, -(2**45)])
STANDARD = rope_jax.Standard(base=5e5)(ROTARY_DIM)
each_schedule = pytest.mark.parametrize("case", CASES, ids=IDS)


def allowed(frequencies, distances):
    """What the docstring of mean_score allows, for an attention factor of 1."""
    return np.abs(np.asarray(distances, np.float64)) * 2.0**-62 + (2 * frequencies.num_pairs + 16) * U


def assert_within(got, want, error):
    assert got.dtype == np.float64 and got.shape == np.shape(want)
    worst = np.max(np.abs(got - want) / error)
    assert worst <= 1, worst


# ------------------------------------------------------------------------------------ one pair by itself


@each_schedule
def test_one_pair_by_itself(case):
    inv_freq, _ = case.oracle(ROTARY_DIM)
    frequencies, length = case.build()(ROTARY_DIM), 8192
    with mpmath.workdps(30):
        wavelength = [float(2 * mpmath.pi / f) if f else math.inf for f in inv_freq]
        turns = [float(length * mpmath.mpf(f) / (2 * mpmath.pi)) for f in inv_freq]
    # the schedule itself is in float64 on both sides, by different formulas
    np.testing.assert_allclose(analysis.wavelengths(frequencies), wavelength, rtol=1e-13)
    np.testing.assert_allclose(analysis.effective_context(frequencies), np.array(wavelength) / 2, rtol=1e-13)
    np.testing.assert_allclose(analysis.turns(frequencies, length), turns, rtol=1e-13)
    got = analysis.incomplete_pairs(frequencies, length)
    assert got.dtype == bool and got.tolist() == [w > length for w in wavelength]
    assert 0 < got.sum() < got.size


def test_negative_and_zero_frequencies():
    frequencies = rope_jax.Frequencies([-2 * np.pi / 10, 0.0, 5e-324])
    assert analysis.wavelengths(frequencies).tolist() == [10.0, np.inf, np.inf]
    assert analysis.turns(frequencies, 25).round(300).tolist() == [2.5, 0.0, 0.0]
    # ten tokens are one whole turn
    assert [analysis.incomplete_pairs(frequencies, length).tolist() for length in (9, 10)] == [
        [True] * 3,
        [False, True, True],
    ]


def test_the_score_falls_up_to_half_a_wavelength():
    theta = STANDARD.inv_freq[20]
    one = rope_jax.Frequencies([theta])
    (half,) = analysis.effective_context(one)
    score = lambda distances: [math.cos(d * theta) for d in distances]
    falls, rises = score(np.linspace(0, half, 50)), score(np.linspace(half, 2 * half, 50))
    assert np.all(np.diff(falls) < 0) and np.all(np.diff(rises) > 0)
    assert score([half * 0.7])[0] == pytest.approx(score([half * 1.3])[0], abs=1e-12)  # ambiguous beyond


# ---------------------------------------------------------------------------------- all pairs, by distance


@each_schedule
def test_mean_score_at_any_whole_distance(case):
    frequencies = case.build()(ROTARY_DIM)
    square = frequencies.attention_factor**2
    cos, _ = oracles.cos_sin(FAR, frequencies.inv_freq)
    want = square * cos.mean(-1)
    error = square * allowed(frequencies, FAR)
    assert_within(analysis.mean_score(frequencies, FAR), want, error)
    assert_within(analysis.mean_score(frequencies, FAR.astype(np.float64)), want, error)
    assert_within(analysis.mean_score(frequencies, FAR.reshape(3, 4)), want.reshape(3, 4), error.reshape(3, 4))
    assert analysis.mean_score(frequencies, 0) == square


def test_mean_score_between_tokens():
    distances = np.array([0.5, -2.25, 1e6 + 0.125, 2**31 - 0.75, -1e-300, 1 / 3])
    frequencies = rope_jax.Frequencies(rope_jax.Standard()(16).inv_freq, 1.25)
    with mpmath.workdps(50):
        want = [
            float(
                1.25**2 * mpmath.fsum(mpmath.cos(mpmath.mpf(d) * mpmath.mpf(f)) for f in frequencies.inv_freq) / 8
            )
            for d in distances.tolist()
        ]
    error = 1.25**2 * (allowed(frequencies, distances) + U)
    assert_within(analysis.mean_score(frequencies, distances), want, error)


def test_distances_of_every_dtype_up_to_the_last():
    one = rope_jax.Frequencies([math.pi * 2.0**-62])  # 2^62 tokens are half a turn; in 64 bits of a turn it is a 2
    for distance, want in (
        (2**62, -1.0),
        (2**63 - 1, 1.0),
        (-(2**63), 1.0),
        (np.uint64(2**62), -1.0),
        (2.0**61, 0.0),
    ):
        assert analysis.mean_score(one, distance) == pytest.approx(want, abs=4 * U)
    small = [analysis.mean_score(STANDARD, np.array([5], dtype)) for dtype in ("i1", "u1", "u8", "f2", "f4", "f8")]
    assert len({float(x[0]) for x in small}) == 1


@each_schedule
def test_decay_bound(case):
    frequencies = case.build()(ROTARY_DIM)
    cos, sin = oracles.cos_sin(FAR, frequencies.inv_freq)
    want = [np.mean([abs(sum(z[:j])) for j in range(1, z.size + 1)]) for z in cos + 1j * sin]
    got = analysis.decay_bound(frequencies, FAR)
    assert_within(got, want, frequencies.num_pairs * allowed(frequencies, FAR))
    assert got[0] == (frequencies.num_pairs + 1) / 2


def test_decay_bound_bounds_every_score():
    rng = np.random.default_rng(0)
    rope = rope_jax.Rope(head_dim=32, schedule=rope_jax.Standard(), layout="interleaved")
    distances = np.arange(-300, 300)
    fading = np.repeat(np.sqrt(np.arange(16, 0, -1)), 2) / math.sqrt(2)  # each product one less than the one before
    for q, k in [(fading, fading), *rng.normal(size=(20, 2, 32))]:
        h = np.append((q[::2] + 1j * q[1::2]) * np.conj(k[::2] + 1j * k[1::2]), 0)
        bound = 16 * np.abs(np.diff(h)).max() * analysis.decay_bound(rope.frequencies(), distances)
        score = np.abs(analysis.score_kernel(q, k, rope, distances))
        assert np.all(score <= bound * (1 + 1e-12))
        if q is fading:  # the bound is reached
            assert score[300] == pytest.approx(bound[300], rel=1e-12)


# -------------------------------------------------------------------------------------------- one query, one key


def dealt(axes):
    """A schedule of one ladder, where pair i reads the position axis ``axes[i]``."""

    def schedule(rotary_dim):
        is_read = np.arange(max(axes) + 1)[:, None] == np.array(axes)
        return rope_jax.Frequencies(np.where(is_read, rope_jax.Standard()(rotary_dim).inv_freq, 0))

    return schedule


ROPES = {
    "half": rope_jax.Rope(32, rope_jax.Standard()),
    "interleaved": rope_jax.Rope(32, rope_jax.Standard(), layout="interleaved"),
    "partial": rope_jax.Rope(48, rope_jax.Standard(), rotary_dim=32),
    "partial, interleaved": rope_jax.Rope(48, rope_jax.Standard(), rotary_dim=32, layout="interleaved"),
    "a of 1.14": rope_jax.Rope(32, rope_jax.Yarn(factor=4.0, original_length=2048)),
    "negated": rope_jax.Rope(32, rope_jax.Negated(schedule=rope_jax.Standard())),
    "axes": rope_jax.Rope(32, dealt((0, 1, 2, 2) * 4)),
    "axes, partial": rope_jax.Rope(48, dealt((1,) * 6 + (0,) * 10), 32, "interleaved"),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_score_kernel_is_the_score_of_rotated_features(rope):
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(2, rope.head_dim)).astype(np.float32)
    frequencies = rope.frequencies()
    shape = (40,) if rope.num_axes == 1 else (40, rope.num_axes)
    m, n = rng.integers(-50, 50, (2, *shape)).astype(np.int32)
    m[:20] += 10**6
    got = analysis.score_kernel(q, k, rope, m - n)

    def rotated(x, positions):
        matrix = np.atleast_2d(frequencies.inv_freq)
        axes = np.argmax(matrix != 0, axis=0)
        read = np.stack([np.atleast_2d(positions.T)[axis] for axis in axes], -1)  # [40, R/2]
        angles = [oracles.cos_sin(read[:, i], [matrix[axis, i]]) for i, axis in enumerate(axes)]
        cos, sin = (frequencies.attention_factor * np.concatenate(part, -1) for part in zip(*angles, strict=True))
        return oracles.rotate_features(np.tile(x, (40, 1, 1)), cos, sin, rope.layout)[:, 0]

    size = frequencies.attention_factor**2 * float(np.abs(q).max() * np.abs(k).max()) * rope.head_dim
    assert_within(got, (rotated(q, m) * rotated(k, n)).sum(-1), size * (1e6 * 2.0**-61 + 64 * U))
    # and of what the rope does in float32: four roundings of each product, and cos and sin to 1.2e-7
    ours, theirs = rope(*(jnp.tile(jnp.asarray(x), (40, 1, 1)) for x in (q, k)), m)
    other = rope(*(jnp.tile(jnp.asarray(x), (40, 1, 1)) for x in (q, k)), n)[1]
    assert theirs.shape == other.shape
    scores = (np.asarray(ours, np.float64) * np.asarray(other, np.float64)).sum((-1, -2))
    assert np.abs(scores - got).max() <= size * 8 * oracles.EPS32


WAVES = {
    "axial from a feature": rope_jax.Rope(24, rope_jax.Axial(sizes=(8, 8)), rotary_dim=16, start=5),
    "blocks": rope_jax.Rope(16, rope_jax.Axial(sizes=(8, 8)), blocks=2),
    "phases": rope_jax.Rope(
        16, rope_jax.Affine(schedule=rope_jax.Axial(sizes=(8, 8)), scale=0.5, offset=(3, -0.25))
    ),
    "dense": rope_jax.Rope(
        16,
        lambda r: rope_jax.Frequencies(np.random.default_rng(0).uniform(-1, 1, (3, r // 2)), 1.5),
        layout="interleaved",
    ),
}


@pytest.mark.parametrize("name", WAVES)
def test_score_kernel_of_wave_vectors(name):
    """Against mpmath and a loop over pairs. A phase falls out of the difference of two rotations."""
    rope = WAVES[name]
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(2, rope.head_dim))
    frequencies = rope.frequencies()
    distances = rng.integers(-(10**6), 10**6, (4, 5, rope.num_axes))
    got = analysis.score_kernel(q, k, rope, distances)
    cos, sin = oracles.mp_waves(distances.reshape(20, -1), frequencies.inv_freq)
    first, second = {
        "axial from a feature": ([5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]),
        "blocks": ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
        "phases": (range(8), range(8, 16)),
        "dense": (range(0, 16, 2), range(1, 16, 2)),
    }[name]
    want = sum(x * y for i, (x, y) in enumerate(zip(q, k, strict=True)) if i not in {*first, *second}) * np.ones(20)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        same, across = q[a] * k[a] + q[b] * k[b], q[a] * k[b] - q[b] * k[a]
        want += frequencies.attention_factor**2 * (same * cos[:, i] + across * sin[:, i])
    np.testing.assert_allclose(got, want.reshape(4, 5), atol=1e-11)
    # and of what the rope does, to the rounding of float32
    n = rng.integers(-(10**6), 10**6, (20, rope.num_axes)).astype(np.int32)
    at = (n + distances.reshape(20, -1)).astype(np.int32)
    x, y = (jnp.tile(jnp.asarray(each, jnp.float32), (20, 1, 1)) for each in (q, k))
    scores = np.sum(np.asarray(rope(x, x, at)[0], np.float64) * np.asarray(rope(y, y, n)[0], np.float64), (-1, -2))
    np.testing.assert_allclose(scores, want, atol=32 * rope.head_dim * oracles.EPS32)


@pytest.mark.parametrize("arithmetic", ["exact", "float32", "bfloat16"])
def test_phase_error_with_a_phase(arithmetic):
    inv_freq, phase, positions = [0.3, 1e-3, 0.0], [2.5, -100.0, 1e-4], np.array([0, 1, -7, 10**6])
    got = analysis.phase_error(rope_jax.Frequencies(inv_freq, 1.0, phase), positions, arithmetic)
    cos, sin = oracles.mp_waves(positions[:, None], [inv_freq], phase)
    if arithmetic == "exact":
        assert got.max() <= math.sqrt(2) * 1.2e-7 * 1.0001
        return
    kind = np.float32 if arithmetic == "float32" else jnp.bfloat16
    m, f, p = (np.asarray(x, np.float32).astype(kind) for x in (positions, inv_freq, phase))
    angle = (m[:, None] * f + p).astype(np.float64)
    np.testing.assert_allclose(got, np.abs(np.angle(np.exp(1j * angle) * (cos - 1j * sin))), atol=1e-9)


SEVERAL_AXES = rope_jax.Frequencies([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.1, 0.01]])


def test_score_kernel_with_a_context_length():
    rope = rope_jax.Rope(8, rope_jax.DynamicNTK(factor=2.0, original_length=64))
    x = jnp.arange(8, dtype=jnp.bfloat16)
    long, short = (float(analysis.score_kernel(x, x, rope, 9, context_length=length)) for length in (640, 64))
    cos, _ = oracles.cos_sin([9], oracles.dynamic_ntk(8, 1e4, 2.0, 64, 640)[0])
    weights = [i**2 + (i + 4) ** 2 for i in range(4)]
    assert long == pytest.approx(float(cos[0] @ weights), rel=1e-13) and abs(long - short) > 1


# ------------------------------------------------------------------------------------------------- aliases


@each_schedule
def test_aliases_one_distance_at_a_time(case):
    frequencies = case.build()(ROTARY_DIM)
    length = 600
    score = [float(x) for x in oracles.cos_sin(range(length), frequencies.inv_freq)[0].mean(-1)]
    low = next(d for d in range(1, length) if score[d + 1] > score[d])
    peaks = [
        d
        for d in range(low + 1, length)
        if score[d] > score[d - 1] and (d == length - 1 or score[d] >= score[d + 1])
    ]
    peaks.sort(key=lambda d: -score[d])
    for count in (1, 4, 10_000):
        distances, similarity = analysis.aliases(frequencies, length, count)
        assert distances.tolist() == peaks[:count]
        np.testing.assert_allclose(similarity, [score[d] for d in peaks[:count]], atol=1e-13)
    assert len(peaks) > 4


def test_aliases_of_a_single_pair():
    every_ten = rope_jax.Frequencies([2 * np.pi / 10, 0.0], attention_factor=2.0)
    distances, similarity = analysis.aliases(every_ten, 28, count=2)
    # 27, where the length ends, is on its way up; 10 and 20 are like 0
    assert sorted(distances.tolist()) == [10, 20] and similarity == pytest.approx([1, 1])
    assert analysis.aliases(every_ten, 28, count=9)[0].tolist()[2:] == [27]
    assert analysis.aliases(every_ten, 6, count=9)[0].tolist() == []  # it only falls
    assert analysis.aliases(rope_jax.Frequencies([0.0]), 6)[0].tolist() == []
    assert [len(part) for part in analysis.aliases(every_ten, 1)] == [0, 0]


# --------------------------------------------------------------------------------------------- arithmetics


def rounded(value: Fraction, bits: int) -> Fraction:
    """To the nearest binary float with so many significant bits, ties to even, in Python integers."""
    if value == 0:
        return value
    exponent = math.frexp(float(abs(value)))[1] - bits
    unit = Fraction(2) ** exponent
    return round(value / unit) * unit  # round() of a Fraction goes to even


def wrapped(angle, true):
    with mpmath.workdps(60):
        turn = 2 * mpmath.pi
        off = mpmath.fmod(angle - true, turn)
        return float(min(abs(off), turn - abs(off)))


@pytest.mark.parametrize("arithmetic", ["exact", "bfloat16_table", "float32", "bfloat16"])
@each_schedule
def test_phase_error(case, arithmetic):
    frequencies = case.build()(ROTARY_DIM)
    positions = np.array([0, 1, -5, 257, 8191, 10**6 + 3, 2**24 + 1, 2**31 - 1, -(2**31)], np.int32)
    want = np.empty((positions.size, frequencies.num_pairs))
    rotation = rope_jax.rotation(positions, frequencies)
    for row, m in enumerate(positions.tolist()):
        for i, theta in enumerate(frequencies.inv_freq.tolist()):
            if arithmetic in ("exact", "bfloat16_table"):
                cos, sin = (Fraction(float(part[row, i])) for part in rotation)
                if arithmetic == "bfloat16_table":
                    cos, sin = rounded(cos, 8), rounded(sin, 8)
                angle = mpmath.atan2(float(sin), float(cos))
            else:
                a, b = rounded(Fraction(m), 24), rounded(Fraction(theta), 24)
                if arithmetic == "bfloat16":
                    a, b = rounded(a, 8), rounded(b, 8)
                product = rounded(a * b, 24 if arithmetic == "float32" else 8)
                angle = mpmath.mpf(float(product))
            with mpmath.workdps(60):
                want[row, i] = wrapped(angle, mpmath.mpf(m) * mpmath.mpf(theta))
    got = analysis.phase_error(frequencies, positions, arithmetic)
    error = np.abs(positions.astype(np.float64))[:, None] * 2.0**-62 + 2.0**-50
    assert_within(got, want, error * np.ones_like(want))
    assert error.max() < 1e-9


@each_schedule
def test_bounds_of_phase_errors(case):
    """Exact phases keep the contract of rotation, float32 products their rounding; no error exceeds half a turn."""
    frequencies = case.build()(ROTARY_DIM)
    positions = np.arange(-4000, 2**31 - 1, 99_999_989, dtype=np.int32)
    errors = {name: analysis.phase_error(frequencies, positions, name) for name in ("exact", "float32", "bfloat16")}
    assert errors["exact"].max() <= math.sqrt(2) * 1.2e-7 * 1.0001
    assert 1.5 < errors["float32"].max() <= math.pi and 2.5 < errors["bfloat16"].max() <= math.pi
    near = analysis.phase_error(frequencies, np.arange(100), "float32")
    assert np.all(near <= np.outer(np.arange(100), frequencies.inv_freq) * 2.01 * oracles.EPS32 + 2.0**-50)
    table = analysis.phase_error(frequencies, positions, "bfloat16_table")
    # cos and sin, each off by a share u at most, move the angle by u |sin cos| each
    assert 1e-3 < table.max() <= oracles.EPS16 * 1.01


# ---------------------------------------------------------------------------------------------- refusals

GRID = rope_jax.Rope(8, rope_jax.Sections(sections=(2, 2)))
TEXT = rope_jax.Rope(8, rope_jax.Standard())
FEW = rope_jax.Standard()(8)
ON_FREQUENCIES = {
    "wavelengths": analysis.wavelengths,
    "effective_context": analysis.effective_context,
    "turns": lambda f: analysis.turns(f, 10),
    "incomplete_pairs": lambda f: analysis.incomplete_pairs(f, 10),
    "mean_score": lambda f: analysis.mean_score(f, [1]),
    "decay_bound": lambda f: analysis.decay_bound(f, [1]),
    "aliases": lambda f: analysis.aliases(f, 10),
    "phase_error": lambda f: analysis.phase_error(f, [1], "float32"),
}
NOT_HOST = {
    "of a jax array": rope_jax.Frequencies(jnp.ones(4)),
    "FrequencyChoice": rope_jax.core.FrequencyChoice((FEW, FEW), jnp.array(0)),
    "Standard": rope_jax.Standard(),
    "ndarray": np.ones(4),
}


@pytest.mark.parametrize("says", NOT_HOST)
@pytest.mark.parametrize("function", ON_FREQUENCIES.values(), ids=ON_FREQUENCIES)
def test_only_host_frequencies(function, says):
    with pytest.raises(TypeError, match=f"frequencies must be host Frequencies, got .*{says}"):
        function(NOT_HOST[says])


WITH_SCHEDULE = {
    "wavelengths": lambda f, **r: analysis.wavelengths(f, **r),
    "effective_context": lambda f, **r: analysis.effective_context(f, **r),
    "turns": lambda f, **r: analysis.turns(f, 10, **r),
    "incomplete_pairs": lambda f, **r: analysis.incomplete_pairs(f, 10, **r),
    "mean_score": lambda f, **r: analysis.mean_score(f, [1, 7], **r),
    "decay_bound": lambda f, **r: analysis.decay_bound(f, [1, 7], **r),
    "aliases": lambda f, **r: analysis.aliases(f, 100, 3, **r),
    "phase_error": lambda f, **r: analysis.phase_error(f, [1, 7], "float32", **r),
}


@each_schedule
@pytest.mark.parametrize("function", WITH_SCHEDULE.values(), ids=WITH_SCHEDULE)
def test_a_schedule_stands_for_its_frequencies(function, case):
    schedule = case.build()
    got, want = function(schedule, rotary_dim=ROTARY_DIM), function(schedule(ROTARY_DIM))
    np.testing.assert_array_equal(got, want)


def test_every_function_of_frequencies_takes_a_schedule():
    assert list(WITH_SCHEDULE) == list(ON_FREQUENCIES)


@pytest.mark.parametrize("function", WITH_SCHEDULE.values(), ids=WITH_SCHEDULE)
@pytest.mark.parametrize(
    ("schedule", "rotary_dim", "error", "says"),
    [
        (rope_jax.Standard(), None, TypeError, "got Standard; pass rotary_dim= beside a schedule"),
        (rope_jax.Standard(), 7, ValueError, "rotary_dim must be even and at least 2, got 7"),
        (rope_jax.Standard(), 8.0, TypeError, "rotary_dim must be an integer, got 8.0"),
        (FEW, 8, ValueError, "rotary_dim must be left out beside Frequencies, which have R/2 = 4 pairs, got 8"),
        (rope_jax.Standard, 8, TypeError, "frequencies must be a schedule like Standard\\(\\), got Standard"),
        (np.ones(4), 8, TypeError, "frequencies must be a schedule like Standard\\(\\), got ndarray"),
        (lambda r: FEW, 16, ValueError, "frequencies must give R/2 = 8 frequencies, got 4"),
        (
            rope_jax.DynamicNTK(factor=2.0, original_length=4),
            8,
            ValueError,
            "DynamicNTK needs a context_length: set the field",
        ),
        (lambda r: rope_jax.Frequencies(jnp.ones(r // 2)), 8, TypeError, "got Frequencies of a jax array"),
    ],
)
def test_refused_schedules(function, schedule, rotary_dim, error, says):
    arguments = {} if rotary_dim is None else {"rotary_dim": rotary_dim}
    with pytest.raises(error, match=says):
        function(schedule, **arguments)


@pytest.mark.parametrize("function", ON_FREQUENCIES.values(), ids=ON_FREQUENCIES)
def test_one_axis_and_no_heads(function):
    with pytest.raises(ValueError, match=r"inv_freq must be \[R/2\], got shape \(2, 4\)"):
        function(SEVERAL_AXES)
    with pytest.raises(ValueError, match=r"inv_freq must be \[R/2\], got shape \(3, 1, 4\)"):
        function(rope_jax.Frequencies(np.ones((3, 1, 4))))


def test_score_kernel_refuses_heads():
    rope = rope_jax.Rope(8, lambda r: rope_jax.Frequencies(np.ones((2, 2, r // 2))))
    with pytest.raises(ValueError, match=r"inv_freq must be \[R/2\] or \[A, R/2\], got shape \(2, 2, 4\)"):
        analysis.score_kernel(X, X, rope, [1, 1])


X = np.ones(8)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: analysis.turns(FEW, 0), ValueError, "context_length must be at least 1, got 0"),
        (
            lambda: analysis.turns(FEW, 10.0),
            TypeError,
            "context_length must be an integer, got 10.0",
        ),
        (
            lambda: analysis.incomplete_pairs(FEW, True),
            TypeError,
            "context_length must be an integer, got True",
        ),
        (
            lambda: analysis.turns(FEW, np.array([1, 2])),
            TypeError,
            "context_length must be an integer",
        ),
        (lambda: analysis.aliases(FEW, 10, 0), ValueError, "count must be at least 1, got 0"),
        (lambda: analysis.aliases(FEW, -1), ValueError, "context_length must be at least 1, got -1"),
        (
            lambda: analysis.mean_score(FEW, [True]),
            TypeError,
            "distances must be integers or floats, got dtype bool",
        ),
        (
            lambda: analysis.mean_score(FEW, [1j]),
            TypeError,
            "distances must be integers or floats, got .*complex128",
        ),
        (lambda: analysis.decay_bound(FEW, [2**70]), TypeError, "distances must be an array of numbers, got list"),
        (lambda: analysis.decay_bound(FEW, [np.nan, 1]), ValueError, "distances must be finite and below 2\\^63"),
        (lambda: analysis.mean_score(FEW, [-np.inf]), ValueError, "distances must be finite .* got -inf to -inf"),
        (lambda: analysis.mean_score(FEW, 2.0**63), ValueError, "distances must be finite and below 2\\^63"),
        (
            lambda: analysis.mean_score(FEW, np.uint64(2**63)),
            ValueError,
            "distances must be finite and below 2\\^63",
        ),
        (lambda: analysis.score_kernel(X, X, FEW, 1), TypeError, "rope must be a Rope, got Frequencies"),
        (
            lambda: analysis.score_kernel(X[:4], X, TEXT, 1),
            ValueError,
            r"q must have shape \[H\] with H=8, got \(4,\)",
        ),
        (lambda: analysis.score_kernel(X, X[None], TEXT, 1), ValueError, r"k must have shape .* got \(1, 8\)"),
        (
            lambda: analysis.score_kernel(X, 1j * X, TEXT, 1),
            TypeError,
            "k must be real numbers, got dtype complex128",
        ),
        (lambda: analysis.score_kernel(X > 0, X, TEXT, 1), TypeError, "q must be real numbers, got dtype bool"),
        (
            lambda: analysis.score_kernel(X, X, GRID, 1),
            ValueError,
            r"distances must be \[\.\.\., A=2\] for a rope of 2 axes, got shape \(\)",
        ),
        (lambda: analysis.score_kernel(X, X, GRID, [[1]]), ValueError, r"got shape \(1, 1\)"),
        (
            lambda: analysis.score_kernel(X, X, TEXT, 1, context_length=4),
            ValueError,
            "context_length must be left out",
        ),
        (
            lambda: analysis.score_kernel(
                X,
                X,
                rope_jax.Rope(8, rope_jax.DynamicNTK(factor=2.0, original_length=4)),
                1,
                context_length=jnp.array(9),
            ),
            TypeError,
            "frequencies must be host Frequencies, got Frequencies of a jax array",
        ),
        (
            lambda: analysis.phase_error(FEW, [1], "float16"),
            ValueError,
            "arithmetic must be one of .* got 'float16'",
        ),
        (
            lambda: analysis.phase_error(FEW, [1.0], "exact"),
            TypeError,
            "positions must be integers, got dtype float64",
        ),
        (lambda: analysis.phase_error(FEW, 1, "exact"), ValueError, r"positions must have shape \[P\], got \(\)"),
        (lambda: analysis.phase_error(FEW, [2**31], "exact"), ValueError, "positions must fit in int32"),
        (
            lambda: analysis.phase_error(FEW, np.array([2**63], np.uint64), "float32"),
            ValueError,
            "positions must be finite and below 2\\^63",
        ),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_positions_on_a_device_are_read():
    assert analysis.mean_score(FEW, jax.numpy.arange(3)).tolist() == analysis.mean_score(FEW, range(3)).tolist()


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_aliases_do_not_depend_on_the_attention_factor(factor):
    inv_freq = rope_jax.Standard()(16).inv_freq
    plain, scaled = (analysis.aliases(rope_jax.Frequencies(inv_freq, a), 500, 3) for a in (1.0, factor))
    np.testing.assert_array_equal(scaled[0], plain[0])
    np.testing.assert_array_equal(scaled[1], plain[1])
