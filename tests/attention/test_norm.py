import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import rope_jax


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_is_the_formula(unit_offset, dtype):
    """Zhang and Sennrich 2019, in float64."""
    module = rope_jax.attention.RMSNorm(axis="embed", epsilon=0.1, unit_offset=unit_offset)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 8)), dtype)
    boxed = module.init(jax.random.key(0), x)
    assert nn.get_partition_spec(boxed)["params"]["scale"] == jax.sharding.PartitionSpec("embed")
    fresh = nn.unbox(boxed)["params"]["scale"]
    assert fresh.dtype == jnp.float32 and np.all(fresh == 1 - unit_offset)
    scale = rng.normal(size=8).astype(np.float32)
    got = module.apply({"params": {"scale": scale}}, x)
    wide = np.float64(x)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * (np.float64(scale) + unit_offset)
    assert got.dtype == dtype
    # float32 inside: a mean of 8, a root, a quotient, a product; then one rounding to the dtype.
    eps = 16 * oracles.EPS32 + (oracles.EPS16 if dtype == jnp.bfloat16 else 0)
    np.testing.assert_allclose(np.float64(got), want, rtol=eps, atol=0)
