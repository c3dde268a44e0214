"""On what was it measured, and where is it kept? Every benchmark ends here."""

import datetime
import json
import os
import platform
import sys
from pathlib import Path

import jax
import jaxlib
import numpy as np


def machine() -> dict:
    """The processor and the versions that a figure belongs to."""
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


def save(script: str, result: dict) -> None:
    """Prints the result and writes it to results/<script>.json with its command and machine."""
    path = Path(script)
    kept = {
        "command": " ".join(["python", f"benchmarks/{path.name}", *sys.argv[1:]]),
        **machine(),
        "result": result,
    }
    target = path.parent / "results" / f"{path.stem}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept, indent=1))
