"""Times a token decoded with a cache beside another commit of this repository, in one process.

    git worktree add --detach ../before 6a41c4b
    python -m benchmarks.decode ../before      # five minutes on two CPU cores

6a41c4b is the last commit whose cache was copied: [layers, B, S, K, H], one slice for each layer, all slots read.
Predicted: a step reads the weights and the filled slots of keys and values once, 2 L B K H S numbers. The older
step also wrote the cache of every layer anew and read it again, so it moved that part three times or more: the
longer the cache and the more rows share the weights, the nearer the ratio comes to a third.
"""

import dataclasses
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.clock import in_turns, ratios
from benchmarks.record import markdown, save

ROUNDS = 21
FIELDS = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
SHAPES = {
    "8 layers, D=512, N=8, K=2, H=64": dict(zip(FIELDS, (8, 512, 8, 2, 64, 2048), strict=True)),
    "30 layers, D=576, N=9, K=3, H=64": dict(zip(FIELDS, (30, 576, 9, 3, 64, 1536), strict=True)),
}
CASES = [  # shape, dtype, rows, slots
    *(("8 layers, D=512, N=8, K=2, H=64", "float32", B, S) for S in (16, 256, 1024, 8192) for B in (1, 8)),
    *(("8 layers, D=512, N=8, K=2, H=64", "bfloat16", B, S) for S in (1024, 8192) for B in (1, 8)),
    *(("30 layers, D=576, N=9, K=3, H=64", "float32", 1, S) for S in (16, 1024, 8192)),
]
FILLED = 0.9  # of the slots


def package_of(checkout: Path) -> ModuleType:
    """rope_jax as it stands in this folder, beside any that is imported already."""
    source = checkout / "rope_jax" / "__init__.py"
    if not source.is_file():
        raise FileNotFoundError(f"expected a checkout of this repository, got {checkout} without {source}")
    for name in [name for name in sys.modules if name.split(".")[0] == "rope_jax"]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location("rope_jax", source)
    package = importlib.util.module_from_spec(spec)
    sys.modules["rope_jax"] = package  # its modules import one another by this name
    spec.loader.exec_module(package)
    return package


def decode_step(package: ModuleType, fields: dict, dtype: str, batch: int, capacity: int) -> Callable:
    """A call that decodes one token for each row, always at the same place of a cache that it donates."""
    rope = package.Rope(fields["head_dim"], package.Standard())
    model = package.Decoder(vocab_size=1024, rope=rope, dtype=dtype, param_dtype=dtype, **fields)
    token = jnp.zeros((batch, 1), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), token))
    filled = int(capacity * FILLED)
    cache = dataclasses.replace(
        model.init_cache(batch=batch, capacity=capacity), num_tokens=jnp.full((batch,), filled, jnp.int32)
    )

    def one_token(params, cache):
        logits, cache = model.apply(params, token, cache=cache)
        return logits, dataclasses.replace(cache, num_tokens=jnp.full((batch,), filled, jnp.int32))

    step = jax.jit(one_token, donate_argnames="cache")

    def call():
        nonlocal cache
        logits, cache = step(params, cache)
        return logits

    return call


def measure(before: Path) -> list[dict]:
    packages = {"before": package_of(before), "now": package_of(Path(__file__).parents[1])}
    found = []
    for shape, dtype, batch, capacity in CASES:
        calls = {name: decode_step(each, SHAPES[shape], dtype, batch, capacity) for name, each in packages.items()}
        times = in_turns(calls, ROUNDS)
        found.append(
            {
                "model": f"{shape}, {dtype}",
                "B": batch,
                "S": capacity,
                "milliseconds (medians)": {name: statistics.median(each) for name, each in times.items()},
                "now over before (quartiles)": ratios(times, "now", "before"),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def table(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        low, middle, high = case["now over before (quartiles)"]
        times = [f"{case['milliseconds (medians)'][name]:.3g} ms" for name in ("before", "now")]
        cells = [case["model"], str(case["B"]), f"{case['S']:,}", *times]
        rows.append([*cells, f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    return markdown(["one token, 9 of 10 slots filled", "B", "S", "before", "now", "ratio (quartiles)"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    result = measure(Path(sys.argv[1]))
    save(__file__, {"before": "commit 6a41c4b", "cases": result})
    print(table(result))
    Path(__file__).with_name("results").joinpath("decode.md").write_text(table(result) + "\n")
