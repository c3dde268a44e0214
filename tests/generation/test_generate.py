import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import SLOW, V, build, init, tokens

import rope_jax

UNTIED = dict(tie_embeddings=False)  # tied to random embeddings, it would write one token again and again
MODEL = build(**UNTIED)
PARAMS = init(MODEL, seed=1)
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
    assert out.tokens.dtype == jnp.int32 and out.num_tokens.tolist() == [8, 8, 8]


def test_bytes_are_tokens():
    """Of any integer dtype, whose own largest number may be below the vocabulary's size."""
    text = np.frombuffer(b"ab", np.uint8)[None]
    for vocab in (256, 300):
        model = build(vocab_size=vocab, **UNTIED)
        params = init(model)
        how = dict(max_new_tokens=4, temperature=0)
        want = rope_jax.generate(model, params, text.astype(np.int32), **how).tokens
        other = rope_jax.generate(model, params, np.zeros_like(text), **how).tokens
        assert want.tolist() != other.tolist()
        for dtype in (np.uint8, np.int8, np.uint16, np.uint32, np.int64):
            np.testing.assert_array_equal(rope_jax.generate(model, params, text.astype(dtype), **how).tokens, want)
            logits = model.apply(params, jnp.asarray(text.astype(dtype)))
            np.testing.assert_array_equal(logits, model.apply(params, text.astype(np.int32)))
        traced = jax.jit(functools.partial(rope_jax.generate, model, params, **how))
        assert traced(jnp.array([[5, 2**32 - 1]], jnp.uint32)).tokens.tolist() == [[-1] * 4]


def test_one_token():
    prompt = tokens(1, 4)
    assert greedy(prompt, max_new_tokens=1).tokens.tolist() == [by_hand(prompt[0].tolist(), 1)]


@pytest.mark.parametrize("several", [False, True])
def test_a_stop_token_ends_a_row_and_only_that_row(several):
    prompt = tokens(4, 3, seed=2)
    free = np.asarray(greedy(prompt, max_new_tokens=12).tokens)
    stops = {int(free[0, 3]), int(free[1, 5])} if several else {int(free[0, 3])}
    out = greedy(prompt, max_new_tokens=12, stop_token=stops if several else stops.copy().pop())
    ends = []
    for row, length, unstopped in zip(np.asarray(out.tokens), out.num_tokens, free, strict=True):
        hits = np.flatnonzero(np.isin(unstopped, list(stops)))
        end = hits[0] + 1 if hits.size else 12
        assert length == end
        np.testing.assert_array_equal(row[:end], unstopped[:end])
        assert np.all(row[end:] == row[end - 1])
        ends.append(end)
    assert out.num_tokens[0] <= 4 and len(set(ends)) > 1


class TestSeeds:
    """Greedy decoding hides which key drew which token: these are sampled."""

    PROMPTS = ([1, 2, 3, 4, 5], [7], [3, 3, 9])
    KEY = jax.random.key(3)

    def written(self, *prompts, rng=KEY, width=5, **kwargs):
        ids, mask = rope_jax.generation.pad_prompts(prompts, buckets=width)
        out = rope_jax.generate(MODEL, PARAMS, ids, mask=mask, max_new_tokens=9, rng=rng, **kwargs)
        return out.tokens.tolist()

    def test_a_seed_reproduces_whatever_the_bucket_and_another_does_not(self):
        want = self.written(*self.PROMPTS)
        assert self.written(*self.PROMPTS) == want
        assert self.written(*self.PROMPTS, width=12) == want
        other = self.written(*self.PROMPTS, rng=jax.random.key(4))
        assert all(row != same for row, same in zip(other, want, strict=True))

    def test_the_cuts_leave_the_likeliest(self):
        want = greedy(jnp.array([[1, 2, 3, 4, 5]] * 3), max_new_tokens=9).tokens.tolist()
        rows = [self.PROMPTS[0]] * 3
        assert self.written(*rows, top_k=1) == self.written(*rows, top_p=1e-6) == want

    def test_a_row_does_not_depend_on_the_others(self):
        first, second, third = self.PROMPTS
        want = self.written(first, second, third)
        other = self.written(third, second, first)
        assert other[1] == want[1] and other[0] != want[2]
        assert want[0] != self.written(first, first, first)[1]

    def test_a_key_for_each_row_goes_with_it(self):
        first, second, third = self.PROMPTS
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self.KEY, jnp.arange(3))
        want = self.written(first, second, third)
        assert self.written(first, second, third, rng=keys) == want
        assert self.written(third, first, second, rng=keys[jnp.array([2, 0, 1])]) == [want[i] for i in (2, 0, 1)]
        assert self.written(second, rng=keys[1:2]) == want[1:2]


class TestStreaming:
    PROMPT = tokens(3, 4, seed=2)

    @pytest.mark.parametrize("sampled", [False, True])
    def test_each_token_that_counts_in_order(self, sampled):
        how = dict(rng=jax.random.key(5)) if sampled else dict(temperature=0)
        how |= dict(max_new_tokens=12)
        free = rope_jax.generate(MODEL, PARAMS, self.PROMPT, **how).tokens
        ends = lambda stops: [
            next((i for i, token in enumerate(row) if token in stops), 12) for row in free.tolist()
        ]
        pairs = itertools.combinations(range(MODEL.vocab_size), 2)
        how |= dict(stop_token=next(pair for pair in pairs if len(set(ends(pair))) == 3))
        want = rope_jax.generate(MODEL, PARAMS, self.PROMPT, **how)
        came = []
        out = rope_jax.generate(
            MODEL, PARAMS, self.PROMPT, **how, on_token=lambda row, token: came.append((row, token))
        )
        lengths = want.num_tokens.tolist()
        assert len(set(lengths)) > 1
        np.testing.assert_array_equal(out.tokens, want.tokens)
        assert out.num_tokens.tolist() == lengths and out.tokens.dtype == out.num_tokens.dtype == jnp.int32
        assert came == [(b, int(want.tokens[b, i])) for i in range(12) for b in range(3) if i < lengths[b]]

    def test_what_the_callback_raises_ends_it(self):
        class Enough(Exception):
            pass

        came = []

        def stop_at_five(row, token):
            came.append(row)
            if len(came) == 5:
                raise Enough

        with pytest.raises(Enough):
            greedy(self.PROMPT, max_new_tokens=12, on_token=stop_at_five)
        assert came == [0, 1, 2, 0, 1]

    def test_callbacks_share_their_programs(self):
        from rope_jax.generation.loop import _begin, _next_token

        _begin.clear_cache()
        _next_token.clear_cache()
        for stop in (3, 4):
            greedy(self.PROMPT, max_new_tokens=12, stop_token=stop, on_token=lambda row, token: None)
        assert _begin._cache_size() == _next_token._cache_size() == 1

    def test_not_inside_jit(self):
        with pytest.raises(ValueError, match="on_token must be left out inside jax.jit"):
            jax.jit(lambda prompt: greedy(prompt, max_new_tokens=2, on_token=print))(self.PROMPT)


class TestPrefix:
    """After a cache come the tokens that come after the concatenated prompt."""

    PROMPTS = ([1, 2, 3], [7], [3, 3])
    KEY = jax.random.key(8)

    @staticmethod
    def read(prefixes, model=MODEL, **kwargs):
        """The cache of these prefixes, with no room for more."""
        ids, mask = rope_jax.generation.pad_prompts(prefixes, buckets=[max(map(len, prefixes))])
        cache = model.init_cache(batch=len(prefixes), capacity=ids.shape[1], **kwargs)
        return jax.jit(model.apply)(PARAMS, ids, mask=mask, cache=cache)[1]

    def written(self, prompts, **kwargs):
        ids, mask = rope_jax.generation.pad_prompts(prompts, buckets=8)
        return rope_jax.generate(
            MODEL, PARAMS, ids, mask=mask, max_new_tokens=8, rng=self.KEY, **kwargs
        ).tokens.tolist()

    @pytest.mark.parametrize("prefixes", [([5, 6, 7, 8],), ([5, 6, 7, 8], [9], [2, 4])], ids=["shared", "each"])
    @pytest.mark.parametrize("stored", [dict(), dict(rotated=False)], ids=["rotated", "unrotated"])
    def test_of_one_row_or_of_each(self, prefixes, stored):
        each = prefixes * 3 if len(prefixes) == 1 else prefixes
        want = self.written([a + b for a, b in zip(each, self.PROMPTS, strict=True)])
        cache = self.read(prefixes, **stored)
        assert self.written(self.PROMPTS, cache=cache) == want
        assert want != self.written(self.PROMPTS)
        if not stored:
            assert self.written(self.PROMPTS, cache=cache, on_token=lambda row, token: None) == want

    def test_a_ring_keeps_its_size_and_is_there_afterwards(self):
        """Six slots and a window of 4: no answer outgrows it, and streaming does not consume it."""
        model = build(window=4, **UNTIED)
        prefix, prompt = [[5, 6], [9, 2]], jnp.array([[1, 2, 3], [7, 8, 9]])
        whole = jnp.concatenate([jnp.array(prefix), prompt], axis=1)
        want = rope_jax.generate(model, PARAMS, whole, max_new_tokens=12, temperature=0).tokens.tolist()
        cache = model.init_cache(batch=2, capacity=6, eviction="sliding")
        cache = model.apply(PARAMS, jnp.array(prefix), cache=cache)[1]
        how = dict(cache=cache, max_new_tokens=12, temperature=0)
        for _ in range(2):
            out = rope_jax.generate(model, PARAMS, prompt, **how, on_token=lambda row, token: None)
            assert out.tokens.tolist() == want

    def test_other_prefixes_of_the_same_shape_share_a_program(self):
        from rope_jax.generation.loop import run_on_device

        run_on_device.clear_cache()
        for prefix in ([5, 6, 7, 8], [1, 2, 3, 4]):
            self.written(self.PROMPTS, cache=self.read([prefix]))
        assert run_on_device._cache_size() == 1

    @pytest.mark.parametrize(
        ("cache", "kwargs", "says"),
        [
            (
                dict(batch=2),
                {},
                r"cache.key must have shape .* with layers=2, B=\{1, 3\}, K=2, H=8, got \(2, 2, 2, 4, 8\)",
            ),
            (dict(batch=0), {}, "batch must be at least 1, got 0"),
            (dict(batch=1), dict(cache_dtype=jnp.float32), "cache_dtype must be left out with a cache"),
        ],
    )
    def test_refusals(self, cache, kwargs, says):
        with pytest.raises(ValueError, match=says):
            self.written(self.PROMPTS, cache=MODEL.init_cache(capacity=4, **cache), **kwargs)

    def test_one_of_another_model_or_overflowed_is_refused(self):
        for other in (build(num_layers=1), build(num_kv_heads=4)):
            with pytest.raises(ValueError, match="cache.key must have shape .* with layers=2, .* K=2"):
                self.written(self.PROMPTS, cache=other.init_cache(batch=1, capacity=4))
        with pytest.raises(ValueError, match="cache must hold keys rotated by"):
            self.written(self.PROMPTS, cache=build(rope=SLOW).init_cache(batch=1, capacity=4))
        full = MODEL.init_cache(batch=1, capacity=4)
        full = dataclasses.replace(full, num_tokens=full.num_tokens + 5)
        with pytest.raises(ValueError, match=r"cache must not have overflowed, got S=4, rows \[5\]"):
            self.written(self.PROMPTS, cache=full)
        with pytest.raises(ValueError, match="prompt must fit in the cache: T=8 tokens were given, capacity S=6"):
            greedy(
                tokens(3, 8),
                cache=MODEL.init_cache(batch=3, capacity=6, eviction="sliding", num_sink_tokens=2),
                max_new_tokens=2,
            )

    def test_a_prompt_that_a_full_ring_cannot_take_is_no_answer(self):
        """An error where it is known how full it is, and where only run time knows that, -1."""
        prefix, prompt = jnp.zeros((2, 5), int), jnp.zeros((2, 4), int)
        mask = jnp.array([[1] * 4, [1, 0, 0, 0]])
        cache = MODEL.apply(
            PARAMS, prefix, cache=MODEL.init_cache(batch=2, capacity=6, eviction="sliding", num_sink_tokens=1)
        )[1]
        with pytest.raises(
            ValueError, match=r"prompt must fit .* rows would hold \[9, 6\]: this write would evict"
        ):
            greedy(prompt, mask=mask, cache=cache, max_new_tokens=3)
        out = jax.jit(lambda cache: greedy(prompt, mask=mask, cache=cache, max_new_tokens=3))(cache)
        assert out.tokens[0].tolist() == [-1, -1, -1] and np.all(out.tokens[1] >= 0)


def test_learned_positions_count_what_the_cache_holds():
    model = build(rope=None, position_embedding=rope_jax.models.LearnedPositions(num_positions=9))
    params = init(model)
    cache = model.apply(params, tokens(1, 4), cache=model.init_cache(batch=1, capacity=4))[1]
    says = "max_new_tokens must be at most 3 after a prompt of 7 tokens: position_embedding has 9 positions, got 4"
    with pytest.raises(ValueError, match=says):
        rope_jax.generate(model, params, tokens(2, 3), cache=cache, max_new_tokens=4, temperature=0)


@pytest.mark.parametrize("how", [dict(), dict(on_token=lambda row, token: None)], ids=["", "streamed"])
def test_weights_of_nan_write_no_token(how):
    broken = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    out = rope_jax.generate(MODEL, broken, tokens(2, 3), max_new_tokens=4, rng=jax.random.key(0), **how)
    assert out.tokens.tolist() == [[-1] * 4] * 2


class TestLength:
    SCHEDULE = rope_jax.LongRope(
        short_factor=[1.0] * 4, long_factor=[4.0, 3.0, 2.0, 5.0], original_length=8, factor=4.0, base=100.0
    )
    MODEL = build(rope=rope_jax.Rope(8, SCHEDULE), **UNTIED)

    def written(self, model=MODEL, **kwargs):
        out = rope_jax.generate(model, PARAMS, tokens(2, 4), max_new_tokens=20, temperature=0, **kwargs)
        return out.tokens.tolist()

    @pytest.mark.parametrize("length", [8, 9])
    def test_one_choice_for_the_whole_generation(self, length):
        """The answer goes past the original length of 8; the frequencies are those of the length that was given."""
        divisors = self.SCHEDULE.short_factor if length == 8 else self.SCHEDULE.long_factor
        fixed = dataclasses.replace(self.SCHEDULE, short_factor=divisors, long_factor=divisors, context_length=1)
        forward = jax.jit(build(rope=rope_jax.Rope(8, fixed), **UNTIED).apply)
        ids = tokens(2, 4)
        for _ in range(20):  # by the plain forward pass over everything written so far
            padded = jnp.pad(ids, ((0, 0), (0, 24 - ids.shape[1])))
            ids = jnp.concatenate(
                [ids, jnp.argmax(forward(PARAMS, padded)[:, [ids.shape[1] - 1]], axis=-1)], axis=1
            )
        want = ids[:, 4:].tolist()
        assert self.written(context_length=length) == self.written(context_length=jnp.array(length)) == want
        assert want != self.written(context_length=17 - length)

    def test_of_each_row(self):
        rows = [self.written(context_length=length)[row] for row, length in enumerate((8, 9))]
        assert self.written(context_length=jnp.array([8, 9])) == rows

    def test_a_schedule_that_has_none_says_so(self):
        with pytest.raises(ValueError, match="context_length must be left out: Llama3 does not depend on it"):
            self.written(MODEL, context_length=9)


def test_temperatures_seeds_stops_and_padding_share_one_program():
    from rope_jax.generation.loop import run_on_device

    run_on_device.clear_cache()
    for seed, temperature in enumerate((0.5, 1.0, 2.0)):
        how = dict(max_new_tokens=3, rng=jax.random.key(seed), temperature=temperature, stop_token=seed)
        mask = jnp.arange(9)[None] >= jnp.array([[seed], [0]])
        rope_jax.generate(MODEL, PARAMS, tokens(), mask=mask, **how)
    assert run_on_device._cache_size() == 1


class TestSample:
    LOGITS = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.08, 0.02]))

    def frequencies(self, **kwargs):
        keys = jax.random.split(jax.random.key(0), 20_000)
        drawn = jax.vmap(lambda key: rope_jax.generation.sample(key, self.LOGITS, **kwargs))(keys)
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
            lambda t, p: rope_jax.generation.sample(
                jax.random.key(0), jnp.tile(self.LOGITS, (500, 1)), temperature=t, top_p=p
            )
        )
        assert np.all(draw(0.0, 1.0) == 0)
        assert set(np.asarray(draw(1.0, 0.65)).tolist()) == {0, 1}
        assert np.all(draw(1.0, 0.0) == np.asarray(draw(1.0, 1e-46))) and np.all(draw(1.0, 1e-46) == 0)
        for temperature, top_p in (
            (np.nan, 0.5),
            (-1.0, 0.5),
            (np.inf, 0.5),
            (1.0, np.nan),
            (1.0, -0.1),
            (1.0, 1.5),
        ):
            assert np.all(draw(temperature, top_p) == -1)
        assert draw._cache_size() == 1

    def test_a_single_key(self):
        with pytest.raises(ValueError, match=r"rng must have shape \[\], got \(2,\)"):
            rope_jax.generation.sample(jax.random.split(jax.random.key(0)), self.LOGITS)

    def test_ties_at_the_cut_are_kept(self):
        logits = jnp.tile(jnp.array([1.0, 1.0, 1.0, -9.0]), (2000, 1))
        for cut in (dict(top_k=1), dict(top_p=0.1)):
            assert set(np.asarray(rope_jax.generation.sample(jax.random.key(0), logits, **cut)).tolist()) == {
                0,
                1,
                2,
            }


PROMPT = jnp.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (dict(rng=None), ValueError, "rng must be given with temperature 1.0, got None"),
        (dict(temperature=-1.0), ValueError, "temperature must be 0 or above and finite, got -1.0"),
        (dict(top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (dict(temperature=np.float32(-1)), ValueError, "temperature must be 0 or above and finite, got -1.0"),
        (dict(temperature=jnp.float32(jnp.nan)), ValueError, "temperature must be finite, got nan"),
        (dict(top_p=jnp.float32(0.0)), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=0.0), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_k=2.5), TypeError, "top_k must be an integer, got 2.5"),
        (dict(temperature="a"), TypeError, "temperature must be a real number, got 'a'"),
        (dict(rng=[0, 1]), TypeError, r"rng must be a key, as jax.random.key\(0\), got \[0, 1\]"),
        (dict(top_p=1.5), ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        (dict(stop_token=V), ValueError, r"stop_token must be in \[0, V=13\), got 13"),
        (dict(stop_token=(-1, 3)), ValueError, r"stop_token must be in \[0, V=13\), got \(-1, 3\)"),
        (dict(stop_token=(1, 2.5)), TypeError, "stop_token must be an integer, got 2.5"),
        (dict(rng=7), TypeError, r"rng must be a key, as jax.random.key\(7\), got 7"),
        (
            dict(rng=jax.random.split(jax.random.key(0), 3)),
            ValueError,
            r"rng must have shape \[B\] with B=2, got \(3,\)",
        ),
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
    assert rope_jax.generation.sample(jax.random.key(0), logits, temperature=temperature, top_k=1).tolist() == [
        1,
        -1,
    ]
