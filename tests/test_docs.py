"""The site of `docs/`: its Python blocks run, its links hold, its tables are the measured ones, its prose is plain.

`make docs` builds the pages, with warnings as errors.
"""

import importlib
import re
from pathlib import Path

import eight_devices
import jax
import pages
import prose
import pytest
from test_public_surface import STOREYS

import rope_jax
from docs import links, tables

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = {"_build", "notebooks", "jupyter_execute"}  # by the build
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if not MADE & set(path.relative_to(DOCS).parts[:-1])]
WRITTEN = [path for path in PAGES if "tables" not in path.parts]


def name(path):
    return path.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("path", [path for path in PAGES if "```python" in path.read_text()], ids=name)
def test_the_blocks_of_a_page_run_and_print_what_the_page_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = path.read_text()
    assert len(list(pages.BLOCK.finditer(page))) == page.count("```python")
    # As for a reader of the page: optax is not written for strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        shown = list(pages.printed(page, str(path)))
    for block, text in shown:
        assert (block[2] or "").rstrip("\n") == text, "python tests/pages.py writes what the blocks print"


def test_on_eight_devices():
    eight_devices.run(__file__)


class EightDevices:
    def test_the_page_of_meshes_holds_for_the_shape_that_it_names(self):
        page = (DOCS / "howto/many_devices.md").read_text()
        assert "on eight, write `(2, 4)`" in page and page.count("make_mesh((1, 1), ") == 3
        for block, text in pages.printed(page.replace("make_mesh((1, 1), ", "make_mesh((2, 4), "), "page"):
            assert (block[2] or "").rstrip("\n") == text


def test_a_block_that_prints_something_else_is_found():
    page = "```python\nprint(1)\n```\n\n```text\n2\n```\n\n```python\nx = 3\n```\n"
    shown = [(block[2], text) for block, text in pages.printed(page, "page")]
    assert shown == [("2\n", "1"), (None, "")]
    assert pages.rewritten(page, "page") == page.replace("2", "1")


@pytest.mark.parametrize("file, text", tables.tables().items(), ids=list(tables.tables()))
def test_tables_are_those_of_the_measured_files(file, text):
    assert (tables.TABLES / file).read_text() == text, "python -m docs.tables writes them"


def test_the_page_of_speed_names_where_a_peer_is_ahead():
    """By the whole span of the quartiles."""
    ahead = set()
    for section in (ROOT / "benchmarks/results/rotate.md").read_text().split("\n## ")[1:]:
        for peer, ratio, high in re.findall(
            r"^\| ([^|]+) \|[^|]+\|[^|]+\| (\S+) \(\S+ to (\S+)\) \|", section, re.M
        ):
            if float(ratio) < 1 and float(high) <= 1 and "x * 2" not in peer:
                ahead.add((section.splitlines()[0], peer))
    assert ahead == {
        ("one token, half, 128 of 128, bfloat16", "transformers compiled"),
        ("one token, interleaved, 128 of 128, bfloat16", "transformers compiled"),
        ("rotate, half, 32 of 128, bfloat16", "transformers compiled"),
        ("backward, half, 64 of 64, float32", "equinox"),
        ("backward, half, 256 of 256, float32", "equinox"),
    }
    said = " ".join((DOCS / "results/cpu.md").read_text().split())
    assert "behind `torch.compile` in bfloat16 for a single token, and for 32 rotated features of 128" in said
    assert "behind Equinox for heads of 64 and 256 in float32" in said


def test_no_table_is_left_over():
    assert sorted(path.name for path in tables.TABLES.iterdir()) == sorted(tables.tables())


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_inside_lead_somewhere(path):
    page = path.read_text()
    included = re.findall(r"^```\{include\} (\S+)", page, re.MULTILINE)
    linked = [target for target in re.findall(r"\]\(([^)\s]+)\)", page) if not target.startswith(("http", "#"))]
    for target in included + linked:
        assert (path.parent / target).exists(), target
    for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", page):
        page_of = DOCS / target.lstrip("/") if target.startswith("/") else path.parent / target
        notebook = ROOT / "notebooks" / f"{page_of.name}.ipynb"
        assert page_of.with_suffix(".md").exists() or (page_of.parent.name == "notebooks" and notebook.exists()), (
            target
        )
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", page, re.M)
    }
    if "tables" not in path.parts:
        assert {target[1:] for target in re.findall(r"\]\((#[^)]+)\)", page)} <= headings


def test_a_link_of_the_built_site_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="b.html#y"><a href="#x"><a href="https://b.c"><img src="d.png">'
    )
    (tmp_path / "b.html").write_text('<p id="y"><a href="a.html#y"><a href="a.html?v=1#x">')
    assert links.broken(tmp_path) == ["a.html: d.png", "b.html: a.html#y"]


@pytest.mark.parametrize("storey", STOREYS[1:])
def test_every_public_name_stands_once_in_the_reference(storey):
    reference = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    documented = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", reference, re.MULTILINE)
    data = re.findall(r"^\.\. py:data:: (\S+)\n +:module: (\S+)$", reference, re.MULTILINE)
    documented += [f"{module}.{public}" for public, module in data]
    module = importlib.import_module(storey)
    for public in module.__all__:
        at_root = getattr(rope_jax, public, None) is getattr(module, public)
        assert documented.count(f"rope_jax.{public}" if at_root else f"{storey}.{public}") == 1, public


def test_the_pages_name_things_instead_of_pointing():
    def words(page):
        page = re.sub(r"^```.*?^```$|^:::.*?^:::$", " ", page, flags=re.MULTILINE | re.DOTALL)
        return re.sub(r"\]\([^)]*\)|\{[\w:]+\}", " ", page)

    counted = {path: prose.count(words(path.read_text())) for path in WRITTEN}
    assert prose.per_thousand(counted.values()) <= 30
    assert not {name(path): row for path, row in counted.items() if row[1] > 150 and prose.per_thousand([row]) > 40}
