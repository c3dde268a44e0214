"""Writes new keys and values to the slots of a cache, without a copy of the cache."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._jax_internals import Primitive, ShapedArray, is_for_export, mlir
from rope_jax.attention.memory_order import in_order
from rope_jax.core.explicit import by_xla, spec_of
from rope_jax.core.primitive import is_partitioned_by_xla, unify_varying_axes


def write_slots(stored, new, slots, *, layer=None, consecutive: bool = False, plain: bool = False) -> jax.Array:
    """Writes ``new [B, T, K, ...]`` to slots ``[B, T]`` of ``stored [B, K, S, ...]``. Slot S drops a token.

    A scatter whose batch axes are rows and heads. It needs no transposed cache, and each device of a mesh writes
    its own rows and heads. A `dynamic_update_slice` for each row is a launch for each row on a GPU, copies the
    cache on a TPU if rows may overflow, and gathers it on a mesh.

    Args:
      stored: ``[B, K, S, ...]``, of a stack ``[layers, B, K, S, ...]``.
      new: cast to the dtype of ``stored``.
      slots: int32.
      layer: int32 ``[]``, the layer of a stack; may be traced.
      consecutive: whether the slots of each row are consecutive. Tokens are then written all at once, if they fit
        in the row; else the row stays as it is.
      plain: whether to write each token by a scatter, on every platform, without a primitive of rope_jax.
    """
    new = jnp.swapaxes(new, 1, 2).astype(stored.dtype)
    if 0 in new.shape:
        return stored
    single = layer is None
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    options = dict(single=single, consecutive=consecutive, plain=plain)
    write = by_xla(functools.partial(_write, **options), spec_of(stored))
    written = write(*unify_varying_axes(stored, new, slots, layer))
    chex.assert_equal_shape((written, stored))
    return written


def _write(stored, new, slots, layer, *, single: bool, consecutive: bool, plain: bool) -> jax.Array:
    stack = stored[None] if single else stored
    tokens, capacity = new.shape[2], stack.shape[3]
    if plain:
        stack = _scatter_numbers(stack, new, _index(layer, slots[:, None], new.shape[:3]))
    elif consecutive and isinstance(tokens, int) and isinstance(capacity, int) and tokens > 1:
        # XLA gathers the whole stack to write many tokens at once, if S is divided among devices.
        # Functions made anew would be compiled anew in every call outside jit.
        operands = stack, new, layer, slots
        stack = lax.cond(_divided_p.bind(or_exported=False), _write_each, _write_at_once, *operands)
    else:
        stack = _write_each(stack, new, layer, slots)
    return stack[0] if single else stack


def _write_each(stack, new, layer, slots) -> jax.Array:
    """Writes each token ``[H]`` of a head by an index of its own."""
    return _scatter(stack, new, _index(layer, slots[:, None], new.shape[:3]))


def _write_at_once(stack, new, layer, slots) -> jax.Array:
    """Writes the tokens ``[T, H]`` of a head by the index of the first: on a TPU, each index takes time."""
    return _scatter(stack, new, _index(layer, slots[:, :1], new.shape[:2]))


def _index(layer, slots, shape) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(layer, jnp.broadcast_to(slots, shape)), axis=-1)


def _scatter(stack, new, index) -> jax.Array:
    is_narrow = jnp.issubdtype(stack.dtype, jnp.floating) and stack.dtype.itemsize < 4
    by_row: dict[str, Callable] = dict(cpu=_write_rows_as_bits) if is_narrow else {}
    if isinstance(new.shape[2], int) and (new.shape[2] == 1 or index.ndim == 3):
        by_row |= dict(tpu=_write_rows_unless_divided)
    return lax.platform_dependent(stack, new, index, **by_row, default=_scatter_numbers)


def _write_rows_unless_divided(stack, new, index) -> jax.Array:
    """Row by row on a TPU, which scatters each head by a dozen operations; a mesh would gather the stack."""
    write = functools.partial(_write_rows, fixed_layout=True)
    return lax.cond(_divided_p.bind(or_exported=True), _scatter_numbers, write, stack, new, index)


def _scatter_numbers(stack, new, index) -> jax.Array:
    """``new [B, K, T, ...]`` in ``stack [layers, B, K, S, ...]``, by layer and slot ``index [B, K, (T,) 2]``."""
    by_token = index.ndim == 4
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(index.ndim - 1, new.ndim)),
        inserted_window_dims=(0, 3) if by_token else (0,),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1, 2),
        scatter_indices_batching_dims=(0, 1),
    )
    # Two tokens of one slot are of a row which overflowed, whose attention is NaN.
    return lax.scatter(stack, index, new, numbers, unique_indices=True, mode="drop")


def _write_rows(stack, new, index, *, fixed_layout: bool = False, as_bits: bool = False) -> jax.Array:
    """Row by row: XLA for CPUs scatters narrow floats in a float32 copy of the stack.

    The fixed layout keeps a TPU from transposing the whole stack to suit the row.
    """
    batch, heads, tokens = new.shape[:3]
    size = 1 if index.ndim == 4 else tokens  # tokens of an index
    index = index[:, 0].reshape(-1, 2)
    blocks = jnp.swapaxes(new.reshape(batch, heads, -1, size, *new.shape[3:]), 1, 2)
    blocks = blocks.reshape(-1, 1, 1, heads, size, *new.shape[3:])
    put = _put_bits if as_bits else lax.dynamic_update_slice

    def write(number, stack):
        layer, slot = index[number, 0], index[number, 1]
        zero = jnp.int32(0)
        start = (layer, jnp.int32(number // (index.shape[0] // batch)), zero, slot, *[zero] * (stack.ndim - 4))
        fits = slot + size <= stack.shape[3]  # dynamic_update_slice would clamp a slot past the end
        if fixed_layout:
            stack = in_order(stack)
            old = lax.dynamic_slice(stack, start, blocks.shape[1:])
            return in_order(lax.dynamic_update_slice(stack, jnp.where(fits, blocks[number], old), start))
        return lax.cond(
            fits,
            lambda stack: put(stack, blocks[number], start),
            lambda stack: stack,
            stack,
        )

    return lax.fori_loop(0, index.shape[0], write, stack)


def _put_bits(stack, block, start) -> jax.Array:
    """XLA for CPUs would widen the whole stack to float32 and round it again, to write a block of narrow floats."""
    stack_bits, block_bits = (lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") for x in (stack, block))
    return lax.bitcast_convert_type(lax.dynamic_update_slice(stack_bits, block_bits, start), stack.dtype)


@jax.custom_jvp
def _write_rows_as_bits(stack, new, index) -> jax.Array:
    return _write_rows(stack, new, index, as_bits=True)


@_write_rows_as_bits.defjvp
def _(primals, tangents):
    stack, new, index = primals
    dstack, dnew, _ = tangents  # bits have no derivative
    return _write_rows_as_bits(stack, new, index), _write_rows(dstack, dnew, index)


# ----------------------------------------------- whether XLA divides the program, or the program is exported

_divided_p = Primitive("is_divided")  # -> bool [], known when the program is lowered
_divided_p.def_impl(lambda or_exported: jnp.bool_(False))
_divided_p.def_abstract_eval(lambda or_exported: ShapedArray((), jnp.bool_))


def _lower(context, or_exported: bool):
    module = context.module_context
    answer = is_partitioned_by_xla(module) or (or_exported and is_for_export(module))
    return mlir.lower_fun(lambda: jnp.bool_(answer), multiple_results=False)(context)


mlir.register_lowering(_divided_p, _lower)
