"""Speculative decoding: a draft model proposes tokens, and the target model verifies several in a single pass."""

import functools
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._checks import check_integer
from rope_jax.attention.cache import KVCache
from rope_jax.generation.forward import ForwardPass, check_one_axis
from rope_jax.generation.loop import is_stop, repeat_last
from rope_jax.generation.prompts import check_num_positions, check_prompt, check_stop
from rope_jax.generation.sample import sample
from rope_jax.models.decoder import Decoder


class SpeculativeOutput(NamedTuple):
    """The output of :func:`speculative_decode`, and its cost.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``. After it stops, a row is filled with its stop token.
      num_tokens: int32 ``[B]``, the tokens of each row up to and including its stop token.
      accepted: int32 ``[B]``, how many of these tokens the draft proposed.
      calls: int32 ``[]``, forward passes of the target, including the prefill. :func:`generate` needs a pass for
        each token of the longest row.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    accepted: jax.Array
    calls: jax.Array


def speculative_decode(
    model: Decoder,
    params,
    draft: Decoder,
    draft_params,
    prompt,
    *,
    max_new_tokens: int,
    draft_tokens: int = 4,
    mask=None,
    stop_token: int | Collection[int] | None = None,
    cache_dtype=None,
    context_length: int | jax.Array | None = None,
) -> SpeculativeOutput:
    """The target's greedy tokens, equal to ``generate(model, params, prompt, temperature=0)``, in fewer passes.

    Speculative decoding (Leviathan et al. 2023, section 2; Chen et al. 2023, algorithm 2) at temperature 0. In each
    round the draft proposes tokens ``d_1 .. d_g`` step by step. The target processes all of these in a single pass,
    and gives its own tokens ``t_1 .. t_{g+1}`` before and after each proposal. The first ``n = sum_i prod_{j <= i}
    [d_j = t_j]`` proposals agree. The row gains ``t_1 .. t_{n+1}``, and both caches drop the rejected proposals
    (:meth:`KVCache.truncate`). Rows accept different numbers of proposals; a stopped row waits for the rest.

    The target decides every token, so a bad draft costs only time. Results may differ from :func:`generate` if two
    logits of the target are equal within rounding, since a pass over several tokens rounds differently. Compiled
    once for each padded shape of the prompt, ``max_new_tokens``, ``draft_tokens``, number of stop tokens, cache
    dtype and presence of a mask.

    Args:
      model: the target, a :class:`Decoder`.
      params: its variables.
      draft: a :class:`Decoder` with the same vocabulary.
      draft_params: its variables.
      prompt: integers ``[B, T]``.
      max_new_tokens: the most tokens to generate, at least 1.
      draft_tokens: g, the proposals of each round, at least 1.
      mask: see :func:`generate`.
      stop_token: see :func:`generate`.
      cache_dtype: of both caches; None takes each model's dtype.
      context_length: of the target's frequencies; see :func:`generate`. Required if these depend on a length, since
        all tokens of a pass share the same length.

    Returns:
      :class:`SpeculativeOutput`. A row is -1 from the first NaN in its target's logits on, even if the NaN follows
      a rejected proposal. A draft whose logits are NaN proposes token 0.

    Raises:
      ValueError: if an argument is out of range, a shape is wrong, a prompt is empty, the vocabularies differ, or a
        required ``context_length`` is missing.
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
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"draft must have the target's vocabulary, V={model.vocab_size} tokens, got V={draft.vocab_size}"
        )
    for each in (model, draft):
        check_one_axis(each, "generate takes positions of several axes")
    check_integer("max_new_tokens", max_new_tokens, least=1)
    check_integer("draft_tokens", draft_tokens, least=1)
    prompt, mask = check_prompt(model, prompt, mask)
    stops = check_stop(model, stop_token)
    for decoder in (model, draft):
        check_num_positions("max_new_tokens + draft_tokens", decoder, prompt, mask, max_new_tokens + draft_tokens)
    if context_length is None and model.needs_context_length:
        raise ValueError("context_length must be given with a target whose frequencies depend on it, got None")
    return _speculative_decode(
        ForwardPass.of(model, params, context_length),
        ForwardPass.of(draft, draft_params),
        prompt,
        mask,
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
def _speculative_decode(
    target, draft, prompt, mask, stops, *, max_new_tokens, draft_tokens, cache_dtype
) -> SpeculativeOutput:
    batch = prompt.shape[0]
    rows = jnp.arange(batch)[:, None]
    offsets = jnp.arange(draft_tokens + 1, dtype=jnp.int32)[None]

    def prefill(forward):
        return forward.prefill(prompt, mask, None, num_new_tokens=max_new_tokens + draft_tokens, dtype=cache_dtype)

    def propose(state, _):
        token, cache = state
        logits, cache = draft.step(token[:, None], cache)
        # Token -1 as an input would make the target's logits NaN.
        token = jnp.maximum(sample(None, logits[:, 0], temperature=0), 0)
        return (token, cache), token

    def next_round(state: _State) -> _State:
        before = state.cache.num_tokens
        # The extra step stores the last proposal in the draft's cache; the token that it proposes is dropped.
        (_, draft_cache), proposed = lax.scan(propose, (state.token, state.draft_cache), length=draft_tokens + 1)
        proposed = proposed[:-1].T
        inputs = jnp.concatenate([state.token[:, None], proposed], axis=1)
        logits, cache = target.step(inputs, state.cache)
        verified = sample(None, logits, temperature=0)  # [B, g + 1]
        agrees = jnp.cumprod((proposed == verified[:, :-1]).astype(jnp.int32), axis=1)
        num_agreed = jnp.sum(agrees, axis=1, dtype=jnp.int32)
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
            draft_cache=draft_cache.truncate(before + count),
            token=jnp.where(count > 0, last, state.token),
            tokens=state.tokens.at[rows, index].set(verified, mode="drop"),
            num_tokens=num_tokens,
            accepted=state.accepted + jnp.minimum(num_agreed, count),
            calls=state.calls + 1,
            done=state.done | stopped | (num_tokens == max_new_tokens),
        )

    (logits, cache), (_, draft_cache) = prefill(target), prefill(draft)
    token = sample(None, logits, temperature=0)
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
    state = lax.while_loop(lambda state: ~jnp.all(state.done), next_round, state)
    return SpeculativeOutput(
        repeat_last(state.tokens, state.num_tokens), state.num_tokens, state.accepted, state.calls
    )
