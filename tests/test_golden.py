"""Are the schedules those of transformers? Against numbers it once gave; tests/oracle asks it anew."""

import json
from pathlib import Path

import pytest
from golden.cases import CASES, NAMES, check

GOLDEN = json.loads((Path(__file__).parent / "golden/transformers.json").read_text())["cases"]


def test_every_case_has_its_golden_numbers_and_no_more():
    assert list(GOLDEN) == NAMES and len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_schedule_is_that_of_transformers(case):
    check(case, **GOLDEN[case["name"]])
