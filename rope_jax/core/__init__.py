"""Rotary position embedding: positions, frequencies, angles, rotate."""

from rope_jax.core.positions import positions_from_mask, positions_from_segments
from rope_jax.core.grids import grid_positions, packed_grid_positions
from rope_jax.core.centers import augment_centers, patch_centers
from rope_jax.core.media import diffusion_positions, multimodal_positions
from rope_jax.core.frequencies import Frequencies, FrequencyChoice, Schedule
from rope_jax.core.schedules import (
    Linear,
    Llama3,
    NTKAware,
    Proportional,
    Standard,
    Yarn,
    geometric,
)
from rope_jax.core.length_schedules import DynamicNTK, LongRope
from rope_jax.core.composed_schedules import Affine, Axial, Negated, Sections
from rope_jax.core.angles import Rotation, rotation
from rope_jax.core.primitive import Layout, RotateBackend
from rope_jax.core.rotate import rotate
from rope_jax.core.rope import Rope

__all__ = [
    "Affine",
    "Axial",
    "DynamicNTK",
    "Frequencies",
    "FrequencyChoice",
    "Layout",
    "Linear",
    "Llama3",
    "LongRope",
    "NTKAware",
    "Negated",
    "Proportional",
    "Rope",
    "RotateBackend",
    "Rotation",
    "Schedule",
    "Sections",
    "Standard",
    "Yarn",
    "augment_centers",
    "diffusion_positions",
    "geometric",
    "grid_positions",
    "multimodal_positions",
    "packed_grid_positions",
    "patch_centers",
    "positions_from_mask",
    "positions_from_segments",
    "rotate",
    "rotation",
]
