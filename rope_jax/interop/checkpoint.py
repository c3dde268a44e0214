"""What does a model folder hold?"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rope_jax.interop.read import from_hf_config
from rope_jax.interop.recipe import ModelRope
from rope_jax.models.decoder import Decoder


class Checkpoint(NamedTuple):
    """What :func:`load_hf` read.

    Attributes:
      model: the decoder that the config describes.
      params: its variables, each in the dtype that it is stored in.
      config: what config.json says, as it is there.
    """

    model: Decoder
    params: dict
    config: dict


def load_hf(folder, *, dtype=None) -> Checkpoint:
    """A language model of Hugging Face transformers, from a local folder, as a :class:`Decoder`.

    Reads ``config.json`` and ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.
    Model types: llama, mistral, qwen2, qwen3, phi3, smollm3, gemma2, gemma3_text, and the text part of gemma3.
    The rotation of each layer is that of :func:`from_hf_config`. Nothing is unpickled, executed or downloaded.

    Every tensor in the files is a parameter of the model and the other way around, except: the unembedding of tied
    embeddings, which must equal the embedding where it is stored at all; ``rotary_emb.inv_freq`` of old files,
    which the config says as well; the image tower of gemma3, which is left out. Every key of the config is read,
    known to change nothing in a forward pass (dropout, token ids, how it was saved), or refused.

    Beside the parameters themselves, one of them at a time is held on the host, with all its layers.

    Args:
      folder: the path.
      dtype: of the computation; where it is None, what the embedding is stored in. Parameters stay as stored.

    Returns:
      :class:`Checkpoint`: model, params, config.

    Raises:
      ValueError: if a file, a tensor or a key is missing, one is there that is not known, a tensor has another
        shape than the config says or is not float32, float16 or bfloat16, or a key asks for what
        :class:`Decoder` is not. The message names it.
      ImportError: without the package safetensors, which the extra ``rope_jax[checkpoints]`` brings.

    Example:
      >>> import json, pathlib, tempfile, jax.numpy as jnp, numpy as np, rope_jax, safetensors.numpy
      >>> folder = pathlib.Path(tempfile.mkdtemp())  # a small Llama, in place of one that was downloaded
      >>> config = dict(model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=4, num_hidden_layers=1,
      ...               num_attention_heads=2, tie_word_embeddings=True, max_position_embeddings=64)
      >>> _ = (folder / "config.json").write_text(json.dumps(config))
      >>> layer = {"mlp.gate_proj": (4, 8), "mlp.up_proj": (4, 8), "mlp.down_proj": (8, 4),
      ...          "input_layernorm": (8,), "post_attention_layernorm": (8,)}
      >>> layer |= {f"self_attn.{name}_proj": (8, 8) for name in "qkvo"}
      >>> shapes = {f"layers.0.{name}": shape for name, shape in layer.items()}
      >>> shapes |= {"embed_tokens": (9, 8), "norm": (8,)}
      >>> tensors = {f"model.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
      >>> safetensors.numpy.save_file(tensors, folder / "model.safetensors")
      >>> model, params, config = rope_jax.load_hf(folder)
      >>> rope_jax.generate(model, params, jnp.array([[1, 2]]), max_new_tokens=3, temperature=0).tokens.shape
      (1, 3)
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, got {dtype}")
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        if config.get("model_type") == "gemma3":
            tensors = {name: tensor for name, tensor in tensors.items() if not _IMAGE_TOWER.match(name)}
        trunk, head = _prefixes(tensors)
        stored = _dtype(tensors, f"{trunk}embed_tokens.weight")
        model, names = _decoder(config, stored, dtype)
        names = {module: stem.format(trunk=trunk, head=head, layer="{layer}") for module, stem in names.items()}
        params = _params(model, names, tensors)
    return Checkpoint(model, params, config)


# --------------------------------------------------------------------------------------------- the config


class _Config:
    """A config whose every key must have been read in the end, or be known to change nothing."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.values = {**defaults, **config}
        self.unread = set(config)

    def __getitem__(self, key):
        if key not in self.values:
            raise ValueError(f"config.json must have the key {key!r}")
        self.unread.discard(key)
        return self.values[key]

    def size(self, key) -> int:
        value = self[key]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {key} must be an integer of at least 1, got {value!r}")
        return value

    def one_of(self, key, *allowed):
        """The value, which must be among those that the decoder can be."""
        value = self[key]
        if value not in allowed:
            raise ValueError(f"config.json: {key} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        return value

    def refuse_unread(self) -> None:
        for key in self.unread & _NEUTRAL.keys():
            self.one_of(key, *_NEUTRAL[key])
        for key in sorted(self.unread):
            if not _INERT.fullmatch(key) and self.values[key] is not None:
                raise ValueError(
                    f"config.json: the key {key!r} = {self.values[key]!r} is not known for model_type "
                    f"{self.values['model_type']!r}; take it out if it changes nothing in a forward pass"
                )


# What :func:`from_hf_config` answers for, and what says nothing about a forward pass: token ids, dropout and
# initialisation, how to sample, and how a file came to be.
_INERT = re.compile(
    r"""
    rope_(theta|scaling|parameters|local_base_freq|interleaved) | use_mrope | partial_rotary_factor
    | (original_)?max_position_embeddings
    | no_rope_layers | no_rope_layer_interval
    | max_window_layers  # where it counts, in Qwen, it is read
    | max_sequence_length  # of the first Llama files
    | model_type | architectures | auto_map | (torch_)?dtype | transformers_version | transformers\.js_config | _.*
    | .*_token_ids? | (begin_)?suppress_tokens | prefix | tokenizer_class | task_specific_params
    | .*_dropout | .*_pdrop | initializer_range | gradient_checkpointing
    | use_cache | cache_implementation | attn_implementation | output_.* | return_dict.* | torchscript
    | pretraining_tp | chunk_size_feed_forward  # the same sum, in pieces
    | tf_legacy_loss | use_bfloat16 | tie_encoder_decoder | is_decoder | cross_attention_hidden_size
    | id2label | label2id | num_labels | problem_type | finetuning_task | is_llama_config | unsloth_\w+
    | (max|min)_length | do_sample | early_stopping | num_beams | num_beam_groups | diversity_penalty | temperature
    | top_k | top_p | typical_p | repetition_penalty | length_penalty | (encoder_)?no_repeat_ngram_size
    | num_return_sequences | exponential_decay_length_penalty | remove_invalid_values | bad_words_ids
    """,
    re.VERBOSE,
)

# What would change the computation at any other value; a family that can be more reads the key before.
_NEUTRAL: dict[str, tuple] = {
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

_ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}  # the latter is the form with tanh


def _decoder(config: dict, stored, dtype) -> tuple[Decoder, dict[str, str]]:
    """The model without its weights, and the name of the tensor of each of its modules."""
    config = _text_part(config)
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(f"config.json: model_type must be one of {', '.join(_FAMILIES)}, got {model_type!r}")
    family = _FAMILIES[model_type]
    keys = _Config(config, {**_DEFAULTS, **family.defaults})
    recipe = from_hf_config(keys.values)
    for layer in recipe.layers:
        if layer.logit_factor != 1.0 or layer.query_temperature is not None:
            raise ValueError(f"config.json: each layer must have a rotation or none, and no more, got {layer}")
    ropes = [layer.rope for layer in recipe.layers]
    width, heads, head_dim = keys.size("hidden_size"), keys.size("num_attention_heads"), keys["head_dim"]
    model = Decoder(
        vocab_size=keys.size("vocab_size"),
        num_layers=keys.size("num_hidden_layers"),
        width=width,
        num_heads=heads,
        num_kv_heads=keys["num_key_value_heads"],
        head_dim=next((rope.head_dim for rope in ropes if rope is not None), head_dim or width // heads),
        mlp_dim=keys.size("intermediate_size"),
        rope=_one_or_each(ropes),
        tie_embeddings=keys["tie_word_embeddings"],
        norm_epsilon=keys["rms_norm_eps"],
        activation=_ACTIVATIONS[keys.one_of(family.activation_key, *_ACTIVATIONS)],
        dtype=stored if dtype is None else jnp.dtype(dtype),
        param_dtype=stored,
        **family.fields(keys, recipe),
    )
    keys.refuse_unread()
    return model, _TENSORS | dict(family.tensors)


def _text_part(config: dict) -> dict:
    """Of a gemma3 that reads images too, the config of what reads text."""
    if config.get("model_type") != "gemma3":
        return config
    outer = _Config(config, {"tie_word_embeddings": True})
    if not isinstance(outer["text_config"], dict):
        raise ValueError(f"config.json: text_config must be an object, got {outer['text_config']!r}")
    text = {"model_type": "gemma3_text"} | outer["text_config"]
    text["tie_word_embeddings"] = outer["tie_word_embeddings"]
    outer.unread -= {
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
    }
    outer.refuse_unread()
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What a model type has that Llama has not.

    Attributes:
      fields: of :class:`Decoder`, from the config and the rotations.
      tensors: names of modules in the file, where they are not Llama's.
      defaults: what transformers takes for a key that a config leaves out.
      activation_key: the key of the activation.
    """

    fields: Callable[[_Config, ModelRope], dict]
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation_key: str = "hidden_act"


def _one_or_each(values):
    """The value of all layers, or a tuple of unlike ones."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _windows(keys, window, slides: Callable[[int], bool]):
    """The window, in the layers that ``layer_types`` calls sliding; where it is missing, in those of ``slides``."""
    full, sliding = "full_attention", "sliding_attention"
    types, count = keys["layer_types"], keys.size("num_hidden_layers")
    if types is None:
        types = [sliding if slides(i) else full for i in range(count)]
    if len(types) != count or not {full, sliding}.issuperset(types):
        raise ValueError(
            f"config.json: layer_types must be {full!r} or {sliding!r} for each of {count} layers, got {types}"
        )
    if sliding in types and window is None:
        raise ValueError("config.json: sliding_window must be a number for layers of sliding attention, got None")
    return dict(window=_one_or_each([window if kind == sliding else None for kind in types]))


def _bias(keys) -> dict:
    return dict(qkv_bias=keys["attention_bias"], out_bias=keys["attention_bias"])


def _llama(keys, recipe) -> dict:
    return _bias(keys) | dict(mlp_bias=keys["mlp_bias"])


def _mistral(keys, recipe) -> dict:
    return dict(window=keys["sliding_window"])


def _qwen_windows(keys) -> dict:
    window, first = keys["sliding_window"], keys["max_window_layers"]
    window = window if keys["use_sliding_window"] else None
    return _windows(keys, window, lambda i: window is not None and i >= first)


def _qwen2(keys, recipe) -> dict:
    return dict(qkv_bias=True) | _qwen_windows(keys)


def _qwen3(keys, recipe) -> dict:
    return dict(qk_norm=True) | _bias(keys) | _qwen_windows(keys)


def _smollm3(keys, recipe) -> dict:
    window = keys["sliding_window"] if keys["use_sliding_window"] else None
    windows = _windows(keys, window, lambda i: window is not None and recipe.layers[i].rope is None)
    return _llama(keys, recipe) | windows


def _gemma2(keys, recipe) -> dict:
    return _gemma(keys, slides=lambda i: i % 2 == 0) | dict(logit_cap=keys["attn_logit_softcapping"])


def _gemma3(keys, recipe) -> dict:
    every = keys["sliding_window_pattern"]
    return _gemma(keys, slides=lambda i: (i + 1) % every != 0) | dict(qk_norm=True)


def _gemma(keys, slides) -> dict:
    keys.one_of("hidden_act", None, keys["hidden_activation"])  # transformers reads the other
    keys.one_of("sliding_window_size", None, keys["sliding_window"])
    return (
        _bias(keys)
        | _windows(keys, keys["sliding_window"], slides)
        | dict(
            post_norms=True,
            norm_unit_offset=True,
            embedding_scale=math.sqrt(keys["hidden_size"]),
            logit_scale=keys["query_pre_attn_scalar"] ** -0.5,
            output_cap=keys["final_logit_softcapping"],
        )
    )


# The tensor of each module of the decoder. Modules that share one are its rows, in this order.
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
    "llama": _Family(fields=_llama, defaults=dict(num_key_value_heads=None)),
    "mistral": _Family(fields=_mistral, defaults=dict(sliding_window=4096)),
    "qwen2": _Family(fields=_qwen2, defaults=_QWEN),
    "qwen3": _Family(fields=_qwen3, defaults=_QWEN),
    "phi3": _Family(
        fields=_mistral,
        tensors=_FUSED,
        defaults=dict(num_key_value_heads=None, rms_norm_eps=1e-5, sliding_window=None),
    ),
    "smollm3": _Family(
        fields=_smollm3,
        defaults=dict(tie_word_embeddings=True, use_sliding_window=False, sliding_window=None, layer_types=None),
    ),
    "gemma2": _Family(
        fields=_gemma2,
        tensors=_FOUR_NORMS,
        defaults=_GEMMA | dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
        activation_key="hidden_activation",
    ),
    "gemma3_text": _Family(
        fields=_gemma3,
        tensors=_FOUR_NORMS,
        # Published files of the larger models leave out what is as in the smallest.
        defaults=_GEMMA | dict(vocab_size=262_208, final_logit_softcapping=None, sliding_window_pattern=6),
        activation_key="hidden_activation",
    ),
}

# ----------------------------------------------------------------------------------------------- the files

_IMAGE_TOWER = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"folder must hold {path.name}, got {path.parent} without it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor of the folder by its name, not yet read: a slice of it is read when it is taken."""
    import safetensors  # here, so that the package does not need it

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files, shard_of = ["model.safetensors"], None
    elif index.is_file():
        shard_of = _read_json(index).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(file, str) for file in shard_of.values()):
            raise ValueError(f"{index} must hold a weight_map from tensors to files")
        files = sorted(set(shard_of.values()))
    else:
        raise ValueError(f"folder must hold model.safetensors or {index.name}, got {folder} without them")
    tensors, found = {}, {}
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{index} must name files that are in the folder, got {file!r}")
        try:
            handle = stack.enter_context(safetensors.safe_open(folder / file, framework="np"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{folder / file} must be a safetensors file: {error}") from None
        for name in handle.keys():  # noqa: SIM118, it is no dictionary
            tensors[name], found[name] = handle.get_slice(name), file
    if shard_of is not None and shard_of != found:
        name = min(name for name in shard_of | found if shard_of.get(name) != found.get(name))
        raise ValueError(
            f"{index} must say where each tensor lies: {name} is in {found.get(name)}, got {shard_of.get(name)}"
        )
    return tensors


def _prefixes(tensors) -> tuple[str, str]:
    """What the names of the layers begin with, and the name of the unembedding."""
    for outer, inner in (("", "model."), ("language_model.", "model."), ("", "model.language_model.")):
        if f"{outer}{inner}embed_tokens.weight" in tensors:
            return outer + inner, f"{outer}lm_head"
    raise ValueError(f"tensors must include model.embed_tokens.weight, got {_some(sorted(tensors))}")


def _dtype(tensors, name) -> np.dtype:
    stored = tensors[name].get_dtype()
    if stored not in _STORED:
        raise ValueError(f"tensor {name} must be stored as {', '.join(_STORED)}, got {stored}")
    return _STORED[stored]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _places(shapes, names: Mapping[str, str]) -> tuple[dict, dict]:
    """The tensor and the rows of each parameter; the shape of each tensor, ``[rows]`` or ``[rows, columns]``."""
    places: dict[str, tuple[str, slice]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for module, stem in names.items():
        for kind in ("embedding", "kernel", "bias", "scale"):
            path = f"{module}/{kind}"
            if path not in shapes:
                continue
            shape = shapes[path].shape[1:] if "{layer}" in stem else shapes[path].shape
            tensor = stem + (".bias" if kind == "bias" else ".weight")
            columns = shape[1:] if kind == "embedding" else ()
            if kind == "kernel":  # torch keeps it [out, in]
                columns = (math.prod(shape[:2] if module.endswith("/out") else shape[:1]),)
            rows = math.prod(shape) // math.prod(columns)
            first = expected.get(tensor, (0,))[0]
            expected[tensor] = (first + rows, *columns)
            places[path] = tensor, slice(first, first + rows)
    assert places.keys() == shapes.keys()
    return places, expected


def _params(model: Decoder, names: Mapping[str, str], tensors: Mapping[str, Any]) -> dict:
    """The variables of the model, a parameter at a time."""
    start = model.clone(rope=None)  # it has no parameters, and might ask for a length
    shapes = jax.eval_shape(start.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    shapes = flax.traverse_util.flatten_dict(nn.unbox(shapes), sep="/")
    places, expected = _places(shapes, names)
    layers = range(model.num_layers)
    expected = {name: expected[tensor] for tensor in expected for name in _each(tensor, layers)}
    _check_tensors(tensors, expected, names if model.tie_embeddings else None)

    params = {}
    for path, (tensor, rows) in places.items():
        each = _each(tensor, layers)
        stored = {name: _dtype(tensors, name) for name in each}
        if len(set(stored.values())) != 1:
            raise ValueError(f"tensors {tensor} must be stored alike in all layers, got {stored}")
        whole = np.empty(shapes[path].shape, stored[each[0]])
        parts = whole if "{layer}" in tensor else whole[None]
        for part, name in zip(parts, each, strict=True):
            read = tensors[name][rows]
            part[...] = (read.T if path.endswith("/kernel") else read).reshape(part.shape)
        params[path] = jnp.asarray(whole)
    return {"params": flax.traverse_util.unflatten_dict(params, sep="/")}


def _each(tensor: str, layers: range) -> list[str]:
    return [tensor.format(layer=layer) for layer in layers] if "{layer}" in tensor else [tensor]


def _check_tensors(tensors, expected, tied) -> None:
    """Raises ValueError unless the files hold what is expected and nothing else that matters."""
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(f"tensors must include {_some(missing)}, got files without")
    for name, shape in expected.items():
        if tuple(tensors[name].get_shape()) != shape:
            raise ValueError(f"tensor {name} must have shape {shape}, got {tuple(tensors[name].get_shape())}")
    extra = tensors.keys() - expected.keys()
    if tied:
        embedding, head = f"{tied['embed']}.weight", f"{tied['unembed_kernel']}.weight"
        if head in extra and not np.array_equal(tensors[head][:], tensors[embedding][:]):
            raise ValueError(f"tensor {head} must equal {embedding}, for tie_word_embeddings is true")
        extra -= {head}
    extra = sorted(name for name in extra if not name.endswith(".rotary_emb.inv_freq"))
    if extra:
        raise ValueError(f"tensors must be those of the model, got {_some(extra)} beside them")
