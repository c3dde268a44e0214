"""The border, inwards: what does a Hugging Face config.json say about each layer's rotation?"""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rope_jax.core.frequencies import Schedule
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
from rope_jax.interop.recipe import LayerRope, ModelRope, QueryTemperature

Compat = Literal["transformers"]
Part = Literal["text", "vision"]


class _Keys:
    """A dictionary that remembers which of its keys were asked for, so that none is ignored in silence."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.asked: set[str] = set()

    def get(self, key: str, default=None) -> Any:
        """The value of a key; null counts as missing."""
        self.asked.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def need(self, *keys: str) -> Any:
        """The value of the first key that has one; there must be one."""
        value = self.first(*keys)
        if value is None:
            raise ValueError(f"{self.where} must have the key {keys[0]!r}{self._meant(keys[0], set(self.values))}")
        return value

    def first(self, *keys: str) -> Any:
        """The value of the first key that has one."""
        found = [value for key in keys if (value := self.get(key)) is not None]
        return found[0] if found else None

    def agreed(self, *keys: str) -> Any:
        """The value of keys that mean the same, of which a file may have several."""
        given = {key: value for key in keys if (value := self.get(key)) is not None}
        if any(value != next(iter(given.values())) for value in given.values()):
            raise ValueError(f"{self.where} has keys that mean the same and differ: {given}")
        return next(iter(given.values()), None)

    def number(self, key: str, default: Any = ...) -> Any:
        """A number as a float; the default where the key has none."""
        value = self.need(key) if default is ... else self.get(key, default)
        if value is None or value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{self.where}: {key} must be a number, got {value!r}")
        return float(value)

    def integer(self, value, key: str, least: int = 1) -> int:
        """A value as an integer of at least that size."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
            raise ValueError(f"{self.where}: {key} must be an integer of at least {least}, got {value!r}")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; 0 and 1 are taken for them."""
        value = self.get(key, default)
        if value not in (False, True):
            raise ValueError(f"{self.where}: {key} must be true or false, got {value!r}")
        return bool(value)

    def listed(self, key: str, values, count: int) -> list:
        """Values of which there must be one for each layer."""
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or len(values) != count:
            got = f"{len(values)}" if isinstance(values, Sequence) else repr(values)
            raise ValueError(f"{self.where}: {key} must have an entry for each of {count} layers, got {got}")
        return list(values)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A dictionary; an empty one where the key has none."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where}: {key} must be a dictionary, got {value!r}")
        return value

    def refuse_unread(self, pattern: str = "") -> None:
        """Raises ValueError for a key that nobody asked for, and that looks like the pattern or like a missing one.

        A key without a value, or one that says what is so anyway, is none.
        """
        missing = [key for key in self.asked if self.values.get(key) is None]
        for key, value in self.values.items():
            if key in self.asked or value is None or (key in _NEUTRAL and value == _NEUTRAL[key]):
                continue
            if re.search(pattern, key) or difflib.get_close_matches(key, missing, n=1, cutoff=0.93):
                raise ValueError(
                    f"{self.where} has a key {key!r} = {value!r} that is not known{self._meant(key, self.asked)}"
                )

    @staticmethod
    def _meant(key: str, others: Iterable[str]) -> str:
        near = difflib.get_close_matches(key, sorted(set(others) - {key}), n=1, cutoff=0.75)
        return f"; was {near[0]!r} meant?" if near else ""


# A key of this look at the top of a config says something about rotation, or about positions beside it.
_ROTARY = r"rope|rotary|theta|yarn|ntk|mscale|dual_chunk"
# What released files say of habits that a family has anyway.
_NEUTRAL = {
    "use_mrope": False,
    "use_rotary_pos_emb": True,
    "rope_interleaved": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_pct": 1.0,
    "rotary_value": False,
}


def from_hf_config(config, *, part: Part = "text", compat: Compat | None = None) -> ModelRope:
    """The rotation of every layer of a Hugging Face model, from its config alone.

    Understands ``rope_scaling`` with ``rope_theta`` (transformers 4) and ``rope_parameters`` (transformers 5), flat
    or by layer type; the parts of a multimodal config; and the habits of each family, of which ``_families.py`` has
    the table. A value that the config leaves out is the family's own, as transformers has it: the base, the
    features of a head and the share of them that turns. ``original_max_position_embeddings`` is that of the
    config's top level, else of the recipe, else ``max_position_embeddings``; ``factor``, where it is null, is the
    ratio of the two lengths.

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
    - ``rope_theta`` in the ``attn_config`` of DBRX counts; transformers reads it nowhere.
    - ``rotary_dim`` of MiniMax-M3-VL counts; transformers reads it nowhere.
    - HunYuan-VL's sections deal pairs to axes; transformers gives the two features of a pair different axes, which
      is no rotation, so that ``compat`` refuses it.

    Args:
      config: a dictionary, the path of a config.json or of a model's folder, or a transformers config object.
      part: of a model that also sees, what reads text, or the tower in ``vision_config`` (whose positions are rows
        and columns).
      compat: None, or ``"transformers"`` for that library's departures.

    Returns:
      :class:`ModelRope`.

    Raises:
      ValueError: if the model type, the rope_type or a key about rotation is not known, a value is not of its kind,
        a key is missing, or the model does more with positions than a recipe says (Beam and Mistral Large 4, whose
        rotation alone ``compat`` gives). The message names it.
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
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {get_args(Part)}, got {part!r}")
    whole = _as_dict(config)
    model_type, values = _text_part(whole) if part == "text" else _vision_part(whole)
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.85)
        raise ValueError(
            f"model_type {model_type!r} is not known{f'; was {near[0]!r} meant?' if near else ''} "
            "(a part of a larger model has a config of its own: pass that)"
        )
    family, keys = FAMILIES[model_type], _Keys(values, f"config of {model_type!r}")
    if family.beyond is not None and compat is None:
        raise ValueError(
            f"{keys.where} does not say all that its layers do with positions: {family.beyond}; "
            "compat='transformers' gives the rotation alone"
        )
    if keys.get("rotary_value"):
        raise ValueError(f"{keys.where}: rotary_value must be false, values are not turned here, got true")
    layers = _layers(keys, family)
    entries: dict[str | None, _Keys | None] = {None: None}
    if any(layer.rotates for layer in layers):
        entries = _entries(keys, family, compat)
    else:  # what is said of a rotation that is switched off says nothing
        keys.first(*_OF_ONE_ROTATION, *family.head_dim, *(key for key, _, _ in family.bases.values()))
    made = {layer: _layer_recipe(layer, entries, keys, family, compat) for layer in dict.fromkeys(layers)}
    keys.refuse_unread(_ROTARY)
    return ModelRope(model_type, _shared_objects(made[layer] for layer in layers))


_OF_ONE_ROTATION = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_dim",
    "original_max_position_embeddings",
    "rope_interleave",
)


def _shared_objects(layers: Iterable[LayerRope]) -> tuple[LayerRope, ...]:
    """The same layers, where equal ones, and equal rotations of unlike ones, are one object."""
    ropes: dict[Rope | None, Rope | None] = {}
    recipes: dict[LayerRope, LayerRope] = {}
    layers = [dataclasses.replace(layer, rope=ropes.setdefault(layer.rope, layer.rope)) for layer in layers]
    return tuple(recipes.setdefault(layer, layer) for layer in layers)


def _as_dict(config) -> Mapping[str, Any]:
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        if path.is_dir():
            path /= "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"config must be a local file or folder (nothing is downloaded), got {path}")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"config must be JSON, got {path}: {error}") from None
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
            return _text_part({"model_type": f"{model_type}_text", **config[key]})
    if not isinstance(model_type, str) or not model_type:
        raise ValueError(f"config must have the key 'model_type', got keys {sorted(config)}")
    return model_type, config


def _vision_part(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The model type and the config of the part that sees; older files do not name its type, or name the whole."""
    config = config.get("thinker_config", config)
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping):
        raise ValueError(f"config must have the key 'vision_config' for part='vision', got keys {sorted(config)}")
    names = [f"{name}{end}" for name in (tower.get("model_type"), config.get("model_type")) for end in _TOWERS]
    model_type = next((name for name in names if name in FAMILIES), names[0])
    return model_type, {**tower, "model_type": model_type}


_TOWERS = ("_vision", "_vision_encoder", "")


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
    name = family.num_layers
    count = keys.integer(keys.need(name, "n_layer", "n_layers"), name)
    still = _stands_still(keys, family)
    types = keys.listed("layer_types", _types(keys, family, count, still), count)
    rotates = keys.listed(family.layers, [False] * count if still else _rotates(keys, family, types), count)
    rotates = [bool(flag) and type not in WITHOUT_ATTENTION for flag, type in zip(rotates, types, strict=True)]
    head_dims = _head_dims(keys, family, types) if any(rotates) else [0] * count
    bases: Sequence[Any] = [None] * count
    scaled: Sequence[int] = range(count)
    if family.layers == "layer_rope_theta":
        bases = keys.get("layer_rope_theta", bases)
    if family.layers == "rope_scaling_layers":
        scaled = keys.get("rope_scaling_layers", scaled)
        if any(i not in range(count) for i in scaled):
            raise ValueError(f"{keys.where}: rope_scaling_layers must name layers below {count}, got {scaled}")
    return [_Layer(head_dims[i], types[i], rotates[i], bases[i] or None, i in scaled) for i in range(count)]


def _stands_still(keys: _Keys, family: Family) -> bool:
    """Whether no layer rotates at all."""
    if family.switch is not None:
        key, wanted, default = family.switch
        if keys.get(key, default) != wanted:
            return True
    return family.optional and "rope_parameters" in keys.values and keys.get("rope_parameters") is None


def _types(keys: _Keys, family: Family, count: int, still: bool) -> Sequence[str | None]:
    """The type of each layer, where the config or the family's habit gives one."""
    types = keys.first("layer_types", "layers_block_type")
    if types is None and (attention := keys.first("attn_layer_indices", "full_attn_idxs")) is not None:
        types = ["full_attention" if i in attention else "linear_attention" for i in range(count)]
    if types is None and (blocks := keys.get("block_types")) is not None:
        types = [blocks[i % len(blocks)] for i in range(count)]
    if types is None and family.full_every is not None:
        key, period, first, other = family.full_every
        written = keys.agreed(key, f"_{key}")  # the latter as transformers 5 writes it
        period = period if written is None else written
        if isinstance(period, str):  # EXAONE 4: one letter a layer, L for local and G for global
            types = ["full_attention" if period[i % len(period)] == "G" else other for i in range(count)]
        else:
            period = keys.integer(period, key)
            types = ["full_attention" if (i - first) % period == 0 else other for i in range(count)]
    hybrid = family.hybrid and family.layers == "all"
    counts = family.nested or hybrid or family.layers.startswith(("sliding", "dense"))
    if types is None and counts and not still:
        keys.need("layer_types")
    return [None] * count if types is None else types


def _rotates(keys: _Keys, family: Family, types: list[str | None]) -> Sequence[Any]:
    """Whether each layer rotates."""
    count = len(types)
    if family.layers.startswith(("sliding", "dense")):
        unknown = set(types) - {"sliding_attention", "full_attention", *WITHOUT_ATTENTION}
        if unknown:
            raise ValueError(
                f"{keys.where}: layer_types must be sliding_attention or full_attention, got {unknown}"
            )
    sliding = [type == "sliding_attention" for type in types]
    match family.layers:
        case "no_rope_layers":
            interval = keys.integer(keys.get("no_rope_layer_interval", 4), "no_rope_layer_interval")
            flags = keys.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(count)]
            if any(flag not in (0, 1) for flag in flags):
                raise ValueError(f"{keys.where}: no_rope_layers must hold 0 or 1 for each layer, got {flags}")
            return flags
        case "layer_rope_theta":
            return keys.need("layer_rope_theta") if family.hybrid else keys.get("layer_rope_theta", [True] * count)
        case "sliding":
            return sliding
        case "sliding_if_any":
            window = keys.get("sliding_window")
            windows = any(sliding) if "sliding_window" not in keys.values else window is not None
            return sliding if windows else [True] * count
        case "dense_or_sliding":
            mlps = keys.listed("mlp_layer_types", keys.need("mlp_layer_types"), count)
            dense = keys.get("prefix_dense_sliding_window_pattern", 1) == 1
            return [slides or (dense and mlp == "dense") for slides, mlp in zip(sliding, mlps, strict=True)]
    return [True] * count


def _head_dims(keys: _Keys, family: Family, types: list[str | None]) -> list[int]:
    """The features of one head in each layer: of its rotated part, if that stands alone."""
    names = ("qk_rope_head_dim",) if family.latent else family.head_dim
    head_dim = keys.need(*names) if family.latent else keys.first(*names)
    if head_dim is None:
        head_dim = family.default_head_dim
    if head_dim is None:
        width = keys.integer(keys.need(family.width, "n_embd", "d_model"), family.width)
        heads = keys.integer(keys.need(family.heads, "n_head", "n_heads"), family.heads)
        if width % heads:
            raise ValueError(
                f"{keys.where}: {family.width} must be a multiple of {family.heads}={heads}, got {width}"
            )
        head_dim = width // heads
    own = keys.mapping("per_layer_config")
    full = keys.get(
        "global_head_dim", head_dim if own or family.global_head_dim is None else family.global_head_dim
    )
    head_dims = [keys.integer(full if type == "full_attention" else head_dim, names[0]) for type in types]
    for i, values in own.items():
        if not 0 <= int(i) < len(types):
            raise ValueError(f"{keys.where}: per_layer_config must name layers below {len(types)}, got {i!r}")
        head_dims[int(i)] = keys.integer(values.get(names[0], head_dims[int(i)]), names[0])
    return head_dims


# ----------------------------------------------------------------------------------------- which recipe


def _entries(keys: _Keys, family: Family, compat: Compat | None) -> dict[str | None, _Keys | None]:
    """The recipe of each label, in the keys of transformers 5; the label is None where one is for all layers."""
    name = "rope_scaling" if keys.get("rope_scaling") is not None else "rope_parameters"
    null = "rope_parameters" in keys.values and keys.get("rope_parameters") is None
    if null and "rope_scaling" not in keys.values:
        raise ValueError(f"{keys.where}: rope_parameters must not be null; leave the key out, or say what it is")
    for key in ("rope_parameters", "rope_scaling"):
        keys.mapping(key)  # refuses what is no dictionary
    written = dict(keys.agreed("rope_parameters", "rope_scaling") or {})
    shared = _shared(keys, family, compat)
    bases = {label: {"rope_theta": keys.get(key, base)} for label, (key, base, _) in family.bases.items()}

    def entry_of(label, entry):
        return _Keys({**shared, **bases.get(label, {}), **entry}, f"{keys.where}, {name}[{label!r}]")

    nested = {label: entry for label, entry in written.items() if isinstance(entry, Mapping) or entry is None}
    if nested and (any(nested.values()) or len(nested) == len(written)):
        if len(nested) < len(written):
            raise ValueError(f"{keys.where}: {name} must be flat or by layer type, got both: {written}")
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
        raise ValueError(f"{keys.where} has two bases: rope_theta = {theta}, and in {name} {written['rope_theta']}")
    return {None: _Keys({**shared, **written}, f"{keys.where}, {name}")}


def _shared(keys: _Keys, family: Family, compat: Compat | None) -> dict[str, Any]:
    """What older configs say at their top: the base and the share of the head that turns."""
    shared = {
        "rope_theta": keys.agreed("rope_theta", "rotary_emb_base", "theta"),  # GPT-NeoX; LFM2 has it twice
        "partial_rotary_factor": keys.get("partial_rotary_factor"),
    }
    if family.proportion is not None:
        shared["partial_rotary_factor"] = keys.agreed("partial_rotary_factor", "rotary_pct")
        shared["rotary_dim"] = keys.get("rotary_dim")
    if family.base_in is not None and compat is None:
        shared["rope_theta"] = keys.mapping(family.base_in).get("rope_theta", shared["rope_theta"])
    return {key: value for key, value in shared.items() if value is not None}


def _layer_recipe(layer: _Layer, entries, keys: _Keys, family: Family, compat: Compat | None) -> LayerRope:
    temperature = None
    if family.temperature == "without_rope" and keys.get("attn_temperature_tuning", True) and not layer.rotates:
        length = keys.integer(keys.get("floor_scale", 8192), "floor_scale")
        temperature = QueryTemperature(beta=keys.number("attn_scale", 0.1), period=length, offset=1)
    label = None if None in entries else family.label(layer.type)
    if layer.rotates and label not in entries:
        raise ValueError(f"{keys.where}: rope_parameters must have an entry for {label!r}, got {sorted(entries)}")
    entry = entries.get(label)
    if not layer.rotates or entry is None:
        return LayerRope(None, layer.type, query_temperature=temperature)

    rotary_dim = _rotary_dim(layer, entry, family, compat)
    schedule = _schedule(layer, entry, keys, family, compat, nested=None not in entries)
    axes = _axes(entry, family, rotary_dim // 2)
    layout = family.layout
    if family.layout_key is not None:
        layout = "interleaved" if keys.flag(family.layout_key, layout == "interleaved") else "half"
    logit_factor = 1.0
    if family.logit_factor and isinstance(schedule, Yarn) and schedule.mscale_all_dim:
        logit_factor = schedule.g(schedule.mscale_all_dim) ** 2
    if family.temperature == "yarn" and (beta := entry.number("llama_4_scaling_beta", None)) is not None:
        original = "original_max_position_embeddings"
        temperature = QueryTemperature(beta=beta, period=entry.integer(entry.need(original), original))
    for key in family.unread:
        entry.get(key)
    entry.refuse_unread()
    try:
        rope = Rope(layer.head_dim, schedule, rotary_dim=rotary_dim, layout=layout, axes=axes)
        rope.frequencies(
            1 if hasattr(schedule, "context_length") else None
        )  # says now what it would say at the first call
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from None
    return LayerRope(rope, layer.type, logit_factor, temperature)


def _rotary_dim(layer: _Layer, entry: _Keys, family: Family, compat: Compat | None) -> int:
    given, share = entry.get("rotary_dim"), entry.number("partial_rotary_factor", None)
    rope_type = _rope_type(entry, family)
    # Proportional frequencies are as wide as the head; the rotated part of a latent head stands alone.
    if rope_type == "proportional" or family.latent:
        return layer.head_dim
    if given is None and share is None:
        given = family.rotary_dim
    if given is not None and not (compat and family.rotary_dim_is_lost):
        return entry.integer(given, "rotary_dim", least=2)
    if family.proportion is None and compat and rope_type == "default":
        return layer.head_dim
    return int(layer.head_dim * ((family.proportion or 1.0) if share is None else share))


def _axes(entry: _Keys, family: Family, num_pairs: int) -> tuple[int, ...] | None:
    """Which axis of the position each pair reads."""
    match family.sections:
        case None:
            return None
        case "by_turns":
            return tuple(i % 2 for i in range(num_pairs))
        case "rows_columns":
            return tuple(int(2 * i >= num_pairs) for i in range(num_pairs))
        case "columns_rows":
            return tuple(int(2 * i < num_pairs) for i in range(num_pairs))
    strided = family.sections == "strided"
    if (given := entry.agreed("mrope_interleaved", "interleaved")) is not None and given != strided:
        raise ValueError(f"{entry.where}: mrope_interleaved must be {strided} in this family, got {given!r}")
    sections = (
        entry.agreed("mrope_section", "xdrope_section") or family.default_sections or entry.need("mrope_section")
    )
    wanted = len(family.default_sections or sections)
    if isinstance(sections, str) or len(sections) != wanted or sum(sections) != num_pairs or min(sections) < 0:
        raise ValueError(f"{entry.where}: mrope_section must add up to R/2 = {num_pairs}, got {sections}")
    if strided:
        return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(num_pairs))
    if family.sections == "alternating":
        spatial = sections[0] + sections[1]
        return tuple(1 + i % 2 if i < spatial else 0 for i in range(num_pairs))
    return tuple(axis for axis, section in enumerate(sections) for _ in range(section))


def _schedule(layer: _Layer, entry: _Keys, keys: _Keys, family: Family, compat, *, nested: bool) -> Schedule:
    rope_type = _rope_type(entry, family)
    base = entry.number("rope_theta", family.base)
    base = base if layer.base is None else layer.base

    def longest() -> int:
        names = ("max_position_embeddings", "max_seq_len", "model_max_length")
        return keys.integer(keys.need(*names), names[0])

    def original() -> int:
        # At the top it counts before the recipe's own (Phi-3 keeps it there), but not before one by layer type.
        name = "original_max_position_embeddings"
        inside, outside = entry.get(name), keys.get(name)
        length = outside if outside is not None and not nested else inside
        return longest() if length is None else entry.integer(length, name)

    def factor() -> float:
        # Null, not missing, stands for the ratio of the two lengths.
        if "factor" in entry.values and entry.get("factor") is None:
            return longest() / original()
        return entry.number("factor")

    schedule: Schedule
    match rope_type:
        case "default":
            schedule = Standard(base=base)
        case "mrope" | "axial" if family.sections is not None:
            schedule = Standard(base=base)
        case "linear":
            schedule = Linear(factor=factor(), base=base)
        case "dynamic" | "xdrope" if family.ntk_alpha and entry.get("alpha") is not None:
            entry.get("factor")  # 1 in the released configs, whose alpha stands in its place
            schedule = NTKAware(factor=entry.number("alpha"), base=base)
        case "dynamic":
            schedule = DynamicNTK(factor=factor(), original_length=longest(), base=base)
        case "yarn":
            entry.get("finetuned")  # of the first YaRN checkpoints: how they came to be
            truncate = entry.flag("truncate", True)
            schedule = Yarn(
                factor=factor(),
                original_length=original(),
                base=base,
                beta_fast=entry.number("beta_fast", 32.0),
                beta_slow=entry.number("beta_slow", 1.0),
                mscale=entry.number("mscale", None),
                mscale_all_dim=entry.number("mscale_all_dim", None),
                attention_factor=entry.number("attention_factor", None),
                truncate=True if compat and nested else truncate,
            )
        case "longrope" | "su":
            short, long = entry.need("short_factor"), entry.need("long_factor")
            short_mscale, long_mscale = entry.number("short_mscale", None), entry.number("long_mscale", None)
            ratio = factor() if entry.get("factor") is not None else max(longest() / original(), 1.0)
            schedule = LongRope(
                short_factor=short,
                long_factor=short if compat and long_mscale is not None else long,
                original_length=original(),
                factor=ratio,
                base=base,
                attention_factor=entry.number("attention_factor", short_mscale),
                long_attention_factor=long_mscale,
            )
        case "llama3":
            schedule = Llama3(
                factor=factor(),
                original_length=original(),
                low_freq_factor=entry.number("low_freq_factor"),
                high_freq_factor=entry.number("high_freq_factor"),
                base=base,
            )
        case "proportional":
            proportion = entry.number("partial_rotary_factor", 1.0)
            schedule = Proportional(proportion=proportion, factor=entry.number("factor", 1.0), base=base)
        case _:
            near = difflib.get_close_matches(str(rope_type), _ROPE_TYPES, n=1)
            meant = f"; was {near[0]!r} meant?" if near else ""
            raise ValueError(f"{entry.where}: rope_type must be one of {_ROPE_TYPES}, got {rope_type!r}{meant}")
    if not layer.scaled:
        schedule = Standard(base=base)
    if family.sections in ("rows_columns", "columns_rows"):
        schedule = Axial(schedule=schedule)
    return Negated(schedule=schedule) if family.reversed else schedule


def _rope_type(entry: _Keys, family: Family) -> str:
    """The name of the schedule, by either of its keys."""
    name, older = entry.get("rope_type"), entry.get("type")
    # Qwen2-VL's sections are written as type "mrope" beside rope_type "default".
    if name is not None and older not in (None, name, "mrope"):
        raise ValueError(f"{entry.where} has two names for its schedule: rope_type = {name!r}, type = {older!r}")
    name = name or older or "default"
    return family.aliases.get(name, name)


_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "axial", "mrope")
