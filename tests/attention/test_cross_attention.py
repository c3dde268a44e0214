"""Cross-attention: keys and values of another sequence, with positions of their own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from attention_cases import in_blocks
from layer_oracle import assert_gradients, attention_layer

import rope_jax
from rope_jax.attention import ALiBi, make_cross_plan, make_plan

B, T, S, D, E, N, K, H = 2, 5, 8, 16, 12, 4, 2, 8
ROPE = rope_jax.Rope(H, rope_jax.Standard(base=100.0))
LAYER = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=ROPE, causal=False)
TOLERANCE = 256 * oracles.EPS32
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
KV = jnp.asarray(RNG.normal(size=(B, S, E)), jnp.float32)
AT, KV_AT = RNG.integers(0, 50, (B, T)), RNG.integers(0, 50, (B, S))
WHERE = dict(positions=AT, kv=KV, kv_positions=KV_AT)
PARAMS = nn.unbox(LAYER.init(jax.random.key(0), X, **WHERE))
ALL = np.ones((B, 1, T, S), bool)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_is_the_formula(layout, implementation, monkeypatch):
    in_blocks(monkeypatch, 2, 3)
    rope = rope_jax.Rope(H, rope_jax.Standard(base=100.0), layout=layout)
    layer = LAYER.clone(rope=rope, implementation=implementation)
    want = attention_layer(layer, PARAMS, X, ALL, AT, KV, KV_AT)
    np.testing.assert_allclose(layer.apply(PARAMS, X, **WHERE), want, atol=TOLERANCE)


def test_positions_may_be_seconds():
    """Text words and audio frames at their times."""
    at, kv_at = np.array([0.5, 1.25, 2.0, 3.5, 4.0]), np.arange(S) / 2
    got = LAYER.apply(PARAMS, X, at.astype(np.float32), kv=KV, kv_positions=kv_at.astype(np.float32))
    np.testing.assert_allclose(got, attention_layer(LAYER, PARAMS, X, ALL, at, KV, kv_at), atol=TOLERANCE)


def test_only_differences_of_positions_count():
    want = LAYER.apply(PARAMS, X, **WHERE)
    shifted = LAYER.apply(PARAMS, X, AT + 1_000_000, kv=KV, kv_positions=KV_AT + 1_000_000)
    np.testing.assert_allclose(shifted, want, atol=2 * TOLERANCE)
    assert abs(LAYER.apply(PARAMS, X, AT + 3, kv=KV, kv_positions=KV_AT) - want).max() > 100 * TOLERANCE


def test_padding_of_both_sequences_is_not_read_not_even_nan():
    mask, kv_mask = np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], bool), RNG.random((B, S)) < 0.6
    allowed = ALL & kv_mask[:, None, None, :]
    x, kv = jnp.where(mask[..., None], X, jnp.nan), jnp.where(kv_mask[..., None], KV, jnp.nan)
    options = dict(kv_positions=KV_AT, mask=mask, kv_mask=kv_mask.astype(int))
    got = LAYER.apply(PARAMS, x, AT, kv=kv, **options)
    want = attention_layer(LAYER, PARAMS, X, allowed, AT, KV, KV_AT)
    np.testing.assert_allclose(got[mask], want[mask], atol=TOLERANCE)
    loss = lambda params, x, kv: jnp.sum(LAYER.apply(params, x, AT, kv=kv, **options)[mask] ** 2)
    for leaf in jax.tree.leaves(jax.grad(loss, (0, 1, 2))(PARAMS, x, kv)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("shape", [(B, N, T, S), (1, 1, T, S), (B, 1, 1, S)])
def test_an_attention_mask_and_padding(shape):
    given, kv_mask = np.random.default_rng(3).random(shape) < 0.6, RNG.random((B, S)) < 0.8
    want = attention_layer(LAYER, PARAMS, X, given & kv_mask[:, None, None, :], AT, KV, KV_AT)
    got = LAYER.apply(PARAMS, X, **WHERE, attention_mask=given, kv_mask=kv_mask)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_gradients():
    assert_gradients(
        lambda x, kv: LAYER.apply(PARAMS, x, AT, kv=kv, kv_positions=KV_AT),
        lambda x, kv: attention_layer(LAYER, PARAMS, x, ALL, AT, kv, KV_AT),
        (X, KV),
    )


def test_without_rope_it_is_flax_attention():
    layer = LAYER.clone(rope=None, num_kv_heads=None)
    flax = nn.MultiHeadDotProductAttention(num_heads=N, qkv_features=N * H, out_features=D, use_bias=False)
    params = nn.unbox(layer.init(jax.random.key(1), X, kv=KV))
    given = np.random.default_rng(4).random((B, 1, T, S)) < 0.7
    want = flax.apply(params, X, KV, mask=jnp.asarray(given))
    np.testing.assert_allclose(layer.apply(params, X, kv=KV, attention_mask=given), want, atol=TOLERANCE)


def test_one_plan_serves_many_layers():
    want = LAYER.apply(PARAMS, X, **WHERE)
    plan = make_cross_plan(ROPE, (B, T), S, positions=AT, kv_positions=KV_AT)
    np.testing.assert_array_equal(LAYER.apply(PARAMS, X, kv=KV, plan=plan), want)
    with pytest.raises(ValueError, match=r"plan must be for S=4, of make_cross_plan, got a plan for S=8"):
        LAYER.apply(PARAMS, X, kv=KV[:, :4], plan=plan)
    for name in ("positions", "kv_positions"):
        rows = dict(positions=AT[:1], kv_positions=KV_AT[:1])
        plan_of_three = make_cross_plan(ROPE, (3, T), S, **(rows | {name: np.repeat(rows[name], 3, axis=0)}))
        with pytest.raises(ValueError, match="plan must be for B=2, T=5, as x has, got a plan for B=3, T=5"):
            LAYER.apply(PARAMS, X, kv=KV, plan=plan_of_three)
    with pytest.raises(ValueError, match="plan must be without kv, of make_plan, got a plan for S=8"):
        LAYER.apply(PARAMS, X, plan=plan)
    with pytest.raises(ValueError, match="plan must be for S=8, of make_cross_plan, got a plan for S=None"):
        LAYER.apply(PARAMS, X, kv=KV, plan=make_plan(ROPE, (B, T), causal=False))
    with pytest.raises(ValueError, match="kv_mask must be left out with a plan"):
        LAYER.apply(PARAMS, X, kv=KV, kv_mask=np.ones((B, S), bool), plan=plan)


def test_frequencies_that_are_learned_rotate_both():
    layer = LAYER.clone(learn_frequencies=True, qk_norm=True)
    params = nn.unbox(layer.init(jax.random.key(0), X, **WHERE))
    fixed = {"params": {name: leaf for name, leaf in params["params"].items() if name != "inv_freq"}}
    want = LAYER.clone(qk_norm=True).apply(fixed, X, **WHERE)
    np.testing.assert_allclose(layer.apply(params, X, **WHERE), want, atol=TOLERANCE)
    gradient = jax.grad(lambda params: jnp.sum(layer.apply(params, X, **WHERE) ** 2))(params)
    assert abs(gradient["params"]["inv_freq"]).min() > 0


def test_a_schedule_that_depends_on_the_context_length():
    rope = rope_jax.Rope(H, rope_jax.DynamicNTK(factor=2.0, original_length=16, base=100.0))
    layer = LAYER.clone(rope=rope)
    fixed = rope_jax.Rope(H, rope_jax.DynamicNTK(factor=2.0, original_length=16, base=100.0, context_length=40))
    got = layer.apply(PARAMS, X, **WHERE, context_length=40)
    np.testing.assert_allclose(got, LAYER.clone(rope=fixed).apply(PARAMS, X, **WHERE), atol=TOLERANCE)
    with pytest.raises(ValueError, match="DynamicNTK needs a context_length"):
        layer.apply(PARAMS, X, **WHERE)


def test_position_axes():
    rope = rope_jax.Rope(H, rope_jax.core.Axial(sizes=(4, 4)))
    layer = LAYER.clone(rope=rope)
    at, kv_at = rope_jax.core.grid_positions(1, T), rope_jax.core.grid_positions(2, S // 2)
    got = layer.apply(PARAMS, X, at, kv=KV, kv_positions=kv_at)
    back = layer.apply(PARAMS, X[:, ::-1], at[::-1], kv=KV[:, ::-1], kv_positions=kv_at[::-1])
    np.testing.assert_allclose(back[:, ::-1], got, atol=TOLERANCE)
    assert abs(layer.apply(PARAMS, X, at[::-1], kv=KV, kv_positions=kv_at) - got).max() > 100 * TOLERANCE
    with pytest.raises(ValueError, match=r"kv_positions must be \[\.\.\., T, A=2\]"):
        layer.apply(PARAMS, X, at, kv=KV, kv_positions=np.zeros((B, S, 3), int))


def test_x64_and_bfloat16():
    layer = LAYER.clone(dtype=jnp.bfloat16)
    got = layer.apply(PARAMS, X, AT, kv=KV.astype(jnp.bfloat16), kv_positions=KV_AT)
    want = attention_layer(LAYER, PARAMS, X, ALL, AT, KV, KV_AT)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), want, atol=0.05 * np.abs(want).max())


NO = dict(positions=None, kv_positions=None)


@pytest.mark.parametrize(
    ("fields", "call", "error", "says"),
    [
        (dict(causal=True), {}, ValueError, "causal must be False with kv"),
        (dict(window=3), {}, ValueError, "window must be left out with kv"),
        (dict(position_bias=ALiBi()), {}, ValueError, "position_bias must be left out with kv"),
        (dict(ring_axis="ring"), {}, ValueError, "ring_axis must be left out with kv"),
        ({}, dict(prefix_length=2), ValueError, "prefix_length must be left out with kv"),
        ({}, dict(segment_ids=AT), ValueError, "segment_ids must be left out with kv"),
        ({}, dict(sequence_index=AT), ValueError, "sequence_index must be left out with kv"),
        ({}, dict(kv_positions=None), ValueError, "kv_positions must be given with kv and a rope, got None"),
        ({}, dict(positions=None), ValueError, "positions must be given with kv and a rope, got None"),
        ({}, dict(kv_positions=KV_AT[:, 1:]), ValueError, "kv_positions must have shape"),
        ({}, dict(kv=KV[:1]), ValueError, r"kv must have shape \[B, S, D\] with B=2"),
        ({}, dict(kv=KV.astype(jnp.bfloat16)), TypeError, "kv must have x's dtype float32"),
        ({}, dict(kv=KV_AT[..., None]), TypeError, "kv must be floating"),
        ({}, dict(kv_mask=np.ones((B, T))), ValueError, r"kv_mask must have shape \[B, S\] with B=2, S=8"),
        ({}, dict(kv=None), ValueError, "kv_positions must be left out without kv"),
        ({}, NO | dict(kv=None, kv_mask=ALL), ValueError, "kv_mask must be left out without kv"),
        (dict(rope=None), {}, ValueError, "positions must be left out without rope"),
        (dict(learn_frequencies=True), dict(context_length=9), ValueError, "context_length must be left out"),
    ],
)
def test_refusals(fields, call, error, says):
    with pytest.raises(error, match=says):
        LAYER.clone(**fields).apply(PARAMS, X, **(WHERE | call))


def test_a_cache_is_refused():
    cache = rope_jax.init_cache(batch=B, capacity=S, num_kv_heads=K, head_dim=H)
    with pytest.raises(ValueError, match="cache must be left out with kv, got KVCache"):
        LAYER.apply(PARAMS, X, **WHERE, cache=cache)


CROSS = functools.partial(make_cross_plan, kv_length=S, positions=AT, kv_positions=KV_AT)


@pytest.mark.parametrize("make", [make_plan, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(shape=(2.0, T)), TypeError, "shape must be an integer, got 2.0"),
        (dict(shape=(B, None)), TypeError, "shape must be an integer, got None"),
        (dict(shape=("a", T)), TypeError, "shape must be an integer, got 'a'"),
        (dict(shape=(True, T)), TypeError, "shape must be an integer, got True"),
        (dict(shape=(-1, T)), ValueError, "shape must be at least 0, got -1"),
        (dict(num_heads="4"), TypeError, "num_heads must be an integer, got '4'"),
        (dict(num_heads=0), ValueError, "num_heads must be at least 1, got 0"),
        (dict(learn_frequencies="x"), TypeError, "learn_frequencies must be True or False, got 'x'"),
    ],
)
def test_sizes_and_flags_of_a_plan_are_of_their_kind(make, options, error, says):
    with pytest.raises(error, match=says):
        make(LAYER.rope, **(dict(shape=(B, T)) | options))


@pytest.mark.parametrize("name", ["positions", "kv_positions"])
def test_positions_of_another_dtype_are_named(name):
    for dtype in (jnp.float16, jnp.bfloat16, bool, jnp.complex64):
        with pytest.raises(TypeError, match=f"^{name} must be integers, float32 or float64, got dtype"):
            LAYER.apply(PARAMS, X, **(WHERE | {name: WHERE[name].astype(dtype)}))
