"""The rotation of a whole model, as a value."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from rope_jax._checks import (
    as_int32,
    check_dtype,
    check_integer,
    check_name,
    check_positive,
    check_sequence,
    device_array,
    shown,
)
from rope_jax.core.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryTemperature:
    """Multiplies queries by ``1 + beta ln(1 + floor((m + offset) / period))`` (Meta 2025, Llama 4).

    Attributes:
      beta: the growth for each step of the logarithm.
      period: positions between two steps.
      offset: added to each position.

    Raises:
      TypeError: if beta is no number, or period or offset no integer.
      ValueError: if beta is not positive and finite, period is below 1, offset below 0, or their sum not below
        2^31.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> temperature = rope_jax.interop.QueryTemperature(beta=0.1, period=8192)
      >>> [f"{factor:.4f}" for factor in temperature(jnp.array([0, 8191, 8192]))]
      ['1.0000', '1.0000', '1.0693']
    """

    beta: float
    period: int
    offset: int = 0

    def __post_init__(self):
        check_positive("beta", self.beta, concrete=True)
        object.__setattr__(self, "beta", float(self.beta))
        for field, least in (("period", 1), ("offset", 0)):
            object.__setattr__(self, field, check_integer(field, getattr(self, field), least))
        if self.period + self.offset >= 2**31:
            got = f"{shown(self.period)} and {shown(self.offset)}"
            raise ValueError(f"period + offset must be below 2^31, got {got}")

    def __call__(self, positions) -> jax.Array:
        """The factors of queries at integer positions ``[..., T]``, at least 0: float32 ``[..., T]``.

        Raises:
          TypeError: if the positions are not integers.
        """
        positions = device_array("positions", positions)
        check_dtype("positions", positions, jnp.integer, "integer")
        positions = as_int32(positions)
        # In two parts, each below 2^31: position + offset may exceed the largest integer.
        steps = positions // self.period, (positions % self.period + self.offset) // self.period
        return 1.0 + self.beta * jnp.log1p(steps[0].astype(jnp.float32) + steps[1].astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class LayerRope:
    """The position encoding of one layer.

    Attributes:
      rope: the rotation; None if the layer does not rotate or has no attention.
      type: the config's name for layers of this kind; None if it has none.
      logit_factor: multiplies the scores, beside ``1/sqrt(H)`` of the whole head (DeepSeek-V2's use of YaRN).
      query_temperature: multiplies the queries by a function of their position; None for no such factor.

    Raises:
      TypeError: if a field is of another kind.
      ValueError: if logit_factor is not positive and finite.
    """

    rope: Rope | None
    type: str | None = None
    logit_factor: float = 1.0
    query_temperature: QueryTemperature | None = None

    def __post_init__(self):
        for field, kind in (("rope", Rope), ("type", str), ("query_temperature", QueryTemperature)):
            value = getattr(self, field)
            if not isinstance(value, kind | None):
                raise TypeError(f"{field} must be None or a {kind.__name__}, got {shown(value)}")
        check_positive("logit_factor", self.logit_factor, concrete=True)
        object.__setattr__(self, "logit_factor", float(self.logit_factor))


@dataclasses.dataclass(frozen=True, repr=False)
class ModelRope:
    """The position encoding of a whole model: hashable, equal by value, printed with equal layers together.

    Attributes:
      model_type: the family, as Hugging Face names it.
      layers: one :class:`LayerRope` for each layer.

    Raises:
      TypeError: if model_type is no text, or layers are no sequence of :class:`LayerRope`.

    Example:
      >>> import rope_jax
      >>> from rope_jax.interop import LayerRope, ModelRope
      >>> rotating = LayerRope(rope_jax.Rope(64, rope_jax.Standard()))
      >>> model_rope = ModelRope("smollm3", (rotating, rotating, rotating, LayerRope(None)))
      >>> model_rope.layers[3].rope is None
      True
    """

    model_type: str
    layers: tuple[LayerRope, ...]

    def __post_init__(self):
        check_name("model_type", self.model_type)
        layers = tuple(check_sequence("layers", self.layers, "a sequence of LayerRope"))
        if not all(isinstance(layer, LayerRope) for layer in layers):
            raise TypeError(f"layers must hold a LayerRope for each layer, got {shown(layers)}")
        object.__setattr__(self, "layers", layers)

    @property
    def rope(self) -> Rope:
        """The common rotation of all layers.

        Raises:
          ValueError: if layers differ, or do not rotate.
        """
        ropes = {layer.rope for layer in self.layers}
        if len(ropes) != 1 or None in ropes:
            raise ValueError(f"rope is for models whose layers are all alike; use .layers[i].rope of {self}")
        (rope,) = ropes
        assert rope is not None
        return rope

    def __repr__(self):
        kinds: dict[LayerRope, list[int]] = {}
        for i, layer in enumerate(self.layers):
            kinds.setdefault(layer, []).append(i)
        lines = "".join(f"\n  {_ranges(layers)}: {layer}" for layer, layers in kinds.items())
        return f"ModelRope({self.model_type!r}, {len(self.layers)} layers:{lines})"


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    ranges: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *_, last = [number for _, number in run] * 2
        ranges.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join(ranges)
