"""configs/run_folder.py: a folder keeps what it has through a second run, a kill, a full disk and broken files."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from configs import run_folder


def one_line(capsys, error):
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


def test_two_runs_in_one_folder(tmp_path, capsys):
    workdir = tmp_path / "new" / "run"
    code = f"""
import pathlib, time
from configs import run_folder
with run_folder.locked(pathlib.Path({str(workdir)!r})):
    print("locked", flush=True)
    time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(SystemExit) as error, run_folder.locked(workdir):
                pytest.fail("the folder is locked")
            assert f"--workdir {workdir} is in use by another run" in one_line(capsys, error)
        finally:
            other.kill()
    assert other.returncode == -signal.SIGKILL
    for _ in range(2):  # what a killed run locked is free, and what a finished run locked
        with run_folder.locked(workdir):
            pass


def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "file"
    with run_folder.locked(tmp_path):
        run_folder.write(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit) as error, run_folder.locked(tmp_path):
            run_folder.write(path, b"new")
    assert "must be a writable folder with free space: [Errno 28]" in one_line(capsys, error)
    assert path.read_bytes() == b"old"
    with run_folder.locked(tmp_path):
        run_folder.write(path, b"new")
    assert path.read_bytes() == b"new" and {each.name for each in tmp_path.iterdir()} == {"file", "lock"}


def test_metrics_are_kept_up_to_the_checkpoint(tmp_path, capsys):
    path, rows = tmp_path / "metrics.jsonl", [{"step": step, "train": 1 / step} for step in (1, 2, 3)]
    assert run_folder.keep_metrics(path, 0) == [] and path.read_bytes() == b""
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    for text, step, kept in (
        (whole, 3, 3),
        (whole, 2, 2),
        (whole, 0, 0),
        (whole[:-1], 3, 3),  # a write that was cut off, before the end of the line
        (whole + '{"step": 4, "tr', 3, 3),
    ):
        path.write_text(text)
        assert run_folder.keep_metrics(path, step) == rows[:kept]
        assert path.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:kept])
    for broken in ('{"loss": 3}', '{"loss": 3}\n', whole[:-9] + "\n", "[1, 2]\n"):
        path.write_text(broken)
        with pytest.raises(SystemExit) as error:
            run_folder.keep_metrics(path, 3)
        assert "must hold one JSON object with a step per line" in one_line(capsys, error)
        assert path.read_text() == broken


def test_only_the_same_run_goes_on(tmp_path, capsys):
    path = tmp_path / "config.json"
    run_folder.record_run(path, {"base": 1.0, "schedule": ["yarn"]}, begun=False)
    run_folder.record_run(path, {"base": 1.0, "schedule": ["yarn"]}, begun=True)
    with pytest.raises(SystemExit) as error:
        run_folder.record_run(path, {"base": 2.0, "layout": "half"}, begun=True)
    says = (
        "base 1.0 there, 2.0 here; schedule ['yarn'] there, None here; layout None there, half here. Choose another"
    )
    assert f"{tmp_path} holds a different run: {says} --workdir" in one_line(capsys, error)
    for broken in ("{", "[1, 2]", "3"):
        path.write_text(broken)
        with pytest.raises(SystemExit) as error:
            run_folder.record_run(path, {"base": 1.0}, begun=False)
        assert (
            f"{path} must describe the run in its folder" in one_line(capsys, error) and path.read_text() == broken
        )
    path.unlink()
    with pytest.raises(SystemExit) as error:
        run_folder.record_run(path, {"base": 1.0}, begun=True)
    assert f"{path} must describe the run in its folder" in one_line(capsys, error) and not path.exists()
