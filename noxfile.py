"""Runs the tests in every supported version of Python and JAX: ``pipx run nox``, or ``nox --list``.

``nox -s tests -- tests/core`` runs a part. Each run leaves a report in runs/versions, and ``nox -s table`` writes
them to docs/versions.md.
"""

from pathlib import Path

import nox

REPORTS = "runs/versions"
# jax 0.11 and 0.12 need Python 3.12. "lowest" takes the lower bounds of pyproject.toml.
VERSIONS = [("3.11", "lowest"), ("3.11", "0.10.2"), ("3.12", "0.11.1"), ("3.12", "0.12.*")]
VERSIONS += [("3.13", "newest"), ("3.14", "newest")]
LOWEST = ["jax==0.10.0", "jaxlib==0.10.0", "flax==0.12.8", "numpy==2.0.0", "chex==0.1.90"]
NAMES = """
import platform
from importlib.metadata import version
packages = "jax jaxlib flax numpy chex".split()
print("Python " + platform.python_version(), *(f"{name} {version(name)}" for name in packages), sep=", ")
"""

nox.options.sessions = ["tests", "lint", "wheel"]


def pins(jax: str) -> list[str]:
    """What pip installs for one column of the matrix."""
    return {"lowest": LOWEST, "newest": ["jax", "flax"]}.get(jax) or [f"jax=={jax}", f"jaxlib=={jax}"]


@nox.session
@nox.parametrize("python, jax", VERSIONS)
def tests(session: nox.Session, jax: str) -> None:
    """The tests of `make test`, or the paths that are given."""
    session.install("-e", ".[test]", *pins(jax))
    versions = session.run("python", "-c", NAMES, silent=True).strip()
    report = f"{REPORTS}/{session.python}-{jax.rstrip('.*')}.xml"
    options = ["-m", "not full", f"--junitxml={report}", "-o", f"junit_suite_name={versions}"]
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *options, *session.posargs)


@nox.session
def table(session: nox.Session) -> None:
    """Writes docs/versions.md from the reports of all runs."""
    session.run("python", "tests/versions.py", REPORTS, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    session.run("make", "docs", external=True)


@nox.session
def onnx(session: nox.Session) -> None:
    """Converts layers in plain operations."""
    session.install("-e", ".[onnx]")
    session.run("python", "-m", "pytest", "-m", "oracle", "tests/oracle/test_onnx.py")


@nox.session(python=["3.11", "3.12", "3.13"])
def wheel(session: nox.Session) -> None:
    """Builds sdist and wheel, and imports the wheel where nothing but its dependencies is installed."""
    session.install("build")
    folder = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", folder)
    session.install("--only-binary=:all:", *map(str, Path(folder).glob("*.whl")))
    session.chdir(folder)
    session.run("python", "-c", "import rope_jax; print(rope_jax.__version__, rope_jax.__file__)")
