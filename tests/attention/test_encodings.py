"""The encodings beside RoPE: the values that are added, and that a model with them is one however it is fed."""

import functools
import itertools
import math
from fractions import Fraction

import decoders
import flax.linen as nn
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest
from decoders import ROPE, TOLERANCE, D, L, init, tokens
from jax import export

import rope_jax
import rope_jax.attention.layer
from rope_jax.generation.generate import _generate

B, N, T = 2, 4, 10
ENCODINGS = {
    "none": {},
    "rope": dict(rope=ROPE),
    "sinusoidal": dict(position_embedding=rope_jax.models.Sinusoidal(base=100.0)),
    "learned": dict(position_embedding=rope_jax.models.LearnedPositions(num_positions=70)),
    "t5": dict(position_bias=rope_jax.attention.T5Bias(num_buckets=6, max_distance=9)),
    "alibi": dict(position_bias=rope_jax.attention.ALiBi()),
    "rope+alibi": dict(rope=ROPE, position_bias=rope_jax.attention.ALiBi()),
}


def distances(length=T):
    """float64 ``[T, T]``: how far each query stands behind each key."""
    return np.subtract.outer(np.arange(length), np.arange(length))


# ------------------------------------------------------------------------------------- the formulas, in plain Python


def sinusoidal(position, width, base):
    """Vaswani et al. 2017, section 3.5, at 60 digits."""
    with mpmath.workdps(60):
        angles = [mpmath.mpf(position) / mpmath.mpf(base) ** (mpmath.mpf(2 * i) / width) for i in range(width // 2)]
        return [float(part(angle)) for angle in angles for part in (mpmath.sin, mpmath.cos)]


def t5_bucket(distance, causal, num_buckets, max_distance):
    """Raffel et al. 2020, section 2.1, without a logarithm: ``floor(log(d/e) / log(M/e) * s) >= j`` is this power."""
    if not causal:
        half = num_buckets // 2
        return t5_bucket(abs(distance), True, half, max_distance) + (half if distance < 0 else 0)
    distance, exact = max(distance, 0), num_buckets // 2
    if distance < exact:
        return distance
    shared = num_buckets - exact
    for j in reversed(range(shared)):
        if Fraction(distance, exact) ** shared >= Fraction(max_distance, exact) ** j:
            return exact + j
    raise AssertionError


def alibi_slopes(heads):
    """Press et al. 2022, section 3: a geometric sequence from 2^(-8/n) with that ratio; and, by the authors' code,
    for other numbers of heads that of the power of two below, and every other one of twice as many."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    if power == heads:
        return [2 ** (-8 / heads) * (2 ** (-8 / heads)) ** i for i in range(heads)]
    return alibi_slopes(power) + alibi_slopes(2 * power)[::2][: heads - power]


def reference(name, params, length=T):
    """What the encoding of that name adds to the embeddings ``[T, D]`` and to the scores ``[N, T, S]``."""
    added, bias = 0.0, 0.0
    if "sinusoidal" in name:
        added = np.array([sinusoidal(m, D, 100) for m in range(length)])
    if "learned" in name:
        added = np.asarray(params["params"]["position_embedding"]["table"], np.float64)[:length]
    if "t5" in name:
        table = np.asarray(params["params"]["position_bias"]["table"], np.float64)
        buckets = np.vectorize(lambda d: t5_bucket(d, True, 6, 9))(distances(length))
        bias = np.moveaxis(table[buckets], -1, 0)
    if "alibi" in name:
        bias = -np.array(alibi_slopes(N))[:, None, None] * abs(distances(length))
    return added, bias


# ---------------------------------------------------------------------------------------------- added to embeddings


class TestSinusoidal:
    @pytest.mark.parametrize(("width", "base"), [(2, 10_000.0), (16, 100.0), (64, 10_000.0)])
    @pytest.mark.parametrize("start", [0, 1_000_000, 10_000_000, 2**31 - 8, -8])
    def test_is_the_formula(self, width, base, start):
        where = range(start, start + 8)
        got = rope_jax.models.Sinusoidal(base=base)(jnp.array(list(where), jnp.int32), width)
        assert got.shape == (8, width) and got.dtype == jnp.float32
        # One float32 rounding, as `rotation` promises, and that of the frequency to float64 and of its power, an ulp.
        slack = 2.0**-52 * abs(start) * base ** (-2 * (np.arange(width) // 2) / width)
        error = abs(np.float64(got) - [sinusoidal(m, width, base) for m in where])
        assert np.all(error <= 1.2e-7 + slack)
        given = rope_jax.core.geometric(width, base).tolist()  # for these frequencies it is the rounding alone
        for row, m in zip(np.float64(got), where, strict=True):
            cos, sin = zip(*(oracles.mp_cos_sin(m, frequency) for frequency in given), strict=True)
            np.testing.assert_allclose(row[0::2], sin, rtol=0, atol=1.2e-7)
            np.testing.assert_allclose(row[1::2], cos, rtol=0, atol=1.2e-7)

    def test_positions_of_rows_and_floats(self):
        where = jnp.array([[3, 1, 4], [1, 5, 9]])
        got = rope_jax.models.Sinusoidal()(where, 6)
        want = [[sinusoidal(int(m), 6, 10_000) for m in row] for row in where]
        np.testing.assert_allclose(got, want, rtol=0, atol=1.2e-7)
        # The float path is off by up to m theta 2^-23 radians.
        np.testing.assert_allclose(
            rope_jax.models.Sinusoidal()(where.astype(jnp.float32), 6), want, rtol=0, atol=9 * 2.0**-23 + 1.2e-7
        )

    def test_is_a_value(self):
        assert (
            rope_jax.models.Sinusoidal()
            == rope_jax.models.Sinusoidal(base=1e4)
            != rope_jax.models.Sinusoidal(base=1e5)
        )
        assert hash(rope_jax.models.Sinusoidal()) == hash(rope_jax.models.Sinusoidal(base=1e4))


class TestLearnedPositions:
    MODULE = rope_jax.models.LearnedPositions(num_positions=5)
    PARAMS = nn.unbox(MODULE.init(jax.random.key(0), jnp.arange(5), 3))

    def test_is_the_table(self):
        where = np.array([[4, 0, 2], [1, 1, 3]])
        table = self.PARAMS["params"]["table"]
        assert table.shape == (5, 3) and np.unique(table).size == 15
        np.testing.assert_array_equal(self.MODULE.apply(self.PARAMS, where, 3), np.asarray(table)[where])

    @pytest.mark.parametrize("outside", [5, 99, -1, -5, 2**31 - 1, -(2**31)])
    def test_outside_is_an_error_where_it_is_known_and_nan_where_it_is_not(self, outside):
        where = jnp.array([[0, 4, 1], [0, outside, 1]], jnp.int32)
        with pytest.raises(ValueError, match=rf"positions must be in \[0, num_positions=5\), got .*{outside}"):
            self.MODULE.apply(self.PARAMS, where, 3)
        got = np.isnan(jax.jit(lambda where: self.MODULE.apply(self.PARAMS, where, 3))(where))
        assert got.tolist() == [[[False] * 3] * 3, [[False] * 3, [True] * 3, [False] * 3]]

    def test_gradients_reach_the_rows_that_are_read_as_often_as_they_are(self):
        where = jnp.array([[4, 0, 4], [1, 4, 0]])
        weight = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
        loss = lambda params, where: jnp.nansum(weight * self.MODULE.apply(params, where, 3))
        want = np.zeros((5, 3))
        np.add.at(want, where, np.float64(weight))
        grad = jax.grad(loss)(self.PARAMS, where)["params"]["table"]
        np.testing.assert_allclose(grad, want, atol=8 * oracles.EPS32)  # three terms of size 2
        assert not np.any(grad[jnp.array([2, 3])])
        outside = jax.jit(jax.grad(loss))(self.PARAMS, where.at[0, 0].set(-1))["params"]["table"]
        np.add.at(want, (np.array([4]),), -np.float64(weight[0, 0]))
        np.testing.assert_allclose(outside, want, atol=8 * oracles.EPS32)

    def test_dtype_and_names(self):
        module = rope_jax.models.LearnedPositions(
            num_positions=5, param_dtype=jnp.bfloat16, embedding_init=nn.initializers.ones
        )
        boxed = module.init(jax.random.key(0), jnp.arange(2), 3)
        assert nn.get_partition_spec(boxed)["params"]["table"] == jax.sharding.PartitionSpec("positions", "embed")
        got = module.apply(boxed, jnp.arange(2), 3)
        assert got.dtype == jnp.bfloat16 and np.all(got == 1)


# ------------------------------------------------------------------------------------------------- added to the scores


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

    def test_one_table_serves_all_layers(self):
        seen = []

        def counted(distance, num_heads, causal):
            seen.append((distance.shape, num_heads, causal))
            return jnp.zeros((1, 1, 1, distance.shape[-1]))

        model = decoders.build(num_layers=5, **ENCODINGS["t5"])
        params = init(model)["params"]
        assert params["position_bias"]["table"].shape == (6, N)
        assert params["layers"]["self_attention"]["query"]["kernel"].shape[0] == 5
        assert set(params["layers"]["self_attention"]) == {"query", "key", "value", "out"}
        none = {"params": {name: part for name, part in params.items() if name != "position_bias"}}
        decoders.build(num_layers=5, position_bias=counted).apply(none, tokens())
        assert seen == [((1, 9, 9), N, True)]


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

S, H = 7, 8
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
    # Scores of size 8 carry their roundings into the weights, and sums of H = 8 and S = 7 terms of size 4 follow.
    TOLERANCE = 128 * oracles.EPS32

    # A window of 3 leaves the queries from 9 on without a key among 7: their mean is not attention's to promise.
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("name", OPTIONS)
    def test_against_the_oracle(self, name, kv_heads):
        options, (q, k, v), bias = OPTIONS[name], qkv(kv_heads), some_bias()
        rows = slice(0, 9 if "window" in options else T)
        if "window" in options:  # those queries are shown a key in the oracle, and left out of the comparison
            shown = dict(options, mask=options.get("mask", True) | np.zeros((1, 1, T, S), bool), window=None)
            near = abs(np.subtract.outer(np.arange(T), np.arange(S))) < options["window"]
            near[9:, -1] = True
            want = wanted(q, k, bias, **(shown | dict(mask=shown["mask"] & near)))
        else:
            want = wanted(q, k, bias, **options)
        weights = rope_jax.attention.attention_weights(q, k, bias=bias, **options)
        assert weights.dtype == jnp.float32 and weights.shape == (B, N, T, S)
        np.testing.assert_allclose(weights[:, :, rows], want[:, :, rows], atol=self.TOLERANCE / 4)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=8 * oracles.EPS32)
        got = rope_jax.attend(q, k, v, bias=bias, **options)
        np.testing.assert_allclose(got[:, rows], read(want, v)[:, rows], atol=self.TOLERANCE)
        np.testing.assert_allclose(got, read(np.float64(weights), v), atol=self.TOLERANCE)

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

    @pytest.mark.parametrize("promotion", ["strict", "standard"])
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
        kept = np.asarray(jax.random.bernoulli(key, 0.75, (B, N, T, S)))
        want = read(np.where(kept, wanted(q, k, bias, causal=True) / 0.75, 0), v)
        np.testing.assert_allclose(got, want, atol=2 * self.TOLERANCE)
        nothing = attend(bias=jnp.zeros((1, 1, 1, S)), dropout_rate=0.25, dropout_rng=key)
        np.testing.assert_array_equal(nothing, attend(dropout_rate=0.25, dropout_rng=key))

    @pytest.mark.parametrize("cap", [None, 1.5])
    def test_a_bias_of_zero_and_one_common_to_all_keys_change_nothing(self, cap):
        q, k, v = qkv()
        plain = rope_jax.attend(q, k, v, logit_cap=cap)
        for bias in (jnp.zeros((1, 1, 1, S)), jnp.full((1, N, T, S), 3.0)):
            np.testing.assert_allclose(
                rope_jax.attend(q, k, v, bias=bias, logit_cap=cap), plain, atol=self.TOLERANCE
            )

    def test_a_query_that_reads_nothing_reads_all_alike(self):
        q, k, _ = qkv()
        mask = np.ones((B, 1, T, S), bool)
        mask[0, 0, 2] = False
        got = rope_jax.attention.attention_weights(q, k, bias=some_bias(), mask=mask)
        np.testing.assert_allclose(got[0, :, 2], 1 / S, atol=4 * oracles.EPS32)


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
LEFT_AND_RIGHT = np.array([[0] * 3 + [1] * 7, [1] * 4 + [0] + [1] * 3 + [0] * 2], bool)  # and one with a hole
CUTS = ([7, 8, 9, T], [3, 6, 9, T], range(1, T + 1))  # prefill and decode, chunks, one by one


def in_pieces(step, cache, x, mask, cuts):
    outs = []
    for start, stop in itertools.pairwise([0, *cuts]):
        y, cache = step(x[:, start:stop], None if mask is None else mask[:, start:stop], cache)
        outs.append(y)
    return np.concatenate(outs, axis=1), cache


@pytest.mark.parametrize("case", ["dense", "dense, window", "ragged", "ragged, window"])
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


def test_a_bias_may_be_an_argument():
    """As the field would make it, for all layers at once; with a cache it is as wide as that."""
    x = embedded()
    plain = layer()
    params = init_layer(plain)
    behind = jnp.asarray(distances())[None]
    want = layer("alibi").apply(params, x)
    got = plain.apply(params, x, bias=rope_jax.attention.ALiBi()(behind, N, True))
    np.testing.assert_array_equal(got, want)
    cache = rope_jax.init_cache(batch=B, capacity=T + 2, num_kv_heads=2, head_dim=H)
    wide = jnp.arange(T)[None, :, None] - jnp.arange(T + 2)[None, None]
    cached, _ = plain.apply(params, x, bias=rope_jax.attention.ALiBi()(wide, N, True), cache=cache)
    np.testing.assert_allclose(cached, want, atol=TOLERANCE)


# --------------------------------------------------------------------------------------------- a model with each of them


class Model:
    """A decoder with an encoding, and its programs: each is compiled once for all tests of this file."""

    def __init__(self, name, **change):
        self.module = decoders.build(**(dict(rope=None) | ENCODINGS[name] | change))
        self.params = model(name).params if change else init(self.module)
        self.full = jax.jit(lambda ids, **kw: self.module.apply(self.params, ids, **kw))
        self.traces = 0
        self.step = jax.jit(self._step)

    def _step(self, ids, mask, cache):
        self.traces += 1
        return self.module.apply(self.params, ids, mask=mask, cache=cache)

    def new_cache(self, capacity=T + 2):
        return self.module.init_cache(batch=B, capacity=capacity)


@functools.cache
def model(name, **change):
    return Model(name, **change)


@pytest.fixture(autouse=True, scope="module")
def forget_models():
    yield
    model.cache_clear()


IDS = np.asarray(tokens(B, T, seed=4))
# Each of them in turn; and where they are alike to the code, the two forms of adding to x and to the scores at once.
ENCODINGS["learned+t5"] = ENCODINGS["learned"] | ENCODINGS["t5"]
ENCODINGS["rope+sinusoidal+alibi"] = ENCODINGS["rope+alibi"] | ENCODINGS["sinusoidal"]
SINGLE = ["sinusoidal", "learned", "t5", "alibi", "rope+alibi"]
DOUBLE = ["learned+t5", "rope+sinusoidal+alibi"]
FED = [(name, "dense") for name in SINGLE] + [(name, "ragged, window") for name in ["none", *DOUBLE]]


def seen_weights(kept):
    assert jax.tree.structure(kept) == jax.tree.structure(
        {"intermediates": {"layers": {"self_attention": {"weights": (0,)}}}}
    )
    return kept["intermediates"]["layers"]["self_attention"]["weights"][0]


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_model_and_its_weights_are_the_formula(name):
    one = model(name)
    added, bias = reference(name, one.params)
    weights: list = []
    want = decoders.oracle(one.module, one.params, IDS, added=added, bias=bias, weights=weights)
    logits, kept = jax.jit(lambda ids: one.module.apply(one.params, ids, mutable="intermediates"))(IDS)
    np.testing.assert_allclose(logits, want, atol=TOLERANCE)
    np.testing.assert_allclose(one.full(IDS), want, atol=TOLERANCE)
    got = seen_weights(kept)
    assert got.dtype == jnp.float32 and got.shape == (L, B, N, T, T)
    np.testing.assert_allclose(got, np.stack(weights), atol=TOLERANCE)
    if name != "none":  # and what is added matters: it is not the model without
        without = decoders.oracle(one.module.clone(rope=None), one.params, IDS)
        assert np.abs(without - want).max() > 0.01


@pytest.mark.parametrize(("name", "case"), FED)
def test_a_model_is_one_however_it_is_cut(name, case):
    one = model(name, window=3) if "window" in case else model(name)
    mask = LEFT_AND_RIGHT if "ragged" in case else None
    real = np.ones((B, T), bool) if mask is None else mask
    full = one.full(IDS, mask=mask)
    for cuts in CUTS:
        got, cache = in_pieces(one.step, one.new_cache(), IDS, mask, cuts)
        assert cache.num_tokens.tolist() == [real.sum(1).tolist()] * L
        np.testing.assert_allclose(got[real], full[real], atol=TOLERANCE)


def beside(part, at, fill=0):
    """``[1, n]`` put at a place in a row of T, the rest filled."""
    ids = np.full((len(part), T), fill, np.int32)
    ids[:, at : at + part.shape[1]] = part
    return ids


@pytest.mark.parametrize("name", DOUBLE)
def test_padding_moves_nothing(name):
    one = model(name, window=3)
    alone = one.full(IDS, mask=np.ones((B, T), bool))[:, :7]
    for start in (0, 3):
        mask = beside(np.ones((B, 7)), start).astype(bool)
        got = one.full(beside(IDS[:, :7], start, fill=-1), mask=mask)  # what is at padding is nobody's token
        np.testing.assert_allclose(got[:, start : start + 7], alone, atol=TOLERANCE)


SEGMENTS = np.array([[1] * 4 + [2] * 6, [5] * 4 + [3] * 3 + [5] * 3])  # an id that comes back is a new segment


@pytest.mark.parametrize(("name", "case"), FED)
def test_packed_is_separate(name, case):
    one = model(name, window=3) if "window" in case else model(name)
    real, mask = np.ones((B, T), bool), None
    if "ragged" in case:  # padding in front of the first two segments
        real[:, [0, 4]], mask = False, real
    got = one.full(IDS, segment_ids=SEGMENTS, mask=mask)
    for row, cuts in enumerate(([0, 4, T], [0, 4, 7, T])):
        for start, stop in itertools.pairwise(cuts):
            start += int(not real[row, start])
            # Causal: what is put behind a part changes nothing in it.
            ids = np.concatenate([beside(IDS[row : row + 1, start:stop], 0)] * B)
            alone = one.full(ids, mask=None if mask is None else np.ones((B, T), bool))[0, : stop - start]
            np.testing.assert_allclose(got[row, start:stop], alone, atol=TOLERANCE)


@pytest.mark.parametrize("name", DOUBLE)
def test_64_decode_steps_compile_once(name):
    one = model(name)
    ids = np.asarray(tokens(B, 64, seed=5))
    got, cache = in_pieces(one.step, one.new_cache(64), ids, None, range(1, 65))
    assert one.traces == 1 and one.step._cache_size() == 1
    # More tokens than the other tests have, for the same tolerance: a softmax averages, it does not add up.
    np.testing.assert_allclose(got, one.full(ids), atol=TOLERANCE)
    over, _ = one.step(ids[:, :1], None, cache)
    assert np.isnan(over).all()


@pytest.mark.parametrize("name", DOUBLE)
def test_greedy_is_the_forward_pass(name):
    one = model(name)
    prompts, count = [[1, 2, 3, 4, 5], [7]], 5

    def by_hand(prompt):
        ids = list(prompt)
        while len(ids) < len(prompt) + count:
            logits = one.full(np.concatenate([beside(np.array([ids]), 0)] * B))
            ids.append(int(np.argmax(logits[0, len(ids) - 1])))
        return ids[len(prompt) :]

    want = [by_hand(prompt) for prompt in prompts]
    before = _generate._cache_size()
    for step in (1, -1):  # padded on the right, on the left
        rows = [([*row[::step]] + [0] * (5 - len(row)))[::step] for row in prompts]
        mask = [([1] * len(row) + [0] * (5 - len(row)))[::step] for row in prompts]
        again = decoders.build(**(dict(rope=None) | ENCODINGS[name]))  # an equal model is the same program
        written = rope_jax.generate(
            again, one.params, np.array(rows), mask=np.array(mask), max_new_tokens=count, temperature=0
        )
        assert written.tokens.tolist() == want
    assert _generate._cache_size() == before + 1


def test_weights_are_sown_behind_remat_and_over_a_cache():
    one = model("t5")
    apply = lambda module, **kw: jax.jit(lambda: module.apply(one.params, IDS, mutable="intermediates", **kw))()[1]
    want = apply(one.module)
    again = apply(one.module.clone(remat=True))
    np.testing.assert_allclose(seen_weights(again), seen_weights(want), atol=TOLERANCE)
    got = seen_weights(apply(one.module, cache=one.new_cache()))
    assert not np.any(got[..., T:])  # slots that hold nothing
    np.testing.assert_allclose(got[..., :T], seen_weights(want), atol=TOLERANCE)


def test_nothing_is_sown_or_computed_for_it_unasked(monkeypatch):
    one = model("t5")
    program = lambda **kw: str(jax.make_jaxpr(lambda p: one.module.apply(p, IDS, **kw))(one.params))
    plain, asked = program(), program(mutable="intermediates")
    assert (plain.count("= exp "), asked.count("= exp ")) == (1, 2)  # one softmax; and the one to be looked at
    assert program(mutable=["losses"]).count("= exp ") == 1
    assert set(one.module.init(jax.random.key(0), IDS)) == {"params"}

    def never(*_, **__):
        raise AssertionError("weights that nobody asked for")

    monkeypatch.setattr(rope_jax.attention.layer, "attention_weights", never)
    assert program() == plain
    with pytest.raises(AssertionError, match="nobody asked"):
        program(mutable="intermediates")


def test_callables_of_ones_own():
    """Any function of the two forms will do; it is given positions or distances, and is not evaluated layer by layer."""
    params = init(decoders.build(rope=None))
    slope = lambda distance, heads, causal: jnp.broadcast_to(
        -0.1 * distance[:, None].astype(jnp.float32), (1, heads, *distance.shape[1:])
    )
    ramp = lambda positions, width: jnp.broadcast_to(
        0.1 * positions[..., None].astype(jnp.float32), (*positions.shape, width)
    )
    got = decoders.build(rope=None, position_bias=slope, position_embedding=ramp).apply(params, IDS)
    added = np.broadcast_to(0.1 * np.arange(T)[:, None], (T, D))
    want = decoders.oracle(decoders.build(rope=None), params, IDS, added=added, bias=-0.1 * distances())
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_positions_are_added_after_the_embeddings_are_scaled():
    one = decoders.build(rope=None, embedding_scale=4.0, **ENCODINGS["sinusoidal"])
    params = init(one)
    want = decoders.oracle(one, params, IDS, added=reference("sinusoidal", params)[0])
    np.testing.assert_allclose(one.apply(params, IDS), want, atol=TOLERANCE)


def test_both_seams_at_once_with_unlike_layers():
    """Positions, a bias, RoPE in one layer of three and a window in another."""
    change = dict(num_layers=3, rope=(None, ROPE, None), window=(None, None, 2))
    one = decoders.build(**change, **ENCODINGS["learned+t5"])
    params = init(one)
    added, bias = reference("learned+t5", params)
    want = decoders.oracle(one, params, IDS, added=added, bias=bias)
    np.testing.assert_allclose(one.apply(params, IDS), want, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["sinusoidal", "learned", "t5", "alibi"])
def test_low_precision_under_strict_promotion(name):
    change = dict(rope=None, dtype=jnp.bfloat16) | ENCODINGS[name]
    one = decoders.build(**change)
    params = init(one)
    want = one.clone(dtype=jnp.float32).apply(params, IDS)
    got, cache = one.apply(params, IDS, cache=one.init_cache(batch=B, capacity=T))
    assert got.dtype == jnp.float32 and cache.key.dtype == jnp.bfloat16
    # 32 roundings of what is as large as the largest logit, as decoders.py counts them.
    np.testing.assert_allclose(got, want, atol=32 * oracles.EPS16 * float(jnp.abs(want).max()))


def test_a_learned_table_that_ends_is_an_error_or_nan_in_its_row():
    one = decoders.build(rope=None, position_embedding=rope_jax.models.LearnedPositions(num_positions=4))
    params = nn.unbox(one.init(jax.random.key(0), IDS[:, :4]))
    for apply in (one.apply, jax.jit(one.apply)):
        with pytest.raises(ValueError, match="tokens must be at most T=4, what position_embedding has, got T=5"):
            apply(params, IDS[:, :5])
    with pytest.raises(ValueError, match=r"positions must be in \[0, num_positions=4\), got 1 to 4"):
        one.apply(params, IDS[:, :4], jnp.arange(1, 5)[None])
    where = jnp.array([[0, 1, 2, 3], [0, 1, 4, 3]])
    got = jax.jit(lambda where: one.apply(params, IDS[:, :4], where))(where)
    assert np.isnan(got).all(-1).tolist() == [[False] * 4, [True] * 4]  # a weight of 0 times NaN is NaN
    want = one.apply(params, IDS[:1, :4])
    np.testing.assert_allclose(got[:1], want, atol=TOLERANCE)


def test_symbolic_shapes():
    b, t = export.symbolic_shape("b, t")
    one = model("learned+t5")
    call = export.export(one.full)(jax.ShapeDtypeStruct((b, t), jnp.int32)).call
    for shape in ((1, 3), (2, T)):
        ids = IDS[: shape[0], : shape[1]]
        np.testing.assert_allclose(call(ids), one.full(ids), atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------- what each is said to do


WHERE = jnp.arange(T)[None]


@pytest.mark.parametrize("name", ["none", "rope", *SINGLE])
def test_a_shift_of_all_positions(name):
    """Absolute encodings see it, RoPE does not, and what goes by order refuses it."""
    one = model(name)
    plain = one.full(IDS)
    if name in ("none", "t5", "alibi"):
        with pytest.raises(ValueError, match="positions must be left out without rope and position_embedding"):
            one.full(IDS, positions=WHERE + 50)
        return
    moved = one.full(IDS, positions=WHERE + 50)
    if name in ("sinusoidal", "learned"):
        assert np.abs(moved - plain).max() > 0.05
    else:
        np.testing.assert_allclose(moved, plain, atol=2 * TOLERANCE)


@pytest.mark.parametrize("name", ["rope", *(name for name in SINGLE if name not in ("t5", "alibi"))])
def test_a_scramble_of_positions(name):
    one = model(name)
    moved = one.full(IDS, positions=jnp.asarray(np.random.default_rng(0).permutation(T))[None])
    assert np.abs(moved - one.full(IDS)).max() > 0.05


@pytest.mark.parametrize("name", LAYERS)
def test_without_an_encoding_and_causality_tokens_are_a_set(name):
    module, x = layer(name, causal=False), embedded()
    params = init_layer(module)
    order = np.random.default_rng(1).permutation(T)
    apart = np.abs(module.apply(params, x[:, order]) - module.apply(params, x)[:, order]).max()
    assert apart < TOLERANCE if name == "none" else apart > 0.01


# ------------------------------------------------------------------------------------------------------------- refusals


DISTANCE = jnp.zeros((1, 2, 2), int)
TABLE = {"params": {"table": jnp.ones((32, 3))}}
learn = lambda where, **fields: rope_jax.models.LearnedPositions(**(dict(num_positions=3) | fields)).init(
    jax.random.key(0), where, 4
)
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


def decode(ids=IDS, positions=None, **change):
    return lambda: decoders.build(**(dict(rope=None) | change)).init(jax.random.key(0), ids, positions)


BOTH = (rope_jax.attend, rope_jax.attention.attention_weights)


@pytest.mark.parametrize(
    ("attempt", "error", "says"),
    [
        (lambda: rope_jax.models.Sinusoidal(base=1.0), ValueError, "base must be above 1 and finite, got 1.0"),
        (lambda: rope_jax.models.Sinusoidal(base=math.inf), ValueError, "base must be above 1 and finite, got inf"),
        (lambda: rope_jax.models.Sinusoidal(base=math.nan), ValueError, "base must be above 1 and finite, got nan"),
        (lambda: rope_jax.models.Sinusoidal()(WHERE, 5), ValueError, "width must be even and at least 2, got 5"),
        (lambda: rope_jax.models.Sinusoidal()(WHERE, 0), ValueError, "width must be even and at least 2, got 0"),
        (lambda: rope_jax.models.Sinusoidal()(np.array([2**40]), 4), ValueError, "positions must fit in int32"),
        (lambda: learn(WHERE, num_positions=0), ValueError, "num_positions must be at least 1, got 0"),
        (lambda: learn(WHERE), ValueError, r"positions must be in \[0, num_positions=3\), got 0 to 9"),
        (lambda: learn(-WHERE[:, :2]), ValueError, r"positions must be in \[0, num_positions=3\), got -1 to 0"),
        (lambda: learn(WHERE.astype(jnp.float32)), TypeError, "positions must be integer, got dtype float32"),
        (lambda: learn(np.array([2**40])), ValueError, "positions must fit in int32"),
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
            lambda: layer("alibi").init(jax.random.key(0), embedded(), bias=jnp.zeros((1, 1, T, T))),
            ValueError,
            "bias must be left out where the field position_bias is set: it stands for it",
        ),
        (
            lambda: layer().init(jax.random.key(0), embedded(), bias=jnp.zeros((1, 1, T, T + 1))),
            ValueError,
            r"bias must have shape \[B, N, T, S\] with B={1, 2}, N={1, 4}, T={1, 10}, S=10, got \(1, 1, 10, 11\)",
        ),
        (decode(position_bias=lambda distance, *_: distance[:, None]), TypeError, r"position_bias\(distance\) must be floating, got dtype int32"),
        (decode(position_bias=lambda *_: jnp.zeros(T)), ValueError, r"position_bias\(distance\) must have shape .* S=10, got \(10,\)"),
        *[
            (decode(positions=jnp.zeros(shape, int), **ENCODINGS[name]), ValueError, says)
            for name in ("sinusoidal", "learned")
            for shape, says in (
                ((3, T), r"positions must have shape .* with B={1, 2}, T=10, got \(3, 10\)"),
                ((B, 1), r"positions must have shape .* with B={1, 2}, T=10, got \(2, 1\)"),
                ((1, T, 2), r"positions must have shape .* with B={1, 2}, T=10, got \(1, 10, 2\)"),
            )
        ],
        (decode(ids=IDS[:1], positions=jnp.zeros((2, T), int), **ENCODINGS["sinusoidal"]), ValueError, r"positions must have shape .* with B=\{1\}, T=10, got \(2, 10\)"),
        (decode(position_embedding=lambda positions, width: jnp.zeros((1, T, 1))), ValueError, r"D=16, got \(1, 10, 1\)"),
        (decode(position_bias=rope_jax.attention.ALiBi), TypeError, r"position_bias must be a callable of \(distance, num_heads, causal\), like ALiBi\(\), got the class"),
        (decode(position_bias="alibi"), TypeError, r"position_bias must be a callable .* got 'alibi'"),
        (decode(position_bias=rope_jax.models.Sinusoidal()), TypeError, r"position_bias must be .* got Sinusoidal, which takes \(positions, width\)"),
        (decode(position_embedding=rope_jax.attention.ALiBi()), TypeError, r"position_embedding must be .* got ALiBi, which takes \(distance, num_heads, causal\)"),
        (decode(position_bias=lambda *_: None), TypeError, "position_bias must return an array, got NoneType"),
        (decode(position_embedding=lambda *_: None), TypeError, "position_embedding must return an array, got NoneType"),
        (decode(position_embedding=lambda where, width: jnp.zeros((1, T, width), int)), TypeError, r"position_embedding\(positions\) must be floating"),
        (decode(rope=rope_jax.Rope(8, rope_jax.Standard(), axes=(0, 0, 1, 1)), **ENCODINGS["sinusoidal"]), ValueError, "position_embedding must be left out with a rope that has axes"),
        (lambda: layer().init(jax.random.key(0), embedded(), bias=[[0.0], [0.0, 1.0]]), ValueError, "bias must be an array"),
        (lambda: rope_jax.models.Sinusoidal(base="1e4"), ValueError, "base must be above 1 and finite, got '1e4'"),
        (lambda: rope_jax.models.Sinusoidal()(WHERE, 4.0), TypeError, "width must be an integer, got 4.0"),
        (lambda: rope_jax.models.Sinusoidal()(None, 4), TypeError, "positions must be an array of numbers, got NoneType"),
        (lambda: learn(WHERE, num_positions="8"), TypeError, "num_positions must be an integer, got '8'"),
        (lambda: learn(WHERE, num_positions=True), TypeError, "num_positions must be an integer, got True"),
        (lambda: buckets_of(max_distance=128.0), TypeError, "max_distance must be an integer, got 128.0"),
        (lambda: buckets_of(num_buckets=None), TypeError, "num_buckets must be an integer, got None"),
        (lambda: buckets_of(max_distance=2**63), ValueError, "max_distance must be below 2\\^63"),
        (lambda: buckets_of(causal="no"), TypeError, "causal must be a bool, got 'no'"),
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
        (decode(width=15, **ENCODINGS["sinusoidal"]), ValueError, "width must be even and at least 2, got 15"),
    ],
)  # fmt: skip
def test_refusals(attempt, error, says):
    with pytest.raises(error, match=says):
        attempt()


# ------------------------------------------------------------------------------------- what was once wrong


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64, jnp.int32])
@pytest.mark.parametrize("window", [1, 2, 3, 2**31 - 1])
def test_a_window_is_the_same_number_in_every_integer_type(kind, window):
    q, k, v = qkv()
    want = rope_jax.attend(q, k, v, causal=True, window=window)
    np.testing.assert_array_equal(rope_jax.attend(q, k, v, causal=True, window=kind(window)), want)
    module, x = layer(), embedded()
    params = init_layer(module)
    by_field = layer(window=kind(window)).apply(params, x)
    np.testing.assert_array_equal(module.apply(params, x, window=kind(window)), by_field)
    np.testing.assert_array_equal(module.apply(params, x, window=window), by_field)


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


def test_64_bit_positions_and_tokens_are_not_cut_to_32():
    with jax.enable_x64(True):
        table = rope_jax.models.LearnedPositions(num_positions=5)
        params = table.init(jax.random.key(0), jnp.arange(2), 2)
        wide = jnp.array([2**32 + 3, -(2**32) + 3, 3])
        got = jax.jit(lambda where: table.apply(params, where, 2))(wide)
        assert np.isnan(got).all(-1).tolist() == [True, True, False]
        one = decoders.build(rope=None)
        params = nn.unbox(one.init(jax.random.key(0), IDS))
        rows = jnp.array([[2**32 + 3, 4], [3, 4]])
        assert np.isnan(one.apply(params, rows)).all((1, 2)).tolist() == [True, False]
        with pytest.raises(ValueError, match="prompt must hold tokens in"):
            rope_jax.generate(one, params, rows, max_new_tokens=2, temperature=0)
        written = jax.jit(lambda ids: rope_jax.generate(one, params, ids, max_new_tokens=2, temperature=0))(rows)
        assert (np.asarray(written.tokens) == -1).all(-1).tolist() == [True, False]


@pytest.mark.parametrize("name", ["none", "t5", "sinusoidal"])
def test_nan_at_padding_reaches_no_gradient(name):
    mask = jnp.arange(T)[None] < jnp.array([[T], [T - 3]])
    if name != "sinusoidal":
        module = layer(name)
        x = jnp.where(mask[..., None], embedded(), jnp.nan)
        loss = lambda params: jnp.where(mask[..., None], module.apply(params, x, mask=mask), 0.0).sum()
        params = init_layer(module)
    else:
        module = decoders.build(rope=None, **ENCODINGS[name])
        ids = jnp.where(mask, IDS, -1)
        loss = lambda params: jnp.where(mask[..., None], module.apply(params, ids, mask=mask), 0.0).sum()
        params = nn.unbox(module.init(jax.random.key(0), IDS))
    grads = jax.tree.leaves(jax.grad(loss)(params))
    assert all(np.isfinite(each).all() for each in grads) and max(abs(each).max() for each in grads) > 0


def test_padding_may_stand_behind_the_end_of_a_learned_table():
    one = decoders.build(rope=None, position_embedding=rope_jax.models.LearnedPositions(num_positions=4))
    params = nn.unbox(one.init(jax.random.key(0), IDS[:, :4]))
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]])
    _, cache = one.apply(params, IDS[:, :4], mask=mask, cache=one.init_cache(batch=2, capacity=6))
    got, _ = one.apply(params, IDS[:, 4:5], mask=jnp.array([[0], [1]]), cache=cache)
    alone = one.apply(params, jnp.stack([IDS[1, 0], IDS[1, 4]])[None])
    np.testing.assert_allclose(got[1, 0], alone[0, 1], atol=TOLERANCE)


def test_writing_past_a_learned_table_is_an_error_or_no_token():
    one = decoders.build(rope=None, position_embedding=rope_jax.models.LearnedPositions(num_positions=4))
    params = nn.unbox(one.init(jax.random.key(0), IDS[:, :4]))
    write = lambda ids, count, **how: rope_jax.generate(
        one, params, ids, max_new_tokens=count, temperature=0, **how
    )
    with pytest.raises(
        ValueError,
        match="max_new_tokens must be at most 2 after a prompt of 3 tokens: position_embedding has 4 positions, got 3",
    ):
        write(IDS[:, :3], 3)
    assert (np.asarray(write(IDS[:, :3], 2).tokens) >= 0).all()  # the last one is written and not read
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match="max_new_tokens must be at most 3 after a prompt of 2"):
        write(IDS[:, :3], 4, mask=mask)
    within = write(IDS[:, :3], 3, mask=mask).tokens
    traced = jax.jit(lambda mask: write(IDS[:, :3], 5, mask=mask))(mask).tokens
    np.testing.assert_array_equal(traced[:, :3], within)
    assert np.asarray(traced)[:, 3:].tolist()[0] == [-1, -1] and int(traced[1, 3]) >= 0 and int(traced[1, 4]) == -1
