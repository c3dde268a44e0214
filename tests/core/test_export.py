"""jax.export with symbolic batch and length, serialized to bytes and back."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import export

import rope_jax

SHAPE = export.symbolic_shape("b, t")
ROPES = [
    rope_jax.Rope(16, rope_jax.Yarn(factor=4.0, original_length=64), rotary_dim=12),
    rope_jax.Rope(16, rope_jax.Llama3(factor=8.0, original_length=64), rotary_dim=8, layout="interleaved"),
]


def there_and_back(fn, *specs):
    return export.deserialize(export.export(jax.jit(fn))(*specs).serialize()).call


def spec(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("rope", ROPES, ids=["half", "interleaved"])
def test_rope(rope):
    b, t = SHAPE
    call = there_and_back(rope, spec((b, t, 4, 16)), spec((b, t, 2, 16)), spec((b, t), jnp.int32))
    for batch, length in ((1, 1), (3, 7)):
        q, k = random(batch, length, 4, 16), random(batch, length, 2, 16)
        positions = jnp.full((batch, length), 1_000_003) + jnp.arange(length)
        for got, want in zip(call(q, k, positions), rope(q, k, positions), strict=True):
            np.testing.assert_allclose(got, want, atol=16 * oracles.EPS32)


def test_length_dependent_rope():
    rope = rope_jax.Rope(
        8, rope_jax.LongRope(short_factor=[1] * 4, long_factor=[2] * 4, original_length=16, factor=4.0)
    )
    b, t = SHAPE
    call = there_and_back(
        lambda x, m, n: rope(x, x, m, context_length=n)[0],
        spec((b, t, 1, 8)),
        spec((b, t), jnp.int32),
        spec((b,), jnp.int32),
    )
    x, positions, lengths = random(2, 5, 1, 8), jnp.arange(10).reshape(2, 5), jnp.array([16, 17])
    np.testing.assert_allclose(
        call(x, positions, lengths), rope(x, x, positions, context_length=lengths)[0], atol=16 * oracles.EPS32
    )


@pytest.mark.parametrize(
    ("rope", "options"),
    [
        (ROPES[0], {}),
        pytest.param(ROPES[1], dict(window=3, qk_norm=True), marks=pytest.mark.full),
        pytest.param(ROPES[1], {}, marks=pytest.mark.full),
        pytest.param(ROPES[0], dict(window=3, qk_norm=True), marks=pytest.mark.full),
        pytest.param(ROPES[0], dict(logit_cap=3.0), marks=pytest.mark.full),
        pytest.param(ROPES[1], dict(logit_cap=3.0), marks=pytest.mark.full),
    ],
    ids=lambda value: value.layout if isinstance(value, rope_jax.Rope) else str(value),
)
def test_rotary_attention(rope, options):
    module = rope_jax.RotaryAttention(num_heads=4, num_kv_heads=2, head_dim=16, rope=rope, **options)
    params = nn.unbox(module.init(jax.random.key(0), random(1, 4, 32)))
    b, t = SHAPE

    plain = there_and_back(lambda x: module.apply(params, x), spec((b, t, 32)))
    masked = there_and_back(lambda x, m: module.apply(params, x, mask=m), spec((b, t, 32)), spec((b, t), jnp.bool))
    empty = functools.partial(rope_jax.init_cache, capacity=8, num_kv_heads=2, head_dim=16)
    kept, structure = jax.tree.flatten(jax.eval_shape(lambda: empty(batch=b)))
    cached = there_and_back(
        lambda x, *leaves: jax.tree.leaves(module.apply(params, x, cache=jax.tree.unflatten(structure, leaves))),
        spec((b, t, 32)),
        *kept,
    )
    for batch, length in ((1, 5), (2, 7)):
        x = random(batch, length, 32)
        mask = jnp.arange(length)[None] >= jnp.arange(batch)[:, None]
        np.testing.assert_allclose(plain(x), module.apply(params, x), atol=256 * oracles.EPS32)
        np.testing.assert_allclose(masked(x, mask), module.apply(params, x, mask=mask), atol=256 * oracles.EPS32)
        y, *leaves = cached(x, *jax.tree.leaves(empty(batch=batch)))
        np.testing.assert_allclose(y, module.apply(params, x), atol=256 * oracles.EPS32)
        assert leaves[2].tolist() == [length] * batch
        over, *_ = cached(x, *leaves)  # a second time there is no room: not clamped
        assert np.isnan(over).all()
