"""Calls of the layers, the decoder and generation, with a right value for each argument."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from fuzz_calls import CACHE, KV, ROPE

import rope_jax

FIELDS = dict(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=ROPE,
    causal=True,
    window=2,
    position_bias=None,
    logit_cap=None,
    logit_scale=None,
    qk_norm=True,
    qk_norm_epsilon=1e-6,
    qk_norm_unit_offset=False,
    use_bias=False,
    use_out_bias=None,
    dropout_rate=0.0,
    deterministic=True,
    learn_frequencies=False,
    learn_sinks=False,
    implementation=None,
    attention_fn=None,
    ring_axis=None,
    decode=False,
)
LAYER = rope_jax.RotaryAttention(**FIELDS)
X = jnp.ones((2, 3, 16))
PARAMS = nn.unbox(LAYER.init(jax.random.key(0), X))
NNX_FIELDS = FIELDS | dict(in_features=16, kv_features=None, rngs=nnx.Rngs(0))
NNX_LAYER = rope_jax.nnx.RotaryAttention(**NNX_FIELDS)
NNX_LAYER.init_cache(batch=2, capacity=8)
CALL = {
    "*x": X,
    "*positions": jnp.arange(3),
    "sequence_index": None,
    "mask": jnp.ones((2, 3), int),
    "segment_ids": None,
    "prefix_length": None,
    "attention_mask": None,
    "kv": None,
    "kv_positions": None,
    "kv_mask": None,
    "cache": CACHE,
    "context_length": None,
    "plan": None,
    "deterministic": True,
}
PREFIX = {
    "*x": X,
    "mask": jnp.ones((2, 3), int),
    "prefix_length": jnp.array([1, 2]),
    "attention_mask": jnp.ones((2, 4, 1, 8), bool),
    "cache": CACHE,
}
CROSS = {
    "*x": X,
    "*positions": jnp.arange(3),
    "mask": jnp.ones((2, 3), int),
    "attention_mask": jnp.ones((1, 4, 3, 5), bool),
    "kv": jnp.ones((2, 5, 16)),
    "kv_positions": jnp.arange(5),
    "kv_mask": jnp.ones((2, 5), int),
    "context_length": None,
}
FREE = dict(window=None)  # of the layers for prefixes and cross-attention, which take no window
PREFIX_LAYER = LAYER.clone(**FREE)
CROSS_LAYER = LAYER.clone(**FREE, causal=False)
NNX_PREFIX_LAYER = rope_jax.nnx.RotaryAttention(**NNX_FIELDS | FREE)
NNX_CROSS_LAYER = rope_jax.nnx.RotaryAttention(**NNX_FIELDS | FREE | dict(causal=False))
MODEL_FIELDS = dict(
    vocab_size=11,
    num_layers=1,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    rope=rope_jax.Rope(4, rope_jax.Standard()),
    learn_frequencies=False,
    position_embedding=None,
    position_bias=None,
    tie_embeddings=True,
    qk_norm=False,
    window=None,
    norm_epsilon=1e-6,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    logit_scale=None,
    logit_cap=None,
    output_cap=None,
    post_norms=False,
    norm_unit_offset=False,
    embedding_scale=None,
    remat=False,
    implementation=None,
    attention_fn=None,
    ring_axis=None,
)
MODEL = rope_jax.Decoder(**MODEL_FIELDS)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
MODEL_PARAMS = nn.unbox(MODEL.init(jax.random.key(0), TOKENS))
EMPTY = dict(batch=2, capacity=8, dtype=None, eviction=None, num_sink_tokens=0, rotated=None)
WRITING = {
    "*model": MODEL,
    "*params": MODEL_PARAMS,
    "*prompt": TOKENS,
    "mask": jnp.ones((2, 3), int),
    "max_new_tokens": 2,
    "stop_token": 5,
    "cache": None,
    "cache_dtype": None,
    "context_length": None,
}
DRAWING = {"temperature": 0.5, "rng": jax.random.key(0), "top_k": 3, "top_p": 0.9}
GENERATE = {
    **WRITING,
    **DRAWING,
    "num_samples": 1,
    "logits_fn": (),
    "on_token": None,
    "positions": None,
    "next_position": None,
    "prefix_length": None,
}
BEAMS = {**WRITING, "beams": 2, "length_penalty": 0.0}
DRAFTING = {
    "*model": MODEL,
    "*params": MODEL_PARAMS,
    "*draft": MODEL,
    "*draft_params": MODEL_PARAMS,
    **{name: value for name, value in WRITING.items() if name not in ("*model", "*params")},
    **DRAWING,
    "draft_tokens": 2,
    "draft_cache": None,
}


def layer_of(**given):
    return rope_jax.RotaryAttention(**given).init(jax.random.key(0), X)


def decoder_of(**given):
    return rope_jax.Decoder(**given).init(jax.random.key(0), TOKENS)


def traced(function):
    """The function without compiling, so that hundreds of calls take seconds."""
    return lambda *positional, **given: jax.eval_shape(lambda: function(*positional, **given))


def of_layer(layer):
    return lambda *positional, **given: layer.apply(PARAMS, *positional, **given)


def decoding(x, **given):
    NNX_LAYER.init_cache(batch=2, capacity=8)
    return NNX_LAYER(x, **given)


# see fuzz_calls.CALLS
CALLS = {
    "RotaryAttention": (layer_of, FIELDS, {}),
    "RotaryAttention, traced": (traced(layer_of), FIELDS, {}),
    "layer": (of_layer(LAYER), CALL, {}),
    "layer with a prefix": (of_layer(PREFIX_LAYER), PREFIX, {"cache": "attention_mask"}),
    "layer with kv": (of_layer(CROSS_LAYER), CROSS, {}),
    "nnx.RotaryAttention": (
        lambda **given: rope_jax.nnx.RotaryAttention(**given)(X),
        NNX_FIELDS,
        {"in_features": "x"},
    ),
    "nnx layer": (NNX_LAYER, CALL | {"decode": False, "rngs": None, "sow_weights": False}, {}),
    "nnx layer that decodes": (decoding, {"*x": X, "mask": jnp.ones((2, 3), int), "decode": True}, {}),
    "nnx layer with a prefix": (NNX_PREFIX_LAYER, PREFIX, {"cache": "attention_mask"}),
    "nnx layer with kv": (NNX_CROSS_LAYER, CROSS, {}),
    "nnx init_cache": (NNX_LAYER.init_cache, EMPTY, {}),
    "decoder.init_cache": (MODEL.init_cache, EMPTY, {}),
    "nnx.RMSNorm": (
        lambda num_features, **given: rope_jax.nnx.RMSNorm(num_features, **given)(KV),
        dict(num_features=8, axis="head_dim", epsilon=1e-6, unit_offset=False, param_dtype=jnp.float32),
        {"num_features": "x"},
    ),
    "to_linen": (rope_jax.nnx.to_linen, {"*module": NNX_LAYER}, {}),
    "from_linen": (rope_jax.nnx.from_linen, {"*module": NNX_LAYER, "*variables": PARAMS}, {}),
    "Decoder": (decoder_of, MODEL_FIELDS, {}),
    "Decoder, traced": (traced(decoder_of), MODEL_FIELDS, {}),
    "decoder": (
        lambda *positional, **given: MODEL.apply(MODEL_PARAMS, *positional, **given),
        {
            "*tokens": TOKENS,
            "*positions": jnp.arange(3),
            "sequence_index": None,
            "mask": jnp.ones((2, 3), int),
            "segment_ids": None,
            "prefix_length": None,
            "cache": MODEL.init_cache(batch=2, capacity=8),
            "context_length": None,
        },
        {},
    ),
    "decoder with a prefix": (
        lambda *positional, **given: MODEL.apply(MODEL_PARAMS, *positional, **given),
        {"*tokens": TOKENS, "prefix_length": jnp.array([1, 2])},
        {},
    ),
    "generate": (rope_jax.generate, GENERATE, {}),
    "generate, traced": (traced(rope_jax.generate), GENERATE, {}),
    "beam_search": (rope_jax.generation.beam_search, BEAMS, {}),
    "beam_search, traced": (traced(rope_jax.generation.beam_search), BEAMS, {}),
    "speculative_decode": (rope_jax.generation.speculative_decode, DRAFTING, {}),
    "speculative_decode, traced": (traced(rope_jax.generation.speculative_decode), DRAFTING, {}),
    "sample": (
        rope_jax.generation.sample,
        {"*rng": jax.random.key(0), "*logits": jnp.zeros((2, 5)), "temperature": 0.5, "top_k": 3, "top_p": 0.5},
        {},
    ),
    "pad_prompts": (rope_jax.generation.pad_prompts, dict(prompts=[[1, 2], [3]], buckets=4), {"prompts": "prompt"}),
}
