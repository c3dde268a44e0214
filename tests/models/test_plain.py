"""`implementation="plain"`: operations of JAX alone, for tools that know no primitive of rope_jax."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import V, build, init
from fast import first
from jax.experimental.jet import jet

import rope_jax
from rope_jax.attention import Facts, explain

B, T, N, K, H = 2, 6, 4, 2, 8
ROPES = [
    rope_jax.Rope(H, rope_jax.Standard()),
    rope_jax.Rope(H, rope_jax.Yarn(factor=4.0, original_length=4), layout="interleaved", rotary_dim=4),
    rope_jax.Rope(H, rope_jax.Standard(), rotary_dim=4, start=2, blocks=2),
]
OURS = {"rotate", "attention", "attention_tangent", "attention_backward", "project", "in_order", "is_divided"}


def primitives(jaxpr) -> set:
    """Every primitive of a program and of the programs inside: the names, ours with those of JAX."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= primitives(inner)
    return found


def names(function, *arguments) -> set[str]:
    return {primitive.name for primitive in primitives(jax.make_jaxpr(function)(*arguments).jaxpr)}


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("rope", first(1, ROPES))
@pytest.mark.parametrize(
    "options",
    first(
        2,
        [
            {},
            dict(qk_norm=True, window=3, logit_cap=4.0),
            dict(learn_sinks=True),
            dict(position_bias=rope_jax.attention.ALiBi()),
        ],
    ),
)
def test_a_layer_with_its_gradient_and_its_cache(rope, options):
    layer, same = (
        rope_jax.RotaryAttention(
            num_heads=N, num_kv_heads=K, head_dim=H, rope=rope, implementation=implementation, **options
        )
        for implementation in ("plain", None)
    )
    x, cache = random(B, T, 16), rope_jax.init_cache(batch=B, capacity=T + 1, num_kv_heads=K, head_dim=H)
    params = nn.unbox(layer.init(jax.random.key(0), x))

    def loss(layer, params, x):
        return jnp.sum(jnp.sin(layer.apply(params, x)))

    def step(layer, params, x, cache):
        _, cache = layer.apply(params, x, cache=cache)
        return layer.apply(params, x[:, :1], cache=cache)

    for function, *arguments in (
        (loss, params, x),
        (lambda *args: jax.grad(loss, argnums=(1, 2))(*args), params, x),
        (step, params, x, cache),
    ):
        used = names(functools.partial(function, layer), *arguments)
        assert used and not used & OURS
        assert names(functools.partial(function, same), *arguments) & OURS
        got, want = (jax.tree.leaves(function(each, *arguments)) for each in (layer, same))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())), rtol=0)


@pytest.mark.parametrize(
    "change",
    first(2, [{}, dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), dict(tie_embeddings=False, post_norms=True)]),
)
def test_a_decoder_with_its_gradient_and_its_cache(change):
    """bfloat16 weights in a decode step are where the default has a product of its own."""
    model, same = build(implementation="plain", **change), build(**change)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (1, T)), jnp.int32)
    params = jax.tree.map(lambda leaf: leaf.astype(change.get("param_dtype", leaf.dtype)), init(model))

    def loss(model, params, tokens):
        return jnp.mean(jnp.square(model.apply(params, tokens)))

    def step(model, params, tokens, cache):
        logits, cache = model.apply(params, tokens, cache=cache)
        again, cache = model.apply(params, tokens[:, :1], cache=cache)
        return logits, again, cache.num_tokens

    error = 2e-5 if "dtype" not in change else 2.0**-5
    cache = model.init_cache(batch=1, capacity=T + 1)
    for function, *arguments in (
        (loss, params, tokens),
        (jax.grad(loss, argnums=1), params, tokens),
        (step, params, tokens, cache),
    ):
        wrapped = (
            (lambda *args, function=function: function(model, *args)),
            (lambda *args, function=function: function(same, *args)),
        )
        used, of_same = (names(each, *arguments) for each in wrapped)
        assert used and not used & OURS and of_same & OURS
        got, want = (jax.tree.leaves(each(*arguments)) for each in wrapped)
        for a, b in zip(got, want, strict=True):
            bound = error * max(1.0, float(jnp.abs(b).max()))
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_a_cache_in_a_model_of_your_own(dtype):
    """The default asks whether XLA divides the program, and writes the tokens of a row at once if not."""
    new = random(B, T, K, H)
    mask = jnp.ones((B, T), bool).at[0, 2].set(False)

    def step(new, real, cache, **options):
        cache = cache.write(new, -new, **options).write(new[:, :1], new[:, 1:2], real[:, :1], **options)
        out = rope_jax.attend(new.repeat(2, 2), *cache.read(new.dtype), implementation="plain")
        return cache, cache.nan_if_overflowed(out)

    plain = functools.partial(step, implementation="plain")
    for capacity in (T + 2, T + 1, T):
        cache = rope_jax.init_cache(batch=B, capacity=capacity, num_kv_heads=K, head_dim=H, dtype=dtype)
        step, plain = jax.jit(step), jax.jit(plain)
        if capacity == T + 2:
            assert names(step, new, mask, cache) & OURS and not names(plain, new, mask, cache) & OURS
        for a, b in zip(*map(jax.tree.leaves, (plain(new, mask, cache), step(new, mask, cache))), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"implementation must be None or one of \('plain',\), got 'xla'"):
        cache.write(new, new, implementation="xla")


def test_the_list_of_our_primitives_is_whole():
    """The search of this file would miss a primitive that is not in the list."""
    from rope_jax.attention import cache_write, memory_order, primitive
    from rope_jax.core import primitive as rotation
    from rope_jax.core import projection

    modules = cache_write, memory_order, primitive, rotation, projection
    primitives_of_ours = {
        value.name for module in modules for name, value in vars(module).items() if name.endswith("_p")
    }
    assert primitives_of_ours == OURS


@pytest.mark.parametrize("rope", ROPES)
def test_jet_differentiates_a_rotation_as_often_as_asked(rope):
    """``x(s) = x0 + x1 s + x2 s^2 / 2``: rotation is linear, so each coefficient is rotated."""
    series = [random(1, T, N, H, seed=seed) for seed in range(3)]
    rotation = rope.rotation(jnp.arange(T))
    rotate = functools.partial(rope.rotate, rotation=rotation, implementation="plain")
    value, coefficients = jet(rotate, (series[0],), (series[1:],))
    for got, x in zip([value, *coefficients], series, strict=True):
        np.testing.assert_allclose(got, rope.rotate(x, rotation), atol=1e-6)
    with pytest.raises((KeyError, NotImplementedError), match="rotate"):
        jet(functools.partial(rope.rotate, rotation=rotation), (series[0],), (series[1:],))


@pytest.mark.parametrize(
    "options", [dict(causal=True), dict(window=3, logit_cap=2.0), dict(sink_logits=jnp.ones(N))]
)
def test_attention_is_exact_and_has_every_derivative(options):
    q, k, v = random(B, T, N, H), random(B, T, K, H, seed=1), random(B, T, K, H, seed=2)
    plain = functools.partial(rope_jax.attend, **options, implementation="plain")
    same = functools.partial(rope_jax.attend, **options, implementation="blocks")
    assert not names(plain, q, k, v) & OURS
    np.testing.assert_allclose(plain(q, k, v), same(q, k, v), atol=2e-6)

    def second(function):
        return jax.jvp(jax.grad(lambda q: jnp.sum(function(q, k, v) ** 2)), (q,), (v.repeat(2, 2),))[1]

    np.testing.assert_allclose(second(plain), second(same), atol=2e-5)


def test_a_query_without_any_key_gives_0_and_no_nan():
    q, mask = random(1, 2, 1, H), jnp.zeros((1, 1, 2, 2), bool).at[0, 0, 1].set(True)
    plain = functools.partial(rope_jax.attend, mask=mask, implementation="plain")
    assert not jnp.any(plain(q, q, q)[0, 0])
    assert jnp.all(jnp.isfinite(jax.grad(lambda q: jnp.sum(plain(q, q, q)))(q)))


def test_it_is_explained():
    shape = jax.ShapeDtypeStruct((1, T, N, H), jnp.float32)
    for platform in ("cpu", "gpu", "tpu"):
        said = explain(shape, shape, Facts(causal=True), platform=platform, implementation="plain")
        assert operator.itemgetter(0)(said) == "plain"
