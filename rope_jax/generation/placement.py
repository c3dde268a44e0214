"""Generation on meshes of explicit axes: XLA divides the loops, and the types of the results follow the prompt."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from rope_jax.attention.cache import KVCache
from rope_jax.core.explicit import by_xla, explicit_mesh, spec_of, without_repeats
from rope_jax.generation.forward import ForwardPass


def placed_like(rows: Callable) -> Callable:
    """A decorator for a program of forward passes and arrays, whose results have rows first.

    On a mesh of explicit axes, rows are divided as the array ``rows(*operands)``. A cache is divided as the cache
    that was given, or along K as the kernel of the keys.
    """

    def decorate(program):
        @functools.wraps(program)
        def placed(*operands, **options):
            if not explicit_mesh(*operands):
                return program(*operands, **options)
            axis_of_rows = spec_of(rows(*operands))[0]
            forwards, given = _all_of(ForwardPass, operands), _all_of(KVCache, operands)
            likes = given or forwards

            def specs(results):
                stored = iter(likes)

                def spec(leaf):
                    if isinstance(leaf, KVCache):
                        return _cache_specs(leaf, next(stored), axis_of_rows)
                    return PartitionSpec(axis_of_rows) if leaf.ndim else PartitionSpec()

                return jax.tree.map(spec, results, is_leaf=lambda leaf: isinstance(leaf, KVCache))

            return by_xla(functools.partial(program, **options), specs)(*operands)

        return placed

    return decorate


def _all_of(kind: type, operands) -> list:
    leaves = jax.tree.leaves(operands, is_leaf=lambda leaf: isinstance(leaf, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _cache_specs(cache: KVCache, like: KVCache | ForwardPass, rows):
    """Specs of a cache of all layers: of keys and values ``[layers, B, K, S, H]``, and of counters ``[B]``."""
    if isinstance(like, KVCache):
        stored = spec_of(jax.tree.leaves(like.key)[0])[2:4]
    else:
        kernel = nn.unbox(like.params["params"])["layers"]["self_attention"]["key"]["kernel"]  # [layers, D, K, H]
        stored = (spec_of(kernel)[2], None)
    spec = PartitionSpec(None, *without_repeats(rows, *stored))
    return jax.tree.map(lambda leaf: spec if leaf.ndim > 1 else PartitionSpec(rows), cache)
