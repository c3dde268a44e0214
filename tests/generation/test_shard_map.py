"""All that writes tokens inside shard_map with its check of varying values, rows divided: the same numbers."""

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import build, init, tokens
from jax.sharding import PartitionSpec as P

import rope_jax

MODEL = build(tie_embeddings=False)


def test_on_eight_devices():
    eight_devices.run(__file__)


CALLS = {
    "greedy": lambda params, prompt, keys: rope_jax.generate(
        MODEL, params, prompt, max_new_tokens=4, temperature=0, stop_token=3
    ),
    "drawn": lambda params, prompt, keys: rope_jax.generate(MODEL, params, prompt, max_new_tokens=4, rng=keys),
    "speculative": lambda params, prompt, keys: rope_jax.generation.speculative_decode(
        MODEL, params, MODEL, params, prompt, max_new_tokens=4, rng=keys, temperature=1.0
    ),
    "beams": lambda params, prompt, keys: rope_jax.generation.beam_search(
        MODEL, params, prompt, beams=2, max_new_tokens=4
    ),
}


class EightDevices:
    @pytest.mark.parametrize("name", CALLS)
    def test_rows_are_divided(self, name):
        params, prompt = init(MODEL, seed=1), tokens(8, 5)
        keys = jax.random.split(jax.random.key(2), 8)
        call = lambda *operands: CALLS[name](*operands).tokens
        want = call(params, prompt, keys)
        mesh = eight_devices.mesh(data=8)
        divided = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data")))
        np.testing.assert_array_equal(divided(params, prompt, keys), want)

    def test_a_cache_that_does_not_vary_is_written_by_tokens_that_do(self):
        cache = rope_jax.init_cache(batch=1, capacity=4, num_kv_heads=2, head_dim=8)
        kv = jnp.arange(8 * 3 * 2 * 8.0).reshape(8, 3, 2, 8)
        mesh = eight_devices.mesh(data=8)
        write = lambda kv: cache.write(kv, kv).key
        got = jax.jit(jax.shard_map(write, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(kv)
        np.testing.assert_array_equal(got[:, :, :3], kv.swapaxes(1, 2))
