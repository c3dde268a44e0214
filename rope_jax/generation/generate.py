"""Which token comes next, and the one after that?"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rope_jax._checks import check_axes, check_integer, known_any
from rope_jax.attention.cache import KVCache, check_cache
from rope_jax.generation.forward import ForwardPass
from rope_jax.generation.prompts import check_prompt, check_room, check_stop, is_known, is_stop, repeat_last
from rope_jax.generation.sample import check_sampling, sample
from rope_jax.models.decoder import Decoder


class Generation(NamedTuple):
    """What :func:`generate` wrote.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``; after a row's stop token, that token again.
      num_tokens: int32 ``[B]``, the tokens of each row that count, the stop token among them.
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
    """Continues each prompt: one pass over all prompts, then one token at a time, until every row has stopped.

    Compiled once per padded shape of the prompt (see :func:`pad_prompts`), ``max_new_tokens``, ``top_k``, number of
    stop tokens, shape and dtype of the cache, and whether it is greedy, masked and streamed; other real lengths,
    temperatures, seeds and stop tokens re-use the program. So does another ``context_length`` that is an array; as an int
    it is compiled in.

    Row b draws its token number i with the key ``fold_in(fold_in(rng, b), i)``. What it writes does not depend on
    the padding, the other rows, streaming, or whether a cache held its beginning: except where two tokens are as
    close as sums of another shape may round, and with frequencies that depend on a length which is not given, where
    the deeper layers of a cache keep what they made of its beginning when it was all there was.

    Args:
      model: a :class:`Decoder`.
      params: its variables, as ``model.init`` returned them.
      prompt: integers ``[B, T]``.
      max_new_tokens: how many tokens to write at most, at least 1.
      rng: a key, or one for each row ``[B]`` in place of ``fold_in(rng, b)``, so that its answer does not depend on
        its place in the batch either; needed unless the temperature is 0.
      mask: nonzero at the real tokens of prompts of unequal length ``[B, T]``, padded on either side. Every
        row needs one.
      cache: of :meth:`Decoder.init_cache`, with what stands before the prompt: for each row, or for one row that
        all have in common, as a system prompt. It needs no room of its own for the prompt and the answer. One that
        evicts (``sinks``) keeps its size, and answers may be as long as you like; a prompt that is too long for it
        makes its row -1, see :meth:`KVCache.write`.
      temperature: see :func:`sample`; 0 is greedy.
      top_k: see :func:`sample`.
      top_p: see :func:`sample`.
      stop_token: one or several tokens: a row that writes one of them writes nothing more.
      on_token: called with ``(row, token)`` for each token that counts, as soon as it is there: token by token, in
        each of them row by row. What it raises ends the generation. The loop is then one of the host, which starts
        the device on the next token before it waits for this one; so it cannot be had inside ``jax.jit``.
      cache_dtype: of the stored keys and values; the model's dtype where it is None.
      context_length: for schedules that depend on it (:class:`DynamicNTK`, :class:`LongRope`), the tokens that the
        frequencies are for, see :meth:`Rope.rotation`: prompt and answer together, or the longest context that
        is expected. Without it they take each row's tokens so far, see :meth:`Decoder.__call__`.

    Returns:
      :class:`Generation`. A row whose logits are NaN, as those of broken weights, is -1 from there on.

    Raises:
      ValueError: if an argument is out of its range, a shape is wrong, a prompt is empty, the key is missing, or a
        cache is not of this model, not of this batch or one row, or has overflowed.
      TypeError: if prompt, mask or stop token are not integers, or the key is one.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard())
      >>> sizes = dict(vocab_size=11, num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=32)
      >>> model = rope_jax.Decoder(**sizes, rope=rope)
      >>> prompt, mask = rope_jax.generation.pad_prompts([[1, 2, 3], [4]], buckets=4)
      >>> params = model.init(jax.random.key(0), prompt)
      >>> rope_jax.generate(model, params, prompt, mask=mask, max_new_tokens=5, temperature=0).tokens.shape
      (2, 5)
      >>> system = jnp.array([[7, 8, 9]])  # read once, for both prompts and all that come later
      >>> _, cache = model.apply(params, system, cache=model.init_cache(batch=1, capacity=3))
      >>> answer = rope_jax.generate(
      ...     model, params, prompt, mask=mask, cache=cache, max_new_tokens=5, temperature=0,
      ...     on_token=lambda row, token: None,  # print, send, count
      ... )
      >>> answer.tokens.shape
      (2, 5)
    """
    prompt, mask = check_prompt(model, prompt, mask)
    stops = check_stop(model, stop_token)
    check_integer("max_new_tokens", max_new_tokens, least=1)
    if cache is not None:
        _check_cache(model, cache, prompt, mask, cache_dtype)
    check_room("max_new_tokens", model, prompt, mask, max_new_tokens, cache)
    check_sampling(temperature, top_k, top_p)
    greedy = is_known(temperature) and bool(temperature == 0)
    if rng is None and not greedy:
        raise ValueError(f"rng must be given with temperature {temperature}, got None")
    if rng is not None:
        rng = _checked_key(rng, prompt.shape[0])
    draw = _Draw(
        None if greedy else rng,
        jnp.asarray(temperature, jnp.float32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32),
        top_k,
    )
    given = ForwardPass.of(model, params, context_length), draw, prompt, mask, cache
    if on_token is None:
        return _generate(*given, stops, max_new_tokens=max_new_tokens, cache_dtype=cache_dtype)
    if not is_known(given):
        raise ValueError("on_token must be left out inside jax.jit: there, no token is there before the end")
    first, cache = _first(*given, room=max_new_tokens, cache_dtype=cache_dtype)
    return _streamed(*given[:2], first, cache, np.asarray(stops), max_new_tokens, on_token)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Draw:
    """How the tokens of all rows are drawn, as one argument of a jitted function."""

    rng: jax.Array | None  # [] or [B]; none is greedy
    temperature: jax.Array
    top_p: jax.Array | None
    top_k: int | None = dataclasses.field(metadata=dict(static=True))

    def __call__(self, logits, index) -> jax.Array:
        """Token number ``index`` of each answer, from logits ``[B, V]``: int32 ``[B]``."""
        if self.rng is None:
            return sample(None, logits, temperature=0)
        how = functools.partial(sample, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        rows = jnp.arange(logits.shape[0])
        keys = self.rng if self.rng.ndim else jax.vmap(functools.partial(jax.random.fold_in, self.rng))(rows)
        return jax.vmap(lambda key, row: how(jax.random.fold_in(key, index), row))(keys, logits)


class _Written(NamedTuple):
    """An answer in the middle of being written."""

    steps: jax.Array  # []: tokens of each row that are there
    token: jax.Array  # [B]: the last of them, not read yet
    cache: KVCache
    tokens: jax.Array
    num_tokens: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "cache_dtype"))
def _generate(reader, draw, prompt, mask, cache, stops, *, max_new_tokens, cache_dtype) -> Generation:
    token, cache = _first(reader, draw, prompt, mask, cache, room=max_new_tokens, cache_dtype=cache_dtype)
    tokens = jnp.zeros((prompt.shape[0], max_new_tokens), jnp.int32).at[:, 0].set(token)
    num_tokens = jnp.ones_like(token)

    def step(state: _Written) -> _Written:
        token, cache = _next(reader, draw, state.token, state.cache, state.steps)
        tokens = state.tokens.at[:, state.steps].set(token)
        num_tokens = state.num_tokens + (~state.done).astype(jnp.int32)
        return _Written(state.steps + 1, token, cache, tokens, num_tokens, state.done | is_stop(token, stops))

    def going(state: _Written):
        return (state.steps < max_new_tokens) & ~jnp.all(state.done)

    state = _Written(jnp.int32(1), token, cache, tokens, num_tokens, is_stop(token, stops))
    state = lax.while_loop(going, step, state)
    return Generation(repeat_last(state.tokens, state.num_tokens), state.num_tokens)


@functools.partial(jax.jit, static_argnames=("room", "cache_dtype"))
def _first(reader, draw, prompt, mask, cache, *, room, cache_dtype):
    logits, cache = reader.start(prompt, mask, cache, room=room, dtype=cache_dtype)
    return draw(logits, 0), cache


@functools.partial(jax.jit, donate_argnames="cache")
def _next(reader, draw, token, cache, index):
    logits, cache = reader.read(token[:, None], cache)
    return draw(logits[:, 0], index), cache


def _streamed(reader, draw, token, cache, stops, max_new_tokens, on_token) -> Generation:
    """The loop of `_generate` on the host.

    In the device's own loop, the callback would be compiled into the program, for each callback anew, would not be
    called in order where there are several devices, and what it raises would lose its type.
    """
    num_tokens = np.zeros(token.shape, np.int32)
    done = np.zeros(token.shape, bool)
    tokens: list[np.ndarray] = []
    while len(tokens) < max_new_tokens and not done.all():
        now = token
        if len(tokens) + 1 < max_new_tokens:  # started, and not waited for
            token, cache = _next(reader, draw, now, cache, np.int32(len(tokens) + 1))
        tokens.append(np.asarray(now))
        for row in np.flatnonzero(~done).tolist():
            on_token(row, int(tokens[-1][row]))
        num_tokens += ~done
        done |= np.isin(tokens[-1], stops)
    unwritten = np.zeros((max_new_tokens - len(tokens), len(done)), np.int32)
    written, counted = jnp.asarray(np.concatenate([tokens, unwritten]).T), jnp.asarray(num_tokens)
    return Generation(repeat_last(written, counted), counted)


def _checked_key(rng, batch: int) -> jax.Array:
    """One key, or one for each row ``[B]``."""
    if isinstance(rng, int | np.integer):
        raise TypeError(f"rng must be a key, as jax.random.key({rng}), got the integer {rng}")
    if not isinstance(rng, jax.Array | np.ndarray):
        raise TypeError(f"rng must be a key, as jax.random.key(0), got {rng!r}")
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        rng = jax.random.wrap_key_data(jnp.asarray(rng))
    check_axes("rng", rng, "B" if rng.ndim else "", B=batch)
    return rng


def _check_cache(model: Decoder, cache: KVCache, prompt, mask, cache_dtype) -> None:
    if cache_dtype is not None:
        raise ValueError(f"cache_dtype must be left out with a cache, which has its own, got {cache_dtype}")
    check_cache(cache)
    sizes = dict(
        layers=model.num_layers, B={1, prompt.shape[0]}, K=model.num_kv_heads or model.num_heads, H=model.head_dim
    )
    check_axes("cache.key", cache.key, "layers B S K H", **sizes)
    if known_any(cache.overflowed):
        raise ValueError(
            f"cache must not have overflowed, got S={cache.capacity}, rows {cache.num_tokens.tolist()}"
        )
    if cache.eviction is not None:
        cache.slots.advance(
            "prompt", cache.num_tokens, prompt.shape[1], mask, max_window=model.max_window
        )
