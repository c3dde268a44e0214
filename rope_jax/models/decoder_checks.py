"""Checks of a :class:`Decoder`: its fields, and the arguments of a call."""

import jax
import jax.numpy as jnp

from rope_jax._checks import (
    as_int32,
    check_axes,
    check_callable,
    check_dtype,
    check_kinds,
    check_real,
    device_array,
)
from rope_jax.attention.cache import check_cache
from rope_jax.attention.mask import window_size
from rope_jax.attention.rotations import check_ropes, first_rope

_SIZES = "vocab_size", "num_layers", "width", "num_heads", "head_dim", "mlp_dim", "num_kv_heads"
_FLAGS = (
    *("learn_frequencies", "mlp_bias", "norm_unit_offset", "out_bias", "post_norms", "qk_norm", "qkv_bias"),
    *("remat", "tie_embeddings"),
)
_POSITIVE = "norm_epsilon", "output_cap"


def check_fields(model) -> None:
    optional = "num_kv_heads", "output_cap"
    kinds = dict(sizes=_SIZES, flags=_FLAGS, positive=_POSITIVE, dtypes=("dtype", "param_dtype"))
    functions = "kernel_init", "embedding_init", "activation"
    check_kinds(model, **kinds, functions=functions, optional=optional)
    windows = model.windows
    for window in windows if isinstance(windows, tuple) else (windows,):
        window_size(window)
    check_ropes(model.ropes)
    first = first_rope(model.ropes)
    if model.learn_frequencies and (first is None or isinstance(model.ropes, tuple)):
        raise ValueError(f"rope must be one rope for all layers with learn_frequencies, got {model.rope}")
    check_callable("position_embedding", model.position_embedding, "positions", "width")
    if model.position_embedding is not None and first is not None and first.num_axes > 1:
        raise ValueError(
            f"position_embedding must be left out with a rope of {first.num_axes} axes: it reads one position"
        )
    if model.embedding_scale is not None:
        check_real("embedding_scale", model.embedding_scale)


def checked_tokens(tokens) -> jax.Array:
    """Tokens, as int32 ``[B, T]``."""
    tokens = device_array("tokens", tokens)
    check_axes("tokens", tokens, "B T")
    check_dtype("tokens", tokens, jnp.integer, "integer")
    return as_int32(tokens)


def check_stack_cache(model, cache, batch: int) -> None:
    """Raises unless the cache is one of all layers of this model."""
    check_cache(cache)
    if cache.key.ndim != 5:
        raise ValueError(
            "cache must be one of all layers, from model.init_cache: key [layers, B, K, S, H], "
            f"got {cache.key.shape}"
        )
    heads = dict(K=model.num_kv_heads or model.num_heads, H=model.head_dim)
    check_axes("cache.key", cache.key, "layers B K S H", layers=model.num_layers, B=batch, **heads)


def check_positions(model, positions, length, mask, segment_ids) -> None:
    """Raises if nothing would read the positions, or the position embedding has too few."""
    if positions is not None and first_rope(model.ropes) is None and model.position_embedding is None:
        raise ValueError("positions must be left out without rope and position_embedding: nothing reads them")
    longest = getattr(model.position_embedding, "num_positions", None)
    counted = positions is None and mask is None and segment_ids is None and isinstance(length, int)
    if counted and longest is not None and length > longest:
        raise ValueError(
            f"tokens must be at most T={longest}, the positions of position_embedding, got T={length}: "
            "raise num_positions"
        )
