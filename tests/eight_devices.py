"""Eight virtual devices must be there before jax starts, so the tests that need them run in a process of their own.

A file keeps such tests in a class named EightDevices, which pytest does not collect by itself, and has one test that
calls ``run(__file__)``.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import oracles
from jax.sharding import AxisType

# Which markers the tests have that run now, as pytest's option -m says it: conftest.py sets it.
markers = ""


def run(file):
    flags = "--xla_force_host_platform_device_count=8"
    name = "EightDevices"
    done = subprocess.run(
        [sys.executable, *f"-m pytest -q -s -o python_classes={name} -k {name}".split(), "-m", markers, file],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr


def mesh(**sizes):
    """A mesh of as many of the devices as the sizes need."""
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def assert_reordered(got, want, terms):
    """Loss and gradients that differ by the order of their sums: by an eps for each of the terms along their path."""
    (loss, grads), (want_loss, want_grads) = got, want
    worst = abs(float(loss) / float(want_loss) - 1)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert np.abs(b).max() > 0
        worst = max(worst, np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())
    print(
        f"\nloss and gradients {worst:.1e} of the largest, {worst / terms / oracles.EPS32:.2f} of what is allowed",
        end="",
    )
    assert worst <= terms * oracles.EPS32


def terms_of(model, batch, length):
    """How many terms are summed along the longest path of a loss and its gradient: heads, keys, features, tokens."""
    heads = model.num_heads * model.head_dim
    layer = 2 * model.width + 2 * length + heads + model.mlp_dim  # projections, softmax and values, out, MLP
    return batch * length + 2 * (model.vocab_size + model.num_layers * layer)
