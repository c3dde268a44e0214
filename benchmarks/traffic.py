"""Counts the bytes that a program with loops moves through memory, from its optimised text for a TPU or a GPU.

A loop counts as often as its condition says, or as often as the caller says if that depends on data. Of an array
that an instruction reads or overwrites in part, only the part counts.
"""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.tpu_compiler import arrays

FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "after-all", "partition-id"}
INDEXING = {"add", "subtract", "multiply", "minimum", "maximum", "compare", "select", "clamp", "convert"}
PASSING = {"bitcast", "reshape", "copy", "get-tuple-element", "optimization-barrier"}


class Line(NamedTuple):
    name: str
    result: str  # its type
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool

    @property
    def called(self) -> str | None:
        found = re.search(r"\b(?:calls|to_apply)=%([\w.-]+)", self.rest)
        return found and found[1]


def size(text: str) -> int:
    """Bytes in memory outside the chip of the arrays that a type names."""
    return sum(array.bytes for array in arrays(text) if array.in_hbm)


class Program:
    """An optimised program, as its computations."""

    def __init__(self, hlo: str, dynamic_trips: int = 1):
        self.dynamic_trips = dynamic_trips
        self.computations: dict[str, list[Line]] = {}
        self.entry = ""
        lines: list[Line] = []
        for text in hlo.splitlines():
            if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", text):
                lines = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif parts := re.match(r"\s+(ROOT )?%(\S+) = (.*?) ([\w-]+)\(([^)]*)\)(.*)", text):
                root, name, result, opcode, operands, rest = parts.groups()
                is_literal = opcode in ("parameter", "constant")
                named = [operands] if is_literal else re.findall(r"%([\w.-]+)", operands)
                lines.append(Line(name, result, opcode, named, rest, bool(root)))

    def trips(self, line: Line) -> int:
        """How often a loop's body runs."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%([\w.-]+)", line.rest)[1]]
        by_name = {each.name: each for each in condition}
        root = next(each for each in condition if each.is_root)
        bounds = [by_name[name] for name in root.operands if by_name[name].opcode == "constant"]
        if root.opcode == "compare" and len(bounds) == 1:
            return int(bounds[0].operands[0])
        return self.dynamic_trips

    def visits(self, computation: str | None = None, times: int = 1):
        """Each instruction that is launched, its computation, and how often."""
        for line in self.computations[computation or self.entry]:
            yield line, computation or self.entry, times
            bodies = re.findall(r"\b(?:body|condition)=%([\w.-]+)", line.rest) if line.opcode == "while" else []
            if line.opcode == "call":
                bodies = [line.called]
            if line.opcode == "conditional":
                branches = re.findall(r"(?:branch_computations=\{|(?:true|false)_computation=)([^}\s]*)", line.rest)
                bodies = re.findall(r"%([\w.-]+)", " ".join(branches))
            for body in bodies:
                yield from self.visits(body, times * (self.trips(line) if line.opcode == "while" else 1))

    def bytes_of(self, line: Line, computation: str) -> int:
        """What one instruction reads and writes."""
        if line.opcode in FREE or line.opcode in ("while", "call", "conditional") or line.opcode.endswith("-done"):
            return 0
        known = {each.name: each.result for each in self.computations[computation]}
        if line.opcode.endswith("-start"):  # a transfer: (to, from, ...)
            again = [each for each in self.computations[computation] if each.operands == line.operands]
            if "cross_program_prefetch" in line.rest and any(each.opcode == line.opcode for each in again[1:]):
                return 0  # for the first run alone: the end of each run fetches for the next
            ends = arrays(line.result)[:2]
            return min(each.bytes for each in ends) * sum(each.in_hbm for each in ends)
        total = self.written(line, known)
        for number, operand in enumerate(line.operands):
            if operand not in line.operands[:number]:
                whole = size(known[operand])
                total += min(whole, self.read(line, number, whole))
        return total

    def read(self, line: Line, number: int, whole: int) -> int:
        """Bytes that an instruction reads of one operand."""
        if line.opcode in ("dynamic-slice", "slice", "gather") and number == 0:
            return size_anywhere(line.result)
        if line.opcode in ("dynamic-update-slice", "scatter") and number == 0:
            return 0
        if line.opcode == "fusion":
            return self.read_inside(line.called, number, whole)
        return whole

    @functools.cache  # noqa: B019
    def read_inside(self, computation: str, number: int, whole: int) -> int:
        """Bytes that a fusion reads of one parameter."""
        lines = self.computations[computation]
        names = {next(each.name for each in lines if each.opcode == "parameter" and each.operands == [str(number)])}
        total = 0
        for line in lines:
            for place, operand in enumerate(line.operands):
                if line.opcode != "parameter" and operand in names:
                    if line.opcode in PASSING and not line.is_root:
                        names.add(line.name)
                    else:
                        total += self.read(line, place, whole)
        return min(total, whole)

    def written(self, line: Line, known) -> int:
        """Bytes that an instruction writes."""
        if line.opcode == "fusion":
            inside = self.computations[line.called]
            by_name = {each.name: each for each in inside}
            root = next(each for each in inside if each.is_root)
            while root.opcode in PASSING and root.operands and root.operands[0] in by_name:
                root = by_name[root.operands[0]]
            if root.opcode in ("dynamic-update-slice", "scatter") or (root.opcode == "fusion" and root.called):
                return min(size(line.result), self.written(root, {each.name: each.result for each in inside}))
        if line.opcode in ("dynamic-update-slice", "scatter"):
            update = line.operands[1 if line.opcode == "dynamic-update-slice" else 2]
            return min(size(line.result), size_anywhere(known[update]))
        return size(line.result)

    def bytes(self) -> int:
        """All that the program reads and writes."""
        return sum(times * self.bytes_of(line, computation) for line, computation, times in self.visits())

    def largest(self, count: int = 10) -> list[tuple[int, int, str]]:
        """The instructions that move most: bytes in all, how often, the name."""
        found = [(times * self.bytes_of(line, where), times, line.name) for line, where, times in self.visits()]
        return sorted(found, reverse=True)[:count]

    def cycles(self) -> int:
        """The TPU compiler's estimates; kernels and background copies have none."""
        total = 0
        for line, _, times in self.visits():
            if estimate := re.search(r'"estimated_cycles":"?(\d+)', line.rest):
                total += times * int(estimate[1])
        return total

    def launches(self) -> int:
        """Instructions that are launched, as often as they are."""
        not_launched = FREE | {"while", "call", "conditional"}
        return sum(times for line, _, times in self.visits() if line.opcode not in not_launched)

    def moves(self, least: int, kinds: Iterable[str] = ("copy", "transpose")) -> list[str]:
        """Copies of at least so many bytes to memory, alone or as a fusion that does nothing else."""
        nothing_else = FREE | PASSING | {"transpose", "dynamic-slice", "slice"} | INDEXING
        found = []
        for line, _, _ in self.visits():
            opcodes = {line.opcode}
            if line.opcode == "fusion":
                opcodes = {each.opcode for each in self.computations[line.called]}
            largest = max((array.bytes for array in arrays(line.result) if array.in_hbm), default=0)
            if opcodes & set(kinds) and opcodes <= nothing_else and largest >= least:
                found.append(line.name)
        return found


def size_anywhere(text: str) -> int:
    """Bytes of the arrays that a type names, wherever they are: what is sliced to the chip was read outside."""
    return sum(array.bytes for array in arrays(text))
