"""Times the compilation of a rotation, and counts the compilations.

    python -m benchmarks.compilation      # pip install ".[peers]" for those to compare with; one minute

Predicted: the time goes by the number of operations. Exact angles are four integer products and two polynomials,
written out, where a peer writes `cos` and `sin`: more operations than a peer's, and more time, once. (The times say
otherwise: what XLA makes of `cos` and `sin` takes it longer.) Positions are an argument, so that all steps of
decoding are one program; a rope is its fields, so that a rope built anew finds the program of its equal.
"""

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import matplotlib.figure

import rope_jax
from benchmarks.clock import in_turns, ratios
from benchmarks.peers import OURS, PACKAGES, PEERS, Recipe, peer
from benchmarks.record import markdown, publish
from rope_jax.plot import COLOURS

RECIPE = Recipe(layout="half", base=10_000.0, head_dim=128, rotary_dim=128, length=4096, dtype="bfloat16")
HEADS = 32, 8  # of q and of k
ROUNDS = 7
STEPS = 64  # of decoding; and ropes built anew


def shapes(rows: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of q, k and positions."""
    q, k = (jax.ShapeDtypeStruct((rows, length, n, RECIPE.head_dim), RECIPE.dtype) for n in HEADS)
    return q, k, jax.ShapeDtypeStruct((rows, length), jnp.int32)


def lower(function: Callable):
    """A whole sequence's q and k from positions; traced anew, with all that it calls."""
    jax.clear_caches()
    return jax.jit(lambda *arguments: function(*arguments)).lower(*shapes(1, RECIPE.length))


def compile_anew(function: Callable) -> None:
    lower(function).compile()


def programs(function: Callable, calls: Iterable[tuple], static: tuple[int, ...] = ()) -> int:
    """How many programs the calls need: jit traces the function once for each."""
    count = 0

    def counted(*arguments):
        nonlocal count
        count += 1
        return function(*arguments)

    jitted = jax.jit(counted, static_argnums=static)
    for arguments in calls:
        jitted(*arguments)
    return count


def decoding(steps: int) -> Iterable[tuple]:
    """One token in each of two rows, at rising positions."""
    q, k = (jnp.zeros(each.shape, each.dtype) for each in shapes(2, 1)[:2])
    return ((q, k, jnp.array([[step], [step + 7]], jnp.int32)) for step in range(steps))


def equal_ropes(count: int) -> Iterable[tuple]:
    """A step of decoding for each of several ropes, built anew from the same fields."""
    (arguments,) = decoding(1)
    for _ in range(count):
        yield rope_jax.Rope(RECIPE.head_dim, rope_jax.Standard(base=RECIPE.base)), *arguments


def measure(peers: Sequence[str] = tuple(PEERS), rounds: int = ROUNDS, steps: int = STEPS) -> dict:
    """Of each peer in jax: operations, quartiles of the time to trace, lower and compile, programs of decoding."""
    found: dict[str, dict] = {}
    calls: dict[str, Callable] = {}
    for name in peers:
        each = peer(name, RECIPE)
        if isinstance(each, str) or each.family != "jax":
            found[name] = {"not measured": each if isinstance(each, str) else "torch: no jax program"}
            continue
        without = isinstance(each.place, str)
        function = (lambda q, k, _, each=each: each.turn(q, k, None)) if without else each.place
        calls[name] = functools.partial(compile_anew, function)
        found[name] = {
            "operations": sum(" = " in line for line in lower(function).as_text().splitlines()),
            "decoding": each.decode if isinstance(each.decode, str) else programs(each.decode, decoding(steps)),
        }
    times = in_turns(calls, rounds)
    for name in calls:
        quartiles = statistics.quantiles(times[name], n=4, method="inclusive")
        found[name]["milliseconds"] = [round(q, 1) for q in quartiles]
        found[name]["over ours"] = [round(q, 3) for q in ratios(times, name, OURS)]
    ropes = programs(lambda rope, *arguments: rope(*arguments), equal_ropes(steps), static=(0,))
    return {"rounds": rounds, "steps": steps, "equal ropes": ropes, "found": found}


def timed(kept: dict) -> dict[str, dict]:
    return {name: each for name, each in kept["result"]["found"].items() if "milliseconds" in each}


def table(kept: dict) -> str:
    result = kept["result"]
    steps = result["steps"]
    titles = [
        "",
        "operations",
        "ms",
        f"over {OURS}",
        f"programs in {steps} steps of decoding",
        f"for {steps} equal ropes",
    ]
    rows = []
    for name, each in timed(kept).items():
        low, middle, high = each["milliseconds"]
        time = f"{middle:.0f} ({low:.0f} to {high:.0f})"
        ropes = str(result["equal ropes"]) if name == OURS else ""
        rows.append(
            [name, f"{each['operations']}", time, f"{each['over ours'][1]:.2f}", f"{each['decoding']}", ropes]
        )
    return markdown(titles, rows)


def draw(kept: dict) -> matplotlib.figure.Figure:
    """Time against the number of operations."""
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, each), colour, marker in zip(timed(kept).items(), COLOURS, "os^Dv*P", strict=False):
        low, middle, high = each["milliseconds"]
        axes.errorbar(
            each["operations"], middle, [[middle - low], [high - middle]], marker=marker, color=colour, label=name
        )
    axes.set(
        xlabel="operations of the lowered program", ylabel="milliseconds to compile, quartiles", ylim=0, xlim=0
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # what a disk remembers is not compiled
    publish(__file__, measure(), table, draw, packages=PACKAGES)
