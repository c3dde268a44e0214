"""The order of storeys, and of the files in each storey: imports name earlier ones only."""

import ast
import importlib
from pathlib import Path

import pytest

import rope_jax

ROOT = Path(__file__).parents[1]
STOREYS = {  # from the ground up; in a storey, the files in import order
    "_jax_internals": [],
    "_checks": [],
    "core": (
        "named nan_rows whole explicit positions grids centers media frequencies schedules length_schedules composed_schedules phases angles kernels "
        "primitive projection rotate rope serialization"
    ).split(),
    "attention": (
        "norm mask bias quantized slots memory_order cache_write cache rotations empty_cache facts plan_arguments prefix plan cross_plan sharding kernels tiling blocks paths primitive attend "
        "zigzag ring layer_checks self_attention layer adapter"
    ).split(),
    "nnx": "parameters norm attention".split(),
    "models": "embedding block decoder_checks decoder".split(),
    "generation": "prompts forward placement sample logits sampler loop generate speculative beam".split(),
    "interop": (
        "layout model_rope config sections rope_types family hooks families layers part_types class_defaults parts read "
        "write decoders weights text checkpoint gguf_architectures gguf_file gguf_rope gguf_tokenizer gguf_checkpoint"
    ).split(),
    "_analysis_arguments": [],
    "analysis": [],
    "plot": [],
    "__main__": [],
}
ORDER = [(storey, file) for storey, files in STOREYS.items() for file in files or [""]]
FILES = [path for path in (ROOT / "rope_jax").rglob("*.py") if path.name != "__init__.py"]


def place(parts) -> tuple[str, str]:
    """The storey and the file of a module, from the parts of its name below ``rope_jax``."""
    return parts[0], parts[1] if len(parts) > 1 else ""


def imports(path: Path):
    """The modules of rope_jax that a file imports, as parts of their names below ``rope_jax``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rope_jax":
            parts = node.module.split(".")[1:]
            for name in node.names:
                # `from rope_jax.core.kernels import tpu` names a module, `from rope_jax.core.rope import Rope` does not.
                yield parts if parts and place(parts) in ORDER else [*parts, name.name]


def test_every_file_has_its_place():
    assert sorted({place(path.relative_to(ROOT / "rope_jax").with_suffix("").parts) for path in FILES}) == sorted(
        ORDER
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_from_below(path):
    here = place(path.relative_to(ROOT / "rope_jax").with_suffix("").parts)
    for parts in imports(path):
        assert place(parts) in ORDER[: ORDER.index(here)], f"{'/'.join(here)} imports {'.'.join(parts)}"


def test_no_file_and_no_class_outgrows_a_reader():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 285, (path, node.name)


# Types and values whose functions carry the examples.
WITHOUT_EXAMPLE = set(
    "AttentionBackend Beams Checkpoint Eviction Explanation Facts FrequencyChoice Generation KVCache Layout LayerRope Plan PositionBias "
    "PositionEmbedding Quantized RMSNorm RotateBackend Rotation Schedule SpeculativeOutput".split()
)


@pytest.mark.parametrize(
    "storey", ["", ".core", ".attention", ".nnx", ".models", ".generation", ".interop", ".analysis"]
)
def test_public_names_are_sorted_and_documented_by_example(storey):
    module = importlib.import_module(f"rope_jax{storey}")
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if callable(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    for name in names:
        value = getattr(module, name)
        if name not in WITHOUT_EXAMPLE and callable(value):
            assert ">>>" in value.__doc__, name
    if hasattr(module, "__all__"):
        assert list(names) == sorted(names)


def test_the_root_names_what_the_readme_needs():
    assert len([name for name in rope_jax.__all__ if callable(getattr(rope_jax, name))]) <= 29


@pytest.mark.parametrize("folder", ["rope_jax", "configs", "examples", "benchmarks", "notebooks"])
def test_no_folder_is_reached_by_changing_the_path_of_python(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert "sys.path" not in path.read_text(), path
