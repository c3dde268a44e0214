"""One block of a decoder, attention and SwiGLU, and the stack of blocks as one scanned module."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax

from rope_jax.attention.cache import KVCache
from rope_jax.attention.layer import Initializer
from rope_jax.attention.plan import Plan


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
    def __call__(self, carry: tuple[jax.Array, KVCache | None], plan: Plan, layer):
        """The residual stream and the cache of all layers after this layer, as a body of :func:`flax.linen.scan`."""
        # The cache of all layers is carried, so that each layer writes its tokens in place. As an input and an output
        # of each layer, the whole cache would be copied with every token.
        x, caches = carry
        cache = None if caches is None else dataclasses.replace(caches, layer=layer)
        y = self.attention(name="self_attention")(
            self.norm(name="attention_norm")(x), plan=plan.of_layer(layer), cache=cache
        )
        if cache is not None:
            y, cache = y
            caches = dataclasses.replace(cache, layer=None)
        if self.post_norms:
            y = self.norm(name="post_attention_norm")(y)
        x += y
        y = self._mlp(self.norm(name="mlp_norm")(x))
        if self.post_norms:
            y = self.norm(name="post_mlp_norm")(y)
        return (place(x + y, self.sharding), caches), None

    def _mlp(self, x) -> jax.Array:
        """SwiGLU: ``down(activation(gate(x)) * up(x))`` (Shazeer 2020, section 2)."""

        def dense(name, features, *axes):
            init = nn.with_logical_partitioning(self.kernel_init, axes)
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:])
            return self.dense(features, kernel_init=init, bias_init=bias_init, name=name)

        gate = dense("gate", self.mlp_dim, "embed", "mlp")(x)
        up = dense("up", self.mlp_dim, "embed", "mlp")(x)
        # Recomputed in the backward pass, which keeps gate, up and their product instead of three more arrays.
        product = jax.checkpoint(lambda gate, up: self.activation(gate) * up)(gate, up)
        return dense("down", x.shape[-1], "mlp", "embed")(product)


def stack(num_layers: int, *, remat: bool, **fields) -> nn.Module:
    """``num_layers`` blocks as one scanned module: parameters get a leading axis ``layers``, one block is compiled.

    The module is called with ``(x, cache)``, the plan of all layers, and the layer numbers ``[layers]``.

    Args:
      num_layers: how many blocks.
      remat: whether to recompute each block in the backward pass instead of keeping its intermediates.
      **fields: of :class:`Block`.
    """
    block = nn.remat(Block, prevent_cse=False) if remat else Block
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(**fields)


def place(x, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The residual stream, constrained to its sharding."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
