"""Learned sinks: a score of each head that takes a share of the softmax and has no value."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import rope_jax
from rope_jax.attention import Facts, explain

B, T, S, N, K, H = 2, 9, 9, 4, 2, 8
TOLERANCE = 64 * oracles.EPS32  # scores of a size of 4, sums of 9 weights


def arrays(dtype=jnp.float32, length=T, kv_length=S):
    rng = np.random.default_rng(0)
    shapes = ((B, length, N, H), (B, kv_length, K, H), (B, kv_length, K, H), (N,))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def wanted(q, k, v, sinks, *, causal=True, allowed=None, cap=None):
    """Weights ``[B, N, T, S]`` and output ``[B, T, N, H]`` in float64: a softmax over S + 1 scores, the last unread."""
    q, k, v, sinks = (np.asarray(x, np.float64) for x in (q, k, v, sinks))
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    allowed = np.ones(scores.shape, bool) if allowed is None else np.broadcast_to(allowed, scores.shape)
    if causal:
        allowed = allowed & np.tri(*scores.shape[-2:], dtype=bool)
    scores = np.where(allowed, scores, -np.inf)
    column = np.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    every = np.concatenate([scores, column], axis=-1)
    every = np.exp(every - every.max(axis=-1, keepdims=True))
    weights = (every / every.sum(axis=-1, keepdims=True))[..., :-1]
    return weights, np.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize("implementation", [None, "blocks", "xla"])
@pytest.mark.parametrize("options", [{}, dict(causal=False), dict(cap=1.5)], ids=str)
def test_the_softmax_has_one_score_more(options, implementation):
    q, k, v, sinks = arrays()
    weights, out = wanted(q, k, v, sinks, **options)
    given = dict(causal=options.get("causal", True), logit_cap=options.get("cap"), sink_logits=sinks)
    got = rope_jax.attend(q, k, v, **given, implementation=implementation)
    np.testing.assert_allclose(got, out, atol=TOLERANCE)
    np.testing.assert_allclose(rope_jax.attention.attention_weights(q, k, **given), weights, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    q, k, v, sinks = arrays(dtype)
    got = rope_jax.attend(q, k, v, causal=True, sink_logits=sinks)
    assert got.dtype == dtype
    # Weights and output are rounded, and the output once more with its share.
    limit = 2 * float(jnp.finfo(dtype).eps) * float(jnp.abs(v).max())
    np.testing.assert_allclose(np.float64(got), wanted(q, k, v, sinks)[1], atol=limit)


def test_sinks_that_take_nothing_or_everything():
    q, k, v, sinks = arrays()
    plain = rope_jax.attend(q, k, v, causal=True)
    nothing = rope_jax.attend(q, k, v, causal=True, sink_logits=jnp.full_like(sinks, -1e9))
    np.testing.assert_allclose(nothing, plain, atol=TOLERANCE)
    everything = rope_jax.attend(q, k, v, causal=True, sink_logits=jnp.full_like(sinks, 1e9))
    np.testing.assert_array_equal(everything, jnp.zeros_like(plain))


def test_a_query_without_a_key_gives_zero_and_finite_gradients():
    q, k, v, sinks = arrays()
    mask = jnp.ones((B, 1, T, S), bool).at[0, :, 3].set(False)
    loss = lambda q, k, v, sinks: jnp.sum(rope_jax.attend(q, k, v, mask=mask, sink_logits=sinks) ** 2)
    out = rope_jax.attend(q, k, v, mask=mask, sink_logits=sinks)
    np.testing.assert_array_equal(out[0, 3], jnp.zeros((N, H)))
    for gradient in jax.grad(loss, (0, 1, 2, 3))(q, k, v, sinks):
        assert np.isfinite(gradient).all()
    weights = rope_jax.attention.attention_weights(q, k, mask=mask, sink_logits=sinks)
    np.testing.assert_array_equal(weights[0, :, 3], jnp.zeros((N, S)))
    np.testing.assert_allclose(weights, wanted(q, k, v, sinks, causal=False, allowed=mask)[0], atol=TOLERANCE)


def test_gradients_are_those_of_the_plain_formula():
    q, k, v, sinks = arrays()
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    loss = lambda *operands: jnp.vdot(
        rope_jax.attend(*operands[:3], causal=True, sink_logits=operands[3]), cotangent
    )
    got = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, sinks)
    # Central differences in float64, along a random direction of each operand.
    for i, gradient in enumerate(got):
        direction = np.random.default_rng(2 + i).normal(size=gradient.shape)

        def at(step, i=i, direction=direction):
            moved = [np.asarray(x, np.float64) for x in (q, k, v, sinks)]
            moved[i] = moved[i] + step * direction
            return np.vdot(wanted(*moved)[1], np.float64(cotangent))

        want = (at(1e-6) - at(-1e-6)) / 2e-6
        # Terms of a size of 1, as many as the operand has numbers, each off by a few units of float32.
        limit = 64 * oracles.EPS32 * np.sqrt(gradient.size) * np.abs(direction).max() * 8
        np.testing.assert_allclose(np.vdot(gradient, direction), want, atol=limit)


def test_in_many_blocks_and_under_vmap():
    q, k, v, sinks = arrays(length=300, kv_length=300)
    np.testing.assert_allclose(
        rope_jax.attend(q, k, v, causal=True, sink_logits=sinks),
        wanted(q, k, v, sinks)[1],
        atol=4 * TOLERANCE,
    )
    q, k, v, sinks = arrays()
    many = jnp.stack([sinks, sinks + 1, sinks - 2])
    got = jax.vmap(lambda sinks: rope_jax.attend(q, k, v, causal=True, sink_logits=sinks))(many)
    for out, sinks in zip(got, many, strict=True):
        np.testing.assert_allclose(out, wanted(q, k, v, sinks)[1], atol=TOLERANCE)


LAYER = rope_jax.RotaryAttention(
    num_heads=N, num_kv_heads=K, head_dim=H, rope=rope_jax.Rope(H, rope_jax.Standard()), learn_sinks=True
)


def with_sinks(params):
    sinks = jnp.asarray(np.random.default_rng(3).normal(size=N), jnp.float32)
    return {"params": dict(nn.unbox(params)["params"], sink_logits=sinks)}


def test_the_layer_has_a_parameter_of_each_head():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(B, T, 16)), jnp.float32)
    boxed = LAYER.init(jax.random.key(0), x)
    assert nn.get_partition_spec(boxed)["params"]["sink_logits"] == jax.sharding.PartitionSpec("heads")
    sinks = nn.unbox(boxed)["params"]["sink_logits"]
    assert sinks.dtype == jnp.float32 and sinks.tolist() == [0.0] * N
    params = with_sinks(boxed)
    without = LAYER.clone(learn_sinks=False)
    plain = {"params": {name: value for name, value in params["params"].items() if name != "sink_logits"}}
    _, kept = without.apply(plain, x, mutable=["intermediates"])
    y, kept_with = LAYER.apply(params, x, mutable=["intermediates"])
    # The share of the keys is theirs alone; the kept weights say it.
    weights, weights_with = (each["intermediates"]["weights"][0] for each in (kept, kept_with))
    share = weights_with.sum(axis=-1, keepdims=True)
    assert float(share.max()) < 1 and float(share.min()) > 0
    np.testing.assert_allclose(weights_with, weights * share, atol=TOLERANCE)
    assert not np.allclose(y, without.apply(plain, x), atol=1e-3)


def test_a_cache_gives_what_the_whole_text_gives():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(B, T, 16)), jnp.float32)
    params = with_sinks(LAYER.init(jax.random.key(0), x))
    whole = LAYER.apply(params, x)
    cache = rope_jax.init_cache(batch=B, capacity=T, num_kv_heads=K, head_dim=H)
    parts = []
    for start, end in itertools.pairwise((0, 5, 6, 7, 8, 9)):
        y, cache = LAYER.apply(params, x[:, start:end], cache=cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=TOLERANCE * 4)


def test_a_kernel_of_ones_own_sees_the_sinks():
    x = jnp.ones((B, T, 16))
    seen = []

    def kernel(q, k, v, facts):
        seen.append(facts.sink_logits)
        return rope_jax.attend(q, k, v, causal=facts.causal, scale=facts.scale, sink_logits=facts.sink_logits)

    params = with_sinks(LAYER.init(jax.random.key(0), x))
    got = LAYER.clone(attention_fn=kernel).apply(params, x)
    np.testing.assert_array_equal(seen[0], params["params"]["sink_logits"])
    np.testing.assert_allclose(got, LAYER.apply(params, x), atol=TOLERANCE)


def test_refusals():
    q, k, v, sinks = arrays()
    attend = functools.partial(rope_jax.attend, q, k, v)
    with pytest.raises(ValueError, match=r"sink_logits must have shape \[N\] with N=4, got \(3,\)"):
        attend(sink_logits=sinks[:3])
    with pytest.raises(TypeError, match="sink_logits must be floating, got dtype int32"):
        attend(sink_logits=jnp.zeros(N, jnp.int32))
    with pytest.raises(ValueError, match="must not be 'cudnn': cuDNN has no sink_logits"):
        attend(sink_logits=sinks, implementation="cudnn")
    q = jax.ShapeDtypeStruct((1, 8192, 32, 128), jnp.bfloat16)
    facts = Facts(causal=True, sink_logits=jnp.zeros(32))
    assert explain(q, q, facts, platform="tpu").path == "splash"
    ring = LAYER.clone(ring_axis="x")
    with pytest.raises(ValueError, match="learn_sinks must be left out with ring_axis='x'"):
        ring.init(jax.random.key(0), jnp.zeros((1, 4, 16)), sequence_index=jnp.arange(4)[None])
    assert dataclasses.replace(facts, sink_logits=None).sink_logits is None
