"""Small decoders, their tokens and parameters, and their oracle: shared by the tests of several storeys."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles

import rope_jax

V, L, D = 13, 2, 16
ROPE = rope_jax.Rope(8, rope_jax.Llama3(factor=4.0, original_length=16, base=100.0))
SLOW = rope_jax.Rope(8, rope_jax.Standard(base=5000.0))
TOLERANCE = 1024 * oracles.EPS32  # two layers of the sums that test_attention.py counts, and logits of size 3


def build(**change):
    sizes = dict(
        vocab_size=V, num_layers=L, width=D, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, rope=ROPE
    )
    return rope_jax.Decoder(**(sizes | change))


def tokens(batch=2, length=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (batch, length)), jnp.int32)


def init(model, seed=0):
    params = nn.unbox(model.init(jax.random.key(seed), tokens()))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + 0.2 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    """Hendrycks and Gimpel 2016, section 2: the form with tanh."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def oracle(model, params, ids, *, added=0.0, bias=0.0, weights=None, prefix=0):
    """The whole model in float64 and numpy, a layer after the other.

    ``added [T, D]`` to the embeddings and ``bias [N, T, S]`` to the scores; the first ``prefix`` tokens read each
    other in both directions; a list of weights is lengthened by those
    of each layer, ``[B, N, T, S]``.
    """
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    batch, length = ids.shape
    ropes = model.rope if isinstance(model.rope, tuple) else (model.rope,) * model.num_layers
    windows = model.window if isinstance(model.window, tuple) else (model.window,) * model.num_layers

    def rms(x, norm):
        scale = norm["scale"] + 1 if model.norm_unit_offset else norm["scale"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * scale

    def dense(x, at, formula="btd,df->btf"):
        return np.einsum(formula, x, at["kernel"]) + at.get("bias", 0)

    x = p["embed"]["embedding"][np.asarray(ids)] * (model.embedding_scale or 1)
    x = x + added
    t, s = np.mgrid[:length, :length]
    for layer, (rope, window) in enumerate(zip(ropes, windows, strict=True)):
        w = jax.tree.map(lambda a, layer=layer: a[layer], p["layers"])
        attn = w["self_attention"]
        n = rms(x, w["attention_norm"])
        q, k, v = (dense(n, attn[name], "btd,dnh->btnh") for name in ("query", "key", "value"))
        if model.qk_norm:
            q, k = rms(q, attn["query_norm"]), rms(k, attn["key_norm"])
        if rope is not None:
            cos, sin = oracles.cos_sin(np.arange(length), rope.frequencies().inv_freq)
            q, k = (oracles.rotate_features(a, cos, sin, rope.layout) for a in (q, k))
        allowed = (s <= t) & (t - s < (window or length)) | ((t < prefix) & (s < prefix))
        how = dict(scale=model.logit_scale, logit_cap=model.logit_cap, bias=bias)
        if weights is not None:
            weights.append(np.stack([oracles.attention_weights(q[b], k[b], allowed, **how) for b in range(batch)]))
        y = np.stack([oracles.attention(q[b], k[b], v[b], allowed, **how) for b in range(batch)])
        y = dense(y, attn["out"], "btnh,nhd->btd")
        x = x + (rms(y, w["post_attention_norm"]) if model.post_norms else y)
        n = rms(x, w["mlp_norm"])
        gated = (silu if model.activation is nn.silu else gelu)(dense(n, w["gate"]))
        y = dense(gated * dense(n, w["up"]), w["down"])
        x = x + (rms(y, w["post_mlp_norm"]) if model.post_norms else y)
    x = rms(x, p["final_norm"])
    logits = x @ (p["embed"]["embedding"].T if model.tie_embeddings else p["unembed_kernel"]["kernel"])
    return logits if model.output_cap is None else model.output_cap * np.tanh(logits / model.output_cap)
