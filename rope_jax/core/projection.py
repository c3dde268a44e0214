"""Products of activations and kernels for decoding: weights in bfloat16 or float16 are read once, as they are.

XLA for CPUs widens such weights to float32 before a product that rounds to their dtype, and before a product of a
single row. It writes and reads six bytes for each byte of the weights.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rope_jax.core.primitive import is_partitioned_by_xla

# Terms of a partial sum. XLA for CPUs computes a widened kernel before the sum if more terms read it.
MAX_TERMS = 12
MIN_TERMS = 4
LAYER_AXIS = 0


def dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None) -> jax.Array:
    """As :func:`jax.lax.dot_general`, for programs that are not trained: the ``dot_general`` of a dense layer.

    Sums are float32 and are rounded once. On a CPU, no float32 copy of the kernel is made. On other platforms, and
    if XLA divides the program among devices, it is :func:`jax.lax.dot_general`.

    Args:
      x: activations.
      kernel: weights.
      dimension_numbers: axes that are summed over, and axes of batches, of which there must be none.
      precision: see :func:`jax.lax.dot_general`.
      preferred_element_type: dtype of the result; by default that of x.
    """
    options = dict(
        dimension_numbers=dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
    )
    narrow = x.dtype == kernel.dtype and kernel.dtype in (jnp.bfloat16, jnp.float16)
    _, (x_batch, kernel_batch) = dimension_numbers
    if not narrow or x_batch or kernel_batch:
        return lax.dot_general(x, kernel, **options)
    (x_axes, kernel_axes), _ = dimension_numbers
    if preferred_element_type == jnp.float32 and not _is_row(x, x_axes):
        return lax.dot_general(x, kernel, **options)  # XLA for CPUs reads such kernels as they are
    options["dimension_numbers"] = (tuple(x_axes), tuple(kernel_axes)), ((), ())
    return project_p.bind(x, kernel, **options)


def _is_row(x, x_axes) -> bool:
    """Whether x has the size 1 along all axes that are not summed over."""
    return all(isinstance(n, int) and n == 1 for axis, n in enumerate(x.shape) if axis not in x_axes)


def take_layer(stack, layer) -> jax.Array:
    """Layer ``int32 []`` of weights ``[layers, ...]``, in a loop over layers.

    On a CPU, XLA would move the widening of all layers out of the loop, unless it must expect other weights in each
    step.
    """

    def take(stack, layer):
        return lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)

    def take_on_cpu(stack, layer):
        return take(*lax.optimization_barrier((stack, layer)))

    return lax.platform_dependent(stack, layer, cpu=take_on_cpu, default=take)


# ----------------------------------------------------------------------------------------------------- on a CPU


def _project_on_cpu(x, kernel, *, dimension_numbers, precision, preferred_element_type) -> jax.Array:
    (x_axes, kernel_axes), _ = dimension_numbers
    dtype = preferred_element_type or x.dtype
    summed = [kernel.shape[axis] for axis in kernel_axes]
    by_parts = None
    if _is_row(x, x_axes):
        if tuple(kernel_axes) == tuple(range(len(kernel_axes))):
            by_parts = _sum_of_rows
        elif tuple(kernel_axes) == (kernel.ndim - 1,):
            by_parts = _sums_of_columns
    terms = _num_terms(math.prod(summed)) if by_parts else 0
    if by_parts is None or terms < MIN_TERMS:
        options = dict(precision=precision, preferred_element_type=jnp.float32)
        return lax.dot_general(x, kernel, dimension_numbers, **options).astype(dtype)
    row = jnp.transpose(x, [a for a in range(x.ndim) if a not in x_axes] + list(x_axes)).reshape(-1)
    shape = [n for a, n in enumerate(x.shape) if a not in x_axes]
    shape += [n for a, n in enumerate(kernel.shape) if a not in kernel_axes]
    return by_parts(row.astype(jnp.float32), kernel, terms).reshape(shape).astype(dtype)


def _num_terms(size: int) -> int:
    """The largest divisor of size which is at most ``MAX_TERMS``."""
    return max((n for n in range(1, MAX_TERMS + 1) if size % n == 0), default=1)


def _sum_of_rows(row, kernel, terms: int) -> jax.Array:
    """``row [D]`` times ``kernel [D, F]``: partial sums ``[D / terms, F]``, then their sum."""
    size = row.shape[0] // terms

    def partial_sums(row, kernel):
        rows, kernels = row.reshape(size, terms), _bits(kernel).reshape(size, terms, -1)
        return _add([rows[:, i, None] * _widen(kernels[:, i], kernel.dtype) for i in range(terms)])

    return _whole(partial_sums, row, kernel).sum(0)


def _sums_of_columns(row, kernel, terms: int) -> jax.Array:
    """``kernel [F, D]`` times ``row [D]``: partial sums ``[F, D / terms]``, then their sums."""
    size = row.shape[0] // terms

    def partial_sums(row, kernel):
        rows, kernels = row.reshape(terms, size), _bits(kernel).reshape(-1, terms, size)
        return _add([rows[i] * _widen(kernels[:, i], kernel.dtype) for i in range(terms)])

    return _whole(partial_sums, row, kernel).sum(-1)


def _add(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(lambda a, b: a + b, parts)


def _bits(kernel) -> jax.Array:
    """A bfloat16 kernel as uint16: XLA for CPUs takes slices of bfloat16 by way of float32, and rounds again."""
    return lax.bitcast_convert_type(kernel, jnp.uint16) if kernel.dtype == jnp.bfloat16 else kernel


def _widen(bits, dtype) -> jax.Array:
    """float32 numbers, from the bits of bfloat16 or from float16."""
    if dtype != jnp.bfloat16:
        return bits.astype(jnp.float32)
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def _whole(program, *operands) -> jax.Array:
    """Calls a program which XLA does not fuse with its callers."""

    @jax.jit
    def call(*operands):
        with set_xla_metadata(inlineable=None):  # only this call stays whole
            return program(*operands)

    with set_xla_metadata(inlineable="false"):
        return call(*operands)


# ----------------------------------------------------------------------------------------------- transformations

project_p = Primitive("project")  # x, kernel -> their product


@functools.partial(jax.jit, static_argnames=("dimension_numbers", "precision", "preferred_element_type"))
def _jitted(x, kernel, **options):
    return project_p.bind(x, kernel, **options)


def _impl(x, kernel, **options):
    program = lax.dot_general if jax.config.jax_disable_jit else _jitted  # type: ignore[attr-defined]
    return program(x, kernel, **options)


def _jvp(primals, tangents, **options):
    out = project_p.bind(*primals, **options)
    active = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_active(*some):
        return lax.dot_general(*(some[active.index(i)] if i in active else primals[i] for i in (0, 1)), **options)

    return out, jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])[1]


def _transpose(cotangent, x, kernel, **options):
    if type(cotangent) is ad.Zero:
        return [None, None]
    if ad.is_undefined_primal(x):
        return jax.linear_transpose(lambda x: lax.dot_general(x, kernel, **options), x.aval)(cotangent)[0], None
    return None, jax.linear_transpose(lambda k: lax.dot_general(x, k, **options), kernel.aval)(cotangent)[0]


def _batch(operands, axes, *, dimension_numbers, **options):
    (x, kernel), (x_axis, kernel_axis) = operands, axes
    if kernel_axis is None:  # more rows
        (x_axes, kernel_axes), _ = dimension_numbers
        numbers = (tuple(axis + 1 for axis in x_axes), kernel_axes), ((), ())
        return project_p.bind(jnp.moveaxis(x, x_axis, 0), kernel, dimension_numbers=numbers, **options), 0
    plain = functools.partial(lax.dot_general, dimension_numbers=dimension_numbers, **options)
    return jax.vmap(plain, (x_axis, kernel_axis))(x, kernel), 0


def _lower_on_cpu(context, x, kernel, **options):
    divided = is_partitioned_by_xla(context.module_context)
    program = lax.dot_general if divided else _project_on_cpu
    return mlir.lower_fun(program, multiple_results=False)(context, x, kernel, **options)


def _abstract_eval(x, kernel, **options):
    """The type of the ordinary product, so that shardings and varying mesh axes follow from it."""
    return jax.make_jaxpr(functools.partial(lax.dot_general, **options))(x, kernel).out_avals[0]


project_p.def_impl(_impl)
project_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[project_p] = _jvp
ad.primitive_transposes[project_p] = _transpose
batching.primitive_batchers[project_p] = _batch
mlir.register_lowering(project_p, mlir.lower_fun(lax.dot_general, multiple_results=False))
mlir.register_lowering(project_p, _lower_on_cpu, platform="cpu")
