"""Deals the pairs of a head to the axes of a position: time, height and width, or rows and columns."""

import dataclasses
from typing import Any, Literal

from rope_jax.interop.config import Config


@dataclasses.dataclass(frozen=True)
class Sections:
    """The order in which a model family deals pairs to position axes.

    Attributes:
      order:
        - ``chunked``: consecutive pairs for each axis.
        - ``strided``: every third pair to height and every third to width, up to their counts; the rest to time.
        - ``alternating``: height and width in turn, then time.
        - ``rows_columns_alternating``: rows and columns in turn.
        - ``rows_columns``: frequencies of their own for rows, then for columns.
        - ``columns_rows``: frequencies of their own for columns, then for rows.
      default: the number of pairs for each axis if the config gives none.
    """

    order: Literal["chunked", "strided", "alternating", "rows_columns_alternating", "rows_columns", "columns_rows"]
    default: tuple[int, ...] | None = None

    @property
    def axial(self) -> bool:
        """Whether each axis has a whole set of frequencies (:class:`rope_jax.core.Axial`)."""
        return self.order in ("rows_columns", "columns_rows")

    @property
    def counted(self) -> bool:
        """Whether a config gives the number of pairs for each axis."""
        return self.order in ("chunked", "strided", "alternating")

    def axes(self, entry: Config, num_pairs: int) -> tuple[int, ...]:
        """The position axis of each pair, from a dictionary of ``rope_parameters``."""
        match self.order:
            case "rows_columns_alternating":
                return tuple(i % 2 for i in range(num_pairs))
            case "rows_columns":
                return tuple(int(2 * i >= num_pairs) for i in range(num_pairs))
            case "columns_rows":
                return tuple(int(2 * i < num_pairs) for i in range(num_pairs))
        counts = self._counts(entry, num_pairs)
        match self.order:
            case "strided":
                return tuple(i % 3 if i < 3 * counts[i % 3] else 0 for i in range(num_pairs))
            case "alternating":
                spatial = counts[0] + counts[1]
                return tuple(1 + i % 2 if i < spatial else 0 for i in range(num_pairs))
        return tuple(axis for axis, count in enumerate(counts) for _ in range(count))

    def _counts(self, entry: Config, num_pairs: int) -> tuple[int, ...]:
        strided = self.order == "strided"
        written = entry.agreed("mrope_interleaved", "interleaved")
        if written is not None and written != strided:
            entry.refuse(f"mrope_interleaved must be {strided} in this family, got {written!r}")
        counts = entry.agreed("mrope_section", "xdrope_section") or self.default or entry.need("mrope_section")
        num_axes = len(self.default or counts)
        if isinstance(counts, str) or len(counts) != num_axes or sum(counts) != num_pairs or min(counts) < 0:
            entry.refuse(f"mrope_section must add up to R/2 = {num_pairs}, got {counts}")
        return counts

    def written(self, axes: tuple[int, ...]) -> dict[str, Any]:
        """The keys of ``rope_parameters`` for these axes."""
        if not self.counted:
            return {}
        counts = [axes.count(axis) for axis in range(max(axes) + 1)]
        return {"mrope_section": counts[1:] + counts[:1] if self.order == "alternating" else counts}
