"""Biases that are added to the scores, T5's and ALiBi's: their values, attention with them, a layer with them."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from decoders import TOLERANCE, D
from fast import first
from position_encodings import (
    CUTS,
    ENCODINGS,
    LEFT_AND_RIGHT,
    B,
    N,
    T,
    alibi_slopes,
    distances,
    in_pieces,
    reference,
    t5_bucket,
)

import rope_jax

SETTINGS = [(32, 128), (16, 64), (8, 20), (6, 9), (4, 3), (64, 1000), (32, 17), (12, 300)]


class TestRelativeBuckets:
    @pytest.mark.parametrize(
        ("causal", "num_buckets", "max_distance"),
        [(causal, *sizes) for causal in (True, False) for sizes in SETTINGS]
        + [(True, *sizes) for sizes in ((2, 2), (3, 5), (7, 40))],
    )
    def test_is_the_rule_in_integers(self, causal, num_buckets, max_distance):
        how = dict(causal=causal, num_buckets=num_buckets, max_distance=max_distance)
        near = np.arange(-max_distance - 40, max_distance + 41)
        got = np.asarray(rope_jax.attention.relative_buckets(near, **how))
        assert got.dtype == np.int32
        assert got.tolist() == [t5_bucket(int(d), **how) for d in near]
        for side in (got[near >= 0], got[near < 0][::-1]):
            assert np.all(np.diff(side) >= 0) and side[-1] == side.max()
        assert got.min() == 0 and got.max() == num_buckets - 1

    @pytest.mark.parametrize(("num_buckets", "max_distance"), SETTINGS)
    def test_is_the_logarithm_where_that_is_not_at_a_bound(self, num_buckets, max_distance):
        exact = num_buckets // 2
        d = np.arange(exact, 3 * max_distance)
        inside = np.log(d / exact) / np.log(max_distance / exact) * (num_buckets - exact)
        clear = abs(inside - np.round(inside)) > 1e-9
        assert clear.sum() >= len(d) - num_buckets
        got = rope_jax.attention.relative_buckets(
            d, causal=True, num_buckets=num_buckets, max_distance=max_distance
        )
        want = np.minimum(exact + np.floor(inside), num_buckets - 1)
        np.testing.assert_array_equal(np.asarray(got)[clear], want[clear])

    def test_every_integer_dtype_to_its_ends(self):
        for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32, jnp.uint32):
            ends = jnp.iinfo(dtype)
            near = [d for d in (ends.min, ends.min + 1, -1, 0, 1, 17, 100, ends.max - 1, ends.max) if d >= ends.min]
            for causal, size in itertools.product((True, False), ((32, 128), (32, 1000), (32, 2**40))):
                how = dict(causal=causal, num_buckets=size[0], max_distance=size[1])
                got = rope_jax.attention.relative_buckets(jnp.array(near, dtype), **how)
                assert got.tolist() == [t5_bucket(int(d), **how) for d in near], (dtype, how)
        with jax.enable_x64(True):
            near = [-(2**63), 2**63 - 1, 2**40, 2**40 - 1]
            how = dict(causal=False, num_buckets=32, max_distance=2**40)
            got = rope_jax.attention.relative_buckets(jnp.array(near, jnp.int64), **how)
            assert got.dtype == jnp.int32 and got.tolist() == [t5_bucket(d, **how) for d in near]

    def test_any_shape_and_jit(self):
        near = jnp.arange(-12, 12).reshape(2, 3, 4)
        got = jax.jit(
            lambda d: rope_jax.attention.relative_buckets(d, causal=False, num_buckets=8, max_distance=7)
        )(near)
        want = np.vectorize(lambda d: t5_bucket(d, False, 8, 7))(near)
        np.testing.assert_array_equal(got, want)


class TestT5Bias:
    MODULE = rope_jax.attention.T5Bias(num_buckets=6, max_distance=9)

    @pytest.mark.parametrize("causal", [True, False])
    def test_reads_the_table_and_its_gradient_is_how_often(self, causal):
        rng = np.random.default_rng(0)
        distance = rng.integers(-12, 13, (2, 5, 7))
        table = rng.normal(size=(6, 3)).astype(np.float32)
        weight = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
        apply = lambda table: self.MODULE.apply({"params": {"table": table}}, jnp.asarray(distance), 3, causal)
        buckets = np.vectorize(lambda d: t5_bucket(d, causal, 6, 9))(distance)
        got = apply(table)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, np.moveaxis(table[buckets], -1, 1))
        want = np.zeros((6, 3))
        np.add.at(want, buckets, np.moveaxis(np.float64(weight), 1, -1))
        grad = jax.grad(lambda table: jnp.sum(weight * apply(table)))(table)
        np.testing.assert_allclose(grad, want, atol=70 * 4 * oracles.EPS32 * 8)  # sums of up to 70 terms of size 4

    def test_dtype_and_names(self):
        module = rope_jax.attention.T5Bias(param_dtype=jnp.bfloat16)
        boxed = module.init(jax.random.key(0), jnp.zeros((1, 2, 2), int), 3, True)
        assert nn.get_partition_spec(boxed)["params"]["table"] == jax.sharding.PartitionSpec(
            "relative_buckets", "heads"
        )
        assert nn.unbox(boxed)["params"]["table"].dtype == jnp.bfloat16
        assert nn.unbox(boxed)["params"]["table"].shape == (32, 3)
        assert module.apply(boxed, jnp.zeros((1, 2, 2), int), 3, True).dtype == jnp.float32


class TestALiBi:
    @pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 32, 40, 48, 64, 71, 112, 128])
    def test_slopes(self, heads):
        got = rope_jax.attention.ALiBi.slopes(heads)
        assert got.dtype == np.float64 and got.shape == (heads,)
        np.testing.assert_allclose(
            got, alibi_slopes(heads), rtol=128 * 2.0**-52
        )  # theirs multiplies up to 128 times
        assert len(set(got.tolist())) == heads and np.all((got > 0) & (got < 1))

    def test_the_paper_s_own_numbers(self):
        """Section 3: for 8 heads 1/2^1, 1/2^2, ..., 1/2^8; for 16 the geometric means between them as well."""
        eight = [2.0**-i for i in range(1, 9)]
        assert rope_jax.attention.ALiBi.slopes(8).tolist() == eight
        np.testing.assert_allclose(rope_jax.attention.ALiBi.slopes(16)[1::2], eight, rtol=1e-15)
        np.testing.assert_allclose(
            rope_jax.attention.ALiBi.slopes(12)[8:], [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
        )

    @pytest.mark.parametrize("causal", [True, False])
    def test_bias(self, causal):
        distance = np.random.default_rng(0).integers(-9, 1000, (2, 4, 5))
        distance[0, 0] = [-(2**31), 2**31 - 1, 0, 1, -1]
        got = rope_jax.attention.ALiBi()(jnp.asarray(distance, jnp.int32), 6, causal)
        assert got.shape == (2, 6, 4, 5) and got.dtype == jnp.float32
        want = -np.array(alibi_slopes(6))[:, None, None] * abs(distance)[:, None]
        np.testing.assert_allclose(got, want, rtol=4 * oracles.EPS32)  # slope, distance, and their product
        near = jnp.array([[[0, 3, 250]]], jnp.uint8)
        np.testing.assert_array_equal(
            rope_jax.attention.ALiBi()(near, 6, causal), rope_jax.attention.ALiBi()(near.astype(int), 6, causal)
        )


# -------------------------------------------------------------------------------------------------- attend with a bias

S, H = T, 8
SHAPES = list(itertools.product((1, B), (1, N), (1, T)))
OPTIONS = {
    "plain": {},
    "scale": dict(scale=0.7),
    "causal": dict(causal=True),
    "mask": dict(mask=np.random.default_rng(5).random((B, N, T, S)) < 0.6),
    "mask and causal": dict(mask=np.random.default_rng(6).random((1, 1, T, S)) < 0.8, causal=True),
    "window": dict(window=3),
    "causal window": dict(window=3, causal=True),
    "cap": dict(logit_cap=1.5),
    "cap, all": dict(logit_cap=1.5, scale=0.7, causal=True, window=4, mask=np.ones((B, 1, T, S), bool)),
}
for _mask in (OPTIONS["mask"]["mask"], OPTIONS["mask and causal"]["mask"]):
    _mask[..., 0] = True  # each query reads a key


def qkv(kv_heads=2, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, n, h, H)), dtype) for n, h in ((T, N), (S, kv_heads), (S, kv_heads))]


def some_bias(shape=(B, N, T), dtype=jnp.float32, seed=1):
    return jnp.asarray(2 * np.random.default_rng(seed).normal(size=(*shape, S)), dtype)


def wanted(q, k, bias, mask=None, causal=False, window=None, scale=None, logit_cap=None):
    """The weights in float64 ``[B, N, T, S]``."""
    behind = np.subtract.outer(np.arange(T), np.arange(S))
    seen = (behind >= 0 if causal else np.ones((T, S), bool)) & (abs(behind) < (window or T + S))
    seen = np.broadcast_to(seen if mask is None else seen & mask, (B, N, T, S))
    bias = np.broadcast_to(np.asarray(bias, np.float64), (B, N, T, S))
    how = dict(scale=scale, logit_cap=logit_cap)
    return np.stack([oracles.attention_weights(q[b], k[b], seen[b], bias=bias[b], **how) for b in range(B)])


def read(weights, v):
    v = np.repeat(np.asarray(v, np.float64), N // v.shape[2], axis=2)
    return np.einsum("bnts,bsnh->btnh", weights, v)


class TestAttend:
    # Scores of size 8 carry their roundings into the weights, and sums of H = 8 and S = 10 terms of size 4 follow.
    TOLERANCE = 128 * oracles.EPS32

    @pytest.mark.parametrize("kv_heads", first(1, [2, 1, 4]))
    @pytest.mark.parametrize("name", OPTIONS)
    def test_against_the_oracle(self, name, kv_heads):
        options, (q, k, v), bias = OPTIONS[name], qkv(kv_heads), some_bias()
        want = wanted(q, k, bias, **options)
        weights = rope_jax.attention.attention_weights(q, k, bias=bias, **options)
        assert weights.dtype == jnp.float32 and weights.shape == (B, N, T, S)
        np.testing.assert_allclose(weights, want, atol=self.TOLERANCE / 4)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=8 * oracles.EPS32)
        got = rope_jax.attend(q, k, v, bias=bias, **options)
        np.testing.assert_allclose(got, read(want, v), atol=self.TOLERANCE)
        if options.get("causal"):
            return
        # Fewer keys than queries are keys that are masked. A window of 3 leaves the queries from 9 on without a key.
        read_by = range(9 if "window" in options else T)
        few = np.array(np.broadcast_to(options.get("mask", True), (B, N, T, S)))
        few[..., 7:] = False
        want = np.array(read(wanted(q, k, bias, **(options | dict(mask=few | (np.arange(T) >= 9)[:, None]))), v))
        want[:, len(read_by) :] = 0
        some = options | (dict(mask=few[..., :7]) if "mask" in options else {})
        got = rope_jax.attend(q, k[:, :7], v[:, :7], bias=bias[..., :7], **some)
        rows = slice(0, 9)
        np.testing.assert_allclose(got[:, rows], want[:, rows], atol=self.TOLERANCE)
        if len(read_by) == 9:
            np.testing.assert_array_equal(got[:, 9:], want[:, 9:])

    @pytest.mark.parametrize("options", [{}, dict(logit_cap=1.5)], ids=["xla", "own"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_axes_of_one_and_gradients(self, shape, options):
        (q, k, v), bias = qkv(), some_bias(shape)
        weight = np.random.default_rng(2).normal(size=q.shape)
        loss = lambda bias: jnp.sum(
            jnp.asarray(weight, jnp.float32) * rope_jax.attend(q, k, v, bias=bias, causal=True, **options)
        )
        value, grad = jax.value_and_grad(loss)(bias)
        weights = wanted(q, k, bias, causal=True, **options)
        many = T * N * B * H
        assert abs(value - np.sum(weight * read(weights, v))) < self.TOLERANCE * math.sqrt(many) * 4
        # d softmax: w (dw - sum w dw), with dw = g . v; what was broadcast is summed.
        wide = np.repeat(np.asarray(v, np.float64), 2, axis=2)
        dw = np.einsum("btnh,bsnh->bnts", weight, wide)
        want = weights * (dw - (weights * dw).sum(-1, keepdims=True))
        once = tuple(axis for axis in range(3) if shape[axis] == 1)
        want = want.sum(once, keepdims=True)
        assert grad.shape == bias.shape and np.abs(want).max() > 0.1
        np.testing.assert_allclose(grad, want, atol=8 * self.TOLERANCE)

    @pytest.mark.parametrize("promotion", first(1, ["strict", "standard"]))
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    @pytest.mark.parametrize("bias_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_every_dtype(self, dtype, bias_dtype, promotion):
        (q, k, v), bias = qkv(dtype=dtype), some_bias((1, N, T), bias_dtype)
        loss = lambda bias: jnp.sum(rope_jax.attend(q, k, v, bias=bias, causal=True).astype(jnp.float32))
        with jax.numpy_dtype_promotion(promotion):
            got = jax.jit(lambda bias: rope_jax.attend(q, k, v, bias=bias, causal=True))(bias)
            grad = jax.jit(jax.grad(loss))(bias)
            weights = rope_jax.attention.attention_weights(q, k, bias=bias, causal=True)
        assert got.dtype == dtype and grad.dtype == bias_dtype and weights.dtype == jnp.float32
        want = wanted(q, k, bias, causal=True)
        np.testing.assert_allclose(weights, want, atol=self.TOLERANCE / 4)  # the scores are float32 whatever q is
        unit = float(jnp.finfo(dtype).eps) / 2
        # The weights and the result are rounded to the dtype once each; values are up to 4.
        size = float(jnp.abs(v).max())
        np.testing.assert_allclose(np.float64(got), read(want, v), atol=max(3 * unit * size, self.TOLERANCE))
        dw = np.repeat(np.asarray(v, np.float64), 2, axis=2).sum(-1).transpose(0, 2, 1)[:, :, None]
        dbias = (want * (dw - (want * dw).sum(-1, keepdims=True))).sum(0, keepdims=True)
        # Of a size of up to H = 8 values, rounded as they are and as the weights, in both directions, and added over B.
        limit = max(8 * unit, 8 * float(jnp.finfo(bias_dtype).eps) / 2) * 4 + self.TOLERANCE
        np.testing.assert_allclose(np.float64(grad), dbias, atol=limit)

    def test_dropout_drops_the_weights_of_the_biased_softmax(self):
        (q, k, v), bias, key = qkv(), some_bias(), jax.random.key(3)
        attend = functools.partial(rope_jax.attend, q, k, v, causal=True)
        got = attend(bias=bias, dropout_rate=0.25, dropout_rng=key)
        # Values that are unit vectors show the weights themselves, of H keys at a time.
        shown = []
        for start in (0, S - H):
            units = jnp.broadcast_to(jnp.eye(S, H, -start)[None, :, None], v.shape)
            dropped = rope_jax.attend(q, k, units, causal=True, bias=bias, dropout_rate=0.25, dropout_rng=key)
            shown.append(np.moveaxis(np.asarray(dropped) != 0, 1, 2))
        kept = np.concatenate([shown[0], shown[1][..., 2 * H - S :]], axis=-1)
        visible = np.broadcast_to(np.tri(T, S, dtype=bool), kept.shape)
        share = kept[visible].mean()
        assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / visible.sum()), share
        want = read(np.where(kept, wanted(q, k, bias, causal=True) / 0.75, 0), v)
        np.testing.assert_allclose(got, want, atol=2 * self.TOLERANCE)
        nothing = attend(bias=jnp.zeros((1, 1, 1, S)), dropout_rate=0.25, dropout_rng=key)
        # The same weights are dropped. Adding 0 is exact, but another program may fuse, and so round, in another way.
        np.testing.assert_allclose(nothing, attend(dropout_rate=0.25, dropout_rng=key), atol=self.TOLERANCE)

    @pytest.mark.parametrize("cap", [None, 1.5])
    def test_a_bias_of_zero_and_one_common_to_all_keys_change_nothing(self, cap):
        q, k, v = qkv()
        plain = rope_jax.attend(q, k, v, logit_cap=cap)
        for bias in (jnp.zeros((1, 1, 1, S)), jnp.full((1, N, T, S), 3.0)):
            np.testing.assert_allclose(
                rope_jax.attend(q, k, v, bias=bias, logit_cap=cap), plain, atol=self.TOLERANCE
            )

    def test_a_query_that_reads_nothing_is_zero(self):
        q, k, v = qkv()
        mask = np.ones((B, 1, T, S), bool)
        mask[0, 0, 2] = False
        got = rope_jax.attention.attention_weights(q, k, bias=some_bias(), mask=mask)
        np.testing.assert_array_equal(got[0, :, 2], 0)
        attend = lambda *qkv: rope_jax.attend(*qkv, bias=some_bias(), mask=mask)
        np.testing.assert_array_equal(attend(q, k, v)[0, 2], 0)
        for grad in jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2))(q, k, v):
            assert np.isfinite(grad).all()


# ------------------------------------------------------------------------------------------------ a layer with a bias


def layer(name="none", **change):
    fields = dict(num_heads=N, num_kv_heads=2, head_dim=H, rope=None) | ENCODINGS[name] | change
    return rope_jax.RotaryAttention(**fields)


def embedded(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)), jnp.float32)


def init_layer(module):
    params = nn.unbox(module.init(jax.random.key(0), embedded()))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.2 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def layer_oracle(params, x, bias, allowed):
    """Without a rotation: ``y [B, T, D]`` and the weights ``[B, N, T, S]``."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    q, k, v = (np.einsum("btd,dnh->btnh", np.float64(x), p[name]["kernel"]) for name in ("query", "key", "value"))
    weights = np.stack([oracles.attention_weights(q[b], k[b], allowed, bias=bias) for b in range(B)])
    return np.einsum("btnh,nhd->btd", read(weights, v), p["out"]["kernel"]), weights


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["none", "t5", "alibi"])
def test_a_layer_is_the_formula_in_both_directions(name, causal, window):
    module, x = layer(name, causal=causal, window=window), embedded()
    params = init_layer(module)
    bias = reference(name, params)[1]
    if name == "t5":
        table = np.asarray(params["params"]["position_bias"]["table"], np.float64)
        buckets = np.vectorize(lambda d: t5_bucket(d, causal, 6, 9))(distances())
        bias = np.moveaxis(table[buckets], -1, 0)
    allowed = (distances() >= 0 if causal else np.ones((T, T), bool)) & (abs(distances()) < (window or T))
    want, weights = layer_oracle(params, x, bias, allowed)
    y, kept = module.apply(params, x, mutable="intermediates")
    np.testing.assert_allclose(y, want, atol=TOLERANCE)
    (sown,) = kept["intermediates"]["weights"]
    np.testing.assert_allclose(sown, weights, atol=TOLERANCE)


LAYERS = ["none", "rope", "t5", "alibi", "rope+alibi"]


@pytest.mark.parametrize("case", first(1, ["ragged, window", "dense", "dense, window", "ragged"]))
@pytest.mark.parametrize("name", ["t5", "alibi", "rope+alibi"])  # test_attention.py has the other two
def test_a_layer_is_one_however_it_is_cut(name, case):
    module, x = layer(name, window=3 if "window" in case else None), np.asarray(embedded())
    params = init_layer(module)
    mask = LEFT_AND_RIGHT if "ragged" in case else None
    real = np.ones((B, T), bool) if mask is None else mask
    step = jax.jit(lambda x, mask, cache: module.apply(params, x, mask=mask, cache=cache))
    full = jax.jit(lambda x, mask: module.apply(params, x, mask=mask))(x, mask)
    for cuts in CUTS:
        cache = rope_jax.init_cache(batch=B, capacity=T + 2, num_kv_heads=2, head_dim=H)
        got, cache = in_pieces(step, cache, x, mask, cuts)
        assert cache.num_tokens.tolist() == real.sum(1).tolist()
        np.testing.assert_allclose(got[real], full[real], atol=TOLERANCE)


def test_a_bias_may_be_planned():
    """As the field would make it, for all layers at once; with a cache it is as wide as the cache."""
    x = embedded()
    plain = layer()
    params = init_layer(plain)
    want = layer("alibi").apply(params, x)
    biased = layer("alibi")
    plan = functools.partial(
        rope_jax.attention.make_plan, plain.rope, (B, T), position_bias=rope_jax.attention.ALiBi(), num_heads=N
    )
    np.testing.assert_array_equal(biased.apply(params, x, plan=plan()), want)
    with pytest.raises(ValueError, match="the layer's position_bias, got one: the layer has none"):
        plain.apply(params, x, plan=plan())
    cache = rope_jax.init_cache(batch=B, capacity=T + 2, num_kv_heads=2, head_dim=H)
    assert plan(cache=cache).position_bias(jnp.zeros((1, 2, 3), jnp.int32)).shape == (1, N, 2, 3)
    cached, _ = biased.apply(params, x, plan=plan(cache=cache), cache=plan(cache=cache).begin(cache))
    np.testing.assert_allclose(cached, want, atol=TOLERANCE)


@pytest.mark.parametrize("name", LAYERS)
def test_without_an_encoding_and_causality_tokens_are_a_set(name):
    module, x = layer(name, causal=False), embedded()
    params = init_layer(module)
    order = np.random.default_rng(1).permutation(T)
    apart = np.abs(module.apply(params, x[:, order]) - module.apply(params, x)[:, order]).max()
    assert apart < TOLERANCE if name == "none" else apart > 0.01


# ------------------------------------------------------------------------------------------------------------- refusals


DISTANCE = jnp.zeros((1, 2, 2), int)
bias_of = lambda distance=DISTANCE, **fields: rope_jax.attention.T5Bias(**fields).init(
    jax.random.key(0), distance, 3, True
)
buckets_of = lambda distance=DISTANCE, **how: rope_jax.attention.relative_buckets(
    distance, **(dict(causal=True) | how)
)


def scores(fn, **change):
    q = jnp.ones((2, 3, 4, 8))
    given = dict(q=q, k=q[:, :, :2], v=q[:, :, :2]) | change
    if fn is rope_jax.attention.attention_weights:
        del given["v"]
    return lambda: fn(**given)


BOTH = (rope_jax.attend, rope_jax.attention.attention_weights)


@pytest.mark.parametrize(
    ("attempt", "error", "says"),
    [
        (lambda: buckets_of(DISTANCE.astype(jnp.float32)), TypeError, "distance must be integer, got dtype float32"),
        (lambda: buckets_of(np.array([2**40])), ValueError, "distance must fit in int32"),
        (lambda: buckets_of(num_buckets=1), ValueError, "num_buckets must be at least 2, got 1"),
        (lambda: buckets_of(num_buckets=2, causal=False), ValueError, "num_buckets must be even and at least 4 without causality, got 2"),
        (lambda: buckets_of(num_buckets=7, causal=False), ValueError, "num_buckets must be even and at least 4 without causality, got 7"),
        (lambda: buckets_of(max_distance=16), ValueError, "max_distance must be over 16 with num_buckets=32, got 16"),
        (lambda: buckets_of(max_distance=8, causal=False), ValueError, "max_distance must be over 8 with num_buckets=32, got 8"),
        (lambda: bias_of(num_buckets=-2), ValueError, "num_buckets must be at least 2, got -2"),
        (lambda: bias_of(max_distance=3), ValueError, "max_distance must be over 16"),
        (lambda: bias_of(DISTANCE[0]), ValueError, r"distance must have shape \[B, T, S\], got \(2, 2\)"),
        (lambda: bias_of(DISTANCE.astype(jnp.float32)), TypeError, "distance must be integer, got dtype float32"),
        (lambda: rope_jax.attention.ALiBi.slopes(0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: rope_jax.attention.ALiBi()(DISTANCE, 0, True), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: rope_jax.attention.ALiBi()(DISTANCE[0], 2, True), ValueError, r"distance must have shape \[B, T, S\], got \(2, 2\)"),
        (lambda: rope_jax.attention.ALiBi()(DISTANCE.astype(jnp.float32), 2, True), TypeError, "distance must be integer, got dtype float32"),
        *[
            case
            for fn in BOTH
            for case in (
                (scores(fn, bias=jnp.ones((2, 4, 3, 2))), ValueError, r"bias must have shape \[B, N, T, S\] with B={1, 2}, N={1, 4}, T={1, 3}, S=3, got \(2, 4, 3, 2\)"),
                (scores(fn, bias=jnp.ones((2, 2, 3, 3))), ValueError, "bias must have shape"),
                (scores(fn, bias=jnp.ones((3, 1, 1, 3))), ValueError, "bias must have shape"),
                (scores(fn, bias=jnp.ones((1, 1, 2, 3))), ValueError, "bias must have shape"),
                (scores(fn, bias=jnp.ones((4, 3, 3))), ValueError, "bias must have shape"),
                (scores(fn, bias=jnp.ones((1, 1, 3, 3), int)), TypeError, "bias must be floating, got dtype int32"),
                (scores(fn, bias=jnp.ones((1, 1, 3, 3), bool)), TypeError, "bias must be floating, got dtype bool"),
                (scores(fn, mask=jnp.ones((1, 1, 3, 3))), TypeError, "mask must be bool, got dtype float32"),
                (scores(fn, mask=jnp.ones((1, 1, 3, 2), bool)), ValueError, "mask must have shape"),
                (scores(fn, q=jnp.ones((3, 4, 8))), ValueError, r"q must have shape \[B, T, N, H\], got \(3, 4, 8\)"),
                (scores(fn, k=jnp.ones((2, 3, 2, 6))), ValueError, r"k must have shape .* with B=2, H=8, got"),
                (scores(fn, q=jnp.ones((2, 3, 5, 8))), ValueError, "q must have a multiple of K=2 heads, got N=5"),
                (scores(fn, window=0), ValueError, "window must be at least 1 token, got 0"),
                (scores(fn, window=1.5), TypeError, "window must be an integer, got 1.5"),
                (scores(fn, logit_cap=0.0), ValueError, "logit_cap must be positive and finite, got 0.0"),
            )
        ],
        (
            lambda: rope_jax.attend(*qkv(), bias=jnp.zeros((1, 1, T, S + 1))),
            ValueError,
            r"bias must have shape \[B, N, T, S\] with B={1, 2}, N={1, 4}, T={1, 10}, S=\d+, got \(1, 1, 10, \d+\)",
        ),
        (lambda: rope_jax.attend(*qkv(), bias=[[0.0], [0.0, 1.0]]), ValueError, "bias must be an array"),
        (lambda: buckets_of(max_distance=128.0), TypeError, "max_distance must be an integer, got 128.0"),
        (lambda: buckets_of(num_buckets=None), TypeError, "num_buckets must be an integer, got None"),
        (lambda: buckets_of(max_distance=2**63), ValueError, "max_distance must be below 2\\^63"),
        (lambda: buckets_of(causal="no"), TypeError, "causal must be True or False, got 'no'"),
        (lambda: rope_jax.attention.T5Bias().init(jax.random.key(0), DISTANCE, 0, True), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: rope_jax.attention.ALiBi.slopes("8"), TypeError, "num_heads must be an integer, got '8'"),
        *[
            case
            for fn in BOTH
            for case in (
                (scores(fn, q=jnp.ones((2, 3, 4, 8), int)), TypeError, "q must be floating, got dtype int32"),
                (scores(fn, k=jnp.ones((2, 3, 0, 8))), ValueError, "q and k must have heads and features, got N=4, K=0, H=8"),
                (scores(fn, window=True), TypeError, "window must be an integer, got True"),
                (scores(fn, window="2"), TypeError, "window must be an integer, got '2'"),
                (scores(fn, window=jnp.ones(3, int)), ValueError, r"window must have shape \[\], got \(3,\)"),
                (lambda fn=fn: jax.jit(lambda w: scores(fn, window=w)())(2.5), TypeError, "window must be an integer, got dtype float32"),
                (lambda fn=fn: jax.jit(lambda w: scores(fn, window=w)())(True), TypeError, "window must be an integer, got dtype bool"),
                (scores(fn, scale=True), TypeError, "scale must be a real number, got True"),
                (scores(fn, scale=math.nan), ValueError, "scale must be finite, got nan"),
                (scores(fn, logit_cap="x"), TypeError, "logit_cap must be a real number, got 'x'"),
            )
        ],
    ],
)  # fmt: skip
def test_refusals(attempt, error, says):
    with pytest.raises(error, match=says):
        attempt()


# ------------------------------------------------------------------------------------- what was once wrong


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64, jnp.int32])
@pytest.mark.parametrize("window", first(2, [2, 2**31 - 1, 1, 3]))
def test_a_window_is_the_same_number_in_every_integer_type(kind, window):
    q, k, v = qkv()
    want = rope_jax.attend(q, k, v, causal=True, window=window)
    np.testing.assert_array_equal(rope_jax.attend(q, k, v, causal=True, window=kind(window)), want)
    module, x = layer(), embedded()
    params = init_layer(module)
    windowed = layer(window=kind(window))
    by_field = windowed.apply(params, x)
    for same in (window, kind(window)):
        plan = rope_jax.attention.make_plan(module.rope, x.shape[:2], window=same)
        np.testing.assert_array_equal(windowed.apply(params, x, plan=plan), by_field)


@pytest.mark.parametrize("window", [2, 2**32 + 2])
def test_a_traced_window_of_64_bits_is_not_cut_to_32(window):
    with jax.enable_x64(True):
        q, k, v = qkv()
        got = jax.jit(lambda window: rope_jax.attend(q, k, v, window=window))(jnp.int64(window))
        np.testing.assert_allclose(got, rope_jax.attend(q, k, v, window=min(window, 99)), atol=TOLERANCE)


def test_float64_under_strict_promotion():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        q, k, v = (part.astype(jnp.float64) for part in qkv())
        got = rope_jax.attend(q, k, v, scale=np.float64(0.5), window=np.int64(8))
        want = wanted(q, k, np.zeros(S), scale=0.5, window=8)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, read(want, v), atol=TOLERANCE)  # scores are float32


@pytest.mark.parametrize("kind", [int, np.int8, np.int64, jnp.int32])
def test_sizes_may_be_any_integers(kind):
    far = np.arange(200)
    for causal, num_buckets, max_distance in ((False, 32, 100), (True, 20, 127), (True, 32, 120)):
        got = rope_jax.attention.relative_buckets(
            far, causal=causal, num_buckets=kind(num_buckets), max_distance=kind(max_distance)
        )
        want = [t5_bucket(int(d), causal, num_buckets, max_distance) for d in far]
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(rope_jax.attention.ALiBi.slopes(kind(6)), rope_jax.attention.ALiBi.slopes(6))


@pytest.mark.parametrize("max_distance", [2**53 + 1, 2**60 + 7, 2**63 - 1])
def test_bounds_are_exact_however_large(max_distance):
    starts = rope_jax.attention.bias._bucket_starts(32, max_distance)
    for j, start in enumerate(starts[16:]):
        bound = max_distance**j * 16 ** (16 - j)
        assert (start - 1) ** 16 < bound <= start**16


def test_four_bit_distances():
    want = rope_jax.attention.relative_buckets(np.arange(-8, 8), causal=False)
    got = rope_jax.attention.relative_buckets(jnp.arange(-8, 8, dtype=jnp.int4), causal=False)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["none", "t5"])
def test_nan_at_padding_reaches_no_gradient(name):
    mask = jnp.arange(T)[None] < jnp.array([[T], [T - 3]])
    module = layer(name)
    x = jnp.where(mask[..., None], embedded(), jnp.nan)
    loss = lambda params: jnp.where(mask[..., None], module.apply(params, x, mask=mask), 0.0).sum()
    grads = jax.tree.leaves(jax.grad(loss)(init_layer(module)))
    assert all(np.isfinite(each).all() for each in grads) and max(abs(each).max() for each in grads) > 0
