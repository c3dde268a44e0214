"""The facts of one attention: which keys a query reads, and what happens to its scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rope_jax.attention.bias import BiasFunction
from rope_jax.attention.mask import attention_mask, distances

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
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
      mask: bool ``[B or 1, N or 1, T, S]``, an attention mask of the caller.
      scale: multiplies q.k; None is ``1/sqrt(H)``.
      logit_cap: soft bound of the scaled scores.
      bias: floating ``[B or 1, N or 1, T or 1, S]``, added to the scores.
      position_bias: a bias computed from distances, added to the scores.
      bias_key_index: int32 ``[B or 1, S]``, in place of ``key_index`` for the position bias, if they differ.
      dropout_rate: share of the weights set to 0.
      dropout_key: key data, unsigned integers.
      dropout_impl: the random number generator of ``dropout_key``.
    """

    causal: bool = dataclasses.field(default=False, metadata=_STATIC)
    window: int | None = dataclasses.field(default=None, metadata=_STATIC)
    traced_window: jax.Array | None = None
    query_index: jax.Array | None = None
    key_index: jax.Array | None = None
    num_sink_tokens: int = dataclasses.field(default=0, metadata=_STATIC)
    segments: jax.Array | None = None
    mask: jax.Array | None = None
    scale: float | None = dataclasses.field(default=None, metadata=_STATIC)
    logit_cap: float | None = dataclasses.field(default=None, metadata=_STATIC)
    bias: jax.Array | None = None
    position_bias: BiasFunction | None = None
    bias_key_index: jax.Array | None = None
    dropout_rate: float = dataclasses.field(default=0.0, metadata=_STATIC)
    dropout_key: jax.Array | None = None
    dropout_impl: str | None = dataclasses.field(default=None, metadata=_STATIC)

    @property
    def any_window(self) -> int | jax.Array | None:
        """The window, known or traced."""
        return self.window if self.traced_window is None else self.traced_window

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
        if self.causal or self.any_window is not None:
            conditions.append(
                attention_mask(
                    self.query_indices(length),
                    self.key_indices(kv_length),
                    causal=self.causal,
                    window=self.any_window,
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
