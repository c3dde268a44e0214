"""The decoder divided among devices by XLA, from logical axis rules: the same loss, gradients and tokens."""

import collections
import dataclasses
import functools
import itertools
import math
import re

import eight_devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rope_jax

B, T, S, N, K, H, V = 8, 16, 16, 8, 4, 8, 13
ROPE = rope_jax.Rope(H, rope_jax.Llama3(factor=4.0, original_length=16, base=100.0))
SIZES = dict(vocab_size=V, num_layers=2, width=16, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=32)
MODEL = rope_jax.Decoder(**SIZES, rope=ROPE)
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
SMALLER = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
AXES = ("data", "model", "sequence")

by_name = lambda shape: "x".join(map(str, shape))
# Every axis is divided in 2 x 2 x 2; the other shapes are left to the full suite.
few = lambda shapes: [
    shape if shape == (2, 2, 2) else pytest.param(shape, marks=pytest.mark.full) for shape in shapes
]


def test_on_eight_devices():
    eight_devices.run(__file__)


def test_names_of_a_cache():
    P = PartitionSpec
    one = rope_jax.attention.cache_partition_spec(
        rope_jax.init_cache(batch=B, capacity=S, num_kv_heads=K, head_dim=H)
    )
    assert one.key == one.value == P("batch", "kv_heads", "kv_length", "head_dim") and one.num_tokens == P("batch")
    shapes = jax.eval_shape(lambda: MODEL.init_cache(batch=B, capacity=S))
    every = rope_jax.attention.cache_partition_spec(shapes)
    assert every.key == every.value == P("layers", "batch", "kv_heads", "kv_length", "head_dim")
    assert every.num_tokens == every.context_length == P("batch")


def test_under_the_rules_of_flax():
    """Kernels of attention are made as matrices, which have not the axes that their names are of."""
    tokens = jnp.arange(8)[None]
    init_and_apply = lambda: MODEL.init_with_output(jax.random.key(0), tokens)[0]
    want = jax.jit(init_and_apply)()
    mesh = eight_devices.mesh(data=1, model=1)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("embed", "data"), ("heads", "model"), ("mlp", "model")]):
        got = jax.jit(init_and_apply)()
    np.testing.assert_allclose(got, want, atol=eight_devices.terms_of(MODEL, 1, 8) * oracles.EPS32)


def rules(shape, *more):
    shared = K % shape[1] == 0  # few kv heads are copied to every device instead
    return [
        *more,
        ("batch", "data"),
        ("kv_length", "sequence"),
        ("heads", "model"),
        ("kv_heads", "model" if shared else None),
        ("mlp", "model"),
    ]


@functools.cache
def data():
    """Parameters large enough that every gradient matters, text, prompts of which four tokens are padding."""
    rng = np.random.default_rng(0)
    params = nn.unbox(MODEL.init(jax.random.key(0), jnp.zeros((1, T), jnp.int32)))
    params = jax.tree.map(lambda p: p + 0.2 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    text = jnp.asarray(rng.integers(0, V, (B, T + 1)), jnp.int32)
    return params, text[:, :-1], text[:, 1:], text[:, :8]


def work(params, tokens, labels, prompt, cache, *, model):
    """Loss and gradients, and eight greedy tokens out of a cache."""

    def loss(params):
        scores = jax.nn.log_softmax(model.apply(params, tokens))
        return -jnp.mean(jnp.take_along_axis(scores, labels[..., None], axis=-1))

    def step(state, _):
        cache, token = state
        logits, cache = model.apply(params, token[:, None], cache=cache)
        return (cache, jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)), token

    logits, cache = model.apply(params, prompt, cache=cache)
    first = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
    (cache, _), written = lax.scan(step, (cache, first), length=S - prompt.shape[1])
    return jax.value_and_grad(loss)(params), written.T, cache


@functools.cache
def compiled(shape, rope=ROPE, fully=False):
    """The program of :func:`work` on a mesh, and what goes into it, each array in its place."""
    mesh = eight_devices.mesh(**dict(zip(AXES, shape, strict=True)))
    along = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    model = MODEL.clone(rope=rope, activation_sharding=along if fully else None)
    axis_rules = rules(shape, *[("embed", "data")] * fully)
    names = nn.get_partition_spec(jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, T), jnp.int32)))
    cache = model.init_cache(batch=B, capacity=S)
    params, tokens, labels, prompt = data()
    by_rows = NamedSharding(mesh, PartitionSpec("data"))
    places = [
        nn.logical_to_mesh_sharding(names, mesh, axis_rules),
        *(along, along, by_rows),
        nn.logical_to_mesh_sharding(rope_jax.attention.cache_partition_spec(cache), mesh, axis_rules),
    ]
    arguments = list(map(jax.device_put, (params, tokens, labels, prompt, cache), places))
    program = jax.jit(
        functools.partial(work, model=model),
        out_shardings=((NamedSharding(mesh, PartitionSpec()), places[0]), by_rows, places[-1]),
    )
    return program.lower(*arguments).compile(), arguments


def collectives(program):
    found = re.findall(
        r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", program.as_text()
    )
    return collections.Counter(found)


def bytes_sent(program) -> int:
    """Of the float32 results of all collectives."""
    results = re.findall(
        r"= (\S+|\(.*?\)) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(",
        program.as_text(),
    )
    shapes = [shape for result in results for shape in re.findall(r"f32\[([\d,]*)\]", result)]
    return sum(4 * math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


@functools.cache
def on_one():
    return jax.jit(functools.partial(work, model=MODEL))(*data(), MODEL.init_cache(batch=B, capacity=S))


def assert_same(got):
    want = on_one()
    eight_devices.assert_reordered(got[0], want[0], eight_devices.terms_of(MODEL, B, T))
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[2].key, want[2].key, atol=1e-4 * float(abs(want[2].key).max()))
    np.testing.assert_array_equal(got[2].num_tokens, want[2].num_tokens)


class EightDevices:
    @pytest.mark.parametrize("shape", few(SHAPES + SMALLER), ids=by_name)
    def test_loss_gradients_and_tokens(self, shape):
        program, arguments = compiled(shape)
        got = program(*arguments)
        assert_same(got)
        data_, model, sequence = shape
        kv_heads = K // model if K % model == 0 else K
        cache = got[2].key
        assert cache.sharding.shard_shape(cache.shape) == (2, B // data_, kv_heads, S // sequence, H)

    @pytest.mark.parametrize("shape", few(SHAPES), ids=by_name)
    def test_the_rotation_sends_nothing(self, shape):
        mesh = eight_devices.mesh(**dict(zip(AXES, shape, strict=True)))
        heads = NamedSharding(mesh, PartitionSpec("data", "sequence", "model"))

        def there_and_back(q, k, positions):
            turned, pull = jax.vjp(lambda q, k: ROPE(q, k, positions), q, k)
            return turned, pull(turned)

        q = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16, sharding=heads)
        for batch, rows in ((B, PartitionSpec("data", "sequence")), (1, PartitionSpec(None, "sequence"))):
            positions = jax.ShapeDtypeStruct((batch, T), jnp.int32, sharding=NamedSharding(mesh, rows))
            program = jax.jit(there_and_back).lower(q, q, positions).compile()
            assert not collectives(program)
            for place in jax.tree.leaves(program.output_shardings):
                assert place.is_equivalent_to(heads, 4)

    @pytest.mark.parametrize("shape", few([(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]), ids=by_name)
    def test_the_decoder_sends_as_much_without_rotation(self, shape):
        """Within a fifth: if T is divided, XLA exchanges cotangents in one program and sums them in the other."""
        rotated, unrotated = (bytes_sent(compiled(shape, rope)[0]) for rope in (ROPE, None))
        assert 0 < rotated <= 1.2 * unrotated

    @pytest.mark.parametrize("tokens", [1, 4])
    @pytest.mark.parametrize("shape", few([(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]), ids=by_name)
    def test_a_write_to_a_cache_sends_nothing(self, shape, tokens):
        """Not even if each device holds some slots of all rows."""
        mesh = eight_devices.mesh(**dict(zip(AXES, shape, strict=True)))
        heads = 8  # so that each device has its own
        cache = jax.eval_shape(
            lambda: rope_jax.init_cache(batch=8, capacity=S, num_kv_heads=heads, head_dim=H, num_layers=2)
        )
        rules_ = [("batch", "data"), ("kv_heads", "model"), ("kv_length", "sequence")]
        places = nn.logical_to_mesh_sharding(rope_jax.attention.cache_partition_spec(cache), mesh, rules_)
        placed = lambda aval, place: jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=place)
        kv = jax.ShapeDtypeStruct(
            (8, tokens, heads, H), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", None, "model"))
        )
        slots = jax.ShapeDtypeStruct((8, tokens), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))

        def write(cache, kv, slots, layer):
            written = dataclasses.replace(cache, layer=layer).store(kv, kv, slots, consecutive=True)
            return dataclasses.replace(written, layer=None)

        program = jax.jit(write, out_shardings=places, donate_argnums=0)
        compiled_ = program.lower(jax.tree.map(placed, cache, places), kv, slots, jnp.int32(1)).compile()
        assert not collectives(compiled_)

    def test_fully_sharded(self):
        """Parameters along every axis of the mesh, and still each device computes its own rows and nothing else."""
        program, arguments = compiled((4, 2, 1), ROPE, True)
        assert_same(program(*arguments))
        kernel = arguments[0]["params"]["layers"]["gate"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (2, 16 // 4, 32 // 2)
        alone, _ = compiled((1, 1, 1))
        share = program.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
        print(f"\nshare of the work: {share:.3f} of one device's", end="")
        assert share < 1.2 / 8

    def test_generate(self):
        _, (params, _, _, prompt, _) = compiled((2, 2, 2))
        written = rope_jax.generate(MODEL, params, prompt, max_new_tokens=S - prompt.shape[1], temperature=0)
        np.testing.assert_array_equal(written.tokens, on_one()[1])

    @pytest.mark.parametrize("spec", [(), ("a",), ("a", "b"), (None, "b"), ("a", None, "b")], ids=str)
    def test_rotations_of_heads_on_a_mesh_of_explicit_axes(self, spec):
        """Heads before tokens by frequencies of each head, tokens at rest, and blocks of a partial head."""
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(4, 4, 6, 12)), jnp.float32)  # [B, N, T, H]
        positions = jnp.asarray(rng.integers(0, 9, (4, 6, 2)), jnp.int32)
        of_heads = rope_jax.Frequencies(rng.normal(size=(2, 2, 6)))
        blocks = rope_jax.Rope(12, rope_jax.Axial(sizes=(4, 4)), rotary_dim=8, blocks=2)

        @jax.jit
        def rotate(x, positions):
            rotated = rope_jax.rotate(x, rope_jax.rotation(positions, of_heads), token_axis=-2)
            longer = rope_jax.rotation(positions, of_heads).prepend_identity(2)
            return rotated, longer.cos, blocks.rotate(x, blocks.rotation(positions), token_axis=-2)

        want = rotate(x, positions)
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, PartitionSpec(*spec[:1]))
            got = rotate(
                jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))), jax.device_put(positions, rows)
            )
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
