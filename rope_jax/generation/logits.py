"""Changes logits before a token is drawn: functions for ``generate(logits_fn=...)``."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import as_int32, check_axes, check_callable, check_dtype, check_real, device_array, shown
from rope_jax._jax_internals import Tracer

LogitsFunction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(logits [B, V], tokens [B, T], step []) -> logits [B, V]``; see :func:`generate`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive logits of tokens that stand in prompt or answer, and multiplies negative ones.

    Keskar et al. 2019, CTRL, section 4.1, in the form of transformers.

    Attributes:
      penalty: above 1 makes repetition rarer; positive.

    Raises:
      ValueError: if the penalty is not positive and finite, or the call's logits are not ``[B, V]``.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> penalty = rope_jax.generation.RepetitionPenalty(2.0)
      >>> penalty(jnp.array([[4.0, 4.0, -4.0]]), jnp.array([[1, 2, -1]]), 0).tolist()
      [[4.0, 2.0, -8.0]]
    """

    penalty: float

    def __post_init__(self):
        _check_positive("RepetitionPenalty: penalty", self.penalty)

    def __call__(self, logits, tokens, step) -> jax.Array:
        logits, tokens = _checked(self, logits), device_array("tokens", tokens)
        check_axes("tokens", tokens, "B T", B={1, logits.shape[0]})
        check_dtype("tokens", tokens, jnp.integer, "integer")
        tokens = as_int32(tokens)
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        columns = jnp.where(tokens < 0, logits.shape[1], tokens)  # -1 is no token
        seen = jnp.zeros(logits.shape, bool).at[rows, columns].set(True, mode="drop")
        penalty = jnp.asarray(self.penalty, logits.dtype)
        return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinP:
    """Keeps the tokens with at least a share of the largest probability (Nguyen et al. 2024, section 3).

    Probabilities are those of the logits as they come, before the temperature.

    Attributes:
      share: in (0, 1].

    Raises:
      ValueError: if the share is out of range, or the call's logits are not ``[..., V]``.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> rope_jax.generation.MinP(0.5)(jnp.array([[1.0, 0.5, -1.0]]), None, 0).tolist()
      [[1.0, 0.5, -inf]]
    """

    share: float

    def __post_init__(self):
        _check_positive("MinP: share", self.share, most=1.0)

    def __call__(self, logits, tokens, step) -> jax.Array:
        logits = _checked(self, logits, "... V")
        # float16 has no number for small shares.
        wide = logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)
        lowest = jnp.max(wide, axis=-1, keepdims=True) + jnp.log(jnp.asarray(self.share, wide.dtype))
        return jnp.where(wide < lowest, jnp.asarray(-jnp.inf, logits.dtype), logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitBias:
    """Adds a number to the logit of each token: -inf forbids a token.

    Attributes:
      bias: floating ``[V]``, or ``[B, V]`` for each row of the output.

    Raises:
      TypeError: if the bias does not hold floats.
      ValueError: if the call's logits are not ``[B, V]``, for the V of the bias.

    Example:
      >>> import jax.numpy as jnp, rope_jax
      >>> rope_jax.generation.LogitBias(jnp.array([0.0, -jnp.inf]))(jnp.ones((1, 2)), None, 0).tolist()
      [[1.0, -inf]]
    """

    bias: jax.Array

    def __post_init__(self):
        if isinstance(self.bias, list | tuple | np.ndarray | jax.Array):  # and not a leaf of JAX's own
            object.__setattr__(self, "bias", device_array("LogitBias: bias", self.bias))
            check_dtype("LogitBias: bias", self.bias, jnp.floating, "floating")

    def __call__(self, logits, tokens, step) -> jax.Array:
        logits, bias = _checked(self, logits), device_array("LogitBias: bias", self.bias)
        rows = "B " if bias.ndim > 1 else ""
        check_axes("LogitBias: bias", bias, f"{rows}V", B=logits.shape[0], V=logits.shape[1])
        return logits + jnp.broadcast_to(bias, logits.shape).astype(logits.dtype)


def _check_positive(argument: str, value, most: float = math.inf) -> None:
    # JAX rebuilds these classes with tracers, and with leaves of its own that are no numbers.
    is_number = isinstance(value, bool | int | float | np.generic | np.ndarray | jax.Array)
    if is_number and not isinstance(value, Tracer):
        number = check_real(argument, value)
        if not number > 0:
            raise ValueError(f"{argument} must be positive, got {value}")
        if number > most:
            raise ValueError(f"{argument} must be at most {most:g}, got {value}")


def _checked(function, logits, axes: str = "B V") -> jax.Array:
    """The logits as a floating array of these axes, for a function whose fields are numbers."""
    _check_numbers(function)
    logits = device_array("logits", logits)
    check_axes("logits", logits, axes)
    if not logits.shape[-1]:
        raise ValueError(f"logits must have V of at least 1, got shape {logits.shape}")
    check_dtype("logits", logits, jnp.floating, "floating")
    return logits


def _check_numbers(function) -> None:
    # Not in the constructors: JAX rebuilds these classes with leaves of its own.
    for field, value in vars(function).items():
        if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
            raise TypeError(f"{type(function).__name__}: {field} must be numbers, got {shown(value)}")


def as_pytrees(logits_fn: LogitsFunction | Sequence[LogitsFunction]) -> tuple[Callable, ...]:
    """The functions as pytrees: a plain function has no leaves, and is compared by identity.

    Raises:
      TypeError: if one is not a function of ``(logits, tokens, step)``.
    """
    functions = tuple(logits_fn) if isinstance(logits_fn, Sequence) else (logits_fn,)
    for function in functions:
        if function is None:
            raise TypeError("logits_fn must be a callable of (logits, tokens, step) or several, got None")
        check_callable("logits_fn", function, "logits", "tokens", "step")
        if isinstance(function, RepetitionPenalty | MinP | LogitBias):
            _check_numbers(function)
    is_leaf = [jax.tree_util.treedef_is_leaf(jax.tree.structure(function)) for function in functions]
    return tuple(
        jax.tree_util.Partial(function) if leaf else function
        for leaf, function in zip(is_leaf, functions, strict=True)
    )


def checked_logits(changed, logits, number: int) -> jax.Array:
    """Raises unless function ``number`` returned floating logits ``[B, V]`` in a jax array."""
    name = f"logits_fn {number} (logits, tokens, step)"
    if not isinstance(changed, jax.Array):
        raise TypeError(f"{name} must return logits in a jax array, got {type(changed).__name__}")
    check_axes(name, changed, "B V", B=logits.shape[0], V=logits.shape[1])
    check_dtype(name, changed, jnp.floating, "floating")
    return changed.astype(logits.dtype)
