"""Prefix-LM: the first tokens of a row read each other in both directions, later tokens read backwards."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from attention_cases import in_blocks
from layer_oracle import assert_gradients, attention_layer, prefix_pairs

import rope_jax
from rope_jax.attention import make_plan

B, T, D, N, K, H = 3, 9, 16, 4, 2, 8
ROPE = rope_jax.Rope(H, rope_jax.Standard(base=100.0))
LAYER = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=ROPE)
TOLERANCE = 256 * oracles.EPS32  # as in test_layer.py
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
PARAMS = nn.unbox(LAYER.init(jax.random.key(0), X))
PREFIX = np.array([4, 1, 7])


def wanted(prefix=PREFIX, x=X):
    return attention_layer(LAYER, PARAMS, x, prefix_pairs(x.shape[1], prefix), np.arange(x.shape[1]))


def new_cache(capacity=T + 2, **fields):
    return rope_jax.init_cache(batch=B, capacity=capacity, num_kv_heads=K, head_dim=H, **fields)


@pytest.mark.parametrize("prefix", [0, 1, 5, T, T + 3, [4, 1, 7], [0, 20, 9]], ids=str)
def test_the_prefix_is_read_in_both_directions(prefix):
    want = wanted(np.broadcast_to(prefix, B))
    np.testing.assert_allclose(LAYER.apply(PARAMS, X, prefix_length=prefix), want, atol=TOLERANCE)
    traced = jax.jit(lambda n: LAYER.apply(PARAMS, X, prefix_length=n))(jnp.asarray(prefix))
    np.testing.assert_allclose(traced, want, atol=TOLERANCE)


def test_a_prefix_of_no_or_one_token_is_causal_and_one_of_all_tokens_is_not():
    causal = LAYER.apply(PARAMS, X)
    for prefix in (0, 1):
        np.testing.assert_array_equal(LAYER.apply(PARAMS, X, prefix_length=prefix), causal)
    both_ways = LAYER.clone(causal=False).apply(PARAMS, X)
    np.testing.assert_allclose(LAYER.apply(PARAMS, X, prefix_length=T), both_ways, atol=TOLERANCE)
    assert abs(both_ways - causal).max() > 0.1


@pytest.mark.parametrize("implementation", [None, "blocks", "xla"])
def test_blocks_that_the_prefix_reads_are_not_skipped(implementation, monkeypatch):
    in_blocks(monkeypatch, 2, 2)
    layer = LAYER.clone(implementation=implementation)
    np.testing.assert_allclose(layer.apply(PARAMS, X, prefix_length=PREFIX), wanted(), atol=TOLERANCE)


def test_gradients():
    assert_gradients(
        lambda x, kernel: LAYER.apply(with_kernel(kernel), x, prefix_length=PREFIX),
        lambda x, kernel: attention_layer(LAYER, with_kernel(kernel), x, prefix_pairs(T, PREFIX), np.arange(T)),
        (X, PARAMS["params"]["key"]["kernel"]),
    )


def with_kernel(kernel):
    return {"params": PARAMS["params"] | {"key": {"kernel": kernel}}}


def padded(mask, rows=X):
    """Rows whose tokens lie where the mask is True, with NaN between; and where each row's tokens came from."""
    out = np.full((*mask.shape, D), np.nan, np.float32)
    for b, real in enumerate(mask):
        out[b, real] = np.asarray(rows)[b, : real.sum()]
    return jnp.asarray(out)


MASK = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1, 1, 1]], bool)


def test_the_prefix_counts_real_tokens():
    """Padded on the left, on the right, and with gaps; a prefix may be longer than its row."""
    prefix = np.array([4, 6, 5])
    got = LAYER.apply(PARAMS, padded(MASK), mask=MASK, prefix_length=prefix)
    for b, real in enumerate(MASK):
        count = real.sum()
        alone = wanted(prefix[b : b + 1], X[b : b + 1, :count])
        np.testing.assert_allclose(got[b, real], alone[0], atol=TOLERANCE)


@pytest.mark.parametrize("fields", [{}, dict(rotated=False), dict(eviction="sliding")], ids=str)
@pytest.mark.parametrize("first", [7, 8, T])
def test_prefill_and_decode_are_the_full_pass(first, fields):
    step = jax.jit(lambda x, cache, n: LAYER.apply(PARAMS, x, cache=cache, prefix_length=n))
    y, cache = step(X[:, :first], new_cache(**fields), PREFIX)
    parts = [y]
    for t in range(first, T):  # the prefix may be given again: all of it is in the cache
        y, cache = (
            step(X[:, t : t + 1], cache, PREFIX) if t % 2 else LAYER.apply(PARAMS, X[:, t : t + 1], cache=cache)
        )
        parts.append(y)
    assert cache.num_tokens.tolist() == [T] * B
    np.testing.assert_allclose(jnp.concatenate(parts, 1), wanted(), atol=TOLERANCE)


def test_padded_prompts_in_a_cache():
    prefix, more = np.array([4, 3, 5]), X[:, -2:]
    y, cache = LAYER.apply(PARAMS, padded(MASK), mask=MASK, prefix_length=prefix, cache=new_cache())
    z, cache = LAYER.apply(PARAMS, more, cache=cache)
    for b, real in enumerate(MASK):
        row = jnp.concatenate([X[b : b + 1, : real.sum()], more[b : b + 1]], axis=1)
        want = wanted(prefix[b : b + 1], row)[0]
        np.testing.assert_allclose(y[b, real], want[:-2], atol=TOLERANCE)
        np.testing.assert_allclose(z[b], want[-2:], atol=TOLERANCE)


def test_a_long_prompt_in_a_cache():
    """Long enough for a kernel, which has no prefix."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 600, D)), jnp.float32)
    cache = rope_jax.init_cache(batch=1, capacity=640, num_kv_heads=K, head_dim=H)
    call = lambda x, cache, **options: LAYER.apply(PARAMS, x, cache=cache, **options)[0]
    got = call(x, cache, prefix_length=550)
    np.testing.assert_allclose(got, wanted([550], x), atol=TOLERANCE)
    # Without it, a program for a TPU asks whether the cache is empty, and gives the new tokens alone to the kernel.
    conditions = lambda **options: str(jax.make_jaxpr(call)(x, cache, **options)).count("cond[")
    assert conditions() > conditions(prefix_length=550)


def test_a_divided_prefix_is_an_error_or_nan():
    step = lambda x, cache, n: LAYER.apply(PARAMS, x, cache=cache, prefix_length=n)
    with pytest.raises(ValueError, match="prefix_length must be of tokens in a single call before which the cache"):
        step(X[:, :6], new_cache(), PREFIX)  # row 2 has a prefix of 7
    y, cache = jax.jit(step)(X[:, :6], new_cache(), PREFIX)
    assert np.isnan(y[2]).all() and np.isfinite(y[:2]).all()
    assert cache.overflowed.tolist() == [False, False, True]
    # A prefix that begins in the cache, whose tokens have not read it.
    _, cache = step(X[:, :3], new_cache(), jnp.array([0, 3, 2]))
    with pytest.raises(ValueError, match=r"rows had \[3, 3, 3\] tokens and have \[9, 9, 9\]"):
        step(X[:, 3:], cache, PREFIX)
    y, cache = jax.jit(step)(X[:, 3:], cache, PREFIX)
    assert np.isnan(np.asarray(y)[[0, 2]]).all() and np.isfinite(y[1]).all()
    assert cache.overflowed.tolist() == [True, False, True]


def test_a_row_without_tokens_in_a_step_divides_nothing():
    idle = np.array([[1] * 4, [0] * 4, [1] * 4], bool)
    _, cache = LAYER.apply(PARAMS, X[:, :4], mask=idle, cache=new_cache(), prefix_length=jnp.array([4, 3, 0]))
    only = np.array([[0] * 4, [1] * 4, [0] * 4], bool)
    y, _ = LAYER.apply(PARAMS, X[:, :4], mask=only, cache=cache, prefix_length=jnp.array([4, 3, 0]))
    np.testing.assert_allclose(y[1], wanted([3], X[1:2, :4])[0], atol=TOLERANCE)


def test_the_plan_carries_indices_and_no_mask():
    plan = make_plan(ROPE, (B, T), prefix_length=PREFIX)
    facts = plan.facts()
    assert facts.mask is None and facts.query_index.shape == (B, T) and facts.key_index.shape == (1, T)
    got = LAYER.apply(PARAMS, X, plan=plan)
    np.testing.assert_array_equal(got, LAYER.apply(PARAMS, X, prefix_length=PREFIX))


@pytest.mark.parametrize(
    ("prefix", "error", "says"),
    [
        (2.0, TypeError, "prefix_length must be integer, got dtype float32"),
        (-1, ValueError, "prefix_length must be 0 or more, got -1"),
        ([1, 2], ValueError, r"prefix_length must have shape \[B\] with B={1, 3}, got \(2,\)"),
        (np.ones((B, 1), int), ValueError, r"prefix_length must have shape \[B\]"),
    ],
)
def test_refusals(prefix, error, says):
    with pytest.raises(error, match=says):
        LAYER.apply(PARAMS, X, prefix_length=prefix)
