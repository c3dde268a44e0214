"""The habits of a model family: how its configs are spelled, and what they leave out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from rope_jax.core.primitive import Layout
from rope_jax.interop.config import Config
from rope_jax.interop.rope_types import Reader
from rope_jax.interop.sections import PairAxes

RotatingLayers = Literal[
    "all",
    "no_rope_layers",
    "sliding",
    "sliding_if_any",
    "dense_or_sliding",
    "layer_rope_theta",
    "rope_scaling_layers",
]
Temperature = Literal["yarn", "without_rope"]
Values = Mapping[str, Any]


class LayerBase(NamedTuple):
    """The base of one layer type in older configs, which have one flat ``rope_scaling`` for all layers."""

    key: str
    default: float
    scaled: bool  # whether ``rope_scaling`` applies to the layer type


class FullEvery(NamedTuple):
    """The layers of full attention in older configs, which have no ``layer_types``."""

    key: str
    period: int  # if the key is missing
    first: int  # the first layer of full attention
    other: str  # the type of the other layers


class Switch(NamedTuple):
    """A key for the rotation of the whole model, on or off."""

    key: str
    on: object
    default: object  # if the key is missing

    def is_on(self, config: Config) -> bool:
        return config.get(self.key, self.default) == self.on

    def written(self, on: bool) -> dict[str, Any]:
        off = self.default if self.default != self.on else not self.on
        return {self.key: self.on if on else off}


class NullSwitch:
    """``rope_parameters: null`` means a model without rotation."""

    def is_on(self, config: Config) -> bool:
        return not config.is_null("rope_parameters")

    def written(self, on: bool) -> dict[str, Any]:
        return {} if on else {"rope_parameters": None}


def _unchanged_on_reading(values: Values, compat: bool) -> Values:
    return values


def _unchanged_on_writing(values: Values) -> Values:
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The habits of one model family, by what they are about.

    Rotation:
      layout: which two features make a pair.
      layout_key: the key of a flag for interleaved pairs.
      base: b, if the config gives none.
      proportion: R/H, if the config gives none. None means 1, and that transformers reads no proportion for the
        plain rotation.
      rotary_dim: R, if the config gives neither R nor a proportion.
      negated: whether pairs rotate by -m theta.
      rope_types: the family's own readers of a ``rope_type``.
      sections: how pairs are dealt to position axes; None for one axis.
      logit_factor: whether YaRN's ``mscale_all_dim`` also multiplies the scores, by g(mscale_all_dim)^2.
      temperature: which layers scale their queries (:class:`QueryTemperature`). ``yarn``: all layers, by a key
        beside YaRN's. ``without_rope``: layers without rotation.
      beyond: other uses of positions, beside rotation, temperature and logit factor; None for no other.
      ignored: further keys of released rope parameters, ignored by the model's own code.

    Head:
      keys: the family's names for ``head_dim``, ``hidden_size``, ``num_attention_heads``, ``num_hidden_layers``.
      default_head_dim: H, if the config gives none; D/N if this is None too.
      latent: whether the rotated part of a head has its own ``qk_rope_head_dim`` features (latent attention).

    Layers:
      layers: which layers rotate. ``no_rope_layers``: layers with a 1 in the list of this name. ``sliding``:
        layers with a sliding window. ``sliding_if_any``: the same, or all if no layer has a window.
        ``dense_or_sliding``: sliding layers, and the dense layers before the experts. ``layer_rope_theta``: layers
        with a base in the list of this name. ``rope_scaling_layers``: all layers; the listed layers are scaled.
      hybrid: whether a config must list the layer types, because some layers have no attention or no rotation.
      full_every: the layers of full attention in configs without ``layer_types``.
      switch: the key of the rotation of the whole model, on or off.

    Form of the config:
      explicit: whether a config must have ``rope_parameters``, because the family's default is more than a base.
      nested: whether ``rope_parameters`` has one dictionary for each layer type.
      labels: from a layer type to its key in ``rope_parameters``, if the two differ.
      bases: the base of each layer type in older, flat configs.
      read_hook: ``(values, compat) -> values`` puts a config into the common form before it is read.
      write_hook: ``values -> values`` puts a config into the family's form after it is written.
    """

    layout: Layout = "half"
    layout_key: str | None = None
    base: float = 10_000.0
    proportion: float | None = None
    rotary_dim: int | None = None
    negated: bool = False
    rope_types: Mapping[str, Reader] = dataclasses.field(default_factory=dict)
    sections: PairAxes | None = None
    logit_factor: bool = False
    temperature: Temperature | None = None
    beyond: str | None = None
    ignored: tuple[str, ...] = ()

    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_head_dim: int | None = None
    latent: bool = False

    layers: RotatingLayers = "all"
    hybrid: bool = False
    full_every: FullEvery | None = None
    switch: Switch | NullSwitch | None = None

    explicit: bool = False
    nested: bool = False
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bases: Mapping[str, LayerBase] = dataclasses.field(default_factory=dict)
    read_hook: Callable[[Values, bool], Values] = _unchanged_on_reading
    write_hook: Callable[[Values], Values] = _unchanged_on_writing

    def key(self, name: str) -> str:
        """The family's spelling of a common key."""
        return "qk_rope_head_dim" if self.latent and name == "head_dim" else self.keys.get(name, name)

    def label(self, layer_type: str | None) -> str | None:
        """The key in ``rope_parameters`` for layers of a type."""
        return layer_type if layer_type is None else self.labels.get(layer_type, layer_type)


MOST_LAYERS, MOST_FEATURES = 10_000, 2**20
"""Sizes far beyond any model: a slip in a file must not cost minutes."""

SYNONYMS = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "depth", "layers", "vt_num_hidden_layers"),
    "hidden_size": ("n_embd", "d_model", "embed_dim", "width", "vt_hidden_size"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "heads", "vt_num_attention_heads"),
}
"""Further spellings of the sizes, in files of every family."""

WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent")
"""Layer types without queries and keys to rotate."""
