"""Reads a trained model beyond its training length: perplexity and passkeys by schedule, base and pair.

    python -m benchmarks.real_context SmolLM2-135M-Instruct.Q4_1.gguf

Nothing is trained. Each schedule reads one long text in a single causal pass through a cache, up to 4 times the
training length, so that the losses at all positions come from one pass. Passkeys are planted in the same text and
asked for after 1, 2 and 4 times the training length. Each unit of work writes a file to --workdir. A second run
continues after the last complete file, and a run with --report-only makes the tables of the finished units.
"""

import dataclasses
import functools
import hashlib
import json
import math
import platform
import pydoc_data.topics
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import rope_jax
from benchmarks.extension_methods import extended, longrope_attention_factor
from benchmarks.real_context_report import report
from benchmarks.record import machine
from rope_jax.analysis import incomplete_pairs

ORIGINAL = 8192  # tokens: the training length of SmolLM2
FACTOR = 4  # the longest text over the training length
LENGTHS = tuple(ORIGINAL * factor for factor in (1, 2, FACTOR))
CHUNK = 1024  # tokens of one prefill step
BIN = 512  # tokens whose losses are averaged
PLACES = 80  # planted passkeys, evenly spaced
QUESTIONS = 19  # asked at each length: at depths of 5 %, 10 %, ... 95 %
BASES = (0.25, 0.5, 2.0, 4.0, 8.0)  # over the trained base
PAIR_TOKENS = 2048  # tokens that are read with one pair frozen
WINDOW, SINKS, ROWS = 256, 4, 8  # of the sliding caches: tokens, sink tokens, rows of text
GENERATIONS = 4  # of the search for LongRoPE's divisors
TOGETHER = (2, 3, 4)  # pairs that are slowed down together
SCHEDULES = ("unmodified", "yarn", "ntk", "dynamic", "longrope", "llama3", "linear")
NAMES = (
    "Anna Ben Carla David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nora Oscar Paul Quinn Rosa "
    "Simon Tara Adam Bella Chris Diana Eric Fiona George Helen Ivan Julia Karl Laura Mark Nina Otto Paula "
    "Robin Sarah Tom Vera Alan Betty Colin Dora Edgar Flora Gavin Hanna Ian Joan Kevin Linda Max Nancy "
    "Owen Penny Ralph Sally Tim Wendy Alex Brian Clara Daniel Ella Fred Gloria Hugo Irene James Karen "
    "Lucas Mary Nick Olivia Peter Rachel Steve Ted Zoe "
)


class Weights(NamedTuple):
    """The model, its variables, and the function from text to token ids."""

    model: rope_jax.Decoder
    params: dict
    encode: Callable[[str], list[int]]


def load(path: Path) -> Weights:
    model, params, _, tokenizer, *_ = rope_jax.interop.load_gguf(path)
    return Weights(model, params, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


# ------------------------------------------------------------------------------------------------ the text


def documentation() -> str:
    """The Python documentation's pages on the language, as the interpreter ships them for ``help()``."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


class Passkey(NamedTuple):
    """A planted sentence: its first token, the name, the digits."""

    start: int
    name: str
    digits: str


def sentence_of(passkey: Passkey) -> str:
    return "\n\n" + " ".join([f"{passkey.name}: {passkey.digits}."] * 3) + "\n\n"


def question_of(passkey: Passkey) -> str:
    return f"\n\n{passkey.name}: "


def answer_of(passkey: Passkey) -> str:
    return passkey.digits


def plant(tokens: np.ndarray, encode, length: int, places: int):
    """Plants a sentence with a passkey in each of ``places`` equal parts of the text.

    Returns:
      tokens int32 ``[length + 1]``; bool ``[length + 1]``, False at planted tokens; and the passkeys.
    """
    rng = np.random.default_rng(16)
    part, pieces, ours, passkeys, used = length // places, [], [], [], 0
    for i, name in enumerate(NAMES.split()[:places]):
        # The sentence ends where the next part begins: the question at this depth follows at a fixed distance.
        passkey = Passkey(0, name, "".join(map(str, rng.integers(0, 10, 5))))
        sentence = encode(sentence_of(passkey))
        fill = part - len(sentence)
        passkeys.append(passkey._replace(start=i * part + fill))
        pieces += [tokens[used : used + fill], sentence]
        ours += [np.ones(fill, bool), np.zeros(len(sentence), bool)]
        used += fill
    rest = length + 1 - places * part
    pieces.append(tokens[used : used + rest])
    ours.append(np.ones(rest, bool))
    return np.concatenate(pieces).astype(np.int32), np.concatenate(ours), passkeys


# --------------------------------------------------------------------------------------------- the reading


def nats(model, params, hidden, targets, rows=256) -> jax.Array:
    """``[T, D], [T] -> [T]``: the loss of each target. Logits exist for ``rows`` tokens at a time."""

    def part(ends):
        logits = model.apply(params, ends[0], method="unembed")
        return optax.softmax_cross_entropy_with_integer_labels(logits, ends[1])

    return jax.lax.map(part, (hidden, targets), batch_size=rows)


def rows_of_nats(model, params, hidden, targets):
    flat = nats(model, params, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    return flat.reshape(targets.shape)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def read_chunk(model, params, tokens, targets, cache):
    """Losses ``[B, T]`` of the targets, and the cache after the tokens ``[B, T]``."""
    hidden, cache = model.apply(params, tokens, cache=cache, method="hidden")
    return rows_of_nats(model, params, hidden, targets), cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def answer(model, params, tokens, targets, cache):
    """The losses of the targets ``[T]``, whether each is the likeliest token, and the cache as it was."""
    before = cache.num_tokens
    hidden, cache = model.apply(params, tokens[None], cache=cache, method="hidden")
    hidden = hidden[0, -targets.size :]
    likeliest = jnp.argmax(model.apply(params, hidden, method="unembed"), axis=-1)
    return nats(model, params, hidden, targets), likeliest == targets, cache.truncate(before)


def ask(model, params, cache, passkey: Passkey, encode):
    """The share of the key's tokens that are the likeliest, their mean loss, and the cache as it was.

    Greedy decoding finds the key exactly if the share is 1: then each of its tokens is the likeliest after the
    question and the tokens of the key before it.
    """
    question, key = encode(question_of(passkey)), encode(answer_of(passkey))
    tokens, targets = np.array([*question, *key[:-1]], np.int32), np.array(key, np.int32)
    loss, right, cache = answer(model, params, tokens, targets, cache)
    return np.asarray(right).mean(), float(np.mean(loss)), cache


def asked(passkeys: Sequence[Passkey], length: int) -> Sequence[Passkey]:
    """QUESTIONS of the passkeys in the first ``length`` tokens, evenly spaced, without the last one."""
    near = [each for each in passkeys if each.start < length]
    step = max(len(near) // (QUESTIONS + 1), 1)
    return near[step - 1 : -1 : step]


def read_on(model, params, text, cache, start: int, end: int, chunk: int):
    """The loss of each token from ``start`` to ``end``, after the tokens in the cache, and the next cache."""
    loss = []
    for begin in range(start, end, chunk):
        tokens, targets = text[None, begin : begin + chunk], text[None, begin + 1 : begin + chunk + 1]
        part, cache = read_chunk(model, params, tokens, targets, cache)
        loss.append(np.asarray(part[0]))
    return np.concatenate(loss), cache


def ask_all(model, params, cache, passkeys, encode, length: int):
    """``[depth, share, loss]`` of each question after ``length`` tokens, and the cache as it was."""
    found = []
    for passkey in asked(passkeys, length):
        share, loss, cache = ask(model, params, cache, passkey, encode)
        found.append([passkey.start / length, share, loss])
    return found, cache


def save_state(path: Path, cache: rope_jax.KVCache) -> None:
    """Keys and values of a row's tokens, without free slots."""
    tokens = int(cache.num_tokens[0])
    key, value = (np.asarray(part[..., :tokens, :]) for part in (cache.key, cache.value))
    unfinished = path.with_name("unfinished.npz")
    np.savez(unfinished, key=key, value=value, context_length=cache.context_length)
    unfinished.replace(path)


def restore_state(path: Path, cache: rope_jax.KVCache) -> rope_jax.KVCache:
    """The empty cache, filled with a saved row."""
    with np.load(path) as saved:
        tokens = saved["key"].shape[-2]
        key, value = (
            getattr(cache, name).at[..., :tokens, :].set(jnp.asarray(saved[name])) for name in ("key", "value")
        )
        counters = {"num_tokens": jnp.full_like(cache.num_tokens, tokens)}
        counters["context_length"] = jnp.asarray(saved["context_length"])
    return dataclasses.replace(cache, key=key, value=value, **counters)


@functools.partial(jax.jit, static_argnames=("model", "num_sink_tokens", "capacity"))
def read_sliding(model, params, tokens, *, capacity: int, num_sink_tokens: int):
    """Losses ``[B, T]`` of ``[B, T + 1]``, one token at a time through a cache that evicts its oldest token."""
    cache = model.init_cache(
        batch=tokens.shape[0], capacity=capacity, eviction="sliding", num_sink_tokens=num_sink_tokens
    )

    def step(cache, ends):
        hidden, cache = model.apply(params, ends[0][:, None], cache=cache, method="hidden")
        logits = model.apply(params, hidden[:, 0], method="unembed")
        return cache, optax.softmax_cross_entropy_with_integer_labels(logits, ends[1])

    return jax.lax.scan(step, cache, (tokens[:, :-1].T, tokens[:, 1:].T))[1].T


@functools.partial(jax.jit, static_argnames=("model", "options"))
def read_option(model, options, params, tokens, index):
    """Losses ``[T]`` of ``[T + 1]`` at the frequencies ``options[index]``: one program for all options."""

    def chosen(rotary_dim):
        return rope_jax.core.FrequencyChoice(options, index)

    model = with_schedule(model, chosen)
    hidden = model.apply(params, tokens[None, :-1], method="hidden")
    return nats(model, params, hidden[0], tokens[1:])


# ------------------------------------------------------------------------------------------- the schedules


def with_schedule(model, schedule):
    """The same model with another schedule; its pairs of features stay."""
    return model.clone(rope=dataclasses.replace(model.rope, schedule=schedule))


def schedule_of(name: str, base: float, divisors: Sequence[float]) -> rope_jax.core.Schedule:
    """The schedule of a method, to reach ``FACTOR * ORIGINAL`` after a training at ORIGINAL.

    Dynamic NTK and LongRoPE read the context length from the cache, chunk by chunk.
    """
    return extended(name, base=base, factor=float(FACTOR), original=ORIGINAL, divisors=divisors)


def spread_positions(tokens: int, parts: int = 4) -> np.ndarray:
    """Positions of a short text in equal parts, spread evenly up to ``FACTOR * ORIGINAL`` (as in PoSE).

    Zhu et al. 2023, "PoSE: Efficient context window extension of LLMs via positional skip-wise training".
    """
    size = tokens // parts
    starts = np.linspace(0, FACTOR * ORIGINAL - size, parts).astype(np.int32)
    return np.concatenate([start + np.arange(size, dtype=np.int32) for start in starts])


@functools.partial(jax.jit, static_argnames=("model", "attention_factor"))
def spread_cost(model, params, tokens, positions, inv_freq, attention_factor):
    """The mean loss at these positions and frequencies: data, so that one program serves the search."""

    def given(rotary_dim):
        return rope_jax.Frequencies(inv_freq, attention_factor)

    hidden = with_schedule(model, given).apply(params, tokens[None, :-1], positions[None], method="hidden")
    return nats(model, params, hidden[0], tokens[1:]).mean()


def search_divisors(cost: Callable, head_dim: int, base: float, generations: int) -> dict:
    """LongRoPE's divisors, by a small evolution (Ding et al. 2024, section 3.2): never falling from pair to pair.

    The search starts from position interpolation, NTK-aware and YaRN.
    """
    rng, standard = np.random.default_rng(2), rope_jax.Standard(base=base)(head_dim).inv_freq
    tried: list[tuple[float, tuple[float, ...]]] = []
    start = {}
    for name in ("linear", "ntk", "yarn"):
        divisors = standard / schedule_of(name, base, ())(head_dim).inv_freq
        start[name] = cost(standard / divisors)
        tried.append((start[name], tuple(divisors)))
    for _ in range(generations):
        for _, parent in sorted(tried)[:3]:
            change = np.interp(np.linspace(0, 4, standard.size), range(5), 0.25 * rng.normal(size=5))
            child = np.maximum.accumulate(np.clip(np.asarray(parent) * np.exp(change), 1, 2 * FACTOR))
            tried.append((cost(standard / child), tuple(child)))
    best = min(tried)
    return {"start": start, "tried": len(tried), "cost": best[0], "divisors": list(best[1])}


# ----------------------------------------------------------------------------------------------- the units


def bins(loss: np.ndarray, ours: np.ndarray, size: int) -> list[float]:
    """Mean losses of each ``size`` tokens, planted tokens left out."""
    parts = [slice(start, start + size) for start in range(0, loss.size, size)]
    return [float(loss[part][ours[part]].mean()) for part in parts]


def repeated(tokens: np.ndarray, size: int, width: int = 16) -> list[float]:
    """The share of tokens, of each ``size``, that begin ``width`` tokens which stand earlier in the text too."""
    seen: set[tuple] = set()
    again = np.zeros(len(tokens) // size * size, bool)
    for i in range(again.size):
        passage = tuple(tokens[i : i + width])
        again[i] = passage in seen
        seen.add(passage)
    return again.reshape(-1, size).mean(axis=1).tolist()


class Study:
    """The units of work in order. Each has a name, and a function that returns its result."""

    def __init__(self, path: Path, workdir: Path):
        self.path, self.workdir = path, workdir

    @functools.cached_property
    def weights(self) -> Weights:
        return load(self.path)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        return np.array(self.weights.encode(documentation()), np.int32)

    @functools.cached_property
    def planted(self):
        return plant(self.tokens, self.weights.encode, LENGTHS[-1], PLACES)

    @functools.cached_property
    def base(self) -> float:
        return self.weights.model.rope.schedule.base

    def units(self):
        yield "text", self.text
        yield "pairs", self.pairs
        yield "cures", self.cures
        yield "together", self.together
        yield "divisors", self.divisors
        for length in LENGTHS[:2]:
            for name in SCHEDULES:
                yield f"read-{name}-{length}", functools.partial(self.read, name, length)
            if length == ORIGINAL:
                yield "fresh", self.fresh
            for factor in BASES:
                yield f"base-{factor:g}-{length}", functools.partial(self.read_base, factor, length)
        for sinks in (SINKS, 0):
            yield f"sliding-{sinks}", functools.partial(self.sliding, sinks)
        for name in SCHEDULES:
            yield f"read-{name}-{LENGTHS[-1]}", functools.partial(self.read, name, LENGTHS[-1])

    def text(self):
        written = documentation()
        return {
            "source": f"pydoc_data/topics.py of Python {platform.python_version()}, topics in alphabetical order",
            "bytes": len(written.encode()),
            "sha256": hashlib.sha256(written.encode()).hexdigest(),
            "tokens": len(self.tokens),
            "read": LENGTHS[-1],
            "passkeys": len(self.planted[2]),
            "file": self.path.name,
            "base": self.base,
            "pairs": self.weights.model.rope.num_pairs,
            "repeated": repeated(self.planted[0], BIN),
        }

    def pairs(self):
        """The loss with one pair frozen: its mean difference and standard error over the same tokens."""
        model, params, _ = self.weights
        standard = self.standard
        frozen = [np.where(np.arange(standard.size) == pair, 0.0, standard) for pair in range(standard.size)]
        options = tuple(map(rope_jax.Frequencies, [standard, *frozen]))
        tokens = jnp.asarray(self.tokens[: PAIR_TOKENS + 1])
        plain, *without = (np.asarray(read_option(model, options, params, tokens, i)) for i in range(len(options)))
        change = [each - plain for each in without]
        return {
            "loss": float(plain.mean()),
            "change": [float(each.mean()) for each in change],
            "error": [float(each.std(ddof=1) / math.sqrt(each.size)) for each in change],
        }

    @functools.cached_property
    def spread(self) -> Callable:
        """The mean loss by frequencies and attention factor, of tokens whose positions are spread."""
        model, params, _ = self.weights
        tokens = jnp.asarray(self.tokens[-PAIR_TOKENS - 1 :])  # the end of the documentation: not read otherwise
        positions = jnp.asarray(spread_positions(PAIR_TOKENS))

        def cost(inv_freq, attention_factor=1.0):
            inv_freq = jnp.asarray(inv_freq, jnp.float32)
            return float(spread_cost(model, params, tokens, positions, inv_freq, attention_factor))

        return cost

    @property
    def standard(self) -> np.ndarray:
        return rope_jax.Standard(base=self.base)(self.weights.model.head_dim).inv_freq

    def divisors(self):
        scaled = functools.partial(self.spread, attention_factor=longrope_attention_factor(FACTOR, ORIGINAL))
        return search_divisors(scaled, self.weights.model.head_dim, self.base, GENERATIONS)

    def cures(self):
        """The loss at spread positions with one frequency divided, for each pair without a turn in training."""
        standard = self.standard
        pairs = np.flatnonzero(incomplete_pairs(rope_jax.Frequencies(standard), ORIGINAL))
        divided = [np.where(np.arange(standard.size) == pair, standard / FACTOR, standard) for pair in pairs]
        slow = np.where(np.arange(standard.size) >= pairs[0], standard / FACTOR, standard)
        return {
            "unmodified": self.spread(standard),
            "all": self.spread(slow),
            "one": {str(pair): self.spread(each) for pair, each in zip(pairs, divided, strict=True)},
        }

    def together(self):
        """The loss with the frequencies of the best pairs of the unit before divided together, by their pairs."""
        standard, one = self.standard, self.kept("cures")["one"]
        best = [int(pair) for pair in sorted(one, key=one.get)]
        found = {}
        for count in TOGETHER:
            chosen = np.isin(np.arange(standard.size), best[:count])
            key = ", ".join(map(str, sorted(best[:count])))
            found[key] = self.spread(np.where(chosen, standard / FACTOR, standard))
        return found

    def read(self, name, length):
        """From the length before to this one. The keys and values so far lie in a file."""
        model, params, encode = self.weights
        text, ours, passkeys = self.planted
        divisors = self.kept("divisors")["divisors"] if name == "longrope" else ()
        model = with_schedule(model, schedule_of(name, self.base, divisors))
        cache = model.init_cache(batch=1, capacity=length + 64)  # 64 is enough for a question
        state, start = self.workdir / f"state-{name}.npz", 0
        if length > LENGTHS[0]:
            start, cache = length // 2, restore_state(state, cache)
        if int(cache.num_tokens[0]) != start:
            raise ValueError(f"{state} must hold {start} tokens, got {cache.num_tokens[0]}: remove read-{name}-*")
        loss, cache = read_on(model, params, text, cache, start, length, CHUNK)
        found, cache = ask_all(model, params, cache, passkeys, encode, length)
        if length < LENGTHS[-1]:
            save_state(state, cache)
        return {"loss": bins(loss, ours[start + 1 : length + 1], BIN), "passkeys": found}

    def schedule_results(self, name):
        """The lengths that are finished: losses in one list, questions by length; None if there is none."""
        parts = {length: self.kept(f"read-{name}-{length}") for length in LENGTHS}
        done = {length: part for length, part in parts.items() if part}
        if not done:
            return None
        return {
            "loss": [each for part in done.values() for each in part["loss"]],
            "passkeys": {str(length): part["passkeys"] for length, part in done.items()},
        }

    def fresh(self):
        """Windows of the training length, each read from its own position 0; the second half of each counts.

        The first window is the beginning of the long text.
        """
        model, params, _ = self.weights
        text, ours, _ = self.planted
        options = tuple(rope_jax.Standard(base=each * self.base)(model.head_dim) for each in (1.0, *BASES))
        halves = {}
        for start in range(0, LENGTHS[-1], ORIGINAL):
            tokens = jnp.asarray(text[start : start + ORIGINAL + 1])
            loss = np.asarray(read_option(model, options, params, tokens, 0))
            half = ORIGINAL // 2
            halves[str(start + half)] = bins(loss[half:], ours[1 + start + half : 1 + start + ORIGINAL], BIN)
        return halves

    def sliding(self, sinks):
        """The mean over rows of text from evenly spaced places, in bins of a quarter of the window."""
        model, params, _ = self.weights
        length = FACTOR * WINDOW
        starts = np.linspace(0, len(self.tokens) - length - 1, ROWS).astype(int)
        rows = jnp.asarray(np.stack([self.tokens[start : start + length + 1] for start in starts]))
        loss = read_sliding(model, params, rows, capacity=WINDOW, num_sink_tokens=sinks)
        return np.asarray(loss).mean(axis=0).reshape(-1, WINDOW // 4).mean(axis=1).tolist()

    def read_base(self, factor, length):
        model, params, _ = self.weights
        text, ours, _ = self.planted
        options = tuple(rope_jax.Standard(base=each * self.base)(model.head_dim) for each in (1.0, *BASES))
        tokens = jnp.asarray(text[: length + 1])
        loss = np.asarray(read_option(model, options, params, tokens, 1 + BASES.index(factor)))
        return bins(loss, ours[1 : length + 1], BIN)

    def kept(self, name):
        path = self.workdir / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def results(self) -> dict:
        """All finished units; None for a unit that is missing."""
        return {
            "command": "python -m benchmarks.real_context " + self.path.name,
            **machine(),
            "config": {
                "original": ORIGINAL,
                "lengths": LENGTHS,
                "bin": BIN,
                "chunk": CHUNK,
                "questions": QUESTIONS,
                "pair tokens": PAIR_TOKENS,
                "window": WINDOW,
                "sinks": SINKS,
                "rows": ROWS,
            },
            "text": self.kept("text"),
            "schedules": {name: self.schedule_results(name) for name in SCHEDULES},
            "fresh": self.kept("fresh"),
            "sliding": {str(sinks): self.kept(f"sliding-{sinks}") for sinks in (SINKS, 0)},
            "bases": {
                f"{factor:g}": {str(length): self.kept(f"base-{factor:g}-{length}") for length in LENGTHS[:2]}
                for factor in BASES
            },
            "pairs": self.kept("pairs"),
            "cures": self.kept("cures"),
            "together": self.kept("together"),
            "divisors": self.kept("divisors"),
        }


@dataclasses.dataclass(frozen=True)
class Config:
    """Reads a trained model beyond its training length."""

    path: tyro.conf.Positional[Path]
    """The weights of SmolLM2-135M-Instruct."""
    workdir: Path = Path("runs/real_context")
    """The folder for the files of finished units of work."""
    results: Path | None = None
    """The folder for real_context.json, .md and the pictures. Default: the workdir."""
    report_only: bool = False
    """Makes the tables and pictures of the finished units, and reads nothing."""
    only: str = ""
    """A regular expression: runs the units whose names match."""


def main(config: Config) -> None:
    study, folder = Study(config.path, config.workdir), config.results or config.workdir
    for path in (config.workdir, folder):
        path.mkdir(parents=True, exist_ok=True)
    for name, unit in [] if config.report_only else study.units():
        path = config.workdir / f"{name}.json"
        if path.exists() or not re.match(config.only, name):
            continue
        begun = time.perf_counter()
        text = json.dumps(unit()) + "\n"
        unfinished = config.workdir / "unfinished"
        unfinished.write_text(text)
        unfinished.replace(path)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    results = study.results()
    (folder / "real_context.json").write_text(json.dumps(results, indent=1) + "\n")
    print(report(results, folder))


if __name__ == "__main__":
    main(tyro.cli(Config))
