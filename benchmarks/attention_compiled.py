"""Reads memory and traffic of attention from the compilers for TPUs and for an H100, on a machine without either.

    python -m benchmarks.attention_compiled    # libtpu for the TPUs; for the H100 the wheels of gpu_compiler.py
    python -m benchmarks.attention_compiled v5p h100    # some chips

The figures are counts and a cost model's, not times. What cannot be compiled here keeps the figures of before.

Predicted: a layer keeps x, q, k, v and the output of attention, 2 bytes for each of 10 to 18 thousand numbers a
token: 200 MB at 8k tokens, which the compiler overlays by half. The scores of 32 heads are 32 T^2 numbers, 4 bytes
each: 8.6 GB at 8k and 137 GB at 32k, more than a chip has. A decode step of 8 rows reads its weights, and the keys
and values of all rows, once. The product of one query fuses with the reading, so little else should move.
"""

import contextlib
import datetime
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import rope_jax
from benchmarks import gpu_compiler, tpu_compiler
from benchmarks.record import markdown, save, versions
from benchmarks.traffic import Program
from rope_jax.attention.paths import block_sizes

WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP = 4096, 32, 8, 128, 14336
ROPE = rope_jax.Rope(HEAD_DIM, rope_jax.Standard(base=500_000.0))
BATCH, LAYERS, VOCAB = 8, 4, 256  # of a decode step
CAPACITIES = 8192, 32768
H100 = "h100"
FORMS = {"chosen": None, "blocks": "blocks", "all scores": "xla"}
COMPARED = "v5p"  # the other chips compile the chosen form alone
LENGTHS = {"forward": (2048, 8192, 32768), "gradient": (8192, 32768)}
GPU_LENGTH, GPU_CAPACITY = 4096, 8192


class Case(NamedTuple):
    what: dict
    program: Callable
    args: tuple
    donate: tuple[int, ...] = ()
    least: int = 0  # bytes that must move
    array: int = 0  # bytes of keys, of one layer
    blocks: int = 1  # of keys


def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def attention_layer(implementation=None) -> rope_jax.RotaryAttention:
    return rope_jax.RotaryAttention(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rope=ROPE,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        implementation=implementation,
    )


def layer_case(direction: str, length: int, form: str) -> Case:
    """A layer on a prompt of one row, or its gradient."""
    layer, x = attention_layer(FORMS.get(form, form)), shape(1, length, WIDTH)
    params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))

    def gradient(params, x, cotangent):
        return jax.vjp(layer.apply, params, x)[1](cotangent)

    program, args = (layer.apply, (params, x)) if direction == "forward" else (gradient, (params, x, x))
    case = dict(program=direction, form=form, T=length)
    return Case(case, program, args, array=2 * length * KV_HEADS * HEAD_DIM)


def decode_case(model: str, capacity: int, platform: str) -> Case:
    """A token in each row, with a full cache: one attention layer, or a decoder of scanned layers."""
    layers = 1 if model == "layer" else LAYERS
    cache_fields: dict = dict(batch=BATCH, capacity=capacity, dtype=jnp.bfloat16)
    module: nn.Module
    if model == "layer":
        module, token = attention_layer(), shape(BATCH, 1, WIDTH)
        cache = functools.partial(rope_jax.init_cache, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, **cache_fields)
    else:
        module = rope_jax.Decoder(
            vocab_size=VOCAB,
            num_layers=LAYERS,
            width=WIDTH,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            mlp_dim=MLP if model == "decoder" else HEAD_DIM,
            rope=ROPE,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
        )
        token, cache = shape(BATCH, 1, dtype=jnp.int32), functools.partial(module.init_cache, **cache_fields)
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), token))
    stored = jax.eval_shape(cache)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    weights -= 2 * VOCAB * WIDTH if model != "layer" else 0  # the embedding: a row for each token
    keys = stored.key.size * stored.key.dtype.itemsize

    def step(params, token, cache):
        return module.apply(params, token, cache=cache)

    q = shape(BATCH, HEADS, 1, HEAD_DIM)
    sizes = block_sizes(q, stored.key, None, platform)
    return Case(
        dict(program="decode step", model=model, S=capacity),
        step,
        (params, token, stored),
        donate=(2,),
        least=weights + 2 * keys,
        array=keys // layers,
        blocks=-(-capacity // sizes.keys),
    )


def tpu_cases(chip: str) -> Iterator[Case]:
    for direction, lengths in LENGTHS.items():
        for form in FORMS if chip == COMPARED else ["chosen"]:
            for length in lengths:
                yield layer_case(direction, length, form)
    for model in ("layer", "decoder, mlp of 128", "decoder"):
        for capacity in CAPACITIES:
            yield decode_case(model, capacity, "tpu")


def gpu_cases() -> Iterator[Case]:
    for direction in LENGTHS:
        for form in ("chosen", "all scores"):
            yield layer_case(direction, GPU_LENGTH, form)
    for model in ("layer", "decoder, mlp of 128", "decoder"):
        yield decode_case(model, GPU_CAPACITY, "gpu")


def figures(case: Case, executable: Callable) -> dict:
    """What the compiler says of one program, or why it refuses."""
    print(case.what, file=sys.stderr, flush=True)
    try:
        ready = executable(case.program, *case.args, donate=case.donate)
    except jax.errors.JaxRuntimeError as error:
        return {**case.what, "does not fit": str(error).splitlines()[0][:200]}
    program = Program(ready.as_text(), case.blocks)
    found = {**case.what, "temporaries": ready.memory_analysis().temp_size_in_bytes}
    if case.least:
        moved = program.bytes()
        found |= {"bytes": moved, "least bytes": case.least, "over the least": round(moved / case.least, 4)}
        found |= {"key blocks": case.blocks, "launches": program.launches()}
    found["estimated cycles"] = program.cycles()
    least = case.array // case.blocks
    found["copies and transposes"] = len(program.moves(least))
    found["slices written out"] = len(program.moves(least, ["dynamic-slice"]))
    return found


def measure_tpu(chip: str) -> dict | list[dict]:
    """The figures of each program; or why there are none."""
    if versions(["libtpu"])["libtpu"] == "not installed":
        return {"not compiled": "libtpu not installed"}
    compile_for = functools.partial(tpu_compiler.executable, tpu_compiler.CHIPS[chip], free_layouts=False)
    return [figures(case, compile_for) for case in tpu_cases(chip)]


def measure_gpu() -> list[dict]:
    """In a process with the flags of :func:`gpu_compiler.measure`."""
    return [figures(case, gpu_compiler.executable) for case in gpu_cases()]


# ----------------------------------------------------------------------------------------------------- tables


def memory(row: dict) -> str:
    if "does not fit" not in row:
        return f"{row['temporaries'] / 1e6:,.0f} MB"
    needed = re.search(r"\(([\d.]+G)\) exceeds available HBM \(([\d.]+G)\)", row["does not fit"])
    return f"does not fit: {needed[1]} of {needed[2]}" if needed else f"does not fit: {row['does not fit']}"


def layers_table(rows_by_chip: dict[str, list[dict]]) -> str:
    rows = []
    for chip, found in rows_by_chip.items():
        for row in found:
            if row["program"] != "decode step":
                moves = str(row.get("copies and transposes", "-"))
                rows.append([chip, row["program"], str(row["T"]), row["form"], memory(row), moves])
    return markdown(["chip", "pass", "T", "form", "temporaries", "copies of k or larger"], rows)


def decoding_table(rows_by_chip: dict[str, list[dict]]) -> str:
    rows = []
    for chip, found in rows_by_chip.items():
        for row in found:
            if row["program"] == "decode step":
                name = [chip, row["model"], str(row["S"])]
                if "does not fit" in row:
                    rows.append([*name, memory(row), "-", "-", "-"])
                    continue
                counts = (row[key] for key in ("launches", "slices written out"))
                rows.append([*name, memory(row), f"{row['over the least']:.2f}", *map(str, counts)])
    return markdown(
        ["chip", "decode step", "S", "temporaries", "bytes over the least", "launches", "slices written out"], rows
    )


def table(kept: dict) -> str:
    """The short table."""
    result = kept["result"]
    by_chip = {chip: found["programs"] for chip, found in result.items() if "programs" in found}
    return f"{layers_table(by_chip)}\n\n{decoding_table(by_chip)}"


def section(found, packages, before: dict) -> dict:
    """New figures with their versions and date, or those of before."""
    if "not compiled" in found:
        print(f"not compiled: {found['not compiled']}")
        return before or found
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "packages": versions(("jax", *packages)), "programs": found}


def main(chips) -> None:
    measured = {chip: measure_tpu(chip) for chip in chips if chip != H100}
    if H100 in chips:
        measured[H100] = gpu_compiler.measure("benchmarks.attention_compiled")
    target = Path(__file__).parent / "results" / "attention_compiled.json"
    before = json.loads(target.read_text())["result"] if target.exists() else {}
    result = {}
    for chip in (*tpu_compiler.CHIPS, H100):
        if chip in measured:
            packages = gpu_compiler.WHEELS if chip == H100 else ["libtpu"]
            result[chip] = section(measured[chip], packages, before.get(chip, {}))
        elif chip in before:
            result[chip] = before[chip]
    with contextlib.redirect_stdout(None):
        save(__file__, result)
    print(table({"result": result}))


if __name__ == "__main__":
    if sys.argv[1:] and "/" in sys.argv[1]:  # in the process that gpu_compiler.measure starts
        print(json.dumps(measure_gpu()))
    else:
        main(sys.argv[1:] or (*tpu_compiler.CHIPS, H100))
