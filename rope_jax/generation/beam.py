"""Which whole answers are the most probable?"""

import functools
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._checks import check_integer
from rope_jax.attention.cache import KVCache
from rope_jax.generation.forward import ForwardPass
from rope_jax.generation.prompts import check_prompt, check_room, check_stop, is_stop, repeat_last
from rope_jax.models.decoder import Decoder


class Beams(NamedTuple):
    """What :func:`beam_search` found, the most probable answer of each row first.

    Attributes:
      tokens: int32 ``[B, beams, max_new_tokens]``; after a stop token, that token again.
      num_tokens: int32 ``[B, beams]``, the tokens that count, the stop token among them.
      score: float32 ``[B, beams]``, the log probability of these tokens, in nats; -inf where there are not as many
        answers as beams.
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
    mask=None,
    stop_token: int | Collection[int] | None = None,
    cache_dtype=None,
    context_length: int | jax.Array | None = None,
) -> Beams:
    """Answers of high probability: at each token, the best continuations of the best answers so far.

    ``score(x) = sum_i log p(x_i | prompt, x_1 .. x_{i-1})``. Of each row's ``beams * V`` answers that are one token
    longer, the ``beams`` of the highest score go on; one that has written a stop token stays as it is and competes
    (Sutskever et al. 2014, section 3.2). Scores are not divided by a length: short answers have the advantage. With
    ``beams >= V^(max_new_tokens - 1)`` nothing is lost, and the search is exhaustive. :meth:`KVCache.take` brings
    the keys of those that go on. Compiled as :func:`generate` is, and once per number of beams.

    Args:
      model: a :class:`Decoder`.
      params: its variables.
      prompt: integers ``[B, T]``.
      beams: how many answers are kept, at least 1; 1 is greedy.
      max_new_tokens: how many tokens to write at most, at least 1.
      mask: see :func:`generate`.
      stop_token: see :func:`generate`.
      cache_dtype: see :func:`generate`.
      context_length: see :func:`generate`; ``[]`` if it is an array.

    Returns:
      :class:`Beams`. A row in which the logits after one of the answers are NaN has tokens -1 and score NaN.

    Raises:
      ValueError: if an argument is out of its range, a shape is wrong, or a prompt is empty.
      TypeError: if prompt, mask or stop token are not integers.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard())
      >>> sizes = dict(vocab_size=11, num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=32)
      >>> model = rope_jax.Decoder(**sizes, rope=rope)
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> params = model.init(jax.random.key(0), prompt)
      >>> found = rope_jax.generation.beam_search(model, params, prompt, beams=4, max_new_tokens=3)
      >>> found.tokens.shape, bool(found.score[0, 0] >= found.score[0, 3])
      ((1, 4, 3), True)
    """
    check_integer("beams", beams, least=1)
    check_integer("max_new_tokens", max_new_tokens, least=1)
    prompt, mask = check_prompt(model, prompt, mask)
    check_room("max_new_tokens", model, prompt, mask, max_new_tokens)
    stops = check_stop(model, stop_token)
    reader = ForwardPass.of(model, params, context_length)
    return _beam_search(
        reader, prompt, mask, stops, beams=beams, max_new_tokens=max_new_tokens, cache_dtype=cache_dtype
    )


class _State(NamedTuple):
    """Answers in the middle of being written: of B rows and beams."""

    steps: jax.Array  # []: tokens of each that are there
    logits: jax.Array  # [B, beams, V]: after the last of them
    cache: KVCache  # of B * beams rows
    beams: Beams
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("beams", "max_new_tokens", "cache_dtype"))
def _beam_search(reader, prompt, mask, stops, *, beams, max_new_tokens, cache_dtype) -> Beams:
    batch, vocab = prompt.shape[0], reader.model.vocab_size
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def choose(state: _State):
        """The state with one token more, which is not read yet; and which beam each was."""
        scores = jax.nn.log_softmax(state.logits, axis=-1)
        stay = jnp.where(jnp.arange(vocab) == 0, 0.0, -jnp.inf)  # one way to write nothing
        scores = state.beams.score[..., None] + jnp.where(state.done[..., None], stay, scores)
        score, best = lax.top_k(scores.reshape(batch, -1), beams)
        parent, token = best // vocab, best % vocab
        tokens, num_tokens = state.beams.tokens[rows, parent], state.beams.num_tokens[rows, parent]
        done = state.done[rows, parent]
        tokens = tokens.at[:, :, state.steps].set(token)
        num_tokens += (~done).astype(jnp.int32)
        new = Beams(tokens, num_tokens, score)
        state = state._replace(steps=state.steps + 1, beams=new, done=done | is_stop(token, stops))
        return state, parent, token

    def step(state: _State) -> _State:
        state, parent, token = choose(state)
        cache = state.cache.select_rows((rows * beams + parent).ravel())
        logits, cache = reader.read(token.reshape(-1, 1), cache)
        return state._replace(logits=logits.reshape(batch, beams, vocab), cache=cache)

    logits, cache = reader.start(prompt, mask, None, room=max_new_tokens, dtype=cache_dtype)
    state = _State(
        steps=jnp.int32(0),
        logits=jnp.broadcast_to(logits[:, None], (batch, beams, vocab)),
        cache=cache.select_rows(jnp.repeat(jnp.arange(batch, dtype=jnp.int32), beams)),
        beams=Beams(
            tokens=jnp.zeros((batch, beams, max_new_tokens), jnp.int32),
            num_tokens=jnp.zeros((batch, beams), jnp.int32),
            # Before the first token there is one answer, not as many as beams.
            score=jnp.full((batch, beams), -jnp.inf, jnp.float32).at[:, 0].set(0.0),
        ),
        done=jnp.zeros((batch, beams), bool),
    )

    def going(state: _State):
        return (state.steps < max_new_tokens - 1) & ~jnp.all(state.done)

    state, *_ = choose(lax.while_loop(going, step, state))
    tokens, num_tokens, score = state.beams
    tokens = repeat_last(tokens, num_tokens)
    return Beams(jnp.where(jnp.isnan(score)[..., None], -1, tokens), num_tokens, score)
