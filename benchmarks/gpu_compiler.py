"""Reads kernels, bytes and widths of accesses from XLA's compiler for an H100, on a machine without a GPU.

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12  # in jax's version, 1.3 GB
    python -m benchmarks.gpu_compiler FOLDER   # as benchmarks.gpu runs it, in a process of its own

The figures are counts, not times. An access is a load or a store of global memory in the PTX of a program: `v4.b16`
moves four numbers of two bytes, a bare `b16` a single one, a fraction of what a thread can move at once.
"""

import collections
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import rope_jax
from benchmarks.record import markdown, versions

WHEELS = "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"
LENGTH, FEATURES = 4096, (32 * 128, 8 * 128)
WIDTHS = {"half": [(128, 128), (64, 64), (128, 64)], "interleaved": [(128, 128), (128, 64)]}  # head_dim, rotary_dim
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NO_KERNEL = ["parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "after-all"]

# ------------------------------------------------------------------------------------- reading the program


def array_bytes(text: str) -> int:
    """Bytes of all arrays that a piece of HLO text names, as in ``bf16[8,64]{1,0}``."""
    total = 0
    for kind, sizes in re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]", text):
        size = 1 if kind == "pred" else int(re.search(r"\d+", kind)[0]) // 8
        for length in filter(None, sizes.split(",")):
            size *= int(length)
        total += size
    return total


def kernel_bytes(hlo: str) -> list[int]:
    """Bytes that each kernel of the entry computation reads and writes, each array once."""
    known: dict[str, int] = {}
    found = []
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        parts = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\(([^)]*)\)", line)
        if parts:
            name, result, opcode, operands = parts.groups()
            known[name] = array_bytes(result)
            if opcode not in NO_KERNEL:
                found.append(known[name] + sum(known[each] for each in set(re.findall(r"%([\w.-]+)", operands))))
    return found


def accesses(ptx: str, kind: str) -> dict[str, int]:
    """How often each width of global load (``"ld"``) or store (``"st"``) stands in the PTX."""
    found = re.findall(kind + r"\.global((?:\.\w+(?:::\w+)?)*)\s", ptx)
    return dict(sorted(collections.Counter(width.replace(".nc", "").lstrip(".") for width in found).items()))


def executable(program: Callable, *args, donate: tuple[int, ...] = ()):
    """The program compiled for an H100."""
    device = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))

    return jax.jit(program, donate_argnums=donate).lower(*jax.tree.map(place, args)).compile()


def cost(program: Callable, dump: Path, *shapes) -> dict:
    """Kernels, bytes and accesses of a program; XLA writes its PTX to ``dump``."""
    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir()
    kernels = kernel_bytes(executable(program, *shapes).as_text())
    ptx = "".join(path.read_text() for path in dump.glob("*.ptx"))
    return {
        "kernels": len(kernels),
        "bytes": sum(kernels),
        "loads": accesses(ptx, "ld"),
        "stores": accesses(ptx, "st"),
    }


# ------------------------------------------------------------------------------------- the programs


def programs() -> Iterable[tuple[dict, Callable, list, int]]:
    """What is compiled, its arguments, and the least bytes: each argument and result once."""
    q, k = ((1, LENGTH, features) for features in FEATURES)
    cases = [(layout, *widths) for layout, each in WIDTHS.items() for widths in each]
    for (layout, head_dim, rotary_dim), dtype in itertools.product(cases, ("bfloat16", "float32")):
        x = jax.ShapeDtypeStruct((*q[:2], q[2] // head_dim, head_dim), dtype)
        part = jax.ShapeDtypeStruct((1, LENGTH, rotary_dim // 2), jnp.float32)
        rotate = functools.partial(rope_jax.rotate, layout=layout)

        def forward(x, cos, sin, rotate=rotate):
            return rotate(x, rope_jax.Rotation(cos, sin))

        def backward(x, cos, sin, forward=forward):
            return jax.vjp(lambda x: forward(x, cos, sin), x)[1](x)[0]

        def between(x, cos, sin, forward=forward):
            return forward(x * 2, cos, sin) + 1

        least = 2 * x.size * x.dtype.itemsize + 2 * part.size * part.dtype.itemsize
        case = dict(layout=layout, rotated=f"{rotary_dim} of {head_dim}", dtype=dtype)
        for name, program in dict(forward=forward, backward=backward, between=between).items():
            yield {**case, "program": name}, program, [x, part, part], least
    for layout in ("half", "interleaved"):
        rope = rope_jax.Rope(128, rope_jax.Standard(), layout=layout)
        xs = [jax.ShapeDtypeStruct((*x[:2], x[2] // 128, 128), jnp.bfloat16) for x in (q, k)]
        positions = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
        least = 4 * sum(x.size for x in xs) + 4 * LENGTH
        case = dict(layout=layout, rotated="128 of 128", dtype="bfloat16", program="q and k from positions")
        yield case, rope, [*xs, positions], least


def measure(module: str = "benchmarks.gpu_compiler") -> dict:
    """The compiler's figures from a process of its own, or why there are none."""
    missing = [name for name, version in versions(WHEELS).items() if version == "not installed"]
    if missing:
        return {"not compiled": f"{', '.join(missing)} not installed"}
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_gpu_autotune_level=0 --xla_dump_to={folder}/dump --xla_gpu_dump_llvmir=true"
        quiet = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": flags}
        command = [sys.executable, "-m", module, f"{folder}/dump"]
        done = subprocess.run(command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(cases: Iterable[Mapping]) -> str:
    """A row for each program."""

    def said(widths: Mapping[str, int]) -> str:
        return ", ".join(f"{count} {width}" for width, count in widths.items())

    keys = ["layout", "rotated", "dtype", "program"]
    rows = []
    for each in cases:
        counts = [str(each["kernels"]), f"{each['over the least']:.3f}"]
        rows.append([*(each[key] for key in keys), *counts, said(each["loads"]), said(each["stores"])])
    return markdown([*keys, "kernels", "bytes over the least", "loads", "stores"], rows)


if __name__ == "__main__":
    found = []
    for case, program, shapes, least in programs():
        figures = cost(program, Path(sys.argv[1]), *shapes)
        found.append({**case, **figures, "over the least": round(figures["bytes"] / least, 4)})
    print(json.dumps(found))
