"""Makes an empty cache."""

import jax
import jax.numpy as jnp

from rope_jax._checks import check_flag, check_integer
from rope_jax.attention.cache import KVCache
from rope_jax.attention.quantized import Quantized, is_narrow, stored_dtype
from rope_jax.attention.rotations import Ropes, check_ropes
from rope_jax.attention.slots import Eviction, check_capacity, checked_slots


def init_cache(
    *,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    num_layers: int | None = None,
    dtype=jnp.float32,
    eviction: Eviction | None = None,
    num_sink_tokens: int = 0,
    rotated: bool = True,
    rope: Ropes = None,
) -> KVCache:
    """An empty cache.

    Example:
      >>> import rope_jax
      >>> rope_jax.init_cache(batch=1, capacity=16, num_kv_heads=2, head_dim=64).key.shape
      (1, 2, 16, 64)
      >>> window = rope_jax.init_cache(batch=1, capacity=16, num_kv_heads=2, head_dim=64, eviction="sliding")

    Args, shape:
      batch: B.
      capacity: S, the most tokens a row can hold, prompt and answer together.
      num_kv_heads: K.
      head_dim: H.
      num_layers: for a stack of layers: keys and values are ``[layers, B, K, S, H]``.

    Args, storage:
      dtype: of stored keys and values: floating, or int8 or an 8-bit float with a scale for each head and token;
        see :func:`rope_jax.attention.quantize` for the error of eight bits.
      eviction: what a full row does. None: it overflows. ``"sliding"``: it evicts its oldest token, so that the row
        is a window of S tokens.
      num_sink_tokens: tokens at the start of a row which are never evicted (Xiao et al. 2023). Positions are then
        counted inside the cache, so that keys must be stored unrotated.

    Args, rotation:
      rotated: whether keys are stored rotated. Each key is then rotated once, which suits a rope whose frequencies
        do not depend on the context length. Unrotated keys are rotated whenever they are read, at the frequencies
        and positions of the moment.
      rope: the rope of the keys, or a tuple with one for each layer: layers with a different rope raise an error.

    Returns:
      :class:`KVCache` of zeros, with ``num_tokens`` 0.

    Raises:
      ValueError: if a size is below 1, sink tokens leave no room or come without eviction, or keys are stored
        rotated beside sink tokens.
      TypeError: if a size is not an integer, or the dtype is neither a float of 16 bits or more nor one that
        :func:`rope_jax.attention.quantize` takes.
    """
    sizes = {"batch": batch, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in (sizes if num_layers is None else sizes | {"num_layers": num_layers}).items():
        if not jax.export.is_symbolic_dim(size):
            check_integer(name, size, least=1)
    check_ropes(rope)
    check_capacity(capacity, least=1)
    num_sink_tokens = checked_slots(capacity, eviction, num_sink_tokens).num_sink_tokens
    rotated = check_flag("rotated", rotated)
    dtype = stored_dtype("dtype", dtype)
    if num_sink_tokens and rotated:
        raise ValueError(
            "rotated must be False with sink tokens, whose positions move with the window, got True with "
            f"num_sink_tokens={num_sink_tokens}"
        )
    shape: tuple = (batch, num_kv_heads, capacity, head_dim)
    shape = shape if num_layers is None else (num_layers, *shape)

    def empty():  # a buffer each: a donated buffer must not be donated again
        if is_narrow(dtype):
            return Quantized(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.float32))
        return jnp.zeros(shape, dtype)

    return KVCache(
        key=empty(),
        value=empty(),
        num_tokens=jnp.zeros((batch,), jnp.int32),
        context_length=jnp.zeros((batch,), jnp.int32),
        eviction=eviction,
        num_sink_tokens=num_sink_tokens,
        rotated=rotated,
        rope=rope,
    )
