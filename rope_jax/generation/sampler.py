"""Draws the tokens of all rows: the options of :func:`sample` and a key for each row, as one argument."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, checked_key, is_concrete
from rope_jax.generation.logits import checked_logits
from rope_jax.generation.sample import check_sampling, cut_logits, is_no_temperature, sample, without_a_likeliest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """The options of :func:`sample` and the keys of all rows, as a single argument of a jitted function."""

    rng: jax.Array | None  # [] or [B]; None is greedy
    temperature: jax.Array
    top_p: jax.Array | None
    logits_fns: tuple[Callable, ...]
    top_k: int | None = dataclasses.field(metadata=dict(static=True))

    @property
    def greedy(self) -> bool:
        return self.rng is None

    @property
    def _options(self) -> dict[str, Any]:
        return dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def next_token(self, logits, written, index) -> tuple[jax.Array, jax.Array]:
        """Draws new token ``index`` of each row from logits ``[B, V]``: int32 ``[B]``, and its log-probability."""
        changed = logits
        for number, logits_fn in enumerate(self.logits_fns):
            changed = checked_logits(logits_fn(changed, written, index), logits, number)
        token = self.draw(changed, index)
        chosen = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], axis=1)[:, 0]
        return token, chosen - jax.nn.logsumexp(logits, axis=-1)

    def draw(self, logits, index, stream: int | None = None) -> jax.Array:
        """Token ``index`` (``[]`` or ``[B]``) of each row from logits ``[B, V]``: int32 ``[B]``."""
        if self.greedy:
            return sample(None, logits, temperature=0)
        keys = self._keys(jnp.broadcast_to(index, logits.shape[:1]), stream)
        return jax.vmap(lambda key, row: sample(key, row, **self._options))(keys, logits)

    def probabilities(self, logits) -> jax.Array:
        """The distribution that :meth:`draw` draws from, float32 ``[..., V]``; NaN where a logit or option is."""
        scaled, invalid = cut_logits(logits, **self._options)
        invalid |= without_a_likeliest(logits) | is_no_temperature(self.temperature)
        likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
        p = jnp.where(self.temperature == 0, likeliest, jax.nn.softmax(scaled, axis=-1))
        return jnp.where(invalid[..., None], jnp.nan, p)

    def uniform(self, index, stream: int) -> jax.Array:
        """A number in [0, 1) for each index ``[B, n]``."""
        draws = [jax.vmap(jax.random.uniform)(self._keys(each, stream)) for each in index.T]
        return jnp.stack(draws, axis=1)

    def categorical(self, log_p, index, stream: int) -> jax.Array:
        """A token of each row with log-probabilities ``[B, V]``: int32 ``[B]``."""
        return jax.vmap(jax.random.categorical)(self._keys(index, stream), log_p).astype(jnp.int32)

    def _keys(self, index, stream: int | None) -> jax.Array:
        """The key of token ``index [B]`` of each row, in a stream of its own."""
        assert self.rng is not None
        rows, fold_in = jnp.arange(index.shape[0]), jax.vmap(jax.random.fold_in)
        keys = self.rng if self.rng.ndim else jax.vmap(jax.random.fold_in, (None, 0))(self.rng, rows)
        keys = fold_in(keys, index)
        return keys if stream is None else jax.vmap(jax.random.fold_in, (0, None))(keys, stream)


def make_sampler(rng, temperature, top_k, top_p, batch: int, logits_fns: tuple[Callable, ...] = ()) -> Sampler:
    """The sampler of ``batch`` rows.

    Raises:
      ValueError: if an option is out of range, or the key is missing or has another shape.
      TypeError: if an option has another type, or ``rng`` is not a key.
    """
    check_sampling(temperature, top_k, top_p)
    greedy = is_concrete(temperature) and float(temperature) == 0  # == of jax numbers is traced inside jit
    if rng is None and not greedy:
        raise ValueError(
            f"rng must be given with temperature {temperature}, got None: pass a key, or temperature=0 for greedy"
        )
    if rng is not None:
        rng = _checked_key(rng, batch)
    return Sampler(
        None if greedy else rng,
        jnp.asarray(temperature, jnp.float32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32),
        logits_fns,
        None if top_k is None else int(top_k),
    )


def _checked_key(rng, batch: int) -> jax.Array:
    """Checks a key ``[]`` or a key for each row ``[B]``, and wraps raw key data."""
    rng = checked_key("rng", rng)
    check_axes("rng", rng, "B" if rng.ndim else "", B=batch)
    return rng
