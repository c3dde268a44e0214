"""Values of rope_jax as arguments of a serialized jax.export, and in flax.serialization."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import build, init
from jax import export
from schedules import CASES, IDS, ROTARY_DIM

import rope_jax
from rope_jax.core import serialization
from rope_jax.generation import Beams, Generation, SpeculativeOutput

ROPE = rope_jax.Rope(8, rope_jax.Yarn(factor=4.0, original_length=16), rotary_dim=4, layout="interleaved")
MODEL = build(rope=(ROPE, None))

ELSEWHERE = """
import sys, jax, flax.serialization, rope_jax
from jax import export
from pathlib import Path
folder = Path(sys.argv[1])
step = export.deserialize(bytearray((folder / "step.bin").read_bytes()))
(params, _, cache, _), _ = jax.tree.unflatten(step.in_tree, step.in_avals)
empty = jax.tree.map(lambda aval: jax.numpy.zeros(aval.shape, aval.dtype), cache)
assert isinstance(empty, rope_jax.KVCache), type(empty)
assert empty.eviction == "sliding" and empty.num_sink_tokens == 1 and not empty.rotated
assert repr(empty.rope) == sys.argv[2], empty.rope
cache = flax.serialization.from_bytes(empty, (folder / "cache.bin").read_bytes())
inputs = flax.serialization.msgpack_restore((folder / "inputs.bin").read_bytes())
logits, cache = step.call(inputs["params"], inputs["tokens"], cache, inputs["mask"])
(folder / "out.bin").write_bytes(flax.serialization.to_bytes([logits, cache]))
"""


def values() -> dict:
    """A value of each registered type, by name."""
    cache = rope_jax.init_cache(batch=2, capacity=3, num_kv_heads=1, head_dim=8, rope=ROPE, eviction="sliding")
    narrow = rope_jax.init_cache(batch=2, capacity=3, num_kv_heads=1, head_dim=8, dtype=jnp.int8, num_layers=2)
    tokens, counts, scores = jnp.ones((2, 3), jnp.int32), jnp.array([3, 1]), jnp.ones((2, 3))
    return {
        "cache": cache.write(*[jnp.ones((2, 1, 1, 8))] * 2),
        "quantized cache": narrow,
        "Quantized": rope_jax.attention.quantize(jnp.arange(6.0).reshape(2, 3)),
        "Rotation": ROPE.rotation(jnp.arange(4)),
        "Rotation of heads": dataclasses.replace(ROPE.rotation(jnp.arange(4)), per_head=True),
        "Generation": Generation(tokens, counts, scores, cache),
        "SpeculativeOutput": SpeculativeOutput(tokens, counts, counts, jnp.int32(4), cache, narrow),
        "Beams": Beams(tokens[:, None], counts[:, None], scores[:, :1]),
    }


def equal(got, want) -> bool:
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return jax.tree.structure(got) == jax.tree.structure(want) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in leaves
    )


@pytest.mark.parametrize("name", values())
def test_as_argument_and_result_of_an_exported_program(name):
    value = values()[name]
    exported = export.export(jax.jit(lambda value: jax.tree.map(lambda leaf: leaf + leaf, value)))(value)
    again = export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree and again.out_tree == exported.out_tree
    assert equal(again.call(value), jax.tree.map(lambda leaf: leaf + leaf, value))


@pytest.mark.parametrize("name", values())
def test_flax_restores_what_it_wrote(name):
    value = values()[name]
    zeros = jax.tree.map(jnp.zeros_like, value)
    assert equal(flax.serialization.from_bytes(zeros, flax.serialization.to_bytes(value)), value)
    state = flax.serialization.to_state_dict(value)
    assert equal(flax.serialization.from_state_dict(zeros, state), value)


def test_a_decode_step_in_another_process_goes_on_from_a_saved_cache(tmp_path):
    params, rng = init(MODEL), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 13, (2, 4)), jnp.int32)
    mask = jnp.array([[True] * 4, [False, True, True, True]])
    options = dict(batch=2, capacity=9, eviction="sliding", num_sink_tokens=1)
    _, cache = MODEL.apply(params, tokens, cache=MODEL.init_cache(**options))

    def step(params, tokens, cache, mask):
        return MODEL.apply(params, tokens, mask=mask, cache=cache)

    exported = export.export(jax.jit(step))(params, tokens, cache, mask)
    (tmp_path / "step.bin").write_bytes(exported.serialize())
    (tmp_path / "cache.bin").write_bytes(flax.serialization.to_bytes(cache))
    inputs = flax.serialization.msgpack_serialize(
        jax.tree.map(np.asarray, dict(params=params, tokens=tokens, mask=mask))
    )
    (tmp_path / "inputs.bin").write_bytes(inputs)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, tmp_path, repr(cache.rope)]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    want = jax.jit(step)(params, tokens, cache, mask)
    got = flax.serialization.from_bytes(list(want), (tmp_path / "out.bin").read_bytes())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(list(want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_schedule_survives(case):
    rope = rope_jax.Rope(ROTARY_DIM, case.build())
    written = serialization._write(rope, "rope")
    assert serialization._read(written) == rope
    assert hash(serialization._read(written)) == hash(rope)


def test_numbers_of_numpy_survive():
    rope = rope_jax.Rope(
        8, rope_jax.Yarn(base=np.float32(1e4), factor=np.float16(2.5), original_length=np.int64(16))
    )
    value = rope_jax.init_cache(batch=1, capacity=3, num_kv_heads=1, head_dim=8, rope=rope, rotated=np.True_)
    program = export.export(jax.jit(lambda value: value))(value)
    assert export.deserialize(program.serialize()).in_tree == program.in_tree
    assert equal(export.deserialize(program.serialize()).call(value), value)
    assert equal(flax.serialization.from_bytes(value, flax.serialization.to_bytes(value)), value)


def test_another_version_is_an_error(monkeypatch):
    value = values()["cache"]
    program = export.export(jax.jit(lambda value: value.num_tokens))(value).serialize()
    state = flax.serialization.to_state_dict(value)
    says = "version of rope_jax.KVCache must be 7 in this rope_jax, got 2: serialize it again, or install"
    monkeypatch.setattr(serialization, "VERSION", 7)
    with pytest.raises(ValueError, match=says):
        export.deserialize(program)
    with pytest.raises(ValueError, match=says):
        flax.serialization.from_state_dict(value, state)
    outputs = values()["Beams"]
    monkeypatch.setattr(serialization, "VERSION", 1)
    program = export.export(jax.jit(lambda outputs: outputs.score))(outputs).serialize()
    monkeypatch.setattr(serialization, "VERSION", 7)
    with pytest.raises(ValueError, match=r"version of rope_jax.Beams must be 7"):
        export.deserialize(program)


@pytest.mark.parametrize(
    "change", [dict(eviction=None), dict(num_sink_tokens=2), dict(rotated=False), dict(rope=None)], ids=str
)
def test_a_target_with_other_static_fields_is_an_error(change):
    value = values()["cache"]
    (field,) = change
    with pytest.raises(ValueError, match=rf"target.{field} must be as written in the state of rope_jax.KVCache"):
        flax.serialization.from_state_dict(
            dataclasses.replace(value, **change), flax.serialization.to_state_dict(value)
        )


def test_a_state_without_a_field_is_an_error():
    value = values()["Quantized"]
    state = flax.serialization.to_state_dict(value)
    del state["scale"]
    with pytest.raises(ValueError, match=r"state of rope_jax.Quantized must have the fields .*'scale'"):
        flax.serialization.from_state_dict(value, state)


def test_a_state_of_another_kind_is_an_error():
    """Flax itself would put what it was given in place of the arrays."""
    value = values()["quantized cache"]
    state = flax.serialization.to_state_dict(value)
    wide = dataclasses.replace(value, key=value.key.astype(jnp.float32), value=value.value.astype(jnp.float32))
    stack = jax.tree.map(lambda leaf: leaf[None], (value.key, value.value))
    of_stack = dataclasses.replace(value, key=stack[0], value=stack[1])
    for target, given, error, message in (
        (value, None, TypeError, "state of rope_jax.KVCache must be a mapping of its fields, got None"),
        (value, [1], TypeError, r"state of rope_jax.KVCache must be a mapping of its fields, got \[1\]"),
        (value, state | {"extra": 1}, ValueError, "state of rope_jax.KVCache must have the fields .*'extra'"),
        (
            value,
            state | {"num_tokens": "abc"},
            ValueError,
            "target.num_tokens must have the rank of the state of rope_jax.KVCache, 0, got 1: make",
        ),
        (value, state | {"key": None}, (TypeError, ValueError), "of rope_jax.(Quantized|KVCache)"),
        (
            wide,
            state,
            ValueError,
            "target.key must have the rank of the state of rope_jax.KVCache, {.*}, got 5: make",
        ),
        (value, flax.serialization.to_state_dict(wide), TypeError, "state of rope_jax.Quantized must be a mapping"),
        (
            of_stack,
            state,
            ValueError,
            "target.values must have the rank of the state of rope_jax.Quantized, 5, got 6",
        ),
    ):
        with pytest.raises(error, match=message):
            flax.serialization.from_state_dict(target, given)


def of_my_own(rotary_dim):
    return rope_jax.Standard()(rotary_dim)


def test_a_schedule_of_your_own_is_kept_by_flax_and_refused_by_export():
    """A program holds no code of yours: the process that reads it could not build the schedule."""
    value = dataclasses.replace(values()["cache"], rope=rope_jax.Rope(8, of_my_own))
    assert equal(flax.serialization.from_bytes(value, flax.serialization.to_bytes(value)), value)
    exported = export.export(jax.jit(lambda value: value.num_tokens))(value)
    with pytest.raises(ValueError, match=r"rope_jax.KVCache.rope must be made of schedules of rope_jax"):
        exported.serialize()
