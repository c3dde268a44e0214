"""The border, outwards: which config.json says what a recipe says?"""

import dataclasses
import math
from typing import Any

from rope_jax.core.length_schedules import DynamicNTK, LongRope
from rope_jax.core.rope import Rope
from rope_jax.core.schedules import (
    Axial,
    Linear,
    Llama3,
    Negated,
    NTKAware,
    Proportional,
    Standard,
    Yarn,
)
from rope_jax.interop.families import FAMILIES, WITHOUT_ATTENTION, Family
from rope_jax.interop.read import from_hf_config
from rope_jax.interop.recipe import LayerRope, ModelRope


def to_hf_config(recipe: ModelRope) -> dict[str, Any]:
    """The keys of a config.json, as transformers 5 spells them, from which the recipe is read again.

    They are those of the rotation, the number and types of the layers, and the features of a head; what else a
    model needs is not in a recipe.

    Args:
      recipe: of a model type that :func:`from_hf_config` knows.

    Returns:
      A dictionary that JSON can hold; ``from_hf_config(to_hf_config(recipe)) == recipe``, for Beam and Mistral
      Large 4 with the ``compat`` without which they are refused.

    Raises:
      ValueError: if a config of that model type cannot say it: a schedule with a fixed length or one of your own,
        or layers, pairs or numbers that the family does not have.

    Example:
      >>> import rope_jax
      >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.Linear(factor=4.0), rotary_dim=16)
      >>> recipe = rope_jax.interop.ModelRope("gpt_neox", (rope_jax.interop.LayerRope(rope),) * 2)
      >>> rope_jax.interop.to_hf_config(recipe)["rope_parameters"]
      {'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 4.0, 'partial_rotary_factor': 0.25}
    """
    if not isinstance(recipe, ModelRope):
        raise TypeError(f"recipe must be a ModelRope, got {type(recipe).__name__}")
    if recipe.model_type not in FAMILIES:
        raise ValueError(f"model_type {recipe.model_type!r} is not known")
    family, layers = FAMILIES[recipe.model_type], recipe.layers
    config = {"model_type": recipe.model_type, family.num_layers: len(layers), **_written_layers(layers, family)}
    entries = [None if layer.rope is None else _written_entry(layer, family) for layer in layers]
    if family.nested and any(entries):
        labels = [family.label(layer.type) for layer in layers]
        attend = [layer.type not in WITHOUT_ATTENTION for layer in layers]
        config["rope_parameters"] = {
            label: entry for label, entry, there in zip(labels, entries, attend, strict=True) if there
        }
    elif any(entries):
        # That of the layers with scaling, if some have none.
        turning = [entry for entry in entries if entry is not None]
        config["rope_parameters"] = max(turning, key=lambda entry: entry["rope_type"] != "default")
    elif family.optional:
        config["rope_parameters"] = None
    try:
        back = from_hf_config(config, compat="transformers" if family.beyond else None)
    except ValueError as error:
        raise ValueError(f"a config of {recipe.model_type!r} cannot say {recipe}: {error}") from None
    if back != recipe:
        raise ValueError(f"a config of {recipe.model_type!r} cannot say {recipe}; it would be read as {back}")
    return config


def _written_layers(layers: tuple[LayerRope, ...], family: Family) -> dict[str, Any]:
    """What a config says outside its recipe."""
    config: dict[str, Any] = {}
    if any(layer.type is not None for layer in layers):
        config["layer_types"] = [layer.type for layer in layers]
    ropes = [layer.rope for layer in layers]
    inner = [_inner(rope) for rope in ropes]
    if family.layers == "no_rope_layers":
        config["no_rope_layers"] = [int(rope is not None) for rope in ropes]
    if family.layers == "layer_rope_theta":
        config["layer_rope_theta"] = [
            0 if rope is None else getattr(inner[i], "base", 0) for i, rope in enumerate(ropes)
        ]
    if family.layers == "rope_scaling_layers":
        config["rope_scaling_layers"] = [
            i for i, schedule in enumerate(inner) if not isinstance(schedule, Standard)
        ]
    if family.layers == "dense_or_sliding":
        dense = [layer.rope is not None and layer.type != "sliding_attention" for layer in layers]
        config["mlp_layer_types"] = ["dense" if d else "sparse" for d in dense]
    if family.switch is not None:
        key, wanted, default = family.switch
        config[key] = wanted if any(ropes) else (default if default != wanted else not wanted)
    if family.temperature == "without_rope":
        found = [layer.query_temperature for layer in layers if layer.query_temperature is not None]
        config["attn_temperature_tuning"] = bool(found)
        if found:
            config |= {"floor_scale": found[0].period, "attn_scale": found[0].beta}
    if family.original_outside:
        outside = [schedule.original_length for schedule in inner if isinstance(schedule, LongRope)]
        if outside:
            config["original_max_position_embeddings"] = outside[0]
    lengths = [schedule.original_length for schedule in inner if isinstance(schedule, DynamicNTK)]
    if lengths:
        config["max_position_embeddings"] = lengths[0]
    turning = [rope for rope in ropes if rope is not None]
    if turning:
        name = "qk_rope_head_dim" if family.latent else family.head_dim[0]
        config[name] = turning[0].head_dim
        own = {
            str(i): {name: rope.head_dim} for i, rope in enumerate(ropes) if rope and rope.head_dim != config[name]
        }
        if own:
            config["per_layer_config"] = own
        if family.layout_key is not None:
            config[family.layout_key] = turning[0].layout == "interleaved"
    return config


def _inner(rope: Rope | None):
    schedule = None if rope is None else rope.schedule
    return schedule.schedule if isinstance(schedule, Negated | Axial) else schedule


def _written_entry(layer: LayerRope, family: Family) -> dict[str, Any]:
    """One recipe, as ``rope_parameters`` has it."""
    rope, schedule = layer.rope, _inner(layer.rope)
    assert rope is not None
    if type(schedule) not in _ROPE_TYPES:
        raise ValueError(f"schedule must be one of {[kind.__name__ for kind in _ROPE_TYPES]}, got {schedule!r}")
    entry = {"rope_type": _ROPE_TYPES[type(schedule)], "rope_theta": schedule.base}
    for field in dataclasses.fields(schedule):
        if field.name not in ("base", "context_length") and (value := getattr(schedule, field.name)) is not None:
            entry[_RENAMED.get(field.name, field.name)] = list(value) if isinstance(value, tuple) else value
    if isinstance(schedule, DynamicNTK):
        del entry["original_max_position_embeddings"]  # it is the config's max_position_embeddings
    if isinstance(schedule, NTKAware):
        entry |= {"alpha": schedule.factor, "factor": 1.0}
    if isinstance(schedule, LongRope) and schedule.long_attention_factor is not None:
        entry["short_mscale"] = entry.pop("attention_factor", None)  # Phi-3.5-MoE has a pair of them
    if layer.query_temperature is not None:
        entry["llama_4_scaling_beta"] = layer.query_temperature.beta
        entry["original_max_position_embeddings"] = layer.query_temperature.period
    if not (family.latent or isinstance(schedule, Proportional)):
        share = 2 * rope.num_pairs / rope.head_dim
        if int(rope.head_dim * share) < 2 * rope.num_pairs:  # a share that was rounded down
            share = math.nextafter(share, 1.0)
        if share != 1.0 or family.proportion is not None:
            entry["partial_rotary_factor"] = share
    if rope.axes is not None and family.sections in ("chunked", "strided", "alternating"):
        counts = [rope.axes.count(axis) for axis in range(max(rope.axes) + 1)]
        entry["mrope_section"] = counts[1:] + counts[:1] if family.sections == "alternating" else counts
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
# The keys of fields that are called otherwise here.
_RENAMED = {
    "original_length": "original_max_position_embeddings",
    "proportion": "partial_rotary_factor",
    "long_attention_factor": "long_mscale",
}
