"""Checks arguments: axes, dtype, range, callability.

All messages have the same form: the argument, the expected value, the actual value.
"""

import inspect
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._jax_internals import Tracer


def is_concrete(values) -> bool:
    """True if no array in the pytree ``values`` is traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def known_any(condition) -> bool:
    """True if the condition is concrete and true anywhere."""
    return is_concrete(condition) and bool(np.asarray(condition).any())


def align_ranks(*arrays) -> list[jax.Array]:
    """The arrays with axes of size 1 in front, to one rank: ``jax_numpy_rank_promotion="raise"`` asks for it."""
    rank = max(array.ndim for array in arrays)
    return [jax.lax.expand_dims(array, range(rank - array.ndim)) for array in arrays]


def as_int32(values) -> jax.Array:
    """Saturating cast of integers to int32."""
    source, target = jnp.iinfo(values.dtype), jnp.iinfo(jnp.int32)
    low, high = max(source.min, target.min), min(source.max, target.max)
    return jnp.clip(values, jnp.asarray(low, values.dtype), jnp.asarray(high, values.dtype)).astype(jnp.int32)


def check_axes(argument: str, array, axes: str, **sizes) -> None:
    """Raises ValueError unless ``array.shape`` matches ``axes``, for example ``"... T N H"`` with ``T=7``.

    A letter without a size matches any length, and a set of sizes each of these. A leading ``...`` matches any
    number of axes. Arguments of users are checked without chex, because ``chex.disable_asserts`` would switch the
    check off.
    """
    letters, shape = axes.split(), tuple(np.shape(array))
    open_ended = axes.startswith("...")
    named = letters[1:] if open_ended else letters
    enough = len(shape) >= len(named) if open_ended else len(shape) == len(named)
    last = shape[max(len(shape) - len(named), 0) :]
    if enough and all(_fits(size, sizes.get(letter)) for letter, size in zip(named, last, strict=True)):
        return
    known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes)
    sizes_and_shape = f"{' with ' + known if known else ''}, got {shape}"
    raise ValueError(f"{argument} must have shape [{', '.join(letters)}]{sizes_and_shape}")


def _fits(size, expected) -> bool:
    """Whether an axis of this size is one expected: None is any, a set holds those allowed."""
    return expected is None or (size in expected if isinstance(expected, set) else size == expected)


def check_dtype(argument: str, array, kind, expected: str) -> None:
    """Raises TypeError unless the dtype of ``array`` is a sub-dtype of ``kind``."""
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{argument} must be {expected}, got dtype {array.dtype}")


def check_integer(argument: str, value, least: int | None = None) -> int:
    """``value`` as an int. Accepts integers of Python, numpy and jax.

    Raises:
      TypeError: if ``value`` is not an integer.
      ValueError: if ``value`` is below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{argument} must be at least {least}, got {number}")
    return number


def check_sizes(module, *fields: str, optional: str | None = None) -> None:
    """Raises unless these fields of a module are integers of at least 1; the optional field may be None.

    Raises:
      TypeError: if a field is not an integer.
      ValueError: if a field is below 1.
    """
    for field in (*fields, *([] if optional is None else [optional])):
        value = getattr(module, field)
        if not (type(value) is int and value >= 1) and not (field == optional and value is None):
            check_integer(field, value, least=1)


def check_real(argument: str, value):
    """``value`` as a float if it is concrete; a traced number or None is returned unchanged.

    Raises:
      TypeError: if ``value`` is not a real number.
      ValueError: if ``value`` is not finite.
    """
    if value is None or isinstance(value, Tracer):
        return value
    array = np.asarray(value)
    if array.ndim or not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{argument} must be a real number, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{argument} must be finite, got {value}")
    return number


def check_mask(argument: str, mask, axes: str, **sizes) -> jax.Array:
    """``mask`` as a bool array, True at nonzero entries: the real tokens.

    Raises:
      TypeError: if ``mask`` is floating. An additive float mask has zeros at real tokens.
      ValueError: if the shape does not match ``axes``, or a known entry is neither 0 nor 1.
    """
    mask = device_array(argument, mask)
    check_axes(argument, mask, axes, **sizes)
    if mask.dtype != jnp.bool:
        check_dtype(argument, mask, jnp.integer, "bool or integer")
        if known_any((mask != 0) & (mask != 1)):
            raise ValueError(
                f"{argument} must hold 0 and 1, got {int(mask.min())} to {int(mask.max())}: numbers of packed "
                "sequences are segment_ids"
            )
    return mask.astype(bool)


def device_array(argument: str, values) -> jax.Array:
    """``values`` as an array on the device.

    Raises:
      TypeError: if ``values`` does not hold numbers.
      ValueError: if ``values`` has no array shape, or an integer would overflow the device's dtype.
    """
    if not isinstance(values, jax.Array):
        try:
            host = np.asarray(values)
        except ValueError:
            hint = ": see rope_jax.generation.pad_prompts" if argument == "prompt" else ""
            raise ValueError(f"{argument} must be an array, got lists of unequal lengths{hint}") from None
        if host.dtype.kind in "OUSMm":
            raise TypeError(f"{argument} must be an array of numbers, got {type(values).__name__}")
        narrow = jax.dtypes.canonicalize_dtype(host.dtype)
        if host.size and host.dtype.kind in "iu":
            low, high = np.iinfo(narrow).min, np.iinfo(narrow).max
            if host.min() < low or host.max() > high:
                raise ValueError(
                    f"{argument} must fit in {narrow}, got values from {host.min()} to {host.max()}: "
                    "enable jax_enable_x64 for 64-bit integers"
                )
        values = jnp.asarray(host, narrow)
    return values


def check_callable(field: str, encoding, *arguments: str) -> None:
    """Raises TypeError unless ``encoding`` is None or a callable of these arguments."""
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
        parameters = ", ".join(inspect.signature(encoding).parameters)
        raise TypeError(f"{expected}, got {type(encoding).__name__}, which takes ({parameters})") from None
    except ValueError:  # some callables written in C have no signature to check
        pass
