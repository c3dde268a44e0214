"""Rotates queries and keys on a TPU in a single launch, with one read and one write.

XLA's program rotates slices of a head, which a TPU pads to whole registers and writes out between fusions. The
kernel rolls a register to align each feature with its partner, so that both layouts cost the same. Queries and keys
are rotated in place. The kernel takes arrays in the memory order of projections and attention, so that the compiler
adds no copies: ``[B, N, T, H]`` if the features fill the 128 lanes, else ``[B, N, H, T]``, tokens along the lanes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._jax_internals import pallas as pl
from rope_jax._jax_internals import pallas_tpu as pltpu
from rope_jax._jax_internals import struct_like

LANES, SUBLANES = 128, 16  # of a register of bfloat16
BLOCK_BYTES = 3 << 20  # of input; with the output, and prefetching of the next block, four times as much
MAX_HEAD_DIM = 1024  # wider heads are untested
MAX_TOKENS = 512  # larger blocks are no faster and start later


def supports(xs) -> bool:
    """True if the kernel can rotate arrays ``[..., T, N, H]`` of these shapes and dtypes together."""
    static = all(isinstance(size, int) and size for x in xs for size in x.shape)
    if not static or len({(*x.shape[:-2], x.shape[-1]) for x in xs}) != 1:
        return False
    *_, length, _, head_dim = xs[0].shape
    if (
        head_dim % SUBLANES
        or head_dim > MAX_HEAD_DIM
        or any(x.dtype not in (jnp.bfloat16, jnp.float32) for x in xs)
    ):
        return False
    # In a decode step the launch would dominate, and XLA fuses the rotation with its neighbours.
    return length >= LANES and _tokens_per_block(xs) > 0


def _tokens_per_block(xs) -> int:
    """Tokens of all heads in a block, in whole registers; 0 if a single register is too large."""
    *_, length, _, head_dim = xs[0].shape
    table_bytes = 2 * 4 * head_dim  # float32, twice: the kernel splits it into cos and sin
    token_bytes = table_bytes + sum(x.shape[-2] * head_dim * x.dtype.itemsize for x in xs)
    register = LANES if head_dim % LANES else SUBLANES
    return min(BLOCK_BYTES // token_bytes // register * register, length, MAX_TOKENS)


def rotate(xs, cos, sin, *, layout: str, interpret: bool = False) -> list[jax.Array]:
    """Rotates each x ``[..., T, N, H]`` by ``cos, sin [..., T, R/2]``; leading axes broadcast."""
    *leading, length, _, head_dim = xs[0].shape
    num_pairs = cos.shape[-1]
    # The last leading axes may share a rotation, as heads before tokens do: no table is repeated for them.
    own = (1,) * (len(leading) + 2 - cos.ndim) + cos.shape[:-2]
    kept = max((i + 1 for i, size in enumerate(own) if size != 1), default=0)
    sharing = math.prod(leading[kept:])
    cos, sin = (jnp.broadcast_to(part, (*leading[:kept], *own[kept:], length, num_pairs)) for part in (cos, sin))
    arrays = [_table(cos, sin, layout, head_dim), *(x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2) for x in xs)]
    tokens = _tokens_per_block(xs)
    rows, columns, feature_axis = tokens, head_dim, 1
    if head_dim % LANES:
        arrays = [array.swapaxes(2, 3) for array in arrays]
        rows, columns, feature_axis = head_dim, tokens, 0

    def block(array, sharing=1):
        batch, heads, *_ = array.shape

        def block_index(b, t):
            zero = jnp.int32(0)  # indices must be 32-bit, even with x64
            row = zero if batch == 1 else b if sharing == 1 else lax.div(b, jnp.int32(sharing))
            return (row, zero, t, zero) if feature_axis else (row, zero, zero, t)

        return pl.BlockSpec((1, heads, rows, columns), block_index)

    table, *heads_first = arrays
    rotated = pl.pallas_call(
        functools.partial(_body, num_pairs=num_pairs, layout=layout, feature_axis=feature_axis),
        grid=(math.prod(leading), pl.cdiv(length, tokens)),
        in_specs=[block(table, sharing), *map(block, heads_first)],
        out_specs=[block(x) for x in heads_first],
        out_shape=[struct_like(x) for x in heads_first],
        input_output_aliases={1 + i: i for i in range(len(xs))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=f"rotate_{layout}",
    )(table, *heads_first)
    if head_dim % LANES:
        rotated = [out.swapaxes(2, 3) for out in rotated]
    return [out.swapaxes(1, 2).reshape(x.shape) for out, x in zip(rotated, xs, strict=True)]


def _table(cos, sin, layout: str, head_dim: int) -> jax.Array:
    """``[1 or B, 1, T, H]``: cos at the first feature of each pair, sin at the second."""
    *_, length, num_pairs = cos.shape
    step, gap = (num_pairs, 0) if layout == "half" else (1, 1)
    padded = []
    for part, start in ((cos, 0), (sin, step)):
        part = part.astype(jnp.float32).reshape(-1, 1, length, num_pairs)
        end = head_dim - start - num_pairs - (num_pairs - 1) * gap
        padded.append(lax.pad(part, jnp.float32(0), [(0, 0, 0)] * 3 + [(start, end, gap)]))
    return padded[0] + padded[1]


def _body(table_ref, *refs, num_pairs: int, layout: str, feature_axis: int):
    """Rotates a block of N heads; refs: the table ``[1, 1, T, H]`` or ``[1, 1, H, T]``, inputs, outputs."""
    table = table_ref[0, 0]
    head_dim = table.shape[feature_axis]
    feature = lax.broadcasted_iota(jnp.int32, table.shape, feature_axis)
    step = num_pairs if layout == "half" else 1  # from the first feature of a pair to its second
    is_first = feature < step if layout == "half" else (feature & 1) == 0

    def partner(x):
        following = pltpu.roll(x, jnp.int32(head_dim - step), feature_axis)
        if 2 * step == head_dim:
            return following
        return jnp.where(is_first, following, pltpu.roll(x, jnp.int32(step), feature_axis))

    swapped = partner(table)
    cos, sin = jnp.where(is_first, table, swapped), jnp.where(is_first, -swapped, table)
    x_refs, out_refs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    for x_ref, out_ref in zip(x_refs, out_refs, strict=True):
        for head in range(x_ref.shape[1]):
            x = x_ref[0, head]
            wide = x.astype(jnp.float32)
            rotated = (wide * cos + partner(wide) * sin).astype(x.dtype)
            if 2 * num_pairs < head_dim:
                rotated = jnp.where(feature < 2 * num_pairs, rotated, x)
            out_ref[0, head] = rotated
