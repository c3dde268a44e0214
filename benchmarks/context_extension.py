"""The study: position encodings and extensions of RoPE on sequences longer than the training length.

    python -m benchmarks.context_extension full      # about an hour on two CPU cores
    python -m benchmarks.context_extension quick     # under ten minutes: one seed, shorter sequences

Trains the toy decoder once for each encoding and seed, on the same bytes in the same order, at one length. Reads
held-out text at up to `factor` times the training length. Then extends the RoPE model by every published method,
without and with a short fine-tuning. Every training sequence holds a passkey, later a question and the passkey
again.

Each unit of work writes a file to --workdir. A second run continues after the last complete file. At the end,
tables and plots are made from these files and written to --results.
"""

import dataclasses
import functools
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

import rope_jax
from benchmarks import encodings, extension_methods
from benchmarks.clock import in_turns
from benchmarks.context_extension_report import report
from benchmarks.record import machine
from configs import toy_lm
from configs.run_folder import fail, record_run, write


@dataclasses.dataclass(frozen=True)
class Config:
    """The hyperparameters of the study. All others of the model and its training are the defaults of toy_lm."""

    workdir: Path = Path("runs/context_extension")
    """The folder for the files of finished units of work."""
    results: Path | None = None
    """The folder for context_extension.json, .md and two .png. Default: the workdir."""
    data: Path | None = None
    """As in toy_lm."""

    seeds: int = 3
    length: int = 128
    """L, bytes in a training sequence: a multiple of 64."""
    factor: int = 8
    """Sequences are read, and RoPE is extended, to this many times L: a power of two that divides batch."""
    num_layers: int = 2
    width: int = 128
    steps: int = 600
    batch: int = 16

    tune_steps: int = 60
    """Steps of the fine-tuning at factor * L, with as many bytes a step as in the training."""
    tune_learning_rate: float = 1e-3
    sequences: int = 64
    """Held-out sequences for bits per byte: a multiple of 16."""
    questions: int = 32
    """Passkey questions at each distance: a multiple of 16."""
    generations: int = 8
    """Generations of the search for LongRoPE's factors."""
    rounds: int = 31
    """Rounds of the timings, 2 or more."""


QUICK = Config(
    workdir=Path("runs/context_extension_quick"),
    seeds=1,
    length=64,
    steps=200,
    tune_steps=20,
    sequences=32,
    questions=16,
    generations=2,
    rounds=7,
)
ENCODINGS = ("rope", "sinusoidal", "learned", "t5", "alibi", "none")
AGAIN = "none again"  # timed beside "none", to show the noise of the machine
METHODS = ("unmodified", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3")
RATES = (1.0, 3.0, 10.0, 30.0)  # learning rates tried for the tables of learned and t5
QUESTION, KEYS = 1, np.arange(128, 144)  # bytes that are rare in the corpus
SPAN = 32  # bytes that a point of a curve averages
FREE = {"workdir", "results", "data"}


# ----------------------------------------------------------------------------------------------- the task


def toy_config(config: Config, encoding: str, seed: int, table_rate: float = 1.0) -> encodings.Config:
    kept = {name: getattr(config, name) for name in ("data", "length", "num_layers", "width", "steps", "batch")}
    return encodings.Config(encoding=encoding, seed=seed, table_rate=table_rate, **kept)


def plant(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Plants in every row a key, later the question and then the same key again, at any distance."""
    tokens = tokens.copy()
    rows, length = np.arange(len(tokens)), tokens.shape[1]
    distance = rng.integers(1, length - 1, len(rows))
    question = rng.integers(distance, length - 1)
    key = rng.choice(KEYS, len(rows))
    tokens[rows, question - distance], tokens[rows, question], tokens[rows, question + 1] = key, QUESTION, key
    return tokens


def train(model, text, config: encodings.Config, optimizer, state=None):
    """Trains on planted bytes, from scratch or from a given state. Returns the parameters."""
    if state is None:
        state = toy_lm.initial_state(model, optimizer, config)
    for step in range(config.steps):
        rng = np.random.default_rng((config.seed, step, 1))  # the text itself is drawn by (seed, step)
        batch = jnp.asarray(plant(toy_lm.training_batch(text, config, step), rng))
        state, _ = toy_lm.train_step(state, batch, model=model, optimizer=optimizer)
    return state["params"]


# --------------------------------------------------------------------------------------------- the reading


@functools.partial(jax.jit, static_argnames="model")
def bits(model, params, tokens) -> jax.Array:
    """``[B, T + 1] -> [B, T]``: the bits of each byte, given all bytes before it."""
    logits = model.apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]) / math.log(2)


@functools.partial(jax.jit, static_argnames="model")
def last_byte(model, params, tokens) -> jax.Array:
    """``[B, T] -> [B]``: the likeliest byte after the last one."""
    hidden = model.apply(params, tokens, method="hidden")
    return jnp.argmax(model.apply(params, hidden[:, -1], method="unembed"), axis=-1)


def in_batches(function, model, params, tokens, size=16) -> np.ndarray:
    return np.concatenate([function(model, params, part) for part in np.split(tokens, len(tokens) // size)])


def held_out_windows(held_out: np.ndarray, config: Config) -> np.ndarray:
    """``[sequences, factor * L + 1]``, spread evenly."""
    longest = config.factor * config.length
    starts = np.linspace(0, len(held_out) - longest - 1, config.sequences).astype(int)
    return toy_lm.windows(held_out, starts, longest)


def lengths(config: Config) -> list[int]:
    """L, 2L, 4L, ... factor * L."""
    return [config.length << i for i in range(config.factor.bit_length())]


def read_long(build: Callable, params, held_out, config: Config) -> list[float]:
    """Bits per byte by position, means over SPAN bytes, each byte with everything before it in one window.

    ``build(T)`` is the model for windows of T bytes: byte m is read in the shortest window that holds it.
    """
    text, curve, done, models = held_out_windows(held_out, config), [], 0, list(map(build, lengths(config)))
    for i, length in enumerate(lengths(config)):
        if models[i] is None:  # this model has no such positions
            break
        if models[i] in models[i + 1 :]:  # and reads them alike in the longer window
            continue
        cost = in_batches(bits, models[i], params, text[:, : length + 1]).mean(axis=0)
        curve += cost[done:].reshape(-1, SPAN).mean(axis=1).tolist()
        done = length
    return curve


def read_sliding(model, params, held_out, config: Config) -> list[float]:
    """Bits per byte in windows of L that slide by L/2: no byte sees more than L bytes before it."""
    text, half = held_out_windows(held_out, config), config.length // 2
    starts = range(0, (config.factor - 1) * config.length + 1, half)
    parts = np.concatenate([text[:, start : start + config.length + 1] for start in starts])
    cost = in_batches(bits, model, params, parts).reshape(len(starts), config.sequences, config.length).mean(axis=1)
    return np.concatenate([cost[0, :half], cost[:, half:].ravel()]).reshape(-1, SPAN).mean(axis=1).tolist()


def asked(config: Config) -> list[tuple[int, int]]:
    """Windows and distances of the questions: one question within L, all others in the longest window."""
    near, *_, longest = lengths(config)
    return [(near, 3 * near // 4), *((longest, 3 * length // 4) for length in lengths(config))]


def ask(build: Callable, params, held_out, config: Config) -> dict[str, float]:
    """The share of passkeys found by the byte after the question, by distance and window."""
    found = {}
    for window, distance in asked(config):
        if (model := build(window)) is None:
            continue
        rng = np.random.default_rng((7, window, distance))  # the same questions for every model
        tokens = toy_lm.windows(held_out, rng.integers(0, len(held_out) - window, config.questions), window - 1)
        keys = rng.choice(KEYS, config.questions)
        tokens[:, -1], tokens[:, -1 - distance] = QUESTION, keys
        found[f"{distance} in {window}"] = float(np.mean(in_batches(last_byte, model, params, tokens) == keys))
    return found


# ------------------------------------------------------------------------------------------- the extension


def extended(method: str, config: Config, factors: list[float], length: int) -> rope_jax.core.Schedule:
    """The schedule of a method for windows of ``length``, to reach ``factor * L`` after a training at L."""
    return extension_methods.extended(
        method,
        base=toy_lm.Config.base,
        factor=float(config.factor),
        original=config.length,
        divisors=factors,
        context_length=length,
    )


def search_factors(model, params, text, config: Config, seed: int) -> list[float]:
    """LongRoPE's divisors, by a small evolution (Ding et al. 2024, section 3.2): never falling from pair to pair.

    It starts from position interpolation, NTK-aware and YaRN, and is judged by training text at factor * L.
    """
    head_dim, standard = model.head_dim, rope_jax.Standard(base=toy_lm.Config.base)(model.head_dim).inv_freq
    rng, longest = np.random.default_rng((seed, 2)), config.factor * config.length
    tokens = toy_lm.windows(text, rng.integers(0, len(text) - longest, 4), longest)

    @jax.jit
    def cost(divisors):
        frequencies = rope_jax.Frequencies(
            1 / divisors * standard, extension_methods.longrope_attention_factor(config.factor, config.length)
        )
        there = model.clone(rope=rope_jax.Rope(head_dim, lambda rotary_dim: frequencies))
        return bits.__wrapped__(there, params, tokens).mean()

    known = [extended(method, config, [], longest)(head_dim).inv_freq for method in ("linear", "ntk", "yarn")]
    population = [standard / inv_freq for inv_freq in known]
    scored = sorted((float(cost(jnp.asarray(each, jnp.float32))), tuple(each)) for each in population)
    for _ in range(config.generations):
        for _, parent in scored[:4]:
            for spread in (0.05, 0.3):
                child = np.asarray(parent) * np.exp(spread * rng.normal(size=len(standard)))
                child = np.maximum.accumulate(np.clip(child, 1, 2 * config.factor))
                scored.append((float(cost(jnp.asarray(child, jnp.float32))), tuple(child)))
        scored = sorted(scored)[:4]
    return list(scored[0][1])


# ---------------------------------------------------------------------------------------------- the units


class Study:
    """The units of work in order. Each has a name, and a function that returns its result."""

    def __init__(self, config: Config):
        self.config = config
        self.text, self.held_out = toy_lm.read_corpus(toy_config(config, "rope", 0))
        # One optimiser for each rate: a compiled step belongs to the object.
        self.optimizer = functools.cache(
            lambda rate: encodings.build_optimizer(toy_config(config, "rope", 0, rate))
        )
        self.tuner = encodings.build_optimizer(self.tuning(0))

    def tuning(self, seed: int) -> encodings.Config:
        config = self.config
        return dataclasses.replace(
            toy_config(config, "rope", 1000 + seed),  # other bytes than those of the training
            length=config.factor * config.length,
            batch=config.batch // config.factor,
            steps=config.tune_steps,
            warmup=max(config.tune_steps // 6, 1),
            learning_rate=config.tune_learning_rate,
        )

    def units(self):
        for encoding in ENCODINGS:
            if encoding in ("learned", "t5"):
                yield f"rates-{encoding}", functools.partial(self.rates, encoding)
            for seed in range(self.config.seeds):
                yield f"params-{encoding}-{seed}", functools.partial(self.train, encoding, seed)
                yield f"read-{encoding}-{seed}", functools.partial(self.read, encoding, seed)
        for seed in range(self.config.seeds):
            yield f"factors-{seed}", functools.partial(self.factors, seed)
        for method in METHODS:
            for seed in range(self.config.seeds):
                yield f"extend-{method}-{seed}", functools.partial(self.extend, method, seed)
        yield "speed", self.speed

    def rates(self, encoding):
        """Bits per training byte after half of the steps, by the rate of the table, at a separate seed."""
        tokens = held_out_windows(self.text, self.config)[:, : self.config.length + 1]
        cost = {}
        for rate in RATES:
            half = toy_config(self.config, encoding, 999, rate)
            half = dataclasses.replace(half, steps=max(half.steps // 2, 1))
            model = encodings.build_model(half)
            params = train(model, self.text, half, encodings.build_optimizer(half))
            cost[rate] = float(in_batches(bits, model, params, tokens).mean())
        return cost

    def rate(self, encoding) -> float:
        """The best rate for the table of an encoding; 1 without a table."""
        if encoding not in ("learned", "t5"):
            return 1.0
        cost = self.kept(f"rates-{encoding}")
        return float(min(cost, key=cost.get))

    def train(self, encoding, seed):
        config = toy_config(self.config, encoding, seed, self.rate(encoding))
        return train(encodings.build_model(config), self.text, config, self.optimizer(config.table_rate))

    def read(self, encoding, seed):
        model = encodings.build_model(toy_config(self.config, encoding, seed))
        params = self.kept(f"params-{encoding}-{seed}")

        def build(length):
            return None if encoding == "learned" and length > self.config.length else model

        sliding = read_sliding(model, params, self.held_out, self.config)
        return self.reading(build, params) | {"sliding": sliding}

    def reading(self, build, params):
        where = params, self.held_out, self.config
        return {"long": read_long(build, *where), "passkey": ask(build, *where)}

    def factors(self, seed):
        model = encodings.build_model(toy_config(self.config, "rope", seed))
        return search_factors(model, self.kept(f"params-rope-{seed}"), self.text, self.config, seed)

    def extend(self, method, seed):
        factors, params = self.kept(f"factors-{seed}"), self.kept(f"params-rope-{seed}")
        model = encodings.build_model(toy_config(self.config, "rope", seed))

        def build(length):
            schedule = extended(method, self.config, factors, length)
            return model.clone(rope=rope_jax.Rope(model.head_dim, schedule))

        tuning = self.tuning(seed)
        plain = self.reading(build, params)
        state = {"params": params, "optimizer": self.tuner.init(params), "step": jnp.zeros((), jnp.int32)}
        tuned = train(build(tuning.length), self.text, tuning, self.tuner, jax.tree.map(jnp.copy, state))
        return {"plain": plain, "tuned": self.reading(build, tuned)}

    def speed(self):
        """Milliseconds of every encoding in turn, round by round: a training step, a cached token, a whole pass.

        The result names the machine, since a study may continue on another machine.
        """
        config, longest = self.config, self.config.factor * self.config.length
        before = longest - config.rounds - 1
        jobs: dict[str, dict[str, Callable]] = {
            f"training step, {config.batch} x {config.length}": {},
            f"training step, {config.batch // config.factor} x {longest}": {},
            f"cached token after {before} to {longest}": {},
            f"pass over {longest} without a cache": {},
        }
        step, long_step, decode, whole = jobs.values()
        for name in (*ENCODINGS, AGAIN):
            short = toy_config(config, "none" if name == AGAIN else name, 0)
            long = dataclasses.replace(short, length=longest, batch=config.batch // config.factor)
            step[name] = training_step(short, self.text, self.optimizer(1.0))
            long_step[name] = training_step(long, self.text, self.optimizer(1.0))
            model = encodings.build_model(long)
            params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
            text = toy_lm.windows(self.text, np.zeros(1, int), longest - 1)
            decode[name] = cached_step(model, params, text[:, :before], capacity=longest)
            whole[name] = functools.partial(last_byte, model, params, text)
        times = {job: in_turns(calls, config.rounds) for job, calls in jobs.items()}
        return machine() | {"milliseconds": times}

    def results(self) -> dict:
        """The results of all units: readings by seed, times by round."""
        seeds = range(self.config.seeds)
        methods = {m: [self.kept(f"extend-{m}-{seed}") for seed in seeds] for m in METHODS}
        return {
            "command": " ".join(["python", "-m", "benchmarks.context_extension", *sys.argv[1:]]),
            **machine(),
            "config": {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE} | {"span": SPAN},
            "encodings": {e: [self.kept(f"read-{e}-{seed}") for seed in seeds] for e in ENCODINGS},
            "methods": {m: {key: [each[key] for each in both] for key in both[0]} for m, both in methods.items()},
            "rates tried": {e: self.kept(f"rates-{e}") for e in ENCODINGS if e in ("learned", "t5")},
            "LongRoPE's factors": [self.kept(f"factors-{seed}") for seed in seeds],
            "speed": self.kept("speed"),
        }

    def fingerprint(self) -> dict:
        """All hyperparameters, those of toy_lm included, and a digest of the text. A workdir must match it."""
        mine = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE}
        theirs = toy_lm.fingerprint(toy_config(self.config, "rope", 0), (self.text, self.held_out))
        return theirs | mine

    def path(self, name: str) -> Path:
        return self.config.workdir / (name + (".msgpack" if name.startswith("params") else ".json"))

    def kept(self, name: str):
        """The result of a finished unit."""
        try:
            if name.startswith("params"):
                return flax.serialization.msgpack_restore(self.path(name).read_bytes())
            return json.loads(self.path(name).read_text())
        except Exception as error:
            fail(f"{self.path(name)} cannot be read, remove it to have it made again: {error}")

    def keep(self, name: str, value) -> None:
        """Writes the result of a unit atomically: a file is complete even if the study is killed."""
        new, path = self.config.workdir / "unfinished", self.path(name)
        if name.startswith("params"):
            new.write_bytes(flax.serialization.msgpack_serialize(jax.device_get(value)))
        else:
            try:
                new.write_text(json.dumps(value, allow_nan=False) + "\n")
            except ValueError:
                fail(f"{name} has figures that are not finite: its model diverged")
        new.replace(path)


def training_step(config: encodings.Config, text, optimizer) -> Callable:
    model, step = encodings.build_model(config), 0
    state = toy_lm.initial_state(model, optimizer, config)
    batch = jnp.asarray(toy_lm.training_batch(text, config, step))

    def call():
        nonlocal state
        state, loss = toy_lm.train_step(state, batch, model=model, optimizer=optimizer)
        return state, loss

    return call


def cached_step(model, params, prompt, capacity) -> Callable:
    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, token, cache):
        hidden, cache = model.apply(params, token, cache=cache, method="hidden")
        return model.apply(params, hidden[:, -1], method="unembed"), cache

    _, cache = step(params, prompt, model.init_cache(batch=1, capacity=capacity))

    def call():
        nonlocal cache
        logits, cache = step(params, prompt[:, :1], cache)
        return logits

    return call


def main(config: Config) -> None:
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, int | float) and not 0 < value < math.inf:
            fail(f"--{name.replace('_', '-')} must be positive, got {value}")
    if config.factor < 2 or config.factor & (config.factor - 1):
        fail(f"--factor must be a power of two, 2 or more, got {config.factor}")
    for name, step in (("length", 2 * SPAN), ("sequences", 16), ("questions", 16)):
        if getattr(config, name) % step:
            fail(f"--{name} must be a multiple of {step}, got {getattr(config, name)}")
    if config.batch % config.factor:
        fail(f"--batch must be a multiple of --factor {config.factor}, got {config.batch}")
    if not 2 <= config.rounds < config.length:
        fail(f"--rounds must be at least 2 and below --length {config.length}, got {config.rounds}")
    study = Study(config)
    longest = config.factor * config.length
    if min(len(study.text), len(study.held_out)) <= longest + 1:
        fail(f"--data must hold more than {longest + 1} bytes of training and of held-out text")

    try:
        for encoding in ENCODINGS:  # fail early, before any model is trained
            model = encodings.build_model(toy_config(config, encoding, 0))
            jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, config.length), jnp.int32))
        folder = config.results or config.workdir
        for path in (config.workdir, folder):
            path.mkdir(parents=True, exist_ok=True)
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    mine = study.fingerprint()
    record_run(config.workdir / "config.json", mine, begun=any(config.workdir.glob("read-*")))

    units = list(study.units())
    try:
        with tqdm.tqdm(total=len(units)) as bar:
            for name, unit in units:
                bar.set_description(name)
                if not study.path(name).exists():
                    study.keep(name, unit())
                bar.update()
    except KeyboardInterrupt:
        print(f"\nstopped in {name}; run again to go on from there", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None

    results = study.results()
    write(folder / "context_extension.json", json.dumps(results, indent=1).encode() + b"\n")
    print(report(results, folder))


if __name__ == "__main__":
    configs = {"full": ("the study, about an hour on two cores", Config()), "quick": ("under ten minutes", QUICK)}
    main(tyro.extras.overridable_config_cli(configs))
