"""configs/toy_lm.py as several processes on the loopback address: the same losses, and no process left waiting."""

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
from test_toy_lm import QUICK, ROOT, SCRIPT, SMALL, losses, refused

pytestmark = pytest.mark.usefixtures("quick_compilation")
toy, text, standard_promotion = test_toy_lm.toy, test_toy_lm.text, test_toy_lm.standard_promotion

STEPS = 12  # checkpoints after 4, 8 and 12 of them, held-out losses after 10 and 12
LIMIT = 1800  # seconds until a process counts as hung, on a machine however busy
HEARTBEAT = 10  # seconds, where one is to be missed

LOADED = """
import itertools, json, os, signal, sys, time
import jax, numpy as np, orbax.checkpoint as ocp, tyro
from configs import toy_lm as toy
"""
RUN = "\nsys.exit(toy.run(tyro.cli(toy.Config)))"


def sends_itself(name: str, thing: str, step: int, kept: int = 0) -> str:
    """The script, where a signal comes just before a training step or a checkpoint, and another is complete by then."""
    place = {"step": "toy, 'train_step'", "checkpoint": "ocp.CheckpointManager, 'save'"}[thing]
    each = {"step": 1, "checkpoint": 4}[thing]
    return f"""{LOADED}
begin, steps = getattr({place}), itertools.count({each}, {each})
def hit(*args, **kwargs):
    if next(steps) == {step}:
        workdir = sys.argv[sys.argv.index("--workdir") + 1]
        while {kept} and not os.path.isdir(f"{{workdir}}/checkpoints/{kept}"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.{name})
    return begin(*args, **kwargs)
setattr({place}, hit)
{RUN}"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def start(text, tmp_path_factory):
    """Starts the script, or ``code`` in its place; what it compiles is kept for the next one."""
    kept = str(tmp_path_factory.mktemp("programs"))

    def start(*flags, devices=1, code=""):
        what = ["-c", code] if code else [str(SCRIPT)]
        env = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": kept,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, *what, *SMALL, "--steps", STEPS, "--data", text, *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([*map(str, command)], cwd=ROOT, env=os.environ | env, **pipes)

    return start


@pytest.fixture(scope="module")
def pair(start):
    """Runs two processes to their ends: ``first`` and ``second`` are what they differ in."""

    @contextlib.contextmanager
    def started(*flags, first=(), second=(), codes=("", ""), devices=1, heartbeat=LIMIT):
        flags = (*flags, "--heartbeat-timeout", heartbeat)
        together = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id"]
        with contextlib.ExitStack() as stack:
            both = []
            for i, (own, code) in enumerate(zip((first, second), codes, strict=True)):
                both.append(stack.enter_context(start(*flags, *together, i, *own, devices=devices, code=code)))
                stack.callback(both[-1].kill)
            yield both

    return started


@pytest.fixture(scope="module")
def together(pair):
    def together(*flags, **kwargs):
        with pair(*flags, **kwargs) as both:
            outputs = [process.communicate(timeout=LIMIT) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
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
    def run(mesh, devices):
        workdir = tmp_path_factory.mktemp("uninterrupted")
        if mesh is None:
            return workdir, alone("--workdir", workdir)
        return workdir, together("--mesh", mesh, "--workdir", workdir, devices=devices)

    return lambda mesh=None, devices=1: run(mesh, devices)


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
@pytest.mark.parametrize(
    "devices, mesh",
    [(1, "data=2"), (1, "model=2"), (2, "data=4"), (2, "data=2,model=2"), (2, "model=4")],
)
def test_two_processes_have_the_losses_of_one(uninterrupted, devices, mesh):
    workdir, ((lead, bar), (other, silence)) = uninterrupted(mesh, devices)
    worst = same_but_for_rounding(losses(workdir), losses(uninterrupted()[0]))
    print(f"{mesh} on 2 x {devices} devices: {worst:.1e} bits per byte")
    assert "bits per byte held out" in lead and f"{STEPS}/{STEPS}" in bar
    assert "held out" not in other and f"/{STEPS}" not in silence, "one process prints"
    assert (workdir / "loss.png").exists() and (workdir / "sample.txt").read_text() in lead


@pytest.mark.full
@pytest.mark.parametrize("mesh, rows", [("data=2", [[0, 1], [2, 3]]), ("model=2", [[0, 1, 2, 3]] * 2)])
def test_each_process_reads_its_own_rows(together, mesh, rows):
    code = f"""{LOADED}
config = tyro.cli(toy.Config)
toy.join(config)
windows, read = toy.windows, []
toy.windows = lambda text, starts, length: read.extend(starts.tolist()) or windows(text, starts, length)
text, starts = np.arange(100, dtype=np.uint8), np.array([30, 20, 70, 10])
batch = toy.place(text, starts, config, toy.build_mesh(config))
whole = toy.multihost_utils.process_allgather(batch, tiled=True)
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


@pytest.mark.full
class TestFaults:
    """Whatever befalls one process, the other ends, and both go on as if nothing had happened."""

    def survivor(self, pair, victim, code, *flags):
        codes = (code, "") if victim == 0 else ("", code)
        with pair("--mesh", "data=2", *flags, codes=codes, heartbeat=HEARTBEAT) as both:
            if "SIGSTOP" in code:
                os.waitid(os.P_PID, both[victim].pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            else:
                assert both[victim].wait(timeout=LIMIT) == -signal.SIGKILL
            _, err = both[1 - victim].communicate(timeout=LIMIT)
        assert both[1 - victim].returncode not in (0, None)
        return err

    @pytest.mark.parametrize(
        "victim, thing, step, kept",
        [(1, "step", 7, 4), (0, "step", 10, 8), (1, "checkpoint", 8, 4)],  # process 0 is the coordinator
    )
    def test_one_is_killed(self, pair, together, uninterrupted, tmp_path, victim, thing, step, kept):
        err = self.survivor(pair, victim, sends_itself("SIGKILL", thing, step, kept), "--workdir", tmp_path)
        # The script says it where a connection broke; jax may be first where the coordinator did, or by the silence.
        says = ["toy_lm: this process failed or lost the others; start all again"]
        says += ["another task died"] * ((victim, thing) != (1, "step"))
        assert any(each in err for each in says), err
        (out, _), _ = together("--mesh", "data=2", "--workdir", tmp_path)
        assert f"held out; step {kept}\n" in out
        straight, _ = uninterrupted("data=2")
        assert losses(tmp_path) == losses(straight)  # to the last bit, each step once
        assert (tmp_path / "sample.txt").read_text() == (straight / "sample.txt").read_text()

    @pytest.mark.parametrize("victim", [0, 1])
    def test_one_is_frozen(self, pair, tmp_path, victim):
        err = self.survivor(pair, victim, sends_itself("SIGSTOP", "step", 7), "--workdir", tmp_path)
        assert "another task died" in err

    def test_one_is_told_to_stop(self, pair, together, uninterrupted, tmp_path):
        flags = ("--mesh", "data=2", "--workdir", tmp_path)
        with pair(*flags, codes=("", sends_itself("SIGTERM", "step", 6))) as both:
            outputs = [process.communicate(timeout=LIMIT) for process in both]
        assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outputs
        assert all("toy_lm: stopped at step 6, saved; run again to resume" in err for _, err in outputs)
        (out, _), _ = together(*flags)
        assert "held out; step 6\n" in out and losses(tmp_path) == losses(uninterrupted("data=2")[0])


class TestBadStart:
    def refused_by_all(self, pair, *flags, **kwargs):
        with pair("--mesh", "data=2", *flags, **kwargs) as both:
            errors = [process.communicate(timeout=LIMIT)[1] for process in both]
        assert all(process.returncode not in (0, None) for process in both), errors
        return errors[0]

    @pytest.mark.full
    def test_flags_that_differ(self, pair, tmp_path):
        says = "toy_lm: every process must get the same flags and the same text, but they differ in"
        err = self.refused_by_all(pair, "--workdir", tmp_path, second=["--seed", 1, "--base", 5.0])
        assert f"{says} seed, base\n" in err
        other = tmp_path / "other.txt"
        other.write_text("the quick brown cat jumps over the lazy dog. " * 60)
        assert f"{says} corpus\n" in self.refused_by_all(pair, "--workdir", tmp_path, second=["--data", other])
        assert not list(tmp_path.glob("*.json*")), "nothing is written"

    @pytest.mark.full
    def test_a_mesh_of_another_size(self, pair, tmp_path):
        err = self.refused_by_all(pair, "--workdir", tmp_path, "--mesh", "data=1")
        assert "toy_lm: --mesh data=1 must use all 2 devices of the 2 processes" in err
        err = self.refused_by_all(pair, "--workdir", tmp_path, "--mesh", "data=4")
        assert "toy_lm: --mesh data=4 needs 4 devices, got 2" in err

    @pytest.mark.full
    def test_a_workdir_that_is_not_shared(self, pair, tmp_path):
        moves = [f"os.makedirs({str(tmp_path / n)!r}); os.chdir({str(tmp_path / n)!r})" for n in "ab"]
        codes = [f"{LOADED}{move}{RUN}" for move in moves]
        with pair("--mesh", "data=2", "--workdir", "work", codes=codes) as both:
            errors = [process.communicate(timeout=LIMIT)[1] for process in both]
        assert [process.returncode for process in both] == [1, 2]
        assert "toy_lm: --workdir work must be one folder for all processes" in errors[1]

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
        assert err.strip() == f"toy_lm: --coordinator {address}: not all processes started within 3 s"

    @pytest.mark.full
    def test_no_platform_that_knows(self, start, tmp_path):
        with start("--coordinator", "auto", "--workdir", tmp_path) as process:
            try:
                _, err = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        assert process.returncode == 2 and err.startswith("toy_lm: --coordinator auto: "), err

    def test_what_jax_is_told(self, toy, monkeypatch):
        told = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: told.append((args, kwargs)))
        monkeypatch.setattr(signal, "signal", lambda *args: None)
        toy.join(toy.Config(heartbeat_timeout=7))
        assert not told, "one process needs no coordinator"
        toy.join(toy.Config(coordinator="auto", heartbeat_timeout=7))
        toy.join(toy.Config(coordinator="[::1]:80", num_processes=2, process_id=0))
        assert [args for args, _ in told] == [(), ("[::1]:80", 2, 0)]
        assert [kwargs["heartbeat_timeout_seconds"] for _, kwargs in told] == [7, 100]

    def test_flags_of_every_kind(self, toy, capsys):
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
        ):  # fmt: skip
            assert says in refused(toy, capsys, *args)
