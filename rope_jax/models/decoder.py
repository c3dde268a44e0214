"""A Llama-shaped decoder: embed, scanned blocks, unembed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rope_jax._checks import check_integer
from rope_jax.attention.bias import PositionBias
from rope_jax.attention.cache import KVCache
from rope_jax.attention.empty_cache import init_cache
from rope_jax.attention.layer import Initializer
from rope_jax.attention.norm import RMSNorm
from rope_jax.attention.paths import AttentionBackend
from rope_jax.attention.plan import make_plan
from rope_jax.attention.rotations import Ropes, check_ropes, distinct_ropes
from rope_jax.attention.slots import Eviction
from rope_jax.core.explicit import placed_product
from rope_jax.core.named import named
from rope_jax.core.primitive import unify_varying
from rope_jax.core.projection import dot_general
from rope_jax.core.rope import Rope
from rope_jax.models.block import place, run_layers, stack
from rope_jax.models.decoder_checks import check_fields, check_positions, check_stack_cache, checked_tokens
from rope_jax.models.embedding import PositionEmbedding, embed_tokens


class Decoder(nn.Module, kw_only=True):
    """Tokens in, logits out: pre-norm blocks of :class:`RotaryAttention` and SwiGLU (Touvron et al. 2023).

    ``x = embed(tokens)``; each layer ``x += attention(norm(x))``, ``x += down(silu(gate(n)) * up(n))`` with
    ``n = norm(x)``; logits ``unembed(norm(x))``.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> model = rope_jax.Decoder(
      ...     vocab_size=256, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
      ...     rope=rope_jax.Rope(head_dim=8, schedule=rope_jax.Standard()),
      ... )
      >>> tokens = jnp.zeros((1, 6), int)
      >>> params = model.init(jax.random.key(0), tokens)
      >>> model.apply(params, tokens).shape
      (1, 6, 256)
      >>> logits, cache = model.apply(params, tokens, cache=model.init_cache(batch=1, capacity=16))
      >>> _, state = model.apply(params, tokens, mutable="intermediates")  # the attention weights of every layer
      >>> state["intermediates"]["layers"]["self_attention"]["weights"][0].shape  # [layers, B, N, T, S]
      (2, 1, 4, 6, 6)

    Layers are scanned: parameters and caches carry a leading axis ``layers``, one layer is compiled, and each
    distinct rotation is evaluated once for all layers. Layers may differ in rope and window. Logical axis names
    beside those of :class:`RotaryAttention`: ``vocab``, ``mlp``, ``layers``.

    Attributes, shape:
      vocab_size: V.
      num_layers: how many blocks.
      width: D.
      num_heads: N.
      num_kv_heads: K, a divisor of N; None is N.
      head_dim: H.
      mlp_dim: features inside the SwiGLU.

    Attributes, rotation and position:
      rope: the rope of every layer, or None for no rotation; or a tuple with the rope of each layer, which differ
        by their schedule alone (Gemma 3, section 2: two bases; Yang et al. 2025, "Rope to NoPE and back again":
        None).
      learn_frequencies: gives each layer a parameter ``inv_freq``, initialised by the rope; see
        :class:`RotaryAttention`. All layers must have the same rope.
      position_embedding: added to the token embeddings: :class:`Sinusoidal`, :class:`LearnedPositions`, or a
        callable of the same form; beside a rope or without.
      position_bias: added to all scores: :class:`T5Bias`, :class:`ALiBi`; see :class:`RotaryAttention`.

    Attributes, masking:
      window: see :class:`RotaryAttention`; or a tuple with the window of each layer.

    Attributes, architecture (Qwen, Phi-3, SmolLM3, Gemma: see :func:`load_hf`):
      tie_embeddings: whether the unembedding is the embedding transposed.
      activation: of the gate (Shazeer 2020, section 2).
      qk_norm: see :class:`RotaryAttention`.
      qkv_bias: whether queries, keys and values have biases (Qwen 2, section 2.2).
      out_bias: whether attention's output projection has a bias.
      mlp_bias: whether gate, up and down have biases.
      post_norms: whether the outputs of attention and MLP are normalised too: ``x += norm(attention(norm(x)))``
        (Gemma 2, section 2).
      norm_epsilon: added to the mean square in every RMSNorm.
      norm_unit_offset: whether every norm multiplies by 1 + scale; see :class:`rope_jax.attention.RMSNorm`.
      embedding_scale: multiplies the token embeddings, both in the computation's dtype (Gemma: ``sqrt(D)``).

    Attributes, numerics:
      logit_scale: of attention; see :class:`RotaryAttention`.
      logit_cap: of attention; see :class:`RotaryAttention`.
      output_cap: soft bound of the logits of the next token: ``c tanh(logits / c)`` (Gemma 2, section 2).
      remat: whether to recompute each block in the backward pass instead of keeping its intermediates.
      dtype: of the computation; logits are summed in float32 and stay float32.
      param_dtype: of the parameters.
      kernel_init: of the kernels.
      embedding_init: of the embedding.
      implementation: see :class:`RotaryAttention`.
      attention_fn: see :class:`RotaryAttention`.

    Attributes, sharding:
      ring_axis: see :class:`RotaryAttention`.
      activation_sharding: where the residual stream ``[B, T, D]`` lies on a mesh: batch and tokens divided,
        features whole. Needed if parameters are divided along ``embed`` (fully sharded): XLA would divide the
        stream likewise, and every device would compute a part of every row.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    rope: Rope | tuple[Rope | None, ...] | None
    num_kv_heads: int | None = None
    learn_frequencies: bool = False
    position_embedding: PositionEmbedding | None = None
    position_bias: PositionBias | None = None
    tie_embeddings: bool = True
    qk_norm: bool = False
    window: int | tuple[int | None, ...] | None = None
    norm_epsilon: float = 1e-6
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    logit_scale: float | None = None
    logit_cap: float | None = None
    output_cap: float | None = None
    post_norms: bool = False
    norm_unit_offset: bool = False
    embedding_scale: float | None = None
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    embedding_init: Initializer = nn.initializers.normal(0.02)
    implementation: AttentionBackend | None = None
    attention_fn: Callable[..., jax.Array] | None = None
    ring_axis: str | None = None
    activation_sharding: jax.sharding.Sharding | None = None

    def setup(self):
        check_fields(self)
        self.embed = nn.Embed(
            self.vocab_size,
            self.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=named(self.embedding_init, ("vocab", "embed")),
        )
        self.layers = stack(self)
        self.final_norm = RMSNorm(
            axis="embed",
            epsilon=self.norm_epsilon,
            unit_offset=self.norm_unit_offset,
            param_dtype=self.param_dtype,
        )
        if not self.tie_embeddings:
            self.unembed_kernel = nn.Dense(
                self.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=named(self.kernel_init, ("embed", "vocab")),
                dot_general=placed_product(
                    functools.partial(_dot_general(self), preferred_element_type=jnp.float32)
                ),
            )

    def __call__(
        self,
        tokens,
        positions=None,
        *,
        sequence_index=None,
        mask=None,
        segment_ids=None,
        prefix_length=None,
        cache: KVCache | None = None,
        context_length=None,
    ):
        """Logits of the next token after each token.

        Args, tokens:
          tokens: integers ``[B, T]`` in ``[0, V)``. A token outside makes its row NaN (on a ring, its readers).
          positions: see :class:`RotaryAttention`; for rope and ``position_embedding`` alike. An error if the model
            has neither: a ``position_bias`` reads sequence indices.
          sequence_index: see :class:`RotaryAttention`.

        Args, masking:
          mask: nonzero at real tokens ``[B, T]``; see :class:`RotaryAttention`.
          segment_ids: of packed sequences ``[B, T]``; see :class:`RotaryAttention`.
          prefix_length: integers, ``[]`` or ``[B]``, the tokens that read in both directions; likewise.

        Args, cache:
          cache: of :meth:`init_cache`, with the tokens before these.
          context_length: for schedules that depend on it; see :meth:`Rope.rotation`. By default the tokens of each
            row so far, if there is a cache. Deeper layers keep what they computed of earlier tokens at their own
            context length, as in every decoder with a cache.

        Returns:
          float32 ``[B, T, V]``, or ``(logits, cache)`` if a cache was given.
        """
        step = dict(sequence_index=sequence_index, mask=mask, segment_ids=segment_ids, cache=cache)
        step |= dict(prefix_length=prefix_length, context_length=context_length)
        hidden = self.hidden(tokens, positions, **step)
        return self.unembed(hidden) if cache is None else (self.unembed(hidden[0]), hidden[1])

    def hidden(
        self,
        tokens,
        positions=None,
        *,
        sequence_index=None,
        mask=None,
        segment_ids=None,
        prefix_length=None,
        cache: KVCache | None = None,
        context_length=None,
    ):
        """As the call, but ``[B, T, D]`` before the unembedding: for callers that need the logits of few tokens."""
        tokens = checked_tokens(tokens)
        if cache is not None:
            check_stack_cache(self, cache, tokens.shape[0])
        check_positions(self, positions, tokens.shape[1], mask, segment_ids)
        plan = make_plan(
            self.ropes,
            tokens.shape,
            positions=positions,
            sequence_index=sequence_index,
            mask=mask,
            segment_ids=segment_ids,
            prefix_length=prefix_length,
            window=self.windows,
            position_bias=self.position_bias,
            num_heads=self.num_heads,
            cache=cache,
            context_length=context_length,
            learn_frequencies=self.learn_frequencies,
            argument="tokens",
        )
        plan = dataclasses.replace(plan, in_stack=True)
        options: dict = dict(scale=self.embedding_scale, position_embedding=self.position_embedding)
        x = place(embed_tokens(self.embed, tokens, plan.positions, plan.mask, **options), self.activation_sharding)
        x, cache = unify_varying((x, None if cache is None else plan.begin(cache)))
        x, cache = run_layers(self, (x, cache), plan)
        x = self.final_norm(x)
        return x if cache is None else (x, plan.end(cache))

    def unembed(self, hidden) -> jax.Array:
        """``[..., D] -> float32 [..., V]``."""
        if self.tie_embeddings:
            table = self.embed.embedding.astype(hidden.dtype)
            numbers = ((hidden.ndim - 1,), (1,)), ((), ())
            logits = placed_product(_dot_general(self))(hidden, table, numbers, preferred_element_type=jnp.float32)
        else:
            logits = self.unembed_kernel(hidden)
        return logits if self.output_cap is None else _soft_cap(logits, float(self.output_cap))

    def init_cache(
        self,
        *,
        batch: int,
        capacity: int,
        dtype=None,
        eviction: Eviction | None = None,
        num_sink_tokens: int = 0,
        rotated: bool | None = None,
    ) -> KVCache:
        """An empty cache for all layers; see :func:`init_cache`.

        ``rotated=None`` stores keys unrotated beside sink tokens, and if a rope's frequencies depend on the context
        length (:class:`DynamicNTK`, :class:`LongRope` without a fixed one): unrotated keys are right at every
        length and take no second rounding. Otherwise it stores keys rotated: each key is rotated once.
        """
        check_ropes(self.ropes)
        if rotated is None:
            rotated = not (check_integer("num_sink_tokens", num_sink_tokens, least=0) or self.needs_context_length)
        return init_cache(
            batch=batch,
            capacity=capacity,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            num_layers=self.num_layers,
            dtype=self.dtype if dtype is None else dtype,
            eviction=eviction,
            num_sink_tokens=num_sink_tokens,
            rotated=rotated,
            rope=self.ropes,
        )

    @property
    def needs_context_length(self) -> bool:
        """Whether the frequencies of some layer depend on a context length: :attr:`Rope.needs_context_length`."""
        return any(rope is not None and rope.needs_context_length for rope in distinct_ropes(self.ropes))

    @property
    def max_window(self) -> int | None:
        """The longest window of the layers; None if a layer has none."""
        windows = self.windows if isinstance(self.windows, tuple) else (self.windows,)
        known = [window for window in windows if window is not None]
        return max(known) if len(known) == len(windows) else None

    @property
    def ropes(self) -> Ropes:
        """The one rope of all layers, or a tuple of unlike ropes."""
        return _one_or_each("rope", self.rope, self.num_layers)

    @property
    def windows(self) -> int | tuple[int | None, ...] | None:
        """The one window of all layers, or a tuple of unlike windows."""
        return _one_or_each("window", self.window, self.num_layers)


def _dot_general(model: Decoder) -> Callable[..., jax.Array]:
    return jax.lax.dot_general if model.implementation == "plain" else dot_general


def _soft_cap(logits, cap: float) -> jax.Array:
    return cap * jnp.tanh(logits / cap)


def _one_or_each(field: str, value, num_layers: int):
    """One value if all layers have the same; else a tuple with the value of each layer."""
    if not isinstance(value, tuple):
        return value
    if len(value) != num_layers:
        raise ValueError(f"{field} must have an entry for each of num_layers={num_layers}, got {len(value)}")
    return value[0] if len(set(value)) == 1 else value
