"""Schedules made of other schedules: dealt to position axes, on scaled coordinates, negated."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_choice, check_flag, check_integer, check_real, check_reals, check_sequence, shown
from rope_jax.core.frequencies import Frequencies, FrequencyChoice, Schedule, call_schedule, check_schedule
from rope_jax.core.schedules import Standard, repr_without_defaults

SectionOrder = Literal["runs", "strided", "alternating"]
_STANDARD = Standard()


def _of_each(change: Callable[[Frequencies], Frequencies], frequencies):
    """Applies a change to frequencies, or to each option of a choice."""
    if isinstance(frequencies, FrequencyChoice):
        return FrequencyChoice(tuple(map(change, frequencies.options)), frequencies.index)
    return change(frequencies)


# The context length of the inner schedule. AttributeError if there is none, so that hasattr is False.
_inner_context_length = property(lambda self: self.schedule.context_length)


def _call(schedule, rotary_dim: int, context_length: tuple) -> Frequencies | FrequencyChoice:
    check_schedule(schedule)
    return call_schedule(schedule, rotary_dim, *context_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axial:
    """Frequencies of their own for each position axis, over ``sizes[a]`` of the R features.

    For images, part of the pairs read the row and part the column (Heo et al. 2024, "Rotary Position Embedding for
    Vision Transformer", section 3.1); for video, a third part reads the time.

    Attributes:
      sizes: the features of each run of pairs, even, in the order of the head; they add up to R.
      schedule: of all runs, or one for each run; the pairs of a run with None are not rotated
        (the attention factor scales them too).
      axes: the position axis that each run reads; None is 0, 1, 2, ... for the runs that are rotated.
      alternating: whether the pairs of equal runs lie by turns: the first pair of each run, then the second, ...

    Raises:
      ValueError: if sizes are odd, below 2 or do not add up to rotary_dim, schedules or axes are not one for each
        run, an axis is negative or left out, alternating runs differ in size, or the frequencies of a schedule are
        not one ladder of host numbers.

    Example:
      >>> import rope_jax
      >>> rope_jax.Axial(sizes=(4, 4))(8).inv_freq.tolist()
      [[1.0, 0.01, 0.0, 0.0], [0.0, 0.0, 1.0, 0.01]]
      >>> flux = rope_jax.Rope(128, rope_jax.Axial(sizes=(16, 56, 56)), layout="interleaved")
      >>> flux.num_axes
      3
    """

    sizes: Sequence[int]
    schedule: Schedule | Sequence[Schedule | None] = _STANDARD
    axes: Sequence[int] | None = None
    alternating: bool = False

    def __post_init__(self):
        sizes = _integers("Axial: sizes", self.sizes)
        check_flag("Axial: alternating", self.alternating)
        object.__setattr__(self, "sizes", sizes)
        if not sizes or any(size < 2 or size % 2 for size in sizes):
            raise ValueError(f"Axial: sizes must be even numbers of features, at least 2, got {sizes}")
        if self.axes is not None:
            object.__setattr__(self, "axes", _integers("Axial: axes", self.axes))
        if isinstance(self.schedule, list):
            object.__setattr__(self, "schedule", tuple(self.schedule))
        if isinstance(self.schedule, tuple) and len(self.schedule) != len(sizes):
            raise ValueError(
                f"Axial: schedule must be one, or one for each of {len(sizes)} runs, got {len(self.schedule)}"
            )
        axes = self._axes()
        if len(axes) != len(sizes) or sorted(set(axes)) != list(range(max(axes) + 1)):
            raise ValueError(f"Axial: axes must name an axis 0, 1, ... for each of {len(sizes)} runs, got {axes}")
        if self.alternating and len(set(sizes)) > 1:
            raise ValueError(f"Axial: sizes must be equal if alternating, got {sizes}")

    __repr__ = repr_without_defaults

    def _schedules(self) -> tuple[Schedule | None, ...]:
        if isinstance(self.schedule, tuple):
            return self.schedule
        return (self.schedule,) * len(self.sizes)  # type: ignore[return-value]

    def _axes(self) -> tuple[int, ...]:
        if self.axes is not None:
            return tuple(self.axes)
        rotated = [schedule is not None for schedule in self._schedules()]
        return tuple(sum(rotated[:run]) if rotated[run] else 0 for run in range(len(rotated)))

    def __call__(self, rotary_dim: int) -> Frequencies:
        if sum(self.sizes) != rotary_dim:
            raise ValueError(f"Axial: sizes must add up to rotary_dim {rotary_dim}, got {self.sizes}")
        runs = [_ladder(schedule, size) for schedule, size in zip(self._schedules(), self.sizes, strict=True)]
        factors = {run.attention_factor for run in runs if run is not None} or {1.0}
        if len(factors) > 1:
            raise ValueError(
                f"Axial: schedules must have one attention factor, got {sorted(factors)}: set attention_factor"
            )
        axes = self._axes()
        columns, num_axes = [], max(axes) + 1
        for axis, size, run in zip(axes, self.sizes, runs, strict=True):
            matrix = np.zeros((num_axes, size // 2))
            matrix[axis] = 0.0 if run is None else run.inv_freq
            columns.append(matrix)
        joined = np.stack(columns, axis=-1).reshape(num_axes, -1) if self.alternating else np.hstack(columns)
        return Frequencies(joined, factors.pop())


def _ladder(schedule: Schedule | None, size: int) -> Frequencies | None:
    """The frequencies ``[size/2]`` of one run; None if it rests."""
    if schedule is None:
        return None
    if getattr(schedule, "context_length", 0) is None:
        raise ValueError(f"Axial: schedule must have its context_length as a field, got {schedule}")
    ladder = _call(schedule, size, ())
    if (
        not isinstance(ladder, Frequencies)
        or not ladder.on_host
        or ladder.inv_freq.ndim != 1
        or ladder.phase is not None
    ):
        raise ValueError(f"Axial: schedule must give host Frequencies of one axis, got {ladder} from {schedule}")
    return ladder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """One ladder of frequencies, whose pairs are dealt to the position axes (M-RoPE: Wang et al. 2024, Qwen2-VL,
    section 2.1).

    With equal coordinates, as of text, the rotation is that of the inner schedule.

    Attributes:
      sections: the number of pairs for each position axis; they add up to R/2.
      schedule: of the whole ladder.
      order: ``"runs"``, consecutive pairs for each axis (Qwen2-VL); ``"strided"``, pair i for axis ``i % A`` as
        long as the axis has pairs left, the rest for axis 0 (Qwen3-VL); ``"alternating"``, axes 1, 2, ... by turns,
        then axis 0 (Ernie 4.5 VL).

    Raises:
      ValueError: if sections are negative, fewer than two, do not add up to R/2 or do not suit the order, or the
        inner schedule has several axes.

    Example:
      >>> import rope_jax
      >>> qwen2_vl = rope_jax.Sections(sections=(16, 24, 24), schedule=rope_jax.Standard(base=1e6))
      >>> rope_jax.Rope(128, qwen2_vl).num_axes
      3
      >>> rope_jax.Sections(sections=(2, 1), order="strided")(6).inv_freq.round(6).tolist()
      [[1.0, 0.0, 0.002154], [0.0, 0.046416, 0.0]]
    """

    sections: Sequence[int]
    schedule: Schedule = _STANDARD
    order: SectionOrder = "runs"

    context_length = _inner_context_length
    __repr__ = repr_without_defaults

    def __post_init__(self):
        object.__setattr__(self, "sections", _integers("Sections: sections", self.sections))
        check_choice("Sections: order", self.order, get_args(SectionOrder))
        if len(self.sections) < 2 or min(self.sections) < 0 or not sum(self.sections):
            raise ValueError(
                f"Sections: sections must be numbers of pairs, for two axes or more, got {self.sections}"
            )
        if [self.axis_of_pair.count(axis) for axis in range(len(self.sections))] != list(self.sections):
            raise ValueError(f"Sections: sections must suit the order {self.order!r}, got {self.sections}")

    @property
    def axis_of_pair(self) -> tuple[int, ...]:
        """The position axis of each pair, R/2 entries."""
        sections, num_axes = tuple(self.sections), len(self.sections)
        if self.order == "strided":
            return tuple(i % num_axes if i < num_axes * sections[i % num_axes] else 0 for i in range(sum(sections)))
        if self.order == "alternating":
            turns = range(max(sections[1:]))
            return (
                *(axis for turn in turns for axis in range(1, num_axes) if turn < sections[axis]),
                *[0] * sections[0],
            )
        return tuple(axis for axis, count in enumerate(sections) for _ in range(count))

    def __call__(self, rotary_dim: int, *context_length) -> Frequencies | FrequencyChoice:
        axis_of_pair = self.axis_of_pair
        if len(axis_of_pair) != rotary_dim // 2:
            raise ValueError(f"Sections: sections must add up to R/2 = {rotary_dim // 2}, got {self.sections}")
        is_read = np.arange(len(self.sections))[:, None] == np.array(axis_of_pair)

        def deal(ladder: Frequencies) -> Frequencies:
            if ladder.num_axes > 1 or ladder.num_heads is not None:
                raise ValueError(f"Sections: schedule must have one position axis, got {self.schedule}")
            inv_freq = ladder.inv_freq
            if inv_freq.ndim == ladder.num_batch_axes + 1:
                inv_freq = inv_freq[..., None, :]
            dealt = (jnp if isinstance(inv_freq, jax.Array) else np).where(is_read, inv_freq, 0)
            return dataclasses.replace(ladder, inv_freq=dealt)

        return _of_each(deal, _call(self.schedule, rotary_dim, context_length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine:
    """Another schedule at the coordinate ``scale * position + offset`` of each axis, exact at integer positions.

    ``theta'_a = scale_a theta_a`` and the phase is ``sum_a offset_a theta_a``, so that positions stay integers. For
    centres of h patches in [-1, 1]: ``scale=2/h`` and ``offset=1/h - 1``. With an offset, position 0 rotates too:
    :meth:`Rotation.prepend_identity` adds class tokens that are not.

    Attributes:
      schedule: of the coordinates.
      scale: a number, or one for each position axis.
      offset: likewise, in coordinates.

    Raises:
      ValueError: if scale or offset is not finite, or there is not one for each axis of the schedule.

    Example:
      >>> import rope_jax
      >>> rope_jax.Affine(schedule=rope_jax.Standard(), scale=0.5, offset=1.0)(4)
      Frequencies([0.5  , 0.005], attention_factor=1.0, phase=[1.  , 0.01])
    """

    schedule: Schedule
    scale: float | Sequence[float] = 1.0
    offset: float | Sequence[float] = 0.0

    context_length = _inner_context_length
    __repr__ = repr_without_defaults

    def __post_init__(self):
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, Sequence) or np.ndim(value):
                object.__setattr__(self, name, check_reals(f"Affine: {name}", value))
            elif not isinstance(number := check_real(f"Affine: {name}", value), float):
                raise TypeError(f"Affine: {name} must be a number, or one for each axis, got {shown(value)}")
            elif isinstance(value, jax.Array):  # not hashable
                object.__setattr__(self, name, number)

    def __call__(self, rotary_dim: int, *context_length) -> Frequencies | FrequencyChoice:
        def move(frequencies: Frequencies) -> Frequencies:
            inv_freq, num_axes = frequencies.inv_freq, frequencies.num_axes
            scale, offset = (self._of_axes(name, num_axes) for name in ("scale", "offset"))
            moves = offset.any()
            if isinstance(inv_freq, jax.Array):
                scale, offset = (np.asarray(value, inv_freq.dtype) for value in (scale, offset))
            if inv_freq.ndim == frequencies.num_batch_axes + 1:
                phase, scaled = offset[0] * inv_freq, inv_freq * scale[0]
            else:
                phase, scaled = (inv_freq * offset[:, None]).sum(axis=-2), inv_freq * scale[:, None]
            if not moves:
                phase = frequencies.phase
            elif frequencies.phase is not None:
                phase = phase + frequencies.phase
            return dataclasses.replace(frequencies, inv_freq=scaled, phase=phase)

        return _of_each(move, _call(self.schedule, rotary_dim, context_length))

    def _of_axes(self, name: str, num_axes: int) -> np.ndarray:
        values = np.array(getattr(self, name), np.float64)
        if values.ndim and values.shape != (num_axes,):
            raise ValueError(
                f"Affine: {name} must be one, or one for each of A={num_axes} axes, got {values.tolist()}"
            )
        return np.broadcast_to(values, (num_axes,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Negated:
    """The negated frequencies of another schedule: ``-theta_i`` (nanochat, Karpathy 2025, released code).

    Example:
      >>> import rope_jax
      >>> rope_jax.Negated(schedule=rope_jax.Standard())(4).inv_freq.tolist()
      [-1.0, -0.01]
    """

    schedule: Schedule

    context_length = _inner_context_length

    def __call__(self, rotary_dim: int, *context_length) -> Frequencies | FrequencyChoice:
        def negate(frequencies: Frequencies) -> Frequencies:
            phase = None if frequencies.phase is None else -frequencies.phase
            return dataclasses.replace(frequencies, inv_freq=-frequencies.inv_freq, phase=phase)

        return _of_each(negate, _call(self.schedule, rotary_dim, context_length))


def _integers(name: str, values) -> tuple[int, ...]:
    """Integers as a tuple; TypeError if a value is not an integer."""
    try:
        return tuple(check_integer(name, value) for value in check_sequence(name, values, "integers"))
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers, got {shown(values)}") from None
