"""100,000 decode steps through a ring of slots, beside attention from scratch at random steps."""

import counts
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory import resident_bytes

import rope_jax

STEPS, WINDOW, WIDTH = 100_000, 24, 16
CHECKED = 60


@pytest.mark.full
def test_a_ring_of_slots_is_right_after_100_000_steps_and_does_not_grow():
    rope = rope_jax.Rope(8, rope_jax.Yarn(factor=4.0, original_length=64))
    layer = rope_jax.RotaryAttention(num_heads=4, num_kv_heads=2, head_dim=8, rope=rope, window=WINDOW)
    params = nn.unbox(layer.init(jax.random.key(0), jnp.ones((1, 1, WIDTH))))
    traces = []

    def decode(x, cache):
        traces.append(x.shape)
        return layer.apply(params, x, cache=cache)

    step = jax.jit(decode, donate_argnames="cache")
    whole = jax.jit(lambda x, positions: layer.apply(params, x, positions)[:, -1])
    tokens = np.random.default_rng(0).normal(size=(997, WIDTH)).astype(np.float32)  # token t is row t % 997
    checked = set(np.random.default_rng(1).integers(WINDOW, STEPS, CHECKED).tolist()) | {WINDOW, STEPS - 1}
    cache = rope_jax.init_cache(batch=1, capacity=WINDOW, num_kv_heads=2, head_dim=8, eviction="sliding")
    on_device = [jnp.asarray(token)[None, None] for token in tokens]
    before = bytes_used = None
    for t in range(STEPS):
        y, cache = step(on_device[t % len(tokens)], cache)
        if t in checked:
            near = np.arange(t - WINDOW + 1, t + 1)
            expected = whole(jnp.asarray(tokens[near % len(tokens)])[None], jnp.asarray(near))
            # one order of sums beside another, over weights of sum 1 and 16 features
            np.testing.assert_allclose(y[:, -1], expected, atol=2e-6, rtol=2e-6)
        if t == STEPS // 10:
            before, bytes_used = counts.now(), resident_bytes()
    counts.assert_no_growth(before, counts.now(), arrays=2, objects=100)
    assert int(cache.num_tokens[0]) == STEPS
    assert traces == [(1, 1, WIDTH)]  # compiled once
    assert resident_bytes() < bytes_used + 50e6
