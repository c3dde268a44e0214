"""Schedules and encodings against committed numbers of transformers; tests/oracle computes them again."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden.cases import CASES, NAMES, check
from golden.make_encodings import FARTHEST, POSITIONS, WIDTH

import rope_jax

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/transformers.json").read_text())["cases"]


def test_every_case_has_its_golden_numbers_and_no_more():
    assert list(GOLDEN) == NAMES and len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_schedule_is_that_of_transformers(case):
    check(case, **GOLDEN[case["name"]])


ENCODINGS = json.loads((Path(__file__).parents[1] / "golden/encodings.json").read_text())


@pytest.mark.parametrize("name", ENCODINGS["T5 buckets"])
def test_buckets_are_those_of_transformers(name):
    num_buckets, max_distance, causal = name.split()
    starts, buckets = np.array(ENCODINGS["T5 buckets"][name]).T
    distance = np.arange(-FARTHEST, FARTHEST + 1)
    want = buckets[np.searchsorted(starts, distance, side="right") - 1]
    options = dict(num_buckets=int(num_buckets), max_distance=int(max_distance), causal=causal == "causal")
    np.testing.assert_array_equal(rope_jax.attention.relative_buckets(distance, **options), want)


@pytest.mark.parametrize("heads", ENCODINGS["BLOOM slopes"])
def test_slopes_are_those_of_transformers(heads):
    want = ENCODINGS["BLOOM slopes"][heads]  # a float32 power, with an exponent up to the number of heads
    np.testing.assert_allclose(rope_jax.attention.ALiBi.slopes(int(heads)), want, rtol=int(heads) * 2.0**-24)


def test_sines_are_those_of_transformers():
    """Marian stores all sines, then all cosines; the paper alternates."""
    ours = np.asarray(rope_jax.models.Sinusoidal()(np.array(POSITIONS), WIDTH))
    ours = np.concatenate([ours[:, 0::2], ours[:, 1::2]], axis=1)
    np.testing.assert_allclose(ours, ENCODINGS["Marian sines"], atol=1.2e-7 + 6e-8)
