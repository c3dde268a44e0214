import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import ROPE, SLOW, TOLERANCE, V, build, init, oracle, tokens
from fast import first

import rope_jax


def named(change):
    """The same name for a case in every process: a function is shown by its name, not by its address."""
    return ", ".join(f"{field}={getattr(value, '__name__', value)}" for field, value in change.items()) or "plain"


GEMMA = dict(
    activation=nn.gelu,
    post_norms=True,
    norm_unit_offset=True,
    embedding_scale=4.0,
    logit_scale=0.5,
    logit_cap=2.0,
    output_cap=3.0,
    qk_norm=True,
)
UNLIKE = [
    dict(rope=(ROPE, SLOW)),
    dict(rope=(SLOW, None)),
    dict(rope=(None, ROPE)),
    dict(window=(3, None)),
    dict(rope=(ROPE, None, SLOW, ROPE), window=(2, None, None, 4), num_layers=4),
    dict(rope=(SLOW, ROPE), window=(3, None), **GEMMA),
]


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(tie_embeddings=False),
        dict(qk_norm=True),
        dict(window=3),
        dict(norm_epsilon=0.3),
        dict(activation=nn.gelu),
        dict(qkv_bias=True),
        dict(qkv_bias=True, out_bias=True, mlp_bias=True),
        dict(logit_scale=0.7, logit_cap=1.0),
        dict(output_cap=1.0, tie_embeddings=False),
        dict(post_norms=True),
        dict(norm_unit_offset=True, qk_norm=True),
        dict(embedding_scale=3.0),
        *UNLIKE,
    ],
    ids=named,
)
def test_is_the_formula(change):
    model = build(**change)
    params = init(model)
    logits = model.apply(params, tokens())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, oracle(model, params, tokens()), atol=TOLERANCE)


def test_remat_changes_nothing_but_memory():
    params = init(build())

    def loss(model):
        return lambda p: jnp.sum(model.apply(p, tokens()) ** 2)

    plain, remat = (jax.value_and_grad(loss(build(remat=flag)))(params) for flag in (False, True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    saved = [
        sum(
            leaf.size
            for leaf in jax.tree.leaves(jax.vjp(loss(build(remat=flag)), params)[1])
            if hasattr(leaf, "size")
        )
        for flag in (False, True)
    ]
    assert saved[1] < saved[0] / 2


@pytest.mark.parametrize("num_layers", [1, 12])
def test_cos_and_sin_are_evaluated_once_for_all_layers(num_layers):
    model = build(num_layers=num_layers, rope=rope_jax.Rope(8, lambda r: rope_jax.Frequencies(jnp.ones(r // 2))))
    params = model.init(jax.random.key(0), tokens())
    jaxpr = str(jax.make_jaxpr(model.apply)(params, tokens()))
    assert len(re.findall(r"= cos ", jaxpr)) == 1
    scanned = jaxpr[jaxpr.index("scan[") :]
    assert "= cos " not in scanned and "= sin " not in scanned


def test_unlike_layers_are_one_program_and_alike_ones_are_no_different():
    params = init(build(num_layers=6))

    def programs(**change):
        """The text of the layer's program, and how often it appears."""
        text = str(jax.make_jaxpr(build(num_layers=6, **change).apply)(params, tokens()))
        return text, text.count("= logistic ")

    plain = programs()
    assert plain[1] == 1
    assert programs(rope=(ROPE,) * 6, window=(None,) * 6) == plain
    text, count = programs(rope=(ROPE, SLOW, None) * 2, window=(2, None, 3) * 2)
    assert count == 1 and "f32[3,1,9,4]" in text  # C = 3 distinct rotations


def test_layers_without_rope_are_exactly_those_of_a_model_without():
    params = init(build())
    model = lambda *ropes: build(rope=ropes).apply(params, tokens())
    np.testing.assert_array_equal(model(None, None), build(rope=None).apply(params, tokens()))
    assert np.abs(model(ROPE, None) - model(None, ROPE)).max() > 0.01
    assert np.abs(model(ROPE, None) - model(ROPE, ROPE)).max() > 0.01


@pytest.mark.parametrize(
    "change",
    [{}, dict(remat=True), dict(rope=None), UNLIKE[-1], *first(0, [dict(window=3), *UNLIKE[:-1]])],
    ids=named,
)
def test_cached_is_full(change):
    model = build(**change)
    params = init(model)
    ids = tokens()
    full = model.apply(params, ids)
    cache = model.init_cache(batch=2, capacity=9)
    layers = model.num_layers
    assert cache.key.shape == (layers, 2, 2, 9, 8) and cache.capacity == 9
    assert cache.num_tokens.shape == (2,)  # one counter a row, for all layers
    step = jax.jit(lambda ids, cache: model.apply(params, ids, cache=cache), donate_argnames="cache")
    outs = []
    for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9)):
        logits, cache = step(ids[:, start:stop], cache)
        outs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), full, atol=TOLERANCE)
    assert not cache.overflowed.any() and cache.overflowed.shape == (2,)
    assert step._cache_size() == 3  # one program for each length: 4, 3 and 1
    logits, cache = step(ids[:, :1], cache)
    assert np.isnan(logits).all() and cache.overflowed.all()


@pytest.mark.parametrize("change", [{}, UNLIKE[-1]], ids=["alike", "unlike"])
def test_packed_and_padded(change):
    model = build(**change)
    params = init(model)
    ids = tokens()
    packed = model.apply(params, ids, segment_ids=jnp.array([[1] * 5 + [2] * 4] * 2))
    for part in (slice(0, 5), slice(5, 9)):
        np.testing.assert_allclose(packed[:, part], model.apply(params, ids[:, part]), atol=TOLERANCE)
    padded = model.apply(params, ids, mask=jnp.array([[0] * 3 + [1] * 6] * 2))
    np.testing.assert_allclose(padded[:, 3:], model.apply(params, ids[:, 3:]), atol=TOLERANCE)


def test_positions_are_handed_down():
    model = build()
    params = init(model)
    where = jnp.arange(9)[None]
    np.testing.assert_allclose(
        model.apply(params, tokens(), where + 10_000_000), model.apply(params, tokens()), atol=2 * TOLERANCE
    )
    assert np.abs(model.apply(params, tokens(), 2 * where) - model.apply(params, tokens())).max() > 0.01


def test_low_precision_and_strict_promotion():
    model = build(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, qk_norm=True)
    unlike = build(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, qkv_bias=True, mlp_bias=True, **UNLIKE[-1])
    rough = unlike.apply(unlike.init(jax.random.key(0), tokens()), tokens())
    assert rough.dtype == jnp.float32 and np.isfinite(rough).all()
    params = model.init(jax.random.key(0), tokens())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits, cache = model.apply(params, tokens(), cache=model.init_cache(batch=2, capacity=9))
    assert logits.dtype == jnp.float32 and cache.key.dtype == jnp.bfloat16
    full = build(qk_norm=True).apply(jax.tree.map(lambda p: p.astype(jnp.float32), params), tokens())
    np.testing.assert_allclose(logits, full, atol=32 * 2.0**-8 * float(jnp.abs(full).max()))
    grads = jax.grad(lambda p: jnp.sum(model.apply(p, tokens()) ** 2))(params)
    assert all(leaf.dtype == jnp.bfloat16 and np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_every_parameter_has_logical_names():
    model = build(tie_embeddings=False, qk_norm=True, qkv_bias=True, mlp_bias=True, post_norms=True)
    spec = nn.get_partition_spec(model.init(jax.random.key(0), tokens()))["params"]
    P = jax.sharding.PartitionSpec
    assert spec["embed"]["embedding"] == P("vocab", "embed")
    assert spec["unembed_kernel"]["kernel"] == P("embed", "vocab")
    assert spec["final_norm"]["scale"] == P("embed")
    layers = spec["layers"]
    assert layers["self_attention"]["query"]["kernel"] == P("layers", "embed", "heads", "head_dim")
    assert layers["gate"]["kernel"] == layers["up"]["kernel"] == P("layers", "embed", "mlp")
    assert layers["down"]["kernel"] == P("layers", "mlp", "embed")
    assert layers["mlp_norm"]["scale"] == layers["post_mlp_norm"]["scale"] == P("layers", "embed")
    assert layers["gate"]["bias"] == P("layers", "mlp") and layers["down"]["bias"] == P("layers", "embed")
    assert layers["self_attention"]["value"]["bias"] == P("layers", "kv_heads", "head_dim")
    assert "bias" not in layers["self_attention"]["out"]


def test_refusals():
    model = build()
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, T\], got \(3,\)"):
        model.init(jax.random.key(0), jnp.zeros(3, int))
    with pytest.raises(TypeError, match="tokens must be integer, got dtype float32"):
        model.init(jax.random.key(0), jnp.zeros((1, 3)))
    params = init(model)
    for outside in (V, -1):
        got = np.isnan(model.apply(params, jnp.array([[1, outside], [1, 2]])))
        assert got.any(axis=(1, 2)).tolist() == [True, False]
    with pytest.raises(ValueError, match="cache must be one of all layers, from model.init_cache"):
        cache = rope_jax.init_cache(batch=2, capacity=9, num_kv_heads=2, head_dim=8)
        model.apply(params, tokens(), cache=cache)
    with pytest.raises(ValueError, match="tokens must fit in int32"):
        model.apply(params, np.full((1, 2), 2**32 + 1))
    axial = build(rope=rope_jax.Rope(8, rope_jax.Sections(sections=(2, 2), order="strided")))
    with pytest.raises(ValueError, match=r"positions must be \[B, T, A=2\] for a rope of 2 axes, got None"):
        axial.init(jax.random.key(0), tokens())
    for change, says in (
        (dict(rope=(ROPE,)), "rope must have an entry for each of num_layers=2, got 1"),
        (dict(window=(1, 2, 3)), "window must have an entry for each of num_layers=2, got 3"),
        (dict(window=(3, 0)), "window must be at least 1 token, got 0"),
        (dict(rope=(None, rope_jax.Rope(8, ROPE.schedule, rotary_dim=4), ROPE), num_layers=3), "by schedule alone"),
        (dict(output_cap=0.0), "output_cap must be positive and finite, got 0.0"),
    ):
        with pytest.raises(ValueError, match=says):
            build(**change).init(jax.random.key(0), tokens())
    for rope in (None, (None, None)):
        with pytest.raises(
            ValueError, match="context_length must be left out without a rope that depends on it, got 9"
        ):
            build(rope=rope).apply(params, tokens(), context_length=9)
    with pytest.raises(ValueError, match="context_length must be left out: Standard does not depend on it"):
        build(rope=(SLOW, None)).apply(params, tokens(), context_length=9)


def test_length_reaches_the_schedule():
    schedule = rope_jax.DynamicNTK(factor=4.0, original_length=4, base=100.0)
    model = build(rope=rope_jax.Rope(8, schedule))
    params = init(build())
    got = model.apply(params, tokens(), context_length=jnp.array([4, 9]))
    for row, length in enumerate((4, 9)):
        want = model.apply(params, tokens()[row : row + 1], context_length=length)
        np.testing.assert_allclose(got[row], want[0], atol=TOLERANCE)
    # Beside a schedule that does not depend on it, and a layer without: the length is for the one that does.
    mixed = build(num_layers=3, rope=(SLOW, rope_jax.Rope(8, schedule), None))
    fixed = build(
        num_layers=3, rope=(SLOW, rope_jax.Rope(8, dataclasses.replace(schedule, context_length=9)), None)
    )
    params = init(mixed.clone(rope=None))
    got = mixed.apply(params, tokens(), context_length=9)
    np.testing.assert_array_equal(got, fixed.apply(params, tokens()))
    assert np.abs(got - mixed.apply(params, tokens(), context_length=4)).max() > 0.01


def test_logits_are_summed_in_float32():
    for tie in (True, False):
        model = build(dtype=jnp.bfloat16, tie_embeddings=tie)
        logits = model.apply(model.init(jax.random.key(0), tokens()), tokens())
        assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))


def test_learned_frequencies_of_each_layer():
    """At first the rope's own; then each layer rotates by its parameter, also from a cache."""
    rope = rope_jax.Rope(8, rope_jax.Standard(base=100.0))
    fixed, learned = build(rope=rope), build(rope=rope, learn_frequencies=True)
    text = tokens()
    start = nn.unbox(learned.init(jax.random.key(0), text))["params"]["layers"]["self_attention"]["inv_freq"]
    np.testing.assert_array_equal(start, np.float32(np.tile(rope.frequencies().inv_freq, (fixed.num_layers, 1))))
    params = init(learned)
    params["params"]["layers"]["self_attention"]["inv_freq"] = inv_freq = start
    same = jax.tree.map(lambda x: x, params)
    del same["params"]["layers"]["self_attention"]["inv_freq"]
    # The float path: angles below 9 radians, off by 9 * 2^-23 each, through two layers.
    np.testing.assert_allclose(learned.apply(params, text), fixed.apply(same, text), atol=2e-5)

    moved = jax.tree.map(lambda x: x, params)
    scale = np.float32([[0.5], [2.0]])
    moved["params"]["layers"]["self_attention"]["inv_freq"] = inv_freq * scale
    want = learned.apply(moved, text)
    assert np.abs(want - learned.apply(params, text)).max() > 1e-3
    swapped = jax.tree.map(lambda x: x, moved)
    swapped["params"]["layers"]["self_attention"]["inv_freq"] = inv_freq * scale[::-1]
    assert np.abs(want - learned.apply(swapped, text)).max() > 1e-3  # each layer has its own
    cache = learned.init_cache(batch=text.shape[0], capacity=text.shape[1])
    first, cache = learned.apply(moved, text[:, :4], cache=cache)
    rest = [learned.apply(moved, text[:, i : i + 1], cache=cache) for i in range(4, 5)]
    np.testing.assert_allclose(first, want[:, :4], atol=2e-5)
    np.testing.assert_allclose(rest[0][0], want[:, 4:5], atol=2e-5)

    loss = jax.jit(lambda f: jnp.sum(learned.apply(with_frequencies(moved, f), text) ** 2))
    with_frequencies = lambda params, f: {
        "params": params["params"]
        | {
            "layers": params["params"]["layers"]
            | {"self_attention": params["params"]["layers"]["self_attention"] | {"inv_freq": f}}
        }
    }
    at = inv_freq * scale
    gradient, direction = jax.grad(loss)(at), jnp.ones_like(at)
    h = 2.0**-7
    slope = (loss(at + h * direction) - loss(at - h * direction)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=0.02)


@pytest.mark.parametrize("rope", [None, (rope_jax.Rope(8, rope_jax.Standard()), None)], ids=["none", "unlike"])
def test_learned_frequencies_want_one_rope(rope):
    with pytest.raises(ValueError, match="rope must be one rope for all layers with learn_frequencies"):
        init(build(rope=rope, learn_frequencies=True))


def test_a_gradient_through_a_cached_call_keeps_no_copy_of_the_layers():
    model = build(num_layers=8)
    params, prompt = init(model), tokens(1, 6)
    cache = model.init_cache(batch=1, capacity=6)
    cached = lambda params: jnp.sum(model.apply(params, prompt, cache=cache)[0] ** 2)
    plain = lambda params: jnp.sum(model.apply(params, prompt) ** 2)
    compiled = [jax.jit(jax.grad(loss)).lower(params).compile() for loss in (cached, plain)]
    for got, want in zip(*(jax.tree.leaves(each(params)) for each in compiled), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))
    bytes_of_layers = sum(leaf.nbytes for leaf in jax.tree.leaves(params["params"]["layers"]))
    with_cache, without = (each.memory_analysis().temp_size_in_bytes for each in compiled)
    assert with_cache < without + bytes_of_layers / 2
