"""Mounts a small file system, for tests of programs on a full disk."""

import contextlib
import dataclasses
import subprocess
from pathlib import Path

import pytest


@dataclasses.dataclass(frozen=True)
class SmallDisk:
    """A file system that only processes started with the command ``enter`` see at ``folder``."""

    folder: Path
    pid: int

    @property
    def enter(self) -> list[str]:
        namespace = [f"--target={self.pid}", "--user", "--mount", "--preserve-credentials", f"--wd={Path.cwd()}"]
        return ["nsenter", *namespace]

    @property
    def files(self) -> Path:
        """The folder, as all other processes see it."""
        return Path(f"/proc/{self.pid}/root{self.folder}")

    def grow(self) -> None:
        subprocess.run([*self.enter, "mount", "-o", "remount,size=256m", self.folder], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """A :class:`SmallDisk` of ``size`` bytes. Skips the test if nothing can be mounted on this machine."""
    folder.mkdir()
    script = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && echo mounted && read end"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    try:
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        pytest.skip(f"unshare is missing: {error}")
    with holder:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip("a test may not mount a file system on this machine")
        yield SmallDisk(folder, holder.pid)
        holder.stdin.close()
