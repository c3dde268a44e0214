"""Times attention on a CPU beside torch's, and beside the plain form, which holds all scores at once.

    python -m benchmarks.attention      # less than six minutes on two cores; torch: make .venv/oracle

The plain form is :func:`jax.nn.dot_product_attention`; its gradient computes the scores again
(:func:`jax.checkpoint`). torch's is ``scaled_dot_product_attention``, which also works in blocks. All results must
agree before they are timed in turns.

Predicted: a causal forward pass needs 2 N H T^2 multiplications and additions, half of 4 N H T^2: 17 x 10^9 at
T = 4096. The plain form computes all, and writes and reads N T^2 scores of 4 bytes about three times, 3 GB. So half
the time of the plain form is saved by causality, and more by memory. With a window W, work grows with 2 T W instead
of T^2: a window of 512 at T = 4096 needs a quarter of the causal work. A decode step reads the filled part of the
cache once: its time over that of a sum over the same keys and values should be near 1, however large the cache is.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.ticker
import numpy as np

import rope_jax
from benchmarks.clock import in_turns, ratios
from benchmarks.record import markdown, publish
from rope_jax.attention.attend import attend_by_facts
from rope_jax.plot import COLOURS

try:
    import torch
except ImportError:
    torch = None

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 128
DTYPES = ("float32", "bfloat16")
LENGTHS = {"forward": (1, 16, 64, 128, 256, 512, 1024, 2048, 4096), "gradient": (128, 256, 512, 1024, 2048, 4096)}
FEATURE_LENGTH = 4096
FEATURES = ("causal", "window of 512", "not causal", "T5 bias", "padding")
MEMORY_LENGTH = 16384
CAPACITIES, SHARES = (1024, 8192, 32768), (0.1, 0.5, 1.0)
LAYERS = 2  # in the cache of the decode step
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 1.5, 5, 101  # of a cell
# Of the largest number of the result: sums in another order, and in bfloat16 two results that are each rounded.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}
OURS, PLAIN, TORCH, READ = "rope_jax", "plain", "torch", "sum"
TIME, OVER = "milliseconds (quartiles)", "rope_jax over {} (quartiles)"


# ------------------------------------------------------------------------------------------ what is timed


def arrays(length: int, dtype: str) -> list[jax.Array]:
    """q ``[1, T, N, H]``, k and v ``[1, T, K, H]``, and a cotangent of the output."""
    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [jnp.asarray(rng.normal(size=(1, length, count, HEAD_DIM)), dtype) for count in heads]


def ours(q, k, v):
    return rope_jax.attend(q, k, v, causal=True)


def plain(q, k, v, **options):
    """All scores at once, computed again for the gradient."""
    return jax.checkpoint(functools.partial(jax.nn.dot_product_attention, **options))(q, k, v)


def of_torch(q, k, v):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, enable_gqa=True
    ).transpose(1, 2)


def forward(program: Callable) -> Callable:
    return lambda q, k, v, _: program(q, k, v)


def gradient(program: Callable) -> Callable:
    """The output and the gradients of q, k and v."""

    def run(q, k, v, cotangent):
        y, pull_back = jax.vjp(program, q, k, v)
        return y, *pull_back(cotangent)

    return run


def gradient_of_torch(q, k, v, cotangent):
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = of_torch(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, cotangent)


DIRECTIONS = {"forward": forward, "gradient": gradient}


def calls(direction: str, length: int, dtype: str) -> dict[str, Callable]:
    """Causal attention by each form."""
    given = arrays(length, dtype)
    found = {}
    for name, program in {OURS: ours, PLAIN: functools.partial(plain, is_causal=True)}.items():
        found[name] = functools.partial(jax.jit(DIRECTIONS[direction](program)), *given)
    if torch is not None:
        tensors = [torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, dtype)) for x in given]
        program = torch.no_grad()(forward(of_torch)) if direction == "forward" else gradient_of_torch
        found[TORCH] = functools.partial(program, *tensors)
    return found


def feature_calls(feature: str, length: int, dtype: str) -> dict[str, Callable]:
    """One feature in the forward pass: ours by the facts of a plan, as a layer does."""
    num_real = length - length // 8
    table = {"params": {"table": jnp.linspace(-1, 1, 32 * HEADS).reshape(32, HEADS)}}
    asked: dict = dict(causal=feature != "not causal")
    by_flags: dict = dict(is_causal=feature != "not causal")
    if feature.startswith("window"):
        asked |= dict(window=512)
        by_flags |= dict(local_window_size=(511, 0))
    elif feature == "padding":
        asked |= dict(mask=jnp.arange(length)[None] < num_real)
        by_flags |= dict(key_value_seq_lengths=jnp.full((1,), num_real, jnp.int32))

    def by_facts(q, k, v):
        bias = rope_jax.attention.T5Bias().bind(table) if feature == "T5 bias" else None
        plan = rope_jax.attention.make_plan(None, (1, length), position_bias=bias, num_heads=HEADS, **asked)
        return attend_by_facts(*(x.swapaxes(1, 2) for x in (q, k, v)), plan.facts()).swapaxes(1, 2)

    def by_scores(q, k, v):
        bias = None
        if feature == "T5 bias":
            tokens = jnp.arange(length)
            distance = tokens[None, :, None] - tokens[None, None, :]
            bias = rope_jax.attention.T5Bias().apply(table, distance, HEADS, True).astype(q.dtype)
        return plain(q, k, v, bias=bias, **by_flags)

    given = arrays(length, dtype)
    real = slice(num_real if feature == "padding" else None)  # outputs at padding are undefined
    programs = {OURS: by_facts, PLAIN: by_scores}
    return {
        name: functools.partial(jax.jit(lambda q, k, v, _, program=program: program(q, k, v)[:, real]), *given)
        for name, program in programs.items()
    }


def decode_calls(capacity: int, share: float, dtype: str) -> dict[str, Callable]:
    """One token reads the second layer of a cache that is filled in part; and a sum over the filled part."""
    row = dict(batch=1, capacity=capacity, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, num_layers=LAYERS)
    cache, filled = rope_jax.init_cache(**row, dtype=dtype), round(share * capacity)
    key, value = (jax.random.normal(jax.random.key(i), cache.key.shape, dtype) for i in range(2))
    q = arrays(1, dtype)[0].swapaxes(1, 2)

    def attend(q, key, value, num_tokens, layer):
        stored = rope_jax.KVCache(key, value, num_tokens, num_tokens, layer=layer)
        facts = rope_jax.attention.make_plan(None, (1, 1), cache=stored).facts()
        return attend_by_facts(q, key, value, facts, layer=layer)

    def total(key, value, layer):
        parts = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)[:, :, :filled] for x in (key, value))
        return [part.sum(dtype=jnp.float32) for part in parts]

    num_tokens, layer = jnp.full((1,), filled - 1, jnp.int32), jnp.int32(1)
    return {
        OURS: functools.partial(jax.jit(attend), q, key, value, num_tokens, layer),
        READ: functools.partial(jax.jit(total), key, value, layer),
    }


def temporaries() -> dict:
    """Bytes of temporaries by the compiler, at a length where nothing is run."""
    shapes = [jax.ShapeDtypeStruct((1, MEMORY_LENGTH, count, HEAD_DIM), jnp.float32) for count in (HEADS, KV_HEADS)]
    q, k = shapes
    found: dict = {}
    for direction, of in DIRECTIONS.items():
        for name, program in {OURS: ours, PLAIN: functools.partial(plain, is_causal=True)}.items():
            ready = jax.jit(of(program)).lower(q, k, k, q).compile()
            found.setdefault(direction, {})[name] = ready.memory_analysis().temp_size_in_bytes
    return found


# ------------------------------------------------------------------------------------------ right, then fast


def largest_difference(found: Mapping[str, Callable]) -> dict[str, float]:
    """Of each form from the plain one, over the plain one's largest number.

    Raises:
      ArithmeticError: if a difference is above the tolerance.
    """
    results = {name: jax.tree.leaves(call()) for name, call in found.items()}

    def numbers(x):
        return np.asarray(x.float() if TORCH in results and isinstance(x, torch.Tensor) else x, np.float32)

    tolerance = TOLERANCE[str(results[OURS][0].dtype)]
    differences = {}
    for name, result in results.items():
        pairs = [(numbers(a), numbers(b)) for a, b in zip(result, results[PLAIN], strict=True)]
        worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)
        if not worst <= tolerance:
            raise ArithmeticError(f"{name} is off by {worst:.2g} of the largest number, allowed is {tolerance}")
        differences[name] = float(worst)
    return differences


def timed(found: Mapping[str, Callable], seconds: float) -> dict:
    """Quartiles of each compiled call, and of ours over the others; as many rounds as fit in the seconds."""
    start = time.perf_counter()
    for call in found.values():
        jax.block_until_ready(call())
    once = time.perf_counter() - start
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(seconds / once)))
    times = in_turns(found, rounds)
    return {
        "rounds": rounds,
        TIME: {name: statistics.quantiles(each, n=4, method="inclusive") for name, each in times.items()},
        **{OVER.format(name): ratios(times, OURS, name) for name in found if name != OURS},
    }


def measure(
    lengths: Mapping = LENGTHS,
    feature_length: int = FEATURE_LENGTH,
    capacities=CAPACITIES,
    seconds: float = SECONDS,
) -> dict:
    cases = []
    for direction in DIRECTIONS:
        for dtype in DTYPES:
            for length in lengths[direction]:
                found = calls(direction, length, dtype)
                case = {"direction": direction, "dtype": dtype, "T": length, "S": length, "feature": "causal"}
                cases.append({**case, "difference": largest_difference(found), **timed(found, seconds)})
    for feature in FEATURES:
        found = feature_calls(feature, feature_length, "float32")
        case = {"direction": "forward", "dtype": "float32", "T": feature_length, "feature": feature}
        cases.append({**case, "difference": largest_difference(found), **timed(found, seconds)})
    for dtype in DTYPES:
        for capacity in capacities:
            for share in SHARES:
                found = decode_calls(capacity, share, dtype)
                case = {"direction": "forward", "dtype": dtype, "T": 1, "S": capacity, "filled": share}
                for call in found.values():
                    jax.block_until_ready(call())
                cases.append({**case, **timed(found, seconds / 3)})
    return {
        "heads": {"N": HEADS, "K": KV_HEADS, "H": HEAD_DIM, "B": 1},
        "cases": cases,
        f"temporaries at T={MEMORY_LENGTH}, float32": temporaries(),
    }


# -------------------------------------------------------------------------------------- tables and picture


def said(quartiles) -> str:
    if quartiles is None:
        return "-"
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def by_length(kept: dict) -> str:
    """Causal attention: a row for each length."""
    columns = [(direction, dtype) for direction in DIRECTIONS for dtype in DTYPES]
    rows: dict[int, dict] = {}
    for case in kept["result"]["cases"]:
        if case.get("feature") == "causal" and "S" in case:
            rows.setdefault(case["T"], {})[case["direction"], case["dtype"]] = case
    lines = []
    for length, cells in rows.items():
        line = [str(length)]
        for column in columns:
            case = cells.get(column, {})
            both = (case.get(OVER.format(name)) for name in (TORCH, PLAIN))
            line.append(", ".join(said(each) for each in both) if case else "-")
        lines.append(line)
    titles = [f"{direction}, {dtype}: over torch, over the plain form" for direction, dtype in columns]
    return markdown(["T", *titles], lines)


def by_feature(kept: dict) -> str:
    rows = []
    for case in kept["result"]["cases"]:
        if "feature" in case and "S" not in case:
            middle = (f"{case[TIME][name][1]:.0f} ms" for name in (OURS, PLAIN))
            rows.append([f"{case['feature']}, T={case['T']}", *middle, said(case[OVER.format(PLAIN)])])
    return markdown(["forward, float32", OURS, "plain form", "ratio (quartiles)"], rows)


def by_filling(kept: dict) -> str:
    rows = []
    for case in kept["result"]["cases"]:
        if "filled" in case:
            middle = (f"{case[TIME][name][1]:.3g} ms" for name in (OURS, READ))
            rows.append(
                [str(case["S"]), f"{case['filled']:.0%}", case["dtype"], *middle, said(case[OVER.format(READ)])]
            )
    return markdown(["slots", "filled", "dtype", "read by a token", "sum", "ratio (quartiles)"], rows)


def by_memory(kept: dict) -> str:
    (title, found), *_ = ((key, each) for key, each in kept["result"].items() if key.startswith("temporaries"))
    rows = [[name, *(f"{found[at][name] / 1e6:,.0f} MB" for at in DIRECTIONS)] for name in (OURS, PLAIN)]
    return markdown([title, *DIRECTIONS], rows)


def table(kept: dict) -> str:
    """The short table."""
    return "\n\n".join(part(kept) for part in (by_length, by_feature, by_filling, by_memory))


RATIOS = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2)


def draw(kept: dict) -> matplotlib.figure.Figure:
    """Time over torch's and over the plain form's, by length: medians and quartiles."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    cases = [case for case in kept["result"]["cases"] if case.get("feature") == "causal" and "S" in case]
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), DIRECTIONS, strict=True):
        for number, (dtype, name) in enumerate((dtype, name) for name in (TORCH, PLAIN) for dtype in DTYPES):
            some = [case for case in cases if (case["direction"], case["dtype"]) == (direction, dtype)]
            some = [case for case in some if OVER.format(name) in case]
            lengths = [case["T"] for case in some]
            low, middle, high = np.reshape([case[OVER.format(name)] for case in some], (-1, 3)).T
            axes.plot(lengths, middle, "o-", color=COLOURS[number], label=f"over {name}, {dtype}")
            axes.fill_between(lengths, low, high, color=COLOURS[number], alpha=0.2)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", yscale="log", title=direction, xlabel="T (tokens)")
        lengths = sorted({case["T"] for case in cases if case["direction"] == direction})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize="small")
        axes.set_yticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"time of {OURS} over the other")
    figure.suptitle("Causal attention on two CPU cores: long rows take half of torch's time, a few tokens twice")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    publish(__file__, measure(), table, draw, packages=("torch",))
