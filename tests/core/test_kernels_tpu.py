"""Programs from the TPU compiler: choice of the kernel, compilation for each generation, and the program around it.

libtpu compiles for a TPU on a machine without TPU. Without libtpu, these tests are skipped."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import rope_jax

pytest.importorskip("libtpu")
full = pytest.mark.full
GENERATIONS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


pytestmark = pytest.mark.usefixtures("no_tpu_here")


def devices(generation):
    return topologies.get_topology_desc(GENERATIONS[generation], "tpu").devices


def compiled(generation, fn, *args):
    """The optimised program for one chip of a generation."""
    place = SingleDeviceSharding(devices(generation)[0])
    args = [jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=place) for arg in args]
    return jax.jit(fn).lower(*args).compile().as_text()


def kernels(hlo):
    return hlo.count('custom_call_target="tpu_custom_call"')


def copied(hlo, length):
    """Sizes of all arrays with an axis of ``length`` tokens that the program copies or transposes."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", hlo)
    sizes = [[int(size) for size in shape.split(",")] for shape in shapes]
    return [int(np.prod(each)) for each in sizes if length in each]


def shapes(head_dim, rotary_dim, length=1024, heads=(4, 2), batch=2, dtype=jnp.bfloat16, rows=1):
    xs = [jax.ShapeDtypeStruct((batch, length, n, head_dim), dtype) for n in heads]
    part = jax.ShapeDtypeStruct((rows, length, rotary_dim // 2), jnp.float32)
    return *xs, part, part


def rotate_with(layout, **options):
    def fn(q, k, cos, sin):
        rope = rope_jax.Rope(q.shape[-1], rope_jax.Standard(), rotary_dim=2 * cos.shape[-1], layout=layout)
        return rope.rotate_all([q, k], rope_jax.Rotation(cos, sin), **options)

    return fn


CASES = [
    dict(head_dim=128, rotary_dim=128),
    dict(head_dim=128, rotary_dim=64, length=1000, rows=2),
    dict(head_dim=64, rotary_dim=64, length=1000, rows=2),
    dict(head_dim=80, rotary_dim=32, dtype=jnp.float32, heads=(3, 1)),
    dict(head_dim=256, rotary_dim=256, heads=(48, 16), batch=1, dtype=jnp.float32),
]
IN_SHORT = {("v5e", "half", 64, 64), ("v6e", "interleaved", 80, 32)}


def programs():
    for case, generation, layout in itertools.product(CASES, GENERATIONS, ["half", "interleaved"]):
        name = generation, layout, case["head_dim"], case["rotary_dim"]
        marks = [] if name in IN_SHORT else full
        yield pytest.param(generation, layout, case, marks=marks, id="-".join(map(str, name)))


@pytest.mark.parametrize(("generation", "layout", "case"), list(programs()))
def test_one_kernel_for_queries_and_keys(generation, layout, case):
    assert kernels(compiled(generation, rotate_with(layout), *shapes(**case))) == 1


@pytest.mark.parametrize("layout", ["half", pytest.param("interleaved", marks=full)])
@pytest.mark.parametrize("head_dim", [pytest.param(128, marks=full), 64])
def test_nothing_is_copied_between_a_projection_and_the_kernel(layout, head_dim):
    def projected(x, wq, wk, cos, sin):
        q, k = (jnp.einsum("btd,dnh->btnh", x, w) for w in (wq, wk))
        return tuple(x.swapaxes(1, 2) for x in rotate_with(layout)(q, k, cos, sin))  # as attention reads them

    bf16 = jnp.bfloat16
    weights = [jax.ShapeDtypeStruct((1024, n * 128 // head_dim, head_dim), bf16) for n in (8, 2)]
    part = jax.ShapeDtypeStruct((1, 2048, head_dim // 2), jnp.float32)
    hlo = compiled("v6e", projected, jax.ShapeDtypeStruct((1, 2048, 1024), bf16), *weights, part, part)
    assert kernels(hlo) == 1
    assert max(copied(hlo, 2048), default=0) <= 2048 * head_dim  # cos and sin may be, q and k are not


@pytest.mark.parametrize("layout", ["half", pytest.param("interleaved", marks=full)])
@pytest.mark.parametrize("rows", [2, pytest.param(1, marks=full)])
def test_heads_before_tokens_share_the_table_of_their_row(layout, rows):
    """The largest array of float32 is the table ``[rows, 1, T, H]``: no head has a copy of it."""
    x = jax.ShapeDtypeStruct((2, 8, 1024, 128), jnp.bfloat16)
    part = jax.ShapeDtypeStruct((rows, 1024, 64), jnp.float32)

    def fn(x, cos, sin):
        return rope_jax.rotate(x, rope_jax.Rotation(cos, sin), layout=layout, token_axis=-2)

    hlo = compiled("v5e", fn, x, part, part)
    assert kernels(hlo) == 1
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", hlo)]
    assert max(sizes) == rows * 1024 * 128
    assert max(copied(hlo, 1024), default=0) <= rows * 1024 * 128


@pytest.mark.parametrize("head_dim", [128, pytest.param(64, marks=full)])
def test_with_x64(head_dim):
    with jax.enable_x64(True):
        assert kernels(compiled("v5e", rotate_with("half"), *shapes(head_dim, head_dim, batch=1))) == 1


@full
def test_backward_and_batched():
    q, k, cos, sin = shapes(128, 128)

    def loss(q, k, cos, sin):
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in rotate_with("half")(q, k, cos, sin))

    assert kernels(compiled("v5e", jax.grad(loss, argnums=(0, 1)), q, k, cos, sin)) == 2
    over_batch = jax.vmap(rotate_with("half"), in_axes=(0, 0, None, None))
    shared = (jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in (cos, sin))
    assert kernels(compiled("v5e", over_batch, q, k, *shared)) == 1
    learned = jax.grad(loss, argnums=(0, 1, 2, 3))
    assert kernels(compiled("v5e", learned, q, k, cos, sin)) == 2


def test_an_attention_layer_forward_and_backward():
    rope = rope_jax.Rope(128, rope_jax.Standard())
    attention = rope_jax.RotaryAttention(
        num_heads=4, num_kv_heads=2, head_dim=128, rope=rope, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    x = jax.ShapeDtypeStruct((2, 256, 128), jnp.bfloat16)
    params = jax.eval_shape(attention.init, jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(params)

    def count(module):
        def loss(x, *leaves):
            return jnp.sum(module.apply(tree.unflatten(leaves), x).astype(jnp.float32))

        return kernels(compiled("v6e", jax.grad(loss, argnums=(0, 1)), x, *leaves))

    assert count(attention) == 2
    assert count(attention.clone(implementation="xla")) == 0


def test_shapes_and_dtypes_left_to_xla():
    for case in (
        dict(length=1),
        dict(dtype=jnp.float16),
        dict(head_dim=40, rotary_dim=40),
    ):
        args = shapes(**{"head_dim": 128, "rotary_dim": 128, **case})
        assert kernels(compiled("v5e", rotate_with("half"), *args)) == 0
        with pytest.raises(
            ValueError, match=r"implementation must be None or 'xla' for \w+\[2,\d+,4,\d+\], .*'pallas'"
        ):
            compiled("v5e", rotate_with("half", implementation="pallas"), *args)
    assert kernels(compiled("v5e", rotate_with("half", implementation="xla"), *shapes(128, 128))) == 0
    assert kernels(compiled("v5e", rotate_with("half", implementation="pallas"), *shapes(128, 128))) == 1


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [128, pytest.param(64, marks=full)])
@pytest.mark.parametrize("generation", [pytest.param("v5e", marks=full), "v5p", pytest.param("v6e", marks=full)])
def test_a_decode_step_does_not_copy_the_weights(generation, layout, rotary_dim):
    """An axis for the two features of a pair makes the compiler write the weights out in another order."""

    def project(x, weights, cos, sin):
        x = jnp.einsum("btd,dnh->btnh", x, weights)
        return rope_jax.rotate(x, rope_jax.Rotation(cos, sin), layout=layout)

    x, weights = jnp.ones((8, 1, 1024), jnp.bfloat16), jnp.ones((1024, 32, 128), jnp.bfloat16)
    part = jnp.ones((8, 1, rotary_dim // 2))
    hlo = compiled(generation, project, x, weights, part, part)
    assert kernels(hlo) == 0
    written = re.findall(r" = \w+\[([\d,]*)\]\S* (?:copy|fusion|transpose|reshape)\(", hlo[hlo.index("\nENTRY") :])
    assert written and max(np.prod([int(n) for n in sizes.split(",") if n]) for sizes in written) < weights.size / 8


def test_many_devices():
    """A program that XLA divides takes no kernel; inside shard_map each device does. Nothing is communicated."""
    mesh = jax.sharding.Mesh(
        np.array(devices("v5e")).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    spec, whole = PartitionSpec("data", None, "model"), PartitionSpec()
    args = shapes(128, 128)
    specs = (spec, spec, whole, whole)
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s))
        for a, s in zip(args, specs, strict=True)
    ]

    def lowered(fn):
        return jax.jit(fn).lower(*placed).compile().as_text()

    alone = jax.shard_map(rotate_with("half"), mesh=mesh, in_specs=specs, out_specs=[spec, spec])
    partly = jax.shard_map(
        rotate_with("half"),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec("data"), whole, whole),
        out_specs=[PartitionSpec("data")] * 2,
        axis_names={"data"},
    )
    for fn, expected in ((rotate_with("half"), 0), (alone, 1), (partly, 0)):
        hlo = lowered(fn)
        assert kernels(hlo) == expected
        assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", hlo)
