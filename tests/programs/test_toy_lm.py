"""configs/toy_lm.py, run as a user runs it, at a size that takes seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from small_disk import small_disk

from configs import toy_lm

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs/toy_lm.py"
SMALL = [
    "--num-layers",
    "1",
    "--width",
    "16",
    "--num-heads",
    "4",
    "--num-kv-heads",
    "2",
    "--head-dim",
    "8",
    "--mlp-dim",
    "16",
    "--length",
    "16",
    "--batch",
    "4",
    "--warmup",
    "2",
    "--save-every",
    "4",
]


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture(scope="module")
def toy():
    return toy_lm


def command(*args):
    return [sys.executable, str(SCRIPT), *SMALL, *map(str, args)]


# A quick compilation serves: runs are compared with each other only.
QUICK = "--xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the script to its end. All runs share what they compile."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs"))}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def run(*args, enter=()):
        flags = f"{QUICK} --xla_force_host_platform_device_count=1"
        env = os.environ | cache | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        return subprocess.run([*enter, *command(*args)], capture_output=True, text=True, env=env)

    return run


def started(*args, **pipes):
    """The script, running. It compiles for itself, so that there is time to interrupt it."""
    flags = f"{QUICK} --xla_force_host_platform_device_count=1"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(command(*args), env=env, **pipes)


def losses(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(run, text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    done = run("--data", text, "--steps", 60, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.mark.full
def test_learns_and_leaves_its_files(uninterrupted):
    workdir, out = uninterrupted
    rows = losses(workdir)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert 7.5 < rows[0]["train"] < 8.5  # a byte, before anything was learned
    assert rows[-1]["held_out"] < 5 and "held_out" in rows[3]  # the text has 28 letters and repeats itself
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    sample = (workdir / "sample.txt").read_text()
    assert sample.startswith("def ") and sample in out
    assert f"{rows[-1]['held_out']:.3f} bits per byte held out" in out


@pytest.mark.full
def test_killed_and_started_again_it_reaches_the_same_loss(run, text, tmp_path, uninterrupted):
    args = ("--data", text, "--steps", 60, "--workdir", tmp_path)
    process = started(*args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 13) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it must be killed before it ends"
    again = run(*args)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == losses(uninterrupted[0])  # to the last bit
    assert (tmp_path / "sample.txt").read_text() == (uninterrupted[0] / "sample.txt").read_text()


@pytest.mark.full
def test_ctrl_c_saves_and_the_run_goes_on(run, text, tmp_path, uninterrupted):
    args = ("--data", text, "--steps", 60, "--workdir", tmp_path, "--save-every", 1000)
    process = started(*args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT and "saved; run again to resume" in err
    stopped = len(losses(tmp_path))
    assert 1 <= stopped < 60
    again = run(*args)
    assert again.returncode == 0 and f"step {stopped}\n" in again.stdout
    mine, theirs = losses(tmp_path), losses(uninterrupted[0])
    assert [row["train"] for row in mine] == [row["train"] for row in theirs] and mine[-1] == theirs[-1]


def one_line(done):
    """The message of a run that was refused."""
    (line,) = (line for line in done.stderr.splitlines() if "/60 [" not in line and line.strip())
    assert done.returncode == 2 and line.startswith("error: "), done.stderr
    return line


@pytest.mark.full
@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_checkpoint_that_was_cut_off(run, text, tmp_path, uninterrupted, left):
    """It is refused in one line. Without it, the run goes on from the checkpoint before, to the same losses."""
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "work")
    args = ("--data", text, "--steps", 60, "--workdir", workdir)
    before, newest = sorted((workdir / "checkpoints").iterdir())
    assert (before.name, newest.name) == ("00000056.msgpack", "00000060.msgpack")
    newest.write_bytes(newest.read_bytes()[:left])
    line = one_line(run(*args))
    assert f"{newest} cannot be read" in line and "remove it to resume from the checkpoint before" in line
    assert losses(workdir) == losses(uninterrupted[0])
    newest.unlink()
    again = run(*args)
    assert again.returncode == 0 and "held out; step 56\n" in again.stdout, again.stderr
    assert losses(workdir) == losses(uninterrupted[0])


@pytest.mark.full
def test_a_full_disk(run, text, tmp_path, uninterrupted):
    size = max(path.stat().st_size for path in (uninterrupted[0] / "checkpoints").iterdir())
    with small_disk(tmp_path / "disk", int(2.7 * size)) as disk:
        args = ("--data", text, "--steps", 60, "--workdir", disk.folder)
        line = one_line(run(*args, enter=disk.enter))
        assert "must be a writable folder with free space: [Errno 28] No space left on device" in line
        kept = [path.name for path in (disk.files / "checkpoints").glob("*.msgpack")]
        assert sorted(kept) == ["00000004.msgpack", "00000008.msgpack"]
        assert "No space left" in one_line(run(*args, enter=disk.enter))
        disk.grow()
        again = run(*args, enter=disk.enter)
        assert again.returncode == 0 and "held out; step 8\n" in again.stdout, again.stderr
        assert losses(disk.files) == losses(uninterrupted[0])


@pytest.mark.full
def test_a_second_run_in_the_folder(run, text, tmp_path, uninterrupted):
    args = ("--data", text, "--steps", 60, "--workdir", tmp_path)
    with started(*args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            first.send_signal(signal.SIGSTOP)  # it must not end before the second begins
            assert f"--workdir {tmp_path} is in use by another run" in one_line(run(*args))
            first.send_signal(signal.SIGCONT)
            assert first.wait() == 0
        finally:
            first.kill()
    assert losses(tmp_path) == losses(uninterrupted[0])


@pytest.mark.parametrize(
    "flags",
    [
        "--base 500000 --layout interleaved",
        *(
            pytest.param(flags, marks=pytest.mark.full)
            for flags in (
                "--schedule yarn factor=4 original_length=8",
                "--schedule dynamicntk factor=2 original_length=8 context_length=16",
                "--schedule longrope short_factor=[1,1,1,1] long_factor=[1,2,3,4] original_length=8 factor=2 context_length=16",
            )
        ),
    ],
)
def test_command_line(toy, text, tmp_path, flags, capsys):
    import tyro

    args = [*SMALL, "--data", str(text), "--steps", "2", "--workdir", str(tmp_path), *flags.split()]
    toy.main(tyro.cli(toy.Config, args=args))
    assert "bits per byte held out" in capsys.readouterr().out


def refused(toy, capsys, *args):
    import tyro

    with pytest.raises(SystemExit) as error:
        toy.main(tyro.cli(toy.Config, args=[*SMALL, *map(str, args)]))
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2
    assert message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


class TestBadInput:
    def test_of_every_kind(self, toy, text, tmp_path, capsys):
        empty = tmp_path / "empty"
        empty.mkdir()
        blank = tmp_path / "blank.txt"
        blank.write_text("")
        tiny = tmp_path / "tiny.txt"
        tiny.write_text("short")
        workdir = tmp_path / "work"
        for args, says in (
            (("--data", tmp_path / "missing"), "--data must be a file or a folder, got"),
            (("--data", empty), "needs 17 bytes of training text, got 0 in 0 file(s)"),
            (("--data", blank), "needs 17 bytes of training text, got 0"),
            (("--data", tiny), "--length 16 needs 17 bytes of training text, got 4"),
            (("--data", text, "--length", 400), "--length 400 needs 401 bytes of held-out text, got 270"),
            (("--schedule", "yarm"), "--schedule must be one of standard, linear"),
            (("--schedule", "yarn", "factor=4"), "original_length"),
            (("--schedule", "yarn", "factor"), "expected name=value pairs"),
            (("--schedule", "linear", "factor=0.5"), "Linear: factor must be at least 1"),
            (("--head-dim", 7), "rotary_dim must be even"),
            (("--num-kv-heads", 3), "num_kv_heads must divide num_heads=4, got 3"),
            (("--steps", 0), "--steps must be positive, got 0"),
            (("--learning-rate", -1), "--learning-rate must be positive, got -1.0"),
            (("--seed", 10**20), "too large"),
        ):
            if "--data" not in args:
                args = ("--data", text, *args)
            assert says in refused(toy, capsys, "--steps", 2, "--workdir", workdir, *args)
            assert not workdir.exists()
        assert "--workdir" in refused(toy, capsys, "--data", text, "--steps", 2, "--workdir", tiny)
        assert tiny.read_text() == "short"

    @pytest.mark.full
    def test_a_checkpoint_of_another_run_is_not_touched(self, toy, text, tmp_path, capsys):
        import tyro

        args = ["--data", str(text), "--steps", "4", "--workdir", str(tmp_path / "w")]
        toy.main(tyro.cli(toy.Config, args=[*SMALL, *args]))
        before = {path: path.read_bytes() for path in sorted((tmp_path / "w").rglob("*")) if path.is_file()}
        capsys.readouterr()
        says = refused(toy, capsys, *args, "--base", 5.0)
        assert "holds a different run: base 10000.0 there, 5.0 here. Choose another --workdir" in says
        other = tmp_path / "other.txt"
        other.write_text(text.read_text().replace("fox", "cat"))
        assert "corpus" in refused(toy, capsys, *args, "--data", other)
        after = {path: path.read_bytes() for path in sorted((tmp_path / "w").rglob("*")) if path.is_file()}
        assert before == after

        metrics = tmp_path / "w" / "metrics.jsonl"
        kept = metrics.read_text()
        metrics.write_text('{"loss": 3}')
        assert "must hold one JSON object with a step per line" in refused(toy, capsys, *args)
        metrics.write_text(kept)
        for path in (tmp_path / "w" / "checkpoints").rglob("*"):
            if path.is_file():
                path.write_bytes(b"junk")
        assert "cannot be read" in refused(toy, capsys, *args)
        alien = tmp_path / "alien" / "config.json"
        alien.parent.mkdir()
        alien.write_text('{"model_type": "llama"}')
        assert "holds a different run: model_type llama there" in refused(
            toy, capsys, *args, "--workdir", alien.parent
        )
        assert alien.read_text() == '{"model_type": "llama"}'
        (tmp_path / "w" / "config.json").write_text("{")
        assert "config.json must describe the run in its folder" in refused(toy, capsys, *args)
