"""Writes to a cache, against a loop over tokens; what the compiler makes of them; and their transformations."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import build
from fast import first
from jax import export

import rope_jax
from rope_jax.attention.cache_write import write_slots

LAYERS, B, S, K, H = 3, 3, 8, 2, 4
COUNTERS = [0, 3, 5]  # with T = 3, each row has room
FULL = [5, 6, 8]  # with T = 3, one row has room, one has room for some tokens, one has none


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def slots_from(counters, tokens):
    return jnp.asarray(counters, jnp.int32)[:, None] + jnp.arange(tokens, dtype=jnp.int32)


def by_hand(stored, new, slots, layer=None, at_once=False):
    """Token by token; ``at_once`` leaves a row as it is unless all its tokens fit."""
    out = np.array(stored)
    rows = out if layer is None else out[layer]
    for b, row in enumerate(np.asarray(slots)):
        for t, slot in enumerate(row):
            if 0 <= slot < S and not (at_once and row.max() >= S):
                rows[b, :, slot] = np.asarray(new)[b, t].astype(out.dtype)
    return out


def empty(**change):
    return rope_jax.init_cache(**(dict(batch=B, capacity=S, num_kv_heads=K, head_dim=H) | change))


def filled(cache, counters):
    """The cache with random numbers in all slots, so that no write beside its slots is missed."""
    key, value = (
        jax.tree.map(lambda leaf, seed=seed: (20 * random(*leaf.shape, seed=seed)).astype(leaf.dtype), stored)
        for seed, stored in enumerate((cache.key, cache.value))
    )
    return dataclasses.replace(cache, key=key, value=value, num_tokens=jnp.asarray(counters, jnp.int32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("features", [(), (H,)], ids=["scale", "features"])
@pytest.mark.parametrize("layer", [None, 1], ids=["alone", "in a stack"])
@pytest.mark.parametrize("counters", [COUNTERS, FULL], ids=["fits", "overflows"])
@pytest.mark.parametrize("tokens", [1, 3, S])
def test_writes_are_those_of_a_loop_bit_for_bit(tokens, counters, layer, features, dtype):
    stored = (20 * random(*([] if layer is None else [LAYERS]), B, K, S, *features)).astype(dtype)
    new = 20 * random(B, tokens, K, *features, seed=1)
    slots = slots_from(counters, tokens)
    for consecutive in (False, True):
        write = jax.jit(functools.partial(write_slots, consecutive=consecutive))  # the layer is traced
        got = write(stored, new, slots, layer=layer)
        want = by_hand(stored, new, slots, layer, at_once=consecutive and tokens > 1)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(write_slots(stored, new, slots, layer=layer, consecutive=consecutive), want)


@pytest.mark.parametrize("layer", [None, 2])
def test_gaps_and_a_ring_are_written_token_by_token(layer):
    stored = random(*([] if layer is None else [LAYERS]), B, K, S, H)
    new = random(B, 4, K, H, seed=1)
    slots = jnp.array([[3, S, S, 4], [S, S, S, S], [6, 7, 0, 1]], jnp.int32)
    np.testing.assert_array_equal(write_slots(stored, new, slots, layer=layer), by_hand(stored, new, slots, layer))


@pytest.mark.parametrize("rule", [{}, dict(eviction="sliding")], ids=["fills", "evicts"])
@pytest.mark.parametrize("mask", [None, [[1], [0], [1]]], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_one_token_goes_to_its_slot(dtype, mask, rule):
    """A masked token goes nowhere; so does a token past the end, and an evicting row overwrites its oldest token."""
    cache = filled(empty(dtype=dtype, **rule), [2, 5, S + 3 if rule else S])
    key, value = random(B, 1, K, H, seed=2), random(B, 1, K, H, seed=3)
    mask = None if mask is None else jnp.asarray(mask, bool)
    got = jax.jit(rope_jax.KVCache.write)(cache, key, value, mask)
    last = 3 if rule else S
    slots = jnp.array([[2], [5 if mask is None else S], [last]], jnp.int32)
    for stored, new, after in ((cache.key, key, got.key), (cache.value, value, got.value)):
        new = rope_jax.attention.quantize(new, dtype) if dtype == jnp.int8 else new
        for old, tokens, leaf in zip(*map(jax.tree.leaves, (stored, new, after)), strict=True):
            np.testing.assert_array_equal(leaf, by_hand(old, tokens, slots))


def test_a_mask_of_real_tokens_stores_what_no_mask_stores():
    key, value = random(B, 3, K, H), random(B, 3, K, H, seed=1)
    for dtype in (jnp.float32, jnp.int8):
        cache = filled(empty(dtype=dtype), COUNTERS)
        masked = cache.write(key, value, jnp.ones((B, 3), bool))
        jax.tree.map(np.testing.assert_array_equal, cache.write(key, value), masked)


@pytest.mark.parametrize("tokens", [1, 3])
def test_vmap_over_caches(tokens):
    caches = [filled(empty(), counters) for counters in (COUNTERS, FULL)]
    new = [random(B, tokens, K, H, seed=seed) for seed in range(2)]
    stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    got = jax.vmap(lambda cache, kv: cache.write(kv, 2 * kv))(stack(*caches), stack(*new))
    write = jax.jit(lambda cache, kv: cache.write(kv, 2 * kv))  # traced, so that rows may overflow
    jax.tree.map(np.testing.assert_array_equal, got, stack(*map(write, caches, new)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("counters", [COUNTERS, FULL], ids=["fits", "overflows"])
def test_the_gradient_of_a_write_reads_the_slots(counters, tokens, dtype):
    cotangent, new = random(LAYERS, B, K, S, H, seed=4, dtype=dtype), random(B, tokens, K, H, seed=1, dtype=dtype)
    slots = slots_from(counters, tokens)
    write = lambda stored, new: write_slots(stored, new, slots, layer=jnp.int32(1), consecutive=True)
    got = jax.vjp(write, jnp.ones_like(cotangent), new)[1](cotangent)
    written = by_hand(np.zeros(cotangent.shape), np.ones(new.shape), slots, 1, at_once=tokens > 1) == 1
    np.testing.assert_array_equal(got[0], np.where(written, 0, cotangent))
    want = np.zeros(new.shape, dtype)
    for b, t in np.ndindex(B, tokens):
        slot = int(slots[b, t])
        if slot < S and written[1, b, 0, slot].all():
            want[b, t] = cotangent[1, b, :, slot]
    np.testing.assert_array_equal(got[1], want)


@pytest.mark.parametrize("tokens", ["1", "3", "t"])
@pytest.mark.parametrize("capacity", [str(S), "s"])
def test_exported_with_symbolic_sizes(capacity, tokens):
    b, s, t = export.symbolic_shape(f"b, {capacity}, {tokens}", constraints=["s >= 3"] * (capacity == "s"))
    cache = jax.eval_shape(lambda: empty(batch=b, capacity=s))
    kv = jax.ShapeDtypeStruct((b, t, K, H), jnp.float32)
    write = jax.jit(rope_jax.KVCache.write)
    leaves, tree = jax.tree.flatten(cache)
    flat = jax.jit(lambda leaves, key: jax.tree.leaves(write(jax.tree.unflatten(tree, leaves), key, key)))
    exported = export.export(flat)(leaves, kv)
    for counters in (COUNTERS, FULL):
        have = filled(empty(), counters)
        new = random(B, 3 if tokens == "t" else int(tokens), K, H, seed=1)
        # Only sizes that are known let all tokens be written at once: else the tokens that fit are written.
        slots = slots_from(counters, new.shape[1])
        want = by_hand(have.key, new, slots, at_once=tokens == "3" and capacity != "s")
        np.testing.assert_array_equal(exported.call(jax.tree.leaves(have), new)[0], want)


def test_a_symbolic_capacity_may_turn_out_too_small():
    """Without a constraint on S, only the running program knows whether three tokens fit."""
    (s,) = export.symbolic_shape("s")
    cache = jax.eval_shape(lambda: empty(capacity=s))
    write = jax.jit(lambda cache, kv: cache.write(kv, kv))
    new = random(B, 3, K, H, seed=1)
    exported = export.export(write)(cache, new)
    for capacity in (2, 3, 5):
        got = exported.call(empty(capacity=capacity), new)
        np.testing.assert_array_equal(got.overflowed, [capacity < 3] * B)
        if capacity >= 3:
            np.testing.assert_array_equal(got.key, empty(capacity=capacity).write(new, new).key)


# ---------------------------------------------------------------------------------- what the compiler makes of it


@pytest.mark.parametrize("dtype", first(1, [jnp.float32, jnp.int8]))
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_donated_stack_is_written_in_place(tokens, dtype):
    cache = empty(num_layers=LAYERS, capacity=512, dtype=dtype)
    slots = slots_from(COUNTERS, tokens)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, layer, kv):
        written = dataclasses.replace(cache, layer=layer).store(kv, kv, slots, consecutive=True)
        return dataclasses.replace(written, layer=None)

    where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((cache.key, cache.value))]
    compiled = step.lower(cache, jnp.int32(1), random(B, tokens, K, H)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < jax.tree.leaves(cache.key)[0].nbytes // LAYERS
    after = step(cache, jnp.int32(1), random(B, tokens, K, H))
    assert where == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((after.key, after.value))]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_decoder_steps_without_temporaries_of_cache_size(dtype, tokens):
    """Layers are carried: a step holds a block of one layer, and no copy of the cache of all layers."""
    model = build(num_layers=24, dtype=dtype)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    cache = jax.eval_shape(lambda: model.init_cache(batch=2, capacity=4096))
    step = jax.jit(lambda params, token, cache: model.apply(params, token, cache=cache), donate_argnums=2)
    compiled = step.lower(params, jax.ShapeDtypeStruct((2, tokens), jnp.int32), cache).compile()
    memory, stored = compiled.memory_analysis(), cache.key.size * cache.key.dtype.itemsize
    assert memory.alias_size_in_bytes >= 2 * stored
    assert memory.temp_size_in_bytes < stored // 8
    stack = ",".join(map(str, cache.key.shape))
    assert not re.findall(rf"= \w+\[{stack}\]\S* (?:copy|transpose)\(", compiled.as_text())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_cpu_writes_narrow_floats_without_widening_the_stack(dtype):
    """XLA would read and write all of it, for each token."""
    stack = jax.ShapeDtypeStruct((LAYERS, B, K, S, H), dtype)
    new, slots = jax.ShapeDtypeStruct((B, 1, K, H), dtype), jax.ShapeDtypeStruct((B, 1), jnp.int32)
    write = jax.jit(functools.partial(write_slots, layer=1), donate_argnums=0)
    text = write.lower(stack, new, slots).compile().as_text()
    assert "dynamic-update-slice" in text and f"f32[{LAYERS},{B},{K},{S},{H}]" not in text
