"""The published frequency schedules.

A schedule is a frozen dataclass: the hyperparameters of a paper are its fields, the formula of that paper
is its ``__call__(rotary_dim) -> Frequencies``. Any hashable callable of that form is a schedule.
Everything here is float64 on the host, except where a schedule is asked for a context_length that is traced.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_dtype, known_any
from rope_jax.core.frequencies import Frequencies, FrequencyChoice, Schedule


def geometric(rotary_dim: int, base: float) -> np.ndarray:
    """The geometric ladder of RoFormer (section 3.2.2): ``theta_i = base^(-2i/R)``, float64 ``[R/2]``.

    Args:
      rotary_dim: R, even and at least 2.
      base: b, positive.

    Returns:
      Radians per position, on the host.

    Raises:
      ValueError: if ``rotary_dim`` is odd or below 2, or ``base`` is not positive.

    Example:
      >>> import rope_jax
      >>> rope_jax.core.geometric(4, 10_000.0).tolist()
      [1.0, 0.01]
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, got {rotary_dim}")
    if not (base > 0 and math.isfinite(base)):
        raise ValueError(f"base must be positive and finite, got {base}")
    return base ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def _check(schedule, positive: Sequence[str] = (), **at_least: float) -> None:
    """The one refusal of all schedules: names the schedule, the field, the bound and the value."""
    for name, bound in [(name, None) for name in positive] + list(at_least.items()):
        value = getattr(schedule, name)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{type(schedule).__name__}: {name} must be a number, got {value!r}")
        good = value > 0 if bound is None else value >= bound
        if not (good and math.isfinite(value)):
            wanted = "positive" if bound is None else f"at least {bound}"
            raise ValueError(f"{type(schedule).__name__}: {name} must be {wanted} and finite, got {value}")


def _context_length(schedule, context_length):
    """The context_length asked for: the argument, else the field; never a guess."""
    context_length = schedule.context_length if context_length is None else context_length
    if context_length is None:
        raise ValueError(
            f"{type(schedule).__name__} needs a context_length: set the field context_length=, or pass context_length= with the call "
            "(an integer, or an integer array of one context_length per batch row)"
        )
    if isinstance(context_length, np.ndarray):
        context_length = jnp.asarray(context_length)
    if isinstance(context_length, jax.Array):
        check_dtype("context_length", context_length, jnp.integer, "integer")
        if known_any(context_length < 1):
            raise ValueError(
                f"{type(schedule).__name__}: context_length must be at least 1 token, got {context_length}"
            )
        return context_length
    return _host_context_length(schedule, context_length)


def _host_context_length(schedule, context_length) -> int:
    try:
        tokens = operator.index(context_length)
    except TypeError:
        raise TypeError(f"context_length must be an integer or an integer array, got {context_length!r}") from None
    if tokens < 1:
        raise ValueError(f"{type(schedule).__name__}: context_length must be at least 1 token, got {tokens}")
    return tokens


# ---------------------------------------------------------------------------------------- the schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    """``theta_i = base^(-2i/R)`` (Su et al. 2021, RoFormer, section 3.2.2).

    Example:
      >>> import rope_jax
      >>> rope_jax.Standard(base=10_000.0)(4)
      Frequencies([1.  , 0.01], attention_factor=1.0)
    """

    base: float = 10_000.0

    def __post_init__(self):
        _check(self, positive=["base"])

    def __call__(self, rotary_dim: int) -> Frequencies:
        return Frequencies(geometric(rotary_dim, self.base))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Position interpolation: every pair turns ``factor`` times slower (Chen et al. 2023, section 2.3).

    Example:
      >>> import rope_jax
      >>> rope_jax.Linear(factor=4.0)(4).inv_freq.tolist()
      [0.25, 0.0025]
    """

    factor: float
    base: float = 10_000.0

    def __post_init__(self):
        _check(self, positive=["base"], factor=1)

    def __call__(self, rotary_dim: int) -> Frequencies:
        return Frequencies(geometric(rotary_dim, self.base) / self.factor)


def _ntk_ramp(rotary_dim: int) -> np.ndarray:
    """``2i/(R-2)``: 0 at the first pair, 1 at the last. ``(b s^(R/(R-2)))^(-2i/R) = b^(-2i/R) s^(-2i/(R-2))``."""
    if rotary_dim < 4:
        raise ValueError(f"rotary_dim must be at least 4 for an NTK-aware base, got {rotary_dim}")
    return np.arange(0, rotary_dim, 2) / (rotary_dim - 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKAware:
    """NTK-aware interpolation: ``base' = base * factor^(R/(R-2))`` (Peng et al. 2023, YaRN, section 3.1).

    The first pair keeps its speed, the last turns ``factor`` times slower.

    Example:
      >>> import rope_jax
      >>> rope_jax.NTKAware(factor=4.0)(4).inv_freq.tolist()
      [1.0, 0.0025]
    """

    factor: float
    base: float = 10_000.0

    def __post_init__(self):
        _check(self, positive=["base"], factor=1)

    def __call__(self, rotary_dim: int) -> Frequencies:
        return Frequencies(geometric(rotary_dim, self.base) * self.factor ** -_ntk_ramp(rotary_dim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK:
    """NTK-aware interpolation by as much as the context_length asks for (Peng et al. 2023, YaRN, section 3.3).

    In the form of transformers, whose ``factor`` sets how fast it stretches:
    ``base' = base * (factor * L / original_length - (factor - 1))^(R/(R-2))``, ``L = max(context_length,
    original_length)``: no change up to the original context_length.

    ``context_length`` is the number of tokens that the frequencies are for: a static field, or an argument of the
    call. A traced argument, scalar or one per batch row, compiles once for all lengths; its frequencies are
    float32, off by up to ``(8 + 2 ln s) 2^-24`` of their value where they turn s times slower, and their phases
    take the float32 path of :func:`rotation`.

    Raises:
      ValueError: if a field is out of range, or no context_length is given anywhere.

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
        _check(self, positive=["base"], factor=1, original_length=1)
        if self.context_length is not None:
            _host_context_length(self, self.context_length)

    def __call__(self, rotary_dim: int, context_length: int | jax.Array | None = None) -> Frequencies:
        context_length = _context_length(self, context_length)
        inv_freq, ramp = geometric(rotary_dim, self.base), _ntk_ramp(rotary_dim)
        if not isinstance(context_length, jax.Array):
            beyond = max(context_length, self.original_length) / self.original_length - 1
            return Frequencies(inv_freq * (1 + self.factor * beyond) ** -ramp)
        # L/original - 1 is formed from an exact integer, so that float32 loses nothing near the original.
        beyond = jnp.maximum(context_length - self.original_length, 0).astype(jnp.float32) / self.original_length
        slower = jnp.exp(-jnp.log1p(self.factor * beyond)[..., None] * jnp.asarray(ramp, jnp.float32))
        return Frequencies(jnp.asarray(inv_freq, jnp.float32) * slower)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN: slow pairs are interpolated, fast ones kept, a ramp between (Peng et al. 2023, sections 3.2, 3.4).

    As in its released code, where the ramp is linear in the index of the pair.

    A pair that turns ``r`` times within the original context_length stands at ``i(r) = R ln(original_length /
    (2 pi r)) / (2 ln base)``. Pairs below ``i(beta_fast)`` keep their speed, those above ``i(beta_slow)``
    turn ``factor`` times slower; ``truncate`` rounds the two ends outward to whole pairs.

    ``attention_factor``, where it is not given, is ``g(mscale) / g(mscale_all_dim)`` if both are given and
    not 0, else ``g(1)``, with ``g(m) = 0.1 m ln(factor) + 1`` (section 3.4; mscale as in DeepSeek-V2).

    Raises:
      ValueError: if a field is out of range.

    Example:
      >>> import rope_jax
      >>> rope_jax.Yarn(base=1e6, factor=4.0, original_length=32_768)(128).attention_factor
      1.138629436111989
    """

    factor: float
    original_length: int
    base: float = 10_000.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check(self, positive=["base", "beta_slow"], factor=1, original_length=1, beta_fast=self.beta_slow)
        if not self.base > 1:
            raise ValueError(f"Yarn: base must be above 1, got {self.base}")
        if self.attention_factor is not None:
            _check(self, positive=["attention_factor"])

    def __call__(self, rotary_dim: int) -> Frequencies:
        inv_freq = geometric(rotary_dim, self.base)

        def pair(turns):
            wavelength = self.original_length / (2 * math.pi * turns)
            return rotary_dim * math.log(wavelength) / (2 * math.log(self.base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001  # a step instead of 0/0, as in the released code
        slow = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
        return Frequencies(inv_freq / self.factor * slow + inv_freq * (1 - slow), self._resolved_attention_factor())

    def g(self, mscale: float) -> float:
        """``0.1 mscale ln(factor) + 1``."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def _resolved_attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.g(self.mscale) / self.g(self.mscale_all_dim)
        return self.g(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE: each pair has its own divisor, one list up to the original context_length and one beyond it.

    ``theta_i = base^(-2i/R) / long_factor[i]`` if ``context_length > original_length``, else with ``short_factor``
    (Ding et al. 2024, section 3). ``attention_factor``, where not given, is ``sqrt(1 + ln(factor) /
    ln(original_length))``, as in Phi-3; ``factor`` is the extended context_length over the original one.

    ``long_attention_factor`` is that of the long list, where it is another one (Phi-3.5-MoE).

    ``context_length`` is the number of tokens that the frequencies are for: a static field, or an argument of the
    call. A traced argument, scalar or one per batch row, compiles once for all lengths and stays exact.

    Raises:
      ValueError: if a field is out of range, the lists are not R/2 long, or no context_length is given anywhere.

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
        _check(self, positive=["base"], factor=1, original_length=2)
        for name in ("short_factor", "long_factor"):
            divisors = tuple(float(x) for x in getattr(self, name))
            if not all(x > 0 and math.isfinite(x) for x in divisors):
                raise ValueError(f"LongRope: {name} must hold positive finite numbers, got {divisors}")
            object.__setattr__(self, name, divisors)
        for name in ("attention_factor", "long_attention_factor"):
            if getattr(self, name) is not None:
                _check(self, positive=[name])
        if self.context_length is not None:
            _host_context_length(self, self.context_length)

    def __call__(
        self, rotary_dim: int, context_length: int | jax.Array | None = None
    ) -> Frequencies | FrequencyChoice:
        context_length = _context_length(self, context_length)
        short, long = (self._frequencies(rotary_dim, name) for name in ("short_factor", "long_factor"))
        if isinstance(context_length, jax.Array):
            return FrequencyChoice((short, long), (context_length > self.original_length).astype(jnp.int32))
        return long if context_length > self.original_length else short

    def _frequencies(self, rotary_dim, name):
        inv_freq = geometric(rotary_dim, self.base)
        divisors = np.array(getattr(self, name))
        if divisors.shape != inv_freq.shape:
            raise ValueError(
                f"LongRope: {name} must have R/2 = {inv_freq.size} numbers for rotary_dim {rotary_dim}, "
                f"got {divisors.size}"
            )
        attention_factor = self.attention_factor
        if name == "long_factor" and self.long_attention_factor is not None:
            attention_factor = self.long_attention_factor
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return Frequencies(inv_freq / divisors, attention_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1: keeps short wavelengths, interpolates long ones, blends between (Meta 2024, its released code).

    A pair that turns at least ``high_freq_factor`` times within the original context_length keeps its speed; one
    that turns at most ``low_freq_factor`` times turns ``factor`` times slower.

    Raises:
      ValueError: if a field is out of range.

    Example:
      >>> import rope_jax
      >>> inv_freq = rope_jax.Llama3(factor=8.0, original_length=8192)(128).inv_freq
      >>> float(inv_freq[-1] * 8 / 500_000 ** (-126 / 128))
      1.0
    """

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    base: float = 500_000.0

    def __post_init__(self):
        _check(self, positive=["base", "low_freq_factor"], factor=1, original_length=1)
        _check(self, high_freq_factor=self.low_freq_factor)

    def __call__(self, rotary_dim: int) -> Frequencies:
        inv_freq = geometric(rotary_dim, self.base)
        turns = self.original_length * inv_freq / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        if span == 0:  # a step instead of 0/0, as Llama 4 Scout has it
            keep = (turns >= self.high_freq_factor).astype(np.float64)
        else:
            keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return Frequencies(keep * inv_freq + (1 - keep) * inv_freq / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional:
    """Only the fastest pairs turn: ``theta_i = base^(-2i/R) / factor`` for ``i < proportion * R/2``, else 0.

    The ladder is that of the whole head, cut short; a pair of frequency 0 stands still (p-RoPE, Barbero
    et al. 2024, "Round and Round We Go"; as in Gemma 4).

    Raises:
      ValueError: if a field is out of range.

    Example:
      >>> import rope_jax
      >>> rope_jax.Proportional(proportion=0.5)(8).inv_freq.round(6).tolist()
      [1.0, 0.1, 0.0, 0.0]
    """

    proportion: float
    factor: float = 1.0
    base: float = 10_000.0

    def __post_init__(self):
        _check(self, positive=["base", "proportion"], factor=1)
        if self.proportion > 1:
            raise ValueError(f"Proportional: proportion must be at most 1, got {self.proportion}")

    def __call__(self, rotary_dim: int) -> Frequencies:
        inv_freq = geometric(rotary_dim, self.base) / self.factor
        inv_freq[int(self.proportion * rotary_dim // 2) :] = 0.0
        return Frequencies(inv_freq)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Negated:
    """Another schedule, turning the other way: ``-theta_i`` (nanochat, Karpathy 2025, its released code).

    Example:
      >>> import rope_jax
      >>> rope_jax.Negated(schedule=rope_jax.Standard())(4).inv_freq.tolist()
      [-1.0, -0.01]
    """

    schedule: Schedule

    @property
    def context_length(self) -> int | None:
        """The schedule's own; an AttributeError if it does not depend on one."""
        return self.schedule.context_length  # type: ignore[attr-defined]

    def __call__(self, rotary_dim: int, *context_length) -> Frequencies | FrequencyChoice:
        forward = self.schedule(rotary_dim, *context_length)
        if isinstance(forward, FrequencyChoice):
            return FrequencyChoice(tuple(map(_reverse, forward.options)), forward.index)
        return _reverse(forward)


def _reverse(frequencies: Frequencies) -> Frequencies:
    return Frequencies(-frequencies.inv_freq, frequencies.attention_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axial:
    """Another schedule over R/A features, once for each of A axes, one behind the other.

    For pictures: one half of the pairs reads the row and the other the column, as :class:`Rope` is told by its
    ``axes`` (Heo et al. 2024, "Rotary Position Embedding for Vision Transformer", section 3.1).

    Raises:
      ValueError: if there is no axis, or rotary_dim is not a multiple of 2A.

    Example:
      >>> import rope_jax
      >>> rope_jax.Axial(schedule=rope_jax.Standard())(8).inv_freq.tolist()
      [1.0, 0.01, 1.0, 0.01]
      >>> rope = rope_jax.Rope(8, rope_jax.Axial(schedule=rope_jax.Standard()), axes=(0, 0, 1, 1))
      >>> rope.rotation(rope_jax.grid_positions(2, 3)).cos.shape
      (6, 4)
    """

    schedule: Schedule
    num_axes: int = 2

    def __post_init__(self):
        _check(self, num_axes=1)

    def __call__(self, rotary_dim: int) -> Frequencies:
        if rotary_dim % (2 * self.num_axes):
            raise ValueError(f"rotary_dim must be a multiple of 2A={2 * self.num_axes}, got {rotary_dim}")
        one = self.schedule(rotary_dim // self.num_axes)
        if not (isinstance(one, Frequencies) and one.on_host):
            raise ValueError(f"Axial: schedule must give host Frequencies, got {one} from {self.schedule}")
        return Frequencies(np.tile(one.inv_freq, self.num_axes), one.attention_factor)
