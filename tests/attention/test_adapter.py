import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

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
