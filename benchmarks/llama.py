"""Times a training step, and a token decoded with a cache, beside transformers' Llama in torch.

    python -m benchmarks.llama      # about six minutes on two cores; torch and transformers: make .venv/oracle

One folder of random weights, read by rope_jax.load_hf and by transformers; the same tokens, float32, AdamW with
the same numbers. First the losses of three steps and the logits of the decoded tokens must agree; then they are
timed in turns. torch is timed as it is (a DynamicCache to decode) and through torch.compile (a StaticCache).

Predicted: both spend a training step in the same products of matrices, 6 operations a weight and token: 9 x 10^9 of
the small shape, 138 x 10^9 of the large one. So near 1, and what is left is what each writes to memory in between.
A token decoded alone reads every weight once, 3 MB or 90 MB. The small shape is all launches, hundreds a token: a
microsecond each in a program compiled as one, ten or more where Python makes each.
"""

import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import safetensors.numpy
from matplotlib import ticker

import rope_jax
from benchmarks.clock import in_turns, ratios
from benchmarks.overhead import decoding, rounding, said
from benchmarks.record import markdown, publish
from configs import toy_lm
from rope_jax.plot import COLOURS

try:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
except ImportError:
    torch = None

TOY = toy_lm.Config()
SIZES = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "batch", "length")
SHAPES = {
    "toy LM": {name: getattr(TOY, name) for name in SIZES} | {"rounds": 41},
    "width 512": dict(zip(SIZES, (8, 512, 8, 2, 64, 1408, 4, 256), strict=True)) | {"rounds": 15},
}
VOCAB = 256
BATCHES = (1, 8)  # rows that are decoded together
PROMPT, WRITTEN = 64, 16  # tokens in the cache to begin with, and tokens of one timed call
RATE, DECAY = 1e-3, 0.01
OURS, THEIRS = "rope_jax", {"torch": False, "torch.compile": True}  # whether it is compiled


def write_folder(folder: Path, sizes: Mapping[str, int]) -> None:
    """A Llama of random weights, as transformers would save it."""
    width, hidden, head_dim = sizes["width"], sizes["mlp_dim"], sizes["head_dim"]
    config = dict(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    queries, keys = (sizes[name] * head_dim for name in ("num_heads", "num_kv_heads"))
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    shapes = {f"layers.{i}.{name}": shape for i in range(sizes["num_layers"]) for name, shape in layer.items()}
    shapes |= {"embed_tokens": (VOCAB, width), "norm": (width,)}
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        tensor = np.ones(shape) if "norm" in name else rng.normal(scale=0.02, size=shape)
        tensors[f"model.{name}.weight"] = tensor.astype(np.float32)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------ what is timed


def our_training(model, params, tokens) -> Callable:
    optimizer = optax.adamw(RATE, weight_decay=DECAY)
    params = jax.tree.map(jnp.copy, params)  # they will be donated
    state = {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    tokens = jnp.asarray(tokens)

    def call():
        nonlocal state
        state, loss = toy_lm.train_step(state, tokens, model=model, optimizer=optimizer)
        return loss

    return call


def their_training(folder: Path, tokens, compiled: bool) -> Callable:
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    tokens = torch.from_numpy(tokens).long()

    def call():
        logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return call


def their_decoding(folder: Path, tokens, compiled: bool) -> Callable:
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    return torch_decoding(model, tokens, PROMPT, compiled)


def torch_decoding(model, tokens, prompt: int, compiled: bool) -> Callable:
    """As :func:`overhead.decoding`."""
    forward = torch.compile(model, dynamic=False) if compiled else model
    tokens = torch.from_numpy(tokens).long()
    capacity = tokens.shape[1]
    cache = transformers.StaticCache(model.config, capacity) if compiled else transformers.DynamicCache()
    later = [tokens[:, at : at + 1].contiguous() for at in range(prompt, capacity)]
    with torch.inference_mode():
        model(input_ids=tokens[:, :prompt], past_key_values=cache)

    @torch.inference_mode()
    def call():
        if compiled:
            for layer in cache.layers:
                layer.cumulative_length.fill_(prompt)
        else:
            cache.crop(prompt - cache.get_seq_length())
        return [forward(input_ids=token, past_key_values=cache).logits[:, -1] for token in later]

    return call


# ------------------------------------------------------------------------------------------ how it is timed


def compare(ours: Callable, theirs: Callable, allowed: float, rounds: int, checked: int = 1, count: int = 1):
    """One job, ``count`` times in a call: milliseconds of each form, and ours over theirs in the same round.

    ``theirs(compiled)`` makes a call of torch. It is timed if its first ``checked`` results are ours, to within
    ``allowed`` of the largest; else what is wrong stands in the place of its time.
    """
    want = [np.asarray(ours()) for _ in range(checked)]
    calls, differences = {OURS: ours}, {}
    wrong = {} if torch else dict.fromkeys(THEIRS, "not measured: torch or transformers is not installed")
    for name, compiled in THEIRS.items() if torch else ():
        torch.compiler.reset()  # having seen two shapes, it would compile for any
        try:
            call = theirs(compiled)
            got = [np.asarray(call()) for _ in range(checked)]
        except Exception as error:
            if not compiled:
                raise
            wrong[name] = f"not measured: {' '.join(str(error).split())[:200]}"  # it needs a compiler of C++
            continue
        difference = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))
        differences[name] = difference
        if difference <= allowed:
            calls[name] = call
        else:
            wrong[name] = f"not timed: it differs by {difference:.1e} of the largest, {allowed:.1e} is allowed"
    times = {name: [time / count for time in each] for name, each in in_turns(calls, rounds).items()}
    alone = {name: statistics.quantiles(each, n=4, method="inclusive") for name, each in times.items()}
    over = {name: ratios(times, OURS, name) for name in calls if name != OURS}
    return {
        "allowed": allowed,
        "differences": differences,
        "milliseconds": {name: [round(q, 4) for q in each] for name, each in alone.items()} | wrong,
        "ours over theirs": {name: [round(q, 4) for q in each] for name, each in over.items()},
    }


def measure(
    shapes: Mapping[str, Mapping[str, int]] = SHAPES, batches: Sequence[int] = BATCHES, written: int = WRITTEN
) -> dict:
    """Of each shape and job, what :func:`compare` finds."""
    result = {}
    for shape, sizes in shapes.items():
        with tempfile.TemporaryDirectory() as name:
            folder, rng = Path(name), np.random.default_rng(1)
            write_folder(folder, sizes)
            model, params, *_ = rope_jax.load_hf(folder)
            how = dict(allowed=rounding(model), rounds=sizes["rounds"])
            tokens = rng.integers(0, VOCAB, (sizes["batch"], sizes["length"] + 1), np.int32)
            ours, theirs = our_training(model, params, tokens), functools.partial(their_training, folder, tokens)
            jobs = {f"training step, {sizes['batch']} x {sizes['length']}": compare(ours, theirs, checked=3, **how)}
            for batch in batches:
                tokens = rng.integers(0, VOCAB, (batch, PROMPT + written), np.int32)
                ours = decoding(model, params, jnp.asarray(tokens), PROMPT)
                theirs = functools.partial(their_decoding, folder, tokens)
                jobs[f"decoded token, rows: {batch}"] = compare(ours, theirs, count=written, **how)
        result[shape] = {"sizes": dict(sizes), "jobs": jobs}
    return {"torch threads": torch.get_num_threads() if torch else None, "shapes": result}


def jobs_of(kept: dict) -> dict[str, dict]:
    shapes = kept["result"]["shapes"]
    return {f"{shape}: {job}": row for shape, each in shapes.items() for job, row in each["jobs"].items()}


def table(kept: dict) -> str:
    titles = ["", f"{OURS}, ms", *(f"{name}, ms" for name in THEIRS), *(f"{OURS} over {name}" for name in THEIRS)]
    rows = []
    for job, row in jobs_of(kept).items():
        times, over = row["milliseconds"], row["ours over theirs"]
        cells = [times[name] if name not in (OURS, *over) else f"{times[name][1]:.3g}" for name in (OURS, *THEIRS)]
        rows.append([job, *cells, *(said(over[name], ".2f") if name in over else "-" for name in THEIRS)])
    return markdown(titles, rows)


def draw(kept: dict) -> matplotlib.figure.Figure:
    """A dot for the median of each ratio, and a bar from quartile to quartile."""
    jobs = jobs_of(kept)
    figure = matplotlib.figure.Figure(figsize=(8.5, 1.4 + 0.6 * len(jobs)), layout="constrained")
    axes = figure.subplots()
    for name, colour, beside in zip(THEIRS, COLOURS, (-0.13, 0.13), strict=False):
        over = [row["ours over theirs"].get(name, [np.nan] * 3) for row in jobs.values()]
        low, middle, high = zip(*over, strict=True)
        places = [place + beside for place in range(len(jobs))]
        axes.hlines(places, low, high, color=colour, linewidth=3, alpha=0.5)
        axes.plot(middle, places, "o", color=colour, label=f"over {name}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=range(len(jobs)), yticklabels=jobs, ylim=(len(jobs) - 0.5, -0.5), xscale="log")
    ticks = ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))
    axes.xaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_locator=ticker.NullLocator())
    axes.set(xlabel=f"time of {OURS} over theirs, round by round: median and quartiles")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    publish(__file__, measure(), table, draw, packages=["torch", "transformers", "optax"])
