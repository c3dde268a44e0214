"""Names the class of each part of a model, and what the class fills in where a part's file says nothing.

Written by tests/golden/make_class_defaults.py, from transformers 5.24.0.
"""

from typing import Any

# From the model type of a whole model to the types of its parts.
PART_TYPES: dict[str, dict[str, str]] = {
    "aimv2": {"text_config": "aimv2_text_model", "vision_config": "aimv2_vision_model"},
    "align": {"text_config": "align_text_model", "vision_config": "align_vision_model"},
    "altclip": {"text_config": "altclip_text_model", "vision_config": "altclip_vision_model"},
    "apertus1p5": {
        "text_config": "apertus1p5_text",
        "vision_config": "apertus1p5_vision_tokenizer",
        "audio_config": "wavtokenizer_encoder",
    },
    "aria": {"text_config": "aria_text", "vision_config": "idefics3_vision"},
    "audioflamingo3": {"text_config": "qwen2", "audio_config": "audioflamingo3_encoder"},
    "aya_vision": {"text_config": "cohere2", "vision_config": "siglip_vision_model"},
    "blip": {"text_config": "blip_text_model", "vision_config": "blip_vision_model"},
    "blip-2": {"text_config": "opt", "vision_config": "blip_2_vision_model"},
    "bridgetower": {"text_config": "bridgetower_text_model", "vision_config": "bridgetower_vision_model"},
    "chinese_clip": {"text_config": "chinese_clip_text_model", "vision_config": "chinese_clip_vision_model"},
    "clap": {"text_config": "clap_text_model", "audio_config": "clap_audio_model"},
    "clip": {"text_config": "clip_text_model", "vision_config": "clip_vision_model"},
    "clipseg": {"text_config": "clipseg_text_model", "vision_config": "clipseg_vision_model"},
    "clvp": {"text_config": "clvp_encoder"},
    "cohere2_vision": {"text_config": "cohere2", "vision_config": "siglip_vision_model"},
    "cohere_compass": {"text_config": "cohere_compass_text", "vision_config": "cohere_compass_vision"},
    "cosmos3_edge": {"text_config": "cosmos3_edge_text", "vision_config": "cosmos3_edge_vision"},
    "cosmos3_omni": {"text_config": "qwen3_vl_text", "vision_config": "qwen3_vl_vision"},
    "deepseek_ocr2": {"text_config": "deepseek_ocr2_text", "vision_config": "deepseek_ocr2_vision"},
    "deepseek_vl": {"text_config": "llama", "vision_config": "siglip_vision_model"},
    "deepseek_vl_hybrid": {"text_config": "llama", "vision_config": "siglip_vision_model"},
    "diffusion_gemma": {"text_config": "diffusion_gemma_text", "vision_config": "gemma4_vision"},
    "dots3_note": {
        "text_config": "dots3_note_text",
        "vision_config": "dots3_note_vision_encoder",
        "audio_config": "dots3_note_audio_encoder",
    },
    "edgetam": {"vision_config": "edgetam_vision_model"},
    "edgetam_video": {"vision_config": "sam2_vision_model"},
    "embedding_gemma2": {
        "text_config": "embedding_gemma2_text",
        "vision_config": "gemma4_vision",
        "audio_config": "gemma4_audio",
    },
    "emu3": {"text_config": "emu3_text_model"},
    "ernie4_5_vl_moe": {"text_config": "ernie4_5_vl_moe_text", "vision_config": "ernie4_5_vl_moe_vision"},
    "exaone4_5": {"text_config": "exaone4", "vision_config": "exaone4_5_vision"},
    "fast_vlm": {"text_config": "qwen2", "vision_config": "timm_wrapper"},
    "flava": {"text_config": "flava_text_model"},
    "florence2": {"text_config": "bart", "vision_config": "florence_vision"},
    "fun_asr_nano": {"text_config": "qwen3", "audio_config": "fun_asr_nano_encoder"},
    "fuyu": {"text_config": "persimmon"},
    "gemma3": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"},
    "gemma3n": {"text_config": "gemma3n_text", "vision_config": "gemma3n_vision", "audio_config": "gemma3n_audio"},
    "gemma4": {"text_config": "gemma4_text", "vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
    "gemma4_unified": {
        "text_config": "gemma4_unified_text",
        "vision_config": "gemma4_unified_vision",
        "audio_config": "gemma4_unified_audio",
    },
    "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
    "git": {"vision_config": "git_vision_model"},
    "glm46v": {"text_config": "glm4v_text", "vision_config": "glm4v_vision"},
    "glm4v": {"text_config": "glm4v_text", "vision_config": "glm4v_vision"},
    "glm4v_moe": {"text_config": "glm4v_moe_text", "vision_config": "glm4v_moe_vision"},
    "glm5_next": {"text_config": "glm5_next_text", "vision_config": "glm5_next_vision"},
    "glm_image": {"text_config": "glm_image_text", "vision_config": "glm_image_vision"},
    "glm_ocr": {"text_config": "glm_ocr_text", "vision_config": "glm_ocr_vision"},
    "glmasr": {"text_config": "llama", "audio_config": "glmasr_encoder"},
    "glmga": {"text_config": "glm4v_text", "vision_config": "glm4v_vision"},
    "got_ocr2": {"text_config": "qwen2", "vision_config": "got_ocr2_vision"},
    "granite4_vision": {"text_config": "granite4_vision_text", "vision_config": "clip_vision_model"},
    "granite_docling": {"text_config": "granite_docling_text", "vision_config": "granite_docling_vision"},
    "granite_speech": {"text_config": "granite"},
    "granite_speech_plus": {"text_config": "granite"},
    "grounding-dino": {"text_config": "bert"},
    "groupvit": {"text_config": "groupvit_text_model", "vision_config": "groupvit_vision_model"},
    "hunyuan_vl": {"text_config": "hunyuan_vl_text", "vision_config": "hunyuan_vl_vision"},
    "hy_v4_vl": {"text_config": "hy_v4_vl_text", "vision_config": "hy_v4_vl_vision"},
    "hyperclovax_vision_v2": {"text_config": "hyperclovax", "vision_config": "qwen2_5_vl_vision"},
    "idefics": {"vision_config": "idefics_vision"},
    "idefics2": {"text_config": "mistral", "vision_config": "idefics2_vision"},
    "idefics3": {"text_config": "llama", "vision_config": "idefics3_vision"},
    "inkling2": {"text_config": "inkling2_text", "vision_config": "inkling2_vision"},
    "inkling2_loop": {"text_config": "inkling2_loop_text", "vision_config": "inkling2_vision"},
    "inkling_mm_model": {
        "text_config": "inkling_text",
        "vision_config": "inkling_vision",
        "audio_config": "inkling_audio",
    },
    "instructblip": {"text_config": "opt", "vision_config": "instructblip_vision_model"},
    "instructblipvideo": {"text_config": "opt", "vision_config": "instructblipvideo_vision_model"},
    "internvl": {"text_config": "qwen2", "vision_config": "internvl_vision"},
    "janus": {"text_config": "llama", "vision_config": "janus_vision_model"},
    "jev": {"text_config": "qwen3_5_text"},
    "kimi_k25": {"text_config": "deepseek_v3", "vision_config": "kimi_k25_vision"},
    "kosmos-2": {"text_config": "kosmos_2_text_model", "vision_config": "kosmos_2_vision_model"},
    "kosmos-2.5": {"text_config": "kosmos_2_5_text_model", "vision_config": "kosmos_2_5_vision_model"},
    "lfm2_vl": {"text_config": "lfm2", "vision_config": "siglip2_vision_model"},
    "lfm3_vl": {"text_config": "lfm3", "vision_config": "lfm3_vl_vision"},
    "lighton_ocr": {"text_config": "qwen3", "vision_config": "pixtral"},
    "llama4": {"text_config": "llama4_text", "vision_config": "llama4_vision_model"},
    "llava": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "llava_next": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "llava_next_video": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "llava_onevision": {"text_config": "qwen2", "vision_config": "siglip_vision_model"},
    "metaclip_2": {"text_config": "metaclip_2_text_model", "vision_config": "metaclip_2_vision_model"},
    "minicpm_ocr": {"text_config": "qwen3_5_text", "vision_config": "minicpm_ocr_vision"},
    "minicpmv4_6": {"text_config": "qwen3_5_text", "vision_config": "minicpmv4_6_vision"},
    "minicpmv4_7": {"text_config": "qwen3_5_text", "vision_config": "minicpmv4_7_vision"},
    "minimax_m3_vl": {"text_config": "minimax_m3_vl_text", "vision_config": "minimax_m3_vl_vision"},
    "mistral3": {"text_config": "mistral", "vision_config": "pixtral"},
    "mistral_large4": {"text_config": "mistral_large4_text", "vision_config": "pixtral"},
    "mllama": {"text_config": "mllama_text_model", "vision_config": "mllama_vision_model"},
    "mm-grounding-dino": {"text_config": "bert"},
    "modernvbert": {"text_config": "modernbert", "vision_config": "siglip_vision_model"},
    "molmo2": {"text_config": "molmo2_text", "vision_config": "molmo2_vision"},
    "moss_transcribe_diarize": {"text_config": "qwen3", "audio_config": "moss_transcribe_diarize_audio"},
    "muse_glimmer": {"text_config": "muse_glimmer_text", "vision_config": "muse_glimmer_vision"},
    "muse_spark": {
        "text_config": "muse_spark_text",
        "vision_config": "muse_spark_vision",
        "audio_config": "muse_spark_audio",
    },
    "musicflamingo": {"text_config": "qwen2", "audio_config": "audioflamingo3_encoder"},
    "nemo_speechlm": {"text_config": "nemotron_h", "audio_config": "nemotron3_5_transcribe_audio"},
    "nemotron3_diarization": {"audio_config": "nemotron3_diarization_audio"},
    "nemotron_h_omni": {"text_config": "nemotron_h", "vision_config": "radio", "audio_config": "parakeet_encoder"},
    "omdet-turbo": {"text_config": "clip_text_model"},
    "omniasr": {"text_config": "llama", "audio_config": "omniasr_audio"},
    "omniasr_ctc": {"audio_config": "omniasr_audio"},
    "ovis2": {"text_config": "qwen2", "vision_config": "ovis2_vision"},
    "owlv2": {"text_config": "owlv2_text_model", "vision_config": "owlv2_vision_model"},
    "owlvit": {"text_config": "owlvit_text_model", "vision_config": "owlvit_vision_model"},
    "paddleocr_vl": {"text_config": "paddleocr_vl_text", "vision_config": "paddleocr_vl_vision"},
    "paligemma": {"text_config": "gemma", "vision_config": "siglip_vision_model"},
    "pe_audio": {"text_config": "modernbert", "audio_config": "pe_audio_encoder"},
    "pe_audio_video": {"text_config": "modernbert"},
    "pe_audio_video_encoder": {"audio_config": "pe_audio_encoder"},
    "pe_video": {"text_config": "modernbert"},
    "pe_video_encoder": {"vision_config": "timm_wrapper"},
    "perception_lm": {"text_config": "llama", "vision_config": "timm_wrapper"},
    "phi4_multimodal": {"vision_config": "phi4_multimodal_vision", "audio_config": "phi4_multimodal_audio"},
    "pix2struct": {"text_config": "pix2struct_text_model", "vision_config": "pix2struct_vision_model"},
    "pp_chart2table": {"text_config": "qwen2", "vision_config": "pp_chart2table_vision"},
    "pp_formulanet": {"text_config": "pp_formulanet_text", "vision_config": "pp_formulanet_vision"},
    "qianfan_ocr": {"text_config": "qwen3", "vision_config": "qianfan_ocr_vision"},
    "qwen2_5_omni_thinker": {
        "text_config": "qwen2_5_omni_text",
        "vision_config": "qwen2_5_omni_vision_encoder",
        "audio_config": "qwen2_5_omni_audio_encoder",
    },
    "qwen2_5_vl": {"text_config": "qwen2_5_vl_text", "vision_config": "qwen2_5_vl_vision"},
    "qwen2_audio": {"text_config": "qwen2", "audio_config": "qwen2_audio_encoder"},
    "qwen2_vl": {"text_config": "qwen2_vl_text", "vision_config": "qwen2_vl_vision"},
    "qwen3_5": {"text_config": "qwen3_5_text", "vision_config": "qwen3_5_vision"},
    "qwen3_5_moe": {"text_config": "qwen3_5_moe_text", "vision_config": "qwen3_5_moe_vision"},
    "qwen3_asr": {"text_config": "qwen3", "audio_config": "qwen3_asr_encoder"},
    "qwen3_omni_moe_thinker": {
        "text_config": "qwen3_omni_moe_text",
        "vision_config": "qwen3_omni_moe_vision_encoder",
        "audio_config": "qwen3_omni_moe_audio_encoder",
    },
    "qwen3_vl": {"text_config": "qwen3_vl_text", "vision_config": "qwen3_vl_vision"},
    "qwen3_vl_moe": {"text_config": "qwen3_vl_moe_text", "vision_config": "qwen3_vl_moe_vision"},
    "qwen4_exp": {"text_config": "qwen4_exp_text", "vision_config": "qwen4_exp_vision"},
    "sam": {"vision_config": "sam_vision_model"},
    "sam2": {"vision_config": "sam2_vision_model"},
    "sam2_video": {"vision_config": "sam2_vision_model"},
    "sam3": {"text_config": "clip_text_model", "vision_config": "sam3_vision_model"},
    "sam3_lite_text": {"text_config": "sam3_lite_text_text_model", "vision_config": "sam3_vision_model"},
    "sam3_tracker": {"vision_config": "sam3_vision_model"},
    "sam3_tracker_video": {"vision_config": "sam3_vision_model"},
    "sam_hq": {"vision_config": "sam_hq_vision_model"},
    "shieldgemma2": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"},
    "siglip": {"text_config": "siglip_text_model", "vision_config": "siglip_vision_model"},
    "siglip2": {"text_config": "siglip2_text_model", "vision_config": "siglip2_vision_model"},
    "slanext": {"vision_config": "slanext_vision"},
    "smolvlm": {"text_config": "llama", "vision_config": "smolvlm_vision"},
    "step3p7": {"text_config": "step3p5", "vision_config": "step3p5_vision"},
    "t5gemma2_encoder": {"text_config": "t5gemma2_text", "vision_config": "siglip_vision_model"},
    "tipsv2": {"text_config": "tipsv2_text_model", "vision_config": "tipsv2_vision_model"},
    "ultravbert": {"text_config": "ultrabert", "vision_config": "siglip_vision_model"},
    "unlimited_ocr": {"text_config": "unlimited_ocr_text", "vision_config": "unlimited_ocr_vision"},
    "vibevoice": {"text_config": "qwen2", "audio_config": "vibevoice_acoustic_tokenizer"},
    "vibevoice_asr": {"text_config": "qwen2"},
    "video_llama_3": {"text_config": "qwen2", "vision_config": "video_llama_3_vision"},
    "video_llava": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "videoprism": {"text_config": "videoprism_text_model", "vision_config": "videoprism_vision_model"},
    "vipllava": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "vision-text-dual-encoder": {"text_config": "bert", "vision_config": "vit"},
    "voxtral": {"text_config": "llama", "audio_config": "voxtral_encoder"},
    "voxtral_realtime": {"text_config": "voxtral_realtime_text", "audio_config": "voxtral_realtime_encoder"},
    "xclip": {"text_config": "xclip_text_model", "vision_config": "xclip_vision_model"},
}

# Defaults of the config classes: num_hidden_layers, hidden_size, num_attention_heads, max_position_embeddings.
CLASS_SIZES: dict[str, tuple[int | None, ...]] = {
    "afmoe": (32, 2048, 16, 16384),
    "apertus": (32, 4096, 32, 65536),
    "apertus1p5_text": (32, 4096, 32, 65536),
    "arcee": (32, 2560, 32, 4096),
    "aria_text": (32, 4096, 32, 2048),
    "axk1": (61, 7168, 64, 32768),
    "axk2": (48, 2048, 32, 131072),
    "bailing_hybrid": (42, 2560, 32, 262144),
    "bamba": (32, 4096, 32, 262144),
    "beam": (52, 5120, 48, 8192),
    "bitnet": (30, 2560, 20, 2048),
    "blt_global_transformer": (25, 2048, 16, 4096),
    "blt_local_decoder": (9, 1024, 16, 24576),
    "blt_local_encoder": (1, 1024, 16, 24576),
    "blt_patcher": (14, 768, 12, 8192),
    "chameleon": (32, 4096, 32, 4096),
    "codegen": (28, 4096, 16, 2048),
    "cohere": (40, 8192, 64, 8192),
    "cohere2": (40, 8192, 64, 8192),
    "cohere2_moe": (40, 8192, 64, 8192),
    "cohere_compass_text": (40, 8192, 64, 8192),
    "cohere_compass_vision": (27, 1152, 16, None),
    "cosmos3_edge_text": (28, 2048, 16, 131072),
    "csm": (16, 2048, 32, 2048),
    "csm_depth_decoder_model": (4, 1024, 8, 33),
    "cwm": (64, 6144, 48, 131072),
    "dbrx": (24, 2048, 16, 2048),
    "deepseek_ocr2_encoder": (32, 4096, 32, 32768),
    "deepseek_ocr2_text": (32, 4096, 32, 2048),
    "deepseek_v2": (32, 4096, 32, 2048),
    "deepseek_v3": (61, 7168, 128, 4096),
    "deepseek_v32": (61, 7168, 128, 163840),
    "deepseek_v4": (43, 4096, 64, 1048576),
    "dia_decoder": (18, 2048, 16, 3072),
    "dia_encoder": (12, 1024, 16, 1024),
    "diffllama": (16, 2048, 32, 2048),
    "diffusion_gemma_text": (30, 2304, 8, 131072),
    "doge": (32, 1024, 8, 2048),
    "dory": (72, 2560, 16, 8192),
    "dots1": (62, 4608, 32, 2048),
    "dots3_note_audio_encoder": (32, 1280, 20, 6000),
    "dots3_note_text": (46, 5120, 128, 524288),
    "dots3_note_vision_encoder": (42, 1536, 24, None),
    "embedding_gemma2_text": (24, 512, 4, 262144),
    "emu3_text_model": (32, 4096, 32, 9216),
    "ernie4_5": (18, 1024, 16, 131072),
    "ernie4_5_moe": (28, 2560, 20, 131072),
    "ernie4_5_vl_moe_text": (28, 2560, 20, 131072),
    "ernie4_5_vl_moe_vision": (32, 1280, 16, None),
    "esm": (12, 768, 12, 1026),
    "esmc": (80, 2560, 40, 2048),
    "eurobert": (12, 768, 12, 8192),
    "evolla": (32, 4096, 32, 8192),
    "exaone": (32, 4096, 32, 4096),
    "exaone4": (32, 4096, 32, 2048),
    "exaone4_5_vision": (32, 3584, 16, None),
    "exaone_moe": (32, 4096, 32, 2048),
    "falcon": (32, 4544, 71, 2048),
    "falcon_h1": (32, 4096, 32, 8192),
    "flex_olmo": (32, 4096, 32, 4096),
    "flint": (49, 2048, 32, 262144),
    "gemma": (28, 3072, 16, 8192),
    "gemma2": (26, 2304, 8, 8192),
    "gemma3_text": (26, 2304, 8, 131072),
    "gemma3n_text": (35, 2048, 8, 32768),
    "gemma4_text": (30, 2304, 8, 131072),
    "gemma4_unified_text": (30, 2304, 8, 262144),
    "gemma4_vision": (16, 768, 12, 131072),
    "glm": (40, 4096, 32, 131072),
    "glm4": (40, 4096, 32, 131072),
    "glm4_moe": (46, 4096, 96, 131072),
    "glm4_moe_lite": (47, 2048, 20, 202752),
    "glm4v_moe_text": (46, 4096, 96, 65536),
    "glm4v_moe_vision": (24, 1536, 12, None),
    "glm4v_text": (40, 4096, 32, 32768),
    "glm4v_vision": (24, 1536, 12, None),
    "glm5_next_vision": (24, 1024, 16, None),
    "glm_image_text": (40, 4096, 32, 131072),
    "glm_moe_dsa": (78, 6144, 64, 202752),
    "glm_ocr_text": (16, 1024, 16, 131072),
    "glm_ocr_vision": (24, 1024, 16, None),
    "glmasr_encoder": (32, 1280, 20, 1500),
    "gpt_neox": (44, 6144, 64, 2048),
    "gpt_neox_japanese": (32, 2560, 32, 2048),
    "gpt_oss": (36, 2880, 64, 131072),
    "gptj": (28, 4096, 16, 2048),
    "gradium_phonon_tts": (6, 768, 12, 8192),
    "granite": (32, 4096, 32, 2048),
    "granite4_vision_text": (32, 4096, 32, 2048),
    "granite_docling_text": (28, 1024, 16, 32768),
    "granite_swa": (24, 2560, 20, 8192),
    "granitemoe": (32, 4096, 32, 2048),
    "granitemoe_swa": (32, 4096, 32, 2048),
    "granitemoehybrid": (32, 4096, 32, 2048),
    "granitemoeshared": (32, 4096, 32, 2048),
    "gte": (12, 768, 12, 8192),
    "helium": (24, 2560, 20, 4096),
    "higgs_audio_v2": (28, 3072, 24, 2048),
    "hrm_text": (128, 1536, 12, 2048),
    "hunyuan_v1_dense": (32, 4096, 32, 2048),
    "hunyuan_v1_moe": (32, 4096, 32, 2048),
    "hunyuan_vl_text": (32, 4096, 32, 2048),
    "hy_v3": (80, 4096, 64, 131072),
    "hy_v4": (34, 2816, 32, 262144),
    "hy_v4_vl_text": (78, 6144, 64, 262144),
    "hyperclovax": (32, 4096, 32, 2048),
    "idefics": (32, 4096, 32, 2048),
    "inkling2_vision": (23, 1024, 16, None),
    "internlm3": (48, 4096, 32, 32768),
    "iquestcoder": (80, 5120, 40, 131072),
    "jais2": (32, 3328, 26, 8192),
    "jetmoe": (12, 2048, 32, 4096),
    "jina_embeddings_v3": (24, 1024, 16, 8194),
    "kimi_k25_vision": (27, 1152, 16, None),
    "kolibri1": (50, 2560, 48, 262144),
    "kyutai_speech_to_text": (48, 2048, 32, 750),
    "laguna": (40, 2048, 48, 131072),
    "lara_mini": (34, 1024, 16, 131072),
    "lasr_encoder": (17, 512, 8, 10000),
    "lfm2": (32, 2560, 32, 128000),
    "lfm2_moe": (32, 2048, 32, 128000),
    "lfm3": (24, 2048, 16, 128000),
    "lfm3_vl_vision": (14, 1024, 16, None),
    "llama": (32, 4096, 32, 2048),
    "llama4_text": (48, 5120, 40, 131072),
    "llama4_vision_model": (34, 768, 16, None),
    "longcat_flash": (28, 6144, 64, 131072),
    "mellum": (28, 2304, 32, 131072),
    "mimi": (8, 512, 8, 8000),
    "mimo_v2_flash": (48, 4096, 64, 131072),
    "minicpm3": (62, 2560, 40, 32768),
    "minimax": (32, 4096, 32, 131072),
    "minimax_m2": (62, 3072, 48, 196608),
    "minimax_m3_vl_text": (60, 6144, 64, 524288),
    "minimax_m3_vl_vision": (32, 1280, 16, None),
    "ministral": (32, 4096, 32, 131072),
    "ministral3": (34, 4096, 32, 262144),
    "mistral": (32, 4096, 32, 131072),
    "mistral4": (36, 4096, 32, 1048576),
    "mistral_large4_text": (72, 6144, 64, 1048576),
    "mixtral": (32, 4096, 32, 131072),
    "mlcd_vision_model": (48, 1664, 16, None),
    "mllama_text_model": (40, 4096, 32, 131072),
    "modernbert": (22, 768, 12, 8192),
    "modernbert-decoder": (22, 768, 12, 8192),
    "molmo2_text": (36, 4096, 32, 36864),
    "moonshine": (6, 288, 8, 512),
    "moonshine_streaming": (6, 320, 8, 4096),
    "moshi": (32, 4096, 32, 3000),
    "muse_glimmer_assistant": (5, 6656, 32, 131072),
    "muse_glimmer_text": (52, 6656, 32, 131072),
    "muse_glimmer_vision": (50, 1536, 16, 1024),
    "muse_spark_text": (62, 8192, 128, 1048576),
    "muse_spark_vision": (50, 1536, 16, 1024),
    "nanochat": (12, 768, 6, 2048),
    "nemotron": (32, 6144, 48, 4096),
    "nemotron3_5_transcribe_asr_audio": (32, 1280, 10, 5000),
    "nemotron3_diarization_audio": (31, 512, 8, 5000),
    "neomme": (17, 1024, 16, 16384),
    "neucodec": (12, 1024, 16, 4096),
    "nomic_bert": (12, 768, 12, 2048),
    "olmo": (32, 4096, 32, 2048),
    "olmo2": (32, 4096, 32, 2048),
    "olmo3": (32, 4096, 32, 2048),
    "olmo_hybrid": (32, 3840, 30, 65536),
    "olmoe": (16, 2048, 16, 4096),
    "openai_privacy_filter": (8, 640, 14, 131072),
    "paddleocr_vl_text": (18, 1024, 16, 131072),
    "paddleocr_vl_vision": (27, 1152, 16, None),
    "pe_audio_encoder": (6, 1792, 14, 10000),
    "pe_audio_video_encoder": (6, 1792, 14, 10000),
    "pe_video_encoder": (6, 1792, 14, 10000),
    "persimmon": (36, 4096, 64, 16384),
    "phi": (24, 2048, 32, 2048),
    "phi3": (32, 3072, 32, 4096),
    "phi4_multimodal": (32, 3072, 32, 131072),
    "phimoe": (32, 4096, 32, 131072),
    "pixtral": (24, 1024, 16, None),
    "pocket_tts": (6, 1024, 16, 8192),
    "pocket_tts_audio_tokenizer": (2, 512, 8, 8000),
    "qwen2": (32, 4096, 32, 32768),
    "qwen2_5_omni_dit": (22, 1024, 16, 32768),
    "qwen2_5_omni_talker": (28, 3584, 28, 32768),
    "qwen2_5_omni_text": (28, 3584, 28, 32768),
    "qwen2_5_omni_vision_encoder": (32, 3584, 16, None),
    "qwen2_5_vl_text": (80, 8192, 64, 32768),
    "qwen2_5_vl_vision": (32, 3584, 16, None),
    "qwen2_moe": (24, 2048, 16, 32768),
    "qwen2_vl_text": (80, 8192, 64, 32768),
    "qwen2_vl_vision": (32, 1280, 16, None),
    "qwen3": (32, 4096, 32, 32768),
    "qwen3_5_moe_text": (40, 2048, 16, 32768),
    "qwen3_5_moe_vision": (27, 1152, 16, None),
    "qwen3_5_text": (32, 4096, 16, 32768),
    "qwen3_5_vision": (27, 1152, 16, None),
    "qwen3_moe": (24, 2048, 32, 32768),
    "qwen3_next": (48, 2048, 16, 32768),
    "qwen3_omni_moe_talker_code_predictor": (5, 1024, 16, 32768),
    "qwen3_omni_moe_talker_text": (20, 1024, 16, 32768),
    "qwen3_omni_moe_text": (28, 2048, 28, 32768),
    "qwen3_omni_moe_vision_encoder": (27, 1152, 16, None),
    "qwen3_vl_moe_text": (24, 2048, 16, 128000),
    "qwen3_vl_moe_vision": (27, 1152, 16, None),
    "qwen3_vl_text": (32, 4096, 32, 128000),
    "qwen3_vl_vision": (27, 1152, 16, None),
    "qwen4_exp_text": (40, 2048, 16, 32768),
    "qwen4_exp_vision": (27, 1152, 16, None),
    "recurrent_gemma": (26, 2560, 10, None),
    "roformer": (12, 768, 12, 1536),
    "sarvam_mla": (32, 4096, 64, 4096),
    "sarvam_moe": (19, 4096, 64, 131072),
    "seed_oss": (64, 4096, 80, 524288),
    "smollm3": (36, 2048, 16, 32768),
    "solar_open": (48, 4096, 64, 131072),
    "stablelm": (32, 2560, 32, 4096),
    "starcoder2": (30, 3072, 24, 4096),
    "step3p5": (45, 4096, 64, 128000),
    "step3p5_vision": (47, 1536, 16, 2704),
    "t5_gemma_module": (26, 2304, 8, 8192),
    "t5gemma2_decoder": (26, 2304, 8, 131072),
    "t5gemma2_text": (26, 2304, 8, 131072),
    "timesfm2_5": (20, 1280, 16, 16384),
    "ultrabert": (32, 4096, 32, 32768),
    "unlimited_ocr_text": (12, 1280, 10, 32768),
    "vaultgemma": (26, 2304, 8, 8192),
    "video_llama_3_vision": (12, 768, 12, None),
    "voxtral_realtime_encoder": (32, 1280, 32, 1500),
    "voxtral_realtime_text": (32, 4096, 32, 131072),
    "xcodec2": (12, 1024, 16, 4096),
    "youtu": (32, 2048, 16, 131072),
    "zamba2": (54, 2560, 32, 4096),
    "zaya": (40, 2048, 8, 131072),
}

# More of them, where a family cannot do without.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8},
    "apertus": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "apertus1p5_text": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "axk1": {"qk_rope_head_dim": 64},
    "axk2": {"qk_rope_head_dim": 32},
    "bailing_hybrid": {"qk_rope_head_dim": 64},
    "beam": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
        "layer_types": ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"],
    },
    "cohere_compass_text": {"rope_parameters": {}, "layer_types": (["full_attention"]) * 40},
    "csm": {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
    "csm_depth_decoder_model": {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
    "cwm": {
        "rope_parameters": {
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    },
    "deepseek_v2": {"qk_rope_head_dim": 64},
    "deepseek_v3": {"qk_rope_head_dim": 64},
    "deepseek_v32": {"qk_rope_head_dim": 64},
    "deepseek_v4": {
        "qk_rope_head_dim": 64,
        "layer_types": ["heavily_compressed_attention"] * 3
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"]
        + ["compressed_sparse_attention"]
        + ["heavily_compressed_attention"],
    },
    "diffusion_gemma_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    },
    "dots3_note_text": {
        "qk_rope_head_dim": 64,
        "layer_types": ["indexed_attention"] * 2
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"]
        + ["sliding_attention"] * 3
        + ["indexed_attention"],
    },
    "embedding_gemma2_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
    },
    "exaone_moe": {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8},
    "flint": {
        "layer_types": ["full_attention"] * 2
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 3
        + ["full_attention"]
        + ["sliding_attention"] * 2
        + ["full_attention"]
    },
    "gemma4_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    },
    "gemma4_unified_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    },
    "glm4_moe_lite": {"qk_rope_head_dim": 64},
    "glm_moe_dsa": {"qk_rope_head_dim": 64},
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150000.0,
        }
    },
    "higgs_audio_v2": {
        "rope_parameters": {
            "factor": 32.0,
            "rope_theta": 500000.0,
            "high_freq_factor": 0.5,
            "low_freq_factor": 0.125,
            "original_max_position_embeddings": 1024,
            "rope_type": "llama3",
        }
    },
    "hy_v4": {"qk_rope_head_dim": 64},
    "hy_v4_vl_text": {"qk_rope_head_dim": 64},
    "jetmoe": {"kv_channels": 128},
    "kolibri1": {"layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 10},
    "laguna": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        "layer_types": (["full_attention"]) * 40,
    },
    "lara_mini": {
        "layer_types": (
            (
                ["linear_attention"]
                + ["sliding_attention"]
                + ["linear_attention"]
                + ["full_attention"]
                + ["sliding_attention"]
            )
            * 7
        )[:34]
    },
    "lfm3": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
        },
        "layer_types": ["conv"] * 2
        + ["full_attention"]
        + ["conv"]
        + ["sliding_attention"]
        + ["conv"]
        + ["full_attention"]
        + ["conv"]
        + ["sliding_attention"]
        + ["conv"]
        + ["full_attention"]
        + ["conv"]
        + ["sliding_attention"]
        + ["conv"]
        + ["full_attention"]
        + ["conv"]
        + ["sliding_attention"]
        + ["conv"]
        + ["full_attention"]
        + ["conv"]
        + ["sliding_attention"]
        + ["conv"]
        + ["full_attention"]
        + ["conv"],
    },
    "longcat_flash": {"qk_rope_head_dim": 64},
    "mellum": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": (["full_attention"]) * 28,
    },
    "mimo_v2_flash": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.334},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.334},
        },
        "layer_types": ["full_attention"]
        + ["sliding_attention"] * 4
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"],
    },
    "minicpm3": {"qk_rope_head_dim": 32},
    "ministral3": {
        "rope_parameters": {
            "type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "max_position_embeddings": 262144,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
            "rope_type": "yarn",
        }
    },
    "mistral4": {
        "qk_rope_head_dim": 64,
        "rope_parameters": {
            "type": "yarn",
            "rope_theta": 10000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "max_position_embeddings": 1048576,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 0.5,
            "rope_type": "yarn",
        },
    },
    "mistral_large4_text": {
        "qk_rope_head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2048.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.0,
        },
    },
    "moonshine_streaming": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.8}
    },
    "muse_spark_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "nemotron3_5_transcribe_asr_audio": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
    "neomme": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        "layer_types": ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 4
        + ["full_attention"],
    },
    "openai_privacy_filter": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150000.0,
        }
    },
    "phi3": {"original_max_position_embeddings": 4096},
    "phi4_multimodal": {"original_max_position_embeddings": 4096},
    "sarvam_mla": {"qk_rope_head_dim": 64},
    "step3p5": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        "layer_types": (["full_attention"]) * 45,
    },
    "ultrabert": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 2560000.0},
        },
        "layer_types": ((["sliding_attention"] * 2 + ["full_attention"]) * 11)[:32],
    },
    "youtu": {"qk_rope_head_dim": 64},
    "zamba2": {"attention_head_dim": 160},
    "zaya": {
        "rope_parameters": {
            "hybrid": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
            "hybrid_sliding": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        "layer_types": (["hybrid"]) * 40,
    },
}

# Model types whose code has no rotation.
WITHOUT_ROTATION = frozenset(
    "aimv2_text_model aimv2_vision_model albert align_text_model align_vision_model altclip_text_model "
    "altclip_vision_model audio-spectrogram-transformer audioflamingo3_encoder autoformer bart beit bert "
    "bert-generation big_bird bigbird_pegasus biogpt bit blenderbot blenderbot-small blip_2_qformer "
    "blip_2_vision_model blip_text_model blip_vision_model bloom bridgetower_text_model "
    "bridgetower_vision_model bros camembert canine chinese_clip_text_model chinese_clip_vision_model "
    "clap_audio_model clap_text_model clip_text_model clip_vision_model clipseg_text_model "
    "clipseg_vision_model coarse_acoustics convbert convnext convnextv2 cpmant ctrl cvt dac data2vec-audio "
    "data2vec-text data2vec-vision deberta deberta-v2 decision_transformer deit dinat dinov2 "
    "dinov2_with_registers dinov3_convnext distilbert donut-swin dpr edgetam_mask_decoder "
    "edgetam_prompt_encoder efficientnet electra encodec eomt ernie falcon_mamba fastspeech2_conformer "
    "fastspeech2_conformer_hifigan fine_acoustics flaubert flava_image_codebook flava_image_model "
    "flava_multimodal_model flava_text_model florence_vision fnet focalnet fsmt fun_asr_nano_encoder funnel "
    "git_vision_model glpn got_ocr2_vision gpt2 gpt_bigcode gpt_neo granite_speech5_encoder "
    "granite_speech_encoder granite_speech_plus_encoder groupvit_text_model groupvit_vision_model hgnet_v2 "
    "hiera hubert ibert idefics2_perceiver idefics2_vision idefics3_vision ijepa imagegpt informer "
    "inkling2_loop_text inkling_audio inkling_text inkling_vision instructblip_qformer "
    "instructblip_vision_model instructblipvideo_qformer instructblipvideo_vision_model internvl_vision "
    "janus_vision_model janus_vqgan kosmos_2_5_text_model kosmos_2_5_vision_model kosmos_2_text_model "
    "kosmos_2_vision_model layoutlm layoutlmv2 layoutlmv3 led levit lilt longformer longt5 luke lw_detr_vit "
    "lxmert m2m_100 mamba mamba2 marian markuplm maskformer-swin mbart megatron-bert metaclip_2_text_model "
    "metaclip_2_vision_model mgp-str minicpm_ocr_vision minicpmv4_6_vision mobilebert mobilenet_v1 "
    "mobilenet_v2 mobilevit mobilevitv2 moss_transcribe_diarize_audio mpnet mra mt5 musicgen_decoder "
    "musicgen_melody_decoder mvp nllb-moe nystromformer omniasr_audio openai-gpt opt ovis2_vision "
    "owlv2_text_model owlv2_vision_model owlvit_text_model owlvit_vision_model patchtsmixer patchtst pegasus "
    "pegasus_x perceiver pix2struct_text_model pix2struct_vision_model pixio plbart poolformer pop2piano "
    "pp_formulanet_text pp_formulanet_vision pp_lcnet pp_lcnet_v3 pp_lcnet_v4 prophetnet pvt pvt_v2 "
    "qianfan_ocr_vision qwen2_audio_encoder qwen3_asr_encoder radio rag reformer regnet rembert resnet "
    "rf_detr_dinov2 roberta roberta-prelayernorm roc_bert rt_detr_resnet rwkv sam2_hiera_det_model "
    "sam2_mask_decoder sam2_prompt_encoder sam3_lite_text_detr_decoder sam3_lite_text_detr_encoder "
    "sam3_lite_text_geometry_encoder sam3_lite_text_mask_decoder sam3_lite_text_text_model "
    "sam3_tracker_mask_decoder sam3_tracker_prompt_encoder sam_hq_mask_decoder sam_hq_prompt_encoder "
    "sam_hq_vision_model sam_mask_decoder sam_prompt_encoder sam_vision_model seamless_m4t_v2 segformer seggpt "
    "semantic sew sew-d siglip2_text_model siglip2_vision_model siglip_text_model siglip_vision_model "
    "slanext_vision smolvlm_vision speech_to_text speecht5 speecht5_hifigan splinter squeezebert superpoint "
    "swiftformer swin swin2sr swinv2 switch_transformers t5 tapas textnet time_series_transformer timesfm "
    "timesformer timm_backbone tipsv2_text_model tipsv2_vision_model trocr udop umt5 unispeech unispeech-sat "
    "univnet uvdoc_backbone vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder "
    "vibevoice_acoustic_tokenizer_encoder vibevoice_diffusion videomae videomt videoprism_text_model "
    "videoprism_vision_model vilt visual_bert vit vit_mae vit_msn vitdet vitpose_backbone vits vivit "
    "voxtral_encoder wav2vec2 wavlm wavtokenizer wavtokenizer_encoder whisper xclip_text_model "
    "xclip_vision_model xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod yolos yoso zamba ".split()
)
