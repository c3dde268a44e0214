"""The committed table of all folders against the installed transformers; see census.py."""

import dataclasses
import inspect
import json
import logging
import re

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import census

import rope_jax
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


WRONG = {
    "rows before columns": lambda case: dataclasses.replace(case.rope.schedule, axes=(0, 1)),
    "in runs": lambda case: dataclasses.replace(case.rope.schedule, alternating=False),
    "another base": lambda case: dataclasses.replace(case.rope.schedule, schedule=rope_jax.Standard(base=10_001.0)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_row_is_different(wrong, monkeypatch):
    row = census.TOWERS["kimi_k25"]

    def changed(modeling, configuration):
        return [
            dataclasses.replace(case, rope=dataclasses.replace(case.rope, schedule=WRONG[wrong](case)))
            for case in row(modeling, configuration)
        ]

    assert census.summary(census.census(["kimi_k25"]))["folders"]["kimi_k25"]["status"] == "same"
    monkeypatch.setitem(census.TOWERS, "kimi_k25", changed)
    assert census.summary(census.census(["kimi_k25"]))["folders"]["kimi_k25"]["status"] == "different"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", ["TOWERS", "NO_ROTATION"])
def test_a_folder_without_a_row_is_not_covered(rows, monkeypatch):
    folder = {"TOWERS": "dinov3_vit", "NO_ROTATION": "vjepa2"}[rows]
    monkeypatch.delitem(getattr(census, rows), folder)
    row = census.summary(census.census([folder]))["folders"][folder]
    assert row["status"] == "not covered" and row["note"]


@pytest.mark.parametrize("folder", [name for name, why in census.NO_ROTATION.items() if "calls" in why])
def test_a_copied_function_is_never_called(folder):
    """The name stands in its definition, and in a decorator that offers a kernel for it."""
    modeling = next(module for name, module in census.modeling_modules() if name == folder)
    uses = re.findall(r"^.*\bapply_rotary_pos_emb\b.*$", inspect.getsource(modeling), re.MULTILINE)
    assert len(uses) == 2
    assert (
        uses[0].startswith("def apply_rotary_pos_emb(") and uses[1] == "@use_kernelized_func(apply_rotary_pos_emb)"
    )


@pytest.mark.filterwarnings("ignore")
def test_hunyuan_vl_gives_the_features_of_a_pair_different_angles():
    """With equal coordinates, as of text, the angles are equal."""
    ((cls, config),) = [row[2:4] for row in census.described() if row[0] == "hunyuan_vl"]
    module = cls(census.repaired(config))
    text, picture = np.full((4, 1, 3), 5), np.arange(12).reshape(4, 1, 3)
    for part in census.their_cos_sin(module, text, None):
        assert part.shape == (1, 3, 128) and np.array_equal(part[..., :64], part[..., 64:])
    with pytest.raises(census.Different, match="the two features of a pair have different angles"):
        census.halves(census.as_numpy(census.their_cos_sin(module, picture, None)[0]), 64)


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
