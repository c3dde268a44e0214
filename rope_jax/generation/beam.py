"""Beam search: finds the most probable continuations of each prompt."""

import functools
import math
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._checks import check_real
from rope_jax._jax_internals import Tracer
from rope_jax.attention.cache import KVCache
from rope_jax.core.primitive import unify_varying
from rope_jax.core.serialization import serializable
from rope_jax.generation.forward import ForwardPass, check_one_axis
from rope_jax.generation.loop import is_stop, repeat_last
from rope_jax.generation.placement import placed_like
from rope_jax.generation.prompts import (
    check_model,
    check_num_positions,
    check_num_tokens,
    check_prefix,
    check_prompt,
    check_stop,
    checked_cache_dtype,
)
from rope_jax.models.decoder import Decoder


@serializable
class Beams(NamedTuple):
    """The output of :func:`beam_search`, the most probable continuation of each row first.

    Attributes:
      tokens: int32 ``[B, beams, max_new_tokens]``. After it stops, a continuation is filled with its stop token.
      num_tokens: int32 ``[B, beams]``, the tokens up to and including the stop token.
      score: float32 ``[B, beams]``, the sum of log probabilities divided by ``num_tokens ** length_penalty``, in
        nats. If there are fewer continuations than beams, the rest score -inf.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    score: jax.Array


def beam_search(
    model: Decoder,
    params,
    prompt,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 0.0,
    mask=None,
    cache: KVCache | None = None,
    stop_token: int | Collection[int] | None = None,
    cache_dtype=None,
    context_length: int | jax.Array | None = None,
) -> Beams:
    """Continuations of high probability: keeps the best ``beams`` of each row at every step.

    ``score(x) = sum_i log p(x_i | prompt, x_1 .. x_{i-1}) / n^length_penalty`` for n tokens. Each step extends the
    ``beams`` continuations of a row by all V tokens and keeps the ``beams`` highest scores. A continuation with a
    stop token is no longer extended, but stays in the competition (Sutskever et al. 2014, section 3.2). A
    ``length_penalty`` of 0 favours short continuations, 1 compares the mean log probability of a token (Wu et al.
    2016, section 7, in the form of transformers). With ``beams >= V^(max_new_tokens - 1)`` the search is
    exhaustive. Compiled as :func:`generate`, and once for each ``beams``.

    Args:
      model: a :class:`Decoder`.
      params: its variables.
      prompt: integers ``[B, T]``.
      beams: number of continuations kept, at least 1; 1 is greedy.
      max_new_tokens: the most tokens to generate, at least 1.
      length_penalty: the power of the number of tokens that divides a score; a finite number.
      mask: see :func:`generate`.
      cache: see :func:`generate`.
      stop_token: see :func:`generate`.
      cache_dtype: see :func:`generate`.
      context_length: see :func:`generate`; an array must have shape ``[]``.

    Returns:
      :class:`Beams`. If the logits after any continuation of a row are NaN, the row has tokens -1 and score NaN.

    Raises:
      ValueError: if an argument is out of range, a shape is wrong, or a prompt is empty.
      TypeError: if prompt, mask or stop token are not integers.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard())
      >>> sizes = dict(vocab_size=11, num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=32)
      >>> model = rope_jax.Decoder(**sizes, rope=rope)
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> params = model.init(jax.random.key(0), prompt)
      >>> result = rope_jax.generation.beam_search(model, params, prompt, beams=4, max_new_tokens=3)
      >>> result.tokens.shape, bool(result.score[0, 0] >= result.score[0, 3])
      ((1, 4, 3), True)
    """
    check_model("model", model)
    beams, max_new_tokens = check_num_tokens("beams", beams), check_num_tokens("max_new_tokens", max_new_tokens)
    prompt, mask = check_prompt(model, prompt, mask)
    cache_dtype = checked_cache_dtype(cache_dtype)
    if cache is not None:
        check_prefix(model, cache, prompt, mask, cache_dtype)
    check_num_positions("max_new_tokens", model, prompt, mask, max_new_tokens, cache)
    if length_penalty is None or isinstance(check_real("length_penalty", length_penalty), Tracer):
        raise TypeError(f"length_penalty must be a concrete number, got {length_penalty}")
    if abs(float(length_penalty)) * math.log(max_new_tokens) > 80:  # float32 ends at exp(88)
        raise ValueError(f"length_penalty must be moderate, got {length_penalty} for {max_new_tokens} tokens")
    stops = check_stop(model, stop_token)
    check_one_axis(model, "generate takes positions of several axes")
    forward = ForwardPass.of(model, params, context_length)
    sizes = dict(beams=beams, max_new_tokens=max_new_tokens, cache_dtype=cache_dtype)
    return _beam_search(forward, prompt, mask, cache, stops, jnp.float32(length_penalty), **sizes)


class _State(NamedTuple):
    """The state of the search between two steps."""

    num_steps: jax.Array  # []: tokens of each beam so far
    logits: jax.Array  # [B, beams, V]: after the last of these
    cache: KVCache  # of B * beams rows
    beams: Beams  # with scores before they are divided
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("beams", "max_new_tokens", "cache_dtype"))
@placed_like(lambda forward, prompt, *_: prompt)
def _beam_search(
    forward, prompt, mask, cache, stops, length_penalty, *, beams, max_new_tokens, cache_dtype
) -> Beams:
    batch, vocab = prompt.shape[0], forward.model.vocab_size
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def choose(state: _State):
        """The state with another token, which is not in the cache yet; and the beam that each beam extends."""
        scores = jax.nn.log_softmax(state.logits, axis=-1)
        # A stopped beam competes once, with its score unchanged: as its extension by token 0.
        stopped = jnp.where(jnp.arange(vocab) == 0, 0.0, -jnp.inf)
        scores = state.beams.score[..., None] + jnp.where(state.done[..., None], stopped, scores)
        lengths = state.beams.num_tokens + (~state.done).astype(jnp.int32)
        ranks = scores / _power(lengths, length_penalty)[..., None]
        _, best = lax.top_k(ranks.reshape(batch, -1), beams)
        score = jnp.take_along_axis(scores.reshape(batch, -1), best, axis=1)
        parent, token = best // vocab, best % vocab
        tokens, num_tokens = state.beams.tokens[rows, parent], state.beams.num_tokens[rows, parent]
        done = state.done[rows, parent]
        tokens = tokens.at[:, :, state.num_steps].set(token)
        num_tokens += (~done).astype(jnp.int32)
        state = state._replace(
            num_steps=state.num_steps + 1,
            beams=Beams(tokens, num_tokens, score),
            done=done | is_stop(token, stops),
        )
        return state, parent, token

    def step(state: _State) -> _State:
        state, parent, token = choose(state)
        cache = state.cache.select_rows((rows * beams + parent).ravel())
        logits, cache = forward.step(token.reshape(-1, 1), cache)
        return state._replace(logits=logits.reshape(batch, beams, vocab), cache=cache)

    logits, cache = forward.prefill(prompt, mask, cache, num_new_tokens=max_new_tokens, dtype=cache_dtype)
    state = _State(
        num_steps=jnp.int32(0),
        logits=jnp.broadcast_to(logits[:, None], (batch, beams, vocab)),
        cache=cache.select_rows(jnp.repeat(jnp.arange(batch, dtype=jnp.int32), beams)),
        beams=Beams(
            tokens=jnp.zeros((batch, beams, max_new_tokens), jnp.int32),
            num_tokens=jnp.zeros((batch, beams), jnp.int32),
            # All beams start as the same prompt; only the first may be extended, or its tokens would be repeated.
            score=jnp.full((batch, beams), -jnp.inf, jnp.float32).at[:, 0].set(0.0),
        ),
        done=jnp.zeros((batch, beams), bool),
    )

    def unfinished(state: _State):
        return (state.num_steps < max_new_tokens - 1) & ~jnp.all(state.done)

    state, *_ = choose(lax.while_loop(unfinished, step, unify_varying(state)))
    tokens, num_tokens, score = state.beams
    tokens = repeat_last(tokens, num_tokens)
    score /= _power(num_tokens, length_penalty)
    return Beams(jnp.where(jnp.isnan(score)[..., None], -1, tokens), num_tokens, score)


def _power(lengths, length_penalty) -> jax.Array:
    """``lengths ^ length_penalty``, float32."""
    return jnp.maximum(lengths, 1).astype(jnp.float32) ** length_penalty
