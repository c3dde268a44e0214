"""Meshes of explicit axes, the default of ``jax.make_mesh``: the numbers of one device, and types that say where."""

import collections
import dataclasses
import functools
import re

import eight_devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from fast import first
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rope_jax
from rope_jax.attention import cache_partition_spec, ring_attention, zigzag_sequence_index

B, T, S, N, K, H, D, V = 8, 8, 16, 8, 4, 8, 16, 24
ROPE = rope_jax.Rope(H, rope_jax.Llama3(factor=4.0, original_length=16, base=100.0))
SIZES = dict(vocab_size=V, num_layers=2, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=32)
MODEL = rope_jax.Decoder(**SIZES, rope=ROPE)
EVERY_OPTION = dict(
    qk_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, post_norms=True, tie_embeddings=False
)
TERMS = eight_devices.terms_of(MODEL, B, T)
COLLECTIVES = r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


def test_on_eight_devices():
    eight_devices.run(__file__)


def make_mesh(kind=AxisType.Explicit, **sizes):
    sizes = sizes or dict(data=2, model=4)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def put(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def by_rules(mesh, names, kv_heads=K, *more):
    kv_heads = "model" if kv_heads % mesh.shape["model"] == 0 else None
    rules = [("heads", "model"), ("kv_heads", kv_heads), ("mlp", "model"), ("vocab", "model"), ("batch", "data")]
    return nn.logical_to_mesh_sharding(names, mesh, [*more, *rules])


@functools.cache
def variables(module, *shape):
    """Parameters large enough that every gradient matters, and their logical names."""
    x = jnp.zeros(shape) if len(shape) == 3 else jnp.zeros(shape, jnp.int32)
    names = nn.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), x))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.2 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params), names


def decoder_on(mesh, model, *more):
    params, names = variables(model.clone(activation_sharding=None), 1, T)
    return params, jax.device_put(params, by_rules(mesh, names, model.num_kv_heads, *more))


def cache_on(mesh, cache):
    return jax.device_put(cache, by_rules(mesh, cache_partition_spec(cache), cache.key.shape[-3]))


def text(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, shape), jnp.int32)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_close(got, want, terms=TERMS):
    """Equal but for the order of sums of so many terms; integers exactly."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        if other.dtype.kind != "f":
            np.testing.assert_array_equal(one, other)
        else:
            scale = max(np.abs(other).max(), 1e-3)
            worst = np.abs(one - other).max() / scale
            assert worst <= terms * oracles.EPS32, worst


def spec_of(x):
    return tuple(jax.typeof(x).sharding.spec)


def cross_entropy(model, params, tokens, labels, **arguments):
    logits = model.apply(params, tokens, **arguments)
    if jax.sharding.get_abstract_mesh().explicit_axes:  # optax takes logits of whole vocabularies
        logits = jax.sharding.reshard(logits, P(*spec_of(logits)[:2]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


MODELS = {
    "plain": dict(),
    "every option": EVERY_OPTION | dict(remat=True, window=5),
    "kv heads copied": dict(num_kv_heads=2),
    "T5 bias, learned positions": dict(
        rope=None,
        position_bias=rope_jax.attention.T5Bias(),
        position_embedding=rope_jax.models.LearnedPositions(num_positions=32),
    ),
    "unlike layers": dict(rope=(ROPE, None), window=(4, None)),
    "learned frequencies": dict(learn_frequencies=True),
}
CACHES = {
    "plain": dict(),
    "bfloat16": dict(dtype=jnp.bfloat16),
    "int8": dict(dtype=jnp.int8),
    "sliding": dict(eviction="sliding", capacity=6),
    "unrotated sinks": dict(eviction="sliding", num_sink_tokens=2, rotated=False, capacity=6),
}


GENERATIONS = {
    "greedy": lambda params, prompt, mask, keys: rope_jax.generate(
        MODEL, params, prompt, mask=mask, max_new_tokens=4, temperature=0, stop_token=3
    ),
    "speculative": lambda params, prompt, mask, keys: rope_jax.generation.speculative_decode(
        MODEL, params, MODEL, params, prompt, mask=mask, max_new_tokens=4, rng=keys[:B], temperature=1.0
    ),
    "beams": lambda params, prompt, mask, keys: rope_jax.generation.beam_search(
        MODEL, params, prompt, mask=mask, beams=2, max_new_tokens=4
    ),
    "drawn": lambda params, prompt, mask, keys: rope_jax.generate(
        MODEL, params, prompt, max_new_tokens=4, num_samples=2, rng=keys, top_k=5, top_p=0.9
    ),
}


class EightDevices:
    @pytest.mark.parametrize("name", first(2, MODELS))
    @pytest.mark.parametrize("fully", [False, True], ids=["", "fully sharded"])
    def test_a_training_step(self, name, fully):
        """Loss, gradients, optimizer state and parameters, placed as they were."""
        mesh = make_mesh()
        model = MODEL.clone(**MODELS[name])
        params, placed = decoder_on(mesh, model, *[("embed", "data"), ("positions", None)] * fully)
        sharding = NamedSharding(mesh, P("data"))
        on_mesh = model.clone(activation_sharding=sharding if fully else None)
        optimizer = optax.adamw(1e-3)
        tokens = text(B, T + 1)

        @functools.partial(jax.jit, static_argnames="model")
        def step(params, state, tokens, model):
            loss, grads = jax.value_and_grad(lambda p: cross_entropy(model, p, tokens[:, :-1], tokens[:, 1:]))(
                params
            )
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state, params)
            return loss, grads, optax.apply_updates(params, updates), state

        want = step(params, optimizer.init(params), tokens, model)
        with jax.set_mesh(mesh):
            got = step(placed, optimizer.init(placed), put(mesh, tokens, "data"), on_mesh)
        eight_devices.assert_reordered(got[:2], want[:2], TERMS)
        assert jax.tree.map(spec_of, got[2]) == jax.tree.map(spec_of, placed) == jax.tree.map(spec_of, got[1])

    @pytest.mark.parametrize("name", first(2, CACHES))
    @pytest.mark.parametrize("kv_heads", [K, 2], ids=["", "kv heads copied"])
    def test_a_layer_and_its_cache(self, name, kv_heads):
        mesh = make_mesh()
        layer = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=kv_heads, head_dim=H, rope=ROPE, window=4)
        params, names = variables(layer, 1, T, D)
        cache = rope_jax.init_cache(**dict(batch=B, capacity=S, num_kv_heads=kv_heads, head_dim=H) | CACHES[name])
        mask = jnp.asarray(np.random.default_rng(1).integers(0, 2, (B, 3)), bool).at[:, 0].set(True)

        @jax.jit
        def steps(params, x, mask, cache):
            ys = []
            for part, real in ((x[:, :3], mask), (x[:, 3:4], None), (x[:, 4:5], None)):
                y, cache = layer.apply(params, part, mask=real, cache=cache)
                ys.append(y)
            ys[0] = jnp.where(mask[:, :, None], ys[0], 0)
            alone = layer.apply(params, x, segment_ids=jnp.zeros(x.shape[:2], jnp.int32))
            return ys, alone, cache

        x = normal(B, T, D)
        want = steps(params, x, mask, cache)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, by_rules(mesh, names, kv_heads))
            cache = cache_on(mesh, cache)
            got = steps(placed, put(mesh, x, "data"), put(mesh, mask, "data"), cache)
        tolerance = 1e-2 if name in ("bfloat16", "int8") else None  # a rounding that falls to the other side
        if tolerance is None:
            assert_close(got, want)
        else:
            for one, other in zip(got[0], want[0], strict=True):
                np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
        assert jax.tree.map(spec_of, got[2]) == jax.tree.map(spec_of, cache)
        assert spec_of(got[1]) == ("data", None, None)

    @pytest.mark.parametrize("rotated", first(1, [True, False]))
    def test_frequencies_that_depend_on_the_context_length(self, rotated):
        """Some rows outgrow the short list: their stored keys are rotated again."""
        mesh = make_mesh()
        long = rope_jax.LongRope(
            short_factor=(1.0,) * 4, long_factor=(2.0, 3.0, 4.0, 5.0), factor=4.0, original_length=6
        )
        params, placed = decoder_on(mesh, MODEL)
        model = MODEL.clone(rope=rope_jax.Rope(H, long))
        mask = jnp.ones((B, 5), bool).at[::2, :2].set(False)

        @jax.jit
        def steps(params, tokens, mask, cache):
            _, cache = model.apply(params, tokens[:, :5], mask=mask, cache=cache)
            return model.apply(params, tokens[:, 5:7], cache=cache)

        cache = model.init_cache(batch=B, capacity=S, rotated=rotated)
        want = steps(params, text(B, T), mask, cache)
        with jax.set_mesh(mesh):
            got = steps(placed, *put(mesh, (text(B, T), mask), "data"), cache_on(mesh, cache))
        assert_close(got, want)
        assert len(set(want[1].context_length.tolist())) == (2 if rotated else 1)

    def test_a_cache_changes_rows_and_size(self):
        mesh = make_mesh()
        cache = rope_jax.init_cache(batch=B, capacity=S, num_kv_heads=K, head_dim=H, num_layers=2)
        kv = normal(B, 3, K, H)

        def change(cache, kv, rows):
            for layer in range(2):
                of_layer = dataclasses.replace(cache, layer=jnp.int32(layer))
                slots = cache.slots.of_new_tokens(cache.num_tokens, jnp.ones(kv.shape[:2], bool))
                cache = dataclasses.replace(of_layer.store(kv, kv + layer, slots, consecutive=True), layer=None)
            cache = dataclasses.replace(cache, num_tokens=cache.num_tokens + 3)
            cache = cache.grow(2 * S).select_rows(rows).truncate(jnp.arange(rows.shape[0]) % 4)
            return cache, dataclasses.replace(cache, layer=jnp.int32(1)).read(jnp.float32)

        for rows in (jnp.arange(B)[::-1], jnp.repeat(jnp.arange(B), 2), jnp.arange(3)):
            want = jax.jit(change)(cache, kv, rows)
            with jax.set_mesh(mesh):
                got = jax.jit(change)(cache_on(mesh, cache), put(mesh, kv, "data", None, "model"), rows)
            assert_close(got, want, terms=0)
            along = None if len(rows) == 3 else "data"  # two devices do not divide three rows
            assert spec_of(got[0].key) == (None, along, "model", None, None)
            assert spec_of(got[0].num_tokens) == (along,)

    @pytest.mark.parametrize("eager", [False, True], ids=["jit", "eager"])
    def test_the_functions_below_a_layer(self, eager):
        """Rotation, attention with bias and mask, its weights and second derivatives."""
        mesh = make_mesh()
        q, k, v = normal(B, T, N, H), normal(B, T, 2, H, seed=1), normal(B, T, 2, H, seed=2)
        bias, mask = normal(1, N, T, T, seed=3), jnp.asarray(np.tri(T, dtype=bool))[None, None]

        def call(q, k, v, bias, mask, positions):
            q, k = ROPE(q, k, positions)
            results = rope_jax.attend(q, k, v, bias=bias, mask=mask, window=5, logit_cap=9.0)
            return q, k, results, rope_jax.attention.attention_weights(q, k, bias=bias, mask=mask)

        def curvature(q, k, v, *rest):
            loss = lambda q: jnp.sum(call(q, k, v, *rest)[2] ** 2)
            return jax.jvp(jax.grad(loss), (q,), (jnp.ones_like(q),))

        both = lambda *operands: (call(*operands), curvature(*operands))
        operands = q, k, v, bias, mask, jnp.arange(T)[None] * 1000
        want = jax.jit(both)(*operands)
        with jax.set_mesh(mesh):
            placed = put(mesh, q, "data", None, "model"), put(mesh, k, "data"), put(mesh, v, "data"), *operands[3:]
            got = call(*placed) if eager else jax.jit(both)(*placed)
        assert_close(got, want[0] if eager else want, terms=4096)
        out = got if eager else got[0]
        assert spec_of(out[0]) == spec_of(out[2]) == ("data", None, "model", None)
        assert spec_of(out[3]) == ("data", "model", None, None)

    @pytest.mark.parametrize(("kv_heads", "order"), first(1, [(1, "not placed"), (K, "placed"), (1, "placed")]))
    def test_ring(self, kv_heads, order):
        mesh = make_mesh(data=2, sequence=2, model=2)
        q, k, v = normal(B, T, N, H), normal(B, T, kv_heads, H, seed=1), normal(B, T, kv_heads, H, seed=2)
        index = jnp.asarray(zigzag_sequence_index(T, 2))[None]

        def whole(q, k, v):
            mask = index[:, None, :, None] >= index[:, None, None, :]
            return rope_jax.attend(q, k, v, mask=mask)

        def ring(q, k, v, index):
            return ring_attention(q, k, v, index, axis_name="sequence", causal=True)

        loss = lambda f: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x) ** 2), argnums=(0, 1, 2)))
        want = jax.jit(whole)(q, k, v), loss(whole)(q, k, v)
        with jax.set_mesh(mesh):
            heads = "model" if kv_heads > 1 else None
            q, (k, v) = put(mesh, q, "data", "sequence", "model"), put(mesh, (k, v), "data", "sequence", heads)
            index = put(mesh, index, None, "sequence") if order == "placed" else index
            got = jax.jit(ring)(q, k, v, index), loss(ring)(q, k, v, index)
        assert_close(got, want, terms=2048)
        assert spec_of(got[0]) == ("data", "sequence", "model", None)
        assert [spec_of(x) for x in got[1][1]] == [spec_of(x) for x in (q, k, v)]

    def test_a_decoder_on_a_ring(self):
        mesh = make_mesh(data=2, sequence=2, model=2)
        params, placed = decoder_on(mesh, MODEL)
        along = NamedSharding(mesh, P("data", "sequence"))
        tokens = text(B, T + 1)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        step = jax.jit(jax.value_and_grad(cross_entropy, argnums=1), static_argnums=0)
        want = step(MODEL, params, inputs, labels)
        with jax.set_mesh(mesh):
            model = MODEL.clone(ring_axis="sequence", activation_sharding=along)
            index = jnp.arange(T)[None]
            got = step(model, placed, *jax.device_put((inputs, labels), along), sequence_index=index)
        eight_devices.assert_reordered(got, want, TERMS)

    @pytest.mark.parametrize("name", first(3, GENERATIONS))
    def test_generation(self, name):
        mesh = make_mesh()
        prompt, keys = text(B, 5), jax.random.split(jax.random.key(2), 2 * B)
        mask = jnp.ones((B, 5), bool).at[::2, :2].set(False)
        params, placed = decoder_on(mesh, MODEL)
        want = GENERATIONS[name](params, prompt, mask, keys)
        with jax.set_mesh(mesh):
            got = GENERATIONS[name](placed, *put(mesh, (prompt, mask, keys), "data"))
        assert_close(got, want)
        assert all(spec_of(x)[:1] in ((), ("data",)) for x in jax.tree.leaves(got) if x.ndim < 4)
        if name != "beams":
            assert spec_of(got.cache.key) == (None, "data", "model", None, None)

    def test_kv_heads_are_copied_and_the_cache_is_divided_by_rows(self):
        mesh, model = make_mesh(), MODEL.clone(num_kv_heads=2)
        params, placed = decoder_on(mesh, model)
        options = dict(max_new_tokens=4, temperature=0)
        want = rope_jax.generate(model, params, text(B, 5), **options)
        with jax.set_mesh(mesh):
            got = rope_jax.generate(model, placed, put(mesh, text(B, 5), "data"), **options)
        assert_close(got, want)
        assert spec_of(got.cache.key) == (None, "data", None, None, None)

    def test_a_conversation_streamed_to_the_host(self):
        """The cache of one answer, or of a prompt that all rows share, begins the next: placed as it was given."""
        mesh = make_mesh()
        params, placed = decoder_on(mesh, MODEL)

        def chat(params, place, shared):
            seen = []
            options = dict(max_new_tokens=3, temperature=0, on_token=lambda row, token: seen.append((row, token)))
            first = rope_jax.generate(MODEL, params, place(text(B, 5)), cache=shared, **options)
            second = rope_jax.generate(MODEL, params, place(text(B, 4, seed=1)), cache=first.cache, **options)
            return second, np.array(seen)

        shared = rope_jax.generate(MODEL, params, text(1, 4), max_new_tokens=1, temperature=0).cache
        want = chat(params, lambda x: x, shared)
        with jax.set_mesh(mesh):
            got = chat(placed, lambda x: put(mesh, x, "data"), put(mesh, shared))
        assert_close(got, want)
        assert spec_of(got[0].cache.key) == (None, "data", None, None, None)

    def test_inside_shard_map(self):
        """Rows over a manual axis; heads stay divided over the explicit axis."""
        mesh = make_mesh()
        params, placed = decoder_on(mesh, MODEL)
        write = lambda params, prompt: (
            rope_jax.generate(MODEL, params, prompt, max_new_tokens=4, temperature=0).tokens
        )
        want = write(params, text(B, 5))
        with jax.set_mesh(mesh):
            mapped = jax.shard_map(write, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"})
            got = jax.jit(mapped)(placed, put(mesh, text(B, 5), "data"))
        assert_close(got, want)

    def test_without_a_mesh_in_use(self):
        """The types of arrays that lie on an explicit mesh suffice."""
        mesh = make_mesh()
        params, placed = decoder_on(mesh, MODEL)
        got, want = (
            rope_jax.generate(MODEL, p, t, max_new_tokens=2, temperature=0)
            for p, t in ((placed, put(mesh, text(B, 5), "data")), (params, text(B, 5)))
        )
        assert_close(got, want)

    def test_no_collective_for_the_rotation(self):
        mesh = make_mesh()

        def there_and_back(q, k, positions):
            rotated, pull = jax.vjp(lambda q, k: ROPE(q, k, positions), q, k)
            return rotated, pull(rotated)

        with jax.set_mesh(mesh):
            q, k = put(mesh, normal(B, T, N, H), "data", None, "model"), put(mesh, normal(B, T, 2, H), "data")
            positions = put(mesh, jnp.zeros((B, T), jnp.int32), "data")
            program = jax.jit(there_and_back).lower(q, k, positions).compile()
        assert not re.findall(COLLECTIVES, program.as_text())

    @pytest.mark.parametrize("what", ["training", "decoding"])
    def test_as_many_collectives_as_on_a_mesh_of_automatic_axes(self, what):
        counts = {}
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = make_mesh(kind)
            _, placed = decoder_on(mesh, MODEL)
            cache = cache_on(mesh, MODEL.init_cache(batch=B, capacity=S))
            tokens = put(mesh, text(B, T), "data")

            def train(params, tokens, cache):
                return jax.value_and_grad(lambda p: cross_entropy(MODEL, p, tokens, tokens))(params)

            def decode(params, tokens, cache):
                return MODEL.apply(params, tokens[:, :1], cache=cache)

            with jax.set_mesh(mesh):
                program = jax.jit(train if what == "training" else decode).lower(placed, tokens, cache).compile()
            counts[kind] = collections.Counter(re.findall(COLLECTIVES, program.as_text()))
        print(f"\n{what}: {counts}", end="")
        assert counts[AxisType.Explicit].total() <= counts[AxisType.Auto].total()
