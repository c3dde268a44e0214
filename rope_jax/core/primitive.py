"""`rotate` as a JAX primitive: its derivative, transpose, batching and lowering.

Rotation is linear in x: its derivative is the rotation itself, and its transpose is the inverse rotation, computed
from cos and sin alone. Forward mode, reverse mode and any order of both hold. A primitive stays a single operation
until it is lowered for a platform: a TPU has a kernel, every other chip takes XLA's program.
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
"""The two features of a pair: i and i + R/2 (GPT-NeoX, Llama in transformers), or 2i and 2i + 1 (GPT-J)."""


def rotate_arrays(xs, cos, sin, *, layout: Layout, implementation: RotateBackend | None = None) -> list[jax.Array]:
    """Rotates each x ``[..., T, N, H]`` by ``cos, sin [..., T, R/2]``, without checks of shapes."""
    # Inside shard_map, x must vary over every mesh axis over which the rotation varies.
    varying = jax.typeof(cos).manual_axis_type.varying | jax.typeof(sin).manual_axis_type.varying
    missing = [tuple(varying - jax.typeof(x).manual_axis_type.varying) for x in xs]
    xs = [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(xs, missing, strict=True)]
    return rotate_p.bind(cos, sin, *xs, layout=layout, implementation=implementation)


# ------------------------------------------------------------------------------------------- forms for XLA


def rotate_by_pairs(x, cos, sin, layout: Layout) -> jax.Array:
    """Splits x into first and second features of pairs; XLA compiles a single loop, without copy or transpose."""
    *leading, length, _, head_dim = x.shape
    num_pairs = cos.shape[-1]

    # A pair lies along `axis` of a view of the features, so that no copy and no transpose is needed.
    # half: [H/g, g], with the first R/2 features in `rows` rows of g and their partners in the next `rows` rows;
    # interleaved: [H/2, 2], with a pair in each row.
    cos, sin = _match_rank(x, cos), _match_rank(x, sin)
    if layout == "half":
        columns = math.gcd(num_pairs, head_dim)
        rows, axis = num_pairs // columns, x.ndim - 1
        cos, sin = (part.reshape(*part.shape[:-1], 1, rows, columns) for part in (cos, sin))
        rotary_rows = 2 * rows
    else:
        columns, rows, axis = 2, 1, x.ndim
        cos, sin = (part[..., None, :, None] for part in (cos, sin))
        rotary_rows = num_pairs

    view = x.reshape(*leading, length, x.shape[-2], head_dim // columns, columns)
    pairs, *unrotated = _split_at(view, rotary_rows, x.ndim - 1)
    first, second = lax.split(pairs, (rows, rows), axis)

    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    first, second, cos, sin = (part.astype(dtype) for part in (first, second, cos, sin))
    rotated = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
    if layout == "half":
        return lax.concatenate([*rotated, *unrotated], axis).reshape(x.shape)
    return lax.concatenate([lax.concatenate(rotated, axis), *unrotated], axis - 1).reshape(x.shape)


def rotate_by_partners(x, cos, sin, layout: Layout) -> jax.Array:
    """Adds to ``x cos`` the partner of each feature times sin: a single loop over contiguous heads.

    The parts for first and for second features are padded to whole heads and added. Halves are long enough to be
    multiplied before padding. Interleaved features are swapped first, as bits: XLA adds narrow floats in float32.
    """
    head_dim, num_pairs = x.shape[-1], cos.shape[-1]
    step, gap = (num_pairs, 0) if layout == "half" else (1, 1)  # to a pair's second feature; between first features

    def select_pairs(array, start):
        return lax.slice_in_dim(array, start, start + 1 + (num_pairs - 1) * (gap + 1), gap + 1, axis=-1)

    def pad_to_head(part, start):
        end = head_dim - start - num_pairs - (num_pairs - 1) * gap
        zero = jnp.zeros((), part.dtype)
        return lax.pad(part, zero, [(0, 0, 0)] * (part.ndim - 1) + [(start, end, gap)])

    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    cos, sin = (_match_rank(x, part).astype(dtype)[..., None, :] for part in (cos, sin))
    if layout == "half":
        first, second = (select_pairs(x, start).astype(dtype) for start in (0, step))
        partner_times_sin = pad_to_head(-sin * second, 0) + pad_to_head(sin * first, step)
    else:
        bits = _bits(x)
        partner_bits = pad_to_head(select_pairs(bits, step), 0) | pad_to_head(select_pairs(bits, 0), step)
        partner = lax.bitcast_convert_type(partner_bits, x.dtype)
        partner_times_sin = (pad_to_head(-sin, 0) + pad_to_head(sin, step)) * partner.astype(dtype)
    head_cos = pad_to_head(cos, 0) + pad_to_head(cos, step)
    rotated = (x.astype(dtype) * head_cos + partner_times_sin).astype(x.dtype)
    if 2 * num_pairs == head_dim:
        return rotated
    # As bits: selecting among narrow floats, XLA for CPUs rewrites NaN.
    is_rotary = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < 2 * num_pairs
    return lax.bitcast_convert_type(lax.select(is_rotary, _bits(rotated), _bits(x)), x.dtype)


def _bits(x) -> jax.Array:
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def _match_rank(x, part) -> jax.Array:
    """``part [..., T, R/2]`` with leading axes of size 1, as many as ``x [..., T, N, H]`` has before T."""
    return lax.expand_dims(part, range(x.ndim - 1 - part.ndim))


def _split_at(x, size: int, axis: int) -> list[jax.Array]:
    """The first ``size`` entries along ``axis``, and the rest unless empty."""
    rest = x.shape[axis] - size
    return list(lax.split(x, (size, rest), axis)) if rest else [x]


# ------------------------------------------------------------------------------------------- transformations

rotate_p = Primitive("rotate")  # cos, sin, *xs -> the rotated xs
rotate_p.multiple_results = True


@functools.partial(jax.jit, static_argnames=("layout", "implementation"))
def _jitted(cos, sin, *xs, layout, implementation):
    return rotate_p.bind(cos, sin, *xs, layout=layout, implementation=implementation)


def _impl(*arguments, **options):
    return (_rotate_with_xla if jax.config.jax_disable_jit else _jitted)(*arguments, **options)  # type: ignore[attr-defined]


def _abstract_eval(cos, sin, *xs, layout, implementation):
    """The types of XLA's program, so that shardings and varying mesh axes follow from ordinary operations."""
    rotate_one = functools.partial(rotate_by_pairs, layout=layout)
    return [jax.make_jaxpr(rotate_one)(x, cos, sin).out_avals[0] for x in xs]


def _jvp(primals, tangents, **options):
    (cos, sin, *xs), (dcos, dsin, *dxs) = primals, tangents
    rotated = rotate_p.bind(cos, sin, *xs, **options)
    active = [i for i, dx in enumerate(dxs) if type(dx) is not ad.Zero]
    if type(dcos) is type(dsin) is ad.Zero:
        return rotated, _replace(dxs, active, _rotate_some(cos, sin, dxs, active, options))

    # Learned frequencies: x is saved, and the sum of both parts of its tangent is rounded once.
    dcos, dsin = ad.instantiate_zeros(dcos), ad.instantiate_zeros(dsin)
    wide = [jnp.float64 if x.dtype == jnp.float64 else jnp.float32 for x in xs]
    out_tangents = [
        rotate_by_pairs(_zero_unrotated(x.astype(dtype), cos), dcos, dsin, options["layout"])
        for x, dtype in zip(xs, wide, strict=True)
    ]
    wide_dxs = _replace(dxs, active, [dxs[i].astype(wide[i]) for i in active])
    rotated_dxs = _rotate_some(cos, sin, wide_dxs, active, options)
    sums = [out_tangents[i] + rotated_dx for i, rotated_dx in zip(active, rotated_dxs, strict=True)]
    out_tangents = _replace(out_tangents, active, sums)
    return rotated, [tangent.astype(x.dtype) for tangent, x in zip(out_tangents, xs, strict=True)]


def _replace(items, indices, replacements) -> list:
    """The list with the items at ``indices`` replaced."""
    by_index = dict(zip(indices, replacements, strict=True))
    return [by_index.get(i, item) for i, item in enumerate(items)]


def _rotate_some(cos, sin, xs, indices, options) -> list:
    return rotate_p.bind(cos, sin, *(xs[i] for i in indices), **options) if indices else []


def _zero_unrotated(x, cos) -> jax.Array:
    """x with zeros from rotary_dim on, since those features do not depend on the rotation."""
    is_rotary = jnp.arange(x.shape[-1], dtype=jnp.int32) < 2 * cos.shape[-1]
    return jnp.where(is_rotary, x, jnp.zeros_like(x))


def _transpose(cotangents, cos, sin, *xs, **options):
    if ad.is_undefined_primal(cos) or ad.is_undefined_primal(sin):
        raise NotImplementedError("rotate is transposed in x alone, not in the rotation: take jax.vjp")
    active = [i for i, x in enumerate(xs) if ad.is_undefined_primal(x) and type(cotangents[i]) is not ad.Zero]
    x_cotangents = _rotate_some(cos, -sin, cotangents, active, options)
    # A sharded rotation shards the cotangent, even if x is not sharded: give it back the sharding of x.
    shardings = [xs[i].aval.sharding for i in active]
    x_cotangents = [
        x if jax.typeof(x).sharding == sharding else jax.reshard(x, sharding)
        for x, sharding in zip(x_cotangents, shardings, strict=True)
    ]
    return [None, None, *_replace([None] * len(xs), active, x_cotangents)]


def _batch(arguments, axes, **options):
    (cos, sin, *xs), (cos_axis, sin_axis, *x_axes) = arguments, axes
    size = next(a.shape[axis] for a, axis in zip(arguments, axes, strict=True) if axis is not None)
    shared_rotation = cos_axis is sin_axis is None

    def to_front(array, axis):
        return jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)

    # Arrays of equal key are rotated together. With a shared rotation, an unbatched x stays unbatched.
    def group_key(x, axis):
        return axis is None if shared_rotation else x.ndim + (axis is None)

    out: list = [None] * len(xs)
    out_axes = [None if shared_rotation and axis is None else 0 for axis in x_axes]
    keys = list(map(group_key, xs, x_axes))
    for key in dict.fromkeys(keys):
        members = [i for i in range(len(xs)) if keys[i] == key]
        group = [xs[i] if out_axes[i] is None else to_front(xs[i], x_axes[i]) for i in members]
        parts = [cos, sin]
        if not shared_rotation:
            # [b, ..., T, R/2] against [b, ..., T, N, H]: axes of size 1 go between b and the axes of the rotation.
            batched = to_front(cos, cos_axis), to_front(sin, sin_axis)
            parts = [lax.expand_dims(part, range(1, group[0].ndim - part.ndim)) for part in batched]
        for i, rotated in zip(members, rotate_p.bind(*parts, *group, **options), strict=True):
            out[i] = rotated
    return out, out_axes


# -------------------------------------------------------------------------------------------------- lowering


def _rotate_with_xla(cos, sin, *xs, layout, implementation):
    return [rotate_by_pairs(x, cos, sin, layout) for x in xs]


def _rotate_on_cpu(cos, sin, *xs, layout, implementation):
    """Fully rotated heads of long halves in a narrow dtype are faster by pairs (benchmarks/rotate.py)."""

    def rotate_one(x):
        has_bits = jnp.finfo(x.dtype).bits == 8 * x.dtype.itemsize  # else no unsigned integer has its bits
        long_halves = layout == "half" and x.shape[-1] == 2 * cos.shape[-1] >= 128 and x.dtype.itemsize < 4
        form = rotate_by_partners if has_bits and not long_halves else rotate_by_pairs
        return form(x, cos, sin, layout)

    return [rotate_one(x) for x in xs]


def _rotate_with_kernel(cos, sin, *xs, layout, implementation):
    from rope_jax.core.kernels import tpu

    # Inside shard_map, all arrays of a kernel must vary over the same mesh axes.
    varying = [jax.typeof(array).manual_axis_type.varying for array in (cos, sin, *xs)]
    union = frozenset().union(*varying)
    cos, sin, *aligned_xs = (
        lax.pcast(array, tuple(union - axes), to="varying") if union - axes else array
        for array, axes in zip((cos, sin, *xs), varying, strict=True)
    )
    return tpu.rotate(aligned_xs, cos, sin, layout=layout)


def _lower_on_tpu(context, *arguments, layout, implementation):
    from rope_jax.core.kernels import tpu

    _, _, *xs = context.avals_in
    use_kernel = implementation != "xla"
    if use_kernel and is_partitioned_by_xla(context.module_context):
        if implementation == "pallas":
            raise ValueError(
                "implementation must be None or 'xla' in a program that XLA divides among devices, got 'pallas': "
                "call rotate inside shard_map"
            )
        use_kernel = False
    if use_kernel and not tpu.supports(xs):
        if implementation == "pallas":
            shapes = ", ".join(x.str_short() for x in xs)
            raise ValueError(
                f"implementation must be None or 'xla' for {shapes}, got 'pallas': "
                "the docstring of rope_jax.rotate lists the shapes and dtypes of the kernel"
            )
        use_kernel = False
    lower = mlir.lower_fun(_rotate_with_kernel if use_kernel else _rotate_with_xla, multiple_results=True)
    return lower(context, *arguments, layout=layout, implementation=implementation)


def is_partitioned_by_xla(module_context) -> bool:
    """True if XLA divides the program among devices: XLA can divide its own operations, but no kernel."""
    axes = module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices != 1
    mesh = axes.mesh.shape
    return any(mesh[name] > 1 for name in set(mesh) - set(axes.manual_axes)) if axes.manual_axes else mesh != {}


def _lower_without_kernel(program, context, *arguments, layout, implementation):
    if implementation == "pallas":
        raise ValueError("implementation must be None or 'xla' on anything but a TPU, got 'pallas'")
    lower = mlir.lower_fun(program, multiple_results=True)
    return lower(context, *arguments, layout=layout, implementation=implementation)


rotate_p.def_impl(_impl)
rotate_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[rotate_p] = _jvp
ad.primitive_transposes[rotate_p] = _transpose
batching.primitive_batchers[rotate_p] = _batch
mlir.register_lowering(rotate_p, functools.partial(_lower_without_kernel, _rotate_with_xla))
mlir.register_lowering(rotate_p, functools.partial(_lower_without_kernel, _rotate_on_cpu), platform="cpu")
mlir.register_lowering(rotate_p, _lower_on_tpu, platform="tpu")
