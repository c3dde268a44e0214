"""One block of a decoder, attention and SwiGLU, and the stack of blocks as one scanned module."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rope_jax.attention.cache import KVCache
from rope_jax.attention.layer import Initializer, RotaryAttention
from rope_jax.attention.layer_checks import check_fields
from rope_jax.attention.norm import RMSNorm
from rope_jax.attention.plan import Plan
from rope_jax.attention.rotations import first_rope
from rope_jax.core.explicit import dense_options, explicit_mesh
from rope_jax.core.named import named
from rope_jax.core.projection import LayerProduct, take_layer


class Block(nn.Module, kw_only=True):
    """``x += attention(norm(x))``, then ``x += down(activation(gate(n)) * up(n))`` with ``n = norm(x)``.

    Attributes:
      attention: makes the attention, by name.
      norm: makes a norm, by name.
      dense: makes a dense layer of so many features.
      mlp_dim: features inside the SwiGLU.
      kernel_init: of the dense layers.
      activation: of the gate.
      post_norms: whether the outputs of attention and MLP are normalised too, before they are added.
      sharding: where the residual stream lies on a mesh, or None.
    """

    attention: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    mlp_dim: int
    kernel_init: Initializer
    activation: Callable[[jax.Array], jax.Array]
    post_norms: bool
    sharding: jax.sharding.Sharding | None

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, KVCache | None], plan: Plan, layer, dot: Callable | None = None):
        """The residual stream and the cache of all layers after this layer: a body of :func:`flax.linen.scan`.

        ``dot`` is the ``dot_general`` of the dense layers.
        """
        # The cache of all layers is carried, so that each layer writes its tokens in place. As an input and an
        # output of each layer, the whole cache would be copied with every token.
        x, caches = carry
        cache = None if caches is None else dataclasses.replace(caches, layer=layer)
        y = self.attention(name="self_attention", dot_general=dot)(
            self.norm(name="attention_norm")(x), plan=plan.of_layer(layer), cache=cache
        )
        if cache is not None:
            y, cache = y
            caches = dataclasses.replace(cache, layer=None)
        if self.post_norms:
            y = self.norm(name="post_attention_norm")(y)
        x += y
        y = self._mlp(self.norm(name="mlp_norm")(x), dot)
        if self.post_norms:
            y = self.norm(name="post_mlp_norm")(y)
        return (place(x + y, self.sharding), caches), None

    def _mlp(self, x, dot: Callable | None) -> jax.Array:
        """SwiGLU: ``down(activation(gate(x)) * up(x))`` (Shazeer 2020, section 2)."""

        def dense(name, features, *axes):
            init = named(self.kernel_init, axes)
            bias_init = named(nn.initializers.zeros_init(), axes[1:])
            return self.dense(features, kernel_init=init, bias_init=bias_init, name=name, **dense_options(dot))

        gate = dense("gate", self.mlp_dim, "embed", "mlp")(x)
        up = dense("up", self.mlp_dim, "embed", "mlp")(x)
        # Recomputed in the backward pass, which keeps gate, up and their product instead of three more arrays.
        product = jax.checkpoint(lambda gate, up: self.activation(gate) * up)(gate, up)
        return dense("down", x.shape[-1], "mlp", "embed")(product)


def stack(model, **options) -> nn.Module:
    """The blocks of a :class:`Decoder` as one scanned module: parameters get a leading axis ``layers``.

    One block is compiled. The module is called with ``(x, cache)``, the plan of all layers, and the layer numbers
    ``[layers]``.
    """
    fields = _fields(model)
    check_fields(fields["attention"](parent=None))
    scanned = nn.scan(
        nn.remat(Block, prevent_cse=False) if model.remat else Block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=model.num_layers,
        metadata_params=_LAYERS,
    )
    return scanned(**fields, **options)


def run_layers(model, carry: tuple[jax.Array, KVCache | None], plan: Plan) -> tuple[jax.Array, KVCache | None]:
    """The residual stream and the cache after all layers of a :class:`Decoder`.

    With a cache, each layer is taken out of the parameters by :func:`take_layer` and multiplied by
    :class:`LayerProduct`; the paths of its modules, as ``nn.intercept_methods`` sees them, then begin in the layer.
    Without a cache, for derivatives, and in plain operations, flax scans the layers.
    """
    if (
        carry[1] is None
        or model.implementation == "plain"
        or model.is_initializing()
        or model.is_mutable_collection("intermediates")
    ):
        return model.layers(carry, plan, _numbers(model))[0]
    stacks, tree = jax.tree.flatten(model.layers.variables.get("params", {}))
    for each in stacks:  # an index would be clamped
        if each.shape[0] != model.num_layers:
            raise ValueError(
                f"params of layers must have shape [layers, ...] with layers={model.num_layers}, got {each.shape}"
            )
    # JAX keeps the functions below: they hold no array, and no module that holds any.
    unbound = model.clone(parent=None)
    block = Block(**_fields(unbound), parent=None)

    @jax.custom_jvp
    def run(stacks, carry, plan):
        return jax.lax.scan(functools.partial(step, stacks, plan), carry, _numbers(unbound))[0]

    @run.defjvp
    def _(primals, tangents):
        # A gradient would keep a copy of all layers: flax's scan does not.
        def by_scan(stacks, carry, plan):
            params = {"params": jax.tree.unflatten(tree, stacks)}
            return stack(unbound, parent=None).apply(params, carry, plan, _numbers(unbound))[0]

        return jax.jvp(by_scan, primals, tangents)

    def step(stacks, plan, carry, layer):
        taken = [take_layer(each, layer) for each in stacks]

        dot = LayerProduct(stacks, taken, layer)
        of_layer = nn.meta.remove_axis(jax.tree.unflatten(tree, taken), 0, _LAYERS)
        return block.apply({"params": of_layer}, carry, plan, layer, dot)

    return run(stacks, carry, plan)


def _numbers(model) -> jax.Array:
    """The numbers of all layers, int32 ``[layers]``."""
    return jnp.arange(model.num_layers, dtype=jnp.int32)


_LAYERS = {nn.PARTITION_NAME: "layers"}


def _fields(model) -> dict:
    """The fields of each :class:`Block`."""
    params = dict(param_dtype=model.param_dtype)
    norm = dict(epsilon=model.norm_epsilon, unit_offset=model.norm_unit_offset)
    attention = functools.partial(
        RotaryAttention,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rope=first_rope(model.ropes),  # all layers share its head_dim, rotary_dim and layout
        learn_frequencies=model.learn_frequencies,
        window=None if isinstance(model.windows, tuple) else model.windows,  # unlike windows are in the plan
        logit_scale=model.logit_scale,
        logit_cap=model.logit_cap,
        qk_norm=model.qk_norm,
        qk_norm_epsilon=model.norm_epsilon,
        qk_norm_unit_offset=model.norm_unit_offset,
        use_bias=model.qkv_bias,
        use_out_bias=model.out_bias,
        dtype=model.dtype,
        kernel_init=model.kernel_init,
        implementation=model.implementation,
        attention_fn=model.attention_fn,
        ring_axis=model.ring_axis,
        **params,
    )
    return dict(
        attention=attention,
        norm=functools.partial(RMSNorm, axis="embed", **norm, **params),
        dense=functools.partial(nn.Dense, dtype=model.dtype, use_bias=model.mlp_bias, **params),
        mlp_dim=model.mlp_dim,
        kernel_init=model.kernel_init,
        activation=model.activation,
        post_norms=model.post_norms,
        sharding=model.activation_sharding,
    )


def place(x, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The residual stream, constrained to its sharding."""
    if sharding is None:
        return x
    if not isinstance(sharding, NamedSharding):
        return jax.lax.with_sharding_constraint(x, sharding)
    if mesh := explicit_mesh(x):
        return jax.sharding.reshard(x, NamedSharding(mesh, sharding.spec))
    if not sharding.mesh.explicit_axes:
        return jax.lax.with_sharding_constraint(x, sharding)
    # Without a mesh in use, x is whole, as in model.init. Inside by_xla, the mesh in use has automatic axes.
    in_use = not jax.sharding.get_abstract_mesh().empty
    return jax.lax.with_sharding_constraint(x, sharding.spec) if in_use else x
