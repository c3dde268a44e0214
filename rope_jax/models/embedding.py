"""Position embeddings, sinusoidal or learned: added to the token embeddings."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rope_jax._checks import (
    as_float_dtype,
    check_axes,
    check_callable,
    check_dtype,
    check_integer,
    check_positive,
    device_array,
    is_concrete,
)
from rope_jax.core.angles import rotation
from rope_jax.core.explicit import beside, by_xla, explicit_mesh, spec_of
from rope_jax.core.frequencies import Frequencies
from rope_jax.core.named import named
from rope_jax.core.nan_rows import nan_where
from rope_jax.core.schedules import geometric


class PositionEmbedding(Protocol):
    """A callable that returns the embeddings of ``positions [..., T]``: ``[..., T, D]`` for a width D.

    An attribute ``num_positions`` limits the positions: a sequence that is known to be longer raises an error.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> def ramp(positions, width):
      ...     return jnp.broadcast_to(positions[..., None] / 1000, (*positions.shape, width))
      >>> sizes = dict(vocab_size=11, num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=32)
      >>> model = rope_jax.Decoder(**sizes, rope=None, position_embedding=ramp)
    """

    def __call__(self, positions, width: int, /) -> jax.Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoidal:
    """Sines and cosines of the position (Vaswani et al. 2017, section 3.5).

    ``PE[m, 2i] = sin(m * theta_i)``, ``PE[m, 2i + 1] = cos(m * theta_i)`` with ``theta_i = base^(-2i/D)``. Exact at
    every int32 position, see :func:`rotation`. The paper multiplies the token embeddings by ``sqrt(D)``: set
    ``Decoder(embedding_scale=...)``.

    Attributes:
      base: b, the ratio of the slowest wavelength to the fastest as D grows.

    Raises:
      TypeError: if the base is no real number.
      ValueError: if the base is not above 1 and finite, or D is not even.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> rope_jax.models.Sinusoidal()(jnp.arange(3), 4)[0].tolist()  # position 0
      [0.0, 1.0, 0.0, 1.0]
    """

    base: float = 10_000.0

    def __post_init__(self):
        check_positive("base", self.base, concrete=True)
        object.__setattr__(self, "base", float(self.base))
        if not self.base > 1:
            raise ValueError(f"base must be above 1, got {self.base}")

    def __call__(self, positions, width: int) -> jax.Array:
        """float32 ``[..., T, D]``."""
        width = check_integer("width", width)
        if width < 2 or width % 2:
            raise ValueError(f"width must be even and at least 2, got {width}")
        cos, sin = rotation(positions, Frequencies(geometric(width, self.base)))
        return jnp.stack([sin, cos], axis=-1).reshape(*sin.shape[:-1], width)


class LearnedPositions(nn.Module, kw_only=True):
    """A learned vector for each position (Gehring et al. 2017, section 3.1; GPT-2, BERT).

    ``PE[m] = table[m]``. The axes of the table are named ``positions`` and ``embed``.

    Attributes:
      num_positions: rows of the table. A position outside ``[0, num_positions)`` raises an error if it is concrete
        (:class:`Decoder` and :func:`generate` check the lengths of their sequences), and gives NaN if it is traced.
      param_dtype: dtype of the table.
      embedding_init: initializer of the table ``[num_positions, D]``.

    Raises:
      TypeError: if positions are not integers.
      ValueError: if num_positions is below 1, or a concrete position is outside the table.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> positions = rope_jax.models.LearnedPositions(num_positions=16)
      >>> params = positions.init(jax.random.key(0), jnp.arange(5), 8)
      >>> positions.apply(params, jnp.arange(5), 8).shape
      (5, 8)
    """

    num_positions: int
    param_dtype: Any = jnp.float32
    embedding_init: Callable[..., Any] = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, positions, width: int) -> jax.Array:
        """``[..., T, D]`` in the table's dtype."""
        num_positions = check_integer("num_positions", self.num_positions, 1)
        width = check_integer("width", width, 1)
        given, positions = positions, device_array("positions", positions)
        check_dtype("positions", positions, jnp.integer, "integer")
        if is_concrete(given) and positions.size:
            known = np.asarray(given)  # operations of jax would be traced inside jit
            low, high = known.min(), known.max()
            if low < 0 or high >= num_positions:
                raise ValueError(f"positions must be in [0, num_positions={num_positions}), got {low} to {high}")
        check_callable("embedding_init", self.embedding_init, "key", "shape", "dtype", optional=False)
        init, dtype = (
            named(self.embedding_init, ("positions", "embed")),
            as_float_dtype("param_dtype", self.param_dtype),
        )
        table: Any = self.param("table", init, (num_positions, width), dtype)
        # Compared in the dtype of the positions, since the cast to int32 may wrap around.
        inside = (positions >= 0) & (positions < num_positions)
        index = jnp.where(inside, positions, jnp.zeros_like(positions)).astype(jnp.int32)
        take = by_xla(lambda table, index: table[index], PartitionSpec(*spec_of(index), None))
        return nan_where(~inside[..., None], take(beside(index, table), index))


def _take(embed: nn.Embed, tokens) -> jax.Array:
    """``embed(tokens)``, divided as the tokens; features are whole."""
    if not explicit_mesh(tokens, embed.embedding):
        return embed(tokens)
    take = by_xla(embed.clone(parent=None).apply, PartitionSpec(*spec_of(tokens), None))
    return take({"params": {"embedding": beside(tokens, embed.embedding)}}, tokens)


def embed_tokens(embed: nn.Embed, tokens, positions, mask, *, scale, position_embedding) -> jax.Array:
    """Token embeddings times ``scale``, plus the position embedding: ``[B, T, D]``.

    A token outside ``[0, V)`` gives NaN. At padding any number may stand.

    Args:
      embed: the table of V embeddings.
      tokens: int32 ``[B, T]``.
      positions: integers ``[B or 1, T]``.
      mask: bool ``[B, T]``, True at real tokens, or None.
      scale: multiplies the token embeddings, in their dtype; None is 1.
      position_embedding: see :class:`PositionEmbedding`; None for no position embedding.
    """
    # nn.Embed would read a negative token from the end.
    known = (tokens >= 0) & (tokens < int(embed.num_embeddings))
    x = _take(embed, jnp.where(known, tokens, jnp.zeros_like(tokens)))
    if scale is not None:
        x *= jnp.asarray(scale, x.dtype)
    if position_embedding is not None:
        positions = positions if mask is None else jnp.where(mask, positions, jnp.zeros_like(positions))
        added = position_embedding(positions, x.shape[-1])
        if not isinstance(added, jax.Array):
            raise TypeError(f"position_embedding must return an array, got {type(added).__name__}")
        check_dtype("position_embedding(positions)", added, jnp.floating, "floating")
        added = added[None] if added.ndim == 2 else added
        sizes = dict(B={1, x.shape[0]}, T=x.shape[1], D=x.shape[2])
        check_axes("position_embedding(positions)", added, "B T D", **sizes)
        if mesh := explicit_mesh(x, added):
            spec = (axis if size > 1 else None for axis, size in zip(spec_of(x), added.shape, strict=True))
            added = jax.sharding.reshard(added, NamedSharding(mesh, PartitionSpec(*spec)))
        x += added.astype(x.dtype)
    return nan_where(~(known if mask is None else known | ~mask)[..., None], x)
