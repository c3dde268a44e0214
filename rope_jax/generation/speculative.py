"""Speculative decoding: a draft model proposes tokens, and the target model verifies several in a single pass."""

import functools
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rope_jax._checks import is_concrete
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
from rope_jax.generation.sample import sample
from rope_jax.generation.sampler import make_sampler
from rope_jax.models.decoder import Decoder

PROPOSE, ACCEPT, REPLACE = 1, 2, 3  # streams of random numbers


@serializable
class SpeculativeOutput(NamedTuple):
    """The output of :func:`speculative_decode`, and its cost.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``. After it stops, a row is filled with its stop token.
      num_tokens: int32 ``[B]``, the tokens of each row up to and including its stop token.
      accepted: int32 ``[B]``, how many of these tokens the draft proposed.
      calls: int32 ``[]``, forward passes of the target, including the prefill. :func:`generate` needs a pass for
        each token of the longest row.
      cache: of the target: prompt and answer, but for the last token of each row, as in :class:`Generation`.
      draft_cache: of the draft, with the same tokens.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    accepted: jax.Array
    calls: jax.Array
    cache: KVCache
    draft_cache: KVCache


def speculative_decode(
    model: Decoder,
    params,
    draft: Decoder,
    draft_params,
    prompt,
    *,
    max_new_tokens: int,
    draft_tokens: int = 4,
    rng=None,
    temperature=0.0,
    top_k: int | None = None,
    top_p=None,
    mask=None,
    cache: KVCache | None = None,
    draft_cache: KVCache | None = None,
    stop_token: int | Collection[int] | None = None,
    cache_dtype=None,
    context_length: int | jax.Array | None = None,
) -> SpeculativeOutput:
    """Tokens of the target's own distribution, as by :func:`generate`, in fewer passes of the target.

    Speculative decoding (Leviathan et al. 2023, section 2; Chen et al. 2023, algorithm 2). In each round the draft
    proposes tokens ``d_1 .. d_g`` step by step, with probabilities ``q_i(d_i)``. The target processes all of these
    in a single pass, which gives its probabilities ``p_1 .. p_{g+1}`` before and after each proposal. At a
    temperature above 0, proposal i is accepted with probability ``min(1, p_i(d_i) / q_i(d_i))``. The first one
    rejected is drawn again from ``max(p_i - q_i, 0)``, normalised; if none is, one token more is drawn from
    ``p_{g+1}``. Each token then has the distribution of the target. At temperature 0, the default, a proposal is
    accepted if it is the target's likeliest token, and the tokens are those of ``generate(..., temperature=0)``.
    Both caches drop the rejected proposals (:meth:`KVCache.truncate`). Rows accept different numbers of proposals;
    a stopped row waits for the rest.

    The target decides every token, so a bad draft costs only time. Greedy results may differ from :func:`generate`
    if two logits of the target are equal within rounding, since a pass over several tokens rounds differently.
    Compiled once for each padded shape of the prompt, ``max_new_tokens``, ``draft_tokens``, ``top_k``, number of
    stop tokens, shapes of the caches, cache dtype, and choice of greedy decoding and a mask.

    Args:
      model: the target, a :class:`Decoder`.
      params: its variables.
      draft: a :class:`Decoder` with the same vocabulary.
      draft_params: its variables.
      prompt: integers ``[B, T]``.
      max_new_tokens: the most tokens to generate, at least 1.
      draft_tokens: g, the proposals of each round, at least 1.
      rng: a key, or a key for each row; see :func:`generate`. The same key draws other tokens than there.
      temperature: of both models; see :func:`sample`; 0 is greedy.
      top_k: of both models; see :func:`sample`.
      top_p: of both models; see :func:`sample`.
      mask: see :func:`generate`.
      cache: the tokens before the prompt in the target's cache, as for :func:`generate`, without eviction.
      draft_cache: the same tokens in the draft's cache; required with ``cache``.
      stop_token: see :func:`generate`.
      cache_dtype: of both caches; None takes each model's dtype.
      context_length: of the target's frequencies; see :func:`generate`. Required if these depend on a length, since
        all tokens of a pass share the same length.

    Returns:
      :class:`SpeculativeOutput`. A row is -1 from the first NaN in its target's logits on, even if the NaN follows
      a rejected proposal. A draft whose logits are NaN proposes token 0.

    Raises:
      ValueError: if an argument is out of range, a shape is wrong, a prompt is empty, the vocabularies differ, or a
        required ``context_length``, key or cache is missing.
      TypeError: if prompt, mask or stop token are not integers.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard())
      >>> sizes = dict(vocab_size=11, width=16, num_heads=2, head_dim=8, mlp_dim=32, rope=rope)
      >>> large, small = (rope_jax.Decoder(num_layers=layers, **sizes) for layers in (3, 1))
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> params, draft_params = (model.init(jax.random.key(0), prompt) for model in (large, small))
      >>> out = rope_jax.generation.speculative_decode(large, params, small, draft_params, prompt, max_new_tokens=6)
      >>> greedy = rope_jax.generate(large, params, prompt, max_new_tokens=6, temperature=0)
      >>> out.tokens.tolist() == greedy.tokens.tolist()
      True
    """
    check_model("model", model)
    check_model("draft", draft)
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"draft must have the target's vocabulary, V={model.vocab_size} tokens, got V={draft.vocab_size}"
        )
    for each in (model, draft):
        check_one_axis(each, "generate takes positions of several axes")
    max_new_tokens = check_num_tokens("max_new_tokens", max_new_tokens)
    draft_tokens = check_num_tokens("draft_tokens", draft_tokens)
    prompt, mask = check_prompt(model, prompt, mask)
    stops = check_stop(model, stop_token)
    cache_dtype = checked_cache_dtype(cache_dtype)
    if (cache is None) != (draft_cache is None):
        raise ValueError("cache and draft_cache must be given together, got one of them")
    for decoder, stored in ((model, cache), (draft, draft_cache)):
        if stored is not None:
            check_prefix(decoder, stored, prompt, mask, cache_dtype)
            if stored.eviction is not None:
                raise ValueError("cache must not evict tokens: rejected proposals could not be taken back")
        most = max_new_tokens + draft_tokens
        check_num_positions("max_new_tokens + draft_tokens", decoder, prompt, mask, most, stored)
    if cache is not None and draft_cache is not None and is_concrete((cache.num_tokens, draft_cache.num_tokens)):
        counts, others = np.asarray(cache.num_tokens), np.asarray(draft_cache.num_tokens)
        if np.any(counts != others):
            raise ValueError(
                f"cache and draft_cache must hold the same tokens, got {counts.tolist()} and {others.tolist()}"
            )
    sampler = make_sampler(rng, temperature, top_k, top_p, prompt.shape[0])
    if context_length is None and model.needs_context_length:
        raise ValueError("context_length must be given with a target whose frequencies depend on it, got None")
    return _speculative_decode(
        ForwardPass.of(model, params, context_length),
        ForwardPass.of(draft, draft_params, argument="draft_params"),
        sampler,
        prompt,
        mask,
        (cache, draft_cache),
        stops,
        max_new_tokens=max_new_tokens,
        draft_tokens=draft_tokens,
        cache_dtype=cache_dtype,
    )


class _State(NamedTuple):
    """The state between two rounds. Both caches hold the prompt and all new tokens except the last."""

    cache: KVCache
    draft_cache: KVCache
    token: jax.Array  # [B]: the last new token
    tokens: jax.Array
    num_tokens: jax.Array
    accepted: jax.Array
    calls: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "draft_tokens", "cache_dtype"))
@placed_like(lambda target, draft, sampler, prompt, *_: prompt)
def _speculative_decode(
    target, draft, sampler, prompt, mask, caches, stops, *, max_new_tokens, draft_tokens, cache_dtype
) -> SpeculativeOutput:
    batch = prompt.shape[0]
    rows = jnp.arange(batch)[:, None]
    offsets = jnp.arange(draft_tokens + 1, dtype=jnp.int32)[None]

    def prefill(forward, cache):
        return forward.prefill(prompt, mask, cache, num_new_tokens=max_new_tokens + draft_tokens, dtype=cache_dtype)

    def propose(state, _):
        token, cache, number = state
        logits, cache = draft.step(token[:, None], cache)
        # Token -1 as an input would make the target's logits NaN.
        token = jnp.maximum(sampler.draw(logits[:, 0], number, stream=PROPOSE), 0)
        return (token, cache, number + 1), (token, None if sampler.greedy else logits[:, 0])

    def next_round(state: _State) -> _State:
        before = state.cache.num_tokens
        # The extra step stores the last proposal in the draft's cache; the token that it proposes is dropped.
        start = state.token, state.draft_cache, state.num_tokens
        (_, draft_cache, _), (proposed, draft_logits) = lax.scan(propose, start, length=draft_tokens + 1)
        proposed = proposed[:-1].T
        inputs = jnp.concatenate([state.token[:, None], proposed], axis=1)
        logits, cache = target.step(inputs, state.cache)
        if sampler.greedy:
            verified = sample(None, logits, temperature=0)  # [B, g + 1]
            num_agreed = _num_leading(proposed == verified[:, :-1])
        else:
            proposals = proposed, draft_logits[:-1].swapaxes(0, 1)
            verified, num_agreed = _verify(sampler, logits, *proposals, state.num_tokens)
        count = jnp.minimum(num_agreed + 1, max_new_tokens - state.num_tokens)
        stop_here = is_stop(verified, stops) & (offsets < count[:, None])
        stopped = jnp.any(stop_here, axis=1)
        count = jnp.where(stopped, jnp.argmax(stop_here, axis=1).astype(jnp.int32) + 1, count)
        count = jnp.where(state.done, 0, count)

        # Index max_new_tokens is out of range: mode="drop" ignores it.
        index = jnp.where(offsets < count[:, None], state.num_tokens[:, None] + offsets, max_new_tokens)
        last = jnp.take_along_axis(verified, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        num_tokens = state.num_tokens + count
        return _State(
            cache=cache.truncate(before + count),
            draft_cache=draft_cache.truncate(state.draft_cache.num_tokens + count),
            token=jnp.where(count > 0, last, state.token),
            tokens=state.tokens.at[rows, index].set(verified, mode="drop"),
            num_tokens=num_tokens,
            accepted=state.accepted + jnp.minimum(num_agreed, count),
            calls=state.calls + 1,
            done=state.done | stopped | (num_tokens == max_new_tokens),
        )

    (logits, cache), (_, draft_cache) = prefill(target, caches[0]), prefill(draft, caches[1])
    token = sampler.draw(logits, jnp.zeros((batch,), jnp.int32), stream=REPLACE)
    state = _State(
        cache=cache,
        draft_cache=draft_cache,
        token=token,
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token),
        num_tokens=jnp.ones((batch,), jnp.int32),
        accepted=jnp.zeros((batch,), jnp.int32),
        calls=jnp.int32(1),
        done=is_stop(token, stops) | (max_new_tokens == 1),
    )
    state = lax.while_loop(lambda state: ~jnp.all(state.done), next_round, unify_varying(state))
    tokens = repeat_last(state.tokens, state.num_tokens)
    return SpeculativeOutput(tokens, state.num_tokens, state.accepted, state.calls, state.cache, state.draft_cache)


def _num_leading(agrees) -> jax.Array:
    """How many of each row are true before the first that is not: int32 ``[B]``."""
    return jnp.sum(jnp.cumprod(agrees.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def _verify(sampler, logits, proposed, draft_logits, number) -> tuple[jax.Array, jax.Array]:
    """Rejection sampling of a round: tokens ``[B, g + 1]``, the first ``num_agreed + 1`` valid; ``num_agreed [B]``.

    Args:
      sampler: a :class:`Sampler` with keys.
      logits: of the target, ``[B, g + 1, V]``.
      proposed: int32 ``[B, g]``.
      draft_logits: ``[B, g, V]``.
      number: int32 ``[B]``, of the first token of the round.
    """
    p, q = sampler.probabilities(logits), sampler.probabilities(draft_logits)
    # A draft whose logits are NaN proposes token 0.
    token_0 = (jnp.arange(q.shape[-1]) == 0).astype(q.dtype)
    q = jnp.where(jnp.isnan(q).any(axis=-1, keepdims=True), token_0, q)
    offsets = jnp.arange(proposed.shape[1], dtype=jnp.int32)
    shares = sampler.uniform(number[:, None] + offsets, stream=ACCEPT)
    p_proposed, q_proposed = (jnp.take_along_axis(x, proposed[..., None], axis=-1)[..., 0] for x in (p[:, :-1], q))
    num_agreed = _num_leading(shares * q_proposed < p_proposed)
    # After all proposals there is none to reject: q is 0.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    p, q = (jnp.take_along_axis(x, num_agreed[:, None, None], axis=1)[:, 0] for x in (p, q))
    rest = jnp.maximum(p - q, 0)
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)  # p and q alike, but for rounding
    drawn = sampler.categorical(jnp.log(rest), number + num_agreed, stream=REPLACE)
    drawn = jnp.where(jnp.isnan(p).any(axis=-1), -1, drawn)
    padded = jnp.pad(proposed, ((0, 0), (0, 1)))
    offsets = jnp.arange(padded.shape[1], dtype=jnp.int32)
    return jnp.where(offsets < num_agreed[:, None], padded, drawn[:, None]), num_agreed
