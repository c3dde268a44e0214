"""Frequencies of the pairs of features, as a hashable value."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_axes, check_dtype


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Frequencies:
    """Radians per position of each pair, and the factor of cos and sin.

    Host numbers (a list, a numpy array) are kept in float64. They compare and hash by value, and
    :func:`rotation` is exact for them. A jax array (learned, or traced) is kept as given: :func:`rotation` works
    in float32 and is differentiable in the array. Such a value has no hash.

    Attributes:
      inv_freq: radians per position, ``[R/2]`` on the host, or a jax array ``[..., R/2]`` with the
        leading axes of the positions, without T.
      attention_factor: the factor of cos and sin in YaRN (section 3.4) and LongRoPE; 1 in other schedules.

    Raises:
      ValueError: if host frequencies are not ``[R/2]`` finite numbers below 2^64, with R/2 of at least 1, or the
        factor is not a positive finite number.
      TypeError: if a jax array is not floating.

    Example:
      >>> import rope_jax
      >>> rope_jax.Frequencies([1.0, 0.1]) == rope_jax.Frequencies([1.0, 0.1])
      True
    """

    inv_freq: np.ndarray | jax.Array
    attention_factor: float = 1.0

    def __post_init__(self):
        if isinstance(self.inv_freq, jax.Array):
            check_dtype("inv_freq", self.inv_freq, jnp.floating, "floating")
            check_axes("inv_freq", self.inv_freq, "... R/2")
        else:
            inv_freq = np.array(self.inv_freq, np.float64)
            if inv_freq.ndim != 1 or not inv_freq.size or not np.all(np.abs(inv_freq) < 2.0**64):
                raise ValueError(f"inv_freq must be [R/2] finite numbers below 2^64, got {self.inv_freq}")
            inv_freq.flags.writeable = False
            object.__setattr__(self, "inv_freq", inv_freq)
        if not (self.attention_factor > 0 and math.isfinite(self.attention_factor)):
            raise ValueError(f"attention_factor must be positive and finite, got {self.attention_factor}")
        object.__setattr__(self, "attention_factor", float(self.attention_factor))

    @property
    def on_host(self) -> bool:
        """True if the frequencies are host numbers, so that phases are exact."""
        return not isinstance(self.inv_freq, jax.Array)

    @property
    def num_pairs(self) -> int:
        """R/2."""
        return self.inv_freq.shape[-1]

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The axes before R/2, which are the axes of the positions without T."""
        return self.inv_freq.shape[:-1]

    def _value(self):
        if not self.on_host:
            raise TypeError(
                "Frequencies made from a jax array cannot be hashed or compared: "
                "pass the array through jit and build Frequencies inside"
            )
        return self.inv_freq.tobytes(), self.attention_factor

    def __eq__(self, other):
        return isinstance(other, Frequencies) and self._value() == other._value()

    def __hash__(self):
        return hash(self._value())

    def __reduce__(self):
        return Frequencies, (self.inv_freq, self.attention_factor)

    def __repr__(self):
        if not self.on_host:
            shown = f"<jax {self.inv_freq.dtype}{list(self.inv_freq.shape)}>"
        else:
            shown = np.array2string(
                np.asarray(self.inv_freq), precision=6, threshold=6, edgeitems=2, separator=", "
            )
        return f"Frequencies({shown}, attention_factor={self.attention_factor})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrequencyChoice:
    """One of several host :class:`Frequencies`, chosen at run time; the phases stay exact.

    LongRoPE chooses by context length, for each batch row; a scanned stack of layers may choose by layer.

    Attributes:
      options: C frequencies of one rotary_dim.
      index: integer ``[...]`` in ``[0, C)``, with the axes of the positions, without T. Any other index
        gives NaN.

    Raises:
      ValueError: if options are empty, not on the host, or of several rotary_dims.
    """

    options: tuple[Frequencies, ...] = dataclasses.field(metadata={"static": True})
    index: jax.Array

    def __post_init__(self):
        sizes = [option.num_pairs for option in self.options]
        if len(set(sizes)) != 1 or not all(option.on_host for option in self.options):
            raise ValueError(f"options must be one or more host Frequencies of one rotary_dim, got {self.options}")

    on_host = True

    @property
    def num_pairs(self) -> int:
        """R/2."""
        return self.options[0].num_pairs

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The axes of the index, which are the axes of the positions without T."""
        return self.index.shape


class Schedule(Protocol):
    """Any hashable callable from rotary_dim R to :class:`Frequencies`.

    A schedule that depends on the context length has a field ``context_length`` and takes ``context_length`` as
    a second argument, which overrides the field.
    """

    def __call__(self, rotary_dim: int, /) -> "Frequencies | FrequencyChoice": ...
