"""Attention as JAX primitives: its derivative, transpose, batching and lowering.

``attention_p`` gives the output, the maximum of scores and the log of the sum of exp(scores - maximum). Its
derivative is ``tangent_p``, linear in the tangents. The transpose of ``tangent_p`` is ``backward_p``, which
computes the weights again. All three are lowered for a platform by :func:`choose_path`. Higher derivatives
differentiate the blocks of plain JAX.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._jax_internals import Primitive, ad, batching, is_jit_disabled, mlir
from rope_jax.attention import blocks
from rope_jax.attention.facts import Facts
from rope_jax.attention.kernels import splash
from rope_jax.attention.paths import AttentionBackend, block_sizes, choose_path
from rope_jax.attention.quantized import Quantized, read_layer
from rope_jax.attention.tiling import Extras
from rope_jax.core.explicit import by_xla
from rope_jax.core.primitive import is_partitioned_by_xla, unify_varying_axes, wide_dtype


def attention(q, k, v, facts: Facts, *, layer=None, implementation: AttentionBackend | None = None) -> jax.Array:
    """The output ``[B, N, T, H]``, without checks.

    Args:
      q: ``[B, N, T, H]``.
      k: ``[B, K, S, H]``, an array or :class:`Quantized`; of a stack of layers ``[layers, B, K, S, H]``.
      v: likewise.
      facts: which keys a query reads.
      layer: int32 ``[]``, the layer of a stack.
      implementation: see :func:`rope_jax.attend`.
    """
    return _bind((q, k, v, layer, facts), logged=False, implementation=implementation)[0]


def attention_with_log(
    q, k, v, facts: Facts, *, layer=None, implementation: AttentionBackend | None = None
) -> tuple[jax.Array, jax.Array]:
    """The output, and the log of the sum of exp(scores), float32 ``[B, N, T]``; both may be differentiated."""
    out, maximum, log_sum = _bind((q, k, v, layer, facts), logged=True, implementation=implementation)
    return out, maximum + log_sum


def _bind(arguments, **options) -> list[jax.Array]:
    assert arguments[-1].sink_logits is None, "sinks multiply the output: see attend_by_facts"
    leaves, tree = jax.tree.flatten(arguments)
    leaves = unify_varying_axes(*leaves)
    if options["implementation"] == "plain":
        return _forward(*leaves, tree=tree, path="plain", platform="cpu", **options)
    return attention_p.bind(*leaves, tree=tree, **options)


# ---------------------------------------------------------------------------------------------- programs in blocks


def _forward(*leaves, tree, implementation, logged, path, platform):
    q, k, v, layer, facts = tree.unflatten(leaves)
    if path == "splash":
        out, log_total = splash.forward(q, k, v, facts.segments, **_splash_options(q, facts), save_log_total=logged)
        return [out] if log_total is None else [out, jnp.zeros_like(log_total), log_total]
    results = blocks.forward(q, k, v, layer, facts, block_sizes(q, k, implementation, platform))
    return list(results) if logged else [results[0]]


def _tangent(*operands, tree, implementation, active, path, platform, differentiable=False):
    leaves, (out, maximum, log_sum), tangents = _split(operands, tree.num_leaves)
    q, k, v, _, facts = tree.unflatten(leaves)
    given = dict(zip(active, tangents, strict=True))
    dleaves = [given.get(i) for i in range(tree.num_leaves)]
    dq, dk, dv, _, dfacts = tree.unflatten(dleaves)
    dparams = None
    if facts.position_bias is not None and jax.tree.leaves(dfacts.position_bias.params):
        dparams = jax.tree.map(
            lambda x, dx: jnp.zeros_like(x) if dx is None else dx,
            facts.position_bias.params,
            dfacts.position_bias.params,
        )
    sizes = block_sizes(q, k, implementation, platform)
    given_extras = Extras(dfacts.bias, dparams)
    results = out, maximum, log_sum
    return list(
        blocks.tangent(q, k, v, facts, *results, dq, dk, dv, given_extras, sizes, differentiable=differentiable)
    )


def _backward(*operands, tree, implementation, active, path, platform, differentiable=False):
    leaves, (out, maximum, log_sum), (dout, *dlog_total) = _split(operands, tree.num_leaves)
    q, k, v, _, facts = tree.unflatten(leaves)
    dlog = dlog_total[0] if dlog_total else None
    if path == "splash":
        results = (q, k, v, facts.segments, out, maximum + log_sum, dout)
        gradients = splash.backward(*results, **_splash_options(q, facts), dlog_total=dlog)
        return _gradients_of_leaves(tree, leaves, active, *gradients, Extras())
    sizes = block_sizes(q, k, implementation, platform)
    dq, dk, dv, dextras = blocks.backward(
        q, k, v, facts, out, maximum, log_sum, dout, dlog, sizes, differentiable=differentiable
    )
    return _gradients_of_leaves(tree, leaves, active, dq, dk, dv, dextras)


def _splash_options(q, facts: Facts) -> dict:
    scale = q.shape[-1] ** -0.5 if facts.scale is None else facts.scale
    return dict(causal=facts.causal, window=facts.known_window, scale=scale, logit_cap=facts.logit_cap)


def _gradients_of_leaves(tree, leaves, active, dq, dk, dv, dextras: Extras) -> list[jax.Array]:
    """The gradients in the order of the active leaves."""
    numbers = tree.unflatten(range(tree.num_leaves))
    q, k, v, _, facts = numbers
    by_leaf = {q: dq, k: dk, v: dv}
    if facts.bias is not None:
        by_leaf[facts.bias] = dextras.bias
    if facts.position_bias is not None:
        numbers = jax.tree.leaves(facts.position_bias.params)
        by_leaf |= dict(zip(numbers, jax.tree.leaves(dextras.params), strict=True))
    return [by_leaf[i].astype(leaves[i].dtype) for i in active]


def _split(operands, num_leaves: int):
    return operands[:num_leaves], operands[num_leaves : num_leaves + 3], operands[num_leaves + 3 :]


# ------------------------------------------------------------------------------------------------- transformations

attention_p = Primitive("attention")  # q, k, v, layer and facts as leaves -> out, maximum, log_sum
tangent_p = Primitive("attention_tangent")  # leaves, results, tangents of active leaves -> dout, dlog_total
backward_p = Primitive("attention_backward")  # leaves, results, dout, dlog_total or none -> active gradients


def _jvp(primals, tangents, *, tree, implementation, logged):
    _, k, _, layer, _ = tree.unflatten(primals)
    active = tuple(i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    if layer is not None or isinstance(k, Quantized):

        def of_one_layer(*some):
            q, k, v, layer, facts = tree.unflatten(_replaced(primals, active, some))
            k, v = (read_layer(stored, layer, q.dtype) for stored in (k, v))
            return _bind((q, k, v, None, facts), logged=logged, implementation=implementation)

        return jax.jvp(of_one_layer, [primals[i] for i in active], [tangents[i] for i in active])
    results = attention_p.bind(*primals, tree=tree, implementation=implementation, logged=True)
    some = (tangents[i] for i in active)
    dresults = tangent_p.bind(*primals, *results, *some, tree=tree, implementation=implementation, active=active)
    if not logged:
        return results[:1], dresults[:1]
    # Only the sum of maximum and log is used: the log has the derivative of both.
    dout, dlog_total = dresults
    return results, [dout, ad.Zero(jax.typeof(results[1]).to_tangent_aval()), dlog_total]


def _transpose(cotangents, *operands, tree, implementation, active):
    leaves, results, tangents = _split(operands, tree.num_leaves)
    if any(map(ad.is_undefined_primal, (*leaves, *results))):
        raise NotImplementedError("the derivative of attention is transposed in its tangents alone: take jax.vjp")
    dout, dlog_total = cotangents
    if type(dout) is ad.Zero:
        dout = jnp.zeros_like(results[0])
    given = [] if type(dlog_total) is ad.Zero else [dlog_total]
    gradients = backward_p.bind(
        *leaves, *results, dout, *given, tree=tree, implementation=implementation, active=active
    )
    assert all(map(ad.is_undefined_primal, tangents))
    return [None] * (len(leaves) + 3) + gradients


def _replaced(items, indices, replacements) -> list:
    by_index = dict(zip(indices, replacements, strict=True))
    return [by_index.get(i, item) for i, item in enumerate(items)]


def _jvp_of_blocks(program, types, primals, tangents, **options):
    """The derivative of a derivative: JAX differentiates the blocks, also if a kernel was asked for by name."""
    active = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
    blocks_of = functools.partial(program, **options, path="blocks", platform="cpu", differentiable=True)
    divided = by_xla(blocks_of, _specs(types(*map(jax.typeof, primals), **options)))

    def of_active(*some):
        return divided(*_replaced(primals, active, some))

    return jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])


def _batch(primitive, operands, axes, *, tree, **options):
    """Merges the new axis with the rows B if each operand has rows; else one call after another."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    batch = operands[0].shape[0 if axes[0] != 0 else 1]
    _, _, _, layer, facts = tree.unflatten(operands[: tree.num_leaves])
    first_fact = tree.num_leaves - len(jax.tree.leaves(facts))
    with_rows = layer is facts.traced_window is facts.position_bias is None and not facts.dropout_rate
    if not with_rows or any(i >= first_fact for i in options.get("active", ())):
        mapped = [i for i, axis in enumerate(axes) if axis is not None]
        results = lax.map(
            lambda some: primitive.bind(*_replaced(operands, mapped, some), tree=tree, **options),
            [jnp.moveaxis(operands[i], axes[i], 0) for i in mapped],
        )
        return results, [0] * len(results)

    def merge(i, x, axis):
        if axis is not None:
            x = jnp.moveaxis(x, axis, 0)
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
        elif first_fact <= i < tree.num_leaves and x.shape[0] == 1:  # one row of facts for all rows
            return x
        else:
            x = jnp.broadcast_to(x, (size, *x.shape))
        return x.reshape(size * batch, *x.shape[2:])

    merged = (merge(i, x, axis) for i, (x, axis) in enumerate(zip(operands, axes, strict=True)))
    results = primitive.bind(*merged, tree=tree, **options)
    return [x.reshape(size, batch, *x.shape[1:]) for x in results], [0] * len(results)


def _specs(types) -> list[jax.sharding.PartitionSpec]:
    return [each.sharding.spec for each in types]


def _results_like(leaves):
    """Types of the output and of a number for each query: as q, and as q without features in float32 or wider."""
    q = leaves[0]

    def log_like(q):
        return q[..., 0].astype(wide_dtype(q))

    return [q, jax.make_jaxpr(log_like)(q).out_avals[0]]


def _forward_types(*operands, tree, logged, **_):
    out, number = _results_like(operands)
    return [out, number, number] if logged else [out]


def _tangent_types(*operands, **_):
    return _results_like(operands)


def _backward_types(*operands, tree, active, **_):
    return [operands[i] for i in active]


# ------------------------------------------------------------------------------------------------------- lowering


@functools.partial(jax.jit, static_argnames=("primitive", "tree", "implementation", "active", "logged"))
def _jitted(*operands, primitive, **options):
    return primitive.bind(*operands, **options)


def _impl(primitive, program, types, *operands, **options):
    if is_jit_disabled():
        platform = jax.default_backend()
        path = _path(primitive, operands, options["tree"], options["implementation"], platform, divided=False)
        program = functools.partial(program, **options, path=path, platform=platform)
        return by_xla(program, _specs(types(*map(jax.typeof, operands), **options)))(*operands)
    return _jitted(*operands, primitive=primitive, **options)


def _path(primitive, operands, tree, implementation, platform: str, *, divided: bool) -> AttentionBackend:
    q, k, _, layer, facts = tree.unflatten(operands[: tree.num_leaves])
    path = choose_path(q, k, layer, facts, implementation, platform=platform, divided=divided)
    # The kernel has no forward mode.
    return "blocks" if primitive is tangent_p and path == "splash" else path


def _lower(primitive, program, platform, context, *operands, tree, implementation, **options):
    divided = is_partitioned_by_xla(context.module_context)
    path = _path(primitive, context.avals_in, tree, implementation, platform, divided=divided)
    options |= dict(tree=tree, implementation=implementation, path=path, platform=platform)
    divided_program = by_xla(functools.partial(program, **options), _specs(context.avals_out))
    return mlir.lower_fun(divided_program, multiple_results=True)(context, *operands)


def _register(primitive, program, types) -> None:
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(_impl, primitive, program, types))
    primitive.def_abstract_eval(types)
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    for platform in ("cpu", "tpu", None):
        lower = functools.partial(_lower, primitive, program, platform or "gpu")
        mlir.register_lowering(primitive, lower, platform=platform)


_register(attention_p, _forward, _forward_types)
_register(tangent_p, _tangent, _tangent_types)
_register(backward_p, _backward, _backward_types)
ad.primitive_jvps[attention_p] = _jvp
ad.primitive_jvps[tangent_p] = functools.partial(_jvp_of_blocks, _tangent, _tangent_types)
ad.primitive_jvps[backward_p] = functools.partial(_jvp_of_blocks, _backward, _backward_types)
ad.primitive_transposes[tangent_p] = _transpose
