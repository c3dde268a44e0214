"""A small Llama-shaped model: what do experiments, notebooks and real checkpoints share?"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax._angles import Rotation
from rope_jax._attention import Initializer, RotaryAttention
from rope_jax._cache import KVCache, init_cache
from rope_jax._checks import check_axes, check_dtype, device_array
from rope_jax._norm import RMSNorm
from rope_jax._rope import Rope


class Decoder(nn.Module, kw_only=True):
    """Tokens in, logits out: pre-norm blocks of :class:`RotaryAttention` and SwiGLU (Touvron et al. 2023).

    ``x = embed(tokens)``; each layer ``x += attention(norm(x))``, ``x += down(silu(gate(n)) * up(n))`` with
    ``n = norm(x)``; logits ``unembed(norm(x))``. Layers are scanned: parameters and caches carry a leading
    axis ``layers``, one layer is compiled, and cos and sin are evaluated once for all of them.

    Logical axis names beside those of :class:`RotaryAttention`: ``vocab``, ``mlp``, ``layers``.

    Attributes:
      vocab_size: V.
      num_layers: how many blocks.
      width: D.
      num_heads: N.
      head_dim: H.
      hidden_dim: features inside the SwiGLU.
      rope: the recipe of every layer, or None for no position encoding.
      num_kv_heads: K, a divisor of N; N where it is None.
      tie_embeddings: whether the unembedding is the embedding transposed.
      qk_norm: see :class:`RotaryAttention`.
      window: see :class:`RotaryAttention`.
      norm_epsilon: added to the mean square in every RMSNorm.
      remat: recompute each block in the backward pass instead of storing what is inside it.
      dtype: of the computation; logits are summed in float32 and stay so.
      param_dtype: of the parameters.
      kernel_init: of the kernels.
      embedding_init: of the embedding.
      implementation: of :func:`jax.nn.dot_product_attention`.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> model = rope_jax.Decoder(
      ...     vocab_size=256, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=64,
      ...     rope=rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard()),
      ... )
      >>> tokens = jnp.zeros((1, 6), int)
      >>> params = model.init(jax.random.key(0), tokens)
      >>> model.apply(params, tokens).shape
      (1, 6, 256)
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    rope: Rope | None
    num_kv_heads: int | None = None
    tie_embeddings: bool = True
    qk_norm: bool = False
    window: int | None = None
    norm_epsilon: float = 1e-6
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    embedding_init: Initializer = nn.initializers.normal(0.02)
    implementation: Any = None

    def setup(self):
        self.embed = nn.Embed(
            self.vocab_size,
            self.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.with_logical_partitioning(self.embedding_init, ("vocab", "embed")),
        )
        norm = functools.partial(RMSNorm, axis="embed", epsilon=self.norm_epsilon, param_dtype=self.param_dtype)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        attention = functools.partial(
            RotaryAttention,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rope=self.rope,
            window=self.window,
            qk_norm=self.qk_norm,
            qk_norm_epsilon=self.norm_epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            implementation=self.implementation,
        )
        block = nn.remat(_Block, prevent_cse=False) if self.remat else _Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.layers = stack(attention, norm, dense, self.hidden_dim, self.kernel_init)
        self.final_norm = norm()
        if not self.tie_embeddings:
            init = nn.with_logical_partitioning(self.kernel_init, ("embed", "vocab"))
            dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
            self.unembed_kernel = dense(self.vocab_size, kernel_init=init, dot_general=dot)

    def __call__(
        self, tokens, positions=None, *, mask=None, segment_ids=None, cache: KVCache | None = None, length=None
    ):
        """Logits of the next token after each one.

        Args:
          tokens: integers ``[B, T]`` in ``[0, V)``; one outside makes its row NaN.
          positions: see :class:`RotaryAttention`.
          mask: nonzero at real tokens ``[B, T]``; see :class:`RotaryAttention`.
          segment_ids: of packed sequences ``[B, T]``; see :class:`RotaryAttention`.
          cache: of :meth:`init_cache`, with the tokens before these.
          length: for schedules that depend on it; see :meth:`Rope.rotation`.

        Returns:
          float32 ``[B, T, V]``, or ``(logits, cache)`` if a cache was given.
        """
        hidden = self.hidden(tokens, positions, mask=mask, segment_ids=segment_ids, cache=cache, length=length)
        if cache is None:
            return self.unembed(hidden)
        hidden, cache = hidden
        return self.unembed(hidden), cache

    def hidden(
        self, tokens, positions=None, *, mask=None, segment_ids=None, cache: KVCache | None = None, length=None
    ):
        """As the call, but ``[B, T, D]`` before the unembedding: for those who need the logits of few tokens."""
        tokens = device_array("tokens", tokens)
        check_axes("tokens", tokens, "B T")
        check_dtype("tokens", tokens, jnp.integer, "integer")
        tokens = tokens.astype(jnp.int32)
        if cache is not None and cache.key.ndim != 5:
            raise ValueError(
                "cache must be one of all layers, from model.init_cache: key [layers, B, S, K, H], "
                f"got {cache.key.shape}"
            )
        rotation = None
        if self.rope is not None:
            if positions is None:
                seen = None if cache is None else cache.length[0]
                positions = self.rope.next_positions(tokens.shape, mask, segment_ids, seen)
            rotation = self.rope.rotation(positions, length=length)
        known = (tokens >= 0) & (tokens < self.vocab_size)  # an embedding would read a negative one from the end
        x = jnp.where(known[..., None], self.embed(tokens), jnp.asarray(jnp.nan, self.dtype))
        x, cache = self.layers(x, rotation, mask, segment_ids, cache)
        x = self.final_norm(x)
        return x if cache is None else (x, cache)

    def unembed(self, hidden) -> jax.Array:
        """``[..., D] -> float32 [..., V]``."""
        if not self.tie_embeddings:
            return self.unembed_kernel(hidden)
        table = self.embed.embedding.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def init_cache(self, *, batch: int, capacity: int, dtype=None) -> KVCache:
        """An empty cache for all layers: every leaf has a leading axis of ``num_layers``."""
        one = init_cache(
            batch=batch,
            capacity=capacity,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            dtype=dtype or self.dtype,
        )
        return jax.tree.map(lambda leaf: jnp.zeros((self.num_layers, *leaf.shape), leaf.dtype), one)


class _Block(nn.Module):
    """One layer: attention and SwiGLU, each behind a norm and beside a residual."""

    attention: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    hidden_dim: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x, rotation: Rotation | None, mask, segment_ids, cache: KVCache | None):
        def dense(name, features, *axes):
            init = nn.with_logical_partitioning(self.kernel_init, axes)
            return self.dense(features, kernel_init=init, name=name)

        y = self.attention(name="self_attention")(
            self.norm(name="attention_norm")(x),
            rotation=rotation,
            mask=mask,
            segment_ids=segment_ids,
            cache=cache,
        )
        if cache is not None:
            y, cache = y
        x += y
        n = self.norm(name="mlp_norm")(x)
        inside = nn.silu(dense("gate", self.hidden_dim, "embed", "mlp")(n))
        inside *= dense("up", self.hidden_dim, "embed", "mlp")(n)
        return x + dense("down", x.shape[-1], "mlp", "embed")(inside), cache
