"""Rotary positions for Flax's own attention modules, of linen and of NNX."""

import functools
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_flag, check_function, device_array, shown
from rope_jax.core.rope import Rope


def rotary_attention_fn(
    rope: Rope,
    positions=None,
    *,
    attention_fn: Callable[..., jax.Array] = nn.dot_product_attention,
    decode: bool = False,
) -> Callable[..., jax.Array]:
    """An ``attention_fn`` for ``flax.linen.MultiHeadDotProductAttention`` and ``flax.nnx.MultiHeadAttention``.

    It rotates q and k, then attends.

    For Flax's decode mode, set ``decode=True``. Flax caches keys before it calls ``attention_fn``, so keys are
    stored unrotated, and all S slots are rotated for every token. The query stands at the last slot that the mask
    allows it to read. :class:`RotaryAttention` rotates each key once, and gives NaN past the capacity, whereas Flax
    overwrites its last slot.

    Args:
      rope: a :class:`Rope` with head_dim ``qkv_features / num_heads``.
      positions: int32 ``[..., T]`` (or ``[..., T, A]``); None is ``0 .. T-1``. In a jitted model, call
        :func:`rotary_attention_fn` inside the model, to use its positions.
      attention_fn: called with the rotated q and k.
      decode: whether to serve Flax's decode mode: one query and S keys, with a mask of the slots written so far.

    Returns:
      A function with the signature of ``attention_fn``.

    Raises:
      TypeError: if an argument is of another kind.
      ValueError: if positions are given with ``decode``, since tokens stand at the slots of Flax's cache. The
        returned function raises it if the numbers of keys and queries differ, unless ``decode`` serves a single
        query with a mask. Do not use cross-attention with equally many keys and queries: the error cannot be
        detected, but queries and keys share no positions. :class:`RotaryAttention` serves cross-attention.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rope_jax
      >>> from flax import nnx
      >>> rope = rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard())
      >>> attention_fn = rope_jax.attention.rotary_attention_fn(rope)
      >>> x = jnp.ones((2, 5, 64))
      >>> module = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn)
      >>> module.init_with_output(jax.random.key(0), x)[0].shape
      (2, 5, 64)
      >>> options = dict(num_heads=4, in_features=64, decode=False, rngs=nnx.Rngs(0))
      >>> nnx.MultiHeadAttention(**options, attention_fn=attention_fn)(x).shape
      (2, 5, 64)
    """
    if not isinstance(rope, Rope):
        raise TypeError(f"rope must be a Rope, got {shown(rope)}")
    check_function("attention_fn", attention_fn)
    if check_flag("decode", decode) and positions is not None:
        raise ValueError("positions must be left out with decode=True: tokens stand at the slots of Flax's cache")
    parameters = inspect.signature(attention_fn).parameters
    takes_causal = "is_causal" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(attention_fn)  # linen passes only the arguments named in the signature
    def rotated(query, key, value, *args, **kwargs):
        query, key = device_array("query", query), device_array("key", key)
        check_axes("query", query, "... T N H", H=rope.head_dim)
        check_axes("key", key, "... S K H", H=rope.head_dim)
        length, keys = query.shape[-3], key.shape[-3]
        if length == keys:
            query, key = rope(query, key, jnp.arange(length, dtype=jnp.int32) if positions is None else positions)
        elif decode:
            query, key = _rotate_at_slots(rope, query, key, kwargs.get("mask"))
            kwargs.pop("is_causal", None)  # the mask covers causality, which Flax would count from the first slot
        else:
            raise ValueError(
                f"key must have as many positions as query, T={length}, got S={keys}. Flax's decode=True caches "
                "keys before attention_fn gets them: to decode, pass decode=True to rotary_attention_fn, or use "
                "rope_jax.RotaryAttention with cache= or decode=True; for cross-attention, kv= and kv_positions="
            )
        # NNX passes is_causal, which linen's function does not take.
        if not takes_causal and kwargs.pop("is_causal", False):
            causal = jnp.tril(jnp.ones((length, keys), bool))
            kwargs["mask"] = nn.combine_masks(kwargs.get("mask"), causal[(None,) * (query.ndim - 2)], dtype=bool)
        return attention_fn(query, key, value, *args, **kwargs)

    return rotated


def _rotate_at_slots(rope: Rope, query, key, mask) -> tuple[jax.Array, jax.Array]:
    """One query, rotated to the last slot that it may read, and the keys of all slots."""
    length, keys = query.shape[-3], key.shape[-3]
    mask = None if mask is None else device_array("mask", mask)
    if length != 1 or mask is None:
        got = f"T={length} queries and S={keys} keys" + (" without a mask" if mask is None else "")
        raise ValueError(f"decode=True serves one query with the mask of Flax's decode mode, got {got}")
    slots = jnp.arange(keys, dtype=jnp.int32)
    readable = jnp.any(mask.astype(bool), axis=-3)[..., 0, :]  # by some head: [..., S]
    last = jnp.max(jnp.where(readable, slots, jnp.zeros_like(slots)), axis=-1, keepdims=True)
    return rope.rotate(query, rope.rotation(last)), rope.rotate(key, rope.rotation(slots))
