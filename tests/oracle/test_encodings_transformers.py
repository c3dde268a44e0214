"""T5's bias, BLOOM's ALiBi and Marian's sines against transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402
import oracles  # noqa: E402
from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

import rope_jax  # noqa: E402

pytestmark = pytest.mark.oracle

B, T, N, H, D = 2, 300, 4, 8, 32
FAR = np.arange(-5000, 5001)  # tokens from the key to the query; theirs are from the query to the key


def t5_layer(causal):
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=D, d_kv=H, num_heads=N, dropout_rate=0.0, is_decoder=causal)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    for parameter in theirs.parameters():  # scores and biases of size 1, where a wrong bucket is seen
        torch.nn.init.normal_(parameter, std=0.4)
    return theirs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (64, 256), (16, 64), (32, 1000), (16, 4096), (12, 17), (8, 4000)]
)
def test_t5_buckets(causal, num_buckets, max_distance):
    how = dict(num_buckets=num_buckets, max_distance=max_distance)
    theirs = T5Attention._relative_position_bucket(torch.tensor(-FAR), bidirectional=not causal, **how)
    np.testing.assert_array_equal(rope_jax.attention.relative_buckets(FAR, causal=causal, **how), theirs.numpy())


@pytest.mark.parametrize("causal", [True, False])
def test_t5_bias(causal):
    theirs = t5_layer(causal)
    table = theirs.relative_attention_bias.weight.detach().numpy()
    ours = rope_jax.attention.T5Bias().apply(
        {"params": {"table": table}}, np.subtract.outer(np.arange(T), np.arange(T))[None], N, causal
    )
    np.testing.assert_array_equal(ours, theirs.compute_bias(T, T).detach().numpy())


@pytest.mark.parametrize("causal", [True, False])
def test_t5_attention(causal):
    """A whole layer: scores without a scale, one bias for both directions of an encoder or the past of a decoder."""
    theirs, ours = t5_layer(causal), rope_jax.RotaryAttention(
        num_heads=N, head_dim=H, rope=None, position_bias=rope_jax.attention.T5Bias(), logit_scale=1.0, causal=causal
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    kernel = lambda linear: linear.weight.detach().numpy().T
    params = {
        "query": {"kernel": kernel(theirs.q).reshape(D, N, H)},
        "key": {"kernel": kernel(theirs.k).reshape(D, N, H)},
        "value": {"kernel": kernel(theirs.v).reshape(D, N, H)},
        "out": {"kernel": kernel(theirs.o).reshape(N, H, D)},
        "position_bias": {"table": theirs.relative_attention_bias.weight.detach().numpy()},
    }
    allowed = np.tril(np.ones((T, T), bool)) if causal else np.ones((T, T), bool)
    mask = torch.where(torch.tensor(allowed), 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        want = theirs(torch.tensor(x), mask=mask)[0].numpy()
    # Sums of D = 32 in the projections, H = 8 in the scores, which reach 60, and T = 300 in the mean.
    tolerance = 64 * oracles.EPS32 * float(np.abs(want).max())
    np.testing.assert_allclose(ours.apply({"params": params}, jnp.asarray(x)), want, atol=tolerance)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 32, 40, 112])
def test_bloom_alibi(heads):
    """Theirs is slope * s, ours -slope * (t - s): of one query they differ by a constant, which softmax drops."""
    theirs = build_alibi_tensor(torch.ones(1, T), heads, torch.float32).numpy().reshape(1, heads, 1, T)
    distance = np.tril(np.subtract.outer(np.arange(T), np.arange(T)))[None]
    ours = np.float64(rope_jax.attention.ALiBi()(distance, heads, True))
    slopes = theirs[0, :, 0, 1]
    np.testing.assert_allclose(
        rope_jax.attention.ALiBi.slopes(heads), slopes, rtol=heads * oracles.EPS32
    )  # theirs: pow
    past = np.tril(np.ones((T, T), bool))
    constant = np.float64(theirs) - ours
    same = constant - constant[..., :1]  # each key beside the first one
    # Both are products of two float32 of up to T.
    np.testing.assert_allclose(np.where(past, same, 0), 0, atol=T * (heads + 4) * oracles.EPS32)


def test_marian_sines():
    """Theirs are all sines, then all cosines; the paper's alternate. Both give the same row up to that order."""
    theirs = MarianSinusoidalPositionalEmbedding(T, D)
    theirs.weight.data = theirs.create_weight()
    ours = np.asarray(rope_jax.models.Sinusoidal()(jnp.arange(T), D))
    want = theirs((1, T)).numpy()
    np.testing.assert_allclose(np.concatenate([ours[:, 0::2], ours[:, 1::2]], axis=1), want, atol=1.2e-7 + 6e-8)
