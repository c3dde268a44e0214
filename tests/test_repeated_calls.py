"""Repeated calls, in which the Python code of the library runs: they keep nothing, and compile nothing again.

In a jitted step the library runs only once, while it is traced; ``attention/test_soak.py`` repeats such a step.
"""

import counts
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import rope_jax

CALLS = 40
ROPE = rope_jax.Rope(4, rope_jax.Standard())
SIZES = dict(num_heads=2, num_kv_heads=1, head_dim=4, rope=ROPE)
X = jnp.ones((1, 3, 8))


def rotate(number):
    q = jnp.ones((1, 3, 2, 4))
    rope = rope_jax.Rope(4, rope_jax.Yarn(factor=2.0, original_length=8))  # equal, but made anew
    return rope(q, q, jnp.arange(3) + number)


def attend(number):
    k = jnp.full((1, 3, 1, 4), float(number))
    return rope_jax.attend(jnp.ones((1, 3, 2, 4)), k, k, causal=True, window=2)


LAYER = rope_jax.RotaryAttention(**SIZES)
PARAMS = nn.unbox(LAYER.init(jax.random.key(0), X))


def decode(number):
    cache = rope_jax.init_cache(batch=1, capacity=8, num_kv_heads=1, head_dim=4, rope=ROPE)
    _, cache = LAYER.apply(PARAMS, X + number, cache=cache)
    return LAYER.apply(PARAMS, X[:, :1], cache=cache)


NNX_LAYER = rope_jax.nnx.RotaryAttention(in_features=8, **SIZES, rngs=nnx.Rngs(0))


def decode_in_nnx(number):
    NNX_LAYER.init_cache(batch=1, capacity=8)
    return NNX_LAYER(X + number, decode=True)


def decode_under_jit(number):
    """A jit made anew in each call of the user would compile anew: the user makes it once, as here."""
    cache = rope_jax.init_cache(batch=1, capacity=8, num_kv_heads=1, head_dim=4, rope=ROPE)
    return STEP(X + number, cache)


STEP = jax.jit(lambda x, cache: LAYER.apply(PARAMS, x, cache=cache))
MODEL = rope_jax.Decoder(vocab_size=5, num_layers=1, width=8, mlp_dim=8, **SIZES)
PROMPT = jnp.array([[1, 2, 3]])
MODEL_PARAMS = nn.unbox(MODEL.init(jax.random.key(0), PROMPT))


def generate(number):
    options = dict(max_new_tokens=2, temperature=0.5 + number / 100, rng=jax.random.key(number), top_k=3)
    out = rope_jax.generate(MODEL, MODEL_PARAMS, PROMPT, **options, stop_token=4)
    return rope_jax.generate(MODEL, MODEL_PARAMS, PROMPT, **options, cache=out.cache)


def beam_search(number):
    prompt = (PROMPT + number) % 5
    return rope_jax.generation.beam_search(MODEL, MODEL_PARAMS, prompt, beams=2, max_new_tokens=2)


# Outside jit, the loops over layers would be compiled in every call, by flax (nn.scan) and by jax (lax.scan).
DECODER = jax.jit(MODEL.apply)


def decoder(number):
    return DECODER(MODEL_PARAMS, (PROMPT + number) % 5)


def decoder_with_a_cache(number):
    cache = MODEL.init_cache(batch=1, capacity=8)
    return DECODER(MODEL_PARAMS, (PROMPT + number) % 5, cache=cache)


def speculative_decode(number):
    prompt = (PROMPT + number) % 5
    options = dict(max_new_tokens=2, draft_tokens=2)
    return rope_jax.generation.speculative_decode(MODEL, MODEL_PARAMS, MODEL, MODEL_PARAMS, prompt, **options)


LONG = rope_jax.LongRope(short_factor=(1.0,) * 2, long_factor=(2.0,) * 2, factor=4.0, original_length=3)
BIASED = rope_jax.RotaryAttention(**SIZES, position_bias=rope_jax.attention.T5Bias(), window=3)
BIASED_PARAMS = nn.unbox(BIASED.init(jax.random.key(0), X))


def decode_with_a_bias(number):
    cache = rope_jax.init_cache(batch=1, capacity=8, num_kv_heads=1, head_dim=4, dtype="int8")
    return BIASED.apply(BIASED_PARAMS, X + number, cache=cache, mask=jnp.ones((1, 3), int))


def decode_past_the_original_length(number):
    layer = LAYER.clone(rope=rope_jax.Rope(4, LONG))
    cache = rope_jax.init_cache(batch=1, capacity=8, num_kv_heads=1, head_dim=4)
    _, cache = layer.apply(PARAMS, X + number, cache=cache)
    return layer.apply(PARAMS, X, cache=cache)


# Outside jit, jax itself keeps a dead reference for each gradient of a primitive.
GRADIENT = jax.jit(jax.grad(lambda q, k: jnp.sum(rope_jax.attend(*ROPE(q, k, jnp.arange(3)), k, causal=True) ** 2)))


def gradient(number):
    return GRADIENT(jnp.ones((1, 3, 2, 4)), jnp.full((1, 3, 1, 4), float(number)))


def prefix_and_packed(number):
    y = LAYER.apply(PARAMS, X + number, prefix_length=jnp.array([2]))
    return LAYER.apply(PARAMS, y, segment_ids=jnp.array([[0, 0, 1]]))


@pytest.mark.parametrize(
    "call",
    [
        *(rotate, attend, gradient, decode, decode_with_a_bias, decode_past_the_original_length),
        *(prefix_and_packed, decode_in_nnx, decode_under_jit, decoder, decoder_with_a_cache),
        *(generate, beam_search, speculative_decode),
    ],
    ids=lambda f: f.__name__,
)
def test_repeated_calls_keep_nothing_and_compile_nothing(call):
    for number in range(2):
        jax.block_until_ready(jax.tree.leaves(call(number)))
    before = counts.now()
    for number in range(2, CALLS + 2):
        jax.block_until_ready(jax.tree.leaves(call(number)))
    counts.assert_no_growth(before, counts.now(), arrays=2, objects=CALLS // 10)
