"""Names of JAX that may move are taken from `_jax_internals` alone."""

import ast
from pathlib import Path

import jax
import pytest

from rope_jax import _jax_internals

FOLDER = Path(__file__).parents[1] / "rope_jax"
FILES = [path for path in FOLDER.rglob("*.py") if path != Path(_jax_internals.__file__)]
UNSTABLE = ("jax._src", "jax.core", "jax.extend", "jax.interpreters", "jax.experimental", "jax.lib", "jaxlib")
ATTRIBUTES = {"manual_axis_type", "vma", "mat", "lowering_parameters", "axis_context", "_src"}


def unstable_names(source: str) -> list[str]:
    """What a file takes from JAX that JAX may move: imports, attributes of modules, attributes of configs and types."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Attribute):
            written = ast.unparse(node)
            # `jax.config.update` is public, the value of a setting as an attribute is not.
            reads_setting = written.startswith("jax.config.") and written != "jax.config.update"
            found += [written] if written.startswith("jax.") else []
            found += ["jax._src"] if reads_setting or node.attr in ATTRIBUTES else []
        elif isinstance(node, ast.keyword) and node.arg in ATTRIBUTES:
            found.append("jax._src")
    return [name for name in found if any(name == each or name.startswith(each + ".") for each in UNSTABLE)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_no_other_file_takes_a_name_that_may_move(path):
    assert unstable_names(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from jax import core",
        "import jax.core",
        "from jax.experimental import pallas",
        "from jax.experimental.layout import Layout",
        "isinstance(x, jax.core.Tracer)",
        "jax.config.jax_disable_jit",
        "jax.typeof(x).manual_axis_type",
        "jax.ShapeDtypeStruct((), 'int32', vma=axes)",
    ],
)
def test_the_search_finds_each_form(line):
    assert unstable_names(line)


def test_the_file_names_what_it_has():
    public = {name for name in vars(_jax_internals) if not name.startswith("_")} - {"Any", "config", "jax"}
    assert public >= set(_jax_internals.__all__)
    for name in public:
        assert name.removesuffix("_kernel") in _jax_internals.__doc__, name
    assert jax.__version_info__ >= (0, 10)
