"""The public surface in one pass: small calls of all that a user composes, as a dictionary of arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import rope_jax

B, T, N, K, H, D = 2, 6, 4, 2, 8, 16


def rotations() -> dict:
    """Schedules, layouts, partial heads, axes and float positions; forward and backward."""
    q, k = (jax.random.normal(jax.random.key(i), (B, T, n, H), jnp.float32) for i, n in enumerate((N, K)))
    positions, out = jnp.arange(T), {}
    factors = dict(short_factor=[1.0] * (H // 2), long_factor=[2.0] * (H // 2))
    for schedule in (
        rope_jax.Standard(),
        rope_jax.Linear(factor=2.0),
        rope_jax.NTKAware(factor=2.0),
        rope_jax.Yarn(factor=2.0, original_length=16),
        rope_jax.Llama3(factor=2.0, original_length=16),
        rope_jax.DynamicNTK(factor=2.0, original_length=4),
        rope_jax.LongRope(**factors, original_length=4, factor=2.0),
    ):
        rope = rope_jax.Rope(H, schedule)
        length = dict(context_length=jnp.int32(T)) if rope.needs_context_length else {}
        out[type(schedule).__name__] = rope(q, k, positions, **length)[0]
    for layout in ("half", "interleaved"):
        for rotary_dim in (H, H // 2):
            rope = rope_jax.Rope(H, rope_jax.Standard(), rotary_dim=rotary_dim, layout=layout)
            out[f"{layout} {rotary_dim}"] = rope(q, k, positions[None])[1]
            loss = lambda q, rope=rope: jnp.sum(rope(q, k, positions)[0] ** 3)
            out[f"{layout} {rotary_dim}, gradient"] = jax.grad(loss)(q)
    axial = rope_jax.Rope(H, rope_jax.core.Axial(sizes=(4, 4)))
    out["axial"] = axial(q, k, rope_jax.core.grid_positions(2, 3))[0]
    out["float positions"] = rope_jax.Rope(H, rope_jax.Standard())(q, k, positions / 2)[0]
    return out


def attention() -> dict:
    """Masks, windows, bias, caps, sinks and dropout; forward and backward."""
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, n, H), jnp.float32) for i, n in enumerate((N, K, K)))
    out = {"weights": rope_jax.attention.attention_weights(q, k, causal=True)}
    for name, options in {
        "causal": dict(causal=True),
        "window": dict(causal=True, window=3),
        "cap": dict(logit_cap=2.0),
        "mask": dict(mask=jnp.ones((B, 1, 1, T), bool)),
        "bias": dict(bias=jnp.ones((1, N, T, T), jnp.float32)),
        "sinks": dict(sink_logits=jnp.ones(N, jnp.float32)),
        "dropout": dict(dropout_rate=0.5, dropout_rng=jax.random.key(3)),
    }.items():
        out[name] = rope_jax.attend(q, k, v, **options)
        loss = lambda q, options=options: jnp.sum(rope_jax.attend(q, k, v, **options) ** 2)
        out[f"{name}, gradient"] = jax.grad(loss)(q)
    return out


def layers() -> dict:
    """The layer with each bias: padding, packed sequences, a cache."""
    rope, x, out = (
        rope_jax.Rope(H, rope_jax.Standard()),
        jax.random.normal(jax.random.key(0), (B, T, D), jnp.float32),
        {},
    )
    mask = jnp.array([[1] * T, [0, 0, 1, 1, 1, 1]])
    for bias in (None, rope_jax.attention.T5Bias(), rope_jax.attention.ALiBi()):
        name = type(bias).__name__
        layer = rope_jax.RotaryAttention(
            num_heads=N, num_kv_heads=K, head_dim=H, rope=rope, position_bias=bias, qk_norm=True, window=4
        )
        params = nn.unbox(layer.init(jax.random.key(0), x))
        out[f"{name}, padding"] = layer.apply(params, x, mask=mask)[:, 2:]
        out[f"{name}, packed"] = layer.apply(params, x, segment_ids=jnp.array([[0, 0, 0, 1, 1, 1]] * B))
        cache = rope_jax.init_cache(batch=B, capacity=8, num_kv_heads=K, head_dim=H)
        out[f"{name}, prefill"], cache = layer.apply(params, x, cache=cache)
        out[f"{name}, step"], _ = layer.apply(params, x[:, :1], cache=cache)
    layer = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=rope)
    params = nn.unbox(layer.init(jax.random.key(0), x))
    cache = rope_jax.init_cache(batch=B, capacity=8, num_kv_heads=K, head_dim=H)
    out["prefix"], cache = layer.apply(params, x, prefix_length=jnp.array([3, 6]), cache=cache)
    out["not overflowed"] = cache.nan_if_overflowed(out["prefix"])
    out["attention mask"] = layer.apply(params, x, attention_mask=jnp.ones((1, 1, T, T), bool))
    other = dict(kv=x[:, ::-1], kv_positions=jnp.arange(T) / 2, kv_mask=mask)
    out["cross"] = layer.clone(causal=False).apply(params, x, jnp.arange(T), **other)
    variables = nn.unbox(layer.clone(decode=True).init(jax.random.key(0), x))
    out["cache collection"], _ = layer.clone(decode=True).apply(variables, x[:, :1], mutable="cache")
    return out


def decoders() -> dict:
    """Decoders, their gradient, and all that writes tokens."""
    rope, out = rope_jax.Rope(H, rope_jax.Standard()), {}
    ids, mask = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]]), jnp.array([[1, 1, 1, 1], [0, 1, 1, 1]])
    unlike = dict(rope=(rope, rope_jax.Rope(H, rope_jax.Standard(base=100.0))), window=(None, 3))
    kinds = {
        "plain": {},
        "sinusoidal": dict(position_embedding=rope_jax.models.Sinusoidal()),
        "learned": dict(learn_frequencies=True),
        "unlike layers": unlike,
    }
    for name, fields in kinds.items():
        sizes = dict(vocab_size=11, num_layers=2, width=D, num_heads=2, head_dim=H, mlp_dim=16, rope=rope)
        model = rope_jax.Decoder(**(sizes | fields))
        params = nn.unbox(model.init(jax.random.key(0), ids))
        out[name] = model.apply(params, ids)
        loss = lambda p, model=model: jnp.mean(model.apply(p, ids) ** 2)
        out[f"{name}, gradient"] = jax.tree.leaves(jax.grad(loss)(params))[0]
        greedy = rope_jax.generate(model, params, ids, mask=mask, max_new_tokens=3, temperature=0)
        out[f"{name}, log_probs"] = greedy.log_probs
        drawn = rope_jax.generate(model, params, ids, max_new_tokens=3, rng=jax.random.key(1), top_k=3, top_p=0.9)
        out[f"{name}, drawn"] = drawn.log_probs
    out["beams"] = rope_jax.generation.beam_search(model, params, ids, beams=2, max_new_tokens=3).score
    speculative = rope_jax.generation.speculative_decode
    out["speculative"] = speculative(model, params, model, params, ids, max_new_tokens=3).tokens
    for fields in (dict(eviction="sliding"), dict(eviction="sliding", num_sink_tokens=1), dict(dtype="int8")):
        cache = model.init_cache(batch=B, capacity=T, **fields)
        out[f"cache {fields}"], _ = model.apply(params, ids, cache=cache)
    return out


def essence() -> dict:
    """A part of the surface in the smallest sizes, for a mode that runs each operation by itself."""
    rope, x = rope_jax.Rope(4, rope_jax.Standard()), jax.random.normal(jax.random.key(0), (1, 2, 4), jnp.float32)
    q, out = x[:, :, None, :], {}
    out["rotate"] = rope_jax.rotate(q, rope.rotation(jnp.arange(2)))
    out["rope"] = rope(q, q, jnp.arange(2))[0]
    layer = rope_jax.RotaryAttention(num_heads=1, head_dim=4, rope=rope)
    params = nn.unbox(layer.init(jax.random.key(0), x))
    out["layer"] = layer.apply(params, x)
    cache = rope_jax.init_cache(batch=1, capacity=3, num_kv_heads=1, head_dim=4)
    out["prefill"], cache = layer.apply(params, x, cache=cache)
    out["step"], _ = layer.apply(params, x[:, :1], cache=cache)
    sizes = dict(vocab_size=5, num_layers=1, width=4, num_heads=1, head_dim=4, mlp_dim=4)
    model, ids = rope_jax.Decoder(**sizes, rope=rope), jnp.array([[1, 2]])
    params = nn.unbox(model.init(jax.random.key(0), ids))
    out["decoder"] = model.apply(params, ids)
    out["generate"] = rope_jax.generate(model, params, ids, max_new_tokens=2, temperature=0).log_probs
    return out


def surface() -> dict:
    return {
        f"{part.__name__}: {name}": array
        for part in (rotations, attention, layers, decoders)
        for name, array in part().items()
    }
