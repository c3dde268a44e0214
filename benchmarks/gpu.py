"""Times the rotation of q and k on a GPU, over its copy bandwidth, beside other libraries.

    python -m benchmarks.gpu        # without a GPU it says "not measured", and why

With the wheels of the CUDA compiler, the results also have XLA's kernels, bytes and widths of accesses for an H100,
with or without a card (gpu_compiler.py): counts, not times.

The copy is `-x` of the same arrays: it reads and writes each byte once. XLA would drop a plain `x`.
Predicted, in bytes over those of the copy: rope_jax and plain split and concatenate, where each array is one
kernel, read cos and sin besides, 1.3 % more; transformers' eager lines take five times the bytes, torch.compile
and the hand-written kernels as many as the copy. XLA cannot rotate a donated array in place, since each
result depends on two inputs: it copies the array first, twice the bytes. An attention layer
takes q and k out and in once more, and in its gradient their cotangents as well.
"""

import datetime
import functools
import json
import math
import os
import pkgutil
import statistics
from pathlib import Path

# By default jax takes three quarters of the card's memory for itself, and torch would find too little.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

import rope_jax
from benchmarks import gpu_compiler
from benchmarks.clock import in_turns, ratios
from benchmarks.record import markdown, publish, save, versions
from rope_jax.plot import COLOURS

SIZES = {"B": 4, "T": 4096, "N": 32, "K": 8, "H": 128}
TINY = {"B": 1, "T": 16}  # in their place, to see what a call costs that moves next to nothing
ROUNDS, REPEATS, LAYER_REPEATS = 51, 50, 5  # repeats: calls in one timed window
BAR = 0.90  # of the copy's bandwidth
DIRECTIONS = ("forward", "backward")
TIME, SHARE, AGAINST = "microseconds (quartiles)", "share of the copy (quartiles)", "time over rope_jax (quartiles)"
COPY, OURS, LIGER = "copy (-x)", "rope_jax", "Liger"
PACKAGES = (
    "jax-cuda12-plugin jax-cuda13-plugin torch triton transformers liger-kernel flash-attn transformer-engine"
)


def split_and_concatenate(x, rotation):
    """As most JAX models write it; its backward pass is what autodiff makes of it."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (part[..., None, :] for part in rotation)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


interleaved = functools.partial(rope_jax.rotate, layout="interleaved")
# By name: what it does to one array [B, T, N, H], and what it must agree with.
TURNS = {
    COPY: (lambda x, rotation: -x, lambda x, rotation: -x),
    OURS: (rope_jax.rotate, rope_jax.rotate),
    f"{OURS} interleaved": (interleaved, interleaved),
    "split and concatenate": (split_and_concatenate, rope_jax.rotate),
}


def heads_first(peer, cos, sin):
    """For a peer that turns q [B, N, T, H] and k [B, K, T, H] at once: views here, as in a model."""
    return lambda q, k: tuple(x.transpose(1, 2) for x in peer(q.transpose(1, 2), k.transpose(1, 2), cos, sin))


def one_by_one(peer, *args, **options):
    """For a peer that turns one array [B, T, N, H]."""
    return lambda q, k: (peer(q, *args, **options), peer(k, *args, **options))


LLAMA = "transformers.models.llama.modeling_llama:apply_rotary_pos_emb"
ENGINE = "transformer_engine.pytorch.attention.rope:apply_rotary_pos_emb"
# By name: what it is, how it is called with the tables of `torch_forms`, and the roundings that it may be off by:
# transformers rounds cos and sin, both products and their sum; flash-attn reads rounded cos and sin; and a kernel
# may truncate, which counts as two.
PEERS = {
    "transformers eager": (LLAMA, lambda f, t: heads_first(f, *t["low wide"]), 3.5),
    "transformers torch.compile": (LLAMA, lambda f, t: t["compile"](heads_first(f, *t["low wide"])), 3.5),
    LIGER: ("liger_kernel.transformers.rope:liger_rotary_pos_emb", lambda f, t: heads_first(f, *t["wide"]), 2.1),
    "flash-attn": ("flash_attn.layers.rotary:apply_rotary_emb", lambda f, t: one_by_one(f, *t["low"]), 3.5),
    "TransformerEngine": (ENGINE, lambda f, t: one_by_one(f, t["angles"], tensor_format="bshd", fused=True), 2.1),
}


def window(step, arrays, wait=jax.block_until_ready, chained=False):
    """`run(repeats)` hands over all its calls and waits once: the card works while the host prepares the next.

    Each call is a program of its own, so that nothing is fused or cancelled across calls. A `fori_loop` in one
    program would copy q and k at every turn, to keep its state in one place.
    """

    def run(repeats=1):
        nonlocal arrays
        for _ in range(repeats):
            out = step(*arrays)
            arrays = out if chained else arrays
        wait(out)
        return out

    return run


def jax_forms(device, rotation, direction) -> dict:
    """By name: `start(q, k)`, a window with arrays of its own; what it must agree with, to so many roundings."""
    put = functools.partial(jnp.asarray, dtype=jnp.bfloat16, device=device)
    rotation = jax.device_put(rotation, device)

    def start(turn, donated):
        def forward(q, k, rotation):
            return turn(q, rotation), turn(k, rotation)

        def backward(q, k, rotation):  # a rotation is linear: its derivative is the same at every point
            return jax.vjp(lambda q, k: forward(q, k, rotation), q, k)[1]((q, k))

        step = jax.jit(forward if direction == "forward" else backward, donate_argnums=(0, 1) if donated else ())
        return lambda q, k: window(lambda q, k: step(q, k, rotation), (put(q), put(k)), chained=donated)

    return {
        f"{name} donated" if donated else name: (start(turn, donated), reference, 1.1)
        for name, (turn, reference) in TURNS.items()
        for donated in (False, True)
    }


def torch_forms(device, rotation, angles, direction) -> dict:
    """As `jax_forms`; in the place of a peer that is not there, the reason."""
    try:
        import torch
    except ImportError as error:
        return dict.fromkeys(PEERS, f"not installed: {error}")
    on_gpu = device.platform == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return dict.fromkeys(PEERS, "this torch finds no GPU")
    put = functools.partial(torch.tensor, device="cuda" if on_gpu else "cpu")
    wide = [np.concatenate([part, part], axis=-1) for part in (*rotation, angles)]
    tables = {
        "low": [put(part[0], dtype=torch.bfloat16) for part in rotation],  # [T, R/2]
        "low wide": [put(part, dtype=torch.bfloat16) for part in wide[:2]],  # [1, T, H]
        "wide": [put(part) for part in wide[:2]],
        "angles": put(wide[2][:, None, None]),  # [T, 1, 1, H]
        "compile": functools.partial(torch.compile, dynamic=False, fullgraph=True),
    }

    def backward(turned, leaves, *cotangents):
        return torch.autograd.grad(turned, leaves, cotangents, retain_graph=True)

    def start(turn, q, k):
        arrays = [put(x, dtype=torch.bfloat16) for x in (q, k)]
        if direction == "forward":
            step = torch.no_grad()(turn)
        else:
            leaves = [x.clone().requires_grad_() for x in arrays]
            step = functools.partial(backward, turn(*leaves), leaves)
        return window(step, arrays, wait=lambda _: torch.cuda.synchronize() if on_gpu else None)

    def form(where, adapt, roundings):
        try:
            return functools.partial(start, adapt(pkgutil.resolve_name(where), tables)), rope_jax.rotate, roundings
        except Exception as error:  # what is installed may be broken in many ways
            missing = isinstance(error, ModuleNotFoundError)
            return f"{'not installed' if missing else 'cannot be imported'}: {error}"

    return {name: form(*peer) for name, peer in PEERS.items()}


def checked(form, arrays, rotation, direction):
    """The form's window and its worst error, in roundings to bfloat16 of a number as long as its pair."""
    start, reference, roundings = form
    turn = rotation if direction == "forward" else rotation.inverse()
    quarter = rope_jax.Rotation(jnp.zeros_like(turn.cos), jnp.ones_like(turn.sin))
    worst = 0.0
    for x, out in zip(arrays, start(*arrays)(), strict=True):
        got = np.asarray(out if isinstance(out, jax.Array) else out.float().cpu(), np.float32)
        errors = np.abs(got - reference(x, turn)) / np.hypot(x, reference(x, quarter)) * 2**8
        worst = np.maximum(worst, errors.max())  # NaN stays
    if not worst <= roundings:
        raise ArithmeticError(f"off by {worst:.3g} roundings, where its arithmetic allows {roundings}")
    return start(*arrays), float(worst)  # started anew: a call may have overwritten its arrays


def quartiles(values) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def rotating(device, sizes, rounds, repeats) -> dict:
    """By direction and form: held to our float32, then timed in turns with the others; or why not."""
    B, T, N, K, H = sizes.values()
    rng = np.random.default_rng(0)
    arrays = [np.array(rng.normal(size=(B, T, n, H)), jnp.bfloat16).astype(np.float32) for n in (N, K)]
    frequencies = rope_jax.Standard(base=500_000.0)(H)
    rotation = rope_jax.rotation(jnp.arange(T)[None], frequencies)
    angles = np.outer(np.arange(T), frequencies.inv_freq).astype(np.float32)
    result: dict = {}
    for direction in DIRECTIONS:
        forms = jax_forms(device, rotation, direction)
        forms |= torch_forms(device, jax.tree.map(np.array, rotation), angles, direction)
        runs, rows = {}, {}
        for name, form in forms.items():
            try:
                if isinstance(form, str):
                    raise ModuleNotFoundError(form)
                run, worst = checked(form, arrays, rotation, direction)
                runs[name], rows[name] = functools.partial(run, repeats), {"worst error, roundings": worst}
            except Exception as problem:
                if name not in PEERS:
                    raise
                # A peer that is not there, not equal or not for this card takes no other's figures away.
                rows[name] = {"not timed": (str(problem) or type(problem).__name__).splitlines()[0]}
        times = in_turns(runs, rounds)
        for name, values in times.items():
            rows[name][TIME] = quartiles([1e3 * value / repeats for value in values])
            rows[name][SHARE] = ratios(times, COPY, name)
            rows[name][AGAINST] = ratios(times, name, OURS)
        result[direction] = rows
    return result


def attending(device, sizes, rounds, repeats) -> dict:
    """A layer with and without its rope; cos and sin are at hand, as a model makes them once for all layers."""
    B, T, N, K, H = sizes.values()
    rope = rope_jax.Rope(H, rope_jax.Standard(base=500_000.0))
    fields = dict(num_heads=N, num_kv_heads=K, head_dim=H, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    layer = rope_jax.RotaryAttention(rope=rope, **fields)
    x = jax.random.normal(jax.random.key(0), (B, T, N * H), jnp.bfloat16)
    params = nn.unbox(layer.init(jax.random.key(1), x[:1, :1]))
    arrays = jax.device_put((params, x), device)
    plan = jax.device_put(rope_jax.attention.make_plan(rope, (B, T)), device)
    layer = layer.clone(implementation="cudnn" if device.platform == "gpu" else None)
    plain = layer.clone(rope=None)
    layers = {"with rope": functools.partial(layer.apply, plan=plan), "without": plain.apply}

    def gradient(apply, params, x):
        return jax.vjp(apply, params, x)[1](x)

    result: dict = {"implementation": layer.implementation}
    for name, of in {"forward": lambda f: f, "gradient": lambda f: functools.partial(gradient, f)}.items():
        runs = {which: window(jax.jit(of(apply)), arrays) for which, apply in layers.items()}
        times = in_turns({which: functools.partial(run, repeats) for which, run in runs.items()}, rounds)
        milliseconds = {which: quartiles([t / repeats for t in values]) for which, values in times.items()}
        result[name] = {"milliseconds (quartiles)": milliseconds, "with over without": ratios(times, *layers)}
    return result


def measure(device, sizes=SIZES, rounds=ROUNDS, repeats=REPEATS, layer_repeats=LAYER_REPEATS) -> dict:
    return {
        "sizes": sizes,
        "bytes": 2 * 2 * sizes["B"] * sizes["T"] * (sizes["N"] + sizes["K"]) * sizes["H"],
        "rotating": rotating(device, sizes, rounds, repeats),
        "tiny": rotating(device, sizes | TINY, rounds, repeats),
        "attention": attending(device, sizes, rounds, layer_repeats),
    }


def medians(result: dict, key: str, part: str = "rotating") -> dict:
    """By name and direction, of those that were timed."""
    rows = [(name, at, row) for at in DIRECTIONS for name, row in result[part][at].items()]
    return {(name, at): row[key][1] for name, at, row in rows if key in row}


def said(forms) -> str:
    return ", ".join(f"{name} ({at})" for name, at in forms) or "none"


def remarks(result: dict) -> list[str]:
    """What the bars, the layer and the absent have to say."""
    share, against = medians(result, SHARE), medians(result, AGAINST)
    ours = [form for form in share if form[0].startswith(OURS)]
    liger = [f"{against[LIGER, at]:.2f} {at}" for at in DIRECTIONS if (LIGER, at) in against]
    layer = [f"{result['attention'][name]['with over without'][1]:.2f} {name}" for name in ("forward", "gradient")]
    rows = [(name, row) for at in DIRECTIONS for name, row in result["rotating"][at].items()]
    absent = dict.fromkeys(f"{name} ({row['not timed']})" for name, row in rows if "not timed" in row)
    return [
        f"Bar: {BAR:.2f} of the copy. Met by {said(form for form in ours if share[form] >= BAR)}; "
        f"not by {said(form for form in ours if share[form] < BAR)}.",
        f"Bar: Liger's time over {OURS}'s at least 1. It is {', '.join(liger) or 'not measured'}.",
        "Tiny: a call that moves next to nothing. Where a whole one takes longer, launching it is hidden.",
        f"An attention layer's time with rope over that without: {', '.join(layer)}.",
        f"Not timed: {'; '.join(absent) or 'none'}.",
    ]


def table(kept: dict) -> str:
    result = kept["result"]
    if "not measured" in result:
        why, command = result["not measured"], kept["command"]
        return f"Rotation on a GPU is not measured: {why}. `{command}` measures it where there is one."
    time, share, tiny = medians(result, TIME), medians(result, SHARE), medians(result, TIME, "tiny")

    def cells(form):
        if form not in time:
            return ["-"] * 3
        speed = result["bytes"] / time[form] / 1e3
        return [f"{speed:.0f}", f"{share[form]:.2f}", f"{time[form]:.0f} ({tiny.get(form, math.nan):.0f})"]

    titles = ["form", *(f"{at}, {what}" for at in DIRECTIONS for what in ("GB/s", "of the copy", "µs (tiny)"))]
    names = dict.fromkeys(name for name, _ in time)
    rows = [[name, *(cell for at in DIRECTIONS for cell in cells((name, at)))] for name in names]
    return "\n".join([markdown(titles, rows), "", *(f"- {remark}" for remark in remarks(result))])


def draw(kept: dict) -> matplotlib.figure.Figure:
    """Every form's share of the copy's bandwidth: bars at the medians, with quartiles."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(f"Rotating q and k in bfloat16, {kept['device'].split(',')[0]}")
    for axes, at in zip(figure.subplots(1, 2, sharex=True, sharey=True), DIRECTIONS, strict=True):
        shares = {name: row[SHARE] for name, row in kept["result"]["rotating"][at].items() if SHARE in row}
        low, middle, high = np.transpose(list(shares.values()))
        colours = [COLOURS[0 if name.startswith(OURS) else 5] for name in shares]
        axes.barh(list(shares), middle, xerr=(middle - low, high - middle), color=colours)
        axes.axvline(BAR, color="black", linestyle=":", label=f"the bar, {BAR:.2f}")
        axes.set(title=at, xlabel="share of the copy's bandwidth")
    axes.invert_yaxis()  # shared: the first form on top
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    return figure


def add_compiled(target: Path, before: dict) -> None:
    """Adds the compiler's figures to the written results: new if its wheels are installed, else those of before."""
    compiled = gpu_compiler.measure()
    if "not compiled" in compiled:
        print(f"not compiled: {compiled['not compiled']}")
        section = before.get("compiled")
    else:
        print(gpu_compiler.table(compiled))
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        packages = versions(("jax", *gpu_compiler.WHEELS))
        section = {"chip": "H100, compiled without a GPU", "date": date, "packages": packages, "programs": compiled}
    if section:
        target.write_text(json.dumps({**json.loads(target.read_text()), "compiled": section}, indent=1) + "\n")


def main(device) -> None:
    if device.platform == "gpu":
        publish(__file__, measure(device), table, draw, packages=PACKAGES.split())
        return
    result = {"not measured": f"no GPU; the backend found is {device.platform}"}
    save(__file__, result)
    print(f"not measured: {result['not measured']}")


if __name__ == "__main__":
    target = Path(__file__).parent / "results" / "gpu.json"
    before = json.loads(target.read_text()) if target.exists() else {}
    main(jax.devices()[0])
    add_compiled(target, before)
