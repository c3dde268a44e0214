"""Times several calls in turns, so that a busy machine slows all of them alike."""

import collections
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax


def in_turns(calls: Mapping[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, until its arrays are ready. A first call, not counted, compiles it.

    The first call of a round finds the processor's caches cold, so the calls take turns to be first.
    """

    def timed(call: Callable) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return 1e3 * (time.perf_counter() - start)

    for call in calls.values():
        jax.block_until_ready(call())
    return in_rounds({name: functools.partial(timed, call) for name, call in calls.items()}, rounds)


def in_rounds(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each call measures of itself in each round; the calls take turns to be first."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    order = collections.deque(timed)
    for _ in range(rounds):
        for name in order:
            times[name].append(timed[name]())
        order.rotate(-1)
    return times


def ratios(times: Mapping[str, Sequence[float]], name: str, to: str) -> list[float]:
    """Quartiles of the time of call ``name`` over the time of call ``to`` in the same round."""
    return statistics.quantiles(
        [a / b for a, b in zip(times[name], times[to], strict=True)], n=4, method="inclusive"
    )
