"""Programs around jax's splash kernel from the TPU compiler: copies, memory, and compilation for each generation.

libtpu compiles for a TPU on a machine without TPU. Without libtpu, these tests are skipped."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import rope_jax
from rope_jax.attention.kernels import splash

pytest.importorskip("libtpu")
full = pytest.mark.full
GENERATIONS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
BF16 = jnp.bfloat16


pytestmark = pytest.mark.usefixtures("no_tpu_here")


def compiled(generation, fn, *args):
    """The optimised program for one chip of a generation."""
    place = SingleDeviceSharding(topologies.get_topology_desc(GENERATIONS[generation], "tpu").devices[0])
    args = [jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=place) for arg in args]
    return jax.jit(fn).lower(*args).compile()


def kernels(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')


def attention(**options):
    """Splash with its backward pass, for ``[B, T, N, H]``."""

    @jax.custom_vjp
    def attend(q, k, v):
        return splash.forward(q, k, v, None, **options, save_log_total=False)[0]

    def forward(q, k, v):
        out, log_total = splash.forward(q, k, v, None, **options)
        return out, (q, k, v, out, log_total)

    def backward(residuals, dout):
        q, k, v, out, log_total = residuals
        return splash.backward(q, k, v, None, out, log_total, dout, **options)

    attend.defvjp(forward, backward)
    return lambda q, k, v: attend(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)


def layer(head_dim):
    rope = rope_jax.Rope(head_dim, rope_jax.Standard())
    attend = attention(causal=True, window=None, scale=head_dim**-0.5, logit_cap=None)

    def fn(x, wq, wk, wv, wo, cos, sin):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in (wq, wk, wv))
        q, k = rope.rotate_all([q, k], rope_jax.Rotation(cos, sin))
        return jnp.einsum("btnh,nhd->btd", attend(q, k, v), wo)

    return fn


def with_backward(fn):
    def both(x, *arrays):
        *weights, cos, sin = arrays
        out, transpose = jax.vjp(lambda *primals: fn(*primals, cos, sin), x, *weights)
        return transpose(out)

    return both


def arguments(length, head_dim=128, heads=32, kv_heads=8, width=4096):
    q, kv = (width, heads, head_dim), (width, kv_heads, head_dim)
    shapes = [(1, length, width), q, kv, kv, (heads, head_dim, width)]
    part = jax.ShapeDtypeStruct((1, length, head_dim // 2), jnp.float32)
    return [*(jax.ShapeDtypeStruct(shape, BF16) for shape in shapes), part, part]


def copied(program, length):
    """Sizes of all arrays with an axis of ``length`` tokens that the program copies or transposes."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", program.as_text())
    sizes = [[int(size) for size in shape.split(",")] for shape in shapes]
    return [int(np.prod(each)) for each in sizes if length in each]


@pytest.mark.parametrize("generation", ["v6e", *(pytest.param(name, marks=full) for name in ("v5e", "v5p"))])
def test_nothing_is_copied_between_projection_rotation_attention_and_output(generation):
    small = dict(heads=8, kv_heads=2, width=1024)
    forward = compiled(generation, layer(128), *arguments(2048, **small))
    assert kernels(forward) == 2
    # cos and sin may be copied; q, k, v and the output are not.
    assert max(copied(forward, 2048), default=0) <= 2048 * 64
    backward = compiled(generation, with_backward(layer(128)), *arguments(2048, **small))
    assert kernels(backward) == 5
    assert max(copied(backward, 2048), default=0) <= 2048 * 64  # or the sums of softmax, 2048 for each head


@full
@pytest.mark.parametrize("generation", ["v5p", "v6e"])
def test_memory_of_a_layer(generation):
    def temporaries(fn, length):
        return compiled(generation, fn, *arguments(length)).memory_analysis().temp_size_in_bytes

    assert temporaries(layer(128), 8192) < 200e6
    assert temporaries(with_backward(layer(128)), 32768) < 2e9


KINDS = [
    dict(causal=True, window=None, logit_cap=30.0),
    dict(causal=False, window=None, logit_cap=None),
    dict(causal=True, window=1500, logit_cap=None),
]


def programs():
    shapes = [(128, BF16), (256, jnp.float32), (64, BF16), (80, jnp.float32), (256, BF16)]
    for (head_dim, dtype), kind, generation in itertools.product(shapes, KINDS, GENERATIONS):
        marks = [] if (head_dim, kind, generation) == (256, KINDS[0], "v5e") and dtype != BF16 else full
        yield pytest.param(generation, head_dim, dtype, kind, marks=marks)


def both_passes(q, k, segments, dout, dlog_total, **options):
    out, log_total = splash.forward(q, k, k, segments, **options)
    return splash.backward(q, k, k, segments, out, log_total, dout, dlog_total=dlog_total, **options)


def inputs(length, head_dim, dtype):
    q, k = (jax.ShapeDtypeStruct((2, n, length, head_dim), dtype) for n in (2, 1))
    numbers = jax.ShapeDtypeStruct((2, length), jnp.int32)
    return q, k, numbers, q, jax.ShapeDtypeStruct((2, 2, length), jnp.float32)


@pytest.mark.parametrize(("generation", "head_dim", "dtype", "kind"), list(programs()))
def test_compiles(generation, head_dim, dtype, kind):
    fn = lambda *arrays: both_passes(*arrays, scale=0.1, **kind)
    many_blocks, one_block = (compiled(generation, fn, *inputs(length, head_dim, dtype)) for length in (2000, 500))
    assert (kernels(many_blocks), kernels(one_block)) == (3, 2)


@pytest.mark.parametrize("precision", ["high", pytest.param("highest", marks=full)])
def test_with_x64_and_a_high_precision(precision):
    fn = lambda *arrays: both_passes(*arrays, scale=0.1, **KINDS[0])
    with jax.enable_x64(True), jax.default_matmul_precision(precision):
        for dtype in (BF16, jnp.float32):
            assert kernels(compiled("v5e", fn, *inputs(300, 128, dtype))) == 2
