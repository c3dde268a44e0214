"""Is the committed table of all folders still true of the installed transformers? See census.py."""

import json
import logging

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import census

pytestmark = pytest.mark.oracle


@pytest.mark.filterwarnings("ignore")
def test_no_folder_is_worse_than_in_the_committed_table():
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    result = census.summary(census.census())
    census.show(result)
    assert census.regressions(result, json.loads(census.TABLE.read_text())) == []
    assert "different" not in {row["status"] for row in result["folders"].values()}
