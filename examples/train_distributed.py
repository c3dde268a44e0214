"""Trains the decoder of configs/toy_lm.py on a mesh of devices, in one process or several.

    python examples/train_distributed.py --mesh data=2,model=4             # eight devices of one host
    python examples/train_distributed.py --mesh data=8 --coordinator auto  # SLURM, Open MPI or a TPU slice
    python examples/train_distributed.py --mesh data=2 --coordinator HOST:PORT --num-processes 2 --process-id 0

Each host runs the second command. The third command is for two hosts; the other host has --process-id 1.
All processes share one --workdir. If a process dies, the others stop and say so. The same commands then resume from
the last checkpoint, on the same mesh bit for bit, or on another mesh. Install with pip install -e ".[train]".
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import traceback
import zlib
from pathlib import Path
from typing import NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tqdm
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import toy_lm
from configs.run_folder import fail, keep_metrics, locked, plot_losses, record_run, stop_signals, write


@dataclasses.dataclass(frozen=True)
class Config(toy_lm.Config):
    """Trains a small Llama-shaped decoder on a mesh of devices."""

    workdir: Path = Path("runs/train_distributed")  # The folder of the run, shared by all processes.
    mesh: str = "data=1"  # Devices along the axes data and model: data=2,model=4. Several processes must use all.
    coordinator: str | None = None
    """HOST:PORT of process 0, if several processes train one model; each runs this command. Or auto on a TPU slice,
    under SLURM and under Open MPI, which number the processes themselves."""
    num_processes: int | None = None  # The number of processes; only with HOST:PORT.
    process_id: int | None = None  # The number of this process, from 0; only with HOST:PORT.
    start_timeout: int = 300  # Seconds to wait for all processes at the start.
    heartbeat_timeout: int = 100  # Seconds of silence after which a process counts as dead and the others stop.


MAY_CHANGE = toy_lm.MAY_CHANGE | set(Config.__annotations__)


# ------------------------------------------------------------------------------------ several processes


def leave(status: int, message: str = "") -> NoReturn:
    """Ends this process at once. A normal exit would wait for the other processes, which may wait for this one."""
    if message:
        print(f"error: {message}", file=sys.stderr)
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


def check_agreement(config: Config, fingerprint: dict) -> None:
    """Fails in every process unless all have the same flags and text: else each would train another model."""
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        fail(f"every process must have as many devices as the others, got {jax.local_device_count()} here")
    flags = {k: str(v).encode() for k, v in (dataclasses.asdict(config) | fingerprint).items()}
    del flags["process_id"], flags["data"]  # the path may differ; the digest of the text may not
    digests = multihost_utils.process_allgather(np.array([*map(zlib.crc32, flags.values())], np.uint32))
    differ = [name for name, column in zip(flags, digests.T, strict=True) if len(set(column.tolist())) > 1]
    if differ:
        fail(f"every process must get the same flags and the same text, but they differ in {', '.join(differ)}")


# ------------------------------------------------------------------------------------------- the mesh


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


def place(text: np.ndarray, starts: np.ndarray, config: Config, mesh) -> jax.Array:
    """The windows at ``starts``, divided over the mesh axis data. A process reads only its own windows."""
    shape, sharding = (len(starts), config.length + 1), NamedSharding(mesh, PartitionSpec("data"))
    read = lambda index: toy_lm.windows(text, starts[index[0]], config.length)  # noqa: E731
    return jax.make_array_from_callback(shape, sharding, read)


def initial_state(model, optimizer, mesh, config: Config):
    """Parameters, optimizer state and step, placed on the mesh by logical axis names."""
    divisible = config.num_kv_heads % mesh.shape["model"] == 0  # else every device gets all kv heads
    rules = [("heads", "model"), ("kv_heads", "model" if divisible else None), ("mlp", "model")]

    def init():
        params = model.init(jax.random.key(config.seed), jnp.zeros((1, config.length), jnp.int32))
        return {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    placement = nn.logical_to_mesh_sharding(nn.get_partition_spec(jax.eval_shape(init)), mesh, rules)
    return jax.jit(lambda: nn.unbox(init()), out_shardings=placement)()


# -------------------------------------------------------------------------------------------- the run


def save(manager, state, bar: tqdm.tqdm) -> None:
    """Writes a checkpoint; each process writes its own part of the arrays."""
    try:
        manager.save(step := int(state["step"]), args=ocp.args.StandardSave(state))
    except Exception as error:
        if not isinstance(error, OSError) and "os_error_code" not in str(error):
            raise  # the loss of another process, not a full disk
        bar.close()
        fail(f"the checkpoint of step {step} cannot be written, earlier checkpoints are kept: {error}")


def resume(manager, state):
    """The newest checkpoint, placed like the initial state; the initial state if there is no checkpoint."""
    if (step := manager.latest_step()) is None:
        return state
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(state))
    except Exception as error:
        newest = manager.directory / str(step)
        fail(f"{newest} cannot be read: remove it to resume from the checkpoint before: {error}")


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
    toy_lm.check_flags(config, may_be_zero=("seed", "process_id"))
    join(config)
    lead = jax.process_index() == 0  # only process 0 prints, logs and plots
    stop = stop_signals()
    text, held_out = toy_lm.read_corpus(config)
    fingerprint = toy_lm.fingerprint(config, (text, held_out), MAY_CHANGE)
    check_agreement(config, fingerprint)
    mesh = build_mesh(config)
    try:
        model, optimizer = toy_lm.build_model(config), toy_lm.build_optimizer(config)
        state = initial_state(model, optimizer, mesh, config)
    except (ValueError, TypeError, OverflowError) as error:
        fail(error)
    held_out_batches = [place(held_out, s, config, mesh) for s in toy_lm.evaluation_starts(held_out, config)]

    workdir = config.workdir.absolute()
    with locked(workdir) if lead else contextlib.nullcontext():
        if lead:
            begun = any((workdir / "checkpoints").glob("[0-9]*"))
            record_run(workdir / "config.json", fingerprint, begun)
        multihost_utils.sync_global_devices("config.json")
        if not (workdir / "config.json").exists():
            fail(f"--workdir {config.workdir} must be one folder for all processes: process 0's files are not here")
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        manager = ocp.CheckpointManager(workdir / "checkpoints", options=options)
        state = resume(manager, state)
        first, stop_signal, metrics = int(state["step"]), 0, Path(os.devnull)
        rows: list[dict] = []
        if lead:
            metrics = workdir / "metrics.jsonl"
            rows = keep_metrics(metrics, first)
            count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
            print(f"{count:,} parameters, {text.size:,} training bytes, {held_out.size:,} held out; step {first}")

        bar = tqdm.tqdm(total=config.steps, initial=first, disable=not lead)
        with metrics.open("a", buffering=1) as log, bar:
            for step in range(first, config.steps):
                batch = place(text, toy_lm.training_starts(text, config, step), config, mesh)
                state, loss = toy_lm.train_step(state, batch, model=model, optimizer=optimizer)
                rows.append({"step": step + 1, "train": float(loss) / math.log(2)})
                due = step + 1 == config.steps or (step + 1) % config.save_every == 0
                if due:
                    rows[-1]["held_out"] = toy_lm.evaluate(model, state["params"], held_out_batches)
                log.write(json.dumps(rows[-1]) + "\n")
                bar.update()
                bar.set_postfix_str(f"{rows[-1]['train']:.3f} bits/byte")
                # All processes stop at the same step.
                stop_signal = int(multihost_utils.process_allgather(np.int32(max(stop, default=0))).max())
                if due or stop_signal:
                    save(manager, state, bar)
                if stop_signal:
                    break
        if stop_signal:
            print(f"stopped at step {int(state['step'])}, saved; run again to resume", file=sys.stderr)
            return 128 + stop_signal

        written = toy_lm.sample(model, state["params"], config)
        score = toy_lm.evaluate(model, state["params"], held_out_batches)
        if lead:
            write(workdir / "sample.txt", written.encode())
            plot_losses(workdir / "loss.png", rows)
            steps = f"held out after {config.steps} steps; see {config.workdir}"
            print(f"\n{written}\n\n{score:.3f} bits per byte {steps}")
    return 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config)))
