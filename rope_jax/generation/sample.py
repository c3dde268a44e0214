"""Samples the next token from its logits."""

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._checks import (
    check_axes,
    check_dtype,
    check_integer,
    check_real,
    checked_key,
    device_array,
    is_concrete,
)


def sample(rng, logits, *, temperature=1.0, top_k: int | None = None, top_p=None) -> jax.Array:
    """Draws a token per row from ``softmax(logits / temperature)``, cut to its most probable tokens.

    The cuts follow the temperature. ``top_k`` keeps the k largest logits. Of these, ``top_p`` keeps the fewest
    tokens whose probabilities sum to at least ``top_p`` (nucleus sampling, Holtzman et al. 2020, section 3.1).
    Ties at a cut are kept.

    Args:
      rng: a key.
      logits: floating ``[..., V]``.
      temperature: positive, or 0 for the largest logit (greedy); may be traced.
      top_k: number of tokens kept, at least 1; None keeps all.
      top_p: probability kept, in (0, 1]; None keeps all; may be traced.

    Returns:
      int32 ``[...]``. The result is -1, which is no token, if a row of logits holds NaN, if its largest logit is
      not finite, or if a traced argument is out of range.

    Raises:
      TypeError: if logits are not floating, ``rng`` is not a key, ``temperature`` or ``top_p`` is not a real
        number, or ``top_k`` not an integer.
      ValueError: if an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> int(rope_jax.generation.sample(jax.random.key(0), jnp.array([0.0, 3.0, 1.0]), top_k=1))
      1
    """
    check_sampling(temperature, top_k, top_p)
    logits = device_array("logits", logits)
    check_axes("logits", logits, "... V")
    check_dtype("logits", logits, jnp.floating, "floating")
    if not logits.shape[-1]:
        raise ValueError(f"logits must be of one token or more, got shape {logits.shape}")
    greedy = is_concrete(temperature) and temperature == 0
    temperature = jnp.asarray(temperature, jnp.float32)
    if not greedy:
        rng = checked_key("rng", rng)
        check_axes("rng", rng, "")
    # Traced arguments can only be checked at run time.
    invalid = without_a_likeliest(logits) | is_no_temperature(temperature)
    likeliest = jnp.where(invalid, -1, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
    if greedy:
        return likeliest
    scaled, out_of_range = cut_logits(logits, temperature, top_k, top_p)
    drawn = jax.random.categorical(rng, scaled, axis=-1)
    invalid |= out_of_range
    return jnp.where(invalid, -1, jnp.where(temperature == 0, likeliest, drawn.astype(jnp.int32)))


def without_a_likeliest(logits) -> jax.Array:
    """Which rows of logits ``[..., V]`` hold NaN, or no finite largest logit: bool ``[...]``."""
    return jnp.isnan(logits).any(axis=-1) | ~jnp.isfinite(jnp.max(logits, axis=-1))


def is_no_temperature(temperature) -> jax.Array:
    """True for a negative number, infinity and NaN: bool ``[]``."""
    return ~((temperature >= 0) & (temperature < jnp.inf))


def cut_logits(logits, temperature, top_k: int | None, top_p) -> tuple[jax.Array, jax.Array]:
    """Logits over the temperature with -inf beyond the cuts, float32 ``[..., V]``, and where ``top_p`` is invalid.

    :func:`sample` draws from their softmax. A traced temperature of 0 counts as 1.
    """
    invalid = jnp.zeros((), bool)
    scaled = logits.astype(jnp.float32)
    scaled -= jnp.max(scaled, axis=-1, keepdims=True)  # the largest logit becomes 0, finite at any temperature
    scaled /= jnp.where(temperature == 0, 1.0, temperature)
    if top_k is not None:
        lowest = lax.top_k(scaled, min(top_k, logits.shape[-1]))[0][..., -1:]
        scaled = jnp.where(scaled < lowest, -jnp.inf, scaled)
    if top_p is not None:
        descending = jnp.sort(scaled, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < top_p) | (before == 0)  # at least the most probable token
        lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        invalid = ~((jnp.asarray(top_p) >= 0) & (jnp.asarray(top_p) <= 1))
        scaled = jnp.where(scaled < lowest, -jnp.inf, scaled)
    return scaled, invalid


def check_sampling(temperature, top_k, top_p) -> None:
    """Raises TypeError or ValueError if a concrete argument of :func:`sample` is out of range."""
    if temperature is None:
        raise TypeError("temperature must be a real number, got None")
    number = check_real("temperature", temperature)
    if isinstance(number, float) and number < 0:
        raise ValueError(f"temperature must be 0 or above and finite, got {temperature}")
    if top_k is not None:
        check_integer("top_k", top_k, least=1)
    number = check_real("top_p", top_p)
    if isinstance(number, float) and not 0 < number <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
