"""Builds positions of text and media in one row: multimodal language models, diffusion transformers."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import (
    as_int32,
    check_callable,
    check_choice,
    check_dtype,
    check_integer,
    device_array,
    is_concrete,
    shown,
)
from rope_jax.core.grids import check_sizes, check_step, host_grid, int32_positions, is_sequence

Resume = Literal["all", "plane"] | Callable[[tuple[int, ...]], int]
DiffusionModel = Literal["flux", "flux2", "lumina2", "qwen_image", "z_image"]


def multimodal_positions(
    segments: Sequence[int | Sequence[int]],
    *,
    steps: float | Sequence[float] | None = None,
    offset=0,
    resume: Resume = "all",
    num_axes: int = 3,
) -> tuple[jax.Array, int | jax.Array]:
    """Positions of a row of text and media, and the position of the next token (Qwen2-VL, section 2.1: M-RoPE).

    Text token j of a segment that starts at p has the position ``p + j`` on all axes. The cell ``(t, h, w)`` of a
    picture or video that starts at p has ``(p + floor(step * t), p + h, p + w)``. The next segment starts at

    ==========  ==============================  ======================================================
    resume      after a grid that starts at p   used by
    ==========  ==============================  ======================================================
    "all"       1 + the grid's last position,   Qwen2-VL, the paper and the first code; Qwen2.5-Omni
                the largest on all axes
    "plane"     p + the larger of the last two  ``get_rope_index`` of transformers 5.23 and 5.24
                sizes: max(height, width)
    a function  p + ``resume(sizes)``           ``math.prod``: text counts the media's tokens
    ==========  ==============================  ======================================================

    The first two rules agree unless a video lasts longer than its rows and columns: ``floor(step * (frames - 1)) >=
    max(height, width)``. After such a video transformers decodes from ``positions.max() + 1``, by either rule.

    Args:
      segments: the row from left to right. An integer is the length of a run of text; A integers are the sizes of a
        grid in tokens, after patches are merged: ``[5, (1, 4, 6), 4, (3, 4, 2), 6]``. Audio counts as text.
        Qwen3-VL, Qwen3.5 and GLM-4V put text before each frame: pass each frame as a grid ``(1, h, w)``.
      steps: positions from frame to frame on axis 0: one for all grids, or one for each grid; by default 1.
        Qwen2.5-VL: ``tokens_per_second * seconds_per_frame`` for videos. A float is multiplied in float32, as
        released code does; an integer or a ``fractions.Fraction`` is exact.
      offset: the position of the first token: an integer, or an integer array ``[...]``, which may be traced. To
        continue a row in decoding, pass its next position.
      resume: the rule for the position after a grid.
      num_axes: A.

    Returns:
      positions: int32 ``[..., T, A]``, in tokens, with the leading axes of ``offset``. Pad a row for a batch with
        ``jnp.pad``, on the side of the row's padding.
      next_position: the position of the token after the row, on all axes: an int, or int32 ``[...]`` if
        ``offset`` is an array.

    Raises:
      TypeError: if a length, a size or ``offset`` is not an integer, or a step is not a real number.
      ValueError: if ``segments`` is empty, a length is negative, a size is below 1, a grid does not have A sizes, a
        step is not positive, ``steps`` does not have one entry for each grid, ``resume`` is unknown or returns less
        than 1, or a position does not fit in int32.

    Example:
      >>> import rope_jax
      >>> positions, next_position = rope_jax.core.multimodal_positions([2, (1, 2, 2), 1])
      >>> positions.tolist(), next_position
      ([[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3], [4, 4, 4]], 5)
      >>> rope_jax.core.multimodal_positions([1], offset=next_position)[0].tolist()  # the next decoded token
      [[5, 5, 5]]
    """
    num_axes = check_integer("num_axes", num_axes, least=1)
    segments = _check_segments(segments, num_axes)
    grid_steps = iter(_check_steps(steps, sum(not isinstance(segment, int) for segment in segments)))
    if callable(resume):
        check_callable("resume", resume, "sizes")
    elif not (isinstance(resume, str) and resume in ("all", "plane")):
        raise ValueError(f"resume must be 'all', 'plane' or a function of the sizes of a grid, got {shown(resume)}")

    start = 0
    row = [np.zeros((0, num_axes), np.int64)]
    for segment in segments:
        if isinstance(segment, int):
            row.append(np.repeat(np.arange(start, start + segment)[:, None], num_axes, axis=1))
            start += segment
            continue
        cells = host_grid(segment, step=(next(grid_steps), *[1] * (num_axes - 1)))
        row.append(start + cells)
        if callable(resume):
            start += check_integer("resume(sizes)", resume(segment), least=1)
        else:
            start += int(cells.max()) + 1 if resume == "all" else max(segment[-2:])
    return _from_offset(np.concatenate(row), start, offset)


def diffusion_positions(model: DiffusionModel, num_text_tokens: int, *sizes: Sequence[int]) -> jax.Array:
    """Positions of the text and the pictures of a diffusion transformer, in the order of its joint attention.

    Picture k of the row has the cells ``(time, row, column)``, and text token j counts on the axes below. All other
    coordinates are 0. T' is the length of the text.

    ===========  ==================  =======================================  ===================================
    model        order of the row    picture k                                text token j
    ===========  ==================  =======================================  ===================================
    flux         text, pictures      time k (Kontext's reference: k = 1)      0 on all axes
    flux2        text, pictures      time 10 k, a fourth axis at 0            j on the fourth axis
    qwen_image   text, pictures      time k, row and column from the centre   j + max(height // 2, width // 2), the
                                                                              largest of all pictures, on all axes
    lumina2      text, picture       time T'                                  j on time
    z_image      picture, text       time T' + 1                              j + 1 on time
    ===========  ==================  =======================================  ===================================

    Z-Image pads its picture with tokens at 0, and its text with tokens that count on, to multiples of 32; T' then
    includes the padding. Chroma and Krea share the ids of Flux. Wan and HunyuanVideo rotate no text:
    ``grid_positions(frames, height, width)``. Source: the released pipelines, as ported to diffusers 0.42.

    Args:
      model: the family, see the table.
      num_text_tokens: T', at least 0, without padding.
      *sizes: the picture that is generated, then its references: ``(height, width)`` or ``(frames, height,
        width)``, in patches. The frames of a video count up from the picture's time.

    Returns:
      int32 ``[T, A]``, in patches and tokens; A is 4 for Flux 2, else 3.

    Raises:
      TypeError: if a size or ``num_text_tokens`` is not an integer.
      ValueError: if ``model`` is unknown, a size is below 1, a picture does not have two or three sizes, or there
        are more pictures than the model takes: one for Lumina 2 and Z-Image, two for Flux.

    Example:
      >>> import rope_jax
      >>> rope_jax.core.diffusion_positions("flux", 1, (2, 2)).tolist()
      [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
      >>> rope_jax.core.diffusion_positions("flux2", 2, (1, 1), (1, 1)).tolist()
      [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [10, 0, 0, 0]]
    """
    check_choice("model", model, get_args(DiffusionModel))
    rule = _RULES[model]
    num_text_tokens = check_integer("num_text_tokens", num_text_tokens, least=0)
    if not 1 <= len(sizes) <= rule.max_pictures:
        most = f"at most {rule.max_pictures} for {model}" if sizes else "at least one"
        raise ValueError(f"sizes must be pictures, {most}, got {len(sizes)}")
    pictures = [_check_picture(size) for size in sizes]

    num_text_tokens += -num_text_tokens % rule.pad_to
    text_start = rule.text_start
    if rule.centered:
        text_start = max(max(height // 2, width // 2) for _, height, width in pictures)
    first_time = text_start + num_text_tokens if rule.after_text else 0
    text = np.zeros((num_text_tokens, rule.num_axes), np.int64)
    text[:, rule.text_axes] = text_start + np.arange(num_text_tokens)[:, None]
    row = [text]
    for k, size in enumerate(pictures):
        cells = host_grid(size, centered=(False, rule.centered, rule.centered))
        cells = np.pad(cells, ((0, 0), (0, rule.num_axes - 3)))
        cells[:, 0] += first_time + k * rule.time_step
        row.append(np.pad(cells, ((0, -len(cells) % rule.pad_to), (0, 0))))
    return jnp.asarray(int32_positions(np.concatenate(row if rule.text_first else row[::-1]), [0] * rule.num_axes))


class _Rule(NamedTuple):
    """The ids of one family of diffusion transformers."""

    text_axes: list[int]
    num_axes: int = 3
    text_start: int = 0
    text_first: bool = True
    after_text: bool = False  # pictures start at the time after the text
    time_step: int = 1  # from picture to picture
    centered: bool = False
    max_pictures: float = math.inf
    pad_to: int = 1  # text and pictures are padded to multiples


_RULES = {
    "flux": _Rule([], max_pictures=2),
    "flux2": _Rule([3], num_axes=4, time_step=10),
    "lumina2": _Rule([0], after_text=True, max_pictures=1),
    "qwen_image": _Rule([0, 1, 2], centered=True),
    "z_image": _Rule([0], text_start=1, after_text=True, text_first=False, max_pictures=1, pad_to=32),
}


def _check_picture(size) -> tuple[int, ...]:
    """Frames, height and width."""
    if not is_sequence(size) or len(size) not in (2, 3):
        raise ValueError(
            f"sizes must be (height, width) or (frames, height, width) for each picture, got {shown(size)}"
        )
    return (1,) * (3 - len(size)) + tuple(check_sizes(size))


def _check_segments(segments, num_axes: int) -> list[int | tuple[int, ...]]:
    """The lengths of text and the sizes of grids."""
    if not isinstance(segments, Sequence) or isinstance(segments, str | bytes) or not segments:
        raise ValueError(
            f"segments must be lengths of text and sizes of grids, [5, (1, 4, 6)], got {shown(segments)}"
        )
    checked: list[int | tuple[int, ...]] = []
    for segment in segments:
        if not is_sequence(segment):
            checked.append(check_integer("segments", segment, least=0))
            continue
        sizes = tuple(check_sizes(list(segment), "segments"))
        if len(sizes) != num_axes:
            raise ValueError(f"segments must be lengths of text or A=num_axes={num_axes} sizes, got {segment}")
        checked.append(sizes)
    return checked


def _check_steps(steps, num_grids: int) -> list:
    """The step of each grid."""
    each = list(steps) if is_sequence(steps) else [1 if steps is None else steps] * num_grids
    if len(each) != num_grids:
        raise ValueError(f"steps must be one number or one for each of {num_grids} grids, got {len(each)}")
    for step in each:
        if not check_step("steps", step) > 0:
            raise ValueError(f"steps must be positive, got {step}")
    return each


def _from_offset(row: np.ndarray, end: int, offset) -> tuple[jax.Array, int | jax.Array]:
    """``row [T, A]`` and the position after the row, from ``offset [...]`` on."""
    num_axes = row.shape[1]
    row = np.concatenate([row, np.full((1, num_axes), end)])  # the position after the row must fit as well
    if not isinstance(offset, jax.Array | np.ndarray):
        offset = check_integer("offset", offset)
        return jnp.asarray(int32_positions(row, [offset] * num_axes)[:-1]), offset + end
    given, offset = offset, device_array("offset", offset)
    check_dtype("offset", offset, jnp.integer, "integer")
    if is_concrete(given) and offset.size:
        known = np.asarray(given)  # operations of jax would be traced inside jit
        for extreme in (known.min(), known.max()):
            int32_positions(row, [int(extreme)] * num_axes)
    offset = as_int32(offset)
    return offset[..., None, None] + int32_positions(row, [0] * num_axes)[:-1], offset + end
