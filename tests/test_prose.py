"""Tests of the counter of pointing words, and its limit for the library."""

from pathlib import Path

import prose

DOCSTRING = """Returns that which counts: ``what it does`` and :func:`it` do not, and neither does `one` name.

Args:
  it (int): a name, not a word.
  **one: nor this.

Example:
  >>> where = "it"
  >>> where
  'it'

There, one's done."""


def test_code_is_not_counted():
    # Pointing: that, which, There.
    assert prose.count(DOCSTRING) == (3, 23)


def test_every_docstring_is_counted(tmp_path):
    code = '"""It."""\nclass A:\n    """It."""\n    def f(self):\n        """It."""\n        return "it"  # it\n'
    (tmp_path / "a.py").write_text(code)
    (tmp_path / "b.py").write_text("x = 1\n")
    counted = prose.count_files([tmp_path])
    assert counted == {tmp_path / "a.py": (3, 3), tmp_path / "b.py": (0, 0)}
    assert prose.per_thousand(counted.values()) == 1000


def test_the_library_names_things_instead_of_pointing():
    counted = prose.count_files([Path(__file__).parents[1] / "rope_jax"])
    assert prose.per_thousand(counted.values()) <= 40
