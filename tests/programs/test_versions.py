"""The matrix of versions: noxfile.py, the workflow and pyproject.toml agree, and the table counts what reports say."""

import os
import re
import tomllib
from pathlib import Path

import pytest
import versions

ROOT = Path(__file__).parents[2]
NOX = (ROOT / "noxfile.py").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MATRIX = re.findall(r'\("(3\.\d+)", "([^"]+)"\)', NOX)


def test_the_workflow_runs_the_matrix_of_nox():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.findall(r'- \{python: "(3\.\d+)", jax: (\S+)\}', workflow) == MATRIX
    for session in re.search(r"run: nox -s (\w+(?: \w+)*)\n", workflow).group(1).split():
        assert f"def {session}(" in NOX


def test_the_lowest_versions_are_the_bounds_of_the_project():
    pins = dict(re.findall(r'"(\w+)==([\d.]+)"', NOX))
    bounds = dict(re.fullmatch(r"(\w+)>=([\d.]+)", each).groups() for each in PROJECT["dependencies"])
    for name, bound in bounds.items():
        assert re.sub(r"(\.0)+$", "", pins[name]) == re.sub(r"(\.0)+$", "", bound), name
    assert PROJECT["requires-python"] == f">={MATRIX[0][0]}"


REPORT = """<testsuites><testsuite name="Python 3.13.0, jax {jax}, jaxlib {jax}, flax 0.12.12, numpy 2.5.5, chex 0.1.92">
<testcase classname="tests.core.test_rope" name="a"/>
<testcase classname="tests.core.test_rope" name="b">{b}</testcase>
<testcase classname="tests.attention.test_layer" name="c"><skipped/></testcase>
<testcase classname="tests.test_house" name="d"/>
<testcase time="0.000"/>
</testsuite></testsuites>"""


def test_the_table_counts_the_reports(tmp_path, monkeypatch, capsys):
    (tmp_path / "b.xml").write_text(REPORT.format(jax="0.10.2", b="<failure/>"))
    (tmp_path / "a.xml").write_text(REPORT.format(jax="0.9.2", b=""))
    monkeypatch.setattr(versions, "PAGE", tmp_path / "docs" / "versions.md")
    versions.main(str(tmp_path))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line]
    assert rows[0][:2] == ["Python", "jax"] and rows[0][6:] == [*versions.STOREYS, "other", "skipped", "failed"]
    assert rows[2] == "3.13.0 0.9.2 0.9.2 0.12.12 2.5.5 0.1.92 2 0 0 0 0 0 1 1 0".split()
    assert rows[3] == "3.13.0 0.10.2 0.10.2 0.12.12 2.5.5 0.1.92 1 0 0 0 0 0 1 1 1".split()
    assert "| 3.13.0 | 0.9.2 |" in versions.PAGE.read_text()
    with pytest.raises(SystemExit, match="no report"):
        versions.main(str(tmp_path / "none"))


def test_a_later_report_of_the_same_versions_replaces_its_tests(tmp_path):
    for name, b in (("1.xml", "<error/>"), ("2.xml", "")):
        (tmp_path / name).write_text(REPORT.format(jax="0.10.2", b=b))
        os.utime(tmp_path / name, (int(name[0]), int(name[0])))
    (tests,) = versions.rows(tmp_path).values()
    assert tests["tests.core.test_rope", "b"] == ("core", "passed")
