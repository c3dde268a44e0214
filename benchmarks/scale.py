"""Compiles a training step of a 7B-shaped model for 1 to 256 chips; counts memory and communication.

    python -m benchmarks.scale        # libtpu, no TPU: compiled, not run; an hour or two on two CPU cores
    python -m benchmarks.scale 8k     # rows of so many tokens in blocks, without a ring: printed, not kept

One training step, forward, backward and AdamW, of the shape of Mistral 7B (Jiang et al. 2023, table 1), computed in
bfloat16, each block formed again in the backward pass. Parameters and two moments are float32 and divided over all
chips. A chip has all heads of 8,192 tokens, or of more where the chips are too few for a row. Attention goes around
the ring of the chips that share a row, in blocks, where that is a single chip too; "plain" forms the scores of all
of a chip's queries and all keys, as jax.nn.dot_product_attention does on a TPU.

Predicted: the state takes 12 bytes a parameter over the number of chips, 80.9 GiB on one, and the gradient a third
as much beside it; the residual streams of 8,192 tokens take 2 GiB, their logits and the gradient of these as much.
A step gathers the kernels in bfloat16 twice or more, 13.5 GiB each time, and scatters as much. In a layer a chip
passes k and v, 32 MiB for 8,192 tokens, to the next of s chips s - 1 times in each of three passes, and their
gradients in float32 s times: 2.4 GiB for s = 16.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import matplotlib.figure
from matplotlib import ticker

from benchmarks.record import markdown, publish
from examples import ahead_of_time
from rope_jax.plot import COLOURS

MISTRAL = dict(
    vocab_size=32_000, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336
)
CONTEXTS = {"8k": 2**13, "128k": 2**17, "1M": 2**20}
TOKENS = 2**13  # of a chip at a time, where the chips are enough
TOPOLOGIES = {
    "v5e": {1: "2x2", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {1: "2x2x1", 4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"},
}
MEMORY = {"v5e": 15.75, "v5p": 95.74}  # GiB of a chip, as the compiler counts them
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of so many tokens on a mesh: one row for each place along data."""

    length: int
    data: int
    sequence: int
    model: int = 1
    attention: str = "ring"

    @property
    def chips(self) -> int:
        return self.data * self.sequence * self.model


def cases() -> list[Case]:
    """By context and chips; then otherwise on all of them: heads divided among eight, and plain attention."""
    found = []
    for length in CONTEXTS.values():
        for chips in TOPOLOGIES["v5e"]:
            sequence = min(chips, length // TOKENS)
            found.append(Case(length, chips // sequence, sequence))
        most = found[-1]
        sequence = min(most.chips // 8, length // TOKENS)
        found.append(Case(length, most.chips // 8 // sequence, sequence, model=8))
        found.append(dataclasses.replace(most, attention="plain"))
    return found


def without_ring(length: int) -> list[Case]:
    """Each row on a chip of its own, in blocks: the layer's default in a program that XLA divides."""
    return [Case(length, chips, 1, attention="blocks") for chips in (16, 256)]


# ------------------------------------------------------------------------------------- what a program sends

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
RING = "ring attention"  # whose permutes are told apart: the compiler makes permutes of gathers and scatters too


class Instruction(NamedTuple):
    """One line of optimised HLO: ``%name = shape opcode(arguments), attributes``."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def called(self) -> dict[str, list[str]]:
        """The computations that are part of it, by what they are to it: its body, its branches, ..."""
        found = re.findall(r"(\w+)=\{?((?:%[\w.-]+(?:, )?)+)", self.attributes)
        return {role: re.findall(r"%([\w.-]+)", names) for role, names in found}


def computations(hlo: str) -> dict[str, dict[str, Instruction]]:
    """The computations of a program by name, each by the names of its lines; ENTRY is where it begins."""
    found: dict[str, dict[str, Instruction]] = {}
    for line in hlo.splitlines():
        if begin := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            body = found["ENTRY" if begin[1] else begin[2]] = {}
        elif parts := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)", line):
            body[parts[1]] = Instruction(*parts.groups())
    return found


def bytes_of(shape: str) -> int:
    """Of an array or a tuple, as in ``(f32[8,128]{1,0:T(8,128)}, u32[])``."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size) for dtype, sizes in arrays)


def group_size(attributes: str) -> int:
    """How many devices a collective is among, in any of the three ways to write groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # an axis, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(f"replica_groups must be listed, tiled or of a mesh, got {attributes[:200]}")


def constant(lines: dict[str, Instruction], name: str) -> int:
    line = lines[name]
    while line.opcode == "copy":
        line = lines[line.operands[0]]
    if line.opcode != "constant":
        raise ValueError(f"a loop must count from, by and to below constants, got {line}")
    return int(line.arguments)


def trips(program: dict, lines: dict[str, Instruction], loop: Instruction) -> int:
    """How often a loop turns: its state has a counter."""
    condition, body = (program[loop.called[role][0]] for role in ("condition", "body"))
    *_, end = condition.values()
    *_, after = body.values()
    if end.opcode != "compare" or "direction=LT" not in end.attributes:
        raise ValueError(f"a loop must count to below a constant, got {end}")
    counter, bound = end.operands
    place = int(re.search(r"index=(\d+)", condition[counter].attributes)[1])
    start = constant(lines, lines[loop.operands[0]].operands[place])
    step = body[after.operands[place]]
    if step.opcode != "add":
        raise ValueError(f"a loop must count by a constant, got {step}")
    return math.ceil((constant(condition, bound) - start) / constant(body, step.operands[1]))


def share_sent(kind: str, attributes: str) -> float:
    """What a device sends of its operand when many do the same around a ring: the least that there is to send."""
    if kind in ("collective-permute", RING):
        return float(any(source != target for source, target in re.findall(r"\{(\d+),(\d+)\}", attributes)))
    others = group_size(attributes) - 1
    if kind == "all-gather":
        return others
    return (2 if kind == "all-reduce" else 1) * others / (others + 1)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """By kind of collective, in bytes of one device: its operands, and what it sends of them.

    What is in a loop counts as often as the loop turns, and of a conditional every branch does.
    """
    program = computations(hlo)

    def with_fusions(name: str) -> Iterator[tuple[str, Instruction]]:
        for line in program[name].values():
            yield name, line
            if line.opcode == "fusion":
                yield from with_fusions(line.called["calls"][0])

    @functools.cache
    def inside(name: str) -> Counter[tuple[str, str]]:
        total: Counter[tuple[str, str]] = Counter()
        chains = set()
        for home, line in with_fusions(name):
            kind = line.opcode.removesuffix("-start")
            if kind in KINDS:
                # One that goes on while others compute stands in all their fusions: a chain.
                chain = re.search(r'chain_id="(\d+)"', line.attributes)
                if chain and chain[1] in chains:
                    continue
                chains |= {chain[1]} if chain else set()
                if "/ppermute" in line.attributes:
                    kind = RING
                elif home.startswith("all-reduce-scatter"):  # a TPU's form of it: an all-reduce and a slice
                    kind = "reduce-scatter"
                size = sum(bytes_of(program[home][operand].shape) for operand in line.operands)
                total[kind, "operands"] += size
                total[kind, "sent"] += round(share_sent(kind, line.attributes) * size)
            elif line.opcode != "fusion":
                for called in itertools.chain(*line.called.values()):
                    inner = inside(called)
                    times = trips(program, program[home], line) if inner and line.opcode == "while" else 1
                    total.update({key: times * size for key, size in inner.items()})
        return total

    total = inside("ENTRY")
    kinds = [kind for kind in (*KINDS, RING) if (kind, "operands") in total]
    return {kind: {what: total[kind, what] for what in ("operands", "sent")} for kind in kinds}


# --------------------------------------------------------------------------------------------- the measurement


def needed(message: str) -> list[int] | None:
    """Bytes that a program needs and a chip has, from the words of a compiler that found them too few."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    if not found:
        return None
    sizes = zip(found.groups()[::2], found.groups()[1::2], strict=True)
    return [round(float(size) * 2 ** (10 * "BKMGT".index(unit))) for size, unit in sizes]


def compiled(generation: str, case: Case, sizes: dict) -> dict:
    """What the compiler says of one training step: bytes of a chip, or why there is no program."""
    devices = ahead_of_time.chips(f"{generation}:{TOPOLOGIES[generation][case.chips]}")[: case.chips]
    mesh = ahead_of_time.build_mesh(devices, case.data, case.sequence, case.model)
    model = ahead_of_time.build_model(mesh, case.attention == "ring", **sizes)
    if case.attention == "plain":
        model = model.clone(implementation="xla")  # all scores at once
    try:
        program = ahead_of_time.lower_training(model, mesh, batch=case.data, length=case.length).compile()
    except jax.errors.JaxRuntimeError as error:
        words = " ".join(str(error).split())
        found = needed(words)
        if found is None:
            return {"does not compile": words}
        return dict(zip(("does not fit", "of"), found, strict=True))
    memory = ahead_of_time.memory(program)
    return {
        "state": memory["arguments"],
        "peak": memory["peak"],
        "collectives": collectives(program.as_text()),
    }


def measure(sizes: dict, wanted: list[Case]) -> dict:
    mesh = ahead_of_time.build_mesh(jax.devices()[:1], 1, 1, 1)
    params = nn.unbox(ahead_of_time.variables(ahead_of_time.build_model(mesh, False, **sizes)))
    rows = []
    for case in wanted:
        rows.append(dataclasses.asdict(case) | {g: compiled(g, case, sizes) for g in TOPOLOGIES})
        print(rows[-1], file=sys.stderr)
    return {"sizes": sizes, "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), "cases": rows}


# --------------------------------------------------------------------------------------------- what is shown


def in_words(program: dict) -> str:
    """GiB of a chip at the peak, or why there are none."""
    if "does not compile" in program:
        return "does not compile"
    if "does not fit" in program:
        return f"does not fit: {program['does not fit'] / GIB:.1f}"
    return f"{program['peak'] / GIB:.1f}"


def with_program(row: dict) -> dict | None:
    """What is known of the generation that has a program; of the last of them, if there are two."""
    return next((row[g] for g in reversed(TOPOLOGIES) if "peak" in row[g]), None)


def sent(program: dict) -> tuple[float, float]:
    """GiB that a chip sends in a step: keys, values and their gradients, and everything else."""
    moved = {kind: part["sent"] / GIB for kind, part in program["collectives"].items()}
    ring = moved.pop(RING, 0.0)
    return ring, sum(moved.values())


def cells(row: dict) -> dict[str, str]:
    """All that is said of a case, by the title of its column; GiB of a chip, and GiB that it sends."""
    names = {length: name for name, length in CONTEXTS.items()}
    case = Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})
    program = with_program(row)
    ring, rest = (f"{size:.1f}" for size in sent(program)) if program else ("-", "-")
    peaks = {f"peak, {g} of {MEMORY[g]} GiB": in_words(row[g]) for g in TOPOLOGIES}
    return {
        "tokens in a row": names.get(case.length, str(case.length)),
        "chips": str(case.chips),
        "data x sequence x model": f"{case.data} x {case.sequence} x {case.model}",
        "tokens a chip": f"{case.length // case.sequence:,}",
        "attention": case.attention,
        "state": f"{program['state'] / GIB:.1f}" if program else "-",
        **peaks,
        "sent: keys and values": ring,
        "sent: kernels and all else": rest,
    }


def table(kept: dict) -> str:
    """The short table."""
    rows = [cells(row) for row in kept["result"]["cases"]]
    titles = [title for title in rows[0] if title not in ("tokens a chip", "state")]
    note = (
        f"GiB of each chip. One step: forward, backward, AdamW; {kept['result']['parameters'] / 1e9:.2f} billion "
        'parameters, divided with their moments over all chips. "Does not fit" names what it needs. "Plain" forms '
        f"all scores of a chip's queries. libtpu {kept['packages']['libtpu']}, jax {kept['jax']}, {kept['date']}: "
        f"`{kept['command']}`; [each in full](benchmarks/results/scale.md)."
    )
    return "\n".join([markdown(titles, ([row[title] for title in titles] for row in rows)), "", note])


def whole_table(kept: dict) -> str:
    """Every figure, and why a program does not compile."""
    result = kept["result"]
    rows = [cells(row) for row in result["cases"]]
    notes = [
        f"Compiled, not run: one training step (forward, backward, AdamW) of {result['parameters'] / 1e9:.2f} "
        "billion parameters; GiB of each chip's memory, and GiB that it sends. "
        f"libtpu {kept['packages']['libtpu']}, jax {kept['jax']}, {kept['date']}: `{kept['command']}`."
    ]
    for row, shown in zip(result["cases"], rows, strict=True):
        notes += [
            f"Rows of {shown['tokens in a row']} on {shown['chips']} chips of {generation} do not compile: {words}"
            for generation in TOPOLOGIES
            if (words := row[generation].get("does not compile"))
        ]
    table = markdown(list(rows[0]), (row.values() for row in rows))
    return "\n".join([table, "", *(f"- {note}" for note in notes)])


def draw(kept: dict) -> matplotlib.figure.Figure:
    """Memory at the peak, also where it is too much, and what a chip sends: a line for each context."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle("A training step of a 7B-shaped model, as compiled for TPUs, not run")
    peak, moved = figure.subplots(1, 2)
    for (name, length), colour in zip(CONTEXTS.items(), COLOURS, strict=False):
        rows = [
            row
            for row in kept["result"]["cases"]
            if (row["length"], row["model"], row["attention"]) == (length, 1, "ring")
        ]
        chips = [row["data"] * row["sequence"] for row in rows]
        for generation, marker in zip(TOPOLOGIES, "os", strict=True):
            programs = [row[generation] for row in rows]
            needs = [program.get("peak", program.get("does not fit", math.nan)) / GIB for program in programs]
            peak.plot(chips, needs, color=colour, marker=marker, label=f"{name} tokens in a row, {generation}")
        programs = [with_program(row) for row in rows]
        totals = [sum(sent(program)) if program else math.nan for program in programs]
        moved.plot(chips, totals, color=colour, marker="o")
    for generation, size in MEMORY.items():
        peak.axhline(size, color="0.4", linestyle=":")
        peak.annotate(f"a chip of {generation}", (256, size), ha="right", va="bottom", fontsize="small")
    peak.set(title="memory of a chip at the peak", ylabel="GiB")
    moved.set(title="sent by a chip in a step", ylabel="GiB")
    for axes in (peak, moved):
        axes.set(xlabel="chips", xscale="log", yscale="log")
        axes.set_xticks(list(TOPOLOGIES["v5e"]), list(TOPOLOGIES["v5e"]))
        axes.xaxis.set(minor_locator=ticker.NullLocator())
        axes.yaxis.set(major_locator=ticker.LogLocator(subs=(1.0, 2.0, 5.0)), major_formatter="{x:g}")
        axes.yaxis.set(minor_locator=ticker.NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(*peak.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for a chip cannot be read back here
    if sys.argv[1:]:
        rows = [cells(row) for row in measure(MISTRAL, without_ring(CONTEXTS[sys.argv[1]]))["cases"]]
        print(markdown(list(rows[0]), (row.values() for row in rows)))
        sys.exit()
    publish(__file__, measure(MISTRAL, cases()), table, draw, packages=["libtpu"])
    kept = Path(__file__).with_name("results") / "scale.json"
    kept.with_suffix(".md").write_text(whole_table(json.loads(kept.read_text())) + "\n")
