"""Reads the kind of each layer: its type, its head_dim and whether it rotates."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rope_jax.interop.config import Config
from rope_jax.interop.family import MOST_FEATURES, MOST_LAYERS, SYNONYMS, WITHOUT_ATTENTION, Family

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The rotation of one layer, apart from ``rope_parameters``.

    Attributes:
      head_dim: H; 0 if no layer rotates.
      type: the config's name for layers of this kind; None if it has none.
      rotates: whether the layer rotates.
      base: b; None for the base in ``rope_parameters``.
      scaled: whether the scaling in ``rope_parameters`` applies.
    """

    head_dim: int
    type: str | None
    rotates: bool
    base: float | None
    scaled: bool


def read_layers(config: Config, family: Family) -> list[LayerKind]:
    """The kind of each layer."""
    name = family.key("num_hidden_layers")
    count = config.integer(name, config.need(name, *SYNONYMS["num_hidden_layers"]), most=MOST_LAYERS)
    switched_on = family.switch is None or family.switch.is_on(config)
    types = config.per_layer("layer_types", _types(config, family, count, switched_on), count)
    config.list_of("layer_types", types, str, type(None))
    flags = _rotating(config, family, types) if switched_on else [False] * count
    flags = config.per_layer(family.layers, flags, count)
    rotates = [bool(flag) and type not in WITHOUT_ATTENTION for flag, type in zip(flags, types, strict=True)]
    head_dims = _head_dims(config, family, types) if any(rotates) else [0] * count
    bases: Sequence[Any] = [None] * count
    scaled: Sequence[int] = range(count)
    if family.layers == "layer_rope_theta":
        bases = config.list_of("layer_rope_theta", config.get("layer_rope_theta", bases), int, float, type(None))
    if family.layers == "rope_scaling_layers":
        if (written := config.get("rope_scaling_layers")) is not None:
            scaled = config.list_of("rope_scaling_layers", written, int)
        if any(i not in range(count) for i in scaled):
            config.refuse(f"rope_scaling_layers must name layers below {count}, got {scaled}")
    return [LayerKind(head_dims[i], types[i], rotates[i], bases[i] or None, i in scaled) for i in range(count)]


def _types(config: Config, family: Family, count: int, switched_on: bool) -> Sequence[str | None]:
    """The type of each layer, from the config or the family's habit; None if neither gives one."""
    if (types := config.first("layer_types", "layers_block_type")) is not None:
        return types
    if (attention := config.first("attn_layer_indices", "full_attn_idxs")) is not None:
        attention = config.list_of("attn_layer_indices", attention, int)
        return [FULL if i in attention else "linear_attention" for i in range(count)]
    if (flags := config.get("attn_type_list")) is not None:  # MiniMax-01: 1 for softmax
        return [FULL if flag else "linear_attention" for flag in config.per_layer("attn_type_list", flags, count)]
    if (blocks := config.get("block_types")) is not None:
        if not config.list_of("block_types", blocks, str):
            config.refuse("block_types must have an entry")
        return [blocks[i % len(blocks)] for i in range(count)]
    if family.full_every is not None:
        return _periodic_types(config, family, count)
    hybrid = family.hybrid and family.layers == "all"
    if switched_on and (family.nested or hybrid or _by_window(family)):
        raise ValueError(f"{config.name} must have the key 'layer_types', a list of the type of each layer")
    return [None] * count


def _periodic_types(config: Config, family: Family, count: int) -> list[str]:
    """Layers of full attention at a fixed period."""
    assert family.full_every is not None
    key, default, first, other = family.full_every
    period = config.agreed(key, f"_{key}")  # transformers 5 writes the latter
    if isinstance(period, str):  # EXAONE 4: one letter for each layer, L for local and G for global
        return [FULL if period[i % len(period)] == "G" else other for i in range(count)]
    period = config.integer(key, default if period is None else period)
    return [FULL if (i - first) % period == 0 else other for i in range(count)]


def _by_window(family: Family) -> bool:
    """Whether the type of a layer decides if it rotates."""
    return family.layers in ("sliding", "sliding_if_any", "dense_or_sliding")


def _rotating(config: Config, family: Family, types: list[str | None]) -> Sequence[Any]:
    """Whether each layer rotates, by the family's rule."""
    count = len(types)
    if _by_window(family) and (unknown := set(types) - {SLIDING, FULL, *WITHOUT_ATTENTION}):
        config.refuse(f"layer_types must be {SLIDING} or {FULL}, got {unknown}")
    sliding = [type == SLIDING for type in types]
    match family.layers:
        case "no_rope_layers":
            interval = config.integer("no_rope_layer_interval", config.get("no_rope_layer_interval", 4))
            written = config.get("no_rope_layers")
            if written is not None and not isinstance(written, list | tuple):
                config.refuse(f"no_rope_layers must be a list of 0 or 1, got {written!r}")
            flags = written or [(i + 1) % interval != 0 for i in range(count)]
            if any(flag not in (0, 1) for flag in flags):
                config.refuse(f"no_rope_layers must hold 0 or 1 for each layer, got {flags}")
            return flags
        case "layer_rope_theta" if family.hybrid:
            return config.need("layer_rope_theta")
        case "layer_rope_theta":
            return config.get("layer_rope_theta", [True] * count)
        case "sliding":
            return sliding
        case "sliding_if_any":
            window = config.get("sliding_window")
            has_window = window is not None if "sliding_window" in config.values else any(sliding)
            return sliding if has_window else [True] * count
        case "dense_or_sliding":
            kinds = config.per_layer("mlp_layer_types", config.need("mlp_layer_types"), count)
            dense_rotate = config.get("prefix_dense_sliding_window_pattern", 1) == 1
            return [slides or (dense_rotate and mlp == "dense") for slides, mlp in zip(sliding, kinds, strict=True)]
    return [True] * count


def _head_dims(config: Config, family: Family, types: list[str | None]) -> list[int]:
    """H of each layer; of the rotated part only, if the head is latent."""
    name = family.key("head_dim")
    # A null head_dim is D/N, also where the class of the family has another default.
    missing = None if config.is_null(name) else family.default_head_dim
    if family.latent:
        head_dim = config.need(name)
    else:
        names = ("head_dim", "kv_channels") if name == "head_dim" else (name,)
        head_dim = missing if (written := config.agreed(*names)) is None else written
    if head_dim is None:
        head_dim = _width_per_head(config, family)
    single_layers = config.mapping("per_layer_config")
    full = config.get("global_head_dim", head_dim)
    head_dims = [config.integer(name, full if type == FULL else head_dim, most=MOST_FEATURES) for type in types]
    for i, values in single_layers.items():
        if not str(i).isdigit() or int(i) >= len(types):
            config.refuse(f"per_layer_config must name layers below {len(types)}, got {i!r}")
        if not isinstance(values, Mapping):
            config.refuse(f"per_layer_config must hold a dictionary for each layer, got {values!r}")
        head_dims[int(i)] = config.integer(name, values.get(name, head_dims[int(i)]), most=MOST_FEATURES)
    return head_dims


def _width_per_head(config: Config, family: Family) -> int:
    """D/N."""
    width_key, heads_key = family.key("hidden_size"), family.key("num_attention_heads")
    width = config.integer(width_key, config.need(width_key, *SYNONYMS["hidden_size"]))
    heads = config.integer(heads_key, config.need(heads_key, *SYNONYMS["num_attention_heads"]))
    if width % heads:
        config.refuse(
            f"{width_key} must be a multiple of {heads_key}={heads}, got {width}; or give {family.key('head_dim')}"
        )
    return width // heads
