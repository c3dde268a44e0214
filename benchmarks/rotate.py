"""Times the rotation of q and k on a CPU, over reading and writing them, beside other libraries.

    python -m benchmarks.rotate      # pip install ".[peers]" for those to compare with; eight minutes on two cores

Predicted: the limit is `x * 2` over the same q and k, jitted: it reads 84 MB of float32 and writes as many.
Rotating also reads cos and sin, as much as one head of forty, and does three operations where the limit does one;
its backward pass is the same program with the sine negated. So both should take what the limit takes, or little
more. All heads share the angles: from positions should cost what one table costs (angles.py), half a millisecond.
One token in each of eight rows is all launch and no arithmetic.

Nothing is donated, as q and k would be in a training step: every form and the limit allocate what they return.
Fresh pages of memory cost a CPU several times what the limit does with them, and who gets fresh ones is luck; so
freed pages are kept, and the first rounds are not counted. torch peers have a limit of their own, torch's `x * 2`.
Each peer is compared with ours before it is timed; who computes something else is not timed.

XLA's loops depend on the processor: shorter sequences are timed again with narrower instruction sets, in processes
of their own, beside the plain formula. A form must be good on both sides of the 32 MB from which malloc maps pages.
"""

import ctypes
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import matplotlib.figure
import numpy as np
from matplotlib import ticker

from benchmarks.clock import in_turns, ratios
from benchmarks.peers import OURS, PACKAGES, PEERS, Peer, Recipe, backward, forward, own, peer, read
from benchmarks.record import markdown, publish
from rope_jax.plot import COLOURS

BASE = 10_000.0
LENGTH = 4096
FEATURES = 32 * 128, 8 * 128  # of all heads of q, and of k: as many bytes at every head_dim
ROWS = 8  # of one token each
WARM = 8  # rounds before the first that counts
ROUNDS = {"rotate": 15, "backward": 15, "from positions": 15, "one token": 301}
DOORS = {"rotate": "turn", "backward": "turn", "from positions": "place", "one token": "decode"}
DTYPES = ("bfloat16", "float32")
LAYOUTS = ("half", "interleaved")
HEAD_DIM = 128
OTHERS = (64, 64), (256, 256), (128, 64), (128, 32)  # head_dim, rotary_dim
GIVEN = f"{OURS}, rotation given"
PLAIN = "split and concatenate"
LENGTHS = 1024, 3500  # q of 8 and 29 MB in bfloat16, 17 and 57 MB in float32
NARROWER = "AVX2", "AVX"  # than the processor's own
SETS = {"avx512f": "AVX512", "avx2": "AVX2", "avx": "AVX"}
LIMITS = {"jax": "x * 2", "torch": "x * 2 in torch"}


def all_cases() -> Iterable[dict]:
    """One thing varies at a time, around whole heads of 128 by halves; each in both dtypes."""
    for form, layout, dtype in itertools.product(DOORS, LAYOUTS, DTYPES):
        yield dict(form=form, layout=layout, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM, dtype=dtype)
    for form, (head_dim, rotary_dim), dtype in itertools.product(("rotate", "backward"), OTHERS, DTYPES):
        yield dict(form=form, layout="half", head_dim=head_dim, rotary_dim=rotary_dim, dtype=dtype)


def length_cases() -> Iterable[dict]:
    """Whole and partial heads at several lengths, in every dtype."""
    for layout, rotary_dim, dtype, length in itertools.product(LAYOUTS, (128, 64), (*DTYPES, "float16"), LENGTHS):
        sizes = dict(head_dim=HEAD_DIM, rotary_dim=rotary_dim, length=length)
        yield dict(form="rotate", layout=layout, dtype=dtype, **sizes)


def instruction_set() -> str:
    """The widest that XLA may use here."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_cpu_max_isa=" in flags:
        return flags.split("--xla_cpu_max_isa=")[1].split()[0]
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return next((name for flag, name in SETS.items() if flag in found), "unknown")


# ------------------------------------------------------------------------------------------- the calls


def inputs(case: dict, length: int, features: Sequence[int], rows: int) -> tuple[np.ndarray, ...]:
    """q, k and positions: one row from 0 on, or one token in each of several rows."""
    shape, positions = (1, length), np.arange(length)[None]
    if case["form"] == "one token":
        shape, positions = (rows, 1), np.linspace(0, length - 1, rows)[:, None]
    rng = np.random.default_rng(0)
    heads = [count // case["head_dim"] for count in features]
    q, k = (rng.standard_normal((*shape, n, case["head_dim"]), np.float32) for n in heads)
    return q, k, positions.astype(np.int32)


def prepare(form: str, dtype: str, each: Peer, q, k, positions) -> Callable | str:
    """The call to be timed, with all it takes at hand; or why there is none."""
    door = getattr(each, DOORS[form])
    if form == "backward" and isinstance(door, str):
        door = each.place  # the forward pass has kept its cos and sin
    if isinstance(door, str):
        return door
    q, k = (own(each.family, x, dtype, each.heads_first) for x in (q, k))
    positions = own(each.family, positions, "int32")
    rest = each.rotation(positions) if door is each.turn else positions
    return (backward if form == "backward" else forward)(each.family, door, q, k, rest)


def doubled(q, k):
    return q * 2, k * 2


def keep_pages() -> None:
    """Has glibc keep what is freed, in one heap, however large; elsewhere it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
        if mallopt:
            mallopt(option, value)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# ------------------------------------------------------------------------------------------- right, then fast


def allowed(arithmetic: str, dtype: str, length: int, largest: float) -> float:
    """How far a right answer may lie from ours, where the largest feature is ``largest``.

    In ``x1 cos - x2 sin`` the two products are together at most the length r of the pair. With u half the spacing
    of a dtype's numbers at 1: cos and sin, the products and the difference, each rounded, cost 3 u r, and a last
    cast u r of its own; ours 4 u r in float32 and its cast. An angle in float32, after an exponent, a power and a
    product, is off by at most 8 u times its position.
    """
    u = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
    return math.sqrt(2) * largest * (3 * u[arithmetic] + 2 * u[dtype] + (4 + 8 * length) * u["float32"])


def compare(each: Peer, returned, want, dtype: str, bound: float) -> dict:
    """The largest difference from ours beside what arithmetic allows, and why it is not timed, if so."""
    got, dtypes = zip(*(read(each.family, x, each.heads_first) for x in returned), strict=True)
    far = max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True))
    found = {"largest difference": far, "allowed": bound}
    if set(dtypes) != {dtype}:
        found["not timed"] = f"returns {dtypes[0]} for {dtype}"
    elif not far <= bound:
        found["not timed"] = f"computes something else: differs by {far:.2g} where {bound:.2g} is allowed"
    return found


def checked_calls(case: dict, names: Sequence[str], length: int, features, rows: int) -> tuple[dict, dict, dict]:
    """What was found of each peer, the calls of those that are right, and the limit of each call."""
    form, dtype = case["form"], case["dtype"]
    q, k, positions = inputs(case, length, features, rows)
    largest = float(max(np.abs(q).max(), np.abs(k).max()))
    recipe = Recipe(case["layout"], BASE, case["head_dim"], case["rotary_dim"], length, dtype)
    rope = peer(OURS, recipe)
    want = [read("jax", x)[0] for x in prepare(form, dtype, rope, q, k, positions)()]
    found, calls, limits = {}, {}, {}
    for name in names:
        each = peer(name, recipe)
        call = each if isinstance(each, str) else prepare(form, dtype, each, q, k, positions)
        if isinstance(call, str):
            found[name] = {"not timed": call}
            continue
        found[name] = compare(each, call(), want, dtype, allowed(each.arithmetic, dtype, length, largest))
        if "not timed" not in found[name]:
            calls[name], limits[name] = call, LIMITS[each.family.split(".")[0]]
    if form == "from positions":
        calls[GIVEN], limits[GIVEN] = prepare("rotate", dtype, rope, q, k, positions), LIMITS["jax"]
    for family, limit in LIMITS.items():
        if limit in limits.values():
            calls[limit], limits[limit] = forward(family, doubled, *(own(family, x, dtype) for x in (q, k))), limit
    return found, calls, limits


def time_case(case: dict, names: Sequence[str], sizes: tuple, rounds: int, warm: int) -> dict:
    found, calls, limits = checked_calls(case, names, *sizes)
    in_turns(calls, warm)
    before = page_faults()
    times = in_turns(calls, rounds)
    faults = (page_faults() - before) / rounds
    for name in calls:
        three = {
            "milliseconds": statistics.quantiles(times[name], n=4, method="inclusive"),
            "over its limit": ratios(times, name, limits[name]),
            "over ours": ratios(times, name, OURS),
        }
        rounded = {key: [round(x, 4) for x in quartiles] for key, quartiles in three.items()}
        found[name] = found.get(name, {}) | rounded
    return {**case, "page faults in a round": faults, "found": found}


def measure(
    cases: Iterable[dict] | None = None,
    peers: Sequence[str] = tuple(PEERS),
    length: int = LENGTH,
    features: Sequence[int] = FEATURES,
    rows: int = ROWS,
    rounds: Mapping[str, int] = ROUNDS,
    warm: int = WARM,
) -> dict:
    """Quartiles of every peer in every case, round by round over its limit and over ours."""
    done = []
    for case in all_cases() if cases is None else cases:
        sizes_of_case = case.get("length", length), features, rows
        done.append(time_case(case, peers, sizes_of_case, rounds[case["form"]], warm))
        jax.clear_caches()
    sizes = {"length": length, "features of q and k": list(features), "rows": rows, "rounds": dict(rounds)}
    return {**sizes, "cases": done}


def measure_lengths() -> list[dict]:
    """The cases of several lengths beside the plain formula, with the instruction set of this process."""
    return measure(length_cases(), (OURS, PLAIN), rounds=dict.fromkeys(DOORS, 15), warm=4)["cases"]


def measure_lengths_with(instructions: str) -> list[dict]:
    """The same in another process, where XLA uses no wider instructions."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={instructions}"
    command = [sys.executable, "-m", "benchmarks.rotate", "lengths"]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------- the tables


def said(quartiles: Sequence[float], digits: str = ".2f") -> str:
    low, middle, high = (format(value, digits) for value in quartiles)
    return f"{middle} ({low} to {high})"


def compared(found: dict) -> list[str]:
    """The peers that were timed, the fastest first."""
    names = [name for name in found if name not in (OURS, GIVEN, *LIMITS.values()) and "over ours" in found[name]]
    return sorted(names, key=lambda name: found[name]["over ours"][1])


def table(kept: dict) -> str:
    """Whole heads of 128. How near we are to the limit, and the peers' time over ours."""
    cells: dict[tuple[str, str], list[str]] = {}
    titles = ["", "dtype"]
    for layout in LAYOUTS:
        titles += [f"{layout}: {OURS} over `x * 2`", f"fastest peer over {OURS}", f"slowest peer over {OURS}"]
    for case in kept["result"]["cases"]:
        if case["head_dim"] == case["rotary_dim"] == HEAD_DIM:
            found = case["found"]
            names = compared(found)
            ends = [f"{name} {found[name]['over ours'][1]:.2f}" for name in names[:1] + names[-1:]] or ["-", "-"]
            row = cells.setdefault((case["form"], case["dtype"]), [case["form"], case["dtype"]])
            row += [said(found[OURS]["over its limit"]), *ends]
    return markdown(titles, cells.values())


def tables(kept: dict) -> str:
    """Every case: medians (quartiles), round by round."""
    result = kept["result"]
    packages = ", ".join(f"{name} {version}" for name, version in kept["packages"].items())
    lines = [
        f"`{kept['command']}`: {kept['device']}, {kept['processor']}; Python {kept['python']}, jax {kept['jax']}, "
        f"{packages}; {kept['date']}. Medians (quartiles) of rounds in turn; {result['length']} tokens, or one "
        f"in each of {result['rows']} rows; {' and '.join(map(str, result['features of q and k']))} features of q "
        "and k in all heads."
    ]
    lines[0] += f" Instruction set: {result['instruction set']}."
    lines += [
        "## Instruction sets: rope_jax over `x * 2`, and the plain formula over rope_jax",
        lengths_table(result),
    ]
    titles = ["", "ms", "over its limit", "over rope_jax", "largest difference", "allowed"]
    for case in result["cases"]:
        found = case["found"]
        lines += [
            f"## {case['form']}, {case['layout']}, {case['rotary_dim']} of {case['head_dim']}, {case['dtype']}",
            markdown(
                titles,
                (
                    [
                        name,
                        said(each["milliseconds"], ".3g"),
                        *(said(each[key]) for key in ("over its limit", "over ours")),
                        *(f"{each[key]:.1e}" if key in each else "" for key in ("largest difference", "allowed")),
                    ]
                    for name, each in found.items()
                    if "milliseconds" in each
                ),
            ),
            "\n".join(f"- {name}: {each['not timed']}" for name, each in found.items() if "not timed" in each),
        ]
    return "\n\n".join(line for line in lines if line) + "\n"


def lengths_table(result: dict) -> str:
    """Medians at each length, a column for each instruction set."""
    rows: dict[tuple, list[str]] = {}
    for cases in result["lengths"].values():
        for case in cases:
            found = case["found"]
            key = case["layout"], f"{case['rotary_dim']} of {case['head_dim']}", case["dtype"], str(case["length"])
            pair = found[OURS]["over its limit"][1], found[PLAIN]["over ours"][1]
            rows.setdefault(key, list(key)).append(" and ".join(format(value, ".2f") for value in pair))
    return markdown(["layout", "rotated", "dtype", "tokens", *result["lengths"]], rows.values())


def draw(kept: dict) -> matplotlib.figure.Figure:
    """Times over ours at whole heads of 128: a row for each form and layout, a panel for each dtype."""
    cases = [case for case in kept["result"]["cases"] if case["head_dim"] == case["rotary_dim"] == HEAD_DIM]
    timed = [name for name in PEERS if any(name in compared(case["found"]) for case in cases)]
    styles = dict(zip(timed, zip(itertools.cycle(COLOURS), "osD^vXP*", strict=False), strict=False))
    styles[LIMITS["jax"]] = "0.6", "|"
    rows = list(dict.fromkeys((case["form"], case["layout"]) for case in cases))
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, 2, sharex=True, sharey=True), DTYPES, strict=True):
        for case in (case for case in cases if case["dtype"] == dtype):
            place = rows.index((case["form"], case["layout"]))
            for name, (colour, marker) in styles.items():
                if "over ours" in (each := case["found"].get(name, {})):
                    low, middle, high = each["over ours"]
                    size = 14 if name in LIMITS.values() else 6
                    axes.plot(middle, place, marker, color=colour, markersize=size, markeredgewidth=2, label=name)
                    axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axes.axvline(1, color="black", linewidth=1.2)
        axes.set(xscale="log", title=dtype, xlabel=f"time over {OURS}'s (line), quartiles of rounds in turn")
        axes.xaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_yticks(range(len(rows)), [f"{form}, {layout}" for form, layout in rows])
        axes.grid(alpha=0.3)
    figure.axes[0].invert_yaxis()
    labelled = dict(
        pair for axes in figure.axes for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    keep_pages()
    if sys.argv[1:] == ["lengths"]:
        print(json.dumps(measure_lengths()))
        sys.exit()
    lengths = {instruction_set(): measure_lengths(), **{name: measure_lengths_with(name) for name in NARROWER}}
    result = {"instruction set": instruction_set(), **measure(), "lengths": lengths}
    publish(__file__, result, table, draw, packages=PACKAGES)
    results = Path(__file__).parent / "results"
    results.joinpath("rotate.md").write_text(tables(json.loads(results.joinpath("rotate.json").read_text())))
