"""Times decoding and prefill of a real model beside transformers, llama.cpp and the bandwidth of memory.

    python -m benchmarks.real_models PATH   # a GGUF file, or a folder of transformers; torch: make .venv/oracle

rope_jax and transformers read the same weights, in float32 and in bfloat16. transformers runs as it is and through
torch.compile. llama.cpp reads a GGUF file with its own quantization, a single row at a time. First the logits must
agree; then the calls take turns.

Predicted: a step of decoding reads all weights once, and the tokens in the cache. One pass over an array of that
size, timed in the same rounds, is the limit; the bar is 1.3 times the limit. A prompt of n tokens takes 2 n
operations a weight, so that prefill is bound by matrix products.
"""

import concurrent.futures
import gc
import importlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

import rope_jax
from benchmarks import llama
from benchmarks.clock import in_turns, ratios
from benchmarks.overhead import decoding, said
from benchmarks.record import markdown, publish
from rope_jax.plot import COLOURS

OURS, PASS = "rope_jax", "one pass over memory"
DTYPES = ("float32", "bfloat16")
PROMPT, WRITTEN = 256, 16  # tokens in the cache to begin with, and tokens of one timed call
BAR = 1.3  # times the limit, for a step of decoding
# Differences of logits, as a share of the largest. Both round to bfloat16 after each product, unlike one another.
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


class Job(NamedTuple):
    """A timed job: ``rows`` prompts of ``prompt`` tokens, and steps of one token after the prompts."""

    rows: int
    prompt: int
    steps: int
    rounds: int

    def __str__(self) -> str:
        return f"decoded token, rows: {self.rows}" if self.steps else f"prefill, tokens: {self.prompt:,}"


JOBS = (Job(1, PROMPT, WRITTEN, 15), Job(8, PROMPT, WRITTEN, 15), Job(1, 512, 0, 9), Job(1, 2048, 0, 5))


# ---------------------------------------------------------------------------------------------- who is timed


class Ours:
    """A model of rope_jax. Each method makes a call that returns logits float32 ``[B, V]``, for each step."""

    def __init__(self, path: Path, dtype: str):
        if path.is_dir():
            self.model, params, *_ = rope_jax.load_hf(path, dtype=dtype)
        else:
            self.model, params, *_ = rope_jax.interop.load_gguf(path, dtype=dtype)
        self.params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def decoding(self, tokens, prompt: int) -> Callable:
        return decoding(self.model, self.params, jnp.asarray(tokens), prompt)

    def prefill(self, tokens) -> Callable:
        tokens = jnp.asarray(tokens)
        model, params = self.model, self.params
        batch, length = tokens.shape

        @jax.jit
        def run(params, tokens):
            hidden, cache = model.apply(
                params, tokens, cache=model.init_cache(batch=batch, capacity=length), method="hidden"
            )
            return model.apply(params, hidden[:, -1], method="unembed"), cache

        return lambda: [run(params, tokens)[0]]


class Torch:
    """A model of transformers, as it is or through torch.compile."""

    compiled = False

    def __init__(self, path: Path, dtype: str):
        place: dict = (
            dict(pretrained_model_name_or_path=path)
            if path.is_dir()
            else dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
        )
        load = llama.transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(**place, dtype=getattr(llama.torch, dtype)).eval()

    def decoding(self, tokens, prompt: int) -> Callable:
        call = llama.torch_decoding(self.model, tokens, prompt, self.compiled)
        return lambda: [each.float().numpy() for each in call()]

    def prefill(self, tokens) -> Callable:
        tokens = llama.torch.from_numpy(tokens).long()
        forward = llama.torch.compile(self.model, dynamic=False) if self.compiled else self.model

        @llama.torch.inference_mode()
        def call():
            cache = llama.transformers.DynamicCache()
            return [
                forward(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].float().numpy()
            ]

        return call


class TorchCompile(Torch):
    compiled = True


class LlamaCpp:
    """A GGUF file as llama.cpp runs it, quantized, with a thread for each core."""

    def __init__(self, path: Path, dtype: str):
        if path.is_dir():
            raise ValueError("llama.cpp reads a GGUF file, not a folder")
        llama_cpp = importlib.import_module("llama_cpp")
        self.model = llama_cpp.Llama(str(path), n_ctx=4096, n_batch=2048, n_threads=os.cpu_count(), verbose=False)

    def decoding(self, tokens, prompt: int) -> Callable:
        if len(tokens) > 1:
            raise ValueError("llama-cpp-python decodes one row at a time")
        model, tokens = self.model, tokens[0].tolist()

        def call():
            model.n_tokens = prompt  # rewound: later tokens are evaluated again
            logits = []
            for token in tokens[prompt:]:
                model.eval([token])
                logits.append(self.logits())
            return logits

        model.reset()
        model.eval(tokens[:prompt])
        return call

    def prefill(self, tokens) -> Callable:
        model, tokens = self.model, tokens[0].tolist()

        def call():
            model.reset()
            model.eval(tokens)
            return [self.logits()]

        return call

    def logits(self):
        """Of the last evaluated token."""
        return np.ctypeslib.as_array(self.model._ctx.get_logits(), shape=(1, self.model.n_vocab()))


THEIRS: dict[str, type] = {"transformers": Torch, "torch.compile": TorchCompile, "llama.cpp": LlamaCpp}
QUANTIZED = {"llama.cpp"}  # other weights, so that their logits are not compared


def one_pass(num_bytes: int) -> Callable:
    """A call that reads an array of so many bytes once, with all threads of XLA."""
    array = jnp.ones(num_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: total(array)


# ------------------------------------------------------------------------------------------ how it is timed


def size(tree) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def call_of(contender, job: Job, tokens) -> Callable:
    return contender.decoding(tokens, job.prompt) if job.steps else contender.prefill(tokens)


def compare(ours: Ours, theirs: Mapping, job: Job, tokens, allowed: float) -> dict:
    """Milliseconds of a step of each contender, ours over each in the same round, and over the limit.

    ``theirs`` maps a name to a contender, or to the reason why there is none. A contender whose logits differ by
    more than ``allowed`` is not timed.
    """
    steps = job.steps or 1
    calls = {OURS: call_of(ours, job, tokens)}
    want = np.stack([np.asarray(each) for each in calls[OURS]()])
    wrong, differences = {}, {}
    for name, contender in theirs.items():
        if isinstance(contender, str):
            wrong[name] = contender
            continue
        if llama.torch:
            llama.torch.compiler.reset()  # having seen two shapes, it would compile for any
        try:
            call = call_of(contender, job, tokens)
            got = np.stack([np.asarray(each) for each in call()])
        except Exception as error:  # torch.compile needs a compiler of C++; llama-cpp-python has no rows
            wrong[name] = f"not measured: {' '.join(str(error).split())[:200]}"
            continue
        if name not in QUANTIZED:
            differences[name] = float(np.abs(got - want).max() / np.abs(want).max())
            if differences[name] > allowed:
                wrong[name] = (
                    f"not timed: it differs by {differences[name]:.1e} of the largest, allowed: {allowed:g}"
                )
                continue
        calls[name] = call
    weights = size(ours.params)
    calls[PASS] = one_pass(weights)
    times = in_turns(calls, job.rounds)
    times = {name: [time / (steps if name != PASS else 1) for time in each] for name, each in times.items()}
    row = {
        "allowed": allowed,
        "differences": differences,
        "milliseconds": {name: quartiles(each) for name, each in times.items()} | wrong,
        "ours over theirs": {name: rounded(ratios(times, OURS, name)) for name in theirs if name in times},
    }
    if job.steps:
        model = ours.model
        cache = model.init_cache(batch=job.rows, capacity=job.prompt + job.steps // 2)  # filled, on average
        read = (weights + size((cache.key, cache.value))) / weights
        times["limit"] = [read * time for time in times[PASS]]
        row |= {"limit": quartiles(times["limit"]), "over the limit": rounded(ratios(times, OURS, "limit"))}
    return row


def quartiles(values: Sequence[float]) -> list[float]:
    return rounded(statistics.quantiles(values, n=4, method="inclusive"))


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def peak(kind: type, path: Path, dtype: str) -> float:
    """MiB that decoding a row takes at its peak, beyond what the process held before the weights were read.

    Called in a process of its own. The peak of loading and compiling is left out.
    """
    before = resident("VmRSS")
    tokens = np.ones((1, PROMPT + WRITTEN), np.int32)
    call = kind(path, dtype).decoding(tokens, PROMPT)
    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    call()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def peaks(path: Path, dtype: str, names: Sequence[str]) -> dict[str, float]:
    kinds = {OURS: Ours} | THEIRS
    found = {}
    for name in names:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            found[name] = round(pool.submit(peak, kinds[name], path, dtype).result())
    return found


def contenders(path: Path, dtype: str) -> dict:
    """Each contender, or the reason why it is not measured."""
    found: dict = {}
    for name, kind in THEIRS.items():
        try:
            if issubclass(kind, Torch) and not llama.torch:
                raise ImportError("torch or transformers is not installed")
            found[name] = kind(path, dtype)
        except (ImportError, ValueError) as error:
            found[name] = f"not measured: {' '.join(str(error).split())[:200]}"
    return found


def measure(path: Path, dtypes: Sequence[str] = DTYPES, jobs: Sequence[Job] = JOBS) -> dict:
    """By dtype: the bytes of the weights, peaks of memory, and what :func:`compare` finds of each job."""
    result = {}
    for dtype in dtypes:
        ours, theirs = Ours(path, dtype), contenders(path, dtype)
        rows, rng = {}, np.random.default_rng(1)
        for job in jobs:
            tokens = rng.integers(0, ours.model.vocab_size, (job.rows, job.prompt + job.steps), np.int32)
            rows[str(job)] = compare(ours, theirs, job, tokens, ALLOWED[dtype])
        weights, measured = size(ours.params), [name for name, each in theirs.items() if not isinstance(each, str)]
        del ours, theirs
        gc.collect()
        result[dtype] = {"weights": weights, "peak": peaks(path, dtype, [OURS, *measured]), "jobs": rows}
    return {
        "torch threads": llama.torch.get_num_threads() if llama.torch else None,
        "file": path.name,
        "dtypes": result,
    }


def jobs_of(kept: dict) -> dict[str, dict]:
    dtypes = kept["result"]["dtypes"]
    return {f"{dtype}: {job}": row for dtype, each in dtypes.items() for job, row in each["jobs"].items()}


def table(kept: dict) -> str:
    titles = ["", f"{OURS}, ms", "over the limit", *(f"{name}, ms" for name in THEIRS)]
    titles += [f"{OURS} over {name}" for name in THEIRS]
    rows = []
    for job, row in jobs_of(kept).items():
        times, over = row["milliseconds"], row["ours over theirs"]
        limit = said(row["over the limit"], ".2f") if "limit" in row else "-"
        cells = [times[name] if name not in over else f"{times[name][1]:.3g}" for name in THEIRS]
        cells = [f"{times[OURS][1]:.3g}", limit, *cells]
        rows.append([job, *cells, *(said(over[name], ".2f") if name in over else "-" for name in THEIRS)])
    return markdown(titles, rows)


def whole_table(kept: dict) -> str:
    """The table, with its command, machine and memory, for the .md file."""
    result = kept["result"]
    packages = ", ".join(f"{name} {version}" for name, version in kept["packages"].items())
    memory = [
        [dtype, f"{each['weights'] / 2**20:.0f}", *(str(each["peak"].get(name, "-")) for name in (OURS, *THEIRS))]
        for dtype, each in result["dtypes"].items()
    ]
    lines = [
        f"`{kept['command']}`: {kept['device']}, {kept['processor']}; Python {kept['python']}, jax {kept['jax']}, "
        f"{packages}; {result['torch threads']} threads of torch; {kept['date']}. Medians of {result['file']}, "
        "with quartiles of the ratios round by round. The limit is one pass over an array of the size of the "
        f"weights and the filled cache, timed in the same rounds; the bar is {BAR}.",
        "",
        table(kept),
        "",
        "MiB resident at the peak while a row is decoded, beyond the libraries:",
        "",
        markdown(["", "weights", OURS, *THEIRS], memory),
    ]
    return "\n".join(lines) + "\n"


def draw(kept: dict) -> matplotlib.figure.Figure:
    """A dot for the median time of each contender and job, a bar from quartile to quartile, and the limit."""
    jobs = jobs_of(kept)
    figure = matplotlib.figure.Figure(figsize=(9, 1.4 + 0.7 * len(jobs)), layout="constrained")
    axes = figure.subplots()
    names = (OURS, *THEIRS)
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        timed = [
            (place + 0.15 * (i - 1.5), row["milliseconds"][name])
            for place, row in enumerate(jobs.values())
            if not isinstance(row["milliseconds"][name], str)
        ]
        if timed:
            places, times = zip(*timed, strict=True)
            low, middle, high = zip(*times, strict=True)
            axes.hlines(places, low, high, color=colour, linewidth=3, alpha=0.5)
            axes.plot(middle, places, "o", color=colour, label=name)
    limits = [(place, row["limit"][1]) for place, row in enumerate(jobs.values()) if "limit" in row]
    if limits:
        places, times = zip(*limits, strict=True)
        axes.plot(times, places, "|", color="black", markersize=22, label="limit of memory")
    axes.set(yticks=range(len(jobs)), yticklabels=jobs, ylim=(len(jobs) - 0.5, -0.5), xscale="log")
    axes.set(xlabel="milliseconds of a step, or of a prompt: median and quartiles")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


if __name__ == "__main__":
    packages = ["torch", "transformers", "llama-cpp-python"]
    publish(__file__, measure(Path(sys.argv[1])), table, draw, packages)
    written = Path(__file__).with_name("results") / "real_models.json"
    written.with_suffix(".md").write_text(whole_table(json.loads(written.read_text())))
