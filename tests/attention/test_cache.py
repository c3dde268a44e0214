import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import rope_jax

B, S, K, H = 3, 6, 2, 4


def empty(**change):
    return rope_jax.init_cache(**(dict(batch=B, capacity=S, num_kv_heads=K, head_dim=H) | change))


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(B, count, K, H)), jnp.float32) for _ in range(2))


@given(st.lists(hnp.arrays(bool, st.tuples(st.just(B), st.integers(1, 4))), min_size=1, max_size=4))
def test_rows_hold_their_real_tokens_in_order(masks):
    """Against a list per row. Under jit, so that rows may run over: then the excess is dropped."""
    cache = empty()
    write = jax.jit(lambda cache, k, v, mask: cache.write(k, v, mask))
    rows = [[] for _ in range(B)]
    for seed, mask in enumerate(masks):
        key, value = tokens(mask.shape[1], seed)
        cache = write(cache, key, value, mask)
        for b, t in zip(*np.nonzero(mask), strict=True):
            rows[b].append((key[b, t], value[b, t]))
    assert cache.num_tokens.tolist() == [len(row) for row in rows]
    assert cache.overflowed.tolist() == [len(row) > S for row in rows]
    for b, row in enumerate(rows):
        for s, (key, value) in enumerate(row[:S]):
            np.testing.assert_array_equal(cache.key[b, :, s], key)
            np.testing.assert_array_equal(cache.value[b, :, s], value)
        assert not np.any(cache.key[b, :, len(row) :]) and not np.any(cache.value[b, :, len(row) :])


def test_a_full_cache_is_never_clamped_into():
    key, value = tokens(S)
    cache = empty().write(key, value)
    more, _ = tokens(1, seed=1)
    after = jax.jit(rope_jax.KVCache.write)(cache, more, more)
    np.testing.assert_array_equal(after.key, cache.key)
    assert after.overflowed.all() and not cache.overflowed.any()
    assert jax.jit(rope_jax.KVCache.write)(after, more, more).overflowed.all()


def test_donated_it_is_updated_in_place():
    cache = empty(capacity=64)
    step = jax.jit(rope_jax.KVCache.write, donate_argnums=0)
    key, value = tokens(1)
    where = cache.key.unsafe_buffer_pointer()
    after = step(cache, key, value)
    assert cache.key.is_deleted() and cache.value.is_deleted()
    assert after.key.unsafe_buffer_pointer() == where


def test_keeps_its_own_dtype():
    key, value = tokens(2)
    cache = empty(dtype=jnp.bfloat16).write(key, value)
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache.key[:, :, :2], jnp.swapaxes(key, 1, 2).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: empty(capacity=0), ValueError, "capacity must be at least 1, got 0"),
        (lambda: empty(batch=-1), ValueError, "batch must be at least 1, got -1"),
        (lambda: empty(dtype=jnp.int32), TypeError, "dtype must be floating or int8, got dtype int32"),
        (lambda: empty().write(*tokens(S + 1)), ValueError, "T=7 tokens were given, capacity S=6"),
        (
            lambda: jax.jit(lambda c: c.write(*tokens(S + 1)))(empty()),
            ValueError,
            "key must fit in the cache: T=7 tokens were given, capacity S=6",
        ),
        (lambda: empty().write(*tokens(5)).write(*tokens(2)), ValueError, r"rows would hold \[7, 7, 7\]"),
        (
            lambda: empty(batch=2).write(*tokens(1)),
            ValueError,
            r"key must have shape \[B, T, K, H\] with B=2.*got \(3,",
        ),
        (lambda: empty(num_kv_heads=1).write(*tokens(1)), ValueError, r"with B=3, K=1, H=4, got \(3, 1, 2, 4\)"),
        (
            lambda: empty().write(next(tokens(2)), next(tokens(1))),
            ValueError,
            r"value must .* T=2.*got \(3, 1, 2, 4\)",
        ),
        (lambda: empty().write(*tokens(2), mask=jnp.ones((3, 3), bool)), ValueError, "mask must have shape .* T=2"),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ("x", TypeError, "values must be an array of numbers, got str"),
        ([1, 2], TypeError, "values must be floating, got dtype int32"),
        (1.0, ValueError, r"values must have shape \[B, \.\.\.\] with B=2, got \(\)"),
        (np.ones((3, 4), np.float32), ValueError, r"values must have shape \[B, \.\.\.\] with B=2, got \(3, 4\)"),
    ],
)
def test_values_without_a_row_for_each_row_of_the_cache_are_refused(values, error, says):
    cache = rope_jax.init_cache(batch=2, capacity=3, num_kv_heads=1, head_dim=2)
    assert cache.nan_if_overflowed([1.0, 2.0]).tolist() == [1.0, 2.0]
    with pytest.raises(error, match=says):
        cache.nan_if_overflowed(values)
