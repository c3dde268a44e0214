"""Trains a byte-level language model on the sources of Python's standard library.

    python configs/toy_lm.py                                        # about three minutes on two CPU cores
    python configs/toy_lm.py --base 500000 --layout interleaved --steps 500
    python configs/toy_lm.py --schedule yarn factor=4 original_length=64
    python configs/toy_lm.py --encoding alibi --workdir runs/alibi
    python configs/toy_lm.py --data FILE_OR_FOLDER --workdir runs/mine
    python configs/toy_lm.py --mesh data=2,model=4                  # eight devices
    python configs/toy_lm.py --mesh data=8 --coordinator auto       # under srun, or on each host of a TPU slice
    python configs/toy_lm.py --mesh data=2 --coordinator HOST:PORT --num-processes 2 --process-id 0  # and 1

A second run with the same --workdir resumes from the last checkpoint and reaches the same losses, bit for bit.
Install with pip install -e ".[train]".
"""

import ast
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import sys
import sysconfig
import threading
import traceback
import zlib
from pathlib import Path
from typing import Literal, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rope_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small Llama-shaped decoder on bytes and samples from it."""

    data: Path | None = None
    """A text file, or a folder of text files. Default: the sources of Python's standard library."""
    workdir: Path = Path("runs/toy_lm")
    """The folder for checkpoints, metrics.jsonl, loss.png and sample.txt."""
    seed: int = 0

    encoding: Literal["rope", "sinusoidal", "learned", "t5", "alibi", "none"] = "rope"
    """The position encoding. The next three flags belong to rope."""
    schedule: tuple[str, ...] = ("standard",)
    """A rope_jax schedule and its hyperparameters, such as yarn factor=4 original_length=64."""
    base: float = 10_000.0
    """b of the schedule: theta_i = b^(-2i/R)."""
    layout: Literal["half", "interleaved"] = "half"
    """The pairing of features: i with i + R/2, or 2i with 2i + 1."""

    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 352
    length: int = 128
    """Bytes in a training sequence."""

    steps: int = 450
    batch: int = 16
    learning_rate: float = 5e-3
    """The peak, after a linear warm-up; a cosine then decays it to a tenth."""
    table_rate: float = 1.0
    """A factor of the learning rate for the tables of learned and t5, which need larger steps."""
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_every: int = 100
    checkpoint_every: int = 100

    mesh: str = "data=1"
    """Devices along the axes data and model: data=2,model=4. Several processes must use all of their devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0, if several processes train one model; each runs this command. Or auto on a TPU slice,
    under SLURM and under Open MPI, which number the processes themselves."""
    num_processes: int | None = None
    """The number of processes; only with HOST:PORT."""
    process_id: int | None = None
    """The number of this process, from 0; only with HOST:PORT. All other flags must agree across processes."""
    start_timeout: int = 300
    """Seconds to wait for all processes at the start."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as dead and the others stop."""
    prompt: str = "def "
    sample_bytes: int = 300
    temperature: float = 0.7


# Flags that may change when a run is resumed: the loss does not depend on them.
FREE = {"data", "workdir", "eval_every", "checkpoint_every", "mesh", "prompt", "sample_bytes", "temperature"}
FREE |= {"coordinator", "num_processes", "process_id", "start_timeout", "heartbeat_timeout"}
EVAL_SEQUENCES = 128


def fail(message, program: str = "toy_lm") -> NoReturn:
    """Ends the program with status 2 and a one-line message for the user."""
    print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------ several processes


def leave(status: int, message: str = "") -> NoReturn:
    """Ends this process at once. A normal exit would wait for the other processes, which may wait for this one."""
    if message:
        print(f"toy_lm: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def join(config: Config) -> None:
    """Joins the other processes if the flags ask for several: all run one program on all of their devices."""
    address, num_processes, process_id = flags = config.coordinator, config.num_processes, config.process_id
    by_hand = address not in (None, "auto")
    if any((value is not None) != by_hand for value in (num_processes, process_id)):
        fail(f"--coordinator HOST:PORT, --num-processes and --process-id go together, got {flags}")
    if address is None:
        return
    if by_hand and not (address.rpartition(":")[0] and address.rpartition(":")[2].isdigit()):
        fail(f"--coordinator must be HOST:PORT or auto, got {address}")
    if by_hand and process_id >= num_processes:
        fail(f"--process-id must be less than --num-processes {num_processes}, got {process_id}")
    # jax would also end the wait, but by an abort with a stack trace.
    late = f"--coordinator {address}: not all processes started within {config.start_timeout} s"
    alarm = threading.Timer(config.start_timeout, leave, (1, late))
    alarm.daemon = True
    alarm.start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # lets Ctrl-C end the wait
    try:
        jax.distributed.initialize(
            *(flags if by_hand else ()),
            initialization_timeout=2 * config.start_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        fail(f"--coordinator {address}: {error}")
    finally:
        alarm.cancel()


def check_agreement(config: Config, run_fingerprint: dict) -> None:
    """Fails in every process unless all have the same flags and text: else each would train another model."""
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        fail(f"every process must have as many devices as the others, got {jax.local_device_count()} here")
    flags = {k: str(v).encode() for k, v in (dataclasses.asdict(config) | run_fingerprint).items()}
    del flags["process_id"], flags["data"]  # the path may differ; the digest of the text may not
    digests = multihost_utils.process_allgather(np.array([*map(zlib.crc32, flags.values())], np.uint32))
    differ = [name for name, column in zip(flags, digests.T, strict=True) if len(set(column.tolist())) > 1]
    if differ:
        fail(f"every process must get the same flags and the same text, but they differ in {', '.join(differ)}")


# ------------------------------------------------------------------------------------------------- data


def read_corpus(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Training bytes and held-out bytes: every tenth file is held out, or the last tenth of a single file."""
    if config.data is None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    elif config.data.is_file():
        files = [config.data]
    elif config.data.is_dir():
        files = sorted(path for path in config.data.rglob("*") if path.is_file())
    else:
        fail(f"--data must be a file or a folder, got {config.data}")
    try:
        texts = [path.read_bytes() for path in files]
    except OSError as error:
        fail(f"--data must be readable: {error}")
    texts = [text for text in texts if text and b"\0" not in text]  # a NUL byte marks a binary file
    if len(texts) == 1:
        cut = len(texts[0]) * 9 // 10
        train, held_out = [texts[0][:cut]], [texts[0][cut:]]
    else:
        train = [text for i, text in enumerate(texts) if i % 10]
        held_out = texts[::10]
    parts = [np.frombuffer(b"\0".join(part), np.uint8) for part in (train, held_out)]
    for name, part in zip(("training", "held-out"), parts, strict=True):
        if len(part) < config.length + 1:
            fail(
                f"--length {config.length} needs {config.length + 1} bytes of {name} text, "
                f"got {len(part)} in {len(files)} file(s) of {config.data}"
            )
    return parts[0], parts[1]


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """``[B, length + 1]``: the bytes from each start on, and the target of the last."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def training_starts(text: np.ndarray, config: Config, step: int) -> np.ndarray:
    """A pure function of seed and step, so that a resumed run reads the same bytes."""
    return np.random.default_rng((config.seed, step)).integers(0, len(text) - config.length, config.batch)


def training_batch(text: np.ndarray, config: Config, step: int) -> np.ndarray:
    return windows(text, training_starts(text, config, step), config.length)


def place(text: np.ndarray, starts: np.ndarray, config: Config, mesh) -> jax.Array:
    """The windows at ``starts``, divided over the mesh axis data. A process reads only its own windows."""
    shape, sharding = (len(starts), config.length + 1), NamedSharding(mesh, PartitionSpec("data"))
    read = lambda index: windows(text, starts[index[0]], config.length)  # noqa: E731
    return jax.make_array_from_callback(shape, sharding, read)


SCHEDULES = ("Standard", "Linear", "NTKAware", "DynamicNTK", "Yarn", "LongRope", "Llama3", "Proportional")


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


def build_encoding(config: Config) -> dict:
    """The fields of the decoder that encode positions."""
    if config.encoding == "rope":
        return dict(rope=rope_jax.Rope(config.head_dim, build_schedule(config), layout=config.layout))
    for name in ("schedule", "base", "layout"):
        if getattr(config, name) != getattr(Config, name):
            fail(f"--{name} belongs to --encoding rope, got --encoding {config.encoding}")
    if config.encoding == "learned" and len(config.prompt.encode()) >= config.length:
        fail(f"--prompt must be shorter than the {config.length} positions of --encoding learned")
    others = {
        # Vaswani et al. 2017, section 3.4: embeddings times sqrt(D), so that the sines do not dominate.
        "sinusoidal": dict(
            position_embedding=rope_jax.models.Sinusoidal(), embedding_scale=math.sqrt(config.width)
        ),
        "learned": dict(position_embedding=rope_jax.models.LearnedPositions(num_positions=config.length)),
        "t5": dict(position_bias=rope_jax.attention.T5Bias()),
        "alibi": dict(position_bias=rope_jax.attention.ALiBi()),
        "none": {},
    }
    return dict(rope=None) | others[config.encoding]


def build_model(config: Config) -> rope_jax.Decoder:
    names = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    sizes = {name: getattr(config, name) for name in names}
    return rope_jax.Decoder(vocab_size=256, **sizes, **build_encoding(config), qk_norm=True)


def build_optimizer(config: Config) -> optax.GradientTransformation:
    peak, steps = config.learning_rate, max(config.steps, config.warmup + 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup, steps, end_value=peak / 10)
    # Decay kernels only. Layers are stacked: a norm's scale is [layers, D]; a kernel has three axes or more.
    kernels = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 2)
    adamw = optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=kernels)
    named_table = lambda path, _: jax.tree_util.DictKey("table") in path  # noqa: E731
    tables = functools.partial(jax.tree_util.tree_map_with_path, named_table)
    faster = optax.masked(optax.scale(config.table_rate), tables)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw, faster)


def build_mesh(config: Config) -> jax.sharding.Mesh:
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in config.mesh.split(","))}
    except ValueError:
        fail(f"--mesh must look like data=2,model=4, got {config.mesh}")
    if not set(sizes) <= {"data", "model"} or min(sizes.values()) < 1:
        fail(f"--mesh axes must be data and model, of size 1 or more, got {config.mesh}")
    sizes = {"data": 1, "model": 1} | sizes
    needed, available = math.prod(sizes.values()), jax.device_count()
    if needed > available:
        fail(f"--mesh {config.mesh} needs {needed} devices, got {available}")
    if needed < available and jax.process_count() > 1:
        fail(f"--mesh {config.mesh} must use all {available} devices of the {jax.process_count()} processes")
    for name, axis in (("batch", "data"), ("num_heads", "model"), ("mlp_dim", "model")):
        value, flag = getattr(config, name), name.replace("_", "-")
        if value % sizes[axis]:
            fail(f"--{flag} must be a multiple of the mesh axis {axis}={sizes[axis]}, got {value}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2)


def initial_state(model, optimizer, mesh, config: Config):
    """Parameters, optimizer state and step, placed on the mesh by logical axis names."""
    divisible = config.num_kv_heads % mesh.shape["model"] == 0  # else every device gets all kv heads
    rules = [("heads", "model"), ("kv_heads", "model" if divisible else None), ("mlp", "model")]

    def init():
        params = model.init(jax.random.key(config.seed), jnp.zeros((1, config.length), jnp.int32))
        return {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    placement = nn.logical_to_mesh_sharding(nn.get_partition_spec(jax.eval_shape(init)), mesh, rules)
    return jax.jit(lambda: nn.unbox(init()), out_shardings=placement)()


def mean_loss(model, params, tokens) -> jax.Array:
    """The mean cross-entropy in nats per byte."""
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


def evaluate(model, params, held_out, config: Config, mesh) -> float:
    """Bits per byte of sequences spaced evenly over the held-out text."""
    count = max(EVAL_SEQUENCES // config.batch, 1)
    starts = np.linspace(0, len(held_out) - config.length - 1, count * config.batch).astype(int)
    batches = [place(held_out, each, config, mesh) for each in np.split(starts, count)]
    return float(np.mean([eval_step(model, params, batch) for batch in batches])) / math.log(2)


# ----------------------------------------------------------------------------------- the run and its files


def fingerprint(config: Config, corpus) -> dict:
    """All hyperparameters that the loss depends on, and a digest of the text: a resumed run must have the same."""
    kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    digest = hashlib.sha256(b"".join(part.tobytes() for part in corpus)).hexdigest()[:16]
    return json.loads(json.dumps(kept | {"corpus": digest}))


def check_same_run(saved: Path, run_fingerprint: dict, begun: bool) -> None:
    """Fails if the folder of ``saved`` belongs to another run."""
    try:
        there = json.loads(saved.read_text()) if saved.exists() or begun else run_fingerprint
        keys = [key for key in there | run_fingerprint if there.get(key) != run_fingerprint.get(key)]
        differ = [f"{key} {there.get(key)} there, {run_fingerprint.get(key)} here" for key in keys]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fail(f"{saved} must describe the run in its folder, got: {error}")
    if differ:
        fail(f"{saved.parent} holds a different run: {'; '.join(differ)}. Choose another --workdir")


def resume(manager, state, workdir: Path):
    """The newest checkpoint, placed like the initial state; the initial state if there is no checkpoint."""
    if manager.latest_step() is None:
        return state
    try:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
    except Exception as error:
        fail(f"the checkpoint in {workdir} cannot be read: {error}")


def keep_metrics(path: Path, step: int) -> list[dict]:
    """Keeps the metrics up to a step. A killed run may have logged more, and will log those steps again."""
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        rows = [row for row in map(json.loads, lines) if row["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path} must hold one JSON object with a step per line: {error}")
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write(path: Path, text: str) -> None:
    """Writes a file atomically: if the run is killed, either the old or the new file remains."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def plot(path: Path, rows: list[dict]) -> None:
    """Draws the losses by training step."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel="bits per byte", yscale="log", title="Toy LM")
    for key, label in (("train", "training batch"), ("held_out", "held-out files")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "held_out" else "", linewidth=1)
    axes.yaxis.set(major_formatter="{x:.1f}", minor_formatter="{x:.1f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def run(config: Config) -> int:
    """The exit status of main. If one of several processes fails, it leaves at once and the others notice."""
    try:
        return main(config)
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            leave(error.code)
        traceback.print_exc()
        leave(1, "this process failed or lost the others; start all again to resume from the last checkpoint")


def main(config: Config) -> int:
    for name, value in dataclasses.asdict(config).items():
        least = 0 if name in ("seed", "temperature", "weight_decay", "process_id") else 1e-9
        if value == "" or (isinstance(value, int | float) and not (least <= value < math.inf)):
            fail(f"--{name.replace('_', '-')} must be {'0 or more' if not least else 'positive'}, got {value!r}")
    join(config)
    lead = jax.process_index() == 0  # only process 0 prints, logs and plots
    stop: list[int] = []  # Ctrl-C ends the run after the current step, with a checkpoint
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: stop.append(signum) or signal.signal(signum, signal.SIG_DFL))
    try:
        prompt = np.frombuffer(config.prompt.encode(), np.uint8)[None]
    except UnicodeEncodeError as error:
        fail(f"--prompt must be text: {error}")
    corpus = read_corpus(config)
    run_fingerprint = fingerprint(config, corpus)
    check_agreement(config, run_fingerprint)
    mesh = build_mesh(config)
    try:
        model, optimizer = build_model(config), build_optimizer(config)
        state = initial_state(model, optimizer, mesh, config)
    except (ValueError, TypeError, OverflowError) as error:
        fail(error)

    workdir = config.workdir.absolute()
    saved = workdir / "config.json"
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    try:
        manager = ocp.CheckpointManager(workdir / "checkpoints", options=options)
    except OSError as error:
        fail(f"--workdir {config.workdir} must be a writable folder: {error}")
    if lead:
        check_same_run(saved, run_fingerprint, begun=manager.latest_step() is not None)
        write(saved, json.dumps(run_fingerprint, indent=1) + "\n")
    multihost_utils.sync_global_devices("config.json")
    if not saved.exists():
        fail(f"--workdir {config.workdir} must be one folder for all processes, got one without process 0's files")
    state = resume(manager, state, workdir)
    first, stop_signal, rows, metrics = int(state["step"]), 0, [], Path(os.devnull)
    if lead:
        metrics = workdir / "metrics.jsonl"
        rows = keep_metrics(metrics, first)
        count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
        print(f"{count:,} parameters, {corpus[0].size:,} training bytes, {corpus[1].size:,} held out; step {first}")

    bar = tqdm.tqdm(total=config.steps, initial=first, disable=not lead)
    with metrics.open("a", buffering=1) as log, bar:
        for step in range(first, config.steps):
            batch = place(corpus[0], training_starts(corpus[0], config, step), config, mesh)
            state, loss = train_step(state, batch, model=model, optimizer=optimizer)
            row = {"step": step + 1, "train": float(loss) / math.log(2)}
            last = step + 1 == config.steps
            if last or (step + 1) % config.eval_every == 0:
                row["held_out"] = evaluate(model, state["params"], corpus[1], config, mesh)
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            bar.update()
            tokens_per_s = (bar.format_dict["rate"] or 0.0) * config.batch * config.length
            bar.set_postfix_str(
                f"loss {float(loss):.3f}, {row['train']:.3f} bits/byte, {tokens_per_s:,.0f} tokens/s"
            )
            # All processes stop at the same step.
            stop_signal = int(multihost_utils.process_allgather(np.int32(max(stop, default=0))).max())
            if last or stop_signal or (step + 1) % config.checkpoint_every == 0:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
            if stop_signal:
                break
    manager.wait_until_finished()
    if stop_signal:
        print(f"toy_lm: stopped at step {rows[-1]['step']}, saved; run again to resume", file=sys.stderr)
        return 128 + stop_signal
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)

    sample_bytes = config.sample_bytes
    if config.encoding == "learned":
        sample_bytes = min(sample_bytes, config.length - prompt.size)
    sampling = dict(max_new_tokens=sample_bytes, temperature=config.temperature)
    written = rope_jax.generate(model, state["params"], prompt, rng=jax.random.key(config.seed), **sampling)
    if not lead:
        return 0
    if sample_bytes < config.sample_bytes:
        print(f"the sample ends after {sample_bytes} bytes: the learned table has {config.length} positions")
    plot(workdir / "loss.png", rows)
    text = config.prompt + bytes(np.asarray(written.tokens[0], np.uint8)).decode(errors="replace")
    (workdir / "sample.txt").write_text(text)
    held_out = [row["held_out"] for row in rows if "held_out" in row][-1]
    print(f"\n{text}\n\n{held_out:.3f} bits per byte held out after {config.steps} steps; see {config.workdir}")
    return 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config)))
