"""The public surface under the modes of JAX that large code bases set, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import surface

TESTS = Path(__file__).parent
MODES = {
    "rank promotion": dict(jax_numpy_rank_promotion="raise"),
    "dtype promotion": dict(jax_numpy_dtype_promotion="strict"),
    "x64": dict(jax_enable_x64=True),
    "debug NaNs": dict(jax_debug_nans=True),
    "tracer leaks": dict(jax_check_tracer_leaks=True),
}
CODE = """
import sys
import jax, numpy as np
for name, value in {mode!r}.items():
    jax.config.update(name, value)
import surface
np.savez(sys.argv[1], **{{name: np.asarray(x, np.float64) for name, x in surface.{part}().items()}})
"""


def in_a_mode(mode, part, folder):
    """The arrays of a function of ``surface``, from a process in this mode."""
    command = [sys.executable, "-c", CODE.format(mode=mode, part=part)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    done = subprocess.run([*command, folder / "out.npz"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npz")


@pytest.fixture(scope="module")
def wanted():
    return {name: np.asarray(x, np.float64) for name, x in surface.surface().items()}


@pytest.mark.full
@pytest.mark.parametrize("name", MODES)
def test_the_surface_gives_the_same_numbers(name, wanted, tmp_path):
    got = in_a_mode(MODES[name], "surface", tmp_path)
    assert set(got) == set(wanted)
    for key, want in wanted.items():
        if name == "x64" and ("dropout" in key or "drawn" in key):
            continue  # random numbers are drawn in 64 bits
        limit = 1e-5 * max(1.0, np.abs(want).max())  # float32 sums in another order, through two layers
        np.testing.assert_allclose(got[key], want, atol=limit, err_msg=key)


def test_without_jit_a_part_of_the_surface_gives_the_same_numbers(tmp_path):
    """Each operation runs and compiles by itself, so that the whole surface would be too slow.

    The slowest piece is ``generate``, a quarter of the seconds: its loops run in Python, step by step.
    """
    got = in_a_mode(dict(jax_disable_jit=True), "essence", tmp_path)
    wanted = surface.essence()
    assert set(got) == set(wanted)
    for key, want in wanted.items():
        # float32 sums of up to 4 numbers near 1 in another order, through one layer
        np.testing.assert_allclose(got[key], np.asarray(want, np.float64), atol=2e-6, err_msg=key)
