"""Which tokens does a model continue, and where does it stop?"""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import as_int32, check_axes, check_dtype, check_integer, check_mask, device_array, known_any
from rope_jax.attention.cache import KVCache
from rope_jax.models.decoder import Decoder


def pad_prompts(prompts, *, buckets: int | Sequence[int] = 16) -> tuple[jax.Array, jax.Array]:
    """Prompts of unequal length as one array, padded on the right to the smallest bucket that holds the longest.

    ``tokens[b, t] = prompts[b][t]`` and ``mask[b, t] = 1`` where ``t < len(prompts[b])``; else both are 0. Each
    width is a program of its own for :func:`generate`, and so lengths up to L make ``log2(L / buckets) + 1`` of
    them at most.

    Args:
      prompts: B sequences of integers, of at least one token each; ``bytes`` are one.
      buckets: the widths that there are, or the smallest of those that double: 16, 32, 64, ...

    Returns:
      ``(tokens, mask)``, int32 and bool ``[B, T]``, as :func:`generate` takes them.

    Raises:
      TypeError: if a prompt or a bucket is not of integers.
      ValueError: if there is no prompt, a prompt is empty, or the longest fits in no bucket.

    Example:
      >>> import rope_jax
      >>> tokens, mask = rope_jax.generation.pad_prompts([[5, 6, 7], [8]], buckets=(2, 4, 8))
      >>> tokens.tolist(), mask.astype(int).tolist()
      ([[5, 6, 7, 0], [8, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]])
      >>> rope_jax.generation.pad_prompts([range(40)])[0].shape
      (1, 64)
    """
    rows = [np.array(list(prompt)) if isinstance(prompt, bytes) else np.asarray(prompt) for prompt in prompts]
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


def _bucket(longest: int, buckets: int | Sequence[int]) -> int:
    """The smallest width that holds the longest prompt."""
    if isinstance(buckets, Sequence):
        widths = [check_integer("buckets", width, least=1) for width in buckets]
        if not widths or max(widths) < longest:
            raise ValueError(f"buckets must hold the longest prompt, T={longest}, got {tuple(widths)}")
        return min(width for width in widths if width >= longest)
    width = check_integer("buckets", buckets, least=1)
    while width < longest:
        width *= 2
    return width


def check_prompt(model: Decoder, prompt, mask) -> tuple[jax.Array, jax.Array | None]:
    """The prompt ``[B, T]`` as int32 and its mask as bool, if they are tokens of the model."""
    prompt = device_array("prompt", prompt)
    check_axes("prompt", prompt, "B T")
    check_dtype("prompt", prompt, jnp.integer, "integer")
    if prompt.size == 0:
        raise ValueError(f"prompt must hold at least one row and one token, got shape {prompt.shape}")
    if mask is not None:
        mask = check_mask("mask", mask, "B T", B=prompt.shape[0], T=prompt.shape[1])
        if known_any(~jnp.any(mask, axis=1)):
            raise ValueError("mask must have a real token in every row, got a row of padding alone")
        prompt = jnp.where(mask, prompt, jnp.zeros_like(prompt))  # what stands at padding is nobody's token
    if is_known(prompt):
        known = np.asarray(prompt)  # by numpy: inside a function that is being traced, jnp would forget that it is
        low, high = known.min(), known.max()
        if low < 0 or high >= model.vocab_size:
            raise ValueError(f"prompt must hold tokens in [0, V={model.vocab_size}), got {low} to {high}")
    return as_int32(prompt), mask


def check_stop(model: Decoder, stop_token: int | Collection[int] | None) -> jax.Array:
    """The tokens that end a row: int32 ``[stops]``, of which there may be none."""
    if stop_token is None:
        stop_token = ()
    # An array may be a number; then it is no collection, whatever it says.
    given: Any = np.ravel(stop_token) if isinstance(stop_token, np.ndarray | jax.Array) else stop_token
    given = given if isinstance(given, Collection) else (given,)
    stops = sorted(check_integer("stop_token", token) for token in given)
    if stops and not 0 <= stops[0] <= stops[-1] < model.vocab_size:
        raise ValueError(f"stop_token must be in [0, V={model.vocab_size}), got {stop_token}")
    return jnp.array(stops, jnp.int32)


def check_room(argument: str, model: Decoder, prompt, mask, count: int, cache: KVCache | None = None) -> None:
    """Raises where it is known that ``count`` tokens after the prompt outgrow the positions of the embedding."""
    longest = getattr(model.position_embedding, "num_positions", None)
    if longest is None or not is_known((mask, cache)):
        return
    real = np.array([prompt.shape[1]]) if mask is None else np.asarray(mask).sum(axis=1)
    real = (real + (0 if cache is None else np.asarray(cache.num_tokens))).max()
    if real + count - 1 > longest:  # the last token is written and not read
        raise ValueError(
            f"{argument} must be at most {longest + 1 - real} after a prompt of {real} tokens: "
            f"position_embedding has {longest} positions, got {count}"
        )


def is_known(values) -> bool:
    """Whether no array among them is traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def is_stop(tokens, stops) -> jax.Array:
    """Which tokens ``[...]`` are among those that end a row: bool ``[...]``."""
    return jnp.any(tokens[..., None] == stops, axis=-1)


def repeat_last(tokens, num_tokens) -> jax.Array:
    """Tokens ``[..., T]`` with the last of the first ``num_tokens [...]`` in place of what comes after."""
    last = jnp.take_along_axis(tokens, num_tokens[..., None] - 1, axis=-1)
    return jnp.where(jnp.arange(tokens.shape[-1], dtype=jnp.int32) < num_tokens[..., None], tokens, last)
