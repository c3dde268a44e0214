"""Checks arguments: axes, dtype, range, callability.

All messages have the same form: the argument, the expected value, the actual value.
"""

import inspect
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._jax_internals import Tracer


def shown(value) -> str:
    """The value for a message, on one line and cut short. An array of many numbers is shown by dtype and shape."""
    if isinstance(value, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        if is_concrete(value) and jnp.issubdtype(value.dtype, np.number) and value.size <= 8:
            return str(np.asarray(value).tolist())
        return f"{type(value).__name__} {value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, int) and not -(10**30) < value < 10**30:  # Python prints no integer of 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer inside may be too long to print
        return type(value).__name__
    return text if len(text) <= 100 else f"{text[:100]}..."


def is_concrete(values) -> bool:
    """True if no array in the pytree ``values`` is traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def known_any(condition) -> bool:
    """True if the condition is concrete and true anywhere."""
    return is_concrete(condition) and bool(np.asarray(condition).any())


def known_of(given, condition) -> bool:
    """True if ``given`` is concrete and ``condition(given)`` true anywhere, inside jit too.

    Inside jit an array made from known numbers is traced, and so is a comparison of a known array.
    """
    return is_concrete(given) and bool(condition(np.asarray(given)).any())


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
    letters, shape = axes.split(), _shape_of(argument, array)
    open_ended = axes.startswith("...")
    named = letters[1:] if open_ended else letters
    enough = len(shape) >= len(named) if open_ended else len(shape) == len(named)
    last = shape[max(len(shape) - len(named), 0) :]
    if enough and all(_fits(size, sizes.get(letter)) for letter, size in zip(named, last, strict=True)):
        return
    known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes)
    sizes_and_shape = f"{' with ' + known if known else ''}, got {shape}"
    raise ValueError(f"{argument} must have shape [{', '.join(letters)}]{sizes_and_shape}")


def _shape_of(argument: str, array) -> tuple:
    if hasattr(array, "shape") and isinstance(array.shape, tuple):
        return array.shape
    try:
        return np.asarray(array).shape
    except ValueError:
        raise ValueError(f"{argument} must be an array, got lists of unequal lengths") from None


def _fits(size, expected) -> bool:
    """Whether an axis of this size is one expected: None is any, a set holds those allowed."""
    return expected is None or (size in expected if isinstance(expected, set) else size == expected)


def check_dtype(argument: str, array, kind, expected: str) -> None:
    """Raises TypeError unless ``array`` is an array whose dtype is a sub-dtype of ``kind``."""
    if not hasattr(array, "dtype"):
        raise TypeError(f"{argument} must be an array, got {type(array).__name__}")
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
        raise TypeError(f"{argument} must be an integer, got {shown(value)}")
    if least is not None and number < least:
        raise ValueError(f"{argument} must be at least {least}, got {shown(number)}")
    return number


def check_kinds(module, *, sizes=(), flags=(), positive=(), dtypes=(), functions=(), optional=()) -> None:
    """Raises unless fields of a module are of their kind; an optional field may be None.

    Args:
      module: has the fields.
      sizes: fields that are integers of at least 1.
      flags: fields that are True or False.
      positive: fields that are positive numbers.
      dtypes: fields that are dtypes of floats.
      functions: fields that are functions.
      optional: those of the fields that may be None.

    Raises:
      TypeError: if a field is of another kind.
      ValueError: if a number is out of range.
    """
    for field in (*sizes, *flags, *positive):
        value = getattr(module, field)
        if value is None and field in optional:
            continue
        if field in sizes:
            if isinstance(value, jax.Array):  # comparing it gives a traced value inside jit
                raise TypeError(f"{field} must be an integer of Python or numpy, got a jax array: pass int(...)")
            if type(value) is not int or value < 1:
                check_integer(field, value, least=1)
        elif field in flags:
            if type(value) is not bool:
                check_flag(field, value)
        elif type(value) is not float or not 0 < value < math.inf:
            check_positive(field, value, concrete=True)
    for field in dtypes:
        if (dtype := getattr(module, field)) is not None or field not in optional:
            as_float_dtype(field, dtype)
    for field in functions:
        function = getattr(module, field)
        if not callable(function) and (function is not None or field not in optional):
            check_function(field, function)


def as_float_dtype(argument: str, dtype) -> np.dtype:
    """``dtype`` as a dtype of numpy. Raises TypeError unless it is of floats."""
    dtype = as_dtype(argument, dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{argument} must be floating, got dtype {dtype}")
    return dtype


def as_dtype(argument: str, dtype) -> np.dtype:
    """``dtype`` as a dtype of numpy. Raises TypeError unless it names one."""
    if isinstance(dtype, np.dtype | type | str):
        try:
            return jnp.dtype(dtype)
        except TypeError:
            pass
    raise TypeError(f"{argument} must be a dtype, as jnp.float32, got {shown(dtype)}")


def check_real(argument: str, value):
    """``value`` as a float if it is concrete; a traced number or None is returned unchanged.

    Raises:
      TypeError: if ``value`` is not a real number.
      ValueError: if ``value`` is not finite.
    """
    if value is None or isinstance(value, Tracer):
        return value
    dtype = np.dtype(type(value)) if isinstance(value, int | float) else getattr(value, "dtype", None)
    is_real = dtype is not None and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))
    if not is_real or np.ndim(value) or isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{argument} must be a real number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{argument} must be finite, got {shown(value)}")
    return number


def check_sequence(argument: str, values, expected: str) -> list:
    """``values`` as a list. Raises TypeError unless the values are a sequence, or an array of one axis."""
    is_array = isinstance(values, np.ndarray | jax.Array)
    if (is_array and values.ndim == 1) or (isinstance(values, Sequence) and not isinstance(values, str | bytes)):
        return list(values)
    raise TypeError(f"{argument} must be {expected}, got {shown(values)}")


def check_reals(argument: str, values) -> tuple[float, ...]:
    """``values`` as a tuple of floats. Raises unless the values are concrete, finite real numbers."""
    numbers = [check_real(argument, value) for value in check_sequence(argument, values, "a sequence of numbers")]
    if not all(isinstance(number, float) for number in numbers):
        raise TypeError(f"{argument} must hold concrete real numbers, got {shown(values)}")
    return tuple(numbers)


def check_positive(argument: str, value, *, concrete: bool = False) -> None:
    """Raises unless ``value`` is a real number above 0, or traced if it need not be concrete."""
    number = check_real(argument, value)
    if number is None:
        raise TypeError(f"{argument} must be a real number, got None")
    if concrete and not isinstance(number, float):
        raise TypeError(f"{argument} must be a concrete number, got a traced number")
    if isinstance(number, float) and number <= 0:
        raise ValueError(f"{argument} must be positive and finite, got {shown(value)}")


def check_choice(argument: str, value, choices: Sequence[str], optional: bool = False) -> None:
    """Raises ValueError unless ``value`` is one of the names ``choices``, or None if optional."""
    if not (isinstance(value, str) and value in choices) and not (optional and value is None):
        or_none = "None or " if optional else ""
        raise ValueError(f"{argument} must be {or_none}one of {tuple(choices)}, got {shown(value)}")


def check_flag(argument: str, value) -> bool:
    """``value`` as a bool. Raises TypeError unless the value is True or False."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(f"{argument} must be True or False, got {shown(value)}")
    return bool(value)


def check_function(argument: str, function) -> None:
    """Raises TypeError unless ``function`` can be called."""
    if not callable(function):
        raise TypeError(f"{argument} must be a function, got {shown(function)}")


def check_name(argument: str, name) -> None:
    """Raises TypeError unless ``name`` is a string."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a name, got {shown(name)}")


def check_mask(argument: str, mask, axes: str, **sizes) -> jax.Array:
    """``mask`` as a bool array, True at nonzero entries: the real tokens.

    Raises:
      TypeError: if ``mask`` is floating. An additive float mask has zeros at real tokens.
      ValueError: if the shape does not match ``axes``, or a known entry is neither 0 nor 1.
    """
    given, mask = mask, device_array(argument, mask)
    check_axes(argument, mask, axes, **sizes)
    if mask.dtype != jnp.bool:
        check_dtype(argument, mask, jnp.integer, "bool or integer")
        if known_of(given, lambda values: (values != 0) & (values != 1)):
            known = np.asarray(given)
            raise ValueError(
                f"{argument} must hold 0 and 1, got {known.min()} to {known.max()}: numbers of packed sequences "
                "are segment_ids"
            )
    return mask.astype(bool)


def device_array(argument: str, values) -> jax.Array:
    """``values`` as an array on the device.

    Raises:
      TypeError: if ``values`` does not hold numbers.
      ValueError: if ``values`` has no array shape, or an integer would overflow the device's dtype.
    """
    if not isinstance(values, jax.Array):
        host = host_array(argument, values)
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


def host_array(argument: str, values) -> np.ndarray:
    """``values`` as an array of numpy.

    Raises:
      TypeError: if ``values`` does not hold numbers, or is traced.
      ValueError: if ``values`` has no array shape.
    """
    try:
        host = np.asarray(values)
    except ValueError:
        hint = ": see rope_jax.generation.pad_prompts" if argument == "prompt" else ""
        raise ValueError(f"{argument} must be an array, got lists of unequal lengths{hint}") from None
    except TypeError:  # jax's error for traced values is one too
        expected = "an array of numbers" if is_concrete(values) else "known, not traced by jit"
        raise TypeError(f"{argument} must be {expected}, got {shown(values)}") from None
    if host.dtype.kind in "OUSMm" or host.dtype.type is np.void:
        raise TypeError(f"{argument} must be an array of numbers, got {type(values).__name__}")
    return host


def checked_key(argument: str, key) -> jax.Array:
    """A key of ``jax.random``, or keys ``[B]``; raw numbers are wrapped. Raises TypeError unless it is one."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32 and key.shape[-1:] in ((2,), (4,)):
        try:
            return jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError:
            impl = str(jax.random.key_impl(jax.random.key(0)))
            raise TypeError(
                f"{argument} must be a key of {impl!r}, got {key.shape[-1]} raw numbers: pass "
                "jax.random.wrap_key_data(numbers, impl=...)"
            ) from None
    hint = f"({key})" if isinstance(key, int | np.integer) and abs(int(key)) < 2**31 else "(0)"
    raise TypeError(f"{argument} must be a key, as jax.random.key{hint}, got {shown(key)}")


def check_callable(field: str, encoding, *arguments: str, optional: bool = True) -> None:
    """Raises TypeError unless ``encoding`` is a callable of these arguments, or None if optional."""
    if optional and encoding is None:
        return
    expected = f"{field} must be a callable of ({', '.join(arguments)})"
    if isinstance(encoding, type):
        raise TypeError(f"{expected}, like {encoding.__name__}(), got the class {encoding.__name__} itself")
    if not callable(encoding):
        raise TypeError(f"{expected}, got {shown(encoding)}")
    try:
        inspect.signature(encoding).bind(*arguments)
    except TypeError:
        parameters = ", ".join(inspect.signature(encoding).parameters)
        raise TypeError(f"{expected}, got {type(encoding).__name__}, which takes ({parameters})") from None
    except ValueError:  # some callables written in C have no signature to check
        pass
