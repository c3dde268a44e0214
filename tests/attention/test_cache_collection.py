"""The cache in Flax's collection ``cache``, as models with ``decode=True`` expect it (Flax's lm1b example)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import rope_jax

V, B, T, D, L = 11, 2, 8, 16, 3
ROPE = rope_jax.Rope(8, rope_jax.Standard(base=100.0))
TOLERANCE = 1024 * oracles.EPS32  # three layers, logits of size 3


class Block(nn.Module):
    decode: bool
    rope: rope_jax.Rope

    @nn.compact
    def __call__(self, x, _):
        fields = dict(num_heads=4, num_kv_heads=2, head_dim=8, rope=self.rope, decode=self.decode)
        x += rope_jax.RotaryAttention(**fields, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.LayerNorm()(x)))), None


class Model(nn.Module):
    """A causal language model of scanned layers, which knows nothing of rope_jax's cache."""

    decode: bool = False
    rope: rope_jax.Rope = ROPE

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D, name="embed")(tokens)
        layers = nn.scan(
            Block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=L,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(self.decode, self.rope, name="layers")(x, None)
        return nn.Dense(V)(nn.LayerNorm()(x))


def start(model, batch=B, length=T):
    """Parameters and an empty cache, as lm1b makes them: by ``init`` with tokens of the full length."""
    variables = nn.unbox(model.clone(decode=True).init(jax.random.key(0), jnp.ones((batch, length), jnp.int32)))
    return variables["params"], variables["cache"]


def step_of(model, params):
    """lm1b's ``tokens_ids_to_logits``: ids ``[B, 1]`` and a cache to logits ``[B, V]`` and the next cache."""
    decoder = model.clone(decode=True)

    @jax.jit
    def step(ids, cache):
        logits, state = decoder.apply({"params": params, "cache": cache}, ids, mutable=["cache"])
        return logits[:, -1], state["cache"]

    return step


def held(cache) -> rope_jax.KVCache:
    (found,) = jax.tree.leaves(cache, is_leaf=lambda leaf: isinstance(leaf, rope_jax.KVCache))
    return found


def tokens(length=T):
    return jnp.asarray(np.random.default_rng(0).integers(1, V, (B, length)), jnp.int32)


def test_tokens_one_by_one_are_the_full_pass_and_more_than_fit_are_nan():
    params, cache = start(Model())
    step, got = step_of(Model(), params), []
    assert held(cache).key.shape == (L, B, 2, T, 8) and not held(cache).num_tokens.any()
    for t in range(T):
        logits, cache = step(tokens()[:, t : t + 1], cache)
        got.append(logits)
    want = Model().apply({"params": params}, tokens())
    np.testing.assert_allclose(jnp.stack(got, 1), want, atol=TOLERANCE)
    assert held(cache).num_tokens.tolist() == [[T] * B] * L and step._cache_size() == 1
    logits, cache = step(tokens()[:, :1], cache)
    assert np.isnan(logits).all() and held(cache).overflowed.all()


def test_a_prompt_at_once_and_rows_of_beams():
    """A beam search repeats and selects rows of every leaf, whose axis after ``layers`` is B."""
    params, cache = start(Model())
    step = step_of(Model(), params)
    _, cache = step(tokens()[:, :5], cache)
    beams = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=1), cache)
    logits, _ = step(jnp.repeat(tokens()[:, 5:6], 2, axis=0), beams)
    want = Model().apply({"params": params}, tokens())[:, 5]
    np.testing.assert_allclose(logits, jnp.repeat(want, 2, axis=0), atol=TOLERANCE)


def sample(prompt, cache, step, end=V):
    """The loop of lm1b's ``temperature_sample``, at temperature 0: a prompt ``[B, T]`` is followed by zeros."""
    length = prompt.shape[1]

    def unfinished(state):
        i, _, _, _, ended = state
        return (i < length - 1) & ~jnp.all(ended)

    def body(state):
        i, sequences, cache, token, ended = state
        logits, cache = step(token, cache)
        written = jnp.argmax(logits, -1).astype(jnp.int32)
        forced = jax.lax.dynamic_index_in_dim(sequences, i + 1, axis=1, keepdims=False)
        token = jnp.where(ended, 0, jnp.where(forced == 0, written, forced)[:, None])
        sequences = jax.lax.dynamic_update_slice(sequences, token, (jnp.int32(0), i + 1))
        return i + 1, sequences, cache, token, ended | (token == end)

    zeros = jnp.zeros((prompt.shape[0], 1), jnp.int32)
    return jax.lax.while_loop(unfinished, body, (jnp.int32(-1), prompt, cache, zeros, zeros > 0))[1]


def test_the_sampler_of_lm1b_writes_what_the_full_pass_does():
    params, cache = start(Model())
    prompt = np.zeros((B, T), np.int32)
    prompt[0, :3], prompt[1, :1] = [4, 2, 7], [5]
    got = np.asarray(jax.jit(lambda prompt, cache: sample(prompt, cache, step_of(Model(), params)))(prompt, cache))
    for row, known in zip(got, (3, 1), strict=True):
        for t in range(known, T):
            shifted = np.concatenate([[0], row[:t]])[None]
            assert row[t] == int(jnp.argmax(Model().apply({"params": params}, shifted)[0, -1]))


def test_frequencies_that_depend_on_the_length_rotate_when_read():
    """One layer, so that no token keeps the frequencies of a shorter text."""
    fields = dict(
        num_heads=4, head_dim=8, rope=rope_jax.Rope(8, rope_jax.DynamicNTK(factor=2.0, original_length=4))
    )
    layer, x = rope_jax.RotaryAttention(**fields), jax.random.normal(jax.random.key(1), (B, T, D))
    variables = nn.unbox(layer.clone(decode=True).init(jax.random.key(0), x))
    assert not held(variables["cache"]).rotated
    y, state = layer.clone(decode=True).apply(variables, x[:, :-1], mutable="cache")
    variables = {"params": variables["params"]} | state
    y, _ = layer.clone(decode=True).apply(variables, x[:, -1:], mutable="cache")
    want = layer.apply({"params": variables["params"]}, x, context_length=T)[:, -1:]
    np.testing.assert_allclose(y, want, atol=TOLERANCE)


def test_init_gives_the_output_of_a_pass_and_the_same_parameters():
    layer = rope_jax.RotaryAttention(num_heads=4, head_dim=8, rope=ROPE, decode=True)
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    y, variables = layer.init_with_output(jax.random.key(0), x)
    want, plain = layer.clone(decode=False).init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, want, atol=TOLERANCE)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables["params"], plain["params"]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_the_cache_has_the_dtype_of_the_computation(dtype):
    layer = rope_jax.RotaryAttention(num_heads=4, head_dim=8, rope=ROPE, decode=True, dtype=dtype)
    variables = layer.init(jax.random.key(0), jnp.ones((B, T, D)))
    assert held(variables["cache"]).key.dtype == (dtype or jnp.float32)


def test_refusals():
    layer = rope_jax.RotaryAttention(num_heads=4, head_dim=8, rope=ROPE, decode=True)
    x = jnp.ones((B, T, D))
    variables = nn.unbox(layer.init(jax.random.key(0), x))
    params = {"params": variables["params"]}
    with pytest.raises(ValueError, match="variables must have the collection 'cache' with decode=True"):
        layer.apply(params, x[:, :1], mutable="cache")  # Flax's own layer makes a new one here, in silence
    cache = rope_jax.init_cache(batch=B, capacity=T, num_kv_heads=4, head_dim=8)
    with pytest.raises(ValueError, match="cache must be left out with decode=True, got KVCache"):
        layer.apply(variables, x[:, :1], cache=cache, mutable="cache")
    plan = rope_jax.attention.make_plan(ROPE, (B, 1), cache=cache)
    with pytest.raises(ValueError, match="plan must be left out with decode=True, got Plan"):
        layer.apply(variables, x[:, :1], plan=plan, mutable="cache")
    with pytest.raises(ValueError, match="x must fit in the cache: T=9 tokens were given, capacity S=8"):
        layer.apply(variables, jnp.ones((B, T + 1, D)), mutable="cache")
    with pytest.raises(ValueError, match="causal must be True with a cache"):
        layer.clone(causal=False).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="decode must be True or False, got 'yes'"):
        layer.clone(decode="yes").init(jax.random.key(0), x)
    for wrong, kind, message in (
        ([1.0, 2.0], ValueError, r"x must have shape \[B, T, D\], got \(2,\)"),
        ("text", TypeError, "x must be an array of numbers, got str"),
        (x.astype(int), TypeError, "x must be floating, got dtype int32"),
    ):
        with pytest.raises(kind, match=message):
            layer.init(jax.random.key(0), wrong)
    of_lists = layer.init(jax.random.key(0), np.asarray(x).tolist())
    assert held(of_lists["cache"]).key.dtype == jnp.float32
