"""Checks and defaults of the arguments of a plan."""

from typing import Any

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_dtype, check_flag, check_integer, device_array, known_any, shown
from rope_jax.attention.cache import KVCache, check_between_steps, check_cache
from rope_jax.attention.mask import window_size
from rope_jax.attention.rotations import Ropes, check_ropes, first_rope
from rope_jax.core.angles import leading_axes
from rope_jax.core.positions import count_positions
from rope_jax.core.rope import Rope

Windows = int | jax.Array | None | tuple[int | None, ...]
"""The window of all layers, or a tuple with the window of each layer."""

NO_WINDOW = jnp.iinfo(jnp.int32).max  # a window longer than any row


def count(shape: tuple[int, int], real, starts, seen) -> jax.Array:
    """The count of real tokens before each token, after the ``seen [B]`` in the cache: int32 ``[B, T]``.

    ``[1, T]`` if all rows are alike, so that their rotation is computed once.
    """
    if real is None and starts is None:
        count = jnp.arange(shape[1], dtype=jnp.int32)[None]
    else:
        count = count_positions(jnp.ones_like(starts) if real is None else real, starts)
    return count if seen is None else count + seen[:, None]


def checked_sizes(shape, num_heads, **flags) -> tuple[Any, Any, int | None]:
    """B, T and N, or None for N: integers or symbolic sizes.

    Raises:
      TypeError: if a size is of another kind, or a flag is neither True nor False.
      ValueError: if a size is out of range, or ``shape`` is not ``(B, T)``.
    """
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(f"shape must be (B, T), got {shown(shape)}: pass x.shape[:2]")
    if not all((type(size) is int and size >= 0) or jax.export.is_symbolic_dim(size) for size in shape):
        shape = tuple(check_integer("shape", size, least=0) for size in shape)
    if num_heads is not None and not (type(num_heads) is int and num_heads > 0):
        num_heads = check_integer("num_heads", num_heads, least=1)
    for name, flag in flags.items():
        if type(flag) is not bool:
            check_flag(name, flag)
    return *shape, num_heads


def check_layers(ropes: Ropes, window: Windows) -> None:
    """Raises unless ropes go together, and layers that differ are equally many."""
    check_ropes(ropes)
    if any(isinstance(each, tuple) and not each for each in (ropes, window)):
        raise ValueError(f"rope and window must have an entry for each layer, got {ropes} and {window}")
    if isinstance(ropes, tuple) and isinstance(window, tuple) and len(ropes) != len(window):
        raise ValueError(f"window must have an entry for each of {len(ropes)} layers, got {len(window)}")


def check_with_cache(cache, ropes: Ropes, batch, causal: bool, segment_ids) -> None:
    """Raises unless the step can go with a cache."""
    check_cache(cache)
    check_between_steps(cache)
    check_axes("cache.num_tokens", cache.num_tokens, "B", B=batch)
    if segment_ids is not None:
        raise ValueError("segment_ids must be left out with a cache: a cached row is one sequence")
    if not causal:
        raise ValueError("causal must be True with a cache: earlier tokens cannot read later ones")
    first = first_rope(ropes)
    if first is not None and first.num_axes > 1:  # a cache keeps no positions, from which to rotate keys later
        if not cache.rotated:
            raise ValueError(
                f"cache must hold rotated keys, init_cache(rotated=True), for a rope of {first.num_axes} axes: "
                "it keeps no positions"
            )
        if first.needs_context_length:
            raise ValueError(
                f"context_length must be a field of the schedule with a cache, for a rope of {first.num_axes} "
                f"axes, got {first.schedule}"
            )
    if cache.rope is not None and cache.rope != ropes:
        raise ValueError(f"cache must hold keys rotated by {ropes}, got keys of {cache.rope}")


def check_cache_of_plan(plan, cache, *, in_step: bool) -> None:
    """Raises unless the plan was made for this cache, and its step has begun, or has not."""
    check_cache(cache)
    if plan.cache_policy != cache.policy:
        raise ValueError(f"plan must be made with cache= of {cache.policy}, got a plan for {plan.cache_policy}")
    if cache.num_tokens.shape != plan.seen.shape:
        raise ValueError(f"cache must have B={plan.seen.shape[0]} rows, got {cache.num_tokens.shape[0]}")
    if cache.rope is not None and cache.rope != plan.ropes:
        raise ValueError(f"cache must hold keys rotated by {plan.ropes}, got keys of {cache.rope}")
    if not in_step:
        check_between_steps(cache)
    elif not cache.in_step:
        raise ValueError("cache must be what plan.begin(cache) returned, got a cache that no step has begun")
    if known_any(cache.num_tokens != plan.seen):
        got = f"a plan for rows of {plan.seen.tolist()} tokens, and rows of {cache.num_tokens.tolist()}"
        raise ValueError(f"plan must be made for each step, with the cache of that step, got {got}")


def checked_attention_mask(
    attention_mask, batch: int, num_heads: int | None, length, kv_length, cache: KVCache | None = None
) -> jax.Array:
    """The attention mask of the caller, bool ``[B or 1, N or 1, T or 1, S]``.

    Raises:
      TypeError: if the mask is not bool.
      ValueError: if its shape is wrong, or the cache evicts tokens.
    """
    if cache is not None and cache.eviction is not None:
        raise ValueError(
            f"attention_mask must be left out with a cache of eviction={cache.eviction!r}: its slots change tokens"
        )
    attention_mask = device_array("attention_mask", attention_mask)
    sizes: dict = dict(B={1, batch}, T={1, length}, S=kv_length)
    if num_heads is not None:
        sizes["N"] = {1, num_heads}
    check_axes("attention_mask", attention_mask, "B N T S", **sizes)
    check_dtype("attention_mask", attention_mask, jnp.bool, "bool, True if a query may read a key")
    return attention_mask


def checked_positions(
    positions, shape, rope: Rope | None, cache: KVCache | None, argument: str = "positions"
) -> jax.Array:
    """The given positions, if the rope and the cache can take them."""
    positions = device_array(argument, positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer) and positions.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"{argument} must be integers, float32 or float64, got dtype {positions.dtype}")
    num_axes = 1 if rope is None else rope.num_axes
    if num_axes > 1:
        positions = _with_axes(positions, shape, num_axes, argument)
    elif positions.ndim > 1:
        check_axes(argument, positions, "B T", B={1, shape[0]}, T=shape[1])
    else:
        if positions.ndim and positions.shape[0] == shape[0] != shape[1] == 1:  # one for each row of a decode step
            got = f"got {positions.shape}: pass {argument}[:, None]"
            raise ValueError(f"{argument} must have shape [T] or [B, T] with B={shape[0]}, T=1, {got}")
        check_axes(argument, positions, "T", T=shape[1])
    if cache is not None and rope is not None and (not cache.rotated or rope.needs_context_length):
        kind = "unrotated keys" if not cache.rotated else "keys whose frequencies depend on the context length"
        raise ValueError(
            f"positions must be left out with a cache of {kind}: it rotates keys to their sequence index"
        )
    return positions


def _with_axes(positions, shape: tuple[int, int], num_axes: int, argument: str) -> jax.Array:
    """Positions ``[T, A]`` or ``[B or 1, T, A]``; those of text, ``[B or 1, T]``, are the same on every axis."""
    batch, length = shape
    text = positions.ndim == 2 and positions.shape[0] in (1, batch) and positions.shape[1] == length
    if text and positions.shape == (length, num_axes):
        raise ValueError(
            f"{argument} of shape {positions.shape} may be [B, T] or [T, A={num_axes}]: pass [B, T, A={num_axes}]"
        )
    if text:
        return jnp.broadcast_to(positions[..., None], (*positions.shape, num_axes))
    leading_axes(positions, num_axes, argument=argument, T=length)
    if positions.ndim > 2:
        check_axes(argument, positions, "B T A", B={1, batch})
    return positions


def windows(window: Windows):
    """``(window, traced_window, window_of_layer, max_window)``, each None if it does not apply."""
    if not isinstance(window, tuple):
        window = window_size(window)
        return (window, None, None, window) if isinstance(window, int | None) else (None, window, None, None)
    windows = [window_size(each) for each in window]
    of_layer = jnp.array([NO_WINDOW if each is None else each for each in windows], jnp.int32)
    known = [each for each in windows if isinstance(each, int)]
    return None, None, of_layer, max(known) if len(known) == len(windows) else None
