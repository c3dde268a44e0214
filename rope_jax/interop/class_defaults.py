"""The defaults of config classes, which a part's file leaves out.

Written by tests/golden/make_class_defaults.py, from transformers 5.24.0.
"""

from typing import Any

# fmt: off
# num_hidden_layers, hidden_size, num_attention_heads, max_position_embeddings.
CLASS_SIZES: dict[str, tuple[int | None, ...]] = {
    "afmoe": (32, 2048, 16, 16384), "apertus": (32, 4096, 32, 65536), "apertus1p5_text": (32, 4096, 32, 65536),
    "arcee": (32, 2560, 32, 4096), "aria_text": (32, 4096, 32, 2048), "axk1": (61, 7168, 64, 32768), "axk2": (48,
    2048, 32, 131072), "bailing_hybrid": (42, 2560, 32, 262144), "bamba": (32, 4096, 32, 262144), "beam": (52, 5120,
    48, 8192), "bitnet": (30, 2560, 20, 2048), "blt_global_transformer": (25, 2048, 16, 4096), "blt_local_decoder":
    (9, 1024, 16, 24576), "blt_local_encoder": (1, 1024, 16, 24576), "blt_patcher": (14, 768, 12, 8192),
    "chameleon": (32, 4096, 32, 4096), "codegen": (28, 4096, 16, 2048), "cohere": (40, 8192, 64, 8192), "cohere2":
    (40, 8192, 64, 8192), "cohere2_moe": (40, 8192, 64, 8192), "cohere_compass_text": (40, 8192, 64, 8192),
    "cohere_compass_vision": (27, 1152, 16, None), "cosmos3_edge_text": (28, 2048, 16, 131072), "csm": (16, 2048,
    32, 2048), "csm_depth_decoder_model": (4, 1024, 8, 33), "cwm": (64, 6144, 48, 131072), "dbrx": (24, 2048, 16,
    2048), "deepseek_ocr2_encoder": (32, 4096, 32, 32768), "deepseek_ocr2_text": (32, 4096, 32, 2048),
    "deepseek_v2": (32, 4096, 32, 2048), "deepseek_v3": (61, 7168, 128, 4096), "deepseek_v32": (61, 7168, 128,
    163840), "deepseek_v4": (43, 4096, 64, 1048576), "dia_decoder": (18, 2048, 16, 3072), "dia_encoder": (12, 1024,
    16, 1024), "diffllama": (16, 2048, 32, 2048), "diffusion_gemma_text": (30, 2304, 8, 131072), "doge": (32, 1024,
    8, 2048), "dory": (72, 2560, 16, 8192), "dots1": (62, 4608, 32, 2048), "dots3_note_audio_encoder": (32, 1280,
    20, 6000), "dots3_note_text": (46, 5120, 128, 524288), "dots3_note_vision_encoder": (42, 1536, 24, None),
    "embedding_gemma2_text": (24, 512, 4, 262144), "emu3_text_model": (32, 4096, 32, 9216), "ernie4_5": (18, 1024,
    16, 131072), "ernie4_5_moe": (28, 2560, 20, 131072), "ernie4_5_vl_moe_text": (28, 2560, 20, 131072),
    "ernie4_5_vl_moe_vision": (32, 1280, 16, None), "esm": (12, 768, 12, 1026), "esmc": (80, 2560, 40, 2048),
    "eurobert": (12, 768, 12, 8192), "evolla": (32, 4096, 32, 8192), "exaone": (32, 4096, 32, 4096), "exaone4": (32,
    4096, 32, 2048), "exaone4_5_vision": (32, 3584, 16, None), "exaone_moe": (32, 4096, 32, 2048), "falcon": (32,
    4544, 71, 2048), "falcon_h1": (32, 4096, 32, 8192), "flex_olmo": (32, 4096, 32, 4096), "flint": (49, 2048, 32,
    262144), "gemma": (28, 3072, 16, 8192), "gemma2": (26, 2304, 8, 8192), "gemma3_text": (26, 2304, 8, 131072),
    "gemma3n_text": (35, 2048, 8, 32768), "gemma4_text": (30, 2304, 8, 131072), "gemma4_unified_text": (30, 2304, 8,
    262144), "gemma4_vision": (16, 768, 12, 131072), "glm": (40, 4096, 32, 131072), "glm4": (40, 4096, 32, 131072),
    "glm4_moe": (46, 4096, 96, 131072), "glm4_moe_lite": (47, 2048, 20, 202752), "glm4v_moe_text": (46, 4096, 96,
    65536), "glm4v_moe_vision": (24, 1536, 12, None), "glm4v_text": (40, 4096, 32, 32768), "glm4v_vision": (24,
    1536, 12, None), "glm5_next_vision": (24, 1024, 16, None), "glm_image_text": (40, 4096, 32, 131072),
    "glm_moe_dsa": (78, 6144, 64, 202752), "glm_ocr_text": (16, 1024, 16, 131072), "glm_ocr_vision": (24, 1024, 16,
    None), "glmasr_encoder": (32, 1280, 20, 1500), "gpt_neox": (44, 6144, 64, 2048), "gpt_neox_japanese": (32, 2560,
    32, 2048), "gpt_oss": (36, 2880, 64, 131072), "gptj": (28, 4096, 16, 2048), "gradium_phonon_tts": (6, 768, 12,
    8192), "granite": (32, 4096, 32, 2048), "granite4_vision_text": (32, 4096, 32, 2048), "granite_docling_text":
    (28, 1024, 16, 32768), "granite_swa": (24, 2560, 20, 8192), "granitemoe": (32, 4096, 32, 2048),
    "granitemoe_swa": (32, 4096, 32, 2048), "granitemoehybrid": (32, 4096, 32, 2048), "granitemoeshared": (32, 4096,
    32, 2048), "gte": (12, 768, 12, 8192), "helium": (24, 2560, 20, 4096), "higgs_audio_v2": (28, 3072, 24, 2048),
    "hrm_text": (128, 1536, 12, 2048), "hunyuan_v1_dense": (32, 4096, 32, 2048), "hunyuan_v1_moe": (32, 4096, 32,
    2048), "hunyuan_vl_text": (32, 4096, 32, 2048), "hy_v3": (80, 4096, 64, 131072), "hy_v4": (34, 2816, 32,
    262144), "hy_v4_vl_text": (78, 6144, 64, 262144), "hyperclovax": (32, 4096, 32, 2048), "idefics": (32, 4096, 32,
    2048), "inkling2_vision": (23, 1024, 16, None), "internlm3": (48, 4096, 32, 32768), "iquestcoder": (80, 5120,
    40, 131072), "jais2": (32, 3328, 26, 8192), "jetmoe": (12, 2048, 32, 4096), "jina_embeddings_v3": (24, 1024, 16,
    8194), "kimi_k25_vision": (27, 1152, 16, None), "kolibri1": (50, 2560, 48, 262144), "kyutai_speech_to_text":
    (48, 2048, 32, 750), "laguna": (40, 2048, 48, 131072), "lara_mini": (34, 1024, 16, 131072), "lasr_encoder": (17,
    512, 8, 10000), "lfm2": (32, 2560, 32, 128000), "lfm2_moe": (32, 2048, 32, 128000), "lfm3": (24, 2048, 16,
    128000), "lfm3_vl_vision": (14, 1024, 16, None), "llama": (32, 4096, 32, 2048), "llama4_text": (48, 5120, 40,
    131072), "llama4_vision_model": (34, 768, 16, None), "longcat_flash": (28, 6144, 64, 131072), "mellum": (28,
    2304, 32, 131072), "mimi": (8, 512, 8, 8000), "mimo_v2_flash": (48, 4096, 64, 131072), "minicpm3": (62, 2560,
    40, 32768), "minimax": (32, 4096, 32, 131072), "minimax_m2": (62, 3072, 48, 196608), "minimax_m3_vl_text": (60,
    6144, 64, 524288), "minimax_m3_vl_vision": (32, 1280, 16, None), "ministral": (32, 4096, 32, 131072),
    "ministral3": (34, 4096, 32, 262144), "mistral": (32, 4096, 32, 131072), "mistral4": (36, 4096, 32, 1048576),
    "mistral_large4_text": (72, 6144, 64, 1048576), "mixtral": (32, 4096, 32, 131072), "mlcd_vision_model": (48,
    1664, 16, None), "mllama_text_model": (40, 4096, 32, 131072), "modernbert": (22, 768, 12, 8192),
    "modernbert-decoder": (22, 768, 12, 8192), "molmo2_text": (36, 4096, 32, 36864), "moonshine": (6, 288, 8, 512),
    "moonshine_streaming": (6, 320, 8, 4096), "moshi": (32, 4096, 32, 3000), "muse_glimmer_assistant": (5, 6656, 32,
    131072), "muse_glimmer_text": (52, 6656, 32, 131072), "muse_glimmer_vision": (50, 1536, 16, 1024),
    "muse_spark_text": (62, 8192, 128, 1048576), "muse_spark_vision": (50, 1536, 16, 1024), "nanochat": (12, 768, 6,
    2048), "nemotron": (32, 6144, 48, 4096), "nemotron3_5_transcribe_asr_audio": (32, 1280, 10, 5000),
    "nemotron3_diarization_audio": (31, 512, 8, 5000), "neomme": (17, 1024, 16, 16384), "neucodec": (12, 1024, 16,
    4096), "nomic_bert": (12, 768, 12, 2048), "olmo": (32, 4096, 32, 2048), "olmo2": (32, 4096, 32, 2048), "olmo3":
    (32, 4096, 32, 2048), "olmo_hybrid": (32, 3840, 30, 65536), "olmoe": (16, 2048, 16, 4096),
    "openai_privacy_filter": (8, 640, 14, 131072), "paddleocr_vl_text": (18, 1024, 16, 131072),
    "paddleocr_vl_vision": (27, 1152, 16, None), "pe_audio_encoder": (6, 1792, 14, 10000), "pe_audio_video_encoder":
    (6, 1792, 14, 10000), "pe_video_encoder": (6, 1792, 14, 10000), "persimmon": (36, 4096, 64, 16384), "phi": (24,
    2048, 32, 2048), "phi3": (32, 3072, 32, 4096), "phi4_multimodal": (32, 3072, 32, 131072), "phimoe": (32, 4096,
    32, 131072), "pixtral": (24, 1024, 16, None), "pocket_tts": (6, 1024, 16, 8192), "pocket_tts_audio_tokenizer":
    (2, 512, 8, 8000), "qwen2": (32, 4096, 32, 32768), "qwen2_5_omni_dit": (22, 1024, 16, 32768),
    "qwen2_5_omni_talker": (28, 3584, 28, 32768), "qwen2_5_omni_text": (28, 3584, 28, 32768),
    "qwen2_5_omni_vision_encoder": (32, 3584, 16, None), "qwen2_5_vl_text": (80, 8192, 64, 32768),
    "qwen2_5_vl_vision": (32, 3584, 16, None), "qwen2_moe": (24, 2048, 16, 32768), "qwen2_vl_text": (80, 8192, 64,
    32768), "qwen2_vl_vision": (32, 1280, 16, None), "qwen3": (32, 4096, 32, 32768), "qwen3_5_moe_text": (40, 2048,
    16, 32768), "qwen3_5_moe_vision": (27, 1152, 16, None), "qwen3_5_text": (32, 4096, 16, 32768), "qwen3_5_vision":
    (27, 1152, 16, None), "qwen3_moe": (24, 2048, 32, 32768), "qwen3_next": (48, 2048, 16, 32768),
    "qwen3_omni_moe_talker_code_predictor": (5, 1024, 16, 32768), "qwen3_omni_moe_talker_text": (20, 1024, 16,
    32768), "qwen3_omni_moe_text": (28, 2048, 28, 32768), "qwen3_omni_moe_vision_encoder": (27, 1152, 16, None),
    "qwen3_vl_moe_text": (24, 2048, 16, 128000), "qwen3_vl_moe_vision": (27, 1152, 16, None), "qwen3_vl_text": (32,
    4096, 32, 128000), "qwen3_vl_vision": (27, 1152, 16, None), "qwen4_exp_text": (40, 2048, 16, 32768),
    "qwen4_exp_vision": (27, 1152, 16, None), "recurrent_gemma": (26, 2560, 10, None), "roformer": (12, 768, 12,
    1536), "sarvam_mla": (32, 4096, 64, 4096), "sarvam_moe": (19, 4096, 64, 131072), "seed_oss": (64, 4096, 80,
    524288), "smollm3": (36, 2048, 16, 32768), "solar_open": (48, 4096, 64, 131072), "stablelm": (32, 2560, 32,
    4096), "starcoder2": (30, 3072, 24, 4096), "step3p5": (45, 4096, 64, 128000), "step3p5_vision": (47, 1536, 16,
    2704), "t5_gemma_module": (26, 2304, 8, 8192), "t5gemma2_decoder": (26, 2304, 8, 131072), "t5gemma2_text": (26,
    2304, 8, 131072), "timesfm2_5": (20, 1280, 16, 16384), "ultrabert": (32, 4096, 32, 32768), "unlimited_ocr_text":
    (12, 1280, 10, 32768), "vaultgemma": (26, 2304, 8, 8192), "video_llama_3_vision": (12, 768, 12, None),
    "voxtral_realtime_encoder": (32, 1280, 32, 1500), "voxtral_realtime_text": (32, 4096, 32, 131072), "xcodec2":
    (12, 1024, 16, 4096), "youtu": (32, 2048, 16, 131072), "zamba2": (54, 2560, 32, 4096), "zaya": (40, 2048, 8,
    131072),
}

# More of them, where a family cannot do without.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8}, "apertus": {"rope_parameters":
    {"rope_type": "llama3", "rope_theta": 12000000.0, "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, "apertus1p5_text": {"rope_parameters": {"rope_type":
    "llama3", "rope_theta": 12000000.0, "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor":
    1.0, "high_freq_factor": 4.0}}, "axk1": {"qk_rope_head_dim": 64}, "axk2": {"qk_rope_head_dim": 32},
    "bailing_hybrid": {"qk_rope_head_dim": 64}, "beam": {"rope_parameters": {"sliding_attention": {"rope_type":
    "default", "rope_theta": 10000.0}, "full_attention": None}, "layer_types": [*["sliding_attention"] * 5,
    "full_attention", *["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 5, "full_attention",
    *["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 5, "full_attention",
    *["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 5, "full_attention",
    *["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 3, "full_attention"]},
    "cohere_compass_text": {"rope_parameters": {}, "layer_types": ["full_attention"] * 40}, "csm":
    {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, "csm_depth_decoder_model":
    {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, "cwm": {"rope_parameters": {"rope_theta":
    1000000.0, "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings":
    8192, "rope_type": "llama3"}}, "deepseek_v2": {"qk_rope_head_dim": 64}, "deepseek_v3": {"qk_rope_head_dim": 64},
    "deepseek_v32": {"qk_rope_head_dim": 64}, "deepseek_v4": {"qk_rope_head_dim": 64, "layer_types":
    [*["heavily_compressed_attention"] * 3, "compressed_sparse_attention", "heavily_compressed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention",
    "heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention",
    "heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention",
    "heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention",
    "heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention",
    "heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention",
    "heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention"]}, "diffusion_gemma_text": {"rope_parameters":
    {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {"rope_type":
    "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}}, "layer_types": [*["sliding_attention"]
    * 5, "full_attention"] * 5}, "dots3_note_text": {"qk_rope_head_dim": 64, "layer_types": [*["indexed_attention"]
    * 2, *["sliding_attention"] * 3, "indexed_attention", *["sliding_attention"] * 3, "indexed_attention",
    *["sliding_attention"] * 3, "indexed_attention", *["sliding_attention"] * 3, "indexed_attention",
    *["sliding_attention"] * 3, "indexed_attention", *["sliding_attention"] * 3, "indexed_attention",
    *["sliding_attention"] * 3, "indexed_attention", *["sliding_attention"] * 3, "indexed_attention",
    *["sliding_attention"] * 3, "indexed_attention", *["sliding_attention"] * 3, "indexed_attention",
    *["sliding_attention"] * 3, "indexed_attention"]}, "embedding_gemma2_text": {"rope_parameters":
    {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {"rope_type":
    "default", "rope_theta": 1000000.0}}, "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 4},
    "exaone_moe": {"layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8}, "flint": {"layer_types":
    [*["full_attention"] * 2, *["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 3,
    "full_attention", *["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 3, "full_attention",
    *["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 3, "full_attention",
    *["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 3, "full_attention",
    *["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 3, "full_attention",
    *["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 2, "full_attention"]}, "gemma4_text":
    {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention":
    {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}}, "layer_types":
    [*["sliding_attention"] * 5, "full_attention"] * 5}, "gemma4_unified_text": {"rope_parameters":
    {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {"rope_type":
    "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}}, "layer_types": [*["sliding_attention"]
    * 5, "full_attention"] * 5}, "glm4_moe_lite": {"qk_rope_head_dim": 64}, "glm_moe_dsa": {"qk_rope_head_dim": 64},
    "gpt_oss": {"rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 4096, "rope_theta": 150000.0}}, "higgs_audio_v2":
    {"rope_parameters": {"factor": 32.0, "rope_theta": 500000.0, "high_freq_factor": 0.5, "low_freq_factor": 0.125,
    "original_max_position_embeddings": 1024, "rope_type": "llama3"}}, "hy_v4": {"qk_rope_head_dim": 64},
    "hy_v4_vl_text": {"qk_rope_head_dim": 64}, "jetmoe": {"kv_channels": 128}, "kolibri1": {"layer_types":
    [*["sliding_attention"] * 4, "full_attention"] * 10}, "laguna": {"rope_parameters": {"full_attention":
    {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}, "sliding_attention":
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}, "layer_types":
    ["full_attention"] * 40}, "lara_mini": {"layer_types": (["linear_attention", "sliding_attention",
    "linear_attention", "full_attention", "sliding_attention"] * 7)[:34]}, "lfm3": {"rope_parameters":
    {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {"rope_type":
    "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5}}, "layer_types": [*["conv"] * 2,
    "full_attention", "conv", "sliding_attention", "conv", "full_attention", "conv", "sliding_attention", "conv",
    "full_attention", "conv", "sliding_attention", "conv", "full_attention", "conv", "sliding_attention", "conv",
    "full_attention", "conv", "sliding_attention", "conv", "full_attention", "conv"]}, "longcat_flash":
    {"qk_rope_head_dim": 64}, "mellum": {"rope_parameters": {"full_attention": {"rope_type": "default",
    "rope_theta": 500000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}, "layer_types":
    ["full_attention"] * 28}, "mimo_v2_flash": {"rope_parameters": {"full_attention": {"rope_type": "default",
    "rope_theta": 5000000.0, "partial_rotary_factor": 0.334}, "sliding_attention": {"rope_type": "default",
    "rope_theta": 10000.0, "partial_rotary_factor": 0.334}}, "layer_types": ["full_attention",
    *["sliding_attention"] * 4, "full_attention", *["sliding_attention"] * 5, "full_attention",
    *["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 5, "full_attention",
    *["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 5, "full_attention",
    *["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 5, "full_attention"]}, "minicpm3":
    {"qk_rope_head_dim": 32}, "ministral3": {"rope_parameters": {"type": "yarn", "rope_theta": 1000000.0, "factor":
    16.0, "original_max_position_embeddings": 16384, "max_position_embeddings": 262144, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1, "rope_type": "yarn"}},
    "mistral4": {"qk_rope_head_dim": 64, "rope_parameters": {"type": "yarn", "rope_theta": 10000.0, "factor": 128.0,
    "original_max_position_embeddings": 8192, "max_position_embeddings": 1048576, "beta_fast": 32.0, "beta_slow":
    1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5,
    "rope_type": "yarn"}}, "mistral_large4_text": {"qk_rope_head_dim": 64, "rope_parameters": {"rope_type": "yarn",
    "rope_theta": 10000.0, "factor": 2048.0, "original_max_position_embeddings": 512, "beta_fast": 32.0,
    "beta_slow": 1.0, "attention_factor": 1.0}}, "moonshine_streaming": {"rope_parameters": {"rope_type": "default",
    "rope_theta": 10000.0, "partial_rotary_factor": 0.8}}, "muse_spark_text": {"rope_parameters": {"rope_type":
    "default", "rope_theta": 500000.0}}, "nemotron3_5_transcribe_asr_audio": {"rope_parameters": {"rope_type":
    "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}, "neomme": {"rope_parameters":
    {"full_attention": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    "layer_types": [*["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 5, "full_attention",
    *["sliding_attention"] * 4, "full_attention"]}, "openai_privacy_filter": {"rope_parameters": {"rope_type":
    "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096, "rope_theta": 150000.0}}, "phi3": {"original_max_position_embeddings":
    4096}, "phi4_multimodal": {"original_max_position_embeddings": 4096}, "sarvam_mla": {"qk_rope_head_dim": 64},
    "step3p5": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    "layer_types": ["full_attention"] * 45}, "ultrabert": {"rope_parameters": {"sliding_attention": {"rope_type":
    "default", "rope_theta": 10000.0}, "full_attention": {"rope_type": "default", "rope_theta": 2560000.0}},
    "layer_types": ([*["sliding_attention"] * 2, "full_attention"] * 11)[:32]}, "youtu": {"qk_rope_head_dim": 64},
    "zamba2": {"attention_head_dim": 160}, "zaya": {"rope_parameters": {"hybrid": {"rope_type": "default",
    "rope_theta": 5000000.0, "partial_rotary_factor": 0.5}, "hybrid_sliding": {"rope_type": "default", "rope_theta":
    10000.0, "partial_rotary_factor": 0.5}}, "layer_types": ["hybrid"] * 40},
}
