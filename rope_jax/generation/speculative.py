"""How does a small model help a large one to write faster, and nothing else?"""

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
from rope_jax.generation.sample import sample
from rope_jax.models.decoder import Decoder


class SpeculativeOutput(NamedTuple):
    """What :func:`speculative_decode` wrote, and what it cost.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``; after a row's stop token, that token again.
      num_tokens: int32 ``[B]``, the tokens of each row that count, the stop token among them.
      accepted: int32 ``[B]``, those of them that the draft proposed.
      calls: int32 ``[]``, forward passes of the target, that over the prompts among them. :func:`generate` needs
        as many as the longest row has tokens.
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
    """The target's greedy tokens, those of ``generate(model, params, prompt, temperature=0)``, in fewer passes.

    Speculative decoding (Leviathan et al. 2023, section 2; Chen et al. 2023, algorithm 2) at temperature 0. In each
    round the draft proposes the tokens ``d_1 .. d_g``, one by one; the target reads all of them at once and says
    what it would write before and after each, ``t_1 .. t_{g+1}``. With n the number of proposals before the first
    that differs, ``n = sum_i prod_{j <= i} [d_j = t_j]``, the row writes ``t_1 .. t_{n+1}``, and both caches forget
    what comes after (:meth:`KVCache.truncate`). Rows accept different numbers; a row that has ended waits.

    The target decides every token: a bad draft costs time and changes nothing, except where two tokens of the
    target are as close as a pass over several tokens may round otherwise than over one. Compiled once per padded
    shape of the prompt, the two numbers of tokens, number of stop tokens, cache dtype, and whether it is masked.

    Args:
      model: the target, a :class:`Decoder`.
      params: its variables.
      draft: a :class:`Decoder` of the same vocabulary.
      draft_params: its variables.
      prompt: integers ``[B, T]``.
      max_new_tokens: how many tokens to write at most, at least 1.
      draft_tokens: g, how many the draft proposes in each round, at least 1.
      mask: see :func:`generate`.
      stop_token: see :func:`generate`.
      cache_dtype: of both caches; each model's own dtype where it is None.
      context_length: see :func:`generate`; of the target's frequencies. Needed where they depend on it, since tokens that
        are read at once have one length.

    Returns:
      :class:`SpeculativeOutput`. A row whose target gives NaN is -1 from there on, also where it is for a token that was
      proposed and would not have been written; a draft that gives NaN proposes 0.

    Raises:
      ValueError: if an argument is out of its range, a shape is wrong, a prompt is empty, the vocabularies differ,
        or the length is missing.
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
    check_integer("max_new_tokens", max_new_tokens, least=1)
    check_integer("draft_tokens", draft_tokens, least=1)
    prompt, mask = check_prompt(model, prompt, mask)
    stops = check_stop(model, stop_token)
    for each in (model, draft):
        check_room("max_new_tokens + draft_tokens", each, prompt, mask, max_new_tokens + draft_tokens)
    if context_length is None and model.needs_context_length:
        raise ValueError("context_length must be given with a target whose frequencies depend on it, got None")
    return _speculate(
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
    """Between two rounds. Both caches hold the prompt and all that is written but its last token."""

    cache: KVCache
    draft_cache: KVCache
    token: jax.Array  # [B]: the last that is written
    tokens: jax.Array
    num_tokens: jax.Array
    accepted: jax.Array
    calls: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "draft_tokens", "cache_dtype"))
def _speculate(
    target, draft, prompt, mask, stops, *, max_new_tokens, draft_tokens, cache_dtype
) -> SpeculativeOutput:
    batch = prompt.shape[0]
    rows = jnp.arange(batch)[:, None]
    ahead = jnp.arange(draft_tokens + 1, dtype=jnp.int32)[None]

    def start(reader):
        return reader.start(prompt, mask, None, room=max_new_tokens + draft_tokens, dtype=cache_dtype)

    def propose(state, _):
        token, cache = state
        logits, cache = draft.read(token[:, None], cache)
        # The target must not read -1, which would make its own answer NaN.
        token = jnp.maximum(sample(None, logits[:, 0], temperature=0), 0)
        return (token, cache), token

    def next_round(state: _State) -> _State:
        before = state.cache.num_tokens
        # The last one proposed is read, so that the draft knows it too, and what follows it is not used.
        (_, draft_cache), proposed = lax.scan(propose, (state.token, state.draft_cache), length=draft_tokens + 1)
        proposed = proposed[:-1].T
        read = jnp.concatenate([state.token[:, None], proposed], axis=1)
        logits, cache = target.read(read, state.cache)
        written = sample(None, logits, temperature=0)  # [B, g + 1]
        agrees = jnp.cumprod((proposed == written[:, :-1]).astype(jnp.int32), axis=1)
        agreed = jnp.sum(agrees, axis=1, dtype=jnp.int32)
        count = jnp.minimum(agreed + 1, max_new_tokens - state.num_tokens)
        ends = is_stop(written, stops) & (ahead < count[:, None])
        ended = jnp.any(ends, axis=1)
        count = jnp.where(ended, jnp.argmax(ends, axis=1).astype(jnp.int32) + 1, count)
        count = jnp.where(state.done, 0, count)

        slots = jnp.where(ahead < count[:, None], state.num_tokens[:, None] + ahead, max_new_tokens)
        last = jnp.take_along_axis(written, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        num_tokens = state.num_tokens + count
        return _State(
            cache=cache.truncate(before + count),
            draft_cache=draft_cache.truncate(before + count),
            token=jnp.where(count > 0, last, state.token),
            tokens=state.tokens.at[rows, slots].set(written, mode="drop"),
            num_tokens=num_tokens,
            accepted=state.accepted + jnp.minimum(agreed, count),
            calls=state.calls + 1,
            done=state.done | ended | (num_tokens == max_new_tokens),
        )

    (logits, cache), (_, draft_cache) = start(target), start(draft)
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
