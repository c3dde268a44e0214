"""Random calls of the public surface: the result is right beside float64, or the error is our own.

``make fuzz`` runs many more of them, other ones each time.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

import flax.linen as nn
import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rope_jax

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # one unit in the last place, relative
DTYPES = st.sampled_from(sorted(EPS))
INT32 = st.integers(-(2**31), 2**31 - 1)
SCHEDULES = {
    "Standard": (rope_jax.Standard, dict(base=10_000.0)),
    "Linear": (rope_jax.Linear, dict(factor=2.0)),
    "NTKAware": (rope_jax.NTKAware, dict(factor=2.0)),
    "DynamicNTK": (rope_jax.DynamicNTK, dict(factor=2.0, original_length=64, context_length=100)),
    "Yarn": (rope_jax.Yarn, dict(factor=4.0, original_length=64)),
    "Llama3": (rope_jax.Llama3, dict(factor=4.0, original_length=64)),
    "LongRope": (
        rope_jax.LongRope,
        dict(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, factor=4.0, original_length=64, context_length=100),
    ),
    "Proportional": (rope_jax.Proportional, dict(proportion=0.5)),
    "Axial": (rope_jax.Axial, dict(sizes=(4, 4))),
    "Sections": (rope_jax.Sections, dict(sections=(2, 1, 1), schedule=rope_jax.Standard())),
    "Affine": (rope_jax.Affine, dict(schedule=rope_jax.Standard(), scale=0.5)),
    "Negated": (rope_jax.Negated, dict(schedule=rope_jax.Standard())),
}


def numbers(data, shape, dtype):
    seed = data.draw(st.integers(0, 9), "seed")
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# --------------------------------------------------------------------------------------------------- the rotation


@given(st.data())
def test_rotations_are_those_of_float64(data):
    head_dim = data.draw(st.sampled_from([2, 4, 8, 10]), "H")
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2), "R/2")
    start = data.draw(st.integers(0, head_dim - rotary_dim), "start")
    layout = data.draw(st.sampled_from(["half", "interleaved"]), "layout")
    base = data.draw(st.floats(1.001, 1e9), "base")
    rope = rope_jax.Rope(head_dim, rope_jax.Standard(base=base), rotary_dim=rotary_dim, start=start, layout=layout)
    length, heads = data.draw(st.sampled_from([(1, 1), (3, 2), (5, 4)]), "T, N")
    leading = data.draw(st.sampled_from([(), (2,), (2, 1)]), "leading axes")
    dtype = data.draw(DTYPES, "dtype")
    heads_first = data.draw(st.booleans(), "heads first")
    x = numbers(data, (*leading, length, heads, head_dim), dtype)
    integers = np.array(data.draw(st.lists(INT32, min_size=length, max_size=length), "positions"))
    kind = data.draw(st.sampled_from(["list", "int32", "int64", "jax"]), "positions are")
    positions = {
        "list": integers.tolist(),
        "int32": integers.astype(np.int32),
        "int64": integers,
        "jax": jnp.asarray(integers, jnp.int32),
    }[kind]
    given_x = jnp.swapaxes(x, -2, -3) if heads_first else x
    q, k = rope(
        given_x,
        given_x[..., :1, :, :] if heads_first else x[..., :1, :],
        positions,
        token_axis=-2 - (not heads_first),
    )
    q = jnp.swapaxes(q, -2, -3) if heads_first else q
    cos, sin = oracles.cos_sin(integers, rope.frequencies().inv_freq)
    rotating = np.asarray(x, np.float64)[..., start : start + rotary_dim]
    expected = np.array(x, np.float64)
    expected[..., start : start + rotary_dim] = oracles.rotate_features(rotating, cos, sin, layout)
    size = np.abs(rotating).max() * math.sqrt(2)
    # cos and sin 1.2e-7, two products, a sum, one rounding to the dtype
    np.testing.assert_allclose(
        np.asarray(q, np.float64), expected, rtol=EPS[dtype] / 2 + 2.0**-24, atol=size * (1.2e-7 + 3 * 2.0**-24)
    )
    assert q.dtype == k.dtype == x.dtype


# -------------------------------------------------------------------------------------------------- attention


@given(st.data())
def test_attention_is_that_of_float64(data):
    batch, kv_heads, group = data.draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 1, 3)]), "B, K, N/K")
    length, kv_length = data.draw(st.sampled_from([(1, 1), (1, 5), (4, 4), (7, 7), (3, 6)]), "T, S")
    heads, head_dim, dtype = (
        kv_heads * group,
        data.draw(st.sampled_from([1, 4, 6]), "H"),
        data.draw(DTYPES, "dtype"),
    )
    q, k, v = (
        numbers(data, (batch, size, n, head_dim), dtype)
        for size, n in ((length, heads), *[(kv_length, kv_heads)] * 2)
    )
    options, allowed = {}, np.ones((batch, heads, length, kv_length), bool)
    distance = np.arange(length)[:, None] - np.arange(kv_length)
    if length == kv_length and data.draw(st.booleans(), "causal"):
        options["causal"], allowed = True, allowed & (distance >= 0)
    if data.draw(st.booleans(), "has a window"):
        options["window"] = data.draw(st.integers(1, 9), "window")
        allowed = allowed & (abs(distance) < options["window"])
        if data.draw(st.booleans(), "window is traced"):
            options["window"] = jnp.int32(options["window"])
    if data.draw(st.booleans(), "has a mask"):
        shape = [data.draw(st.sampled_from([1, size])) for size in (batch, heads, length)]
        mask = np.random.default_rng(data.draw(st.integers(0, 9))).random((*shape, kv_length)) < 0.7
        options["mask"], allowed = mask, allowed & mask
    bias = 0.0
    if data.draw(st.booleans(), "has a bias"):
        shape = [data.draw(st.sampled_from([1, size])) for size in (batch, heads, length)]
        options["bias"] = numbers(data, (*shape, kv_length), "float32")
        bias = np.broadcast_to(np.asarray(options["bias"], np.float64), allowed.shape)
    for name, values in dict(
        scale=[0.0, 0.3, -1.0, 5], logit_cap=[0.5, 30.0], implementation=["xla", "blocks"]
    ).items():
        if data.draw(st.booleans(), f"has {name}"):
            options[name] = data.draw(st.sampled_from(values), name)
    y = np.asarray(rope_jax.attend(q, k, v, **options), np.float64)
    for b in range(batch):
        readable = allowed[b].any(-1)  # [N, T]
        some = np.where(readable[..., None], allowed[b], True)
        expected = oracles.attention(
            np.asarray(q[b], np.float64),
            np.asarray(k[b], np.float64),
            np.asarray(v[b], np.float64),
            some,
            scale=options.get("scale"),
            logit_cap=options.get("logit_cap"),
            bias=bias if np.ndim(bias) == 0 else bias[b],
        )
        expected = np.where(readable.T[..., None], expected, 0.0)
        largest = np.abs(np.asarray(v[b], np.float64)).max()
        # scores up to about 30 times one rounding, and one rounding of the output
        np.testing.assert_allclose(y[b], expected, rtol=EPS[dtype], atol=largest * (40 * 2.0**-24 + 2 * EPS[dtype]))


# ------------------------------------------------------------------------------------------- arguments of a wrong kind


ROPE = rope_jax.Rope(8, rope_jax.Standard())
KV = jnp.ones((2, 3, 2, 8))
SIZES = dict(batch=2, capacity=8, num_kv_heads=2, head_dim=8)
CACHE = rope_jax.init_cache(**SIZES)
FIELDS = dict(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=ROPE,
    causal=True,
    window=2,
    position_bias=None,
    logit_cap=None,
    logit_scale=None,
    qk_norm=True,
    qk_norm_epsilon=1e-6,
    qk_norm_unit_offset=False,
    use_bias=False,
    use_out_bias=None,
    dropout_rate=0.0,
    deterministic=True,
    learn_frequencies=False,
    learn_sinks=False,
    implementation=None,
    attention_fn=None,
    ring_axis=None,
    decode=False,
)
LAYER = rope_jax.RotaryAttention(**FIELDS)
X = jnp.ones((2, 3, 16))
PARAMS = nn.unbox(LAYER.init(jax.random.key(0), X))
MODEL_FIELDS = dict(
    vocab_size=11,
    num_layers=1,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    rope=rope_jax.Rope(4, rope_jax.Standard()),
    learn_frequencies=False,
    position_embedding=None,
    position_bias=None,
    tie_embeddings=True,
    qk_norm=False,
    window=None,
    norm_epsilon=1e-6,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    logit_scale=None,
    logit_cap=None,
    output_cap=None,
    post_norms=False,
    norm_unit_offset=False,
    embedding_scale=None,
    remat=False,
    implementation=None,
    attention_fn=None,
    ring_axis=None,
)
MODEL = rope_jax.Decoder(**MODEL_FIELDS)
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
MODEL_PARAMS = nn.unbox(MODEL.init(jax.random.key(0), TOKENS))
WRITING = {
    "*model": MODEL,
    "*params": MODEL_PARAMS,
    "*prompt": TOKENS,
    "mask": jnp.ones((2, 3), int),
    "max_new_tokens": 2,
}
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
DRAFTING = {"*target": MODEL, "*target_params": MODEL_PARAMS, "*draft": MODEL, "*draft_params": MODEL_PARAMS}

# function, arguments (with a star: by position), and words by which a message may name them
CALLS = {
    "Rope": (
        rope_jax.Rope,
        dict(head_dim=8, schedule=rope_jax.Standard(), rotary_dim=4, start=2, layout="half", blocks=1),
        "",
    ),
    "rope": (
        ROPE,
        {
            "*q": KV,
            "*k": KV,
            "*positions": jnp.arange(3),
            "context_length": None,
            "token_axis": -3,
            "implementation": None,
        },
        "T",
    ),
    "rope.inverse": (
        ROPE.inverse,
        {
            "*q": KV,
            "*k": KV,
            "*positions": jnp.arange(3),
            "context_length": None,
            "token_axis": -3,
            "implementation": None,
        },
        "T",
    ),
    "rope.rotate": (
        ROPE.rotate,
        dict(x=KV, rotation=ROPE.rotation(jnp.arange(3)), token_axis=-3, implementation=None),
        "",
    ),
    "rope.frequencies": (ROPE.frequencies, dict(context_length=3), ""),
    "rotation": (rope_jax.rotation, dict(positions=jnp.arange(3), frequencies=ROPE.frequencies()), ""),
    "rotate": (rope_jax.rotate, dict(x=KV, rotation=ROPE.rotation(jnp.arange(3)), layout="half", start=0), ""),
    "Frequencies": (rope_jax.Frequencies, dict(inv_freq=np.ones(4), attention_factor=1.0), ""),
    "positions_from_mask": (
        rope_jax.positions_from_mask,
        dict(mask=np.ones((2, 3), int), segment_ids=np.ones((2, 3), int)),
        "",
    ),
    "positions_from_segments": (rope_jax.positions_from_segments, dict(segment_ids=np.ones((2, 3), int)), ""),
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
        "positions",
    ),
    "packed_grid_positions": (
        rope_jax.core.packed_grid_positions,
        {"*sizes": [(1, 2), (2, 1)], "origin": 0, "num_prefix_tokens": 0},
        "positions",
    ),
    "multimodal_positions": (
        rope_jax.core.multimodal_positions,
        {"*segments": [2, (1, 4, 6)], "offset": 0},
        "positions",
    ),
    "patch_centers": (rope_jax.core.patch_centers, {"*height": 2, "*width": 3}, "sizes"),
    "convert_layout": (
        rope_jax.convert_layout,
        {"*weight": np.ones((16, 8), np.float32), "*to": "half", "head_dim": 8},
        "",
    ),
    "attend": (
        rope_jax.attend,
        {**ATTEND, "dropout_rate": 0.1, "dropout_rng": jax.random.key(0), "implementation": None},
        "",
    ),
    "attention_weights": (
        rope_jax.attention.attention_weights,
        {name: value for name, value in ATTEND.items() if name != "*v"},
        "",
    ),
    "init_cache": (
        rope_jax.init_cache,
        dict(**SIZES, num_layers=2, dtype=jnp.float32, eviction=None, num_sink_tokens=0, rotated=True),
        "",
    ),
    "write": (CACHE.write, dict(key=KV, value=KV, mask=jnp.ones((2, 3), bool), max_window=2), ""),
    "truncate": (CACHE.write(KV, KV).truncate, dict(num_tokens=jnp.array([1, 2])), ""),
    "select_rows": (CACHE.select_rows, dict(rows=jnp.array([1, 0])), ""),
    "grow": (CACHE.grow, dict(capacity=9), ""),
    "quantize": (rope_jax.attention.quantize, dict(x=KV, dtype=jnp.int8), ""),
    "make_plan": (
        rope_jax.attention.make_plan,
        {
            "*ropes": ROPE,
            "*shape": (2, 3),
            "positions": None,
            "sequence_index": None,
            "mask": None,
            "segment_ids": None,
            "causal": True,
            "window": None,
            "position_bias": None,
            "num_heads": 4,
            "cache": CACHE,
            "context_length": None,
        },
        "rope",
    ),
    "RotaryAttention": (lambda **given: rope_jax.RotaryAttention(**given).init(jax.random.key(0), X), FIELDS, ""),
    "layer": (
        lambda *positional, **given: LAYER.apply(PARAMS, *positional, **given),
        {
            "*x": X,
            "*positions": jnp.arange(3),
            "sequence_index": None,
            "mask": jnp.ones((2, 3), int),
            "segment_ids": None,
            "cache": CACHE,
            "context_length": None,
            "plan": None,
            "deterministic": True,
        },
        "",
    ),
    "Decoder": (lambda **given: rope_jax.Decoder(**given).init(jax.random.key(0), TOKENS), MODEL_FIELDS, ""),
    "decoder": (
        lambda *positional, **given: MODEL.apply(MODEL_PARAMS, *positional, **given),
        {
            "*tokens": TOKENS,
            "*positions": jnp.arange(3),
            "sequence_index": None,
            "mask": jnp.ones((2, 3), int),
            "segment_ids": None,
            "cache": MODEL.init_cache(batch=2, capacity=8),
            "context_length": None,
        },
        "",
    ),
    "generate": (
        rope_jax.generate,
        {
            **WRITING,
            "temperature": 0.5,
            "rng": jax.random.key(0),
            "top_k": 3,
            "top_p": 0.9,
            "stop_token": 5,
            "num_samples": 1,
            "cache": None,
            "logits_fn": None,
            "on_token": None,
            "positions": None,
        },
        "prompts tokens vocab_size",
    ),
    "beam_search": (
        rope_jax.generation.beam_search,
        {**WRITING, "beams": 2, "length_penalty": 0.0, "stop_token": 5, "cache": None},
        "prompts tokens vocab_size",
    ),
    "speculative_decode": (
        rope_jax.generation.speculative_decode,
        {
            **DRAFTING,
            "*prompt": TOKENS,
            "mask": jnp.ones((2, 3), int),
            "max_new_tokens": 2,
            "draft_tokens": 2,
            "stop_token": 5,
        },
        "prompts tokens vocab_size model params",
    ),
    "sample": (
        rope_jax.generation.sample,
        {"*rng": jax.random.key(0), "*logits": jnp.zeros((2, 5)), "temperature": 0.5, "top_k": 3, "top_p": 0.5},
        "",
    ),
    "pad_prompts": (rope_jax.generation.pad_prompts, dict(prompts=[[1, 2], [3]], buckets=4), "prompt"),
}


def frequencies_of(make, /, **fields):
    return make(**fields)(8)


for name, (schedule, fields) in SCHEDULES.items():
    fields = {field.name: fields.get(field.name, field.default) for field in dataclasses.fields(schedule)}
    CALLS[name] = (functools.partial(frequencies_of, schedule), fields, "rotary_dim inv_freq phase")

HUGE = {2**31, 2**64, 10**400}  # these sizes would take terabytes, or years
SIZE = {
    "capacity",
    "batch",
    "num_kv_heads",
    "head_dim",
    "num_layers",
    "max_new_tokens",
    "beams",
    "num_samples",
    "vocab_size",
    "width",
    "mlp_dim",
    "num_heads",
    "draft_tokens",
    "*sizes",
    "*size",
    "num_prefix_tokens",
    "*height",
    "*width",
    "buckets",
    "rotary_dim",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named(name):
    function, arguments, words = CALLS[name]
    found = []
    for argument, wrong in itertools.product(arguments, fuzz.WRONG):
        value = fuzz.WRONG[wrong]()
        if argument in SIZE and isinstance(value, int) and value in HUGE:
            continue
        try:
            fuzz.outcome(function, {**arguments, argument: value}, set(words.split()))
        except AssertionError as error:
            found.append(f"{name}({argument}={wrong}): {error}")
    assert not found, "\n".join(["", *found])


# ------------------------------------------------------------------------------------------------------ configs


CONFIGS = json.loads((pathlib.Path(__file__).parent / "golden/configs_in_the_wild.json").read_text())


@given(st.data())
def test_a_changed_config_is_read_or_refused(data):
    configs = list(walk(CONFIGS))
    config = data.draw(st.sampled_from(configs), "config")
    paths = list(keys_of(config))
    path = data.draw(st.sampled_from(paths), "key")
    how = data.draw(st.sampled_from(["replaced", "removed", "misspelled"]), "how")
    config = json.loads(json.dumps(config))
    place = config
    for key in path[:-1]:
        place = place[key]
    value = place.pop(path[-1])
    if how == "replaced":
        place[path[-1]] = data.draw(
            st.one_of(
                st.none(),
                st.booleans(),
                st.integers(-5, 10**6),
                st.floats(),
                st.text(max_size=3),
                st.lists(st.integers(-2, 9), max_size=3),
                st.just({}),
                st.just({"a": 1}),
            ),
            "value",
        )
    elif how == "misspelled":
        place[path[-1] + "x"] = value
    got = fuzz.outcome(rope_jax.from_hf_config, {"config": config}, {"config", path[-1], *map(str, path)})
    fuzz.report("from_hf_config", got)


def walk(node):
    """The dictionaries with a model type inside the committed table."""
    if isinstance(node, dict):
        if "model_type" in node:
            yield node
            return
        node = list(node.values())
    if isinstance(node, list):
        yield from itertools.chain.from_iterable(map(walk, node))


def keys_of(node, path=()):
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*path, key))
