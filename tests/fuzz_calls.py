"""Calls of the public functions of rotation and attention, with a right value for each argument."""

import dataclasses
import functools

import fuzz_schedules
import jax
import jax.numpy as jnp
import numpy as np

import rope_jax

ROPE = rope_jax.Rope(8, rope_jax.Standard())
NTK = rope_jax.Rope(8, rope_jax.DynamicNTK(factor=2.0, original_length=64))
LONG = rope_jax.Rope(8, rope_jax.LongRope(**fuzz_schedules.LONG_ROPE))
KV = jnp.ones((2, 3, 2, 8))
SIZES = dict(batch=2, capacity=8, num_kv_heads=2, head_dim=8)
CACHE = rope_jax.init_cache(**SIZES)
ATTEND = {
    "*q": jnp.ones((2, 3, 4, 8)),
    "*k": KV,
    "*v": KV,
    "causal": True,
    "window": 2,
    "scale": None,
    "logit_cap": None,
    "bias": jnp.zeros((1, 1, 3, 3)),
    "mask": jnp.ones((2, 1, 1, 3), bool),
    "sink_logits": jnp.zeros(4),
}
ROTATE = {
    "*q": KV,
    "*k": KV,
    "*positions": jnp.arange(3),
    "context_length": None,
    "token_axis": -3,
    "implementation": None,
}
PLAN = {
    "*ropes": ROPE,
    "*shape": (2, 3),
    "positions": None,
    "sequence_index": None,
    "mask": None,
    "segment_ids": None,
    "causal": True,
    "prefix_length": None,
    "attention_mask": None,
    "window": None,
    "position_bias": None,
    "num_heads": 4,
    "cache": CACHE,
    "context_length": None,
    "learn_frequencies": False,
    "argument": "x",
}
CROSS = {
    "*rope": ROPE,
    "*shape": (2, 3),
    "*kv_length": 5,
    "positions": jnp.arange(3),
    "kv_positions": jnp.arange(5),
    "mask": jnp.ones((2, 3), int),
    "kv_mask": jnp.ones((2, 5), int),
    "attention_mask": jnp.ones((1, 4, 3, 5), bool),
    "num_heads": 4,
    "context_length": None,
    "learn_frequencies": False,
}

# function, arguments (with a star: by position), and the name by which a message may call an argument
CALLS = {
    "Rope": (
        rope_jax.Rope,
        dict(head_dim=8, schedule=rope_jax.Standard(), rotary_dim=4, start=2, layout="half", blocks=1),
        {},
    ),
    "rope": (ROPE, ROTATE, {}),
    "rope.inverse": (ROPE.inverse, ROTATE, {}),
    "rope.rotate": (
        ROPE.rotate,
        dict(x=KV, rotation=ROPE.rotation(jnp.arange(3)), token_axis=-3, implementation=None),
        {},
    ),
    "rope.frequencies": (NTK.frequencies, dict(context_length=3), {}),
    "rope.rerotate": (
        LONG.rerotate,
        {"*k": KV, "*positions": jnp.arange(3), "old_context_length": 64, "new_context_length": 65},
        {
            "*positions": "rotation.cos",
            "old_context_length": "context_length",
            "new_context_length": "context_length",
        },
    ),
    "rotation": (rope_jax.rotation, dict(positions=jnp.arange(3), frequencies=ROPE.frequencies()), {}),
    "rotate": (
        rope_jax.rotate,
        dict(
            x=KV,
            rotation=ROPE.rotation(jnp.arange(3)),
            layout="half",
            start=0,
            blocks=1,
            token_axis=-3,
            implementation=None,
        ),
        {"x": "rotation.cos", "token_axis": "rotation.cos"},  # a wrong T is seen beside the rotation
    ),
    "Frequencies": (
        rope_jax.Frequencies,
        dict(inv_freq=np.ones(4), attention_factor=1.0, phase=None, num_batch_axes=0),
        {},
    ),
    "positions_from_mask": (
        rope_jax.positions_from_mask,
        dict(mask=np.ones((2, 3), int), segment_ids=np.ones((2, 3), int)),
        {},
    ),
    "positions_from_segments": (rope_jax.positions_from_segments, dict(segment_ids=np.ones((2, 3), int)), {}),
    "grid_positions": (
        rope_jax.grid_positions,
        {
            "*sizes": 2,
            "*size": 3,
            "origin": 0,
            "step": 1,
            "resize_to": None,
            "centered": False,
            "frames": None,
            "block": 1,
            "num_prefix_tokens": 0,
        },
        {"*size": "sizes", "origin": "positions"},
    ),
    "packed_grid_positions": (
        rope_jax.core.packed_grid_positions,
        {"*sizes": [(1, 2), (2, 1)], "origin": 0, "num_prefix_tokens": 0},
        {"origin": "positions"},
    ),
    "multimodal_positions": (
        rope_jax.core.multimodal_positions,
        {"*segments": [2, (1, 4, 6)], "steps": None, "offset": 0, "resume": "all", "num_axes": 3},
        {"offset": "positions"},
    ),
    "diffusion_positions": (
        rope_jax.core.diffusion_positions,
        {"*model": "flux", "*num_text_tokens": 2, "*size": (2, 3)},
        {"*size": "sizes"},
    ),
    "patch_centers": (
        rope_jax.core.patch_centers,
        {"*height": 2, "*width": 3, "normalize": "own"},
        {"*height": "sizes", "*width": "sizes"},
    ),
    "augment_centers": (
        rope_jax.core.augment_centers,
        {"*key": jax.random.key(0), "*centers": jnp.ones((3, 2)), "shift": 0.0, "jitter": 1.0, "rescale": 1.0},
        {},
    ),
    "convert_layout": (
        rope_jax.convert_layout,
        {
            "*weight": np.ones((16, 8), np.float32),
            "*to": "half",
            "head_dim": 8,
            "rotary_dim": None,
            "start": 0,
            "axis": 0,
        },
        {},
    ),
    "attend": (
        rope_jax.attend,
        {**ATTEND, "dropout_rate": 0.1, "dropout_rng": jax.random.key(0), "implementation": None},
        {},
    ),
    "attention_weights": (
        rope_jax.attention.attention_weights,
        {name: value for name, value in ATTEND.items() if name != "*v"},
        {},
    ),
    "init_cache": (
        rope_jax.init_cache,
        dict(**SIZES, num_layers=2, dtype=jnp.float32, eviction=None, num_sink_tokens=0, rotated=True, rope=None),
        {},
    ),
    "RMSNorm": (
        lambda **given: rope_jax.attention.RMSNorm(**given).init(jax.random.key(0), KV),
        dict(axis="head_dim", epsilon=1e-6, unit_offset=False),
        {},
    ),
    "write": (
        CACHE.write,
        dict(key=KV, value=KV, mask=jnp.ones((2, 3), bool), max_window=2, implementation="plain"),
        {},
    ),
    "nan_if_overflowed": (CACHE.nan_if_overflowed, dict(values=KV), {}),
    "truncate": (CACHE.write(KV, KV).truncate, dict(num_tokens=jnp.array([1, 2])), {}),
    "select_rows": (CACHE.select_rows, dict(rows=jnp.array([1, 0])), {}),
    "grow": (CACHE.grow, dict(capacity=9), {}),
    "quantize": (rope_jax.attention.quantize, dict(x=KV, dtype=jnp.int8), {}),
    "make_plan": (rope_jax.attention.make_plan, PLAN, {"*ropes": "rope"}),
    # A prefix goes with no window, order or segments, so that a call of its own has it.
    "make_plan with a prefix": (
        rope_jax.attention.make_plan,
        PLAN | {"prefix_length": jnp.array([1, 2]), "attention_mask": jnp.ones((2, 4, 1, 8), bool)},
        {"*ropes": "rope", "cache": "attention_mask", "num_heads": "attention_mask"},
    ),
    "make_cross_plan": (
        rope_jax.attention.make_cross_plan,
        CROSS,
        {"*kv_length": "kv_positions", "num_heads": "attention_mask"},
    ),
}


def frequencies_of(make, /, **fields):
    return make(**fields)(8)


def fields_of(schedule, fields):
    return {field.name: fields.get(field.name, field.default) for field in dataclasses.fields(schedule)}


# Some hyperparameters are bounds of others, or show in the frequencies that they give.
NAMED_AS = {
    "Yarn": {"beta_slow": "beta_fast"},
    "Llama3": {"low_freq_factor": "high_freq_factor"},
    "Affine": {"scale": "inv_freq", "offset": "phase"},
}
for name, (schedule, fields) in fuzz_schedules.SCHEDULES.items():
    CALLS[name] = (functools.partial(frequencies_of, schedule), fields_of(schedule, fields), NAMED_AS.get(name, {}))
