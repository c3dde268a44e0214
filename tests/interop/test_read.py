"""What a config.json says: against transformers' own numbers, and against recipes written out by hand."""

import dataclasses
import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from golden import make_families
from golden.cases import frequency_error
from schedules import CASES, IDS, ROTARY_DIM

import rope_jax
from rope_jax import DynamicNTK, Linear, Llama3, LongRope, NTKAware, Proportional, Rope, Standard, Yarn
from rope_jax.interop.families import FAMILIES
from rope_jax.interop.model_rope import LayerRope

ROWS = json.loads(Path(__file__).parents[1].joinpath("golden").joinpath("families.json").read_text())["rows"]


# ----------------------------------------------------------------------------------- transformers' own numbers


def check_layer(layer, theirs):
    rope = layer.rope
    length = 1 if hasattr(rope.schedule, "context_length") else None
    frequencies = rope.frequencies(length)
    expected = np.array(theirs["inv_freq"])
    schedule, rotary_dim, sign = rope.schedule, 2 * rope.num_pairs, 1
    if isinstance(schedule, rope_jax.Negated):  # theirs is turned back later
        schedule, sign = schedule.schedule, -1
    ladder = rotary_dim
    if isinstance(schedule, rope_jax.Axial):
        schedule, ladder = schedule.schedule, rotary_dim // schedule.num_axes
    ours = sign * frequencies.inv_freq
    allowed = frequency_error(schedule, ladder, ours)
    if rope.layout == "interleaved" and rope.axes is not None and rope.axes[:2] == (1, 2):
        # Ernie 4.5 VL keeps them in another order.
        ours, allowed = (np.concatenate([x[:44:2], x[1:44:2], x[44:]]) for x in (ours, allowed))
    kept = [0, 1, ours.size // 2, -1]
    assert np.all(np.abs(ours[kept] - expected) <= allowed[kept])

    x = make_families.query(rope.head_dim)
    at = jnp.asarray([theirs["position"]])
    turned = rope.rotate(
        jnp.asarray(x)[None, None, None], rope.rotation(at[None], context_length=4 if length else None)
    )
    turned = np.asarray(turned).ravel()[make_families.features(rotary_dim, rope.head_dim)]
    # Positions up to 3 and features up to 1: two products, of cos and sin off by 2e-7 and 3 * 2^-23.
    factor = rope.frequencies(4 if length else None).attention_factor
    np.testing.assert_allclose(
        turned, theirs["turned"], rtol=0, atol=factor * 2 * (2e-7 + 3 * 2.0**-23 + 4 * oracles.EPS32)
    )
    assert layer.logit_factor == pytest.approx(theirs["logit_factor"], rel=1e-12)
    if theirs["attention_factor"] is not None:
        assert frequencies.attention_factor == pytest.approx(theirs["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_every_family_of_transformers(row):
    recipe = rope_jax.from_hf_config(row["config"], compat="transformers")
    assert row["layers"]
    for layer, theirs in row["layers"].items():
        check_layer(recipe.layers[int(layer)], theirs)
    compat = None if FAMILIES[recipe.model_type].beyond is None else "transformers"
    assert (
        rope_jax.from_hf_config(json.loads(json.dumps(rope_jax.interop.to_hf_config(recipe))), compat=compat)
        == recipe
    )


# ------------------------------------------------------------------------ released configs, written out by hand


def config_of(model_type, **keys):
    """What every config has, for a small model of two layers."""
    return dict(model_type=model_type, num_hidden_layers=2, hidden_size=4096, num_attention_heads=32) | keys


def every(rope, count=2, **fields):
    return (LayerRope(rope, **fields),) * count


LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3"
)
SHORT, LONG = [1.0 + 0.1 * i for i in range(48)], [1.0 + i for i in range(48)]
YARN_DEEPSEEK = dict(
    beta_fast=32,
    beta_slow=1,
    factor=40,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=4096,
    type="yarn",
)
G = (0.1 * np.log(40.0) + 1.0) ** 2  # DeepSeek-V2's factor of the scores, at mscale_all_dim = 1

RELEASED = {
    "Llama 2": (config_of("llama", rope_scaling=None), every(Rope(128, Standard()))),
    "CodeLlama": (config_of("llama", rope_theta=1000000), every(Rope(128, Standard(base=1e6)))),
    "LongChat": (
        config_of("llama", rope_scaling={"type": "linear", "factor": 8.0}),
        every(Rope(128, Linear(factor=8.0))),
    ),
    "Llama 3.1": (
        config_of("llama", rope_theta=500000.0, rope_scaling=LLAMA3, max_position_embeddings=131072),
        every(Rope(128, Llama3(factor=8.0, original_length=8192))),
    ),
    "SmolLM2": (config_of("llama", rope_interleaved=False, rope_theta=1e5), every(Rope(128, Standard(base=1e5)))),
    "Yarn-Llama-2": (
        config_of(
            "llama",
            rope_scaling=dict(factor=16.0, original_max_position_embeddings=4096, type="yarn", finetuned=True),
        ),
        every(Rope(128, Yarn(factor=16.0, original_length=4096))),
    ),
    "Command R7B": (
        config_of(
            "cohere2",
            num_hidden_layers=1,
            rope_theta=50000,
            rotary_pct=1.0,
            sliding_window=4096,
            sliding_window_pattern=4,
        ),
        every(Rope(128, Standard(base=5e4), layout="interleaved"), 1, type="sliding_attention"),
    ),
    "DBRX": (
        dict(
            model_type="dbrx",
            n_layers=2,
            d_model=6144,
            n_heads=48,
            max_seq_len=32768,
            attn_config=dict(rope_theta=500000),
        ),
        every(Rope(128, Standard(base=5e5))),
    ),
    "LFM2": (
        config_of("lfm2", hidden_size=2048, rope_theta=1e6, theta=1e6, full_attn_idxs=[1]),
        (LayerRope(None, "linear_attention"), LayerRope(Rope(64, Standard(base=1e6)), "full_attention")),
    ),
    "EXAONE 4.0": (
        config_of(
            "exaone4", num_hidden_layers=4, sliding_window=4096, sliding_window_pattern="LLLG", rope_theta=1e6
        ),
        (
            *every(Rope(128, Standard(base=1e6)), 3, type="sliding_attention"),
            LayerRope(None, "full_attention"),
        ),
    ),
    "Nomic": (
        config_of(
            "nomic_bert",
            hidden_size=768,
            num_attention_heads=12,
            rotary_emb_base=1000,
            rotary_emb_fraction=1.0,
            rotary_emb_interleaved=False,
            rotary_emb_scale_base=None,
        ),
        every(Rope(64, Standard(base=1e3))),
    ),
    "Qwen3 without its head_dim": (config_of("qwen3", hidden_size=1024), every(Rope(128, Standard()))),
    "GPT-J without its rotary_dim": (
        dict(model_type="gptj", n_layer=2, n_embd=4096, n_head=16),
        every(Rope(256, Standard(), rotary_dim=64, layout="interleaved")),
    ),
    "Molmo 2, scaled in part": (
        config_of("molmo2_text", rope_scaling_layers=[1], rope_scaling=dict(rope_type="linear", factor=2.0)),
        (LayerRope(Rope(128, Standard())), LayerRope(Rope(128, Linear(factor=2.0)))),
    ),
    "Llama 3.2, v5": (
        config_of("llama", head_dim=64, rope_parameters=dict(LLAMA3, rope_theta=5e5, factor=32.0)),
        every(Rope(64, Llama3(factor=32.0, original_length=8192))),
    ),
    "Qwen2.5 with YaRN": (
        config_of(
            "qwen2",
            rope_theta=1000000.0,
            rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn"),
        ),
        every(Rope(128, Yarn(factor=4.0, original_length=32_768, base=1e6))),
    ),
    "YaRN without the original length": (
        config_of("qwen2", rope_scaling=dict(factor=4.0, type="yarn"), max_position_embeddings=32768),
        every(Rope(128, Yarn(factor=4.0, original_length=32_768))),
    ),
    "YaRN with a null factor": (
        config_of(
            "qwen3",
            max_position_embeddings=131072,
            rope_scaling=dict(factor=None, original_max_position_embeddings=32768, type="yarn"),
        ),
        every(Rope(128, Yarn(factor=4.0, original_length=32_768))),
    ),
    "InternLM, dynamic": (
        config_of("llama", max_position_embeddings=4096, rope_scaling=dict(type="dynamic", factor=2.0)),
        every(Rope(128, DynamicNTK(factor=2.0, original_length=4096))),
    ),
    "HunYuan, alpha": (
        config_of(
            "hunyuan_v1_moe",
            head_dim=128,
            rope_scaling=dict(
                alpha=1000.0, beta_fast=32, beta_slow=1, factor=1.0, mscale=1.0, mscale_all_dim=1.0, type="dynamic"
            ),
        ),
        every(Rope(128, NTKAware(factor=1000.0))),
    ),
    "GPT-NeoX": (
        config_of("gpt_neox", rotary_pct=0.25, rotary_emb_base=10000),
        every(Rope(128, Standard(), rotary_dim=32)),
    ),
    "GPT-J": (
        dict(model_type="gptj", n_layer=2, n_embd=4096, n_head=16, rotary_dim=64, rotary=True),
        every(Rope(256, Standard(), rotary_dim=64, layout="interleaved")),
    ),
    "StableLM": (
        config_of("stablelm", partial_rotary_factor=0.25, rope_theta=10000),
        every(Rope(128, Standard(), rotary_dim=32)),
    ),
    "MiniMax-M2": (
        config_of("minimax_m2", head_dim=128, rotary_dim=64, rope_theta=5000000),
        every(Rope(128, Standard(base=5e6), rotary_dim=64)),
    ),
    "GLM-4": (
        config_of("glm4", head_dim=128, partial_rotary_factor=0.5, rope_theta=10000.0),
        every(Rope(128, Standard(), rotary_dim=64, layout="interleaved")),
    ),
    "Falcon": (config_of("falcon", hidden_size=2048, alibi=False), every(Rope(64, Standard()))),
    "Falcon RW": (config_of("falcon", hidden_size=2048, alibi=True), every(None)),
    "Phi-3 mini 128k": (
        config_of(
            "phi3",
            hidden_size=3072,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling=dict(type="longrope", short_factor=SHORT, long_factor=LONG),
        ),
        every(Rope(96, LongRope(short_factor=SHORT, long_factor=LONG, original_length=4096, factor=32.0))),
    ),
    "Phi-3, its first name": (
        config_of(
            "phi3",
            hidden_size=3072,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling=dict(type="su", short_factor=SHORT, long_factor=LONG),
        ),
        every(Rope(96, LongRope(short_factor=SHORT, long_factor=LONG, original_length=4096, factor=32.0))),
    ),
    "Phi-3, its other first name": (
        config_of(
            "phi3",
            hidden_size=3072,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling=dict(type="yarn", short_factor=SHORT, long_factor=LONG),
        ),
        every(Rope(96, LongRope(short_factor=SHORT, long_factor=LONG, original_length=4096, factor=32.0))),
    ),
    "Phi-3.5-MoE": (
        config_of(
            "phimoe",
            hidden_size=3072,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_theta=10000.0,
            rope_scaling=dict(
                type="longrope", short_factor=SHORT, long_factor=LONG, short_mscale=1.1, long_mscale=1.3
            ),
        ),
        every(
            Rope(
                96,
                LongRope(
                    short_factor=SHORT,
                    long_factor=LONG,
                    original_length=4096,
                    factor=32.0,
                    attention_factor=1.1,
                    long_attention_factor=1.3,
                ),
            )
        ),
    ),
    "DeepSeek-V3": (
        config_of(
            "deepseek_v3", qk_rope_head_dim=64, qk_nope_head_dim=128, rope_theta=10000, rope_scaling=YARN_DEEPSEEK
        ),
        every(
            Rope(
                64,
                Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
                layout="interleaved",
            ),
            logit_factor=G,
        ),
    ),
    "a DeepSeek-V3 with halves": (
        config_of("deepseek_v3", qk_rope_head_dim=64, rope_interleave=False),
        every(Rope(64, Standard())),
    ),
    "gpt-oss": (
        config_of(
            "gpt_oss",
            head_dim=64,
            rope_theta=150000,
            layer_types=["sliding_attention", "full_attention"],
            initial_context_length=4096,
            rope_scaling=dict(
                beta_fast=32.0,
                beta_slow=1.0,
                factor=32.0,
                original_max_position_embeddings=4096,
                rope_type="yarn",
                truncate=False,
            ),
        ),
        tuple(
            LayerRope(Rope(64, Yarn(factor=32.0, original_length=4096, base=1.5e5, truncate=False)), type)
            for type in ("sliding_attention", "full_attention")
        ),
    ),
    "SmolLM3": (
        config_of("smollm3", num_hidden_layers=4, rope_theta=5000000.0, no_rope_layers=[1, 1, 1, 0]),
        (*every(Rope(128, Standard(base=5e6)), 3), LayerRope(None)),
    ),
    "Gemma 3, v4": (
        config_of(
            "gemma3_text",
            num_hidden_layers=6,
            head_dim=256,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            sliding_window_pattern=6,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
        ),
        (
            *every(Rope(256, Standard()), 5, type="sliding_attention"),
            LayerRope(Rope(256, Linear(factor=8.0, base=1e6)), "full_attention"),
        ),
    ),
    "Gemma 3 4b with pictures": (
        dict(
            model_type="gemma3",
            vision_config=dict(model_type="siglip_vision_model"),
            text_config=dict(model_type="gemma3_text", num_hidden_layers=1, hidden_size=2560),
        ),
        every(Rope(256, Standard()), 1, type="sliding_attention"),
    ),
    "Gemma 4, v5": (
        config_of(
            "gemma4_text",
            head_dim=256,
            global_head_dim=512,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
                full_attention=dict(rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.25),
            ),
        ),
        (
            LayerRope(Rope(256, Standard()), "sliding_attention"),
            LayerRope(Rope(512, Proportional(proportion=0.25, base=1e6)), "full_attention"),
        ),
    ),
    "ModernBERT, v4": (
        config_of(
            "modernbert",
            hidden_size=768,
            num_attention_heads=12,
            num_hidden_layers=4,
            global_rope_theta=160000.0,
            local_rope_theta=10000.0,
            global_attn_every_n_layers=3,
        ),
        (
            LayerRope(Rope(64, Standard(base=1.6e5)), "full_attention"),
            *every(Rope(64, Standard()), 2, type="sliding_attention"),
            LayerRope(Rope(64, Standard(base=1.6e5)), "full_attention"),
        ),
    ),
    "Cohere 2, v4": (
        config_of("cohere2", num_hidden_layers=4, rope_theta=50000, sliding_window=4096, sliding_window_pattern=4),
        (
            *every(Rope(128, Standard(base=5e4), layout="interleaved"), 3, type="sliding_attention"),
            LayerRope(None, "full_attention"),
        ),
    ),
    "Llama 4 Scout": (
        config_of(
            "llama4_text",
            head_dim=128,
            rope_theta=500000.0,
            no_rope_layers=[1, 0],
            attn_temperature_tuning=4,
            floor_scale=8192,
            attn_scale=0.1,
            rope_scaling=dict(LLAMA3, factor=16.0, high_freq_factor=1.0),
        ),
        (
            LayerRope(
                Rope(128, Llama3(factor=16.0, original_length=8192, high_freq_factor=1.0), layout="interleaved")
            ),
            LayerRope(None, query_temperature=rope_jax.interop.QueryTemperature(beta=0.1, period=8192, offset=1)),
        ),
    ),
    "Ministral 3": (
        config_of(
            "ministral3",
            head_dim=128,
            rope_parameters=dict(
                rope_type="yarn",
                type="yarn",
                rope_theta=1e6,
                factor=16.0,
                original_max_position_embeddings=16384,
                max_position_embeddings=262144,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.1,
            ),
        ),
        every(
            Rope(128, Yarn(factor=16.0, original_length=16_384, base=1e6, mscale=1.0, mscale_all_dim=1.0)),
            query_temperature=rope_jax.interop.QueryTemperature(beta=0.1, period=16_384),
        ),
    ),
    "Qwen2-VL, v4": (
        config_of("qwen2_vl", rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24])),
        every(Rope(128, Standard(base=1e6), axes=(0,) * 16 + (1,) * 24 + (2,) * 24)),
    ),
    "Qwen2.5-VL, v4": (
        config_of("qwen2_5_vl", rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24])),
        every(Rope(128, Standard(base=1e6), axes=(0,) * 16 + (1,) * 24 + (2,) * 24)),
    ),
    "Qwen2-VL, nothing said": (
        config_of("qwen2_vl"),
        every(Rope(128, Standard(base=1e6), axes=(0,) * 16 + (1,) * 24 + (2,) * 24)),
    ),
    "Qwen2.5-VL, nothing said": (
        config_of("qwen2_5_vl"),
        every(Rope(128, Standard(base=1e6), axes=(0,) * 16 + (1,) * 24 + (2,) * 24)),
    ),
    "Qwen3-Next, v4": (
        config_of(
            "qwen3_next",
            num_hidden_layers=4,
            head_dim=256,
            rope_theta=1e7,
            partial_rotary_factor=0.25,
            full_attention_interval=4,
        ),
        (
            *every(None, 3, type="linear_attention"),
            LayerRope(Rope(256, Standard(base=1e7), rotary_dim=64), "full_attention"),
        ),
    ),
    "Qwen3-VL": (
        dict(
            model_type="qwen3_vl",
            text_config=config_of(
                "qwen3_vl_text",
                head_dim=128,
                rope_theta=5000000,
                rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
            ),
        ),
        every(Rope(128, Standard(base=5e6), axes=(0, 1, 2) * 20 + (0,) * 4)),
    ),
    "Ernie 4.5 VL": (
        config_of("ernie4_5_vl_moe_text", head_dim=128, rope_theta=500000),
        every(Rope(128, Standard(base=5e5), layout="interleaved", axes=(1, 2) * 22 + (0,) * 20)),
    ),
    "GPT-NeoX, later in v4": (
        config_of("gpt_neox", rotary_pct=0.25, rotary_emb_base=10000, rope_theta=10000, partial_rotary_factor=0.25),
        every(Rope(128, Standard(), rotary_dim=32)),
    ),
    "CodeGen": (
        dict(model_type="codegen", n_layer=2, n_embd=1024, n_head=16, rotary_dim=32),
        every(Rope(64, Standard(), rotary_dim=32, layout="interleaved")),
    ),
    "RoFormer": (
        config_of("roformer", hidden_size=768, num_attention_heads=12, rotary_value=False),
        every(Rope(64, Standard(), layout="interleaved")),
    ),
    "ESM-2": (
        config_of("esm", hidden_size=320, num_attention_heads=20, position_embedding_type="rotary"),
        every(Rope(16, Standard())),
    ),
    "ESM-1b": (config_of("esm", position_embedding_type="absolute"), every(None)),
    "Granite 4 hybrid": (
        config_of("granitemoehybrid", position_embedding_type="nope", layer_types=["mamba", "attention"]),
        (LayerRope(None, "mamba"), LayerRope(None, "attention")),
    ),
    "Granite 4, rotating": (
        config_of("granitemoehybrid", position_embedding_type="rope", layer_types=["mamba", "attention"]),
        (LayerRope(None, "mamba"), LayerRope(Rope(128, Standard()), "attention")),
    ),
    "DeepSeek-V4, first file": (
        config_of(
            "deepseek_v4",
            head_dim=512,
            qk_rope_head_dim=64,
            rope_theta=10000,
            compress_rope_theta=160000,
            layer_types=["sliding_attention", "compressed_sparse_attention"],
            rope_scaling=dict(
                type="yarn", factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1
            ),
        ),
        (
            LayerRope(Rope(64, Standard(), layout="interleaved"), "sliding_attention"),
            LayerRope(
                Rope(
                    64,
                    Yarn(factor=16.0, original_length=65_536, base=1.6e5, attention_factor=1.0),
                    layout="interleaved",
                ),
                "compressed_sparse_attention",
            ),
        ),
    ),
    "HunYuan dense, alpha": (
        config_of(
            "hunyuan_v1_dense",
            head_dim=128,
            rope_scaling=dict(alpha=1000.0, beta_fast=32, factor=1.0, type="dynamic"),
        ),
        every(Rope(128, NTKAware(factor=1000.0))),
    ),
    "HunYuan-VL": (
        config_of(
            "hunyuan_vl_text",
            head_dim=128,
            rope_scaling=dict(alpha=1000.0, beta_fast=32, factor=1.0, type="xdrope", xdrope_section=[16] * 4),
        ),
        every(Rope(128, NTKAware(factor=1000.0), axes=tuple(i // 16 for i in range(64)))),
    ),
    "nanochat": (config_of("nanochat"), every(Rope(128, rope_jax.Negated(schedule=Standard())))),
    "Zamba2": (config_of("zamba2", use_mem_rope=False, attention_head_dim=160), every(None)),
    "OLMo hybrid": (config_of("olmo_hybrid", rope_parameters=None), every(None)),
}


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
    recipe = rope_jax.from_hf_config(config | SLIDING_ONLY[model_type])
    assert [layer.rope is not None for layer in recipe.layers] == [False, True, False]
    assert rope_jax.from_hf_config(rope_jax.interop.to_hf_config(recipe)) == recipe


def test_exaone_rotates_everywhere_without_a_window():
    for window in (dict(sliding_window=None), {}):
        recipe = rope_jax.from_hf_config(config_of("exaone4", layer_types=["full_attention"] * 2, **window))
        assert recipe.rope == Rope(128, Standard())
    recipe = rope_jax.from_hf_config(config_of("exaone4", layer_types=["full_attention"] * 2, sliding_window=4096))
    assert [layer.rope for layer in recipe.layers] == [None, None]


def test_cohere2_moe_rotates_its_dense_layers_too():
    config = config_of("cohere2_moe", layer_types=["full_attention"] * 2, mlp_layer_types=["dense", "sparse"])
    assert [layer.rope is not None for layer in rope_jax.from_hf_config(config).layers] == [True, False]
    config["prefix_dense_sliding_window_pattern"] = 2
    assert [layer.rope is not None for layer in rope_jax.from_hf_config(config).layers] == [False, False]


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(name):
    config, layers = RELEASED[name]
    recipe = rope_jax.from_hf_config(config)
    assert recipe.layers == layers
    assert rope_jax.from_hf_config(rope_jax.interop.to_hf_config(recipe)) == recipe


# ---------------------------------------------------------------------------------------- where it is read from


def test_from_a_dictionary_a_file_a_folder_and_an_object(tmp_path):
    config = config_of("llama", rope_theta=5e5)
    (tmp_path / "config.json").write_text(json.dumps(config))

    class Config:
        def to_dict(self):
            return config

    recipes = [rope_jax.from_hf_config(c) for c in (config, tmp_path, str(tmp_path / "config.json"), Config())]
    assert len(set(recipes)) == 1
    assert recipes[0].rope == Rope(128, Standard(base=5e5))
    assert pickle.loads(pickle.dumps(recipes[0])) == recipes[0]
    assert "head_dim=128" in repr(recipes[0]) and "0-1" in repr(recipes[0])
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        rope_jax.from_hf_config(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="config must be a dictionary, a path or a config object, got int"):
        rope_jax.from_hf_config(7)


def test_the_config_is_not_changed():
    config = config_of("llama", rope_scaling=dict(LLAMA3), rope_theta=5e5)
    before = json.dumps(config)
    rope_jax.from_hf_config(config)
    assert json.dumps(config) == before


def test_layers_that_are_alike_share_one_rope():
    smollm = rope_jax.from_hf_config(config_of("smollm3", num_hidden_layers=8))
    assert len({id(layer) for layer in smollm.layers}) == 2
    gemma = rope_jax.from_hf_config(config_of("gemma3_text", num_hidden_layers=12, rope_theta=1e4))
    assert len({layer.rope for layer in gemma.layers}) == 1 and len(set(gemma.layers)) == 2
    assert len({id(layer.rope) for layer in gemma.layers}) == 1
    with pytest.raises(ValueError, match=r"rope is for models whose layers are all alike"):
        _ = smollm.rope


# ------------------------------------------------------------------------------------------------ what is refused

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
    "alpha where it is nobody's": (
        config_of("llama", max_position_embeddings=64, rope_scaling=dict(type="dynamic", alpha=8.0, factor=1.0)),
        "has an unknown key 'alpha' = 8.0; remove the key if it does not change the computation",
    ),
    "a misspelled head_dim": (
        config_of("qwen3", head_dimm=64),
        "an unknown key 'head_dimm' = 64; did you mean 'head_dim'?",
    ),
    "what a recipe cannot express": (
        config_of("beam"),
        "does not say everything that its layers do with positions: queries grow",
    ),
    "dual chunks": (
        config_of("qwen2", dual_chunk_attention_config={"chunk_size": 4}),
        "'dual_chunk_attention_config'",
    ),
    "layers by halves": (
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
    "a share of nothing": (
        config_of("gpt_neox", rotary_pct=0.0),
        "rotary_dim must be even, from 2 to head_dim=128, got 0",
    ),
    "a share as text": (
        config_of("gpt_neox", rotary_pct="0.5"),
        "partial_rotary_factor must be a number, got '0.5'",
    ),
    "a recipe as text": (config_of("llama", rope_scaling="yarn"), "rope_scaling must be a dictionary, got 'yarn'"),
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
    "a length by halves": (
        config_of("llama", rope_scaling=dict(YARN, original_max_position_embeddings=64.5)),
        "original_max_position_embeddings must be an integer of at least 1, got 64.5",
    ),
    "four sections for three axes": (
        config_of("qwen2_vl", rope_scaling=dict(type="mrope", mrope_section=[16, 16, 16, 16])),
        "mrope_section must add up to R/2 = 64",
    ),
    "a layer that is not there": (
        config_of("gemma3_text", per_layer_config={"9": {"head_dim": 64}}),
        "per_layer_config must name layers below 2, got '9'",
    ),
    "a hybrid that does not say which": (
        config_of("minimax"),
        "config of 'minimax' must have the key 'layer_types'",
    ),
    "no_rope_layers as text": (
        config_of("smollm3", no_rope_layers=["0", "1"]),
        r"no_rope_layers must hold 0 or 1 for each layer, got \['0', '1'\]",
    ),
    "scaled layers that are not there": (
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
    "misspelled key in the recipe": (
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
    "two recipes": (
        config_of("llama", rope_scaling=dict(YARN), rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        "has synonymous keys with different values: {'rope_parameters'",
    ),
    "two rope_types": (
        config_of("llama", rope_scaling=dict(YARN, rope_type="linear")),
        "two names for its schedule: rope_type = 'linear', type = 'yarn'",
    ),
    "nothing said where the family's own recipe is more than a base": (
        config_of("gpt_oss"),
        "config of 'gpt_oss' must have rope_parameters, got None",
    ),
    "one recipe where each layer type has its own": (
        config_of("gemma4_text", layer_types=["full_attention"] * 2, rope_theta=1e4),
        "config of 'gemma4_text' must have rope_parameters for each layer type, got None",
    ),
    "two names of a share that differ": (
        config_of("gpt_neox", rotary_pct=0.25, partial_rotary_factor=0.5),
        "has synonymous keys with different values: {'partial_rotary_factor': 0.5, 'rotary_pct': 0.25}",
    ),
    "null for all layers": (config_of("llama", rope_parameters=None), "rope_parameters must not be null"),
    "no recipe for a layer type": (
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
    "no layer types where they count": (config_of("afmoe"), "must have the key 'layer_types'"),
    "odd rotary_dim": (
        config_of("gpt_neox", hidden_size=64 * 42, num_attention_heads=64, rotary_pct=0.5),
        "rotary_dim must be even, from 2 to head_dim=42, got 21",
    ),
    "sections that do not add up": (
        config_of("qwen2_vl", rope_scaling=dict(type="mrope", mrope_section=[16, 24, 20])),
        r"mrope_section must add up to R/2 = 64, got \[16, 24, 20\]",
    ),
    "sections dealt another way": (
        config_of("qwen2_vl", rope_scaling=dict(mrope_interleaved=True, mrope_section=[16, 24, 24])),
        "mrope_interleaved must be False in this family, got True",
    ),
    "values that turn": (config_of("roformer", rotary_value=True), "rotary_value must be False or None, got True"),
}


def test_a_family_whose_own_recipe_is_more_than_a_base_must_say_it():
    must = {
        name
        for name, family in FAMILIES.items()
        if family.beyond is None and (family.explicit or (family.nested and not family.bases))
    }
    assert {"gpt_oss", "apertus", "cwm", "csm", "mistral4", "gemma4_text", "laguna"} <= must and len(must) == 25
    for model_type in must:
        layers = dict(layer_types=["full_attention"] * 2, layer_rope_theta=[1e4, 0])
        config = config_of(model_type, head_dim=64, qk_rope_head_dim=64, **layers)
        with pytest.raises(ValueError, match="must have rope_parameters"):
            rope_jax.from_hf_config(config)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        rope_jax.from_hf_config(config)


def test_compat_must_be_known():
    with pytest.raises(ValueError, match=r"compat must be None or one of \('transformers',\), got 'vllm'"):
        rope_jax.from_hf_config(config_of("llama"), compat="vllm")


# ------------------------------------------------------------------------- where transformers departs from the checkpoints


def both(config):
    return rope_jax.from_hf_config(config), rope_jax.from_hf_config(config, compat="transformers")


def test_a_proportion_counts_with_the_plain_rotation_too():
    ours, theirs = both(config_of("llama", partial_rotary_factor=0.5))
    assert (ours.rope.rotary_dim, theirs.rope.rotary_dim) == (64, None)
    ours, theirs = both(config_of("llama", partial_rotary_factor=0.5, rope_scaling=dict(type="linear", factor=2.0)))
    assert ours.rope.rotary_dim == theirs.rope.rotary_dim == 64


def test_truncate_counts_in_a_recipe_by_layer_type():
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
    at_4097 = [recipe.rope.frequencies(4097) for recipe in (ours, theirs)]
    np.testing.assert_allclose(at_4097[0].inv_freq * LONG, at_4097[1].inv_freq * SHORT, rtol=1e-15)
    assert at_4097[0].attention_factor == at_4097[1].attention_factor == 1.3


def test_rotary_dim_of_minimax_m3_counts():
    ours, theirs = both(config_of("minimax_m3_vl_text", head_dim=128, rotary_dim=64))
    assert (ours.rope.rotary_dim, theirs.rope.rotary_dim) == (64, None)


def test_hunyuan_vl_is_a_rotation():
    config = config_of("hunyuan_vl_text", rope_parameters=dict(rope_theta=1e4, mrope_section=[16, 16, 16, 16]))
    assert rope_jax.from_hf_config(config).rope.axes == sum(((axis,) * 16 for axis in range(4)), ())


# --------------------------------------------------------------------------------------------- the way back


def test_what_a_family_cannot_say_is_refused():
    def recipe(rope, model_type="llama", **fields):
        return rope_jax.interop.ModelRope(model_type, (LayerRope(rope, **fields),) * 2)

    for bad in [
        recipe(Rope(64, Standard(), layout="interleaved")),
        recipe(Rope(64, DynamicNTK(factor=2.0, original_length=4096, context_length=8192))),
        recipe(Rope(64, Standard()), logit_factor=2.0),
        recipe(Rope(64, Standard(), axes=(0,) * 32)),
        recipe(None),
    ]:
        with pytest.raises(ValueError, match="a config of 'llama' cannot express"):
            rope_jax.interop.to_hf_config(bad)
    with pytest.raises(ValueError, match="schedule must be one of"):
        rope_jax.interop.to_hf_config(recipe(Rope(64, lambda rotary_dim: Standard()(rotary_dim))))
    with pytest.raises(ValueError, match="model_type 'lama' is unknown"):
        rope_jax.interop.to_hf_config(recipe(Rope(64, Standard()), "lama"))


def test_every_share_of_a_head_is_written_so_that_it_is_read_again():
    for head_dim in range(2, 258, 2):
        for rotary_dim in range(2, head_dim + 1, 2):
            layer = LayerRope(Rope(head_dim, Standard(), rotary_dim=rotary_dim))
            share = rope_jax.interop.to_hf_config(rope_jax.interop.ModelRope("gpt_neox", (layer,)))[
                "rope_parameters"
            ]
            assert int(head_dim * share["partial_rotary_factor"]) == rotary_dim


# ---------------------------------------------------------------------------------------- numbers beside the rotation


def test_query_temperature():
    temperature = rope_jax.interop.QueryTemperature(beta=0.1, period=8192, offset=1)
    positions = np.array([[0, 8190, 8191, 8192, 100_000, 2_000_000_000]])
    exact = 1 + 0.1 * np.log(1 + np.floor((positions.astype(np.float64) + 1) / 8192))
    np.testing.assert_allclose(jax.jit(temperature)(jnp.asarray(positions)), exact, rtol=2 * oracles.EPS32)
    assert hash(temperature) == hash(dataclasses.replace(temperature))


@pytest.mark.parametrize("field", ["beta", "period"])
def test_query_temperature_refuses(field):
    with pytest.raises(ValueError, match=f"{field} must be"):
        rope_jax.interop.QueryTemperature(**{**dict(beta=0.1, period=8192), field: 0})


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_schedule_is_written_and_read_again(case):
    schedule = case.build()
    if hasattr(schedule, "context_length"):  # a config says none
        schedule = dataclasses.replace(schedule, context_length=None)
    for rope in (Rope(ROTARY_DIM, schedule), Rope(2 * ROTARY_DIM, schedule, rotary_dim=ROTARY_DIM)):
        if isinstance(schedule, Proportional) and rope.rotary_dim is not None:
            continue  # its ladder is as wide as the head
        family = "hunyuan_v1_dense" if isinstance(schedule, NTKAware) else "gpt_neox"
        recipe = rope_jax.interop.ModelRope(family, (LayerRope(rope),) * 3)
        assert rope_jax.from_hf_config(json.loads(json.dumps(rope_jax.interop.to_hf_config(recipe)))) == recipe


def test_the_tower_of_a_model_that_sees():
    tower = dict(depth=2, embed_dim=1280, num_heads=16, hidden_size=3584)
    rope = Rope(80, rope_jax.Axial(schedule=Standard()), axes=(0,) * 20 + (1,) * 20)
    for model_type in (None, "qwen2_vl", "qwen2_vl_vision"):  # as files of three years name it
        config = config_of(
            "qwen2_vl", vision_config=tower | ({} if model_type is None else dict(model_type=model_type))
        )
        assert rope_jax.from_hf_config(config, part="vision").rope == rope
    assert rope_jax.from_hf_config(config).rope.axes[:17] == (0,) * 16 + (1,)
    with pytest.raises(ValueError, match="config must have the key 'vision_config' for part='vision'"):
        rope_jax.from_hf_config(config_of("llama"), part="vision")
    with pytest.raises(ValueError, match="part must be one of .*, got 'audio'"):
        rope_jax.from_hf_config(config_of("llama"), part="audio")


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
def test_what_is_said_of_a_rotation_that_is_switched_off_is_no_error(config):
    for written in ({}, dict(rope_theta=1e4), dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))):
        recipe = rope_jax.from_hf_config(config | written)
        assert [layer.rope for layer in recipe.layers] == [None, None]
    with pytest.raises(ValueError, match="has an unknown key 'rope_theda'"):
        rope_jax.from_hf_config(config | dict(rope_theda=1e4))


def test_phi3_keeps_its_original_length_outside():
    config, _ = RELEASED["Phi-3 mini 128k"]
    written = rope_jax.interop.to_hf_config(rope_jax.from_hf_config(config))
    # Where the config's own default would stand before the recipe's.
    assert written["original_max_position_embeddings"] == 4096


def test_full_layers_have_a_head_of_their_own():
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
        recipe = rope_jax.from_hf_config(config | given)
        assert tuple(layer.rope.head_dim for layer in recipe.layers) == wanted


def test_dbrx_base_and_compat():
    ours, theirs = both(RELEASED["DBRX"][0])
    assert (ours.rope.schedule.base, theirs.rope.schedule.base) == (5e5, 1e4)


def test_a_recipe_holds_layers():
    assert rope_jax.interop.ModelRope("llama", [LayerRope(None)]).layers == (LayerRope(None),)
    with pytest.raises(TypeError, match="layers must hold a LayerRope for each layer"):
        rope_jax.interop.ModelRope("llama", (Rope(8, Standard()),))
    with pytest.raises(TypeError, match="model_rope must be a ModelRope, got Rope"):
        rope_jax.interop.to_hf_config(Rope(8, Standard()))


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be JSON: "):
        rope_jax.from_hf_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing is downloaded"):
        rope_jax.from_hf_config("Qwen/Qwen2.5-7B")
