"""`rotate` from a first feature, inside blocks, with heads before tokens, and by frequencies for each head: against a
loop over pairs in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from fast import first

import rope_jax

LAYOUTS = ["half", "interleaved"]
T, H = 5, 16
FACTOR = 1.25


def pairs_of(layout, num_pairs, start, blocks):
    """The two features of each pair, by counting."""
    first, second = [], []
    for i in range(num_pairs):
        if layout == "interleaved":
            first.append(start + 2 * i)
            second.append(start + 2 * i + 1)
        else:
            half = num_pairs // blocks
            block, place = divmod(i, half)
            first.append(start + 2 * half * block + place)
            second.append(start + 2 * half * block + half + place)
    return first, second


QUICK = [  # of each layout; of the whole head, its middle and its end; of one block and of several
    dict(layout="half", num_pairs=8, start=0, blocks=2),
    dict(layout="half", num_pairs=6, start=1, blocks=3),
    dict(layout="half", num_pairs=4, start=8, blocks=1),
    dict(layout="interleaved", num_pairs=3, start=2, blocks=1),
]
FORMS = [
    dict(layout=layout, num_pairs=num_pairs, start=start, blocks=blocks)
    for layout, (num_pairs, start), blocks in itertools.product(
        LAYOUTS, [(8, 0), (4, 0), (4, 8), (3, 2), (6, 4), (2, 5), (6, 1)], [1, 2, 3]
    )
    if num_pairs % blocks == 0 and (layout == "half" or blocks == 1)
]
FORMS = QUICK + [form for form in FORMS if form not in QUICK]
ids = lambda form: " ".join(map(str, form.values()))


def case(num_pairs, heads=(4, 2), M=None, batch=(2,), dtype=jnp.float32, seed=0, rows=True):
    """q and k ``[..., T, N, H]``, their angles, and the rotation; M heads have angles of their own."""
    rng = np.random.default_rng(seed)
    xs = [jnp.asarray(rng.normal(size=(*batch, T, n, H)), dtype) for n in heads]
    shape = (*(batch if rows else (1,) * len(batch) if M else ()), T, *(() if M is None else (M,)), num_pairs)
    angles = rng.uniform(-3, 3, shape)
    parts = (jnp.asarray(FACTOR * f(angles), jnp.float32) for f in (np.cos, np.sin))
    rotation = rope_jax.Rotation(*parts, per_head=M is not None)
    return xs, angles, rotation


def oracle(x, angles, per_head, layout, num_pairs, start, blocks):
    """float64, row by row and pair by pair; x ``[..., T, N, H]``."""
    first, second = pairs_of(layout, num_pairs, start, blocks)
    x = np.asarray(x).astype(np.float64)
    heads = x.shape[-2]
    if per_head:
        angles = np.repeat(angles, heads // angles.shape[-2], axis=-2)
    else:
        angles = np.repeat(angles[..., None, :], heads, axis=-2)
    angles = np.broadcast_to(angles, (*x.shape[:-1], num_pairs))
    rows = [
        oracles.rotate_pairs(row, angle, first, second, FACTOR)
        for row, angle in zip(x.reshape(-1, T, heads, H), angles.reshape(-1, T, heads, num_pairs), strict=True)
    ]
    return np.stack(rows).reshape(x.shape)


def assert_rotated(got, x, want, num_pairs, start):
    """Three roundings of float32, those of cos and sin, and one to x's dtype; the rest bit for bit."""
    assert got.dtype == x.dtype and got.shape == x.shape
    size = np.abs(np.asarray(x, np.float64)).max() * FACTOR * 1.5
    unit = float(jnp.finfo(x.dtype).eps) / 2
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= 5 * size * oracles.EPS32 + np.abs(want) * unit * (1 + 1e-3))
    for rest in (slice(0, start), slice(start + 2 * num_pairs, None)):
        np.testing.assert_array_equal(got[..., rest], x[..., rest])


def options_of(form):
    return {name: form[name] for name in ("layout", "start", "blocks")}


def swapped(x):
    return jnp.swapaxes(x, -3, -2)


jitted = jax.jit(rope_jax.rotate, static_argnames=("layout", "start", "blocks", "token_axis", "implementation"))


@pytest.mark.parametrize("M", [None, pytest.param(1, marks=pytest.mark.full), 2], ids=lambda m: f"M={m}")
@pytest.mark.parametrize("form", first(4, FORMS), ids=ids)
class TestForms:
    @pytest.mark.parametrize(
        "dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)]
    )
    def test_is_the_rotation_of_each_pair(self, form, M, dtype):
        xs, angles, rotation = case(form["num_pairs"], M=M, dtype=dtype)
        for x in xs:
            want = oracle(x, angles, M is not None, **form)
            got = jitted(x, rotation, **options_of(form))
            assert_rotated(got, x, want, form["num_pairs"], form["start"])
            before = jitted(swapped(x), rotation, **options_of(form), token_axis=-2)
            np.testing.assert_array_equal(swapped(before), got)

    def test_float64(self, form, M):
        with jax.enable_x64(True):
            (x, _), angles, _ = case(form["num_pairs"], M=M, dtype=jnp.float64)
            rotation = rope_jax.Rotation(
                jnp.asarray(FACTOR * np.cos(angles)), jnp.asarray(FACTOR * np.sin(angles)), M is not None
            )
            want = oracle(x, angles, M is not None, **form)
            for token_axis in (-3, -2):
                given = x if token_axis == -3 else swapped(x)
                got = rope_jax.rotate(given, rotation, **options_of(form), token_axis=token_axis)
                assert got.dtype == jnp.float64
                np.testing.assert_allclose(got if token_axis == -3 else swapped(got), want, atol=1e-14)

    @pytest.mark.parametrize("token_axis", [-3, -2])
    def test_derivatives(self, form, M, token_axis):
        """Forward: the rotation of the tangent. Backward: the transpose, as a matrix. In the rotation: float64."""
        (x, _), _, rotation = case(form["num_pairs"], M=M, batch=(1,))
        x = x if token_axis == -3 else swapped(x)
        fn = functools.partial(rope_jax.rotate, **options_of(form), token_axis=token_axis)
        tangent = jnp.cos(3 * x)
        y, dy = jax.jvp(lambda x: fn(x, rotation), (x,), (tangent,))
        np.testing.assert_array_equal(y, fn(x, rotation))
        np.testing.assert_array_equal(dy, fn(tangent, rotation))
        _, vjp = jax.vjp(lambda x: fn(x, rotation), x)
        (back,) = vjp(tangent)
        adjoint = float(jnp.sum(back * x)), float(jnp.sum(tangent * y))
        assert abs(adjoint[0] - adjoint[1]) < 1e-4 * x.size
        np.testing.assert_allclose(
            back, fn(tangent, rope_jax.Rotation(rotation.cos, -rotation.sin, rotation.per_head)), atol=1e-6
        )

        drotation = jax.grad(lambda r: jnp.sum(fn(x, r) * tangent))(rotation)
        weight = np.asarray(tangent if token_axis == -3 else swapped(tangent), np.float64)
        values = np.asarray(x if token_axis == -3 else swapped(x), np.float64)
        first, second = pairs_of(form["layout"], form["num_pairs"], form["start"], form["blocks"])
        dcos = values[..., first] * weight[..., first] + values[..., second] * weight[..., second]
        dsin = values[..., first] * weight[..., second] - values[..., second] * weight[..., first]
        for got, each in zip(drotation, (dcos, dsin), strict=True):
            each = each.sum(-2) if M is None else each.reshape(1, T, M, -1, form["num_pairs"]).sum(-2)
            np.testing.assert_allclose(got, each, atol=1e-5)

        # Forward, in the rotation: features that do not rotate have no tangent.
        moved = rope_jax.Rotation(jnp.sin(5 * rotation.cos), jnp.cos(7 * rotation.sin), rotation.per_head)
        _, dy = jax.jvp(lambda r: fn(x, r), (rotation,), (moved,))
        factor = np.asarray(moved.cos, np.float64) + 1j * np.asarray(moved.sin, np.float64)
        factor = factor[..., None, :] if M is None else np.repeat(factor, values.shape[-2] // M, axis=-2)
        product, want = (values[..., first] + 1j * values[..., second]) * factor, np.zeros(values.shape)
        want[..., first], want[..., second] = product.real, product.imag
        np.testing.assert_allclose(dy if token_axis == -3 else swapped(dy), want, atol=1e-5)

    def test_vmap(self, form, M):
        (x, k), _, rotation = case(form["num_pairs"], M=M)
        for token_axis in (-3, -2):
            q, keys = (x, k) if token_axis == -3 else (swapped(x), swapped(k))
            fn = functools.partial(rope_jax.rotate, **options_of(form), token_axis=token_axis)
            want = fn(q, rotation)
            np.testing.assert_allclose(jax.vmap(fn)(q, rotation), want, atol=2e-6)
            one = jax.tree.map(lambda part: part[:1] if M else part[0], rotation)
            shared = jax.vmap(lambda x, one=one, fn=fn: fn(x[None], one)[0])(q)
            np.testing.assert_allclose(shared, fn(q, one), atol=2e-6)
            opposite = rope_jax.Rotation(-rotation.cos, -rotation.sin, rotation.per_head)
            both = jax.tree.map(lambda *parts: jnp.stack(parts), rotation, opposite)
            each = jax.vmap(fn, in_axes=(None, 0))(keys, both)
            np.testing.assert_allclose(each, jnp.stack([fn(keys, rotation), fn(keys, opposite)]), atol=2e-6)

    def test_a_rotation_of_all_rows(self, form, M):
        (x, _), angles, rotation = case(form["num_pairs"], M=M, rows=False)
        got = rope_jax.rotate(x, rotation, **options_of(form))
        assert_rotated(got, x, oracle(x, angles, M is not None, **form), form["num_pairs"], form["start"])
        before = rope_jax.rotate(swapped(x), rotation, **options_of(form), token_axis=-2)
        np.testing.assert_array_equal(swapped(before), got)

    def test_rope_says_the_same(self, form, M):
        frequencies = np.random.default_rng(0).uniform(-1, 1, (*(() if M is None else (M,)), 2, form["num_pairs"]))
        schedule = lambda rotary_dim: rope_jax.Frequencies(frequencies, FACTOR)
        rope = rope_jax.Rope(H, schedule, rotary_dim=2 * form["num_pairs"], **options_of(form))
        assert (rope.num_axes, rope.num_heads, rope.num_pairs) == (2, M, form["num_pairs"])
        first, second = rope.feature_pairs
        want = pairs_of(form["layout"], form["num_pairs"], form["start"], form["blocks"])
        assert (first.tolist(), second.tolist()) == want
        (q, k), _, _ = case(form["num_pairs"])
        for positions in (np.arange(4 * T).reshape(2, T, 2), np.arange(2 * T).reshape(T, 2)):
            angles = (
                np.einsum("...ta,...ai->t...i" if M is None else "...ta,nai->...tni", positions, frequencies)
                if M is not None
                else positions @ frequencies
            )
            rotated = rope(q, k, positions)
            for x, got in zip((q, k), rotated, strict=True):
                x_angles = angles if M is None or positions.ndim == 3 else angles[None]
                assert_rotated(got, x, oracle(x, x_angles, M is not None, **form), form["num_pairs"], form["start"])
            there = rope(swapped(q), swapped(k), positions, token_axis=-2)
            jax.tree.map(np.testing.assert_array_equal, tuple(map(swapped, there)), rotated)
            back = rope.inverse(*there, positions, token_axis=-2)
            for x, got in zip((q, k), back, strict=True):
                np.testing.assert_allclose(swapped(got), x, atol=2e-6)


@pytest.mark.parametrize("token_axis", [-3, -2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_heads_share_frequencies(layout, token_axis):
    """Query heads 0, 1, 2 take those of key head 0, and 3, 4, 5 those of key head 1."""
    (q, k), angles, rotation = case(8, heads=(6, 2), M=2)
    for x in (q, k):
        given = x if token_axis == -3 else swapped(x)
        got = rope_jax.rotate(given, rotation, layout=layout, token_axis=token_axis)
        got = got if token_axis == -3 else swapped(got)
        for head in range(x.shape[-2]):
            own = angles[:, :, head // (x.shape[-2] // 2)]
            want = oracle(x[:, :, [head]], own, False, layout, 8, 0, 1)
            assert_rotated(got[:, :, [head]], x[:, :, [head]], want, 8, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_learned_frequencies_of_each_head(layout):
    """By central differences in float64, through `rotation` and `rotate`: matrix and phase."""
    rng = np.random.default_rng(0)
    inv_freq, phase = rng.uniform(-1, 1, (2, 2, 3)), rng.uniform(-1, 1, (2, 3))
    positions, x = rng.integers(-4, 5, (T, 2)), rng.normal(size=(1, T, 4, 8))

    def loss(f, p):
        rotation = rope_jax.rotation(positions, rope_jax.Frequencies(f, 1.0, p))
        rotation = jax.tree.map(lambda part: part[None], rotation)
        return jnp.sum(jnp.sin(rope_jax.rotate(jnp.asarray(x, jnp.float32), rotation, layout=layout, start=2)))

    def exact(f, p):
        angles = np.repeat(np.einsum("ta,nai->tni", positions, f) + p, 2, axis=1)
        first, second = pairs_of(layout, 3, 2, 1)
        return np.sin(oracles.rotate_pairs(x[0], angles, first, second)).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        jnp.asarray(inv_freq, jnp.float32), jnp.asarray(phase, jnp.float32)
    )
    for i, gradient in enumerate(got):
        want = np.empty(gradient.shape)
        for index in np.ndindex(want.shape):
            step = np.zeros(want.shape)
            step[index] = 1e-5
            up, down = (
                exact(inv_freq + (i == 0) * s * step if i == 0 else inv_freq, phase + s * step if i == 1 else phase)
                for s in (1, -1)
            )
            want[index] = (up - down) / 2e-5
        np.testing.assert_allclose(gradient, want, atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [dict(), dict(start=16), dict(rotary_dim=32)])
def test_heads_before_tokens_compile_without_a_transpose(layout, form):
    rope = rope_jax.Rope(64, rope_jax.Standard(), layout=layout, **form)
    x = jnp.ones((2, 3, 256, 64), jnp.bfloat16)
    fn = lambda x, positions: rope.rotate(x, rope.rotation(positions), token_axis=-2)
    back = lambda x, positions: jax.vjp(lambda x: fn(x, positions), x)[1](x)
    for program in (fn, back):
        assert " transpose(" not in jax.jit(program).lower(x, jnp.arange(256)).compile().as_text()


X = jnp.ones((2, T, 4, H))
ROTATION = rope_jax.Rotation(jnp.ones((2, T, 4)), jnp.ones((2, T, 4)))
HEADS = rope_jax.Rotation(jnp.ones((2, T, 2, 4)), jnp.ones((2, T, 2, 4)), per_head=True)
ROPE = rope_jax.Rope(H, rope_jax.Standard())
PER_HEAD = rope_jax.Rope(H, lambda r: rope_jax.Frequencies(np.ones((2, 1, r // 2))))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rope_jax.rotate(X, ROTATION, start=-1), ValueError, "start must be at least 0, got -1"),
        (lambda: rope_jax.rotate(X, ROTATION, start=1.0), TypeError, "start must be an integer, got 1.0"),
        (lambda: rope_jax.rotate(X, ROTATION, start=9), ValueError, "R must be from 2 to head_dim H=16 - start 9, got R=8"),
        (lambda: rope_jax.rotate(X, ROTATION, blocks=0), ValueError, "blocks must be at least 1, got 0"),
        (lambda: rope_jax.rotate(X, ROTATION, blocks=3), ValueError, "blocks must divide R/2 = 4, got 3"),
        (lambda: rope_jax.rotate(X, ROTATION, blocks=2, layout="interleaved"), ValueError, "blocks must be 1 with interleaved pairs, .* got 2"),
        (lambda: rope_jax.rotate(X, ROTATION, token_axis=1), ValueError, r"token_axis must be -3 for \[\.\.\., T, N, H\] or -2 .* got 1"),
        (lambda: rope_jax.rotate(swapped(X), ROTATION), ValueError, r"rotation.cos must have shape \[\.\.\., T, R/2\] with T=4, got \(2, 5, 4\)"),
        (lambda: rope_jax.rotate(X, ROTATION, token_axis=-2), ValueError, r"rotation.cos must have shape .* with T=4, got \(2, 5, 4\)"),
        (lambda: rope_jax.rotate(X[..., :3, :], HEADS), ValueError, r"x must have a multiple of M=2 heads, .* \(2, 5, 2, 4\), got N=3"),
        (lambda: rope_jax.rotate(X, HEADS, token_axis=-2), ValueError, r"rotation.cos must have shape \[\.\.\., T, M, R/2\] with T=4"),
        (lambda: rope_jax.rotate(X[:1], HEADS), ValueError, r"= \(2, 5, 2, 4\) must broadcast against x"),
        (lambda: rope_jax.rotate(X[0], HEADS), ValueError, r"= \(2, 5, 2, 4\) must broadcast against x"),
        (lambda: rope_jax.rotate(X, ROTATION, implementation="triton"), ValueError, "implementation must be None or one of"),
        (lambda: rope_jax.Rope(H, rope_jax.Standard(), start=16), ValueError, "rotary_dim must be even, from 2 to head_dim=16 - start 16, got 0"),
        (lambda: rope_jax.Rope(H, rope_jax.Standard(), start=3), ValueError, "to head_dim=16 - start 3, got 13"),
        (lambda: rope_jax.Rope(H, rope_jax.Standard(), rotary_dim=12, start=6), ValueError, "to head_dim=16 - start 6, got 12"),
        (lambda: rope_jax.Rope(H, rope_jax.Standard(), blocks=3), ValueError, "blocks must divide R/2 = 8, got 3"),
        (lambda: rope_jax.Rope(H, rope_jax.Standard(), layout="interleaved", blocks=2), ValueError, "blocks must be 1 with interleaved pairs"),
        (lambda: rope_jax.Rope(H, rope_jax.Standard(), start=-2), ValueError, "start must be at least 0, got -2"),
        (lambda: ROPE(X, X, jnp.arange(T), token_axis=-2), ValueError, r"positions must be of T=4 tokens, got 5, as axis -3 of q and k has: pass token_axis=-3"),
        (
            lambda: ROPE(swapped(X), X, jnp.arange(T), token_axis=-2),
            ValueError,
            r"k must have shape \[\.\.\., K, T, H\] with T=5, H=16, got \(2, 5, 4, 16\)",
        ),
        (lambda: PER_HEAD(X[..., :3, :], X, jnp.arange(T)), ValueError, "x must have a multiple of M=2 heads"),
        (
            lambda: PER_HEAD.rotate(X, ROPE.rotation(jnp.arange(T))),
            ValueError,
            "rotation must have per_head=True, as the rope, got False",
        ),
        (
            lambda: rope_jax.Rope(H, rope_jax.Sections(sections=(4, 4)))(X, X, jnp.arange(T)),
            ValueError,
            r"positions must be \[\.\.\., T, A=2\] for frequencies of 2 position axes, got shape \(5,\)",
        ),
        (lambda: ROPE(X, X, jnp.zeros((T, 2), int)), ValueError, r"positions must have shape \[\.\.\., T\] with T=5, got \(5, 2\)"),
    ],
)  # fmt: skip
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_rotation_for_each_head_is_never_read_as_that_of_rows():
    """With as many rows, tokens and heads, shapes alone would not tell."""
    size = 6
    inv_freq = np.random.default_rng(0).uniform(0.1, 1, (size, 2, 4))
    positions = jnp.asarray(np.random.default_rng(1).integers(0, 9, (size, size, 2)))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(size, size, size, 8)), jnp.float32)
    each_head = rope_jax.rotation(positions[0], rope_jax.Frequencies(inv_freq))
    got = rope_jax.rotate(x, each_head)
    for head in range(size):
        alone = rope_jax.rotation(positions[0], rope_jax.Frequencies(inv_freq[head]))
        np.testing.assert_allclose(got[:, :, head], rope_jax.rotate(x, alone)[:, :, head], atol=2e-6)
    np.testing.assert_allclose(rope_jax.rotate(x[0], each_head), got[0], atol=2e-6)  # also without rows
    rows = jax.vmap(lambda m: rope_jax.rotation(m, rope_jax.Frequencies(inv_freq)))(positions)
    np.testing.assert_allclose(rope_jax.rotate(x, rows)[0], got[0], atol=2e-6)
    shared = rope_jax.rotation(positions, rope_jax.Frequencies(inv_freq[0]))
    with pytest.raises(ValueError, match="must broadcast against x"):  # the rows of x were forgotten
        rope_jax.rotate(x[0], shared)
    with pytest.raises(ValueError, match="rotation must have per_head=False, as the rope, got True"):
        rope_jax.Rope(8, lambda r: rope_jax.Frequencies(inv_freq[0])).rotate(x, each_head)


@pytest.mark.parametrize("token_axis", [-3, -2])
def test_no_rows_and_no_tokens(token_axis):
    frequencies = rope_jax.Frequencies(np.ones((2, 1, 4)))
    for shape in ((0, 5, 4, 8), (2, 0, 4, 8)):
        x = jnp.zeros(shape) if token_axis == -3 else jnp.zeros(shape).swapaxes(1, 2)
        rotation = rope_jax.rotation(jnp.zeros(shape[:2], int), frequencies)
        assert rope_jax.rotate(x, rotation, token_axis=token_axis).shape == x.shape


@pytest.mark.parametrize("token_axis", [5, "a", None, -3.0])
def test_token_axes_that_are_none(token_axis):
    x = jnp.ones((2, 3, 4, 8))
    for call in (
        lambda: rope_jax.Rope(8, rope_jax.Standard())(x, x, jnp.arange(3), token_axis=token_axis),
        lambda: rope_jax.rotate(x, rope_jax.rotation(jnp.arange(3), rope_jax.Standard()(8)), token_axis=token_axis),
    ):
        with pytest.raises((TypeError, ValueError), match="token_axis must be"):
            call()


def test_a_rope_over_traced_frequencies_leaks_nothing():
    x = jnp.ones((1, 3, 2, 8))

    @jax.jit
    @jax.grad
    def gradient(inv_freq):
        return rope_jax.Rope(8, lambda r: rope_jax.Frequencies(inv_freq))(x, x, jnp.arange(3))[0].sum()

    with jax.checking_leaks():
        assert gradient(jnp.ones(4)).shape == (4,)
