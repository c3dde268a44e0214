"""Counts pointing words (that, one, it, what, where, those, which, there) per 1,000 words of docstrings.

    python tests/prose.py [files or folders]          # default: rope_jax

Prints a row for each file, the highest rate first, and a row for all files together. A word is a run of letters and
apostrophes. Excluded, since they are code: doctest examples with their output, text in backticks, and the names of
arguments, attributes and exceptions before the colon in a section such as ``Args:``.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

POINTING = frozenset("that one it what where those which there".split())
CODE = re.compile(
    r"^[ \t]*>>>.*(?:\n[ \t]*\S.*)*"  # an example, up to the next empty line
    r"|``(?:.|\n)*?``|(?::[\w:]+:)?`[^`]*`"  # text in backticks, and roles such as :func:`rotate`
    r"|^[ \t]+\*{0,2}\w+(?: \([^)]*\))?:",  # `  name:` in an indented section
    re.MULTILINE,
)


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a Python file: of the module, its classes and its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def count(docstring: str) -> tuple[int, int]:
    """The numbers of pointing words and of all words in a docstring, code excluded."""
    words = re.findall(r"[a-z']+", CODE.sub(" ", docstring).lower())
    return sum(word in POINTING for word in words), len(words)


def count_files(paths) -> dict[Path, tuple[int, int]]:
    """The numbers of pointing words and of all words in each Python file among files and folders."""
    files = [
        file for path in map(Path, paths) for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    return {file: tuple(map(sum, zip(*map(count, docstrings(file)), strict=True))) for file in files}


def per_thousand(counts) -> float:
    """The rate of pointing words over several files."""
    pointing, words = map(sum, zip(*counts, strict=True))
    return 1000 * pointing / max(words, 1)


if __name__ == "__main__":
    counted = count_files(sys.argv[1:] or [Path(__file__).parents[1] / "rope_jax"])
    print("per 1,000  pointing  words")
    for file, row in sorted(counted.items(), key=lambda item: -per_thousand([item[1]])):
        print(f"{per_thousand([row]):9.1f}  {row[0]:8}  {row[1]:5}  {file}")
    total = [sum(column) for column in zip(*counted.values(), strict=True)]
    print(f"{per_thousand([total]):9.1f}  {total[0]:8}  {total[1]:5}  together")
