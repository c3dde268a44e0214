"""Deals the pairs of a head to the axes of a position: time, height and width, or rows and columns."""

import dataclasses
from typing import Any, Literal

from rope_jax.core.composed_schedules import Axial, SectionOrder, Sections
from rope_jax.core.frequencies import Schedule
from rope_jax.core.schedules import Linear, Standard
from rope_jax.interop.config import Config

_ORDERS: dict[str, SectionOrder] = {"chunked": "runs", "strided": "strided", "alternating": "alternating"}


@dataclasses.dataclass(frozen=True)
class PairAxes:
    """The order in which a model family deals pairs to position axes.

    Attributes:
      order:
        - ``chunked``: consecutive pairs for each axis.
        - ``strided``: every third pair to height and every third to width, up to their counts; the rest to time.
        - ``alternating``: height and width in turn, then time; a config counts height, width, time.
        - ``rows_columns_alternating``: rows and columns in turn.
        - ``rows_columns``: frequencies of their own for rows, then for columns.
        - ``columns_rows``: frequencies of their own for columns, then for rows.
        - ``column_row_alternating``: the same, and the pairs of a frequency lie side by side.
        - ``even_rows_odd_columns``: of one ladder of R/2 frequencies, the even ones for rows, then the odd ones for
          columns.
        - ``time_rows_columns``: frequencies of their own for time, rows and columns, a third of the pairs each.
      default: the number of pairs for each axis if the config gives none.
      blocks: of the head, if each holds the pairs of one axis with both their halves; see :class:`Rope`.
    """

    order: Literal[
        "chunked",
        "strided",
        "alternating",
        "rows_columns_alternating",
        "rows_columns",
        "columns_rows",
        "column_row_alternating",
        "even_rows_odd_columns",
        "time_rows_columns",
    ]
    default: tuple[int, ...] | None = None
    blocks: int = 1

    def rotary_dim(self, head_dim: int) -> int:
        """R of an unpartitioned head: all features, or what three axes can share."""
        return 3 * 2 * (head_dim // 3 // 2) if self.order == "time_rows_columns" else head_dim

    def dealt(self, schedule: Schedule, entry: Config, rotary_dim: int) -> Schedule:
        """The schedule of several axes, from the schedule of one and a dictionary of ``rope_parameters``."""
        num_pairs = rotary_dim // 2
        if self.order in _ORDERS:
            counts = self._counts(entry, num_pairs)
            if self.order == "alternating":
                counts = counts[-1:] + counts[:-1]
            return Sections(sections=counts, schedule=schedule, order=_ORDERS[self.order])
        if self.order == "rows_columns_alternating":
            return Sections(
                sections=(num_pairs - num_pairs // 2, num_pairs // 2), schedule=schedule, order="strided"
            )
        if self.order == "time_rows_columns":
            return Axial(sizes=(rotary_dim // 3,) * 3, schedule=schedule)
        if self.order == "even_rows_odd_columns":
            if not isinstance(schedule, Standard):
                entry.refuse(f"rope_type must be 'default' or 'axial' in this family, got {schedule}")
            odd = Linear(factor=schedule.base ** (2 / rotary_dim), base=schedule.base)
            return Axial(sizes=(num_pairs, num_pairs), schedule=(schedule, odd))
        return Axial(
            sizes=(num_pairs, num_pairs),
            schedule=schedule,
            axes=(1, 0) if self.order.startswith("column") else None,
            alternating=self.order == "column_row_alternating",
        )

    def _counts(self, entry: Config, num_pairs: int) -> tuple[int, ...]:
        strided = self.order == "strided"
        written = entry.agreed("mrope_interleaved", "interleaved")
        if written is not None and written != strided:
            entry.refuse(f"mrope_interleaved must be {strided} in this family, got {written!r}")
        counts = entry.agreed("mrope_section", "xdrope_section")
        if counts is None:
            counts = self.default or entry.need("mrope_section")
        counts = entry.list_of("mrope_section", counts, int)
        num_axes = len(self.default or counts)
        if len(counts) != num_axes or sum(counts) != num_pairs or min(counts) < 0:
            entry.refuse(f"mrope_section must add up to R/2 = {num_pairs}, got {counts}")
        if strided:  # height and width take every third pair as far as there are pairs
            dealt = [i % num_axes if i < num_axes * counts[i % num_axes] else 0 for i in range(num_pairs)]
            counts = [dealt.count(axis) for axis in range(num_axes)]
        return tuple(counts)

    def written(self, schedule) -> dict[str, Any]:
        """The keys of ``rope_parameters`` for a dealt schedule."""
        if self.order not in _ORDERS or not isinstance(schedule, Sections):
            return {}
        counts = list(schedule.sections)
        return {"mrope_section": counts[1:] + counts[:1] if self.order == "alternating" else counts}
