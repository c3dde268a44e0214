"""Writes families.json: numbers of transformers for every model type. Needs torch and transformers.

python tests/golden/make_families.py

For each part of each folder: the config keys that we read, and for each label of its rope parameters a few
frequencies, the attention factor, and a few features of one query, rotated by its own apply function at position 3
(at 3, 2, 1, ... on several axes). The configs are the default of every part, the default without its keys of
rotation, and the perturbed ones of PERTURBED. Layers after the last new kind are left out.
"""

import copy
import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))


# One of each kind: flat, part of the head, interleaved, latent, by layer type, several axes, and special families.
PERTURBED = (
    "llama gpt_neox glm cohere2 deepseek_v3 gemma3_text gemma4_text laguna qwen2_vl_text qwen3_vl_text phi3 phimoe "
    "hunyuan_v1_dense"
).split()


ALWAYS = ("default config", "nothing said", "version 4")


def features(rotary_dim, head_dim):
    """The features of the rotated query that are kept: the ends of both halves, and the last of the head."""
    half = rotary_dim // 2
    return sorted({0, 1, 2, 3, half - 1, half, half + 1, rotary_dim - 1, head_dim - 1})


def query(head_dim):
    return np.sin(1.0 + np.arange(head_dim)).astype(np.float32)


def ask(census, cls, modeling, config_class, values):
    """The keys of a file that we read, and the numbers of transformers for the first layer of each kind."""
    import torch

    from rope_jax.interop import read

    configs: list = []

    class RecordedConfig(read.Config):
        def __init__(self, values, name):
            super().__init__(values, name)
            configs.append(self)

    original, read.Config = read.Config, RecordedConfig
    try:
        model_rope = read.from_hf_config(values, compat="transformers")
    finally:
        read.Config = original
    kept = {key: values[key] for key in ["model_type", *sorted(configs[0].read)] if values.get(key) is not None}

    config = census.from_file(config_class, values)
    module = cls(copy.deepcopy(config))
    apply, halves_out = census.apply_function(modeling, config)
    answers = {}
    for label, rope in census.ropes_by_label(model_rope, config).items():
        axes = rope.num_axes
        text_only = config.model_type == "hunyuan_vl_text"  # see from_hf_config
        at = [3] * axes if text_only else [3 - axis for axis in range(axes)]
        positions = np.array(at).reshape(axes, 1, 1) if axes > 1 else np.array([at])
        cos_sin = census.their_cos_sin(copy.deepcopy(module), positions, label)
        q = torch.tensor(query(rope.head_dim))[None, None, None]
        turned = census.turn(apply, q, cos_sin, 2 * rope.num_pairs)
        turned = turned.numpy().ravel()
        if halves_out:
            turned = turned.reshape(2, -1).T.ravel()
        name = "inv_freq" if label is None else f"{label}_inv_freq"
        inv_freq = getattr(module, name).numpy()
        factor = getattr(module, "attention_scaling" if label is None else f"{label}_attention_scaling")
        if "Phimoe" in cls.__name__:  # decides in each call; its turned query tells
            factor = None
        layer = next(i for i, layer in enumerate(model_rope.layers) if layer.rope == rope)
        answers[str(layer)] = dict(
            position=at if axes > 1 else at[0],
            inv_freq=[float(f"{f:.9g}") for f in inv_freq[[0, 1, len(inv_freq) // 2, -1]]],
            attention_factor=factor,
            logit_factor=modeling.yarn_apply_mscale(config.rope_parameters, 1.0)
            if hasattr(modeling, "yarn_apply_mscale")
            else 1.0,
            turned=[float(f"{turned[i]:.9g}") for i in features(2 * rope.num_pairs, rope.head_dim)],
        )
    return dict(config=shortened(kept, len(model_rope.layers), 1 + max(map(int, answers))), layers=answers)


def ask_axial(census, cls, modeling, config):
    """As :func:`ask`, at row 3 and column 2."""
    import torch

    import rope_jax

    values = {**config.to_dict(), "model_type": config.model_type}
    layers = rope_jax.from_hf_config(values, compat="transformers").layers
    layer, rope = next((i, layer.rope) for i, layer in enumerate(layers) if layer.rope is not None)
    keys = "model_type num_hidden_layers depth hidden_size embed_dim num_attention_heads num_heads rope_parameters"
    kept = {key: values[key] for key in [*keys.split(), "layer_types"] if values.get(key) is not None}
    module = cls(copy.deepcopy(config))
    q = torch.tensor(query(rope.head_dim))[None, None]
    with torch.no_grad():
        cos_sin = census.their_cos_sin(module, np.array([[3, 2]]), None)
        turned = modeling.apply_rotary_pos_emb_vision(q, q, *cos_sin)[0].numpy().ravel()
    inv_freq = np.tile(module.inv_freq.numpy(), 2)
    answer = dict(
        position=[3, 2],
        inv_freq=[float(f"{f:.9g}") for f in inv_freq[[0, 1, len(inv_freq) // 2, -1]]],
        attention_factor=1.0,
        logit_factor=1.0,
        turned=[float(f"{turned[i]:.9g}") for i in features(2 * rope.num_pairs, rope.head_dim)],
    )
    return dict(config=shortened(kept, len(layers), layer + 1), layers={str(layer): answer})


def shortened(config, layers, count):
    """The config of the first layers only."""
    blocks = 2 if "mlp" in config.get("layer_types", ()) else 1  # for each layer: see Dory
    layers, count = blocks * layers, blocks * count
    short = {
        key: value[:count] if isinstance(value, list) and len(value) == layers else value
        for key, value in config.items()
        if key != "per_layer_config"
    }
    if "per_layer_config" in config:
        own = config["per_layer_config"].items()
        short["per_layer_config"] = {str(i): value for i, value in own if int(i) < count}
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_num_hidden_layers"):
        if key in short:
            short[key] = count
    return short


def main():
    import census
    import torch
    import transformers

    from rope_jax.interop.families import FAMILIES

    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    rows = []
    for _, modeling, cls, config, axial in census.described():
        if axial:
            row = ask_axial(census, cls, modeling, config)
            rows.append(json.dumps(dict(name=config.model_type, **row)))
            continue
        files = dict(census.variants(config))
        for name, results in census.examine(cls, modeling, config).items():
            wanted = name in ALWAYS or config.model_type in PERTURBED
            if FAMILIES[config.model_type].logit_factor and name == "yarn, mscale":
                wanted = True
            if isinstance(results, str) or not wanted:
                continue
            row = ask(census, cls, modeling, type(config), files[name])
            rows.append(json.dumps(dict(name=f"{config.model_type}, {name}", **row)))
    rows = list(dict.fromkeys(rows))
    versions = json.dumps(dict(transformers=transformers.__version__, torch=torch.__version__))
    text = f'{{"versions": {versions},\n"rows": [\n' + ",\n".join(rows) + "\n]}\n"
    json.loads(text)
    Path(__file__).with_name("families.json").write_text(text)


if __name__ == "__main__":
    main()
