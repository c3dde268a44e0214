"""Keeps the axes of an array in memory in their order, where the compiler would transpose the array."""

import jax

from rope_jax._jax_internals import Layout, Primitive, ad, batching, is_for_export, mlir, with_layout_constraint


def in_order(x) -> jax.Array:
    """x, with its last axis contiguous in memory. An exported program has no such constraint."""
    return in_order_p.bind(x)


in_order_p = Primitive("in_order")
in_order_p.def_impl(lambda x: x)
in_order_p.def_abstract_eval(lambda x: x)
ad.deflinear2(in_order_p, lambda cotangent, x: [cotangent])
batching.primitive_batchers[in_order_p] = lambda operands, axes: (in_order_p.bind(*operands), axes[0])


def _lower(context, x):
    if is_for_export(context.module_context):  # exported programs must keep to what jax guarantees
        return [x]
    constrain = mlir.lower_fun(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), False)
    return constrain(context, x)


mlir.register_lowering(in_order_p, _lower)
