"""Guards that `make test` names every public name at least once. A guard, not a proof that the name is tested."""

import ast
import importlib
import types
import typing
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
STOREYS = ["rope_jax", *(f"rope_jax.{name}" for name in "core attention nnx models generation interop".split())]

# Types that only functions make: a test of the function is a test of the type.
MADE_BY = {
    "Beams": "beam_search",
    "Checkpoint": "load_hf",
    "Generation": "generate",
    "Plan": "make_plan",
    "Quantized": "quantize",
    "SpeculativeOutput": "speculative_decode",
}


def is_no_code(thing):
    """Modules are their storeys'; protocols, and aliases such as ``Literal["half", "interleaved"]``, only type checkers read."""
    return (
        isinstance(thing, types.ModuleType)
        or typing.get_origin(thing) is not None
        or getattr(thing, "_is_protocol", False)
    )


def is_full(node):
    return "mark.full" in ast.unparse(node)


def names_in(path):
    """The names in code that the marker ``full`` leaves in the fast suite."""
    tree = ast.parse(path.read_text())
    if any(
        is_full(node) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
    ):
        return
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if any(is_full(decorator) for decorator in getattr(node, "decorator_list", ())):
            continue
        nodes += ast.iter_child_nodes(node)
        for field in ("id", "attr", "name", "module"):
            yield from (getattr(node, field, None) or "").split(".")


@pytest.fixture(scope="module")
def named():
    files = [path for path in TESTS.rglob("*.py") if path.parent.name not in ("oracle", "golden")]
    return {name for path in files if path != Path(__file__) for name in names_in(path)}


@pytest.mark.parametrize("storey", STOREYS)
def test_the_fast_suite_names_all_that_is_public(storey, named):
    module = importlib.import_module(storey)
    public = [name for name in module.__all__ if not is_no_code(getattr(module, name))]
    assert not [name for name in public if MADE_BY.get(name, name) not in named]


def test_the_guard_sees_the_marker(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("@pytest.mark.full\ndef test_a(): rope_jax.one()\n\ndef test_b(): rope_jax.two()\n")
    assert "two" in names_in(file) and "one" not in names_in(file)
    file.write_text("pytestmark = pytest.mark.full\n\ndef test_b(): rope_jax.two()\n")
    assert not list(names_in(file))
