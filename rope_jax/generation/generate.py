"""Generates text: prefill, then a token per step until every row has stopped."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rope_jax._checks import check_axes, check_integer, is_concrete, known_any
from rope_jax.attention.cache import KVCache, check_cache
from rope_jax.generation.forward import ForwardPass
from rope_jax.generation.prompts import check_num_positions, check_prompt, check_stop
from rope_jax.generation.sample import check_sampling, sample
from rope_jax.models.decoder import Decoder


class Generation(NamedTuple):
    """The output of :func:`generate`.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``. After it stops, a row is filled with its stop token.
      num_tokens: int32 ``[B]``, the tokens of each row up to and including its stop token.
    """

    tokens: jax.Array
    num_tokens: jax.Array


def generate(
    model: Decoder,
    params,
    prompt,
    *,
    max_new_tokens: int,
    rng=None,
    mask=None,
    cache: KVCache | None = None,
    temperature=1.0,
    top_k: int | None = None,
    top_p=None,
    stop_token: int | Collection[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    cache_dtype=None,
    context_length: int | jax.Array | None = None,
) -> Generation:
    """Continues each prompt: a single pass over all prompts, then a token per step until every row has stopped.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard())
      >>> sizes = dict(vocab_size=11, num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=32)
      >>> model = rope_jax.Decoder(**sizes, rope=rope)
      >>> prompt, mask = rope_jax.generation.pad_prompts([[1, 2, 3], [4]], buckets=4)
      >>> params = model.init(jax.random.key(0), prompt)
      >>> rope_jax.generate(model, params, prompt, mask=mask, max_new_tokens=5, temperature=0).tokens.shape
      (2, 5)

    With a system prompt that all rows share, and with streaming:

      >>> _, cache = model.apply(params, jnp.array([[7, 8, 9]]), cache=model.init_cache(batch=1, capacity=3))
      >>> rope_jax.generate(
      ...     model, params, prompt, mask=mask, cache=cache, max_new_tokens=5, rng=jax.random.key(1),
      ...     on_token=lambda row, token: None,  # print, send or count the token
      ... ).tokens.shape
      (2, 5)

    Args, prompt and cache:
      model: a :class:`Decoder`.
      params: its variables, from ``model.init``.
      prompt: integers ``[B, T]``.
      mask: nonzero at real tokens ``[B, T]``, for prompts of unequal length padded on either side. Every row must
        have a real token.
      cache: the tokens before the prompt, in a cache of :meth:`Decoder.init_cache` with B rows, or with a single
        row shared by all prompts. It needs no free slots. A cache that evicts tokens keeps its size, so the output
        can be of any length. If a prompt is too long for it, the row is filled with -1; see :meth:`KVCache.write`.

    Args, sampling:
      rng: a key, from which token i of row b is drawn with ``fold_in(fold_in(rng, b), i)``; or keys ``[B]`` in
        place of ``fold_in(rng, b)``, which make a row independent of its index. Required unless ``temperature`` is
        0.
      temperature: see :func:`sample`; 0 is greedy.
      top_k: see :func:`sample`.
      top_p: see :func:`sample`.

    Args, stopping and streaming:
      max_new_tokens: the most tokens to generate, at least 1.
      stop_token: a token or several. A row stops after any of these.
      on_token: called with ``(row, token)`` for each generated token: step by step, and row by row within a step.
        An exception in it ends the generation. The loop then runs on the host, so ``jax.jit`` around
        :func:`generate` is an error. The device starts the next step before the host waits for the current token.

    Args, numerics:
      cache_dtype: of the stored keys and values; None takes the model's dtype.
      context_length: tokens for which frequencies are computed, if the schedule depends on a length
        (:class:`DynamicNTK`, :class:`LongRope`); see :meth:`Rope.rotation`. Pass the length of prompt and output
        together, or the longest expected context. None takes each row's tokens so far; see
        :meth:`Decoder.__call__`.

    Returns:
      :class:`Generation`. A row is -1 from the first NaN in its logits on.

    Raises:
      ValueError: if an argument is out of range, a shape is wrong, a prompt is empty or the key is missing. Also if
        the cache belongs to a different model, has neither B rows nor a single row, or has overflowed.
      TypeError: if prompt, mask or stop token are not integers, or ``rng`` is not a key.

    Compilation: once for each padded shape of the prompt (see :func:`pad_prompts`), ``max_new_tokens``, ``top_k``,
    number of stop tokens, shape and dtype of the cache, integer ``context_length``, and choice of greedy decoding,
    mask and streaming. Prompt lengths under the same padding, temperatures, keys, stop tokens and array
    ``context_length`` share a program.

    Reproducibility: a row depends neither on padding, nor on other rows, nor on streaming, nor on a cache for its
    first tokens. There are two exceptions. Sums of a different shape round differently, which may decide between
    nearly equal logits. If frequencies depend on the length and no ``context_length`` is given, the deeper layers
    of a cache keep the values that they computed at its earlier length.
    """
    prompt, mask = check_prompt(model, prompt, mask)
    stops = check_stop(model, stop_token)
    check_integer("max_new_tokens", max_new_tokens, least=1)
    if cache is not None:
        _check_cache(model, cache, prompt, mask, cache_dtype)
    check_num_positions("max_new_tokens", model, prompt, mask, max_new_tokens, cache)
    check_sampling(temperature, top_k, top_p)
    greedy = is_concrete(temperature) and bool(temperature == 0)
    if rng is None and not greedy:
        raise ValueError(
            f"rng must be given with temperature {temperature}, got None: pass a key, or temperature=0 for greedy"
        )
    if rng is not None:
        rng = _checked_key(rng, prompt.shape[0])
    sampler = _Sampler(
        None if greedy else rng,
        jnp.asarray(temperature, jnp.float32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32),
        top_k,
    )
    inputs = ForwardPass.of(model, params, context_length), sampler, prompt, mask, cache
    if on_token is None:
        return _generate(*inputs, stops, max_new_tokens=max_new_tokens, cache_dtype=cache_dtype)
    if not is_concrete(inputs):
        raise ValueError("on_token must be left out inside jax.jit, which returns no token before the last")
    token, cache = _first_token(*inputs, num_new_tokens=max_new_tokens, cache_dtype=cache_dtype)
    return _generate_on_host(*inputs[:2], token, cache, np.asarray(stops), max_new_tokens, on_token)


def is_stop(tokens, stops) -> jax.Array:
    """Which tokens ``[...]`` are stop tokens: bool ``[...]``."""
    return jnp.any(tokens[..., None] == stops, axis=-1)


def repeat_last(tokens, num_tokens) -> jax.Array:
    """Fills each row of tokens ``[..., T]`` after its first ``num_tokens [...]`` with the last of these."""
    last = jnp.take_along_axis(tokens, num_tokens[..., None] - 1, axis=-1)
    return jnp.where(jnp.arange(tokens.shape[-1], dtype=jnp.int32) < num_tokens[..., None], tokens, last)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sampler:
    """The options of :func:`sample` and the keys of all rows, as a single argument of a jitted function."""

    rng: jax.Array | None  # [] or [B]; None is greedy
    temperature: jax.Array
    top_p: jax.Array | None
    top_k: int | None = dataclasses.field(metadata=dict(static=True))

    def __call__(self, logits, index) -> jax.Array:
        """Draws new token ``index`` of each row from logits ``[B, V]``: int32 ``[B]``."""
        if self.rng is None:
            return sample(None, logits, temperature=0)
        sample_row = functools.partial(sample, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        rows = jnp.arange(logits.shape[0])
        keys = self.rng if self.rng.ndim else jax.vmap(functools.partial(jax.random.fold_in, self.rng))(rows)
        return jax.vmap(lambda key, row: sample_row(jax.random.fold_in(key, index), row))(keys, logits)


class _State(NamedTuple):
    """The state of the generation between two steps."""

    num_steps: jax.Array  # []: tokens of each row so far
    token: jax.Array  # [B]: the last of these, which is not in the cache yet
    cache: KVCache
    tokens: jax.Array
    num_tokens: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "cache_dtype"))
def _generate(forward, sampler, prompt, mask, cache, stops, *, max_new_tokens, cache_dtype) -> Generation:
    token, cache = _first_token(
        forward, sampler, prompt, mask, cache, num_new_tokens=max_new_tokens, cache_dtype=cache_dtype
    )
    tokens = jnp.zeros((prompt.shape[0], max_new_tokens), jnp.int32).at[:, 0].set(token)
    num_tokens = jnp.ones_like(token)

    def step(state: _State) -> _State:
        token, cache = _next_token(forward, sampler, state.token, state.cache, state.num_steps)
        tokens = state.tokens.at[:, state.num_steps].set(token)
        num_tokens = state.num_tokens + (~state.done).astype(jnp.int32)
        return _State(state.num_steps + 1, token, cache, tokens, num_tokens, state.done | is_stop(token, stops))

    def unfinished(state: _State):
        return (state.num_steps < max_new_tokens) & ~jnp.all(state.done)

    state = _State(jnp.int32(1), token, cache, tokens, num_tokens, is_stop(token, stops))
    state = lax.while_loop(unfinished, step, state)
    return Generation(repeat_last(state.tokens, state.num_tokens), state.num_tokens)


@functools.partial(jax.jit, static_argnames=("num_new_tokens", "cache_dtype"))
def _first_token(forward, sampler, prompt, mask, cache, *, num_new_tokens, cache_dtype):
    logits, cache = forward.prefill(prompt, mask, cache, num_new_tokens=num_new_tokens, dtype=cache_dtype)
    return sampler(logits, 0), cache


@functools.partial(jax.jit, donate_argnames="cache")
def _next_token(forward, sampler, token, cache, index):
    logits, cache = forward.step(token[:, None], cache)
    return sampler(logits[:, 0], index), cache


def _generate_on_host(forward, sampler, token, cache, stops, max_new_tokens, on_token) -> Generation:
    """The loop of `_generate`, on the host.

    A device loop would have three drawbacks: a compilation for each callback, calls out of order on several
    devices, and a new exception type for errors in the callback.
    """
    num_tokens = np.zeros(token.shape, np.int32)
    done = np.zeros(token.shape, bool)
    tokens: list[np.ndarray] = []
    while len(tokens) < max_new_tokens and not done.all():
        current = token
        if len(tokens) + 1 < max_new_tokens:  # starts the device on the next token before waiting for the current
            token, cache = _next_token(forward, sampler, current, cache, np.int32(len(tokens) + 1))
        tokens.append(np.asarray(current))
        for row in np.flatnonzero(~done).tolist():
            on_token(row, int(tokens[-1][row]))
        num_tokens += ~done
        done |= np.isin(tokens[-1], stops)
    missing = np.zeros((max_new_tokens - len(tokens), len(done)), np.int32)
    filled, counts = jnp.asarray(np.concatenate([tokens, missing]).T), jnp.asarray(num_tokens)
    return Generation(repeat_last(filled, counts), counts)


def _checked_key(rng, batch: int) -> jax.Array:
    """Checks a key ``[]`` or a key for each row ``[B]``, and wraps raw key data."""
    if isinstance(rng, int | np.integer):
        raise TypeError(f"rng must be a key, as jax.random.key({rng}), got the integer {rng}")
    if not isinstance(rng, jax.Array | np.ndarray):
        raise TypeError(f"rng must be a key, as jax.random.key(0), got {rng!r}")
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        rng = jax.random.wrap_key_data(jnp.asarray(rng))
    check_axes("rng", rng, "B" if rng.ndim else "", B=batch)
    return rng


def _check_cache(model: Decoder, cache: KVCache, prompt, mask, cache_dtype) -> None:
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
