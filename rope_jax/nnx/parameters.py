"""Parameters of NNX modules: their logical axis names, and their exchange with linen modules."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen
import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from rope_jax._checks import shown
from rope_jax.core.named import placement


def named(init: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """An initialiser whose values carry these logical axis names, in place of names that they come with."""

    def unboxed(*args):
        value = flax.linen.unbox(init(*args))
        return value.raw_value if isinstance(value, nnx.VariableMetadata) else value

    return nnx.with_partitioning(unboxed, names, **placement(names))


def from_linen(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Sets the parameters of an NNX module to those of the linen module that has the same tree.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> from flax import nnx
      >>> fields = dict(num_heads=4, head_dim=16, rope=rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard()))
      >>> x = jnp.ones((2, 5, 64))
      >>> variables = rope_jax.RotaryAttention(**fields).init(jax.random.key(0), x)
      >>> attention = rope_jax.nnx.RotaryAttention(in_features=64, **fields, rngs=nnx.Rngs(1))
      >>> rope_jax.nnx.from_linen(attention, variables)
      >>> bool(jnp.allclose(attention(x), rope_jax.RotaryAttention(**fields).apply(variables, x), atol=1e-6))
      True

    Args:
      module: an NNX module, or a stack made by ``nnx.vmap`` for a linen stack made by ``nn.scan``.
      variables: of ``init``, boxed (:func:`flax.linen.unbox`) or not. Other collections are not read.

    Raises:
      TypeError: if the module is not of NNX, the variables are no mapping of collections, or a parameter is no
        array.
      ValueError: if parameters are missing or unexpected, or a shape differs.
    """
    own = to_linen(module)["params"]
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a mapping of collections, as from init, got {shown(variables)}")
    if "params" not in variables:
        raise ValueError(f"variables must have the collection 'params', got {sorted(map(str, variables))}")
    params = flax.linen.unbox(variables["params"])
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a mapping of names, got {shown(params)}")
    given, held = (flatten_dict(tree, sep="/") for tree in (params, own))
    for kind, names in (("miss", held.keys() - given.keys()), ("have unexpected", given.keys() - held.keys())):
        if names:
            raise ValueError(f"variables must be those of the module, got params that {kind} {sorted(names)}")
    for name, array in given.items():
        if not isinstance(array, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"params of {name} must be an array, got {shown(array)}")
        if array.shape != held[name].shape:
            raise ValueError(f"params of {name} must have shape {held[name].shape}, got {array.shape}")
    nnx.update(module, params)


def to_linen(module: nnx.Module) -> dict[str, dict]:
    """The parameters of an NNX module as variables of the linen module that has the same tree.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> from flax import nnx
      >>> fields = dict(num_heads=4, head_dim=16, rope=rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard()))
      >>> attention = rope_jax.nnx.RotaryAttention(in_features=64, **fields, rngs=nnx.Rngs(1))
      >>> variables = rope_jax.nnx.to_linen(attention)
      >>> rope_jax.RotaryAttention(**fields).apply(variables, jnp.ones((2, 5, 64))).shape
      (2, 5, 64)

    Raises:
      TypeError: if the module is not of NNX.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be an nnx.Module, got {type(module).__name__}")
    return {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}
