"""Writes results with their command, machine and versions. Every benchmark ends here."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jaxlib
import matplotlib.figure
import numpy as np


def machine() -> dict:
    """The processor, the date and the versions of a measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "processor": names[0] if names else platform.processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The version of each package, or "not installed"."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))


def publish(
    script: str,
    result: dict,
    table: Callable[[dict], str],
    draw: Callable[[dict], matplotlib.figure.Figure],
    packages: Sequence[str] = (),
) -> None:
    """Writes results/<script>.json with command, machine and versions, its picture as .png, and prints its table.

    A test compares the site with ``table`` of the written file.
    """
    path = Path(script)
    kept = {
        "command": " ".join(["python", "-m", f"benchmarks.{path.stem}", *sys.argv[1:]]),
        **machine(),
        **({"packages": versions(packages)} if packages else {}),
        "result": result,
    }
    target = path.parent / "results" / f"{path.stem}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + "\n")
    draw(kept).savefig(target.with_suffix(".png"), dpi=120)
    print(table(kept))


def save(script: str, result: dict) -> None:
    """Prints the result and writes it to results/<script>.json with its command and machine."""
    path = Path(script)
    kept = {
        "command": " ".join(["python", "-m", f"benchmarks.{path.stem}", *sys.argv[1:]]),
        **machine(),
        "result": result,
    }
    target = path.parent / "results" / f"{path.stem}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept, indent=1))
