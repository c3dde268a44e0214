"""Calls of biases, embeddings, hooks, orders and readers of files, with a right value for each argument."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import rope_jax
from rope_jax import attention, generation, interop, models

ROPE = rope_jax.Rope(8, rope_jax.Standard())
KV = jnp.ones((2, 3, 2, 8))
BIAS = {"*distance": jnp.ones((1, 2, 3), int), "*num_heads": 4, "*causal": False}
LOGITS = {"*logits": jnp.ones((2, 5))}
CONFIG = dict(
    model_type="llama",
    num_hidden_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    rope_theta=1e4,
    max_position_embeddings=64,
)


def t5_bias(*args, **fields):
    bias = attention.T5Bias(**fields)
    return bias.init_with_output(jax.random.key(0), *args)[0]


def attention_fn(rope, positions, query, key, **options):
    return attention.rotary_attention_fn(rope, positions, **options)(query, key, KV)


def learned_positions(tokens, positions, **fields):
    return models.LearnedPositions(**fields).init_with_output(jax.random.key(0), tokens, positions)[0]


CALLS = {
    "ALiBi": (attention.ALiBi(), BIAS, {}),
    "T5Bias": (
        t5_bias,
        BIAS | dict(num_buckets=8, max_distance=16, param_dtype=jnp.float32, embedding_init=nn.initializers.ones),
        {},
    ),
    "relative_buckets": (
        attention.relative_buckets,
        {"*distance": jnp.arange(-3, 4), "causal": False, "num_buckets": 8, "max_distance": 16},
        {},
    ),
    "rotary_attention_fn": (
        attention_fn,
        {"*rope": ROPE, "*positions": jnp.arange(3), "*query": KV, "*key": KV, "decode": False},
        {"*query": "q", "*key": "k"},
    ),
    "cache_partition_spec": (
        attention.cache_partition_spec,
        {"*cache": rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=2, head_dim=8)},
        {},
    ),
    "zigzag_sequence_index": (attention.zigzag_sequence_index, {"*num_tokens": 8, "*num_devices": 2}, {}),
    "zigzag_inverse": (attention.zigzag_inverse, {"*num_tokens": 8, "*num_devices": 2}, {}),
    "explain": (
        attention.explain,
        {
            "*q": KV,
            "*k": KV,
            "*facts": attention.Facts(),
            "platform": "cpu",
            "implementation": None,
            "divided": False,
        },
        {},
    ),
    "LogitBias": (
        lambda logits, bias: generation.LogitBias(bias)(logits, None, 0),
        LOGITS | {"bias": jnp.zeros(5)},
        {"*logits": "bias"},
    ),
    "MinP": (lambda logits, share: generation.MinP(share)(logits, None, 0), LOGITS | {"share": 0.5}, {}),
    "RepetitionPenalty": (
        lambda *args, penalty: generation.RepetitionPenalty(penalty)(*args, 0),
        LOGITS | {"*tokens": jnp.zeros((2, 3), int), "penalty": 1.5},
        {},
    ),
    "Sinusoidal": (
        lambda *args, base: models.Sinusoidal(base=base)(*args),
        {"*positions": jnp.arange(3), "*width": 8, "base": 1e4},
        {},
    ),
    "LearnedPositions": (
        learned_positions,
        {
            "*positions": jnp.arange(3),
            "*width": 8,
            "num_positions": 4,
            "param_dtype": jnp.float32,
            "embedding_init": nn.initializers.ones,
        },
        {},
    ),
    "from_hf_config": (
        interop.from_hf_config,
        {"*config": CONFIG, "part": "text", "like": None, "compat": None},
        {},
    ),
    "to_hf_config": (interop.to_hf_config, {"*model_rope": interop.from_hf_config(CONFIG)}, {}),
    "ModelRope": (interop.ModelRope, dict(model_type="llama", layers=(interop.LayerRope(ROPE),)), {}),
    "LayerRope": (interop.LayerRope, dict(rope=ROPE, type=None, logit_factor=1.0, query_temperature=None), {}),
    "QueryTemperature": (interop.QueryTemperature, dict(beta=0.1, period=8, offset=0), {}),
}
