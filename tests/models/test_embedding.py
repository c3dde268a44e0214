"""What is added to embeddings: sinusoids and learned tables."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from position_encodings import T, sinusoidal

import rope_jax

WHERE = jnp.arange(T)[None]


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


learn = lambda where, **fields: rope_jax.models.LearnedPositions(**(dict(num_positions=3) | fields)).init(
    jax.random.key(0), where, 4
)


@pytest.mark.parametrize(
    ("attempt", "error", "says"),
    [
        (lambda: rope_jax.models.Sinusoidal(base=1.0), ValueError, "base must be above 1, got 1.0"),
        (lambda: rope_jax.models.Sinusoidal(base=math.inf), ValueError, "base must be finite, got inf"),
        (lambda: rope_jax.models.Sinusoidal(base=math.nan), ValueError, "base must be finite, got nan"),
        (lambda: rope_jax.models.Sinusoidal()(WHERE, 5), ValueError, "width must be even and at least 2, got 5"),
        (lambda: rope_jax.models.Sinusoidal()(WHERE, 0), ValueError, "width must be even and at least 2, got 0"),
        (lambda: rope_jax.models.Sinusoidal()(np.array([2**40]), 4), ValueError, "positions must fit in int32"),
        (lambda: learn(WHERE, num_positions=0), ValueError, "num_positions must be at least 1, got 0"),
        (lambda: learn(WHERE), ValueError, r"positions must be in \[0, num_positions=3\), got 0 to 9"),
        (lambda: learn(-WHERE[:, :2]), ValueError, r"positions must be in \[0, num_positions=3\), got -1 to 0"),
        (lambda: learn(WHERE.astype(jnp.float32)), TypeError, "positions must be integer, got dtype float32"),
        (lambda: learn(np.array([2**40])), ValueError, "positions must fit in int32"),
        (lambda: rope_jax.models.Sinusoidal(base="1e4"), TypeError, "base must be a real number, got '1e4'"),
        (lambda: rope_jax.models.Sinusoidal()(WHERE, 4.0), TypeError, "width must be an integer, got 4.0"),
        (lambda: rope_jax.models.Sinusoidal()(None, 4), TypeError, "positions must be an array of numbers, got NoneType"),
        (lambda: learn(WHERE, num_positions="8"), TypeError, "num_positions must be an integer, got '8'"),
        (lambda: learn(WHERE, num_positions=True), TypeError, "num_positions must be an integer, got True"),
    ],
)  # fmt: skip
def test_refusals(attempt, error, says):
    with pytest.raises(error, match=says):
        attempt()


def test_64_bit_positions_are_not_cut_to_32():
    with jax.enable_x64(True):
        table = rope_jax.models.LearnedPositions(num_positions=5)
        params = table.init(jax.random.key(0), jnp.arange(2), 2)
        wide = jnp.array([2**32 + 3, -(2**32) + 3, 3])
        got = jax.jit(lambda where: table.apply(params, where, 2))(wide)
        assert np.isnan(got).all(-1).tolist() == [True, True, False]
