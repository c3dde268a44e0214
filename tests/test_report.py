"""``python -m rope_jax``: what a bug report needs."""

import platform
import subprocess
import sys
from importlib.metadata import version

import jax

import rope_jax


def test_the_report_names_versions_devices_and_kernels():
    done = subprocess.run([sys.executable, "-m", "rope_jax"], capture_output=True, text=True, check=True)
    first, system, backend, rotation, attention, numbers = done.stdout.splitlines()
    assert first.startswith(
        f"rope_jax {rope_jax.__version__}, Python {platform.python_version()}, jax {jax.__version__}"
    )
    assert f"flax {version('flax')}" in first and f"numpy {version('numpy')}" in first
    assert platform.system() in system
    assert backend.startswith("backend: cpu, 1 of cpu") and rotation == "rotation: by XLA"
    assert "blocks of 256 queries and 256 keys" in attention
    assert "float: float32" in numbers
