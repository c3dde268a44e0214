"""Reads the cost of a program from the TPU compiler, on a machine without a TPU.

The figures are a cost model's, not times: they compare two forms of one computation. Their limits:

- The compiler estimates cycles for fusions and copies. It has no estimate for Pallas kernels (custom calls) or for
  background copies to on-chip memory. A kernel is counted by its bytes over the chip's bandwidth.
- The compiler counts its own simplest pass over memory at a slower rate, see `plain_pass`. A figure with a kernel
  is therefore shown at both rates; a good kernel lies between the two.
- The compiler's "bytes accessed" include on-chip memory, which can hold a whole q. The bytes through HBM are read
  from the layouts of the optimised program instead, padded to whole tiles.
"""

import math
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding


class Chip(NamedTuple):
    topology: str  # what libtpu calls the smallest slice of them
    bandwidth: float  # of HBM, bytes per second
    clock: float  # cycles per second


# Bandwidths as Google Cloud's page on each generation has them. No page has the clock; it is the peak bfloat16 rate
# given there (197, 459 and 918 TFLOP/s) over 2 operations in each of 2^16, 2^17 and 2^18 cells of the matrix units.
CHIPS = {
    "v5e": Chip("v5e:2x2", 819e9, 1.5e9),
    "v5p": Chip("v5p:2x2x1", 2765e9, 1.75e9),
    "v6e": Chip("v6e:2x2", 1640e9, 1.75e9),
}

# Or libtpu complains that it does not know what machine this is, and lets one process at a time load it.
NO_TPU_HERE = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compiled(
    chip: Chip, program: Callable, *args, free_layouts: bool, donate: tuple[int, ...] = ()
) -> tuple[str, int]:
    """The optimised program for one chip, as text, and the compiler's bytes accessed."""
    ready = executable(chip, program, *args, free_layouts=free_layouts, donate=donate)
    return ready.as_text(), int(ready.cost_analysis().get("bytes accessed", 0))  # which a kernel alone has not


def executable(chip: Chip, program: Callable, *args, free_layouts: bool, donate: tuple[int, ...] = ()):
    """The program compiled for one chip.

    With free layouts, the compiler chooses how arguments and results lie in memory, so that the program begins and
    ends without copies; else they lie in JAX's default order.
    """
    for name, value in NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    device = topologies.get_topology_desc(chip.topology, "tpu").devices[0]
    placed = Format(Layout.AUTO if free_layouts else None, SingleDeviceSharding(device))
    jitted = jax.jit(program, donate_argnums=donate, in_shardings=placed, out_shardings=placed)
    return jitted.lower(*args).compile()


# ------------------------------------------------------------------------------------- reading the program


class Array(NamedTuple):
    bytes: int  # in whole tiles
    in_hbm: bool


class Instruction(NamedTuple):
    opcode: str
    results: list[Array]
    operands: list[Array]
    is_kernel: bool
    cycles: int | None  # the compiler's estimate, if it has one

    @property
    def is_work(self) -> bool:
        """Whether something is computed or moved, in the foreground."""
        names = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "custom-call")
        return self.is_kernel or not (self.opcode in names or self.opcode.endswith(("-start", "-done")))


def arrays(text: str) -> list[Array]:
    """The arrays that a piece of HLO text writes out, as in ``bf16[8,64]{1,0:T(8,128)(2,1)S(1)}``.

    The braces hold the axes from the fastest to the slowest, the tile that the fastest are padded to, and S(n) for
    a memory other than HBM.
    """
    found = []
    for kind, sizes, order, tiles in re.findall(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*):?([^}]*)\})?", text):
        sizes = [int(size) for size in sizes.split(",") if size]
        fastest_first = [sizes[int(axis)] for axis in order.split(",") if axis] or sizes[::-1]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if tile:
            for axis, size in enumerate(reversed(tile[1].split(","))):
                if axis < len(fastest_first):
                    fastest_first[axis] += -fastest_first[axis] % int(size)
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        found.append(Array(math.prod(fastest_first) * bits // 8, not re.search(r"S\([1-9]", tiles)))
    return found


def instructions(hlo: str) -> list[Instruction]:
    """Those of the entry computation, in order; what is inside a fusion is one of them."""
    known: dict[str, list[Array]] = {}
    found = []
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        parts = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\(([^)]*)\)(.*)", line)
        if parts:
            name, results, opcode, operands, rest = parts.groups()
            known[name] = arrays(results)
            estimate = re.search(r'"estimated_cycles":"?(\d+)', rest)
            read = [array for operand in re.findall(r"%([\w.-]+)", operands) for array in known[operand]]
            is_kernel = 'custom_call_target="tpu_custom_call"' in rest
            found.append(Instruction(opcode, known[name], read, is_kernel, estimate and int(estimate[1])))
    return found


def hbm_bytes(instruction: Instruction) -> int:
    """What it reads and writes there. An operand that is read or overwritten in part counts whole."""
    opcode, results, operands, *_ = instruction
    if opcode.endswith("-start"):  # a transfer: (to, from, flag), or (from, to, flag) of a slice
        return min(each.bytes for each in results[:2]) * sum(each.in_hbm for each in results[:2])
    if not instruction.is_work:
        return 0
    return sum(each.bytes for each in (*results, *operands) if each.in_hbm)


def cost(chip: Chip, hlo: str, bytes_accessed: int) -> dict:
    """The cost of an optimised program; cycles are the compiler's estimates, and its kernels' by bandwidth.

    Raises:
      ValueError: if it has loops or branches: how often they are gone through is not known.
    """
    if re.search(r" (while|conditional)\(", hlo):
        raise ValueError("the program has loops or branches")
    entry = instructions(hlo)
    kernels = [each for each in entry if each.is_kernel]
    kernel_bytes = sum(array.bytes for each in kernels for array in (*each.results, *each.operands))
    kernel_cycles = by_bandwidth(chip, kernel_bytes)
    return {
        "cycles": sum(each.cycles or 0 for each in entry) + kernel_cycles,
        "of kernels": kernel_cycles,
        "HBM bytes": sum(map(hbm_bytes, entry)),
        "bytes accessed": bytes_accessed,
        "kernels": len(kernels),
        "kernel bytes": kernel_bytes,
        "copies": sum(each.opcode == "copy" for each in entry),
        "fusions": sum(each.opcode == "fusion" for each in entry),
        "without estimate": sum(each.is_work and not each.is_kernel and each.cycles is None for each in entry),
    }


def by_bandwidth(chip: Chip, size: float) -> int:
    """The cycles in which that many bytes pass through HBM."""
    return round(size / chip.bandwidth * chip.clock)


def plain_pass(chip: Chip) -> float:
    """Over bandwidth: what the compiler counts for reading a bfloat16 array and writing it doubled."""
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    found = cost(chip, *compiled(chip, lambda x: x * 2, x, free_layouts=False))
    return found["cycles"] / by_bandwidth(chip, 2 * x.size * x.dtype.itemsize)
