"""Configs from public repositories, cut to their keys of sizes and rotation: what each gives, or where it leads.

``golden/configs_in_the_wild.json`` holds each config with its source and, where transformers 5.24 runs it, a few of
its numbers: ``theirs``. The expected values are formulas of ``oracles.py``, which share no code with the library.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from released import config_of

import rope_jax
from rope_jax.interop.families import FAMILIES
from rope_jax.interop.parts import LIKE
from rope_jax.interop.write import to_hf_config

WILD = json.loads(Path(__file__).parents[1].joinpath("golden", "configs_in_the_wild.json").read_text())


@dataclasses.dataclass(frozen=True)
class Expected:
    """The rotation of some layers.

    Attributes:
      head_dim: H.
      values: the frequencies ``[R/2]`` and the attention factor, by formula.
      layers: their indices; all layers if None.
      layout: which two features make a pair.
      logit_factor: multiplies the scores.
      axes: the position axis of each pair; None for one axis.
      context_length: where the frequencies are compared.
    """

    head_dim: int
    values: Any
    layers: Any = None
    layout: str = "half"
    logit_factor: float = 1.0
    axes: Any = None
    context_length: int | None = None


def plain(dim, base):
    return oracles.standard(dim, base)


MINICPM = WILD["minicpm4"]["config"]["rope_scaling"]
STILL = object()  # layers without a rotation
READ = {
    "baichuan2_7b": ("llama", 32, [Expected(128, plain(128, 1e4))]),
    "deepseek_v4_flash": (
        None,
        43,
        [
            Expected(64, plain(64, 1e4), [0, 1], "interleaved"),
            Expected(64, (oracles.yarn(64, 1.6e5, 16, 65536)[0], 1.0), range(2, 43), "interleaved"),
        ],
    ),
    "devstral_2_123b": (None, 88, [Expected(128, oracles.yarn(128, 1e6, 64, 4096, 4, 1))]),
    "eagle3_mrope_llama": (
        "qwen2_vl",
        1,
        [Expected(128, plain(128, 1e6), axes=[0] * 16 + [1] * 24 + [2] * 24)],
    ),
    "exaone_3_5": (None, 32, [Expected(128, oracles.llama3(128, 1e6, 8, 8192, 1, 4))]),
    "exaone_4_5": (
        None,
        64,
        [
            Expected(128, oracles.llama3(128, 1e6, 16, 8192, 1, 4), [i for i in range(64) if i % 4 != 3]),
            (STILL, range(3, 64, 4)),
        ],
    ),
    "glm4v_flat": (
        None,
        40,
        [Expected(128, plain(64, 1e4), layout="interleaved", axes=[0] * 8 + [1] * 12 + [2] * 12)],
    ),
    "glm_5": (None, 78, [Expected(64, plain(64, 1e6), layout="interleaved")]),
    "head_dim_null_seed_oss": (None, 2, [Expected(64, plain(64, 1e7))]),
    "hunyuan_eagle3_alpha_llama": ("hunyuan_v1_dense", 1, [Expected(128, oracles.ntk(128, 1e4, 1000.0))]),
    "internvl2_2b": ("llama", 24, [Expected(128, oracles.dynamic_ntk(128, 1e6, 2, 512, 700), context_length=700)]),
    "kimi_k2": (
        None,
        61,
        [
            Expected(
                64,
                (oracles.yarn(64, 5e4, 32, 4096, 1, 1)[0], 1.0),
                layout="interleaved",
                logit_factor=(0.1 * np.log(32) + 1) ** 2,
            )
        ],
    ),
    # LLaMA-Factory's original length beside the rule counts for nothing, there and in transformers.
    "llamafactory_dynamic": (
        None,
        36,
        [Expected(128, oracles.dynamic_ntk(128, 1e6, 2, 81920, 99_999), context_length=99_999)],
    ),
    "llava_1_5_7b_hf": (None, 32, [Expected(128, plain(128, 1e4))]),
    "mimo_7b": ("qwen2", 36, [Expected(128, plain(128, 6.4e5))]),
    "mimo_v2_flash": (
        None,
        48,
        [
            Expected(192, plain(64, 5e6), [0, *range(5, 48, 6)]),
            Expected(192, plain(64, 1e4), [i for i in range(1, 48) if i % 6 != 5]),
        ],
    ),
    "minicpm4": (
        "llama",
        32,
        [Expected(128, oracles.longrope(128, 1e4, MINICPM["long_factor"], 1, 32768), context_length=32769)],
    ),
    "minimax_m3_text": (None, 60, [Expected(128, plain(64, 5e6))]),
    "mllama_no_text_type": (None, 32, [Expected(128, plain(128, 5e5))]),
    "mrope_message": ("qwen2_vl", 1, [Expected(16, plain(16, 1e6), axes=[0, 0, 1, 1, 1, 2, 2, 2])]),
    "null_recipe": (None, 36, [Expected(128, plain(128, 1e6))]),
    "qwen2_audio": (None, 32, [Expected(128, plain(128, 1e4))]),
    # What the model was evaluated with: vLLM's g(4) * attn_factor = 1.
    "r1_0528_qwen3_8b_attn_factor": (None, 36, [Expected(128, (oracles.yarn(128, 1e6, 4, 32768)[0], 1.0))]),
    "step3p5_flash": (
        None,
        4,
        [
            Expected(128, oracles.llama3(64, 5e6, 2, 131072, 1, 32), [0]),
            Expected(128, plain(128, 1e4), [1, 2, 3]),
        ],
    ),
}
REFUSED = {
    "baichuan2_7b": "'baichuan' is unknown; it rotates as 'llama' does (the 7B; the 13B has ALiBi instead): "
    "pass like='llama'",
    "chatglm_glm4_9b": "model_type 'chatglm' is unknown; it rotates as 'glm' does: pass like='glm'",
    "eagle3_mrope_llama": "got 'mrope'; pairs that read several axes need their family: like='qwen2_vl' or",
    "gte_new_ntk": "model_type 'new' is unknown; it rotates as 'gte' does: pass like='gte'",
    "hunyuan_eagle3_alpha_llama": "has an unknown key 'alpha' = 1000.0; a key of HunYuan's dynamic scaling: "
    "like='hunyuan_v1_dense' reads it",
    "internvl2_2b": "model_type 'internlm2' in llm_config of 'internvl_chat' is unknown; it rotates as 'llama' does",
    "mimo_7b": "model_type 'mimo' is unknown; it rotates as 'qwen2' does: pass like='qwen2'",
    "minicpm4": "model_type 'minicpm' is unknown; it rotates as 'llama' does: pass like='llama'",
    "mrope_message": "got 'mrope'; pairs that read several axes need their family: like='qwen2_vl' or",
    "nemotron_h": "config of 'nemotron_h' does not rotate queries and keys: its attention has no position encoding",
}
# Refused with ``like`` too: the message says what to write instead.
REFUSED_LIKE = {
    "chatglm_glm4_9b": (
        "glm",
        "'rope_ratio' = 500; it multiplies the base in GLM-4 and ChatGLM3: write rope_theta = ",
    ),
    "gte_new_ntk": (
        "gte",
        "got 'ntk'; Alibaba's fixed NTK, inv_freq_i = base^(-2i/R) / factor^(2(i + 1)/R), is no",
    ),
}


def test_every_case_is_here():
    assert WILD.keys() == READ.keys() | REFUSED.keys() and len(WILD) == 27
    # What is refused without ``like`` is read with it, or says what to write.
    assert {name for name, (like, *_) in READ.items() if like} | REFUSED_LIKE.keys() | {
        "nemotron_h"
    } == REFUSED.keys()


def check(layer, expected):
    if isinstance(expected, tuple):
        assert expected[0] is STILL and layer.rope is None
        return
    rope = layer.rope
    inv_freq, factor = expected.values
    frequencies = rope.frequencies(expected.context_length)
    ladder = np.atleast_2d(frequencies.inv_freq)
    np.testing.assert_allclose(ladder.sum(axis=0), inv_freq, rtol=1e-12)
    assert frequencies.attention_factor == pytest.approx(factor, rel=1e-12)
    assert (rope.head_dim, rope.layout, rope.num_pairs) == (expected.head_dim, expected.layout, len(inv_freq))
    assert layer.logit_factor == pytest.approx(expected.logit_factor, rel=1e-12)
    assert layer.query_temperature is None
    if expected.axes is None:
        assert rope.num_axes == 1
    else:
        assert np.argmax(ladder != 0, axis=0).tolist() == expected.axes


@pytest.mark.parametrize("name", READ)
def test_what_a_config_gives(name):
    like, count, parts = READ[name]
    model_rope = rope_jax.from_hf_config(WILD[name]["config"], like=like)
    assert rope_jax.from_hf_config(to_hf_config(model_rope)) == model_rope
    layers = model_rope.layers
    assert len(layers) == count
    seen = []
    for expected in parts:
        indices = expected[1] if isinstance(expected, tuple) else expected.layers
        indices = list(range(count) if indices is None else indices)
        seen += indices
        for i in indices:
            check(layers[i], expected)
    assert sorted(seen) == list(range(count))


# transformers reads text_config alone and fills in its class for a flat file; it ignores alpha in this family.
DIFFERENT = {"glm4v_flat", "hunyuan_eagle3_alpha_llama"}


@pytest.mark.parametrize("name", sorted({name for name, case in WILD.items() if case["theirs"]} - DIFFERENT))
def test_numbers_of_transformers(name):
    """Figures of transformers 5.24, printed with eight digits."""
    model_rope = rope_jax.from_hf_config(WILD[name]["config"], compat="transformers")
    theirs = WILD[name]["theirs"]
    for key, text in theirs.items():
        if "inv_freq" not in key:
            continue
        size, second, last = re.fullmatch(r"(\d+) freqs, \[1\]=(\S+), last=(\S+)", text).groups()
        label = key.removesuffix("inv_freq").rstrip("_") or None
        family = FAMILIES[model_rope.model_type]
        layer = next(
            layer
            for layer in model_rope.layers
            if layer.rope and label in (None, layer.type, family.label(layer.type))
        )
        length = 1 if hasattr(layer.rope.schedule, "context_length") else None
        frequencies = layer.rope.frequencies(length)
        assert frequencies.inv_freq.shape[-1] == int(size)
        np.testing.assert_allclose(frequencies.inv_freq[[1, -1]], [float(second), float(last)], rtol=1e-6)
        scaling = theirs[f"{key.removesuffix('inv_freq')}attention_scaling"]
        assert frequencies.attention_factor == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_where_a_refused_config_leads(name):
    with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
        rope_jax.from_hf_config(WILD[name]["config"])
    if name in REFUSED_LIKE:
        like, message = REFUSED_LIKE[name]
        with pytest.raises(ValueError, match=re.escape(message)):
            rope_jax.from_hf_config(WILD[name]["config"], like=like)


def test_the_ways_out_are_ways_out():
    glm = {key: value for key, value in WILD["chatglm_glm4_9b"]["config"].items() if key != "rope_ratio"}
    layer = rope_jax.from_hf_config(glm | dict(rope_theta=10000 * 500), like="glm").layers[39]
    check(layer, Expected(128, plain(64, 5e6), layout="interleaved"))
    new = {key: value for key, value in WILD["gte_new_ntk"]["config"].items() if key != "rope_scaling"}
    check(rope_jax.from_hf_config(new, like="gte").layers[0], Expected(64, plain(64, 1.6e5)))


# --------------------------------------------------------------------------------------- parts of larger models


TEXT = dict(model_type="llama", max_position_embeddings=4096)


@pytest.mark.parametrize(
    "key", ["text_config", "llm_config", "language_config", "language_model_config", "lm_config"]
)
def test_a_part_has_the_sizes_of_its_class(key):
    """A part is written without the values that equal its class's defaults; a whole model is not."""
    model_rope = rope_jax.from_hf_config(dict(model_type="some_vlm", **{key: TEXT}))
    check(model_rope.layers[31], Expected(128, plain(128, 1e4)))
    assert len(model_rope.layers) == 32
    with pytest.raises(ValueError, match="config of 'llama' must have the key 'num_hidden_layers'"):
        rope_jax.from_hf_config(TEXT)
    # A size under another name is no missing size.
    sizes = dict(TEXT, n_layer=3, n_embd=256, n_head=8)
    assert rope_jax.from_hf_config(dict(model_type="some_vlm", **{key: sizes})).rope.head_dim == 32


def test_messages_name_the_part():
    for text, message in (
        (dict(TEXT, rope_theda=1e4), "config of 'llama' (text_config of 'llava') has an unknown key 'rope_theda'"),
        (dict(TEXT, hidden_size="x"), "config of 'llama' (text_config of 'llava'): hidden_size must be an integer"),
        (dict(model_type="opt"), "config of 'opt' (text_config of 'llava') does not rotate queries and keys"),
        (dict(model_type="lama"), "model_type 'lama' in text_config of 'llava' is unknown; did you mean 'llama'?"),
        (dict(model_type="lfm2"), "config of 'lfm2' (text_config of 'llava') must have the key 'layer_types'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            rope_jax.from_hf_config(dict(model_type="llava", text_config=text))


def test_a_part_without_a_model_type():
    for outer, model_type in (("llava", "llama"), ("aya_vision", "cohere2"), ("kimi_k25", "deepseek_v3")):
        assert rope_jax.from_hf_config(dict(model_type=outer, text_config={})).model_type == model_type
    kimi = dict(model_type="kimi_k25", text_config=dict(model_type="kimi_k2"))
    assert rope_jax.from_hf_config(kimi).model_type == "deepseek_v3"
    with pytest.raises(
        ValueError, match="text_config of 'some_vlm' must have the key 'model_type', .*like='llama'"
    ):
        rope_jax.from_hf_config(dict(model_type="some_vlm", text_config=dict(hidden_size=64)))
    with pytest.raises(ValueError, match="config has the parts .'decoder', 'encoder'.: pass one of them"):
        rope_jax.from_hf_config(
            dict(model_type="some_seq2seq", decoder=dict(model_type="llama"), encoder=dict(model_type="llama"))
        )


def test_a_part_must_be_a_dictionary():
    with pytest.raises(ValueError, match="config of 'llava': text_config must be a dictionary, got 'llama'"):
        rope_jax.from_hf_config(dict(model_type="llava", text_config="llama"))
    with pytest.raises(ValueError, match="config must have the key 'vision_config' for part='vision', got keys"):
        rope_jax.from_hf_config(dict(model_type="llava", vision_config=[]), part="vision")


def test_class_defaults_of_more_than_a_size():
    gemma = rope_jax.from_hf_config(dict(model_type="gemma4", text_config={})).layers
    check(gemma[4], Expected(256, plain(256, 1e4)))
    check(gemma[5], Expected(512, oracles.proportional(512, 1e6, 0.25, 1.0)))
    ministral = dict(model_type="mistral3", text_config=dict(model_type="ministral3"))
    layer = rope_jax.from_hf_config(ministral).layers[0]
    np.testing.assert_allclose(layer.rope.frequencies().inv_freq, oracles.yarn(128, 1e6, 16, 16384)[0], rtol=1e-12)
    assert layer.query_temperature.beta == 0.1


@pytest.mark.parametrize(
    ("outer", "tower", "head_dim"),
    [
        ("qwen2_vl", {}, 80),
        ("qwen2_vl", dict(model_type="qwen2_vl"), 80),
        ("qwen2_5_vl", dict(depth=2), 224),
        ("step3p7", dict(width=1536, layers=47, heads=16), 96),
        ("mistral3", dict(model_type="pixtral", hidden_size=1024, num_attention_heads=16), 64),
        ("gemma4", {}, 64),
        ("kimi_k25", dict(vt_hidden_size=1152, vt_num_attention_heads=16, vt_num_hidden_layers=27), 72),
        ("minimax_m3_vl", {}, 80),
        ("llama4", {}, 48),
    ],
)
def test_vision_towers_that_files_have(outer, tower, head_dim):
    model_rope = rope_jax.from_hf_config(dict(model_type=outer, vision_config=tower), part="vision")
    assert rope_jax.from_hf_config(to_hf_config(model_rope)) == model_rope
    rope = model_rope.rope
    assert rope.head_dim == head_dim
    matrix, pairs = rope.frequencies().inv_freq, head_dim // 2
    half = 1e4 ** -(np.arange(pairs // 2) / (pairs / 2))
    rows, columns = np.zeros((2, 2, pairs))
    rows[0, : pairs // 2] = columns[1, pairs // 2 :] = half
    expected = rows + columns
    if outer in ("llama4", "step3p7"):
        expected = expected[::-1]
    if outer == "mistral3":  # even frequencies of one ladder for rows, odd ones for columns
        ladder = 1e4 ** -(np.arange(pairs) / pairs)
        expected = np.zeros((2, pairs))
        expected[0, : pairs // 2], expected[1, pairs // 2 :] = ladder[::2], ladder[1::2]
    if outer == "gemma4":
        expected = np.where(expected > 0, expected ** (np.log(100) / np.log(1e4)), 0)
        assert rope.blocks == 2
    if outer == "kimi_k25":
        expected = np.zeros((2, pairs))
        expected[1, ::2] = expected[0, 1::2] = half
    if outer == "minimax_m3_vl":
        third = 1e4 ** -(np.arange(13) / 13)
        expected = np.kron(np.eye(3), third)
    np.testing.assert_allclose(matrix, expected, rtol=1e-12)
    assert rope.layout == ("interleaved" if outer == "llama4" else "half")


def test_towers_without_a_rotation_and_audio():
    for part, outer, tower, message in (
        ("vision", "llava", {}, "config of 'clip_vision_model' (vision_config of 'llava') does not rotate"),
        ("vision", "gemma3", {}, "config of 'siglip_vision_model' (vision_config of 'gemma3') does not rotate"),
        ("vision", "mllama", {}, "config of 'mllama_vision_model' (vision_config of 'mllama') does not rotate"),
        (
            "audio",
            "qwen2_audio",
            {},
            "config of 'qwen2_audio_encoder' (audio_config of 'qwen2_audio') does not rotate",
        ),
        ("vision", "sam3", {}, "rotates in a way that is not read: its global layers shrink rows and columns"),
        (
            "vision",
            "internvl_chat",
            dict(model_type="intern_vit_6b"),
            "model_type 'intern_vit_6b' in vision_config of 'internvl_chat' is unknown",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            rope_jax.from_hf_config(dict(model_type=outer, **{f"{part}_config": tower}), part=part)
    glmasr = dict(model_type="glmasr", audio_config=dict(model_type="glmasr_encoder"))
    check(rope_jax.from_hf_config(glmasr, part="audio").layers[31], Expected(64, plain(32, 1e4)))


# ----------------------------------------------------------------------------------------------- names and hints


def test_like_reads_strictly():
    config = config_of("mine", rope_theta=5e5)
    model_rope = rope_jax.from_hf_config(config, like="llama")
    assert model_rope.model_type == "llama" and model_rope == rope_jax.from_hf_config(
        config | dict(model_type="llama")
    )
    assert (
        rope_jax.from_hf_config({k: v for k, v in config.items() if k != "model_type"}, like="llama") == model_rope
    )
    for key in ("rope_gamma", "alibi_bias", "nope_layers", "position_encoding_2d", "yarn_beta", "logn_scale"):
        with pytest.raises(ValueError, match=f"config of 'mine', read like 'llama' has an unknown key '{key}'"):
            rope_jax.from_hf_config(config | {key: True}, like="llama")
    with pytest.raises(
        ValueError, match="like must be a model type of the table, got 'lama'; did you mean 'llama'?"
    ):
        rope_jax.from_hf_config(config, like="lama")
    # The size of a head is the class's, not the rotation's: Qwen3's 128 is not taken over.
    assert rope_jax.from_hf_config(config_of("mine", hidden_size=2048), like="qwen3").rope.head_dim == 64
    assert {like for like, _ in LIKE.values()} <= FAMILIES.keys() and not LIKE.keys() & FAMILIES.keys()


def test_unknown_models_say_what_to_do():
    with pytest.raises(
        ValueError, match="its architecture 'Qwen3ForCausalLM' is the architecture of 'qwen3': pass"
    ):
        rope_jax.from_hf_config(config_of("mine", architectures=["Qwen3ForCausalLM"]))
    with pytest.raises(
        ValueError, match="unknown; if its code rotates as a known family does, name the family, such"
    ):
        rope_jax.from_hf_config(config_of("mine", architectures=["MineForCausalLM"]))


def test_hints_name_slips_alone():
    """``exaone`` is not ``exaone4``: a digit, a suffix or a letter of a short name is another name."""
    for name in (
        "exaone5",
        "glm4x",
        "minicpm5",
        "minimax_m4",
        "nemotron_x",
        "mimo3",
        "mllama2_text",
        "phi9",
        "olmo9",
    ):
        with pytest.raises(ValueError) as error:
            rope_jax.from_hf_config(config_of(name))
        assert "did you mean" not in str(error.value)
    for name, meant in (
        ("lama", "llama"),
        ("mistrall", "mistral"),
        ("startcoder2", "starcoder2"),
        ("gtp_oss", None),
    ):
        with pytest.raises(ValueError) as error:
            rope_jax.from_hf_config(config_of(name))
        hint = f"did you mean {meant!r}?" if meant else "did you mean 'gpt_oss'?"
        assert hint in str(error.value)


@pytest.mark.parametrize("model_type", ["mpt", "bloom", "jamba", "nemotron_h", "gpt2", "bert", "mamba", "t5"])
def test_models_without_a_rotation(model_type):
    with pytest.raises(
        ValueError, match=f"config of '{model_type}' does not rotate queries and keys: it.*use rope=N"
    ):
        rope_jax.from_hf_config(config_of(model_type, rope_theta=10000))


# -------------------------------------------------------------------------------- keys that were ignored in silence


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [
        ("alibi", False, True),
        ("use_alibi", False, True),
        ("position_embedding_type", "rope", "alibi"),
        ("position_embedding_type", "rotary", "absolute"),
        ("position_embedding_type", "rope_gpt_neox", "rope_gptj"),
        ("use_mla_nope", False, 1),
        ("position_encoding_2d", False, [2]),
        ("use_nope", False, True),
        ("nope_layer_interval", None, 4),
        ("mla_use_nope", False, True),
        ("use_logn_attn", False, True),
        ("use_dynamic_ntk", False, True),
        ("pos_emb", "rotary", "learned"),
        ("use_rope", True, False),
        ("rope_interleave", False, True),
        ("rope_interleaved", False, True),
    ],
)
def test_keys_about_positions_are_read_or_refused(key, off, on):
    config = config_of("llama")
    assert rope_jax.from_hf_config(config | {key: off}) == rope_jax.from_hf_config(config)
    refused = f"config of 'llama': {key} must be .*, got |config of 'llama' has an unknown key '{key}' = "
    with pytest.raises(ValueError, match=refused):
        rope_jax.from_hf_config(config | {key: on})


def test_keys_that_files_keep_of_another_class():
    """ModernBERT's files have BERT's position_embedding_type, Command R7B's the name of TensorRT-LLM."""
    bert = config_of("modernbert", position_embedding_type="absolute")
    assert rope_jax.from_hf_config(bert) == rope_jax.from_hf_config(config_of("modernbert"))
    cohere = config_of("cohere2", position_embedding_type="rope_gptj", rotary_pct=1.0)
    assert rope_jax.from_hf_config(cohere) == rope_jax.from_hf_config(config_of("cohere2"))
    with pytest.raises(ValueError, match="position_embedding_type must be 'rope' or .*, got 'rope_gpt_neox'"):
        rope_jax.from_hf_config(cohere | dict(position_embedding_type="rope_gpt_neox"))


def test_sizes_of_parts_without_rotation_are_no_keys_about_positions():
    config = config_of("deepseek_v3", qk_rope_head_dim=64, qk_nope_head_dim=128, rope_interleave=True)
    assert rope_jax.from_hf_config(config).rope.head_dim == 64
    for flag in (False, True):  # the indexer of sparse attention rotates for itself
        sparse = config_of("glm_moe_dsa", qk_rope_head_dim=64, indexer_rope_interleave=flag, rope_interleave=True)
        assert rope_jax.from_hf_config(sparse).rope.layout == "interleaved"
    with pytest.raises(ValueError, match="rope_interleave must be True or None, got False"):
        rope_jax.from_hf_config(sparse | dict(rope_interleave=False))


# -------------------------------------------------------------------------------- null, zero and a length beside


def test_null_is_not_always_missing():
    for name in ("afmoe", "ernie4_5", "glm", "higgs_audio_v2", "qwen3", "gemma"):
        config = config_of(name, layer_types=["sliding_attention"] * 2, rope_parameters=dict(rope_theta=1e4))
        own = FAMILIES[name].default_head_dim
        heads = 4096 // own * 2
        for given, head_dim in (({}, own), (dict(head_dim=None), own // 2)):
            model_rope = rope_jax.from_hf_config(config | dict(num_attention_heads=heads) | given)
            assert model_rope.rope.head_dim == head_dim
    for name, key, habit in (("phi", "partial_rotary_factor", 0.5), ("gpt_neox", "rotary_pct", 0.25)):
        with pytest.raises(
            ValueError, match=f"{key} must not be null; write the number, or remove the key for {habit}"
        ):
            rope_jax.from_hf_config(config_of(name, **{key: None}))
    with pytest.raises(ValueError, match="rotary_dim must not be null"):
        rope_jax.from_hf_config(dict(model_type="gptj", n_layer=2, n_embd=4096, n_head=16, rotary_dim=None))
    for recipe in (dict(type=None, factor=None), dict(rope_type=None), {}):
        assert rope_jax.from_hf_config(config_of("llama", rope_scaling=recipe)).rope.schedule == rope_jax.Standard()


def test_zero_switches_off():
    yarn = dict(rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=16384)
    for beta, scales in ((0.0, False), (0, False), (0.1, True)):
        config = config_of("ministral3", head_dim=128, rope_parameters=dict(yarn, llama_4_scaling_beta=beta))
        assert (rope_jax.from_hf_config(config).layers[0].query_temperature is not None) is scales
    llama4 = config_of("llama4_text", no_rope_layers=[1, 0], attn_scale=0.0)
    assert rope_jax.from_hf_config(llama4).layers[1].query_temperature is None
    for config, key in (
        (
            config_of("ministral3", head_dim=128, rope_parameters=dict(yarn, llama_4_scaling_beta=-0.1)),
            "llama_4_scaling_beta",
        ),
        (config_of("llama4_text", no_rope_layers=[1, 0], attn_scale=-0.1), "attn_scale"),
    ):
        with pytest.raises(ValueError, match=f"{key} must be at least 0, got -0.1"):
            rope_jax.from_hf_config(config)
    # As in transformers, a zero of YaRN's bounds is its default.
    zero = rope_jax.from_hf_config(config_of("qwen2", rope_parameters=dict(yarn, beta_fast=0, beta_slow=0)))
    assert zero == rope_jax.from_hf_config(config_of("qwen2", rope_parameters=yarn))
    alpha = dict(type="dynamic", factor=2.0, alpha=0)
    hunyuan = config_of("hunyuan_v1_dense", max_position_embeddings=64, rope_scaling=alpha)
    assert isinstance(rope_jax.from_hf_config(hunyuan).rope.schedule, rope_jax.DynamicNTK)


def test_an_original_length_beside_a_rule_that_does_not_read_it():
    for recipe in (dict(type="linear", factor=2.0), dict(type="dynamic", factor=2.0), dict(rope_type="default")):
        config = config_of("llama", max_position_embeddings=8192, rope_scaling=recipe)
        beside = config | dict(rope_scaling=recipe | dict(original_max_position_embeddings=4096))
        assert rope_jax.from_hf_config(beside) == rope_jax.from_hf_config(config)


def test_attn_factor_is_a_multiple():
    yarn = dict(type="yarn", factor=4.0, original_max_position_embeddings=4096, attn_factor=0.5)
    config = config_of("llama", rope_scaling=yarn)
    assert rope_jax.from_hf_config(config).rope.schedule.attention_factor == 0.5 * (0.1 * np.log(4.0) + 1)
    assert rope_jax.from_hf_config(config, compat="transformers").rope.schedule.attention_factor is None
    with pytest.raises(ValueError, match="attn_factor and apply_yarn_scaling exclude attention_factor and"):
        rope_jax.from_hf_config(config_of("llama", rope_scaling=dict(yarn, attention_factor=1.0)))
    assert rope_jax.from_hf_config(config_of("llama", rope_scaling=dict(yarn, extrapolation_factor=1.0)))
    for keys, factor in (
        (dict(apply_yarn_scaling=False), 0.5),
        (dict(apply_yarn_scaling=False, attn_factor=None), 1.0),
    ):
        scaled = rope_jax.from_hf_config(config_of("llama", rope_scaling=yarn | keys))
        assert scaled.rope.schedule.attention_factor == factor
    with pytest.raises(ValueError, match="extrapolation_factor must be 1, got 0.5"):
        rope_jax.from_hf_config(config_of("llama", rope_scaling=dict(yarn, extrapolation_factor=0.5)))


# ------------------------------------------------------------------------------------------- older layer patterns


def test_older_patterns_are_checked():
    for model_type, given, message in (
        (
            "deepseek_v4",
            dict(qk_rope_head_dim=64, compress_ratios=[0, 8]),
            "compress_ratios must hold 0, 4 or 128, got",
        ),
        (
            "mimo_v2_flash",
            dict(rope_theta=1e4, hybrid_layer_pattern=[0, 2]),
            "hybrid_layer_pattern must hold 0 or 1",
        ),
        (
            "mimo_v2_flash",
            dict(rope_theta=1e4, hybrid_layer_pattern=[0]),
            "layer_types must have an entry for each of 2",
        ),
        ("step3p5", dict(rope_theta=[1e4]), "lists by layer must have 2 entries, got 1"),
        ("step3p5", dict(rope_theta=[1e4, 1e6]), "layers of 'full_attention' must rotate alike"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_jax.from_hf_config(config_of(model_type, **given))


def test_lists_by_layer_may_hold_the_layers_of_further_tokens():
    padded = dict(rope_theta=[1e4, 1e4, 7.0], layer_types=["full_attention"] * 3)
    check(rope_jax.from_hf_config(config_of("step3p5", **padded)).layers[1], Expected(128, plain(128, 1e4)))
    lightning = config_of("minimax", attn_type_list=[0, 1])
    assert [layer.rope is not None for layer in rope_jax.from_hf_config(lightning).layers] == [False, True]
    zamba = config_of("zamba2", use_mem_rope=True, layer_types=["full_attention"] * 2)
    assert rope_jax.from_hf_config(zamba).rope.head_dim == 256  # 2D/N
