"""Logical axis names of a cache, for placing it on a mesh of devices."""

import dataclasses

import jax
from jax.sharding import PartitionSpec

from rope_jax.attention.cache import KVCache, check_cache


def cache_partition_spec(cache: KVCache) -> KVCache:
    """The logical axis names of a cache, in the form of :func:`flax.linen.get_partition_spec` for parameters.

    The names are ``batch``, ``kv_heads`` (K, as in the kernels of :class:`RotaryAttention`), ``kv_length`` (S) and
    ``head_dim``, after ``layers`` in a cache of :meth:`Decoder.init_cache`. Use your rules and
    :func:`flax.linen.logical_to_mesh_sharding` to turn the names into shardings: for :func:`jax.device_put`, or for
    the ``in_shardings`` and ``out_shardings`` of a step.

    Args:
      cache: a cache, or its shapes (:func:`jax.eval_shape`).

    Returns:
      The same tree, with a :class:`jax.sharding.PartitionSpec` for each array.

    Raises:
      TypeError: if the cache is no :class:`KVCache`.

    Example:
      >>> import flax.linen as nn, jax, rope_jax
      >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=2, head_dim=4)
      >>> names = rope_jax.attention.cache_partition_spec(cache)
      >>> tuple(names.key), tuple(names.num_tokens)
      (('batch', 'kv_heads', 'kv_length', 'head_dim'), ('batch',))
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> rules = [("batch", "data"), ("kv_heads", "model")]
      >>> cache = jax.device_put(cache, nn.logical_to_mesh_sharding(names, mesh, rules))
    """
    check_cache(cache)
    layers = ("layers",) if len(cache.key.shape) == 5 else ()
    names = (*layers, "batch", "kv_heads", "kv_length", "head_dim")  # a scale has the first of these axes
    stored = {
        name: jax.tree.map(lambda leaf: PartitionSpec(*names[: leaf.ndim]), getattr(cache, name))
        for name in ("key", "value")
    }
    counters = jax.tree.map(lambda leaf: PartitionSpec("batch"), cache)
    return dataclasses.replace(counters, **stored)
