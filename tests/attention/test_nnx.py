"""The NNX layer: equal to the linen layer with the same parameters, and at home in NNX's transformations."""

import dataclasses
import functools
import inspect
import itertools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import rope_jax
from rope_jax.attention import ALiBi, T5Bias, make_plan
from rope_jax.nnx import RMSNorm, RotaryAttention, from_linen, to_linen

B, T, D, N, K, H = 2, 6, 16, 4, 2, 8
ROPE = rope_jax.Rope(H, rope_jax.Standard(base=100.0))
SIZES = dict(num_heads=N, num_kv_heads=K, head_dim=H)
# Sums of D = 16, H = 8, T = 6 and N*H = 32 terms of size 1, and a softmax of scores of size 8.
TOLERANCE = 256 * oracles.EPS32


def kernel(q, k, v, facts):
    queries, keys = (
        jnp.arange(length)[None] if index is None else index
        for index, length in ((facts.query_index, q.shape[1]), (facts.key_index, k.shape[1]))
    )
    return rope_jax.attend(q, k, v, mask=(keys[:, None] <= queries[:, :, None])[:, None])


def product(x, w, dimension_numbers, precision=None, preferred_element_type=None):
    return 2 * jax.lax.dot_general(x, w, dimension_numbers, precision, preferred_element_type)


FIELDS = {
    "plain": {},
    "multi-head": dict(num_kv_heads=None),
    "multi-query": dict(num_kv_heads=1),
    "qk_norm": dict(qk_norm=True, qk_norm_epsilon=1e-3),
    "unit offset": dict(qk_norm=True, qk_norm_unit_offset=True),
    "biases": dict(use_bias=True),
    "out bias": dict(use_out_bias=True),
    "window": dict(window=3),
    "scale and cap": dict(logit_scale=0.7, logit_cap=2.0),
    "every token": dict(causal=False),
    "learned frequencies": dict(learn_frequencies=True),
    "learned sinks": dict(learn_sinks=True),
    "T5": dict(position_bias=T5Bias(num_buckets=6, max_distance=19), rope=None),
    "ALiBi": dict(position_bias=ALiBi(), rope=None),
    "attention_fn": dict(attention_fn=kernel),
    "dot_general": dict(dot_general=product),
    "xla": dict(implementation="xla"),
    "bfloat16": dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
}


def inputs(seed=0, length=T, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, D)), dtype)


def native(seed=1, **change):
    return RotaryAttention(**(dict(in_features=D, rope=ROPE, rngs=nnx.Rngs(seed)) | SIZES | change))


@functools.cache
def layers(name):
    """The linen layer, its variables, and the NNX layer with the same parameters, none of which is 0 or 1."""
    fields = SIZES | dict(rope=ROPE) | FIELDS[name]
    linen = rope_jax.RotaryAttention(**fields)
    rng = np.random.default_rng(0)
    params = nn.unbox(linen.init(jax.random.key(0), inputs()))
    params = jax.tree.map(lambda p: p + 0.2 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    layer = native(**fields)
    from_linen(layer, params)
    return linen, params, layer


def caches(layer):
    return rope_jax.init_cache(
        batch=B, capacity=T, num_kv_heads=layer.num_kv_heads or N, head_dim=H, dtype=layer.dtype or jnp.float32
    )


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def chunks(x):
    return [x[:, start:end] for start, end in itertools.pairwise((0, 3, 4, 5, 6))]


def test_the_fields_are_those_of_the_linen_layer():
    ours, linen = (
        {name: parameter.default for name, parameter in inspect.signature(layer.__init__).parameters.items()}
        for layer in (RotaryAttention, rope_jax.RotaryAttention)
    )
    for name in ("kernel_init", "bias_init"):  # functions without equality by value
        key, shape = jax.random.key(0), (3, 5)
        assert_same(ours.pop(name)(key, shape, jnp.float32), linen.pop(name)(key, shape, jnp.float32))
    for name in ("in_features", "kv_features", "rngs"):
        del ours[name]
    assert ours == {name: default for name, default in linen.items() if name not in ("parent", "name")}


@pytest.mark.parametrize("name", FIELDS)
def test_equals_the_linen_layer(name):
    linen, params, layer = layers(name)
    assert_same(to_linen(layer), params)
    dtype = layer.dtype or jnp.float32
    x, mask = inputs(dtype=dtype), jnp.array([[1] * T, [0, 1, 1, 1, 1, 0]])
    calls = [{}, dict(mask=mask), dict(segment_ids=jnp.array([[0, 0, 1, 1, 1, 1], [3, 3, 3, 4, 5, 5]]))]
    if name not in ("attention_fn", "xla"):
        allowed = jnp.asarray(np.random.default_rng(2).integers(0, 2, (B, 1, T, T)), bool)
        calls += [dict(attention_mask=allowed)]
        if layer.causal and layer.window is None and layer.position_bias is None:
            calls += [dict(prefix_length=jnp.array([2, 4]))]
    if layer.rope is not None:
        calls += [dict(positions=jnp.arange(7, 7 + T)), dict(positions=jnp.arange(T, dtype=jnp.float32) / 2)]
    for options in calls:
        assert_same(layer(x, **options), linen.apply(params, x, **options))
    if layer.causal:
        given, held = caches(layer), dataclasses.replace(caches(layer), rope=layer.rope)
        layer.init_cache(batch=B, capacity=T)
        assert_same(layer.cache.get_value(), held)
        for part in chunks(x):
            wanted, next_cache = linen.apply(params, part, cache=given)
            got, given = layer(part, cache=given)
            assert_same((got, given), (wanted, next_cache))
            assert_same(layer(part, decode=True), wanted)
        assert_same(layer.cache.get_value(), dataclasses.replace(given, rope=layer.rope))
    layer.cache = None


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_equal_those_of_the_linen_layer(name):
    linen, params, layer = layers(name)
    x = inputs(dtype=layer.dtype or jnp.float32)
    loss = lambda y: jnp.sum(y.astype(jnp.float32) ** 2)
    wanted = jax.grad(lambda params: loss(linen.apply(params, x)))(params)
    got = nnx.grad(lambda layer: loss(layer(x)))(layer)
    remat = nnx.grad(lambda layer: loss(nnx.remat(lambda layer: layer(x))(layer)))(layer)
    # bfloat16 gradients of a size up to 100: sums in another order, if any.
    limit = dict(rtol=2**-6, atol=0.5) if layer.dtype == jnp.bfloat16 else dict(rtol=1e-5, atol=1e-4)
    assert_close = functools.partial(np.testing.assert_allclose, **limit)
    for each in (got, remat):
        as_float32 = (jax.tree.map(np.float32, tree) for tree in (nnx.to_pure_dict(each), wanted["params"]))
        jax.tree.map(assert_close, *as_float32)


def test_cross_attention_equals_that_of_the_linen_layer():
    fields = SIZES | dict(rope=ROPE, causal=False)
    linen, layer = rope_jax.RotaryAttention(**fields), native(**fields, kv_features=24)
    kv = jnp.asarray(np.random.default_rng(1).normal(size=(B, 9, 24)), jnp.float32)
    where = dict(
        positions=jnp.arange(T), kv_positions=jnp.arange(9) / 2, kv_mask=jnp.arange(9)[None] < jnp.array([[9], [4]])
    )
    assert layer.key.kernel.shape == (24, K, H)
    assert_same(layer(inputs(), kv=kv, **where), linen.apply(to_linen(layer), inputs(), kv=kv, **where))
    with pytest.raises(ValueError, match="kv must be given with kv_features=24, got None"):
        layer(inputs())
    with pytest.raises(ValueError, match=r"kv must have shape \[B, S, D\] with D=24, got \(2, 6, 16\)"):
        layer(inputs(), kv=inputs(), **where)
    layer.init_cache(batch=B, capacity=T)
    with pytest.raises(ValueError, match="cache must be left out with kv"):
        layer(inputs(), kv=kv, decode=True, **where)


def test_a_plan_made_once_serves_layers_with_caches_of_their_own():
    first, second = native(1), native(2)
    x = inputs()
    given = [caches(first), caches(second)]
    for layer in (first, second):
        layer.init_cache(batch=B, capacity=T)
    for part in chunks(x):
        wanted = part
        for number, layer in enumerate((first, second)):
            wanted, given[number] = layer(wanted, cache=given[number])
        plan = make_plan(ROPE, part.shape[:2], cache=first.cache.get_value())
        got = second(first(part, plan=plan, decode=True), plan=plan, decode=True)
        np.testing.assert_array_equal(got, wanted)
        assert second.cache.get_value().num_tokens.tolist() == given[1].num_tokens.tolist()
    plan = make_plan(ROPE, x.shape[:2])
    assert_same(second(first(x, plan=plan), plan=plan), second(first(x)))


def test_decoding_is_compiled_once_and_in_place():
    layer = native(decode=True)
    layer.init_cache(batch=B, capacity=T)
    whole, compiled = layer(inputs(), decode=False), 0

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(layer, x):
        nonlocal compiled
        compiled += 1
        return layer(x)

    for token in range(T):
        old = layer.cache.get_value().key
        y = step(layer, inputs()[:, token : token + 1])
        assert old.is_deleted()
        np.testing.assert_allclose(y[:, 0], whole[:, token], atol=TOLERANCE)
    assert compiled == 1
    assert not np.isnan(y).any()
    assert np.isnan(step(layer, inputs()[:, :1])).all()  # past the capacity
    layer.init_cache(batch=B, capacity=T)
    np.testing.assert_allclose(step(layer, inputs()[:, :1])[:, 0], whole[:, 0], atol=TOLERANCE)


def test_caches_of_a_rope_that_depends_on_the_context_length():
    factors = dict(short_factor=(1.0, 1.0, 1.0, 1.0), long_factor=(1.0, 2.0, 3.0, 4.0))
    rope = rope_jax.Rope(H, rope_jax.LongRope(**factors, factor=2.0, original_length=4, base=100.0))
    for rotated in (None, True):
        linen, layer = rope_jax.RotaryAttention(**SIZES, rope=rope), native(rope=rope)
        layer.init_cache(batch=B, capacity=T, rotated=rotated)
        assert layer.cache.get_value().rotated == bool(rotated)
        cache = layer.cache.get_value()
        for part in chunks(inputs()):
            wanted, next_cache = linen.apply(to_linen(layer), part, cache=cache)
            plan = make_plan(rope, part.shape[:2], cache=cache)
            assert_same(nnx.clone(layer)(part, plan=plan, decode=True), wanted)
            assert_same(layer(part, decode=True), wanted)
            cache = next_cache
            assert_same(layer.cache.get_value(), cache)
    layer.init_cache(batch=B, capacity=T, eviction="sliding", num_sink_tokens=1, dtype=jnp.bfloat16)
    cache = layer.cache.get_value()
    assert (cache.eviction, cache.num_sink_tokens, cache.rotated, cache.key.dtype) == (
        "sliding",
        1,
        False,
        jnp.bfloat16,
    )


def test_a_cache_passed_as_a_value_under_jit():
    layer, cache = native(), caches(native())
    step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache), donate_argnums=2)
    for part, wanted in zip(chunks(inputs()), chunks(layer(inputs())), strict=True):
        y, cache = step(layer, part, cache)
        np.testing.assert_allclose(y, wanted, atol=TOLERANCE)


def test_a_stack_is_made_by_vmap_and_run_by_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs):
        return native(rngs=rngs, dropout_rate=0.5)

    stack = make(nnx.Rngs(0))
    assert stack.query.kernel.out_sharding == ("layers", "embed", "heads", "head_dim")

    @nnx.vmap
    def make_caches(layer):
        layer.init_cache(batch=B, capacity=T)

    make_caches(stack)
    graph, state = nnx.split(stack)
    each = [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(3)]

    @functools.partial(nnx.jit, static_argnames=("decode", "deterministic"))
    def run(stack, x, plan, decode=None, deterministic=None):
        @nnx.scan(in_axes=(nnx.StateAxes({...: 0}), nnx.Carry), out_axes=nnx.Carry)
        def layers(layer, x):
            return layer(x, plan=plan, decode=decode, deterministic=deterministic)

        return layers(stack, x)

    x = inputs()
    wanted = functools.reduce(lambda x, layer: layer(x), each, x)
    np.testing.assert_allclose(run(stack, x, make_plan(ROPE, (B, T))), wanted, atol=4 * TOLERANCE)
    for part, whole in zip(chunks(x), chunks(wanted), strict=True):
        cache = jax.tree.map(lambda leaf: leaf[0], stack.cache.get_value())
        plan = make_plan(ROPE, part.shape[:2], cache=cache)
        np.testing.assert_allclose(run(stack, part, plan, decode=True), whole, atol=4 * TOLERANCE)
    assert stack.cache.get_value().num_tokens.tolist() == [[T] * B] * 3
    noisy = [run(stack, x, make_plan(ROPE, (B, T)), deterministic=False) for _ in range(2)]
    assert np.abs(noisy[0] - noisy[1]).max() > 0.01

    class Stack(nn.Module):  # of linen, with the same parameters
        @nn.compact
        def __call__(self, x):
            body = lambda layer, x, _: (layer(x), None)
            options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3)
            return nn.scan(body, **options)(rope_jax.RotaryAttention(**SIZES, rope=ROPE, name="layers"), x, None)[0]

    variables = {"params": {"layers": to_linen(stack)["params"]}}
    np.testing.assert_allclose(Stack().apply(variables, x), wanted, atol=4 * TOLERANCE)


def test_a_step_of_an_optimizer_equals_that_of_the_linen_layer():
    linen, params, layer = layers("plain")
    layer = nnx.clone(layer)
    x, transformation = inputs(), optax.sgd(0.1, momentum=0.9)
    optimizer = nnx.Optimizer(layer, transformation, wrt=nnx.Param)

    @nnx.jit
    def train(layer, optimizer):
        loss, gradient = nnx.value_and_grad(lambda layer: jnp.mean(layer(x) ** 2))(layer)
        optimizer.update(layer, gradient)
        return loss

    losses = [float(train(layer, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    state = transformation.init(params)
    for _ in range(3):
        gradient = jax.grad(lambda params: jnp.mean(linen.apply(params, x) ** 2))(params)
        updates, state = transformation.update(gradient, state)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), to_linen(layer), params)


def test_a_checkpoint_brings_back_parameters_cache_and_random_keys(tmp_path):
    layer = native(dropout_rate=0.5, learn_sinks=True)
    layer.init_cache(batch=B, capacity=T)
    layer(inputs()[:, :3], decode=True)
    graph, state = nnx.split(layer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", state)
        checkpointer.wait_until_finished()

        def fresh():
            layer = native(seed=5, dropout_rate=0.5, learn_sinks=True)
            layer.init_cache(batch=B, capacity=T)
            return layer

        graph, empty = nnx.split(nnx.eval_shape(fresh))
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "layer", empty))
    assert_same(to_linen(restored), to_linen(layer))
    for options in (dict(decode=True), dict(deterministic=False)):
        assert_same(restored(inputs()[:, 3:], **options), layer(inputs()[:, 3:], **options))


def test_dropout():
    rngs, x = nnx.Rngs(1), inputs()
    layer, plain = native(dropout_rate=0.5, rngs=rngs), native()(x)
    other = nnx.clone(layer)
    rngs.dropout()  # the layer has a stream of its own
    assert_same(layer(x, deterministic=False), other(x, deterministic=False))
    assert_same(layer(x), plain)
    layer.train()
    assert not layer.deterministic
    one, two = (nnx.jit(lambda layer, x: layer(x))(layer, x) for _ in range(2))
    assert np.abs(one - two).max() > 0.01 and np.abs(one - plain).max() > 0.01
    for rngs in (lambda: nnx.Rngs(dropout=3), lambda: nnx.Rngs(3), lambda: nnx.Rngs(dropout=3).dropout):
        assert_same(layer(x, rngs=rngs()), layer(x, rngs=nnx.Rngs(dropout=3)))
    layer.eval()
    assert_same(layer(x), plain)

    # Weights are kept with their expectation: the mean of many outputs is the output without dropout.
    @nnx.split_rngs(splits=1024)
    @nnx.vmap(in_axes=(0, None))
    def many(rngs, layer):
        return layer(x, rngs=rngs, deterministic=False)

    outputs = np.float64(many(nnx.Rngs(dropout=0), layer))
    error = np.abs(outputs.mean(0) - plain) / (outputs.std(0) / np.sqrt(1024) + TOLERANCE)
    assert error.max() < 5.5  # standard errors, of 192 numbers


def test_dropout_without_a_key_is_refused():
    layer = native(dropout_rate=0.5, deterministic=False, rngs=nnx.Rngs(params=0))
    for rngs in (None, nnx.Rngs(params=0)):
        with pytest.raises(ValueError, match="rngs must have a stream named 'dropout' with dropout_rate above 0"):
            layer(inputs(), rngs=rngs)
    assert layer(inputs(), rngs=nnx.Rngs(dropout=0)).shape == (B, T, D)


def test_weights_are_kept_on_request():
    linen, params, layer = layers("window")
    _, nothing = nnx.capture(layer, nnx.Intermediate)(inputs())
    assert not nothing
    _, kept = nnx.capture(layer, nnx.Intermediate)(inputs(), sow_weights=True)
    (weights,) = kept["weights"].get_value()
    _, wanted = linen.apply(params, inputs(), mutable=["intermediates"])
    assert_same(weights, wanted["intermediates"]["weights"][0])


def test_views_share_parameters_and_a_cache():
    layer = native(dropout_rate=0.5)
    layer.init_cache(batch=B, capacity=T)
    decoding = nnx.view(layer, decode=True, deterministic=True)
    assert_same(decoding(inputs()), layer(inputs()))
    assert layer.cache.get_value().num_tokens.tolist() == [T, T]
    assert not layer.decode and decoding.query.kernel is layer.query.kernel
    assert not nnx.view(layer, deterministic=False).deterministic


def test_equal_layers_share_a_compiled_program():
    compiled = 0

    @nnx.jit
    def run(layer, x):
        nonlocal compiled
        compiled += 1
        return layer(x)

    fields = dict(qk_norm=True, dot_general=product, position_bias=T5Bias(), learn_sinks=True, use_bias=True)
    for seed in (1, 2):
        run(native(seed, **fields), inputs())
    assert compiled == 1


def test_logical_names_are_those_of_the_linen_layer():
    fields = dict(qk_norm=True, use_bias=True, learn_sinks=True, position_bias=T5Bias(), **SIZES, rope=ROPE)
    wanted = nn.get_partition_spec(rope_jax.RotaryAttention(**fields).init(jax.random.key(0), inputs()))
    got = nnx.get_partition_spec(nnx.state(nnx.eval_shape(lambda: native(**fields)), nnx.Param))
    assert_specs = lambda spec, of_linen: spec == of_linen
    assert all(jax.tree.leaves(jax.tree.map(assert_specs, nnx.to_pure_dict(got), wanted["params"])))
    rules = [
        ("embed", None),
        ("heads", "model"),
        ("kv_heads", None),
        ("head_dim", None),
        ("relative_buckets", None),
    ]
    with nnx.logical_axis_rules(rules):
        spec = nnx.get_partition_spec(nnx.state(native(**fields), nnx.Param))
    assert spec["out"]["kernel"].get_value() == jax.sharding.PartitionSpec("model", None, None)


def test_boxed_initialisers_give_their_values():
    kernel_init = nn.initializers.normal(0.5)
    plain = native(kernel_init=kernel_init)
    for boxed in (nn.with_logical_partitioning, nn.with_partitioning, nnx.with_partitioning):
        other = native(kernel_init=boxed(kernel_init, ("a", "b")))
        assert_same(to_linen(other), to_linen(plain))
        assert other.out.kernel.out_sharding == ("heads", "head_dim", "embed")


def test_a_position_bias_may_be_an_nnx_module():
    class Bias(nnx.Module):
        def __init__(self):
            self.slope = nnx.Param(jnp.ones(N))

        def __call__(self, distance, num_heads, causal):
            return -self.slope[...][None, :, None, None] * jnp.abs(distance.astype(jnp.float32))[:, None]

    layer = native(position_bias=Bias())
    wanted = native(position_bias=lambda distance, *_: -jnp.abs(distance.astype(jnp.float32))[:, None])
    np.testing.assert_allclose(layer(inputs()), wanted(inputs()), atol=TOLERANCE)
    gradient = nnx.grad(lambda layer: jnp.sum(layer(inputs()) ** 2))(layer)
    assert np.abs(gradient["position_bias"]["slope"].get_value()).min() > 0


def test_rms_norm_equals_that_of_linen():
    x = inputs()
    for options in ({}, dict(unit_offset=True, epsilon=0.1)):
        norm = RMSNorm(D, **options)
        norm.scale.set_value(norm.scale[...] + jnp.arange(D, dtype=jnp.float32))
        linen = rope_jax.attention.RMSNorm(axis="embed", **options)
        assert_same(norm(x), linen.apply(to_linen(norm), x))
        assert norm.scale.out_sharding == ("embed",)


def test_refusals():
    x = inputs()
    layer = native()
    cases = [
        (
            lambda: native(rope=rope_jax.Rope(4, rope_jax.Standard())),
            ValueError,
            "rope.head_dim must be head_dim=8",
        ),
        (lambda: native(num_kv_heads=3), ValueError, "num_kv_heads must divide num_heads=4, got 3"),
        (lambda: native(kv_features=0), ValueError, "kv_features must be at least 1, got 0"),
        (lambda: native(in_features=16.0), TypeError, "in_features must be an integer, got 16.0"),
        (
            lambda: native(rngs=jax.random.key(0)),
            TypeError,
            r"rngs must be nnx.Rngs, got \w+: pass nnx.Rngs\(seed\)",
        ),
        (lambda: native(implementation="fast"), ValueError, "implementation must be"),
        (lambda: layer(x[..., :8]), ValueError, r"x must have shape \[B, T, D\] with D=16, got \(2, 6, 8\)"),
        (lambda: layer(x.astype(jnp.int32)), TypeError, "x must be floating"),
        (lambda: layer(x, decode=True), ValueError, r"cache must be made before decode=True: call init_cache\("),
        (lambda: layer(x, jnp.zeros((1, 1), int)), ValueError, "positions must have shape"),
        (lambda: layer(x, cache=caches(native(num_kv_heads=1))), ValueError, "cache.key must have shape"),
        (lambda: layer(x, plan=make_plan(ROPE, (B, T + 1))), ValueError, "plan must be for B=2, T=6"),
        (lambda: native(decode=True)(x, plan=3), ValueError, "cache must be made before"),
        (lambda: native(rope=None)(x, jnp.arange(T)), ValueError, "positions must be left out without rope"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    layer.init_cache(batch=B, capacity=T - 1)
    with pytest.raises(ValueError, match="cache must be left out with decode=True"):
        layer(x, cache=caches(layer), decode=True)
    with pytest.raises(TypeError, match="plan must be a Plan"):
        layer(x, plan=3, decode=True)
    with pytest.raises(ValueError, match=r"x must fit in the cache: T=6 tokens were given, capacity S=5"):
        layer(x, decode=True)
    of_value = native()
    of_value.cache = nnx.data(caches(of_value))
    with pytest.raises(TypeError, match="cache must be an nnx.Cache, as from init_cache, got KVCache"):
        of_value(x, decode=True)
    assert layer.cache.get_value().num_tokens.tolist() == [0, 0]
    ring = native(ring_axis="sequence", dropout_rate=0.5)
    for name, options in {"sow_weights": dict(sow_weights=True), "dropout_rate": dict(deterministic=False)}.items():
        with pytest.raises(ValueError, match=f"{name} must be left out with ring_axis='sequence'"):
            ring(x, sequence_index=jnp.arange(T)[None], **options)


def test_parameters_of_another_module_are_refused():
    layer = native()
    wanted = to_linen(layer)
    params = to_linen(native(use_bias=True))
    with pytest.raises(ValueError, match=r"got params that have unexpected \['key/bias', 'out/bias'"):
        from_linen(layer, params)
    with pytest.raises(ValueError, match=r"got params that miss \['key/bias', 'out/bias'"):
        from_linen(native(use_bias=True), wanted)
    with pytest.raises(ValueError, match=r"params of out/kernel must have shape \(2, 8, 16\), got \(4, 8, 16\)"):
        from_linen(native(num_heads=2), wanted)
    lists = jax.tree.map(np.ndarray.tolist, jax.tree.map(np.asarray, wanted))
    for variables, error, message in (
        ({}, ValueError, r"variables must have the collection 'params', got \[\]"),
        (wanted["params"], ValueError, r"variables must have the collection 'params', got \['key', 'out'"),
        (None, TypeError, "variables must be a mapping of collections, as from init, got None"),
        ({"params": "text"}, TypeError, "params must be a mapping of names, got 'text'"),
        (lists, TypeError, "params of key/kernel must be an array"),
    ):
        with pytest.raises(error, match=message):
            from_linen(layer, variables)
    for exchange in (to_linen, lambda module: from_linen(module, wanted)):
        with pytest.raises(TypeError, match="module must be an nnx.Module, got dict"):
            exchange(wanted)
    assert_same(to_linen(layer), wanted)


def test_flags_and_streams_of_a_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=r"rngs must have a stream named 'params', got \['dropout'\]"):
        native(rngs=nnx.Rngs(dropout=0))
    with pytest.raises(TypeError, match="decode must be True or False, got 'no'"):
        native(decode="no")
    layer = native()
    layer.init_cache(batch=2, capacity=T)
    with pytest.raises(TypeError, match="decode must be True or False, got 'no'"):
        layer(jnp.ones((2, T, D)), decode="no")
    with pytest.raises(TypeError, match="rngs must be nnx.Rngs or a stream of these, got int"):
        layer(jnp.ones((2, T, D)), rngs=3)


@pytest.mark.parametrize("flag", ["deterministic", "decode", "sow_weights"])
def test_flags_of_a_call_are_true_or_false(flag):
    layer, x = native(), jnp.ones((2, T, D))
    for value in ("x", 1, jnp.ones(2)):
        with pytest.raises(TypeError, match=f"^{flag} must be True or False, got "):
            layer(x, **{flag: value})
        if flag != "sow_weights":
            with pytest.raises(TypeError, match=f"^{flag} must be True or False, got "):
                nnx.view(layer, **{flag: value})
    if flag == "deterministic":
        linen = rope_jax.RotaryAttention(**SIZES, rope=ROPE)
        with pytest.raises(TypeError, match="^deterministic must be True or False, got 'x'"):
            linen.init(jax.random.key(0), x, deterministic="x")


def test_flax_nnx_is_loaded_at_first_use():
    program = (
        "import sys, rope_jax; assert 'flax.nnx' not in sys.modules; rope_jax.nnx.RotaryAttention; "
        "assert 'flax.nnx' in sys.modules; assert not hasattr(rope_jax, 'nxx')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
