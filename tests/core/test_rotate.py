import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import rope_jax

LAYOUTS = ["half", "interleaved"]
full = pytest.mark.full
jitted_rotate = jax.jit(rope_jax.rotate, static_argnames="layout")
WIDTHS = [
    (8, 8),
    (8, 2),
    (64, 64),
    (64, 16),
    (128, 96),
    (12, 10),
]  # H, R; the last leaves a rest that does not divide


def inputs(head_dim, rotary_dim, dtype=jnp.float32, batch=(2,), length=5, heads=3, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(*batch, length, heads, head_dim)), dtype)
    positions = jnp.asarray(rng.integers(-(10**7), 10**7, (*batch, length)), jnp.int32)
    return x, rope_jax.rotation(positions, rope_jax.Yarn(factor=4.0, original_length=512)(max(rotary_dim, 4)))


def narrowed(rotation, rotary_dim):
    return rope_jax.Rotation(*(part[..., : rotary_dim // 2] for part in rotation))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [pytest.param(*width, marks=[] if width in [(8, 8), (64, 16), (12, 10)] else full) for width in WIDTHS],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_is_the_complex_product_rounded_once(layout, head_dim, rotary_dim, dtype):
    x, rotation = inputs(head_dim, rotary_dim, dtype)
    rotation = narrowed(rotation, rotary_dim)
    got = jitted_rotate(x, rotation, layout=layout)
    assert got.dtype == dtype and got.shape == x.shape
    want = oracles.rotate_features(x, *rotation, layout)
    # Two products and a sum in float32 lose at most 3 roundings of |x||rotation|; then one rounding to dtype.
    size = 1.2 * np.abs(np.asarray(x, np.float64)).max()
    unit = float(jnp.finfo(dtype).eps) / 2
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= 3 * size * oracles.EPS32 + np.abs(want) * unit * (1 + 1e-3))
    np.testing.assert_array_equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_from_rotary_dim_on_pass_through_bit_for_bit(layout):
    odd_ones = np.array([-0.0, np.inf, np.nan, 1e-42, -np.inf, 3.14159274], np.float32)
    x = jnp.asarray(np.concatenate([np.ones(4, np.float32), odd_ones]))[None, None]
    rotation = rope_jax.Rotation(jnp.full((1, 2), 0.6), jnp.full((1, 2), 0.8))
    got = rope_jax.rotate(x, rotation, layout=layout)
    np.testing.assert_array_equal(np.asarray(got[0, 0, 4:]).view(np.uint32), odd_ones.view(np.uint32))
    assert np.all(np.isfinite(got[0, 0, :4]))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, rotation = inputs(16, 16, jnp.float64)
        got = rope_jax.rotate(x, rotation)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, oracles.rotate_features(x, *rotation, "half"), atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [pytest.param(*width, marks=[] if width in [(8, 8), (12, 10)] else full) for width in WIDTHS],
)
class TestDerivatives:
    def test_backward_is_the_inverse_rotation_of_the_cotangent(self, layout, head_dim, rotary_dim):
        x, rotation = inputs(head_dim, rotary_dim)
        rotation = narrowed(rotation, rotary_dim)
        cotangent = jnp.cos(3 * x)
        _, vjp = jax.vjp(lambda x: rope_jax.rotate(x, rotation, layout=layout), x)
        (got,) = vjp(cotangent)
        want = rope_jax.rotate(cotangent, rope_jax.Rotation(rotation.cos, -rotation.sin), layout=layout)
        np.testing.assert_array_equal(got, want)

    def test_gradient_in_the_rotation_is_right(self, layout, head_dim, rotary_dim):
        x, rotation = inputs(head_dim, rotary_dim)
        rotation = narrowed(rotation, rotary_dim)
        weight = np.random.default_rng(1).normal(size=x.shape)

        def loss(x, rotation):
            return jnp.sum(rope_jax.rotate(x, rotation, layout=layout) * jnp.asarray(weight, jnp.float32))

        _, drotation = jax.grad(loss, argnums=(0, 1))(x, rotation)
        # d/dcos and d/dsin of the complex product, summed over the heads that share it
        one, zero = np.ones(rotation.cos.shape), np.zeros(rotation.cos.shape)
        for got, (c, s) in zip(drotation, ((one, zero), (zero, one)), strict=True):
            moved = oracles.rotate_features(x, c, s, layout) * weight
            moved[..., rotary_dim:] = 0
            pairs = rotary_dim // 2
            first = slice(0, pairs) if layout == "half" else slice(0, rotary_dim, 2)
            second = slice(pairs, rotary_dim) if layout == "half" else slice(1, rotary_dim, 2)
            want = (moved[..., first] + moved[..., second]).sum(-2)
            np.testing.assert_allclose(got, want, atol=64 * oracles.EPS32)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestModes:
    def test_forward_mode_linearize_and_hessian(self, layout):
        x, rotation = inputs(8, 6, batch=(), length=2, heads=1)
        rotation = narrowed(rotation, 6)
        fn = lambda x: rope_jax.rotate(x, rotation, layout=layout)
        tangent = jnp.sin(x)
        y, dy = jax.jvp(fn, (x,), (tangent,))
        np.testing.assert_array_equal(dy, fn(tangent))  # the map is its own derivative
        y2, linear = jax.linearize(fn, x)
        np.testing.assert_array_equal(y, y2)
        np.testing.assert_array_equal(linear(tangent), dy)
        hessian = jax.hessian(lambda x: 0.5 * jnp.sum(fn(x) ** 2))(x).reshape(x.size, x.size)
        jacobian = np.asarray(jax.jacfwd(fn)(x)).reshape(x.size, x.size)
        np.testing.assert_allclose(hessian, jacobian.T @ jacobian, atol=1e-5)
        np.testing.assert_allclose(jax.jacrev(fn)(x).reshape(x.size, x.size), jacobian, atol=0)

    def test_learned_frequencies_to_second_order(self, layout):
        x, _ = inputs(8, 8, batch=(), length=3, heads=2)
        positions = jnp.array([0, 1, 5])

        def loss(inv_freq):
            rotation = rope_jax.rotation(positions, rope_jax.Frequencies(inv_freq))
            return jnp.sum(jnp.sin(rope_jax.rotate(x, rotation, layout=layout)))

        inv_freq = jnp.array([1.0, 0.3, 0.1, 0.02])
        with jax.enable_x64(True):  # finite differences need digits
            x, inv_freq = x.astype(jnp.float64), inv_freq.astype(jnp.float64)

            def exact(f):
                angle = np.asarray(positions, np.float64)[:, None] * f
                return np.sin(oracles.rotate_features(x, np.cos(angle), np.sin(angle), layout)).sum()

            f = np.asarray(inv_freq)
            h = 1e-4
            steps = np.eye(4) * h
            grad = [(exact(f + d) - exact(f - d)) / (2 * h) for d in steps]
            hess = [
                [
                    (exact(f + a + b) - exact(f + a - b) - exact(f - a + b) + exact(f - a - b)) / (4 * h * h)
                    for b in steps
                ]
                for a in steps
            ]
        x, inv_freq = x.astype(jnp.float32), inv_freq.astype(jnp.float32)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(inv_freq), grad, atol=2e-4)
        np.testing.assert_allclose(jax.jit(jax.hessian(loss))(inv_freq), hess, rtol=1e-4, atol=2e-3)

    def test_nothing_as_large_as_x_is_saved(self, layout):
        x, rotation = inputs(64, 32, jnp.bfloat16, length=7, heads=5)
        rotation = narrowed(rotation, 32)
        _, vjp = jax.vjp(lambda x: rope_jax.rotate(x, rotation, layout=layout), x)
        sizes = [leaf.size for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "size")]
        assert sizes and max(sizes) <= rotation.cos.size

    def test_vmap_over_heads_and_batch_is_broadcasting(self, layout):
        x, rotation = inputs(16, 16)
        fn = lambda x, rotation: rope_jax.rotate(x, rotation, layout=layout)
        want = fn(x, rotation)
        np.testing.assert_array_equal(jax.vmap(fn)(x, rotation), want)
        heads = jax.vmap(lambda x: fn(x[:, :, None], rotation)[:, :, 0], in_axes=2, out_axes=2)(x)
        np.testing.assert_array_equal(heads, want)

    def test_the_compiled_program_has_no_transpose(self, layout):
        for rotary_dim in (64, 32):
            x, rotation = inputs(64, rotary_dim, jnp.bfloat16)
            rotation = narrowed(rotation, rotary_dim)
            fn = lambda x, rotation: rope_jax.rotate(x, rotation, layout=layout)
            back = lambda x, rotation: jax.vjp(lambda x: fn(x, rotation), x)[1](x)  # noqa: B023
            for program in (fn, back):
                assert " transpose(" not in jax.jit(program).lower(x, rotation).compile().as_text()


def test_layouts_are_equal_up_to_the_permutation():
    x, rotation = inputs(32, 24)
    rotation = narrowed(rotation, 24)
    order = [*range(0, 24, 2), *range(1, 24, 2), *range(24, 32)]  # interleaved -> half
    half = rope_jax.rotate(x[..., order], rotation, layout="half")
    interleaved = rope_jax.rotate(x, rotation, layout="interleaved")
    np.testing.assert_array_equal(half, interleaved[..., order])


X = jnp.ones((2, 5, 3, 8))
ROTATION = rope_jax.Rotation(jnp.ones((2, 5, 4)), jnp.ones((2, 5, 4)))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rope_jax.rotate(X.astype(int), ROTATION), TypeError, "x must be floating, got dtype int32"),
        (
            lambda: rope_jax.rotate(X[0, 0], ROTATION),
            ValueError,
            r"x must have shape \[\.\.\., T, N, H\], got \(3, 8\)",
        ),
        (
            lambda: rope_jax.rotate(X.swapaxes(1, 2), ROTATION),  # heads and length mixed up
            ValueError,
            r"rotation.cos must have shape \[\.\.\., T, R/2\] with T=3, got \(2, 5, 4\)",
        ),
        (
            lambda: rope_jax.rotate(X, rope_jax.Rotation(ROTATION.cos, ROTATION.sin[:1])),
            ValueError,
            "rotation.sin must have the shape",
        ),
        (
            lambda: rope_jax.rotate(X[:1], ROTATION),
            ValueError,
            r"rotation .* = \(2, 5, 4\) must broadcast against x",
        ),
        (
            lambda: rope_jax.rotate(X[0], ROTATION),  # the rows of x were forgotten
            ValueError,
            r"= \(2, 5, 4\) must broadcast against x",
        ),
        (
            lambda: rope_jax.rotate(X[0], jax.tree.map(lambda a: a[None], ROTATION)),
            ValueError,
            r"rotation .* = \(1, 2, 5, 4\) must broadcast against x",
        ),
        (lambda: rope_jax.rotate(X[..., :6], ROTATION), ValueError, "R must be from 2 to head_dim H=6, got R=8"),
        (
            lambda: rope_jax.rotate(X, ROTATION, layout="neox"),
            ValueError,
            r"layout must be one of \('half', 'inter.*'neox'",
        ),
        (
            lambda: rope_jax.rotate(X[..., :7], jax.tree.map(lambda a: a[..., :3], ROTATION), layout="interleaved"),
            ValueError,
            "head_dim H must be even for interleaved pairs, got 7",
        ),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()
