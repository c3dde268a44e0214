import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import TOLERANCE, build, init, oracle

import rope_jax
from rope_jax.generation.beam import _beam_search

V, COUNT = 3, 4
MODEL = build(vocab_size=V)
PARAMS = init(MODEL)
PROMPTS = ([1, 2, 0, 1], [2], [0, 2])
ANSWERS = list(itertools.product(range(V), repeat=COUNT))
# Each of the tokens of an answer: its logit and the logarithm of the sum of all, of float32 logits.
SCORE = COUNT * 2 * TOLERANCE


def log_probabilities(prompt):
    """log p of each token of every answer, by the model in float64 over the whole text: a dict of ``[COUNT]``."""
    ids = np.array([[*prompt, *answer] for answer in ANSWERS])
    logits = oracle(MODEL, PARAMS, ids)[:, len(prompt) - 1 : -1]
    largest = logits.max(-1, keepdims=True)
    logits = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    rows = np.take_along_axis(logits, np.array(ANSWERS)[..., None], axis=-1)[..., 0]
    return dict(zip(ANSWERS, rows, strict=True))


TABLES = [log_probabilities(prompt) for prompt in PROMPTS]


def scores_of(table, stops, length):
    """Every answer of so many tokens, cut after the first stop, with its score."""
    found = {}
    for answer, row in table.items():
        end = next((i + 1 for i, token in enumerate(answer[:length]) if token in stops), length)
        found[answer[:end]] = row[:end].sum()
    return found


def search(prompts=PROMPTS, **kwargs):
    ids, mask = rope_jax.generation.pad_prompts(prompts, buckets=4)
    return rope_jax.generation.beam_search(MODEL, PARAMS, ids, mask=mask, **(dict(max_new_tokens=COUNT) | kwargs))


def assert_found(out, row, want):
    """The answers of a row are these, in this order, with these scores."""
    tokens, length, score = (np.asarray(leaf[row]) for leaf in out)
    found = [tuple(answer[:end].tolist()) for answer, end in zip(tokens, length, strict=True)]
    assert found[: len(want)] == list(want)
    worst = np.max(np.abs(score[: len(want)] - list(want.values())))
    print(f"worst difference of a score: {worst:.1e}, of {SCORE:.1e} allowed")
    assert worst < SCORE
    assert np.all(score[len(want) :] == -np.inf)
    assert all(np.all(answer[end:] == answer[end - 1]) for answer, end in zip(tokens, length, strict=True))


@pytest.mark.parametrize("stops", [(), (1,)])
def test_enough_beams_find_what_an_exhaustive_search_finds(stops):
    """27 beams hold every answer of three tokens, so that none of four is lost."""
    out = search(beams=27, stop_token=stops)
    for row, table in enumerate(TABLES):
        every = scores_of(table, stops, COUNT)
        assert_found(out, row, dict(sorted(every.items(), key=lambda item: -item[1])[:27]))


@pytest.mark.parametrize("penalty", [-1.0, 0.5, 1.0, 3.0])
def test_scores_are_divided_by_a_power_of_the_length(penalty):
    out = search(beams=27, stop_token=1, length_penalty=penalty)
    for row, table in enumerate(TABLES):
        every = {answer: score / len(answer) ** penalty for answer, score in scores_of(table, (1,), COUNT).items()}
        assert_found(out, row, dict(sorted(every.items(), key=lambda item: -item[1])[:27]))


@pytest.mark.parametrize("rows", [1, 3])
def test_after_a_cache_come_the_beams_of_the_whole_prompt(rows):
    prefixes = [[2, 1, 0]] if rows == 1 else [[2, 1, 0], [1, 1, 2], [0, 2, 2]]
    cache = MODEL.init_cache(batch=rows, capacity=3)
    _, cache = MODEL.apply(PARAMS, jnp.array(prefixes), cache=cache)
    out = search(beams=3, cache=cache)
    for b, prompt in enumerate(PROMPTS):
        whole = jnp.array([[*prefixes[b % rows], *prompt]])
        want = rope_jax.generation.beam_search(MODEL, PARAMS, whole, beams=3, max_new_tokens=COUNT)
        assert out.tokens[b].tolist() == want.tokens[0].tolist()
        np.testing.assert_allclose(out.score[b], want.score[0], atol=SCORE)


def test_few_beams_keep_the_best_of_each_length():
    """Against the same by hand; and the beams do change places, so that each needs the keys of another."""
    out = search(beams=2, stop_token=1)
    changed = False
    for row, table in enumerate(TABLES):
        kept = {(): 0.0}
        for length in range(1, COUNT + 1):
            longer = scores_of(table, (1,), length)
            going = {answer: s for answer, s in longer.items() if answer in kept or answer[:-1] in kept}
            best = dict(sorted(going.items(), key=lambda item: -item[1])[:2])
            changed |= [answer[: length - 1] for answer in best] != list(kept)
            kept = best
        assert_found(out, row, kept)
    assert changed


def test_one_beam_is_greedy():
    ids, mask = rope_jax.generation.pad_prompts(PROMPTS, buckets=4)
    want = rope_jax.generate(MODEL, PARAMS, ids, mask=mask, max_new_tokens=COUNT, temperature=0, stop_token=1)
    out = search(beams=1, stop_token=1)
    assert (
        out.tokens[:, 0].tolist() == want.tokens.tolist()
        and out.num_tokens[:, 0].tolist() == want.num_tokens.tolist()
    )


def test_other_prompts_and_stops_share_a_program():
    _beam_search.clear_cache()
    search(beams=2, stop_token=1)
    search([[1], [2, 2], [0]], beams=2, stop_token=2)
    assert _beam_search._cache_size() == 1


def test_weights_of_nan_have_no_answer():
    broken = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    out = rope_jax.generation.beam_search(MODEL, broken, jnp.array([[1, 2]]), beams=2, max_new_tokens=COUNT)
    assert np.all(out.tokens == -1) and np.all(np.isnan(out.score))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        (dict(beams=0), "beams must be at least 1, got 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(length_penalty=float("inf")), "length_penalty must be finite, got inf"),
        (dict(length_penalty=200), "length_penalty must be moderate, got 200 for 2 tokens"),
        (dict(stop_token=V), r"stop_token must be in \[0, V=3\), got 3"),
        (dict(prompt=jnp.zeros((2, 0), int)), "prompt must hold at least one row and one token"),
    ],
)
def test_refusals(kwargs, says):
    arguments = dict(prompt=jnp.zeros((2, 3), int), beams=2, max_new_tokens=2) | kwargs
    with pytest.raises(ValueError, match=says):
        rope_jax.generation.beam_search(MODEL, PARAMS, **arguments)
