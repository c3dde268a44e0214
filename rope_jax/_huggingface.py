"""The border, inwards: what does a Hugging Face config.json say about each layer's rotation?"""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from rope_jax._families import FAMILIES, WITHOUT_ATTENTION, Family
from rope_jax._frequencies import (
    Axial,
    DynamicNTK,
    Linear,
    Llama3,
    LongRope,
    NTKAware,
    Proportional,
    Reversed,
    Schedule,
    Standard,
    Yarn,
)
from rope_jax._recipe import LayerRecipe, QueryTemperature, Recipe
from rope_jax._rope import Rope

Compat = Literal["transformers"]


class _Keys:
    """A dictionary that remembers which of its keys were asked for, so that none is ignored in silence."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.asked: set[str] = set()

    def get(self, key: str, default=None):
        self.asked.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str):
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.where} must have the key {key!r}{self._meant(key, set(self.values))}")
        return value

    def refuse_unread(self, pattern: str = "") -> None:
        """Raises ValueError for a key that has a value, looks like the pattern and was not asked for."""
        for key, value in self.values.items():
            if value is not None and key not in self.asked and re.search(pattern, key):
                raise ValueError(
                    f"{self.where} has a key {key!r} = {value!r} that is not known{self._meant(key, self.asked)}"
                )

    @staticmethod
    def _meant(key: str, others: Iterable[str]) -> str:
        near = difflib.get_close_matches(key, sorted(others), n=1, cutoff=0.75)
        return f"; was {near[0]!r} meant?" if near else ""


# A key of this look at the top of a config says something about rotation.
_ROTARY = r"rope|rotary|theta|yarn|ntk|mscale"


def from_hf_config(config, *, compat: Compat | None = None) -> Recipe:
    """The rotation of every layer of a Hugging Face model, from its config alone.

    Understands ``rope_scaling`` with ``rope_theta`` (transformers 4) and ``rope_parameters`` (transformers 5), flat
    or by layer type; the text part of a multimodal config; and the habits of each family (see :class:`Family`).
    A value that the config leaves out is the family's own, as transformers has it: the base and the share of the
    head that turns. ``original_max_position_embeddings`` is that of the config's top level, else of the recipe,
    else ``max_position_embeddings``; ``factor``, where it is null, is the ratio of the two lengths.

    A family whose own recipe is more than a base, as gpt-oss or Gemma 4, must say it.

    Schedules that depend on the length (``dynamic``, ``longrope``) come without one: give it with each call.

    Where transformers 5.23 departs from what the released checkpoints were trained with, this follows the
    checkpoints, and ``compat="transformers"`` follows transformers:

    - ``truncate`` of YaRN counts in a recipe by layer type; transformers reads it from flat ones only.
    - Phi-3.5-MoE uses its long factors beyond the original length; transformers uses the short ones always.
    - ``partial_rotary_factor`` counts with the plain rotation in every family; transformers ignores it there in
      those that have it from no released checkpoint.
    - ``type``, the older name of ``rope_type``, counts in files of version 4 of Gemma 3, OLMo 3 and ModernBERT, and
      ``rope_theta`` of OLMo 3 in all its layers; transformers reads the one nowhere there, and the other for full
      attention only. ``compat`` does not follow it here.
    - ``rotary_dim`` of MiniMax-M3-VL counts; transformers reads it nowhere.
    - HunYuan-VL's sections deal pairs to axes; transformers gives the two features of a pair different axes, which
      is no rotation, so that ``compat`` refuses it.

    Args:
      config: a dictionary, the path of a config.json or of a model's folder, or a transformers config object.
      compat: None, or ``"transformers"`` for that library's departures.

    Returns:
      :class:`Recipe`.

    Raises:
      ValueError: if the model type, the rope_type or a key is not known, or a key is missing. The message names it.
      FileNotFoundError: if the path leads to no config.

    Example:
      >>> import rope_jax
      >>> recipe = rope_jax.from_hf_config({
      ...     "model_type": "llama", "num_hidden_layers": 2, "head_dim": 128, "rope_theta": 500000.0,
      ...     "max_position_embeddings": 131072,
      ...     "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
      ...                      "low_freq_factor": 1.0, "high_freq_factor": 4.0},
      ... })
      >>> recipe.rope.schedule
      Llama3(factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0, base=500000.0)
    """
    if compat not in (None, *get_args(Compat)):
        raise ValueError(f"compat must be None or one of {get_args(Compat)}, got {compat!r}")
    model_type, values = _text_part(_as_dict(config))
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1)
        raise ValueError(
            f"model_type {model_type!r} is not known{f'; was {near[0]!r} meant?' if near else ''} "
            "(a part of a larger model has a config of its own: pass that)"
        )
    family, keys = FAMILIES[model_type], _Keys(values, f"config of {model_type!r}")
    if keys.get("rotary_value"):
        raise ValueError(f"{keys.where}: rotary_value must be false, values are not turned here, got true")
    layers = _layers(keys, family)
    entries = _entries(keys, family)
    made = {layer: _layer_recipe(layer, entries, keys, family, compat) for layer in dict.fromkeys(layers)}
    keys.refuse_unread(_ROTARY)
    return Recipe(model_type, _shared_objects(made[layer] for layer in layers))


def _shared_objects(layers: Iterable[LayerRecipe]) -> tuple[LayerRecipe, ...]:
    """The same layers, where equal ones, and equal rotations of unlike ones, are one object."""
    ropes: dict[Rope | None, Rope | None] = {}
    recipes: dict[LayerRecipe, LayerRecipe] = {}
    layers = [dataclasses.replace(layer, rope=ropes.setdefault(layer.rope, layer.rope)) for layer in layers]
    return tuple(recipes.setdefault(layer, layer) for layer in layers)


def _as_dict(config) -> Mapping[str, Any]:
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        if path.is_dir():
            path /= "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
    elif not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise TypeError(f"config must be a dictionary, a path or a config object, got {type(config).__name__}")
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config must hold a dictionary, got {type(config).__name__}")
    return config


def _text_part(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The model type and the config of the part that reads text."""
    model_type = config.get("model_type")
    for key in ("thinker_config", "text_config"):
        if isinstance(config.get(key), Mapping):
            part = config[key]
            return _text_part({"model_type": f"{model_type}_text", **part})
    if not isinstance(model_type, str) or not model_type:
        raise ValueError(f"config must have the key 'model_type', got keys {sorted(config)}")
    return model_type, config


# ----------------------------------------------------------------------------------------- which layers


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What tells one layer's recipe from another's."""

    head_dim: int
    type: str | None
    rotates: bool
    base: float | None  # in the place of its entry's
    scaled: bool  # whether its entry's scaling is for it


def _layers(keys: _Keys, family: Family) -> list[_Layer]:
    count = int(_first(keys, family.num_layers, "n_layer", "n_layers", need=True))
    types = _listed(keys, "layer_types", _types(keys, family, count), count)
    rotates = _listed(keys, family.layers, _rotates(keys, family, types), count)
    head_dims = _head_dims(keys, family, types) if any(rotates) else [0] * count
    bases, scaled = [None] * count, range(count)
    if family.layers == "layer_rope_theta":
        bases = keys.get("layer_rope_theta", bases)
    if family.layers == "rope_scaling_layers":
        scaled = keys.get("rope_scaling_layers", scaled)
    return [
        _Layer(
            head_dim=head_dims[i],
            type=types[i],
            rotates=bool(rotates[i]) and types[i] not in WITHOUT_ATTENTION,
            base=bases[i] or None,
            scaled=i in scaled,
        )
        for i in range(count)
    ]


def _types(keys: _Keys, family: Family, count: int) -> list[str | None]:
    """The type of each layer, where the config or the family's habit gives one."""
    types = _first(keys, "layer_types", "layers_block_type")
    if types is not None:
        return types
    if (attention := _first(keys, "attn_layer_indices", "full_attn_idxs")) is not None:
        return ["full_attention" if i in attention else "linear_attention" for i in range(count)]
    if (blocks := keys.get("block_types")) is not None:
        return [blocks[i % len(blocks)] for i in range(count)]
    if family.full_every is not None:
        key, period, first, other = family.full_every
        period = int(keys.get(key, period))
        return ["full_attention" if (i - first) % period == 0 else other for i in range(count)]
    if family.nested or family.layers.startswith(("sliding", "dense")):
        keys.need("layer_types")
    return [None] * count


def _rotates(keys: _Keys, family: Family, types: list[str | None]) -> list:
    """Whether each layer rotates."""
    count = len(types)
    if family.switch is not None:
        key, wanted, default = family.switch
        if keys.get(key, default) != wanted:
            return [False] * count
    if family.optional and "rope_parameters" in keys.values and keys.get("rope_parameters") is None:
        return [False] * count
    sliding = [type == "sliding_attention" for type in types]
    match family.layers:
        case "no_rope_layers":
            interval = int(keys.get("no_rope_layer_interval", 4))
            return keys.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(count)]
        case "layer_rope_theta":
            return keys.get("layer_rope_theta", [True] * count)
        case "sliding":
            return sliding
        case "sliding_if_any":
            window = keys.get("sliding_window")
            windows = any(sliding) if "sliding_window" not in keys.values else window is not None
            return sliding if windows else [True] * count
        case "dense_or_sliding":
            mlps = keys.need("mlp_layer_types")
            dense = keys.get("prefix_dense_sliding_window_pattern", 1) == 1
            return [slides or (dense and mlp == "dense") for slides, mlp in zip(sliding, mlps, strict=False)]
    return [True] * count


def _head_dims(keys: _Keys, family: Family, types: list[str | None]) -> list[int]:
    """The features of one head in each layer: of its rotated part, if that stands alone."""
    name = "qk_rope_head_dim" if family.latent else "head_dim"
    head_dim = keys.need(name) if family.latent else _first(keys, *family.head_dim)
    if head_dim is None:
        width = _first(keys, family.width, "n_embd", "d_model", need=True)
        head_dim = width // _first(keys, family.heads, "n_head", "n_heads", need=True)
    full = keys.get("global_head_dim", head_dim)
    head_dims = [int(full if type == "full_attention" else head_dim) for type in types]
    for i, own in keys.get("per_layer_config", {}).items():
        head_dims[int(i)] = int(own.get(name, head_dims[int(i)]))
    return head_dims


def _first(keys: _Keys, *names: str, need: bool = False) -> Any:
    """The value of the first key that has one."""
    for name in names:
        if (value := keys.get(name)) is not None:
            return value
    return keys.need(names[0]) if need else None


def _listed(keys: _Keys, name: str, values, count: int) -> list:
    if len(values) != count:
        raise ValueError(f"{keys.where}: {name} must have an entry for each of {count} layers, got {len(values)}")
    return list(values)


# ----------------------------------------------------------------------------------------- which recipe


def _entries(keys: _Keys, family: Family) -> dict[str | None, _Keys | None]:
    """The recipe of each label, in the keys of transformers 5; the label is None where one is for all layers."""
    written, scaling = keys.get("rope_parameters"), keys.get("rope_scaling")
    null = "rope_parameters" in keys.values and written is None and "rope_scaling" not in keys.values
    if null and not family.optional:
        raise ValueError(f"{keys.where}: rope_parameters must not be null; leave the key out, or say what it is")
    if written is not None and scaling is not None and written != scaling:
        raise ValueError(
            f"{keys.where} has rope_parameters and rope_scaling, and they differ: {written}, {scaling}"
        )
    written = dict(written or scaling or {})
    shared = _shared(keys, family)
    bases = {label: {"rope_theta": keys.get(key, base)} for label, (key, base, _) in family.bases.items()}

    def entry_of(label, entry):
        return _Keys({**shared, **bases.get(label, {}), **entry}, f"{keys.where}, rope_parameters[{label!r}]")

    nested = {label: entry for label, entry in written.items() if isinstance(entry, Mapping) or entry is None}
    if nested and (any(nested.values()) or len(nested) == len(written)):
        if len(nested) < len(written):
            raise ValueError(f"{keys.where}: rope_parameters must be flat or by layer type, got both: {written}")
        return {label: None if entry is None else entry_of(label, entry) for label, entry in nested.items()}
    if (family.nested and not family.bases) or (family.explicit and not written):
        by = " for each layer type" if family.nested else ""
        raise ValueError(f"{keys.where} must have rope_parameters{by}, got {written or None}")
    if family.bases:
        if family.attention_factor is not None and written.get("rope_type", written.get("type")) == "yarn":
            written = {"attention_factor": family.attention_factor, **written}
        return {label: entry_of(label, written if scaled else {}) for label, (_, _, scaled) in family.bases.items()}
    theta = shared.get("rope_theta")
    if theta is not None and written.get("rope_theta", theta) != theta:
        raise ValueError(
            f"{keys.where} has two bases: rope_theta = {theta}, and in its recipe {written['rope_theta']}"
        )
    return {None: _Keys({**shared, **written}, f"{keys.where}, rope_parameters")}


def _shared(keys: _Keys, family: Family) -> dict[str, Any]:
    """What older configs say at their top: the base and the share of the head that turns."""
    shared = {"rope_theta": keys.get("rope_theta"), "partial_rotary_factor": keys.get("partial_rotary_factor")}
    if family.proportion is not None:  # GPT-NeoX and GPT-J have names of their own
        shared = {
            "rope_theta": _agreed(keys, "rope_theta", "rotary_emb_base"),
            "partial_rotary_factor": _agreed(keys, "partial_rotary_factor", "rotary_pct"),
            "rotary_dim": keys.get("rotary_dim"),
        }
    return {key: value for key, value in shared.items() if value is not None}


def _agreed(keys: _Keys, *names: str):
    """The value of keys that mean the same, of which an older file may have several."""
    given = {name: value for name in names if (value := keys.get(name)) is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{keys.where} has keys that mean the same and differ: {given}")
    return next(iter(given.values()), None)


def _layer_recipe(layer: _Layer, entries, keys: _Keys, family: Family, compat) -> LayerRecipe:
    label = None if None in entries else family.label(layer.type)
    temperature = None
    if family.temperature == "without_rope" and keys.get("attn_temperature_tuning", True):
        length, beta = int(keys.get("floor_scale", 8192)), float(keys.get("attn_scale", 0.1))
        temperature = None if layer.rotates else QueryTemperature(beta=beta, length=length, offset=1)
    if layer.rotates and label not in entries:
        raise ValueError(f"{keys.where}: rope_parameters must have an entry for {label!r}, got {sorted(entries)}")
    entry = entries.get(label)
    if not layer.rotates or entry is None:
        return LayerRecipe(None, layer.type, query_temperature=temperature)

    rotary_dim = _rotary_dim(layer, entry, family, compat)
    schedule = _schedule(layer, entry, keys, family, compat, nested=None not in entries)
    axes = _axes(entry, family, rotary_dim // 2)
    layout = family.layout
    if family.layout_key is not None and not keys.get(family.layout_key, True):
        layout = "half"
    logit_factor = 1.0
    if family.logit_factor and isinstance(schedule, Yarn) and schedule.mscale_all_dim:
        logit_factor = (0.1 * schedule.mscale_all_dim * math.log(schedule.factor) + 1.0) ** 2
    if family.temperature == "yarn" and (beta := entry.get("llama_4_scaling_beta")) is not None:
        length = int(entry.need("original_max_position_embeddings"))
        temperature = QueryTemperature(beta=float(beta), length=length)
    for key in family.unread:
        entry.get(key)
    entry.refuse_unread()
    try:
        rope = Rope(layer.head_dim, schedule, rotary_dim=rotary_dim, layout=layout, axes=axes)
        rope.frequencies(1 if hasattr(schedule, "length") else None)  # says now what it would say at the first call
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from None
    return LayerRecipe(rope, layer.type, logit_factor, temperature)


def _rotary_dim(layer: _Layer, entry: _Keys, family: Family, compat) -> int:
    given = entry.get("rotary_dim")
    if compat and family.rotary_dim_is_lost:
        given = None
    proportion = entry.get("partial_rotary_factor")
    rope_type = _rope_type(entry, family)
    # Proportional frequencies are as wide as the head; the rotated part of a latent head stands alone.
    if rope_type == "proportional" or family.latent:
        return layer.head_dim
    if given is not None:
        return int(given)
    if family.proportion is None:
        ignored = compat and rope_type == "default"
        return layer.head_dim if ignored else int(layer.head_dim * (proportion or 1.0))
    return int(layer.head_dim * float(family.proportion if proportion is None else proportion))


def _axes(entry: _Keys, family: Family, num_pairs: int) -> tuple[int, ...] | None:
    """Which axis of the position each pair reads."""
    if family.sections is None:
        return None
    if family.sections == "by_turns":
        return tuple(i % 2 for i in range(num_pairs))
    if family.sections in ("rows_columns", "columns_rows"):
        first = 0 if family.sections == "rows_columns" else 1
        return tuple(first if 2 * i < num_pairs else 1 - first for i in range(num_pairs))
    interleaved = _first(entry, "mrope_interleaved", "interleaved")
    if interleaved is not None and interleaved != (family.sections == "strided"):
        raise ValueError(
            f"{entry.where}: mrope_interleaved must be {not interleaved} in this family, got {interleaved}"
        )
    sections = _first(entry, "mrope_section", "xdrope_section")
    sections = sections or family.default_sections or entry.need("mrope_section")
    if sum(sections) != num_pairs:
        raise ValueError(f"{entry.where}: mrope_section must add up to R/2 = {num_pairs}, got {list(sections)}")
    if family.sections == "strided":
        return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(num_pairs))
    if family.sections == "alternating":
        spatial = sections[0] + sections[1]
        return tuple(1 + i % 2 if i < spatial else 0 for i in range(num_pairs))
    return tuple(axis for axis, section in enumerate(sections) for _ in range(section))


def _schedule(layer: _Layer, entry: _Keys, keys: _Keys, family: Family, compat, *, nested: bool) -> Schedule:
    rope_type = _rope_type(entry, family)
    base = _number(entry, "rope_theta", family.base)
    base = base if layer.base is None else layer.base

    def original() -> int:
        # At the top it counts before the recipe's own (Phi-3 keeps it there), but not before one by layer type.
        length = entry.get("original_max_position_embeddings")
        if (outside := keys.get("original_max_position_embeddings")) is not None and not nested:
            length = outside
        return int(_longest(keys) if length is None else length)

    def factor() -> float:
        # Null, not missing, stands for the ratio of the two lengths.
        if "factor" in entry.values and entry.get("factor") is None:
            return _longest(keys) / original()
        return _number(entry, "factor")

    schedule: Schedule
    match rope_type:
        case "default":
            schedule = Standard(base=base)
        case "mrope" | "axial" if family.sections is not None:
            schedule = Standard(base=base)
        case "linear":
            schedule = Linear(factor=factor(), base=base)
        case "dynamic" | "xdrope" if entry.get("alpha") is not None:
            entry.get("factor")  # 1 in the released configs, whose alpha stands in its place
            schedule = NTKAware(factor=_number(entry, "alpha"), base=base)
        case "dynamic":
            length = _longest(keys)
            schedule = DynamicNTK(factor=factor(), original_length=length, base=base)
        case "yarn":
            truncate = entry.get("truncate", True)
            schedule = Yarn(
                factor=factor(),
                original_length=original(),
                base=base,
                beta_fast=_number(entry, "beta_fast", 32.0),
                beta_slow=_number(entry, "beta_slow", 1.0),
                mscale=_number(entry, "mscale", None),
                mscale_all_dim=_number(entry, "mscale_all_dim", None),
                attention_factor=_number(entry, "attention_factor", None),
                truncate=True if compat and nested else bool(truncate),
            )
        case "longrope" | "su":
            schedule = _longrope(entry, keys, original(), base, compat)
        case "llama3":
            schedule = Llama3(
                factor=factor(),
                original_length=original(),
                low_freq_factor=_number(entry, "low_freq_factor"),
                high_freq_factor=_number(entry, "high_freq_factor"),
                base=base,
            )
        case "proportional":
            proportion = _number(entry, "partial_rotary_factor", 1.0)
            schedule = Proportional(proportion=proportion, factor=_number(entry, "factor", 1.0), base=base)
        case _:
            near = difflib.get_close_matches(str(rope_type), _ROPE_TYPES, n=1)
            meant = f"; was {near[0]!r} meant?" if near else ""
            raise ValueError(f"{entry.where}: rope_type must be one of {_ROPE_TYPES}, got {rope_type!r}{meant}")
    if not layer.scaled:
        schedule = Standard(base=base)
    if family.sections in ("rows_columns", "columns_rows"):
        schedule = Axial(schedule=schedule)
    return Reversed(schedule=schedule) if family.reversed else schedule


def _rope_type(entry: _Keys, family: Family) -> str:
    """The name of the schedule, by either of its keys."""
    name, older = entry.get("rope_type"), entry.get("type")
    # Qwen2-VL's sections are written as type "mrope" beside rope_type "default".
    if name is not None and older not in (None, name, "mrope"):
        raise ValueError(f"{entry.where} has two names for its schedule: rope_type = {name!r}, type = {older!r}")
    name = name or older or "default"
    return family.aliases.get(name, name)


_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "axial", "mrope")


def _longrope(entry: _Keys, keys: _Keys, original: int, base: float, compat) -> LongRope:
    short, long = entry.need("short_factor"), entry.need("long_factor")
    factor = entry.get("factor")
    if factor is None:
        factor = _longest(keys) / original
    short_mscale, long_mscale = _number(entry, "short_mscale", None), _number(entry, "long_mscale", None)
    return LongRope(
        short_factor=short,
        long_factor=short if compat and long_mscale is not None else long,
        original_length=original,
        factor=max(float(factor), 1.0),
        base=base,
        attention_factor=_number(entry, "attention_factor", short_mscale),
        long_attention_factor=long_mscale,
    )


def _longest(keys: _Keys) -> int:
    return int(_first(keys, "max_position_embeddings", "max_seq_len", "model_max_length", need=True))


_NEEDED: Any = object()


def _number(keys: _Keys, name: str, default=_NEEDED):
    """A number as a float; the default where the key has none."""
    value = keys.need(name) if default is _NEEDED else keys.get(name, default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{keys.where}: {name} must be a number, got {value!r}")
    return value if value is None else float(value)
