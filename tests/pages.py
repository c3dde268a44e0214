"""Runs the Python blocks of a page of the site, and compares what they print with the page.

    python tests/pages.py docs/howto/debug.md ...     # writes what the blocks print into the pages

The blocks of a page run from top to bottom in one namespace. A block marked ``text`` right after a block holds what
the block prints.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def printed(page: str, name: str):
    """Runs the blocks; yields the match of each block and the text that it printed."""
    names: dict = {"__name__": "page"}
    for block in BLOCK.finditer(page):
        line = page.count("\n", 0, block.start(1))
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + block[1], name, "exec"), names)
        yield block, "\n".join(text.rstrip() for text in out.getvalue().splitlines())


def rewritten(page: str, name: str) -> str:
    """The page with what its blocks print."""
    for block, text in reversed(list(printed(page, name))):
        shown = f"\n```text\n{text}\n```\n" if text else ""
        page = f"{page[: block.start()]}```python\n{block[1]}```\n{shown}{page[block.end() :]}"
    return page


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(rewritten(path.read_text(), str(path)))
