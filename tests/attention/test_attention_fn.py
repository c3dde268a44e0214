"""Attention by a function of the user's own, and the explanation of the program that attention takes."""

import functools

import decoders
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax
from rope_jax.attention import Explanation, Facts, explain
from rope_jax.attention.attend import attend_by_facts

B, T, D, N, K, H = 2, 9, 12, 4, 2, 8
ROPE = rope_jax.Rope(head_dim=H, schedule=rope_jax.Standard())


def from_facts(q, k, v, facts, seen=None):
    """Softmax of all scores, by what the facts say."""
    if seen is not None:
        seen.append((q.shape, k.shape, facts))
    mask = facts.attention_mask(q.shape[1], k.shape[1])
    bias = facts.score_bias(q.shape[1], k.shape[1])
    options = dict(mask=mask, bias=bias, scale=facts.scale, logit_cap=facts.logit_cap)
    weights = rope_jax.attention.attention_weights(q, k, **options)
    return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // K, axis=2)).astype(q.dtype)


FIELDS = {
    "causal": {},
    "window and cap": dict(window=3, logit_cap=2.0, logit_scale=0.3),
    "bias": dict(position_bias=rope_jax.attention.T5Bias(num_buckets=6, max_distance=8)),
    "not causal": dict(causal=False),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_layer_calls_it_with_rotated_arrays_and_the_facts(name):
    make = functools.partial(
        rope_jax.RotaryAttention, num_heads=N, num_kv_heads=K, head_dim=H, rope=ROPE, **FIELDS[name]
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    params = nn.unbox(make().init(jax.random.key(0), x))
    real = np.arange(T) < np.array([[T], [T - 3]])
    seen = []
    own = make(attention_fn=functools.partial(from_facts, seen=seen))
    for options in ({}, dict(mask=real), dict(segment_ids=np.arange(T)[None] // 4 + np.zeros((B, 1), int))):
        want, got = (module.apply(params, x, **options) for module in (make(), own))
        shown = real if "mask" in options else np.ones((B, T), bool)
        np.testing.assert_allclose(np.asarray(got)[shown], np.asarray(want)[shown], atol=2e-6)
    assert seen[0][:2] == ((B, T, N, H), (B, T, K, H)) and seen[0][2].logit_cap == make().logit_cap
    if make().causal:
        cache = rope_jax.init_cache(batch=B, capacity=T + 2, num_kv_heads=K, head_dim=H)
        want, _ = make().apply(params, x, cache=cache)
        got, _ = own.apply(params, x, cache=cache)
        np.testing.assert_allclose(got, want, atol=2e-6)
        assert seen[-1][1] == (B, T + 2, K, H)


def test_a_decoder_hands_it_to_every_layer():
    tokens = jnp.zeros((1, 6), jnp.int32)
    plain = decoders.build(rope=rope_jax.Rope(decoders.build().head_dim, rope_jax.Standard()))
    params = nn.unbox(plain.init(jax.random.key(0), tokens))
    zero = plain.clone(attention_fn=lambda q, k, v, facts: jnp.zeros_like(q))
    assert np.abs(zero.apply(params, tokens) - plain.apply(params, tokens)).max() > 1e-3

    def by_library(q, k, v, facts):
        return rope_jax.attend(q, k, v, causal=facts.causal, scale=facts.scale)

    same = plain.clone(attention_fn=by_library)
    np.testing.assert_array_equal(same.apply(params, tokens), plain.apply(params, tokens))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(attention_fn=lambda q, k, v: q), TypeError, r"attention_fn must be a callable of \(q, k, v, facts\)"),
        (dict(attention_fn=3), TypeError, "attention_fn must be a callable"),
        (dict(attention_fn=from_facts, implementation="xla"), ValueError, "implementation must be left out"),
        (dict(attention_fn=from_facts, ring_axis="s"), ValueError, "ring_axis must be left out"),
    ],
)
def test_refusals(change, error, says):
    layer = rope_jax.RotaryAttention(num_heads=N, head_dim=H, rope=ROPE, **change)
    with pytest.raises(error, match=says):
        layer.init(jax.random.key(0), jnp.ones((1, 3, D)))


Q, KEYS = (jax.ShapeDtypeStruct((1, 4096, heads, 128), jnp.bfloat16) for heads in (32, 8))


@pytest.mark.parametrize(
    ("facts", "options", "says"),
    [
        (Facts(causal=True), dict(platform="tpu"), "splash: jax's kernel for a TPU"),
        (Facts(causal=True), dict(platform="tpu", divided=True), "call attention inside shard_map"),
        (Facts(causal=True), dict(platform="gpu"), "blocks of 512 queries and 1024 keys: the kernel is for a TPU"),
        (Facts(causal=True), dict(platform="cpu", implementation="xla"), "xla of 4096 queries and 4096 keys"),
        (Facts(causal=True), dict(platform="gpu", implementation="cudnn"), "cudnn: asked for by name"),
        (Facts(bias=jnp.zeros((1, 1, 1, 4096))), dict(platform="tpu"), "the kernel has no bias"),
        (Facts(window=jnp.int32(3)), dict(platform="tpu"), "the kernel has no traced window"),
        (
            Facts(query_index=jnp.zeros((1, 4096), jnp.int32)),
            dict(platform="tpu"),
            "in the order of their sequence",
        ),
    ],
)
def test_explains_the_program(facts, options, says):
    got = explain(Q, KEYS, facts, **options)
    assert isinstance(got, Explanation) and says in str(got)


def test_explains_what_a_lowered_program_holds():
    """The program lowered for a TPU calls a kernel exactly where the explanation says so."""
    for facts in (Facts(causal=True), Facts(causal=True, query_index=jnp.zeros((1, 4096), jnp.int32))):
        attend = functools.partial(attend_by_facts, facts=facts)
        heads_first = [jax.ShapeDtypeStruct((1, n, 4096, 128), jnp.bfloat16) for n in (32, 8, 8)]
        text = jax.jit(attend).trace(*heads_first).lower(lowering_platforms=("tpu",)).as_text()
        assert ("tpu_custom_call" in text) == (explain(Q, KEYS, facts, platform="tpu").path == "splash")


def test_a_name_that_cannot_serve_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match="got 'splash': the kernel is for a TPU, not for a CPU"):
        explain(Q, KEYS, Facts(causal=True), platform="cpu", implementation="splash")
    with pytest.raises(ValueError, match="platform must be one of"):
        explain(Q, KEYS, Facts(causal=True), platform="npu")
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        explain(Q, KEYS, Facts(), platform="cpu", implementation="flash")
    with pytest.raises(ValueError, match="'cudnn': cuDNN is for a GPU, not for a CPU"):
        explain(Q, KEYS, Facts(), platform="cpu", implementation="cudnn")
    with pytest.raises(ValueError, match="'cudnn': cuDNN has no logit_cap"):
        explain(Q, KEYS, Facts(logit_cap=3.0), platform="gpu", implementation="cudnn")
    with pytest.raises(ValueError, match="must not be empty"):
        explain(Q.update(shape=(1, 0, 32, 128)), KEYS, Facts(), platform="cpu")
    q = jnp.ones((1, 600, 4, 16))
    with pytest.raises(ValueError, match="got 'splash': the kernel is for a TPU, not for a CPU"):
        rope_jax.attend(q, q, q, causal=True, implementation="splash")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda y: y[:, :1], ValueError, r"attention_fn\(q, k, v, facts\) must have shape \[B, T, N, H\]"),
        (lambda y: y[:1], ValueError, "must have shape"),
        (lambda y: y[:, :, :K], ValueError, "must have shape"),
        (lambda y: y.astype(jnp.bfloat16), TypeError, "attention_fn must return q's dtype float32, got bfloat16"),
        (lambda y: None, TypeError, r"attention_fn must return an array \[B, T, N, H\], got NoneType"),
    ],
)
def test_its_output_is_checked(change, error, says):
    x = jnp.ones((B, T, D))
    layer = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=ROPE)
    params = layer.init(jax.random.key(0), x)
    with pytest.raises(error, match=says):
        layer.clone(attention_fn=lambda *args: change(from_facts(*args))).apply(params, x)


def test_it_reads_the_window_of_each_layer_of_a_stack():
    """Also a window that only the running program knows is `facts.window`."""

    def by_window(q, k, v, facts):
        return rope_jax.attend(q, k, v, causal=facts.causal, window=facts.window)

    model = decoders.build(num_layers=2, window=(3, None))
    tokens = jnp.arange(2 * T).reshape(2, T) % 7
    params = model.init(jax.random.key(0), tokens)
    want, got = (m.apply(params, tokens) for m in (model, model.clone(attention_fn=by_window)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_dropout_by_rate_alone_is_no_matter_for_the_kernel():
    q, k = (jax.ShapeDtypeStruct((1, 1024, heads, 64), jnp.float32) for heads in (4, 2))
    assert explain(q, k, Facts(causal=True, dropout_rate=0.1), platform="tpu").path == "blocks"
    for facts, says in ((None, "facts must be Facts"), ({}, "facts must be Facts")):
        with pytest.raises(TypeError, match=says):
            explain(q, k, facts, platform="tpu")
    with pytest.raises(TypeError, match="q must be an array or a jax.ShapeDtypeStruct, got tuple"):
        explain(q.shape, k, Facts(), platform="tpu")
    with pytest.raises(ValueError, match="q must have a multiple of K=2 heads, got N=3"):
        explain(jax.ShapeDtypeStruct((1, 8, 3, 64), jnp.float32), k, Facts(), platform="tpu")
