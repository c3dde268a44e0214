"""Plan a step once for all layers: positions, rotations, cache slots, and the facts behind an attention mask.

:func:`make_plan` checks the call and returns an immutable pytree. A stack of layers hands the plan down as one
broadcast argument, so that cos and sin are evaluated once for all layers, and nothing is checked twice. The plan
carries facts (causal, window, segments, sequence indices), not a mask: attention masks one block of scores at a
time, or leaves the mask to a kernel.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_axes, check_callable, check_mask, check_name, device_array, is_concrete
from rope_jax.attention.bias import BiasFunction, PositionBias, bias_function
from rope_jax.attention.cache import CachePolicy, KVCache
from rope_jax.attention.facts import Facts
from rope_jax.attention.mask import checked_sequence_index
from rope_jax.attention.plan_arguments import (
    NO_WINDOW,
    Windows,
    check_cache_of_plan,
    check_layers,
    check_with_cache,
    checked_attention_mask,
    checked_positions,
    checked_sizes,
    count,
    windows,
)
from rope_jax.attention.prefix import (
    check_beside_prefix,
    checked_prefix_length,
    divided_prefix,
    prefix_query_index,
)
from rope_jax.attention.rotations import (
    Ropes,
    distinct_ropes,
    rerotate_stored_keys,
    rotations_at,
    stored_context_length,
)
from rope_jax.core.angles import Rotation
from rope_jax.core.positions import segment_starts

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The facts of one step, for all layers of a model.

    Attributes:
      positions: ``[T]``, ``[B or 1, T]`` or ``[..., T, A]``: the positions that queries and keys are rotated to.
      sequence_index: int32 ``[B or 1, T]``: the rank of each token in its row, which causality and windows go by.
      query_index: int32 ``[B or 1, T]``, the sequence index up to which each query reads; None if its own.
      key_sequence_index: int32 ``[B or 1, S]``, of the cache's slots; None without a cache.
      key_positions: ``[S]``, ``[B or 1, S]`` or ``[..., S, A]``, of the keys in cross-attention; int32 ``[B or 1,
        S]``, of the slots of a cache of unrotated keys; else None.
      mask: bool ``[B, T]``, True at real tokens; None if all tokens are real.
      attention_mask: bool ``[B or 1, N or 1, T or 1, S]``, of the caller; None without one.
      key_mask: bool ``[B, S]``, True at real tokens of the keys in cross-attention; None if all are real.
      segments: int32 ``[B, T]``, the number of each token's segment; None if a row is one sequence.
      rotation: cos and sin at ``positions``. For layers with unlike ropes ``[C, B or 1, T, R/2]``, one for each of
        the C distinct ropes.
      key_rotation: cos and sin at ``key_positions``, likewise.
      position_bias: added to the scores, as a function of distances; None without a position bias.
      starts_empty: bool ``[]``, whether the cache had no tokens; None without a cache.
      slots: int32 ``[B, T]``, where the cache stores the new tokens; None without a cache.
      seen: int32 ``[B]``, the cache's counter before this step; None without a cache.
      num_tokens: int32 ``[B]``, its counter after this step.
      context_length: int32 ``[B]``, the cache's context length after this step; None if the stored keys do not
        depend on it.
      rope_of_layer: int32 ``[layers]``, which of the C rotations each layer reads; None if the ropes are alike.
      window_of_layer: int32 ``[layers]``; None if the windows are alike.
      traced_window: int32 ``[]``, a window that is traced.
      known_window: a window that is known, the same for all layers.
      causal: whether a token reads only itself and earlier tokens.
      ropes: the rope or ropes that the plan was made for.
      cache_policy: eviction, sink tokens and storage of the cache that the plan was made for.
      rerotates: whether :meth:`begin` may have to rotate stored keys again.
      reordered: whether the caller gave the sequence index.
      kv_length: S in cross-attention; None in self-attention.
      in_stack: whether a stack of layers made the plan for its cache, and has checked its layers and x.
    """

    positions: jax.Array
    sequence_index: jax.Array
    query_index: jax.Array | None = None
    key_sequence_index: jax.Array | None = None
    key_positions: jax.Array | None = None
    mask: jax.Array | None = None
    attention_mask: jax.Array | None = None
    key_mask: jax.Array | None = None
    segments: jax.Array | None = None
    rotation: Rotation | None = None
    key_rotation: Rotation | None = None
    position_bias: BiasFunction | None = None
    starts_empty: jax.Array | None = None
    slots: jax.Array | None = None
    seen: jax.Array | None = None
    num_tokens: jax.Array | None = None
    context_length: jax.Array | None = None
    rope_of_layer: jax.Array | None = None
    window_of_layer: jax.Array | None = None
    traced_window: jax.Array | None = None
    known_window: int | None = dataclasses.field(default=None, metadata=_STATIC)
    causal: bool = dataclasses.field(default=True, metadata=_STATIC)
    ropes: Ropes = dataclasses.field(default=None, metadata=_STATIC)
    cache_policy: CachePolicy | None = dataclasses.field(default=None, metadata=_STATIC)
    rerotates: bool = dataclasses.field(default=False, metadata=_STATIC)
    reordered: bool = dataclasses.field(default=False, metadata=_STATIC)
    kv_length: int | None = dataclasses.field(default=None, metadata=_STATIC)
    in_stack: bool = dataclasses.field(default=False, metadata=_STATIC)

    @property
    def window(self) -> int | jax.Array | None:
        """The window of the layers: known, traced, or None."""
        return self.known_window if self.traced_window is None else self.traced_window

    def of_layer(self, layer) -> "Plan":
        """The plan of one layer of a stack: its rotation and its window. The number of the layer may be traced."""
        rotation, key_rotation, ropes = self.rotation, self.key_rotation, self.ropes
        known_window, traced_window = self.known_window, self.traced_window
        if self.rope_of_layer is not None:
            rope = _entry_of(self.rope_of_layer, layer)
            rotation, key_rotation = jax.tree.map(lambda leaf: leaf[rope], (rotation, key_rotation))
        if isinstance(ropes, tuple):
            if len(distinct_ropes(ropes)) == 1:
                ropes = ropes[0]
            elif is_concrete(layer):
                ropes = ropes[int(layer)]
        if self.window_of_layer is not None:
            traced_window = _entry_of(self.window_of_layer, layer)
            if is_concrete(traced_window):
                window, traced_window = int(traced_window), None
                known_window = None if window == NO_WINDOW else window
        return dataclasses.replace(
            self,
            rotation=rotation,
            key_rotation=key_rotation,
            known_window=known_window,
            traced_window=traced_window,
            rope_of_layer=None,
            window_of_layer=None,
            ropes=ropes,
        )

    def facts(self, *, fresh: bool = False) -> Facts:
        """What attention must know. If ``fresh``, the new tokens read only themselves: the cache has none."""
        if self.kv_length is not None:
            return Facts(mask=self.attention_mask)
        cached = self.slots is not None and not fresh
        segments = self.segments
        if self.mask is not None and not cached:  # a cache stores no padding
            segments = jnp.where(self.mask, jnp.int32(0) if segments is None else segments, jnp.int32(-1))
        # Without gaps, tokens have the order of their indices; with gaps, that is all that causality needs.
        in_order = not cached and not self.reordered and self.query_index is None
        in_order &= self.mask is None or (self.window is None and self.position_bias is None)
        queries = self.sequence_index if self.query_index is None else self.query_index
        keys = self.key_sequence_index if cached else self.sequence_index
        sinks = 0 if self.cache_policy is None or not cached else self.cache_policy.num_sink_tokens
        return Facts(
            causal=self.causal,
            window=self.window,
            query_index=None if in_order else queries,
            key_index=None if in_order else keys,
            num_sink_tokens=sinks,
            segments=segments,
            mask=self.attention_mask,
            position_bias=self.position_bias,
            bias_key_index=self.key_positions if sinks else None,
        )

    def begin(self, cache: KVCache) -> KVCache:
        """The cache in this step: stored keys rotated to the frequencies of the step's context length.

        Until :meth:`end` only layers take it. To give a step up, go on from the cache before it.

        Raises:
          ValueError: if the plan was not made with this cache as it stands. Rows of which only run time knows that
            they have other tokens are NaN, and ``overflowed`` after the step.
        """
        if not self.in_stack:
            check_cache_of_plan(self, cache, in_step=False)
        cache = rerotate_stored_keys(cache, self.ropes, self.context_length) if self.rerotates else cache
        return dataclasses.replace(cache, in_step=True)

    def end(self, cache: KVCache) -> KVCache:
        """The cache with its counters advanced by this step. Raises ValueError unless the step has begun."""
        if not self.in_stack:
            check_cache_of_plan(self, cache, in_step=True)
        assert self.num_tokens is not None
        is_other = cache.num_tokens != self.seen
        num_tokens = jnp.where(is_other, jnp.int32(cache.slots.overflow_count), self.num_tokens)
        context_length = cache.context_length if self.context_length is None else self.context_length
        return dataclasses.replace(cache, num_tokens=num_tokens, context_length=context_length, in_step=False)

    def overflowed(self, cache: KVCache) -> jax.Array:
        """bool ``[B]``: rows whose tokens do not fit, or that have other tokens than those of the plan's cache."""
        assert self.num_tokens is not None
        return cache.slots.overflowed(self.num_tokens) | (cache.num_tokens != self.seen)


def make_plan(
    ropes: Ropes,
    shape: tuple[int, int],
    *,
    positions=None,
    sequence_index=None,
    mask=None,
    segment_ids=None,
    causal: bool = True,
    prefix_length=None,
    attention_mask=None,
    window: Windows = None,
    position_bias: PositionBias | None = None,
    num_heads: int | None = None,
    cache: KVCache | None = None,
    context_length=None,
    learn_frequencies: bool = False,
    argument: str = "x",
) -> Plan:
    """Checks the arguments of one step and decides what all layers share.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard())
      >>> x = jnp.ones((2, 5, 64))
      >>> layer = rope_jax.RotaryAttention(num_heads=4, head_dim=16, rope=rope)
      >>> params = layer.init(jax.random.key(0), x)
      >>> plan = rope_jax.attention.make_plan(rope, x.shape[:2])  # once, for as many layers as there are
      >>> layer.apply(params, layer.apply(params, x, plan=plan), plan=plan).shape
      (2, 5, 64)
      >>> cache = rope_jax.init_cache(batch=2, capacity=8, num_kv_heads=4, head_dim=16)  # of one layer
      >>> plan = rope_jax.attention.make_plan(rope, x.shape[:2], cache=cache)
      >>> y, cache = layer.apply(params, x, plan=plan, cache=plan.begin(cache))
      >>> plan.end(cache).num_tokens.tolist()  # without `end`, the next plan is an error
      [5, 5]

    Args, shape:
      ropes: the rope of the layers, or a tuple with one for each layer; None for layers without rotation.
      shape: ``(B, T)``.
      learn_frequencies: whether the layers learn their frequencies, and compute rotations of their own.
      argument: the name of the tokens in error messages.

    Args, tokens:
      positions: integers ``[T]`` or ``[B or 1, T]`` (``[..., T, A]`` if the rope has axes). By default the count of
        real tokens so far, within each segment, after the tokens in the cache.
      sequence_index: integers ``[B or 1, T]``, if tokens are stored out of order; by default the count of real
        tokens so far. Positions default to it.
      mask: bool or integer ``[B, T]``, nonzero at real tokens.
      segment_ids: integers ``[B, T]`` of packed sequences: runs of equal ids read only themselves.

    Args, attention:
      causal: whether a token reads only itself and earlier tokens.
      prefix_length: integers, ``[]`` or ``[B]``; see :class:`RotaryAttention`.
      attention_mask: bool ``[B or 1, N or 1, T or 1, S]``; see :class:`RotaryAttention`.
      window: a token reads only tokens less than this many away; may be traced; a tuple has one for each layer.
      position_bias: added to the scores; see :class:`RotaryAttention`.
      num_heads: N; needed with a position bias.

    Args, cache:
      cache: the tokens before these.
      context_length: the length that the frequencies are for, if the schedule depends on it: integers, ``[]`` or
        ``[B]``. By default the tokens of each row so far, if there is a cache.

    Returns:
      :class:`Plan`.

    Raises:
      ValueError: if the arguments do not go together, tokens are known at trace time not to fit in the cache, or
        the cache's last step has not ended.
      TypeError: if an array has a dtype of another kind.
    """
    flags = dict(causal=causal, learn_frequencies=learn_frequencies)
    batch, length, num_heads = checked_sizes(shape, num_heads, **flags)
    check_layers(ropes, window)
    if type(argument) is not str:
        check_name("argument", argument)
    if isinstance(context_length, np.ndarray | jax.Array) and context_length.ndim:
        check_axes("context_length", context_length, "B", B={1, batch})
    check_callable("position_bias", position_bias, "distance", "num_heads", "causal")
    if position_bias is not None and num_heads is None:
        raise ValueError("num_heads must be given with a position_bias, got None")
    if learn_frequencies and context_length is not None:
        raise ValueError(f"context_length must be left out with learned frequencies, got {context_length}")
    rotating = [rope for rope in distinct_ropes(ropes) if rope is not None]
    first = rotating[0] if rotating else None
    if getattr(mask, "ndim", 0) == 4:
        raise ValueError(
            f"mask must have shape [B, T], got {np.shape(mask)}: pass a mask [B, N, T, S] as attention_mask"
        )
    if mask is not None:
        mask = check_mask("mask", mask, "B T", B=batch, T=length)
    if cache is not None:
        check_with_cache(cache, ropes, batch, causal, segment_ids)
    kv_length = length if cache is None else cache.capacity
    if attention_mask is not None:
        attention_mask = checked_attention_mask(attention_mask, batch, num_heads, length, kv_length, cache)
    if prefix_length is not None:
        check_beside_prefix(
            causal,
            sequence_index=sequence_index,
            segment_ids=segment_ids,
            window=window,
            position_bias=position_bias,
        )
        prefix_length = checked_prefix_length(prefix_length, batch)
    starts = None
    if segment_ids is not None:
        segment_ids = device_array("segment_ids", segment_ids)
        check_axes("segment_ids", segment_ids, "B T", B=batch, T=length)
        starts = segment_starts(segment_ids)

    # The counter is read before it advances: the new tokens come after those in the cache.
    seen = None if cache is None else cache.num_tokens
    by_count, reordered = positions is None, sequence_index is not None
    if sequence_index is not None:
        for name, value in (("cache", cache), ("segment_ids", segment_ids)):  # these count tokens by their index
            if value is not None:
                raise ValueError(f"{name} must be left out with sequence_index, got {type(value).__name__}")
        sequence_index = counted = checked_sequence_index(sequence_index, batch, length)
    else:
        sequence_index = counted = count(shape, mask, None, seen)
        if starts is not None and positions is None:
            # Segments restart the positions, but not the index that causality and windows go by.
            counted = count(shape, mask, starts, seen)
    if positions is None:
        if first is not None and first.num_axes > 1:
            raise ValueError(
                f"positions must be [B, T, A={first.num_axes}] for a rope of {first.num_axes} axes, got None"
            )
        positions = counted
    else:
        positions = checked_positions(positions, shape, first, cache)

    known_window, traced_window, window_of_layer, max_window = windows(window)
    facts: dict = dict(
        positions=positions,
        sequence_index=sequence_index,
        query_index=None if prefix_length is None else prefix_query_index(prefix_length, sequence_index),
        mask=mask,
        attention_mask=attention_mask,
        segments=None if starts is None else jnp.cumsum(starts, axis=-1, dtype=jnp.int32),
        known_window=known_window,
        traced_window=traced_window,
        window_of_layer=window_of_layer,
        causal=causal,
        ropes=ropes,
        reordered=reordered,
    )
    keys, so_far = sequence_index, None
    if cache is not None:
        seen = cache.num_tokens
        num_tokens = cache.slots.advance(argument, seen, length, mask, max_window=max_window)
        after = seen + (length if mask is None else jnp.sum(mask, axis=-1, dtype=jnp.int32))
        # A row is at least one token long; with sink tokens, positions are counted inside the cache.
        so_far = jnp.clip(after, 1, cache.capacity if cache.num_sink_tokens else None)
        stored, rerotates = None, False
        if not learn_frequencies:
            stored, num_tokens, rerotates = stored_context_length(
                cache, ropes, context_length, so_far, num_tokens, by_count
            )
        if prefix_length is not None:
            divided = divided_prefix(prefix_length, seen, after)
            num_tokens = jnp.where(divided, jnp.int32(cache.slots.overflow_count), num_tokens)
        keys = cache.slots.positions(after)
        facts |= dict(
            key_sequence_index=cache.slots.sequence_index(after),
            key_positions=None if cache.rotated else keys,
            starts_empty=jnp.all(seen == 0),
            seen=seen,
            slots=cache.slots.of_new_tokens(seen, jnp.ones(shape, bool) if mask is None else mask),
            num_tokens=num_tokens,
            context_length=stored,
            cache_policy=cache.policy,
            rerotates=rerotates,
        )
    if not learn_frequencies:
        facts["rotation"], facts["rope_of_layer"] = rotations_at(ropes, positions, context_length, so_far)
        if cache is not None and not cache.rotated and rotating:
            facts["key_rotation"], _ = rotations_at(ropes, keys, context_length, so_far)
    if position_bias is not None and num_heads is not None:
        facts["position_bias"] = bias_function(position_bias, num_heads, bool(causal), (length, keys.shape[-1]))
    return Plan(**facts)


def _entry_of(per_layer: jax.Array, layer):
    """The entry of one layer. A number that is known to be outside would be clamped: IndexError."""
    if is_concrete(layer) and not 0 <= int(layer) < per_layer.shape[0]:
        raise IndexError(f"layer must be in [0, {per_layer.shape[0]}), got {layer}")
    return per_layer[layer]
