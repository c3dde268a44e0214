"""Plans, layers and decoders whose ropes have position axes, heads or phases, against attention in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from fast import first

import rope_jax
from rope_jax.attention import make_plan

B, T, D, H, N, K = 2, 6, 16, 8, 4, 2
TOLERANCE = 256 * oracles.EPS32  # as in test_layer
AXIAL = rope_jax.Axial(sizes=(4, 4), schedule=rope_jax.Standard(base=100.0))
SECTIONS = rope_jax.Sections(sections=(2, 1, 1), schedule=rope_jax.Standard(base=100.0), order="strided")


def dense(rotary_dim):
    """A matrix for each of the key heads, and phases."""
    rng = np.random.default_rng(5)
    return rope_jax.Frequencies(
        rng.uniform(-1, 1, (K, 2, rotary_dim // 2)), 1.25, rng.uniform(-1, 1, (K, rotary_dim // 2))
    )


ROPES = {
    "axial": rope_jax.Rope(H, AXIAL, layout="interleaved"),
    "heads": rope_jax.Rope(H, dense),
    "sections": rope_jax.Rope(H, SECTIONS),
    "start and blocks": rope_jax.Rope(H, rope_jax.Axial(sizes=(2, 2)), rotary_dim=4, start=3, blocks=2),
    "affine": rope_jax.Rope(H, rope_jax.Affine(schedule=AXIAL, scale=(0.5, 2.0), offset=-0.25)),
}
SHAPES = ["[T, A]", "[1, T, A]", "[B, T, A]"]


def module_of(rope, **change):
    return rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=rope, **change)


def inputs(length=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, D)), jnp.float32)


def positions_of(rope, shape="[B, T, A]", length=T):
    at = np.random.default_rng(1).integers(0, 30, (B, length, rope.num_axes)).astype(np.int32)
    return {"[T, A]": at[0], "[1, T, A]": at[:1], "[B, T, A]": at}[shape]


def init(module, *arguments):
    params = nn.unbox(module.init(jax.random.key(0), *arguments))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.2 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def rotated(rope, x, positions, inv_freq=None):
    """x ``[B, T, N, H]`` in float64, a row and a pair at a time."""
    frequencies = rope.frequencies()
    inv_freq = np.asarray(frequencies.inv_freq if inv_freq is None else inv_freq, np.float64)
    matrix = inv_freq if inv_freq.ndim == 3 else inv_freq[None]
    angles = np.einsum("bta,nai->btni", np.asarray(positions, np.float64), matrix)
    angles = angles + (0 if frequencies.phase is None else frequencies.phase)
    angles = np.repeat(angles, x.shape[2] // angles.shape[2], axis=2)
    first, second = rope.feature_pairs
    rows = zip(x, angles, strict=True)
    return np.stack([oracles.rotate_pairs(*row, first, second, frequencies.attention_factor) for row in rows])


def attention_oracle(module, params, x, positions, allowed, inv_freq=None):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    q, k, v = (
        np.einsum("btd,dnh->btnh", np.asarray(x, np.float64), p[n]["kernel"]) for n in ("query", "key", "value")
    )
    positions = np.broadcast_to(positions, (B, *positions.shape[-2:]))
    q, k = (rotated(module.rope, a, positions, inv_freq) for a in (q, k))
    y = np.stack([oracles.attention(q[b], k[b], v[b], allowed) for b in range(B)])
    return np.einsum("btnh,nhd->btd", y, p["out"]["kernel"])


CAUSAL = np.tril(np.ones((T, T), bool))
each_rope = pytest.mark.parametrize("rope", first(3, ROPES))


class TestLayer:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("shape", SHAPES)
    @each_rope
    def test_training(self, rope, shape, causal):
        module, x = module_of(ROPES[rope], causal=causal), inputs()
        at = positions_of(module.rope, shape)
        params = init(module, x, at)
        want = attention_oracle(module, params, x, at, CAUSAL if causal else np.ones((T, T), bool))
        np.testing.assert_allclose(jax.jit(module.apply)(params, x, at), want, atol=TOLERANCE)
        plan = make_plan(module.rope, (B, T), positions=at, causal=causal)
        np.testing.assert_allclose(module.apply(params, x, plan=plan), want, atol=TOLERANCE)

    @each_rope
    def test_prefill_and_cached_decode(self, rope):
        module, x = module_of(ROPES[rope]), inputs()
        at = positions_of(module.rope)
        params = init(module, x, at)
        want = attention_oracle(module, params, x, at, CAUSAL)
        cache = rope_jax.init_cache(batch=B, capacity=T, num_kv_heads=K, head_dim=H)
        step = jax.jit(lambda x, at, cache: module.apply(params, x, at, cache=cache))
        for tokens in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
            y, cache = step(x[:, tokens], at[:, tokens], cache)
            np.testing.assert_allclose(y, want[:, tokens], atol=TOLERANCE)

    @each_rope
    def test_text_positions_are_equal_coordinates(self, rope):
        module, x = module_of(ROPES[rope]), inputs()
        text = np.random.default_rng(2).integers(0, 30, (B, T)).astype(np.int32)
        at = np.repeat(text[..., None], module.rope.num_axes, -1)
        params = init(module, x, at)
        want = attention_oracle(module, params, x, at, CAUSAL)
        np.testing.assert_allclose(module.apply(params, x, text), want, atol=TOLERANCE)
        np.testing.assert_array_equal(module.apply(params, x, text[:1]), module.apply(params, x, at[:1]))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rope", first(2, ["sections", "heads", "axial"]))
    def test_learned_frequencies(self, rope, shape):
        """Output and gradients by the oracle with the learned matrix, which need not have zeros."""
        module, x = module_of(ROPES[rope], learn_frequencies=True), inputs()
        at = positions_of(module.rope, shape)
        params = init(module, x, at)
        start = module.rope.frequencies().inv_freq
        assert params["params"]["inv_freq"].shape == start.shape
        fresh = nn.unbox(module.init(jax.random.key(0), x, at))["params"]["inv_freq"]
        np.testing.assert_array_equal(fresh, start.astype(np.float32))
        learned = np.asarray(params["params"]["inv_freq"], np.float64)
        assert np.all(learned != 0)
        # Float32 angles of up to 3 coordinates below 30.
        want = attention_oracle(module, params, x, at, CAUSAL, learned)
        np.testing.assert_allclose(module.apply(params, x, at), want, atol=4 * TOLERANCE)

        weight = np.random.default_rng(3).normal(size=(B, T, D))
        loss = lambda p: jnp.sum(module.apply(p, x, at) * jnp.asarray(weight, jnp.float32))
        got = jax.grad(loss)(params)["params"]["inv_freq"]
        exact = lambda f: np.sum(attention_oracle(module, params, x, at, CAUSAL, f) * weight)
        for index in list(np.ndindex(got.shape))[::3]:
            step = np.zeros(got.shape)
            step[index] = 1e-6
            difference = (exact(learned + step) - exact(learned - step)) / 2e-6
            assert abs(got[index] - difference) < 1e-3 * (1 + abs(difference)) * 4

    def test_unlike_frequencies_of_heads_reach_the_right_heads(self):
        """With one head for both groups swapped, the output differs: the test above can fail."""
        module, x = module_of(ROPES["heads"]), inputs()
        at = positions_of(module.rope)
        params = init(module, x, at)
        inv_freq = module.rope.frequencies().inv_freq[::-1]
        other = attention_oracle(module, params, x, at, CAUSAL, inv_freq)
        assert np.abs(module.apply(params, x, at) - other).max() > 0.01


class TestDecoder:
    @pytest.mark.parametrize("unlike", [False, True])
    @pytest.mark.parametrize("rope", first(2, ["sections", "heads", "axial", "start and blocks"]))
    def test_prefill_and_cached_decode_are_the_whole(self, rope, unlike):
        """The whole without a cache, whose layers the tests above hold against float64."""
        rope = ROPES[rope]
        ropes = (rope, rope_jax.Rope(**{f: getattr(rope, f) for f in ("head_dim", "rotary_dim", "layout", "start", "blocks")}, schedule=lambda r: rope_jax.Frequencies(rope.schedule(r).inv_freq * 0.5))) if unlike else rope  # fmt: skip
        model = rope_jax.Decoder(
            vocab_size=13, num_layers=2, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=24, rope=ropes
        )
        tokens = np.random.default_rng(0).integers(0, 13, (B, T))
        at = positions_of(rope)
        params = init(model, tokens, at)
        whole = model.apply(params, tokens, at)
        text = np.random.default_rng(2).integers(0, 30, (B, T)).astype(np.int32)
        assert np.abs(whole - model.apply(params, tokens, text)).max() > 1e-3  # positions matter
        cache = model.init_cache(batch=B, capacity=T)
        step = jax.jit(lambda tokens, at, cache: model.apply(params, tokens, at, cache=cache))
        for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
            logits, cache = step(tokens[:, part], at[:, part], cache)
            np.testing.assert_allclose(logits, whole[:, part], atol=4 * TOLERANCE)

    def test_text_after_a_picture(self):
        """A cached step of text passes ``[B, T]``."""
        model = rope_jax.Decoder(
            vocab_size=13, num_layers=2, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=24, rope=ROPES["sections"]
        )  # fmt: skip
        tokens, at = np.random.default_rng(0).integers(0, 13, (B, T)), positions_of(model.rope)
        at[:, 4:] = np.array([40, 41])[None, :, None]
        params = init(model, tokens, at)
        whole = model.apply(params, tokens, at)
        _, cache = model.apply(params, tokens[:, :4], at[:, :4], cache=model.init_cache(batch=B, capacity=T))
        logits, cache = model.apply(params, tokens[:, 4:], np.array([[40, 41]]), cache=cache)
        np.testing.assert_allclose(logits, whole[:, 4:], atol=4 * TOLERANCE)

    def test_gradients_reach_every_parameter(self):
        model = rope_jax.Decoder(
            vocab_size=13, num_layers=2, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=24, rope=ROPES["axial"], remat=True
        )  # fmt: skip
        tokens, at = np.random.default_rng(0).integers(0, 13, (B, T)), positions_of(model.rope)
        params = init(model, tokens, at)
        grads = jax.grad(lambda p: jnp.sum(model.apply(p, tokens, at) ** 2))(params)
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


class TestPlan:
    def test_text_of_each_shape(self):
        rope = ROPES["axial"]
        text = np.arange(B * T).reshape(B, T)
        for given in (text, text[:1]):
            plan = make_plan(rope, (B, T), positions=given)
            want = rope.rotation(np.stack([given] * 2, -1))
            jax.tree.map(np.testing.assert_array_equal, plan.rotation, want)
        # Of T = A = 2, rows of one are text: [B, T] is ambiguous only if it may be [T, A].
        plan = make_plan(rope, (1, 2), positions=[[5, 9]])
        jax.tree.map(np.testing.assert_array_equal, plan.rotation, rope.rotation([[[5, 5], [9, 9]]]))
        plan = make_plan(rope, (3, 2), positions=[[5, 9], [6, 7]])
        jax.tree.map(np.testing.assert_array_equal, plan.rotation, rope.rotation([[5, 9], [6, 7]]))

    def test_heads_of_positions_of_all_rows(self):
        rope = ROPES["heads"]
        plan = make_plan(rope, (B, T), positions=positions_of(rope, "[T, A]"))
        assert plan.rotation.per_head and plan.rotation.cos.shape == (T, K, H // 2)

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda rope: make_plan(rope, (2, 2), positions=[[5, 9], [6, 7]]), r"positions of shape \(2, 2\) may be \[B, T\] or \[T, A=2\]: pass \[B, T, A=2\]"),
            (lambda rope: make_plan(rope, (B, T)), r"positions must be \[B, T, A=2\] for a rope of 2 axes, got None"),
            (lambda rope: make_plan(rope, (B, T), positions=np.arange(T)), r"A=2\] for frequencies of 2 position axes, got shape \(6,\)"),
            (lambda rope: make_plan(rope, (B, T), positions=np.zeros((B, T, 3), int)), r"A=2\] .* got shape \(2, 6, 3\)"),
            (lambda rope: make_plan(rope, (B, T), positions=np.zeros((3, T, 2), int)), r"positions must have shape \[B, T, A\] with B=\{1, 2\}, got \(3, 6, 2\)"),
            (lambda rope: make_plan(rope, (B, T), positions=np.zeros((T - 1, 2), int)), r"positions must have shape \[\.\.\., T, A\] with T=6, got \(5, 2\)"),
            (
                lambda rope: make_plan((rope, ROPES["sections"]), (B, T), positions=np.zeros((B, T, 2), int)),
                "rope must be of layers that differ by schedule alone",
            ),
            (
                lambda rope: make_plan((ROPES["affine"], rope_jax.Rope(H, SECTIONS)), (B, T), positions=np.zeros((B, T, 2), int)),
                "differ by schedule alone, with equal axes and heads",
            ),
            (
                lambda rope: make_plan(
                    rope, (B, T), positions=np.zeros((B, T, 2), int),
                    cache=rope_jax.init_cache(batch=B, capacity=T, num_kv_heads=K, head_dim=H, rotated=False),
                ),
                r"cache must hold rotated keys, init_cache\(rotated=True\), for a rope of 2 axes: it keeps no positions",
            ),
            (
                lambda rope: make_plan(
                    rope_jax.Rope(H, rope_jax.Sections(sections=(2, 2), schedule=rope_jax.DynamicNTK(factor=2.0, original_length=8))),
                    (B, T), positions=np.zeros((B, T, 2), int),
                    cache=rope_jax.init_cache(batch=B, capacity=T, num_kv_heads=K, head_dim=H),
                ),
                "context_length must be a field of the schedule with a cache, for a rope of 2 axes, got Sections",
            ),
        ],
    )  # fmt: skip
    def test_refusals(self, call, says):
        with pytest.raises(ValueError, match=says):
            call(ROPES["axial"])

    def test_frequencies_for_more_heads_than_keys_have(self):
        rope = rope_jax.Rope(H, lambda r: rope_jax.Frequencies(np.ones((N, 1, r // 2))))
        with pytest.raises(ValueError, match="rope must have frequencies for a divisor of K=2 heads, got for 4"):
            module_of(rope).init(jax.random.key(0), inputs())
