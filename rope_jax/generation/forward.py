"""Forward passes with a cache: prefill with whole prompts, then step through the next tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_axes, check_dtype, device_array, shown
from rope_jax.attention.cache import KVCache
from rope_jax.attention.rotations import first_rope
from rope_jax.models.decoder import Decoder


def check_one_axis(model: Decoder, advice: str) -> None:
    """Raises ValueError if the model's rope has several position axes, whose positions cannot be counted."""
    rope = first_rope(model.ropes)
    if rope is not None and rope.num_axes > 1:
        raise ValueError(f"model must have a rope of one position axis, got {rope.num_axes}: {advice}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """A model and its variables, as a single argument of a jitted function.

    Attributes:
      params: the model's variables.
      context_length: integers ``[]`` or ``[B]`` for the model's frequencies, or None; see :meth:`Decoder.__call__`.
      model: a :class:`Decoder`.
      static_context_length: the context length if it is a Python integer, which is compiled into the program.
    """

    params: Any
    context_length: jax.Array | None
    model: Decoder = dataclasses.field(metadata=dict(static=True))
    static_context_length: int | None = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(
        cls, model: Decoder, params, context_length: int | jax.Array | None = None, argument: str = "params"
    ) -> "ForwardPass":
        """Makes an integer context length static, and keeps an array as an argument of the program.

        Raises:
          ValueError: if params, named ``argument``, are not the model's variables, or an array is of other axes.
          TypeError: if the context length is not an integer.
        """
        if not isinstance(params, Mapping) or "params" not in params:
            kind = "their inside" if isinstance(params, Mapping) else shown(params)
            raise ValueError(f"{argument} must be the variables of model.init, {{'params': ...}}, got {kind}")
        if isinstance(context_length, int | np.integer) and not isinstance(context_length, bool):
            return cls(params, None, model, int(context_length))
        if context_length is not None:
            context_length = device_array("context_length", context_length)
            check_dtype("context_length", context_length, jnp.integer, "integer")
            check_axes("context_length", context_length, "B" if context_length.ndim else "")
        return cls(params, context_length, model, None)

    def prefill(
        self,
        prompt,
        mask,
        cache: KVCache | None,
        *,
        num_new_tokens: int,
        dtype=None,
        positions=None,
        prefix_length=None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs the model over whole prompts ``[B, T]``, after the tokens of a cache if given.

        Args:
          prompt: integers ``[B, T]``.
          mask: bool ``[B, T]``, True at real tokens, or None.
          cache: of B rows, or of a single row that all prompts share.
          num_new_tokens: free slots of the returned cache after the prompts. A cache that evicts keeps its size.
          dtype: of the new cache, if none is given.
          positions: of the prompt; None counts its real tokens, after those of the cache.
          prefix_length: integers, ``[]`` or ``[B]``; see :meth:`Decoder.__call__`.

        Returns:
          Logits float32 ``[B, V]`` after the last real token of each row, and the cache.
        """
        batch, width = prompt.shape
        if cache is None:
            cache = self.model.init_cache(batch=batch, capacity=width + num_new_tokens, dtype=dtype)
        else:
            if cache.num_tokens.shape[-1] != batch:
                cache = cache.select_rows(jnp.zeros((batch,), jnp.int32))
            if cache.eviction is None:
                cache = cache.grow(cache.capacity + width + num_new_tokens)
        hidden, cache = self._hidden(prompt, cache, mask, positions, prefix_length)
        last = jnp.full((batch,), width - 1, jnp.int32)
        if mask is not None:
            last -= jnp.argmax(mask[:, ::-1], axis=1).astype(last.dtype)
        return self._unembed(hidden[jnp.arange(batch), last]), cache

    def step(self, tokens, cache: KVCache, mask=None, positions=None) -> tuple[jax.Array, KVCache]:
        """Logits float32 ``[B, T, V]`` after each of the next tokens ``[B, T]``, and the updated cache."""
        hidden, cache = self._hidden(tokens, cache, mask, positions)
        return self._unembed(hidden), cache

    def _hidden(self, tokens, cache, mask=None, positions=None, prefix_length=None):
        context_length = self.context_length if self.static_context_length is None else self.static_context_length
        options = dict(mask=mask, prefix_length=prefix_length, cache=cache, context_length=context_length)
        return self.model.apply(self.params, tokens, positions, **options, method="hidden")

    def _unembed(self, hidden):
        return self.model.apply(self.params, hidden, method="unembed")
