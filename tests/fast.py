"""Leaves cases of a table to ``make test-all``."""

import pytest


def first(count, cases):
    """The cases, those after the first ``count`` with the marker ``full``."""
    cases = list(cases)
    return cases[:count] + [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)
        for case in cases[count:]
    ]
