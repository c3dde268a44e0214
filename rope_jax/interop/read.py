"""Reads the rotation of every layer from a Hugging Face config."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from rope_jax._checks import check_choice, shown
from rope_jax.core.composed_schedules import Negated, Sections
from rope_jax.core.frequencies import Schedule
from rope_jax.core.rope import Rope
from rope_jax.core.schedules import Standard, Yarn
from rope_jax.interop.config import Config, did_you_mean, load_config
from rope_jax.interop.families import FAMILIES
from rope_jax.interop.family import Family
from rope_jax.interop.layers import LayerKind, read_layers
from rope_jax.interop.model_rope import LayerRope, ModelRope, QueryTemperature
from rope_jax.interop.parts import find_part, unknown_model_type
from rope_jax.interop.rope_types import ELSEWHERE, ROPE_TYPES, RopeParameters, advice_in, rope_type, standard

Compat = Literal["transformers"]
Part = Literal["text", "vision", "audio"]


def from_hf_config(
    config, *, part: Part = "text", like: str | None = None, compat: Compat | None = None
) -> ModelRope:
    """The rotation of every layer of a Hugging Face model, from its config alone.

    Example:
      >>> import rope_jax
      >>> model_rope = rope_jax.from_hf_config({
      ...     "model_type": "llama", "num_hidden_layers": 2, "head_dim": 128, "rope_theta": 500000.0,
      ...     "max_position_embeddings": 131072,
      ...     "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
      ...                      "low_freq_factor": 1.0, "high_freq_factor": 4.0},
      ... })
      >>> model_rope.rope.schedule
      Llama3(factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0, base=500000.0)

    If layers differ, read ``model_rope.layers[i].rope``. Schedules that depend on the context length (``dynamic``,
    ``longrope``) come without one: pass ``context_length`` with each call.

    Both spellings are read: ``rope_scaling`` with ``rope_theta`` (transformers 4) and ``rope_parameters``
    (transformers 5), flat or by layer type. If the config omits the base, the head_dim or the rotated proportion,
    the family's own value is used, as in transformers; the table is ``rope_jax/interop/families.py``. A family
    whose default is more than a base, such as gpt-oss or Gemma 4, must have ``rope_parameters``.
    ``original_max_position_embeddings`` is read from the config's top level, else from the rope parameters; if
    both lack the key, it is ``max_position_embeddings``. A null ``factor`` is the ratio of the two lengths. A null
    ``head_dim`` is the width per head, also where a missing one is the family's.

    Files leave out of a part, such as ``text_config``, what equals the defaults of its class: the same defaults are
    filled in. A whole config must have its sizes.

    Programs write further keys beside a recipe:

    - ``original_max_position_embeddings`` beside ``linear`` and ``dynamic`` (LLaMA-Factory): not read, as in
      transformers. ``dynamic`` grows from ``max_position_embeddings``.
    - ``attn_factor`` beside ``yarn`` (vLLM): multiplies YaRN's own attention factor. transformers ignores the key.
      ``attention_factor`` is another key (transformers): it replaces the factor.
    - ``apply_yarn_scaling`` beside ``yarn`` (vLLM): false leaves YaRN's own attention factor out. transformers
      ignores the key.
    - ``extrapolation_factor`` beside ``yarn`` (vLLM): must be 1.
    - ``indexer_rope_interleave`` at the top (GLM-5): of the indexer of sparse attention, which rotates for itself.

    Args:
      config: a dictionary, the path of a config.json or of a model folder, or a transformers config object.
      part: of a multimodal model, ``"text"``, the ``"vision"`` tower, whose positions are rows and columns, or the
        ``"audio"`` tower. Llama 4's vision tower counts rows and columns from 1.
      like: the family whose rotation the model has, such as ``"llama"`` for a model with its own code; None reads
        the family from ``model_type``. Base, layout and spelling are the family's, the size of a head is not. A key
        about positions that the family does not have is an error.
      compat: None follows the released checkpoints; ``"transformers"`` follows that library.

    Returns:
      :class:`ModelRope`.

    Raises:
      ValueError: if the model type, the rope_type or a key about rotation is unknown, a value has the wrong type,
        a required key is missing, or the model does not rotate. Also if the model does more with positions than a
        :class:`ModelRope` holds (Beam and Mistral Large 4; ``compat`` gives their rotation alone). The message
        names the key.
      FileNotFoundError: if the path leads to no config.

    transformers 5.24 departs from the training of some released checkpoints. ``compat="transformers"`` follows it,
    except for the last three entries:

    - vLLM's ``attn_factor`` and ``apply_yarn_scaling`` count; transformers ignores both.
    - YaRN's ``truncate`` counts by layer type too; transformers reads it from flat rope parameters only.
    - Phi-3.5-MoE uses its long factors beyond the original length; transformers always uses the short ones.
    - ``partial_rotary_factor`` counts with the plain rotation of every family; transformers ignores it in families
      of which no released checkpoint has it.
    - The ``rope_theta`` in DBRX's ``attn_config`` counts; transformers does not read it.
    - The ``rotary_dim`` of MiniMax-M3-VL counts; transformers does not read it.
    - In version-4 files of Gemma 3, OLMo 3 and ModernBERT, the key ``type`` counts, and OLMo 3's ``rope_theta``
      counts in all layers. transformers ignores this ``type``, and reads this base for full attention only.
    - Flat files of GLM-4.1V count; transformers 5 reads ``text_config`` alone.
    - HunYuan-VL's sections deal pairs to axes. transformers gives the two features of a pair different axes, which
      is no rotation.
    """
    check_choice("compat", compat, get_args(Compat), optional=True)
    check_choice("part", part, get_args(Part))
    if like is not None and not (isinstance(like, str) and like in FAMILIES):
        hint = did_you_mean(like, FAMILIES) if isinstance(like, str) else ""
        raise ValueError(f"like must be a model type of the table, got {shown(like)}{hint}")
    values, model_type, name = find_part(load_config(config), part, like, FAMILIES)
    if model_type not in FAMILIES:
        raise ValueError(unknown_model_type(model_type, values, name, FAMILIES))
    family = FAMILIES[model_type]
    if like is not None:  # the size of a head is a habit of the class, not of the rotation
        family = dataclasses.replace(family, default_head_dim=None)
    top = Config(family.read_hook(values, compat is not None), name)
    if family.beyond is not None and compat is None:
        raise ValueError(
            f"{top.name} does not say everything that its layers do with positions: {family.beyond}; "
            "compat='transformers' gives the rotation alone"
        )
    layers = read_layers(top, family)
    if any(layer.rotates for layer in layers):
        parameters = _rope_parameters(top, family)
    else:  # the keys of a rotation that is switched off do not matter
        parameters = {None: None}
        bases = (key for key, _, _ in family.bases.values())
        top.ignore(*_KEYS_OF_ROTATION, family.keys.get("head_dim", "head_dim"), *bases)
    ropes = {layer: _layer_rope(layer, parameters, top, family, compat) for layer in dict.fromkeys(layers)}
    top.refuse_unread(_constants(family), inert=functools.partial(_inert, top), elsewhere=ELSEWHERE)
    return ModelRope(model_type, _shared_objects(ropes[layer] for layer in layers))


_KEYS_OF_ROTATION = (
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
# At the top of a config, keys with these words are about the rotation, or about positions beside it.
_OTHER_POSITIONS = re.compile(
    r"alibi|logn|relative_attention|(?<!qk_)nope(?!_head)|position_(embedding_type|encoding)|^pos_emb$"
)
_ABOUT_ROTATION = re.compile(rf"rope|rotary|theta|yarn|ntk|mscale|dual_chunk|{_OTHER_POSITIONS.pattern}")
# Keys of released files that state a family's only habit.
_CONSTANTS = {
    "alibi": (False, None),
    "indexer_rope_interleave": (True, False, None),  # the indexer of sparse attention, which rotates for itself
    "mla_use_nope": (False, None),
    "nope_layer_interval": (None, 0, -1),
    "pos_emb": ("rotary", "rope", None),
    "use_alibi": (False, None),
    "use_dynamic_ntk": (False, None),
    "use_logn_attn": (False, None),
    "use_mrope": (False, None),
    "use_nope": (False, None),
    "use_rope": (True, None),
    "use_rotary_pos_emb": (True, None),
    "rotary_emb_fraction": (1.0, None),
    "rotary_pct": (1.0, None),
    "rotary_value": (False, None),
}


def _constants(family: Family) -> dict[str, tuple]:
    """The allowed values of keys that state a habit of the family."""
    interleaved = family.layout == "interleaved"
    flags = ("rope_interleave", "rope_interleaved", "rotary_emb_interleaved")
    named = "rope_gptj" if interleaved else "rope_gpt_neox"
    kinds = ("rope", "rotary", named, None)
    return _CONSTANTS | dict.fromkeys(flags, (interleaved, None)) | {"position_embedding_type": kinds}


def _inert(config: Config, key: str) -> bool:
    """Whether a key of the top does not change the rotation."""
    if config.values[key] is False and _OTHER_POSITIONS.search(key):
        return True
    return not _ABOUT_ROTATION.search(key) and not config.resembles_missing(key)


def _shared_objects(layers: Iterable[LayerRope]) -> tuple[LayerRope, ...]:
    """The same layers; equal layers, and equal ropes of unequal layers, become one object."""
    ropes: dict[Rope | None, Rope | None] = {}
    unique: dict[LayerRope, LayerRope] = {}
    layers = [dataclasses.replace(layer, rope=ropes.setdefault(layer.rope, layer.rope)) for layer in layers]
    return tuple(unique.setdefault(layer, layer) for layer in layers)


# --------------------------------------------------------------------- the dictionaries of rope parameters

Parameters = dict[str | None, Config | None]


def _rope_parameters(config: Config, family: Family) -> Parameters:
    """The rope parameters of each label, in the keys of transformers 5; label None is for all layers."""
    name = "rope_scaling" if config.get("rope_scaling") is not None else "rope_parameters"
    if config.is_null("rope_parameters") and "rope_scaling" not in config.values:
        config.refuse("rope_parameters must not be null; remove the key, or set the rope parameters")
    for key in ("rope_parameters", "rope_scaling"):
        config.mapping(key)  # refuses other types
    written = dict(config.agreed("rope_parameters", "rope_scaling") or {})
    if {"type", "rope_type", "factor"} & written.keys() and not any(
        value is not None for value in written.values()
    ):
        written = {}  # a recipe of nulls says nothing
    at_top = _parameters_at_top(config, family)
    bases = {label: {"rope_theta": config.get(key, base)} for label, (key, base, _) in family.bases.items()}

    def entry_of(label, entry):
        return Config({**at_top, **bases.get(label, {}), **entry}, f"{config.name}, {name}[{label!r}]")

    nested = {label: entry for label, entry in written.items() if isinstance(entry, Mapping) or entry is None}
    if nested and (any(nested.values()) or len(nested) == len(written)):
        if len(nested) < len(written):
            config.refuse(f"{name} must be flat or by layer type, got both: {written}")
        return {label: None if entry is None else entry_of(label, entry) for label, entry in nested.items()}
    if (family.nested and not family.bases) or (family.explicit and not written):
        each = " for each layer type" if family.nested else ""
        raise ValueError(
            f"{config.name} must have rope_parameters{each}, got {written or None}; its habit is more than a base"
        )
    if family.bases:
        return {label: entry_of(label, written if base.scaled else {}) for label, base in family.bases.items()}
    theta = at_top.get("rope_theta")
    if theta is not None and "rope_theta" in written and written["rope_theta"] != theta:
        raise ValueError(
            f"{config.name} has two bases: rope_theta = {theta}, and in {name} {written['rope_theta']}; keep one"
        )
    return {None: Config({**at_top, **written}, f"{config.name}, {name}")}


def _parameters_at_top(config: Config, family: Family) -> dict[str, Any]:
    """The base and the rotated proportion, which older configs keep at the top."""
    at_top = {
        "rope_theta": config.agreed("rope_theta", "rotary_emb_base", "theta"),  # GPT-NeoX; LFM2 has it twice
        "partial_rotary_factor": config.get("partial_rotary_factor"),
    }
    if family.proportion is not None:
        at_top["partial_rotary_factor"] = config.agreed("partial_rotary_factor", "rotary_pct")
        at_top["rotary_dim"] = config.get("rotary_dim")
        _refuse_null_proportion(config, family, at_top)
    return {key: value for key, value in at_top.items() if value is not None}


def _refuse_null_proportion(config: Config, family: Family, at_top: Mapping[str, Any]) -> None:
    """Refuses null where it means another part of the head than a missing key does."""
    written = config.values.get("rope_parameters") or config.values.get("rope_scaling")
    if any(at_top.get(key) is not None for key in ("partial_rotary_factor", "rotary_dim")) or written:
        return
    for key in ("partial_rotary_factor", "rotary_pct", "rotary_dim"):
        habit = family.rotary_dim if key == "rotary_dim" else family.proportion
        if config.is_null(key) and habit not in (None, 1.0):
            config.refuse(f"{key} must not be null; write the number, or remove the key for {habit}")


# -------------------------------------------------------------------------------------------- one layer


def _layer_rope(
    layer: LayerKind, parameters: Parameters, config: Config, family: Family, compat: Compat | None
) -> LayerRope:
    by_layer_type = None not in parameters
    label = family.label(layer.type) if by_layer_type else None
    if layer.rotates and label not in parameters:
        config.refuse(f"rope_parameters must have an entry for {label!r}, got {sorted(map(str, parameters))}")
    temperature = _temperature_without_rope(layer, config, family)
    entry = parameters.get(label)
    if not layer.rotates or entry is None:
        return LayerRope(None, layer.type, query_temperature=temperature)

    rotary_dim = _rotary_dim(layer, entry, family, compat)
    schedule = _schedule(layer, entry, config, family, compat, by_layer_type, rotary_dim)
    layout = family.layout
    if family.layout_key is not None:
        layout = "interleaved" if config.flag(family.layout_key, layout == "interleaved") else "half"
    logit_factor = 1.0
    ladder = schedule.schedule if isinstance(schedule, Sections) else schedule
    if family.logit_factor and isinstance(ladder, Yarn) and ladder.mscale_all_dim:
        scale = ladder.g(ladder.mscale_all_dim)
        logit_factor = scale * scale  # not ** 2, which overflows with an error of Python
    if family.temperature == "yarn" and (beta := entry.number("llama_4_scaling_beta", None)) is not None:
        key = "original_max_position_embeddings"
        if beta < 0:
            entry.refuse(f"llama_4_scaling_beta must be at least 0, got {beta}")
        period = entry.integer(key, entry.need(key))
        temperature = QueryTemperature(beta=beta, period=period) if beta else None  # 0 switches it off
    entry.ignore(*family.ignored)
    entry.refuse_unread(_CONSTANTS, elsewhere=advice_in(entry))
    try:
        blocks = 1 if family.sections is None else family.sections.blocks
        rope = Rope(layer.head_dim, schedule, rotary_dim=rotary_dim, layout=layout, blocks=blocks)
        # Frequencies that do not fit fail here, not at the first call.
        rope.frequencies(1 if hasattr(schedule, "context_length") else None)
        return LayerRope(rope, layer.type, logit_factor, temperature)
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}") from None


def _temperature_without_rope(layer: LayerKind, config: Config, family: Family) -> QueryTemperature | None:
    """Llama 4's temperature of the layers that do not rotate."""
    if family.temperature != "without_rope" or not config.get("attn_temperature_tuning", True) or layer.rotates:
        return None
    period = config.integer("floor_scale", config.get("floor_scale", 8192))
    beta = config.number("attn_scale", 0.1)
    if beta < 0:
        config.refuse(f"attn_scale must be at least 0, got {beta}")
    return QueryTemperature(beta=beta, period=period, offset=1) if beta else None


def _rotary_dim(layer: LayerKind, entry: Config, family: Family, compat: Compat | None) -> int:
    rotary_dim, proportion = entry.get("rotary_dim"), entry.number("partial_rotary_factor", None)
    kind = rope_type(entry)
    # Proportional frequencies are as wide as the head; the rotated part of a latent head stands alone.
    if kind == "proportional" or family.latent:
        return layer.head_dim
    if rotary_dim is None and proportion is None:
        rotary_dim = family.rotary_dim
    if rotary_dim is not None:
        return entry.integer("rotary_dim", rotary_dim, least=2)
    if family.sections is not None and proportion is None and family.proportion is None:
        return family.sections.rotary_dim(layer.head_dim)
    if family.proportion is None and compat and kind == "default":
        return layer.head_dim
    return int(layer.head_dim * ((family.proportion or 1.0) if proportion is None else proportion))


def _schedule(
    layer: LayerKind,
    entry: Config,
    config: Config,
    family: Family,
    compat: Compat | None,
    by_layer_type: bool,
    rotary_dim: int,
) -> Schedule:
    name = rope_type(entry)
    readers = {**ROPE_TYPES, **family.rope_types}
    if family.sections is not None:  # the sections say the rest
        readers |= {"mrope": standard, "axial": standard}
    if not isinstance(name, str) or name not in readers:
        raise ValueError(
            f"{entry.name}: rope_type must be one of {tuple(readers)}, got {name!r}"
            f"{ELSEWHERE.get(str(name)) or did_you_mean(str(name), readers)}"
        )
    base = entry.number("rope_theta", family.base)
    base = base if layer.base is None else layer.base
    try:
        schedule = readers[name](RopeParameters(entry, config, base, by_layer_type, compat is not None))
    except ValueError as error:  # the schedules' own checks know no config
        known = str(error).startswith(config.name.split(",")[0])
        raise ValueError(str(error) if known else f"{entry.name}: {error}") from None
    if not layer.scaled:
        schedule = Standard(base=base)
    if family.sections is not None:
        schedule = family.sections.dealt(schedule, entry, rotary_dim)
    return Negated(schedule=schedule) if family.negated else schedule
