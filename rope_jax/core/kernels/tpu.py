"""How does a TPU turn pairs with one read and one write?

XLA's program turns slices of a head, which a TPU pads to whole registers and writes out between fusions. Here a
feature meets its partner by rolling a register, so that both layouts cost the same, and queries and keys go in one
launch, in place. The compiler puts no copy between a projection, the kernel and attention, since the kernel takes
the arrays as they lie: heads before tokens, ``[B, N, T, H]`` where features fill the 128 lanes, and where they do
not ``[B, N, H, T]``, tokens along the lanes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 16  # of a register of bfloat16
BLOCK_BYTES = 3 << 20  # of input; with the output, and the next block on its way, a block takes four times as much
MAX_HEAD_DIM = 1024  # wider ones have not been tried
MAX_TOKENS = 512  # past it a block is no faster, only later to begin


def takes(xs) -> bool:
    """Whether the kernel is made for arrays ``[..., T, N, H]`` of these shapes and dtypes."""
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
    return length >= LANES and _tokens(xs) > 0  # a decode step is all launch: XLA fuses it with its neighbours


def _tokens(xs) -> int:
    """How many tokens of all heads make one block: whole registers of them, or none where none fit."""
    *_, length, _, head_dim = xs[0].shape
    table_bytes = 2 * 4 * head_dim  # float32, twice: it is not written, but taken apart
    token_bytes = table_bytes + sum(x.shape[-2] * head_dim * x.dtype.itemsize for x in xs)
    register = LANES if head_dim % LANES else SUBLANES
    return min(BLOCK_BYTES // token_bytes // register * register, length, MAX_TOKENS)


def turn(xs, cos, sin, *, layout: str, interpret: bool = False) -> list[jax.Array]:
    """Each x ``[..., T, N, H]`` turned by ``cos, sin [..., T, R/2]``, whose leading axes broadcast."""
    *leading, length, _, head_dim = xs[0].shape
    num_pairs = cos.shape[-1]
    if any(size != 1 for size in cos.shape[:-2]):
        cos, sin = (jnp.broadcast_to(part, (*leading, length, num_pairs)) for part in (cos, sin))
    arrays = [_table(cos, sin, layout, head_dim), *(x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2) for x in xs)]
    tokens = _tokens(xs)
    rows, columns, feature_axis = tokens, head_dim, 1
    if head_dim % LANES:
        arrays = [array.swapaxes(2, 3) for array in arrays]
        rows, columns, feature_axis = head_dim, tokens, 0

    def block(array):
        batch, heads, *_ = array.shape

        def place(b, t):
            zero = jnp.int32(0)  # indices are of 32 bits, with x64 on too
            row = b if batch > 1 else zero
            return (row, zero, t, zero) if feature_axis else (row, zero, zero, t)

        return pl.BlockSpec((1, heads, rows, columns), place)

    table, *heads_first = arrays
    turned = pl.pallas_call(
        functools.partial(_body, num_pairs=num_pairs, layout=layout, feature_axis=feature_axis),
        grid=(math.prod(leading), pl.cdiv(length, tokens)),
        in_specs=[block(array) for array in arrays],
        out_specs=[block(x) for x in heads_first],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
            for x in heads_first
        ],
        input_output_aliases={1 + i: i for i in range(len(xs))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=f"rotate_{layout}",
    )(table, *heads_first)
    if head_dim % LANES:
        turned = [out.swapaxes(2, 3) for out in turned]
    return [out.swapaxes(1, 2).reshape(x.shape) for out, x in zip(turned, xs, strict=True)]


def _table(cos, sin, layout: str, head_dim: int) -> jax.Array:
    """``[1 or B, 1, T, H]``: cos at the first feature of a pair, sin at the second, each padded to its places."""
    *_, length, num_pairs = cos.shape
    step, gap = (num_pairs, 0) if layout == "half" else (1, 1)
    placed = []
    for part, low in ((cos, 0), (sin, step)):
        part = part.astype(jnp.float32).reshape(-1, 1, length, num_pairs)
        high = head_dim - low - num_pairs - (num_pairs - 1) * gap
        placed.append(lax.pad(part, jnp.float32(0), [(0, 0, 0)] * 3 + [(low, high, gap)]))
    return placed[0] + placed[1]


def _body(table_ref, *refs, num_pairs: int, layout: str, feature_axis: int):
    """One block: the table ``[1, 1, T, H]`` or ``[1, 1, H, T]``, then what comes in and what goes out, N heads."""
    table = table_ref[0, 0]
    head_dim = table.shape[feature_axis]
    feature = lax.broadcasted_iota(jnp.int32, table.shape, feature_axis)
    step = num_pairs if layout == "half" else 1  # from the first feature of a pair to its second
    is_first = feature < step if layout == "half" else (feature & 1) == 0

    def partner(x):
        after = pltpu.roll(x, jnp.int32(head_dim - step), feature_axis)
        if 2 * step == head_dim:
            return after
        return jnp.where(is_first, after, pltpu.roll(x, jnp.int32(step), feature_axis))

    other = partner(table)
    cos, sin = jnp.where(is_first, table, other), jnp.where(is_first, -other, table)
    ins, outs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    for x_ref, out_ref in zip(ins, outs, strict=True):
        for head in range(x_ref.shape[1]):
            x = x_ref[0, head]
            wide = x.astype(jnp.float32)
            turned = (wide * cos + partner(wide) * sin).astype(x.dtype)
            if 2 * num_pairs < head_dim:
                turned = jnp.where(feature < 2 * num_pairs, turned, x)
            out_ref[0, head] = turned
