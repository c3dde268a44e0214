"""Reads a Hugging Face config strictly: every key is read, known to be inert, or refused."""

import difflib
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if the file holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


_MOST_LETTERS = 1000


def one_line(message: str) -> str:
    """A message on one line, shortened: values and names in a broken file may be any text."""
    message = "".join(letter if letter.isprintable() else " " for letter in message[: _MOST_LETTERS + 1])
    return message if len(message) <= _MOST_LETTERS else message[:_MOST_LETTERS] + " ..."


def load_config(config) -> Mapping[str, Any]:
    """A config as a dictionary, from a dictionary, a path or a transformers config object."""
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        if os.path.isdir(path):
            path /= "config.json"
        if not os.path.isfile(path):  # false for a path that is too long, such as the text of a config
            raise FileNotFoundError(
                one_line(f"config must be a local file or folder (nothing is downloaded), got {path}")
            )
        if path.suffix.lower() == ".gguf":
            raise ValueError(one_line(f"config must be a JSON file, got {path}: from_gguf reads GGUF files"))
        return read_json(path)
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise TypeError(f"config must be a dictionary, a path or a config object, got {type(config).__name__}")
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config.to_dict() must return a dictionary, got {type(config).__name__}")
    return config


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The end of an error message: the candidate that ``name`` misspells by one slip, or nothing.

    A digit or a suffix is no slip: ``exaone`` is not ``exaone4``, and ``glm4v`` is not ``glm4``.
    """
    close = sorted(candidate for candidate in set(candidates) if _one_slip(name, candidate))
    return f"; did you mean {close[0]!r}?" if close else ""


def _one_slip(a: str, b: str) -> bool:
    """Whether a letter was added, left out or replaced, or two neighbours swapped; the first letter stays."""
    if a == b or a[:1] != b[:1] or abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    most = min(len(a), len(b)) - start
    end = next((i for i in range(most) if a[-1 - i] != b[-1 - i]), most)
    wrong, right = a[start : len(a) - end], b[start : len(b) - end]
    if any(letter.isdigit() for letter in wrong + right):
        return False
    if len(wrong) == len(right):
        replaced = len(wrong) == 1 and len(a) >= 8  # short names differ by a letter: mimo is not mimi
        return replaced or (len(wrong) == 2 and wrong == right[::-1])
    doubled = a[start - 1] == (wrong or right)
    return len(wrong + right) == 1 and (end > 0 or doubled)


_KINDS = {int: "integers", float: "numbers", str: "names", bool: "booleans", type(None): "null"}


class Config:
    """A dictionary with a record of the keys that were read, so that no key is ignored in silence.

    Attributes:
      values: the keys of the file, over the defaults.
      name: of the dictionary, in error messages.
    """

    def __init__(self, values: Mapping[str, Any], name: str, defaults: Mapping[str, Any] | None = None):
        self.values, self.name = {**(defaults or {}), **values}, name
        self.read: set[str] = set()
        self._in_file = tuple(values)

    def __getitem__(self, key: str) -> Any:
        """The value of a required key; it may be null."""
        if key not in self.values:
            raise ValueError(f"{self.name} must have the key {key!r}{did_you_mean(key, self.values)}")
        self.read.add(key)
        return self.values[key]

    def get(self, key: str, default=None) -> Any:
        """The value of an optional key; null counts as missing."""
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def is_null(self, key: str) -> bool:
        """True if the key is present and null."""
        self.read.add(key)
        return key in self.values and self.values[key] is None

    def ignore(self, *keys: str) -> None:
        """Counts keys as read, whatever their values."""
        self.read.update(keys)

    def need(self, *keys: str) -> Any:
        """The first value among synonymous keys; raises ValueError if all are missing."""
        value = self.first(*keys)
        if value is None:
            raise ValueError(f"{self.name} must have the key {keys[0]!r}{did_you_mean(keys[0], self.values)}")
        return value

    def first(self, *keys: str) -> Any:
        """The first value among synonymous keys, or None."""
        values = [self.get(key) for key in keys]
        return next((value for value in values if value is not None), None)

    def agreed(self, *keys: str) -> Any:
        """The value of synonymous keys, or None; raises ValueError if two values differ."""
        found = {key: value for key in keys if (value := self.get(key)) is not None}
        first = next(iter(found.values()), None)
        if any(value is not first and value != first for value in found.values()):  # NaN is itself alone
            raise ValueError(f"{self.name} has synonymous keys with different values: {found}; keep one")
        return first

    def number(self, key: str, default: Any = ...) -> Any:
        """A number as a float; the default, if any, as it is."""
        value = self.need(key) if default is ... else self.get(key, default)
        if value is None or value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(f"{key} must be a number, got {value!r}")
        return float(value)

    def integer(self, key: str, value, least: int = 1, most: int = 2**31 - 1) -> int:
        """``value``, read from ``key``, as an integer; 8.0 is 8."""
        whole = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not whole or value != int(value) or value < least:
            self.refuse(f"{key} must be an integer of at least {least}, got {value!r}")
        if value > most:
            self.refuse(f"{key} must be at most {most:,}, got {int(value):,}")
        return int(value)

    def size(self, key: str) -> int:
        """A required integer of at least 1, written without a decimal point."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(f"{key} must be an integer of at least 1, got {value!r}")
        return self.integer(key, value)

    def positive(self, key: str, null: bool = False) -> Any:
        """A required number above 0, as it is written; null if ``null`` allows it."""
        value = self[key]
        if value is None and null:
            return None
        if value is None or self.number(key) <= 0:
            self.refuse(f"{key} must be a number above 0, got {value!r}")
        return value

    def size_or_null(self, key: str) -> int | None:
        """An integer of at least 1, or null."""
        return None if self[key] is None else self.size(key)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; 0 and 1 are accepted."""
        value = self.get(key, default)
        if not isinstance(value, int) or value not in (False, True):
            self.refuse(f"{key} must be true or false, got {value!r}")
        return bool(value)

    def one_of(self, key: str, *allowed) -> Any:
        """The value of a required key, which must be among those allowed."""
        value = self[key]
        if value not in allowed:
            self.refuse(f"{key} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        return value

    def per_layer(self, key: str, values, count: int) -> list:
        """``values``, read from ``key``, as a list of ``count`` entries."""
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or len(values) != count:
            got = f"{len(values)}" if isinstance(values, Sequence) else repr(values)
            self.refuse(f"{key} must have an entry for each of {count} layers, got {got}")
        return list(values)

    def list_of(self, key: str, values, *kinds: type) -> list:
        """``values``, read from ``key``, as a list of elements of these kinds."""
        fits = isinstance(values, list | tuple) and all(
            isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds) for value in values
        )
        if not fits:
            names = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
            self.refuse(f"{key} must be a list of {names}, got {values!r}")
        return list(values)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A dictionary; empty if the key is missing."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            self.refuse(f"{key} must be a dictionary, got {value!r}")
        return value

    def refuse(self, message: str) -> NoReturn:
        """Raises ValueError with the name of this dictionary."""
        raise ValueError(one_line(f"{self.name}: {message}"))

    def resembles_missing(self, key: str) -> bool:
        """True if a key looks like a misspelling of a missing key."""
        missing = [name for name in self.read if self.values.get(name) is None]
        return bool(difflib.get_close_matches(key, missing, n=1, cutoff=0.93))

    def refuse_unread(
        self,
        constants: Mapping[str, tuple],
        inert: Callable[[str], object] = lambda key: False,
        elsewhere: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        """Raises ValueError for an unread key, unless the key is null, inert, or constant with an allowed value.

        Args:
          constants: the allowed values of keys that would change the computation at any other value.
          inert: true for keys that do not change the computation.
          elsewhere: the end of the message for keys that other families read.
        """
        for key in self._in_file:
            if key in self.read:
                continue
            if key in constants:
                self.one_of(key, *constants[key])
            elif self.values[key] is not None and not inert(key):
                advice = elsewhere.get(key) or did_you_mean(key, self.read)
                advice = advice or "; remove the key if it does not change the computation"
                raise ValueError(
                    one_line(f"{self.name} has an unknown key {key!r:.100} = {self.values[key]!r:.400}{advice}")
                )
