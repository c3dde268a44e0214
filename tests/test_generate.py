import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import V, build, init, tokens

import rope_jax

MODEL = build()
PARAMS = init(MODEL)
FORWARD = jax.jit(MODEL.apply)


def by_hand(prompt, count):
    """Greedy, by the plain forward pass over everything written so far."""
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.array([ids + [0] * (16 - len(ids))])  # causal: what comes after changes nothing
        ids.append(int(jnp.argmax(FORWARD(PARAMS, padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def greedy(prompt, **kwargs):
    return rope_jax.generate(MODEL, PARAMS, prompt, temperature=0, **kwargs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_is_the_forward_pass_for_prompts_of_unequal_length(side):
    prompts = [[1, 2, 3, 4, 5], [7], [3, 3, 9]]
    width = max(map(len, prompts))
    pad = lambda row, fill: (
        [fill] * (width - len(row)) + row if side == "left" else row + [fill] * (width - len(row))
    )
    ids = jnp.array([pad(row, -1) for row in prompts])
    mask = jnp.array([pad([1] * len(row), 0) for row in prompts])
    out = greedy(ids, mask=mask, max_new_tokens=8)
    assert out.tokens.tolist() == [by_hand(row, 8) for row in prompts]
    assert out.tokens.dtype == jnp.int32 and out.length.tolist() == [8, 8, 8]


def test_bytes_are_tokens():
    model = build(vocab_size=256)
    prompt = np.frombuffer(b"ab", np.uint8)[None]
    out = rope_jax.generate(model, init(model), prompt, max_new_tokens=2, temperature=0)
    assert out.tokens.shape == (1, 2)


def test_one_token():
    prompt = tokens(1, 4)
    assert greedy(prompt, max_new_tokens=1).tokens.tolist() == [by_hand(prompt[0].tolist(), 1)]


def test_a_stop_token_ends_a_row_and_only_that_row():
    prompt = tokens(4, 3, seed=2)
    free = np.asarray(greedy(prompt, max_new_tokens=12).tokens)
    stop = int(free[0, 3])
    out = greedy(prompt, max_new_tokens=12, stop_token=stop)
    for row, length, unstopped in zip(np.asarray(out.tokens), out.length, free, strict=True):
        hits = np.flatnonzero(unstopped == stop)
        end = hits[0] + 1 if hits.size else 12
        assert length == end
        np.testing.assert_array_equal(row[:end], unstopped[:end])
        assert np.all(row[end:] == stop)
    assert out.length[0] <= 4


def test_a_seed_reproduces_and_another_does_not():
    draw = lambda seed, **kw: np.asarray(
        rope_jax.generate(MODEL, PARAMS, tokens(), max_new_tokens=20, rng=jax.random.key(seed), **kw).tokens
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.any(draw(0) != draw(1))
    assert draw(0, top_k=1).tolist() == np.asarray(greedy(tokens(), max_new_tokens=20).tokens).tolist()
    assert draw(0, top_p=1e-6).tolist() == draw(0, top_k=1).tolist()


class TestLength:
    SCHEDULE = rope_jax.LongRope(
        short_factor=[1.0] * 4, long_factor=[4.0, 3.0, 2.0, 5.0], original_length=8, factor=4.0, base=100.0
    )
    MODEL = build(rope=rope_jax.Rope(8, SCHEDULE))

    def written(self, model=MODEL, **kwargs):
        out = rope_jax.generate(model, PARAMS, tokens(2, 4), max_new_tokens=20, temperature=0, **kwargs)
        return out.tokens.tolist()

    @pytest.mark.parametrize("length", [8, 9])
    def test_one_choice_for_the_whole_generation(self, length):
        """The answer goes past the original length of 8; the frequencies are those of the length that was given."""
        divisors = self.SCHEDULE.short_factor if length == 8 else self.SCHEDULE.long_factor
        fixed = dataclasses.replace(self.SCHEDULE, short_factor=divisors, long_factor=divisors, length=1)
        forward = jax.jit(build(rope=rope_jax.Rope(8, fixed)).apply)
        ids = tokens(2, 4)
        for _ in range(20):  # by the plain forward pass over everything written so far
            padded = jnp.pad(ids, ((0, 0), (0, 24 - ids.shape[1])))
            ids = jnp.concatenate(
                [ids, jnp.argmax(forward(PARAMS, padded)[:, [ids.shape[1] - 1]], axis=-1)], axis=1
            )
        want = ids[:, 4:].tolist()
        assert self.written(length=length) == self.written(length=jnp.array(length)) == want
        assert want != self.written(length=17 - length)

    def test_of_each_row(self):
        rows = [self.written(length=length)[row] for row, length in enumerate((8, 9))]
        assert self.written(length=jnp.array([8, 9])) == rows

    def test_without_it_the_schedule_says_so(self):
        with pytest.raises(ValueError, match="LongRope needs a length"):
            self.written()
        with pytest.raises(ValueError, match="length must be left out: Llama3 does not depend on it"):
            self.written(MODEL, length=9)


def test_temperatures_seeds_and_padding_share_one_program():
    from rope_jax._generate import _generate

    _generate.clear_cache()
    for seed, temperature in enumerate((0.5, 1.0, 2.0)):
        mask = jnp.arange(9)[None] >= jnp.array([[seed], [0]])
        rope_jax.generate(
            MODEL, PARAMS, tokens(), mask=mask, max_new_tokens=3, rng=jax.random.key(seed), temperature=temperature
        )
    assert _generate._cache_size() == 1


class TestSample:
    LOGITS = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.08, 0.02]))

    def frequencies(self, **kwargs):
        keys = jax.random.split(jax.random.key(0), 20_000)
        drawn = jax.vmap(lambda key: rope_jax.sample(key, self.LOGITS, **kwargs))(keys)
        return np.bincount(drawn, minlength=5) / len(keys)

    @pytest.mark.parametrize(
        ("kwargs", "want"),
        [
            ({}, [0.4, 0.3, 0.2, 0.08, 0.02]),
            (dict(temperature=0.5), np.array([0.16, 0.09, 0.04, 0.0064, 0.0004]) / 0.2968),
            (dict(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
            (dict(top_k=99), [0.4, 0.3, 0.2, 0.08, 0.02]),
            (dict(top_p=0.65), [4 / 7, 3 / 7, 0, 0, 0]),
            (dict(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
            (dict(top_p=1.0), [0.4, 0.3, 0.2, 0.08, 0.02]),
            (dict(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0, 0]),
            (dict(temperature=0), [1, 0, 0, 0, 0]),
            (dict(temperature=np.float32(0.0)), [1, 0, 0, 0, 0]),
            (dict(temperature=1e-30), [1, 0, 0, 0, 0]),
        ],
    )
    def test_distribution(self, kwargs, want):
        # Five standard deviations of a share estimated from 20,000 draws: 5 * sqrt(1/4 / 20000) = 0.018.
        np.testing.assert_allclose(self.frequencies(**kwargs), want, atol=0.018)
        assert np.all(self.frequencies(**kwargs)[np.asarray(want) == 0] == 0)

    def test_traced_temperature_and_top_p(self):
        draw = jax.jit(
            lambda t, p: rope_jax.sample(jax.random.key(0), jnp.tile(self.LOGITS, (500, 1)), temperature=t, top_p=p)
        )
        assert np.all(draw(0.0, 1.0) == 0)
        assert set(np.asarray(draw(1.0, 0.65)).tolist()) == {0, 1}
        assert draw._cache_size() == 1

    def test_ties_at_the_cut_are_kept(self):
        logits = jnp.tile(jnp.array([1.0, 1.0, 1.0, -9.0]), (2000, 1))
        for cut in (dict(top_k=1), dict(top_p=0.1)):
            assert set(np.asarray(rope_jax.sample(jax.random.key(0), logits, **cut)).tolist()) == {0, 1, 2}


PROMPT = jnp.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (dict(rng=None), ValueError, "rng must be given with temperature 1.0, got None"),
        (dict(temperature=-1.0), ValueError, "temperature must be 0 or above and finite, got -1.0"),
        (dict(top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (dict(temperature=np.float32(-1)), ValueError, "temperature must be 0 or above and finite, got -1.0"),
        (dict(temperature=jnp.float32(jnp.nan)), ValueError, "temperature must be 0 or above and finite, got nan"),
        (dict(top_p=jnp.float32(0.0)), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=0.0), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        (dict(stop_token=V), ValueError, r"stop_token must be an integer in \[0, V=13\), got 13"),
        (dict(prompt=jnp.zeros(3, int)), ValueError, r"prompt must have shape \[B, T\]"),
        (dict(prompt=jnp.zeros((2, 0), int)), ValueError, "prompt must hold at least one row and one token"),
        (dict(prompt=PROMPT.at[0, 1].set(V)), ValueError, r"prompt must hold tokens in \[0, V=13\), got 0 to 13"),
        (dict(prompt=PROMPT.astype(float)), TypeError, "prompt must be integer"),
        (dict(mask=jnp.ones((2, 4), bool)), ValueError, "mask must have shape"),
        (dict(mask=jnp.array([[1, 1, 1], [0, 0, 0]])), ValueError, "mask must have a real token in every row"),
    ],
)
def test_refusals(kwargs, error, says):
    arguments = dict(prompt=PROMPT, max_new_tokens=2, rng=jax.random.key(0)) | kwargs
    with pytest.raises(error, match=says):
        rope_jax.generate(MODEL, PARAMS, **arguments)


@pytest.mark.parametrize("temperature", [0, 0.7, jnp.float32(0.0)])
def test_nan_is_no_token_and_stays_in_its_row(temperature):
    logits = jnp.array([[0.0, 9.0, 1.0], [0.0, jnp.nan, 1.0]])
    assert rope_jax.sample(jax.random.key(0), logits, temperature=temperature, top_k=1).tolist() == [1, -1]
