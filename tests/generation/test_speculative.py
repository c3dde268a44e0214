import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import V, build, init, tokens

import rope_jax
from rope_jax.generation.speculative import _speculative_decode

UNTIED = dict(tie_embeddings=False)  # tied to random embeddings, it would write one token again and again
MODEL = build(**UNTIED)
PARAMS = init(MODEL, seed=1)
SMALL = build(num_layers=1, **UNTIED)
PROMPTS = ([1, 2, 3, 4, 5], [7], [3, 3, 9])
COUNT, AHEAD = 14, 3  # max_new_tokens and draft_tokens
DRAFTS = {
    "the target itself": (MODEL, PARAMS),
    "half right": (MODEL, jax.tree.map(lambda p, q: 0.95 * p + 0.05 * q, PARAMS, init(MODEL, seed=3))),
    "another model": (SMALL, init(SMALL, seed=1)),
}
FORWARD = {model: jax.jit(model.apply) for model in (MODEL, SMALL)}


def by_hand(model, params, ids, count):
    """Greedy, by the plain forward pass over everything so far."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        padded = jnp.array([ids + [0] * (24 - len(ids))])  # causal: what comes after changes nothing
        ids.append(int(jnp.argmax(FORWARD[model](params, padded)[0, len(ids) - 1])))
    return ids[start:]


def rounds_by_hand(draft, prompt, want):
    """What the draft gets accepted of each round, if this is what the target wants: a list of numbers."""
    accepted, written = [], 1
    while written < len(want):
        proposed = by_hand(*draft, [*prompt, *want[:written]], AHEAD)
        agrees = [a == b for a, b in zip(proposed, want[written:], strict=False)]
        accepted.append((*agrees, False).index(False))
        written += accepted[-1] + 1
    return accepted


def speculative_decode(draft, prompts=PROMPTS, **kwargs):
    ids, mask = rope_jax.generation.pad_prompts(prompts, buckets=5)
    sizes = dict(max_new_tokens=COUNT, draft_tokens=AHEAD)
    return rope_jax.generation.speculative_decode(MODEL, PARAMS, *draft, ids, mask=mask, **(sizes | kwargs))


WANT = [by_hand(MODEL, PARAMS, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.parametrize("name", DRAFTS)
def test_the_targets_greedy_tokens_whatever_the_draft(name):
    """Tokens, accepted proposals and calls are those of a simulation that knows no cache, row by row."""
    rounds = [rounds_by_hand(DRAFTS[name], *row) for row in zip(PROMPTS, WANT, strict=True)]
    print(f"{name}: accepted in each round of {AHEAD}", rounds)
    out = speculative_decode(DRAFTS[name])
    assert out.tokens.tolist() == WANT and out.num_tokens.tolist() == [COUNT] * 3
    assert out.accepted.tolist() == [sum(row) for row in rounds]
    assert out.calls == 1 + max(map(len, rounds))
    share = sum(map(sum, rounds)) / (AHEAD * sum(map(len, rounds)))
    low, high = {"the target itself": (0.8, 1), "half right": (0.3, 0.7), "another model": (0, 0.1)}[name]
    assert low <= share <= high  # the three are what they are called
    if name == "half right":
        assert len(set(map(len, rounds))) > 1  # rows need different numbers of rounds


@pytest.mark.parametrize("name", ["the target itself", "half right"])
def test_rows_stop_one_by_one_even_inside_a_round(name):
    stops = (WANT[0][12], WANT[1][9])
    ends = [min(row.index(stop) + 1 if stop in row else COUNT for stop in stops) for row in WANT]
    out = speculative_decode(DRAFTS[name], stop_token=stops)
    assert out.num_tokens.tolist() == ends and len(set(ends)) == 3
    assert out.tokens.tolist() == [
        row[:end] + [row[end - 1]] * (COUNT - end) for row, end in zip(WANT, ends, strict=True)
    ]
    rounds = [rounds_by_hand(DRAFTS[name], p, w[:end]) for p, w, end in zip(PROMPTS, WANT, ends, strict=True)]
    assert out.accepted.tolist() == [sum(row) for row in rounds]
    assert out.calls == 1 + max(map(len, rounds))


def test_one_compilation_for_prompts_stops_and_weights():
    _speculative_decode.clear_cache()
    for seed in range(3):
        params = init(SMALL, seed)
        speculative_decode((SMALL, params), [[seed + 1] * (seed + 1)] * 3, stop_token=seed)
    assert _speculative_decode._cache_size() == 1


def test_one_token_needs_no_draft():
    out = speculative_decode(DRAFTS["half right"], max_new_tokens=1)
    assert out.tokens.tolist() == [row[:1] for row in WANT] and out.calls == 1 and not out.accepted.any()


def test_a_window_and_eight_bits_are_those_of_the_target():
    model = build(window=4, **UNTIED)
    prompt = tokens(4, 5)
    written = [
        rope_jax.generate(
            model, PARAMS, prompt, max_new_tokens=12, temperature=0, cache_dtype=dtype
        ).tokens.tolist()
        for dtype in (jnp.int8, jnp.float32)
    ]
    out = rope_jax.generation.speculative_decode(
        model, PARAMS, *DRAFTS["half right"], prompt, max_new_tokens=12, cache_dtype=jnp.int8
    )
    assert out.tokens.tolist() == written[0] != written[1]


def test_frequencies_of_a_length_are_those_that_were_given():
    schedule = rope_jax.DynamicNTK(original_length=8, factor=4.0, base=100.0)
    model = build(rope=rope_jax.Rope(8, schedule), **UNTIED)
    prompt = tokens(2, 5)
    want = rope_jax.generate(model, PARAMS, prompt, max_new_tokens=9, temperature=0, context_length=14).tokens
    out = rope_jax.generation.speculative_decode(
        model, PARAMS, *DRAFTS["half right"], prompt, max_new_tokens=9, context_length=14
    )
    assert out.tokens.tolist() == want.tolist()
    with pytest.raises(
        ValueError, match="context_length must be given with a target whose frequencies depend on it"
    ):
        rope_jax.generation.speculative_decode(model, PARAMS, *DRAFTS["half right"], prompt, max_new_tokens=9)


def broken(params):
    return jax.tree.map(lambda p: p * jnp.nan, params)


def test_a_draft_of_nan_costs_time_and_a_target_of_nan_the_answer():
    out = speculative_decode((SMALL, broken(init(SMALL))))
    assert out.tokens.tolist() == WANT
    ids, mask = rope_jax.generation.pad_prompts(PROMPTS, buckets=5)
    sizes = dict(mask=mask, max_new_tokens=COUNT, draft_tokens=AHEAD)
    out = rope_jax.generation.speculative_decode(MODEL, broken(PARAMS), SMALL, init(SMALL), ids, **sizes)
    assert np.all(out.tokens == -1) and out.num_tokens.tolist() == [COUNT] * 3


LEARNED = build(rope=None, position_embedding=rope_jax.models.LearnedPositions(num_positions=9))


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (
            dict(draft=build(vocab_size=14)),
            ValueError,
            "draft must have the target's vocabulary, V=13 tokens, got V=14",
        ),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (dict(draft_tokens=0), ValueError, "draft_tokens must be at least 1, got 0"),
        (dict(draft_tokens=1.5), TypeError, "draft_tokens must be an integer, got 1.5"),
        (dict(prompt=jnp.zeros((2, 0), int)), ValueError, "prompt must hold at least one row and one token"),
        (dict(prompt=jnp.full((2, 3), V)), ValueError, r"prompt must hold tokens in \[0, V=13\), got 13 to 13"),
        (dict(mask=jnp.array([[1, 1, 1], [0, 0, 0]])), ValueError, "mask must have a real token in every row"),
        (dict(stop_token=(1, V)), ValueError, r"stop_token must be in \[0, V=13\), got \(1, 13\)"),
        (
            dict(draft=LEARNED, max_new_tokens=4),
            ValueError,
            r"max_new_tokens \+ draft_tokens must be at most 7 after a prompt of 3 tokens: .* 9 positions, got 8",
        ),
    ],
)
def test_refusals(kwargs, error, says):
    arguments = dict(draft=SMALL, draft_params={}, prompt=jnp.zeros((2, 3), int), max_new_tokens=2) | kwargs
    with pytest.raises(error, match=says):
        rope_jax.generation.speculative_decode(MODEL, PARAMS, **arguments)
