"""Calls with arguments of the right kind and of the wrong kind: what comes back, and whether an error is our own."""

import datetime
import decimal
import fractions
import pathlib
import re
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import event

import rope_jax

OURS = pathlib.Path(rope_jax.__file__).parent

# Values that people pass by mistake, by name: some are right for some arguments.
WRONG = {
    "None": lambda: None,
    "True": lambda: True,
    "a word": lambda: "x",
    "bytes": lambda: b"x",
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-1": lambda: -1,
    "0": lambda: 0,
    "2^31": lambda: 2**31,
    "2^64": lambda: 2**64,
    "10^400": lambda: 10**400,
    "-2^40": lambda: -(2**40),
    "empty list": lambda: [],
    "ragged list": lambda: [[1], [1, 2]],
    "list of words": lambda: ["a", "b"],
    "list of None": lambda: [None, None],
    "dictionary": lambda: {"a": 1},
    "set": lambda: {1, 2},
    "object": object,
    "function of nothing": lambda: lambda: 0,
    "class": lambda: int,
    "module": lambda: np,
    "range": lambda: range(3),
    "generator": lambda: (i for i in range(3)),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "Decimal": lambda: decimal.Decimal("1.5"),
    "date": lambda: datetime.date(2026, 1, 1),
    "complex": lambda: 1 + 2j,
    "numpy nan": lambda: np.float64("nan"),
    "numpy int8": lambda: np.int8(3),
    "numpy words": lambda: np.array(["a"]),
    "numpy objects": lambda: np.array([None, 1], object),
    "numpy complex": lambda: np.ones(3, np.complex64),
    "numpy date": lambda: np.array(["2026-01-01"], "datetime64[D]"),
    "numpy [0]": lambda: np.zeros(0, np.float32),
    "numpy int [0]": lambda: np.zeros(0, np.int32),
    "numpy rank 7": lambda: np.zeros((1,) * 7, np.float32),
    "numpy int64 [2, 3]": lambda: np.full((2, 3), 2**40),
    "numpy record": lambda: np.zeros(2, [("a", int)]),
    "jax bool": lambda: jnp.ones((2, 3), bool),
    "jax int [3]": lambda: jnp.arange(3),
    "jax float []": lambda: jnp.float32(0.5),
    "jax int []": lambda: jnp.int32(2),
    "jax nan [2, 3]": lambda: jnp.full((2, 3), jnp.nan),
    "jax eight bits": lambda: jnp.ones((2, 3), jnp.float8_e4m3fn),
    "jax key": lambda: jax.random.key(0),
    "only a shape": lambda: jax.ShapeDtypeStruct((2, 3), jnp.float32),
}


def frames_of(error: BaseException) -> list[pathlib.Path]:
    return [pathlib.Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]


def names(message: str, argument: str) -> bool:
    """Whether the message has the argument as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", message) is not None


def is_ours(error: Exception, arguments: set[str]) -> bool:
    """Whether rope_jax raised the error, in one line that names one of the arguments and says what was expected."""
    message = str(error)
    raised_here = OURS in frames_of(error)[-1].parents
    named = any(names(message, argument) for argument in arguments)
    kinds = ValueError, TypeError, *([FileNotFoundError] if "config" in arguments else [])
    return isinstance(error, kinds) and raised_here and named and "\n" not in message


def outcome(function, arguments: dict[str, Any], wrong: set[str]):
    """The result of the call, or our error, which names an argument of ``wrong``. Any other error fails."""
    positional = [arguments[name] for name in arguments if name.startswith("*")]
    named = {name: value for name, value in arguments.items() if not name.startswith("*")}
    try:
        result = function(*positional, **named)
        jax.block_until_ready(jax.tree.leaves(result))
    except Exception as error:
        assert is_ours(error, wrong), f"{type(error).__name__} from inside, or without the argument: {error}"
        return error
    return result


def report(name: str, got) -> None:
    event(f"{name}: {type(got).__name__ if isinstance(got, Exception) else 'a result'}")
