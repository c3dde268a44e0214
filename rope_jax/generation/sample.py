"""Sample the next token from its logits."""

import jax
import jax.numpy as jnp
from jax import lax

from rope_jax._checks import check_integer
from rope_jax.attention.attend import real_number
from rope_jax.generation.prompts import is_known


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
      int32 ``[...]``; -1, which is no token, where the logits hold NaN, or an argument is out of its range and only
      run time knows it.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> int(rope_jax.generation.sample(jax.random.key(0), jnp.array([0.0, 3.0, 1.0]), top_k=1))
      1
    """
    check_sampling(temperature, top_k, top_p)
    logits = jnp.asarray(logits)
    broken = jnp.isnan(logits).any(axis=-1) | ~(jnp.asarray(temperature) >= 0)  # known at run time alone
    likeliest = jnp.where(broken, -1, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
    if is_known(temperature) and temperature == 0:
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
        kept = (before < top_p) | (before == 0)  # the most probable one at least
        lowest = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        broken |= ~((jnp.asarray(top_p) >= 0) & (jnp.asarray(top_p) <= 1))
        scaled = jnp.where(scaled < lowest, -jnp.inf, scaled)
    drawn = jax.random.categorical(rng, scaled, axis=-1)
    return jnp.where(broken, -1, jnp.where(temperature == 0, likeliest, drawn.astype(jnp.int32)))


def check_sampling(temperature, top_k, top_p) -> None:
    number = real_number("temperature", temperature)
    if isinstance(number, float) and number < 0:
        raise ValueError(f"temperature must be 0 or above and finite, got {temperature}")
    if top_k is not None:
        check_integer("top_k", top_k, least=1)
    number = real_number("top_p", top_p)
    if isinstance(number, float) and not 0 < number <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
