"""`rotate` as a JAX primitive: batching, shard_map, explicit sharding, choice of the kernel, and the kernel in
interpret mode. test_kernels_tpu.py compiles the kernel."""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, PartitionSpec

import rope_jax
from rope_jax.core import primitive
from rope_jax.core.kernels import tpu

LAYOUTS = ["half", "interleaved"]
full = pytest.mark.full
FEW_ROWS = [((), True), ((3,), False)]  # leading axes, and whether they share a rotation
MORE_ROWS = [((1,), False), ((3,), True), ((2, 2), False), ((2, 2), True)]


def rotate_by_partners(x, cos, sin, layout):
    assert layout == "interleaved"
    return primitive.rotate_by_partners(x, cos, sin)


XLA_FORMS = [
    (primitive.rotate_by_parts, "half"),
    (primitive.rotate_by_parts, "interleaved"),
    (rotate_by_partners, "interleaved"),
    (primitive.rotate_in_one_loop, "half"),
    (primitive.rotate_in_one_loop, "interleaved"),
]
jitted = {form: jax.jit(form, static_argnums=3) for form, _ in XLA_FORMS}
rotate_interpreted = jax.jit(functools.partial(tpu.rotate, interpret=True), static_argnames="layout")
WIDTHS = [(128, 128), (128, 64), (256, 256), (384, 96), (64, 64), (64, 20), (32, 32), (80, 32), (96, 96), (16, 2)]


def inputs(head_dim, rotary_dim, dtype=jnp.float32, batch=(2,), length=150, heads=(4, 1), shared=False, seed=0):
    rng = np.random.default_rng(seed)
    xs = [jnp.asarray(rng.normal(size=(*batch, length, n, head_dim)), dtype) for n in heads]
    positions = rng.integers(-(10**7), 10**7, (length,) if shared else (*batch, length))
    schedule = rope_jax.Yarn(factor=4.0, original_length=512)
    cos, sin = rope_jax.rotation(jnp.asarray(positions, jnp.int32), schedule(max(rotary_dim, 4)))
    return xs, cos[..., : rotary_dim // 2], sin[..., : rotary_dim // 2]


def assert_rotated(got, x, cos, sin, layout):
    """To the tolerance of test_rotate: three roundings of float32, and one to x's dtype."""
    want = oracles.rotate_features(x, cos, sin, layout)
    size = 1.2 * np.abs(np.asarray(x, np.float64)).max()
    unit = float(jnp.finfo(x.dtype).eps) / 2
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= 3 * size * oracles.EPS32 + np.abs(want) * unit * (1 + 1e-3))
    rotary_dim = 2 * cos.shape[-1]
    np.testing.assert_array_equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize(("form", "layout"), XLA_FORMS)
@pytest.mark.parametrize(  # whole heads; heads of several, and of no whole number of rotary_dim
    ("head_dim", "rotary_dim"),
    [
        pytest.param(128, 128, marks=full),
        (48, 12),
        (64, 20),
        pytest.param(12, 10, marks=full),
        (7, 4),
        (8, 2),
        (4, 4),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=full)])
def test_each_form_for_xla_is_the_complex_product_rounded_once(form, layout, head_dim, rotary_dim, dtype):
    """A CPU takes the last form; other chips choose by layout and partial heads."""
    if layout == "interleaved" and head_dim % 2:
        head_dim += 1
    xs, cos, sin = inputs(head_dim, rotary_dim, dtype, length=9)
    for x in xs:
        assert_rotated(jitted[form](x, cos, sin, layout), x, cos, sin, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotary_dim", [32, 8])
def test_a_cpu_rotates_in_a_single_loop(layout, rotary_dim):
    """Inlined or joined, the rotation becomes several loops, or one that is not vectorised."""
    (x, _), cos, sin = inputs(32, rotary_dim, jnp.bfloat16, length=16)
    turn = jax.jit(lambda x, cos, sin: rope_jax.rotate(x + 1, rope_jax.Rotation(cos, sin), layout=layout) * 2)
    hlo = turn.lower(x, cos, sin).compile().as_text()
    sizes = f"{32 // rotary_dim},2,{rotary_dim // 2}"
    if layout == "interleaved":
        sizes = f"{32 // rotary_dim},{rotary_dim // 2},2"
    body = hlo[hlo.index("\n%rotate_pairs") :].split("\n}")[0]
    assert body.count(" fusion(") == 1 and f"bf16[2,16,4,{sizes}]" in body.split("ROOT")[1]


@pytest.mark.parametrize("layout", LAYOUTS)
class TestTheKernelInterpreted:
    @pytest.mark.parametrize(
        ("head_dim", "rotary_dim"),
        [pytest.param(*width, marks=[] if width in [(128, 64), (80, 32)] else full) for width in WIDTHS],
    )
    @pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=full), jnp.bfloat16])
    def test_is_the_complex_product_rounded_once(self, layout, head_dim, rotary_dim, dtype):
        xs, cos, sin = inputs(head_dim, rotary_dim, dtype)
        assert tpu.supports(xs)
        for x, got in zip(xs, rotate_interpreted(xs, cos, sin, layout=layout), strict=True):
            assert got.dtype == dtype and got.shape == x.shape
            assert_rotated(got, x, cos, sin, layout)

    @pytest.mark.parametrize("head_dim", [128, 64])
    @pytest.mark.parametrize(  # a single block, and several blocks, of which the last is short
        ("length", "batches"),
        [
            (1030, FEW_ROWS),
            pytest.param(1030, MORE_ROWS, marks=full),
            *(pytest.param(n, FEW_ROWS + MORE_ROWS, marks=full) for n in (128, 129, 511)),
        ],
    )
    def test_any_length_any_rows(self, layout, head_dim, length, batches):
        for batch, shared in batches:
            xs, cos, sin = inputs(head_dim, head_dim, batch=batch, length=length, heads=(2,), shared=shared)
            (got,) = rotate_interpreted(xs, cos, sin, layout=layout)
            parts = (np.broadcast_to(part, (*batch, *part.shape[-2:])) for part in (cos, sin))
            assert_rotated(got, xs[0], *parts, layout)

    @pytest.mark.parametrize("head_dim", [128, pytest.param(64, marks=full)])
    def test_rows_of_one_axis_that_share_a_rotation_along_another(self, layout, head_dim):
        xs, cos, sin = inputs(head_dim, head_dim, batch=(2, 3))
        for index in (np.s_[:1], np.s_[:, :1]):
            part = cos[index], sin[index]
            got = rotate_interpreted(xs, *part, layout=layout)
            want = [jitted[primitive.rotate_by_parts](x, *part, layout) for x in xs]
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, atol=6 * oracles.EPS32)

    @pytest.mark.parametrize(
        "rows", [(), (3,), (2, 1), pytest.param((1, 3), marks=full), pytest.param((2, 3), marks=full)]
    )
    @pytest.mark.parametrize("head_dim", [128, pytest.param(64, marks=full)])
    def test_heads_before_tokens_are_rows_that_share_a_rotation(self, layout, head_dim, rows):
        (x,), *_ = inputs(head_dim, head_dim, batch=(2, 3), heads=(1,))
        _, cos, sin = inputs(head_dim, head_dim, batch=rows, seed=1)
        (got,) = rotate_interpreted([x], cos, sin, layout=layout)
        assert_rotated(got, x, *(np.broadcast_to(part, (2, 3, *part.shape[-2:])) for part in (cos, sin)), layout)

    @pytest.mark.parametrize("head_dim", [128, 64])
    def test_features_from_rotary_dim_on_pass_bit_for_bit(self, layout, head_dim):
        odd_ones = np.resize(
            np.array([-0.0, np.inf, np.nan, 1e-42, -np.inf, 3.14159274], np.float32), head_dim - 32
        )
        row = np.concatenate([np.ones(32, np.float32), odd_ones])
        x = jnp.asarray(np.broadcast_to(row, (130, 2, head_dim)))
        cos, sin = jnp.full((130, 16), 0.6), jnp.full((130, 16), 0.8)
        (got,) = rotate_interpreted([x], cos, sin, layout=layout)
        kept = np.asarray(got[..., 32:]).view(np.uint32)
        np.testing.assert_array_equal(kept, np.broadcast_to(odd_ones.view(np.uint32), kept.shape))
        assert np.all(np.isfinite(got[..., :32]))

    @full
    def test_the_block_of_many_wide_heads_is_still_whole_registers(self, layout):
        xs, cos, sin = inputs(256, 256, batch=(1,), length=140, heads=(48, 16))
        for x, got in zip(xs, rotate_interpreted(xs, cos, sin, layout=layout), strict=True):
            assert_rotated(got, x, cos, sin, layout)


@pytest.mark.parametrize(
    ("shapes", "dtype", "supported"),
    [
        ([(1, 128, 4, 128)], jnp.bfloat16, True),
        ([(128, 1, 16)], jnp.float32, True),
        ([(1, 127, 4, 128)], jnp.bfloat16, False),  # a decode step
        ([(1, 128, 4, 120)], jnp.bfloat16, False),  # half a register
        ([(1, 128, 4, 128)], jnp.float16, False),
        ([(1, 128, 4, 128), (1, 128, 2, 128)], jnp.bfloat16, True),
        ([(1, 128, 4, 128), (1, 128, 2, 64)], jnp.bfloat16, False),
        ([(2, 128, 4, 128), (1, 128, 4, 128)], jnp.bfloat16, False),
        ([(0, 128, 4, 128)], jnp.bfloat16, False),
        ([(1, 128, 128, 64), (1, 128, 1, 64)], jnp.bfloat16, True),
        ([(1, 128, 128, 64), (1, 128, 1, 64)], jnp.float32, False),  # the smallest block is too large
    ],
)
def test_shapes_and_dtypes_of_the_kernel(shapes, dtype, supported):
    assert tpu.supports([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]) == supported


def test_is_a_single_operation_until_it_is_lowered():
    xs, cos, sin = inputs(16, 16, length=3)
    rotation = rope_jax.Rotation(cos, sin)
    rope = rope_jax.Rope(16, rope_jax.Standard())

    def operations(fn, *args):
        return [equation.primitive.name for equation in jax.make_jaxpr(fn)(*args).eqns]

    assert operations(lambda x: rope_jax.rotate(x, rotation), xs[0]) == ["rotate"]
    both = operations(lambda q, k: rope(q, k, jnp.arange(3)), *xs)
    assert both.count("rotate") == 1  # queries and keys in a single launch


AXES = list(itertools.product([None, 0, 1], [None, 0, 1], [None, 0]))[1:]
VMAP_IN_SHORT = [(0, None, None), (None, 1, 0), (1, 0, None)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [pytest.param(axes, marks=[] if axes in VMAP_IN_SHORT else full) for axes in AXES])
def test_vmap_along_any_axes(layout, axes):
    """x, cos and sin, each along its own axis, or shared."""
    rng = np.random.default_rng(1)

    def random(shape, axis):
        return jnp.asarray(rng.normal(size=shape if axis is None else np.insert(shape, axis, 2)), jnp.float32)

    x, cos, sin = (random(s, a) for s, a in zip(((2, 5, 3, 8), (5, 4), (5, 4)), axes, strict=True))
    fn = lambda x, cos, sin: rope_jax.rotate(x, rope_jax.Rotation(cos, sin), layout=layout)
    one = lambda array, axis, i: array if axis is None else jnp.take(array, i, axis)
    want = [fn(*(one(array, axis, i) for array, axis in zip((x, cos, sin), axes, strict=True))) for i in range(2)]
    got = jax.vmap(fn, in_axes=axes)(x, cos, sin)
    np.testing.assert_allclose(got, jnp.stack(want), atol=4 * oracles.EPS32 * 16)
    pull = lambda x, cos, sin: jax.vjp(lambda x: fn(x, cos, sin), x)[1](jnp.sin(x))[0]
    want = [pull(*(one(array, axis, i) for array, axis in zip((x, cos, sin), axes, strict=True))) for i in range(2)]
    back = jax.vmap(pull, in_axes=axes)(x, cos, sin)
    np.testing.assert_allclose(back, jnp.stack(want), atol=4 * oracles.EPS32 * 16)


class TestSeveralArrays:
    ROPE = rope_jax.Rope(8, rope_jax.Standard())
    Q = jax.random.normal(jax.random.key(0), (3, 4, 5, 2, 8))  # [batches, B, T, N, H]
    K = jax.random.normal(jax.random.key(1), (5, 1, 8))
    POSITIONS = jnp.arange(5)

    @pytest.mark.full  # bit for bit only as optimised programs
    def test_an_unbatched_array_is_rotated_once(self):
        q, k = jax.vmap(lambda q: self.ROPE(q, self.K, self.POSITIONS), out_axes=(0, None))(self.Q)
        want_q, want_k = self.ROPE(self.Q, self.K, self.POSITIONS)
        np.testing.assert_array_equal(k, want_k)
        np.testing.assert_array_equal(q, want_q)

    def test_ranks_that_differ(self):
        positions = jnp.stack([self.POSITIONS, self.POSITIONS + 9])
        q, k = jax.vmap(lambda positions: self.ROPE(self.Q, self.K, positions))(positions)
        for i in range(2):
            want_q, want_k = self.ROPE(self.Q, self.K, positions[i])
            np.testing.assert_allclose(q[i], want_q, atol=1e-6)
            np.testing.assert_allclose(k[i], want_k, atol=1e-6)

    def test_a_gradient_in_q_alone_saves_nothing_of_k(self):
        _, pull = jax.vjp(lambda q: self.ROPE(q, self.Q[0, :, :, :1], self.POSITIONS), self.Q[0])
        assert max(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size")) <= 5 * 4
        (got,) = pull((jnp.zeros_like(self.Q[0]), jnp.ones((4, 5, 1, 8))))
        assert not np.any(got)

    def test_any_sequence_of_arrays(self):
        rotation = self.ROPE.rotation(self.POSITIONS)
        assert len(self.ROPE.rotate_all((x for x in (self.K, self.K)), rotation)) == 2
        assert self.ROPE.rotate_all([], rotation) == []


def test_with_jit_switched_off():
    xs, cos, sin = inputs(8, 8, length=3)
    rotation = rope_jax.Rotation(cos, sin)
    both = lambda x: (
        rope_jax.rotate(x, rotation),
        jax.grad(lambda x: jnp.sum(jnp.sin(rope_jax.rotate(x, rotation))))(x),
    )
    with jax.disable_jit():
        got = both(xs[0])
    for each, want in zip(got, both(xs[0]), strict=True):
        np.testing.assert_allclose(each, want, atol=1e-6)


def test_a_second_call_compiles_nothing():
    compiled = []
    rope = rope_jax.Rope(24, rope_jax.Standard())
    x = jnp.ones((2, 3, 1, 24))

    def listen(event, seconds, **_):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    positions = [jnp.arange(3, dtype=jnp.int32) + i for i in range(3)]
    rope(x, x, positions[0])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for later in positions[1:]:
            rope(x, x, later)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "rotary_dim", [2, 6]
)  # of a head of five times 2; of a head of 14, no whole number of times 6
def test_every_bit_of_narrow_floats_passes(layout, dtype, rotary_dim):
    bits = np.arange(2**16, dtype=np.uint16).reshape(-1, 1, 8)
    x = jnp.asarray(np.concatenate([np.zeros_like(bits[..., :rotary_dim]), bits], axis=-1).view(dtype))
    cos, sin = (jnp.full((len(bits), rotary_dim // 2), number) for number in (0.6, 0.8))
    got = jax.jit(lambda x: rope_jax.rotate(x, rope_jax.Rotation(cos, sin), layout=layout))(x)
    np.testing.assert_array_equal(np.asarray(got)[..., rotary_dim:].view(np.uint16), bits)


def test_a_tangent_of_both_is_rounded_once():
    """d(x cos) = dx cos + x dcos in bfloat16, where the two nearly cancel."""
    xs, cos, sin = inputs(64, 64, jnp.bfloat16, length=40)
    rotation = rope_jax.Rotation(cos, sin)
    x = xs[0]
    moves = -x, rope_jax.Rotation(cos * 1.01, sin * 1.01)
    _, got = jax.jvp(rope_jax.rotate, (x, rotation), moves)
    exact = oracles.rotate_features(-np.asarray(x, np.float64), cos, sin, "half")
    exact += oracles.rotate_features(x, moves[1].cos, moves[1].sin, "half")
    size = np.abs(np.asarray(x, np.float64)).max()
    unit = float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert np.all(
        np.abs(np.asarray(got, np.float64) - exact) <= 12 * size * oracles.EPS32 + np.abs(exact) * unit * 1.001
    )


def test_on_four_devices():
    """Replicated arrays stay replicated, sharded arrays stay sharded, and so do their derivatives."""
    code = """if True:
        import jax, jax.numpy as jnp, numpy as np, rope_jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        rope, positions = rope_jax.Rope(8, rope_jax.Standard()), jnp.arange(8)[None]
        q = jax.random.normal(jax.random.key(0), (4, 8, 4, 8))
        k = jax.random.normal(jax.random.key(1), (4, 8, 1, 8))
        want = rope(q, k, positions)
        mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
        heads = P(None, None, "model")
        split = jax.jit(jax.shard_map(lambda q, k: rope(q, k, positions), mesh=mesh, in_specs=(heads, P()), out_specs=(heads, P())))
        loss = lambda rotate: lambda q, k: sum(jnp.sum(jnp.sin(x)) for x in rotate(q, k))
        plain = jax.grad(loss(lambda q, k: rope(q, k, positions)), (0, 1))(q, k)
        for got, expected in zip((*split(q, k), *jax.jit(jax.grad(loss(split), (0, 1)))(q, k)), (*want, *plain)):
            np.testing.assert_allclose(got, expected, atol=1e-5)

        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
        with jax.set_mesh(mesh):
            for spec, rotation_spec in ((P("a", None, "b"), P()), (P("a", None, "b"), P("a")), (P(), P("a"))):
                x = jax.device_put(q, NamedSharding(mesh, spec))
                rotation = rope.rotation(jnp.broadcast_to(positions, (4, 8)))
                rotation = jax.tree.map(lambda part: jax.device_put(part, NamedSharding(mesh, rotation_spec)), rotation)
                got = jax.jit(rope.rotate)(x, rotation)
                assert "a" in jax.typeof(got).sharding.spec, jax.typeof(got)
                np.testing.assert_allclose(got, want[0], atol=1e-5)
                dx, drotation = jax.jit(jax.grad(lambda x, rotation: jnp.sum(jnp.sin(rope.rotate(x, rotation))), (0, 1)))(x, rotation)
                np.testing.assert_allclose(dx, plain[0], atol=1e-5)
                assert jax.typeof(dx) == jax.typeof(x), (jax.typeof(dx), jax.typeof(x))
            for layout, rotary_dim in (("half", 4), ("interleaved", 4), ("half", 6), ("interleaved", 6)):
                partial = rope_jax.Rope(8, rope_jax.Standard(), rotary_dim=rotary_dim, layout=layout)
                rotation = jax.tree.map(jnp.asarray, partial.rotation(jnp.broadcast_to(positions, (4, 8))))
                want = np.asarray(partial.rotate(q, rotation))
                rotation = jax.tree.map(lambda part: jax.device_put(part, NamedSharding(mesh, P("a"))), rotation)
                got = jax.jit(partial.rotate)(jax.device_put(q, NamedSharding(mesh, P())), rotation)
                assert "a" in jax.typeof(got).sharding.spec, jax.typeof(got)
                np.testing.assert_allclose(got, want, atol=1e-5)
    """
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_rotation_that_differs_by_device_under_shard_map():
    mesh = jax.make_mesh((1,), ("seq",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 4, 8)), jnp.float32)
    rope = rope_jax.Rope(8, rope_jax.Standard())

    def rotated(x):
        start = jax.lax.axis_index("seq").astype(jnp.int32) + 7
        return rope.rotate(x, rope.rotation(jnp.arange(8, dtype=jnp.int32)[None] + start))

    fn = jax.shard_map(rotated, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("seq"))
    want = rope.rotate(x, rope.rotation(jnp.arange(8)[None] + 7))
    np.testing.assert_allclose(jax.jit(fn)(x), want, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(fn(x) * want)))(x)
    np.testing.assert_allclose(gradient, x, atol=2e-6)  # the inverse rotation of rotated features


def test_refusals():
    xs, cos, sin = inputs(128, 128, length=128)
    rotation = rope_jax.Rotation(cos, sin)
    with pytest.raises(
        ValueError, match=r"implementation must be None or one of \('xla', 'pallas', 'plain'\), got 'triton'"
    ):
        rope_jax.rotate(xs[0], rotation, implementation="triton")
    with pytest.raises(
        ValueError, match="implementation must be None or 'xla' on anything but a TPU, got 'pallas'"
    ):
        jax.jit(lambda x: rope_jax.rotate(x, rotation, implementation="pallas")).lower(xs[0]).compile()
    with pytest.raises(
        ValueError, match="implementation must be None or 'xla' on anything but a TPU, got 'pallas'"
    ):
        rope_jax.rotate(xs[0], rotation, implementation="pallas")
    for wrong in (None, jnp.arange(128), (cos, sin, sin), rope_jax.Standard()(128)):
        with pytest.raises(TypeError, match="rotation must be a Rotation, as rope.rotation"):
            rope_jax.rotate(xs[0], wrong)
    with pytest.raises(TypeError, match="rotation.cos must be floating, got dtype complex64"):
        rope_jax.rotate(xs[0], rope_jax.Rotation(cos.astype(jnp.complex64), sin))
