"""Checks the links inside the built site: every page, file and anchor that a page names must exist.

python -m docs.links docs/_build/html
"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

OUTSIDE = re.compile(r"[a-z]+:|//")


def broken(site: Path) -> list[str]:
    """The links of the pages that lead nowhere, each after the name of its page."""
    pages = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    anchors = {
        page.resolve(): set(re.findall(r'\bid="([^"]+)"', page.read_text()))
        for page in pages
    }
    found = []
    for page in pages:
        for link in set(re.findall(r'(?:href|src)="([^"]+)"', page.read_text())):
            if OUTSIDE.match(link):
                continue
            path, anchor = urldefrag(link)
            target = (
                (page.parent / unquote(path.split("?")[0])).resolve()
                if path
                else page.resolve()
            )
            if not target.exists() or (
                anchor and unquote(anchor) not in anchors.get(target, {unquote(anchor)})
            ):
                found.append(f"{page.relative_to(site)}: {link}")
    return sorted(found)


if __name__ == "__main__":
    if links := broken(Path(sys.argv[1])):
        sys.exit("\n".join(["links that lead nowhere:", *links]))
