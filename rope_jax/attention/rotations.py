"""The rotations of a step: one for each distinct rope, at the context length that its frequencies are for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rope_jax._checks import as_int32, check_axes, check_dtype, device_array, known_any
from rope_jax.attention.cache import KVCache
from rope_jax.attention.quantized import Quantized
from rope_jax.attention.slots import Slots
from rope_jax.core.angles import Rotation
from rope_jax.core.frequencies import FrequencyChoice
from rope_jax.core.rope import Rope

Ropes = Rope | None | tuple[Rope | None, ...]
"""The rope of all layers, or a tuple with the rope of each layer."""


def distinct_ropes(ropes: Ropes) -> tuple[Rope | None, ...]:
    """Each different rope once, None for layers without rotation included."""
    return tuple(dict.fromkeys(ropes)) if isinstance(ropes, tuple) else (ropes,)


def first_rope(ropes: Ropes) -> Rope | None:
    """The first rope of a layer, None if no layer rotates."""
    return next((rope for rope in distinct_ropes(ropes) if rope is not None), None)


def check_ropes(ropes: Ropes) -> None:
    """Raises unless each rope is a :class:`Rope` or None, and unlike ropes differ by their schedule alone."""
    for rope in distinct_ropes(ropes):
        if not isinstance(rope, Rope | None):
            raise TypeError(f"rope must be a Rope, None, or a tuple of these, got {type(rope).__name__}")
    rotating = [rope for rope in distinct_ropes(ropes) if rope is not None]
    for rope in rotating[1:]:
        first = rotating[0]
        same = (rope.num_axes, rope.num_heads) == (first.num_axes, first.num_heads)
        if dataclasses.replace(rope, schedule=first.schedule) != first or not same:
            raise ValueError(
                "rope must be of layers that differ by schedule alone, with equal axes and heads, "
                f"got {first} and {rope}"
            )


def _depends_on_length(rope: Rope) -> bool:
    """Whether the schedule takes a context length. True also for a schedule with a fixed one of its own."""
    return hasattr(rope.schedule, "context_length")


def rotations_at(ropes: Ropes, positions, context_length, so_far) -> tuple[Rotation | None, jax.Array | None]:
    """The rotation of all layers and None; for unlike ropes C stacked rotations and int32 ``[layers]``, the choice.

    A schedule that depends on the context length takes ``context_length``, else its own, else ``so_far``.
    """
    distinct = distinct_ropes(ropes)
    rotating = [rope for rope in distinct if rope is not None]
    if not rotating:
        if context_length is not None:
            raise ValueError(
                f"context_length must be left out without a rope that depends on it, got {context_length}"
            )
        return None, None
    # If no schedule takes a context length, the call below raises the error.
    takers = [rope for rope in rotating if _depends_on_length(rope)] or rotating
    rotations: dict[Rope | None, Rotation] = {}
    for rope in rotating:
        length = context_length if rope in takers else None
        if length is None and rope.needs_context_length:
            length = so_far
        rotations[rope] = rope.rotation(positions, context_length=length)
    if not isinstance(ropes, tuple) or len(distinct) == 1:
        return rotations[distinct[0]], None
    like = rotations[rotating[0]]
    identity = Rotation(jnp.ones_like(like.cos), jnp.zeros_like(like.sin), like.per_head)
    each = [rotations.get(rope, identity) for rope in distinct]
    stacked = jax.tree.map(lambda *parts: jnp.stack(jnp.broadcast_arrays(*parts)), *each)
    return stacked, jnp.array([distinct.index(rope) for rope in ropes], jnp.int32)


def stored_context_length(cache: KVCache, ropes: Ropes, context_length, so_far, num_tokens, by_count: bool):
    """``(context_length, num_tokens, rerotates)`` of the cache after this step: int32 ``[B]`` twice, and a bool.

    The context length is None if the stored keys do not depend on one. If their frequencies may switch in this
    step, ``rerotates`` is True, and :func:`rerotate_stored_keys` is due. Keys that cannot be rotated again overflow
    their row if the frequencies switch.

    Args:
      cache: the cache before this step.
      ropes: of the layers.
      context_length: of the call, or None.
      so_far: int32 ``[B]``, the tokens of each row after this step.
      num_tokens: int32 ``[B]``, the counter after this step.
      by_count: whether keys are rotated to their sequence index, not to given positions.

    Raises:
      ValueError: if the cache must hold unrotated keys, or the context length is known to change.
    """
    distinct = distinct_ropes(ropes)
    takers = [rope for rope in distinct if rope is not None and _depends_on_length(rope)]
    if not cache.rotated or not takers:
        return None, num_tokens, False
    growing = context_length is None and any(rope.needs_context_length for rope in takers)
    if len(distinct) > 1:
        if context_length is None and not growing:
            return None, num_tokens, False
        raise ValueError(
            "cache must hold unrotated keys, init_cache(rotated=False), if layers differ in rope and the "
            "frequencies of some depend on the context length"
        )
    (rope,) = takers
    eight_bits = isinstance(cache.key, Quantized)
    if eight_bits and growing:
        raise ValueError(
            "rotated must be False in a cache of eight bits if frequencies depend on the context length, "
            "got a cache of rotated keys"
        )
    if context_length is None:
        context_length = so_far if growing else rope.schedule.context_length  # type: ignore[attr-defined]
    context_length = device_array("context_length", context_length)
    check_dtype("context_length", context_length, jnp.integer, "integer")
    batch = cache.num_tokens.shape[0]
    check_axes("context_length", context_length, "B" if context_length.ndim else "", B=batch)
    new = jnp.broadcast_to(as_int32(context_length), (batch,))
    old = jnp.where(cache.context_length == 0, new, cache.context_length)
    if by_count and not eight_bits and isinstance(rope.frequencies(new), FrequencyChoice):
        return new, num_tokens, True
    name = type(rope.schedule).__name__
    if growing:
        raise ValueError(
            "keys must be stored unrotated, init_cache(rotated=False), with a schedule that is no choice among "
            f"fixed frequencies, got {name}"
        )
    if known_any(old != new):
        given = " in eight bits" if eight_bits else "" if by_count else " to given positions"
        raise ValueError(
            f"context_length must stay {old.tolist()}, as the cache holds keys rotated by the frequencies of "
            f"{name}{given}, got {new.tolist()}: see init_cache(rotated=False)"
        )
    return new, jnp.where(old != new, jnp.int32(cache.slots.overflow_count), num_tokens), False


def rerotate_stored_keys(cache: KVCache, ropes: Ropes, context_length) -> KVCache:
    """Rotates stored keys again, to the frequencies for ``context_length [B]``, if a row switched frequencies.

    Only a choice among fixed frequencies switches (:class:`LongRope`), when a row outgrows the original length. A
    step without a switch costs nothing. Keys of a stack of layers ``[layers, B, K, S, H]`` share one rope.
    """
    (rope,) = [rope for rope in distinct_ropes(ropes) if rope is not None]
    old_length = jnp.where(cache.context_length == 0, context_length, cache.context_length)
    lengths = old_length, context_length
    return dataclasses.replace(
        cache, key=_rerotated(cache.key, cache.num_tokens, *lengths, rope=rope, slots=cache.slots)
    )


# Outside jit, the branches of a condition would be compiled anew in every call.
@functools.partial(jax.jit, static_argnames=("rope", "slots"), inline=True)
def _rerotated(key, num_tokens, old_length, new_length, *, rope: Rope, slots: Slots):
    old, new = rope.frequencies(old_length), rope.frequencies(new_length)
    assert isinstance(old, FrequencyChoice) and isinstance(new, FrequencyChoice)  # stored_context_length saw to it

    def rerotate(key):
        rerotated = rope.rerotate(
            jnp.swapaxes(key, 1, 2),
            slots.sequence_index(num_tokens),
            old_context_length=old_length,
            new_context_length=new_length,
        )
        return jnp.swapaxes(rerotated, 1, 2)

    switched = jnp.any(old.index != new.index)
    return jax.lax.cond(switched, jax.vmap(rerotate) if key.ndim == 5 else rerotate, lambda key: key, key)
