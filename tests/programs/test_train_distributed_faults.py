"""examples/train_distributed.py when a process, a checkpoint or the disk fails: nothing is lost, and one line says what."""

import math
import os
import shutil
import signal

import pytest
import test_train_distributed as distributed
from small_disk import small_disk
from test_toy_lm import losses
from test_train_distributed import HEARTBEAT, LIMIT, LOADED, RUN, STEPS, ends

from configs import run_folder

pytestmark = pytest.mark.full
text, start, group = distributed.text, distributed.start, distributed.group
together, alone, uninterrupted = distributed.together, distributed.alone, distributed.uninterrupted


def sends_itself(name: str, thing: str, step: int, kept: int = 0) -> str:
    """The script, where a signal comes just before a training step or a checkpoint, and another is complete by then."""
    place = {"step": "toy_lm, 'train_step'", "checkpoint": "ocp.CheckpointManager, 'save'"}[thing]
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


def survivors(group, processes, victim, code, *flags):
    """What the others say after ``victim`` was killed or frozen by ``code``."""
    codes = [code if i == victim else "" for i in range(processes)]
    with group("--mesh", f"data={processes}", *flags, codes=codes, heartbeat=HEARTBEAT) as all_of_them:
        others = [process for i, process in enumerate(all_of_them) if i != victim]
        if "SIGSTOP" in code:
            os.waitid(os.P_PID, all_of_them[victim].pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        else:
            assert all_of_them[victim].wait(timeout=LIMIT) == -signal.SIGKILL
        errors = [err for _, err in ends(others)]
    assert all(process.returncode not in (0, None) for process in others)
    return errors


@pytest.mark.parametrize(
    "processes, victim, thing, step, kept",
    [
        (2, 1, "step", 7, 4),
        (2, 0, "step", 10, 8),  # process 0 is the coordinator
        (2, 1, "checkpoint", 8, 4),
        (3, 2, "step", 7, 4),
        (3, 0, "step", 10, 8),
    ],
)
def test_one_is_killed(group, together, uninterrupted, tmp_path, processes, victim, thing, step, kept):
    flags = ("--workdir", tmp_path, *(["--batch", 6] if processes == 3 else []))
    errors = survivors(group, processes, victim, sends_itself("SIGKILL", thing, step, kept), *flags)
    # The script says it where a connection broke; jax may be first where the coordinator did, or by the silence.
    says = ["error: this process failed or lost the others; start all again"]
    says += ["another task died"] * ((processes, victim, thing) != (2, 1, "step"))
    assert all(any(each in err for each in says) for err in errors), errors
    (out, _), *_ = together("--mesh", f"data={processes}", *flags, codes=("",) * processes)
    assert f"held out; step {kept}\n" in out
    straight, _ = uninterrupted(f"data={processes}", processes=processes)
    assert losses(tmp_path) == losses(straight)  # to the last bit, each step once
    assert (tmp_path / "sample.txt").read_text() == (straight / "sample.txt").read_text()


@pytest.mark.parametrize("processes, victim", [(2, 0), (2, 1), (3, 1)])
def test_one_is_frozen(group, tmp_path, processes, victim):
    flags = ("--workdir", tmp_path, *(["--batch", 6] if processes == 3 else []))
    errors = survivors(group, processes, victim, sends_itself("SIGSTOP", "step", 7), *flags)
    assert all("another task died" in err for err in errors), errors


def test_one_is_told_to_stop(group, together, uninterrupted, tmp_path):
    flags = ("--mesh", "data=2", "--workdir", tmp_path)
    with group(*flags, codes=("", sends_itself("SIGTERM", "step", 6))) as both:
        outputs = ends(both)
    assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outputs
    assert all("stopped at step 6, saved; run again to resume" in err for _, err in outputs)
    (out, _), _ = together(*flags)
    mine, theirs = losses(tmp_path), losses(uninterrupted("data=2")[0])
    assert "held out; step 6\n" in out and mine == theirs


@pytest.mark.parametrize("left", [0, 100])
def test_a_checkpoint_was_cut_off(group, together, uninterrupted, tmp_path, left):
    """It is refused in one line. Without it, the run goes on from the checkpoint before, to the same losses."""
    source, _ = uninterrupted("model=2")
    workdir = shutil.copytree(source, tmp_path / "work")
    newest, flags = workdir / f"checkpoints/{STEPS}", ("--mesh", "model=2", "--workdir", workdir)
    for path in (newest / "default/ocdbt.process_1/d").iterdir():
        path.write_bytes(path.read_bytes()[:left])
    with group(*flags, heartbeat=HEARTBEAT) as both:
        errors = [err for _, err in ends(both)]
    assert all(process.returncode not in (0, None) for process in both)
    lines = [line for err in errors for line in err.splitlines() if line.startswith("error: ")]
    says = f"error: {newest} cannot be read: remove it to resume from the checkpoint before"
    assert any(line.startswith(says) for line in lines), errors
    assert losses(workdir) == losses(source)
    shutil.rmtree(newest)
    (out, _), _ = together(*flags)
    assert "held out; step 8\n" in out and losses(workdir) == losses(source)


def test_the_disk_is_full(group, together, uninterrupted, tmp_path):
    source, _ = uninterrupted("data=2")
    files = [path for path in (source / f"checkpoints/{STEPS}").rglob("*") if path.is_file()]
    pages = sum(math.ceil(path.stat().st_size / 4096) for path in files)
    with small_disk(tmp_path / "disk", int(2.5 * pages) * 4096) as disk:
        flags = ("--mesh", "data=2", "--workdir", disk.folder)
        with group(*flags, heartbeat=HEARTBEAT, enter=disk.enter) as both:
            errors = [err for _, err in ends(both)]
        assert all(process.returncode not in (0, None) for process in both)
        lines = [line for err in errors for line in err.splitlines() if line.startswith("error: ")]
        says = f"error: the checkpoint of step {STEPS} cannot be written, earlier checkpoints are kept: "
        assert any(line.startswith(says) and "No space left" in line for line in lines), errors
        disk.grow()
        (out, _), _ = together(*flags, enter=disk.enter)
        assert "held out; step 8\n" in out and losses(disk.files) == losses(source)


def test_a_second_run_in_the_folder(group, tmp_path):
    with (
        run_folder.locked(tmp_path),
        group("--mesh", "data=2", "--workdir", tmp_path, heartbeat=HEARTBEAT) as both,
    ):
        errors = [err for _, err in ends(both)]
    assert both[0].returncode == 2 and both[1].returncode not in (0, None)
    assert errors[0].startswith(f"error: --workdir {tmp_path} is in use by another run"), errors
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}, "nothing is written"
