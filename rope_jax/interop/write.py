"""Writes the rotation of a model as the keys of a Hugging Face config."""

import dataclasses
import math
from typing import Any

from rope_jax.core.composed_schedules import Axial, Negated, Sections
from rope_jax.core.length_schedules import DynamicNTK, LongRope
from rope_jax.core.rope import Rope
from rope_jax.core.schedules import Linear, Llama3, NTKAware, Proportional, Standard, Yarn
from rope_jax.interop.families import FAMILIES
from rope_jax.interop.family import WITHOUT_ATTENTION, Family
from rope_jax.interop.layers import SLIDING
from rope_jax.interop.model_rope import LayerRope, ModelRope
from rope_jax.interop.read import from_hf_config


def to_hf_config(model_rope: ModelRope) -> dict[str, Any]:
    """The config keys of a model's rotation, as transformers 5 spells them.

    Example:
      >>> import rope_jax
      >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.Linear(factor=4.0), rotary_dim=16)
      >>> model_rope = rope_jax.interop.ModelRope("gpt_neox", (rope_jax.interop.LayerRope(rope),) * 2)
      >>> rope_jax.interop.to_hf_config(model_rope)["rope_parameters"]
      {'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 4.0, 'partial_rotary_factor': 0.25}

    The keys hold the rotation, the number and types of the layers, and the head_dim; a model needs other keys too.

    Args:
      model_rope: of a model type known to :func:`from_hf_config`.

    Returns:
      A dictionary for JSON, with ``from_hf_config(to_hf_config(model_rope)) == model_rope``. Beam and Mistral
      Large 4 are read again with ``compat="transformers"``.

    Raises:
      TypeError: if ``model_rope`` is no :class:`ModelRope`.
      ValueError: if the family's config cannot express the rotation. Examples are a schedule with a fixed context
        length, a schedule of your own, or another layout than the family's.
    """
    if not isinstance(model_rope, ModelRope):
        raise TypeError(f"model_rope must be a ModelRope, got {type(model_rope).__name__}")
    if model_rope.model_type not in FAMILIES:
        raise ValueError(f"model_type {model_rope.model_type!r} is unknown")
    family, layers = FAMILIES[model_rope.model_type], model_rope.layers
    config = {
        "model_type": model_rope.model_type,
        family.key("num_hidden_layers"): len(layers),
        **_layer_keys(layers, family),
        **_head_keys(layers, family),
        **_rope_parameters(layers, family),
    }
    if family.switch is not None:
        config |= family.switch.written(any(layer.rope is not None for layer in layers))
    config = dict(family.write_hook(config))
    try:
        read_again = from_hf_config(config, compat="transformers" if family.beyond else None)
    except ValueError as error:
        raise ValueError(f"a config of {model_rope.model_type!r} cannot express {model_rope}: {error}") from None
    if read_again != model_rope:
        raise ValueError(
            f"a config of {model_rope.model_type!r} cannot express {model_rope}; it would be read as {read_again}"
        )
    return config


def _layer_keys(layers: tuple[LayerRope, ...], family: Family) -> dict[str, Any]:
    """Which layers rotate, and how."""
    config: dict[str, Any] = {}
    if any(layer.type is not None for layer in layers):
        config["layer_types"] = [layer.type for layer in layers]
    rotates = [layer.rope is not None for layer in layers]
    schedules = [_inner_schedule(layer.rope) for layer in layers]
    match family.layers:
        case "no_rope_layers":
            config["no_rope_layers"] = [int(flag) for flag in rotates]
        case "layer_rope_theta":
            config["layer_rope_theta"] = [getattr(schedule, "base", 0) for schedule in schedules]
        case "rope_scaling_layers":
            scaled = [i for i, schedule in enumerate(schedules) if not isinstance(schedule, Standard)]
            config["rope_scaling_layers"] = scaled
        case "dense_or_sliding":
            dense = [flag and layer.type != SLIDING for flag, layer in zip(rotates, layers, strict=True)]
            config["mlp_layer_types"] = ["dense" if flag else "sparse" for flag in dense]
    if family.temperature == "without_rope":
        temperatures = [layer.query_temperature for layer in layers if layer.query_temperature is not None]
        config["attn_temperature_tuning"] = bool(temperatures)
        if temperatures:
            config |= {"floor_scale": temperatures[0].period, "attn_scale": temperatures[0].beta}
    return config


def _head_keys(layers: tuple[LayerRope, ...], family: Family) -> dict[str, Any]:
    """The head_dim of all layers and of layers that differ; the layout, if the config says it."""
    ropes = {i: layer.rope for i, layer in enumerate(layers) if layer.rope is not None}
    if not ropes:
        return {}
    first, name = next(iter(ropes.values())), family.key("head_dim")
    config: dict[str, Any] = {name: first.head_dim}
    others = {str(i): {name: rope.head_dim} for i, rope in ropes.items() if rope.head_dim != first.head_dim}
    if others:
        config["per_layer_config"] = others
    if family.layout_key is not None:
        config[family.layout_key] = first.layout == "interleaved"
    return config


def _rope_parameters(layers: tuple[LayerRope, ...], family: Family) -> dict[str, Any]:
    """``rope_parameters``, flat or by layer type, and the length that DynamicNTK reads beside it."""
    config: dict[str, Any] = {}
    for layer in layers:
        schedule = _inner_schedule(layer.rope)
        if isinstance(schedule, DynamicNTK):
            config.setdefault("max_position_embeddings", schedule.original_length)
    entries = [None if layer.rope is None else _entry(layer, layer.rope, family) for layer in layers]
    rotating = [entry for entry in entries if entry is not None]
    if family.nested and rotating:
        config["rope_parameters"] = {
            family.label(layer.type): entry
            for layer, entry in zip(layers, entries, strict=True)
            if layer.type not in WITHOUT_ATTENTION
        }
    elif rotating:
        # If only some layers are scaled, the parameters are those of a scaled layer.
        config["rope_parameters"] = max(rotating, key=lambda entry: entry["rope_type"] != "default")
    return config


def _inner_schedule(rope: Rope | None):
    schedule = None if rope is None else rope.schedule
    inner = schedule.schedule if isinstance(schedule, Negated | Axial | Sections) else schedule
    return inner[0] if isinstance(inner, tuple) else inner  # of pixtral's two, the first has the base


def _entry(layer: LayerRope, rope: Rope, family: Family) -> dict[str, Any]:
    """One dictionary of ``rope_parameters``."""
    schedule = _inner_schedule(rope)
    if type(schedule) not in _ROPE_TYPES:
        raise ValueError(f"schedule must be one of {[kind.__name__ for kind in _ROPE_TYPES]}, got {schedule!r}")
    entry = {"rope_type": _ROPE_TYPES[type(schedule)], "rope_theta": schedule.base}
    for field in dataclasses.fields(schedule):
        if field.name not in ("base", "context_length") and (value := getattr(schedule, field.name)) is not None:
            entry[_KEYS.get(field.name, field.name)] = list(value) if isinstance(value, tuple) else value
    if isinstance(schedule, DynamicNTK):
        del entry["original_max_position_embeddings"]  # the config's max_position_embeddings
    if isinstance(schedule, NTKAware):
        entry |= {"alpha": schedule.factor, "factor": 1.0}
    if isinstance(schedule, LongRope) and schedule.long_attention_factor is not None:
        entry["short_mscale"] = entry.pop("attention_factor", None)  # Phi-3.5-MoE has one factor for each list
    if layer.query_temperature is not None:
        entry["llama_4_scaling_beta"] = layer.query_temperature.beta
        entry["original_max_position_embeddings"] = layer.query_temperature.period
    if not (family.latent or isinstance(schedule, Proportional)):
        proportion = 2 * rope.num_pairs / rope.head_dim
        if int(rope.head_dim * proportion) < 2 * rope.num_pairs:  # the quotient was rounded down
            proportion = math.nextafter(proportion, 1.0)
        if proportion != 1.0 or family.proportion is not None:
            entry["partial_rotary_factor"] = proportion
    if family.sections is not None:
        entry |= family.sections.written(rope.schedule)
    return entry


_ROPE_TYPES: dict[type, str] = {
    Standard: "default",
    Linear: "linear",
    NTKAware: "dynamic",
    DynamicNTK: "dynamic",
    Yarn: "yarn",
    LongRope: "longrope",
    Llama3: "llama3",
    Proportional: "proportional",
}
# From our fields to config keys, if the two differ.
_KEYS = {
    "original_length": "original_max_position_embeddings",
    "proportion": "partial_rotary_factor",
    "long_attention_factor": "long_mscale",
}
