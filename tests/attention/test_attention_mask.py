"""An attention mask of the caller: in addition to causality, windows, padding and segments."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from attention_cases import in_blocks
from layer_oracle import assert_gradients, attention_layer

import rope_jax
from rope_jax.attention import make_plan

B, T, D, N, K, H = 2, 7, 16, 4, 2, 8
ROPE = rope_jax.Rope(H, rope_jax.Standard(base=100.0))
LAYER = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=ROPE)
TOLERANCE = 256 * oracles.EPS32
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
PARAMS = nn.unbox(LAYER.init(jax.random.key(0), X))
SHAPES = [(B, 1, T, T), (B, N, T, T), (1, N, T, T), (1, 1, T, T), (B, 1, 1, T), (B, N, 1, T)]


def given(shape, seed=1):
    return np.random.default_rng(seed).random(shape) < 0.6


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_combined_with_causality(shape, causal):
    mask, layer = given(shape), LAYER.clone(causal=causal)
    allowed = mask & np.tri(T, dtype=bool) if causal else mask
    want = attention_layer(layer, PARAMS, X, allowed, np.arange(T))
    np.testing.assert_allclose(layer.apply(PARAMS, X, attention_mask=mask), want, atol=TOLERANCE)
    plan = make_plan(ROPE, (B, T), causal=causal, attention_mask=mask)
    np.testing.assert_allclose(layer.apply(PARAMS, X, plan=plan), want, atol=TOLERANCE)


def test_a_query_without_any_key_gives_zero():
    mask = np.ones((B, 1, T, T), bool)
    mask[1, :, 3] = False
    y = LAYER.apply(PARAMS, X, attention_mask=mask)
    np.testing.assert_array_equal(y[1, 3], np.zeros(D))
    np.testing.assert_array_equal(y[0], LAYER.apply(PARAMS, X)[0])


def test_is_combined_with_a_window_padding_and_a_prefix(monkeypatch):
    in_blocks(monkeypatch, 2, 3)
    mask, real = given((B, N, T, T)), np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], bool)
    t, s = np.mgrid[:T, :T]
    where = np.array([[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 0]])
    readable = mask & real[:, None, None, :]
    near = readable & (s <= t) & (t - s < 3)
    got = LAYER.clone(window=3).apply(PARAMS, X, mask=real, attention_mask=mask)
    want = attention_layer(LAYER, PARAMS, X, near, where)
    np.testing.assert_allclose(got[real], want[real], atol=TOLERANCE)
    prefix = np.array([3, 2])
    both = (where[:, :, None] < prefix[:, None, None]) & (where[:, None, :] < prefix[:, None, None])
    got = LAYER.apply(PARAMS, X, mask=real, attention_mask=mask, prefix_length=prefix)
    want = attention_layer(LAYER, PARAMS, X, readable & ((s <= t) | both[:, None]), where)
    np.testing.assert_allclose(got[real], want[real], atol=TOLERANCE)


def test_gradients():
    mask = given((B, N, T, T))
    assert_gradients(
        lambda x: LAYER.apply(PARAMS, x, attention_mask=mask),
        lambda x: attention_layer(LAYER, PARAMS, x, mask & np.tri(T, dtype=bool), np.arange(T)),
        (X,),
    )


@pytest.mark.parametrize("rotated", [True, False])
def test_with_a_cache_the_mask_is_of_its_slots(rotated):
    capacity = T + 2
    cache = rope_jax.init_cache(batch=B, capacity=capacity, num_kv_heads=K, head_dim=H, rotated=rotated)
    mask = given((B, N, T, T))
    of_slots = np.zeros((B, N, T, capacity), bool)
    of_slots[..., :T] = mask
    want = attention_layer(LAYER, PARAMS, X, mask & np.tri(T, dtype=bool), np.arange(T))
    got, cache = LAYER.apply(PARAMS, X[:, :4], cache=cache, attention_mask=of_slots[:, :, :4])
    np.testing.assert_allclose(got, want[:, :4], atol=TOLERANCE)
    for t in range(4, T):
        part = slice(t, t + 1)
        y, cache = LAYER.apply(PARAMS, X[:, part], cache=cache, attention_mask=of_slots[:, :, part])
        np.testing.assert_allclose(y, want[:, part], atol=TOLERANCE)


def test_a_long_prompt_in_a_cache():
    """Long enough for a kernel, which has no attention mask."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 600, D)), jnp.float32)
    cache = rope_jax.init_cache(batch=1, capacity=640, num_kv_heads=K, head_dim=H)
    mask = given((1, 1, 600, 640))
    want = attention_layer(LAYER, PARAMS, x, mask[..., :600] & np.tri(600, dtype=bool), np.arange(600))
    call = lambda x, cache, **options: LAYER.apply(PARAMS, x, cache=cache, **options)[0]
    got = call(x, cache, attention_mask=mask)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    # Without it, a program for a TPU asks whether the cache is empty, and gives the new tokens alone to the kernel.
    conditions = lambda **options: str(jax.make_jaxpr(call)(x, cache, **options)).count("cond[")
    assert conditions() > conditions(attention_mask=mask)


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (given((B, T, T)), ValueError, r"attention_mask must have shape \[B, N, T, S\]"),
        (given((B, 3, T, T)), ValueError, r"attention_mask must have shape \[B, N, T, S\] with B={1, 2}, N={1, 4}"),
        (given((B, 1, T, T + 1)), ValueError, "S=7"),
        (given((B, 1, T, T)).astype(int), TypeError, "attention_mask must be bool, True if a query may read a key"),
    ],
)
def test_refusals(mask, error, says):
    with pytest.raises(error, match=says):
        LAYER.apply(PARAMS, X, attention_mask=mask)


def test_a_plan_for_other_heads_is_refused():
    plan = make_plan(ROPE, (B, T), attention_mask=given((B, 2, T, T)))
    with pytest.raises(ValueError, match="plan must be for num_heads=4, got an attention mask of N=2 heads"):
        LAYER.apply(PARAMS, X, plan=plan)


def test_with_a_cache_the_capacity_is_named():
    cache = rope_jax.init_cache(batch=B, capacity=T + 2, num_kv_heads=K, head_dim=H)
    with pytest.raises(ValueError, match="S=9"):
        LAYER.apply(PARAMS, X, cache=cache, attention_mask=given((B, 1, T, T)))
