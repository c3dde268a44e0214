"""The loop of :func:`generate`: prefill, then a token per step until every row has stopped, on device or host."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rope_jax._checks import align_ranks
from rope_jax.attention.cache import KVCache
from rope_jax.core.primitive import unify_varying
from rope_jax.core.serialization import serializable
from rope_jax.generation.placement import placed_like


@serializable
class Generation(NamedTuple):
    """The output of :func:`generate`.

    Rows are those of the prompt, or ``num_samples`` answers to each of them side by side.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``. After it stops, a row is filled with its stop token.
      num_tokens: int32 ``[B]``, the tokens of each row up to and including its stop token.
      log_probs: float32 ``[B, max_new_tokens]``, the logarithm of the probability that the model gave to each of
        these tokens, before ``logits_fn``, temperature and cuts; 0 after the stop token.
      cache: the tokens of prompt and answer, but for the last token of each row, which the model has not read: the
        next prompt begins with it.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    log_probs: jax.Array
    cache: KVCache


def is_stop(tokens, stops) -> jax.Array:
    """Which tokens ``[...]`` are stop tokens: bool ``[...]``."""
    tokens, stops = align_ranks(tokens[..., None], stops)
    return jnp.any(tokens == stops, axis=-1)


def repeat_last(tokens, num_tokens) -> jax.Array:
    """Fills each row of tokens ``[..., T]`` after its first ``num_tokens [...]`` with the last of these."""
    last = jnp.take_along_axis(tokens, num_tokens[..., None] - 1, axis=-1)
    index, count = align_ranks(jnp.arange(tokens.shape[-1], dtype=jnp.int32), num_tokens[..., None])
    return jnp.where(index < count, tokens, last)


class Inputs(NamedTuple):
    """What a generation begins with."""

    prompt: jax.Array
    mask: jax.Array | None
    cache: KVCache | None
    stops: jax.Array
    positions: jax.Array | None
    next_position: jax.Array | None  # [B]
    prefix_length: jax.Array | None  # [B or 1]


class _State(NamedTuple):
    """The state of the generation between two steps, apart from the cache."""

    num_steps: jax.Array  # []: tokens of each row so far
    token: jax.Array  # [B]: the last of these, which is not in the cache yet
    written: jax.Array  # [B, T + max_new_tokens]
    log_probs: jax.Array  # [B, max_new_tokens]
    num_tokens: jax.Array  # [B]
    done: jax.Array  # [B]
    num_cached: jax.Array  # [B]: tokens in the cache before the first step
    next_position: jax.Array | None  # [B]: of ``token``


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "num_samples", "cache_dtype"))
@placed_like(lambda forward, sampler, inputs: inputs.prompt)
def run_on_device(forward, sampler, inputs, *, max_new_tokens, num_samples, cache_dtype) -> Generation:
    sizes = dict(max_new_tokens=max_new_tokens, num_samples=num_samples, cache_dtype=cache_dtype)
    state, cache = _begin(forward, sampler, inputs, **sizes)

    def unfinished(carry):
        state, _ = carry
        return (state.num_steps < max_new_tokens) & ~jnp.all(state.done)

    state, cache = lax.while_loop(
        unfinished, lambda carry: _next_token(forward, sampler, inputs.stops, *carry), (state, cache)
    )
    return _finish(state, cache, max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "num_samples", "cache_dtype"))
@placed_like(lambda forward, sampler, inputs: inputs.prompt)
def _begin(forward, sampler, inputs, *, max_new_tokens, num_samples, cache_dtype) -> tuple[_State, KVCache]:
    """Reads the prompts and draws the first token of each answer."""
    prompt, mask = inputs.prompt, inputs.mask
    logits, cache = forward.prefill(
        prompt,
        mask,
        inputs.cache,
        num_new_tokens=max_new_tokens,
        dtype=cache_dtype,
        positions=inputs.positions,
        prefix_length=inputs.prefix_length,
    )
    written = prompt if mask is None else jnp.where(mask, prompt, -1)
    written = jnp.pad(written, ((0, 0), (0, max_new_tokens)), constant_values=-1)
    next_position = inputs.next_position
    if num_samples > 1:
        rows = jnp.repeat(jnp.arange(prompt.shape[0], dtype=jnp.int32), num_samples)
        logits, written, cache = logits[rows], written[rows], cache.select_rows(rows)
        next_position = None if next_position is None else next_position[rows]
    token, log_prob = sampler.next_token(logits, written, jnp.int32(0))
    state = _State(
        jnp.int32(1),
        token,
        written.at[:, prompt.shape[1]].set(token),
        jnp.zeros((len(token), max_new_tokens), jnp.float32).at[:, 0].set(log_prob),
        jnp.ones_like(token),
        is_stop(token, inputs.stops),
        cache.num_tokens,
        next_position,
    )
    return unify_varying((state, cache))


@functools.partial(jax.jit, donate_argnames="cache")
@placed_like(lambda forward, sampler, stops, state, cache: state.token)
def _next_token(forward, sampler, stops, state: _State, cache) -> tuple[_State, KVCache]:
    """Reads the last token of each row and draws the next."""
    # Tokens after a stop are cut from the cache at the end, unless they would have evicted others.
    mask = None if cache.eviction is None else ~state.done[:, None]
    positions = None if state.next_position is None else state.next_position[:, None]
    logits, cache = forward.step(state.token[:, None], cache, mask, positions)
    token, log_prob = sampler.next_token(logits[:, 0], state.written, state.num_steps)
    first = state.written.shape[1] - state.log_probs.shape[1]
    return _State(
        state.num_steps + 1,
        token,
        state.written.at[:, first + state.num_steps].set(token),
        state.log_probs.at[:, state.num_steps].set(log_prob),
        state.num_tokens + (~state.done).astype(jnp.int32),
        state.done | is_stop(token, stops),
        state.num_cached,
        None if state.next_position is None else state.next_position + 1,
    ), cache


@functools.partial(jax.jit, static_argnames="max_new_tokens", donate_argnames="cache")
@placed_like(lambda state, cache: state.token)
def _finish(state: _State, cache: KVCache, *, max_new_tokens: int) -> Generation:
    tokens = repeat_last(state.written[:, -max_new_tokens:], state.num_tokens)
    so_far = jnp.arange(max_new_tokens, dtype=jnp.int32)[None] < state.num_tokens[:, None]
    if cache.eviction is None:
        cache = cache.truncate(state.num_cached + state.num_tokens - 1)
    return Generation(tokens, state.num_tokens, jnp.where(so_far, state.log_probs, 0), cache)


def run_on_host(forward, sampler, inputs, on_token, sizes) -> Generation:
    """The loop of :func:`run_on_device` on the host, with calls of ``on_token``.

    A device loop would have three drawbacks: a compilation for each callback, calls out of order on several
    devices, and a new exception type for errors in the callback.
    """
    state, cache = _begin(forward, sampler, inputs, **sizes)
    done = np.zeros(state.done.shape, bool)
    for count in range(1, sizes["max_new_tokens"] + 1):
        current = state
        if count < sizes["max_new_tokens"]:  # starts the device on the next token before waiting for the current
            state, cache = _next_token(forward, sampler, inputs.stops, current, cache)
        token = np.asarray(current.token)
        for row in np.flatnonzero(~done).tolist():
            on_token(row, int(token[row]))
        done = np.asarray(current.done)
        if done.all():
            break
    return _finish(current, cache, max_new_tokens=sizes["max_new_tokens"])
