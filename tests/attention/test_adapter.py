import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import rope_jax

ROPE = rope_jax.Rope(8, rope_jax.Standard(base=100.0), layout="interleaved")


def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32)), jnp.float32)


@pytest.mark.parametrize("positions", [None, [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]]])
def test_flax_attention_equals_rotary_attention_with_the_same_parameters(positions):
    x = inputs()
    where = None if positions is None else jnp.array(positions)
    theirs = nn.MultiHeadDotProductAttention(
        num_heads=4, attention_fn=rope_jax.attention.rotary_attention_fn(ROPE, where)
    )
    params = theirs.init(jax.random.key(0), x)
    ours = rope_jax.RotaryAttention(num_heads=4, head_dim=8, rope=ROPE, use_bias=True)
    mask = nn.make_causal_mask(x[..., 0])
    np.testing.assert_allclose(
        theirs.apply(params, x, mask=mask), ours.apply(params, x, where), atol=256 * oracles.EPS32
    )


def test_dropout_and_other_arguments_reach_the_inner_function():
    module = nn.MultiHeadDotProductAttention(
        num_heads=4,
        dropout_rate=0.5,
        deterministic=False,
        attention_fn=rope_jax.attention.rotary_attention_fn(ROPE),
    )
    x = inputs()
    params = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    one, two = (module.apply(params, x, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 2))
    assert np.abs(one - two).max() > 0.01


def test_decode_is_refused_with_the_reason():
    module = nn.MultiHeadDotProductAttention(
        num_heads=4, decode=True, attention_fn=rope_jax.attention.rotary_attention_fn(ROPE)
    )
    x = inputs()
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match="T=1, got S=6.*decode=True caches keys before.*RotaryAttention with cache="
    ):
        module.apply(variables, x[:, :1], mutable=["cache"])


def test_cross_attention_is_refused():
    module = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=rope_jax.attention.rotary_attention_fn(ROPE))
    with pytest.raises(ValueError, match="for cross-attention, kv= and kv_positions="):
        module.init(jax.random.key(0), inputs(), inputs()[:, :3])


@functools.cache
def both(**change):
    """NNX's attention by the adapter, and ours with the same parameters."""
    attention_fn = rope_jax.attention.rotary_attention_fn(ROPE, decode=True, **change)
    theirs = nnx.MultiHeadAttention(
        num_heads=4, in_features=32, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(0)
    )
    ours = rope_jax.nnx.RotaryAttention(
        in_features=32, num_heads=4, head_dim=8, rope=ROPE, use_bias=True, rngs=nnx.Rngs(1)
    )
    rope_jax.nnx.from_linen(ours, rope_jax.nnx.to_linen(theirs))
    return theirs, ours


INNER = {"linen": {}, "nnx": dict(attention_fn=nnx.dot_product_attention)}


@pytest.mark.parametrize("inner", INNER)
def test_nnx_attention_equals_rotary_attention_with_the_same_parameters(inner):
    theirs, ours = both(**INNER[inner])
    x, limit = inputs(), dict(atol=256 * oracles.EPS32)
    wanted = ours(x)
    np.testing.assert_allclose(theirs(x, mask=nnx.make_causal_mask(x[..., 0])), wanted, **limit)
    np.testing.assert_allclose(theirs(x, is_causal=True), wanted, **limit)
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x, is_causal=True))(theirs, x), wanted, **limit)
    ours = nnx.clone(ours)
    ours.causal = False
    np.testing.assert_allclose(theirs(x), ours(x), **limit)
    mask = jnp.array([[1] * 6, [1, 1, 1, 1, 0, 0]], bool)
    got = theirs(x, mask=mask[:, None, None, :], is_causal=True)
    np.testing.assert_allclose(got[mask], wanted[mask], **limit)


@pytest.mark.parametrize("inner", INNER)
def test_nnx_decode_equals_rotary_attention(inner):
    theirs, ours = both(**INNER[inner])
    x, mask = inputs(), jnp.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    for options, wanted, real in (
        ({}, ours(x), np.ones((2, 6), bool)),
        (dict(is_causal=True), ours(x), np.ones((2, 6), bool)),
        (dict(mask=mask.astype(bool)[:, None, None, :]), ours(x, mask=mask), mask == 1),
    ):
        theirs.init_cache(x.shape)
        step = nnx.jit(lambda layer, x, options=options: layer(x, decode=True, **options))
        got = jnp.concatenate([step(theirs, x[:, i : i + 1]) for i in range(6)], axis=1)
        np.testing.assert_allclose(got[real], wanted[real], atol=256 * oracles.EPS32)


def test_linen_decode_equals_rotary_attention():
    x = inputs()
    attention_fn = rope_jax.attention.rotary_attention_fn(ROPE, decode=True)
    theirs = nn.MultiHeadDotProductAttention(num_heads=4, decode=True, attention_fn=attention_fn)
    variables = theirs.init(jax.random.key(0), x)
    ours = rope_jax.RotaryAttention(num_heads=4, head_dim=8, rope=ROPE, use_bias=True)
    wanted, cache = ours.apply({"params": variables["params"]}, x), variables["cache"]
    for token in range(6):
        y, changed = theirs.apply(variables | {"cache": cache}, x[:, token : token + 1], mutable=["cache"])
        cache = changed["cache"]
        np.testing.assert_allclose(y[:, 0], wanted[:, token], atol=256 * oracles.EPS32)


def test_refusals_of_decode():
    with pytest.raises(ValueError, match="positions must be left out with decode=True: tokens stand at the slots"):
        rope_jax.attention.rotary_attention_fn(ROPE, jnp.arange(6), decode=True)
    attention_fn = rope_jax.attention.rotary_attention_fn(ROPE, decode=True)
    q, k = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 6, 4, 8))
    with pytest.raises(ValueError, match="decode=True serves one query .* got T=2 queries and S=6 keys$"):
        attention_fn(q, k, k, mask=jnp.ones((1, 1, 2, 6), bool))
    with pytest.raises(ValueError, match="got T=1 queries and S=6 keys without a mask"):
        attention_fn(q[:, :1], k, k)
    theirs = nnx.MultiHeadAttention(
        num_heads=4,
        in_features=32,
        attention_fn=rope_jax.attention.rotary_attention_fn(ROPE),
        decode=True,
        rngs=nnx.Rngs(0),
    )
    theirs.init_cache((2, 6, 32))
    with pytest.raises(ValueError, match="T=1, got S=6.*pass decode=True to rotary_attention_fn"):
        theirs(inputs()[:, :1])
