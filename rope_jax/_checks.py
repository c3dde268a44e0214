"""Does an argument have the axes and the dtype that its docstring promises?

Every public function asks here, so that each refusal reads alike: the argument, what was expected, what came.
"""

import inspect
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np


def check_axes(argument: str, array, axes: str, **sizes) -> None:
    """Raises ValueError unless ``array.shape`` reads as ``axes``, for example ``"... T N H"`` with ``T=7``.

    A letter without a size matches any length; a leading ``...`` matches any number of axes.
    """
    letters = axes.split()
    expected = tuple(... if letter == "..." else sizes.get(letter) for letter in letters)
    known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes)
    try:
        chex.assert_shape(array, expected)
    except AssertionError:  # said again in our words: chex knows neither the argument nor the letters
        given = f"{' with ' + known if known else ''}, got {tuple(np.shape(array))}"
        raise ValueError(f"{argument} must have shape [{', '.join(letters)}]{given}") from None


def check_dtype(argument: str, array, kind, expected: str) -> None:
    """Raises TypeError unless the dtype of ``array`` is a sub-dtype of ``kind``."""
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{argument} must be {expected}, got dtype {array.dtype}")


def check_integer(argument: str, value, least: int | None = None) -> int:
    """``value`` as an int, if it is an integer, numpy's and jax's included, and not below ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{argument} must be at least {least}, got {number}")
    return number


def known_any(condition) -> bool:
    """Whether a condition is known to hold somewhere: what is traced is not known."""
    return not isinstance(condition, jax.core.Tracer) and bool(np.asarray(condition).any())


def as_int32(values) -> jax.Array:
    """Integers as int32; one that does not fit becomes the nearest that does, and wraps around to no other."""
    own, narrow = jnp.iinfo(values.dtype), jnp.iinfo(jnp.int32)
    low, high = (jnp.asarray(end, values.dtype) for end in (max(own.min, narrow.min), min(own.max, narrow.max)))
    return jnp.clip(values, low, high).astype(jnp.int32)


def check_mask(argument: str, mask, axes: str, **sizes) -> jax.Array:
    """``mask`` as a bool array: nonzero at real tokens. An additive float mask means the opposite: TypeError."""
    mask = device_array(argument, mask)
    check_axes(argument, mask, axes, **sizes)
    if mask.dtype != jnp.bool:
        check_dtype(argument, mask, jnp.integer, "bool or integer")
    return mask.astype(bool)


def device_array(argument: str, values) -> jax.Array:
    """``values`` as an array on the device; an integer that would wrap around there is refused."""
    if not isinstance(values, jax.Array):
        try:
            host = np.asarray(values)
        except ValueError as error:  # nested lists of unequal lengths
            raise ValueError(f"{argument} must be an array: {error}") from None
        if host.dtype.kind in "OUSMm":
            raise TypeError(f"{argument} must be an array of numbers, got {type(values).__name__}")
        narrow = jax.dtypes.canonicalize_dtype(host.dtype)
        if host.size and host.dtype.kind in "iu":
            low, high = np.iinfo(narrow).min, np.iinfo(narrow).max
            if host.min() < low or host.max() > high:
                raise ValueError(
                    f"{argument} must fit in {narrow}, got values from {host.min()} to {host.max()}; "
                    "with jax_enable_x64 they may be 64-bit"
                )
        values = jnp.asarray(host, narrow)
    return values


def check_callable(field: str, encoding, *arguments: str) -> None:
    """Raises unless an encoding is None or can be called with the arguments of its kind."""
    if encoding is None:
        return
    expected = f"{field} must be a callable of ({', '.join(arguments)})"
    if isinstance(encoding, type):
        raise TypeError(f"{expected}, like {encoding.__name__}(), got the class {encoding.__name__} itself")
    if not callable(encoding):
        raise TypeError(f"{expected}, got {encoding!r}")
    try:
        inspect.signature(encoding).bind(*arguments)
    except TypeError:
        taken = ", ".join(inspect.signature(encoding).parameters)
        raise TypeError(f"{expected}, got {type(encoding).__name__}, which takes ({taken})") from None
    except ValueError:  # a callable that shows no signature
        pass
