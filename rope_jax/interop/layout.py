"""How do weights move from one pairing layout to the other?"""

from typing import TypeVar, get_args

import jax
import numpy as np

from rope_jax.core.primitive import Layout

Weight = TypeVar("Weight", np.ndarray, jax.Array)


def convert_layout(
    weight: Weight, to: Layout, *, head_dim: int, rotary_dim: int | None = None, start: int = 0, axis: int = -1
) -> Weight:
    """Reorders the features of queries or keys, so that a rope of layout ``to`` turns the pairs it used to turn.

    With x interleaved and y half, ``y[i] = x[2i]`` and ``y[i + R/2] = x[2i + 1]`` for ``i < R/2``, in each head,
    counted from ``start``. Nothing else moves, no number changes, and the way back is exact. A score is a sum
    over pairs, in any order: queries and keys that are both converted keep theirs (RoFormer, section 3.2.2).

    What produces or scales queries and keys before the rotation is to be converted, and nothing else is: not the
    values, not the output. What to pass besides ``to``, and ``head_dim=H`` where no other is written:

    =========================================  ==========================================================
    Flax kernel ``[D, N, H]`` or ``[D, N*H]``  nothing; stacked layers ``[..., D, N, H]`` alike
    biases ``[N, H]`` and ``[N*H]``            nothing
    QK-norm scale ``[H]``                      nothing
    torch weight ``[N*H, D]``                  ``axis=0``; with K heads alike
    partial rotary                             ``rotary_dim=R``
    latent attention, q_b_proj                 ``head_dim=nope + rope, start=nope, axis=0``
    its kv_a_proj_with_mqa                     ``head_dim=rank + rope, start=rank, axis=0``
    GPT-NeoX's query_key_value ``[N*3*H, D]``  ``head_dim=3*H, rotary_dim=R, axis=0``, and with ``start=H`` again
    LoRA of any of these, ``B @ A``            B as the weight itself; A, which holds no head, stays as it is
    =========================================  ==========================================================

    Other fused weights, ``[q | k | v]``, are to be split first.

    Args:
      weight: a numpy or jax array of any dtype.
      to: the layout wanted; that of ``weight`` is the other one.
      head_dim: H, after how many entries along ``axis`` the next head begins.
      rotary_dim: R, the features that are turned, even; all from ``start`` on where it is None.
      start: the first feature of a head that is turned.
      axis: where the features lie: the last axis in Flax, axis 0 of a torch weight. A weight of which both axes
        are multiples of H cannot tell that the wrong one was named.

    Returns:
      An array of the same kind, shape and dtype.

    Raises:
      TypeError: if ``weight`` is no numpy or jax array, or a number is no integer.
      ValueError: if the layout is unknown, ``start`` or ``rotary_dim`` does not fit in the head, ``rotary_dim`` is
        odd, or ``axis`` does not hold whole heads.

    Example:
      >>> import dataclasses, numpy as np, rope_jax
      >>> rope_jax.convert_layout(np.arange(10), "half", head_dim=10, rotary_dim=8).tolist()
      [0, 2, 4, 6, 1, 3, 5, 7, 8, 9]
      >>> rope = rope_jax.Rope(head_dim=64, schedule=rope_jax.Standard(), layout="interleaved")
      >>> q_proj = np.ones((8 * 64, 512), np.float16)  # torch's [N*H, D]
      >>> q_proj = rope_jax.convert_layout(q_proj, "half", head_dim=64, axis=0)
      >>> rope = dataclasses.replace(rope, layout="half")
    """
    if not isinstance(weight, np.ndarray | jax.Array):
        raise TypeError(f"weight must be a numpy or jax array, got {type(weight).__name__}")
    if to not in get_args(Layout):
        raise ValueError(f"to must be one of {get_args(Layout)}, got {to!r}")
    given = dict(head_dim=head_dim, start=start, axis=axis)
    for name, value in (given if rotary_dim is None else given | dict(rotary_dim=rotary_dim)).items():
        if not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {value!r}")
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

    # A head's turned features are [2, R/2] in layout half, [R/2, 2] interleaved: either is the other's transpose.
    source = (rotary_dim // 2, 2) if to == "half" else (2, rotary_dim // 2)
    order = np.arange(head_dim)
    order[start : start + rotary_dim] = start + np.arange(rotary_dim).reshape(source).T.ravel()

    # Heads have an axis of their own, so that those of a sharded weight stay on their devices.
    heads = (*weight.shape[:axis], weight.shape[axis] // head_dim, head_dim, *weight.shape[axis + 1 :])
    return weight.reshape(heads).take(order, axis=axis + 1, mode="clip").reshape(weight.shape)
