"""Finds the part of a model that a config is read for: its text model, its vision tower or its audio tower."""

import re
from collections.abc import Collection, Container, Mapping
from typing import Any, NamedTuple

from rope_jax.interop.class_defaults import CLASS_DEFAULTS, CLASS_SIZES
from rope_jax.interop.config import did_you_mean, one_line
from rope_jax.interop.family import SYNONYMS, Family
from rope_jax.interop.part_types import PART_TYPES, WITHOUT_ROTATION

Values = Mapping[str, Any]

# Where the parts of a model stand: in files of transformers, and of models with their own code.
_KEYS = {
    "text": (
        "thinker_config",
        "text_config",
        "llm_config",
        "language_config",
        "language_model_config",
        "lm_config",
    ),
    "vision": ("vision_config", "vision_tower_config", "visual"),
    "audio": ("audio_config", "audio_encoder_config", "audio_tower_config"),
}
_WRAPPERS = ("thinker_config",)  # a part that has parts itself
# Other names of a family: names that transformers maps, and names of the same code elsewhere.
ALIASES = {
    "exaone4_5_text": "exaone4",
    "kimi_k2": "deepseek_v3",
    "minimax_m3": "minimax_m3_vl_text",
    "musicflamingo_encoder": "audioflamingo3_encoder",
}

# Model types of other people's code that rotate as a family does: what to pass as ``like``, and a reservation.
LIKE = {
    "aquila": ("llama", ""),
    "baichuan": ("llama", "the 7B; the 13B has ALiBi instead"),
    "chatglm": ("glm", ""),
    "internlm": ("llama", ""),
    "internlm2": ("llama", ""),
    "mimo": ("qwen2", ""),
    "minicpm": ("llama", ""),
    "new": ("gte", ""),
    "orion": ("llama", ""),
    "xverse": ("llama", ""),
}

# What stands in the place of a rotation.
_INSTEAD = {
    **dict.fromkeys(("bloom", "mpt"), "it biases its scores by ALiBi"),
    **dict.fromkeys(
        ("jamba", "nemotron_h", "kimi_linear"),
        "its attention has no position encoding, and its recurrent layers know the order",
    ),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv"), "it has no attention"),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers"), "it biases its scores by T5's buckets"),
    **dict.fromkeys(("bert", "gpt2", "gpt_neo", "opt", "roberta"), "it adds learned position embeddings"),
}
# Parts without a rotation, beside parts with one in the same code.
_TOWERS = """
cosmos3_edge_vision gemma3n_audio gemma3n_vision gemma4_audio gemma4_unified_audio gemma4_unified_vision
glm_image_vision granite_docling_vision hunyuan_vl_vision hy_v4_vl_vision idefics_vision mllama_vision_model
molmo2_vision parakeet_encoder phi4_multimodal_audio phi4_multimodal_vision qwen2_5_omni_audio_encoder
qwen3_omni_moe_audio_encoder
"""

# Towers that rotate in a way that a :class:`ModelRope` does not hold.
OTHER_ROTATIONS = {
    "deepseek_ocr2_vision": "it has two towers; pass the config of one, encoder_config",
    "sam3_vision_model": "its global layers shrink rows and columns by window_size / grid size",
}


class Part(NamedTuple):
    """A config to read.

    Attributes:
      values: its keys, with the defaults of its class.
      model_type: of the family; may be unknown.
      name: of the config, in error messages.
    """

    values: Values
    model_type: str
    name: str


def find_part(config: Values, part: str, like: str | None, families: Mapping[str, Family]) -> Part:
    """The part of a whole config, with its model type and the defaults of its class.

    Args:
      config: the whole config.
      part: ``"text"``, ``"vision"`` or ``"audio"``.
      like: the family whose habits the part has; None for the family of its model type.
      families: the known families.

    Raises:
      ValueError: if there is no such part, or no model type.
    """
    written, where = config.get("model_type"), None
    model_type = written if isinstance(written, str) else ""
    keys = _KEYS["text"] if part == "text" else _WRAPPERS
    while key := next((key for key in keys if config.get(key) is not None), None):
        if not isinstance(config[key], Mapping):
            raise ValueError(f"config of {model_type!r}: {key} must be a dictionary, got {config[key]!r}")
        where = f"{key} of {model_type!r}"
        model_type, config = _part_type(model_type, key, config[key], families), config[key]
    if part != "text":
        key = next((key for key in _KEYS[part] if isinstance(config.get(key), Mapping)), None)
        if key is None:
            raise ValueError(
                f"config must have the key {_KEYS[part][0]!r} for part={part!r}, got keys {sorted(config)}"
            )
        where = f"{key} of {model_type!r}"
        model_type, config = _part_type(model_type, key, config[key], families), config[key]
    elif where is None and model_type:
        model_type = _family_name(model_type, "text_config", families)
    if like is not None:
        whose = config.get("model_type") or model_type
        name = f"config of {whose!r}, read like {like!r}" if whose else f"config, read like {like!r}"
    elif model_type:
        name = f"config of {model_type!r}"
    elif config.get("model_type") is not None:
        raise ValueError(one_line(f"{where or 'config'}: model_type must be a name, got {config['model_type']!r}"))
    else:
        raise ValueError(
            f"{where or 'config'} must have the key 'model_type', got keys {sorted(config)}; "
            "like='llama' reads a config without it"
        )
    if where is not None:
        name += f" ({where})"
        if model_type in families and like in (None, model_type):
            config = with_class_defaults(config, model_type, families[model_type])
    return Part(config, like or model_type, name)


def _part_type(outer: str, key: str, values: Values, families: Container[str]) -> str:
    """The model type of a part of a model; empty if neither says it."""
    inner = values.get("model_type")
    inner = inner if isinstance(inner, str) else ""
    if key in _WRAPPERS:
        return inner or f"{outer}_thinker"
    kind = next(f"{part}_config" for part, keys in _KEYS.items() if key in keys)
    if inner:
        name = _family_name(inner, kind, families)
        if name in families or inner != outer:
            return name
    # Older files give a part no model type, or the type of the whole model.
    default = PART_TYPES.get(outer, {}).get(kind)
    if default is None and outer:
        suffixed = _family_name(f"{outer}_{kind.removesuffix('_config')}", kind, families)
        default = suffixed if suffixed in families else inner
    return default or ""


def _family_name(model_type: str, kind: str, families: Container[str]) -> str:
    """The family of a model type: its own, an alias, or the family of the part of a whole model of this type."""
    suffix = kind.removesuffix("_config")
    if suffix != "text":
        suffixed = (f"{model_type}_{suffix}", f"{model_type}_{suffix}_encoder")
        names = (*suffixed, model_type) if model_type not in families or kind == "vision_config" else (model_type,)
    else:
        names = (model_type, ALIASES.get(model_type, ""), f"{model_type}_text")
    # A name of the table comes first, then what transformers makes of the name.
    found = next((name for name in names if name in families), None)
    return found or ALIASES.get(model_type) or PART_TYPES.get(model_type, {}).get(kind, model_type)


def with_class_defaults(values: Values, model_type: str, family: Family) -> Values:
    """The values of a part over the defaults of its class: files leave out what equals them."""
    defaults = dict(CLASS_DEFAULTS.get(model_type, {}))
    for name, size in zip((*SYNONYMS, "max_position_embeddings"), CLASS_SIZES.get(model_type, ()), strict=False):
        if not any(values.get(synonym) is not None for synonym in SYNONYMS.get(name, ())):
            defaults[family.key(name)] = size
    if values.get("rope_scaling") is not None or values.get("rope_theta") is not None:
        defaults.pop("rope_parameters", None)
    count = values.get(family.key("num_hidden_layers"), defaults.get(family.key("num_hidden_layers")))
    if len(defaults.get("layer_types", ())) != count:
        defaults.pop("layer_types", None)
    return {**{key: value for key, value in defaults.items() if value is not None}, **values}


def unknown_model_type(model_type: str, values: Values, name: str, families: Collection[str]) -> str:
    """The message for a model type that is not in the table."""
    if model_type in WITHOUT_ROTATION.union(_TOWERS.split(), _INSTEAD):
        instead = _INSTEAD.get(model_type, "it encodes positions in another way")
        return f"{name} does not rotate queries and keys: {instead}; use rope=None"
    if model_type in OTHER_ROTATIONS:
        return f"{name} rotates in a way that is not read: {OTHER_ROTATIONS[model_type]}"
    parts = [key for key, value in values.items() if isinstance(value, Mapping) and re.search("config|coder", key)]
    parts = [key for key in parts if {"model_type", "hidden_size"} & values[key].keys()]
    hint = did_you_mean(model_type, families)
    where = f" in {name.split(' (', 1)[1].rstrip(')')}" if " (" in name else ""
    message = f"model_type {model_type!r}{where} is unknown"
    if parts:
        return f"{message}; config has the parts {parts}: pass one of them"
    if model_type in LIKE:
        like, reservation = LIKE[model_type]
        does = f"does ({reservation})" if reservation else "does"
        return f"{message}; it rotates as {like!r} {does}: pass like={like!r}"
    if hint:
        return message + hint
    architectures = values.get("architectures") or ()
    for architecture in architectures if isinstance(architectures, list) else ():
        stem = re.sub(r"For\w+|Model$|_", "", str(architecture)).lower()
        same = next((family for family in families if family.replace("_", "") == stem), None)
        if same is not None:
            return (
                f"{message}; its architecture {architecture!r} is the architecture of {same!r}: pass like={same!r}"
            )
    return f"{message}; if its code rotates as a known family does, name the family, such as like='llama'"
