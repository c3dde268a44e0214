"""One row for each model family: from the ``model_type`` of a config to its :class:`Family`; head sizes below.

Most families are like Llama and differ in nothing; a row holds only the differences. ``make oracle`` compares the
table with transformers.
"""

import dataclasses

from rope_jax.interop.family import Family, FullEvery, LayerBase, NullSwitch, Switch
from rope_jax.interop.hooks import (
    base_in_attn_config,
    compress_ratios,
    hybrid_layer_pattern,
    key_of_bert,
    lists_by_layer,
    original_length_at_top,
    period_of_five,
    rotary_dim_is_lost,
    twice_the_width,
    wide_global_heads,
    without_mlp_blocks,
)
from rope_jax.interop.rope_types import alpha, alpha_or_dynamic, longrope, yarn
from rope_jax.interop.sections import PairAxes

FAMILIES: dict[str, Family] = {}


def _family(model_types: str, **habits) -> None:
    FAMILIES.update(dict.fromkeys(model_types.split(), Family(**habits)))


# --------------------------------------------------------------------------- one rotation, of the whole head

_family(
    "arcee aria_text chameleon deepseek_ocr2_encoder deepseek_ocr2_text dia_decoder dia_encoder diffllama doge "
    "dots1 esmc eurobert falcon_h1 gemma gemma2 gradium_phonon_tts granite granite4_vision_text "
    "granite_docling_text granitemoe granitemoeshared hrm_text hyperclovax idefics internlm3 iquestcoder jais2 "
    "kyutai_speech_to_text lasr_encoder llama mimi ministral mistral moshi neucodec olmo olmo2 olmoe pocket_tts "
    "pocket_tts_audio_tokenizer qwen2 qwen2_5_omni_dit qwen2_moe qwen3 qwen3_moe qwen3_omni_moe_code2wav "
    "qwen3_omni_moe_talker_code_predictor seed_oss starcoder2 t5_gemma_module timesfm2_5 unlimited_ocr_text "
    "vaultgemma voxtral_realtime_encoder voxtral_realtime_text xcodec2"
)
_family("csm csm_depth_decoder_model", base=5e5, explicit=True)
_family("higgs_audio_v2", explicit=True)
_family("apertus apertus1p5_text", base=12e6, explicit=True)
_family("bitnet evolla exaone flex_olmo mllama_text_model muse_glimmer_assistant", base=5e5)
_family("cwm", base=1e6, explicit=True)
_family("dbrx", read_hook=base_in_attn_config)
_family("emu3_text_model mixtral", base=1e6)
_family("lfm2 lfm2_moe minimax", base=1e6, hybrid=True)
_family("nomic_bert", base=1000.0)
_family("gte", base=1.6e5)
_family("gpt_oss", base=1.5e5, explicit=True)
_family("hy_v3", base=11158840.0)
_family("jina_embeddings_v3", base=2e4)
_family("jetmoe", keys={"head_dim": "kv_channels"})
_family("falcon", switch=Switch("alibi", on=False, default=False))
_family("granitemoehybrid", hybrid=True, switch=Switch("position_embedding_type", on="rope", default=None))
_family("esm", switch=Switch("position_embedding_type", on="rotary", default="absolute"))
_family("olmo_hybrid", hybrid=True, switch=NullSwitch())
_family(
    "zamba2",
    hybrid=True,
    keys={"head_dim": "attention_head_dim"},
    switch=Switch("use_mem_rope", on=True, default=False),
    read_hook=twice_the_width,
)
_family("nanochat", negated=True)
_family("molmo2_text", layers="rope_scaling_layers")
_family("ministral3", explicit=True, temperature="yarn", ignored=("max_position_embeddings",))
_family(
    "hunyuan_v1_dense hunyuan_v1_moe",
    rope_types={"dynamic": alpha_or_dynamic, "xdrope": alpha},
    ignored=("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
_family("phimoe", base=1e6)

# ------------------------------------------------------------------------------------- part of the head

_family(
    "glm4_moe glmasr_encoder dots3_note_audio_encoder nemotron persimmon phi",
    proportion=0.5,
)
_family("bamba recurrent_gemma", hybrid=True, proportion=0.5)
_family("gpt_neox stablelm", proportion=0.25)
_family(
    "qwen3_next",
    proportion=0.25,
    full_every=FullEvery("full_attention_interval", period=4, first=3, other="linear_attention"),
)
_family("gpt_neox_japanese nemotron3_diarization_audio", proportion=1.0)
_family("nemotron3_5_transcribe_asr_audio", proportion=1.0, explicit=True)
_family("solar_open", base=1e6, proportion=1.0)
_family("sarvam_moe", base=8e6, proportion=1.0)
_family("minimax_m2", base=5e6, proportion=1.0)
_family("minimax_m3_vl_text", base=5e6, proportion=1.0, rotary_dim=64, read_hook=rotary_dim_is_lost)
_family("phi3 phi4_multimodal", proportion=1.0, rope_types={"yarn": longrope}, write_hook=original_length_at_top)

# --------------------------------------------------------------------------------------- interleaved pairs

_family("blt_local_encoder blt_local_decoder blt_global_transformer", layout="interleaved", base=5e5)
_family("cohere ernie4_5 ernie4_5_moe", layout="interleaved", base=5e5)
_family("blt_patcher", layout="interleaved")
_family("helium", layout="interleaved", base=1e5)
_family("openai_privacy_filter", layout="interleaved", base=1.5e5, explicit=True)
_family("pe_audio_encoder pe_audio_video_encoder pe_video_encoder", layout="interleaved", base=2e4)
_family("glm glm4", layout="interleaved", proportion=0.5)
_family(
    "moonshine",
    layout="interleaved",
    proportion=0.9,
    keys={"num_attention_heads": "decoder_num_attention_heads", "num_hidden_layers": "decoder_num_hidden_layers"},
)
_family("moonshine_streaming", layout="interleaved", proportion=1.0, explicit=True)
_family("gptj", layout="interleaved", proportion=1.0, rotary_dim=64, switch=Switch("rotary", on=True, default=True))
_family("codegen", layout="interleaved", proportion=1.0, rotary_dim=64)
_family("roformer", layout="interleaved", proportion=1.0, read_hook=key_of_bert)

# ------------------------------------------------------------ layers that differ, one rotation for each layer type

_family(
    "cohere2",
    layout="interleaved",
    layers="sliding",
    full_every=FullEvery("sliding_window_pattern", period=4, first=3, other="sliding_attention"),
)
_family("cohere2_moe", layout="interleaved", layers="dense_or_sliding")
_family("afmoe flint", layers="sliding")
_family("lara_mini", layers="sliding", read_hook=period_of_five)
_family(
    "exaone4",
    layers="sliding_if_any",
    full_every=FullEvery("sliding_window_pattern", period=4, first=3, other="sliding_attention"),
)
_family("exaone_moe kolibri1", layers="sliding_if_any")
_family("smollm3", base=2e6, layers="no_rope_layers")
_family("llama4_text", layout="interleaved", base=5e5, layers="no_rope_layers", temperature="without_rope")
_family("granite_swa granitemoe_swa", layers="layer_rope_theta")
_family("muse_glimmer_text", hybrid=True, layers="layer_rope_theta")
_family("muse_spark_text", explicit=True, hybrid=True, layers="layer_rope_theta")
_family("laguna mellum zaya", nested=True, proportion=1.0)
_family("mimo_v2_flash", nested=True, proportion=1.0, read_hook=hybrid_layer_pattern)
_family("step3p5", nested=True, proportion=1.0, read_hook=lists_by_layer)
_family("beam", nested=True, beyond="queries grow as (1 + (m + 1) / 2048)^0.1 where nothing rotates")
_family("ultrabert", nested=True)
_family("lfm3", base=1e6, nested=True)
_family("diffusion_gemma_text", nested=True, proportion=1.0, read_hook=wide_global_heads)
_family("embedding_gemma2_text gemma4_text gemma4_unified_text", nested=True, read_hook=wide_global_heads)
_gemma3 = {
    "full_attention": LayerBase("rope_theta", 1e6, scaled=True),
    "sliding_attention": LayerBase("rope_local_base_freq", 1e4, scaled=False),
}
_family(
    "gemma3_text t5gemma2_text t5gemma2_decoder",
    nested=True,
    bases=_gemma3,
    full_every=FullEvery("sliding_window_pattern", period=6, first=5, other="sliding_attention"),
)
_family(
    "gemma3n_text",
    nested=True,
    bases=_gemma3,
    full_every=FullEvery("sliding_window_pattern", period=5, first=4, other="sliding_attention"),
)
_family(
    "olmo3",
    nested=True,
    bases={
        "full_attention": LayerBase("rope_theta", 5e5, scaled=True),
        "sliding_attention": LayerBase("rope_theta", 5e5, scaled=False),
    },
    full_every=FullEvery("sliding_window_pattern", period=4, first=3, other="sliding_attention"),
)
_family(
    "dory",
    nested=True,
    bases={
        "full_attention": LayerBase("rope_theta", 1e7, scaled=True),
        "sliding_attention": LayerBase("rope_theta", 1e4, scaled=True),
    },
    full_every=FullEvery("sliding_window_pattern", period=4, first=3, other="sliding_attention"),
    read_hook=without_mlp_blocks,
)
_family(
    "modernbert modernbert-decoder",
    nested=True,
    bases={
        "full_attention": LayerBase("global_rope_theta", 1.6e5, scaled=True),
        "sliding_attention": LayerBase("local_rope_theta", 1e4, scaled=True),
    },
    full_every=FullEvery("global_attn_every_n_layers", period=3, first=0, other="sliding_attention"),
    read_hook=key_of_bert,
)

# ----------------------------------------------------------------------------------------- latent attention

_family(
    "deepseek_v3 axk1 glm4_moe_lite youtu",
    latent=True,
    layout="interleaved",
    layout_key="rope_interleave",
    logit_factor=True,
)
_family(
    "sarvam_mla",
    latent=True,
    layout="interleaved",
    layout_key="rope_interleave",
    logit_factor=True,
    rope_types={"deepseek_yarn": yarn},
)
_family(
    "mistral4",
    explicit=True,
    latent=True,
    layout="interleaved",
    layout_key="rope_interleave",
    logit_factor=True,
    temperature="yarn",
    ignored=("max_position_embeddings",),
)
_family("deepseek_v2 deepseek_v32 axk2 glm_moe_dsa", latent=True, layout="interleaved", logit_factor=True)
_family("bailing_hybrid", hybrid=True, latent=True, layout="interleaved", base=6e6, logit_factor=True)
_family(
    "longcat_flash",
    keys={"num_hidden_layers": "num_layers"},
    latent=True,
    layout="interleaved",
    base=1e7,
    logit_factor=True,
)
_family("hy_v4", latent=True, logit_factor=True)
_family("minicpm3", latent=True, logit_factor=True)
_family(
    "mistral_large4_text",
    beyond="the weights hold factors of the frequencies, and of the queries",
    explicit=True,
    latent=True,
    layout="interleaved",
    layers="no_rope_layers",
    logit_factor=True,
)
_family(
    "dots3_note_text",
    nested=True,
    latent=True,
    layout="interleaved",
    base=8e7,
    bases={
        "indexed_attention": LayerBase("rope_theta", 8e7, scaled=True),
        "sliding_attention": LayerBase("swa_rope_theta", 5e4, scaled=True),
    },
)
_family(
    "deepseek_v4",
    nested=True,
    latent=True,
    layout="interleaved",
    labels={
        "sliding_attention": "main",
        "compressed_sparse_attention": "compress",
        "heavily_compressed_attention": "compress",
    },
    bases={
        "main": LayerBase("rope_theta", 1e4, scaled=False),
        "compress": LayerBase("compress_rope_theta", 1.6e5, scaled=True),
    },
    read_hook=compress_ratios,
)

# ------------------------------------------------------------- positions with several axes: text, height, width

_family("qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text", base=1e6, sections=PairAxes("chunked", (16, 24, 24)))
_family("qwen2_5_omni_text qwen2_5_omni_talker", base=1e6, sections=PairAxes("chunked", (16, 24, 24)))
_family("paddleocr_vl_text", base=5e5, sections=PairAxes("chunked", (16, 24, 24)))
_family(
    "hunyuan_vl_text",
    rope_types={"dynamic": alpha_or_dynamic, "xdrope": alpha},
    sections=PairAxes("chunked"),
    ignored=("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
_family(
    "glm4v_text glm_ocr_text",
    layout="interleaved",
    proportion=1.0,
    sections=PairAxes("chunked", (8, 12, 12)),
)
_family(
    "hy_v4_vl_text",
    latent=True,
    layout="interleaved",
    logit_factor=True,
    sections=PairAxes("strided", (12, 10, 10)),
)
_family("glm4v_moe_text", proportion=0.5, sections=PairAxes("chunked", (8, 12, 12)))
_family("glm_image_text", proportion=1.0, sections=PairAxes("chunked", (8, 12, 12)))
_family("qwen3_vl_text qwen3_vl_moe_text", base=5e5, sections=PairAxes("strided", (24, 20, 20)))
_family("qwen3_omni_moe_text", base=1e6, sections=PairAxes("strided", (24, 20, 20)))
_family("qwen3_omni_moe_talker_text", sections=PairAxes("strided", (24, 20, 20)))
_family("cosmos3_edge_text", base=1e8, sections=PairAxes("strided", (24, 20, 20)))
_family("cohere_compass_text", nested=True, sections=PairAxes("strided", (24, 20, 20)))
_family(
    "qwen3_5_text qwen3_5_moe_text",
    proportion=0.25,
    sections=PairAxes("strided", (11, 11, 10)),
    full_every=FullEvery("full_attention_interval", period=4, first=3, other="linear_attention"),
)
_family("qwen4_exp_text", proportion=1.0, sections=PairAxes("strided", (11, 11, 10)))
_family("ernie4_5_vl_moe_text", layout="interleaved", base=5e5, sections=PairAxes("alternating", (22, 22, 20)))
_family("neomme", nested=True, proportion=1.0, sections=PairAxes("rows_columns_alternating"))

# -------------------------------------------------------------------------------- images: rows and columns

_family(
    "cohere_compass_vision ernie4_5_vl_moe_vision exaone4_5_vision glm4v_vision glm4v_moe_vision glm5_next_vision "
    "glm_ocr_vision qwen2_5_omni_vision_encoder qwen2_5_vl_vision qwen3_5_vision qwen3_5_moe_vision "
    "qwen3_omni_moe_vision_encoder qwen3_vl_vision qwen3_vl_moe_vision qwen4_exp_vision",
    keys={"num_attention_heads": "num_heads", "num_hidden_layers": "depth"},
    sections=PairAxes("rows_columns"),
)
_family(
    "qwen2_vl_vision",
    keys={"hidden_size": "embed_dim", "num_attention_heads": "num_heads", "num_hidden_layers": "depth"},
    sections=PairAxes("rows_columns"),
)
_family(
    "dots3_note_vision_encoder mlcd_vision_model muse_glimmer_vision muse_spark_vision paddleocr_vl_vision "
    "video_llama_3_vision",
    sections=PairAxes("rows_columns"),
)
_family("lfm3_vl_vision", base=1e6, sections=PairAxes("rows_columns"))
_family("step3p5_vision", sections=PairAxes("columns_rows"))
_family("pixtral", sections=PairAxes("even_rows_odd_columns"))
_family("gemma4_vision", base=100.0, sections=PairAxes("rows_columns", blocks=2))
_family("kimi_k25_vision", sections=PairAxes("column_row_alternating"))
_family("minimax_m3_vl_vision", sections=PairAxes("time_rows_columns"))
_family("llama4_vision_model", layout="interleaved", sections=PairAxes("columns_rows"))  # counted from 1
_family("inkling2_vision", layout="interleaved", sections=PairAxes("columns_rows"))

# ------------------------------------------------------- H, if a config gives none and D/N is wrong

_HEAD_DIMS = {
    64: "gemma4_vision gpt_oss muse_spark_text neomme neucodec openai_privacy_filter qwen2_5_omni_dit "
    "sarvam_moe voxtral_realtime_encoder xcodec2",
    80: "timesfm2_5",
    128: "afmoe beam cohere2_moe cosmos3_edge_text cwm dia_decoder dia_encoder ernie4_5 flint glm glm4 helium "
    "higgs_audio_v2 hrm_text hy_v3 internlm3 iquestcoder jetmoe kolibri1 laguna lara_mini lfm3 llama4_text "
    "mellum minimax_m2 minimax_m3_vl_text ministral3 molmo2_text muse_glimmer_assistant muse_glimmer_text "
    "paddleocr_vl_text pe_audio_encoder pe_audio_video_encoder pe_video_encoder qwen2_5_omni_talker qwen3 "
    "qwen3_omni_moe_talker_code_predictor qwen3_vl_text "
    "seed_oss solar_open step3p5 zaya",
    192: "mimo_v2_flash",
    256: "diffusion_gemma_text dory embedding_gemma2_text gemma gemma2 gemma3_text gemma3n_text gemma4_text "
    "gemma4_unified_text qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text t5_gemma_module "
    "t5gemma2_decoder t5gemma2_text vaultgemma",
}

for _head_dim, _model_types in _HEAD_DIMS.items():
    for _name in _model_types.split():
        FAMILIES[_name] = dataclasses.replace(FAMILIES[_name], default_head_dim=_head_dim)
