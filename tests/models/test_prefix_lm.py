"""Prefix-LM through the decoder and through generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import ROPE, SLOW, TOLERANCE, build, init, oracle, tokens
from fast import first

import rope_jax

UNTIED = dict(tie_embeddings=False)  # tied to random embeddings, it would write one token again and again
MODEL = build(**UNTIED)
PARAMS = init(MODEL, seed=1)


@pytest.mark.parametrize(
    "change", first(2, [{}, dict(rope=(ROPE, SLOW)), dict(remat=True), dict(rope=None)]), ids=str
)
def test_is_the_formula(change):
    model = build(**change)
    params, ids = init(model), tokens()
    for prefix in (0, 5, 9):
        want = oracle(model, params, ids, prefix=prefix)
        np.testing.assert_allclose(model.apply(params, ids, prefix_length=prefix), want, atol=TOLERANCE)
    got = model.apply(params, ids, prefix_length=jnp.array([2, 7]))
    for row, prefix in enumerate((2, 7)):
        want = oracle(model, params, ids[row : row + 1], prefix=prefix)[0]
        np.testing.assert_allclose(got[row], want, atol=TOLERANCE)


def test_prefill_and_decode_are_the_full_pass():
    ids, prefix = tokens(), jnp.array([4, 6])
    want = MODEL.apply(PARAMS, ids, prefix_length=prefix)
    step = jax.jit(lambda ids, cache, n: MODEL.apply(PARAMS, ids, cache=cache, prefix_length=n))
    logits, cache = step(ids[:, :6], MODEL.init_cache(batch=2, capacity=9), prefix)
    np.testing.assert_allclose(logits, want[:, :6], atol=TOLERANCE)
    for t in range(6, 9):
        logits, cache = MODEL.apply(PARAMS, ids[:, t : t + 1], cache=cache)
        np.testing.assert_allclose(logits[:, 0], want[:, t], atol=TOLERANCE)
    with pytest.raises(ValueError, match="prefix_length must be of tokens in a single call"):
        MODEL.apply(PARAMS, ids[:, :5], cache=MODEL.init_cache(batch=2, capacity=9), prefix_length=prefix)


PROMPTS = [[1, 2, 3, 4, 5], [7], [3, 3, 9]]


FORWARD = jax.jit(lambda ids, prefix: MODEL.apply(PARAMS, ids, prefix_length=prefix))


def by_hand(row, prefix, count):
    """Greedy, by the pass over all tokens so far. Zeros after them change nothing: no token of them is in the prefix."""
    ids = list(row)
    for _ in range(count):
        logits = FORWARD(jnp.array([ids + [0] * (9 - len(ids))]), prefix)
        ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    return ids[len(row) :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prefix", [[5, 1, 3], [3, 0, 2]], ids=["whole prompts", "parts"])
def test_generate_reads_prompts_in_both_directions(prefix, side):
    ids, mask = rope_jax.generation.pad_prompts(PROMPTS, buckets=5)
    if side == "left":
        ids, mask = (
            jnp.stack([jnp.roll(row, 5 - len(p)) for row, p in zip(x, PROMPTS, strict=True)]) for x in (ids, mask)
        )
    options = dict(mask=mask, max_new_tokens=4, temperature=0, prefix_length=jnp.array(prefix))
    out = rope_jax.generate(MODEL, PARAMS, ids, **options)
    assert out.tokens.tolist() == [by_hand(row, n, 4) for row, n in zip(PROMPTS, prefix, strict=True)]
    twice = rope_jax.generate(MODEL, PARAMS, ids, **options, num_samples=2)
    assert twice.tokens.tolist() == np.repeat(out.tokens, 2, axis=0).tolist()
    streamed = []
    rope_jax.generate(MODEL, PARAMS, ids, **options, on_token=lambda row, token: streamed.append((row, token)))
    assert [[token for row, token in streamed if row == b] for b in range(3)] == out.tokens.tolist()


def test_the_prefix_changes_what_is_written():
    """Else the test above would pass without any prefix."""
    ids = jnp.array([PROMPTS[0]])
    options = dict(max_new_tokens=6, temperature=0)
    causal = rope_jax.generate(MODEL, PARAMS, ids, **options)
    both_ways = rope_jax.generate(MODEL, PARAMS, ids, **options, prefix_length=5)
    assert abs(causal.log_probs - both_ways.log_probs).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("prefix", "error", "says"),
    [
        (
            5,
            ValueError,
            r"prefix_length must be of tokens in a single call .*: got \[5\], rows had \[0\] tokens and have \[5, 1, 3\]",
        ),
        ([1, 1], ValueError, r"prefix_length must have shape \[B\]"),
        (1.0, TypeError, "prefix_length must be integer"),
    ],
)
def test_generate_refuses_a_prefix_longer_than_its_prompt(prefix, error, says):
    ids, mask = rope_jax.generation.pad_prompts(PROMPTS, buckets=5)
    with pytest.raises(error, match=says):
        rope_jax.generate(MODEL, PARAMS, ids, mask=mask, max_new_tokens=4, temperature=0, prefix_length=prefix)


def test_generate_refuses_a_prefix_behind_a_cache():
    _, cache = MODEL.apply(PARAMS, jnp.array([[7, 8]]), cache=MODEL.init_cache(batch=1, capacity=2))
    options = dict(max_new_tokens=2, temperature=0, cache=cache)
    with pytest.raises(ValueError, match="before which the cache is empty"):
        rope_jax.generate(MODEL, PARAMS, jnp.array([[1, 2]]), **options, prefix_length=4)
    # A prefix inside the cache has been read already.
    want = rope_jax.generate(MODEL, PARAMS, jnp.array([[1, 2]]), **options).tokens
    got = rope_jax.generate(MODEL, PARAMS, jnp.array([[1, 2]]), **options, prefix_length=2).tokens
    assert got.tolist() == want.tolist()
