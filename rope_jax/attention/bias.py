"""Position biases: what T5 and ALiBi add to the attention scores, by the distance from key to query."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_axes, check_dtype, check_integer, device_array
from rope_jax.attention.mask import distances


class PositionBias(Protocol):
    """What is added to the scores ``[B, N, T, S]`` of a query ``distance [B, T, S]`` tokens after a key.

    The distance is that of the tokens' places in line, padding left out, whatever positions they are given. A
    negative one is that of a key after the query, which is read only without causality.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> def near(distance, num_heads, causal):
      ...     return jnp.where(abs(distance) < 8, 0.0, -1.0)[:, None]
      >>> attention = rope_jax.RotaryAttention(num_heads=2, head_dim=8, rope=None, position_bias=near)
    """

    def __call__(self, distance, num_heads: int, causal: bool, /) -> jax.Array: ...


def bias_of_order(position_bias: PositionBias, query_order, key_order, num_heads: int, causal: bool) -> jax.Array:
    """The bias of queries and keys by their order in the row: floating ``[B or 1, N or 1, T, S]``."""
    distance = distances(query_order, key_order)
    bias = position_bias(distance, num_heads, causal)
    if not isinstance(bias, jax.Array):
        raise TypeError(f"position_bias must return an array, got {type(bias).__name__}")
    batch, queries, keys = distance.shape
    check_axes("position_bias(distance)", bias, "B N T S", B={1, batch}, N={1, num_heads}, T={1, queries}, S=keys)
    check_dtype("position_bias(distance)", bias, jnp.floating, "floating")
    return bias


def relative_buckets(distance, *, causal: bool, num_buckets: int = 32, max_distance: int = 128) -> jax.Array:
    """Which of T5's buckets a distance belongs to (Raffel et al. 2020, section 2.1).

    Of n buckets, the first ``e = floor(n/2)`` hold one distance each; bucket ``e + j`` starts at ``e (max_distance
    / e)^(j / (n - e))`` tokens, rounded up, and the last holds all that follow. Without causality one half of the
    buckets is for keys before the query, the other for keys after it. The bounds are integers, found exactly:
    no logarithm is taken on the device, where each chip would round it in its own way.

    Args:
      distance: integers ``[...]``, tokens from the key to the query: ``m - n``. Negative ones are keys after
        the query, and count as 0 with ``causal``.
      causal: whether there are no keys after the query.
      num_buckets: how many, both directions together.
      max_distance: tokens, from where on all distances share a bucket at the latest; below 2^63.

    Returns:
      int32 ``[...]`` in ``[0, num_buckets)``.

    Raises:
      TypeError: if distances or the numbers are not integers, or causal is not a bool.
      ValueError: if there are too few buckets (2, or 4 and an even number without causality), or max_distance
        is not over half of those for one direction, or too large.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> rope_jax.attention.relative_buckets(jnp.array([0, 1, 15, 16, 18, 19, 127, 5000]), causal=True).tolist()
      [0, 1, 15, 16, 16, 17, 31, 31]
    """
    distance = device_array("distance", distance)
    check_dtype("distance", distance, jnp.integer, "integer")
    if not isinstance(causal, bool | np.bool):
        raise TypeError(f"causal must be a bool, got {causal!r}")
    num_buckets = check_integer("num_buckets", num_buckets)
    max_distance = check_integer("max_distance", max_distance)
    if num_buckets < (2 if causal else 4) or num_buckets % (1 if causal else 2):
        least = "at least 2" if causal else "even and at least 4 without causality"
        raise ValueError(f"num_buckets must be {least}, got {num_buckets}")
    count = num_buckets if causal else num_buckets // 2
    if max_distance <= count // 2:
        raise ValueError(
            f"max_distance must be over {count // 2}, where {num_buckets} buckets begin to be shared, "
            f"got {max_distance}"
        )
    if max_distance >= 2**63:
        raise ValueError(f"max_distance must be below 2^63, got {max_distance}")
    if jnp.iinfo(distance.dtype).bits < 8:  # jnp.abs has no four bits
        distance = distance.astype(jnp.int32)
    # A bound that the dtype cannot hold is one that no distance reaches; nor can it hold |d| of its least integer.
    low, high = int(jnp.iinfo(distance.dtype).min), int(jnp.iinfo(distance.dtype).max)
    starts = jnp.array([d for d in _bucket_starts(count, max_distance) if d <= high], distance.dtype)
    behind = jnp.maximum(distance, 0) if causal else jnp.abs(jnp.maximum(distance, max(low, -high)))
    bucket = jnp.searchsorted(starts, behind, side="right", method="compare_all").astype(jnp.int32) - 1
    if causal:
        return bucket
    return bucket + jnp.where(distance < 0, jnp.int32(count), jnp.int32(0))


def _bucket_starts(count: int, max_distance: int) -> list[int]:
    """The least distance of each of ``count`` buckets of one direction, by integer arithmetic."""
    exact = count // 2
    shared = count - exact
    starts = list(range(exact))
    for j in range(shared):
        # The least d with d / exact >= (max_distance / exact)^(j / shared), both sides to the power of `shared`.
        bound = max_distance**j * exact ** (shared - j)
        d = int(exact * (max_distance / exact) ** (j / shared))  # float64: close by, on either side
        while d > exact and (d - 1) ** shared >= bound:
            d -= 1
        while d**shared < bound:
            d += 1
        starts.append(d)
    return starts


class T5Bias(nn.Module, kw_only=True):
    """A learned scalar for each head and bucket of distances (Raffel et al. 2020, section 2.1).

    ``bias[n, t, s] = table[bucket(t - s), n]``, see :func:`relative_buckets`. One table serves all layers of a
    :class:`Decoder`, as in T5. T5 does not scale its scores; ``logit_scale=1.0`` does as it does.

    Attributes:
      num_buckets: how many, both directions together.
      max_distance: tokens, from where on all distances share a bucket.
      param_dtype: of the table.
      embedding_init: of the table ``[num_buckets, N]``, whose axes are named ``relative_buckets`` and ``heads``.

    Raises:
      ValueError: as :func:`relative_buckets`.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> distance = jnp.arange(5)[None, :, None] - jnp.arange(5)[None, None, :]
      >>> bias = rope_jax.attention.T5Bias()
      >>> params = bias.init(jax.random.key(0), distance, 2, True)
      >>> bias.apply(params, distance, 2, True).shape
      (1, 2, 5, 5)
    """

    num_buckets: int = 32
    max_distance: int = 128
    param_dtype: Any = jnp.float32
    embedding_init: Callable[..., Any] = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, distance, num_heads: int, causal: bool) -> jax.Array:
        """float32 ``[B, N, T, S]`` for integer distances ``[B, T, S]``."""
        num_heads = check_integer("num_heads", num_heads, 1)
        distance = device_array("distance", distance)
        check_axes("distance", distance, "B T S")
        bucket = relative_buckets(
            distance, causal=causal, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        init = nn.with_logical_partitioning(self.embedding_init, ("relative_buckets", "heads"))
        table: Any = self.param("table", init, (self.num_buckets, num_heads), self.param_dtype)
        return jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 1)


@dataclasses.dataclass(frozen=True)
class ALiBi:
    """A penalty that grows with the distance, at a slope of its own for each head (Press et al. 2022, section 3).

    ``bias[n, t, s] = -slope_n |t - s|``, with the slopes ``2^(-8 (n + 1) / N)``. Where N is no power of two,
    the first heads have the slopes of the power of two P below it, and the rest every other one of those of 2 P,
    as in the authors' code.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> rope_jax.attention.ALiBi()(jnp.array([[[1, 2]]]), 2, True)[0, :, 0].tolist()
      [[-0.0625, -0.125], [-0.00390625, -0.0078125]]
    """

    @staticmethod
    def slopes(num_heads: int) -> np.ndarray:
        """float64 ``[N]``, in scores per token.

        Example:
          >>> import rope_jax
          >>> rope_jax.attention.ALiBi.slopes(3).tolist()
          [0.0625, 0.00390625, 0.25]
        """
        num_heads = check_integer("num_heads", num_heads, 1)
        power = 2 ** (num_heads.bit_length() - 1)
        first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
        between = 2.0 ** (-8 * np.arange(1, 2 * power, 2) / (2 * power))
        return np.concatenate([first, between])[:num_heads]

    def __call__(self, distance, num_heads: int, causal: bool) -> jax.Array:
        """float32 ``[B, N, T, S]`` for integer distances ``[B, T, S]``; without causality both sides alike."""
        distance = device_array("distance", distance)
        check_axes("distance", distance, "B T S")
        check_dtype("distance", distance, jnp.integer, "integer")
        slopes = jnp.asarray(self.slopes(num_heads), jnp.float32)[:, None, None]
        return slopes * -jnp.abs(distance.astype(jnp.float32))[:, None]
