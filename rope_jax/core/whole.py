"""Keeps a program whole: a call that XLA does not fuse with its callers."""

import functools
from collections.abc import Callable

import jax

from rope_jax._jax_internals import set_xla_metadata


def keep_whole(program: Callable) -> Callable:
    """The program as a call that XLA does not inline. Calls inside the program are inlined."""

    @jax.jit
    @functools.wraps(program)
    def call(*operands):
        with set_xla_metadata(inlineable=None):
            return program(*operands)

    @functools.wraps(program)
    def whole(*operands):
        with set_xla_metadata(inlineable="false"):
            return call(*operands)

    return whole
