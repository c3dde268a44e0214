"""Estimates the cost of rotation on TPUs by the cost model of the TPU compiler.

    python -m benchmarks.tpu    # needs libtpu (pip install ".[tpu]"), but no TPU

The figures are a cost model's, not times: tpu_compiler.py says how far to trust them.

Predicted: to rotate is to read and to write q and k, 84 MB here, and about 5 operations an element, which is less
than the vector units can do while those bytes pass. So rotation alone is at the limit of the memory. Behind the
projection that makes q and k, 172 GFLOP, it adds what those bytes take over what those products take, at the
published peaks: 1/8 on v5e, 1/12 on v5p, 1/4 on v6e. What can spoil that is where features lie in registers of 128
lanes: halves of 64 fill them by half, neighbours in one register must change places, and a form that wants another
layout than the matrix products around it pays for copies.
"""

import functools
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from jax import lax

import rope_jax
from benchmarks.record import markdown, publish
from benchmarks.tpu_compiler import CHIPS, compiled, cost, plain_pass
from rope_jax.plot import COLOURS

TOKENS, WIDTH = 4096, 4096
DECODE_BATCH, DECODE_CAPACITY = 8, 8192
SCHEDULE = rope_jax.Standard(base=500_000.0)
LAYOUTS = get_args(rope_jax.core.Layout)
BYTES_BAR, CYCLES_BAR, ALIKE = 1.1, 1.25, 1.05
ASKED = "v5e", "v6e"


class Heads(NamedTuple):
    queries: int
    keys: int
    head_dim: int
    rotary_dim: int


HEADS = Heads(32, 8, 128, 128)
OTHER_HEADS = {
    "heads of 64": Heads(64, 16, 64, 64),
    "heads of 256": Heads(16, 4, 256, 256),
    "half of each head": Heads(32, 8, 128, 64),
}

OTHER_HEADS_FORMS = (
    "no rotation",
    "rope_jax.Rope, half",
    "rope_jax.Rope, interleaved",
    "split and concatenate",
    "strided slices",
)

# ------------------------------------------------------------------------------------------------- the forms


class Form(NamedTuple):
    layout: rope_jax.core.Layout
    turn: Callable  # Rotation -> what the form takes in its place, made once for all layers
    rotate: Callable  # q, k, that -> q, k


def split_and_concatenate(x, cos, sin):
    x1, x2 = jnp.split(x, 2, -1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def rotate_half(x, cos, sin):
    x1, x2 = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-x2, x1], -1) * sin


def strided_slices(x, cos, sin):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).reshape(x.shape)


def complex_product(x, turn):
    product = lax.complex(x[..., ::2], x[..., 1::2]) * turn
    return jnp.stack([product.real, product.imag], -1).reshape(x.shape)


def of_both(rotate: Callable) -> Callable:
    """From a rotation of one array that of q and k."""
    return lambda q, k, turn: (rotate(q, turn), rotate(k, turn))


def in_float32(formula: Callable, rotary_dim: int) -> Callable:
    """The formula as ours computes it: rounded once, and features from R on pass."""

    def rotate(x, turn):
        turned = formula(x[..., :rotary_dim].astype(jnp.float32), *(part[..., None, :] for part in turn))
        return jnp.concatenate([turned.astype(x.dtype), x[..., rotary_dim:]], -1)

    return rotate


def forms(heads: Heads) -> dict[str, Form]:
    """Ours through its public doors, then the formulas of others."""
    found = {}
    for layout in LAYOUTS:
        rope = rope_jax.Rope(heads.head_dim, SCHEDULE, heads.rotary_dim, layout)
        rotate = functools.partial(rope_jax.rotate, layout=layout)
        found[f"rope_jax.rotate, {layout}"] = Form(layout, lambda turn: turn, of_both(rotate))
        each = functools.partial(lambda rope, q, k, turn: tuple(rope.rotate_all([q, k], turn)), rope)
        found[f"rope_jax.Rope.rotate_all, {layout}"] = Form(layout, lambda turn: turn, each)
        found[f"rope_jax.Rope, {layout}"] = Form(layout, lambda turn: jnp.arange(turn.cos.shape[-2])[None], rope)
        forbidden = functools.partial(rope_jax.rotate, layout=layout, implementation="xla")
        found[f"rope_jax by XLA, {layout}"] = Form(layout, lambda turn: turn, of_both(forbidden))
    others = {
        "split and concatenate": ("half", tuple, split_and_concatenate),
        "rotate_half": ("half", lambda turn: [jnp.concatenate([part, part], -1) for part in turn], rotate_half),
        "strided slices": ("interleaved", tuple, strided_slices),
        "complex product": ("interleaved", lambda turn: [lax.complex(*turn)], complex_product),
    }
    for name, (layout, turn, formula) in others.items():
        found[name] = Form(layout, turn, of_both(in_float32(formula, heads.rotary_dim)))
    return found


def check(heads: Heads, tokens: int = 32) -> None:
    """Raises AssertionError if a form or its derivative is not that of `rope_jax.rotate`, computed here."""
    shapes = [(1, tokens, count, heads.head_dim) for count in (2, 1)]
    given = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
    rotation = rope_jax.rotation(jnp.arange(tokens)[None], SCHEDULE(heads.rotary_dim))

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(rotate, turn):
        forward, pull = jax.vjp(lambda q, k: rotate(q, k, turn), *given)
        return [x.astype(jnp.float32) for x in (*forward, *pull(tuple(given)))]

    for form in forms(heads).values():
        ours = both_ways(of_both(functools.partial(rope_jax.rotate, layout=form.layout)), rotation)
        for x, expected in zip(both_ways(form.rotate, form.turn(rotation)), ours, strict=True):
            # One step of bfloat16, where float32 sums of another order round to its other side.
            np.testing.assert_allclose(x, expected, rtol=2**-7, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the programs


class Job(NamedTuple):
    program: str
    form: str  # the first of a program is its floor
    function: Callable
    args: tuple
    free_layouts: bool
    donate: tuple[int, ...] = ()


def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def rotations(heads: Heads) -> dict[str, tuple[Callable, Any]]:
    """Of each form the function, and the shape of what it takes in the place of a rotation."""
    part = shape(1, TOKENS, heads.rotary_dim // 2, dtype=jnp.float32)
    turn = rope_jax.Rotation(part, part)
    return {name: (form.rotate, jax.eval_shape(form.turn, turn)) for name, form in forms(heads).items()}


def backward(function: Callable, first: int) -> Callable:
    """From cotangents of the results, and the arguments, to the cotangents of the first few of those."""

    def pulled(cotangents, *args):
        _, pull = jax.vjp(lambda *some: function(*some, *args[first:]), *args[:first])
        return pull(cotangents)

    return pulled


def rotation_jobs() -> Iterator[Job]:
    """Nothing but the rotation, in the layouts that suit it and in those that arrays have by default."""
    q, k = (shape(1, TOKENS, count, HEADS.head_dim) for count in (HEADS.queries, HEADS.keys))
    doubled = {"q and k doubled": (lambda q, k, turn: (q * 2, k * 2), ())}
    for name, (rotate, turn) in (doubled | rotations(HEADS)).items():
        yield Job("rotation", name, rotate, (q, k, turn), True, (0, 1))
        yield Job("rotation, backward", name, backward(rotate, 2), ((q, k), q, k, turn), True, (0,))
        yield Job("rotation, default layouts", name, rotate, (q, k, turn), False, (0, 1))


def projection_jobs() -> Iterator[Job]:
    """x to q and k, rotated."""
    nothing = {"no rotation": (lambda q, k, turn: (q, k), ())}
    for kind, heads in {"": HEADS, **OTHER_HEADS}.items():
        x = shape(1, TOKENS, WIDTH)
        kernels = [shape(WIDTH, count, heads.head_dim) for count in heads[:2]]
        cotangents = tuple(shape(1, TOKENS, count, heads.head_dim) for count in heads[:2])
        for name, (rotate, turn) in (nothing | rotations(heads)).items():

            def projected(x, query, key, turn, rotate=rotate):
                return rotate(*(jnp.einsum("btd,dnh->btnh", x, kernel) for kernel in (query, key)), turn)

            args = (x, *kernels, turn)
            if heads is HEADS:
                yield Job("projection + rotation", name, projected, args, True)
                pulled = backward(projected, 3)
                yield Job("projection + rotation, backward", name, pulled, (cotangents, *args), True)
            elif name in OTHER_HEADS_FORMS:
                yield Job(f"projection + rotation, {kind}", name, projected, args, True)


def attention_jobs() -> Iterator[Job]:
    """A whole layer on a prompt, its gradient, and its next token; parameters lie as they always do."""
    ropes = {f"rope_jax.Rope, {a}": rope_jax.Rope(HEADS.head_dim, SCHEDULE, layout=a) for a in LAYOUTS}
    for name, rope in {"no rotation": None, **ropes}.items():
        layer = rope_jax.RotaryAttention(
            num_heads=HEADS.queries,
            num_kv_heads=HEADS.keys,
            head_dim=HEADS.head_dim,
            rope=rope,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
        )
        x, token = shape(1, TOKENS, WIDTH), shape(DECODE_BATCH, 1, WIDTH)
        params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))
        row = dict(batch=DECODE_BATCH, capacity=DECODE_CAPACITY, num_kv_heads=HEADS.keys, head_dim=HEADS.head_dim)
        cache = jax.eval_shape(functools.partial(rope_jax.init_cache, **row, dtype=jnp.bfloat16))

        def total(params, x, layer=layer):
            return layer.apply(params, x).sum()

        def step(params, x, cache, layer=layer):
            return layer.apply(params, x, cache=cache)

        yield Job("attention layer", name, layer.apply, (params, x), False)
        yield Job("attention layer, gradient", name, jax.grad(total, (0, 1)), (params, x), False)
        yield Job("decode step", name, step, (params, token, cache), False, (2,))


def costs(topology: str) -> dict:
    """The cost of each form in each program, or why there is none."""
    chip = CHIPS[topology]
    found: dict[str, dict[str, dict]] = {}
    for program, form, function, args, free_layouts, donate in (
        *rotation_jobs(),
        *projection_jobs(),
        *attention_jobs(),
    ):
        try:
            one = cost(chip, *compiled(chip, function, *args, free_layouts=free_layouts, donate=donate))
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            one = {"not measured": str(error).splitlines()[0]}
        found.setdefault(program, {})[form] = one
    return found


def measure(topologies: Sequence[str] = tuple(CHIPS)) -> dict:
    for heads in (HEADS, *OTHER_HEADS.values()):
        check(heads)
    read_and_written = 2 * 2 * TOKENS * (HEADS.queries + HEADS.keys) * HEADS.head_dim  # bfloat16
    return {
        "bytes of q and k": read_and_written,
        "chips": {
            name: {
                **CHIPS[name]._asdict(),
                "plain pass over bandwidth": plain_pass(CHIPS[name]),
                "programs": costs(name),
            }
            for name in topologies
        },
    }


# -------------------------------------------------------------------------------------- tables and picture

SHOWN = ("projection + rotation", "projection + rotation, backward", "attention layer", "decode step")
DOORS = {
    "rope_jax.rotate": "rotate, of q and of k: two launches",
    "rope_jax.Rope.rotate_all": "rotate_all: one",
    "rope_jax.Rope": "Rope: one, and its angles",
}
WRITTEN_BY = {
    "split and concatenate": "Gemma, Flax, MaxText",
    "rotate_half": "transformers",
    "strided slices": "GPT-J",
    "complex product": "Llama",
}
NOT_TIMES = (
    "These are estimates of the TPU compiler's cost model, **not times**. It has none for a Pallas kernel: that is "
    "counted by its bytes over the chip's published bandwidth, and in parentheses at the slower rate that the "
    "compiler gives its own plain pass over memory."
)


def over_floor(chip: dict, program: str, form: str) -> tuple[float, float]:
    """Cycles over those of the program's first form: kernels by bandwidth, and as the compiler counts a pass."""
    costs = chip["programs"][program]
    if "cycles" not in costs.get(form, {}):
        return math.nan, math.nan
    one, floor = costs[form], next(iter(costs.values()))["cycles"]
    as_pass = one["cycles"] + (chip["plain pass over bandwidth"] - 1) * one["of kernels"]
    return one["cycles"] / floor, as_pass / floor


def traffic(result: dict, chip: dict, form: str) -> tuple[float, float]:
    """Bytes that pass through HBM in rotation alone, over those of q and k read and written once."""
    moved = chip["programs"]["rotation"].get(form, {}).get("HBM bytes", math.nan)
    return (moved / result["bytes of q and k"],) * 2


def said(low: float, high: float) -> str:
    if math.isnan(low):
        return "-"
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} ({high:.2f})"


def bars(result: dict) -> str:
    """What is asked of ours, and the worst that it is, by each door."""
    chips, program = [result["chips"][name] for name in ASKED if name in result["chips"]], SHOWN[0]

    def worst(door: str) -> list[str]:
        half, interleaved = (
            np.array([over_floor(chip, program, f"{door}, {layout}") for chip in chips]) for layout in LAYOUTS
        )
        moved = [traffic(result, chip, f"{door}, {layout}") for chip in chips for layout in LAYOUTS]
        figures = np.max(moved, 0), np.maximum(half, interleaved).max(0), (interleaved / half).max(0)
        return [said(*each) for each in figures]

    asked = (
        ("rotation alone: bytes over those of q and k", BYTES_BAR),
        (f"{program}: cycles over the projection", CYCLES_BAR),
        (f"{program}: interleaved over half", ALIKE),
    )
    cells = [(what, f"{bar}", *each) for (what, bar), *each in zip(asked, *map(worst, DOORS), strict=True)]
    return markdown((f"asked on {' and '.join(ASKED)}; the worst of", "at most", *DOORS.values()), cells)


def table(kept: dict) -> str:
    """The short table: each form beside the same program without rotation."""
    result = kept["result"]
    chips = result["chips"].values()
    cells = []
    for form in next(iter(chips))["programs"][SHOWN[0]]:
        ratios = [[traffic(result, chip, form) for chip in chips]]
        ratios += [[over_floor(chip, program, form) for chip in chips] for program in SHOWN]
        written = [" / ".join(said(*each) for each in column) for column in ratios]
        who = f" ({WRITTEN_BY[form]})" if form in WRITTEN_BY else ""
        cells.append([form + who, *("-" if set(each) <= set("- /") else each for each in written)])
    return "\n".join(
        [
            f"On {' / '.join(result['chips'])}: bytes through HBM in rotation alone, over those of q and k read "
            f"and written once; then cycles over those of the program without rotation. {NOT_TIMES}",
            "",
            markdown(("form", "rotation alone, bytes", *SHOWN), cells),
            "",
            bars(result),
        ]
    )


def whole_table(kept: dict) -> str:
    """Every figure of every program on every chip."""
    result = kept["result"]
    lines = [
        f"`{kept['command']}`: jax {kept['jax']}, libtpu {kept['packages']['libtpu']}, {kept['date']}. q and k are "
        f"read and written in {result['bytes of q and k'] / 1e6:.1f} MB. {NOT_TIMES} HBM bytes are read from the "
        "layouts of the optimised program, an operand that is used in part counting whole (the cache of a decode "
        "step); bytes accessed are the compiler's own count, those of on-chip memory included."
    ]
    for name, chip in result["chips"].items():
        lines += [
            "",
            f"## {name}: {chip['bandwidth'] / 1e9:.0f} GB/s, {chip['clock'] / 1e9} GHz",
            "",
            f"The compiler counts {chip['plain pass over bandwidth']:.2f} times the bandwidth for a plain pass.",
        ]
        for program, costs in chip["programs"].items():
            names = next(iter(costs.values()))
            cells = [
                [form, said(*over_floor(chip, program, form)), *(f"{figure:,}" for figure in one.values())]
                if "cycles" in one
                else [form, f"not measured: {one['not measured']}", *["-"] * len(names)]
                for form, one in costs.items()
            ]
            lines += ["", markdown((program, "over the first", *names), cells)]
    return "\n".join(lines) + "\n"


def draw(kept: dict) -> matplotlib.figure.Figure:
    """Cycles over the floor by form and chip; a line reaches to a kernel counted as the compiler counts a pass."""
    chips = kept["result"]["chips"]
    shown = {"rotation": "doubling q and k", SHOWN[0]: "the projection", "decode step": "a step without"}
    figure = matplotlib.figure.Figure(figsize=(13, 5.5), layout="constrained")
    first = next(iter(chips.values()))["programs"]
    forms_shown = [form for form in first[SHOWN[0]] if form in first["rotation"]]
    high = 0.8 / len(chips)
    for axes, (program, floor) in zip(figure.subplots(1, 3, sharey=True), shown.items(), strict=True):
        for i, (name, chip) in enumerate(chips.items()):
            low, most = np.array([over_floor(chip, program, form) for form in forms_shown]).T
            places = np.arange(len(forms_shown)) + high * (i - (len(chips) - 1) / 2)
            axes.barh(places, low, high, color=COLOURS[i], label=name)
            axes.hlines(places, low, most, color="black", linewidth=1)
        axes.axvline(1, color="black", linestyle=":", linewidth=1.2)
        axes.set(title=program, xlabel=f"cycles over {floor}", xlim=0)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    axes.set_yticks(range(len(forms_shown)), forms_shown)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(chips), frameon=False)
    figure.suptitle("Rotation on TPUs as the compiler's cost model estimates it: not times")
    return figure


if __name__ == "__main__":
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("not measured: libtpu is not installed")
    jax.config.update("jax_platforms", "cpu")  # nor is a TPU looked for
    publish(__file__, measure(), table, draw, packages=["libtpu"])
    kept = Path(__file__).parent / "results" / "tpu.json"
    kept.with_suffix(".md").write_text(whole_table(json.loads(kept.read_text())))
