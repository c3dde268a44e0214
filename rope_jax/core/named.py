"""Gives parameters logical axis names."""

import copy
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


def named(init: Callable, axes: tuple[str, ...], *, by_rules: bool = True) -> Callable:
    """An initialiser with these logical axis names (:func:`flax.linen.with_logical_partitioning`).

    The names of an initialiser that comes with some are replaced: one initialiser serves kernels of unlike axes.
    Without ``by_rules``, rules in use (``flax.linen.logical_axis_rules``) do not place the parameter as it is made.
    """

    def boxed(*args, **kwargs):
        value = nn.unbox(init(*args, **kwargs))
        return NamedParameter(value, axes, rules=None if by_rules else ())

    return boxed


class NamedParameter(nn.LogicallyPartitioned, eq=False):  # the __eq__ of the base class compares only values
    """A parameter of a linen module with logical axis names. ``flax.nnx.bridge.ToNNX`` takes it without a mesh."""

    def to_nnx_metadata(self) -> dict[str, Any]:
        """The names as metadata of an ``nnx.Variable``."""
        # The method of Flax empties `names`: call it on a copy.
        return super(NamedParameter, copy.copy(self)).to_nnx_metadata() | placement(self.names)


def placement(names: tuple[str | None, ...]) -> dict[str, Any]:
    """Metadata of an ``nnx.Variable`` with logical axis names: whether NNX places its value as it is made.

    NNX would raise an error without a mesh in use, or for a name that has no rule and is no axis of the mesh. linen
    places no such parameter.
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = {*mesh.axis_names, *(name for name, _ in nn.get_logical_axis_rules())}
    return {} if not mesh.empty and known.issuperset({*names} - {None}) else {"eager_sharding": False}
