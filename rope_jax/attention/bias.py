"""Position biases of T5 and ALiBi: added to the attention scores, by the distance from key to query."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import (
    as_float_dtype,
    check_axes,
    check_callable,
    check_dtype,
    check_flag,
    check_integer,
    device_array,
    is_concrete,
)
from rope_jax.core.named import named


class PositionBias(Protocol):
    """A callable that returns a bias for the scores ``[B, N, T, S]``, from ``distance [B, T, S]``.

    The distance is the query's sequence index minus the key's. It excludes padding, and ignores the positions of
    the call. A negative distance belongs to a key after the query, which matters only without causality. Attention
    calls the position bias for one block of queries and keys at a time, so that each entry may depend on its own
    distance alone.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> def near(distance, num_heads, causal):
      ...     return jnp.where(abs(distance) < 8, 0.0, -1.0)[:, None]
      >>> attention = rope_jax.RotaryAttention(num_heads=2, head_dim=8, rope=None, position_bias=near)
    """

    def __call__(self, distance, num_heads: int, causal: bool, /) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasFunction:
    """A position bias as a pure function of distances: attention calls it for one block of scores at a time.

    Attributes:
      params: floating arrays that the function is differentiated in, such as the table of :class:`T5Bias`.
      constants: its other arrays.
      function: ``function(params, constants, distance, num_heads, causal)``.
      num_heads: N.
      causal: whether queries read no later keys.
    """

    params: list[jax.Array]
    constants: list[jax.Array]
    function: Callable[..., jax.Array] = dataclasses.field(metadata=dict(static=True))
    num_heads: int = dataclasses.field(metadata=dict(static=True))
    causal: bool = dataclasses.field(metadata=dict(static=True))

    def __call__(self, distance) -> jax.Array:
        """floating ``[B or 1, N or 1, t or 1, s]``, for distances ``[B or 1, t, s]``."""
        return self.function(self.params, self.constants, distance, self.num_heads, self.causal)


def bias_function(position_bias: PositionBias, num_heads: int, causal: bool, shape) -> BiasFunction:
    """A position bias as a function of distances, with its parameters apart.

    Args:
      position_bias: of the layers.
      num_heads: N.
      causal: whether queries read no later keys.
      shape: ``(T, S)`` of all scores, for which the result is checked.

    Raises:
      TypeError: if the position bias returns no floating array, or closes over a traced value.
      ValueError: if the shape of its result is wrong.
    """
    state: Any = position_bias
    if isinstance(position_bias, nn.Module):
        position_bias(jnp.zeros((1, 1, 1), jnp.int32), num_heads, causal)  # creates parameters, when initialising
        module, state = position_bias.unbind()
        kind: _Kind = module, None
    elif not jax.tree_util.treedef_is_leaf(jax.tree.structure(position_bias)):  # as jax.tree_util.Partial
        kind = None, None
    else:
        state, kind = (), (None, position_bias)
    arrays, tree = jax.tree.flatten(state)
    arrays = [jnp.asarray(array) for array in arrays]
    differentiable = tuple(jnp.issubdtype(array.dtype, jnp.floating) for array in arrays)
    params, constants = (
        [array for array, flag in zip(arrays, differentiable, strict=True) if flag == floating]
        for floating in (True, False)
    )
    function = BiasFunction(params, constants, _Apply(tree, differentiable, *kind), num_heads, causal)

    def of_all(params, distance):
        return dataclasses.replace(function, params=params)(distance)

    queries, keys = shape
    distance = jax.ShapeDtypeStruct((1, queries, keys), jnp.int32)
    program, bias = jax.make_jaxpr(of_all, return_shape=True)(function.params, distance)
    if not isinstance(bias, jax.ShapeDtypeStruct):
        raise TypeError(f"position_bias must return an array, got {type(bias).__name__}")
    if not is_concrete(program.consts):
        raise TypeError(
            "position_bias must not close over traced values: make it a flax.linen.Module with parameters, or a "
            "jax.tree_util.Partial with traced arguments"
        )
    check_axes("position_bias(distance)", bias, "B N T S", B=1, N={1, num_heads}, T={1, queries}, S=keys)
    check_dtype("position_bias(distance)", bias, jnp.floating, "floating")
    return function


_Kind = tuple[nn.Module | None, Callable[..., jax.Array] | None]


@dataclasses.dataclass(frozen=True)
class _Apply:
    """A module, a callable pytree or a plain callable, as a function of its floating and of its other arrays."""

    tree: Any
    differentiable: tuple[bool, ...]  # of each array of the tree
    module: nn.Module | None
    plain: Callable[..., jax.Array] | None

    def __call__(self, params, constants, distance, num_heads: int, causal: bool) -> jax.Array:
        if self.plain is not None:
            return self.plain(distance, num_heads, causal)
        given = {True: iter(params), False: iter(constants)}
        state = self.tree.unflatten([next(given[flag]) for flag in self.differentiable])
        if self.module is None:
            return state(distance, num_heads, causal)
        bias: Any = self.module.apply(state, distance, num_heads, causal)
        return bias


def relative_buckets(distance, *, causal: bool, num_buckets: int = 32, max_distance: int = 128) -> jax.Array:
    """The T5 bucket of each distance (Raffel et al. 2020, section 2.1).

    Of n buckets, the first ``e = floor(n/2)`` hold a single distance each. Bucket ``e + j`` starts at
    ``e (max_distance / e)^(j / (n - e))`` tokens, rounded up, and the last bucket is unbounded. Without causality,
    half of the buckets serve keys before the query, and half keys after the query. The bounds are exact integers,
    computed on the host, since a logarithm on the device would be rounded differently by each chip.

    Args:
      distance: integers ``[...]``, tokens from the key to the query: ``m - n``. Keys after the query have a
        negative distance, which counts as 0 with ``causal``.
      causal: whether queries read no later keys.
      num_buckets: number of buckets, both directions together.
      max_distance: tokens; all distances from here on (or earlier) share the last bucket; below 2^63.

    Returns:
      int32 ``[...]`` in ``[0, num_buckets)``.

    Raises:
      TypeError: if ``distance``, ``num_buckets`` or ``max_distance`` is not integer, or ``causal`` is not a bool.
      ValueError: if ``num_buckets`` is below 2 (without causality: below 4, or odd), or ``max_distance`` is too
        large, or at most half the number of buckets of a direction.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> rope_jax.attention.relative_buckets(jnp.array([0, 1, 15, 16, 18, 19, 127, 5000]), causal=True).tolist()
      [0, 1, 15, 16, 16, 17, 31, 31]
    """
    distance = device_array("distance", distance)
    check_dtype("distance", distance, jnp.integer, "integer")
    causal = check_flag("causal", causal)
    num_buckets = check_integer("num_buckets", num_buckets)
    max_distance = check_integer("max_distance", max_distance)
    if num_buckets < (2 if causal else 4) or num_buckets % (1 if causal else 2):
        least = "at least 2" if causal else "even and at least 4 without causality"
        raise ValueError(f"num_buckets must be {least}, got {num_buckets}")
    count = num_buckets if causal else num_buckets // 2
    if max_distance <= count // 2:
        raise ValueError(
            f"max_distance must be over {count // 2} with num_buckets={num_buckets}, got {max_distance}"
        )
    if max_distance >= 2**63:
        raise ValueError(f"max_distance must be below 2^63, got {max_distance}")
    if jnp.iinfo(distance.dtype).bits < 8:  # jnp.abs does not support 4-bit integers
        distance = distance.astype(jnp.int32)
    # Bounds above the dtype's range are dropped, since no distance reaches them. The least integer of the dtype is
    # raised by 1, since its absolute value would overflow.
    low, high = int(jnp.iinfo(distance.dtype).min), int(jnp.iinfo(distance.dtype).max)
    starts = jnp.array([d for d in _bucket_starts(count, max_distance) if d <= high], distance.dtype)
    magnitude = jnp.maximum(distance, 0) if causal else jnp.abs(jnp.maximum(distance, max(low, -high)))
    bucket = jnp.searchsorted(starts, magnitude, side="right", method="compare_all").astype(jnp.int32) - 1
    if causal:
        return bucket
    return bucket + jnp.where(distance < 0, jnp.int32(count), jnp.int32(0))


def _bucket_starts(count: int, max_distance: int) -> list[int]:
    """The least distance of each of the ``count`` buckets of a direction, by integer arithmetic."""
    exact = count // 2
    shared = count - exact
    starts = list(range(exact))
    for j in range(shared):
        # The least d with d / exact >= (max_distance / exact)^(j / shared), both sides to the power of `shared`.
        bound = max_distance**j * exact ** (shared - j)
        d = int(exact * (max_distance / exact) ** (j / shared))  # float64 estimate, slightly too small or too large
        while d > exact and (d - 1) ** shared >= bound:
            d -= 1
        while d**shared < bound:
            d += 1
        starts.append(d)
    return starts


class T5Bias(nn.Module, kw_only=True):
    """A learned scalar for each head and bucket of distances (Raffel et al. 2020, section 2.1).

    ``bias[n, t, s] = table[bucket(t - s), n]``, see :func:`relative_buckets`. All layers of a :class:`Decoder`
    share a table, as in T5. T5 does not scale its scores: set ``logit_scale=1.0`` to match.

    Attributes:
      num_buckets: number of buckets, both directions together.
      max_distance: see :func:`relative_buckets`.
      param_dtype: dtype of the table.
      embedding_init: initializer of the table ``[num_buckets, N]``, with axes named ``relative_buckets`` and
        ``heads``.

    Raises:
      TypeError: as :func:`relative_buckets`, or if param_dtype is no dtype of floats or embedding_init no function.
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
        check_callable("embedding_init", self.embedding_init, "key", "shape", "dtype", optional=False)
        init = named(self.embedding_init, ("relative_buckets", "heads"))
        dtype = as_float_dtype("param_dtype", self.param_dtype)
        table: Any = self.param("table", init, (self.num_buckets, num_heads), dtype)
        return jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 1)


@dataclasses.dataclass(frozen=True)
class ALiBi:
    """A penalty proportional to the distance, with a fixed slope for each head (Press et al. 2022, section 3).

    ``bias[n, t, s] = -slope_n |t - s|``, with the slopes ``2^(-8 (n + 1) / N)``. If N is no power of two, let P be
    the largest power of two below N. The first P heads have the slopes for N = P. The remaining heads have the
    first, third, fifth, ... slope for N = 2 P, as in the authors' code.

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
        """float32 ``[B, N, T, S]`` for integer distances ``[B, T, S]``. Keys before and after count equally."""
        distance = device_array("distance", distance)
        check_axes("distance", distance, "B T S")
        check_dtype("distance", distance, jnp.integer, "integer")
        check_flag("causal", causal)
        slopes = jnp.asarray(self.slopes(num_heads), jnp.float32)[None, :, None, None]
        return slopes * -jnp.abs(distance.astype(jnp.float32))[:, None]
