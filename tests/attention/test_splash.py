"""jax's splash kernel as it is called here, in interpret mode, beside float64: outputs, sums and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast import first
from jax.sharding import PartitionSpec

from rope_jax.attention.kernels import splash

B, N, K = 2, 4, 2


def inputs(length, head_dim, dtype, segments, seed=0):
    """q, k, v, segments, and cotangents of both results."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(B, n, length, head_dim)), dtype) for n in (N, K, K, N))
    dlog_total = jnp.asarray(rng.normal(size=(B, N, length)), jnp.float32)
    rows = {None: 0, "shared": 1, "packed": B}[segments]
    numbers = jnp.asarray(np.sort(rng.integers(0, 4, (rows, length))), jnp.int32) if rows else None
    return q, k, v, numbers, dout, dlog_total


def visible(length, segments, causal, window):
    distance = np.arange(length)[:, None] - np.arange(length)
    allowed = np.ones((1, 1, length, length), bool)
    if causal:
        allowed = allowed & (distance >= 0)
    if window is not None:
        allowed = allowed & (abs(distance) < window)
    if segments is not None:
        numbers = np.asarray(segments)
        allowed = allowed & (numbers[:, None, :, None] == numbers[:, None, None, :])
    return allowed


def exact(q, k, v, segments, dout, dlog_total, *, causal, window, scale, logit_cap):
    """In float64: output, logarithms of the sums, and the gradients of q, k and v."""
    q, k, v, dout, dlog_total = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlog_total))
    k, v = (np.repeat(x, N // K, axis=1) for x in (k, v))
    products = np.einsum("bnth,bnsh->bnts", q, k) * scale
    scores = products if logit_cap is None else logit_cap * np.tanh(products / logit_cap)
    scores = np.where(visible(q.shape[2], segments, causal, window), scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    log_total = np.log(np.exp(scores - largest).sum(-1)) + largest[..., 0]
    weights = np.exp(scores - log_total[..., None])
    out = np.einsum("bnts,bnsh->bnth", weights, v)

    dweights = np.einsum("bnth,bnsh->bnts", dout, v)
    shift = dlog_total - (dout * out).sum(-1)
    dproducts = weights * (dweights + shift[..., None]) * scale
    if logit_cap is not None:
        dproducts *= 1 - np.tanh(products / logit_cap) ** 2
    dq = np.einsum("bnts,bnsh->bnth", dproducts, k)
    dk = np.einsum("bnts,bnth->bnsh", dproducts, q)
    dv = np.einsum("bnts,bnth->bnsh", weights, dout)
    dk, dv = (x.reshape(B, K, N // K, *x.shape[2:]).sum(2) for x in (dk, dv))
    return out, log_total, dq, dk, dv


def both_passes(q, k, v, segments, dout, dlog_total, **options):
    out, log_total = splash.forward(q, k, v, segments, **options, interpret=True)
    options |= dict(dlog_total=dlog_total, interpret=True)
    return out, log_total, *splash.backward(q, k, v, segments, out, log_total, dout, **options)


def check(length, head_dim, dtype, segments=None, causal=True, window=None, logit_cap=None):
    arguments = inputs(length, head_dim, dtype, segments)
    options = dict(causal=causal, window=window, scale=head_dim**-0.5, logit_cap=logit_cap)
    got = jax.jit(lambda *arrays: both_passes(*arrays, **options))(*arguments)
    want = exact(*arguments, **options)
    q, k, v, *_ = arguments
    for x, like in zip(got, (q, None, q, k, v), strict=True):
        assert like is None or (x.shape, x.dtype) == (like.shape, like.dtype)
    assert got[1].dtype == jnp.float32
    narrow = dtype == jnp.bfloat16
    bounds = (2e-2, 2e-2, 2e-2, 2e-2, 2e-2) if narrow else (2e-6, 2e-6, 1e-5, 1e-5, 1e-5)
    for i, (x, y, bound) in enumerate(zip(got, want, bounds, strict=True)):
        largest = np.abs(y).max() if i > 1 else 1.0
        assert np.abs(np.asarray(x, np.float64) - y).max() <= bound * largest, i


F32, BF16 = jnp.float32, jnp.bfloat16
CASES = [
    dict(length=128, head_dim=64, dtype=F32),
    dict(length=200, head_dim=64, dtype=F32, causal=False),
    dict(length=130, head_dim=128, dtype=F32, causal=False, window=40, logit_cap=3.0, segments="packed"),
    dict(length=130, head_dim=128, dtype=BF16, window=40, logit_cap=3.0, segments="packed"),
    dict(length=200, head_dim=80, dtype=F32, segments="shared"),
    dict(length=128, head_dim=64, dtype=F32, causal=False),
    dict(length=256, head_dim=64, dtype=F32, window=1),
    dict(length=256, head_dim=64, dtype=F32, window=256),
    dict(length=256, head_dim=64, dtype=F32, causal=False, window=1000),
    dict(length=300, head_dim=96, dtype=F32, causal=False, segments="packed"),
    dict(length=300, head_dim=128, dtype=BF16, causal=False, segments="shared"),
    dict(length=300, head_dim=128, dtype=BF16),
    dict(length=1, head_dim=128, dtype=F32),
    dict(length=1100, head_dim=64, dtype=F32, segments="packed"),
    dict(length=1100, head_dim=64, dtype=F32, causal=False, window=300),
]


@pytest.mark.parametrize("case", first(5, CASES), ids=str)
def test_agrees_with_float64(case):
    check(**case)


@pytest.mark.parametrize(
    "case",
    first(
        1,
        [
            dict(segments="packed"),
            dict(window=150),
            dict(causal=False, window=100, logit_cap=3.0),
            dict(causal=False),
        ],
    ),
    ids=str,
)
def test_in_many_blocks(monkeypatch, case):
    monkeypatch.setattr(splash, "MIN_BLOCK", 128)
    monkeypatch.setattr(splash, "MAX_BLOCK", 256)
    check(600, 64, jnp.float32, **case)


def test_with_x64_and_without_leaks():
    with jax.enable_x64(True), jax.checking_leaks():
        splash._kernel.cache_clear()
        check(130, 64, jnp.float32, segments="shared")
        check(130, 64, jnp.float32, segments="packed")  # the tables are cached


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.full)])
def test_inside_shard_map(check_vma):
    q, k, v, segments, dout, dlog_total = inputs(130, 64, jnp.float32, "shared")
    options = dict(causal=True, window=None, scale=0.125, logit_cap=None)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        lambda *arrays: both_passes(*arrays, **options),
        mesh=mesh,
        in_specs=(split, split, split, whole, split, split),
        out_specs=split,
        check_vma=check_vma,
    )
    arrays = q, k, v, segments, dout, dlog_total
    for got, want in zip(jax.jit(sharded)(*arrays), both_passes(*arrays, **options), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_without_the_sums():
    q, k, v, *_ = inputs(130, 64, jnp.float32, None)
    options = dict(causal=True, window=None, scale=0.125, logit_cap=None, interpret=True)
    out, log_total = splash.forward(q, k, v, None, **options, save_log_total=False)
    assert log_total is None
    np.testing.assert_array_equal(out, splash.forward(q, k, v, None, **options)[0])


def test_a_power_of_two_is_an_exact_scale():
    q, k, v, *_ = inputs(130, 64, jnp.bfloat16, None)
    options = dict(causal=True, window=None, logit_cap=None, interpret=True)
    out, log_total = splash.forward(q, k, v, None, scale=0.125, **options)
    same, same_total = splash.forward(q * jnp.bfloat16(0.125), k, v, None, scale=1.0, **options)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(log_total, same_total)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


Q, KEYS = array(1, 4, 256, 128), array(1, 2, 256, 128)
REFUSED = [
    (array(1, 4, 256, 128, dtype=jnp.float16), array(1, 2, 256, 128, dtype=jnp.float16), "float16"),
    (Q, array(1, 2, 256, 128, dtype=jnp.float32), "bfloat16 and float32"),
    (Q, array(1, 2, 512, 128), "256 queries and 512 keys"),
    (Q, array(1, 3, 256, 128), "N must be a multiple of K, got 4 and 3"),
    (array(0, 4, 256, 128), array(0, 2, 256, 128), "must not be empty"),
    (array(1, 4, 256, 640), array(1, 2, 256, 640), "head_dim must be at most 256, got 640"),
]


@pytest.mark.parametrize(("q", "k", "reason"), REFUSED, ids=[each[2] for each in REFUSED])
def test_says_what_the_kernel_cannot_serve(q, k, reason):
    assert reason in splash.unsupported(q, k)


def test_says_when_jax_has_changed(monkeypatch):
    monkeypatch.setattr(splash.splash_attention_kernel, "_splash_attention_bwd_dq", lambda q, k, v: None)
    splash._moved.cache_clear()
    assert "_splash_attention_bwd_dq has changed" in splash.unsupported(Q, KEYS)
    monkeypatch.undo()
    splash._moved.cache_clear()
    assert splash.unsupported(Q, KEYS) is None


def test_serves_the_rest():
    for dtype in (jnp.bfloat16, jnp.float32):
        for head_dim in (8, 64, 80, 96, 128, 192, 256):
            for length in (1, 100, 256):
                q, k = (array(2, n, length, head_dim, dtype=dtype) for n in (4, 2))
                assert splash.unsupported(q, k, window=5) is None
    traced = jax.eval_shape(lambda: jnp.int32(5))
    assert "the window must be an int" in splash.unsupported(Q, KEYS, window=traced)
    (batch,) = jax.export.symbolic_shape("b")
    assert "must be known" in splash.unsupported(array(batch, 4, 256, 128), array(batch, 2, 256, 128))


def test_blocks_are_large_and_padding_is_short():
    for length in range(1, 9000, 7):
        for window in (None, 100):
            blocks = splash._blocks(array(1, 1, length, 128), window)
            assert blocks.length % blocks.block == blocks.block % blocks.compute == blocks.compute % 128 == 0
            assert blocks.block >= min(512, blocks.length) and blocks.compute < 1024
            assert 0 <= blocks.length - length < 512
            assert blocks.block <= (1024 if window is None else 512)
            if length <= 512:
                assert blocks.length - length < 128


def test_two_backward_kernels_for_many_blocks():
    assert [splash._blocks(array(1, 1, length, 128), None).fused for length in (100, 1024, 1025)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("sides", [(None, 0), (99, 0), (99, 99), (0, 0), (1000, 1000)])
def test_quick_masks_are_the_masks(sides):
    quick, plain = (kind((512, 512), sides, 0) for kind in (splash._Band, splash.jax_splash.LocalMask))
    for i in range(0, 512, 64):
        for j in range(0, 512, 128):
            block = slice(i, i + 64), slice(j, j + 128)
            np.testing.assert_array_equal(quick[block], plain[block])
