import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from fast import first

import rope_jax

B, T, D, H = 2, 10, 16, 8
ROPES = {
    "none": None,
    "standard": rope_jax.Rope(H, rope_jax.Standard(base=100.0)),
    "yarn": rope_jax.Rope(H, rope_jax.Yarn(factor=4.0, original_length=16, base=100.0)),
    "partial": rope_jax.Rope(H, rope_jax.Standard(base=100.0), rotary_dim=4),
    "interleaved": rope_jax.Rope(H, rope_jax.Standard(base=100.0), layout="interleaved"),
}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
# Outputs are of size 1 and pass through sums of D = 16, H = 8, T = 10 and N*H = 32 float32 terms and a softmax
# whose scores, of size up to 8, carry their absolute rounding into the weights: a few hundred roundings at worst.
TOLERANCE = 256 * oracles.EPS32


def build(rope="standard", heads="gqa", **change):
    num_heads, num_kv_heads = HEADS[heads]
    fields = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=H)
    fields |= dict(rope=ROPES[rope] if isinstance(rope, str) else rope) | change
    return rope_jax.RotaryAttention(**fields)


def inputs(seed=0, length=T):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, D)), jnp.float32)


def init(module, x=None, seed=0):
    """Parameters of size 1 also where initialisers give zeros and ones, so that each of them matters."""
    params = nn.unbox(module.init(jax.random.key(seed), inputs() if x is None else x))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + 0.2 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def new_cache(module, capacity=T + 2):
    return rope_jax.init_cache(
        batch=B, capacity=capacity, num_kv_heads=module.num_kv_heads or module.num_heads, head_dim=H
    )


def oracle(module, params, x, positions, allowed):
    """The module in float64 and numpy: allowed is bool [B, T, T]."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    x = np.asarray(x, np.float64)

    def project(name):
        return np.einsum("btd,dnh->btnh", x, p[name]["kernel"]) + p[name].get("bias", 0)

    q, k, v = (project(name) for name in ("query", "key", "value"))
    if module.qk_norm:
        q, k = (
            a / np.sqrt((a**2).mean(-1, keepdims=True) + module.qk_norm_epsilon) * p[name]["scale"]
            for a, name in ((q, "query_norm"), (k, "key_norm"))
        )
    if module.rope is not None:
        frequencies = module.rope.frequencies()
        cos, sin = (
            frequencies.attention_factor * part.reshape(*positions.shape, -1)
            for part in oracles.cos_sin(positions, frequencies.inv_freq)
        )
        q, k = (oracles.rotate_features(a, cos, sin, module.rope.layout) for a in (q, k))
    y = np.stack(
        [
            oracles.attention(q[b], k[b], v[b], allowed[b], scale=module.logit_scale, logit_cap=module.logit_cap)
            for b in range(len(x))
        ]
    )
    return np.einsum("btnh,nhd->btd", y, p["out"]["kernel"]) + p["out"].get("bias", 0)


def allowed_pairs(length=T, causal=True, window=None):
    t, s = np.mgrid[:length, :length]
    seen = (s <= t) if causal else np.ones((length, length), bool)
    return np.broadcast_to(seen & (abs(t - s) < (window or length)), (B, length, length))


ORDINARY = np.broadcast_to(np.arange(T), (B, T))


class TestAgainstTheOracle:
    @pytest.mark.parametrize("heads", HEADS)
    @pytest.mark.parametrize("rope", first(2, ROPES))
    def test_every_rope_and_grouping(self, rope, heads):
        module, x = build(rope, heads), inputs()
        params = init(module)
        want = oracle(module, params, x, ORDINARY, allowed_pairs())
        np.testing.assert_allclose(module.apply(params, x), want, atol=TOLERANCE)

    @pytest.mark.parametrize(
        "change",
        [
            dict(causal=False),
            dict(window=3),
            dict(causal=False, window=3),
            dict(logit_cap=2.0),
            dict(logit_cap=2.0, window=4),
            dict(logit_cap=2.0, causal=False),
            dict(logit_scale=0.5),
            dict(logit_scale=0.5, logit_cap=1.5),
            dict(qk_norm=True),
            dict(qk_norm=True, qk_norm_epsilon=0.5),
            dict(use_bias=True),
            dict(rope=rope_jax.Rope(H, rope_jax.Standard(), rotary_dim=6, layout="interleaved")),
        ],
        ids=str,
    )
    def test_every_option(self, change):
        module, x = build(**change), inputs()
        params = init(module)
        want = oracle(
            module,
            params,
            x,
            ORDINARY,
            allowed_pairs(causal=change.get("causal", True), window=change.get("window")),
        )
        np.testing.assert_allclose(module.apply(params, x), want, atol=TOLERANCE)

    def test_positions_are_obeyed(self):
        module, x = build(), inputs()
        params = init(module)
        positions = np.random.default_rng(3).integers(0, 10_000, (B, T))
        want = oracle(module, params, x, positions, allowed_pairs())
        np.testing.assert_allclose(module.apply(params, x, jnp.asarray(positions)), want, atol=TOLERANCE)
        plan = rope_jax.attention.make_plan(module.rope, (B, T), positions=positions)
        np.testing.assert_array_equal(
            module.apply(params, x, plan=plan), module.apply(params, x, jnp.asarray(positions))
        )

    def test_rows_without_gaps_need_flags_and_no_arrays(self):
        """A kernel takes causality and a window as flags; sequence indices are given only if they differ from 0, 1, 2."""
        plan = rope_jax.attention.make_plan(None, (B, T), window=4)
        assert not jax.tree.leaves(plan.facts()) and plan.facts().causal and plan.facts().window == 4
        padded = rope_jax.attention.make_plan(None, (B, T), mask=np.ones((B, T), int))
        assert len(jax.tree.leaves(padded.facts())) == 1  # segments
        padded = rope_jax.attention.make_plan(None, (B, T), mask=np.ones((B, T), int), window=4)
        assert len(jax.tree.leaves(padded.facts())) == 3  # a window counts real tokens


# ---------------------------------------------------------------------------- full = prefill + decode = chunks


def feed(step, cache, x, mask, cuts):
    """x in pieces that end at the cuts; outputs side by side."""
    outs = []
    for start, stop in itertools.pairwise([0, *cuts]):
        y, cache = step(cache, x[:, start:stop], mask[:, start:stop])
        outs.append(y)
    return jnp.concatenate(outs, axis=1), cache


@pytest.mark.parametrize("window", first(1, [3, None]))
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("heads", first(1, ["gqa", "mha", "mqa"]))
@pytest.mark.parametrize("rope", ROPES)
def test_however_it_is_cut_the_cache_gives_the_full_forward(rope, heads, ragged, window):
    module, x = build(rope, heads, window=window), inputs()
    params = init(module)
    mask = np.ones((B, T), bool)
    if ragged:  # row 0 padded on the left, row 1 on the right and with a hole
        mask[0, :3] = False
        mask[1, [4, 8, 9]] = False
    real = jnp.asarray(mask)

    @jax.jit
    def step(cache, x, mask):
        return module.apply(params, x, mask=mask if ragged else None, cache=cache)

    full = module.apply(params, x, mask=real if ragged else None)
    for cuts in ([T], [7, *range(8, T + 1)], range(1, T + 1), [3, 6, 9, T], [7, T]):
        got, cache = feed(step, new_cache(module), x, real, cuts)
        assert cache.num_tokens.tolist() == mask.sum(1).tolist()
        np.testing.assert_allclose(got[mask], full[mask], atol=TOLERANCE)


def test_64_decode_steps_compile_once():
    module = build(window=5)
    params = init(module)
    traces = []

    def step(params, x, cache):
        traces.append(1)
        return module.apply(params, x, cache=cache)

    step = jax.jit(step, donate_argnames="cache")
    x = inputs(length=70)
    cache = new_cache(module, 70)
    _, cache = module.apply(params, x[:, :6], cache=cache)
    outs = []
    for t in range(6, 70):
        y, cache = step(params, x[:, t : t + 1], cache)
        outs.append(y)
    assert len(traces) == 1 and step._cache_size() == 1
    full = module.apply(params, x)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), full[:, 6:], atol=TOLERANCE)


@pytest.mark.parametrize("rope", ROPES)
def test_packed_is_separate(rope):
    module, x = build(rope), inputs()
    params = init(module)
    ids = np.array([[1] * 4 + [2] * 6, [5] * 4 + [3] * 3 + [5] * 3])  # an id that comes back is a new segment
    got = module.apply(params, x, segment_ids=ids)
    for b, cuts in enumerate(([0, 4, T], [0, 4, 7, T])):
        for part in itertools.starmap(slice, itertools.pairwise(cuts)):
            alone = module.apply(params, x[b : b + 1, part])
            np.testing.assert_allclose(got[b, part], alone[0], atol=TOLERANCE)


def test_packed_with_padding_and_a_window():
    module, x = build(window=2), inputs()
    params = init(module)
    ids = jnp.array([[1] * 4 + [2] * 6] * B)
    mask = jnp.array([[1, 1, 1, 0, 0, 1, 1, 1, 1, 0]] * B)
    got = module.apply(params, x, segment_ids=ids, mask=mask)
    for part in (slice(0, 3), slice(5, 9)):
        np.testing.assert_allclose(got[:, part], module.apply(params, x[:, part]), atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rope", first(2, ROPES))
def test_padded_on_the_left_or_right_is_unpadded(rope, window):
    module, x = build(rope, window=window), inputs()
    params = init(module)
    alone = module.apply(params, x[:, :6])
    junk = jnp.full((B, 4, D), jnp.nan)  # not even this may be seen
    for padded, part in (
        (jnp.concatenate([junk, x[:, :6]], 1), slice(4, T)),
        (jnp.concatenate([x[:, :6], junk], 1), slice(0, 6)),
    ):
        mask = np.zeros((B, T), bool)
        mask[:, part] = True
        np.testing.assert_allclose(module.apply(params, padded, mask=mask)[:, part], alone, atol=TOLERANCE)


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "none"])
@pytest.mark.parametrize("shift", first(1, [2**31 - 1 - T, 10_000_000, -10_000_000]))
def test_a_common_shift_of_positions_changes_nothing(rope, shift):
    module, x = build(rope), inputs()
    params = init(module)
    positions = jnp.arange(T)[None]
    want = module.apply(params, x, positions)
    np.testing.assert_allclose(module.apply(params, x, positions + shift), want, atol=2 * TOLERANCE)
    got, _ = feed(
        lambda cache, x, where: module.apply(params, x, where, cache=cache),
        new_cache(module),
        x,
        jnp.broadcast_to(positions + shift, (B, T)),
        [4, T],
    )
    np.testing.assert_allclose(got, want, atol=2 * TOLERANCE)


# --------------------------------------------------------------------------------------------- what else it promises


def test_an_overflowing_row_is_nan_and_the_others_are_not():
    module, x = build(), inputs()
    params = init(module)
    mask = np.array([[True] * 4, [True, False, False, False]])
    cache = new_cache(module, capacity=4)
    step = jax.jit(lambda x, mask, cache: module.apply(params, x, mask=mask, cache=cache))
    y, cache = step(x[:, :4], mask, cache)
    assert np.all(np.isfinite(y))
    for expected in ([1, 0], [1, 0], [1, 0], [1, 1]):  # row 1 has room for three more
        y, cache = step(x[:, 4:5], np.ones((B, 1), bool), cache)
        assert np.isnan(y).all(axis=(1, 2)).tolist() == expected
        assert np.isfinite(y).all(axis=(1, 2)).tolist() == [not e for e in expected]


def test_only_learned_frequencies_are_parameters():
    names = lambda module: set(nn.unbox(module.init(jax.random.key(0), inputs()))["params"])
    assert names(build("none")) == names(build("yarn")) == {"query", "key", "value", "out"}
    learned = build("yarn", learn_frequencies=True)
    assert names(learned) == {"query", "key", "value", "out", "inv_freq"}
    assert set(learned.init(jax.random.key(0), inputs())) == {"params"}
    params, x = init(build("yarn")), inputs()
    start = {
        "params": params["params"] | {"inv_freq": jnp.asarray(learned.rope.frequencies().inv_freq, jnp.float32)}
    }
    np.testing.assert_allclose(learned.apply(start, x), build("yarn").apply(params, x), atol=TOLERANCE)
    grads = jax.grad(lambda p: jnp.sum(learned.apply(p, x) ** 2))(start)
    h = 2.0**-8
    for i in (0, 3):
        moved = [start["params"] | {"inv_freq": start["params"]["inv_freq"].at[i].add(d)} for d in (h, -h)]
        up, down = (np.sum(np.asarray(learned.apply({"params": p}, x), np.float64) ** 2) for p in moved)
        assert abs(grads["params"]["inv_freq"][i] - (up - down) / (2 * h)) < 1e-2 * (1 + abs(up - down) / (2 * h))


def test_every_kernel_has_logical_names():
    boxed = build(use_bias=True, qk_norm=True).init(jax.random.key(0), inputs())
    spec = nn.get_partition_spec(boxed)["params"]
    P = jax.sharding.PartitionSpec
    assert spec["query"]["kernel"] == P("embed", "heads", "head_dim")
    assert spec["key"]["kernel"] == spec["value"]["kernel"] == P("embed", "kv_heads", "head_dim")
    assert spec["out"]["kernel"] == P("heads", "head_dim", "embed")
    assert spec["key"]["bias"] == P("kv_heads", "head_dim") and spec["out"]["bias"] == P("embed")
    assert spec["query_norm"]["scale"] == P("head_dim")


def test_dropout():
    module, x = build(dropout_rate=0.5), inputs()
    params = init(module)
    quiet = module.apply(params, x)
    np.testing.assert_allclose(quiet, build().apply(params, x), atol=TOLERANCE)
    draw = lambda seed: module.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.abs(draw(0) - draw(1)).max() > 0.1
    # Dropout keeps the mean of what attention reads: the average of many draws closes in as 1/sqrt(n).
    mean = jnp.mean(jax.vmap(lambda key: module.apply(params, x, deterministic=False, rngs={"dropout": key}))(
        jax.random.split(jax.random.key(0), 2000)), axis=0)  # fmt: skip
    spread = jnp.std(jnp.stack([draw(seed) for seed in range(20)]), axis=0)
    assert np.all(np.abs(mean - quiet) < 6 * spread / np.sqrt(2000) + 1e-3)


@pytest.mark.parametrize("compute", [jnp.bfloat16, jnp.float16])
def test_low_precision_computation(compute):
    module, x = build(dtype=compute, qk_norm=True), inputs()
    params = init(module)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    y = module.apply(params, x)
    assert y.dtype == compute
    want = build(qk_norm=True).apply(params, x)
    unit = float(jnp.finfo(compute).eps)
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=16 * unit * float(jnp.abs(want).max()))
    cached, cache = module.apply(params, x, cache=new_cache(module))
    assert cached.dtype == compute and cache.key.dtype == jnp.float32


def test_implementation_is_passed_through():
    """An unknown name is an error, and cuDNN serves no cap and no dropout."""
    x = inputs()
    with pytest.raises(ValueError, match="implementation must be None or one of .* got 'nonsense'"):
        build(implementation="nonsense").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="implementation must not be 'cudnn': cuDNN has no logit_cap"):
        build(implementation="cudnn", logit_cap=1.0).init(jax.random.key(0), x)


def test_no_tokens():
    module, x = build(), inputs()
    params = init(module)
    y, cache = module.apply(params, x[:, :0], cache=new_cache(module))
    assert y.shape == (B, 0, D) and cache.num_tokens.tolist() == [0, 0]
    assert module.apply(params, x[:, :0]).shape == (B, 0, D)


def test_x64_changes_nothing():
    module, x = build(), inputs()
    params = init(module)
    want = module.apply(params, x)
    with jax.enable_x64(True):
        y, cache = module.apply(params, x, cache=new_cache(module))
        assert y.dtype == jnp.float32 and cache.num_tokens.dtype == jnp.int32
        np.testing.assert_allclose(y, want, atol=TOLERANCE)
        np.testing.assert_allclose(module.apply(params, x, mask=np.ones((B, T), bool)), want, atol=TOLERANCE)


def test_under_shard_map():
    module, x = build(), inputs()
    params = init(module)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    fn = jax.shard_map(lambda x: module.apply(params, x), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(fn)(x), module.apply(params, x), atol=TOLERANCE)


def test_no_leaks_and_remat_and_scan_over_calls():
    module, x = build(), inputs()
    params = init(module)
    with jax.checking_leaks():
        fn = jax.jit(jax.grad(lambda p: jnp.sum(jax.checkpoint(lambda p: module.apply(p, x))(p) ** 2)))
        grads = fn(params)
    want = jax.grad(lambda p: jnp.sum(module.apply(p, x) ** 2))(params)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    one = lambda cache, x: module.apply(params, x[:, None], cache=cache)[::-1]
    _, ys = jax.lax.scan(one, new_cache(module), x.swapaxes(0, 1))
    np.testing.assert_allclose(ys[:, :, 0].swapaxes(0, 1), module.apply(params, x), atol=TOLERANCE)


def test_padding_gets_no_gradient_and_gives_none():
    module, x = build(), inputs()
    params = init(module)
    mask = jnp.ones((B, T), bool).at[:, :3].set(False)
    grad = jax.grad(lambda x: jnp.sum(jnp.where(mask[..., None], module.apply(params, x, mask=mask), 0) ** 2))(x)
    assert not np.any(grad[:, :3]) and np.all(np.isfinite(grad)) and np.any(grad[:, 3:])


X = jnp.ones((B, T, D))


def call(module, *args, **kwargs):
    return lambda: module.init(jax.random.key(0), X, *args, **kwargs)


@pytest.mark.parametrize(
    ("attempt", "error", "says"),
    [
        (call(build(num_heads=4, num_kv_heads=3)), ValueError, "num_kv_heads must divide num_heads=4, got 3"),
        (call(build(head_dim=16)), ValueError, "rope.head_dim must be head_dim=16, got 8"),
        (call(build("none", learn_frequencies=True)), ValueError, "rope must be given with learn_frequencies"),
        (call(build(window=0)), ValueError, "window must be at least 1 token, got 0"),
        (call(build(logit_cap=0.0)), ValueError, "logit_cap must be positive and finite, got 0.0"),
        (call(build(dropout_rate=1.0)), ValueError, r"dropout_rate must be in \[0, 1\), got 1.0"),
        (lambda: build().init(jax.random.key(0), X[0]), ValueError, r"x must have shape \[B, T, D\], got \(10, 16\)"),
        (lambda: build().init(jax.random.key(0), X.astype(int)), TypeError, "x must be floating, got dtype int32"),
        (call(build(), jnp.arange(T - 1)), ValueError, r"positions must have shape \[T\] with T=10, got \(9,\)"),
        (
            call(build(), jnp.zeros((3, T), int)),
            ValueError,
            r"positions must have shape \[B, T\] with B={1, 2}, T=10, got \(3, 10\)",
        ),
        (
            lambda: build().init(jax.random.key(0), X[:, :1], jnp.array([3, 5])),
            ValueError,
            r"positions must have shape \[T\] or \[B, T\] with B=2, T=1, got \(2,\): pass positions\[:, None\]",
        ),
        (call(build("none"), jnp.arange(T)), ValueError, "positions must be left out without rope: nothing reads them"),
        (call(build(learn_frequencies=True), context_length=3), ValueError, "context_length must be left out with learned"),
        (call(build(window=(3, 3))), ValueError, r"window must have shape \[\], got \(2,\)"),
        (call(build(logit_scale=float("nan"))), ValueError, "logit_scale must be finite, got nan"),
        (
            lambda: rope_jax.attention.make_plan(ROPES["standard"], (B, T), window=(2, 0)),
            ValueError,
            "window must be at least 1 token, got 0",
        ),
        (
            lambda: rope_jax.attention.make_plan((ROPES["standard"], None), (B, T), window=(2, 3, 4)),
            ValueError,
            "window must have an entry for each of 2 layers, got 3",
        ),
        (
            lambda: rope_jax.attention.make_plan((ROPES["standard"], None), (B, T)).of_layer(2),
            IndexError,
            r"layer must be in \[0, 2\), got 2",
        ),
        (
            lambda: rope_jax.attention.make_plan(rope_jax.Standard(), (B, T)),
            TypeError,
            "rope must be a Rope, None, or a tuple of these, got Standard",
        ),
        (lambda: rope_jax.attention.make_plan(None, (B, T, D)), ValueError, r"shape must be \(B, T\), got \(2, 10, 16\)"),
        (lambda: rope_jax.attention.make_plan(None, (B, T), causal="no"), TypeError, "causal must be True or False"),
        (
            lambda: rope_jax.attention.make_plan(None, (B, T), position_bias=rope_jax.attention.ALiBi()),
            ValueError,
            "num_heads must be given with a position_bias",
        ),
        (
            lambda: rope_jax.attention.make_plan(None, (3, T), cache=new_cache(build())),
            ValueError,
            r"cache.num_tokens must have shape \[B\] with B=3, got \(2,\)",
        ),
        (
            lambda: rope_jax.attention.make_plan(None, (B, T)).end(new_cache(build())),
            ValueError,
            "plan must be made with cache= of CachePolicy",
        ),
        (call(build("none"), context_length=3), ValueError, "context_length must be left out without a rope that depends"),
        (call(build(), mask=jnp.zeros((B, T))), TypeError, "mask must be bool or integer, got dtype float32"),
        (call(build(), mask=jnp.ones((B, T - 1), bool)), ValueError, "mask must have shape .* with B=2, T=10"),
        (call(build(), segment_ids=jnp.ones((1, T), int)), ValueError, "segment_ids must have shape .* with B=2, T=10"),
        (call(build(), segment_ids=X[..., 0]), TypeError, "segment_ids must be integer"),
        (
            call(build(), segment_ids=jnp.ones((B, T), int), cache=new_cache(build())),
            ValueError,
            "segment_ids must be left out with a cache",
        ),
        (call(build(causal=False), cache=new_cache(build())), ValueError, "causal must be True with a cache"),
        (call(build(heads="mha"), cache=new_cache(build())), ValueError, r"cache.key must .* with B=2, K=4, H=8, got"),
        (call(build(), cache=new_cache(build(), 5)), ValueError, "T=10 tokens were given, capacity S=5"),
        (
            call(build(rope=rope_jax.Rope(H, rope_jax.Sections(sections=(2, 2), order="strided")))),
            ValueError,
            r"positions must be \[B, T, A=2\] for a rope of 2 axes, got None",
        ),
        (call(build(num_heads=0)), ValueError, "num_heads must be at least 1, got 0"),
        (call(build(num_kv_heads=0)), ValueError, "num_kv_heads must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_refusals(attempt, error, says):
    with pytest.raises(error, match=says):
        attempt()


class TestAttend:
    def test_a_query_that_reads_nothing_is_finite(self):
        q = jnp.ones((1, 2, 1, 4))
        mask = jnp.array([[[[False, False], [True, False]]]])
        for cap in (None, 3.0):
            assert np.all(np.isfinite(rope_jax.attend(q, q, q, mask=mask, logit_cap=cap)))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                dict(k=jnp.ones((1, 3, 3, 4)), v=jnp.ones((1, 3, 3, 4))),
                "q must have a multiple of K=3 heads, got N=4",
            ),
            (dict(k=jnp.ones((2, 3, 2, 4))), "k must have shape .* with B=1, H=4, got"),
            (dict(v=jnp.ones((1, 2, 2, 4))), "v must have shape .* S=3, K=2"),
            (dict(dropout_rate=0.5), "dropout_rng must be given with dropout_rate 0.5"),
            (dict(window=0), "window must be at least 1 token, got 0"),
            (dict(logit_cap=-1.0), "logit_cap must be positive and finite, got -1.0"),
            (dict(implementation="flash", logit_cap=1.0), "implementation must be None or one of .* got 'flash'"),
            (dict(mask=jnp.ones((1, 1, 3, 2), bool)), "mask must have shape"),
        ],
    )
    def test_refusals(self, change, says):
        arguments = dict(q=jnp.ones((1, 3, 4, 4)), k=jnp.ones((1, 3, 2, 4)), v=jnp.ones((1, 3, 2, 4))) | change
        with pytest.raises(ValueError, match=says):
            rope_jax.attend(**arguments)


def test_a_window_may_be_planned_and_be_traced():
    """For layers of unlike windows: the plan's window is what the field would be, with and without a cache."""
    module, x = build(), inputs()
    params = module.init(jax.random.key(0), x)

    @jax.jit
    def traced(window, cache):
        plan = rope_jax.attention.make_plan(module.rope, (B, T), window=window, cache=cache)
        if cache is None:
            return module.apply(params, x, plan=plan)
        y, cache = module.apply(params, x, plan=plan, cache=plan.begin(cache))
        return y, plan.end(cache)

    for window in (1, 3, T, 2**31 - 1):
        field = build(window=window)
        for cache in (None, rope_jax.init_cache(batch=B, capacity=T, num_kv_heads=module.num_kv_heads, head_dim=H)):
            got, want = traced(window, cache), field.apply(params, x, cache=cache)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
    assert traced._cache_size() == 2
    for module, window, says in (
        (build(window=3), 2, "plan must be for window=3, got a plan for window=2"),
        (build(), 0, "window must be at least 1 token, got 0"),
        (build(), jnp.ones(2, int), r"window must have shape \[\], got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=says):
            module.apply(params, x, plan=rope_jax.attention.make_plan(module.rope, (B, T), window=window))


def test_a_step_that_has_not_ended_is_refused():
    """Its counters do not count its tokens, so the next step would overwrite them."""
    module, x = build(), inputs()
    params, cache = init(module), new_cache(module)
    plan = rope_jax.attention.make_plan(module.rope, (B, T), cache=cache)
    _, begun = module.apply(params, x, plan=plan, cache=plan.begin(cache))
    kv = jnp.ones((B, 1, module.num_kv_heads, H))
    for call in (
        lambda: plan.begin(begun),
        lambda: rope_jax.attention.make_plan(module.rope, (B, 1), cache=begun),
        lambda: module.apply(params, x[:, :1], cache=begun),
        lambda: begun.write(kv, kv),
        lambda: begun.select_rows(jnp.arange(B)),
        lambda: begun.truncate(1),
        lambda: begun.grow(20),
    ):
        with pytest.raises(
            ValueError, match=r"cache must be what plan.end\(cache\) returned, got a cache whose step"
        ):
            call()
    ended = plan.end(begun)
    assert not ended.in_step and ended.num_tokens.tolist() == [T] * B
    for other in (cache, ended):
        with pytest.raises(
            ValueError, match=r"cache must be what plan.begin\(cache\) returned, got a cache that no"
        ):
            plan.end(other)


def test_a_plan_serves_one_step():
    """A plan made before the loop would write every token to the same slot."""
    module, x = build(), inputs()
    params, empty = init(module), new_cache(module)

    def step(x, plan, cache):
        y, cache = module.apply(params, x, plan=plan, cache=plan.begin(cache))
        return y, plan.end(cache)

    plan = rope_jax.attention.make_plan(module.rope, (B, 1), cache=empty)
    _, once = step(x[:, :1], plan, empty)
    says = r"plan must be made for each step, .* got a plan for rows of \[0, 0\] tokens, and rows of \[1, 1\]"
    with pytest.raises(ValueError, match=says):
        step(x[:, 1:2], plan, once)
    # A second plan of the same cache, for a step that the first one began.
    other = rope_jax.attention.make_plan(module.rope, (B, 1), cache=once)
    with pytest.raises(ValueError, match="plan must be made for each step"):
        other.end(plan.begin(empty))
    # Inside jit only the running program knows the counters: the row is NaN, and stays so. Row 0 alone is reused.
    half = dataclasses.replace(empty, num_tokens=jnp.array([1, 0]))
    reused, after = jax.jit(step)(x[:, 1:2], plan, half)
    np.testing.assert_array_equal(np.isnan(reused).all((1, 2)), [True, False])
    assert after.overflowed.tolist() == [True, False]
    fresh = jax.jit(lambda x, cache: module.apply(params, x, cache=cache))(x[:, 1:2], after)[0]
    np.testing.assert_array_equal(np.isnan(fresh).all((1, 2)), [True, False])


def test_a_plan_for_another_layer_or_call_is_refused():
    module, x = build(), inputs()
    params = init(module)
    make_plan, rope = rope_jax.attention.make_plan, module.rope
    plan, cache = make_plan(rope, (B, T)), new_cache(module)
    for change, how, says in (
        ({}, dict(plan=3), "plan must be a Plan, as from rope_jax.attention.make_plan, got int"),
        ({}, dict(plan=plan, mask=np.ones((B, T), bool)), "mask must be left out with a plan, got ndarray"),
        ({}, dict(plan=plan, positions=jnp.arange(T)), "positions must be left out with a plan"),
        ({}, dict(plan=make_plan(rope, (B, 4))), "plan must be for B=2, T=10, as x has, got a plan for B=1, T=4"),
        (
            {},
            dict(plan=make_plan(rope, (3, T), mask=np.ones((3, T), bool))),
            "plan must be for B=2, T=10, as x has",
        ),
        *(
            (
                {},
                dict(plan=make_plan(rope, (3, T), **rows)),
                "plan must be for B=2, T=10, .* got a plan for B=3, T=10",
            )
            for rows in (
                dict(attention_mask=np.ones((3, 1, T, T), bool)),
                dict(prefix_length=jnp.array([1, 2, 3])),
                dict(positions=jnp.zeros((3, T), int)),
            )
        ),
        (
            {},
            dict(plan=make_plan((rope, ROPES["yarn"]), (B, T))),
            r"plan must be for one layer.*pass plan.of_layer",
        ),
        (
            {},
            dict(plan=make_plan(rope, (B, T), window=(3, None))),
            r"plan must be for one layer.*pass plan.of_layer",
        ),
        ({}, dict(plan=plan, cache=cache), "plan must be made with cache= of CachePolicy.* got a plan for None"),
        (
            {},
            dict(plan=make_plan(rope, (B, T), cache=cache)),
            "cache must be given with a plan that was made with one",
        ),
        ({}, dict(plan=make_plan(ROPES["yarn"], (B, T))), "plan must be for the rope Rope.* got a plan for Rope"),
        (
            {},
            dict(plan=make_plan(rope, (B, T), cache=cache), cache=cache.grow(20)),
            r"plan must be made with cache= of CachePolicy\(capacity=20, .*capacity=12",
        ),
        (
            {},
            dict(plan=make_plan(rope, (B, T), cache=cache), cache=cache),
            r"cache must be what plan.begin\(cache\) returned, got a cache that no step has begun",
        ),
        ({}, dict(plan=plan, cache=3), "cache must be a KVCache, as from init_cache, got int"),
        (dict(causal=False), dict(plan=plan), "plan must be for causal=False, got a plan for causal=True"),
        (
            dict(position_bias=rope_jax.attention.ALiBi()),
            dict(plan=plan),
            "plan must be made with the layer's position_bias, got none: the layer has one",
        ),
        ({}, dict(plan=make_plan(rope, (B, T), window=3)), "plan must be for window=None, got a plan for window=3"),
        ({}, dict(plan=make_plan(rope, (B, T), learn_frequencies=True)), "plan must have a rotation for a layer"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            module.clone(**change).apply(params, x, **how)
    alike = make_plan((rope, rope), (B, T), window=(3, None))
    for layer, window in enumerate((3, None)):  # layers whose ropes are alike, and whose windows differ
        windowed = module.clone(window=window)
        np.testing.assert_array_equal(
            windowed.apply(params, x, plan=alike.of_layer(layer)), windowed.apply(params, x)
        )
    learned = build(learn_frequencies=True)
    with_frequencies = init(learned)
    for learns in (False, True):  # a layer that learns its frequencies rotates by them, whatever the plan says
        got = learned.apply(with_frequencies, x, plan=make_plan(rope, (B, T), learn_frequencies=learns))
        np.testing.assert_array_equal(got, learned.apply(with_frequencies, x))


def test_a_rope_that_is_none_and_one_that_needs_a_length_are_refused_by_name():
    x = jnp.ones((1, 3, 8))
    dynamic = rope_jax.Rope(4, rope_jax.DynamicNTK(factor=2.0, original_length=8))
    for rope, error, message in [
        (rope_jax.Standard(), TypeError, "rope must be a Rope or None, got Standard"),
        (
            dynamic,
            ValueError,
            "DynamicNTK needs a context_length: set the field context_length=, or pass context_length= with the call",
        ),
    ]:
        attention = rope_jax.RotaryAttention(num_heads=2, head_dim=4, rope=rope)
        with pytest.raises(error, match=message):
            attention.init(jax.random.key(0), x)
    attention = rope_jax.RotaryAttention(num_heads=2, head_dim=4, rope=dynamic)
    params = attention.init(jax.random.key(0), x, context_length=16)
    fixed = rope_jax.Rope(4, rope_jax.DynamicNTK(factor=2.0, original_length=8, context_length=16))
    np.testing.assert_array_equal(
        attention.apply(params, x, context_length=16), attention.clone(rope=fixed).apply(params, x)
    )


@pytest.mark.parametrize("window", [0, -1, 2.5, True, 2**31])
def test_a_window_that_is_none_is_refused_on_every_path(window):
    rope = rope_jax.Rope(4, rope_jax.Standard())
    x, mask = jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool)
    attention = rope_jax.RotaryAttention(num_heads=2, head_dim=4, rope=rope)
    params = attention.init(jax.random.key(0), x)
    cache = rope_jax.init_cache(batch=1, capacity=4, num_kv_heads=2, head_dim=4)
    for options in (dict(), dict(mask=mask), dict(cache=cache)):
        for call in (
            lambda options: rope_jax.attention.make_plan(rope, (1, 3), window=window, **options),
            lambda options: attention.clone(window=window).apply(params, x, **options),
        ):
            with pytest.raises((ValueError, TypeError), match="window must"):
                call(options)


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_float16_is_attended_under_jit(promotion):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 5, 2, 8)), jnp.float16) for _ in range(3))
    with jax.numpy_dtype_promotion(promotion):
        got = jax.jit(lambda *qkv: rope_jax.attend(*qkv, causal=True))(q, k, v)
    a, b, c = (np.asarray(part, np.float64) for part in (q, k, v))
    scores = np.einsum("btnh,bsnh->bnts", a, b) / np.sqrt(8)
    scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), c)
    # Weights rounded to float16 (2^-11) times values up to 4, their sum, and one rounding of the result.
    np.testing.assert_allclose(got, want, atol=4 * 3 * 2.0**-11)
    assert got.dtype == jnp.float16


def test_an_initialiser_with_names_of_its_own_is_taken():
    """As every Flax example passes it; the layer names each kernel by its own axes."""
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("a", "b", "c"))
    x = jnp.ones((1, 3, 16))
    layer = rope_jax.RotaryAttention(num_heads=2, head_dim=8, rope=None)
    want, got = layer.init(jax.random.key(0), x), layer.clone(kernel_init=init).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(got), nn.unbox(want))
    assert nn.get_partition_spec(got) == nn.get_partition_spec(want)
    sizes = dict(vocab_size=9, num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=8, rope=None)
    boxed = dict(
        kernel_init=init, embedding_init=nn.with_logical_partitioning(nn.initializers.normal(), ("a", "b"))
    )
    tokens = jnp.array([[1, 2]])
    got, want = (rope_jax.Decoder(**sizes, **fields).init(jax.random.key(0), tokens) for fields in (boxed, {}))
    assert nn.get_partition_spec(got) == nn.get_partition_spec(want)


def test_the_field_says_whether_dropout_is_on_and_the_call_overrides_it():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 16)), jnp.float32)
    fields = dict(num_heads=2, head_dim=8, rope=None, dropout_rate=0.5)
    plain = rope_jax.RotaryAttention(**fields)
    params, rngs = plain.init(jax.random.key(0), x), dict(dropout=jax.random.key(1))
    off = plain.apply(params, x)
    on = plain.apply(params, x, rngs=rngs, deterministic=False)
    assert not np.allclose(on, off, atol=1e-3)
    dropping = plain.clone(deterministic=False)
    np.testing.assert_array_equal(dropping.apply(params, x, deterministic=True), off)
    # Within nn.remat and nn.jit, whose calls could not trace the flag.
    again = nn.remat(rope_jax.RotaryAttention)(**fields, deterministic=False).apply(params, x, rngs=rngs)
    np.testing.assert_allclose(again, on, atol=1e-6)
    jitted = nn.jit(rope_jax.RotaryAttention)(**fields, deterministic=False)  # flax gives it keys of its own
    assert not np.allclose(jitted.apply(params, x, rngs=rngs), off, atol=1e-3)
    with pytest.raises(ValueError, match="rngs must have a key named 'dropout'"):
        dropping.apply(params, x)
