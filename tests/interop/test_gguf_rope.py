"""Ropes of GGUF files, against llama.cpp's formulas in float64."""

import math

import gguf
import numpy as np
import pytest
from gguf_files import write

import rope_jax
from rope_jax.interop import LayerRope, QueryTemperature, from_gguf
from rope_jax.interop.gguf_architectures import ARCHITECTURES
from rope_jax.interop.gguf_rope import Divided

HEAD = 16
BASE = {".block_count": 3, ".embedding_length": 32, ".attention.head_count": 2, ".context_length": 256}
PAIRS = np.arange(HEAD // 2)
DIVISORS = np.linspace(1.0, 3.0, HEAD // 2).astype(np.float32)
LONG, SHORT = (DIVISORS * 4).astype(np.float32), (DIVISORS / 2).astype(np.float32)


def model_rope(tmp_path, metadata=None, architecture="llama", tensors=None):
    return from_gguf(write(tmp_path / "a.gguf", architecture, BASE | (metadata or {}), tensors))


def ggml_rope(
    base=10_000.0, factor=1.0, divisors=1.0, ext=0.0, length=256, fast=32.0, slow=1.0, attn=1.0, log=0.0, n=HEAD
):
    """Frequencies and the factor of cos and sin, as ggml computes them (ggml-cpu/ops.cpp, rope_yarn, with
    llama-context.cpp, yarn_attn_factor)."""
    i = np.arange(n // 2)
    extrapolated = base ** (-2 * i / n) / divisors
    theta = extrapolated / factor

    def end(turns):
        return n * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    def get_mscale(scale, mscale):
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    if ext:
        low, high = max(0, math.floor(end(fast))), min(n - 1, math.ceil(end(slow)))
        ramp = 1 - np.clip((i - low) / max(0.001, high - low), 0, 1)
        theta = theta * (1 - ramp * ext) + extrapolated * ramp * ext
        attn *= get_mscale(factor, 1.0) / (get_mscale(factor, log) if log else 1.0)
        attn *= 1 / (1 + 0.1 * math.log(factor))  # undone by the kernel
        attn *= 1 + 0.1 * math.log(factor)
    return theta, attn


YARN = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 8.0, ".rope.scaling.original_context_length": 64}
CASES = {
    "nothing": ({}, {}),
    "a base": ({".rope.freq_base": 500.0}, dict(base=500.0)),
    "type none": ({".rope.scaling.type": "none", ".rope.scaling.factor": 8.0}, {}),
    "no type is linear": ({".rope.scaling.factor": 8.0}, dict(factor=8.0)),
    "linear": ({".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0}, dict(factor=8.0)),
    "a factor of 0 is 1": ({".rope.scaling.factor": 0.0}, {}),
    "the older key": ({".rope.scale_linear": 4.0}, dict(factor=4.0)),
    "both keys": ({".rope.scale_linear": 4.0, ".rope.scaling.factor": 2.0}, dict(factor=2.0)),
    "linear with an attention factor": (
        {".rope.scaling.factor": 8.0, ".rope.scaling.attn_factor": 1.25},
        dict(factor=8.0, attn=1.25),
    ),
    "yarn": (YARN, dict(factor=8.0, ext=1.0, length=64)),
    "yarn from the context length": (
        {".rope.scaling.type": "yarn", ".rope.scaling.factor": 8.0},
        dict(factor=8.0, ext=1.0, length=256),
    ),
    "yarn of factor 1": (YARN | {".rope.scaling.factor": 1.0}, {}),
    "yarn with an attention factor": (
        YARN | {".rope.scaling.attn_factor": 0.75},
        dict(factor=8.0, ext=1.0, length=64, attn=0.75),
    ),
    "yarn with ends": (
        YARN | {".rope.scaling.yarn_beta_fast": 8.0, ".rope.scaling.yarn_beta_slow": 2.0},
        dict(factor=8.0, ext=1.0, length=64, fast=8.0, slow=2.0),
    ),
    "yarn with a log multiplier": (
        YARN | {".rope.scaling.yarn_log_multiplier": 0.5},
        dict(factor=8.0, ext=1.0, length=64, log=0.5),
    ),
    "yarn without a blend": (YARN | {".rope.scaling.yarn_ext_factor": 0.0}, dict(factor=8.0)),
    "linear with a blend": (
        YARN | {".rope.scaling.type": "linear", ".rope.scaling.yarn_ext_factor": 1.0},
        dict(factor=8.0, ext=1.0, length=64),
    ),
    "an unset blend": (YARN | {".rope.scaling.yarn_ext_factor": -1.0}, dict(factor=8.0, ext=1.0, length=64)),
    "an inert attention factor": (
        YARN | {".rope.scaling.yarn_attn_factor": 1.0},
        dict(factor=8.0, ext=1.0, length=64),
    ),
    "finetuned is a remark": (YARN | {".rope.scaling.finetuned": False}, dict(factor=8.0, ext=1.0, length=64)),
    "divisors": ({"divisors": True}, dict(divisors=DIVISORS)),
    "divisors and a factor": ({"divisors": True, ".rope.scaling.factor": 2.0}, dict(divisors=DIVISORS, factor=2.0)),
    "divisors and yarn": (YARN | {"divisors": True}, dict(divisors=DIVISORS, factor=8.0, ext=1.0, length=64)),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_llama_cpps(tmp_path, name):
    metadata, want = CASES[name]
    metadata = dict(metadata)
    tensors = {"rope_freqs.weight": DIVISORS} if metadata.pop("divisors", None) else None
    rope = model_rope(tmp_path, metadata, tensors=tensors).rope
    frequencies = rope.frequencies()
    inv_freq, attention_factor = ggml_rope(**want)
    np.testing.assert_allclose(frequencies.inv_freq, inv_freq, rtol=1e-12)
    assert frequencies.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert (rope.head_dim, rope.layout, rope.rotary_dim) == (HEAD, "interleaved", None)


def test_llama_3s_rule_is_stored_as_divisors(tmp_path):
    """The converter writes theta_i over the scaled theta_i, as float32."""
    llama3 = rope_jax.Llama3(factor=8.0, original_length=64, base=500.0)
    divisors = (500.0 ** (-2 * PAIRS / HEAD) / llama3(HEAD).inv_freq).astype(np.float32)
    rope = model_rope(tmp_path, {".rope.freq_base": 500.0}, tensors={"rope_freqs.weight": divisors}).rope
    np.testing.assert_allclose(rope.frequencies().inv_freq, llama3(HEAD).inv_freq, rtol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_longrope_has_two_lists(tmp_path, factor):
    metadata = {
        ".rope.scaling.type": "longrope",
        ".rope.scaling.original_context_length": 64,
        ".rope.scaling.attn_factor": 1.25,
        ".rope.scaling.factor": factor,
    }
    tensors = {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}
    rope = model_rope(tmp_path, metadata, "phi3", tensors).rope
    for length, divisors in ((64, SHORT), (65, LONG)):
        frequencies = rope.frequencies(length)
        inv_freq, attention_factor = ggml_rope(divisors=divisors.astype(np.float64), factor=factor, attn=1.25)
        np.testing.assert_allclose(frequencies.inv_freq, inv_freq, rtol=1e-12)
        assert frequencies.attention_factor == attention_factor


def test_longrope_without_lists_is_plain(tmp_path):  # MiniCPM
    assert model_rope(tmp_path, {".rope.scaling.type": "longrope"}, "minicpm").rope.schedule == rope_jax.Standard()


def test_part_of_a_head_and_its_size(tmp_path):
    rope = model_rope(tmp_path, {".rope.dimension_count": 8, ".attention.key_length": 24}, "gptneox").rope
    assert rope == rope_jax.Rope(24, rope_jax.Standard(), rotary_dim=8)
    inv_freq, _ = ggml_rope(n=8)
    np.testing.assert_allclose(rope.frequencies().inv_freq, inv_freq, rtol=1e-12)


# Of each type in llama_model_rope_type, src/llama-model.cpp: llama.cpp's own words, checked against the table.
NORM = "llama llama4 deci baichuan internlm2 minicpm xverse command-r cohere2 olmo arctic deepseek chatglm granite smollm3 ernie4_5"
NEOX = "falcon dbrx stablelm qwen qwen2 qwen2moe qwen3 qwen3moe olmo2 olmoe phi2 phi3 plamo gemma gemma2 gemma3 gemma3n starcoder2"
NEOX += (
    " openelm gptneox codeshell orion nemotron exaone exaone4 gpt-oss lfm2 glm4moe seed_oss apertus hunyuan-dense"
)


@pytest.mark.parametrize(("names", "layout"), [(NORM, "interleaved"), (NEOX, "half")])
def test_which_architectures_pair_neighbours(tmp_path, names, layout):
    for name in names.split():
        ropes = {layer.rope for layer in model_rope(tmp_path, architecture=name).layers} - {None}
        assert {rope.layout for rope in ropes} == {layout}, name


def test_architectures_are_those_of_the_package():
    assert ARCHITECTURES.keys() <= set(gguf.MODEL_ARCH_NAMES.values())


def ropes(model, key=lambda rope: rope is not None):
    return [key(layer.rope) for layer in model.layers]


def base_of(rope):
    return rope.schedule.base


def test_gemma3_has_two_bases(tmp_path):
    metadata = {
        ".block_count": 7,
        ".rope.freq_base": 1e6,
        ".rope.scaling.factor": 8.0,
        ".attention.sliding_window": 5,
    }
    model = model_rope(tmp_path, metadata, "gemma3")
    local, full = rope_jax.Standard(), rope_jax.Linear(factor=8.0, base=1e6)
    assert ropes(model, lambda rope: rope.schedule) == [local] * 5 + [full, local]
    assert [layer.type for layer in model.layers] == ["sliding_attention"] * 5 + [
        "full_attention",
        "sliding_attention",
    ]
    metadata |= {".rope.freq_base_swa": 500.0, ".attention.sliding_window_pattern": 2}
    model = model_rope(tmp_path, metadata, "gemma3")
    assert ropes(model, base_of) == [500.0, 1e6, 500.0, 1e6, 500.0, 1e6, 500.0]
    metadata[".attention.sliding_window_pattern"] = [True, True, False, False, True, True, True]
    assert ropes(model_rope(tmp_path, metadata, "gemma3"), base_of) == [500.0] * 2 + [1e6] * 2 + [500.0] * 3
    del metadata[".attention.sliding_window"], metadata[".attention.sliding_window_pattern"]
    assert ropes(model_rope(tmp_path, metadata, "gemma3"), base_of) == [1e6] * 7


def test_gemma4_divides_full_layers_alone(tmp_path):
    metadata = {
        ".attention.key_length": 32,
        ".attention.key_length_swa": HEAD,
        ".rope.dimension_count": 32,
        ".rope.dimension_count_swa": HEAD,
        ".rope.freq_base": 1e6,
        ".rope.freq_base_swa": 1e4,
        ".attention.sliding_window": 5,
        ".attention.sliding_window_pattern": [True, False, True],
    }
    divisors = np.where(np.arange(16) < 4, 1.0, 1e30).astype(np.float32)
    model = model_rope(tmp_path, metadata, "gemma4", {"rope_freqs.weight": divisors})
    assert model.layers[0].rope == model.layers[2].rope == rope_jax.Rope(HEAD, rope_jax.Standard())
    full = model.layers[1].rope
    assert full.head_dim == 32
    proportional = rope_jax.Proportional(proportion=0.25, base=1e6)(32).inv_freq
    np.testing.assert_allclose(full.frequencies().inv_freq, proportional, atol=1e-29)
    with pytest.raises(ValueError, match=r"attention.sliding_window_pattern must have an entry for each layer"):
        model_rope(tmp_path, {".attention.sliding_window": 5}, "gemma4")


FOUR = {".block_count": 4}


def test_layers_without_rotation(tmp_path):
    assert ropes(model_rope(tmp_path, FOUR, "smollm3")) == [True, True, True, False]
    assert ropes(model_rope(tmp_path, FOUR, "cohere2")) == [True, True, True, False]
    assert ropes(model_rope(tmp_path, FOUR, "exaone4")) == [True] * 4
    big = ropes(model_rope(tmp_path, {".block_count": 64}, "exaone4"))
    assert big == [True, True, True, False] * 16
    assert ropes(model_rope(tmp_path, FOUR | {".rope.scaling.finetuned": False}, "granite")) == [False] * 4
    assert ropes(model_rope(tmp_path, FOUR, "granite")) == [True] * 4
    assert ropes(model_rope(tmp_path, FOUR, "qwen3next")) == [False, False, False, True]
    interval = FOUR | {".full_attention_interval": 2}
    assert ropes(model_rope(tmp_path, interval, "qwen3next")) == [False, True, False, True]
    mixed = FOUR | {".attention.head_count_kv": [0, 1, 0, 1]}
    assert ropes(model_rope(tmp_path, mixed, "lfm2")) == [False, True, False, True]
    deci = FOUR | {".attention.head_count": [2, 0, 2, 2], ".attention.head_count_kv": [1, 0, 0, 1]}
    assert ropes(model_rope(tmp_path, deci, "deci")) == [True, False, False, True]


def test_olmo3_scales_full_layers_alone(tmp_path):
    metadata = FOUR | YARN | {".attention.sliding_window": 5, ".rope.scaling.attn_factor": 1.5}
    model = model_rope(tmp_path, metadata, "olmo2")
    assert ropes(model, lambda rope: rope.schedule)[:3] == [rope_jax.Standard()] * 3
    assert isinstance(model.layers[3].rope.schedule, rope_jax.Yarn)
    del metadata[".attention.sliding_window"]  # OLMo 2
    assert len(set(model_rope(tmp_path, metadata, "olmo2").layers)) == 1


def test_queries_grow_with_the_position(tmp_path):
    layers = model_rope(tmp_path, FOUR, "llama4").layers
    assert layers[3] == LayerRope(None, query_temperature=QueryTemperature(beta=0.1, period=8192, offset=1))
    assert {layer.query_temperature for layer in layers[:3]} == {None}
    metadata = YARN | {".attention.temperature_scale": 0.25, ".rope.scaling.yarn_log_multiplier": 1.0}
    layers = model_rope(tmp_path, metadata, "mistral3").layers
    assert {layer.query_temperature for layer in layers} == {QueryTemperature(beta=0.25, period=64)}
    assert layers[0].rope.frequencies().attention_factor == 1.0


@pytest.mark.parametrize(
    ("architecture", "counts", "axes"),
    [
        ("qwen2vl", [2, 3, 3, 0], [0, 0, 1, 1, 1, 2, 2, 2]),
        ("qwen2vl", [2, 3, 3], [0, 0, 1, 1, 1, 2, 2, 2]),
        ("qwen3vl", [3, 3, 2, 0], [0, 1, 2, 0, 1, 2, 0, 1]),
        ("qwen3vl", [4, 2, 2, 0], [0, 1, 2, 0, 1, 2, 0, 0]),  # the last pair reads the time
        ("glm4", [2, 3, 3, 0], [0, 0, 1, 1, 1, 2, 2, 2]),
        ("glm4moe", [2, 3, 3, 0], [0, 0, 1, 1, 1, 2, 2, 2]),
    ],
)
def test_sections_deal_pairs_to_axes(tmp_path, architecture, counts, axes):
    rope = model_rope(tmp_path, {".rope.dimension_sections": counts}, architecture).rope
    assert rope.layout == "half"
    want = np.where(np.arange(3)[:, None] == np.array(axes), ggml_rope()[0], 0)
    np.testing.assert_allclose(rope.frequencies().inv_freq, want, rtol=1e-12)


def test_sections_may_be_left_out_of_glm4(tmp_path):
    assert model_rope(tmp_path, architecture="glm4").rope == rope_jax.Rope(
        HEAD, rope_jax.Standard(), layout="interleaved"
    )
    assert model_rope(tmp_path, architecture="glm4moe").rope.layout == "half"
    with pytest.raises(ValueError, match=r"must have the key 'rope.dimension_sections'"):
        model_rope(tmp_path, architecture="qwen2vl")


REFUSED = {
    "an unknown architecture": (dict(architecture="lama"), "architecture 'lama' is not in the table of from_gguf; did you mean 'llama'?; read the config.json"),
    "latent attention": (dict(architecture="deepseek2"), "'deepseek2' is not in the table of from_gguf, which lacks the rotated part of a latent head"),
    "no rotation": (dict(architecture="mpt"), "must be of a model that rotates queries and keys, got architecture 'mpt'"),
    "an unknown key": (dict(metadata={".rope.freq_bass": 1.0}), "has an unknown key 'rope.freq_bass' = 1.0; did you mean 'rope.freq_base'?"),
    "alpha": (dict(metadata={".rope.scaling.alpha": 1000.0}), "unknown key 'rope.scaling.alpha'"),
    "a second base without windows": (dict(metadata={".rope.freq_base_swa": 10.0}), "unknown key 'rope.freq_base_swa'"),
    "sections without axes": (dict(metadata={".rope.dimension_sections": [2, 3, 3]}), "unknown key 'rope.dimension_sections'"),
    "a type of scaling": (dict(metadata={".rope.scaling.type": "ntk"}), "rope.scaling.type must be one of ('none', 'linear', 'yarn', 'longrope'), got 'ntk'"),
    "half a blend": (dict(metadata=YARN | {".rope.scaling.yarn_ext_factor": 0.5}), "yarn_ext_factor must be 0 or 1, got 0.5"),
    "transformers' attention factor": (dict(metadata=YARN | {".rope.scaling.yarn_attn_factor": 1.5}), "yarn_attn_factor must be 1, got 1.5"),
    "a base that is no number": (dict(metadata={".rope.freq_base": float("nan")}), "rope.freq_base must be a number, got nan"),
    "a base of 0": (dict(metadata={".rope.freq_base": 0.0}), "base must be positive and finite"),
    "a factor below 1": (dict(metadata={".rope.scaling.factor": 0.5}), "factor must be at least 1"),
    "a text for a number": (dict(metadata={".rope.freq_base": "big"}), "rope.freq_base must be a number, got 'big'"),
    "an odd part": (dict(metadata={".rope.dimension_count": 7}), "rotary_dim must be even"),
    "a part above the head": (dict(metadata={".rope.dimension_count": 18}), "from 2 to head_dim=16"),
    "no layers": (dict(metadata={".block_count": 0}), "block_count must be an integer of at least 1, got 0"),
    "too many layers": (dict(metadata={".block_count": 30_000_000}), "block_count must be at most 10,000"),
    "a list of another length": (dict(metadata={".attention.head_count": [2, 2]}), "attention.head_count must have an entry for each of 3 layers, got 2"),
    "one list of LongRoPE": (dict(tensors={"rope_factors_long.weight": LONG}), "must hold the tensor rope_freqs.weight, or rope_factors_short.weight and"),
    "all three lists": (dict(tensors={f"rope_{name}.weight": LONG for name in ("freqs", "factors_short", "factors_long")}), "or none of them"),
    "divisors for another head": (dict(tensors={"rope_freqs.weight": LONG[:4]}), "divisors must be R/2 = 8, got 4"),
    "a divisor of 0": (dict(tensors={"rope_freqs.weight": 0 * LONG}), "divisors must be positive and finite"),
    "a matrix of divisors": (dict(tensors={"rope_freqs.weight": np.ones((2, 8), np.float32)}), "must have R/2 divisors, got shape (2, 8)"),
    "sections that do not add up": (dict(architecture="qwen2vl", metadata={".rope.dimension_sections": [1, 3, 3, 0]}), "sections must add up to R/2 = 8"),
    "a fourth section": (dict(architecture="qwen2vl", metadata={".rope.dimension_sections": [1, 3, 3, 1]}), "and then 0, got [1, 3, 3, 1]"),
    "longrope and yarn": (dict(metadata=YARN, tensors={"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}), "must not be yarn beside the tensors of LongRoPE"),
    "Llama 4 without windows": (dict(architecture="llama4", metadata={".attention.sliding_window": 0}), "must be above 0 in this architecture"),
    "queries that shrink": (dict(architecture="mistral3", metadata={".attention.temperature_scale": -0.1}), "attention.temperature_scale must be at least 0"),
    "an image tower": (dict(architecture="clip"), "which lacks the towers of images and sounds"),
    "Baichuan 13B": (dict(architecture="baichuan", metadata={".block_count": 40}), "got Baichuan 13B"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    given, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        model_rope(tmp_path, **given)
    said = str(error.value)
    assert message in said and "a.gguf" in said and "\n" not in said


def test_missing_sizes(tmp_path):
    path = write(tmp_path / "a.gguf", "llama", {".block_count": 1})
    with pytest.raises(ValueError, match=r"keys of 'llama' must have the key 'attention.head_count'"):
        from_gguf(path)


def test_divided_is_a_schedule():
    schedule = Divided(schedule=rope_jax.Standard(), divisors=[1.0, 4.0], attention_factor=2.0)
    assert schedule == Divided(schedule=rope_jax.Standard(), divisors=(1.0, 4.0), attention_factor=2.0)
    assert hash(schedule) == hash(Divided(schedule=rope_jax.Standard(), divisors=(1.0, 4.0), attention_factor=2.0))
    assert schedule(4) == rope_jax.Frequencies([1.0, 0.0025], 2.0)
    assert repr(schedule) == "Divided(schedule=Standard(base=10000.0), divisors=(1.0, 4.0), attention_factor=2.0)"
    assert Divided(schedule=rope_jax.Standard())(4) == rope_jax.Standard()(4)
