"""Contracts of public functions: they hold whatever the switch of chex says."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rope_jax
from rope_jax._checks import check_axes


@pytest.fixture(params=[False, True], ids=["chex on", "chex off"])
def switch(request):
    if request.param:
        chex.disable_asserts()
    yield
    chex.enable_asserts()


@pytest.mark.parametrize(
    ("shape", "axes", "sizes", "fits"),
    [
        ((2, 3), "B T", {}, True),
        ((2, 3), "B T", dict(T=3), True),
        ((2, 3), "B T", dict(T=4), False),
        ((2, 3), "B T H", {}, False),
        ((2, 3, 4), "B T", {}, False),
        ((2, 3), "... T", dict(T=3), True),
        ((3,), "... T", dict(T=3), True),
        ((), "... T", {}, False),
        ((3,), "... N H", {}, False),
        ((2, 3, 4), "... T H", dict(T=3, H=5), False),
        ((1, 3), "B T", dict(B={1, 5}), True),
        ((5, 3), "B T", dict(B={1, 5}), True),
        ((2, 3), "B T", dict(B={1, 5}), False),
        ((0, 3), "B T", dict(B=0), True),
        ((), "", {}, True),
        ((1,), "", {}, False),
    ],
)
def test_axes(switch, shape, axes, sizes, fits):
    if fits:
        check_axes("x", jnp.zeros(shape), axes, **sizes)
    else:
        with pytest.raises(ValueError, match=r"x must have shape \["):
            check_axes("x", jnp.zeros(shape), axes, **sizes)


def test_public_functions(switch):
    q, k = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8))
    rope = rope_jax.Rope(8, rope_jax.Standard())
    with pytest.raises(ValueError, match=r"got \(1, 1\)"):
        rope(q, k, jnp.zeros((1, 1), int))
    with pytest.raises(ValueError, match=r"v must have shape \[B, S, K, H\] with B=2, S=5, K=2, H=8"):
        rope_jax.attend(q, k, k[:, :4])
    with pytest.raises(ValueError, match=r"mask must have shape \[B, N, T, S\]"):
        rope_jax.attend(q, k, k, mask=jnp.ones((2, 5, 5), bool))
    layer = rope_jax.RotaryAttention(num_heads=2, head_dim=8, rope=rope)
    with pytest.raises(ValueError, match=r"mask must have shape"):
        layer.init(jax.random.key(0), jnp.ones((2, 5, 16)), mask=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, D\]"):
        layer.init(jax.random.key(0), jnp.ones((5, 16)))


def test_causality_needs_the_order_of_queries_and_keys():
    """jax aligns queries to the first key, flash-attention and a cache to the last: neither in silence."""
    q, k = jnp.ones((1, 3, 2, 8)), jnp.ones((1, 7, 2, 8))
    for queries, keys in ((q, k), (k, q)):
        for function in (lambda q, k: rope_jax.attend(q, k, k, causal=True), attention_weights_of):
            with pytest.raises(
                ValueError, match=r"causal must be False with T=\d queries and S=\d keys.* pass the mask"
            ):
                function(queries, keys)
    # The way out that the message names: the last T of S tokens.
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 7, 2, 8)), jnp.float32) for _ in range(3))
    T, S = 3, 7
    mask = jnp.tril(jnp.ones((T, S), bool), S - T)[None, None]
    last = rope_jax.attend(q[:, -T:], k, v, mask=mask)
    np.testing.assert_allclose(last, rope_jax.attend(q, k, v, causal=True)[:, -T:], atol=1e-6)


def attention_weights_of(q, k):
    return rope_jax.attention.attention_weights(q, k, causal=True)


def test_a_mask_is_no_number_of_sequences():
    layer = rope_jax.RotaryAttention(num_heads=2, head_dim=8, rope=rope_jax.Rope(8, rope_jax.Standard()))
    mask = jnp.array([[1, 1, 1, 2, 2, 2, 0]])
    with pytest.raises(
        ValueError, match="mask must hold 0 and 1, got 0 to 2: numbers of packed sequences are segment_ids"
    ):
        layer.init(jax.random.key(0), jnp.ones((1, 7, 16)), mask=mask)
    with pytest.raises(ValueError, match="mask must hold 0 and 1, got -1 to 1"):
        rope_jax.core.positions_from_mask(jnp.array([[1, -1]]))


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_known_values_are_refused_inside_jit_too(array):
    """Inside jit an array made from known numbers is traced; the numbers are known all the same."""
    mask, length, negative = array([[1, 1, 2]]), array([0]), array([-1])
    prompt, first, no_token = array([[1, 99]]), array([[1, 0]]), array([[0, 0]])
    rope = rope_jax.Rope(8, rope_jax.DynamicNTK(factor=2.0, original_length=4))
    layer = rope_jax.RotaryAttention(num_heads=2, head_dim=8, rope=rope_jax.Rope(8, rope_jax.Standard()))
    x, q = jnp.ones((1, 3, 16)), jnp.ones((1, 3, 2, 8))
    params = layer.init(jax.random.key(0), x)
    cache = rope_jax.init_cache(batch=1, capacity=4, num_kv_heads=2, head_dim=8)
    model = rope_jax.Decoder(
        vocab_size=11, width=16, num_layers=1, num_heads=2, head_dim=8, rope=layer.rope, mlp_dim=16
    )
    weights = model.init(jax.random.key(0), jnp.ones((1, 2), int))

    learned, far = rope_jax.models.LearnedPositions(num_positions=4), array([0, 9])
    table = learned.init(jax.random.key(0), jnp.arange(2), 8)
    last = array([2**31 - 2])

    def write(prompt, mask=None):
        return rope_jax.generate(model, weights, prompt, mask=mask, max_new_tokens=1, temperature=0.0).tokens

    for call, says in (
        (lambda x: layer.apply(params, x, mask=mask), "mask must hold 0 and 1, got 1 to 2"),
        (lambda x: rope_jax.core.positions_from_mask(mask) + x[..., 0], "mask must hold 0 and 1, got 1 to 2"),
        (lambda x: layer.apply(params, x, prefix_length=negative), "prefix_length must be 0 or more"),
        (
            lambda x: rope(q, q, jnp.arange(3), context_length=length),
            "DynamicNTK: context_length must be at least 1",
        ),
        (lambda x: learned.apply(table, far, 8), r"positions must be in \[0, num_positions=4\), got 0 to 9"),
        (lambda x: rope_jax.core.multimodal_positions([5], offset=last)[0], "positions must fit in int32"),
        (lambda x: write(prompt), r"prompt must hold tokens in \[0, V=11\), got 1 to 99"),
        (lambda x: write(prompt, first), None),  # the values at padding do not matter
        (lambda x: write(prompt, no_token), "mask must have a real token in every row"),
        (lambda x: cache.truncate(negative).num_tokens + x[0, 0, 0], r"num_tokens must be 0 or more, got \[-1\]"),
        (lambda x: cache.select_rows(negative).num_tokens + x[0, 0, 0], r"rows must be in \[0, B=1\), got \[-1\]"),
    ):
        for run in (call, jax.jit(call)):
            with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext():
                run(x)


@pytest.mark.parametrize("field", ["num_heads", "head_dim", "num_kv_heads"])
def test_sizes_of_a_layer_are_integers(field):
    fields = dict(num_heads=2, num_kv_heads=2, head_dim=8, rope=None)
    layer = rope_jax.RotaryAttention(**(fields | {field: fields[field] / 1}))
    with pytest.raises(TypeError, match=f"{field} must be an integer, got {fields[field]}.0"):
        layer.init(jax.random.key(0), jnp.ones((1, 3, 16)))
    layer = rope_jax.RotaryAttention(**(fields | {field: 0}))
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        layer.init(jax.random.key(0), jnp.ones((1, 3, 16)))


@pytest.mark.parametrize("field", ["vocab_size", "num_layers", "width", "num_heads", "head_dim", "mlp_dim"])
def test_sizes_of_a_decoder_are_integers(field):
    sizes = dict(vocab_size=9, num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=8)
    model = rope_jax.Decoder(**(sizes | {field: float(sizes[field])}), rope=None)
    with pytest.raises(TypeError, match=f"{field} must be an integer, got {sizes[field]}.0"):
        model.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))


def test_lists_of_unequal_lengths_are_padded_first():
    model = rope_jax.Decoder(vocab_size=9, num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=8, rope=None)
    with pytest.raises(
        ValueError, match="prompt must be an array, got lists of unequal lengths: see .*pad_prompts"
    ):
        rope_jax.generation.generate(model, {}, [[1, 2], [3]], max_new_tokens=1, temperature=0)
    with pytest.raises(ValueError, match="k must be an array, got lists of unequal lengths$"):
        rope_jax.attend(jnp.ones((1, 1, 1, 2)), [[1.0], [1.0, 2.0]], jnp.ones((1, 1, 1, 2)))


@pytest.mark.parametrize(("impl", "wrong"), [("threefry2x32", 4), ("rbg", 2)])
def test_raw_numbers_of_another_kind_of_key(impl, wrong):
    model = rope_jax.Decoder(vocab_size=9, num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=8, rope=None)
    prompt, q = jnp.zeros((2, 3), jnp.int32), jnp.ones((1, 3, 2, 8))
    params = model.init(jax.random.key(0), prompt)
    calls = {
        "rng": lambda key: rope_jax.generate(model, params, prompt, max_new_tokens=1, rng=key),
        "dropout_rng": lambda key: rope_jax.attend(q, q, q, dropout_rate=0.5, dropout_rng=key),
    }
    with jax.default_prng_impl(impl):
        for name, call in calls.items():
            call(jnp.zeros(6 - wrong, jnp.uint32))
            for key in (np.zeros(wrong, np.uint32), jnp.zeros((2, wrong), jnp.uint32)):
                with pytest.raises(TypeError, match=f"^{name} must be a key of '{impl}', got {wrong} raw numbers"):
                    call(key)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("dtype", "zz", "dtype must be a dtype, as jnp.float32, got 'zz'"),
        ("dtype", jnp.int32, "dtype must be floating, got dtype int32"),
        ("param_dtype", bool, "param_dtype must be floating, got dtype bool"),
        ("kernel_init", 3, "kernel_init must be a function, got 3"),
        ("bias_init", "zeros", "bias_init must be a function, got 'zeros'"),
        ("dot_general", 3, "dot_general must be a function, got 3"),
        ("embedding_init", None, "embedding_init must be a function, got None"),
        ("activation", "silu", "activation must be a function, got 'silu'"),
    ],
)
def test_dtypes_and_functions_of_a_module(field, value, says):
    fields, x = dict(num_heads=2, head_dim=8, rope=None) | {field: value}, jnp.ones((1, 3, 16))
    sizes, tokens = dict(vocab_size=9, num_layers=2, width=16, mlp_dim=8), jnp.zeros((1, 3), jnp.int32)
    calls = []
    if field not in ("embedding_init", "activation"):
        calls += [
            lambda: rope_jax.RotaryAttention(**fields).init(jax.random.key(0), x),
            lambda: rope_jax.nnx.RotaryAttention(in_features=16, rngs=nnx.Rngs(0), **fields),
        ]
    if field not in ("bias_init", "dot_general"):
        calls.append(lambda: rope_jax.Decoder(**sizes, **fields).init(jax.random.key(0), tokens))
    for call in calls:
        with pytest.raises(TypeError, match=says):
            call()


def test_a_cache_is_read_in_floats():
    cache = rope_jax.init_cache(batch=1, capacity=3, num_kv_heads=1, head_dim=8, dtype=jnp.int8)
    for dtype, says in ((jnp.int8, "floating, got dtype int8"), (None, "a dtype, .* got None")):
        with pytest.raises(TypeError, match=f"dtype must be {says}"):
            cache.read(dtype)
