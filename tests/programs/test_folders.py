"""Programs import each other from the root of the repository, and each docstring gives a command that exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    path for folder in ("configs", "examples", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PROGRAMS, *NOTEBOOKS, *sorted(Path(__file__).parent.glob("*.py"))], ids=name)
def test_nobody_reaches_another_folder_by_the_search_path(path):
    words = ["sys" + ".path", "syspath" + "_prepend", "spec_from" + "_file_location"]
    assert not [word for word in words if word in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=name)
def test_a_program_says_how_it_is_run(path):
    if '__name__ == "__main__"' not in path.read_text():
        return
    doc = ast.get_docstring(ast.parse(path.read_text()))
    module = name(path).removesuffix(".py").replace("/", ".")
    command = f"python -m {module}" if path.parent.name == "benchmarks" else f"python {name(path)}"
    assert re.search(rf"^ *{re.escape(command)}\b", doc, re.MULTILINE), command
