"""examples/train_distributed.py on meshes and in processes that fail: the same losses, and no process left waiting."""

import concurrent.futures
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import test_toy_lm
from test_toy_lm import QUICK, ROOT, SMALL, losses, refused

from examples import train_distributed

pytestmark = pytest.mark.usefixtures("quick_compilation")
text, standard_promotion = test_toy_lm.text, test_toy_lm.standard_promotion

SCRIPT = ROOT / "examples/train_distributed.py"
STEPS = 12  # checkpoints and held-out losses after 4, 8 and 12 of them
LIMIT = 1800  # seconds until a process counts as hung, on a machine however busy
HEARTBEAT = 10  # seconds, where one is to be missed

LOADED = """
import itertools, json, os, signal, sys, time
import jax, numpy as np, orbax.checkpoint as ocp, tyro
from configs import toy_lm
from examples import train_distributed as program
"""
RUN = "\nsys.exit(program.run(tyro.cli(program.Config)))"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start(text, tmp_path_factory):
    """Starts the script, or ``code`` in its place; what it compiles is kept for the next one."""
    kept = str(tmp_path_factory.mktemp("programs"))

    def start(*flags, devices=1, code="", enter=()):
        what = ["-c", code] if code else [str(SCRIPT)]
        env = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": kept,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [*enter, sys.executable, *what, *SMALL, "--steps", STEPS, "--data", text, *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([*map(str, command)], cwd=ROOT, env=os.environ | env, **pipes)

    return start


@pytest.fixture(scope="module")
def group(start):
    """Runs processes, two unless ``codes`` has another number. ``last`` are flags of the last process only."""

    @contextlib.contextmanager
    def started(*flags, last=(), codes=("", ""), heartbeat=LIMIT, **options):
        flags = (*flags, "--heartbeat-timeout", heartbeat)
        together = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", len(codes), "--process-id"]
        with contextlib.ExitStack() as stack:
            processes = []
            for i, code in enumerate(codes):
                own = last if i == len(codes) - 1 else ()
                processes.append(stack.enter_context(start(*flags, *together, i, *own, code=code, **options)))
                stack.callback(processes[-1].kill)
            yield processes

    return started


def ends(processes) -> list[tuple[str, str]]:
    """The outputs of processes that run at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda process: process.communicate(timeout=LIMIT), processes))


@pytest.fixture(scope="module")
def together(group):
    def together(*flags, **options):
        with group(*flags, **options) as processes:
            outputs = ends(processes)
        assert [process.returncode for process in processes] == [0] * len(processes), outputs
        return outputs

    return together


@pytest.fixture(scope="module")
def alone(start):
    def alone(*flags, devices=1):
        with start(*flags, devices=devices) as process:
            try:
                out, err = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        assert process.returncode == 0, err
        return out, err

    return alone


@pytest.fixture(scope="module")
def uninterrupted(alone, together, tmp_path_factory):
    """The folder and the outputs of a run by two processes on a mesh, or by one on one device."""

    @functools.cache
    def run(mesh, devices, processes):
        workdir = tmp_path_factory.mktemp("uninterrupted")
        rows = ["--batch", 6] if processes == 3 else []  # three do not divide four
        if mesh is None:
            return workdir, alone("--workdir", workdir, *rows)
        return workdir, together(
            "--mesh", mesh, "--workdir", workdir, *rows, devices=devices, codes=("",) * processes
        )

    return lambda mesh=None, devices=1, processes=2: run(mesh, devices, processes)


def same_but_for_rounding(mine: list[dict], theirs: list[dict]) -> float:
    """The worst difference in bits per byte, held to what another order of float32 sums can make.

    A sum of n terms, rounded in another order, moves by about sqrt(n) eps / 2 of what is summed, eps = 2^-23. From the
    bytes to the loss there are four sums in a row, none of more than n = 256 terms (the alphabet's); as many lead
    back to the gradients. AdamW makes a step of what it divides by its own size, so that a gradient's relative error
    is a step's, and moves the loss by that share of what the steps have made it fall.
    """
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    assert [row["step"] for row in mine] == [*range(1, STEPS + 1)]
    a, b = ([value for row in rows for key, value in row.items() if key != "step"] for rows in (mine, theirs))
    fallen = theirs[0]["train"] - theirs[-1]["train"]
    worst = np.abs(np.subtract(a, b)).max()
    assert worst < 4 * 256**0.5 * 2.0**-24 * (theirs[0]["train"] + 2 * fallen), worst
    return worst


@pytest.mark.full
def test_one_process_has_the_losses_of_the_toy(uninterrupted, start, tmp_path):
    code = "import sys, tyro\nfrom configs import toy_lm\nsys.exit(toy_lm.main(tyro.cli(toy_lm.Config)))"
    with start("--workdir", tmp_path, code=code) as process:
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert losses(tmp_path) == losses(uninterrupted()[0])  # to the last bit
    assert (tmp_path / "sample.txt").read_text() == (uninterrupted()[0] / "sample.txt").read_text()


@pytest.mark.full
def test_eight_devices_on_a_mesh_give_the_same_losses(alone, tmp_path):
    alone("--steps", 60, "--workdir", tmp_path / "one")
    alone("--steps", 60, "--workdir", tmp_path / "eight", "--mesh", "data=2,model=4", devices=8)
    mine, theirs = ([row["train"] for row in losses(tmp_path / name)] for name in ("eight", "one"))
    np.testing.assert_allclose(mine[:5], theirs[:5], rtol=1e-4)  # sums in another order, then sixty steps of it
    np.testing.assert_allclose(mine, theirs, rtol=2e-2)


@pytest.mark.full
def test_the_mesh_really_shards(start):
    code = f"""{LOADED}
config = program.Config(mesh="data=2,model=4")
model, optimizer = toy_lm.build_model(config), toy_lm.build_optimizer(config)
state = program.initial_state(model, optimizer, program.build_mesh(config), config)
layers = state["params"]["params"]["layers"]
print(layers["self_attention"]["query"]["kernel"].sharding.spec, layers["down"]["kernel"].sharding.spec,
      layers["self_attention"]["key"]["kernel"].sharding.spec)
moments = [x for x in jax.tree.leaves(state["optimizer"]) if x.shape == layers["down"]["kernel"].shape]
print(len(moments), *{{str(x.sharding.spec) for x in moments}})"""
    with start(devices=8, code=code) as process:
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    params, moments = out.replace("PartitionSpec", "P").splitlines()
    assert params == "P(None, None, 'model', None) P(None, 'model', None) P(None, None, None, None)"
    assert moments == "2 P(None, 'model', None)"


@pytest.mark.full
@pytest.mark.parametrize(
    "processes, devices, mesh",
    [
        (2, 1, "data=2"),
        (2, 1, "model=2"),
        (2, 2, "data=4"),
        (2, 2, "data=2,model=2"),
        (2, 2, "model=4"),
        (3, 1, "data=3"),
    ],
)
def test_several_processes_have_the_losses_of_one(uninterrupted, processes, devices, mesh):
    workdir, ((lead, bar), *others) = uninterrupted(mesh, devices, processes)
    worst = same_but_for_rounding(losses(workdir), losses(uninterrupted(processes=processes)[0]))
    print(f"{mesh} on {processes} x {devices} devices: {worst:.1e} bits per byte")
    assert "bits per byte held out" in lead and f"{STEPS}/{STEPS}" in bar
    for other, silence in others:
        assert "held out" not in other and f"/{STEPS}" not in silence, "one process prints"
    assert (workdir / "loss.png").exists() and (workdir / "sample.txt").read_text() in lead


@pytest.mark.full
@pytest.mark.parametrize("mesh, rows", [("data=2", [[0, 1], [2, 3]]), ("model=2", [[0, 1, 2, 3]] * 2)])
def test_each_process_reads_its_own_rows(together, mesh, rows):
    code = f"""{LOADED}
config = tyro.cli(program.Config)
program.join(config)
windows, read = toy_lm.windows, []
toy_lm.windows = lambda text, starts, length: read.extend(starts.tolist()) or windows(text, starts, length)
text, starts = np.arange(100, dtype=np.uint8), np.array([30, 20, 70, 10])
batch = program.place(text, starts, config, program.build_mesh(config))
whole = program.multihost_utils.process_allgather(batch, tiled=True)
print(json.dumps([sorted({{starts.tolist().index(start) for start in read}}), whole.tolist()]))"""
    outputs = together("--mesh", mesh, codes=(code, code))
    seen = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    batch = [[*range(start, start + 17)] for start in (30, 20, 70, 10)]
    assert seen == [[rows[0], batch], [rows[1], batch]]


@pytest.mark.full
def test_every_process_writes_its_part_of_a_checkpoint(uninterrupted):
    workdir, _ = uninterrupted("model=2")
    folder = workdir / f"checkpoints/{STEPS}/default"
    sizes = [sum(f.stat().st_size for f in (folder / f"ocdbt.process_{i}/d").iterdir()) for i in (0, 1)]
    assert min(sizes) > sum(sizes) / 4, sizes  # what is whole on both is written by one of them


@pytest.mark.full
@pytest.mark.parametrize(
    "written, devices, read, exactly",
    [
        (("data=2",), 2, "data=2", True),  # by one process
        (("data=2",), 2, "model=2", False),
        (("model=2",), 1, None, False),
        (("data=2,model=2", 2), None, "model=2", False),  # by two
        ((), None, "data=2", False),
    ],
)
def test_a_checkpoint_goes_on_upon_another_mesh(
    uninterrupted, alone, together, tmp_path, written, devices, read, exactly
):
    source, _ = uninterrupted(*written)
    workdir = shutil.copytree(source, tmp_path / "work")
    shutil.rmtree(workdir / f"checkpoints/{STEPS}")
    flags = ["--workdir", workdir, *(["--mesh", read] if read else [])]
    out = alone(*flags, devices=devices)[0] if devices else together(*flags)[0][0]
    assert "held out; step 8\n" in out
    assert losses(workdir)[:8] == losses(source)[:8]
    worst = same_but_for_rounding(losses(workdir), losses(source))
    print(f"{written} read as {read}: {worst:.1e} bits per byte")
    assert not exactly or losses(workdir) == losses(source)


class TestBadStart:
    def refused_by_all(self, group, *flags, **options):
        with group("--mesh", "data=2", *flags, **options) as processes:
            errors = [err for _, err in ends(processes)]
        assert all(process.returncode not in (0, None) for process in processes), errors
        return errors[0]

    @pytest.mark.full
    def test_flags_that_differ(self, group, tmp_path):
        says = "error: every process must get the same flags and the same text, but they differ in"
        err = self.refused_by_all(group, "--workdir", tmp_path, last=["--seed", 1, "--base", 5.0])
        assert f"{says} seed, base\n" in err
        other = tmp_path / "other.txt"
        other.write_text("the quick brown cat jumps over the lazy dog. " * 60)
        assert f"{says} corpus\n" in self.refused_by_all(group, "--workdir", tmp_path, last=["--data", other])
        assert not list(tmp_path.glob("*.json*")), "nothing is written"

    @pytest.mark.full
    def test_one_of_three_has_another_seed(self, group, tmp_path):
        with group(
            "--mesh", "data=3", "--batch", 6, "--workdir", tmp_path, last=["--seed", 1], codes=[""] * 3
        ) as all_of_them:
            errors = [err for _, err in ends(all_of_them)]
        assert all(process.returncode not in (0, None) for process in all_of_them), errors
        # a process that is not the first to say so may lose the first before it can
        assert any("the same flags and the same text, but they differ in seed\n" in err for err in errors), errors
        assert not list(tmp_path.glob("*.json*")), "nothing is written"

    @pytest.mark.full
    def test_one_of_three_does_not_start(self, start, tmp_path):
        address = f"127.0.0.1:{free_port()}"
        flags = ["--coordinator", address, "--num-processes", 3, "--start-timeout", 30, "--workdir", tmp_path]
        with start(*flags, "--process-id", 0) as first, start(*flags, "--process-id", 1) as second:
            try:
                errors = [err for _, err in ends([first, second])]
            finally:
                first.kill()
                second.kill()
        assert first.returncode == second.returncode == 1
        says = f"error: --coordinator {address}: not all processes started within 30 s\n"
        assert all(err == says for err in errors), errors

    @pytest.mark.full
    def test_a_mesh_of_another_size(self, group, tmp_path):
        err = self.refused_by_all(group, "--workdir", tmp_path, "--mesh", "data=1")
        assert "error: --mesh data=1 must use all 2 devices of the 2 processes" in err
        err = self.refused_by_all(group, "--workdir", tmp_path, "--mesh", "data=4")
        assert "error: --mesh data=4 needs 4 devices, got 2" in err

    @pytest.mark.full
    def test_a_workdir_that_is_not_shared(self, group, tmp_path):
        moves = [f"os.makedirs({str(tmp_path / n)!r}); os.chdir({str(tmp_path / n)!r})" for n in "ab"]
        codes = [f"{LOADED}{move}{RUN}" for move in moves]
        with group("--mesh", "data=2", "--workdir", "work", codes=codes) as both:
            errors = [err for _, err in ends(both)]
        assert [process.returncode for process in both] == [1, 2]
        assert "error: --workdir work must be one folder for all processes" in errors[1]

    @pytest.mark.full
    @pytest.mark.parametrize("process_id", [0, 1])
    def test_no_coordinator_or_nobody_else(self, start, tmp_path, process_id):
        address = f"127.0.0.1:{free_port()}"
        flags = ["--coordinator", address, "--num-processes", 2, "--process-id", process_id, "--start-timeout", 3]
        with start(*flags, "--workdir", tmp_path) as process:
            try:
                _, err = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        assert process.returncode == 1
        assert err.strip() == f"error: --coordinator {address}: not all processes started within 3 s"

    @pytest.mark.full
    def test_no_platform_that_knows(self, start, tmp_path):
        with start("--coordinator", "auto", "--workdir", tmp_path) as process:
            try:
                _, err = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        assert process.returncode == 2 and err.startswith("error: --coordinator auto: "), err

    def test_what_jax_is_told(self, monkeypatch):
        told = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: told.append((args, kwargs)))
        monkeypatch.setattr(signal, "signal", lambda *args: None)
        train_distributed.join(train_distributed.Config(heartbeat_timeout=7))
        assert not told, "one process needs no coordinator"
        train_distributed.join(train_distributed.Config(coordinator="auto", heartbeat_timeout=7))
        train_distributed.join(train_distributed.Config(coordinator="[::1]:80", num_processes=2, process_id=0))
        assert [args for args, _ in told] == [(), ("[::1]:80", 2, 0)]
        assert [kwargs["heartbeat_timeout_seconds"] for _, kwargs in told] == [7, 100]

    def test_flags_of_every_kind(self, text, capsys):
        here = ("--coordinator", "127.0.0.1:1234")
        for args, says in (
            (here, "--coordinator HOST:PORT, --num-processes and --process-id go together, got ('127.0.0.1:1234', None, None)"),
            ((*here, "--num-processes", 2), "go together, got ('127.0.0.1:1234', 2, None)"),
            (("--process-id", 1), "go together, got (None, None, 1)"),
            (("--coordinator", "auto", "--num-processes", 2), "go together, got ('auto', 2, None)"),
            ((*here, "--num-processes", 2, "--process-id", 2), "--process-id must be less than --num-processes 2, got 2"),
            ((*here, "--num-processes", 2, "--process-id", -1), "--process-id must be 0 or more, got -1"),
            ((*here, "--num-processes", 0, "--process-id", 0), "--num-processes must be positive, got 0"),
            (("--coordinator", "host", "--num-processes", 2, "--process-id", 0), "must be HOST:PORT or auto, got host"),
            (("--start-timeout", 0), "--start-timeout must be positive, got 0"),
            (("--heartbeat-timeout", -5), "--heartbeat-timeout must be positive, got -5"),
            (("--mesh", "data=64"), "--mesh data=64 needs 64 devices, got 1"),
            (("--mesh", "rows=2"), "--mesh axes must be data and model"),
            (("--mesh", "2x4"), "--mesh must look like data=2,model=4, got 2x4"),
        ):  # fmt: skip
            assert says in refused(train_distributed, capsys, "--data", text, *args)
