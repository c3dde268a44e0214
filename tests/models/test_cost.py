"""What RoPE costs, counted and not timed: what is saved for the backward pass, what is evaluated, what is compiled."""

import collections
import dataclasses
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast import first

import rope_jax
from rope_jax.attention import tiling

V, B, T, N, K, H, D = 11, 2, 24, 4, 2, 16, 32
ROPE = rope_jax.Rope(H, rope_jax.Standard())
SLOW = rope_jax.Rope(H, rope_jax.Yarn(factor=4.0, original_length=8))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


def layer(rope, **change):
    return rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=rope, **change)


def decoder(rope, num_layers=12, **change):
    sizes = dict(vocab_size=V, width=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=40)
    return rope_jax.Decoder(**sizes, rope=rope, num_layers=num_layers, **change)


# ------------------------------------------------------------------------------- what is saved for the gradient


def saved(module, inputs) -> collections.Counter:
    """How many arrays of each shape and dtype the backward pass holds on to."""
    params = nn.unbox(module.init(jax.random.key(0), inputs))
    _, backward = jax.vjp(lambda params: module.apply(params, inputs), params)
    kept = {id(leaf): leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "shape")}
    return collections.Counter((leaf.shape, leaf.dtype.name) for leaf in kept.values())


def sizes(counted) -> list[int]:
    """Entries of each array, all of them float32."""
    assert {kind for _, kind in counted} <= {"float32"}
    return [int(np.prod(shape)) for shape, _ in counted.elements()]


@pytest.mark.parametrize("dtype", first(1, [jnp.bfloat16, jnp.float32]))
@pytest.mark.parametrize("rotary_dim", [H, H // 2])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_layer_saves_cos_and_sin_and_nothing_else_for_its_rope(layout, rotary_dim, dtype):
    """T x R/2 each, once for the queries and once for the keys; of all else what it would keep without rope."""
    rope = rope_jax.Rope(H, rope_jax.Standard(), rotary_dim=rotary_dim, layout=layout)
    x = jax.random.normal(jax.random.key(1), (B, T, D), dtype)
    turned, plain = (saved(layer(each, dtype=dtype), x) for each in (rope, None))
    assert not plain - turned
    more = sizes(turned - plain)
    assert set(more) == {T * rotary_dim // 2} and len(more) <= 4


@pytest.mark.parametrize("dtype", first(1, [jnp.bfloat16, jnp.float32]))
@pytest.mark.parametrize(
    "change", [{}, {"logit_cap": 30.0}, {"window": 5}, {"position_bias": rope_jax.attention.ALiBi()}]
)
def test_a_layer_saves_no_table_of_scores(change, dtype):
    """N x T x T is what a plain softmax keeps, two or three times: nothing with T twice, but what lies over it."""
    x = jax.random.normal(jax.random.key(1), (B, T, D), dtype)
    square = [shape for shape, _ in saved(layer(ROPE, dtype=dtype, **change), x) if shape.count(T) > 1]
    assert all(shape[0] == 1 for shape in square)  # a mask or a bias: of no row, so of no scores


@pytest.mark.parametrize("dtype", first(1, [jnp.bfloat16, jnp.float32]))
def test_a_block_saves_each_of_its_wide_features_once(dtype):
    """Of SwiGLU gate, up and their product; of a norm its input and its output, which the next product reads."""
    tokens = decoder(ROPE, num_layers=1, dtype=dtype)
    kept = saved(tokens, TOKENS)
    wide, narrow = ((1, B, T, size) for size in (40, D))
    assert sum(count for (shape, _), count in kept.items() if shape == wide) == 3
    assert sum(count for (shape, _), count in kept.items() if shape == narrow) <= 4


def test_learned_frequencies_save_queries_and_keys_too():
    """The count sees what is as large as x: here it must be there, for the derivative in the frequencies."""
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    more = saved(layer(ROPE, learn_frequencies=True), x) - saved(layer(None), x)
    assert max(sizes(more)) >= B * T * K * H // 2


@pytest.mark.parametrize("remat", [False, True])
def test_a_stack_of_layers_saves_what_one_layer_does(remat):
    turned, plain = (saved(decoder(rope, remat=remat), TOKENS) for rope in (ROPE, None))
    assert not plain - turned
    more = sizes(turned - plain)
    assert set(more) == {T * H // 2} and len(more) <= 4


# ------------------------------------------------------------------------------------ how often it is evaluated


def equations(jaxpr, scanned=False):
    """Every equation of a program and of the programs inside, and whether it is in the body of a scan."""
    for equation in jaxpr.eqns:
        yield equation, scanned
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, scanned or equation.primitive.name == "scan")


def counted(function, *args) -> dict[str, int]:
    """Scans, and products of uint32, of which only the exact phases are made, outside of scans and inside."""
    found = {"scans": 0, "outside": 0, "inside": 0}
    for equation, scanned in equations(jax.make_jaxpr(function)(*args).jaxpr):
        found["scans"] += equation.primitive.name == "scan"
        if equation.primitive.name == "mul" and equation.outvars[0].aval.dtype == jnp.uint32:
            found["inside" if scanned else "outside"] += 1
    return found


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("rope", "num_layers", "distinct"),
    [(ROPE, 1, 1), (ROPE, 12, 1), ((ROPE, SLOW) * 6, 12, 2), (None, 12, 0)],
    ids=["one layer", "alike", "unlike", "none"],
)
def test_each_rotation_is_evaluated_once_for_all_layers_and_their_gradient(rope, num_layers, distinct, remat):
    once = counted(ROPE.rotation, jnp.arange(T))["outside"]
    assert once > 0
    model = decoder(rope, num_layers, remat=remat)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
    loss = lambda params: jnp.sum(model.apply(params, TOKENS) ** 2)
    assert counted(loss, params) == {"scans": 1, "outside": distinct * once, "inside": 0}
    assert counted(jax.grad(loss), params) == {"scans": 2, "outside": distinct * once, "inside": 0}


# --------------------------------------------------------------------------------------------- what is compiled


@pytest.mark.parametrize("rope", [ROPE, (ROPE, SLOW), None], ids=["alike", "unlike", "none"])
def test_64_decoded_tokens_compile_one_program_and_nothing_beside_it(rope):
    model = decoder(rope, num_layers=2)
    tokens = jnp.tile(TOKENS, 3)[:, :70]
    params = nn.unbox(model.init(jax.random.key(0), tokens))
    step = jax.jit(lambda token, cache: model.apply(params, token, cache=cache), donate_argnames="cache")
    _, cache = step(tokens[:, :6], model.init_cache(batch=B, capacity=70))
    later = [tokens[:, at : at + 1] for at in range(6, 70)]
    compiled = []

    def listen(event, seconds, **_):
        compiled.extend([seconds] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for token in later:
            logits, cache = step(token, cache)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1 and cache.num_tokens.tolist() == [70] * B
    assert not np.isnan(logits).any()


# --------------------------------------------------------------------------------------------- what is checked


def test_a_traced_cached_masked_call_checks_at_most_thirty_times():
    """Each argument is checked once, at the door of the model: not in every layer, and not in every helper."""
    model = decoder(ROPE, num_layers=2)
    params = nn.unbox(model.init(jax.random.key(0), TOKENS))
    cache = model.init_cache(batch=B, capacity=2 * T)
    step = jax.jit(lambda tokens, mask, cache: model.apply(params, tokens, mask=mask, cache=cache))
    checks = collections.Counter()

    def count(frame, event, _):
        code = frame.f_code
        if event == "call" and "rope_jax" in code.co_filename and re.match(r"_?check(_|ed_|$)", code.co_name):
            checks[code.co_name] += 1

    sys.setprofile(count)
    try:
        step.trace(TOKENS, jnp.ones(TOKENS.shape, bool), cache)
    finally:
        sys.setprofile(None)
    print(f"\n{checks.total()} checks: {dict(checks)}", end="")
    assert 0 < checks.total() <= 30 and checks["check_mask"] == 1


# ------------------------------------------------------------------------------------- how much of a cache is read


def keys_read(monkeypatch, capacity: int, num_tokens: int) -> int:
    """How many keys each layer reads in a decode step, counted by the blocks that run."""
    model, read = decoder(ROPE, num_layers=2), []
    plain = tiling.Tiling.drop

    def drop(self, weights, i, j):
        jax.debug.callback(lambda: read.append(weights.shape[-1]))
        return plain(self, weights, i, j)

    params = nn.unbox(model.init(jax.random.key(0), TOKENS))
    cache = model.init_cache(batch=B, capacity=capacity)
    cache = dataclasses.replace(cache, num_tokens=jnp.array([num_tokens, 1]))
    with monkeypatch.context() as patch:
        patch.setattr(tiling.Tiling, "drop", drop)
        step = jax.jit(lambda params, tokens, cache: model.apply(params, tokens, cache=cache)[0])
        step(params, TOKENS[:, :1], cache).block_until_ready()
        jax.effects_barrier()
    return sum(read) // model.num_layers


def test_a_decode_step_reads_the_tokens_of_the_longest_row_and_not_the_capacity(monkeypatch):
    """In whole blocks of at most 1,024 keys: 68 tokens cost the same in a cache of any size."""
    assert keys_read(monkeypatch, 256, 68) == 256
    assert keys_read(monkeypatch, 2048, 68) == keys_read(monkeypatch, 16_384, 68) == 1024
    assert keys_read(monkeypatch, 16_384, 5000) == 5 * 1024
