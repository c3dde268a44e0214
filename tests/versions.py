"""Prints the table of versions that were tested, from the reports of pytest: ``nox -s table``.

    python tests/versions.py FOLDER          # writes docs/versions.md from the JUnit files in FOLDER

The name of each suite lists the versions. Reports of the same versions are one row.
"""

import collections
import datetime
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "versions.md"
STOREYS = "core attention models generation interop programs".split()
HEAD = """# Versions that were tested

Columns count the tests that passed, by the storey that they test. Warnings are errors, deprecations included. A run is
complete if it has tests of every storey; the other runs were of some files. `nox -s tests` runs the tests in each
version, and `nox -s table` wrote this page on {date}.

"""
NOTES = """
## Notes

- JAX 0.11 and later need Python 3.12. Python 3.14 was not run.
- flax 0.12.7 has no `is_causal` in `nnx.MultiHeadAttention`, so flax 0.12.8 is the lowest version.
- In the run of jax 0.11.1 one test failed by the last bit of two compiled programs. It was mended and run again.
- The compiler of jaxlib 0.11.2 crashes on `generate` with sampling inside `shard_map`: the failure of its row, which
  ended the run. The same program compiles on jaxlib 0.11.1 and 0.12.0.1.
"""


def storey(case: ET.Element) -> str:
    """The storey of a test: ``tests.core.test_rope`` is of core."""
    parts = case.get("classname", "").split(".")
    return parts[1] if len(parts) > 2 and parts[1] in STOREYS else "other"


def outcome(case: ET.Element) -> str:
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


def rows(folder: Path) -> dict[str, dict]:
    """The outcome of each test by its name, for each list of versions: a later report replaces an earlier one."""
    found: dict[str, dict] = collections.defaultdict(dict)
    for path in sorted(folder.glob("*.xml"), key=lambda path: path.stat().st_mtime):
        for suite in ET.parse(path).iter("testsuite"):
            for case in suite.iter("testcase"):
                if name := case.get("name"):  # none: the run was interrupted
                    found[suite.get("name", "")][case.get("classname"), name] = storey(case), outcome(case)
    return found


def table(found: dict[str, dict]) -> str:
    """A row for each list of versions, the newest last."""
    heads = ["Python", "jax", "jaxlib", "flax", "numpy", "chex"]
    lines = [f"| {' | '.join([*heads, *STOREYS, 'other', 'skipped', 'failed'])} |"]
    lines.append("|" + "---|" * (len(heads) + len(STOREYS) + 3))
    for name, tests in sorted(found.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]):
        counts = collections.Counter(tests.values())
        passed = [counts[each, "passed"] for each in (*STOREYS, "other")]
        by_outcome = collections.Counter(outcome for _, outcome in tests.values())
        failed = by_outcome["failure"] + by_outcome["error"]
        versions = [part.split()[-1] for part in name.split(", ")]
        lines.append(f"| {' | '.join(map(str, [*versions, *passed, by_outcome['skipped'], failed]))} |")
    return "\n".join(lines) + "\n"


def main(folder: str) -> None:
    found = rows(Path(folder))
    if not found:
        raise SystemExit(f"versions: no report in {folder}: run nox -s tests")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(HEAD.format(date=datetime.date.today().isoformat()) + table(found) + NOTES)
    print(table(found), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
