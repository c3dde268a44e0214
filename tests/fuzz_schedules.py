"""Every schedule, with hyperparameters for a rotary_dim of 8."""

import rope_jax

LONG_ROPE = dict(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, factor=4.0, original_length=64)
SCHEDULES = {
    "Standard": (rope_jax.Standard, dict(base=10_000.0)),
    "Linear": (rope_jax.Linear, dict(factor=2.0)),
    "NTKAware": (rope_jax.NTKAware, dict(factor=2.0)),
    "DynamicNTK": (rope_jax.DynamicNTK, dict(factor=2.0, original_length=64, context_length=100)),
    "Yarn": (rope_jax.Yarn, dict(factor=4.0, original_length=64)),
    "Llama3": (rope_jax.Llama3, dict(factor=4.0, original_length=64)),
    "LongRope": (rope_jax.LongRope, LONG_ROPE | dict(context_length=100)),
    "Proportional": (rope_jax.Proportional, dict(proportion=0.5)),
    "Axial": (rope_jax.Axial, dict(sizes=(4, 4))),
    "Sections": (rope_jax.Sections, dict(sections=(2, 1, 1), schedule=rope_jax.Standard())),
    "Affine": (rope_jax.Affine, dict(schedule=rope_jax.Standard(), scale=0.5)),
    "Negated": (rope_jax.Negated, dict(schedule=rope_jax.Standard())),
}
