"""Random calls of the public surface: the result is right beside float64, or the error is our own.

``make fuzz`` runs many more of them, other ones each time.
"""

import inspect
import itertools
import json
import math
import pathlib

import fuzz
import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import given
from hypothesis import strategies as st

import rope_jax

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # one unit in the last place, relative
DTYPES = st.sampled_from(sorted(EPS))
INT32 = st.integers(-(2**31), 2**31 - 1)


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
    words = {*map(str, path), *inspect.signature(rope_jax.from_hf_config).parameters}
    got = fuzz.outcome(rope_jax.from_hf_config, {"config": config}, words)
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
