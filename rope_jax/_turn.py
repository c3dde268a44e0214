"""How does one turn go through JAX's transformations, and to the chip that it is for?

The turn is one operation, linear in what is turned: its derivative is itself, and its transpose is the inverse
rotation, from cos and sin alone. Forward mode, reverse mode and any order of both hold. As an operation it stays
whole until it is known where it runs: a TPU has a kernel, everything else takes XLA's program.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Implementation = Literal["xla", "pallas"]
Layout = Literal["half", "interleaved"]
"""Which two features make a pair: i and i + R/2 (GPT-NeoX, Llama in transformers), or 2i and 2i + 1 (GPT-J)."""


def turn(xs, cos, sin, *, layout: Layout, implementation: Implementation | None = None) -> list[jax.Array]:
    """Each x ``[..., T, N, H]`` turned by ``cos, sin [..., T, R/2]``; the shapes are checked already."""
    # Inside shard_map, a rotation that differs by device makes of an x that does not, one that does.
    cos, sin, *xs = vary_alike(cos, sin, *xs)
    if implementation == "xla":
        return [by_xla(x, cos, sin, layout) for x in xs]
    return _turn.bind(cos, sin, *xs, layout=layout, implementation=implementation)


def vary_alike(*arrays) -> list[jax.Array]:
    """The arrays, each typed to differ along every manual mesh axis along which one of them does (shard_map)."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    everywhere = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(everywhere - own), to="varying") if everywhere - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def by_xla(x, cos, sin, layout: Layout) -> jax.Array:
    """The turn as operations that XLA makes one loop of: no copy, no transpose."""
    *leading, length, _, head_dim = x.shape
    num_pairs = cos.shape[-1]

    # A pair lies along `axis` of a view of the features, so that no copy and no transpose is needed.
    # half: [H/g, g], where the first R/2 features fill `rows` rows of g and their partners as many after them;
    # interleaved: [H/2, 2], a pair in each row.
    if layout == "half":
        columns = math.gcd(num_pairs, head_dim)
        rows, axis = num_pairs // columns, x.ndim - 1
        cos, sin = (part.reshape(*part.shape[:-1], 1, rows, columns) for part in (cos, sin))
        turning = 2 * rows
    else:
        columns, rows, axis = 2, 1, x.ndim
        cos, sin = (part[..., None, :, None] for part in (cos, sin))
        turning = num_pairs

    view = x.reshape(*leading, length, x.shape[-2], head_dim // columns, columns)
    pairs, *rest = _split(view, turning, x.ndim - 1)
    first, second = lax.split(pairs, (rows, rows), axis)

    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    first, second, cos, sin = (part.astype(dtype) for part in (first, second, cos, sin))
    turned = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
    if layout == "half":
        return lax.concatenate([*turned, *rest], axis).reshape(x.shape)
    return lax.concatenate([lax.concatenate(turned, axis), *rest], axis - 1).reshape(x.shape)


def _split(x, size: int, axis: int) -> list[jax.Array]:
    """The first ``size`` entries along ``axis``, and the rest where there is one."""
    rest = x.shape[axis] - size
    return list(lax.split(x, (size, rest), axis)) if rest else [x]


# ------------------------------------------------------------------------------------------- transformations

_turn = Primitive("rotate")
_turn.multiple_results = True


@functools.partial(jax.jit, static_argnames=("layout", "implementation"))
def _eagerly(cos, sin, *xs, layout, implementation):
    return _turn.bind(cos, sin, *xs, layout=layout, implementation=implementation)


def _jvp(primals, tangents, **how):
    (cos, sin, *xs), (dcos, dsin, *dxs) = primals, tangents
    moved = []
    if not all(type(dx) is ad.Zero for dx in dxs):
        moved.append(_turn.bind(cos, sin, *map(ad.instantiate_zeros, dxs), **how))
    if not (type(dcos) is type(dsin) is ad.Zero):  # learned frequencies: x is kept, and XLA's program does
        dcos, dsin = ad.instantiate_zeros(dcos), ad.instantiate_zeros(dsin)
        moved.append([by_xla(_pairs_of(x, cos), dcos, dsin, how["layout"]) for x in xs])
    both = list(map(ad.add_tangents, *moved)) if len(moved) == 2 else moved[0]
    return _turn.bind(cos, sin, *xs, **how), both


def _pairs_of(x, cos) -> jax.Array:
    """x with zeros from rotary_dim on: what passes through does not depend on the rotation."""
    turns = jnp.arange(x.shape[-1], dtype=jnp.int32) < 2 * cos.shape[-1]
    return jnp.where(turns, x, jnp.zeros_like(x))


def _transpose(cotangents, cos, sin, *xs, **how):
    return [None, None, *_turn.bind(cos, -sin, *map(ad.instantiate_zeros, cotangents), **how)]


def _batch(arguments, axes, **how):
    size = next(a.shape[axis] for a, axis in zip(arguments, axes, strict=True) if axis is not None)

    def to_front(array, axis):
        return jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)

    (cos, sin, *xs), (cos_axis, sin_axis, *x_axes) = arguments, axes
    xs = list(map(to_front, xs, x_axes))
    if not (cos_axis is sin_axis is None):
        # [b, ..., T, R/2] beside [b, ..., T, N, H]: axes of size 1 stand for those that only x has.
        cos, sin = to_front(cos, cos_axis), to_front(sin, sin_axis)
        between = (1,) * (xs[0].ndim - 1 - cos.ndim)
        cos, sin = (part.reshape(size, *between, *part.shape[1:]) for part in (cos, sin))
    return _turn.bind(cos, sin, *xs, **how), [0] * len(xs)


# ---------------------------------------------------------------------------------------------------- chips


def _to_xla(cos, sin, *xs, layout, implementation):
    return [by_xla(x, cos, sin, layout) for x in xs]


def _to_kernel(cos, sin, *xs, layout, implementation):
    from rope_jax.kernels import tpu  # here, since Pallas is slow to import and no other chip needs it

    return tpu.turn(xs, cos, sin, layout=layout)


def _lower_on_tpu(context, *arguments, layout, implementation):
    from rope_jax.kernels import tpu

    _, _, *xs = context.avals_in
    kernel = tpu.takes(xs) and not _divided_by_xla(context.module_context)
    if implementation == "pallas" and not kernel:
        shapes = ", ".join(x.str_short() for x in xs)
        raise ValueError(
            f"implementation must be None or 'xla' for {shapes}, or in a program that XLA divides among devices "
            "(call it inside shard_map), got 'pallas': see rope_jax.rotate"
        )
    lower = mlir.lower_fun(_to_kernel if kernel else _to_xla, multiple_results=True)
    return lower(context, *arguments, layout=layout, implementation=implementation)


def _divided_by_xla(module_context) -> bool:
    """Whether XLA itself divides the program among devices: it can divide its own operations, but no kernel."""
    axes = module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices != 1
    manual: frozenset = getattr(axes, "manual_axes", frozenset())
    return bool(manual) and manual != frozenset(axes.mesh.axis_names)


def _lower_elsewhere(context, *arguments, layout, implementation):
    if implementation == "pallas":
        raise ValueError("implementation must be None or 'xla' on anything but a TPU, got 'pallas'")
    lower = mlir.lower_fun(_to_xla, multiple_results=True)
    return lower(context, *arguments, layout=layout, implementation=implementation)


_turn.def_impl(_eagerly)
_turn.def_abstract_eval(lambda cos, sin, *xs, **how: list(xs))
ad.primitive_jvps[_turn] = _jvp
ad.primitive_transposes[_turn] = _transpose
batching.primitive_batchers[_turn] = _batch
mlir.register_lowering(_turn, _lower_elsewhere)
mlir.register_lowering(_turn, _lower_on_tpu, platform="tpu")
