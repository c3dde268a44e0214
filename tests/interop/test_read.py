"""Reading configs: released ones, where they come from, which are refused, and departures of transformers."""

import json
import pickle

import numpy as np
import pytest
from released import LLAMA3, LONG, RELEASED, SHORT, config_of

import rope_jax
from rope_jax import Rope, Standard
from rope_jax.interop.write import to_hf_config


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(name):
    config, layers = RELEASED[name]
    model_rope = rope_jax.from_hf_config(config)
    assert model_rope.layers == layers
    assert rope_jax.from_hf_config(to_hf_config(model_rope)) == model_rope


def test_the_vision_tower():
    tower = dict(depth=2, embed_dim=1280, num_heads=16, hidden_size=3584)
    rope = Rope(80, rope_jax.Axial(sizes=(40, 40), schedule=Standard()))
    for model_type in (None, "qwen2_vl", "qwen2_vl_vision"):  # older files
        config = config_of(
            "qwen2_vl", vision_config=tower | ({} if model_type is None else dict(model_type=model_type))
        )
        assert rope_jax.from_hf_config(config, part="vision").rope == rope
    assert rope_jax.from_hf_config(config).rope.schedule.axis_of_pair[:17] == (0,) * 16 + (1,)
    with pytest.raises(ValueError, match="config must have the key 'vision_config' for part='vision'"):
        rope_jax.from_hf_config(config_of("llama"), part="vision")
    with pytest.raises(ValueError, match="config must have the key 'audio_config' for part='audio'"):
        rope_jax.from_hf_config(config_of("llama"), part="audio")
    with pytest.raises(ValueError, match="part must be one of .*, got 'speech'"):
        rope_jax.from_hf_config(config_of("llama"), part="speech")


# --------------------------------------------------------------------------------------------------------- sources


def test_from_a_dictionary_a_file_a_folder_and_an_object(tmp_path):
    config = config_of("llama", rope_theta=5e5)
    (tmp_path / "config.json").write_text(json.dumps(config))

    class Config:
        def to_dict(self):
            return config

    model_ropes = [rope_jax.from_hf_config(c) for c in (config, tmp_path, str(tmp_path / "config.json"), Config())]
    assert len(set(model_ropes)) == 1
    assert model_ropes[0].rope == Rope(128, Standard(base=5e5))
    assert pickle.loads(pickle.dumps(model_ropes[0])) == model_ropes[0]
    assert "head_dim=128" in repr(model_ropes[0]) and "0-1" in repr(model_ropes[0])
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        rope_jax.from_hf_config(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="config must be a dictionary, a path or a config object, got int"):
        rope_jax.from_hf_config(7)


def test_the_config_is_not_changed():
    config = config_of("llama", rope_scaling=dict(LLAMA3), rope_theta=5e5)
    before = json.dumps(config)
    rope_jax.from_hf_config(config)
    assert json.dumps(config) == before


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be JSON: "):
        rope_jax.from_hf_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing is downloaded"):
        rope_jax.from_hf_config("Qwen/Qwen2.5-7B")


# ------------------------------------------------------------------------------------------------- refused configs


YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=4096)
REFUSED = {
    "no model type": (dict(num_hidden_layers=2), "config must have the key 'model_type'"),
    "unknown model type": (config_of("lama"), "model_type 'lama' is unknown; did you mean 'llama'?"),
    "no layers": (dict(model_type="llama", head_dim=8), "config of 'llama' must have the key 'num_hidden_layers'"),
    "no head": (dict(model_type="llama", num_hidden_layers=2), "config of 'llama' must have the key 'hidden_size'"),
    "misspelled key at the top": (
        config_of("llama", rope_theda=5e5),
        "config of 'llama' has an unknown key 'rope_theda' = 500000.0; did you mean 'rope_theta'?",
    ),
    "alpha in a family without it": (
        config_of("llama", max_position_embeddings=64, rope_scaling=dict(type="dynamic", alpha=8.0, factor=1.0)),
        "has an unknown key 'alpha' = 8.0; a key of HunYuan's dynamic scaling: like='hunyuan_v1_dense' reads it",
    ),
    "a misspelled head_dim": (
        config_of("qwen3", head_dimm=64),
        "an unknown key 'head_dimm' = 64; did you mean 'head_dim'?",
    ),
    "more than a rotation": (
        config_of("beam"),
        "does not say everything that its layers do with positions: queries grow",
    ),
    "dual chunks": (
        config_of("qwen2", dual_chunk_attention_config={"chunk_size": 4}),
        "'dual_chunk_attention_config'",
    ),
    "half a layer": (
        config_of("llama", num_hidden_layers=2.5),
        "num_hidden_layers must be an integer of at least 1, got 2.5",
    ),
    "no heads": (
        config_of("llama", num_attention_heads=0),
        "num_attention_heads must be an integer of at least 1, got 0",
    ),
    "heads that do not divide": (
        config_of("llama", hidden_size=4097),
        "hidden_size must be a multiple of num_attention_heads=32, got 4097",
    ),
    "head_dim as text": (config_of("llama", head_dim="x"), "head_dim must be an integer of at least 1, got 'x'"),
    "a proportion of 0": (
        config_of("gpt_neox", rotary_pct=0.0),
        "rotary_dim must be even, from 2 to head_dim=128, got 0",
    ),
    "a proportion as text": (
        config_of("gpt_neox", rotary_pct="0.5"),
        "partial_rotary_factor must be a number, got '0.5'",
    ),
    "rope parameters as text": (
        config_of("llama", rope_scaling="yarn"),
        "rope_scaling must be a dictionary, got 'yarn'",
    ),
    "layer_types as a number": (
        config_of("llama", layer_types=3),
        "layer_types must have an entry for each of 2 layers, got 3",
    ),
    "a misspelled layer type": (
        config_of("cohere2", layer_types=["slidng_attention", "full_attention"]),
        "layer_types must be sliding_attention or full_attention, got {'slidng_attention'}",
    ),
    "truncate as text": (
        config_of("llama", rope_scaling=dict(YARN, truncate="false")),
        "truncate must be true or false, got 'false'",
    ),
    "half a token": (
        config_of("llama", rope_scaling=dict(YARN, original_max_position_embeddings=64.5)),
        "original_max_position_embeddings must be an integer of at least 1, got 64.5",
    ),
    "four sections for three axes": (
        config_of("qwen2_vl", rope_scaling=dict(type="mrope", mrope_section=[16, 16, 16, 16])),
        "mrope_section must add up to R/2 = 64",
    ),
    "an unknown layer": (
        config_of("gemma3_text", per_layer_config={"9": {"head_dim": 64}}),
        "per_layer_config must name layers below 2, got '9'",
    ),
    "a hybrid without layer types": (
        config_of("minimax"),
        "config of 'minimax' must have the key 'layer_types'",
    ),
    "no_rope_layers as text": (
        config_of("smollm3", no_rope_layers=["0", "1"]),
        r"no_rope_layers must hold 0 or 1 for each layer, got \['0', '1'\]",
    ),
    "unknown scaled layers": (
        config_of("molmo2_text", rope_scaling_layers=[-1, 99]),
        r"rope_scaling_layers must name layers below 2, got \[-1, 99\]",
    ),
    "a negative factor of LongRoPE": (
        config_of(
            "phi3",
            hidden_size=3072,
            original_max_position_embeddings=4096,
            rope_scaling=dict(type="longrope", short_factor=SHORT, long_factor=LONG, factor=-3.0),
        ),
        "factor must be at least 1",
    ),
    "a key of another family": (
        config_of("llama", rotary_pct=0.25),
        "config of 'llama': rotary_pct must be 1.0 or None, got 0.25",
    ),
    "misspelled key in the rope parameters": (
        config_of("llama", rope_scaling=dict(YARN, beta_fats=24)),
        "rope_scaling has an unknown key 'beta_fats' = 24; did you mean 'beta_fast'?",
    ),
    "a key of another rope_type": (
        config_of("llama", rope_scaling=dict(rope_type="default", factor=4.0)),
        "rope_scaling has an unknown key 'factor' = 4.0",
    ),
    "unknown rope_type": (
        config_of("llama", rope_scaling=dict(rope_type="llama-3", factor=8.0)),
        r"rope_type must be one of \(.*\), got 'llama-3'; did you mean 'llama3'\?",
    ),
    "missing factor": (config_of("llama", rope_scaling=dict(type="linear")), "must have the key 'factor'"),
    "missing original length": (
        config_of("llama", rope_scaling=dict(type="yarn", factor=4.0)),
        "must have the key 'max_position_embeddings'",
    ),
    "missing llama3 bounds": (
        config_of("llama", max_position_embeddings=8192, rope_scaling=dict(rope_type="llama3", factor=8.0)),
        "must have the key 'low_freq_factor'",
    ),
    "missing long factors": (
        config_of("phi3", max_position_embeddings=8192, rope_scaling=dict(type="longrope", short_factor=SHORT)),
        "must have the key 'long_factor'",
    ),
    "long factors of another width": (
        config_of(
            "llama",
            max_position_embeddings=8192,
            rope_scaling=dict(
                type="longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=4096
            ),
        ),
        r"short_factor must have R/2 = 64 numbers for rotary_dim 128, got 48",
    ),
    "factor below 1": (
        config_of("llama", rope_scaling=dict(type="linear", factor=0.5)),
        "factor must be at least 1",
    ),
    "factor as text": (
        config_of("llama", rope_scaling=dict(type="linear", factor="4")),
        "factor must be a number, got '4'",
    ),
    "base as a list": (config_of("llama", rope_theta=[1e4, 1e6]), "rope_theta must be a number, got"),
    "two bases": (
        config_of("llama", rope_theta=1e4, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        "has two bases: rope_theta = 10000.0, and in rope_parameters 1000000.0",
    ),
    "two rope parameters": (
        config_of("llama", rope_scaling=dict(YARN), rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        "has synonymous keys with different values: {'rope_parameters'",
    ),
    "two rope_types": (
        config_of("llama", rope_scaling=dict(YARN, rope_type="linear")),
        "two names for its schedule: rope_type = 'linear', type = 'yarn'",
    ),
    "no rope parameters in a family whose default is more than a base": (
        config_of("gpt_oss"),
        "config of 'gpt_oss' must have rope_parameters, got None",
    ),
    "one rope for a family with one for each layer type": (
        config_of("gemma4_text", layer_types=["full_attention"] * 2, rope_theta=1e4),
        "config of 'gemma4_text' must have rope_parameters for each layer type, got None",
    ),
    "two different proportions": (
        config_of("gpt_neox", rotary_pct=0.25, partial_rotary_factor=0.5),
        "has synonymous keys with different values: {'partial_rotary_factor': 0.5, 'rotary_pct': 0.25}",
    ),
    "null for all layers": (config_of("llama", rope_parameters=None), "rope_parameters must not be null"),
    "no rope parameters for a layer type": (
        config_of(
            "laguna",
            layer_types=["full_attention", "other"],
            rope_parameters={"full_attention": {"rope_theta": 1e4}},
        ),
        r"rope_parameters must have an entry for 'other', got \['full_attention'\]",
    ),
    "flat and nested": (
        config_of("cwm", rope_parameters={"full_attention": {"rope_theta": 1e4}, "factor": 4.0}),
        "rope_parameters must be flat or by layer type, got both",
    ),
    "layer types too short": (
        config_of("cohere2", layer_types=["full_attention"]),
        "layer_types must have an entry for each of 2 layers, got 1",
    ),
    "no layer types in a family that needs them": (config_of("afmoe"), "must have the key 'layer_types'"),
    "odd rotary_dim": (
        config_of("gpt_neox", hidden_size=64 * 42, num_attention_heads=64, rotary_pct=0.5),
        "rotary_dim must be even, from 2 to head_dim=42, got 21",
    ),
    "sections that do not add up": (
        config_of("qwen2_vl", rope_scaling=dict(type="mrope", mrope_section=[16, 24, 20])),
        r"mrope_section must add up to R/2 = 64, got \[16, 24, 20\]",
    ),
    "sections in another order": (
        config_of("qwen2_vl", rope_scaling=dict(mrope_interleaved=True, mrope_section=[16, 24, 24])),
        "mrope_interleaved must be False in this family, got True",
    ),
    "rotated values": (config_of("roformer", rotary_value=True), "rotary_value must be False or None, got True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_configs(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        rope_jax.from_hf_config(config)


WRONG = ("x", -1, 2.5, float("nan"), True, [], ["a"], [[1]], {}, {"a": 1}, 10**13)


@pytest.mark.parametrize("name", RELEASED)
def test_a_wrong_value_is_a_value_error(name):
    """A key of another type is refused by the reader, or does not matter; nothing else is raised."""
    config = RELEASED[name][0]
    inside = [key for key, value in config.items() if isinstance(value, dict)]
    changed = [config | {key: value} for key in config for value in WRONG]
    changed += [
        config | {outer: config[outer] | {key: value}}
        for outer in inside
        for key in config[outer]
        for value in WRONG
    ]
    refused = 0
    for broken in changed:
        try:
            rope_jax.from_hf_config(broken)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(changed) / 4


def test_compat_must_be_known():
    with pytest.raises(ValueError, match=r"compat must be None or one of \('transformers',\), got 'vllm'"):
        rope_jax.from_hf_config(config_of("llama"), compat="vllm")


# -------------------------------------------------------------------------------------- departures of transformers


def both(config):
    return rope_jax.from_hf_config(config), rope_jax.from_hf_config(config, compat="transformers")


def test_a_proportion_counts_with_the_plain_rotation_too():
    ours, theirs = both(config_of("llama", partial_rotary_factor=0.5))
    assert (ours.rope.rotary_dim, theirs.rope.rotary_dim) == (64, None)
    ours, theirs = both(config_of("llama", partial_rotary_factor=0.5, rope_scaling=dict(type="linear", factor=2.0)))
    assert ours.rope.rotary_dim == theirs.rope.rotary_dim == 64


def test_truncate_counts_by_layer_type():
    entry = dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=4096, truncate=False
    )
    nested = config_of(
        "laguna", head_dim=128, layer_types=["full_attention"] * 2, rope_parameters={"full_attention": entry}
    )
    ours, theirs = both(nested)
    assert (ours.rope.schedule.truncate, theirs.rope.schedule.truncate) == (False, True)
    ours, theirs = both(config_of("qwen2", rope_parameters=entry))
    assert ours.rope.schedule.truncate is theirs.rope.schedule.truncate is False


def test_phimoe_uses_its_long_factors():
    ours, theirs = both(RELEASED["Phi-3.5-MoE"][0])
    at_4097 = [model_rope.rope.frequencies(4097) for model_rope in (ours, theirs)]
    np.testing.assert_allclose(at_4097[0].inv_freq * LONG, at_4097[1].inv_freq * SHORT, rtol=1e-15)
    assert at_4097[0].attention_factor == at_4097[1].attention_factor == 1.3


def test_rotary_dim_of_minimax_m3_counts():
    ours, theirs = both(config_of("minimax_m3_vl_text", head_dim=128, rotary_dim=64))
    assert (ours.rope.rotary_dim, theirs.rope.rotary_dim) == (64, None)


def test_hunyuan_vl_is_a_rotation():
    config = config_of("hunyuan_vl_text", rope_parameters=dict(rope_theta=1e4, mrope_section=[16, 16, 16, 16]))
    axis_of_pair = rope_jax.from_hf_config(config).rope.schedule.axis_of_pair
    assert axis_of_pair == sum(((axis,) * 16 for axis in range(4)), ())


def test_dbrx_base_and_compat():
    ours, theirs = both(RELEASED["DBRX"][0])
    assert (ours.rope.schedule.base, theirs.rope.schedule.base) == (5e5, 1e4)


@pytest.mark.parametrize(
    ("written", "dealt"), [([16, 24, 24], (22, 21, 21)), ([0, 32, 32], (22, 21, 21)), ([24, 20, 20], (24, 20, 20))]
)
def test_strided_sections_take_as_many_pairs_as_there_are(written, dealt):
    """transformers' `freqs[..., axis : 3 * section : 3]`, which ends with the pairs."""
    config = config_of(
        "qwen3_vl_text", rope_parameters=dict(rope_theta=5e6, rope_type="default", mrope_section=written)
    )
    axes = [0] * 64
    for axis in (1, 2):
        for pair in range(64)[axis : 3 * written[axis] : 3]:
            axes[pair] = axis
    rope = rope_jax.from_hf_config(config).layers[0].rope
    assert rope.schedule.sections == dealt and list(rope.schedule.axis_of_pair) == axes


def test_sections_without_entries_are_not_the_default():
    with pytest.raises(ValueError, match="mrope_section"):
        rope_jax.from_hf_config(config_of("qwen3_vl_text", rope_parameters=dict(rope_theta=5e6, mrope_section=[])))
