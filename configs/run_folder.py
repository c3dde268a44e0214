"""Keeps the folder of a run: locked, written atomically, and resumed only by the same run."""

import contextlib
import fcntl
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import matplotlib.figure


def fail(message) -> NoReturn:
    """Ends the program with status 2 and a one-line message."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def locked(workdir: Path):
    """Makes the folder and locks it against a second run. Ends the run in one line if a file cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
            yield
    except BlockingIOError:
        fail(f"--workdir {workdir} is in use by another run: wait for its end, or choose another --workdir")
    except OSError as error:
        fail(f"--workdir {workdir} must be a writable folder with free space: {error}")


def write(path: Path, data: bytes) -> None:
    """Writes a file atomically: after a kill or on a full disk, the old file remains."""
    new = path.with_name("unfinished")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read(path: Path, parse, complaint: str):
    """The parsed content of a file. Ends the run with the complaint if the file is broken."""
    try:
        return parse(path.read_bytes())
    except Exception as error:
        fail(f"{path} {complaint}: {error}")


def record_run(path: Path, here: dict, begun: bool) -> None:
    """Writes the hyperparameters of the run. Fails if the folder holds another run."""
    if begun or path.exists():
        there = read(path, lambda data: dict(json.loads(data)), "must describe the run in its folder")
        keys = [key for key in there | here if there.get(key) != here.get(key)]
        if differ := [f"{key} {there.get(key)} there, {here.get(key)} here" for key in keys]:
            fail(f"{path.parent} holds a different run: {'; '.join(differ)}. Choose another --workdir")
    write(path, json.dumps(here, indent=1).encode() + b"\n")


def keep_metrics(path: Path, step: int) -> list[dict]:
    """Keeps the metrics up to a step. A killed run may have logged more, and will log those steps again."""

    def parse(data):
        *lines, last = data.split(b"\n")
        if last.endswith(b"}"):  # else nothing, or half a line of an interrupted write
            lines.append(last)
        return [row for row in map(json.loads, lines) if row["step"] <= step]

    complaint = "must hold one JSON object with a step per line"
    rows = read(path, parse, complaint) if path.exists() else []
    write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def stop_signals() -> list[int]:
    """A list that Ctrl-C or SIGTERM fills. A second signal ends the program at once."""
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: stop.append(signum) or signal.signal(signum, signal.SIG_DFL))
    return stop


def plot_losses(path: Path, rows: list[dict]) -> None:
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel="bits per byte", yscale="log", title="Toy LM")
    for key, label, marker in (("train", "training batch", ""), ("held_out", "held-out files", "o")):
        there = [row for row in rows if key in row]
        axes.plot([r["step"] for r in there], [r[key] for r in there], label=label, marker=marker, linewidth=1)
    axes.yaxis.set(major_formatter="{x:.1f}", minor_formatter="{x:.1f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
