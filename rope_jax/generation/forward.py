"""What does a model expect after these tokens?"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax.attention.cache import KVCache
from rope_jax.models.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """A model and its variables, as one argument of a jitted function.

    Attributes:
      params: its variables.
      context_length: integers ``[]`` or ``[B]`` that its frequencies are for, or None; see :meth:`Decoder.__call__`.
      model: a :class:`Decoder`.
      known_context_length: the same as an int, to be compiled in.
    """

    params: Any
    context_length: jax.Array | None
    model: Decoder = dataclasses.field(metadata=dict(static=True))
    known_context_length: int | None = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, model: Decoder, params, context_length: int | jax.Array | None = None) -> "ForwardPass":
        """The length compiled in where it is an integer of the host."""
        if isinstance(context_length, int | np.integer):
            return cls(params, None, model, int(context_length))
        return cls(params, context_length, model, None)

    def start(self, prompt, mask, cache: KVCache | None, *, room: int, dtype=None) -> tuple[jax.Array, KVCache]:
        """Reads whole prompts ``[B, T]``, after those in a cache if there is one.

        Args:
          prompt: integers ``[B, T]``.
          mask: bool ``[B, T]``, True at real tokens, or None.
          cache: of B rows, or of one that all rows begin with.
          room: how many tokens the cache that comes back can hold after the prompts. One that evicts is as large
            as it was.
          dtype: of a cache that is made here.

        Returns:
          Logits float32 ``[B, V]`` after the last real token of each row, and the cache.
        """
        batch, width = prompt.shape
        if cache is None:
            cache = self.model.init_cache(batch=batch, capacity=width + room, dtype=dtype)
        else:
            if cache.num_tokens.shape[0] != batch:
                cache = cache.select_rows(jnp.zeros((batch,), jnp.int32))
            if cache.eviction is None:
                cache = cache.grow(cache.capacity + width + room)
        hidden, cache = self._hidden(prompt, cache, mask)
        last = jnp.full((batch,), width - 1, jnp.int32)
        if mask is not None:
            last -= jnp.argmax(mask[:, ::-1], axis=1).astype(last.dtype)
        return self._unembed(hidden[jnp.arange(batch), last]), cache

    def read(self, tokens, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Logits float32 ``[B, T, V]`` after each of the next tokens ``[B, T]``, and the cache with them."""
        hidden, cache = self._hidden(tokens, cache)
        return self._unembed(hidden), cache

    def _hidden(self, tokens, cache, mask=None):
        context_length = self.context_length if self.known_context_length is None else self.known_context_length
        return self.model.apply(
            self.params, tokens, mask=mask, cache=cache, context_length=context_length, method="hidden"
        )

    def _unembed(self, hidden):
        return self.model.apply(self.params, hidden, method="unembed")
