"""Generates text: prefill, then a token per step until every row has stopped."""

from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp

from rope_jax._checks import (
    as_int32,
    check_axes,
    check_callable,
    check_dtype,
    device_array,
    is_concrete,
)
from rope_jax.attention.cache import KVCache
from rope_jax.generation.forward import ForwardPass, check_one_axis
from rope_jax.generation.logits import LogitsFunction, as_pytrees
from rope_jax.generation.loop import Generation, Inputs, run_on_device, run_on_host
from rope_jax.generation.prompts import (
    check_model,
    check_num_positions,
    check_num_tokens,
    check_prefix,
    check_prefix_length,
    check_prompt,
    check_stop,
    checked_cache_dtype,
)
from rope_jax.generation.sampler import make_sampler
from rope_jax.models.decoder import Decoder


def generate(
    model: Decoder,
    params,
    prompt,
    *,
    max_new_tokens: int,
    rng=None,
    mask=None,
    positions=None,
    next_position=None,
    prefix_length=None,
    cache: KVCache | None = None,
    num_samples: int = 1,
    temperature=1.0,
    top_k: int | None = None,
    top_p=None,
    logits_fn: LogitsFunction | Sequence[LogitsFunction] = (),
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

    A chat, whose second prompt is read after the first round:

      >>> first = rope_jax.generate(model, params, prompt, mask=mask, max_new_tokens=5, temperature=0, stop_token=3)
      >>> last = first.tokens[:, -1:]  # not read yet: see Generation.cache
      >>> question = jnp.concatenate([last, jnp.array([[5, 6], [7, 8]])], axis=1)
      >>> second = rope_jax.generate(
      ...     model, params, question, cache=first.cache, max_new_tokens=5, temperature=0
      ... )

    Args, prompt and cache:
      model: a :class:`Decoder`.
      params: its variables, from ``model.init``.
      prompt: integers ``[B, T]``.
      mask: nonzero at real tokens ``[B, T]``, for prompts of unequal length padded on either side. Every row must
        have a real token.
      cache: the tokens before the prompt, in a cache of :meth:`Decoder.init_cache` with B rows, or with a single
        row shared by all prompts. It needs no free slots. A cache that evicts tokens keeps its size, so the output
        can be of any length. If a prompt is too long for it, the row is filled with -1; see :meth:`KVCache.write`.
      positions: of the prompt, if they are not the count of real tokens: integers ``[B or 1, T]``, or ``[B or 1, T,
        A]`` for a rope of A axes (:func:`rope_jax.core.multimodal_positions`).
      next_position: integers ``[]`` or ``[B]``, the position of the first new token, on all axes; required with
        ``positions``. Each further token adds 1.
      prefix_length: integers, ``[]`` or ``[B]``: the first real tokens of each prompt, which read each other in
        both directions (prefix-LM): ``mask.sum(1)`` for whole prompts. It needs an empty cache. See
        :class:`RotaryAttention`.
      num_samples: answers to each prompt, from a single prefill: row ``b * num_samples + j`` of the output is
        answer j to prompt b.

    Args, sampling:
      rng: a key, from which token i of row b is drawn with ``fold_in(fold_in(rng, b), i)``; or keys ``[B]`` in
        place of ``fold_in(rng, b)``, which make a row independent of its index. Required unless ``temperature`` is
        0. Rows are those of the output. Inside ``shard_map`` pass keys ``[B]``: a single key numbers the rows of
        each device from 0.
      temperature: see :func:`sample`; 0 is greedy.
      top_k: see :func:`sample`.
      top_p: see :func:`sample`.
      logits_fn: ``logits_fn(logits, tokens, step)`` gives the logits ``[B, V]`` from which token number ``step``
        (int32 ``[]``) is drawn: a function, or several in turn, called under ``jax.jit``. ``tokens`` is int32 ``[B,
        T + max_new_tokens]``: prompt and answer so far, -1 at padding and where nothing is written yet. Ready ones:
        :class:`RepetitionPenalty`, :class:`MinP`, :class:`LogitBias`.

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
    ``num_samples``, ``logits_fn`` (a plain function by identity, the ready ones by class), number of stop tokens,
    shape and dtype of the cache, integer ``context_length``, and choice of greedy decoding, mask and streaming.
    Prompt lengths under the same padding, temperatures, keys, stop tokens and array ``context_length`` share a
    program.

    Reproducibility: a row depends neither on padding, nor on other rows, nor on streaming, nor on a cache for its
    first tokens. There are two exceptions. Sums of a different shape round differently, which may decide between
    nearly equal logits. If frequencies depend on the length and no ``context_length`` is given, the deeper layers
    of a cache keep the values that they computed at its earlier length.
    """
    check_model("model", model)
    prompt, mask = check_prompt(model, prompt, mask)
    stops = check_stop(model, stop_token)
    max_new_tokens = check_num_tokens("max_new_tokens", max_new_tokens)
    num_samples = check_num_tokens("num_samples", num_samples)
    cache_dtype = checked_cache_dtype(cache_dtype)
    if cache is not None:
        check_prefix(model, cache, prompt, mask, cache_dtype)
    check_num_positions("max_new_tokens", model, prompt, mask, max_new_tokens, cache)
    sampler = make_sampler(rng, temperature, top_k, top_p, prompt.shape[0] * num_samples, as_pytrees(logits_fn))
    forward = ForwardPass.of(model, params, context_length)
    if prefix_length is not None:
        prefix_length = check_prefix_length(prefix_length, prompt, mask, cache)
    positions, next_position = _checked_positions(model, positions, next_position, prompt)
    inputs = Inputs(prompt, mask, cache, stops, positions, next_position, prefix_length)
    sizes = dict(max_new_tokens=max_new_tokens, num_samples=num_samples, cache_dtype=cache_dtype)
    if on_token is None:
        return run_on_device(forward, sampler, inputs, **sizes)
    check_callable("on_token", on_token, "row", "token")
    if not is_concrete((forward, sampler, inputs)):
        raise ValueError("on_token must be left out inside jax.jit, which returns no token before the last")
    return run_on_host(forward, sampler, inputs, on_token, sizes)


def _checked_positions(model: Decoder, positions, next_position, prompt) -> tuple:
    """The positions of the prompt, and int32 ``[B]`` of the first new tokens; None and None if they are counted."""
    if (positions is None) != (next_position is None):
        missing, given = ("positions", "next_position") if positions is None else ("next_position", "positions")
        raise ValueError(f"{missing} must be given with {given}, got None")
    if positions is None:
        check_one_axis(model, "pass positions and next_position, as multimodal_positions gives them")
        return None, None
    next_position = device_array("next_position", next_position)
    check_dtype("next_position", next_position, jnp.integer, "integer")
    check_axes("next_position", next_position, "B" if next_position.ndim else "", B=prompt.shape[0])
    return device_array("positions", positions), jnp.broadcast_to(as_int32(next_position), prompt.shape[:1])
