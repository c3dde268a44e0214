"""Reads one dictionary of ``rope_parameters`` into a schedule, by its ``rope_type``."""

import dataclasses
from collections.abc import Callable, Mapping

from rope_jax.core.frequencies import Schedule
from rope_jax.core.length_schedules import DynamicNTK, LongRope
from rope_jax.core.schedules import Linear, Llama3, NTKAware, Proportional, Standard, Yarn
from rope_jax.interop.config import Config


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """One dictionary of ``rope_parameters`` and its config.

    Attributes:
      entry: the dictionary.
      config: the config around the dictionary; it may hold the lengths.
      base: b.
      by_layer_type: whether the config has one dictionary for each layer type.
      compat: whether to follow transformers in its departures from released checkpoints.
    """

    entry: Config
    config: Config
    base: float
    by_layer_type: bool
    compat: bool

    def max_length(self) -> int:
        """The longest context of the model."""
        names = ("max_position_embeddings", "max_seq_len", "model_max_length")
        if (length := self.config.first(*names)) is None:
            raise ValueError(
                f"{self.config.name} must have the key 'max_position_embeddings', or its rope parameters "
                "'original_max_position_embeddings', for this rope_type"
            )
        return self.config.integer(names[0], length)

    def original_length(self) -> int:
        """The context length of the training before the extension."""
        # Phi-3 keeps this length at the top of its config, so the top comes first; but the top does not count
        # beside a dictionary for one layer type.
        name = "original_max_position_embeddings"
        inside, at_top = self.entry.get(name), self.config.get(name)
        length = at_top if at_top is not None and not self.by_layer_type else inside
        return self.max_length() if length is None else self.entry.integer(name, length)

    def ignore_original_length(self) -> None:
        """Trainers write the original length beside rules that do not read it; see :func:`from_hf_config`."""
        self.entry.ignore("original_max_position_embeddings")

    def factor(self) -> float:
        """The growth of the context. A null factor is the ratio of the two lengths; a missing one is an error."""
        if self.entry.is_null("factor"):
            return self.max_length() / self.original_length()
        return self.entry.number("factor")


Reader = Callable[[RopeParameters], Schedule]


def standard(given: RopeParameters) -> Schedule:
    given.ignore_original_length()
    return Standard(base=given.base)


def linear(given: RopeParameters) -> Schedule:
    given.ignore_original_length()
    return Linear(factor=given.factor(), base=given.base)


def dynamic(given: RopeParameters) -> Schedule:
    given.ignore_original_length()
    return DynamicNTK(factor=given.factor(), original_length=given.max_length(), base=given.base)


def alpha(given: RopeParameters) -> Schedule:
    """HunYuan's NTK scaling, by a constant factor ``alpha``."""
    given.ignore_original_length()
    given.entry.ignore("factor")  # 1 in the released configs, and replaced by alpha
    return NTKAware(factor=given.entry.number("alpha"), base=given.base)


def alpha_or_dynamic(given: RopeParameters) -> Schedule:
    return alpha(given) if given.entry.get("alpha") else dynamic(given)


def yarn(given: RopeParameters) -> Schedule:
    given.entry.ignore("finetuned")  # how the first YaRN checkpoints were made
    truncate = given.entry.flag("truncate", True)
    factor, attention_factor = given.factor(), given.entry.number("attention_factor", None)
    # vLLM's keys: a multiple of g(factor), whether g counts, and a share of the blend, which is 1 in every file.
    multiple, with_g = given.entry.number("attn_factor", None), given.entry.flag("apply_yarn_scaling", True)
    if given.entry.number("extrapolation_factor", 1.0) != 1.0:
        given.entry.refuse(f"extrapolation_factor must be 1, got {given.entry.get('extrapolation_factor')}")
    if (multiple is not None or not with_g) and not given.compat:
        if attention_factor is not None or given.entry.get("mscale_all_dim"):
            given.entry.refuse(
                "attn_factor and apply_yarn_scaling exclude attention_factor and mscale_all_dim; "
                "keep what the model ran with"
            )
        g = Yarn(factor=factor, original_length=given.original_length()).g(1.0) if with_g else 1.0
        attention_factor = g * (1.0 if multiple is None else multiple)
    return Yarn(
        factor=factor,
        original_length=given.original_length(),
        base=given.base,
        beta_fast=given.entry.number("beta_fast", 32.0) or 32.0,  # 0 is the default
        beta_slow=given.entry.number("beta_slow", 1.0) or 1.0,
        mscale=given.entry.number("mscale", None),
        mscale_all_dim=given.entry.number("mscale_all_dim", None),
        attention_factor=attention_factor,
        truncate=True if given.compat and given.by_layer_type else truncate,
    )


def longrope(given: RopeParameters) -> Schedule:
    short, long = (
        given.entry.list_of(name, given.entry.need(name), int, float) for name in ("short_factor", "long_factor")
    )
    # Phi-3.5-MoE has one attention factor for each list.
    short_mscale, long_mscale = (given.entry.number(f"{name}_mscale", None) for name in ("short", "long"))
    if given.entry.get("factor") is not None:
        factor = given.factor()
    else:
        factor = max(given.max_length() / given.original_length(), 1.0)
    return LongRope(
        short_factor=short,
        long_factor=short if given.compat and long_mscale is not None else long,
        original_length=given.original_length(),
        factor=factor,
        base=given.base,
        attention_factor=given.entry.number("attention_factor", short_mscale),
        long_attention_factor=long_mscale,
    )


def llama3(given: RopeParameters) -> Schedule:
    return Llama3(
        factor=given.factor(),
        original_length=given.original_length(),
        low_freq_factor=given.entry.number("low_freq_factor"),
        high_freq_factor=given.entry.number("high_freq_factor"),
        base=given.base,
    )


def proportional(given: RopeParameters) -> Schedule:
    proportion = given.entry.number("partial_rotary_factor", 1.0)
    return Proportional(proportion=proportion, factor=given.entry.number("factor", 1.0), base=given.base)


ROPE_TYPES: Mapping[str, Reader] = {
    "default": standard,
    "linear": linear,
    "dynamic": dynamic,
    "yarn": yarn,
    "longrope": longrope,
    "su": longrope,  # the first name of LongRoPE
    "llama3": llama3,
    "proportional": proportional,
}


_RECIPE_KEYS = """
factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim attention_factor attn_factor
truncate finetuned extrapolation_factor short_factor long_factor short_mscale long_mscale low_freq_factor
high_freq_factor
"""
# Keys and names of other families, and of programs: where they lead.
ELSEWHERE = {
    "alpha": "; a key of HunYuan's dynamic scaling: like='hunyuan_v1_dense' reads it",
    "mrope": "; pairs that read several axes need their family: like='qwen2_vl' or like='qwen3_vl_text'",
    "xdrope": "; pairs that read several axes need their family: like='hunyuan_vl_text'",
    "rope_ratio": (
        "; it multiplies the base in GLM-4 and ChatGLM3: write rope_theta = 10000 * rope_ratio instead. "
        "In ChatGLM2-32K it divides positions: write rope_scaling of type linear with this factor"
    ),
    "deepseek_yarn": "; vLLM's name of YaRN with DeepSeek's mscale: write 'yarn'",
    "llama_4_scaling_beta": "; a key of Ministral 3: like='ministral3' reads it",
    "ntk": (
        "; Alibaba's fixed NTK, inv_freq_i = base^(-2i/R) / factor^(2(i + 1)/R), is no schedule of a config: "
        "remove the recipe, and give Rope a schedule of your own"
    ),
}
ELSEWHERE["dual_chunk_attention_config"] = (
    "; positions inside chunks are no part of the recipe: remove the key for contexts that fit one chunk"
)
ELSEWHERE["mrope_section"] = ELSEWHERE["mrope"]
ELSEWHERE["xdrope_section"] = ELSEWHERE["xdrope"]


def advice_in(entry: Config) -> Mapping[str, str]:
    """The ends of messages for keys of a dictionary that its rope_type does not read."""
    unread = f"; rope_type {rope_type(entry)!r} does not read it"
    return dict.fromkeys(_RECIPE_KEYS.split(), unread) | ELSEWHERE


def rope_type(entry: Config) -> str:
    """The name of the schedule, from ``rope_type`` or the older key ``type``."""
    name, older = entry.get("rope_type"), entry.get("type")
    # Qwen2-VL's sections are written as type "mrope" beside rope_type "default".
    if name is not None and older not in (None, name, "mrope"):
        raise ValueError(
            f"{entry.name} has two names for its schedule: rope_type = {name!r}, type = {older!r}; keep one"
        )
    return name or older or "default"
