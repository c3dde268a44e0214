"""The committed table of all folders against the installed transformers; see census.py."""

import json
import logging

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import census

from rope_jax.interop.families import FAMILIES

pytestmark = pytest.mark.oracle


@pytest.mark.filterwarnings("ignore")
def test_no_folder_is_worse_than_in_the_committed_table():
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    result = census.summary(census.census())
    census.show(result)
    assert census.regressions(result, json.loads(census.TABLE.read_text())) == []
    # Every folder that rotates is reproduced; the others are named with a reason.
    assert {row["status"] for row in result["folders"].values()} == {"same", "no rotation"}


@pytest.mark.filterwarnings("ignore")
def test_every_base_equals_the_base_of_the_config_class():
    checked, wrong = 0, {}
    for _, _, _, config, _ in census.described():
        theta = getattr(config, "rope_theta", type(config).default_theta)
        family = FAMILIES[config.model_type]
        if not isinstance(theta, dict) and not family.bases:
            checked += 1
            if family.base != theta:
                wrong[config.model_type] = theta
    assert wrong == {} and checked > 180
