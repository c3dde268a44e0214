"""Builds positions on grids: pictures, videos, packed pictures."""

import math
import numbers
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import as_int32, check_dtype, check_integer, check_real, is_concrete, shown
from rope_jax._jax_internals import Tracer


def grid_positions(
    *sizes: int,
    origin=0,
    step=1,
    resize_to=None,
    centered=False,
    frames: Sequence[int] | None = None,
    block: int = 1,
    num_prefix_tokens: int = 0,
) -> jax.Array:
    """Positions of the cells of a grid, row by row: the last axis runs fastest.

    On an axis of n cells, cell i has the position ``origin + floor(step * (i - c))``; c is ``ceil(n / 2)`` on a
    centred axis, else 0. Wan and HunyuanVideo: ``grid_positions(frames, height, width)``. The options ``origin``,
    ``step``, ``resize_to`` and ``centered`` take one value for all axes, or a sequence of A values.

    Args:
      *sizes: the number of cells along each of the A axes, at least 1: ``grid_positions(height, width)``.
      origin: the position of cell 0, or of the centre cell if centred. Integers, or an integer jax array ``[]`` or
        ``[A]``, which may be traced.
      step: the distance between neighbours, in positions. A float is multiplied in float32, as released code does;
        an integer or a ``fractions.Fraction`` is exact.
      resize_to: m resizes an axis of n cells to m positions: ``step = m / n``, exactly. The fractional positions of
        NaViT (Dehghani et al. 2023, section 2.1) in a table of m.
      centered: counts from the centre, so that half of the positions are negative (Qwen-Image, ``scale_rope``).
      frames: ``sizes[0]`` integers that replace ``floor(step * (i - c))`` on axis 0: the indices of sampled frames.
      block: m orders the tokens by m x m blocks of the last two axes, for a patch merger (Qwen2-VL, section 2.1).
        The sizes of both axes must be multiples of m.
      num_prefix_tokens: tokens at position 0 before the grid: class and register tokens. They are not rotated,
        unless the frequencies have a phase.

    Returns:
      int32 ``[T, A]`` with ``T = num_prefix_tokens + prod(sizes)``, in positions.

    Raises:
      TypeError: if a size, origin, frame, block or ``num_prefix_tokens`` is not an integer, ``step`` is not a real
        number, or ``centered`` is not a bool.
      ValueError: if no size is given, a size is below 1, an option does not have A values, ``frames`` does not have
        ``sizes[0]`` entries, ``block`` does not divide the sizes, or a position does not fit in int32.

    Example:
      >>> import rope_jax
      >>> rope_jax.grid_positions(2, 2).tolist()
      [[0, 0], [0, 1], [1, 0], [1, 1]]
      >>> rope_jax.grid_positions(1, 3, origin=(7, 0), centered=(False, True)).tolist()  # t = 7, centred columns
      [[7, -2], [7, -1], [7, 0]]
    """
    options = dict(step=step, resize_to=resize_to, centered=centered, frames=frames, block=block)
    return _place([host_grid(sizes, **options)], origin, num_prefix_tokens)[0]


def packed_grid_positions(
    sizes: Sequence[Sequence[int]], *, origin=0, num_prefix_tokens: int = 0, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Positions of several pictures or videos in one row, and the index of the picture of each token (NaViT).

    The grids follow each other: ``concatenate([grid_positions(*size, **options) for size in sizes])``.
    Qwen2-VL and its family rotate by (row, column), in blocks of the merge size, and attend within a frame: pass
    each frame as a picture, ``[(h, w)] * t``.

    Args:
      sizes: for each picture the number of cells along each of the A axes: ``[(height, width), ...]``.
      origin, num_prefix_tokens, **options: as in :func:`grid_positions`, the same for each picture.

    Returns:
      positions: int32 ``[T, A]``, in positions.
      segment_ids: int32 ``[T]``, the index of the picture, for attention that stays within a picture.

    Raises:
      TypeError, ValueError: as in :func:`grid_positions`; also if ``sizes`` is empty or the pictures differ in A.

    Example:
      >>> import rope_jax
      >>> positions, segment_ids = rope_jax.core.packed_grid_positions([(1, 2), (2, 1)])
      >>> positions.tolist(), segment_ids.tolist()
      ([[0, 0], [0, 1], [0, 0], [1, 0]], [0, 0, 1, 1])
    """
    if not is_sequence(sizes) or len(sizes) == 0 or not all(map(is_sequence, sizes)):
        raise ValueError(f"sizes must be one or more grids, [(height, width), ...], got {shown(sizes)}")
    if len({len(size) for size in sizes}) > 1:
        raise ValueError(f"sizes must have the same number of axes A in each grid, got {shown(sizes)}")
    return _place([host_grid(size, **options) for size in sizes], origin, num_prefix_tokens)


def check_sizes(sizes: Sequence[int], argument: str = "sizes") -> list[int]:
    """``sizes`` as ints. Raises unless the sizes are one or more integers of at least 1."""
    checked = [check_integer(argument, size) for size in sizes]
    if not checked or min(checked) < 1:
        raise ValueError(f"{argument} must be one or more lengths of at least 1, got {shown(sizes)}")
    if math.prod(checked) >= 2**31:
        raise ValueError(f"{argument} must be a grid of fewer than 2^31 cells, got {shown(sizes)}")
    return checked


def floor_steps(indices: Sequence[int], step) -> list[int]:
    """``floor(step * i)`` for each index: exact for integers and fractions, in float32 for floats."""
    if isinstance(step, numbers.Rational):
        return [int(i) * int(step.numerator) // int(step.denominator) for i in indices]
    # Released code floors a float32 product: frame 10 at steps of 0.7 is 7 there, and 6 with the exact product.
    return [math.floor(np.float32(i) * np.float32(step)) for i in indices]


def check_step(argument: str, step) -> Any:
    """``step`` as an exact number or a float. Raises unless the step is a known real number below 2^31."""
    if isinstance(step, Tracer):
        raise TypeError(f"{argument} must be known when the program is traced, got {shown(step)}")
    if isinstance(step, bool) or not isinstance(step, numbers.Rational):
        step = check_real(argument, step)
    if step is None or abs(step) >= 2**31:
        raise ValueError(f"{argument} must be a number between -2^31 and 2^31, got {shown(step)}")
    return step


def is_sequence(value) -> bool:
    """True for a list, tuple or numpy array with an axis."""
    return value.ndim > 0 if isinstance(value, np.ndarray) else isinstance(value, list | tuple)


def int32_positions(cells: np.ndarray, origin: Sequence[int]) -> np.ndarray:
    """``cells + origin`` as int32 ``[T, A]``. Raises ValueError if a position does not fit."""
    low, high = (
        [int(cell) + start for cell, start in zip(ends, origin, strict=True)]
        for ends in (cells.min(axis=0), cells.max(axis=0))
    )
    if min(low) < -(2**31) or max(high) >= 2**31:
        raise ValueError(f"positions must fit in int32, got positions from {shown(min(low))} to {shown(max(high))}")
    return (cells + np.array(origin)).astype(np.int32)


def host_grid(sizes, *, step=1, resize_to=None, centered=False, frames=None, block=1) -> np.ndarray:
    """Positions of the cells of a grid with origin 0, in the order of the tokens: int64 ``[T, A]``."""
    sizes = check_sizes(sizes)
    num_axes, block = len(sizes), check_integer("block", block, least=1)
    each = {"step": step, "resize_to": resize_to, "centered": centered}
    steps, targets, centered_axes = (_for_each_axis(name, value, num_axes) for name, value in each.items())
    axes = []
    for size, step, target, is_centered in zip(sizes, steps, targets, centered_axes, strict=True):
        if not isinstance(is_centered, bool | np.bool):
            raise TypeError(f"centered must be True or False, or A={num_axes} of them, got {shown(centered)}")
        if target is not None:
            if step != 1:
                raise ValueError(
                    f"pass step or resize_to for an axis, not both, got {shown(step)} and {shown(target)}"
                )
            target = check_integer("resize_to", target, least=1)
            if target >= 2**31:
                raise ValueError(f"resize_to must be below 2^31, got {shown(target)}")
            step = Fraction(target, size)
        first = -((size + 1) // 2) if is_centered else 0
        axes.append(floor_steps(range(first, first + size), check_step("step", step)))
    if frames is not None:
        if not is_sequence(frames) or len(frames) != sizes[0]:
            raise ValueError(f"frames must be sizes[0]={sizes[0]} integers, got {shown(frames)}")
        axes[0] = [check_integer("frames", frame) for frame in frames]
    cells = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    if block > 1:
        if num_axes < 2 or sizes[-2] % block or sizes[-1] % block:
            raise ValueError(f"block must divide the last two of A >= 2 sizes, got {block} and sizes {sizes}")
        *others, height, width = sizes
        cells = cells.reshape(*others, height // block, block, width // block, block, num_axes).swapaxes(-3, -4)
    return cells.reshape(-1, num_axes)


def _for_each_axis(argument: str, value, num_axes: int) -> list:
    """One value for each of the A axes."""
    if not is_sequence(value):
        return [value] * num_axes
    if len(value) != num_axes:
        raise ValueError(f"{argument} must be one value or A={num_axes} values, got {shown(value)}")
    return list(value)


def _place(grids: list[np.ndarray], origin, num_prefix_tokens) -> tuple[jax.Array, jax.Array]:
    """Moves the grids ``[T, A]`` to the origin, behind their prefix tokens: positions and segment ids."""
    num_axes, num_prefix_tokens = grids[0].shape[1], check_integer("num_prefix_tokens", num_prefix_tokens, least=0)
    if num_prefix_tokens >= 2**31:
        raise ValueError(f"num_prefix_tokens must be below 2^31, got {shown(num_prefix_tokens)}")
    shift = None  # a traced origin
    if isinstance(origin, jax.Array):
        check_dtype("origin", origin, jnp.integer, "integer")
        if origin.shape not in ((), (num_axes,)):
            raise ValueError(f"origin must have shape [] or [A={num_axes}], got {origin.shape}")
        if is_concrete(origin):
            origin = np.asarray(origin)
        else:
            origin, shift = 0, as_int32(origin)
    start = [check_integer("origin", value) for value in _for_each_axis("origin", origin, num_axes)]
    positions = np.concatenate(
        [np.pad(int32_positions(grid, start), ((num_prefix_tokens, 0), (0, 0))) for grid in grids]
    )
    segment_ids = np.repeat(np.arange(len(grids)), [num_prefix_tokens + len(grid) for grid in grids])
    is_cell = np.concatenate([np.arange(num_prefix_tokens + len(grid)) >= num_prefix_tokens for grid in grids])
    placed = jnp.asarray(positions)
    if shift is not None:
        placed += jnp.where(is_cell[:, None], shift, 0)
    return placed, jnp.asarray(segment_ids, jnp.int32)
