"""One row for each architecture of llama.cpp: its pairs of features, and the layers that rotate or slide.

The facts are those of llama.cpp: ``llama_model_rope_type`` and ``load_hparams`` in ``src/llama-model.cpp``, and the
graphs in ``src/models``. Most architectures differ in nothing but the layout; a row holds only the differences.
"""

import dataclasses
from typing import Literal

from rope_jax.core.composed_schedules import SectionOrder
from rope_jax.core.primitive import Layout
from rope_jax.interop.config import Config, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The habits of an architecture.

    Attributes:
      layout: ``"interleaved"`` for llama.cpp's type NORM, ``"half"`` for NEOX, MROPE and IMROPE.
      order: of dealing pairs to position axes by ``rope.dimension_sections``; None for one axis.
      optional_sections: whether a file without sections has one axis. With sections, the layout is ``"half"``.
      layers: the rotating layers among the layers with attention: all, sliding layers only, sliding layers only if
        any layer slides, three of four, or all unless ``rope.scaling.finetuned`` is false.
      slides: whether layers slide: never, always, if the file has a window, or if the model has 64 layers.
      period: among sliding layers, the last layer of each period has full attention.
      attention_period: among layers without attention, the last layer of each period has attention.
      sliding_base: b of sliding layers, if the file has no ``rope.freq_base_swa``; None for the base of all layers.
      sliding_scaled: whether ``rope.scaling`` and divisors count in sliding layers.
      temperature: of queries, by position: in layers without rotation (Llama 4), or in all layers (Ministral 3).
    """

    layout: Layout
    order: SectionOrder | None = None
    optional_sections: bool = False
    layers: Literal["all", "sliding", "sliding_if_any", "three_of_four", "finetuned"] = "all"
    slides: Literal["never", "always", "with_window", "with_64_layers"] = "never"
    period: int | None = None
    attention_period: int | None = None
    sliding_base: float | None = None
    sliding_scaled: bool = True
    temperature: Literal["without_rope", "all"] | None = None


ARCHITECTURES: dict[str, Architecture] = {}


def _architecture(names: str, **habits) -> None:
    ARCHITECTURES.update(dict.fromkeys(names.split(), Architecture(**habits)))


_architecture(
    "llama llada arcee arctic baichuan bailingmoe chameleon chatglm command-r deci deepseek ernie4_5 ernie4_5-moe "
    "internlm2 llama-embed maincoder minicpm neo-bert olmo xverse",
    layout="interleaved",
)
_architecture(
    "apertus bailingmoe2 bitnet codeshell cogvlm dbrx dots1 dream eurobert exaone falcon falcon-h1 gemma gptneox "
    "grovemoe hunyuan-dense hunyuan-moe jais2 jina-bert-v3 lfm2 lfm2moe llada-moe minimax-m2 nemotron nomic-bert "
    "nomic-bert-moe olmoe openelm orion pangu-embedded phi2 phi3 phimoe plamo plamo2 qwen qwen2 qwen2moe qwen3 "
    "qwen3moe rnd1 seed_oss stablelm starcoder2",
    layout="half",
)
_architecture("granite granitemoe granitehybrid", layout="interleaved", layers="finetuned")
_architecture("smollm3", layout="interleaved", layers="three_of_four")
_architecture("llama4", layout="interleaved", layers="three_of_four", temperature="without_rope")
_architecture("mistral3", layout="interleaved", temperature="all")
_architecture("cohere2", layout="interleaved", layers="sliding", slides="always", period=4)
_architecture("exaone4", layout="half", layers="sliding_if_any", slides="with_64_layers", period=4)
_architecture("gemma2 gpt-oss", layout="half", slides="always", period=2)
_architecture("olmo2", layout="half", slides="with_window", period=4, sliding_scaled=False)
_gemma3 = dict(layout="half", slides="with_window", sliding_base=10_000.0, sliding_scaled=False)
_architecture("gemma3 gemma-embedding", period=6, **_gemma3)
_architecture("gemma3n", period=5, **_gemma3)
_architecture("gemma4", layout="half", slides="always", sliding_scaled=False)
_architecture("qwen3next", layout="half", attention_period=4)
_architecture("qwen2vl paddleocr", layout="half", order="runs")
_architecture("qwen3vl qwen3vlmoe", layout="half", order="strided")
_architecture("qwen35 qwen35moe", layout="half", order="strided", attention_period=4)
_architecture("glm4", layout="interleaved", order="runs", optional_sections=True)
_architecture("glm4moe", layout="half", order="runs", optional_sections=True)

_NO_ROTATION = """
arwkv7 bert bloom gpt2 gptj jais jamba jina-bert-v2 kimi-linear mamba mamba2 mpt nemotron_h nemotron_h_moe
refact rwkv6 rwkv6qwen2 rwkv7 starcoder t5 t5encoder wavtokenizer-dec
"""
_BEYOND = {
    "deepseek2 deepseek2-ocr glm-dsa minicpm3 mistral4 plm": "the rotated part of a latent head",
    "afmoe exaone-moe mimo2 modern-bert plamo3 smallthinker step35": "its kinds of layers",
    "grok": "the growth of its queries with the position",
    "hunyuan_vl": "its scaling by alpha",
    "clip": "the towers of images and sounds",
}


def find_architecture(name: str, file: str) -> Architecture:
    """The row of an architecture.

    Raises:
      ValueError: if the architecture is unknown or does not rotate. The message says what to do.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name in _NO_ROTATION.split():
        raise ValueError(f"{file} must be of a model that rotates queries and keys, got architecture {name!r}")
    lacks = [lack for names, lack in _BEYOND.items() if name in names.split()]
    reason = f", which lacks {lacks[0]}" if lacks else ""
    raise ValueError(
        f"{file}: architecture {name!r:.60} is not in the table of from_gguf{reason}"
        f"{did_you_mean(name, ARCHITECTURES)}; read the config.json of the same model by from_hf_config"
    )


def sliding_layers(config: Config, architecture: Architecture, count: int) -> list[bool]:
    """Whether each of ``count`` layers slides."""
    if architecture.slides == "never":
        return [False] * count
    slides = {
        "always": True,
        "with_window": bool(config.get("attention.sliding_window")),
        "with_64_layers": count == 64,
    }[architecture.slides]
    pattern = config.get("attention.sliding_window_pattern", architecture.period)
    if isinstance(pattern, list):
        pattern = config.list_of("attention.sliding_window_pattern", pattern, bool, int)
        pattern = config.per_layer("attention.sliding_window_pattern", pattern, count)
        return [bool(flag) for flag in pattern]
    if pattern is None:
        config.refuse("attention.sliding_window_pattern must have an entry for each layer, got none")
    period = config.integer("attention.sliding_window_pattern", pattern)
    return [slides and i % period < period - 1 for i in range(count)]
