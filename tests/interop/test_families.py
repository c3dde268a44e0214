"""Every family against numbers of transformers, and the families' habits."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from golden import make_families
from golden.cases import frequency_error
from released import config_of

import rope_jax
from rope_jax import Rope, Standard
from rope_jax.interop.families import FAMILIES
from rope_jax.interop.write import to_hf_config

ROWS = json.loads(Path(__file__).parents[1].joinpath("golden").joinpath("families.json").read_text())["rows"]


# ----------------------------------------------------------------------------------------- numbers of transformers


def check_layer(layer, theirs):
    rope = layer.rope
    length = 1 if hasattr(rope.schedule, "context_length") else None
    frequencies = rope.frequencies(length)
    expected = np.array(theirs["inv_freq"])
    schedule, rotary_dim, sign = rope.schedule, 2 * rope.num_pairs, 1
    if isinstance(schedule, rope_jax.Negated):  # transformers negates the sine instead
        schedule, sign = schedule.schedule, -1
    ladder = rotary_dim
    axes = None
    if isinstance(schedule, rope_jax.Axial):
        ladder = schedule.sizes[0]
    if isinstance(schedule, rope_jax.Axial | rope_jax.Sections):
        axes, schedule = np.argmax(frequencies.inv_freq != 0, axis=0), schedule.schedule
        assert np.all(np.count_nonzero(frequencies.inv_freq, axis=0) <= 1)
    ours = sign * np.atleast_2d(frequencies.inv_freq).sum(axis=0)
    allowed = frequency_error(schedule, ladder, ours)
    if rope.layout == "interleaved" and axes is not None and axes[:2].tolist() == [1, 2]:
        # Ernie 4.5 VL keeps them in another order.
        ours, allowed = (np.concatenate([x[:44:2], x[1:44:2], x[44:]]) for x in (ours, allowed))
    kept = [0, 1, ours.size // 2, -1]  # by make_families
    assert np.all(np.abs(ours[kept] - expected) <= allowed[kept])

    x = make_families.query(rope.head_dim)
    at = jnp.asarray([theirs["position"]])
    rotated = rope.rotate(
        jnp.asarray(x)[None, None, None], rope.rotation(at[None], context_length=4 if length else None)
    )
    rotated = np.asarray(rotated).ravel()[make_families.features(rotary_dim, rope.head_dim)]
    # Positions up to 3, features up to 1: two products of features with cos and sin, off by 2e-7 + 3 * 2^-23.
    factor = rope.frequencies(4 if length else None).attention_factor
    np.testing.assert_allclose(
        rotated, theirs["turned"], rtol=0, atol=factor * 2 * (2e-7 + 3 * 2.0**-23 + 4 * oracles.EPS32)
    )
    assert layer.logit_factor == pytest.approx(theirs["logit_factor"], rel=1e-12)
    if theirs["attention_factor"] is not None:
        assert frequencies.attention_factor == pytest.approx(theirs["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_every_family_of_transformers(row):
    model_rope = rope_jax.from_hf_config(row["config"], compat="transformers")
    assert row["layers"]
    for layer, theirs in row["layers"].items():
        check_layer(model_rope.layers[int(layer)], theirs)
    compat = None if FAMILIES[model_rope.model_type].beyond is None else "transformers"
    assert rope_jax.from_hf_config(json.loads(json.dumps(to_hf_config(model_rope))), compat=compat) == model_rope


# -------------------------------------------------------------------- which layers rotate, and with which head_dim


SLIDING_ONLY = {
    "afmoe": {},
    "flint": {},
    "exaone4": dict(sliding_window=4096),
    "exaone_moe": dict(sliding_window=4096),
    "kolibri1": dict(sliding_window=513),
    "cohere2": dict(sliding_window=4096),
    "cohere2_moe": dict(mlp_layer_types=["sparse"] * 3),
}


@pytest.mark.parametrize("model_type", SLIDING_ONLY)
def test_families_whose_sliding_layers_alone_rotate(model_type):
    types = ["full_attention", "sliding_attention", "full_attention"]
    config = config_of(model_type, num_hidden_layers=3, layer_types=types, rope_parameters=dict(rope_theta=1e4))
    model_rope = rope_jax.from_hf_config(config | SLIDING_ONLY[model_type])
    assert [layer.rope is not None for layer in model_rope.layers] == [False, True, False]
    assert rope_jax.from_hf_config(to_hf_config(model_rope)) == model_rope


def test_lara_mini_rotates_its_sliding_layers_alone():
    types = ["full_attention", "sliding_attention", "linear_attention"]
    model_rope = rope_jax.from_hf_config(config_of("lara_mini", num_hidden_layers=3, layer_types=types))
    assert [layer.rope is not None for layer in model_rope.layers] == [False, True, False]


@pytest.mark.parametrize(
    "layer_types",
    [["mlp", "full_attention"], ["full_attention", "mlp", "full_attention"], ["full_attention", "mlp"] * 2],
)
def test_dory_lists_an_attention_and_an_mlp_for_each_layer(layer_types):
    count = 2 if len(layer_types) == 4 else len(layer_types)
    config = config_of("dory", num_hidden_layers=count, layer_types=layer_types)
    with pytest.raises(
        ValueError, match=f"'dory': layer_types must be {count} blocks, attention and 'mlp' by turns"
    ):
        rope_jax.from_hf_config(config)


def test_exaone_rotates_everywhere_without_a_window():
    for window in (dict(sliding_window=None), {}):
        model_rope = rope_jax.from_hf_config(config_of("exaone4", layer_types=["full_attention"] * 2, **window))
        assert model_rope.rope == Rope(128, Standard())
    model_rope = rope_jax.from_hf_config(
        config_of("exaone4", layer_types=["full_attention"] * 2, sliding_window=4096)
    )
    assert [layer.rope for layer in model_rope.layers] == [None, None]


def test_cohere2_moe_rotates_its_dense_layers_too():
    config = config_of("cohere2_moe", layer_types=["full_attention"] * 2, mlp_layer_types=["dense", "sparse"])
    assert [layer.rope is not None for layer in rope_jax.from_hf_config(config).layers] == [True, False]
    config["prefix_dense_sliding_window_pattern"] = 2
    assert [layer.rope is not None for layer in rope_jax.from_hf_config(config).layers] == [False, False]


@pytest.mark.parametrize(
    "config",
    [
        config_of("granitemoehybrid", position_embedding_type="nope", layer_types=["mamba", "attention"]),
        config_of("zamba2", use_mem_rope=False),
        config_of("esm", position_embedding_type="absolute"),
        config_of("falcon", alibi=True),
        config_of("gptj", rotary=False, rotary_dim=64),
        config_of("cohere2", layer_types=["full_attention"] * 2),
        config_of("smollm3", no_rope_layers=[0, 0]),
        config_of("qwen3_next", partial_rotary_factor=0.25),
        config_of("gemma3_text", layer_types=["conv"] * 2, rope_local_base_freq=1e4),
    ],
    ids=lambda config: config["model_type"],
)
def test_keys_of_a_rotation_that_is_switched_off_do_not_matter(config):
    for written in ({}, dict(rope_theta=1e4), dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))):
        model_rope = rope_jax.from_hf_config(config | written)
        assert [layer.rope for layer in model_rope.layers] == [None, None]
    with pytest.raises(ValueError, match="has an unknown key 'rope_theda'"):
        rope_jax.from_hf_config(config | dict(rope_theda=1e4))


def test_head_dim_of_full_attention():
    entries = dict(sliding_attention=dict(rope_theta=1e4), full_attention=dict(rope_theta=1e6))
    config = dict(
        model_type="gemma4_text",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=entries,
    )
    for given, wanted in [
        ({}, (256, 512)),
        (dict(head_dim=64, global_head_dim=128), (64, 128)),
        (dict(head_dim=64, per_layer_config={"1": {"head_dim": 32}}), (64, 32)),
        (dict(head_dim=64, per_layer_config={0: {"head_dim": 32}}), (32, 64)),
    ]:
        model_rope = rope_jax.from_hf_config(config | given)
        assert tuple(layer.rope.head_dim for layer in model_rope.layers) == wanted


# ---------------------------------------------------------------------------------------- required rope parameters


def test_families_whose_default_is_more_than_a_base_need_rope_parameters():
    explicit = {
        name
        for name, family in FAMILIES.items()
        if family.beyond is None and (family.explicit or (family.nested and not family.bases))
    }
    assert {"gpt_oss", "apertus", "cwm", "csm", "mistral4", "gemma4_text", "laguna"} <= explicit and len(
        explicit
    ) == 26
    for model_type in explicit:
        layers = dict(layer_types=["full_attention"] * 2, layer_rope_theta=[1e4, 0])
        config = config_of(model_type, head_dim=64, qk_rope_head_dim=64, **layers)
        with pytest.raises(ValueError, match="must have rope_parameters"):
            rope_jax.from_hf_config(config)
