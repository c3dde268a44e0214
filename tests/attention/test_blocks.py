"""Attention in blocks beside float64: outputs, sums and gradients of every feature, and of products of features."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BIAS_SHAPES, FREE, Problem, check, in_blocks, problem, read_factors, solve
from fast import first

import rope_jax
from rope_jax.attention import Quantized, blocks, quantize
from rope_jax.attention.primitive import attention, attention_with_log

# Of 37 tokens: blocks that overlap on both sides, one block of queries, one of keys, equal ones, single tokens.
SIZES = [(10, 16), (64, 8), (8, 64), (1, 5), (37, 37), (36, 1), (256, 256)]
FEATURES = [
    "causal",
    "causal window",
    "traced_window",
    "causal window sinks",
    "cap scale",
    "t5",
    "alibi causal",
    "segments",
    "padding causal",
    "reordered causal window",
    "mask",
    "bias_111",
    "ragged",
    "ring window t5",
]


def solved_with_dropout(p: Problem) -> Problem:
    return dataclasses.replace(p, factors=read_factors(p)) if p.facts.dropout_rate else p


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_features(monkeypatch, features):
    in_blocks(monkeypatch, 10, 16)
    check(problem(features))


@pytest.mark.parametrize(("queries", "keys"), first(3, SIZES[1:]))
@pytest.mark.parametrize("features", first(1, ["causal window cap segments bias_111", "t5 mask"]))
def test_sizes_of_blocks(monkeypatch, features, queries, keys):
    in_blocks(monkeypatch, queries, keys)
    check(problem(features))


@pytest.mark.parametrize(
    "shape", first(2, ["bias_100", *(s for s in BIAS_SHAPES if s not in ("bias_100", "bias_111"))])
)
def test_shapes_of_a_bias(monkeypatch, shape):
    in_blocks(monkeypatch, 10, 16)
    check(problem(f"{shape} cap mask_shared"))


# Of each axis of the product.
SCORES = ["", "cap", "t5", "alibi scale", "bias_101", "t5 bias_010"]
PLACES = ["", "causal", "window", "traced_window causal", "window sinks causal"]
ORDERS = ["", "reordered", "segments", "padding segments", "mask", "ragged"]
PRODUCTS = [" ".join(each).strip() for each in itertools.product(SCORES, PLACES, ORDERS)]
MIXED = PRODUCTS[17::13]  # 13 is prime to the lengths of the tables


@pytest.mark.parametrize("features", first(6, MIXED), ids=str)
def test_products_of_features(monkeypatch, features):
    in_blocks(monkeypatch, 10, 16)
    check(solved_with_dropout(problem(features)))


@pytest.mark.parametrize("features", first(1, ["causal cap t5", "", "window padding bias_011", "mask"]))
@pytest.mark.parametrize(("queries", "keys"), first(1, [(10, 16), (64, 8), (8, 64), (37, 37)]))
def test_dropout(monkeypatch, features, queries, keys):
    """The same entries forward and backward, in all heads, each by itself."""
    in_blocks(monkeypatch, queries, keys)
    p = problem(f"dropout {features}")
    p = solved_with_dropout(p)
    dropped = (p.factors == 0)[p.allowed]
    # Four standard deviations of the share of that many entries.
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.21 / dropped.size)
    by_head = (p.factors == 0).reshape(8, -1)
    assert all(np.any(a != b) for a, b in itertools.combinations(by_head, 2))
    check(p)


@pytest.mark.parametrize("implementation", ["blocks", "xla"])
def test_dropout_drops_the_same_weights_in_blocks_of_any_size(monkeypatch, implementation):
    p = problem("dropout causal")
    in_blocks(monkeypatch, 37, 37)
    whole = read_factors(p)
    in_blocks(monkeypatch, 10, 16)
    np.testing.assert_array_equal(read_factors(p, implementation=implementation), whole)


def test_dropout_differs_from_block_to_block(monkeypatch):
    in_blocks(monkeypatch, 8, 8)
    factors = read_factors(problem("dropout", T=32))
    tiles = [factors[:, :, i : i + 8, j : j + 8] for i in range(0, 32, 8) for j in range(0, 32, 8)]
    assert all(np.any(a != b) for a, b in itertools.combinations(tiles, 2))


HEADS = [(6, 2, 11, 37), (4, 1, 1, 37), (4, 4, 37, 11), (3, 3, 1, 1), (6, 6, 5, 30), (5, 1, 3, 20), (8, 2, 1, 33)]


@pytest.mark.parametrize(("N", "K", "T", "S"), first(3, HEADS))
@pytest.mark.parametrize("features", first(1, ["causal bias_111", "ragged t5", "mask window"]))
def test_heads_and_lengths(monkeypatch, features, N, K, T, S):
    """Grouped, multi-query and multi-head; one query; T and S that differ; T (N/K) no power of two."""
    in_blocks(monkeypatch, 7, 12)
    if "ragged" in features:
        S = max(S, T)
    check(problem(features, N=N, K=K, T=T, S=S, B=3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("features", first(1, ["causal cap bias_111 segments", "ragged bias_101", "mask"]))
def test_dtypes(monkeypatch, features, dtype):
    in_blocks(monkeypatch, 10, 16)
    with jax.enable_x64(dtype == jnp.float64):
        check(problem(features, dtype=dtype))


def test_float32_under_x64(monkeypatch):
    in_blocks(monkeypatch, 10, 16)
    with jax.enable_x64(True):
        check(problem("causal window t5 segments cap"))
        check(solved_with_dropout(problem("ring window dropout")))


@pytest.mark.parametrize("sizes", [(10, 16), (256, 256)], ids=str)
def test_queries_without_keys(monkeypatch, sizes):
    """Whole blocks and whole rows: outputs and gradients are 0, never NaN."""
    in_blocks(monkeypatch, *sizes)
    p = problem("mask cap t5")
    mask = np.asarray(p.facts.mask).copy()
    mask[0] = False
    mask[1, :, 10:30] = False
    allowed = p.allowed & mask
    check(dataclasses.replace(p, facts=dataclasses.replace(p.facts, mask=jnp.asarray(mask)), allowed=allowed))


def test_windows_and_lengths_that_skip_all_keys(monkeypatch):
    """Queries far from all keys: no block is visited."""
    in_blocks(monkeypatch, 10, 16)
    p = problem("reordered window causal", T=40)
    far = jnp.asarray(np.asarray(p.facts.key_index) + 1000, jnp.int32)
    p = dataclasses.replace(p, facts=dataclasses.replace(p.facts, key_index=far), allowed=np.zeros_like(p.allowed))
    check(p)


def stacked(p: Problem, layers=3, layer=1):
    """k and v as a layer of a stack whose other layers are NaN."""
    other = jnp.full_like(p.k, jnp.nan)
    stack = lambda x: jnp.stack([x if i == layer else other for i in range(layers)])
    return dataclasses.replace(p, k=stack(p.k), v=stack(p.v))


@pytest.mark.parametrize("features", first(2, ["ragged", "ring window alibi", "window reordered bias_111 cap"]))
@pytest.mark.parametrize("tokens", [1, pytest.param(11, marks=pytest.mark.full)])
def test_a_layer_of_a_stack(monkeypatch, features, tokens):
    in_blocks(monkeypatch, 4, 16)
    p = problem(features, T=tokens, S=37)
    want_out, _, want = solve(dataclasses.replace(p, dlog=0 * p.dlog))
    whole = stacked(p)

    def both_passes(q, k, v, layer):
        out, pull_back = jax.vjp(lambda *qkv: attention(*qkv, p.facts, layer=layer), q, k, v)
        return out, *pull_back(p.dout)

    out, dq, dk, dv = jax.jit(both_passes)(whole.q, whole.k, whole.v, jnp.int32(1))
    assert np.abs(out - want_out).max() <= 2e-6
    for got, name in ((dq, "q"), (dk[1], "k"), (dv[1], "v")):
        assert np.abs(got - want[name]).max() <= 1e-5 * np.abs(want[name]).max(), name
    assert not np.any(dk[::2]) and not np.any(dv[::2])


@pytest.mark.parametrize("dtype", first(1, [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2]))
@pytest.mark.parametrize("layer", [None, 1])
def test_keys_in_eight_bits(monkeypatch, dtype, layer):
    """The exact attention to the stored numbers; the gradient of q."""
    in_blocks(monkeypatch, 4, 16)
    p = problem("ragged", T=5, S=37)
    small = [quantize(x, dtype) for x in (p.k, p.v)]
    wide = [np.asarray(x.values, np.float64) * np.asarray(x.scale, np.float64)[..., None] for x in small]
    want_out, _, want = solve(dataclasses.replace(p, k=wide[0], v=wide[1], dlog=0 * p.dlog))
    if layer is not None:
        small = [Quantized(jnp.stack([x.values] * 2), jnp.stack([jnp.nan * x.scale, x.scale])) for x in small]

    def both_passes(q, k, v, layer):
        out, pull_back = jax.vjp(lambda q: attention(q, k, v, p.facts, layer=layer), q)
        return out, *pull_back(p.dout)

    out, dq = jax.jit(both_passes)(p.q, *small, None if layer is None else jnp.int32(layer))
    assert np.abs(out - want_out).max() <= 2e-6
    assert np.abs(dq - want["q"]).max() <= 1e-5 * np.abs(want["q"]).max()


def test_padding_of_a_cache_may_hold_anything(monkeypatch):
    """Free slots are never read: huge keys and values change no bit."""
    in_blocks(monkeypatch, 4, 16)
    p = problem("ragged", T=5, S=37)
    free = (np.asarray(p.facts.key_index) == FREE)[:, None, :, None]
    assert free.any()
    program = jax.jit(lambda q, k, v: attention(q, k, v, p.facts))
    other = program(p.q, jnp.where(free, 1e30, p.k), jnp.where(free, 1e30, p.v))
    np.testing.assert_array_equal(program(p.q, p.k, p.v), other)


@pytest.mark.parametrize("implementation", ["blocks", "xla"])
def test_by_name(monkeypatch, implementation):
    in_blocks(monkeypatch, 10, 16)
    check(problem("causal cap t5 segments bias_011"), implementation=implementation)


def test_large_scores(monkeypatch):
    """Scores of size 300, which overflow exp in float32; rows are nearly one-hot."""
    in_blocks(monkeypatch, 10, 16)
    p = problem("causal")
    p = dataclasses.replace(p, q=p.q * 60)
    out, log_total, gradients = (jax.tree.map(np.asarray, each) for each in _solved(p))
    want_out, want_log, want = solve(p)
    # Scores of 300 are known to an ulp, 2^-15, and to the error of a sum of 8 products: 8 * 2^-16.
    error = 8 * 300 * 2.0**-24
    assert np.abs(log_total - want_log).max() <= error
    assert np.abs(out - want_out).max() <= 2 * error * np.abs(np.asarray(p.v)).max()
    for name, gradient in gradients.items():
        assert np.abs(gradient - want[name]).max() <= 4 * error * np.abs(want[name]).max(), name


@pytest.mark.parametrize("offset", [-1e3, -1e9, float(jnp.finfo(jnp.float32).min)])
def test_a_large_bias_of_a_whole_row_leaves_the_gradients(monkeypatch, offset):
    """A bias of padding, added to all scores of a row: the softmax is that of rounded scores."""
    in_blocks(monkeypatch, 10, 16)
    p = problem("causal bias_111")
    bias = p.facts.bias.at[:, :, 3].set(offset)
    p = dataclasses.replace(p, facts=dataclasses.replace(p.facts, bias=bias))
    got = jax.jit(
        lambda o, facts: jax.vjp(lambda o: attention(*dataclasses.replace(p, facts=facts).replaced(o)), o)[1](
            p.dout
        )[0]
    )(p.differentiable, p.facts)
    with jax.enable_x64(True):
        rounded = np.asarray(p.q, np.float32)
        raw = np.einsum("bnth,bnsh->bnts", rounded, np.repeat(np.asarray(p.k), p.q.shape[1] // p.k.shape[1], 1))
        scores = (raw * np.float32(p.q.shape[-1] ** -0.5) + np.asarray(bias)).astype(np.float64)
        scores = np.where(p.allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        dv = np.einsum("bnts,bnth->bnsh", weights, np.asarray(p.dout, np.float64))
        want = dv.reshape(dv.shape[0], p.k.shape[1], -1, *dv.shape[2:]).sum(2)
    # Scores of size 1e3 are known to 2^-14: so are the weights.
    share = 1e-5 if abs(offset) > 1e4 else 2.0**-13
    assert np.abs(np.asarray(got["v"]) - want).max() <= share * np.abs(want).max()


def _solved(p):
    def both_passes(q, k, v):
        results, pull_back = jax.vjp(lambda *qkv: attention_with_log(*qkv, p.facts), q, k, v)
        return *results, dict(zip("qkv", pull_back((p.dout, p.dlog)), strict=True))

    return jax.jit(both_passes)(p.q, p.k, p.v)


def test_weights_are_the_softmax():
    p = problem("mask cap t5 causal")
    weights = np.asarray(blocks.weights(p.q, p.k, p.facts))
    # The values are unit vectors, so that outputs are weights.
    unit = jnp.broadcast_to(jnp.eye(8), (2, 2, 8, 8))
    for start in range(0, 32, 8):
        some = jnp.zeros_like(p.v).at[:, :, start : start + 8].set(unit)
        want, _, _ = solve(dataclasses.replace(p, v=some))
        assert np.abs(weights[..., start : start + 8] - want).max() <= 1e-6


@pytest.mark.parametrize("features", first(2, ["causal window", "traced_window", "cap bias_111", "mask"]))
def test_the_public_function(monkeypatch, features):
    """``attend`` takes tokens first, and options in place of facts."""
    in_blocks(monkeypatch, 10, 16)
    p = problem(features)
    f = p.facts
    options = dict(causal=f.causal, window=f.window, scale=f.scale, logit_cap=f.logit_cap, bias=f.bias, mask=f.mask)
    tokens_first = lambda x: x.swapaxes(1, 2)

    def both_passes(q, k, v, window):
        of_call = options if window is None else options | dict(window=window)
        out, pull_back = jax.vjp(lambda *qkv: rope_jax.attend(*qkv, **of_call), q, k, v)
        return out, *pull_back(tokens_first(p.dout))

    out, *gradients = map(tokens_first, jax.jit(both_passes)(*map(tokens_first, (p.q, p.k, p.v)), f.traced_window))
    want_out, _, want = solve(dataclasses.replace(p, dlog=0 * p.dlog))
    assert np.abs(out - want_out).max() <= 2e-6
    for got, name in zip(gradients, "qkv", strict=True):
        assert np.abs(got - want[name]).max() <= 1e-5 * np.abs(want[name]).max(), name
