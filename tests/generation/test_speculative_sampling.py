"""Speculative decoding at a temperature: the target's own distribution, whatever the draft, by counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import build, init

import rope_jax

V, COUNT, ROWS = 3, 3, 8192
MODEL = build(vocab_size=V, tie_embeddings=False)
PARAMS = init(MODEL, seed=1)
DRAFT = build(vocab_size=V, tie_embeddings=False, num_layers=1)
DRAFT_PARAMS = init(DRAFT, seed=5)
PROMPT = [1, 2, 0]
ANSWERS = np.array(list(itertools.product(range(V), repeat=COUNT)))


def distribution(model, params, temperature, top_k=None):
    """The probability of every answer of three tokens, from the plain forward pass, float64."""
    ids = np.array([[*PROMPT, *answer] for answer in ANSWERS])
    logits = np.asarray(model.apply(params, jnp.asarray(ids)), np.float64)[:, len(PROMPT) - 1 : -1] / temperature
    if top_k is not None:
        logits = np.where(logits < np.sort(logits, axis=-1)[..., -top_k, None], -np.inf, logits)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.take_along_axis(p, ANSWERS[..., None], axis=-1)[..., 0].prod(axis=1)


def decode(**kwargs):
    options = dict(max_new_tokens=COUNT, draft_tokens=2, rng=jax.random.key(7), temperature=0.8) | kwargs
    draft = options.pop("draft", (DRAFT, DRAFT_PARAMS))
    prompt = options.pop("prompt", jnp.tile(jnp.array([PROMPT]), (ROWS, 1)))
    return rope_jax.generation.speculative_decode(MODEL, PARAMS, *draft, prompt, **options)


def chi_square(tokens, p):
    """The statistic, and the limit that a right distribution passes but once in a million."""
    counts = np.bincount(np.ravel_multi_index(np.asarray(tokens).T, (V,) * COUNT), minlength=len(p))
    assert not counts[p == 0].any()
    expected = len(tokens) * p[p > 0]
    degrees = len(expected) - 1
    # Wilson and Hilferty 1931: the cube root of the statistic over its degrees is nearly normal.
    limit = degrees * (1 - 2 / (9 * degrees) + 4.76 * np.sqrt(2 / (9 * degrees))) ** 3
    return ((counts[p > 0] - expected) ** 2 / expected).sum(), limit


@pytest.mark.parametrize("options", [{}, dict(top_k=2), dict(temperature=1.7), dict(draft_tokens=1)], ids=str)
def test_the_distribution_is_the_target_s(options):
    out = decode(**options)
    given = dict(temperature=0.8, top_k=None) | {k: v for k, v in options.items() if k != "draft_tokens"}
    statistic, limit = chi_square(out.tokens, distribution(MODEL, PARAMS, **given))
    print(f"chi-square {statistic:.1f}, of {limit:.1f} allowed; accepted {float(out.accepted.mean()):.2f}")
    assert statistic < limit
    # The draft's own distribution is another: the test would see it.
    other, limit = chi_square(out.tokens, np.maximum(distribution(DRAFT, DRAFT_PARAMS, **given), 1e-12))
    assert other > 4 * limit
    assert 0 < float(out.accepted.mean()) < COUNT - 1


def test_the_target_as_its_own_draft_is_always_accepted():
    out = decode(draft=(MODEL, PARAMS))
    # Two proposals and one token more come of each round; the first token is the prefill's.
    assert float((out.accepted == 2).mean()) > 0.999  # p and q differ by rounding
    assert int(out.calls) <= 3


def test_a_row_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(1), 4)
    prompt = jnp.array([PROMPT] * 4)
    want = decode(prompt=prompt, rng=keys).tokens
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_array_equal(decode(prompt=prompt, rng=keys[order]).tokens, want[order])


def test_greedy_is_a_temperature_of_0():
    prompt = jnp.array([PROMPT])
    want = rope_jax.generate(MODEL, PARAMS, prompt, max_new_tokens=COUNT, temperature=0).tokens
    for temperature in (0, jnp.float32(0)):
        np.testing.assert_array_equal(decode(prompt=prompt, temperature=temperature).tokens, want)
    traced = jax.jit(lambda temperature: decode(prompt=prompt, temperature=temperature).tokens)
    np.testing.assert_array_equal(traced(0.0), want)


def test_weights_of_nan():
    prompt = jnp.array([PROMPT])
    broken = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    out = rope_jax.generation.speculative_decode(
        MODEL, broken, DRAFT, DRAFT_PARAMS, prompt, max_new_tokens=COUNT, rng=jax.random.key(0), temperature=1.0
    )
    assert out.tokens.tolist() == [[-1] * COUNT]
    # A draft of NaN proposes token 0, and the target decides.
    nan_draft = DRAFT, jax.tree.map(lambda p: p * jnp.nan, DRAFT_PARAMS)
    statistic, limit = chi_square(decode(draft=nan_draft).tokens, distribution(MODEL, PARAMS, 0.8))
    assert statistic < limit


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_second_round_goes_on_from_both_caches(temperature):
    how = dict(rng=jax.random.key(3), temperature=temperature, prompt=jnp.array([PROMPT, [2, 2, 1]]))
    first = decode(**how, stop_token=1)
    lengths = [3 + count - 1 for count in first.num_tokens.tolist()]
    assert first.cache.num_tokens.tolist() == first.draft_cache.num_tokens.tolist() == lengths
    question = jnp.concatenate([first.tokens[:, -1:], jnp.array([[2, 0], [0, 0]])], axis=1)
    caches = dict(cache=first.cache, draft_cache=first.draft_cache)
    second = decode(**(how | dict(prompt=question)), **caches)
    for b, count in enumerate(first.num_tokens.tolist()):
        whole = [*how["prompt"][b].tolist(), *first.tokens[b, :count].tolist(), *question[b, 1:].tolist()]
        key = jax.random.fold_in(how["rng"], b)[None]
        alone = decode(**(how | dict(prompt=jnp.array([whole]), rng=key)))
        assert second.tokens[b].tolist() == alone.tokens[0].tolist()


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        (dict(rng=None), "rng must be given with temperature 0.8, got None"),
        (dict(temperature=-1.0), "temperature must be 0 or above and finite, got -1.0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(cache=MODEL.init_cache(batch=1, capacity=8)), "cache and draft_cache must be given together"),
        (
            dict(
                cache=MODEL.apply(PARAMS, jnp.array([[1, 2]]), cache=MODEL.init_cache(batch=1, capacity=8))[1],
                draft_cache=DRAFT.init_cache(batch=1, capacity=8),
            ),
            r"cache and draft_cache must hold the same tokens, got \[2\] and \[0\]",
        ),
        (
            dict(
                cache=MODEL.init_cache(batch=1, capacity=8, eviction="sliding"),
                draft_cache=DRAFT.init_cache(batch=1, capacity=8),
            ),
            "cache must not evict tokens",
        ),
    ],
)
def test_refusals(kwargs, says):
    with pytest.raises(ValueError, match=says):
        decode(prompt=jnp.array([PROMPT]), **kwargs)
