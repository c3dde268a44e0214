"""The rotation of a whole model as a value, and the temperature of queries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from released import config_of

import rope_jax
from rope_jax import Rope, Standard
from rope_jax.interop.model_rope import LayerRope, ModelRope, QueryTemperature
from rope_jax.interop.write import to_hf_config


def test_layers_that_are_alike_share_one_rope():
    smollm = rope_jax.from_hf_config(config_of("smollm3", num_hidden_layers=8))
    assert len({id(layer) for layer in smollm.layers}) == 2
    gemma = rope_jax.from_hf_config(config_of("gemma3_text", num_hidden_layers=12, rope_theta=1e4))
    assert len({layer.rope for layer in gemma.layers}) == 1 and len(set(gemma.layers)) == 2
    assert len({id(layer.rope) for layer in gemma.layers}) == 1
    with pytest.raises(ValueError, match=r"rope is for models whose layers are all alike"):
        _ = smollm.rope


def test_query_temperature():
    temperature = QueryTemperature(beta=0.1, period=8192, offset=1)
    positions = np.array([[0, 8190, 8191, 8192, 100_000, 2_000_000_000]])
    exact = 1 + 0.1 * np.log(1 + np.floor((positions.astype(np.float64) + 1) / 8192))
    np.testing.assert_allclose(jax.jit(temperature)(jnp.asarray(positions)), exact, rtol=2 * oracles.EPS32)
    assert hash(temperature) == hash(dataclasses.replace(temperature))
    # At the ends of the range, and in a dtype that does not hold the period.
    for period, offset in ((1, 2**31 - 2), (2**31 - 1, 0), (2**30, 2**30 - 1)):
        exact = 1 + 0.1 * np.log(1 + np.floor((positions.astype(np.float64) + offset) / period))
        got = QueryTemperature(beta=0.1, period=period, offset=offset)(jnp.asarray(positions))
        np.testing.assert_allclose(got, exact, rtol=2 * oracles.EPS32)
    assert temperature(jnp.array([5], jnp.int8)).tolist() == [1.0]
    assert hash(QueryTemperature(beta=jnp.float32(0.5), period=jnp.int32(8))) == hash(
        QueryTemperature(beta=0.5, period=8)
    )


def test_query_temperature_refuses_sums_beyond_int32():
    with pytest.raises(ValueError, match=r"period \+ offset must be below 2\^31, got 2147483647 and 1"):
        QueryTemperature(beta=0.1, period=2**31 - 1, offset=1)


@pytest.mark.parametrize("field", ["beta", "period"])
def test_query_temperature_refuses(field):
    with pytest.raises(ValueError, match=f"{field} must be"):
        QueryTemperature(**{**dict(beta=0.1, period=8192), field: 0})


def test_a_model_rope_holds_layer_ropes():
    assert ModelRope("llama", [LayerRope(None)]).layers == (LayerRope(None),)
    with pytest.raises(TypeError, match="layers must hold a LayerRope for each layer"):
        ModelRope("llama", (Rope(8, Standard()),))
    with pytest.raises(TypeError, match="model_rope must be a ModelRope, got Rope"):
        to_hf_config(Rope(8, Standard()))
