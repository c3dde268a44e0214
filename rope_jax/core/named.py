"""Gives parameters logical axis names."""

from collections.abc import Callable

import flax.linen as nn


def named(init: Callable, axes: tuple[str, ...], *, by_rules: bool = True) -> Callable:
    """An initialiser with these logical axis names (:func:`flax.linen.with_logical_partitioning`).

    The names of an initialiser that comes with some are replaced: one initialiser serves kernels of unlike axes.
    Without ``by_rules``, rules in use (``flax.linen.logical_axis_rules``) do not place the parameter as it is made.
    """

    def unboxed(*args, **kwargs):
        return nn.unbox(init(*args, **kwargs))

    return nn.with_logical_partitioning(unboxed, axes, rules=None if by_rules else ())
