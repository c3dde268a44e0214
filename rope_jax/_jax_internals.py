"""Collects the unstable names of JAX: every other file of rope_jax imports such a name from this file.

All names are the same from JAX 0.10.0 to 0.12.0.1. If a release renames a name, this file alone changes.

====================================  ============================================================================
name                                  in JAX
====================================  ============================================================================
Primitive                             ``jax.extend.core``
Tracer, ShapedArray, min_dim          ``jax.core``
ad, batching, mlir                    ``jax.interpreters``
Layout, with_layout_constraint        ``jax.experimental.layout``
set_xla_metadata                      ``jax.experimental.xla_metadata``
pallas, pallas_tpu                    ``jax.experimental.pallas``, and its module ``tpu``
splash_attention(_kernel)             ``jax.experimental.pallas.ops.tpu.splash_attention``
varying_axes, struct_like             ``manual_axis_type``; ``vma`` before JAX 0.10
check_vma                             ``jax._src.config._check_vma``, or None: a context, of shard_map's check
is_jit_disabled,                      attributes of ``jax.config``
default_matmul_precision
is_for_export, is_partitioned_by_xla  ``lowering_parameters``, ``axis_context`` of a context of lowering
====================================  ============================================================================
"""

from typing import Any

import jax
from jax._src import config
from jax.core import ShapedArray, Tracer, min_dim
from jax.experimental import pallas
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pallas_tpu
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = [
    "Layout",
    "Primitive",
    "ShapedArray",
    "Tracer",
    "ad",
    "batching",
    "check_vma",
    "min_dim",
    "mlir",
    "pallas",
    "pallas_tpu",
    "set_xla_metadata",
    "splash_attention",
    "splash_attention_kernel",
    "with_layout_constraint",
]

check_vma: Any = getattr(config, "_check_vma", None)


def varying_axes(x) -> frozenset:
    """The manual mesh axes of shard_map over which x varies."""
    return jax.typeof(x).manual_axis_type.varying


def struct_like(x) -> jax.ShapeDtypeStruct:
    """The shape and dtype of x, and the manual mesh axes over which it varies."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def is_jit_disabled() -> bool:
    return jax.config.jax_disable_jit  # type: ignore[attr-defined]


def default_matmul_precision() -> str | None:
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def is_for_export(module_context) -> bool:
    """True if the program is lowered by jax.export."""
    return module_context.lowering_parameters.for_export


def is_partitioned_by_xla(module_context) -> bool:
    """True if XLA divides the program among devices: XLA can divide its own operations, but no kernel."""
    axes = module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices != 1
    mesh = axes.mesh.shape
    return any(mesh[name] > 1 for name in set(mesh) - set(axes.manual_axes)) if axes.manual_axes else mesh != {}
