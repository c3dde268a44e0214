"""Of the turn as one operation: batching, shard_map, explicit sharding, who may take the kernel, and the kernel itself
in interpret mode. tests/test_tpu.py compiles it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, PartitionSpec

import rope_jax
from rope_jax import _turn
from rope_jax.kernels import tpu

LAYOUTS = ["half", "interleaved"]
WIDTHS = [(128, 128), (128, 64), (256, 256), (384, 96), (64, 64), (64, 20), (32, 32), (80, 32), (96, 96), (16, 2)]


def inputs(head_dim, rotary_dim, dtype=jnp.float32, batch=(2,), length=150, heads=(4, 1), shared=False, seed=0):
    rng = np.random.default_rng(seed)
    xs = [jnp.asarray(rng.normal(size=(*batch, length, n, head_dim)), dtype) for n in heads]
    positions = rng.integers(-(10**7), 10**7, (length,) if shared else (*batch, length))
    schedule = rope_jax.Yarn(factor=4.0, original_length=512)
    cos, sin = rope_jax.rotation(jnp.asarray(positions, jnp.int32), schedule(max(rotary_dim, 4)))
    return xs, cos[..., : rotary_dim // 2], sin[..., : rotary_dim // 2]


def assert_turned(got, x, cos, sin, layout):
    """To the tolerance of test_rotation: three roundings of float32, and one to x's dtype."""
    want = oracles.turn_features(x, cos, sin, layout)
    size = 1.2 * np.abs(np.asarray(x, np.float64)).max()
    unit = float(jnp.finfo(x.dtype).eps) / 2
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= 3 * size * oracles.EPS32 + np.abs(want) * unit * (1 + 1e-3))
    rotary_dim = 2 * cos.shape[-1]
    np.testing.assert_array_equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("form", [_turn.by_xla, _turn.by_partner])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (64, 20), (12, 10), (7, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_each_form_for_xla_is_the_complex_product_rounded_once(form, layout, head_dim, rotary_dim, dtype):
    """Whichever a chip takes: a CPU chooses by layout and dtype, the others take the first."""
    if layout == "interleaved" and head_dim % 2:
        head_dim += 1
    xs, cos, sin = inputs(head_dim, rotary_dim, dtype, length=9)
    for x in xs:
        assert_turned(jax.jit(form, static_argnums=3)(x, cos, sin, layout), x, cos, sin, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestTheKernelInterpreted:
    @pytest.mark.parametrize(("head_dim", "rotary_dim"), WIDTHS)
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_is_the_complex_product_rounded_once(self, layout, head_dim, rotary_dim, dtype):
        xs, cos, sin = inputs(head_dim, rotary_dim, dtype)
        assert tpu.takes(xs)
        for x, got in zip(xs, tpu.turn(xs, cos, sin, layout=layout, interpret=True), strict=True):
            assert got.dtype == dtype and got.shape == x.shape
            assert_turned(got, x, cos, sin, layout)

    @pytest.mark.parametrize("head_dim", [128, 64])
    @pytest.mark.parametrize("length", [128, 129, 511, 1030])  # one block, and several of which the last is short
    def test_any_length_any_rows(self, layout, head_dim, length):
        for batch, shared in [
            ((), True),
            ((1,), False),
            ((3,), True),
            ((3,), False),
            ((2, 2), False),
            ((2, 2), True),
        ]:
            xs, cos, sin = inputs(head_dim, head_dim, batch=batch, length=length, heads=(2,), shared=shared)
            (got,) = tpu.turn(xs, cos, sin, layout=layout, interpret=True)
            full = (np.broadcast_to(part, (*batch, *part.shape[-2:])) for part in (cos, sin))
            assert_turned(got, xs[0], *full, layout)

    @pytest.mark.parametrize("head_dim", [128, 64])
    def test_rows_of_one_axis_that_share_a_rotation_along_another(self, layout, head_dim):
        xs, cos, sin = inputs(head_dim, head_dim, batch=(2, 3))
        for index in (np.s_[:1], np.s_[:, :1]):
            part = cos[index], sin[index]
            got = tpu.turn(xs, *part, layout=layout, interpret=True)
            want = [_turn.by_xla(x, *part, layout) for x in xs]
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, atol=6 * oracles.EPS32)

    @pytest.mark.parametrize("head_dim", [128, 64])
    def test_features_from_rotary_dim_on_pass_bit_for_bit(self, layout, head_dim):
        odd_ones = np.resize(
            np.array([-0.0, np.inf, np.nan, 1e-42, -np.inf, 3.14159274], np.float32), head_dim - 32
        )
        row = np.concatenate([np.ones(32, np.float32), odd_ones])
        x = jnp.asarray(np.broadcast_to(row, (130, 2, head_dim)))
        cos, sin = jnp.full((130, 16), 0.6), jnp.full((130, 16), 0.8)
        (got,) = tpu.turn([x], cos, sin, layout=layout, interpret=True)
        kept = np.asarray(got[..., 32:]).view(np.uint32)
        np.testing.assert_array_equal(kept, np.broadcast_to(odd_ones.view(np.uint32), kept.shape))
        assert np.all(np.isfinite(got[..., :32]))

    def test_the_block_of_many_wide_heads_is_still_whole_registers(self, layout):
        xs, cos, sin = inputs(256, 256, batch=(1,), length=140, heads=(48, 16))
        for x, got in zip(xs, tpu.turn(xs, cos, sin, layout=layout, interpret=True), strict=True):
            assert_turned(got, x, cos, sin, layout)


@pytest.mark.parametrize(
    ("shapes", "dtype", "takes"),
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
def test_what_the_kernel_is_made_for(shapes, dtype, takes):
    assert tpu.takes([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]) == takes


def test_one_operation_until_it_is_known_where_it_runs():
    xs, cos, sin = inputs(16, 16, length=3)
    turn = rope_jax.Rotation(cos, sin)
    rope = rope_jax.Rope(16, rope_jax.Standard())

    def operations(fn, *args):
        return [equation.primitive.name for equation in jax.make_jaxpr(fn)(*args).eqns]

    assert operations(lambda x: rope_jax.rotate(x, turn), xs[0]) == ["rotate"]
    both = operations(lambda q, k: rope(q, k, jnp.arange(3)), *xs)
    assert both.count("rotate") == 1  # queries and keys in one launch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", list(itertools.product([None, 0, 1], [None, 0, 1], [None, 0]))[1:])
def test_vmap_along_any_axes(layout, axes):
    """x, cos and sin, each along an axis of its own, or shared."""
    rng = np.random.default_rng(1)

    def random(shape, axis):
        return jnp.asarray(rng.normal(size=shape if axis is None else np.insert(shape, axis, 2)), jnp.float32)

    x, cos, sin = (random(s, a) for s, a in zip(((2, 5, 3, 8), (5, 4), (5, 4)), axes, strict=True))
    fn = lambda x, cos, sin: rope_jax.rotate(x, rope_jax.Rotation(cos, sin), layout=layout)
    one = lambda array, axis, i: array if axis is None else jnp.take(array, i, axis)
    want = [fn(*(one(array, axis, i) for array, axis in zip((x, cos, sin), axes, strict=True))) for i in range(2)]
    got = jax.vmap(fn, in_axes=axes)(x, cos, sin)
    np.testing.assert_allclose(got, jnp.stack(want), atol=4 * oracles.EPS32 * 16)
    back = jax.vmap(lambda *args: jax.vjp(fn, *args)[1](jnp.ones((2, 5, 3, 8)))[0], in_axes=axes)(x, cos, sin)
    assert back.shape == got.shape and np.all(np.isfinite(back))


def test_a_rotation_that_differs_by_device_under_shard_map():
    mesh = jax.make_mesh((1,), ("seq",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 4, 8)), jnp.float32)
    rope = rope_jax.Rope(8, rope_jax.Standard())

    def turned(x):
        start = jax.lax.axis_index("seq").astype(jnp.int32) + 7
        return rope.rotate(x, rope.rotation(jnp.arange(8, dtype=jnp.int32)[None] + start))

    fn = jax.shard_map(turned, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("seq"))
    want = rope.rotate(x, rope.rotation(jnp.arange(8)[None] + 7))
    np.testing.assert_allclose(jax.jit(fn)(x), want, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(fn(x) * want)))(x)
    np.testing.assert_allclose(gradient, x, atol=2e-6)  # the inverse rotation of what was turned


def test_explicit_sharding_is_that_of_x():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    spec = PartitionSpec("data", None, "model", None)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, 8, 4, 8)), jax.NamedSharding(mesh, spec))
        turn = rope_jax.rotation(jnp.arange(8), rope_jax.Standard()(8))
        turned = jax.jit(rope_jax.rotate)(x, turn)
        assert jax.typeof(turned).sharding.spec == spec
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(rope_jax.rotate(x, turn) ** 2)))(x)
        assert jax.typeof(gradient).sharding.spec == spec


def test_refusals():
    xs, cos, sin = inputs(128, 128, length=128)
    turn = rope_jax.Rotation(cos, sin)
    with pytest.raises(
        ValueError, match=r"implementation must be None or one of \('xla', 'pallas'\), got 'triton'"
    ):
        rope_jax.rotate(xs[0], turn, implementation="triton")
    with pytest.raises(
        ValueError, match="implementation must be None or 'xla' on anything but a TPU, got 'pallas'"
    ):
        jax.jit(lambda x: rope_jax.rotate(x, turn, implementation="pallas")).lower(xs[0]).compile()
    with pytest.raises(
        ValueError, match="implementation must be None or 'xla' on anything but a TPU, got 'pallas'"
    ):
        rope_jax.rotate(xs[0], turn, implementation="pallas")
