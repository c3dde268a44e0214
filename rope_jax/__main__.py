"""Prints versions, devices and kernels for a bug report: ``python -m rope_jax``."""

import importlib.metadata
import platform
from typing import Literal

import jax
import jax.numpy as jnp

import rope_jax
from rope_jax._jax_internals import default_matmul_precision
from rope_jax.attention.facts import Facts
from rope_jax.attention.paths import explain

CHIPS: dict[str, Literal["cpu", "gpu", "tpu"]] = dict(cpu="cpu", gpu="gpu", cuda="gpu", rocm="gpu", tpu="tpu")
PACKAGES = ["jax", "jaxlib", "flax", "numpy", "chex", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin"]


def lines() -> list[str]:
    """The lines of the report."""
    versions = [f"rope_jax {rope_jax.__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    backend = jax.default_backend()
    kinds = sorted({device.device_kind for device in jax.local_devices()})
    q = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    chip = CHIPS.get(backend)
    path = "not known" if chip is None else explain(q, q, Facts(causal=True), platform=chip)
    return [
        ", ".join(versions),
        f"platform: {platform.platform()}",
        f"backend: {backend}, {jax.local_device_count()} of {', '.join(kinds)}; processes: {jax.process_count()}",
        f"rotation: {'Pallas kernel for 128 tokens or more' if chip == 'tpu' else 'by XLA'}",
        f"causal attention, T=4096, bfloat16: {path}",
        f"float: {jax.dtypes.canonicalize_dtype(float)}, matmul precision: {default_matmul_precision()}",
    ]


if __name__ == "__main__":
    print("\n".join(lines()))
