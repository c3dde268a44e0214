"""Reads the rotation of every layer from a GGUF file."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rope_jax.core.composed_schedules import Sections
from rope_jax.core.frequencies import Frequencies, Schedule, call_schedule, check_schedule
from rope_jax.core.length_schedules import LongRope
from rope_jax.core.rope import Rope
from rope_jax.core.schedules import Linear, Standard, Yarn, check_hyperparameters, repr_without_defaults
from rope_jax.interop.config import Config
from rope_jax.interop.family import MOST_FEATURES, MOST_LAYERS
from rope_jax.interop.gguf_architectures import Architecture, find_architecture, sliding_layers
from rope_jax.interop.gguf_file import GgufFile, open_gguf
from rope_jax.interop.layers import FULL, SLIDING
from rope_jax.interop.model_rope import LayerRope, ModelRope, QueryTemperature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divided:
    """Another schedule's frequencies, each divided by a number: ``theta_i / divisors_i``.

    Attributes:
      schedule: of the frequencies before the division, with one position axis.
      divisors: R/2 positive numbers; None for 1.
      attention_factor: multiplies the attention factor of the schedule.

    Raises:
      ValueError: if a divisor or the attention factor is not positive and finite, or divisors are not R/2 numbers.
    """

    schedule: Schedule
    divisors: Sequence[float] | None = None
    attention_factor: float = 1.0

    __repr__ = repr_without_defaults

    def __post_init__(self):
        check_hyperparameters(self, positive=["attention_factor"])
        if self.divisors is not None:
            object.__setattr__(self, "divisors", tuple(map(float, self.divisors)))
            if not all(0 < divisor < math.inf for divisor in self.divisors):
                raise ValueError(f"Divided: divisors must be positive and finite, got {self.divisors}")

    def __call__(self, rotary_dim: int) -> Frequencies:
        check_schedule(self.schedule)
        inner = call_schedule(self.schedule, rotary_dim)
        assert isinstance(inner, Frequencies)
        inv_freq = inner.inv_freq
        if self.divisors is not None:
            if len(self.divisors) != rotary_dim // 2:
                raise ValueError(f"Divided: divisors must be R/2 = {rotary_dim // 2}, got {len(self.divisors)}")
            inv_freq = inv_freq / np.array(self.divisors)
        return dataclasses.replace(
            inner, inv_freq=inv_freq, attention_factor=inner.attention_factor * self.attention_factor
        )


def from_gguf(source) -> ModelRope:
    """The rotation of every layer of a model in a GGUF file, as llama.cpp reads it.

    ``theta_i = b^(-2i/R) / (factor * divisors_i)``, with cos and sin times ``attn_factor``; YaRN blends as
    :class:`Yarn`. In the keys of an architecture:

    - b: ``rope.freq_base``, else 10,000; ``rope.freq_base_swa`` in layers that slide (Gemma 3);
    - R: ``rope.dimension_count``, else the size of a head;
    - sections of several position axes: ``rope.dimension_sections`` (Qwen2-VL, Qwen3-VL);
    - factor: ``rope.scaling.factor``, or the older ``rope.scale_linear``, unless ``rope.scaling.type`` is ``none``;
    - divisors: the tensor ``rope_freqs.weight`` (Llama 3's rule), or LongRoPE's two lists,
      ``rope_factors_short.weight`` and ``rope_factors_long.weight``.

    llama.cpp's architectures of type NORM pair neighbours (``layout="interleaved"``): its converters permute the
    rows of queries and keys in these files. The table is ``rope_jax/interop/gguf_architectures.py``.

    llama.cpp and transformers differ. Here:

    - Without ``yarn_log_multiplier`` (l), YaRN's attention factor is ``attn_factor * g(1)``, with it
      ``attn_factor * g(1) / g(l)``. In transformers, ``attention_factor`` replaces ``g(1)``.
    - YaRN's ends are whole pairs. gpt-oss in transformers does not round them.
    - ``yarn_beta_fast`` and ``yarn_beta_slow`` count in every architecture; llama.cpp reads them in a few.
    - LongRoPE's list is chosen by ``context_length``, as in transformers. llama.cpp chooses by the capacity of the
      cache.
    - Pairs beyond the sections of Qwen3-VL read the time, as in transformers; llama.cpp has a fourth axis for them.

    Example:
      >>> import pathlib, tempfile, gguf, rope_jax
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.gguf"  # metadata alone; use a downloaded file
      >>> writer = gguf.GGUFWriter(path, "llama")
      >>> writer.add_block_count(2), writer.add_embedding_length(256), writer.add_head_count(4)
      (None, None, None)
      >>> writer.add_rope_freq_base(500_000.0)
      >>> writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.close()
      (None, None, None)
      >>> rope_jax.interop.from_gguf(path)
      ModelRope('llama', 2 layers:
        0-1: LayerRope(rope=Rope(head_dim=64, schedule=Standard(base=500000.0), layout='interleaved'), type=None, \
logit_factor=1.0, query_temperature=None))

    Args:
      source: the path of a file, or an open ``gguf.GGUFReader``.

    Returns:
      :class:`ModelRope`; ``model_type`` is llama.cpp's name of the architecture.

    Raises:
      ValueError: if the file is broken or one of several parts, the architecture is unknown or does not rotate, or
        a key that begins with ``rope`` is unknown or has a value out of range. The message names it.
      FileNotFoundError: if there is no such file.
      TypeError: if ``source`` is neither a path nor a reader.
      ImportError: without the package gguf; install ``rope_jax[gguf]``.
    """
    return read_ropes(open_gguf(source))


def read_ropes(file: GgufFile) -> ModelRope:
    """The rotation of every layer of an open file."""
    name = file.architecture
    architecture = find_architecture(name, file.name)
    config = metadata_of(file)
    layers = _layers(file, config, architecture)
    config.refuse_unread({}, inert=lambda key: not key.startswith("rope"))
    return ModelRope(name, layers)


def metadata_of(file: GgufFile) -> Config:
    """The keys of the file's architecture, without its name: ``block_count``, ``rope.freq_base``, ..."""
    prefix = f"{file.architecture}."
    values = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
    return Config(values, f"{file.name}, keys of {file.architecture!r}")


def head_sizes(config: Config) -> tuple[int, list[int], list[int]]:
    """H, and the numbers of query heads and of key heads in each layer."""
    count = config.integer("block_count", config.need("block_count"), most=MOST_LAYERS)
    queries = _each_layer(config, "attention.head_count", config.need("attention.head_count"), count)
    keys = config.get("attention.head_count_kv")
    keys = queries if keys is None else _each_layer(config, "attention.head_count_kv", keys, count)
    head_dim = config.get("attention.key_length")
    if head_dim is None:
        width = config.integer("embedding_length", config.need("embedding_length"))
        head_dim = width // max(queries[0], 1)
    return config.integer("attention.key_length", head_dim, most=MOST_FEATURES), queries, keys


def _each_layer(config: Config, key: str, value, count: int) -> list[int]:
    values = config.per_layer(key, value, count) if isinstance(value, list) else [value] * count
    return [config.integer(key, number, least=0) for number in values]


def _layers(file: GgufFile, config: Config, architecture: Architecture) -> tuple[LayerRope, ...]:
    head_dim, queries, keys = head_sizes(config)
    count = len(queries)
    slides = sliding_layers(config, architecture, count)
    period = architecture.attention_period
    if period is not None:
        period = config.integer("full_attention_interval", config.get("full_attention_interval", period))
    rotates = _rotating(file, config, architecture, slides)
    temperature = _temperature(config, architecture)
    # The keys are read once; each kind of layer is one object.
    recipe = _Recipe.read(file, config, architecture)
    full = functools.cache(lambda: recipe.rope(head_dim, "rope.dimension_count", sliding=False))
    sliding = functools.cache(lambda: _sliding_rope(recipe, head_dim))
    kinds: dict[tuple, LayerRope] = {}
    layers = []
    for i in range(count):
        attends = queries[i] > 0 and keys[i] > 0 and (period is None or (i + 1) % period == 0)
        rotating = rotates[i] and attends
        hot = attends and (architecture.temperature == "all" or not rotating)
        key = (slides[i], rotating, hot)
        if key not in kinds:
            rope = (sliding() if slides[i] else full()) if rotating else None
            type_ = (SLIDING if slides[i] else FULL) if any(slides) else None
            kinds[key] = LayerRope(rope, type_, query_temperature=temperature if hot else None)
        layers.append(kinds[key])
    if all(layer.rope is None for layer in layers):  # the keys of a rotation that is switched off do not matter
        config.ignore(*(key for key in config.values if key.startswith("rope")))
    return tuple(layers)


def _sliding_rope(recipe: "_Recipe", head_dim: int) -> Rope:
    config = recipe.config
    head_dim = config.integer("attention.key_length_swa", config.get("attention.key_length_swa", head_dim))
    key = "rope.dimension_count"
    key = f"{key}_swa" if config.get(f"{key}_swa") is not None else key
    return recipe.rope(head_dim, key, sliding=True)


def _rotating(file: GgufFile, config: Config, architecture: Architecture, slides: list[bool]) -> list[bool]:
    """Whether each layer rotates, if it has attention."""
    count = len(slides)
    finetuned = config.flag("rope.scaling.finetuned", True)  # a remark of the converter, but in Granite
    match architecture.layers:
        case "three_of_four":
            if config.get("attention.sliding_window") == 0:
                config.refuse("attention.sliding_window must be above 0 in this architecture, got 0")
            return [(i + 1) % 4 != 0 for i in range(count)]
        case "sliding":
            return slides
        case "sliding_if_any":
            return slides if any(slides) else [True] * count
        case "finetuned":
            return [finetuned] * count
    if file.architecture == "baichuan" and count == 40:  # the model of 13B has ALiBi
        raise ValueError(f"{file.name} must be of a model that rotates queries and keys, got Baichuan 13B")
    return [True] * count


def _temperature(config: Config, architecture: Architecture) -> QueryTemperature | None:
    if architecture.temperature == "without_rope":
        return QueryTemperature(beta=0.1, period=8192, offset=1)
    beta = config.number("attention.temperature_scale", 0.0) if architecture.temperature == "all" else 0.0
    if beta < 0:
        config.refuse(f"attention.temperature_scale must be at least 0, got {beta}")
    return QueryTemperature(beta=beta, period=_original_length(config)) if beta else None


def _original_length(config: Config) -> int:
    key = "rope.scaling.original_context_length"
    length = config.get(key)
    return config.integer(key, config.need("context_length") if length is None else length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
    """The ``rope.*`` keys and tensors of a file, apart from the head."""

    config: Config
    architecture: Architecture
    base: float
    sliding_base: float
    schedule: Any  # base -> schedule, before divisors and sections
    divisors: tuple[float, ...] | None
    attention_factor: float
    sections: tuple[int, ...] | None

    @classmethod
    def read(cls, file: GgufFile, config: Config, architecture: Architecture) -> "_Recipe":
        base = config.number("rope.freq_base", 10_000.0)
        sliding_base = base if architecture.sliding_base is None else architecture.sliding_base
        if architecture.slides != "never":
            sliding_base = config.number("rope.freq_base_swa", sliding_base)
        attention_factor = config.number("rope.scaling.attn_factor", 1.0)
        divisors, short, long = (
            _divisors(file, name) for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
        )
        schedule = _read_schedule(config)
        if (short is None) != (long is None) or (divisors and short):
            raise ValueError(
                f"{file.name} must hold the tensor rope_freqs.weight, or rope_factors_short.weight and "
                "rope_factors_long.weight, or none of them"
            )
        if short and long:
            schedule = _longrope(config, schedule, short, long, attention_factor)
        return cls(
            config=config,
            architecture=architecture,
            base=base,
            sliding_base=sliding_base,
            schedule=schedule,
            divisors=divisors,
            attention_factor=1.0 if short else attention_factor,
            sections=_sections(config, architecture),
        )

    def rope(self, head_dim: int, dims_key: str, *, sliding: bool) -> Rope:
        """The rotation of the layers that slide, or of the others."""
        config, architecture = self.config, self.architecture
        rotary_dim = config.integer(dims_key, config.get(dims_key, head_dim), least=2, most=MOST_FEATURES)
        layout = "half" if self.sections is not None else architecture.layout
        try:
            schedule = self._schedule(sliding)
            if self.sections is not None:
                schedule = _dealt(schedule, self.sections, rotary_dim // 2, architecture)
            rope = Rope(head_dim, schedule, rotary_dim=rotary_dim, layout=layout)
            # Frequencies that do not fit fail here, not at the first call.
            rope.frequencies(1 if rope.needs_context_length else None)
        except ValueError as error:  # the schedules' own checks know no file
            config.refuse(str(error))
        return rope

    def _schedule(self, sliding: bool) -> Schedule:
        if sliding and not self.architecture.sliding_scaled:
            return Standard(base=self.sliding_base)
        schedule = self.schedule(self.sliding_base if sliding else self.base)
        if self.divisors is None and self.attention_factor == 1.0:
            return schedule
        if isinstance(schedule, Yarn) and self.divisors is None:
            assert schedule.attention_factor is not None
            factor = schedule.attention_factor * self.attention_factor
            return dataclasses.replace(schedule, attention_factor=factor)
        return Divided(schedule=schedule, divisors=self.divisors, attention_factor=self.attention_factor)


def _divisors(file: GgufFile, name: str) -> tuple[float, ...] | None:
    tensor = file.tensors.get(f"{name}.weight")
    if tensor is None:
        return None
    if len(tensor.shape) != 1 or tensor.shape[0] > MOST_FEATURES:
        file.refuse(f"tensor {name}.weight must have R/2 divisors, got shape {tensor.shape}")
    return tuple(tensor[:].tolist())


def _read_schedule(config: Config):
    """A function from the base to the schedule, without divisors and ``attn_factor``."""
    kinds = ("none", "linear", "yarn", "longrope")
    kind = config.get("rope.scaling.type", "linear")
    if kind not in kinds:
        config.refuse(f"rope.scaling.type must be one of {kinds}, got {kind!r}")
    factor = config.number("rope.scaling.factor", None)
    older = config.number("rope.scale_linear", None)
    factor = older if factor is None else factor
    if kind == "none" or not factor:  # 0 is 1
        factor = 1.0
    # A negative number is unset; 1 blends as YaRN, 0 does not.
    blends = config.number("rope.scaling.yarn_ext_factor", -1.0)
    blends = float(kind == "yarn") if blends < 0 else blends
    if blends not in (0.0, 1.0):
        config.refuse(f"rope.scaling.yarn_ext_factor must be 0 or 1, got {blends}")
    if config.number("rope.scaling.yarn_attn_factor", 1.0) != 1.0:
        value = config.get("rope.scaling.yarn_attn_factor")
        config.refuse(
            f"rope.scaling.yarn_attn_factor must be 1, got {value}: converters write transformers' "
            "attention_factor here, and llama.cpp does not read it; write rope.scaling.attn_factor instead"
        )
    fast = config.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = config.number("rope.scaling.yarn_beta_slow", 1.0)
    log_multiplier = config.number("rope.scaling.yarn_log_multiplier", 0.0)
    if blends == 0.0 or factor == 1.0:
        config.ignore("rope.scaling.original_context_length")
        return lambda base: Standard(base=base) if factor == 1.0 else Linear(factor=factor, base=base)
    length = _original_length(config)

    def yarn(base: float) -> Yarn:
        schedule = Yarn(factor=factor, original_length=length, base=base, beta_fast=fast, beta_slow=slow)
        attention_factor = schedule.g(1.0) / (schedule.g(log_multiplier) if log_multiplier else 1.0)
        return dataclasses.replace(schedule, attention_factor=attention_factor)

    return yarn


def _longrope(config: Config, schedule, short: Sequence[float], long: Sequence[float], attention_factor: float):
    length = _original_length(config)
    context = config.integer("context_length", config.get("context_length", length))
    if isinstance(schedule(10_000.0), Yarn):
        config.refuse("rope.scaling.type must not be yarn beside the tensors of LongRoPE")

    def longrope(base: float) -> LongRope:
        factor = getattr(schedule(base), "factor", 1.0)  # llama.cpp divides by it too
        return LongRope(
            short_factor=[factor * divisor for divisor in short],
            long_factor=[factor * divisor for divisor in long],
            original_length=length,
            factor=max(context / length, 1.0),
            base=base,
            attention_factor=attention_factor,
        )

    return longrope


def _sections(config: Config, architecture: Architecture) -> tuple[int, ...] | None:
    key = "rope.dimension_sections"
    if architecture.order is None:
        return None
    counts = config.list_of(key, config.get(key, []), int)
    if not any(counts):
        if architecture.optional_sections:
            return None
        config.need(key)
    if len(counts) not in (3, 4) or min(counts) < 0 or any(counts[3:]) or not sum(counts):
        config.refuse(f"{key} must count the pairs of time, height and width, and then 0, got {counts}")
    return tuple(counts[:3])


def _dealt(schedule: Schedule, counts: tuple[int, ...], num_pairs: int, architecture: Architecture) -> Sections:
    assert architecture.order is not None
    if architecture.order == "strided":  # pairs beyond the sections read the time
        dealt = [i % 3 if i < 3 * counts[i % 3] else 0 for i in range(num_pairs)]
        counts = (dealt.count(0), dealt.count(1), dealt.count(2))
    return Sections(sections=counts, schedule=schedule, order=architecture.order)
