"""Runs examples/generate.py for the tests of model files."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/generate.py"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the script in this process, which has jax loaded and its programs compiled: exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run
