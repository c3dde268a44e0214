"""Trains a small decoder with RoPE on the bytes of Python's standard library.

    python configs/toy_lm.py            # three minutes on two CPU cores: below 2.4 bits per byte on held-out files
    python configs/toy_lm.py --base 500000 --layout interleaved --workdir runs/base
    python configs/toy_lm.py --schedule yarn factor=4 original_length=64 --workdir runs/yarn
    python configs/toy_lm.py --data FILE_OR_FOLDER --workdir runs/mine

Ctrl-C saves a checkpoint and stops. The same command then resumes and reaches the same losses, bit for bit.
Install with pip install -e ".[train]". For several devices and processes: examples/train_distributed.py.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import math
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

import rope_jax
from configs.run_folder import fail, keep_metrics, locked, plot_losses, read, record_run, stop_signals, write


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small Llama-shaped decoder on bytes and samples from it."""

    data: Path | None = None  # A text file or a folder of text files. Default: Python's standard library.
    workdir: Path = Path("runs/toy_lm")  # The folder for checkpoints, metrics.jsonl, loss.png and sample.txt.
    seed: int = 0
    schedule: tuple[str, ...] = ("standard",)  # A schedule and its fields: yarn factor=4 original_length=64.
    base: float = 10_000.0  # b of the schedule: theta_i = b^(-2i/R).
    layout: Literal["half", "interleaved"] = "half"  # Pairs features i and i + R/2, or 2i and 2i + 1.
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 352
    length: int = 128  # Bytes in a training sequence.
    batch: int = 16
    steps: int = 450
    learning_rate: float = 5e-3  # The peak, after a linear warm-up; a cosine then decays it to a tenth.
    warmup: int = 40
    save_every: int = 100  # Steps between checkpoints, each with the loss on held-out text.


MAY_CHANGE = {"data", "workdir", "save_every"}  # if a run is resumed: the loss does not depend on these flags
SCHEDULES = ("Standard", "Linear", "NTKAware", "DynamicNTK", "Yarn", "LongRope", "Llama3", "Proportional")
PROMPT, SAMPLE_BYTES, TEMPERATURE = "def ", 300, 0.7


# ------------------------------------------------------------------------------------------------- data


def read_corpus(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Training bytes and held-out bytes: every tenth file is held out, or the last tenth of a single file."""
    if config.data is None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    elif config.data.exists():
        files = [path for path in (config.data, *sorted(config.data.rglob("*"))) if path.is_file()]
    else:
        fail(f"--data must be a file or a folder, got {config.data}")
    try:
        texts = [text for path in files if (text := path.read_bytes()) and b"\0" not in text]  # NUL: a binary file
    except OSError as error:
        fail(f"--data must be readable: {error}")
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        texts = [texts[0][cut:], texts[0][:cut]]  # The last tenth comes first: index 0 is held out.
    # NUL, which no text file contains, separates the files.
    parts = {"training": [text for i, text in enumerate(texts) if i % 10], "held-out": texts[::10]}
    for name, part in parts.items():
        needed, size = config.length + 1, len(b"\0".join(part))
        if size < needed:
            where = f"{size} in {len(files)} file(s) of {config.data}"
            fail(f"--length {config.length} needs {needed} bytes of {name} text, got {where}")
    train, held_out = (np.frombuffer(b"\0".join(part), np.uint8) for part in parts.values())
    return train, held_out


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """``[B, length + 1]``: the bytes from each start on, and the target of the last."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def training_starts(text: np.ndarray, config: Config, step: int) -> np.ndarray:
    """A pure function of seed and step, so that a resumed run reads the same bytes."""
    return np.random.default_rng((config.seed, step)).integers(0, len(text) - config.length, config.batch)


def training_batch(text: np.ndarray, config: Config, step: int) -> np.ndarray:
    return windows(text, training_starts(text, config, step), config.length)


def evaluation_starts(text: np.ndarray, config: Config) -> np.ndarray:
    """``[count, B]``: about 128 starts, evenly spaced."""
    count = max(128 // config.batch, 1)
    return np.linspace(0, len(text) - config.length - 1, count * config.batch).astype(int).reshape(count, -1)


# ----------------------------------------------------------------------- model, optimiser, step, evaluation


def build_schedule(config: Config) -> rope_jax.core.Schedule:
    known = {name.lower(): getattr(rope_jax, name) for name in SCHEDULES}
    name, *settings = config.schedule
    if name.lower() not in known:
        fail(f"--schedule must be one of {', '.join(known)}, got {name}")
    try:
        fields = {key: ast.literal_eval(value) for key, value in (pair.split("=", 1) for pair in settings)}
        return known[name.lower()](**{"base": config.base} | fields)
    except (ValueError, TypeError, SyntaxError) as error:
        fail(f"--schedule {' '.join(config.schedule)}: expected name=value pairs that {name} takes: {error}")


def build_model(config: Config) -> rope_jax.Decoder:
    rope = rope_jax.Rope(config.head_dim, build_schedule(config), layout=config.layout)
    names = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    return rope_jax.Decoder(vocab_size=256, **{n: getattr(config, n) for n in names}, rope=rope, qk_norm=True)


def build_optimizer(config: Config) -> optax.GradientTransformation:
    peak, steps = config.learning_rate, max(config.steps, config.warmup + 1)  # A cosine needs a step.
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup, steps, end_value=peak / 10)
    # Decay kernels only. Layers are stacked, so a kernel has three axes or more. A norm's scale [layers, D] and the
    # embedding [256, D] have two.
    kernels = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 2)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=kernels))


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "config"))
def initial_state(model, optimizer, config: Config) -> dict:
    params = nn.unbox(model.init(jax.random.key(config.seed), jnp.zeros((1, config.length), jnp.int32)))
    return {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def mean_loss(model, params, tokens) -> jax.Array:
    """The mean cross-entropy of ``tokens [B, T + 1]`` in nats per byte."""
    logits = model.apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("model", "optimizer"), donate_argnames="state")
def train_step(state, tokens, *, model, optimizer):
    """One optimizer step on ``tokens [B, T + 1]``. Returns the new state and the loss."""
    loss, grads = jax.value_and_grad(lambda params: mean_loss(model, params, tokens))(state["params"])
    updates, opt_state = optimizer.update(grads, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": opt_state, "step": state["step"] + 1}, loss


eval_step = jax.jit(mean_loss, static_argnames="model")


def evaluate(model, params, batches) -> float:
    """The mean bits per byte of batches ``[B, T + 1]``."""
    return float(np.mean([eval_step(model, params, batch) for batch in batches])) / math.log(2)


def sample(model, params, config: Config) -> str:
    prompt, rng = np.frombuffer(PROMPT.encode(), np.uint8)[None], jax.random.key(config.seed)
    options = dict(max_new_tokens=SAMPLE_BYTES, temperature=TEMPERATURE, rng=rng)
    tokens = rope_jax.generate(model, params, prompt, **options).tokens[0]
    return PROMPT + bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")


# ------------------------------------------------------------------------------------- checkpoint and loop


def fingerprint(config: Config, corpus, may_change=MAY_CHANGE) -> dict:
    """All hyperparameters that the loss depends on, and a digest of the text: a resumed run must have the same."""
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in may_change}
    digest = hashlib.sha256(b"".join(part.tobytes() for part in corpus)).hexdigest()[:16]
    return json.loads(json.dumps(kept | {"corpus": digest}))


def save(folder: Path, state) -> None:
    """Writes a checkpoint and keeps the one before."""
    folder.mkdir(exist_ok=True)
    write(folder / f"{int(state['step']):08}.msgpack", flax.serialization.to_bytes(state))
    for old in sorted(folder.glob("*.msgpack"))[:-2]:
        old.unlink()


def resume(folder: Path, state):
    """The newest checkpoint, or the initial ``state`` if there is no checkpoint."""
    if (newest := max(folder.glob("*.msgpack"), default=None)) is None:
        return state
    restore = functools.partial(flax.serialization.from_bytes, state)
    return jax.device_put(read(newest, restore, "cannot be read: remove it to resume from the checkpoint before"))


def check_flags(config: Config, may_be_zero=("seed",)) -> None:
    for name, value in dataclasses.asdict(config).items():
        least, says = (0, "0 or more") if name in may_be_zero else (1e-9, "positive")
        if isinstance(value, int | float) and not least <= value < math.inf:
            fail(f"--{name.replace('_', '-')} must be {says}, got {value!r}")


def main(config: Config) -> int:
    check_flags(config)
    text, held_out = read_corpus(config)
    try:
        model, optimizer = build_model(config), build_optimizer(config)
        state = initial_state(model, optimizer, config)
    except (ValueError, TypeError, OverflowError) as error:
        fail(error)
    held_out_batches = [windows(held_out, starts, config.length) for starts in evaluation_starts(held_out, config)]
    checkpoints, metrics = config.workdir / "checkpoints", config.workdir / "metrics.jsonl"
    stop = stop_signals()  # A list: Ctrl-C or SIGTERM appends its number.
    with locked(config.workdir):
        record_run(config.workdir / "config.json", fingerprint(config, (text, held_out)), checkpoints.exists())
        state = resume(checkpoints, state)
        first = int(state["step"])
        rows = keep_metrics(metrics, first)
        count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
        print(f"{count:,} parameters, {text.size:,} training bytes, {held_out.size:,} held out; step {first}")

        with metrics.open("a", buffering=1) as log, tqdm.tqdm(total=config.steps, initial=first) as bar:
            for step in range(first, config.steps):
                batch = training_batch(text, config, step)
                state, loss = train_step(state, batch, model=model, optimizer=optimizer)
                rows.append({"step": step + 1, "train": float(loss) / math.log(2)})
                due = step + 1 == config.steps or (step + 1) % config.save_every == 0
                if due:
                    rows[-1]["held_out"] = evaluate(model, state["params"], held_out_batches)
                log.write(json.dumps(rows[-1]) + "\n")
                bar.update()
                speed = (bar.format_dict["rate"] or 0.0) * config.batch * config.length
                bar.set_postfix_str(f"{rows[-1]['train']:.3f} bits/byte, {speed:,.0f} bytes/s")
                if due or stop:
                    save(checkpoints, state)
                if stop:
                    break
        if stop:
            print(f"stopped at step {int(state['step'])}, saved; run again to resume", file=sys.stderr)
            return 128 + stop[0]

        written = sample(model, state["params"], config)
        write(config.workdir / "sample.txt", written.encode())
        plot_losses(config.workdir / "loss.png", rows)
        score = evaluate(model, state["params"], held_out_batches)
        print(f"\n{written}\n\n{score:.3f} bits per byte held out after {config.steps} steps; see {config.workdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
