"""Attention under vmap, jit, scan and export: equal to the loop, and to the plain call."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_same, assert_solved, in_blocks, problem, solve, solved_by_library
from fast import first
from jax import lax

import rope_jax
from rope_jax.attention.facts import Facts
from rope_jax.attention.primitive import attention, attention_with_log

MAPPED = 3
FACTS = {
    "segments": "segments causal",
    "mask": "mask_shared",
    "bias": "bias_011 cap",
    "query_index": "reordered causal window",
    "key_index": "ragged",
    "window": "traced_window causal",
    "dropout_key": "dropout causal",
    "bias_key_index": "ring window alibi",
}


def stacked(x, seed=0):
    """Several arrays like x: other numbers, the same kind of contents."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        noise = np.random.default_rng(seed).normal(size=(MAPPED, *x.shape))
        return x + jnp.asarray(noise, x.dtype)
    if x.dtype == jnp.bool:
        return jnp.stack([jnp.roll(x, i, -1) for i in range(MAPPED)])
    if x.ndim == 0 or x.dtype == jnp.uint32:
        return jnp.stack([x + jnp.asarray(2 * i, x.dtype) for i in range(MAPPED)])
    return jnp.stack([jnp.roll(x, i, 0) if i < 2 else jnp.roll(x, 1, -1) for i in range(MAPPED)])


def loop(f, in_axes, *arguments):
    """What vmap must return."""
    rows = []
    for i in range(MAPPED):
        row = [x if axis is None else jnp.take(x, i, axis) for x, axis in zip(arguments, in_axes, strict=True)]
        rows.append(f(*row))
    return jax.tree.map(lambda *each: jnp.stack(each), *rows)


def with_gradients(p):
    """Both results and all gradients, as a function of q, k, v and one more fact."""

    def function(q, k, v, name=None, fact=None):
        facts = p.facts if name is None else dataclasses.replace(p.facts, **{name: fact})
        loss = lambda q, k, v: attention_with_log(q, k, v, facts)
        results, pull_back = jax.vjp(loss, q, k, v)
        return results, pull_back((p.dout, p.dlog))

    return function


@pytest.mark.parametrize(
    ("q_axis", "k_axis", "v_axis"),
    first(2, [(0, None, None), (None, 2, 1), (1, 0, 3), (None, None, 0), (0, 0, None)]),
)
@pytest.mark.parametrize(
    "features", first(2, ["causal cap", "segments bias_111", "t5 mask", "traced_window", "ragged"])
)
def test_vmap_over_arrays(monkeypatch, features, q_axis, k_axis, v_axis):
    in_blocks(monkeypatch, 10, 16)
    p, axes = problem(features, T=20), (q_axis, k_axis, v_axis)
    arrays = [
        x if axis is None else jnp.moveaxis(stacked(x, seed), 0, axis)
        for seed, (x, axis) in enumerate(zip((p.q, p.k, p.v), axes, strict=True))
    ]
    function = jax.jit(with_gradients(p))
    assert_same(jax.jit(jax.vmap(function, axes))(*arrays), loop(function, axes, *arrays))


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("with_q", [False, pytest.param(True, marks=pytest.mark.full)])
def test_vmap_over_facts(monkeypatch, name, with_q):
    in_blocks(monkeypatch, 10, 16)
    p = problem(FACTS[name], T=20, S=None if name == "segments" else 24)
    function = jax.jit(lambda q, fact: with_gradients(p)(q, p.k, p.v, name, fact))
    axes, q = (0 if with_q else None, 0), stacked(p.q) if with_q else p.q
    arrays = q, stacked(getattr(p.facts, name))
    want = loop(function, axes, *arrays)
    assert np.any(np.asarray(want[0][0][0]) != np.asarray(want[0][0][1])), "the facts matter"
    assert_same(jax.jit(jax.vmap(function, axes))(*arrays), want)


def test_vmap_over_rows_that_share_facts(monkeypatch):
    """Facts of one row serve all rows, mapped or not."""
    in_blocks(monkeypatch, 10, 16)
    p = problem("mask_shared bias_011 causal", T=20)
    assert p.facts.mask.shape[0] == p.facts.bias.shape[0] == 1
    function = lambda q, bias: attention(q, p.k, p.v, dataclasses.replace(p.facts, bias=bias))
    for axes in ((0, None), (None, 0), (0, 0)):
        arrays = [x if axis is None else stacked(x) for x, axis in zip((p.q, p.facts.bias), axes, strict=True)]
        assert_same(jax.vmap(function, axes)(*arrays), loop(function, axes, *arrays))


@pytest.mark.parametrize("features", first(1, ["t5 causal", "bias_111 cap", "t5 dropout"]))
def test_vmap_of_gradients_of_facts(monkeypatch, features):
    """Per-example gradients of a table or of a bias, mapped or shared."""
    in_blocks(monkeypatch, 10, 16)
    p = problem(features, T=20)
    name = "table" if "t5" in features else "bias"

    def function(q, extra):
        operands = p.differentiable | {"q": q, name: extra}
        loss = lambda o: jnp.vdot(attention(*p.replaced(o)), p.dout)
        return jax.grad(loss)(operands)

    function = jax.jit(function)
    for axes in ((0, 0), (0, None), (None, 0)):
        arrays = [
            x if axis is None else stacked(x) for x, axis in zip((p.q, p.differentiable[name]), axes, strict=True)
        ]
        assert_same(jax.jit(jax.vmap(function, axes))(*arrays), loop(function, axes, *arrays))


@pytest.mark.parametrize("features", first(1, ["causal segments", "t5", "dropout"]))
def test_nested_vmap_and_second_derivatives(monkeypatch, features):
    in_blocks(monkeypatch, 4, 8)
    p = problem(features, T=11, H=4)
    inner = lambda q, k: attention(q, k, p.v, p.facts)
    q, k = stacked(p.q), stacked(p.k)
    nested = jax.jit(jax.vmap(jax.vmap(inner, (0, None)), (None, 0)))(q, k)
    by_hand = jnp.stack([jnp.stack([inner(q[i], k[j]) for i in range(MAPPED)]) for j in range(MAPPED)])
    assert_same(nested, by_hand)
    loss = lambda q: jnp.sum(jnp.sin(inner(q, p.k)) * p.dout)
    twice = jax.jit(lambda q: jax.jvp(jax.grad(loss), (q,), (q,))[1])
    assert_same(jax.vmap(twice)(q), loop(twice, (0,), q), terms=512)


@pytest.mark.parametrize("features", first(2, ["t5 causal", "dropout causal", "traced_window", "alibi", "causal"]))
def test_gradient_of_vmap(monkeypatch, features):
    """A loss over mapped calls, each of which depends on arrays of its own and on shared facts."""
    in_blocks(monkeypatch, 4, 3)
    p = problem(features, T=11)
    loss = lambda q, operands: jnp.vdot(attention(*p.replaced(operands | {"q": q})), p.dout)
    operands = {name: x for name, x in p.differentiable.items() if name != "q"}
    q = stacked(p.q)
    got = jax.jit(jax.grad(lambda q, o: jnp.sum(jax.vmap(loss, (0, None))(q, o)), (0, 1)))(q, operands)
    by_hand = jax.jit(jax.grad(lambda q, o: sum(loss(q[i], o) for i in range(MAPPED)), (0, 1)))(q, operands)
    assert_same(got, by_hand, terms=512)


def test_vmap_of_a_stack_and_of_eight_bits(monkeypatch):
    in_blocks(monkeypatch, 4, 16)
    p = problem("ragged", T=2, S=37)
    stack = lambda x: jnp.stack([x, 2 * x])
    for k, v in (
        (stack(p.k), stack(p.v)),
        jax.tree.map(stack, tuple(map(rope_jax.attention.quantize, (p.k, p.v)))),
    ):
        function = jax.jit(lambda q, layer, k=k, v=v: attention(q, k, v, p.facts, layer=layer))
        layers = jnp.array([0, 1, 0], jnp.int32)
        for axes, q in (((0, 0), stacked(p.q)), ((None, 0), p.q), ((0, None), stacked(p.q))):
            arrays = q, layers if axes[1] == 0 else layers[1]
            assert_same(jax.vmap(function, axes)(*arrays), loop(function, axes, *arrays))


def test_jit_scan_and_plain_calls_are_equal(monkeypatch):
    in_blocks(monkeypatch, 10, 16)
    p = problem("causal cap bias_101 segments", T=20)
    want = attention(p.q, p.k, p.v, p.facts)
    assert_same(jax.jit(attention)(p.q, p.k, p.v, p.facts), want)
    scanned = lax.scan(lambda _, q: (None, attention(q, p.k, p.v, p.facts)), None, stacked(p.q))[1]
    assert_same(scanned, loop(lambda q: attention(q, p.k, p.v, p.facts), (0,), stacked(p.q)))
    with jax.disable_jit():
        assert_same(attention(p.q, p.k, p.v, p.facts), want)
    loss = lambda q: lax.scan(lambda q, _: (attention(q, p.k, p.v, p.facts), None), q, None, length=3)[0].sum()
    unrolled = lambda q: functools.reduce(lambda q, _: attention(q, p.k, p.v, p.facts), range(3), q).sum()
    assert_same(jax.grad(loss)(p.q), jax.grad(unrolled)(p.q), terms=512)


def test_numbers_under_strict_promotion_and_x64():
    """conftest.py sets strict promotion; x64 makes Python's numbers float64."""
    with jax.enable_x64(True):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            p = problem("causal window cap alibi bias_111 segments scale", T=9, dtype=dtype)
            out, log_total, gradients = solved_by_library(p)
            assert out.dtype == dtype and log_total.dtype == jnp.float32
            assert_solved(p, out, log_total, gradients)


SYMBOLIC = ["causal window", "alibi causal", "mask cap", "bias", "traced_window"]


@pytest.mark.parametrize("features", first(2, SYMBOLIC))
def test_export_with_symbolic_sizes(features):
    """One program for all batches and lengths, also below a block and between multiples of it; and its gradient."""
    names = features.split()
    batch, length, kv_length = jax.export.symbolic_shape("b, t, s")

    def facts(mask, bias):
        f = problem(" ".join(n for n in names if n not in ("mask", "bias"))).facts
        return dataclasses.replace(
            f, mask=mask if "mask" in names else None, bias=bias if "bias" in names else None
        )

    def both_passes(q, k, v, mask, bias, dout):
        loss = lambda q, k, v, bias: attention(q, k, v, facts(mask, bias))
        out, pull_back = jax.vjp(loss, q, k, v, bias)
        return out, pull_back(dout)

    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    q, k = shape(batch, 4, length, 8), shape(batch, 2, kv_length, 8)
    mask, bias = shape(batch, 1, length, kv_length, dtype=jnp.bool), shape(1, 4, length, kv_length)
    exported = jax.export.export(jax.jit(both_passes))(q, k, k, mask, bias, q)
    for B, T, S in ((1, 1, 2), (2, 5, 130), (1, 130, 5), (3, 128, 256), (1, 257, 129)):
        p = problem(
            "mask_shared bias_011 " + " ".join(n for n in names if n not in ("mask", "bias")), B=B, T=T, S=S
        )
        mask = jnp.broadcast_to(p.facts.mask, (B, 1, T, S))
        arrays = p.q, p.k, p.v, mask, p.facts.bias, p.dout
        assert_same(exported.call(*arrays), jax.jit(both_passes)(*arrays), terms=256)


def test_export_with_dropout():
    """A symbolic size has blocks of its own, and so other entries: the share of them is the rate."""
    (length,) = jax.export.symbolic_shape("t")
    facts = problem("dropout").facts
    shape = lambda heads: jax.ShapeDtypeStruct((1, heads, length, 8), jnp.float32)
    exported = jax.export.export(jax.jit(lambda q, k, v: attention(q, k, v, facts)))(shape(4), shape(1), shape(1))
    for T in (100, 300):
        out = exported.call(jnp.zeros((1, 4, T, 8)), jnp.zeros((1, 1, T, 8)), jnp.ones((1, 1, T, 8)))
        kept = np.asarray(out[..., 0]) * 0.7  # the share of a row
        assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.21 / (4 * T * T)) and kept.std() > 0


def test_export_of_segments_and_of_a_cache():
    batch, length = jax.export.symbolic_shape("b, t")
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    packed = lambda q, k, v, segments: attention(q, k, v, Facts(causal=True, segments=segments))
    q, k = shape(batch, 4, length, 8), shape(batch, 2, length, 8)
    exported = jax.export.export(jax.jit(packed))(q, k, k, shape(batch, length, dtype=jnp.int32))
    for B, T in ((1, 1), (2, 100), (1, 131)):
        p = problem("causal segments", B=B, T=T)
        want, _, _ = solve(p)
        assert np.abs(exported.call(p.q, p.k, p.v, p.facts.segments) - want).max() <= 2e-6

    def decode(q, k, v, queries, keys, layer):
        return attention(q, k, v, Facts(causal=True, query_index=queries, key_index=keys), layer=layer)

    q, k = shape(batch, 4, 1, 8), shape(3, batch, 2, length, 8)
    index = shape(batch, 1, dtype=jnp.int32), shape(batch, length, dtype=jnp.int32), shape(dtype=jnp.int32)
    exported = jax.export.export(jax.jit(decode))(q, k, k, *index)
    for B, S in ((1, 1), (2, 100), (3, 300)):
        p = problem("ragged", B=B, T=1, S=S)
        want, _, _ = solve(p)
        stack = lambda x: jnp.stack([x * jnp.nan, x, x * jnp.nan])
        got = exported.call(p.q, stack(p.k), stack(p.v), p.facts.query_index, p.facts.key_index, jnp.int32(1))
        assert np.abs(got - want).max() <= 2e-6


def test_empty_arrays():
    for T, S in ((0, 3), (3, 0), (0, 0)):
        q, kv = jnp.ones((2, T, 4, 8)), jnp.ones((2, S, 2, 8))
        y = rope_jax.attend(q, kv, kv, causal=T == S)
        assert y.shape == q.shape and not np.any(y)
        gradients = jax.grad(lambda q, k, v=kv: rope_jax.attend(q, k, v).sum(), argnums=(0, 1))(q, kv)
        assert all(x.shape == y.shape and not np.any(x) for x, y in zip(gradients, (q, kv), strict=True))
