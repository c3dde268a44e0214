"""Converts weights between the two pairing layouts."""

from typing import TypeVar, get_args

import jax
import numpy as np

from rope_jax._checks import check_choice, check_integer
from rope_jax.core.primitive import Layout

Weight = TypeVar("Weight", np.ndarray, jax.Array)


def convert_layout(
    weight: Weight, to: Layout, *, head_dim: int, rotary_dim: int | None = None, start: int = 0, axis: int = -1
) -> Weight:
    """Reorders the features of query or key weights, so that a rope of layout ``to`` rotates the same pairs.

    Example:
      >>> import dataclasses, numpy as np, rope_jax
      >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.Standard(), layout="interleaved")
      >>> q_proj = np.ones((8 * 64, 512), np.float16)  # torch's [N*H, D]
      >>> q_proj = rope_jax.convert_layout(q_proj, "half", head_dim=64, axis=0)
      >>> rope = dataclasses.replace(rope, layout="half")
      >>> rope_jax.convert_layout(np.arange(10), "half", head_dim=10, rotary_dim=8).tolist()
      [0, 2, 4, 6, 1, 3, 5, 7, 8, 9]

    With x interleaved and y half, ``y[i] = x[2i]`` and ``y[i + R/2] = x[2i + 1]`` for ``i < R/2``, in each head,
    counted from ``start``. Other features stay in place, no value changes, and the inverse is exact. A score is a
    sum over pairs in any order, so scores stay the same if queries and keys are both converted (RoFormer, section
    3.2.2).

    Convert every weight that produces or scales queries and keys before the rotation. Do not convert the weights of
    values or of the output. Arguments beside ``to``; ``head_dim=H`` unless the table has another:

    ==========================================  ===============================================================
    Flax kernel ``[D, N, H]`` or ``[D, N*H]``   none; the same for stacked layers ``[..., D, N, H]``
    bias ``[N, H]`` or ``[N*H]``                none
    QK-norm scale ``[H]``                       none
    torch weight ``[N*H, D]`` or ``[K*H, D]``   ``axis=0``
    partial rotation                            ``rotary_dim=R``
    latent attention, q_b_proj                  ``head_dim=nope + rope, start=nope, axis=0``
    latent attention, kv_a_proj_with_mqa        ``head_dim=rank + rope, start=rank, axis=0``
    GPT-NeoX's query_key_value ``[N*3*H, D]``   ``head_dim=3*H, rotary_dim=R, axis=0``, then again with ``start=H``
    LoRA of any of these, ``B @ A``             B like the weight itself; A has no heads and stays as it is
    ==========================================  ===============================================================

    Split other fused weights, such as ``[q | k | v]``, before converting them.

    Args:
      weight: a numpy or jax array of any dtype.
      to: the layout to convert to, from the other layout.
      head_dim: H, the number of entries along ``axis`` from one head to the next.
      rotary_dim: R, the number of rotated features, even; if None, all features from ``start`` on.
      start: the first rotated feature of a head.
      axis: the axis of the features: the last axis in Flax, axis 0 of a torch weight. If both axes of a weight are
        multiples of H, a wrong axis cannot be detected.

    Returns:
      An array of the same kind, shape and dtype.

    Raises:
      TypeError: if ``weight`` is no numpy or jax array, or a number is no integer.
      ValueError: if the layout is unknown, ``start`` or ``rotary_dim`` does not fit in the head, ``rotary_dim`` is
        odd, or ``axis`` does not hold whole heads.
    """
    if not isinstance(weight, np.ndarray | jax.Array):
        raise TypeError(f"weight must be a numpy or jax array, got {type(weight).__name__}")
    check_choice("to", to, get_args(Layout))
    integers = dict(head_dim=head_dim, start=start, axis=axis)
    if rotary_dim is not None:
        integers["rotary_dim"] = rotary_dim
    for name, value in integers.items():
        check_integer(name, value)
    if not 0 <= start < head_dim:
        raise ValueError(f"start must be from 0 to below head_dim={head_dim}, got {start}")
    rotary_dim = head_dim - start if rotary_dim is None else rotary_dim
    if not 2 <= rotary_dim <= head_dim - start or rotary_dim % 2:
        raise ValueError(
            f"rotary_dim must be even, from 2 to head_dim - start = {head_dim - start}, got {rotary_dim}"
        )
    if not -weight.ndim <= axis < weight.ndim:
        raise ValueError(f"axis must be one of the {weight.ndim} axes of weight {weight.shape}, got {axis}")
    axis %= weight.ndim
    if weight.shape[axis] % head_dim:
        raise ValueError(
            f"weight must have a multiple of head_dim={head_dim} features along axis {axis}, got {weight.shape}"
        )

    # The rotated features are [2, R/2] in layout half and [R/2, 2] interleaved, so one is the other transposed.
    source = (rotary_dim // 2, 2) if to == "half" else (2, rotary_dim // 2)
    order = np.arange(head_dim)
    order[start : start + rotary_dim] = start + np.arange(rotary_dim).reshape(source).T.ravel()

    # With an axis for heads, the heads of a sharded weight stay on their devices.
    heads = (*weight.shape[:axis], weight.shape[axis] // head_dim, head_dim, *weight.shape[axis + 1 :])
    return weight.reshape(heads).take(order, axis=axis + 1, mode="clip").reshape(weight.shape)
