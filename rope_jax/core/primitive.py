"""`rotate` as a JAX primitive: its derivative, transpose, batching and lowering.

Rotation is linear in x: its derivative is the rotation itself, and its transpose is the inverse rotation, computed
from cos and sin alone. Forward mode, reverse mode and any order of both hold. A primitive stays a single operation
until it is lowered for a platform: a TPU has a kernel, every other chip takes XLA's program.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._jax_internals import (
    Primitive,
    ad,
    batching,
    is_jit_disabled,
    is_partitioned_by_xla,
    mlir,
    varying_axes,
)
from rope_jax.core.whole import keep_whole

RotateBackend = Literal["xla", "pallas", "plain"]
Layout = Literal["half", "interleaved"]
"""The two features of a pair: i and i + R/2 (GPT-NeoX, Llama in transformers), or 2i and 2i + 1 (GPT-J)."""


def rotate_arrays(
    xs, cos, sin, *, layout: Layout, start: int = 0, implementation: RotateBackend | None = None
) -> list[jax.Array]:
    """Rotates each x ``[..., T, N, H]`` by ``cos, sin [..., T, R/2]`` from feature ``start`` on, without checks."""
    # Inside shard_map, x must vary over every mesh axis over which the rotation varies.
    varying = varying_axes(cos) | varying_axes(sin)
    missing = [tuple(varying - varying_axes(x)) for x in xs]
    xs = [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(xs, missing, strict=True)]
    if implementation == "plain":
        return [rotate_by_parts(x, cos, sin, layout, start) for x in xs]
    return rotate_p.bind(cos, sin, *xs, layout=layout, start=start, implementation=implementation)


def unify_varying_axes(*arrays) -> list[jax.Array]:
    """Casts all arrays to vary along the same manual mesh axes of shard_map: the union of their axes."""
    axes_of_each = [varying_axes(array) for array in arrays]
    union = frozenset().union(*axes_of_each)
    return [
        lax.pcast(array, tuple(union - axes), to="varying") if union - axes else array
        for array, axes in zip(arrays, axes_of_each, strict=True)
    ]


def unify_varying(tree):
    """The tree with all its arrays varying alike: the start of a loop, whose results vary as its operands do."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, unify_varying_axes(*leaves))


# ------------------------------------------------------------------------------------------- forms for XLA


def rotate_by_parts(x, cos, sin, layout: Layout, start: int = 0) -> jax.Array:
    """Slices the first and the second features of all pairs out of the heads, and joins their rotations."""
    num_pairs, axis = cos.shape[-1], x.ndim - 1
    rotary_dim, dtype = 2 * num_pairs, wide_dtype(x)
    cos, sin = (_match_rank(x, part).astype(dtype)[..., None, :] for part in (cos, sin))
    # Widened before it is sliced: XLA for GPUs then reads more features at once.
    second_start, stride = (num_pairs, 1) if layout == "half" else (1, 2)
    first, second = (
        lax.slice_in_dim(x.astype(dtype), begin, begin + stride * (num_pairs - 1) + 1, stride, axis)
        for begin in (start, start + second_start)
    )
    rotated = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
    if layout == "interleaved":
        pairs = lax.concatenate([part[..., None] for part in rotated], x.ndim)
        rotated = [pairs.reshape(*x.shape[:-1], rotary_dim)]
    return join_unrotated(x, rotated, start, rotary_dim)


def join_unrotated(x, rotated: list, start: int, rotary_dim: int) -> jax.Array:
    """Rotated features from ``start`` on, between the features of x that are not rotated."""
    axis, like = x.ndim - 1, rotated[0]
    if start:
        rotated = [_shard_like(lax.slice_in_dim(x, 0, start, axis=axis), like), *rotated]
    if start + rotary_dim < x.shape[-1]:
        rotated = [*rotated, _shard_like(lax.slice_in_dim(x, start + rotary_dim, None, axis=axis), like)]
    return lax.concatenate(rotated, axis) if len(rotated) > 1 else like


def rotate_by_partners(x, cos, sin, start: int = 0) -> jax.Array:
    """Adds to ``x cos`` the partner of each feature times sin: interleaved pairs, without a shorter axis than H.

    Partners are swapped as bits: XLA adds narrow floats in float32.
    """
    head_dim, num_pairs, dtype = x.shape[-1], cos.shape[-1], wide_dtype(x)

    def pad_to_head(part, feature):  # 0 or 1, of each pair
        zero, begin = jnp.zeros((), part.dtype), start + feature
        end = head_dim - begin - 2 * num_pairs + 1
        return lax.pad(part, zero, [(0, 0, 0)] * (part.ndim - 1) + [(begin, end, 1)])

    cos, sin = (_match_rank(x, part).astype(dtype)[..., None, :] for part in (cos, sin))
    bits = _bits(x)
    first, second = (
        lax.slice_in_dim(bits, begin, begin + 2 * num_pairs - 1, 2, axis=x.ndim - 1) for begin in (start, start + 1)
    )
    partner = lax.bitcast_convert_type(pad_to_head(second, 0) | pad_to_head(first, 1), x.dtype)
    head_cos = pad_to_head(cos, 0) + pad_to_head(cos, 1)
    head_sin = pad_to_head(-sin, 0) + pad_to_head(sin, 1)
    rotated = (x.astype(dtype) * head_cos + partner.astype(dtype) * head_sin).astype(x.dtype)
    if 2 * num_pairs == head_dim:
        return rotated
    feature = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    is_rotary = (feature >= start) & (feature < start + 2 * num_pairs)
    return jnp.where(is_rotary, rotated, _shard_like(x, rotated))


def rotate_in_one_loop(x, cos, sin, layout: Layout, start: int = 0) -> jax.Array:
    """Rotates pairs along an axis of their own: XLA for CPUs compiles a single vectorised loop over the result.

    Any form that joins features becomes a loop for each part, over all of x. The call stays whole because XLA would
    fuse the last reshape into the loop: an index of the head in place of pair and feature is not vectorised.
    """
    num_pairs, head_dim = cos.shape[-1], x.shape[-1]
    rotary_dim, dtype = 2 * num_pairs, wide_dtype(x)
    # A head is rotary_dim features several times over, of which one block is rotated. Else x is cut and joined.
    whole = head_dim % rotary_dim == start % rotary_dim == 0
    blocks, rotated_block, begin = (head_dim // rotary_dim, start // rotary_dim, 0) if whole else (1, 0, start)

    @keep_whole
    def rotate_pairs(x, cos, sin):
        # Of x: [..., T, N, blocks, 2, R/2] for half, [..., T, N, blocks, R/2, 2] for interleaved.
        sizes = (2, num_pairs) if layout == "half" else (num_pairs, 2)
        axis = x.ndim if layout == "half" else x.ndim + 1
        pairs = lax.slice_in_dim(x, begin, begin + blocks * rotary_dim, axis=x.ndim - 1)
        pairs = pairs.reshape(*x.shape[:-1], blocks, *sizes)
        first, second = (part.astype(dtype) for part in lax.split(pairs, (1, 1), axis))
        cos, sin = (lax.expand_dims(part.astype(dtype), (x.ndim - 2, x.ndim - 1)) for part in (cos, sin))
        cos, sin = jnp.expand_dims(cos, axis), jnp.expand_dims(sin, axis)
        # The same sums in both layouts, so that XLA contracts them alike: their results are equal bit for bit.
        both = [first * cos - second * sin, second * cos + first * sin]
        sharding, axes = jax.typeof(both[0]).sharding, range(pairs.ndim)
        both = [lax.broadcast_in_dim(part, pairs.shape, axes, out_sharding=sharding) for part in both]
        in_pair = lax.broadcasted_iota(jnp.int32, pairs.shape, axis, out_sharding=sharding)
        rotated = lax.select(in_pair == 0, *both).astype(x.dtype)
        if blocks == 1:
            return rotated
        block = lax.broadcasted_iota(jnp.int32, pairs.shape, x.ndim - 1, out_sharding=sharding)
        unrotated = _shard_like(_narrow_bits(x).reshape(pairs.shape), rotated)
        selected = lax.select(block == rotated_block, _narrow_bits(rotated), unrotated)
        return lax.bitcast_convert_type(selected, x.dtype)

    pairs = rotate_pairs(x, _match_rank(x, cos), _match_rank(x, sin))
    if whole:
        return pairs.reshape(x.shape)
    rotated = _narrow_bits(pairs.reshape(*x.shape[:-1], rotary_dim))
    return lax.bitcast_convert_type(join_unrotated(_narrow_bits(x), [rotated], start, rotary_dim), x.dtype)


def wide_dtype(x):
    """The dtype that products and sums over x are computed in."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _has_bits(x) -> bool:
    """True if an unsigned integer holds the bits of x: of dtypes under a byte, it is not known."""
    return jnp.finfo(x.dtype).bits == 8 * x.dtype.itemsize


def _bits(x) -> jax.Array:
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def _narrow_bits(x) -> jax.Array:
    """x, as bits if narrow: moving narrow floats, XLA for CPUs rewrites NaN."""
    return _bits(x) if x.dtype.itemsize < 4 and _has_bits(x) else x


def _shard_like(x, rotated) -> jax.Array:
    """x, sharded as a sharded rotation shards its result, even if x is not sharded."""
    sharding = jax.typeof(rotated).sharding
    return x if jax.typeof(x).sharding == sharding else jax.reshard(x, sharding)


def _match_rank(x, part) -> jax.Array:
    """``part [..., T, R/2]`` with leading axes of size 1, as many as ``x [..., T, N, H]`` has before T."""
    return lax.expand_dims(part, range(x.ndim - 1 - part.ndim))


# ------------------------------------------------------------------------------------------- transformations

rotate_p = Primitive("rotate")  # cos, sin, *xs -> the rotated xs
rotate_p.multiple_results = True


@functools.partial(jax.jit, static_argnames=("layout", "start", "implementation"))
def _jitted(cos, sin, *xs, **options):
    return rotate_p.bind(cos, sin, *xs, **options)


def _impl(*arguments, **options):
    return (_rotate_with_xla if is_jit_disabled() else _jitted)(*arguments, **options)


def _abstract_eval(cos, sin, *xs, layout, start, implementation):
    """The types of XLA's program, so that shardings and varying mesh axes follow from ordinary operations."""
    rotate_one = functools.partial(rotate_by_parts, layout=layout, start=start)
    return [jax.make_jaxpr(rotate_one)(x, cos, sin).out_avals[0] for x in xs]


def _jvp(primals, tangents, **options):
    (cos, sin, *xs), (dcos, dsin, *dxs) = primals, tangents
    rotated = rotate_p.bind(cos, sin, *xs, **options)
    active = [i for i, dx in enumerate(dxs) if type(dx) is not ad.Zero]
    if type(dcos) is type(dsin) is ad.Zero:
        return rotated, _replace(dxs, active, _rotate_some(cos, sin, dxs, active, options))

    # Learned frequencies: x is saved, and the sum of both parts of its tangent is rounded once.
    dcos, dsin = ad.instantiate_zeros(dcos), ad.instantiate_zeros(dsin)
    wide, start = [wide_dtype(x) for x in xs], options["start"]
    out_tangents = [
        rotate_by_parts(_zero_unrotated(x.astype(dtype), cos, start), dcos, dsin, options["layout"], start)
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


def _zero_unrotated(x, cos, start: int) -> jax.Array:
    """x with zeros outside of the R features from ``start`` on, since those do not depend on the rotation."""
    feature = jnp.arange(x.shape[-1], dtype=jnp.int32)
    is_rotary = (feature >= start) & (feature < start + 2 * cos.shape[-1])
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


def _rotate_with_xla(cos, sin, *xs, layout, start, implementation, swaps_partial_heads=False):
    """Swaps the partners of interleaved pairs: a TPU keeps the layout of heads, a GPU moves more of them at once.

    A GPU would read partial heads feature by feature.
    """

    def rotate_one(x):
        swaps = layout == "interleaved" and (swaps_partial_heads or 2 * cos.shape[-1] == x.shape[-1])
        if swaps and _has_bits(x) and x.dtype != jnp.float64:  # XLA for TPUs knows no bits of float64
            return rotate_by_partners(x, cos, sin, start)
        return rotate_by_parts(x, cos, sin, layout, start)

    return [rotate_one(x) for x in xs]


def _rotate_on_cpu(cos, sin, *xs, layout, start, implementation):
    return [rotate_in_one_loop(x, cos, sin, layout, start) for x in xs]


def _rotate_with_kernel(cos, sin, *xs, layout, start, implementation):
    from rope_jax.core.kernels import tpu

    # Inside shard_map, all arrays of a kernel must vary over the same mesh axes.
    cos, sin, *aligned_xs = unify_varying_axes(cos, sin, *xs)
    return tpu.rotate(aligned_xs, cos, sin, layout=layout)


def _lower_on_tpu(context, *arguments, layout, start, implementation):
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
    if use_kernel and (start or not tpu.supports(xs)):
        if implementation == "pallas":
            shapes = ", ".join(x.str_short() for x in xs)
            raise ValueError(
                f"implementation must be None or 'xla' for {shapes}, got 'pallas': "
                "the docstring of rope_jax.rotate lists the shapes and dtypes of the kernel"
            )
        use_kernel = False
    program = _rotate_with_kernel if use_kernel else functools.partial(_rotate_with_xla, swaps_partial_heads=True)
    lower = mlir.lower_fun(program, multiple_results=True)
    return lower(context, *arguments, layout=layout, start=start, implementation=implementation)


def _lower_without_kernel(program, context, *arguments, layout, start, implementation):
    if implementation == "pallas":
        raise ValueError("implementation must be None or 'xla' on anything but a TPU, got 'pallas'")
    lower = mlir.lower_fun(program, multiple_results=True)
    return lower(context, *arguments, layout=layout, start=start, implementation=implementation)


rotate_p.def_impl(_impl)
rotate_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[rotate_p] = _jvp
ad.primitive_transposes[rotate_p] = _transpose
batching.primitive_batchers[rotate_p] = _batch
mlir.register_lowering(rotate_p, functools.partial(_lower_without_kernel, _rotate_with_xla))
mlir.register_lowering(rotate_p, functools.partial(_lower_without_kernel, _rotate_on_cpu), platform="cpu")
mlir.register_lowering(rotate_p, _lower_on_tpu, platform="tpu")
