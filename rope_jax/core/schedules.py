"""Published frequency schedules.

A schedule is a frozen dataclass. Its fields are the hyperparameters of a paper, and
``__call__(rotary_dim) -> Frequencies`` is the paper's formula, in float64 on the host. Any hashable callable with
this signature is a schedule.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence

import numpy as np

from rope_jax._checks import check_flag, check_integer, shown
from rope_jax.core.frequencies import Frequencies


def geometric(rotary_dim: int, base: float) -> np.ndarray:
    """The geometric series of RoFormer (section 3.2.2): ``theta_i = base^(-2i/R)``, float64 ``[R/2]``.

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
    if check_integer("rotary_dim", rotary_dim) < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, got {shown(rotary_dim)}")
    if not (base > 0 and math.isfinite(base)):
        raise ValueError(f"base must be positive and finite, got {base}")
    return base ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def check_hyperparameters(schedule, positive: Sequence[str] = (), **at_least: float) -> None:
    """Raises unless the named fields are finite numbers, positive or at least their bound."""
    for name, bound in [(name, None) for name in positive] + list(at_least.items()):
        value = getattr(schedule, name)
        if not isinstance(value, int | float | np.number) or isinstance(value, bool | np.complexfloating):
            raise TypeError(f"{type(schedule).__name__}: {name} must be a number, got {shown(value)}")
        if isinstance(value, np.number):  # float32 beside the largest float64 would overflow, to infinity
            value = value.item()
        in_range = value > 0 if bound is None else value >= bound
        if not (in_range and value <= sys.float_info.max):
            expected = "positive" if bound is None else f"at least {bound}"
            raise ValueError(f"{type(schedule).__name__}: {name} must be {expected} and finite, got {shown(value)}")


def repr_without_defaults(self) -> str:
    """The call that makes this dataclass, without fields that have their default: a ``__repr__``."""
    fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
    given = [f"{field.name}={value!r}" for field, value in fields if value != field.default]
    return f"{type(self).__name__}({', '.join(given)})"


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
        check_hyperparameters(self, positive=["base"])

    def __call__(self, rotary_dim: int) -> Frequencies:
        return Frequencies(geometric(rotary_dim, self.base))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Position interpolation: all frequencies divided by ``factor`` (Chen et al. 2023, section 2.3).

    Example:
      >>> import rope_jax
      >>> rope_jax.Linear(factor=4.0)(4).inv_freq.tolist()
      [0.25, 0.0025]
    """

    factor: float
    base: float = 10_000.0

    def __post_init__(self):
        check_hyperparameters(self, positive=["base"], factor=1)

    def __call__(self, rotary_dim: int) -> Frequencies:
        return Frequencies(geometric(rotary_dim, self.base) / self.factor)


def ntk_ramp(rotary_dim: int) -> np.ndarray:
    """``2i/(R-2)``, from 0 to 1: ``(b s^(R/(R-2)))^(-2i/R) = b^(-2i/R) s^(-2i/(R-2))``."""
    if rotary_dim < 4:
        raise ValueError(f"rotary_dim must be at least 4 for an NTK-aware base, got {rotary_dim}")
    return np.arange(0, rotary_dim, 2) / (rotary_dim - 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKAware:
    """NTK-aware interpolation: ``base' = base * factor^(R/(R-2))`` (Peng et al. 2023, YaRN, section 3.1).

    The first pair keeps its frequency; the frequency of the last pair is divided by ``factor``.

    Example:
      >>> import rope_jax
      >>> rope_jax.NTKAware(factor=4.0)(4).inv_freq.tolist()
      [1.0, 0.0025]
    """

    factor: float
    base: float = 10_000.0

    def __post_init__(self):
        check_hyperparameters(self, positive=["base"], factor=1)

    def __call__(self, rotary_dim: int) -> Frequencies:
        return Frequencies(geometric(rotary_dim, self.base) * self.factor ** -ntk_ramp(rotary_dim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN: keeps high frequencies, interpolates low ones, blends between (Peng et al. 2023, sections 3.2, 3.4).

    As in the released code, the blend is linear in the index of the pair.

    Pair ``i(r) = R ln(original_length / (2 pi r)) / (2 ln base)`` makes ``r`` turns within the original context
    length. Pairs below ``i(beta_fast)`` keep their frequency. Above ``i(beta_slow)`` frequencies are divided by
    ``factor``. ``truncate`` rounds the two ends outward to whole pairs.

    By default ``attention_factor`` is ``g(mscale) / g(mscale_all_dim)`` if both are given and not 0, else ``g(1)``,
    with ``g(m) = 0.1 m ln(factor) + 1`` (section 3.4; mscale as in DeepSeek-V2).

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
        check_hyperparameters(self, positive=["base", "beta_slow"], factor=1, original_length=1)
        check_hyperparameters(self, beta_fast=self.beta_slow)
        check_flag("Yarn: truncate", self.truncate)
        if self.mscale is not None:
            check_hyperparameters(self, mscale=0)
        if self.mscale_all_dim is not None:
            check_hyperparameters(self, mscale_all_dim=0)
        if not self.base > 1:
            raise ValueError(f"Yarn: base must be above 1, got {self.base}")
        if self.attention_factor is not None:
            check_hyperparameters(self, positive=["attention_factor"])

    def __call__(self, rotary_dim: int) -> Frequencies:
        inv_freq = geometric(rotary_dim, self.base)

        def pair_index(turns):
            wavelength = self.original_length / (2 * math.pi * turns)
            return rotary_dim * math.log(wavelength) / (2 * math.log(self.base))

        low, high = pair_index(self.beta_fast), pair_index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001  # a step instead of 0/0, as in the released code
        interpolate = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
        blended = inv_freq / self.factor * interpolate + inv_freq * (1 - interpolate)
        return Frequencies(blended, self._resolved_attention_factor())

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
class Llama3:
    """Llama 3.1: keeps short wavelengths, interpolates long ones, blends between (Meta 2024, released code).

    A pair of at least ``high_freq_factor`` turns within the original context length keeps its frequency. For a pair
    of at most ``low_freq_factor`` turns, the frequency is divided by ``factor``.

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
        check_hyperparameters(self, positive=["base", "low_freq_factor"], factor=1, original_length=1)
        check_hyperparameters(self, high_freq_factor=self.low_freq_factor)

    def __call__(self, rotary_dim: int) -> Frequencies:
        inv_freq = geometric(rotary_dim, self.base)
        turns = self.original_length * inv_freq / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        if span == 0:  # a step instead of 0/0, as in Llama 4 Scout
            keep = (turns >= self.high_freq_factor).astype(np.float64)
        else:
            keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return Frequencies(keep * inv_freq + (1 - keep) * inv_freq / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional:
    """p-RoPE: ``theta_i = base^(-2i/R) / factor`` for ``i < floor(proportion * R/2)``, else 0.

    Only the highest frequencies of the whole head rotate; pairs of frequency 0 keep their features (Barbero et al.
    2024, "Round and Round We Go"; as in Gemma 4).

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
        check_hyperparameters(self, positive=["base", "proportion"], factor=1)
        if self.proportion > 1:
            raise ValueError(f"Proportional: proportion must be at most 1, got {self.proportion}")

    def __call__(self, rotary_dim: int) -> Frequencies:
        inv_freq = geometric(rotary_dim, self.base) / self.factor
        inv_freq[int(self.proportion * rotary_dim // 2) :] = 0.0
        return Frequencies(inv_freq)
