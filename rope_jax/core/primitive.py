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

RotateBackend = Literal["xla", "pallas"]
Layout = Literal["half", "interleaved"]
"""Which two features make a pair: i and i + R/2 (GPT-NeoX, Llama in transformers), or 2i and 2i + 1 (GPT-J)."""


def turn(xs, cos, sin, *, layout: Layout, implementation: RotateBackend | None = None) -> list[jax.Array]:
    """Each x ``[..., T, N, H]`` turned by ``cos, sin [..., T, R/2]``; the shapes are checked already."""
    # Inside shard_map, what is turned by a rotation that differs by device differs by device.
    differs = jax.typeof(cos).manual_axis_type.varying | jax.typeof(sin).manual_axis_type.varying
    missing = [tuple(differs - jax.typeof(x).manual_axis_type.varying) for x in xs]
    xs = [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(xs, missing, strict=True)]
    return rotate_p.bind(cos, sin, *xs, layout=layout, implementation=implementation)


def by_xla(x, cos, sin, layout: Layout) -> jax.Array:
    """The turn as operations that XLA makes one loop of: no copy, no transpose."""
    *leading, length, _, head_dim = x.shape
    num_pairs = cos.shape[-1]

    # A pair lies along `axis` of a view of the features, so that no copy and no transpose is needed.
    # half: [H/g, g], where the first R/2 features fill `rows` rows of g and their partners as many after them;
    # interleaved: [H/2, 2], a pair in each row.
    cos, sin = _beside(x, cos), _beside(x, sin)
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


def by_partner(x, cos, sin, layout: Layout) -> jax.Array:
    """The same, as ``x cos`` plus what each feature gets of its partner: one loop over whole heads as they lie.

    What goes to the first features of pairs and what goes to the second are padded to whole heads and added up.
    Halves are long enough to be multiplied before that. Neighbours change places first, as bits: narrow floats
    would be added by way of wide ones.
    """
    head_dim, num_pairs = x.shape[-1], cos.shape[-1]
    step, gap = (num_pairs, 0) if layout == "half" else (1, 1)  # to a pair's second feature; between first features

    def taken(array, low):
        return lax.slice_in_dim(array, low, low + 1 + (num_pairs - 1) * (gap + 1), gap + 1, axis=-1)

    def placed(part, low):
        high = head_dim - low - num_pairs - (num_pairs - 1) * gap
        zero = jnp.zeros((), part.dtype)
        return lax.pad(part, zero, [(0, 0, 0)] * (part.ndim - 1) + [(low, high, gap)])

    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    cos, sin = (_beside(x, part).astype(dtype)[..., None, :] for part in (cos, sin))
    if layout == "half":
        first, second = (taken(x, low).astype(dtype) for low in (0, step))
        across = placed(-sin * second, 0) + placed(sin * first, step)
    else:
        bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        partner = lax.bitcast_convert_type(placed(taken(bits, step), 0) | placed(taken(bits, 0), step), x.dtype)
        across = (placed(-sin, 0) + placed(sin, step)) * partner.astype(dtype)
    along = placed(cos, 0) + placed(cos, step)
    turned = (x.astype(dtype) * along + across).astype(x.dtype)
    if 2 * num_pairs == head_dim:
        return turned
    # As bits: choosing among narrow floats, XLA for CPUs rewrites NaN.
    is_turned = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < 2 * num_pairs
    ours, theirs = (lax.bitcast_convert_type(each, f"uint{8 * x.dtype.itemsize}") for each in (turned, x))
    return lax.bitcast_convert_type(lax.select(is_turned, ours, theirs), x.dtype)


def _beside(x, part) -> jax.Array:
    """``part [..., T, R/2]`` with axes of size 1 for those that only ``x [..., T, N, H]`` has."""
    return lax.expand_dims(part, range(x.ndim - 1 - part.ndim))


def _split(x, size: int, axis: int) -> list[jax.Array]:
    """The first ``size`` entries along ``axis``, and the rest where there is one."""
    rest = x.shape[axis] - size
    return list(lax.split(x, (size, rest), axis)) if rest else [x]


# ------------------------------------------------------------------------------------------- transformations

rotate_p = Primitive("rotate")  # cos, sin and the xs to the turned xs
rotate_p.multiple_results = True


@functools.partial(jax.jit, static_argnames=("layout", "implementation"))
def _compiled(cos, sin, *xs, layout, implementation):
    return rotate_p.bind(cos, sin, *xs, layout=layout, implementation=implementation)


def _eagerly(*arguments, **how):
    return (_to_xla if jax.config.jax_disable_jit else _compiled)(*arguments, **how)  # type: ignore[attr-defined]


def _abstractly(cos, sin, *xs, layout, implementation):
    """What XLA's program would return: shardings, and what varies by device, are those of any other operation."""
    one = functools.partial(by_xla, layout=layout)
    return [jax.make_jaxpr(one)(x, cos, sin).out_avals[0] for x in xs]


def _jvp(primals, tangents, **how):
    (cos, sin, *xs), (dcos, dsin, *dxs) = primals, tangents
    turned = rotate_p.bind(cos, sin, *xs, **how)
    moving = [i for i, dx in enumerate(dxs) if type(dx) is not ad.Zero]
    if type(dcos) is type(dsin) is ad.Zero:
        return turned, _instead(dxs, moving, _some(cos, sin, dxs, moving, how))

    # Learned frequencies: x is kept, and both parts of its tangent are rounded once, together.
    dcos, dsin = ad.instantiate_zeros(dcos), ad.instantiate_zeros(dsin)
    wide = [jnp.float64 if x.dtype == jnp.float64 else jnp.float32 for x in xs]
    by_turn = [
        by_xla(_pairs_of(x.astype(w), cos), dcos, dsin, how["layout"]) for x, w in zip(xs, wide, strict=True)
    ]
    by_x = _some(cos, sin, _instead(dxs, moving, [dxs[i].astype(wide[i]) for i in moving]), moving, how)
    both = _instead(by_turn, moving, [by_turn[i] + each for i, each in zip(moving, by_x, strict=True)])
    return turned, [each.astype(x.dtype) for each, x in zip(both, xs, strict=True)]


def _instead(these, places, others) -> list:
    """The list with others at these places."""
    changed = dict(zip(places, others, strict=True))
    return [changed.get(i, each) for i, each in enumerate(these)]


def _some(cos, sin, xs, chosen, how):
    return rotate_p.bind(cos, sin, *(xs[i] for i in chosen), **how) if chosen else []


def _pairs_of(x, cos) -> jax.Array:
    """x with zeros from rotary_dim on: what passes through does not depend on the rotation."""
    turns = jnp.arange(x.shape[-1], dtype=jnp.int32) < 2 * cos.shape[-1]
    return jnp.where(turns, x, jnp.zeros_like(x))


def _transpose(cotangents, cos, sin, *xs, **how):
    if ad.is_undefined_primal(cos) or ad.is_undefined_primal(sin):
        raise NotImplementedError("rotate is transposed in x alone, not in the rotation: take jax.vjp")
    moving = [i for i, x in enumerate(xs) if ad.is_undefined_primal(x) and type(cotangents[i]) is not ad.Zero]
    back = _some(cos, -sin, cotangents, moving, how)
    # A rotation that was divided among devices where x was not has divided the cotangent.
    placed = [xs[i].aval.sharding for i in moving]
    back = [
        x if jax.typeof(x).sharding == place else jax.reshard(x, place)
        for x, place in zip(back, placed, strict=True)
    ]
    return [None, None, *_instead([None] * len(xs), moving, back)]


def _batch(arguments, axes, **how):
    (cos, sin, *xs), (cos_axis, sin_axis, *x_axes) = arguments, axes
    size = next(a.shape[axis] for a, axis in zip(arguments, axes, strict=True) if axis is not None)
    shared = cos_axis is sin_axis is None

    def to_front(array, axis):
        return jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)

    def rank(x, axis):  # of those that go together; a rotation that all share leaves alone what is not batched
        return axis is None if shared else x.ndim + (axis is None)

    out: list = [None] * len(xs)
    out_axes = [None if shared and axis is None else 0 for axis in x_axes]
    ranks = list(map(rank, xs, x_axes))
    for each in dict.fromkeys(ranks):
        chosen = [i for i in range(len(xs)) if ranks[i] == each]
        group = [xs[i] if out_axes[i] is None else to_front(xs[i], x_axes[i]) for i in chosen]
        parts = [cos, sin]
        if not shared:
            # [b, ..., T, R/2] beside [b, ..., T, N, H]: axes of size 1 stand for those that only x has.
            front = to_front(cos, cos_axis), to_front(sin, sin_axis)
            parts = [lax.expand_dims(part, range(1, group[0].ndim - part.ndim)) for part in front]
        for i, turned in zip(chosen, rotate_p.bind(*parts, *group, **how), strict=True):
            out[i] = turned
    return out, out_axes


# ---------------------------------------------------------------------------------------------------- chips


def _to_xla(cos, sin, *xs, layout, implementation):
    return [by_xla(x, cos, sin, layout) for x in xs]


def _to_cpu(cos, sin, *xs, layout, implementation):
    """Long halves of whole heads in a narrow dtype are faster as a loop over halves (benchmarks/rotate.py)."""

    def turned(x):
        whole_bytes = jnp.finfo(x.dtype).bits == 8 * x.dtype.itemsize  # else there are no bits to be put together
        halves = layout == "half" and x.shape[-1] == 2 * cos.shape[-1] >= 128 and x.dtype.itemsize < 4
        return (by_partner if whole_bytes and not halves else by_xla)(x, cos, sin, layout)

    return [turned(x) for x in xs]


def _to_kernel(cos, sin, *xs, layout, implementation):
    from rope_jax.core.kernels import tpu

    # Inside shard_map, all of one kernel varies by device as soon as one of its arrays does.
    varying = [jax.typeof(array).manual_axis_type.varying for array in (cos, sin, *xs)]
    anywhere = frozenset().union(*varying)
    cos, sin, *alike = (
        lax.pcast(array, tuple(anywhere - own), to="varying") if anywhere - own else array
        for array, own in zip((cos, sin, *xs), varying, strict=True)
    )
    return tpu.turn(alike, cos, sin, layout=layout)


def _lower_on_tpu(context, *arguments, layout, implementation):
    from rope_jax.core.kernels import tpu

    _, _, *xs = context.avals_in
    kernel = implementation != "xla"
    if kernel and _divided_by_xla(context.module_context):
        if implementation == "pallas":
            raise ValueError(
                "implementation must be None or 'xla' in a program that XLA divides among devices, got 'pallas': "
                "call it inside shard_map"
            )
        kernel = False
    if kernel and not tpu.takes(xs):
        if implementation == "pallas":
            shapes = ", ".join(x.str_short() for x in xs)
            raise ValueError(
                f"implementation must be None or 'xla' for {shapes}, got 'pallas': see rope_jax.rotate"
            )
        kernel = False
    lower = mlir.lower_fun(_to_kernel if kernel else _to_xla, multiple_results=True)
    return lower(context, *arguments, layout=layout, implementation=implementation)


def _divided_by_xla(module_context) -> bool:
    """Whether XLA itself divides the program among devices: it can divide its own operations, but no kernel."""
    axes = module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices != 1
    mesh = axes.mesh.shape
    return any(mesh[name] > 1 for name in set(mesh) - set(axes.manual_axes)) if axes.manual_axes else mesh != {}


def _lower_elsewhere(form, context, *arguments, layout, implementation):
    if implementation == "pallas":
        raise ValueError("implementation must be None or 'xla' on anything but a TPU, got 'pallas'")
    lower = mlir.lower_fun(form, multiple_results=True)
    return lower(context, *arguments, layout=layout, implementation=implementation)


rotate_p.def_impl(_eagerly)
rotate_p.def_abstract_eval(_abstractly)
ad.primitive_jvps[rotate_p] = _jvp
ad.primitive_transposes[rotate_p] = _transpose
batching.primitive_batchers[rotate_p] = _batch
mlir.register_lowering(rotate_p, functools.partial(_lower_elsewhere, _to_xla))
mlir.register_lowering(rotate_p, functools.partial(_lower_elsewhere, _to_cpu), platform="cpu")
mlir.register_lowering(rotate_p, _lower_on_tpu, platform="tpu")
