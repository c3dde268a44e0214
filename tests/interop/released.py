"""Configs as released models have them, small, and the rotation of each, written by hand."""

import numpy as np

import rope_jax
from rope_jax import DynamicNTK, Linear, Llama3, LongRope, NTKAware, Proportional, Rope, Sections, Standard, Yarn
from rope_jax.interop.model_rope import LayerRope, QueryTemperature


def config_of(model_type, **keys):
    """The keys of every config, for a small model of two layers."""
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
LOGIT_FACTOR = (0.1 * np.log(40.0) + 1.0) ** 2  # DeepSeek-V2's, at mscale_all_dim = 1

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
    "Phi-3, another first name": (
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
            logit_factor=LOGIT_FACTOR,
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
    "Gemma 3 4b, multimodal": (
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
            LayerRope(None, query_temperature=QueryTemperature(beta=0.1, period=8192, offset=1)),
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
            query_temperature=QueryTemperature(beta=0.1, period=16_384),
        ),
    ),
    "Qwen2-VL, v4": (
        config_of("qwen2_vl", rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24])),
        every(Rope(128, Sections(sections=(16, 24, 24), schedule=Standard(base=1e6)))),
    ),
    "Qwen2.5-VL, v4": (
        config_of("qwen2_5_vl", rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24])),
        every(Rope(128, Sections(sections=(16, 24, 24), schedule=Standard(base=1e6)))),
    ),
    "Qwen2-VL without keys of rotation": (
        config_of("qwen2_vl"),
        every(Rope(128, Sections(sections=(16, 24, 24), schedule=Standard(base=1e6)))),
    ),
    "Qwen2.5-VL without keys of rotation": (
        config_of("qwen2_5_vl"),
        every(Rope(128, Sections(sections=(16, 24, 24), schedule=Standard(base=1e6)))),
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
        every(Rope(128, Sections(sections=(24, 20, 20), schedule=Standard(base=5e6), order="strided"))),
    ),
    "Ernie 4.5 VL": (
        config_of("ernie4_5_vl_moe_text", head_dim=128, rope_theta=500000),
        every(
            Rope(
                128,
                Sections(sections=(20, 22, 22), schedule=Standard(base=5e5), order="alternating"),
                layout="interleaved",
            )
        ),
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
    "EXAONE 3.5": (
        dict(
            model_type="exaone",
            num_layers=2,
            hidden_size=4096,
            num_attention_heads=32,
            rope_theta=1000000.0,
            rope_scaling=LLAMA3,
            max_position_embeddings=32768,
        ),
        every(Rope(128, Llama3(factor=8.0, original_length=8192, base=1e6))),
    ),
    "InternLM3": (
        config_of(
            "internlm3",
            rope_theta=50000000,
            rope_scaling=dict(factor=6.0, rope_type="dynamic"),
            max_position_embeddings=32768,
        ),
        every(Rope(128, DynamicNTK(factor=6.0, original_length=32_768, base=5e7))),
    ),
    "Sarvam 30B": (
        config_of("sarvam_moe", num_attention_heads=64, head_dim=64, rope_theta=8000000),
        every(Rope(64, Standard(base=8e6))),
    ),
    "Sarvam 105B, first file": (
        config_of(
            "sarvam_mla",
            head_dim=576,
            q_head_dim=192,
            qk_rope_head_dim=64,
            rope_theta=10000,
            rope_scaling=YARN_DEEPSEEK | dict(type="deepseek_yarn"),
        ),
        every(
            Rope(
                64,
                Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
                layout="interleaved",
            ),
            logit_factor=LOGIT_FACTOR,
        ),
    ),
    "Dory": (
        config_of(
            "dory",
            num_hidden_layers=4,
            head_dim=256,
            layer_types=["sliding_attention", "mlp", "full_attention", "mlp"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
                full_attention=dict(rope_type="default", rope_theta=10000000.0),
            ),
        ),
        (
            LayerRope(Rope(256, Standard()), "sliding_attention"),
            LayerRope(Rope(256, Standard(base=1e7)), "full_attention"),
        ),
    ),
    "Lara Mini without its layer types": (
        config_of("lara_mini", num_hidden_layers=5, hidden_size=1024, num_attention_heads=16),
        (
            LayerRope(None, "linear_attention"),
            LayerRope(Rope(128, Standard()), "sliding_attention"),
            LayerRope(None, "linear_attention"),
            LayerRope(None, "full_attention"),
            LayerRope(Rope(128, Standard()), "sliding_attention"),
        ),
    ),
    "HY4-VL, with YaRN": (
        dict(
            model_type="hy_v4_vl",
            text_config=config_of(
                "hy_v4_vl_text",
                head_dim=64,
                qk_rope_head_dim=64,
                rope_theta=10000,
                rope_scaling=YARN_DEEPSEEK | dict(mrope_section=[12, 10, 10]),
            ),
        ),
        every(
            Rope(
                64,
                Sections(
                    sections=(12, 10, 10),
                    schedule=Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
                    order="strided",
                ),
                layout="interleaved",
            ),
            logit_factor=LOGIT_FACTOR,
        ),
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
        every(Rope(128, Sections(sections=(16,) * 4, schedule=NTKAware(factor=1000.0)))),
    ),
    "nanochat": (config_of("nanochat"), every(Rope(128, rope_jax.Negated(schedule=Standard())))),
    "Zamba2": (config_of("zamba2", use_mem_rope=False, attention_head_dim=160), every(None)),
    "OLMo hybrid": (config_of("olmo_hybrid", rope_parameters=None), every(None)),
}
