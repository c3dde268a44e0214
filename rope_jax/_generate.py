"""Which token comes next, and the one after that?"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rope_jax._checks import check_axes, check_dtype, check_mask, device_array
from rope_jax._decoder import Decoder


class Generation(NamedTuple):
    """What :func:`generate` wrote.

    Attributes:
      tokens: int32 ``[B, max_new_tokens]``; after a row's stop token, the stop token again.
      length: int32 ``[B]``, the tokens of each row that count, the stop token among them.
    """

    tokens: jax.Array
    length: jax.Array


def sample(rng, logits, *, temperature=1.0, top_k: int | None = None, top_p=None) -> jax.Array:
    """Draws one token per row from ``softmax(logits / temperature)``, cut to its most probable tokens.

    The cuts come after the temperature, ``top_k`` first: the k largest, then the fewest of those whose
    probability sums to at least ``top_p`` (nucleus sampling, Holtzman et al. 2020, section 3.1). Ties at a
    cut are kept.

    Args:
      rng: a key.
      logits: floating ``[..., V]``.
      temperature: positive, or 0 for the largest logit (greedy); may be traced.
      top_k: how many tokens are kept, at least 1; all where it is None.
      top_p: probability that is kept, in (0, 1]; all where it is None; may be traced.

    Returns:
      int32 ``[...]``; -1, which is no token, where the logits hold NaN.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> int(rope_jax.sample(jax.random.key(0), jnp.array([0.0, 3.0, 1.0]), top_k=1))
      1
    """
    _check_sampling(temperature, top_k, top_p)
    logits = jnp.asarray(logits)
    broken = jnp.isnan(logits).any(axis=-1)
    likeliest = jnp.where(broken, -1, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
    if _is_known(temperature) and temperature == 0:
        return likeliest
    scaled = logits.astype(jnp.float32)
    scaled -= jnp.max(scaled, axis=-1, keepdims=True)  # the largest stays finite at any temperature
    scaled /= jnp.where(temperature == 0, 1.0, temperature)
    if top_k is not None:
        lowest = lax.top_k(scaled, min(top_k, logits.shape[-1]))[0][..., -1:]
        scaled = jnp.where(scaled < lowest, -jnp.inf, scaled)
    if top_p is not None:
        falling = jnp.sort(scaled, axis=-1, descending=True)
        probabilities = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        lowest = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < lowest, -jnp.inf, scaled)
    drawn = jax.random.categorical(rng, scaled, axis=-1)
    return jnp.where((temperature == 0) | broken, likeliest, drawn.astype(jnp.int32))


def generate(
    model: Decoder,
    params,
    prompt,
    *,
    max_new_tokens: int,
    rng=None,
    mask=None,
    temperature=1.0,
    top_k: int | None = None,
    top_p=None,
    stop_token: int | None = None,
    cache_dtype=None,
    length: int | jax.Array | None = None,
) -> Generation:
    """Continues each prompt: one jitted prefill of all prompts, then one jitted loop of single tokens.

    Compiled once per padded shape of the prompt, ``max_new_tokens``, ``top_k``, stop token, cache dtype, and
    whether it is greedy and masked; other real lengths, temperatures and seeds re-use the program. So does another
    ``length`` that is an array; as an int it is compiled in.

    Args:
      model: a :class:`Decoder`.
      params: its variables, as ``model.init`` returned them.
      prompt: integers ``[B, T]``.
      max_new_tokens: how many tokens to write at most, at least 1.
      rng: a key; needed unless the temperature is 0.
      mask: nonzero at the real tokens of prompts of unequal length ``[B, T]``, padded on either side. Every
        row needs one.
      temperature: see :func:`sample`; 0 is greedy.
      top_k: see :func:`sample`.
      top_p: see :func:`sample`.
      stop_token: a row that writes it writes nothing more.
      cache_dtype: of the stored keys and values; the model's dtype where it is None.
      length: for schedules that depend on it (:class:`DynamicNTK`, :class:`LongRope`), the tokens that the
        frequencies are for, see :meth:`Rope.rotation`: prompt and answer together, or the longest context that
        is expected. One choice for the whole generation, since cached keys were turned by it and new queries
        must agree with them. Without it such a schedule says that it needs one.

    Returns:
      :class:`Generation`.

    Raises:
      ValueError: if an argument is out of its range, a shape is wrong, a prompt is empty, or the key is
        missing.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard())
      >>> sizes = dict(vocab_size=11, num_layers=1, width=16, num_heads=2, head_dim=8, hidden_dim=32)
      >>> model = rope_jax.Decoder(**sizes, rope=rope)
      >>> prompt, mask = jnp.array([[1, 2, 3], [4, 0, 0]]), jnp.array([[1, 1, 1], [1, 0, 0]])
      >>> params = model.init(jax.random.key(0), prompt)
      >>> rope_jax.generate(model, params, prompt, mask=mask, max_new_tokens=5, temperature=0).tokens.shape
      (2, 5)
    """
    prompt = device_array("prompt", prompt)
    check_axes("prompt", prompt, "B T")
    check_dtype("prompt", prompt, jnp.integer, "integer")
    if prompt.size == 0:
        raise ValueError(f"prompt must hold at least one row and one token, got shape {prompt.shape}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if stop_token is not None and not (isinstance(stop_token, int) and 0 <= stop_token < model.vocab_size):
        raise ValueError(f"stop_token must be an integer in [0, V={model.vocab_size}), got {stop_token}")
    if mask is not None:
        mask = check_mask("mask", mask, "B T", B=prompt.shape[0], T=prompt.shape[1])
        if _is_known(mask) and not bool(jnp.all(jnp.any(mask, axis=1))):
            raise ValueError("mask must have a real token in every row, got a row of padding alone")
        prompt = jnp.where(mask, prompt, jnp.zeros_like(prompt))  # what stands at padding is nobody's token
    if _is_known(prompt):
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= model.vocab_size:
            raise ValueError(f"prompt must hold tokens in [0, V={model.vocab_size}), got {low} to {high}")
    prompt = jnp.clip(prompt, -1, model.vocab_size).astype(jnp.int32)  # one that is traced and too large stays so
    _check_room(model, prompt, mask, max_new_tokens)
    _check_sampling(temperature, top_k, top_p)
    greedy = bool(_is_known(temperature) and temperature == 0)
    if rng is None:
        if not greedy:
            raise ValueError(f"rng must be given with temperature {temperature}, got None")
        rng = jax.random.key(0)  # never read
    if isinstance(rng, int):
        raise TypeError(f"rng must be a key, as jax.random.key({rng}), got the integer {rng}")
    fixed = None
    if isinstance(length, int | np.integer):
        fixed, length = int(length), None
    return _generate(
        model,
        params,
        prompt,
        rng,
        mask,
        length,
        jnp.asarray(temperature, jnp.float32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32),
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        stop_token=stop_token,
        cache_dtype=cache_dtype,
        fixed_length=fixed,
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "greedy", "max_new_tokens", "top_k", "stop_token", "cache_dtype", "fixed_length"),
)
def _generate(
    model,
    params,
    prompt,
    rng,
    mask,
    length,
    temperature,
    top_p,
    *,
    greedy,
    max_new_tokens,
    top_k,
    stop_token,
    cache_dtype,
    fixed_length,
) -> Generation:
    batch, width = prompt.shape
    forward = functools.partial(
        model.apply, params, length=length if fixed_length is None else fixed_length, method="hidden"
    )

    def next_token(hidden, step, done):
        logits = model.apply(params, hidden, method="unembed")
        token = sample(
            jax.random.fold_in(rng, step),
            logits,
            temperature=0 if greedy else temperature,
            top_k=top_k,
            top_p=top_p,
        )
        if stop_token is not None:
            token = jnp.where(done, stop_token, token)
        return token

    cache = model.init_cache(batch=batch, capacity=width + max_new_tokens, dtype=cache_dtype)
    hidden, cache = forward(prompt, mask=mask, cache=cache)
    last = jnp.full((batch,), width - 1)
    if mask is not None:
        last -= jnp.argmax(mask[:, ::-1], axis=1).astype(last.dtype)
    going = jnp.zeros((batch,), bool)
    first = next_token(hidden[jnp.arange(batch), last], 0, going)

    def step(carry, index):
        cache, token, done = carry
        if stop_token is not None:
            done |= token == stop_token
        hidden, cache = forward(token[:, None], cache=cache)
        following = next_token(hidden[:, 0], index, done)
        return (cache, following, done), (token, done)

    (_, final, _), (tokens, stopped) = lax.scan(step, (cache, first, going), jnp.arange(1, max_new_tokens))
    tokens = jnp.concatenate([tokens.T, final[:, None]], axis=1)
    # `stopped[i]` says that token i or one before it was the stop token: those up to it count.
    return Generation(tokens, jnp.sum(~stopped, axis=0, dtype=jnp.int32) + 1)


def _check_room(model, prompt, mask, max_new_tokens) -> None:
    """Raises where it is known that the answer outgrows the positions of the model's embedding."""
    longest = getattr(model.position_embedding, "length", None)
    if longest is None or not (mask is None or _is_known(mask)):
        return
    real = prompt.shape[1] if mask is None else int(jnp.sum(mask, axis=1).max())
    if real + max_new_tokens - 1 > longest:  # the last token is written and not read
        raise ValueError(
            f"max_new_tokens must be at most {longest + 1 - real} after a prompt of {real} tokens: "
            f"position_embedding has {longest} positions, got {max_new_tokens}"
        )


def _is_known(value) -> bool:
    return not isinstance(value, jax.core.Tracer)


def _check_sampling(temperature, top_k, top_p) -> None:
    if _is_known(temperature) and not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or above and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and _is_known(top_p) and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
