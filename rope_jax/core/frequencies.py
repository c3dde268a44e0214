"""Frequencies of the pairs of features, as a hashable value."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_callable, check_dtype, check_integer, check_positive, shown


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Frequencies:
    """The wave vector of each pair, and the factor of cos and sin.

    The angle of pair i in head n is ``sum_a positions[t, a] inv_freq[n, a, i] + phase[n, i]``. Text has a single
    position axis, and most forms have the same frequencies in all heads: both axes are optional.

    Host numbers (a list, a numpy array) are kept in float64. They compare and hash by value, and
    :func:`rotation` is exact for them. A jax array (learned, or traced) is kept as given: :func:`rotation` works
    in float32 and is differentiable in the array. Such a value has no hash.

    Attributes:
      inv_freq: radians per position: ``[R/2]`` for text, ``[A, R/2]`` for A position axes, ``[N, A, R/2]`` with a
        matrix for each head. A pair reads one axis if its column has one entry that is not 0.
      attention_factor: the factor of cos and sin in YaRN (section 3.4) and LongRoPE; 1 in other schedules.
      phase: radians at position 0, ``[R/2]`` or ``[N, R/2]``, after the batch axes or without; None is 0.
      num_batch_axes: the leading axes of a jax array that are the axes of the positions before T: 1 for
        ``[B, R/2]``, frequencies for each row.

    Raises:
      ValueError: if host frequencies are not finite numbers below 2^64, shapes do not match, a size is 0, or the
        factor is not a positive finite number.
      TypeError: if a jax array is not floating.

    Example:
      >>> import rope_jax
      >>> rope_jax.Frequencies([1.0, 0.1]) == rope_jax.Frequencies([1.0, 0.1])
      True
      >>> rope_jax.Frequencies([[1.0, 0.0], [0.0, 1.0]]).num_axes  # the first pair reads axis 0, the second axis 1
      2
    """

    inv_freq: np.ndarray | jax.Array
    attention_factor: float = 1.0
    phase: np.ndarray | jax.Array | None = None
    num_batch_axes: int = 0

    def __post_init__(self):
        for name in ("inv_freq",) if self.phase is None else ("inv_freq", "phase"):
            object.__setattr__(self, name, _as_numbers(name, getattr(self, name)))
        if type(self.num_batch_axes) is not int or self.num_batch_axes < 0:
            object.__setattr__(
                self, "num_batch_axes", check_integer("num_batch_axes", self.num_batch_axes, least=0)
            )
        axes = self.inv_freq.ndim - self.num_batch_axes
        batched_host = self.num_batch_axes and isinstance(self.inv_freq, np.ndarray)
        if not 1 <= axes <= 3 or 0 in self.inv_freq.shape or batched_host:
            raise ValueError(
                "inv_freq must be [R/2], [A, R/2] or [N, A, R/2], after num_batch_axes axes of a jax array, "
                f"got shape {self.inv_freq.shape} and num_batch_axes={self.num_batch_axes}"
            )
        if self.phase is not None:
            shape = (self.num_pairs,) if self.num_heads is None else (self.num_heads, self.num_pairs)
            if self.phase.shape not in (shape, (*self.leading_shape, *shape)):
                raise ValueError(f"phase must have shape {(*self.leading_shape, *shape)}, got {self.phase.shape}")
        if type(self.attention_factor) is not float or not 0 < self.attention_factor < math.inf:
            check_positive("attention_factor", self.attention_factor, concrete=True)
        object.__setattr__(self, "attention_factor", float(self.attention_factor))

    @property
    def on_host(self) -> bool:
        """True if the frequencies are host numbers, so that phases are exact."""
        return not any(isinstance(part, jax.Array) for part in (self.inv_freq, self.phase))

    @property
    def num_pairs(self) -> int:
        """R/2."""
        return self.inv_freq.shape[-1]

    @property
    def num_axes(self) -> int:
        """A, the position axes; 1 for text."""
        return 1 if self.inv_freq.ndim - self.num_batch_axes == 1 else self.inv_freq.shape[-2]

    @property
    def num_heads(self) -> int | None:
        """N, the heads with frequencies of their own; None if all heads share the frequencies."""
        return None if self.inv_freq.ndim - self.num_batch_axes < 3 else self.inv_freq.shape[-3]

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The axes of the positions before T."""
        return self.inv_freq.shape[: self.num_batch_axes]

    def _value(self):
        if not self.on_host:
            raise TypeError(
                "Frequencies made from a jax array cannot be hashed or compared: "
                "pass the array through jit and build Frequencies inside"
            )
        phase = None if self.phase is None else self.phase.tobytes()
        return self.inv_freq.shape, self.inv_freq.tobytes(), self.attention_factor, phase

    def __eq__(self, other):
        return isinstance(other, Frequencies) and self._value() == other._value()

    def __hash__(self):
        return hash(self._value())

    def __reduce__(self):
        return Frequencies, (self.inv_freq, self.attention_factor, self.phase, self.num_batch_axes)

    def __repr__(self):
        def brief(numbers):
            if isinstance(numbers, jax.Array):
                return f"<jax {numbers.dtype}{list(numbers.shape)}>"
            return np.array2string(numbers, precision=6, threshold=6, edgeitems=2, separator=", ")

        phase = "" if self.phase is None else f", phase={brief(self.phase)}"
        batch = f", num_batch_axes={self.num_batch_axes}" if self.num_batch_axes else ""
        return f"Frequencies({brief(self.inv_freq)}, attention_factor={self.attention_factor}{phase}{batch})"


def _as_numbers(name: str, numbers) -> np.ndarray | jax.Array:
    """A floating jax array as it is, or host numbers in float64, which cannot be written to."""
    if isinstance(numbers, jax.Array):
        check_dtype(name, numbers, jnp.floating, "floating")
        return numbers
    try:
        given = np.asarray(numbers)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers of one shape, got {shown(numbers)}") from None
    if given.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers, got dtype {given.dtype}")
    host = given.astype(np.float64)
    if not np.all(np.abs(host) < 2.0**64):
        raise ValueError(f"{name} must be finite numbers below 2^64, got {shown(numbers)}")
    host.flags.writeable = False
    return host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrequencyChoice:
    """One of several host :class:`Frequencies`, chosen at run time; the phases stay exact.

    LongRoPE chooses by context length, for each batch row; a scanned stack of layers may choose by layer.

    Attributes:
      options: C frequencies of one shape, all of them with a phase or none.
      index: integer ``[...]`` in ``[0, C)``, with the axes of the positions, without T. Any other index
        gives NaN.

    Raises:
      TypeError: if the index is bool or floating.
      ValueError: if options are empty, not on the host, or of several shapes.
    """

    options: tuple[Frequencies, ...] = dataclasses.field(metadata={"static": True})
    index: jax.Array

    def __post_init__(self):
        on_host = all(isinstance(option, Frequencies) and option.on_host for option in self.options)
        if not on_host or len({(option.inv_freq.shape, option.phase is None) for option in self.options}) != 1:
            raise ValueError(f"options must be one or more host Frequencies of one shape, got {self.options}")
        dtype = getattr(self.index, "dtype", jnp.int32)
        if jnp.issubdtype(dtype, jnp.bool) or jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"index must be integers, got dtype {dtype}")

    on_host = True

    @property
    def num_pairs(self) -> int:
        """R/2."""
        return self.options[0].num_pairs

    @property
    def num_axes(self) -> int:
        """A, the position axes; 1 for text."""
        return self.options[0].num_axes

    @property
    def num_heads(self) -> int | None:
        """N, the heads with frequencies of their own; None if all heads share the frequencies."""
        return self.options[0].num_heads

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


def check_schedule(schedule, argument: str = "schedule") -> None:
    """Raises TypeError unless the schedule can be called."""
    if not callable(schedule) or isinstance(schedule, type):
        hint = ": pass lambda rotary_dim: frequencies" if isinstance(schedule, Frequencies) else ""
        got = schedule if isinstance(schedule, type) else type(schedule)
        raise TypeError(f"{argument} must be a schedule like Standard(), got {got.__name__}{hint}")
    check_callable(argument, schedule, "rotary_dim")


def call_schedule(
    schedule, rotary_dim: int, *context_length, argument: str = "schedule"
) -> Frequencies | FrequencyChoice:
    """The frequencies of a schedule. Raises unless they are R/2 :class:`Frequencies`."""
    frequencies = schedule(rotary_dim, *context_length)
    if not isinstance(frequencies, Frequencies | FrequencyChoice):
        raise TypeError(
            f"{argument} must return Frequencies, got {type(frequencies).__name__} from {shown(schedule)}"
        )
    if frequencies.num_pairs != rotary_dim // 2:
        raise ValueError(
            f"{argument} must give R/2 = {rotary_dim // 2} frequencies, got {frequencies.num_pairs} "
            f"from {shown(schedule)}"
        )
    return frequencies
