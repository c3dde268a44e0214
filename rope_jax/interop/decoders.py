"""Reads the config of a language model into a :class:`Decoder` without parameters."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from rope_jax.interop.config import Config
from rope_jax.interop.families import FAMILIES
from rope_jax.interop.layers import FULL, SLIDING
from rope_jax.interop.model_rope import ModelRope
from rope_jax.interop.parts import find_part
from rope_jax.interop.read import from_hf_config
from rope_jax.models.decoder import Decoder


def read_decoder(values: Mapping[str, Any], stored, dtype) -> tuple[Decoder, dict[str, str]]:
    """The model without its parameters, and the tensor name of each of its modules.

    Args:
      values: the contents of config.json.
      stored: the dtype of the stored embedding.
      dtype: of the computation; ``stored`` if None.

    Raises:
      ValueError: if the model type or a key is unknown, or :class:`Decoder` cannot express a value.
    """
    values = _gemma3_text_part(values) if values.get("model_type") == "gemma3" else values
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ValueError(f"config.json: model_type must be one of {', '.join(_FAMILIES)}, got {model_type!r}")
    family = _FAMILIES[model_type]
    config = Config(values, f"config.json of model_type {model_type!r}", {**_DEFAULTS, **family.defaults})
    # A default of null is no null of the file.
    model_rope = from_hf_config({key: v for key, v in config.values.items() if key in values or v is not None})
    for layer in model_rope.layers:
        if layer.logit_factor != 1.0 or layer.query_temperature is not None:
            config.refuse(f"layers must not scale queries or scores by position, got {layer}")
    ropes = [layer.rope for layer in model_rope.layers]
    width, heads, head_dim = config.size("hidden_size"), config.size("num_attention_heads"), config["head_dim"]
    model = Decoder(
        vocab_size=config.size("vocab_size"),
        num_layers=config.size("num_hidden_layers"),
        width=width,
        num_heads=heads,
        num_kv_heads=config.size_or_null("num_key_value_heads"),
        head_dim=next((rope.head_dim for rope in ropes if rope is not None), head_dim or width // heads),
        mlp_dim=config.size("intermediate_size"),
        rope=_one_or_per_layer(ropes),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        norm_epsilon=float(config.positive("rms_norm_eps")),
        activation=_ACTIVATIONS[config.one_of(family.activation_key, *_ACTIVATIONS)],
        dtype=stored if dtype is None else jnp.dtype(dtype),
        param_dtype=stored,
        **family.fields(config, model_rope),
    )
    config.refuse_unread(_CONSTANTS, inert=_INERT.fullmatch)
    return model, _TENSORS | dict(family.tensors)


def _gemma3_text_part(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text part of a gemma3, whose outer config has keys of its own."""
    outer = Config(values, "config.json", {"tie_word_embeddings": True})
    if not isinstance(outer["text_config"], dict):
        outer.refuse(f"text_config must be an object, got {outer['text_config']!r}")
    outer.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    text = {**find_part(values, "text", None, FAMILIES).values, "tie_word_embeddings": outer["tie_word_embeddings"]}
    outer.refuse_unread(_CONSTANTS, inert=_INERT.fullmatch)
    return text


# Keys that :func:`from_hf_config` has checked, and keys that do not change a forward pass: token ids, dropout,
# initialisation, sampling and provenance.
_INERT = re.compile(
    r"""
    rope_(theta|scaling|parameters|local_base_freq|interleaved) | use_mrope | partial_rotary_factor
    | (original_)?max_position_embeddings
    | no_rope_layers | no_rope_layer_interval
    | max_window_layers  # Qwen reads it
    | max_sequence_length  # in the first Llama files
    | model_type | architectures | auto_map | (torch_)?dtype | transformers_version | transformers\.js_config | _.*
    | .*_token_ids? | (begin_)?suppress_tokens | prefix | tokenizer_class | task_specific_params
    | .*_dropout | .*_pdrop | initializer_range | gradient_checkpointing
    | use_cache | cache_implementation | attn_implementation | output_.* | return_dict.* | torchscript
    | pretraining_tp | chunk_size_feed_forward  # the same sum, in parts
    | tf_legacy_loss | use_bfloat16 | tie_encoder_decoder | is_decoder | cross_attention_hidden_size
    | id2label | label2id | num_labels | problem_type | finetuning_task | is_llama_config | unsloth_\w+
    | (max|min)_length | do_sample | early_stopping | num_beams | num_beam_groups | diversity_penalty | temperature
    | top_k | top_p | typical_p | repetition_penalty | length_penalty | (encoder_)?no_repeat_ngram_size
    | num_return_sequences | exponential_decay_length_penalty | remove_invalid_values | bad_words_ids
    """,
    re.VERBOSE,
)

# Keys that would change the computation at any other value. A family that supports more reads the key first.
_CONSTANTS: dict[str, tuple] = {
    "quantization_config": (None,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "use_bidirectional_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "activation": ("swiglu",),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}

_ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}  # nn.gelu is the form with tanh


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DecoderFamily:
    """The differences of a model type from Llama.

    Attributes:
      fields: ``(config, model_rope) -> fields of Decoder``.
      tensors: the tensor names of modules, if not Llama's.
      defaults: the values of transformers for keys that a config omits.
      activation_key: the key of the activation.
    """

    fields: Callable[[Config, ModelRope], dict]
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation_key: str = "hidden_act"


def _one_or_per_layer(values):
    """The common value of all layers, or a tuple of the values."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _windows(config: Config, window, slides: Callable[[int], bool]) -> dict:
    """The window of each sliding layer; ``slides`` tells which layers slide if ``layer_types`` is missing."""
    types, count = config["layer_types"], config.size("num_hidden_layers")
    if types is None:
        types = [SLIDING if slides(i) else FULL for i in range(count)]
    if len(types) != count or not {FULL, SLIDING}.issuperset(types):
        config.refuse(f"layer_types must be {FULL!r} or {SLIDING!r} for each of {count} layers, got {types}")
    if SLIDING in types and window is None:
        config.refuse("sliding_window must be a number for layers of sliding attention, got None")
    return dict(window=_one_or_per_layer([window if kind == SLIDING else None for kind in types]))


def _bias(config: Config) -> dict:
    return dict.fromkeys(("qkv_bias", "out_bias"), config.flag("attention_bias", False))


def _llama(config: Config, model_rope: ModelRope) -> dict:
    return _bias(config) | dict(mlp_bias=config.flag("mlp_bias", False))


def _mistral(config: Config, model_rope: ModelRope) -> dict:
    return dict(window=config.size_or_null("sliding_window"))


def _qwen_windows(config: Config) -> dict:
    window, first = config.size_or_null("sliding_window"), config["max_window_layers"]
    first = config.integer("max_window_layers", first, least=0)
    window = window if config.flag("use_sliding_window", False) else None
    return _windows(config, window, lambda i: window is not None and i >= first)


def _qwen2(config: Config, model_rope: ModelRope) -> dict:
    return dict(qkv_bias=True) | _qwen_windows(config)


def _qwen3(config: Config, model_rope: ModelRope) -> dict:
    return dict(qk_norm=True) | _bias(config) | _qwen_windows(config)


def _smollm3(config: Config, model_rope: ModelRope) -> dict:
    window = config.size_or_null("sliding_window") if config.flag("use_sliding_window", False) else None
    windows = _windows(config, window, lambda i: window is not None and model_rope.layers[i].rope is None)
    return _llama(config, model_rope) | windows


def _gemma2(config: Config, model_rope: ModelRope) -> dict:
    return _gemma(config, slides=lambda i: i % 2 == 0) | dict(
        logit_cap=config.positive("attn_logit_softcapping", null=True)
    )


def _gemma3(config: Config, model_rope: ModelRope) -> dict:
    period = config.size("sliding_window_pattern")
    return _gemma(config, slides=lambda i: (i + 1) % period != 0) | dict(qk_norm=True)


def _gemma(config: Config, slides: Callable[[int], bool]) -> dict:
    # Older files repeat two keys under another name, which transformers does not read.
    config.one_of("hidden_act", None, config["hidden_activation"])
    config.one_of("sliding_window_size", None, config["sliding_window"])
    return (
        _bias(config)
        | _windows(config, config.size_or_null("sliding_window"), slides)
        | dict(
            post_norms=True,
            norm_unit_offset=True,
            embedding_scale=math.sqrt(config["hidden_size"]),
            logit_scale=config.positive("query_pre_attn_scalar") ** -0.5,
            output_cap=config.positive("final_logit_softcapping", null=True),
        )
    )


# The tensor name of each module of the decoder. Modules with the same name are rows of one tensor, in this order.
_TENSORS = {
    "embed": "{trunk}embed_tokens",
    "layers/attention_norm": "{trunk}layers.{layer}.input_layernorm",
    "layers/self_attention/query": "{trunk}layers.{layer}.self_attn.q_proj",
    "layers/self_attention/key": "{trunk}layers.{layer}.self_attn.k_proj",
    "layers/self_attention/value": "{trunk}layers.{layer}.self_attn.v_proj",
    "layers/self_attention/query_norm": "{trunk}layers.{layer}.self_attn.q_norm",
    "layers/self_attention/key_norm": "{trunk}layers.{layer}.self_attn.k_norm",
    "layers/self_attention/out": "{trunk}layers.{layer}.self_attn.o_proj",
    "layers/mlp_norm": "{trunk}layers.{layer}.post_attention_layernorm",
    "layers/gate": "{trunk}layers.{layer}.mlp.gate_proj",
    "layers/up": "{trunk}layers.{layer}.mlp.up_proj",
    "layers/down": "{trunk}layers.{layer}.mlp.down_proj",
    "final_norm": "{trunk}norm",
    "unembed_kernel": "{head}",
}
_FUSED = {
    **{
        f"layers/self_attention/{name}": "{trunk}layers.{layer}.self_attn.qkv_proj"
        for name in ("query", "key", "value")
    },
    **{f"layers/{name}": "{trunk}layers.{layer}.mlp.gate_up_proj" for name in ("gate", "up")},
}
_FOUR_NORMS = {
    "layers/post_attention_norm": "{trunk}layers.{layer}.post_attention_layernorm",
    "layers/mlp_norm": "{trunk}layers.{layer}.pre_feedforward_layernorm",
    "layers/post_mlp_norm": "{trunk}layers.{layer}.post_feedforward_layernorm",
}

_DEFAULTS = dict(
    head_dim=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
)
_QWEN = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None)
_GEMMA = dict(
    num_attention_heads=8,
    num_key_value_heads=4,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    layer_types=None,
    hidden_activation="gelu_pytorch_tanh",
    hidden_act=None,
    sliding_window_size=None,
    tie_word_embeddings=True,
)
_FAMILIES = {
    "llama": _DecoderFamily(fields=_llama, defaults=dict(num_key_value_heads=None)),
    "mistral": _DecoderFamily(fields=_mistral, defaults=dict(sliding_window=4096)),
    "qwen2": _DecoderFamily(fields=_qwen2, defaults=_QWEN),
    "qwen3": _DecoderFamily(fields=_qwen3, defaults=_QWEN),
    "phi3": _DecoderFamily(
        fields=_mistral,
        tensors=_FUSED,
        defaults=dict(num_key_value_heads=None, rms_norm_eps=1e-5, sliding_window=None),
    ),
    "smollm3": _DecoderFamily(
        fields=_smollm3,
        defaults=dict(tie_word_embeddings=True, use_sliding_window=False, sliding_window=None, layer_types=None),
    ),
    "gemma2": _DecoderFamily(
        fields=_gemma2,
        tensors=_FOUR_NORMS,
        defaults=_GEMMA | dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
        activation_key="hidden_activation",
    ),
    "gemma3_text": _DecoderFamily(
        fields=_gemma3,
        tensors=_FOUR_NORMS,
        # Published files of the larger models omit the values of the smallest.
        defaults=_GEMMA | dict(vocab_size=262_208, final_logit_softcapping=None, sliding_window_pattern=6),
        activation_key="hidden_activation",
    ),
}
