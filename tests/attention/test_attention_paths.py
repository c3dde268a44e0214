"""The choice of a program, and the splash kernel behind attention, in interpret mode on a CPU."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import check, in_blocks, problem, solve, solved_by_library
from fast import first

import rope_jax
from rope_jax.attention import Facts, paths, primitive, quantize
from rope_jax.attention.kernels import splash
from rope_jax.attention.primitive import attention, attention_with_log


@pytest.fixture
def calls(monkeypatch):
    """On this CPU attention takes the kernel whenever a TPU would. Returns the list of calls of the kernel."""
    calls = []

    def interpreted(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            return function(*arguments, **options, interpret=True)

        return call

    def choose(q, k, layer, facts, implementation, *, platform, divided):
        if implementation in ("xla", "blocks"):
            return implementation
        reason = paths.why_not_splash(q, k, layer, facts, platform="tpu", divided=divided)
        return "splash" if reason is None else "blocks"

    kernel = {name: getattr(splash, name) for name in ("forward", "backward")}
    for name, function in kernel.items():
        monkeypatch.setattr(splash, name, interpreted(function))
    monkeypatch.setattr(primitive, "choose_path", choose)
    # Eager calls have a program of their own for each choice.
    primitive._jitted.clear_cache()
    yield calls
    primitive._jitted.clear_cache()


SERVED = [
    ("causal", dict(T=128)),
    ("causal window cap segments padding", dict(T=200)),
    ("causal window", dict(T=300, N=2, K=1)),
    ("window cap", dict(T=130, N=4, K=4)),
    ("causal scale segments", dict(T=256, N=6, K=2)),
    ("padding", dict(T=300)),
    ("", dict(T=200)),
    ("causal", dict(T=1)),
    ("causal cap", dict(T=300, H=96)),
]


@pytest.mark.parametrize(("features", "sizes"), first(3, SERVED))
@pytest.mark.parametrize("dtype", first(1, [jnp.float32, jnp.bfloat16]), ids=lambda d: d.__name__)
def test_the_kernel_beside_float64(calls, features, sizes, dtype):
    """Outputs, sums of exponentials, and gradients along both."""
    sizes = dict(N=4, K=2, H=32, B=2) | sizes
    if dtype == jnp.float32:
        check(problem(features, **sizes))
    else:
        p = problem(features, dtype=dtype, **sizes)
        out, log_total, gradients = solved_by_library(p)
        want_out, want_log, want = solved_by_library(p, implementation="blocks")
        # Keys are multiplied by the scale and rounded once more than in blocks: half an ulp of each term of a score.
        scale = p.q.shape[-1] ** -0.5 if p.facts.scale is None else p.facts.scale
        q, k = (np.abs(np.asarray(x, np.float32)) for x in (p.q, np.repeat(p.k, p.q.shape[1] // p.k.shape[1], 1)))
        assert np.abs(log_total - want_log).max() <= 2.0**-8 * scale * np.einsum("bnth,bnsh->bnts", q, k).max()
        assert np.abs(np.asarray(out - want_out, np.float32)).max() <= 4 * 2.0**-8 * 4
        for name, gradient in gradients.items():
            error = np.abs(np.asarray(gradient - want[name], np.float32)).max()
            assert error <= 2e-2 * float(abs(want[name]).max()), name
    assert calls == ["forward", "backward"]


def test_bfloat16_near_one(calls):
    """The contract: within 2e-2 for outputs near 1."""
    p = problem("causal segments", T=200, H=32, dtype=jnp.bfloat16)
    p = dataclasses.replace(p, v=(jnp.tanh(p.v)).astype(jnp.bfloat16))
    want, _, _ = solve(p)
    assert np.abs(np.asarray(jax.jit(attention)(p.q, p.k, p.v, p.facts), np.float64) - want).max() <= 2e-2
    assert calls == ["forward"]


def test_without_a_gradient_the_sums_are_not_written(calls, monkeypatch):
    written = []
    forward = splash.forward

    def watched(*arguments, save_log_total, **options):
        written.append(save_log_total)
        return forward(*arguments, save_log_total=save_log_total, **options)

    monkeypatch.setattr(splash, "forward", watched)
    p = problem("causal", T=128)
    out = jax.jit(lambda q: attention(q, p.k, p.v, p.facts))(p.q)
    jax.jit(jax.grad(lambda q: attention(q, p.k, p.v, p.facts).sum()))(p.q)
    with_log, _ = jax.jit(lambda q: attention_with_log(q, p.k, p.v, p.facts))(p.q)
    assert written == [False, True, True]
    np.testing.assert_array_equal(out, with_log)


def test_other_derivatives_take_blocks(calls):
    """The kernel has no forward mode, and its backward pass is not differentiated: blocks do both, to the same."""
    p = problem("causal cap", T=130, B=1, N=2, K=1)
    loss = lambda q, implementation=None: jnp.sum(
        jnp.sin(attention(q, p.k, p.v, p.facts, implementation=implementation)) * p.dout
    )
    by_blocks = functools.partial(loss, implementation="blocks")
    along = lambda f: lambda q: jax.jvp(f, (q,), (p.dout,))[1]
    for transform in (along, lambda f: along(jax.grad(f)), lambda f: jax.grad(along(f))):
        got, want = jax.jit(transform(loss))(p.q), jax.jit(transform(by_blocks))(p.q)
        assert np.abs(got - want).max() <= 4e-5 * np.abs(want).max()
    assert "forward" in calls


@pytest.mark.parametrize("axes", [(0, None), pytest.param((None, 0), marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("features", first(1, ["causal segments", "window"]))
def test_vmap_calls_the_kernel_once(calls, features, axes):
    """A new axis joins the rows of the batch."""
    p = problem(features, T=130, N=2, K=1)
    more = lambda x, axis: x if axis is None else jnp.stack([x, 2 * x])
    arrays = [more(x, axis) for x, axis in zip((p.q, p.k), axes, strict=True)]

    def function(q, k, implementation=None):
        out, pull_back = jax.vjp(lambda q, k: attention(q, k, p.v, p.facts, implementation=implementation), q, k)
        return out, *pull_back(p.dout)

    got = jax.jit(jax.vmap(function, axes))(*arrays)
    assert calls == ["forward", "backward"]
    want = jax.jit(jax.vmap(functools.partial(function, implementation="blocks"), axes))(*arrays)
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


ROPE = rope_jax.Rope(32, rope_jax.Standard(base=1000.0))
CALLS = {
    "causal": {},
    "padding": dict(mask=lambda B, T: jnp.arange(T)[None] < jnp.array([[T], [T - 30]])),
    "segments": dict(segment_ids=lambda B, T: jnp.broadcast_to(jnp.arange(T) // 50, (B, T))),
}


@pytest.mark.parametrize("call", first(2, CALLS))
@pytest.mark.parametrize("fields", first(1, [dict(logit_cap=5.0), dict(window=40), dict(causal=False)]), ids=str)
def test_a_layer(calls, fields, call):
    """Outputs and gradients of parameters, as by blocks."""
    layer = rope_jax.RotaryAttention(num_heads=4, num_kv_heads=2, head_dim=32, rope=ROPE, **fields)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 150, 24)), jnp.float32)
    how = {name: make(2, 150) for name, make in CALLS[call].items()}
    params = nn.unbox(layer.init(jax.random.key(0), x[:, :2]))
    real = how.get("mask", jnp.ones((2, 150), bool))[..., None]

    def loss(params, x, layer):
        y = layer.apply(params, x, **how)
        return jnp.sum(jnp.where(real, jnp.sin(y), 0)), jnp.where(real, y, 0)

    def run(layer):
        return jax.jit(jax.value_and_grad(functools.partial(loss, layer=layer), (0, 1), has_aux=True))(params, x)

    calls.clear()  # of init
    got = run(layer)
    assert calls == ([] if fields == dict(window=40) and call == "padding" else ["forward", "backward"])
    want = run(layer.clone(implementation="blocks"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max())


def test_a_decoder(calls):
    """Two layers in a scan with remat or without: loss and gradients as by blocks."""
    sizes = dict(
        vocab_size=11, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=16, rope=ROPE
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 140)), jnp.int32)
    model = rope_jax.Decoder(**sizes)
    params = nn.unbox(model.init(jax.random.key(0), tokens[:, :2]))
    loss = lambda params, model: jnp.mean(jax.nn.logsumexp(model.apply(params, tokens), -1) ** 2)
    calls.clear()
    got = jax.jit(jax.value_and_grad(functools.partial(loss, model=model)))(params)
    assert {"forward", "backward"} == set(calls)
    calls.clear()
    want = jax.jit(jax.value_and_grad(functools.partial(loss, model=model.clone(implementation="blocks"))))(params)
    assert not calls
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(1e-2, np.abs(b).max())


# --------------------------------------------------------------------------------------------------- the choice


def arrays(T=1024, S=None, dtype=jnp.bfloat16, H=128):
    shape = lambda heads, length: jax.ShapeDtypeStruct((1, heads, length, H), dtype)
    return shape(4, T), shape(2, T if S is None else S)


def why_not(facts, *, layer=None, platform="tpu", divided=False, k=None, **sizes):
    q, keys = arrays(**sizes)
    return paths.why_not_splash(q, keys if k is None else k, layer, facts, platform=platform, divided=divided)


one = jnp.zeros((1, 1), jnp.int32)
REASONS = [
    (Facts(), dict(platform="cpu"), "the kernel is for a TPU, not for a CPU"),
    (Facts(), dict(platform="gpu"), "the kernel is for a TPU, not for a GPU"),
    (Facts(), dict(divided=True), "call attention inside shard_map"),
    (Facts(), dict(layer=jnp.int32(0)), "outside a cache"),
    (Facts(), dict(k=quantize(jnp.ones((1, 2, 4, 8)))), "outside a cache"),
    (Facts(query_index=one), {}, "in the order of their sequence indices"),
    (Facts(window=jnp.int32(3)), {}, "the kernel has no traced window"),
    (Facts(mask=jnp.ones((1, 1, 1, 1), bool)), {}, "the kernel has no attention mask"),
    (Facts(bias=jnp.ones((1, 1, 1, 1))), {}, "the kernel has no bias"),
    (problem("alibi").facts, {}, "the kernel has no position bias"),
    (problem("dropout").facts, {}, "the kernel has no dropout"),
    (Facts(), dict(S=2048), "queries and keys must be the same tokens"),
    (Facts(), dict(dtype=jnp.float16), "bfloat16 or both float32"),
    (Facts(), dict(H=1024), "head_dim must be at most 256"),
]


@pytest.mark.parametrize(("facts", "change", "reason"), REASONS, ids=[each[2] for each in REASONS])
def test_says_why_the_kernel_cannot_serve(facts, change, reason):
    assert reason in why_not(facts, **change)


def test_the_kernel_serves_the_rest():
    for features in ("", "causal", "causal window", "window cap", "segments padding causal", "scale"):
        assert why_not(problem(features).facts) is None
    assert why_not(Facts(), H=256) is None and why_not(Facts(), H=256, dtype=jnp.float32) is None


def choose(facts=Facts(), implementation=None, platform="tpu", **sizes):  # noqa: B008
    return paths.choose_path(*arrays(**sizes), None, facts, implementation, platform=platform, divided=False)


def test_chooses_the_kernel_for_long_sequences_on_a_tpu():
    assert choose(T=513) == "splash" and choose(T=512) == "blocks" and choose(T=1) == "blocks"
    assert choose(T=100, implementation="splash") == "splash"
    assert choose(implementation="blocks") == "blocks" and choose(implementation="xla") == "xla"
    for platform in ("cpu", "gpu"):
        assert choose(platform=platform) == "blocks"
    assert choose(Facts(window=jnp.int32(1))) == "blocks"


@pytest.mark.parametrize("facts", [Facts(), Facts(causal=True, window=jnp.int32(3))], ids=["", "window"])
def test_a_kernel_by_name_is_an_error_where_it_cannot_serve(facts):
    """When the program is lowered: it may be traced for another platform."""
    q = jnp.ones((1, 4, 16, 8))
    call = jax.jit(lambda q: attention(q, q, q, facts, implementation="splash"))
    traced = call.trace(q)
    with pytest.raises(ValueError, match="got 'splash': the kernel is for a TPU, not for a CPU"):
        traced.lower()
    with pytest.raises(ValueError, match="got 'splash': the kernel is for a TPU, not for a CPU"):
        attention(q, q, q, facts, implementation="splash")
    if facts.traced_window is not None:
        with pytest.raises(ValueError, match="got 'splash': the kernel has no traced window"):
            traced.lower(lowering_platforms=("tpu",))


def test_by_name_through_attend_and_a_layer():
    q = jnp.ones((1, 16, 2, 32))
    with pytest.raises(ValueError, match="got 'splash': the kernel is for a TPU, not for a CPU"):
        rope_jax.attend(q, q, q, implementation="splash")
    layer = rope_jax.RotaryAttention(num_heads=2, head_dim=32, rope=ROPE, implementation="splash")
    with pytest.raises(ValueError, match="got 'splash': the kernel is for a TPU, not for a CPU"):
        jax.jit(layer.init_with_output)(jax.random.key(0), jnp.ones((1, 4, 8)))


def test_one_traced_program_serves_all_platforms():
    """The text for a TPU calls the kernel, the text for a CPU has a loop."""
    q, k = (jax.ShapeDtypeStruct((1, n, 1024, 128), jnp.bfloat16) for n in (4, 2))
    exported = jax.export.export(
        jax.jit(lambda q, k, v: attention(q, k, v, Facts(causal=True))), platforms=["cpu", "tpu", "cuda"]
    )(q, k, k)
    text = exported.mlir_module()
    assert "tpu_custom_call" in text and "stablehlo.while" in text


def test_blocks_are_about_equal(monkeypatch):
    in_blocks(monkeypatch, 256, 256, 1024)
    sizes = lambda T, S: tuple(paths.block_sizes(*arrays(T, S), None, "cpu"))[:2]
    assert (
        sizes(256, 256) == (256, 256)
        and sizes(512, 512) == (256, 256)
        and sizes(257, 600) == (129, 300)
        and sizes(4096, 4096) == (256, 256)
    )
    assert sizes(1, 4096) == (1, 1024) and sizes(128, 4096) == (128, 512) and sizes(3, 5) == (3, 5)
    assert tuple(paths.block_sizes(*arrays(300, 500), "xla", "cpu"))[:2] == (300, 500)
    for T in range(1, 3000, 17):
        queries, keys = sizes(T, T)
        count = -(-T // queries)
        assert queries <= 256 and count * queries - T < count and keys <= 1024
