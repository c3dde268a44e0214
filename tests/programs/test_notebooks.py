"""The notebooks, run from top to bottom as a reader would, and what is kept of their outputs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SUBJECTS = "rotation frequency_bases context_extension precision inference compose images".split()


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_subject_has_its_notebook():
    assert sorted(path.stem for path in NOTEBOOKS) == sorted(SUBJECTS)


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path):
    # In a process of its own, as `make notebooks` does it: what Jupyter's packages leave open is closed with it.
    command = [sys.executable, path.parent / "execute.py", path, "--to", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]  # the cell and its traceback
    for kept, new in zip(code_cells(read(path)), code_cells(read(tmp_path / path.name)), strict=True):
        kinds = [sorted(output.output_type for output in cell.outputs) for cell in (kept, new)]
        assert kinds[0] == kinds[1], f"a cell shows something else than what is kept of it:\n{kept.source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestWhatIsKept:
    def test_says_first_what_one_will_learn(self, path):
        first = read(path).cells[0]
        assert first.cell_type == "markdown" and first.source.startswith("# ") and "learn" in first.source

    def test_was_run_once_in_order_and_without_errors(self, path):
        cells = code_cells(read(path))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
        pictures = ["image/png" in output.data for output in outputs if "<Figure" in str(output.get("data"))]
        assert pictures and all(pictures), "a figure is stored without its picture"

    def test_begins_with_a_question_and_ends_with_changes_to_try(self, path):
        notes = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
        assert "**The question:**" in notes[0] and "## What to try next" in notes[-1]

    def test_is_small_and_knows_nothing_of_the_machine(self, path):
        text = path.read_text()
        assert len(text) < 300_000
        notebook = json.loads(text)
        assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        for cell in notebook["cells"]:
            assert "execution" not in cell["metadata"], "no timestamps"
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("image/png", None)  # base64 has slashes of its own
            assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps(cell)), "no paths of a machine"
