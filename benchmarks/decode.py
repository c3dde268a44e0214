"""Times a token decoded with a cache beside another commit of this repository, each in a process of its own.

    git worktree add --detach ../before 6a41c4b
    python -m benchmarks.decode ../before      # five minutes on two CPU cores

6a41c4b is the last commit whose cache was copied: [layers, B, S, K, H], one slice for each layer, all slots read.
Predicted: a step reads the weights and the filled slots of keys and values once, 2 L B K H S numbers. The older
step also wrote the cache of every layer anew and read it again, so it moved that part three times or more: the
longer the cache and the more rows share the weights, the nearer the ratio comes to a third.
"""

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

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


def serve(fields: dict, dtype: str, batch: int, capacity: int) -> None:
    """Decodes one token for each row whenever a line comes in, always at the same place; answers milliseconds."""
    import rope_jax  # of the checkout that PYTHONPATH names

    rope = rope_jax.Rope(fields["head_dim"], rope_jax.Standard())
    model = rope_jax.Decoder(vocab_size=1024, rope=rope, dtype=dtype, param_dtype=dtype, **fields)
    token = jnp.zeros((batch, 1), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), token))
    filled = jnp.full((batch,), int(capacity * FILLED), jnp.int32)
    cache = dataclasses.replace(model.init_cache(batch=batch, capacity=capacity), num_tokens=filled)

    def one_token(params, cache):
        logits, cache = model.apply(params, token, cache=cache)
        return logits, dataclasses.replace(cache, num_tokens=jnp.full((batch,), int(capacity * FILLED), jnp.int32))

    step = jax.jit(one_token, donate_argnames="cache")
    _, cache = step(params, cache)
    print(Path(rope_jax.__file__).resolve().parents[1], flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        logits, cache = step(params, cache)
        jax.block_until_ready(logits)
        print(1e3 * (time.perf_counter() - start), flush=True)


@contextlib.contextmanager
def process_of(checkout: Path, *arguments) -> Iterator[subprocess.Popen]:
    """A process that serves with rope_jax as it stands in this folder.

    Raises:
      FileNotFoundError: if there is no rope_jax in the folder.
    """
    checkout = checkout.resolve()
    if not (checkout / "rope_jax" / "__init__.py").is_file():
        raise FileNotFoundError(f"expected a checkout of this repository, got {checkout} without rope_jax in it")
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", json.dumps(arguments)],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().strip() == str(checkout)
        yield process
        process.stdin.close()


def milliseconds(process: subprocess.Popen) -> float:
    """The time of one step."""
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(before: Path, now: Path, *arguments, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of a step in each round; the two take turns to be first."""
    from benchmarks.clock import in_rounds

    with process_of(before, *arguments) as old, process_of(now, *arguments) as new:
        steps = {"before": functools.partial(milliseconds, old), "now": functools.partial(milliseconds, new)}
        for step in steps.values():  # the first is not counted
            step()
        return in_rounds(steps, rounds)


def measure(before: Path) -> list[dict]:
    from benchmarks.clock import ratios

    found = []
    for shape, dtype, batch, capacity in CASES:
        times = compare(before, Path(__file__).parents[1], SHAPES[shape], dtype, batch, capacity)
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
    from benchmarks.record import markdown

    rows = []
    for case in cases:
        low, middle, high = case["now over before (quartiles)"]
        times = [f"{case['milliseconds (medians)'][name]:.3g} ms" for name in ("before", "now")]
        cells = [case["model"], str(case["B"]), f"{case['S']:,}", *times]
        rows.append([*cells, f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    return markdown(["one token, 9 of 10 slots filled", "B", "S", "before", "now", "ratio (quartiles)"], rows)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--serve":
        serve(*json.loads(sys.argv[2]))
        sys.exit()
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    from benchmarks.record import save  # the processes above have only rope_jax on their path

    result = measure(Path(sys.argv[1]))
    save(__file__, {"before": "commit 6a41c4b", "cases": result})
    print(table(result))
    Path(__file__).with_name("results").joinpath("decode.md").write_text(table(result) + "\n")
