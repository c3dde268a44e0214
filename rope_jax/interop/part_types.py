"""Names the class of each part of a model, and the models without a rotation.

Written by tests/golden/make_class_defaults.py, from transformers 5.24.0.
"""

# fmt: off
# From the model type of a whole model to the types of its parts.
PART_TYPES: dict[str, dict[str, str]] = {
    "aimv2": {"text_config": "aimv2_text_model", "vision_config": "aimv2_vision_model"}, "align": {"text_config":
    "align_text_model", "vision_config": "align_vision_model"}, "altclip": {"text_config": "altclip_text_model",
    "vision_config": "altclip_vision_model"}, "apertus1p5": {"text_config": "apertus1p5_text", "vision_config":
    "apertus1p5_vision_tokenizer", "audio_config": "wavtokenizer_encoder"}, "aria": {"text_config": "aria_text",
    "vision_config": "idefics3_vision"}, "audioflamingo3": {"text_config": "qwen2", "audio_config":
    "audioflamingo3_encoder"}, "aya_vision": {"text_config": "cohere2", "vision_config": "siglip_vision_model"},
    "blip": {"text_config": "blip_text_model", "vision_config": "blip_vision_model"}, "blip-2": {"text_config":
    "opt", "vision_config": "blip_2_vision_model"}, "bridgetower": {"text_config": "bridgetower_text_model",
    "vision_config": "bridgetower_vision_model"}, "chinese_clip": {"text_config": "chinese_clip_text_model",
    "vision_config": "chinese_clip_vision_model"}, "clap": {"text_config": "clap_text_model", "audio_config":
    "clap_audio_model"}, "clip": {"text_config": "clip_text_model", "vision_config": "clip_vision_model"},
    "clipseg": {"text_config": "clipseg_text_model", "vision_config": "clipseg_vision_model"}, "clvp":
    {"text_config": "clvp_encoder"}, "cohere2_vision": {"text_config": "cohere2", "vision_config":
    "siglip_vision_model"}, "cohere_compass": {"text_config": "cohere_compass_text", "vision_config":
    "cohere_compass_vision"}, "cosmos3_edge": {"text_config": "cosmos3_edge_text", "vision_config":
    "cosmos3_edge_vision"}, "cosmos3_omni": {"text_config": "qwen3_vl_text", "vision_config": "qwen3_vl_vision"},
    "deepseek_ocr2": {"text_config": "deepseek_ocr2_text", "vision_config": "deepseek_ocr2_vision"}, "deepseek_vl":
    {"text_config": "llama", "vision_config": "siglip_vision_model"}, "deepseek_vl_hybrid": {"text_config": "llama",
    "vision_config": "siglip_vision_model"}, "diffusion_gemma": {"text_config": "diffusion_gemma_text",
    "vision_config": "gemma4_vision"}, "dots3_note": {"text_config": "dots3_note_text", "vision_config":
    "dots3_note_vision_encoder", "audio_config": "dots3_note_audio_encoder"}, "edgetam": {"vision_config":
    "edgetam_vision_model"}, "edgetam_video": {"vision_config": "sam2_vision_model"}, "embedding_gemma2":
    {"text_config": "embedding_gemma2_text", "vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
    "emu3": {"text_config": "emu3_text_model"}, "ernie4_5_vl_moe": {"text_config": "ernie4_5_vl_moe_text",
    "vision_config": "ernie4_5_vl_moe_vision"}, "exaone4_5": {"text_config": "exaone4", "vision_config":
    "exaone4_5_vision"}, "fast_vlm": {"text_config": "qwen2", "vision_config": "timm_wrapper"}, "flava":
    {"text_config": "flava_text_model"}, "florence2": {"text_config": "bart", "vision_config": "florence_vision"},
    "fun_asr_nano": {"text_config": "qwen3", "audio_config": "fun_asr_nano_encoder"}, "fuyu": {"text_config":
    "persimmon"}, "gemma3": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"}, "gemma3n":
    {"text_config": "gemma3n_text", "vision_config": "gemma3n_vision", "audio_config": "gemma3n_audio"}, "gemma4":
    {"text_config": "gemma4_text", "vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
    "gemma4_unified": {"text_config": "gemma4_unified_text", "vision_config": "gemma4_unified_vision",
    "audio_config": "gemma4_unified_audio"}, "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
    "git": {"vision_config": "git_vision_model"}, "glm46v": {"text_config": "glm4v_text", "vision_config":
    "glm4v_vision"}, "glm4v": {"text_config": "glm4v_text", "vision_config": "glm4v_vision"}, "glm4v_moe":
    {"text_config": "glm4v_moe_text", "vision_config": "glm4v_moe_vision"}, "glm5_next": {"text_config":
    "glm5_next_text", "vision_config": "glm5_next_vision"}, "glm_image": {"text_config": "glm_image_text",
    "vision_config": "glm_image_vision"}, "glm_ocr": {"text_config": "glm_ocr_text", "vision_config":
    "glm_ocr_vision"}, "glmasr": {"text_config": "llama", "audio_config": "glmasr_encoder"}, "glmga":
    {"text_config": "glm4v_text", "vision_config": "glm4v_vision"}, "got_ocr2": {"text_config": "qwen2",
    "vision_config": "got_ocr2_vision"}, "granite4_vision": {"text_config": "granite4_vision_text", "vision_config":
    "clip_vision_model"}, "granite_docling": {"text_config": "granite_docling_text", "vision_config":
    "granite_docling_vision"}, "granite_speech": {"text_config": "granite"}, "granite_speech_plus": {"text_config":
    "granite"}, "grounding-dino": {"text_config": "bert"}, "groupvit": {"text_config": "groupvit_text_model",
    "vision_config": "groupvit_vision_model"}, "hunyuan_vl": {"text_config": "hunyuan_vl_text", "vision_config":
    "hunyuan_vl_vision"}, "hy_v4_vl": {"text_config": "hy_v4_vl_text", "vision_config": "hy_v4_vl_vision"},
    "hyperclovax_vision_v2": {"text_config": "hyperclovax", "vision_config": "qwen2_5_vl_vision"}, "idefics":
    {"vision_config": "idefics_vision"}, "idefics2": {"text_config": "mistral", "vision_config": "idefics2_vision"},
    "idefics3": {"text_config": "llama", "vision_config": "idefics3_vision"}, "inkling2": {"text_config":
    "inkling2_text", "vision_config": "inkling2_vision"}, "inkling2_loop": {"text_config": "inkling2_loop_text",
    "vision_config": "inkling2_vision"}, "inkling_mm_model": {"text_config": "inkling_text", "vision_config":
    "inkling_vision", "audio_config": "inkling_audio"}, "instructblip": {"text_config": "opt", "vision_config":
    "instructblip_vision_model"}, "instructblipvideo": {"text_config": "opt", "vision_config":
    "instructblipvideo_vision_model"}, "internvl": {"text_config": "qwen2", "vision_config": "internvl_vision"},
    "janus": {"text_config": "llama", "vision_config": "janus_vision_model"}, "jev": {"text_config":
    "qwen3_5_text"}, "kimi_k25": {"text_config": "deepseek_v3", "vision_config": "kimi_k25_vision"}, "kosmos-2":
    {"text_config": "kosmos_2_text_model", "vision_config": "kosmos_2_vision_model"}, "kosmos-2.5": {"text_config":
    "kosmos_2_5_text_model", "vision_config": "kosmos_2_5_vision_model"}, "lfm2_vl": {"text_config": "lfm2",
    "vision_config": "siglip2_vision_model"}, "lfm3_vl": {"text_config": "lfm3", "vision_config": "lfm3_vl_vision"},
    "lighton_ocr": {"text_config": "qwen3", "vision_config": "pixtral"}, "llama4": {"text_config": "llama4_text",
    "vision_config": "llama4_vision_model"}, "llava": {"text_config": "llama", "vision_config":
    "clip_vision_model"}, "llava_next": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "llava_next_video": {"text_config": "llama", "vision_config": "clip_vision_model"}, "llava_onevision":
    {"text_config": "qwen2", "vision_config": "siglip_vision_model"}, "metaclip_2": {"text_config":
    "metaclip_2_text_model", "vision_config": "metaclip_2_vision_model"}, "minicpm_ocr": {"text_config":
    "qwen3_5_text", "vision_config": "minicpm_ocr_vision"}, "minicpmv4_6": {"text_config": "qwen3_5_text",
    "vision_config": "minicpmv4_6_vision"}, "minicpmv4_7": {"text_config": "qwen3_5_text", "vision_config":
    "minicpmv4_7_vision"}, "minimax_m3_vl": {"text_config": "minimax_m3_vl_text", "vision_config":
    "minimax_m3_vl_vision"}, "mistral3": {"text_config": "mistral", "vision_config": "pixtral"}, "mistral_large4":
    {"text_config": "mistral_large4_text", "vision_config": "pixtral"}, "mllama": {"text_config":
    "mllama_text_model", "vision_config": "mllama_vision_model"}, "mm-grounding-dino": {"text_config": "bert"},
    "modernvbert": {"text_config": "modernbert", "vision_config": "siglip_vision_model"}, "molmo2": {"text_config":
    "molmo2_text", "vision_config": "molmo2_vision"}, "moss_transcribe_diarize": {"text_config": "qwen3",
    "audio_config": "moss_transcribe_diarize_audio"}, "muse_glimmer": {"text_config": "muse_glimmer_text",
    "vision_config": "muse_glimmer_vision"}, "muse_spark": {"text_config": "muse_spark_text", "vision_config":
    "muse_spark_vision", "audio_config": "muse_spark_audio"}, "musicflamingo": {"text_config": "qwen2",
    "audio_config": "audioflamingo3_encoder"}, "nemo_speechlm": {"text_config": "nemotron_h", "audio_config":
    "nemotron3_5_transcribe_audio"}, "nemotron3_diarization": {"audio_config": "nemotron3_diarization_audio"},
    "nemotron_h_omni": {"text_config": "nemotron_h", "vision_config": "radio", "audio_config": "parakeet_encoder"},
    "omdet-turbo": {"text_config": "clip_text_model"}, "omniasr": {"text_config": "llama", "audio_config":
    "omniasr_audio"}, "omniasr_ctc": {"audio_config": "omniasr_audio"}, "ovis2": {"text_config": "qwen2",
    "vision_config": "ovis2_vision"}, "owlv2": {"text_config": "owlv2_text_model", "vision_config":
    "owlv2_vision_model"}, "owlvit": {"text_config": "owlvit_text_model", "vision_config": "owlvit_vision_model"},
    "paddleocr_vl": {"text_config": "paddleocr_vl_text", "vision_config": "paddleocr_vl_vision"}, "paligemma":
    {"text_config": "gemma", "vision_config": "siglip_vision_model"}, "pe_audio": {"text_config": "modernbert",
    "audio_config": "pe_audio_encoder"}, "pe_audio_video": {"text_config": "modernbert"}, "pe_audio_video_encoder":
    {"audio_config": "pe_audio_encoder"}, "pe_video": {"text_config": "modernbert"}, "pe_video_encoder":
    {"vision_config": "timm_wrapper"}, "perception_lm": {"text_config": "llama", "vision_config": "timm_wrapper"},
    "phi4_multimodal": {"vision_config": "phi4_multimodal_vision", "audio_config": "phi4_multimodal_audio"},
    "pix2struct": {"text_config": "pix2struct_text_model", "vision_config": "pix2struct_vision_model"},
    "pp_chart2table": {"text_config": "qwen2", "vision_config": "pp_chart2table_vision"}, "pp_formulanet":
    {"text_config": "pp_formulanet_text", "vision_config": "pp_formulanet_vision"}, "qianfan_ocr": {"text_config":
    "qwen3", "vision_config": "qianfan_ocr_vision"}, "qwen2_5_omni_thinker": {"text_config": "qwen2_5_omni_text",
    "vision_config": "qwen2_5_omni_vision_encoder", "audio_config": "qwen2_5_omni_audio_encoder"}, "qwen2_5_vl":
    {"text_config": "qwen2_5_vl_text", "vision_config": "qwen2_5_vl_vision"}, "qwen2_audio": {"text_config":
    "qwen2", "audio_config": "qwen2_audio_encoder"}, "qwen2_vl": {"text_config": "qwen2_vl_text", "vision_config":
    "qwen2_vl_vision"}, "qwen3_5": {"text_config": "qwen3_5_text", "vision_config": "qwen3_5_vision"},
    "qwen3_5_moe": {"text_config": "qwen3_5_moe_text", "vision_config": "qwen3_5_moe_vision"}, "qwen3_asr":
    {"text_config": "qwen3", "audio_config": "qwen3_asr_encoder"}, "qwen3_omni_moe_thinker": {"text_config":
    "qwen3_omni_moe_text", "vision_config": "qwen3_omni_moe_vision_encoder", "audio_config":
    "qwen3_omni_moe_audio_encoder"}, "qwen3_vl": {"text_config": "qwen3_vl_text", "vision_config":
    "qwen3_vl_vision"}, "qwen3_vl_moe": {"text_config": "qwen3_vl_moe_text", "vision_config":
    "qwen3_vl_moe_vision"}, "qwen4_exp": {"text_config": "qwen4_exp_text", "vision_config": "qwen4_exp_vision"},
    "sam": {"vision_config": "sam_vision_model"}, "sam2": {"vision_config": "sam2_vision_model"}, "sam2_video":
    {"vision_config": "sam2_vision_model"}, "sam3": {"text_config": "clip_text_model", "vision_config":
    "sam3_vision_model"}, "sam3_lite_text": {"text_config": "sam3_lite_text_text_model", "vision_config":
    "sam3_vision_model"}, "sam3_tracker": {"vision_config": "sam3_vision_model"}, "sam3_tracker_video":
    {"vision_config": "sam3_vision_model"}, "sam_hq": {"vision_config": "sam_hq_vision_model"}, "shieldgemma2":
    {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"}, "siglip": {"text_config":
    "siglip_text_model", "vision_config": "siglip_vision_model"}, "siglip2": {"text_config": "siglip2_text_model",
    "vision_config": "siglip2_vision_model"}, "slanext": {"vision_config": "slanext_vision"}, "smolvlm":
    {"text_config": "llama", "vision_config": "smolvlm_vision"}, "step3p7": {"text_config": "step3p5",
    "vision_config": "step3p5_vision"}, "t5gemma2_encoder": {"text_config": "t5gemma2_text", "vision_config":
    "siglip_vision_model"}, "tipsv2": {"text_config": "tipsv2_text_model", "vision_config": "tipsv2_vision_model"},
    "ultravbert": {"text_config": "ultrabert", "vision_config": "siglip_vision_model"}, "unlimited_ocr":
    {"text_config": "unlimited_ocr_text", "vision_config": "unlimited_ocr_vision"}, "vibevoice": {"text_config":
    "qwen2", "audio_config": "vibevoice_acoustic_tokenizer"}, "vibevoice_asr": {"text_config": "qwen2"},
    "video_llama_3": {"text_config": "qwen2", "vision_config": "video_llama_3_vision"}, "video_llava":
    {"text_config": "llama", "vision_config": "clip_vision_model"}, "videoprism": {"text_config":
    "videoprism_text_model", "vision_config": "videoprism_vision_model"}, "vipllava": {"text_config": "llama",
    "vision_config": "clip_vision_model"}, "vision-text-dual-encoder": {"text_config": "bert", "vision_config":
    "vit"}, "voxtral": {"text_config": "llama", "audio_config": "voxtral_encoder"}, "voxtral_realtime":
    {"text_config": "voxtral_realtime_text", "audio_config": "voxtral_realtime_encoder"}, "xclip": {"text_config":
    "xclip_text_model", "vision_config": "xclip_vision_model"},
}

_WITHOUT = """
aimv2_text_model aimv2_vision_model albert align_text_model align_vision_model altclip_text_model
altclip_vision_model audio-spectrogram-transformer audioflamingo3_encoder autoformer bart beit bert
bert-generation big_bird bigbird_pegasus biogpt bit blenderbot blenderbot-small blip_2_qformer
blip_2_vision_model blip_text_model blip_vision_model bloom bridgetower_text_model bridgetower_vision_model bros
camembert canine chinese_clip_text_model chinese_clip_vision_model clap_audio_model clap_text_model
clip_text_model clip_vision_model clipseg_text_model clipseg_vision_model coarse_acoustics convbert convnext
convnextv2 cpmant ctrl cvt dac data2vec-audio data2vec-text data2vec-vision deberta deberta-v2
decision_transformer deit dinat dinov2 dinov2_with_registers dinov3_convnext distilbert donut-swin dpr
edgetam_mask_decoder edgetam_prompt_encoder efficientnet electra encodec eomt ernie falcon_mamba
fastspeech2_conformer fastspeech2_conformer_hifigan fine_acoustics flaubert flava_image_codebook
flava_image_model flava_multimodal_model flava_text_model florence_vision fnet focalnet fsmt
fun_asr_nano_encoder funnel git_vision_model glpn got_ocr2_vision gpt2 gpt_bigcode gpt_neo
granite_speech5_encoder granite_speech_encoder granite_speech_plus_encoder groupvit_text_model
groupvit_vision_model hgnet_v2 hiera hubert ibert idefics2_perceiver idefics2_vision idefics3_vision ijepa
imagegpt informer inkling2_loop_text inkling_audio inkling_text inkling_vision instructblip_qformer
instructblip_vision_model instructblipvideo_qformer instructblipvideo_vision_model internvl_vision
janus_vision_model janus_vqgan kosmos_2_5_text_model kosmos_2_5_vision_model kosmos_2_text_model
kosmos_2_vision_model layoutlm layoutlmv2 layoutlmv3 led levit lilt longformer longt5 luke lw_detr_vit lxmert
m2m_100 mamba mamba2 marian markuplm maskformer-swin mbart megatron-bert metaclip_2_text_model
metaclip_2_vision_model mgp-str minicpm_ocr_vision minicpmv4_6_vision mobilebert mobilenet_v1 mobilenet_v2
mobilevit mobilevitv2 moss_transcribe_diarize_audio mpnet mra mt5 musicgen_decoder musicgen_melody_decoder mvp
nllb-moe nystromformer omniasr_audio openai-gpt opt ovis2_vision owlv2_text_model owlv2_vision_model
owlvit_text_model owlvit_vision_model patchtsmixer patchtst pegasus pegasus_x perceiver pix2struct_text_model
pix2struct_vision_model pixio plbart poolformer pop2piano pp_formulanet_text pp_formulanet_vision pp_lcnet
pp_lcnet_v3 pp_lcnet_v4 prophetnet pvt pvt_v2 qianfan_ocr_vision qwen2_audio_encoder qwen3_asr_encoder radio rag
reformer regnet rembert resnet rf_detr_dinov2 roberta roberta-prelayernorm roc_bert rt_detr_resnet rwkv
sam2_hiera_det_model sam2_mask_decoder sam2_prompt_encoder sam3_lite_text_detr_decoder
sam3_lite_text_detr_encoder sam3_lite_text_geometry_encoder sam3_lite_text_mask_decoder
sam3_lite_text_text_model sam3_tracker_mask_decoder sam3_tracker_prompt_encoder sam_hq_mask_decoder
sam_hq_prompt_encoder sam_hq_vision_model sam_mask_decoder sam_prompt_encoder sam_vision_model seamless_m4t_v2
segformer seggpt semantic sew sew-d siglip2_text_model siglip2_vision_model siglip_text_model
siglip_vision_model slanext_vision smolvlm_vision speech_to_text speecht5 speecht5_hifigan splinter squeezebert
superpoint swiftformer swin swin2sr swinv2 switch_transformers t5 tapas textnet time_series_transformer timesfm
timesformer timm_backbone tipsv2_text_model tipsv2_vision_model trocr udop umt5 unispeech unispeech-sat univnet
uvdoc_backbone vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder
vibevoice_acoustic_tokenizer_encoder vibevoice_diffusion videomae videomt videoprism_text_model
videoprism_vision_model vilt visual_bert vit vit_mae vit_msn vitdet vitpose_backbone vits vivit voxtral_encoder
wav2vec2 wavlm wavtokenizer wavtokenizer_encoder whisper xclip_text_model xclip_vision_model xglm xlm
xlm-roberta xlm-roberta-xl xlnet xlstm xmod yolos yoso zamba
"""
# Model types whose code has no rotation.
WITHOUT_ROTATION = frozenset(_WITHOUT.split())
