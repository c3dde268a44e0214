"""Layers in plain operations, converted to ONNX by jax2onnx and run by onnx's own evaluator."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax

pytestmark = pytest.mark.oracle
jax2onnx = pytest.importorskip("jax2onnx")
reference = pytest.importorskip("onnx.reference")

B, T, N, K, H = 2, 6, 4, 2, 8
ROPE = rope_jax.Rope(H, rope_jax.Yarn(factor=4.0, original_length=4))
INTERLEAVED = rope_jax.Rope(H, rope_jax.Standard(), layout="interleaved", rotary_dim=4)


@pytest.fixture(autouse=True)
def fresh_programs():
    """The converter traces jax with functions of its own, which jax would keep among its programs."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def agrees(function, *arguments):
    """Compares the converted function with the function."""
    want = np.asarray(function(*arguments))
    jax.clear_caches()
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arguments]
    model = jax2onnx.to_onnx(function, inputs=shapes)
    names = [each.name for each in model.graph.input]
    given = dict(zip(names, map(np.asarray, arguments), strict=True))
    (got,) = reference.ReferenceEvaluator(model).run(None, given)
    np.testing.assert_allclose(got, want, atol=4e-6, rtol=0)


@pytest.mark.parametrize("rope", [ROPE, INTERLEAVED])
def test_rotate(rope):
    rotation = rope.rotation(jnp.arange(T))
    agrees(lambda x: rope.rotate(x, rotation, implementation="plain"), random(B, T, N, H))
    with pytest.raises(NotImplementedError, match="rotate"):
        agrees(lambda x: rope.rotate(x, rotation), random(B, T, N, H))


def test_rope_at_float_positions():
    """Exact phases are arithmetic on bits, which ONNX lacks: float positions take cos and sin."""
    agrees(lambda x, m: ROPE(x, x, m, implementation="plain")[0], random(B, T, N, H), jnp.arange(6.0)[None])


def test_attend():
    q, k, v = random(B, T, N, H), random(B, T, K, H, seed=1), random(B, T, K, H, seed=2)
    agrees(lambda q, k, v: rope_jax.attend(q, k, v, causal=True, window=3, implementation="plain"), q, k, v)


def test_a_layer():
    sizes = dict(num_heads=N, num_kv_heads=K, head_dim=H, rope=ROPE, qk_norm=True)
    layer, x = rope_jax.RotaryAttention(**sizes, implementation="plain"), random(B, T, 16)
    params = nn.unbox(layer.init(jax.random.key(0), x))
    agrees(lambda x: layer.apply(params, x, jnp.arange(6.0)), x)
