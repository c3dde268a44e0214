"""What does each model family know about its rotation that its config.json does not say?

One table, from the ``model_type`` of a config to a :class:`Family`. Most families are Llama's and differ by
nothing; a row says only what differs. ``make oracle`` holds the table against transformers itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from rope_jax.core.primitive import Layout

Layers = Literal[
    "all",
    "no_rope_layers",
    "sliding",
    "sliding_if_any",
    "dense_or_sliding",
    "layer_rope_theta",
    "rope_scaling_layers",
]
Sections = Literal["chunked", "strided", "alternating", "by_turns", "rows_columns", "columns_rows"]
Temperature = Literal["yarn", "without_rope"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The habits of one model family, where its config.json leaves them open.

    Attributes:
      layout: which two features make a pair.
      layout_key: a key of the config that says whether pairs are interleaved.
      base: b, where the config gives none.
      base_in: key of a dictionary that may hold b (and that transformers does not read).
      proportion: R/H, where the config gives none. 1 where it is None; then transformers reads no proportion at
        all for the plain rotation.
      rotary_dim: R, where the config gives neither that nor a share.
      rotary_dim_is_lost: whether transformers does not read the config's ``rotary_dim``.
      head_dim: keys that hold H, first found first.
      default_head_dim: H where all of those are missing; D/N where this is None too.
      global_head_dim: H of layers of full attention, where the config gives none of their own.
      width: key of D, in the place of ``hidden_size``.
      heads: key of the number of heads, in the place of ``num_attention_heads``.
      num_layers: key of the number of layers, in the place of ``num_hidden_layers``.
      latent: whether the rotated part of a head stands alone, with ``qk_rope_head_dim`` features.
      layers: which layers rotate. ``no_rope_layers``: those with a 1 in that list; ``sliding``: those with a
        sliding window; ``sliding_if_any``: those, or all if there is no window; ``dense_or_sliding``: those, and
        the dense ones before the experts; ``layer_rope_theta``: those with a base in that list;
        ``rope_scaling_layers``: all, but those that are not in that list without scaling.
      original_outside: whether ``original_max_position_embeddings`` stands at the top of a config.
      explicit: whether a config must say its recipe, because the family's own is more than a base.
      nested: whether ``rope_parameters`` has an entry for each type of layer.
      labels: from a layer's type to the name of its entry in ``rope_parameters``, where these differ.
      bases: of older configs, which have one flat recipe: for each layer type, the key of its base, that base
        where the key is missing, and whether ``rope_scaling`` is for it.
      full_every: of older configs, which have no ``layer_types``: the key of the period, the period where that is
        missing, the first layer of full attention, and the type of the others.
      switch: a key, the value with which the model rotates at all, and the value where the key is missing.
      hybrid: whether some layers have no attention, or no rotation, so that a config must say which.
      beyond: what the layers do with positions that a recipe does not say.
      ntk_alpha: whether ``alpha`` beside rope_type "dynamic" stands for a fixed factor.
      optional: whether ``rope_parameters`` may be null, and nothing rotates then.
      attention_factor: of YaRN in older configs, which give none.
      sections: how the pairs are dealt to the axes of the position. ``chunked``: in runs; ``strided``: every
        third pair to h and to w as far as their sections go, the others to t; ``alternating``: h and w by turns,
        t behind; ``by_turns``: rows and columns by turns; ``rows_columns``: a ladder of its own for each, one
        behind the other, and ``columns_rows`` the other way around.
      default_sections: pairs for each axis, where the config gives none.
      logit_factor: whether YaRN's ``mscale_all_dim`` also multiplies the scores, as g(mscale_all_dim)^2.
      temperature: whether queries are scaled by their position, see :class:`QueryTemperature`: in all layers, by
        keys beside those of YaRN, or in the layers that do not rotate.
      reversed: whether pairs turn by -m theta.
      aliases: names of a rope_type that mean another one here.
      unread: keys that released checkpoints carry beside their recipe and that their own code does not read.
    """

    layout: Layout = "half"
    layout_key: str | None = None
    base: float = 10_000.0
    base_in: str | None = None
    proportion: float | None = None
    rotary_dim: int | None = None
    rotary_dim_is_lost: bool = False
    head_dim: tuple[str, ...] = ("head_dim",)
    width: str = "hidden_size"
    heads: str = "num_attention_heads"
    default_head_dim: int | None = None
    global_head_dim: int | None = None
    num_layers: str = "num_hidden_layers"
    latent: bool = False
    layers: Layers = "all"
    original_outside: bool = False
    explicit: bool = False
    nested: bool = False
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bases: Mapping[str, tuple[str, float, bool]] = dataclasses.field(default_factory=dict)
    full_every: tuple[str, int, int, str] | None = None
    switch: tuple[str, object, object] | None = None
    hybrid: bool = False
    beyond: str | None = None
    ntk_alpha: bool = False
    optional: bool = False
    attention_factor: float | None = None
    sections: Sections | None = None
    default_sections: tuple[int, ...] | None = None
    logit_factor: bool = False
    temperature: Temperature | None = None
    reversed: bool = False
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def label(self, layer_type: str | None) -> str | None:
        """The name of the entry of ``rope_parameters`` for layers of a type."""
        return layer_type if layer_type is None else self.labels.get(layer_type, layer_type)


WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent")
"""Types of layers that have nothing to rotate."""

FAMILIES: dict[str, Family] = {}


def _family(model_types: str, **habits) -> None:
    FAMILIES.update(dict.fromkeys(model_types.split(), Family(**habits)))


# --------------------------------------------------------------------------- one flat recipe, the whole head

_family(
    "arcee aria_text chameleon deepseek_ocr2_encoder deepseek_ocr2_text "
    "dia_decoder dia_encoder diffllama doge dots1 esmc eurobert falcon_h1 gemma gemma2 gradium_phonon_tts "
    "granite granite4_vision_text granite_docling_text granitemoe granitemoeshared hrm_text "
    "hyperclovax idefics jais2 kyutai_speech_to_text lasr_encoder llama mimi ministral mistral moshi neucodec "
    "olmo olmo2 olmoe pocket_tts pocket_tts_audio_tokenizer qwen2 qwen2_5_omni_dit qwen2_moe qwen3 qwen3_moe "
    "qwen3_omni_moe_code2wav qwen3_omni_moe_talker_code_predictor seed_oss starcoder2 t5_gemma_module "
    "timesfm2_5 unlimited_ocr_text vaultgemma voxtral_realtime_encoder voxtral_realtime_text xcodec2"
)
_family("csm csm_depth_decoder_model", base=5e5, explicit=True)
_family("higgs_audio_v2", explicit=True)
_family("apertus", base=12e6, explicit=True)
_family("bitnet evolla flex_olmo mllama_text_model muse_glimmer_assistant", base=5e5)
_family("cwm", base=1e6, explicit=True)
_family("dbrx", base_in="attn_config")
_family("emu3_text_model mixtral", base=1e6)
_family("lfm2 lfm2_moe minimax", base=1e6, hybrid=True)
_family("nomic_bert", base=1000.0)
_family("gte", base=1.6e5)
_family("gpt_oss", base=1.5e5, explicit=True)
_family("hy_v3", base=11158840.0)
_family("jina_embeddings_v3", base=2e4)
_family("jetmoe", head_dim=("kv_channels",))
_family("falcon", switch=("alibi", False, False))
_family("granitemoehybrid", hybrid=True, switch=("position_embedding_type", "rope", None))
_family("esm", switch=("position_embedding_type", "rotary", "absolute"))
_family("olmo_hybrid", hybrid=True, optional=True)
_family("zamba2", hybrid=True, head_dim=("attention_head_dim",), switch=("use_mem_rope", True, False))
_family("nanochat", reversed=True)
_family("molmo2_text", layers="rope_scaling_layers")
_family("ministral3", explicit=True, temperature="yarn", unread=("max_position_embeddings",))
_family(
    "hunyuan_v1_dense hunyuan_v1_moe",
    ntk_alpha=True,
    unread=("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
_family("phimoe", base=1e6)

# ------------------------------------------------------------------------------------- part of the head

_family(
    "glm4_moe glmasr_encoder dots3_note_audio_encoder nemotron persimmon phi",
    proportion=0.5,
)
_family("bamba recurrent_gemma", hybrid=True, proportion=0.5)
_family("gpt_neox stablelm", proportion=0.25)
_family("qwen3_next", proportion=0.25, full_every=("full_attention_interval", 4, 3, "linear_attention"))
_family("gpt_neox_japanese nemotron3_diarization_audio", proportion=1.0)
_family("nemotron3_5_transcribe_asr_audio", proportion=1.0, explicit=True)
_family("solar_open", base=1e6, proportion=1.0)
_family("minimax_m2", base=5e6, proportion=1.0)
_family("minimax_m3_vl_text", base=5e6, proportion=1.0, rotary_dim=64, rotary_dim_is_lost=True)
_family("phi3 phi4_multimodal", proportion=1.0, original_outside=True, aliases={"yarn": "longrope"})

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
    heads="decoder_num_attention_heads",
    num_layers="decoder_num_hidden_layers",
)
_family("moonshine_streaming", layout="interleaved", proportion=1.0, explicit=True)
_family("gptj", layout="interleaved", proportion=1.0, rotary_dim=64, switch=("rotary", True, True))
_family("codegen", layout="interleaved", proportion=1.0, rotary_dim=64)
_family("roformer", layout="interleaved", proportion=1.0)

# ---------------------------------------------------------------------- layers that differ, one recipe a layer type

_family(
    "cohere2",
    layout="interleaved",
    layers="sliding",
    full_every=("sliding_window_pattern", 4, 3, "sliding_attention"),
)
_family("cohere2_moe", layout="interleaved", layers="dense_or_sliding")
_family("afmoe flint", layers="sliding")
_family("exaone4", layers="sliding_if_any", full_every=("sliding_window_pattern", 4, 3, "sliding_attention"))
_family("exaone_moe kolibri1", layers="sliding_if_any")
_family("smollm3", base=2e6, layers="no_rope_layers")
_family("llama4_text", layout="interleaved", base=5e5, layers="no_rope_layers", temperature="without_rope")
_family("granite_swa granitemoe_swa", layers="layer_rope_theta")
_family("muse_glimmer_text", hybrid=True, layers="layer_rope_theta")
_family("muse_spark_text", explicit=True, hybrid=True, layers="layer_rope_theta")
_family("laguna mellum mimo_v2_flash step3p5 zaya diffusion_gemma_text", nested=True, proportion=1.0)
_family("beam", nested=True, beyond="queries grow as (1 + (m + 1) / 2048)^0.1 where nothing rotates")
_family("ultrabert embedding_gemma2_text", nested=True)
_family("lfm3", base=1e6, nested=True)
_family("gemma4_text gemma4_unified_text", nested=True)
_gemma3 = {"full_attention": ("rope_theta", 1e6, True), "sliding_attention": ("rope_local_base_freq", 1e4, False)}
_family(
    "gemma3_text t5gemma2_text t5gemma2_decoder",
    nested=True,
    bases=_gemma3,
    full_every=("sliding_window_pattern", 6, 5, "sliding_attention"),
)
_family(
    "gemma3n_text", nested=True, bases=_gemma3, full_every=("sliding_window_pattern", 5, 4, "sliding_attention")
)
_family(
    "olmo3",
    nested=True,
    bases={"full_attention": ("rope_theta", 5e5, True), "sliding_attention": ("rope_theta", 5e5, False)},
    full_every=("sliding_window_pattern", 4, 3, "sliding_attention"),
)
_family(
    "modernbert modernbert-decoder",
    nested=True,
    bases={
        "full_attention": ("global_rope_theta", 1.6e5, True),
        "sliding_attention": ("local_rope_theta", 1e4, True),
    },
    full_every=("global_attn_every_n_layers", 3, 0, "sliding_attention"),
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
    "mistral4",
    explicit=True,
    latent=True,
    layout="interleaved",
    layout_key="rope_interleave",
    logit_factor=True,
    temperature="yarn",
    unread=("max_position_embeddings",),
)
_family("deepseek_v2 deepseek_v32 axk2 glm_moe_dsa", latent=True, layout="interleaved", logit_factor=True)
_family("bailing_hybrid", hybrid=True, latent=True, layout="interleaved", base=6e6, logit_factor=True)
_family("longcat_flash", num_layers="num_layers", latent=True, layout="interleaved", base=1e7, logit_factor=True)
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
    bases={"indexed_attention": ("rope_theta", 8e7, True), "sliding_attention": ("swa_rope_theta", 5e4, True)},
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
    bases={"main": ("rope_theta", 1e4, False), "compress": ("compress_rope_theta", 1.6e5, True)},
    attention_factor=1.0,
)

# ------------------------------------------------------------- positions with several axes: text, height, width

_family(
    "qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text", base=1e6, sections="chunked", default_sections=(16, 24, 24)
)
_family("qwen2_5_omni_text qwen2_5_omni_talker", base=1e6, sections="chunked", default_sections=(16, 24, 24))
_family("paddleocr_vl_text", base=5e5, sections="chunked", default_sections=(16, 24, 24))
_family(
    "hunyuan_vl_text",
    ntk_alpha=True,
    sections="chunked",
    unread=("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
_family(
    "glm4v_text glm_ocr_text",
    layout="interleaved",
    proportion=1.0,
    sections="chunked",
    default_sections=(8, 12, 12),
)
_family("glm4v_moe_text", proportion=0.5, sections="chunked", default_sections=(8, 12, 12))
_family("glm_image_text", proportion=1.0, sections="chunked", default_sections=(8, 12, 12))
_family("qwen3_vl_text qwen3_vl_moe_text", base=5e5, sections="strided", default_sections=(24, 20, 20))
_family("qwen3_omni_moe_text", base=1e6, sections="strided", default_sections=(24, 20, 20))
_family("qwen3_omni_moe_talker_text", sections="strided", default_sections=(24, 20, 20))
_family("cosmos3_edge_text", base=1e8, sections="strided", default_sections=(24, 20, 20))
_family("cohere_compass_text", nested=True, sections="strided", default_sections=(24, 20, 20))
_family(
    "qwen3_5_text qwen3_5_moe_text",
    proportion=0.25,
    sections="strided",
    default_sections=(11, 11, 10),
    full_every=("full_attention_interval", 4, 3, "linear_attention"),
)
_family("qwen4_exp_text", proportion=1.0, sections="strided", default_sections=(11, 11, 10))
_family(
    "ernie4_5_vl_moe_text", layout="interleaved", base=5e5, sections="alternating", default_sections=(22, 22, 20)
)
_family("neomme", nested=True, proportion=1.0, sections="by_turns")

# -------------------------------------------------------------------------------- pictures: rows and columns

_family(
    "cohere_compass_vision ernie4_5_vl_moe_vision exaone4_5_vision glm4v_vision glm4v_moe_vision glm5_next_vision "
    "glm_ocr_vision qwen2_5_omni_vision_encoder qwen2_5_vl_vision qwen3_5_vision qwen3_5_moe_vision "
    "qwen3_omni_moe_vision_encoder qwen3_vl_vision qwen3_vl_moe_vision qwen4_exp_vision",
    heads="num_heads",
    num_layers="depth",
    sections="rows_columns",
)
_family("qwen2_vl_vision", heads="num_heads", num_layers="depth", width="embed_dim", sections="rows_columns")
_family(
    "dots3_note_vision_encoder mlcd_vision_model muse_glimmer_vision muse_spark_vision paddleocr_vl_vision "
    "video_llama_3_vision",
    sections="rows_columns",
)
_family("lfm3_vl_vision", base=1e6, sections="rows_columns")
_family("step3p5_vision", sections="columns_rows")
_family("inkling2_vision", layout="interleaved", sections="columns_rows")

# ------------------------------------------------------- H where a config says none, and D/N is not what is meant

_HEAD_DIMS = {
    64: "gpt_oss muse_spark_text neomme neucodec openai_privacy_filter qwen2_5_omni_dit "
    "voxtral_realtime_encoder xcodec2",
    80: "timesfm2_5",
    128: "afmoe beam cohere2_moe cosmos3_edge_text cwm dia_decoder dia_encoder ernie4_5 flint glm glm4 helium "
    "higgs_audio_v2 hrm_text hy_v3 jetmoe kolibri1 laguna lfm3 llama4_text mellum minimax_m2 "
    "minimax_m3_vl_text ministral3 molmo2_text muse_glimmer_assistant muse_glimmer_text pe_audio_encoder "
    "pe_audio_video_encoder pe_video_encoder qwen2_5_omni_talker qwen3 qwen3_vl_text seed_oss solar_open "
    "step3p5 zaya",
    192: "mimo_v2_flash",
    256: "diffusion_gemma_text embedding_gemma2_text gemma gemma2 gemma3_text gemma3n_text gemma4_text "
    "gemma4_unified_text qwen3_5_text qwen3_next t5_gemma_module t5gemma2_decoder t5gemma2_text "
    "vaultgemma",
}
_GLOBAL_HEAD_DIM = "diffusion_gemma_text embedding_gemma2_text gemma4_text gemma4_unified_text"

for _head_dim, _model_types in _HEAD_DIMS.items():
    for _name in _model_types.split():
        FAMILIES[_name] = dataclasses.replace(FAMILIES[_name], default_head_dim=_head_dim)
for _name in _GLOBAL_HEAD_DIM.split():
    FAMILIES[_name] = dataclasses.replace(FAMILIES[_name], global_head_dim=512)
