"""Products of activations and kernels for decoding: weights in bfloat16 or float16 are read once, as they are.

XLA for CPUs widens such weights to float32 before a product that rounds to their dtype, and before a product of a
single row. It writes and reads six bytes for each byte of the weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._jax_internals import Primitive, ad, batching, is_jit_disabled, mlir
from rope_jax.core.primitive import is_partitioned_by_xla
from rope_jax.core.whole import keep_whole

# Terms of a partial sum. XLA for CPUs computes a widened kernel before the sum if more terms read it.
MAX_TERMS = 12
MIN_TERMS = 4
MIN_WEIGHTS = 2**15  # of a kernel that is multiplied by parts; smaller ones stay in the processor's caches


def dot_general(
    x, kernel, dimension_numbers, precision=None, preferred_element_type=None, *, stack=None, layer=None
) -> jax.Array:
    """As :func:`jax.lax.dot_general`, for programs that are not trained: the ``dot_general`` of a dense layer.

    Sums are float32 and are rounded once. On a CPU, no float32 copy of the kernel is made. On other platforms, and
    if XLA divides the program among devices, it is :func:`jax.lax.dot_general`.

    Args:
      x: activations.
      kernel: weights.
      dimension_numbers: axes that are summed over, and axes of batches.
      precision: see :func:`jax.lax.dot_general`.
      preferred_element_type: dtype of the result; by default that of x.
      stack: the kernels of all layers ``[layers, ...]``, if the kernel is one of these: a CPU multiplies a single
        row by it in place.
      layer: int32 ``[]``, the layer of the stack.
    """
    options = dict(precision=precision, preferred_element_type=preferred_element_type)
    (x_axes, kernel_axes), (x_batch, kernel_batch) = dimension_numbers
    is_row = all(isinstance(n, int) and n == 1 for axis, n in enumerate(x.shape) if axis not in x_axes)
    narrow = kernel.dtype in (jnp.bfloat16, jnp.float16)
    in_place = is_row and stack is not None and kernel.dtype == jnp.float32
    # XLA for CPUs reads narrow kernels as they are, if there are several rows and the result is float32.
    as_they_are = narrow and (is_row or preferred_element_type != jnp.float32)
    if not (in_place or as_they_are) or x.dtype != kernel.dtype or x_batch or kernel_batch:
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    options["dimension_numbers"] = (tuple(x_axes), tuple(kernel_axes)), ((), ())
    of_stack = () if stack is None or not is_row else (stack, layer)
    return project_p.bind(x, *(of_stack or (kernel,)), **options)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerProduct:
    """:func:`dot_general` in a loop over layers, for the kernels of one layer.

    Attributes:
      stacks: kernels of all layers ``[layers, ...]``.
      taken: the kernel of the layer for each stack, of :func:`take_layer`.
      layer: int32 ``[]``.
    """

    stacks: list[jax.Array]
    taken: list[jax.Array]
    layer: jax.Array

    def __call__(self, x, kernel, *arguments, **options) -> jax.Array:
        return dot_general(x, kernel, *arguments, **(self.stack_of(kernel) | options))

    def stack_of(self, kernel) -> dict[str, jax.Array]:
        """The arguments ``stack`` and ``layer`` of a kernel; none if the kernel is not one of the layer."""
        found = (stack for stack, one in zip(self.stacks, self.taken, strict=True) if one is kernel)
        return {"stack": stack, "layer": self.layer} if (stack := next(found, None)) is not None else {}


def take_layer(stack, layer) -> jax.Array:
    """Layer ``int32 []`` of weights ``[layers, ...]``, in a loop over layers.

    On a CPU, XLA would move the widening of all layers out of the loop, unless it must expect other weights in each
    step.
    """

    def take_on_cpu(stack, layer):
        return _take(*lax.optimization_barrier((stack, layer)))

    return lax.platform_dependent(stack, layer, cpu=take_on_cpu, default=_take)


def _take(stack, layer) -> jax.Array:
    return lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _dot_general(x, kernel, *layer, dimension_numbers, **options) -> jax.Array:
    """The ordinary product with a kernel, or with the kernel of a layer."""
    kernel = _take(kernel, *layer) if layer else kernel
    return lax.dot_general(x, kernel, dimension_numbers, **options)


# ----------------------------------------------------------------------------------------------------- on a CPU


def _project_on_cpu(x, kernel, *layer, dimension_numbers, precision, preferred_element_type) -> jax.Array:
    (x_axes, kernel_axes), _ = dimension_numbers
    dtype = preferred_element_type or x.dtype
    shape = kernel.shape[1:] if layer else kernel.shape
    rows = [n for axis, n in enumerate(x.shape) if axis not in x_axes]
    size = math.prod(x.shape[axis] for axis in x_axes)
    terms = max((n for n in range(1, MAX_TERMS + 1) if size % n == 0), default=0)
    by_parts: Callable[..., jax.Array] | None = None
    if kernel_axes == tuple(range(len(x_axes))) and x_axes == tuple(range(x.ndim - len(x_axes), x.ndim)):
        by_parts = _sum_of_rows
    elif kernel_axes == (len(shape) - 1,) and not layer:
        by_parts = _sums_of_columns
    is_small = terms < MIN_TERMS or math.prod(shape) < MIN_WEIGHTS
    if by_parts is None or is_small or any(n != 1 for n in rows):
        kernel = take_layer(kernel, *layer) if layer else kernel
        return lax.dot_general(x, kernel, dimension_numbers, precision, jnp.float32).astype(dtype)
    out = by_parts(x.reshape(-1).astype(jnp.float32), kernel, *layer, terms=terms)
    features = [n for axis, n in enumerate(shape) if axis not in kernel_axes]
    return out.reshape(*rows, *features).astype(dtype)


def _project_divided(x, kernel, *layer, **options) -> jax.Array:
    """The product in a program that XLA divides. Without the barrier of ``take_layer`` a CPU widens all layers."""
    return _dot_general(x, take_layer(kernel, *layer) if layer else kernel, **options)


def _sum_of_rows(row, kernel, *layer, terms: int) -> jax.Array:
    """``row [D]`` times ``kernel [D, F]``, or times a layer's: partial sums ``[D / terms, F]``, then their sum.

    The kernel of each term is read by an index of its own: XLA for CPUs vectorises no loop over a shared slice.
    """
    size = row.shape[0] // terms

    def partial_sums(row, kernel, *layer):
        if layer:
            kernel, *layer = lax.optimization_barrier((kernel, *layer))
        rows, kernels = row.reshape(size, terms), _bits(kernel)
        kernels = kernels.reshape(kernel.shape[0] if layer else 1, size, terms, -1)
        number, zero = layer[0] if layer else jnp.int32(0), jnp.int32(0)

        def term(i):
            start, sizes = (number, zero, jnp.int32(i), zero), (1, size, 1, kernels.shape[3])
            return rows[:, i, None] * _widen(lax.dynamic_slice(kernels, start, sizes)[0, :, 0], kernel.dtype)

        return _add([term(i) for i in range(terms)])

    return keep_whole(partial_sums)(row, kernel, *layer).sum(0)


def _sums_of_columns(row, kernel, *, terms: int) -> jax.Array:
    """``kernel [F, D]`` times ``row [D]``: partial sums ``[F, D / terms]``, then their sums."""
    size = row.shape[0] // terms

    def partial_sums(row, kernel):
        rows, kernels = row.reshape(terms, size), _bits(kernel).reshape(-1, terms, size)
        return _add([rows[i] * _widen(kernels[:, i], kernel.dtype) for i in range(terms)])

    return keep_whole(partial_sums)(row, kernel).sum(-1)


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


# ----------------------------------------------------------------------------------------------- transformations

project_p = Primitive("project")  # x, and a kernel or kernels of all layers and a layer -> their product


@functools.partial(jax.jit, static_argnames=("dimension_numbers", "precision", "preferred_element_type"))
def _jitted(*operands, **options):
    return project_p.bind(*operands, **options)


def _impl(*operands, **options):
    return (_dot_general if is_jit_disabled() else _jitted)(*operands, **options)


def _abstract_eval(*operands, **options):
    """The type of the ordinary product, so that shardings and varying mesh axes follow from it."""
    return jax.make_jaxpr(functools.partial(_dot_general, **options))(*operands).out_avals[0]


def _jvp(primals, tangents, **options):
    active = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_active(*some):
        given = dict(zip(active, some, strict=True))
        return _dot_general(*(given.get(i, primal) for i, primal in enumerate(primals)), **options)

    _, tangent = jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])
    return project_p.bind(*primals, **options), tangent


def _transpose(cotangent, *operands, **options):
    (number,) = (i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand))

    def of_one(operand):
        return _dot_general(*operands[:number], operand, *operands[number + 1 :], **options)

    (transposed,) = jax.linear_transpose(of_one, operands[number].aval)(cotangent)
    return [transposed if i == number else None for i in range(len(operands))]


def _batch(operands, axes, *, dimension_numbers, **options):
    (x_axes, kernel_axes), _ = dimension_numbers
    if all(axis is None for axis in axes[1:]):  # more rows
        numbers = (tuple(axis + 1 for axis in x_axes), kernel_axes), ((), ())
        x = jnp.moveaxis(operands[0], axes[0], 0)
        return project_p.bind(x, *operands[1:], dimension_numbers=numbers, **options), 0
    plain = functools.partial(_dot_general, dimension_numbers=dimension_numbers, **options)
    return jax.vmap(plain, tuple(axes))(*operands), 0


def _lower_on_cpu(context, *operands, **options):
    divided = is_partitioned_by_xla(context.module_context)
    program = _project_divided if divided else _project_on_cpu
    return mlir.lower_fun(program, multiple_results=False)(context, *operands, **options)


project_p.def_impl(_impl)
project_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[project_p] = _jvp
ad.primitive_transposes[project_p] = _transpose
batching.primitive_batchers[project_p] = _batch
mlir.register_lowering(project_p, mlir.lower_fun(_dot_general, multiple_results=False))
mlir.register_lowering(project_p, _lower_on_cpu, platform="cpu")
