"""Published frequency schedules that depend on the context length."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_dtype, check_integer, check_reals, device_array, known_of, shown
from rope_jax.core.frequencies import Frequencies, FrequencyChoice
from rope_jax.core.schedules import check_hyperparameters, geometric, ntk_ramp


def _resolve_context_length(schedule, context_length) -> int | jax.Array:
    """The argument of the call, else the field; raises ValueError if both are None or the value is below 1."""
    name = type(schedule).__name__
    context_length = schedule.context_length if context_length is None else context_length
    if context_length is None:
        raise ValueError(
            f"{name} needs a context_length: set the field context_length=, or pass context_length= with the call "
            "(an integer, or an integer array with one entry for each batch row)"
        )
    given = context_length
    if isinstance(context_length, np.ndarray):
        context_length = device_array("context_length", context_length)
    if not isinstance(context_length, jax.Array):
        return _host_context_length(schedule, context_length)
    check_dtype("context_length", context_length, jnp.integer, "integer")
    if 0 in context_length.shape:
        raise ValueError(f"{name}: context_length must be [] or [B], got shape {context_length.shape}")
    if known_of(given, lambda lengths: lengths < 1):
        raise ValueError(f"{name}: context_length must be at least 1 token, got {np.asarray(given).tolist()}")
    return context_length


def _host_context_length(schedule, context_length) -> int:
    try:
        num_tokens = check_integer("context_length", context_length)
    except TypeError:
        raise TypeError(
            f"context_length must be an integer or an integer array, got {shown(context_length)}"
        ) from None
    if num_tokens >= 2**63:
        raise ValueError(f"{type(schedule).__name__}: context_length must fit in int64, got {shown(num_tokens)}")
    if num_tokens < 1:
        raise ValueError(f"{type(schedule).__name__}: context_length must be at least 1 token, got {num_tokens}")
    return num_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK:
    """NTK-aware interpolation that grows with the context length (Peng et al. 2023, YaRN, section 3.3).

    ``base' = base * (factor * L / original_length - (factor - 1))^(R/(R-2))`` with ``L = max(context_length,
    original_length)``, as in transformers: up to the original length, frequencies are unchanged.

    ``context_length``, in tokens, is a static field or an argument of the call. A traced argument, scalar or with
    one entry for each batch row, compiles once for all lengths. Its frequencies are float32: a frequency divided by
    s is off by up to ``(8 + 2 ln s) 2^-24`` of its value. Phases then take the float32 path of :func:`rotation`.

    Raises:
      ValueError: if a field is out of range, or ``context_length`` is given neither as field nor as argument.

    Example:
      >>> import rope_jax
      >>> rope_jax.DynamicNTK(factor=2.0, original_length=1024)(4, context_length=2048).inv_freq.round(6).tolist()
      [1.0, 0.003333]
    """

    factor: float
    original_length: int
    base: float = 10_000.0
    context_length: int | None = None

    def __post_init__(self):
        check_hyperparameters(self, positive=["base"], factor=1, original_length=1)
        if self.context_length is not None:  # an array would not be hashable
            object.__setattr__(self, "context_length", _host_context_length(self, self.context_length))

    def __call__(self, rotary_dim: int, context_length: int | jax.Array | None = None) -> Frequencies:
        context_length = _resolve_context_length(self, context_length)
        inv_freq, ramp = geometric(rotary_dim, self.base), ntk_ramp(rotary_dim)
        if not isinstance(context_length, jax.Array):
            host_excess = max(context_length, self.original_length) / self.original_length - 1
            return Frequencies(inv_freq * (1 + self.factor * host_excess) ** -ramp)
        # L/original - 1 is formed from an exact integer, so that float32 loses nothing near the original.
        excess = jnp.maximum(context_length - self.original_length, 0).astype(jnp.float32) / self.original_length
        shrink = jnp.exp(-jnp.log1p(self.factor * excess)[..., None] * jnp.asarray(ramp, jnp.float32))
        return Frequencies(jnp.asarray(inv_freq, jnp.float32) * shrink, num_batch_axes=context_length.ndim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE: a divisor for each pair, from the short list up to the original length, else from the long list.

    ``theta_i = base^(-2i/R) / long_factor[i]`` if ``context_length > original_length``, else with ``short_factor``
    (Ding et al. 2024, section 3). ``factor`` is the extended context length over the original length. By default
    ``attention_factor`` is ``sqrt(1 + ln(factor) / ln(original_length))``, as in Phi-3.

    ``long_attention_factor`` replaces ``attention_factor`` for the long list (Phi-3.5-MoE).

    ``context_length``, in tokens, is a static field or an argument of the call. A traced argument, scalar or with
    one entry for each batch row, compiles once for all lengths and stays exact.

    Raises:
      ValueError: if a field is out of range, a list has not R/2 entries, or ``context_length`` is given neither as
        field nor as argument.

    Example:
      >>> import rope_jax
      >>> schedule = rope_jax.LongRope(short_factor=[1, 1], long_factor=[1, 8], original_length=4096, factor=32)
      >>> schedule(4, context_length=4097).inv_freq.tolist()
      [1.0, 0.00125]
    """

    short_factor: Sequence[float]
    long_factor: Sequence[float]
    original_length: int
    factor: float
    base: float = 10_000.0
    attention_factor: float | None = None
    long_attention_factor: float | None = None
    context_length: int | None = None

    def __post_init__(self):
        check_hyperparameters(self, positive=["base"], factor=1, original_length=2)
        for name in ("short_factor", "long_factor"):
            divisors = check_reals(f"LongRope: {name}", getattr(self, name))
            if min(divisors, default=1.0) <= 0:
                raise ValueError(f"LongRope: {name} must hold positive numbers, got {divisors}")
            object.__setattr__(self, name, divisors)
        for name in ("attention_factor", "long_attention_factor"):
            if getattr(self, name) is not None:
                check_hyperparameters(self, positive=[name])
        if self.context_length is not None:  # an array would not be hashable
            object.__setattr__(self, "context_length", _host_context_length(self, self.context_length))

    def __call__(
        self, rotary_dim: int, context_length: int | jax.Array | None = None
    ) -> Frequencies | FrequencyChoice:
        context_length = _resolve_context_length(self, context_length)
        short, long = (self._frequencies(rotary_dim, name) for name in ("short_factor", "long_factor"))
        if isinstance(context_length, jax.Array):
            return FrequencyChoice((short, long), (context_length > self.original_length).astype(jnp.int32))
        return long if context_length > self.original_length else short

    def _frequencies(self, rotary_dim: int, divisors_field: str) -> Frequencies:
        inv_freq = geometric(rotary_dim, self.base)
        divisors = np.array(getattr(self, divisors_field))
        if divisors.shape != inv_freq.shape:
            raise ValueError(
                f"LongRope: {divisors_field} must have R/2 = {inv_freq.size} numbers for rotary_dim {rotary_dim}, "
                f"got {divisors.size}"
            )
        attention_factor = self.attention_factor
        if divisors_field == "long_factor" and self.long_attention_factor is not None:
            attention_factor = self.long_attention_factor
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return Frequencies(inv_freq / divisors, attention_factor)
