"""The facts of one attention: which keys a query reads, and what happens to its scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rope_jax.attention.bias import BiasFunction
from rope_jax.attention.mask import attention_mask, distances


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What an attention kernel must know beside queries, keys and values.

    A query reads a key if all conditions allow it: causality, window, equal segments, mask. Padding arrives as
    segments or in the mask. With a cache, keys and values are all S slots, and ``key_index`` sorts free slots after
    every query.

    Attributes:
      causal: whether a query reads only keys with its own sequence index or a lower one.
      window: a query reads only keys less than this many tokens away: an int, int32 ``[]`` if traced, or None.
      query_index: int32 ``[B or 1, T]``, the sequence index of each query; None is ``0 .. T-1``.
      key_index: int32 ``[B or 1, S]``, of each key; None is ``0 .. S-1``.
      num_sink_tokens: keys with a lower sequence index are in every window.
      segments: int32 ``[B, T]`` of self-attention: a query reads only its own segment. Padding is a segment.
      mask: bool ``[B or 1, N or 1, T or 1, S]``, an attention mask of the caller.
      scale: multiplies q.k; None is ``1/sqrt(H)``.
      logit_cap: soft bound of the scaled scores.
      bias: floating ``[B or 1, N or 1, T or 1, S]``, added to the scores.
      position_bias: a bias computed from distances, added to the scores.
      bias_key_index: int32 ``[B or 1, S]``, in place of ``key_index`` for the position bias, if they differ.
      sink_logits: floating ``[N]``, a score of each head that takes a share of the weights and has no value.
      dropout_rate: share of the weights set to 0.
      dropout_key: key data, unsigned integers: ``jax.random.wrap_key_data(dropout_key, impl=dropout_impl)``.
      dropout_impl: the random number generator of ``dropout_key``.
    """

    causal: bool = False
    window: int | jax.Array | None = None
    query_index: jax.Array | None = None
    key_index: jax.Array | None = None
    num_sink_tokens: int = 0
    segments: jax.Array | None = None
    mask: jax.Array | None = None
    scale: float | None = None
    logit_cap: float | None = None
    bias: jax.Array | None = None
    position_bias: BiasFunction | None = None
    bias_key_index: jax.Array | None = None
    sink_logits: jax.Array | None = None
    dropout_rate: float = 0.0
    dropout_key: jax.Array | None = None
    dropout_impl: str | None = None

    @property
    def known_window(self) -> int | None:
        """The window, if it is known before the program runs."""
        return self.window if isinstance(self.window, int) else None

    @property
    def traced_window(self) -> jax.Array | None:
        """The window, if only the running program knows it."""
        return None if isinstance(self.window, int) else self.window

    def query_indices(self, length) -> jax.Array:
        """The sequence indices of T queries, int32 ``[B or 1, T]``."""
        return jnp.arange(length, dtype=jnp.int32)[None] if self.query_index is None else self.query_index

    def key_indices(self, kv_length) -> jax.Array:
        """The sequence indices of S keys, int32 ``[B or 1, S]``."""
        return jnp.arange(kv_length, dtype=jnp.int32)[None] if self.key_index is None else self.key_index

    def attention_mask(self, length, kv_length) -> jax.Array | None:
        """All conditions on T queries and S keys as one mask, bool ``[B or 1, N or 1, T, S]``; None without any.

        Example:
          >>> Facts(causal=True).attention_mask(2, 3).astype(int).tolist()
          [[[[1, 0, 0], [1, 1, 0]]]]
        """
        conditions = [] if self.mask is None else [self.mask]
        if self.causal or self.window is not None:
            conditions.append(
                attention_mask(
                    self.query_indices(length),
                    self.key_indices(kv_length),
                    causal=self.causal,
                    window=self.window,
                    num_sink_tokens=self.num_sink_tokens,
                )
            )
        if self.segments is not None:
            conditions.append((self.segments[:, :, None] == self.segments[:, None, :])[:, None])
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def score_bias(self, length, kv_length) -> jax.Array | None:
        """Bias and position bias of T queries and S keys, floating ``[B or 1, N or 1, T or 1, S]``."""
        if self.position_bias is None:
            return self.bias
        keys = self.key_indices(kv_length) if self.bias_key_index is None else self.bias_key_index
        bias = self.position_bias(distances(self.query_indices(length), keys))
        return bias if self.bias is None else self.bias + bias


_ARRAYS = [
    "query_index",
    "key_index",
    "segments",
    "mask",
    "bias",
    "position_bias",
    "bias_key_index",
    "sink_logits",
    "dropout_key",
]
_STATIC = ["causal", "num_sink_tokens", "scale", "logit_cap", "dropout_rate", "dropout_impl"]


def _flatten(facts: Facts):
    arrays = [facts.traced_window, *(getattr(facts, name) for name in _ARRAYS)]
    return arrays, (facts.known_window, *(getattr(facts, name) for name in _STATIC))


def _unflatten(static, arrays) -> Facts:
    (known_window, *options), (traced_window, *facts) = static, arrays
    names = dict(zip(_STATIC, options, strict=True)) | dict(zip(_ARRAYS, facts, strict=True))
    return Facts(window=traced_window if known_window is None else known_window, **names)


jax.tree_util.register_pytree_node(Facts, _flatten, _unflatten)
