"""The wheel and the sdist: built twice they are the same bytes, and they hold the library alone."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(source: Path, target: Path) -> dict[str, Path]:
    """The sdist and the wheel of a folder, by the suffix: without network, by the build backend itself."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(target)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=environment)
    return {path.suffix: path for path in target.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("built"))


def digests(files: dict[str, Path]) -> dict[str, str]:
    return {suffix: hashlib.sha256(path.read_bytes()).hexdigest() for suffix, path in files.items()}


def test_two_builds_are_the_same_bytes_and_the_sdist_builds_the_same_wheel(built, tmp_path):
    assert set(built) == {".gz", ".whl"}
    assert digests(build(ROOT, tmp_path / "again")) == digests(built)
    with tarfile.open(built[".gz"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("rope_jax-*")
    assert digests(build(unpacked, tmp_path / "from sdist"))[".whl"] == digests(built)[".whl"]


def test_the_wheel_holds_the_library_its_types_and_its_licence(built):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
        metadata = next(wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
    info = next(iter({name.split("/")[0] for name in names if ".dist-info/" in name}))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "rope_jax").rglob("*.py")} | {"rope_jax/py.typed"}
    assert {name for name in names if not name.startswith(info)} == files
    assert f"{info}/licenses/LICENSE" in names
    assert built[".whl"].name.endswith("-py3-none-any.whl")  # no compiler is needed
    for requirement in PROJECT["dependencies"]:
        assert f"Requires-Dist: {requirement}" in metadata
    assert f"Requires-Python: {PROJECT['requires-python']}" in metadata
    assert "flatbuffers" in next(
        line for line in metadata.splitlines() if "flatbuffers" in line and "'export'" in line
    )


def test_the_sdist_holds_what_the_readme_runs(built):
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in "LICENSE README.md pyproject.toml Makefile noxfile.py tests/conftest.py configs/toy_lm.py".split():
        assert name in names, name
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "runs"))]
