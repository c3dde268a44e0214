"""Pads prompts to a common length, and checks prompts and stop tokens."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import (
    as_int32,
    check_axes,
    check_dtype,
    check_integer,
    check_mask,
    check_sequence,
    device_array,
    is_concrete,
    known_any,
    known_of,
    shown,
)
from rope_jax.attention.cache import KVCache, check_cache
from rope_jax.attention.prefix import checked_prefix_length, divided_prefix
from rope_jax.attention.quantized import stored_dtype
from rope_jax.models.decoder import Decoder


def pad_prompts(prompts, *, buckets: int | Sequence[int] = 16) -> tuple[jax.Array, jax.Array]:
    """Stacks prompts of unequal length, padded on the right to the smallest bucket that holds the longest prompt.

    ``tokens[b, t] = prompts[b][t]`` and ``mask[b, t] = 1`` if ``t < len(prompts[b])``; both are 0 at padding.
    :func:`generate` compiles once per width. With an integer ``buckets``, prompts of up to L tokens need at most
    ``log2(L / buckets) + 1`` compilations.

    Args:
      prompts: B sequences of integers, at least one token each; ``bytes`` are a sequence too.
      buckets: the allowed widths; or the smallest width, doubled as needed: 16, 32, 64, ...

    Returns:
      ``(tokens, mask)``, int32 and bool ``[B, T]``: the arguments of :func:`generate`.

    Raises:
      TypeError: if a prompt or a bucket is not of integers.
      ValueError: if ``prompts`` or a prompt is empty, or the longest prompt fits in no bucket.

    Example:
      >>> import rope_jax
      >>> tokens, mask = rope_jax.generation.pad_prompts([[5, 6, 7], [8]], buckets=(2, 4, 8))
      >>> tokens.tolist(), mask.astype(int).tolist()
      ([[5, 6, 7, 0], [8, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]])
      >>> rope_jax.generation.pad_prompts([range(40)])[0].shape
      (1, 64)
    """
    rows = [_tokens_of(f"prompts[{index}]", prompt) for index, prompt in enumerate(_prompts(prompts))]
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    for index, row in enumerate(rows):
        if row.size == 0:
            raise ValueError(f"prompts must hold at least one token each, got none in prompts[{index}]")
        check_axes(f"prompts[{index}]", row, "T")
        check_dtype(f"prompts[{index}]", row, np.integer, "integer")
        if int(row.min()) < -(2**31) or int(row.max()) >= 2**31:
            raise ValueError(f"prompts must fit in int32, got {row.min()} to {row.max()} in prompts[{index}]")
    longest = max(row.size for row in rows)
    width = _bucket(longest, buckets)
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        tokens[index, : row.size] = row
        mask[index, : row.size] = True
    return jnp.asarray(tokens), jnp.asarray(mask)


def _prompts(prompts) -> list:
    """The prompts as a list: a sequence, or an array ``[B, T]``."""
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 2:
        return list(np.asarray(prompts))
    return check_sequence("prompts", prompts, "a sequence of prompts")


def _tokens_of(argument: str, prompt) -> np.ndarray:
    """The tokens of a prompt."""
    try:
        return np.array(list(prompt)) if isinstance(prompt, bytes) else np.asarray(prompt)
    except (TypeError, ValueError):
        raise TypeError(f"{argument} must be a sequence of integers, got {shown(prompt)}") from None


def _bucket(longest: int, buckets: int | Sequence[int]) -> int:
    """The smallest allowed width for the longest prompt."""
    if isinstance(buckets, Sequence) and not isinstance(buckets, str | bytes):
        widths = [check_integer("buckets", width, least=1) for width in buckets]
        if not widths or max(widths) < longest:
            raise ValueError(f"buckets must hold the longest prompt, T={longest}, got {tuple(widths)}")
        return min(width for width in widths if width >= longest)
    width = check_integer("buckets", buckets, least=1)
    while width < longest:
        width *= 2
    return width


def check_model(argument: str, model) -> None:
    """Raises TypeError unless the model is a :class:`Decoder`."""
    if not isinstance(model, Decoder):
        raise TypeError(f"{argument} must be a Decoder, got {shown(model)}")


def check_num_tokens(argument: str, number) -> int:
    """A number of tokens, of steps or of rows as an int, from 1 to 2^31 - 1."""
    number = check_integer(argument, number, least=1)
    if number >= 2**31:
        raise ValueError(f"{argument} must be below 2^31, got {shown(number)}")
    return number


def check_prompt(model: Decoder, prompt, mask) -> tuple[jax.Array, jax.Array | None]:
    """Checks the prompt ``[B, T]`` and its mask, and returns them as int32 and bool."""
    if isinstance(prompt, str):
        raise TypeError("prompt must be an array of tokens, got text: encode it, as tokenizer.encode(text).ids")
    tokens, prompt = prompt, device_array("prompt", prompt)
    check_axes("prompt", prompt, "B T")
    check_dtype("prompt", prompt, jnp.integer, "integer")
    if prompt.size == 0:
        raise ValueError(f"prompt must hold at least one row and one token, got shape {prompt.shape}")
    given = mask
    if mask is not None:
        mask = check_mask("mask", mask, "B T", B=prompt.shape[0], T=prompt.shape[1])
        if known_of(given, lambda mask: ~mask.astype(bool).any(axis=1)):
            raise ValueError("mask must have a real token in every row, got a row of padding only")
        prompt = jnp.where(mask, prompt, jnp.zeros_like(prompt))  # the values at padding may be no tokens at all
    if is_concrete((tokens, given)):
        # numpy, since operations of jnp return traced values while jax traces a function.
        known = np.asarray(tokens) if given is None else np.where(np.asarray(given), np.asarray(tokens), 0)
        low, high = known.min(), known.max()
        if low < 0 or high >= model.vocab_size:
            raise ValueError(f"prompt must hold tokens in [0, V={model.vocab_size}), got {low} to {high}")
    return as_int32(prompt), mask


def check_stop(model: Decoder, stop_token: int | Collection[int] | None) -> jax.Array:
    """The stop tokens as int32 ``[stops]``, with length 0 if there are none."""
    if stop_token is None:
        stop_token = ()
    # isinstance(array, Collection) holds for arrays without axes too, so arrays are flattened first.
    tokens: Any = stop_token
    if isinstance(stop_token, np.ndarray | jax.Array):
        check_dtype("stop_token", stop_token, jnp.integer, "integer")
        tokens = np.ravel(stop_token)
    tokens = tokens if isinstance(tokens, Collection) else (tokens,)
    stops = sorted(check_integer("stop_token", token) for token in tokens)
    if stops and not 0 <= stops[0] <= stops[-1] < model.vocab_size:
        raise ValueError(f"stop_token must be in [0, V={model.vocab_size}), got {shown(stop_token)}")
    return jnp.array(stops, jnp.int32)


def check_num_positions(
    argument: str, model: Decoder, prompt, mask, num_new_tokens: int, cache: KVCache | None = None
) -> None:
    """Raises ValueError if the new tokens are known to exceed the positions of the model's position embedding."""
    num_positions = getattr(model.position_embedding, "num_positions", None)
    if num_positions is None or not is_concrete((mask, cache)):
        return
    num_tokens = np.array([prompt.shape[1]]) if mask is None else np.asarray(mask).sum(axis=1)
    num_tokens = (num_tokens + (0 if cache is None else np.asarray(cache.num_tokens))).max()
    if num_tokens + num_new_tokens - 1 > num_positions:  # the last new token is returned but never embedded
        raise ValueError(
            f"{argument} must be at most {num_positions + 1 - num_tokens} after a prompt of {num_tokens} tokens: "
            f"position_embedding has {num_positions} positions, got {num_new_tokens}"
        )


def checked_cache_dtype(cache_dtype) -> np.dtype | None:
    """The dtype of a new cache, or None. Raises TypeError unless :func:`init_cache` takes the dtype."""
    return None if cache_dtype is None else stored_dtype("cache_dtype", cache_dtype)


def check_prefix(model: Decoder, cache: KVCache, prompt, mask, cache_dtype) -> None:
    """Raises ValueError unless the cache fits the model and the batch, and has not overflowed."""
    if cache_dtype is not None:
        raise ValueError(f"cache_dtype must be left out with a cache, which has a dtype already, got {cache_dtype}")
    check_cache(cache)
    sizes = dict(
        layers=model.num_layers, B={1, prompt.shape[0]}, K=model.num_kv_heads or model.num_heads, H=model.head_dim
    )
    check_axes("cache.key", cache.key, "layers B K S H", **sizes)
    if known_any(cache.overflowed):
        raise ValueError(
            f"cache must not have overflowed, got S={cache.capacity}, rows {cache.num_tokens.tolist()}"
        )
    if cache.eviction is not None:
        cache.slots.advance("prompt", cache.num_tokens, prompt.shape[1], mask, max_window=model.max_window)


def check_prefix_length(prefix_length, prompt, mask, cache: KVCache | None) -> jax.Array:
    """The prefix of each prompt, int32 ``[B or 1]``, which must be part of its prompt, before an empty cache.

    Raises:
      TypeError: if ``prefix_length`` is not an integer.
      ValueError: if its shape is wrong, or a prefix is known to be longer than its prompt or to begin in the cache.
    """
    prefix_length = checked_prefix_length(prefix_length, prompt.shape[0])
    before = jnp.zeros((1,), jnp.int32) if cache is None else cache.num_tokens
    divided_prefix(prefix_length, before, before + (prompt.shape[1] if mask is None else mask.sum(axis=1)))
    return prefix_length
