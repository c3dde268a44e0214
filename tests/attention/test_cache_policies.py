"""Caches that evict, forget, gather and grow, and keys that are turned when they are read or when the schedule switches:
each against attention from scratch over the tokens that are left."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from fast import first

import rope_jax

B, N, K, H, D = 2, 4, 2, 8, 16
ROPE = rope_jax.Rope(H, rope_jax.Standard())
LONG = rope_jax.LongRope(
    short_factor=(1.0, 1.0, 1.1, 1.3), long_factor=(1.0, 2.0, 5.0, 8.0), factor=4.0, original_length=8
)
# Sums of at most 64 float32 products of numbers near 1, in another order.
CLOSE = 64 * oracles.EPS32 * 4
WORST: dict[str, float] = {}  # of each test, the largest difference


@pytest.fixture(scope="module", autouse=True)
def worst_differences():
    """With ``pytest -s`` the table of them is printed."""
    yield
    print("\n", *(f"{worst:.1e}  {name}" for name, worst in WORST.items()), sep="\n")


def close(got, want, atol=CLOSE):
    name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
    WORST[name] = max(WORST.get(name, 0.0), float(np.abs(np.asarray(got) - np.asarray(want)).max()))
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def layer(rope=ROPE, **change):
    module = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=rope, **change)
    params = module.init(jax.random.key(0), jnp.ones((1, 2, D)), **known(rope))
    return module, params


def known(rope):
    return {"context_length": 2} if rope.needs_context_length else {}


def tokens(length, seed=1):
    return jax.random.normal(jax.random.key(seed), (B, length, D))


def empty(capacity, **change):
    return rope_jax.init_cache(**dict(batch=B, capacity=capacity, num_kv_heads=K, head_dim=H) | change)


def stepper(module, params):
    """One jitted step, and how often it was traced."""
    traces = []

    @jax.jit
    def step(x, cache, mask=None):
        traces.append(x.shape)
        return module.apply(params, x, cache=cache, mask=mask)

    return step, traces


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("cuts", [[1] * 20, [3, 1, 3, 2, 3, 3, 3, 2]])
def test_a_ring_is_a_sliding_window(rotated, cuts):
    """In pieces of up to 3 tokens a window of 5 needs 7 slots, and 5 where tokens come one by one."""
    module, params = layer(window=5)
    x = tokens(20)
    want = module.apply(params, x)
    cache = empty(4 + max(cuts), eviction="sliding", rotated=rotated)
    step, traces = stepper(module, params)
    got, start = [], 0
    for cut in cuts:
        y, cache = step(x[:, start : start + cut], cache)
        got.append(y)
        start += cut
    close(jnp.concatenate(got, axis=1), want)
    assert len(traces) == len(set(cuts)) and not cache.overflowed.any()


def test_a_ring_of_rows_with_padding():
    module, params = layer(window=4)
    x = tokens(12)
    mask = np.ones((B, 12), bool)
    mask[0, [1, 2, 7]] = False
    cache = empty(7, eviction="sliding")
    full = jax.jit(module.apply)
    for start in range(0, 12, 4):
        part = slice(start, start + 4)
        y, cache = module.apply(params, x[:, part], mask=mask[:, part], cache=cache)
        for b in range(B):
            seen = np.flatnonzero(mask[b, : start + 4])
            alone = full(params, x[b : b + 1, seen])
            here = mask[b, part].sum()
            close(y[b][mask[b, part]], alone[0, len(seen) - here :])


@pytest.mark.parametrize("sinks", [1, 3])
def test_sinks_stand_right_before_the_window(sinks):
    """StreamingLLM: each query reads the first tokens and the last, at their positions inside the cache."""
    capacity = 8
    module, params = layer()
    x = tokens(30)
    cache = empty(capacity, eviction="sliding", num_sink_tokens=sinks, rotated=False)
    step, traces = stepper(module, params)
    y, cache = step(x[:, :6], cache)
    close(y, module.apply(params, x[:, :6]))
    for t in range(6, 30):
        y, cache = step(x[:, t : t + 1], cache)
        kept = np.r_[:sinks, max(sinks, t + 1 - capacity + sinks) : t + 1]
        want = module.apply(params, x[:, kept])[:, -1:]
        close(y, want)
    assert len(traces) == 2


def test_ten_thousand_evictions_drift_by_nothing():
    """Keys are stored as they are and turned once, when they are read: only where they stand changes."""
    capacity, sinks, count = 6, 2, 10_000
    module, params = layer()
    x = tokens(count)
    cache = empty(capacity, eviction="sliding", num_sink_tokens=sinks, rotated=False)

    def step(cache, x):
        y, cache = module.apply(params, x[:, None], cache=cache)
        return cache, y[:, 0]

    cache, ys = jax.jit(lambda cache, x: jax.lax.scan(step, cache, x.swapaxes(0, 1)))(cache, x)
    kept = np.r_[:sinks, count - capacity + sinks : count]
    close(ys[-1], module.apply(params, x[:, kept])[:, -1])
    assert cache.num_tokens.tolist() == [count] * B


def test_positions_that_restart_are_the_callers_subtraction():
    """Only m - n counts: a caller whose positions move by an offset subtracts it, and no key is touched."""
    module, params = layer()
    x = tokens(9)
    positions = jnp.arange(9)[None] + 500
    want = module.apply(params, x, positions)
    _, cache = module.apply(params, x[:, :8], positions[:, :8], cache=empty(9))
    last = positions[:, 8:] + jnp.array([[70_000], [-30_000]])  # in the caller's count, which moved
    y, _ = module.apply(params, x[:, 8:], last - jnp.array([[70_000], [-30_000]]), cache=cache)
    close(y, want[:, 8:])
    stayed, _ = module.apply(params, x[:, 8:], last, cache=cache)
    assert np.abs(stayed - want[:, 8:]).max() > 1e-3


@pytest.mark.parametrize("rotated", [True, False])
def test_truncated_rows_go_on_as_if_the_rest_had_not_been(rotated):
    module, params = layer()
    x, other = tokens(7), tokens(3, seed=2)
    _, cache = module.apply(params, x, cache=empty(12, rotated=rotated))
    kept = [4, 9]  # more than there are: all
    y, cache = module.apply(params, other, cache=cache.truncate(jnp.array(kept)))
    assert cache.num_tokens.tolist() == [7, 10]
    for b, length in enumerate([4, 7]):
        both = jnp.concatenate([x[b : b + 1, :length], other[b : b + 1]], axis=1)
        close(y[b], module.apply(params, both)[0, length:])


def test_rows_that_are_taken_and_room_that_grows():
    module, params = layer()
    x, next_x = tokens(6), tokens(1, seed=3)
    _, cache = module.apply(params, x, cache=empty(6))
    rows = jnp.array([1, 0, 1])
    taken = cache.select_rows(rows).grow(9)
    y, after = module.apply(params, next_x[jnp.array([0, 0, 1])], cache=taken)
    both = jnp.concatenate([x[rows], next_x[jnp.array([0, 0, 1])]], axis=1)
    close(y, module.apply(params, both)[:, -1:])
    assert after.num_tokens.tolist() == [7] * 3 and after.capacity == 9
    # What overflowed does not come back with the room.
    full = jax.jit(rope_jax.KVCache.write)(cache, jnp.ones((B, 1, K, H)), jnp.ones((B, 1, K, H)))
    assert full.overflowed.all() and full.grow(20).overflowed.all()
    outside = jax.jit(rope_jax.KVCache.select_rows)(cache, jnp.array([0, 2, -1]))
    assert outside.overflowed.tolist() == [False, True, True]


# ---------------------------------------------------------------------------- frequencies that depend on the length

SCHEDULES = {"long": LONG, "dynamic": rope_jax.DynamicNTK(factor=4.0, original_length=8)}


@pytest.mark.parametrize(("name", "rotated"), first(1, [("long", False), ("long", True), ("dynamic", False)]))
def test_decoding_across_the_switch_is_the_full_forward_at_the_new_length(name, rotated):
    """Rows of unequal length, so that one switches before the other; one program for all steps."""
    rope = rope_jax.Rope(H, SCHEDULES[name])
    module, params = layer(rope)
    x = tokens(14)
    mask = np.ones((B, 5), bool)
    mask[1, 3:] = False  # row 1 is 2 tokens behind
    cache = empty(16, rotated=rotated, rope=rope)
    full = jax.jit(lambda x, length: module.apply(params, x, context_length=length), static_argnums=1)
    step, traces = stepper(module, params)
    _, cache = step(x[:, :5], cache, mask)
    rows = [list(range(5)), list(range(3))]
    for t in range(5, 14):
        y, cache = step(x[:, t : t + 1], cache)
        for b, row in enumerate(rows):
            row.append(t)
            length = len(row)
            want = full(x[b : b + 1, row], length)
            # dynamic: traced frequencies are float32, their angles off by position * 2^-23; long: one more rounding
            close(y[b, 0], want[0, -1])
    assert len(traces) == 2 and [len(row) for row in rows] == [14, 12]


@pytest.mark.parametrize("rotated", first(1, [True, False]))
def test_decoding_from_4096_tokens_to_4097(rotated):
    """As long as Phi-3's first list goes: a sum of as many float32 terms is off by as many eps at most."""
    switch = 4096
    rope = rope_jax.Rope(H, dataclasses.replace(LONG, original_length=switch))
    module = rope_jax.RotaryAttention(num_heads=1, head_dim=H, rope=rope)
    x = jax.random.normal(jax.random.key(2), (1, switch + 2, D))
    params = module.init(jax.random.key(3), x[:, :2], context_length=2)
    cache = rope_jax.init_cache(batch=1, capacity=switch + 2, num_kv_heads=1, head_dim=H, rotated=rotated)

    @jax.jit
    def full(x, length):
        return module.apply(params, x, context_length=length)

    step, traces = stepper(module, params)
    _, cache = step(x[:, : switch - 1], cache)
    for t in range(switch - 1, switch + 2):  # the 4096th token, the 4097th, the 4098th
        y, cache = step(x[:, t : t + 1], cache)
        close(y[0, 0], full(x, t + 1)[0, t], atol=switch * oracles.EPS32)
        other = full(x, switch + 1 if t < switch else switch)[0, t]
        assert np.abs(y[0, 0] - other).max() > 10 * switch * oracles.EPS32
    assert len(traces) == 2


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_re_rotation_is_exact_at_every_position(layout):
    rope = rope_jax.Rope(H, LONG, layout=layout)
    positions = jnp.array([[0, 1, 4096, 1_000_003, 2**31 - 1, -(2**31)]])
    k = jax.random.normal(jax.random.key(0), (1, 6, K, H))
    short, long = (rope.rotate(k, rope.rotation(positions, context_length=n)) for n in (8, 9))
    for old, new, start, end in ((8, 9, short, long), (9, 8, long, short), (8, 8, short, short)):
        moved = rope.rerotate(start, positions, old_context_length=old, new_context_length=new)
        # Two exact rotations of pairs up to 4 long, each 1.2e-7 and three roundings off.
        close(moved, end, atol=4 * 2 * (1.2e-7 + 3 * oracles.EPS32))


def test_a_decoder_switches_all_its_layers():
    """By a stack of one layer that is what the layer does; deeper ones keep what they computed at its time."""
    rope = rope_jax.Rope(H, LONG)
    sizes = dict(vocab_size=11, num_layers=1, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=20)
    model = rope_jax.Decoder(**sizes, rope=rope)
    ids = jax.random.randint(jax.random.key(0), (B, 12), 0, 11, jnp.int32)
    params = model.init(jax.random.key(1), ids, context_length=12)
    full = jax.jit(lambda ids, length: model.apply(params, ids, context_length=length), static_argnums=1)
    step = jax.jit(lambda ids, cache: model.apply(params, ids, cache=cache))
    for rotated in (None, True):
        cache = model.init_cache(batch=B, capacity=12, rotated=rotated)
        assert cache.rotated is bool(rotated)
        for t in range(12):
            logits, cache = step(ids[:, t : t + 1], cache)
            want = full(ids[:, : t + 1], t + 1)[:, -1:]
            close(logits, want, atol=1e-5)


def test_a_decoder_of_unlike_layers_with_unrotated_keys_and_sinks():
    ropes = (ROPE, None, rope_jax.Rope(H, rope_jax.Standard(base=100.0)))
    sizes = dict(vocab_size=11, num_layers=3, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=20)
    model = rope_jax.Decoder(**sizes, rope=ropes)
    ids = jax.random.randint(jax.random.key(0), (B, 9), 0, 11, jnp.int32)
    params = model.init(jax.random.key(1), ids)
    want = model.apply(params, ids)
    for options in (dict(rotated=False), dict(eviction="sliding", num_sink_tokens=2), dict(eviction="sliding")):
        logits, cache = model.apply(params, ids[:, :4], cache=model.init_cache(batch=B, capacity=9, **options))
        more, cache = model.apply(params, ids[:, 4:], cache=cache)
        close(jnp.concatenate([logits, more], axis=1), want, atol=1e-5)


@pytest.mark.parametrize("rotated", first(1, [True, False]))
def test_keys_know_what_they_are_turned_by(rotated):
    """Tokens taken back across the switch, and a length given after keys were stored without one."""
    rope = rope_jax.Rope(H, LONG)
    module, params = layer(rope)
    x = tokens(14)
    _, cache = module.apply(params, x[:, :10], cache=empty(16, rotated=rotated))
    cache = cache.truncate(5)
    for cut, length in ((slice(5, 6), 6), (slice(6, 9), 9)):
        y, cache = module.apply(params, x[:, cut], cache=cache)
        want = module.apply(params, x[:, :length], context_length=length)
        close(y, want[:, cut])

    sizes = dict(vocab_size=11, num_layers=1, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=20)
    model = rope_jax.Decoder(**sizes, rope=rope)
    ids = jax.random.randint(jax.random.key(0), (B, 7), 0, 11, jnp.int32)
    params = model.init(jax.random.key(1), ids, context_length=7)
    _, cache = model.apply(params, ids[:, :4], cache=model.init_cache(batch=B, capacity=7, rotated=rotated))
    for t, length in ((4, 9), (5, None), (6, jnp.array([9, 3]))):
        got, cache = model.apply(params, ids[:, t : t + 1], cache=cache, context_length=length)
        want = model.apply(params, ids[:, : t + 1], context_length=t + 1 if length is None else length)
        close(got, want[:, -1:], atol=1e-5)


def test_keys_that_cannot_be_turned_on_are_not_read():
    rope = rope_jax.Rope(H, SCHEDULES["dynamic"])
    sizes = dict(vocab_size=11, num_layers=1, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=20)
    model = rope_jax.Decoder(**sizes, rope=rope)
    ids = jax.random.randint(jax.random.key(0), (B, 4), 0, 11, jnp.int32)
    params = model.init(jax.random.key(1), ids, context_length=20)
    step = jax.jit(lambda ids, cache, length: model.apply(params, ids, cache=cache, context_length=length))
    _, cache = step(ids[:, :3], model.init_cache(batch=B, capacity=7, rotated=True), 20)
    same, _ = step(ids[:, 3:], cache, 20)
    close(same, model.apply(params, ids, context_length=20)[:, -1:], atol=1e-5)
    other, after = step(ids[:, 3:], cache, jnp.array([20, 30]))
    assert np.isfinite(other[0]).all() and np.isnan(other[1]).all() and after.overflowed.tolist() == [False, True]
    with pytest.raises(ValueError, match=r"context_length must stay \[20, 20\].*DynamicNTK, got \[30, 30\]"):
        model.apply(params, ids[:, 3:], cache=cache, context_length=30)


def test_inside_the_cache_a_sequence_is_no_longer_than_it():
    """StreamingLLM over a rope that asks for the length, and over ALiBi: places are those inside the cache."""
    capacity, sinks, count = 6, 1, 30
    x = tokens(count)
    kept = np.r_[:sinks, count - capacity + sinks : count]
    for rope, change in ((rope_jax.Rope(H, LONG), {}), (ROPE, dict(position_bias=rope_jax.attention.ALiBi()))):
        module, params = layer(rope, **change)
        cache = empty(capacity, eviction="sliding", num_sink_tokens=sinks, rotated=False)
        step, _ = stepper(module, params)
        for t in range(count):
            y, cache = step(x[:, t : t + 1], cache)
        length = dict(context_length=capacity) if known(rope) else {}
        close(y, module.apply(params, x[:, kept], **length)[:, -1:])


# ----------------------------------------------------------------------------------------------------- eight bits


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bits_are_off_by_what_they_say(dtype):
    x = (
        np.asarray(jax.random.normal(jax.random.key(0), (40, H)))
        * np.logspace(-20, 20, 40, dtype=np.float32)[:, None]
    )
    x[7] = 0
    kept = rope_jax.attention.quantize(jnp.asarray(x), dtype)
    error = np.abs(np.asarray(kept.astype(jnp.float32), np.float64) - x)
    largest = np.abs(x).max(axis=1, keepdims=True)
    rounding = largest * 4 * oracles.EPS32  # of the scale, the quotient and the product
    if dtype == jnp.int8:
        assert np.all(error <= largest / 254 + rounding)
    elif dtype == jnp.float8_e4m3fn:
        assert np.all(error <= np.maximum(np.abs(x) / 16, largest / 448 / 2**10) + rounding)
    else:
        assert np.all(error <= np.maximum(np.abs(x) / 8, largest / 57344 / 2**17) + rounding)
    broken = rope_jax.attention.quantize(jnp.array([[1.0, np.nan], [np.inf, 1.0], [1.0, 1.0]]), dtype).astype(
        jnp.float32
    )
    assert np.isnan(broken[:2]).all() and np.isfinite(broken[2]).all()


@pytest.mark.parametrize("rotated", [True, False])
def test_attention_to_eight_bits_is_attention_to_what_they_hold(rotated):
    module, params = layer()
    x = tokens(7)
    step, _ = stepper(module, params)
    _, cache = step(x[:, :6], empty(7, dtype=jnp.int8, rotated=rotated))
    y, cache = step(x[:, 6:], cache)
    plain = dataclasses.replace(
        cache.truncate(6), key=cache.key.astype(jnp.float32), value=cache.value.astype(jnp.float32)
    )
    # The last token's own key and value are rounded too.
    want = module.apply(params, x[:, 6:], cache=plain)[0]
    exact = module.apply(params, x)[:, 6:]
    assert np.abs(y - want).max() <= 2 * np.abs(y - exact).max() < 0.05
    assert cache.key.values.nbytes * 4 == plain.key.nbytes


def test_eight_bits_take_rotated_keys_of_a_fixed_context_length():
    fixed = rope_jax.Rope(H, dataclasses.replace(LONG, context_length=9))
    module, params = layer(fixed)
    x = tokens(7)
    step, _ = stepper(module, params)
    _, cache = step(x[:, :6], empty(7, dtype=jnp.int8))
    y, _ = step(x[:, 6:], cache)
    close(y, module.apply(params, x)[:, 6:], atol=0.05)
    with pytest.raises(
        ValueError, match=r"context_length must stay \[9, 9\].*LongRope in eight bits, got \[8, 8\]"
    ):
        module.apply(params, x[:, 6:], cache=cache, context_length=8)


# --------------------------------------------------------------------------------------------------------- faults


def test_broken_rows_stay_alone():
    module, params = layer()
    x = tokens(6).at[0, 2].set(jnp.nan)
    _, cache = module.apply(params, x[:, :4], cache=empty(6))
    y, _ = module.apply(params, x[:, 4:], cache=cache)
    assert np.isnan(y[0]).all()
    np.testing.assert_array_equal(y[1], module.apply(params, x[:, 4:], cache=cache)[0][1])
    clean = module.apply(params, tokens(6))[1, 4:]
    close(y[1], clean)


def test_what_only_run_time_knows_makes_a_row_nan_and_no_other():
    module, params = layer()
    x = tokens(9)
    step, _ = stepper(module, params)
    mask = np.ones((B, 3), bool)
    mask[1, 1:] = False
    # Three at once into a ring of six that holds five: what the first of them reads would be gone.
    _, cache = step(x[:, :5], empty(6, eviction="sliding"))
    y, cache = step(x[:, 5:8], cache, mask)
    assert np.isnan(y[0]).all() and np.isfinite(y[1, 0]).all()
    assert cache.overflowed.tolist() == [True, False]
    y, cache = step(x[:, 8:], cache)
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()
    # A ring that has evicted cannot go back.
    turned = jax.jit(lambda cache: cache.truncate(2))(cache)
    assert turned.overflowed.tolist() == [True, True]


def test_layers_of_unlike_windows_share_a_ring():
    """The longest window is what must stay; where one layer has none, everything."""
    sizes = dict(vocab_size=11, num_layers=2, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=20)
    ids = jax.random.randint(jax.random.key(0), (B, 8), 0, 11, jnp.int32)
    for window in ((3, 2), (3, 3), np.int64(3)):
        model = rope_jax.Decoder(**sizes, rope=ROPE, window=window)
        params = model.init(jax.random.key(1), ids)
        cache, got = model.init_cache(batch=B, capacity=6, eviction="sliding"), []
        for cut in (slice(0, 4), slice(4, 8)):
            logits, cache = model.apply(params, ids[:, cut], cache=cache)
            got.append(logits)
        close(jnp.concatenate(got, axis=1), model.apply(params, ids), atol=1e-5)


def test_a_cache_of_another_model_is_refused():
    sizes = dict(vocab_size=11, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=20, rope=ROPE)
    model = rope_jax.Decoder(**sizes, num_layers=2)
    ids = jnp.zeros((B, 2), jnp.int32)
    params = model.init(jax.random.key(0), ids)
    for layers, batch in ((1, B), (3, B), (2, B + 1)):
        cache = rope_jax.Decoder(**sizes, num_layers=layers).init_cache(batch=batch, capacity=4)
        with pytest.raises(
            ValueError, match=r"cache.key must have shape \[layers, B, K, S, H\] with layers=2, B=2"
        ):
            model.apply(params, ids, cache=cache)
    with pytest.raises(TypeError, match="cache must be a KVCache, as from init_cache, got int"):
        model.apply(params, ids, cache=3)


def test_keys_at_positions_that_were_given_do_not_move():
    rope = rope_jax.Rope(H, dataclasses.replace(LONG, context_length=4))
    sizes = dict(vocab_size=11, num_layers=1, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=20)
    model = rope_jax.Decoder(**sizes, rope=rope)
    ids, where = jnp.arange(4)[None], jnp.arange(4)[None] + 100
    params = model.init(jax.random.key(0), ids)
    _, cache = model.apply(
        params, ids[:, :3], where[:, :3], cache=model.init_cache(batch=1, capacity=4), context_length=4
    )
    last, _ = model.apply(params, ids[:, 3:], where[:, 3:], cache=cache, context_length=4)
    close(last, model.apply(params, ids, where, context_length=4)[:, 3:], atol=1e-5)
    with pytest.raises(
        ValueError, match=r"context_length must stay \[4\].*LongRope to given positions, got \[20\]"
    ):
        model.apply(params, ids[:, 3:], where[:, 3:], cache=cache, context_length=20)


def test_narrow_integers_do_not_wrap():
    many = rope_jax.init_cache(batch=200, capacity=2, num_kv_heads=1, head_dim=2)
    assert many.select_rows(jnp.array([1, 100], jnp.int8)).num_tokens.tolist() == [0, 0]
    x = tokens(4)
    _, cache = MODULE.apply(PARAMS, x[:, :3], jnp.arange(3), cache=empty(4))
    want, _ = MODULE.apply(PARAMS, x[:, 3:], jnp.array([100]), cache=cache)
    for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint32):
        got, _ = MODULE.apply(PARAMS, x[:, 3:], jnp.array([100], dtype), cache=cache)
        np.testing.assert_array_equal(got, want)


def test_what_a_model_knows_not_to_fit_is_refused():
    sizes = dict(vocab_size=11, num_layers=2, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=20)
    model = rope_jax.Decoder(**sizes, rope=ROPE)
    ids = jnp.zeros((1, 4), jnp.int32)
    params = model.init(jax.random.key(1), ids)
    for options in ({}, dict(eviction="sliding"), dict(eviction="sliding", num_sink_tokens=2)):
        _, cache = model.apply(params, ids, cache=model.init_cache(batch=1, capacity=6, **options))
        with pytest.raises(ValueError, match=r"tokens must fit in the cache: T=4 .* rows would hold \[8\]"):
            model.apply(params, ids, cache=cache)
        logits, _ = jax.jit(lambda cache: model.apply(params, ids, cache=cache))(cache)
        assert np.isnan(logits).all()
        if options:  # others grow
            with pytest.raises(
                ValueError, match=r"prompt must fit in the cache: T=4 .*: this write would evict keys"
            ):
                rope_jax.generate(model, params, ids, cache=cache, max_new_tokens=3, temperature=0)
    slides = model.clone(window=3)
    logits, _ = slides.apply(
        params,
        ids,
        cache=slides.apply(params, ids, cache=slides.init_cache(batch=1, capacity=6, eviction="sliding"))[1],
    )
    assert np.isfinite(logits).all()


def test_padding_evicts_nothing():
    """Only real tokens count: a padded row does what it does without its padding."""
    module, params = layer(window=3)
    x = tokens(12)
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)
    for options in (dict(eviction="sliding"), dict(eviction="sliding", num_sink_tokens=2, rotated=False)):
        _, cache = module.apply(params, x[:, :5], cache=empty(6, **options))
        for t in range(5, 8):
            _, cache = module.apply(params, x[:, t : t + 1], cache=cache)
        y, after = jax.jit(lambda x, cache: module.apply(params, x, cache=cache, mask=mask))(x[:, 8:], cache)
        alone, _ = module.apply(params, x[:, 8:9], cache=cache)
        close(y[0, 0], alone[0, 0])
        slides = "num_sink_tokens" not in options  # 3 - 1 + 3 slots are enough for these three
        assert after.num_tokens.tolist() == [9, 11 if slides else -1]
        none = jax.jit(lambda x, cache: module.apply(params, x, cache=cache, mask=mask & False))(x[:, 8:], cache)[1]
        assert none.num_tokens.tolist() == [8, 8]


def test_lengths_of_any_integer_dtype():
    _, cache = MODULE.apply(PARAMS, tokens(3), cache=empty(4))
    truncate = jax.jit(lambda cache, length: cache.truncate(length))
    for length, left in ((np.uint32(2**32 - 1), 3), (np.uint8(2), 2), (np.int8(-1), 5), (np.int32(-(2**31)), 5)):
        assert truncate(cache, jnp.asarray(length)).num_tokens.tolist() == [left] * B
    with jax.enable_x64(True):
        assert truncate(cache, jnp.asarray(2**32)).num_tokens.tolist() == [3] * B
    _, ring = MODULE.apply(PARAMS, tokens(3), cache=empty(4, eviction="sliding"))
    for given in (cache, ring):
        full = jax.jit(rope_jax.KVCache.write)(given, *[jnp.ones((B, 2, K, H))] * 2)
        assert full.overflowed.all() and full.truncate(2).overflowed.all()


def test_a_ring_of_symbolic_sizes():
    t, s = jax.export.symbolic_shape("t, s")
    cache = jax.eval_shape(
        lambda: rope_jax.init_cache(batch=B, capacity=s, num_kv_heads=K, head_dim=H, eviction="sliding")
    )
    kv = jax.ShapeDtypeStruct((B, t, K, H), jnp.float32)
    write = jax.export.export(jax.jit(lambda cache, kv: cache.write(kv, kv, max_window=3).num_tokens))(cache, kv)
    assert write.call(empty(6, eviction="sliding"), jnp.ones((B, 4, K, H))).tolist() == [4, 4]
    assert write.call(empty(6, eviction="sliding"), jnp.ones((B, 7, K, H))).tolist() == [-1, -1]


def test_positions_that_decrease_are_what_they_say():
    """Only m - n counts: a sequence that runs backwards is the mirror of one that runs forwards at minus positions."""
    module, params = layer(causal=False)
    x = tokens(5)
    where = jnp.array([[9, 4, 4, -3, 0]])
    got = module.apply(params, x, where)
    shuffled = jnp.array([3, 4, 1, 2, 0])
    close(got[:, shuffled], module.apply(params, x[:, shuffled], where[:, shuffled]))


MODULE, PARAMS = layer()
OTHER = rope_jax.Rope(H, rope_jax.Standard(base=500.0))
DYNAMIC = rope_jax.Rope(H, SCHEDULES["dynamic"])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: empty(4, eviction="sliding", num_sink_tokens=4),
            ValueError,
            "num_sink_tokens must be below the capacity S=4, got 4",
        ),
        (
            lambda: empty(4, eviction="sliding", num_sink_tokens=True),
            TypeError,
            "num_sink_tokens must be an integer, got True",
        ),
        (lambda: empty(4, num_sink_tokens=1), ValueError, "num_sink_tokens must be 0 without eviction, got 1"),
        (
            lambda: empty(4, eviction="ring"),
            ValueError,
            r"eviction must be None or one of \('sliding',\), got 'ring'",
        ),
        (lambda: empty(4.0), TypeError, "capacity must be an integer, got 4.0"),
        (lambda: empty(4).grow(8.0), TypeError, "capacity must be an integer, got 8.0"),
        (
            lambda: empty(4).write(*[jnp.ones((B, 1, K, H))] * 2, max_window=0),
            ValueError,
            "max_window must be at least 1, got 0",
        ),
        (
            lambda: empty(4).write(*[jnp.ones((B, 1, K, H), int)] * 2),
            TypeError,
            "key must be floating, got dtype int",
        ),
        (lambda: empty(4, dtype=jnp.float8_e8m0fnu), TypeError, "dtype must be one of int8, .*got float8_e8m0fnu"),
        (
            lambda: layer(rope_jax.Rope(H, LONG))[0].apply(PARAMS, tokens(1), jnp.arange(1), cache=empty(4)),
            ValueError,
            "positions must be left out with a cache of keys whose frequencies depend on the context length",
        ),
        (
            lambda: empty(4, eviction="sliding", num_sink_tokens=1),
            ValueError,
            "rotated must be False with sink tokens.* got True with num_sink_tokens=1",
        ),
        (
            lambda: MODULE.apply(PARAMS, tokens(1), cache=empty(4, rope=OTHER)),
            ValueError,
            "cache must hold keys rotated by",
        ),
        (
            lambda: MODULE.apply(PARAMS, tokens(1), jnp.arange(1), cache=empty(4, rotated=False)),
            ValueError,
            "positions must be left out with a cache of unrotated keys",
        ),
        (
            lambda: layer(DYNAMIC)[0].apply(layer(DYNAMIC)[1], tokens(1), cache=empty(4)),
            ValueError,
            "keys must be stored unrotated.*DynamicNTK",
        ),
        (lambda: empty(4).truncate(-1), ValueError, "num_tokens must be 0 or more, got -1"),
        (lambda: empty(4).truncate(1.5), TypeError, "num_tokens must be integer"),
        (lambda: empty(4).select_rows(jnp.array([2])), ValueError, r"rows must be in \[0, B=2\), got \[2\]"),
        (lambda: empty(4).grow(3), ValueError, "capacity must be at least S=4, got 3"),
        (lambda: empty(2**31 - 1), ValueError, r"capacity must be below 2\^31 - 1, got 2147483647"),
        (lambda: empty(10**30), ValueError, r"capacity must be below 2\^31 - 1, got an integer of 100 bits"),
        (lambda: empty(4).grow(2**31 - 1), ValueError, r"capacity must be below 2\^31 - 1, got 2147483647"),
        (
            lambda: empty(4, eviction="sliding").grow(8),
            ValueError,
            "capacity must stay S=4 in a cache that evicts tokens",
        ),
        (
            lambda: rope_jax.attention.quantize(jnp.ones(3), jnp.int4),
            TypeError,
            "dtype must be one of int8, .* got int4",
        ),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()
