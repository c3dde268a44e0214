"""Runs every example in the tables of docs/limits.md and compares the error with the table."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "limits.md").read_text()
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| limit |")
]
ERRORS = [row for row in ROWS if len(row) == 4]
NANS = [row for row in ROWS if len(row) == 3]


@pytest.fixture(scope="module")
def names():
    (setup,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    found: dict = {}
    exec(setup, found)
    return found


def run(cell: str, names: dict):
    (code,) = re.fullmatch("`([^`]*)`", cell).groups()
    return eval(code, dict(names))


def test_the_tables_are_read():
    assert len(ERRORS) > 70 and len(NANS) > 3 and len(ERRORS) + len(NANS) == len(ROWS)


@pytest.mark.parametrize("row", ERRORS, ids=lambda row: row[0].replace("`", ""))
def test_an_error_is_raised_as_the_table_says(row, names):
    _, code, error, instead = row
    kind, message = error.split(": ", 1)
    with pytest.raises(Exception, match=re.escape(message)) as raised:
        run(code, names)
    assert type(raised.value).__name__ == kind and instead


@pytest.mark.parametrize("row", NANS, ids=lambda row: row[0].replace("`", ""))
def test_the_running_program_gives_nan(row, names):
    result = run(row[1], names)
    assert isinstance(result, jax.Array) and np.isnan(result).all()
