"""Puts the configs of families with a spelling of their own into the common form, or back."""

from collections.abc import Mapping, Sequence

from rope_jax.interop.family import MOST_LAYERS, Values


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
    count = values.get("num_hidden_layers")
    if values.get("layer_types") is not None or not isinstance(count, int) or count > MOST_LAYERS:
        return values
    period = ("linear", "sliding", "linear", "full", "sliding")
    return {**values, "layer_types": [f"{period[i % 5]}_attention" for i in range(count)]}


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


_COMPRESSIONS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def compress_ratios(values: Values, compat: bool) -> Values:
    """DeepSeek-V4's first files give each layer's compression; layers beyond the model predict further tokens."""
    ratios, count = values.get("compress_ratios"), values.get("num_hidden_layers")
    if values.get("layer_types") is None and ratios is not None and isinstance(count, int):
        if not isinstance(ratios, Sequence) or (unknown := [r for r in ratios if r not in (0, 4, 128)]):
            found = unknown if isinstance(ratios, Sequence) else ratios
            raise ValueError(f"config of 'deepseek_v4': compress_ratios must hold 0, 4 or 128, got {found}")
        values = {**values, "layer_types": [_COMPRESSIONS[ratio] for ratio in ratios[:count]]}
    return flat_yarn_without_factor(values, compat)


def hybrid_layer_pattern(values: Values, compat: bool) -> Values:
    """MiMo-V2's own files: 1 for a sliding layer, and a base of its own for these layers."""
    pattern, older = values.get("hybrid_layer_pattern"), {"rope_theta", "swa_rope_theta"} & values.keys()
    if pattern is not None and values.get("layer_types") is None:
        if not isinstance(pattern, Sequence) or any(flag not in (0, 1) for flag in pattern):
            raise ValueError(f"config of 'mimo_v2_flash': hybrid_layer_pattern must hold 0 or 1, got {pattern}")
        values = {**values, "layer_types": ["sliding_attention" if flag else "full_attention" for flag in pattern]}
    if older and not (values.get("rope_parameters") or values.get("rope_scaling")):
        bases = {"full_attention": ("rope_theta", 5e6), "sliding_attention": ("swa_rope_theta", 1e4)}
        proportion = values.get("partial_rotary_factor", 0.334)
        entries = {
            kind: {"rope_theta": values.get(key, base), "partial_rotary_factor": proportion}
            for kind, (key, base) in bases.items()
        }
        values = {key: value for key, value in values.items() if key not in older} | {"rope_parameters": entries}
    return values


def lists_by_layer(values: Values, compat: bool) -> Values:
    """Step-3.5's own files: a base and a proportion for each layer, which agree within a layer type."""
    bases, proportions = values.get("rope_theta"), values.get("partial_rotary_factors")
    count, name = values.get("num_hidden_layers"), "config of 'step3p5'"
    listed = isinstance(bases, list) or isinstance(proportions, list)
    if not listed or not isinstance(count, int) or not 0 < count <= MOST_LAYERS:
        return values
    given_by_key = {"rope_theta": bases, "partial_rotary_factor": proportions}
    lists: dict[str, list] = {
        key: given if isinstance(given, list) else [given] * count for key, given in given_by_key.items()
    }
    types = values.get("layer_types") or ["full_attention"] * count
    for given in (types, *lists.values()):
        if not isinstance(given, list):
            raise ValueError(f"{name}: layer_types must be a list, got {given!r}")
        if len(given) < count:
            raise ValueError(f"{name}: lists by layer must have {count} entries, got {len(given)}")
    entries: dict[str, dict] = {}
    for i, kind in enumerate(types[:count]):  # layers beyond the model predict further tokens
        entry = {key: given[i] for key, given in lists.items() if given[i] is not None}
        if entries.setdefault(kind, entry) != entry:
            raise ValueError(f"{name}: layers of {kind!r} must rotate alike, got {entries[kind]} and {entry}")
    scaling, scaled = values.get("rope_scaling") or {}, values.get("yarn_only_types") or ["full_attention"]
    if not isinstance(scaled, list) or not isinstance(scaling, Mapping):
        raise ValueError(
            f"{name}: yarn_only_types must be a list and rope_scaling a dictionary, got {scaled}, {scaling}"
        )
    entries = {kind: {**entry, **(scaling if kind in scaled else {})} for kind, entry in entries.items()}
    read = ("rope_theta", "partial_rotary_factors", "rope_scaling", "yarn_only_types")
    values = {key: value for key, value in values.items() if key not in read}
    return {**values, "layer_types": types[:count], "rope_parameters": entries}


def twice_the_width(values: Values, compat: bool) -> Values:
    """Zamba2's attention reads the hidden state and the embedding: H is 2D/N if a config gives none."""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if values.get("attention_head_dim") is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        return {**values, "attention_head_dim": 2 * width // heads}
    return values


def key_of_bert(values: Values, compat: bool) -> Values:
    """ModernBERT's files keep a key of BERT's class, which its code does not read."""
    if values.get("position_embedding_type") != "absolute":
        return values
    return {key: value for key, value in values.items() if key != "position_embedding_type"}


def original_length_at_top(values: Values) -> Values:
    """Phi-3's config class has a default original length at the top, which counts before ``rope_parameters``."""
    name = "original_max_position_embeddings"
    entry = values.get("rope_parameters", {})
    return {**values, name: entry[name]} if entry.get("rope_type") == "longrope" else values
