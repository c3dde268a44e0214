"""Registers the values of rope_jax for jax.export and flax.serialization, each with the version of its fields.

A serialized program of :mod:`jax.export` takes and returns such values. The process that reads the program imports
rope_jax first. :func:`flax.serialization.to_bytes` writes them, and ``from_bytes`` restores them into a value with
the same static fields, and arrays of the same rank. As always in Flax, the sizes are those that were written.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.serialization
import jax.export
import numpy as np

from rope_jax._checks import shown
from rope_jax.core.angles import Rotation
from rope_jax.core.composed_schedules import Affine, Axial, Negated, Sections
from rope_jax.core.length_schedules import DynamicNTK, LongRope
from rope_jax.core.rope import Rope
from rope_jax.core.schedules import Linear, Llama3, NTKAware, Proportional, Standard, Yarn

T = TypeVar("T", bound=type)
VERSION = 2  # of the fields of all registered types; another number for another set of fields

_SCHEDULES = Affine, Axial, DynamicNTK, Linear, Llama3, LongRope, Negated, NTKAware, Proportional, Sections
_KNOWN = {cls.__name__: cls for cls in (*_SCHEDULES, Standard, Yarn, Rope)}


def serializable(cls: T) -> T:
    """Registers a dataclass that is a pytree, or a NamedTuple: a decorator."""
    name = f"rope_jax.{cls.__name__}"
    if not dataclasses.is_dataclass(cls):  # flax writes every NamedTuple by its fields

        def make(_, children):
            return cls(*children)

        _register_for_export(cls, name, lambda _: {}, lambda _: None, from_children=make)
        return cls
    fields = dataclasses.fields(cls)
    static = [field.name for field in fields if field.metadata.get("static")]
    arrays = [field.name for field in fields if field.name not in static]

    def write(values) -> dict:
        return {field: _write(value, f"{name}.{field}") for field, value in zip(static, values, strict=True)}

    def read(written: dict) -> tuple:
        return tuple(_read(written[field]) for field in static)

    _register_for_export(cls, name, write, read)

    def to_state(value) -> dict[str, Any]:
        state = {field: flax.serialization.to_state_dict(getattr(value, field)) for field in arrays}
        return state | {"version": VERSION} | {field: _text(getattr(value, field)) for field in static}

    def from_state(target, state: Mapping[str, Any]):
        if not isinstance(state, Mapping):
            raise TypeError(f"state of {name} must be a mapping of its fields, got {shown(state)}")
        _check_version(name, state.get("version"))
        if state.keys() != {"version", *arrays, *static}:
            wanted = sorted({*arrays, *static})
            raise ValueError(f"state of {name} must have the fields {wanted}, got {sorted(map(str, state))}")
        for field in static:
            if state[field] != (text := _text(getattr(target, field))):
                raise ValueError(
                    f"target.{field} must be as written in the state of {name}, {state[field]}, got {text}"
                )
        restored = {
            field: flax.serialization.from_state_dict(getattr(target, field), state[field], field)
            for field in arrays
        }
        for field, value in restored.items():
            ranks = [jax.tree.map(np.ndim, array) for array in (value, getattr(target, field))]
            if ranks[0] != ranks[1]:
                raise ValueError(
                    f"target.{field} must have the rank of the state of {name}, {ranks[0]}, got {ranks[1]}: make "
                    "the target with the same num_layers and dtype"
                )
        return dataclasses.replace(target, **restored)

    flax.serialization.register_serialization_state(cls, to_state, from_state)
    return cls


def _register_for_export(cls, name: str, write, read, **options) -> None:
    def serialize(values) -> bytes:
        return json.dumps({"version": VERSION} | write(values)).encode()

    def deserialize(payload) -> Any:
        written = json.loads(bytes(payload))
        _check_version(name, written.get("version"))
        return read(written)

    jax.export.register_pytree_node_serialization(
        cls, serialized_name=name, serialize_auxdata=serialize, deserialize_auxdata=deserialize, **options
    )


def _check_version(name: str, version) -> None:
    if version != VERSION:
        raise ValueError(
            f"version of {name} must be {VERSION} in this rope_jax, got {version}: serialize it again, or install "
            "the rope_jax that wrote it"
        )


def _write(value, argument: str):
    """A static field as JSON: a number, a text, None, a tuple, or a rope or schedule of rope_jax."""
    if isinstance(value, np.generic):  # a number of numpy is equal to Python's, and has the same hash
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_write(each, argument) for each in value]
    if type(value) in _KNOWN.values():
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {type(value).__name__: {field: _write(each, argument) for field, each in fields.items()}}
    raise ValueError(
        f"{argument} must be made of schedules of rope_jax to be serialized, got {value!r}: "
        "pass dataclasses.replace(cache, rope=None)"
    )


def _read(written):
    """The value that :func:`_write` wrote."""
    if isinstance(written, list):
        return tuple(map(_read, written))
    if isinstance(written, dict):
        ((name, fields),) = written.items()
        if name not in _KNOWN:
            raise ValueError(f"schedule must be one of {', '.join(sorted(_KNOWN))}, got {name}")
        return _KNOWN[name](**{field: _read(each) for field, each in fields.items()})
    return written


def _text(value) -> str:
    """A static field as text, to be compared only: a schedule of your own by its ``repr``."""
    try:
        return json.dumps(_write(value, ""))
    except ValueError:
        return repr(value)


serializable(Rotation)
