"""Times a decode step with keys stored unrotated beside keys stored rotated, for LongRoPE.

    python -m benchmarks.unrotated_keys

A cache of unrotated keys rotates every stored key at every step: it reads the keys, writes them rotated, and reads
them again, 2 K H more numbers a slot than the 2 K H that keys and values need. Predicted: nothing to see if the
weights are most of the bytes, and up to twice the time if a long cache is.
"""

import dataclasses
import statistics
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

import rope_jax
from benchmarks.clock import in_turns, ratios
from benchmarks.record import markdown, save

ROUNDS = 15
SHAPES = {
    "8 layers, D=512, N=8, K=2, H=64": dict(num_layers=8, width=512, num_heads=8, num_kv_heads=2, mlp_dim=1536),
    "2 layers, D=2048, N=32, K=8, H=64": dict(num_layers=2, width=2048, num_heads=32, num_kv_heads=8, mlp_dim=8192),
}
CACHES = ((1, 1024), (1, 8192), (8, 4096))  # batch, slots
HEAD_DIM = 64


def compare(fields: Mapping, batch: int, capacity: int, rounds: int = ROUNDS) -> dict:
    """Quartiles of a step, and of the ratio of unrotated to rotated, with a cache that is full but for 2 tokens."""
    half = HEAD_DIM // 2
    schedule = rope_jax.LongRope(
        short_factor=[1.0] * half, long_factor=[4.0] * half, original_length=capacity // 2, factor=4.0
    )
    model = rope_jax.Decoder(vocab_size=256, head_dim=HEAD_DIM, rope=rope_jax.Rope(HEAD_DIM, schedule), **fields)
    token = jnp.zeros((batch, 1), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), token, context_length=1))
    step = jax.jit(lambda token, cache: model.apply(params, token, cache=cache)[1], donate_argnames="cache")
    kept = {}

    def call(rotated):
        def run():
            cache = dataclasses.replace(kept[rotated], num_tokens=jnp.full((batch,), capacity - 2, jnp.int32))
            kept[rotated] = step(token, cache)
            return kept[rotated].num_tokens

        return run

    for rotated in (True, False):
        cache = model.init_cache(batch=batch, capacity=capacity, rotated=rotated)
        noise = jax.random.normal(jax.random.key(1), cache.key.shape)
        full = jnp.full((batch,), capacity - 2, jnp.int32)
        kept[rotated] = dataclasses.replace(cache, key=noise, value=noise.copy(), context_length=full)
    times = in_turns({"rotated": call(True), "unrotated": call(False)}, rounds)
    return {
        "milliseconds (quartiles)": {
            name: [round(q, 3) for q in statistics.quantiles(each, n=4)] for name, each in times.items()
        },
        "unrotated over rotated (quartiles)": [round(q, 3) for q in ratios(times, "unrotated", "rotated")],
    }


def measure() -> dict:
    return {
        f"{name}; B={batch}, S={capacity}": compare(fields, batch, capacity)
        for name, fields in SHAPES.items()
        for batch, capacity in CACHES
    }


def table(result: dict) -> str:
    rows = []
    for name, each in result.items():
        rotated, unrotated = (each["milliseconds (quartiles)"][form][1] for form in ("rotated", "unrotated"))
        low, middle, high = each["unrotated over rotated (quartiles)"]
        rows.append([name, f"{rotated:.3g} ms", f"{unrotated:.3g} ms", f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    return markdown(["decode step, float32", "keys rotated", "keys unrotated", "ratio (quartiles)"], rows)


if __name__ == "__main__":
    result = measure()
    save(__file__, result)
    print(table(result))
