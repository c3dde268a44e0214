"""Counts what a leak makes grow: arrays, objects of Python, compilations."""

import gc
from typing import NamedTuple

import jax


class Counts(NamedTuple):
    arrays: int  # alive on the device
    objects: int  # containers that the garbage collector tracks
    compilations: int  # of this process, programs read from disk included


_compilations = 0


def _count(event, seconds, **_):
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def now() -> Counts:
    gc.collect()
    return Counts(len(jax.live_arrays()), len(gc.get_objects()), _compilations)


def assert_no_growth(before: Counts, after: Counts, *, arrays: int, objects: int) -> None:
    """Fails if more arrays or objects are alive than before, up to so many, or a program was compiled."""
    assert before.compilations > 0  # the event is counted
    grown = Counts(*(b - a for a, b in zip(before, after, strict=True)))
    assert grown.arrays <= arrays and grown.objects <= objects and grown.compilations == 0, grown
