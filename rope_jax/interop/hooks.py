"""Puts the configs of families with a spelling of their own into the common form, or back."""

from collections.abc import Mapping, Sequence

from rope_jax.interop.family import Values


def base_in_attn_config(values: Values, compat: bool) -> Values:
    """DBRX keeps its base in ``attn_config``; transformers does not read the base there."""
    attention = values.get("attn_config")
    if compat or attention is None:
        return values
    if not isinstance(attention, Mapping):
        raise ValueError(f"config of 'dbrx': attn_config must be a dictionary, got {attention!r}")
    return {**values, "rope_theta": attention["rope_theta"]} if "rope_theta" in attention else values


def rotary_dim_is_lost(values: Values, compat: bool) -> Values:
    """MiniMax-M3-VL rotates ``rotary_dim`` features; transformers ignores the key and rotates the whole head."""
    if not compat:
        return values

    def without_rotary_dim(entry):
        if not isinstance(entry, Mapping):
            return entry
        return {key: without_rotary_dim(value) for key, value in entry.items() if key != "rotary_dim"}

    values = without_rotary_dim(values)
    proportions = [values.get(key) for key in ("partial_rotary_factor", "rotary_pct")]
    return values if any(p is not None for p in proportions) else {**values, "partial_rotary_factor": 1.0}


def wide_global_heads(values: Values, compat: bool) -> Values:
    """Gemma 4's heads of full attention have 512 features, unless the config gives sizes for single layers."""
    if values.get("per_layer_config") or values.get("global_head_dim") is not None:
        return values
    return {**values, "global_head_dim": 512}


def without_mlp_blocks(values: Values, compat: bool) -> Values:
    """Dory's released files list the attention and the MLP of a layer as two blocks."""
    types = values.get("layer_types")
    if not isinstance(types, Sequence) or isinstance(types, str) or "mlp" not in types:
        return values
    count = values.get("num_hidden_layers")
    if count != len(types) or len(types) % 2 or any(type != "mlp" for type in types[1::2]):
        raise ValueError(
            f"config of 'dory': layer_types must be {count} blocks, attention and 'mlp' by turns, got {list(types)}"
        )
    return {**values, "layer_types": list(types[::2]), "num_hidden_layers": count // 2}


def period_of_five(values: Values, compat: bool) -> Values:
    """Lara Mini's types of layers, if a config lists none."""
    if values.get("layer_types") is not None or not isinstance(values.get("num_hidden_layers"), int):
        return values
    period = ("linear", "sliding", "linear", "full", "sliding")
    return {**values, "layer_types": [f"{period[i % 5]}_attention" for i in range(values["num_hidden_layers"])]}


def flat_yarn_without_factor(values: Values, compat: bool) -> Values:
    """DeepSeek-V4's first file has one flat YaRN for two layer types, and its attention factor is 1."""

    def is_flat_yarn(entry):
        flat = isinstance(entry, Mapping) and not any(isinstance(value, Mapping) for value in entry.values())
        return flat and entry.get("rope_type", entry.get("type")) == "yarn"

    changed = {
        key: {"attention_factor": 1.0, **values[key]}
        for key in ("rope_parameters", "rope_scaling")
        if is_flat_yarn(values.get(key))
    }
    return {**values, **changed}


def original_length_at_top(values: Values) -> Values:
    """Phi-3's config class has a default original length at the top, which counts before ``rope_parameters``."""
    name = "original_max_position_embeddings"
    entry = values.get("rope_parameters", {})
    return {**values, name: entry[name]} if entry.get("rope_type") == "longrope" else values
