"""What an application needs of generate: the cache, log-probabilities, changed logits, samples, positions of axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import V, build, init

import rope_jax
from rope_jax.generation import LogitBias, MinP, RepetitionPenalty

UNTIED = dict(tie_embeddings=False)
MODEL = build(**UNTIED)
PARAMS = init(MODEL, seed=1)
PROMPTS = ([1, 2, 3, 4, 5], [7], [3, 3, 9])
COUNT = 6
FORWARD = jax.jit(MODEL.apply)


@functools.cache
def padded():
    return rope_jax.generation.pad_prompts(PROMPTS, buckets=5)


def generate(*, model=MODEL, params=PARAMS, **kwargs):
    ids, mask = padded()
    options = dict(max_new_tokens=COUNT, temperature=0, mask=mask) | kwargs
    return rope_jax.generate(model, params, ids, **options)


def stop_of(free):
    """A token that ends the rows of a free run at different places."""
    for stop in range(V):
        ends = [row.index(stop) if stop in row else COUNT for row in free.tokens.tolist()]
        if len(set(ends)) > 1:
            return stop
    raise AssertionError("no token ends rows at different places")


def logits_after(prefix):
    """Logits of the plain forward pass after all of ``prefix``, float64."""
    ids = jnp.array([list(prefix) + [0] * (24 - len(prefix))])
    return np.asarray(FORWARD(PARAMS, ids)[0, len(prefix) - 1], np.float64)


@pytest.mark.parametrize("streamed", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_log_probabilities_are_the_model_s(sampled, streamed):
    how = dict(temperature=0.7, top_k=3, rng=jax.random.key(2)) if sampled else {}
    stop = stop_of(generate(**how))
    out = generate(**how, stop_token=stop, on_token=(lambda row, token: None) if streamed else None)
    assert out.log_probs.shape == (3, COUNT) and out.log_probs.dtype == jnp.float32
    for prompt, row, log_probs, count in zip(
        PROMPTS, out.tokens.tolist(), out.log_probs, out.num_tokens, strict=True
    ):
        want = []
        for i in range(int(count)):
            logits = logits_after(prompt + row[:i])
            want.append(logits[row[i]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        np.testing.assert_allclose(log_probs[: len(want)], want, atol=2e-5)  # sums in another order, logits of 5
        np.testing.assert_array_equal(log_probs[len(want) :], 0)


@pytest.mark.parametrize("streamed", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("eviction", [None, "sliding"])
def test_a_second_round_goes_on_from_the_cache(streamed, eviction):
    model = MODEL if eviction is None else MODEL.clone(window=9)
    on_token = (lambda row, token: None) if streamed else None
    cache = None if eviction is None else model.init_cache(batch=3, capacity=14, eviction=eviction)
    first = generate(model=model, cache=cache)
    stop = stop_of(first)
    first = generate(model=model, cache=cache, stop_token=stop, on_token=on_token)
    counts = first.num_tokens.tolist()
    assert len(set(counts)) > 1
    lengths = [len(prompt) + count - 1 for prompt, count in zip(PROMPTS, counts, strict=True)]
    assert first.cache.num_tokens.tolist() == lengths
    questions = [[row[count - 1], 2, 4] for row, count in zip(first.tokens.tolist(), counts, strict=True)]
    second = rope_jax.generate(
        model,
        PARAMS,
        jnp.array(questions),
        cache=first.cache,
        max_new_tokens=COUNT,
        temperature=0,
        on_token=on_token,
    )
    # From scratch, one row at a time.
    for b, (prompt, count) in enumerate(zip(PROMPTS, counts, strict=True)):
        everything = [*prompt, *first.tokens[b, :count].tolist(), 2, 4]
        alone = rope_jax.generate(model, PARAMS, jnp.array([everything]), max_new_tokens=COUNT, temperature=0)
        assert second.tokens[b].tolist() == alone.tokens[0].tolist()
        np.testing.assert_allclose(second.log_probs[b], alone.log_probs[0], atol=2e-5)


def test_several_answers_to_each_prompt():
    keys = jax.random.split(jax.random.key(3), 6)
    out = generate(num_samples=2, temperature=1.0, rng=keys)
    assert out.tokens.shape == (6, COUNT) and out.cache.num_tokens.shape == (6,)
    ids, mask = padded()
    for b in range(3):
        for j in range(2):
            alone = rope_jax.generate(
                MODEL, PARAMS, ids[b : b + 1], mask=mask[b : b + 1], max_new_tokens=COUNT, rng=keys[2 * b + j][None]
            )
            assert out.tokens[2 * b + j].tolist() == alone.tokens[0].tolist()
    assert out.tokens[0].tolist() != out.tokens[1].tolist()
    same = generate(num_samples=2)
    np.testing.assert_array_equal(same.tokens[::2], same.tokens[1::2])
    np.testing.assert_array_equal(same.tokens[::2], generate().tokens)


@pytest.mark.parametrize("streamed", [False, True], ids=["device", "host"])
def test_logits_are_changed_with_all_that_was_written(streamed):
    """The next token is the likeliest that stands nowhere yet: by hand from the plain forward pass."""

    def nothing_twice(logits, tokens, step):
        assert logits.shape == (3, V) and tokens.shape == (3, 5 + COUNT) and step.shape == ()
        seen = jnp.any(tokens[:, :, None] == jnp.arange(V), axis=1)
        return jnp.where(seen, -jnp.inf, logits)

    out = generate(logits_fn=nothing_twice, on_token=(lambda row, token: None) if streamed else None)
    for prompt, row in zip(PROMPTS, out.tokens.tolist(), strict=True):
        written = list(prompt)
        for token in row:
            logits = logits_after(written)
            logits[written] = -np.inf
            assert token == int(np.argmax(logits))
            written.append(token)


def test_the_step_is_counted():
    stepwise = lambda logits, tokens, step: jnp.where(jnp.arange(V) == step + 2, 50.0, logits)
    assert generate(logits_fn=stepwise).tokens.tolist() == [[2, 3, 4, 5, 6, 7]] * 3


def test_ready_ones():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 7)).astype(np.float32)
    tokens = jnp.array([[1, 1, 4, -1, -1], [0, -1, -1, -1, -1]])
    want = logits.copy()
    for row, seen in ((0, [1, 4]), (1, [0])):
        want[row, seen] = np.where(want[row, seen] > 0, want[row, seen] / 1.5, want[row, seen] * 1.5)
    np.testing.assert_allclose(RepetitionPenalty(1.5)(jnp.asarray(logits), tokens, 0), want, rtol=1e-6)
    shares = np.exp(logits) / np.exp(logits).max(axis=1, keepdims=True)
    kept = np.isfinite(MinP(0.3)(jnp.asarray(logits), tokens, 0))
    np.testing.assert_array_equal(kept, shares >= 0.3)
    # 1e-8 is 0 in float16, whose logarithm would keep everything.
    assert MinP(1e-8)(jnp.array([10.0, -50.0], jnp.float16), None, 0).tolist() == [10.0, -np.inf]
    many = jnp.ones((1, 300))  # more tokens than int8 counts
    np.testing.assert_array_equal(
        RepetitionPenalty(2.0)(many, jnp.array([[5, -1]], jnp.int8), 0)[0, 4:7], [1, 0.5, 1]
    )
    bias = rng.normal(size=7).astype(np.float32)
    np.testing.assert_array_equal(LogitBias(jnp.asarray(bias))(jnp.asarray(logits), tokens, 0), logits + bias)
    # Several in turn, and other numbers share a program.
    from rope_jax.generation.loop import run_on_device

    generate(logits_fn=(RepetitionPenalty(1.2), MinP(0.1)))
    before = run_on_device._cache_size()
    out = generate(logits_fn=(RepetitionPenalty(1e9), MinP(0.2)))
    assert run_on_device._cache_size() == before
    for prompt, row in zip(PROMPTS, out.tokens.tolist(), strict=True):
        written = list(prompt)
        for token in row:
            logits = logits_after(written)
            logits[written] = np.where(logits[written] > 0, logits[written] / 1e9, logits[written] * 1e9)
            assert token == int(np.argmax(logits))
            written.append(token)
    forbidden = jnp.zeros(V).at[generate().tokens[0, 0]].set(-jnp.inf)
    assert generate(logits_fn=LogitBias(forbidden)).tokens[0, 0] != generate().tokens[0, 0]


def test_positions_of_several_axes():
    """A picture in the prompt, as M-RoPE counts it: by hand from the plain forward pass."""
    schedule = rope_jax.Sections(sections=(2, 1, 1), schedule=rope_jax.Standard())
    model = build(**UNTIED, rope=rope_jax.Rope(8, schedule))
    params = PARAMS  # a rope has none
    positions, next_position = rope_jax.core.multimodal_positions([2, (1, 2, 3), 1])
    prompt = jnp.array([[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1]])
    assert int(next_position) < prompt.shape[1]
    out = rope_jax.generate(
        model,
        params,
        prompt,
        positions=positions[None],
        next_position=next_position,
        max_new_tokens=4,
        temperature=0,
    )
    for b in range(2):
        ids, at = prompt[b].tolist(), positions
        for i in range(4):
            logits = model.apply(params, jnp.array([ids]), at[None])
            assert int(jnp.argmax(logits[0, -1])) == int(out.tokens[b, i])
            ids.append(int(out.tokens[b, i]))
            at = jnp.concatenate([at, jnp.full((1, 3), next_position + i, at.dtype)])
    counted = jnp.arange(9)[None, :, None].repeat(3, axis=2)
    other = rope_jax.generate(
        model, params, prompt, positions=counted, next_position=9, max_new_tokens=4, temperature=0
    )
    assert not np.allclose(other.log_probs, out.log_probs, atol=1e-4)
    with pytest.raises(ValueError, match="rope of one position axis, got 3: pass positions and next_position"):
        rope_jax.generate(model, params, prompt, max_new_tokens=4, temperature=0)
    with pytest.raises(ValueError, match="rope of one position axis, got 3: generate takes positions"):
        rope_jax.generation.beam_search(model, params, prompt, max_new_tokens=4, beams=2)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (dict(num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
        (
            dict(num_samples=2, rng=jax.random.split(jax.random.key(0), 3)),
            ValueError,
            r"rng must have shape \[B\] with B=6",
        ),
        (
            dict(positions=jnp.zeros((3, 5), int)),
            ValueError,
            "next_position must be given with positions, got None",
        ),
        (dict(next_position=5), ValueError, "positions must be given with next_position, got None"),
        (dict(positions=jnp.zeros((3, 5), int), next_position=0.5), TypeError, "next_position must be integer"),
        (dict(positions=jnp.zeros((3, 4), int), next_position=5), ValueError, "positions must"),
        (
            dict(logits_fn=None),
            TypeError,
            r"logits_fn must be a callable of \(logits, tokens, step\) or several, got None",
        ),
        (
            dict(logits_fn=lambda logits: logits),
            TypeError,
            r"logits_fn must be a callable of \(logits, tokens, step\)",
        ),
        (
            dict(logits_fn=lambda logits, tokens, step: None),
            TypeError,
            "logits_fn 0 .* must return logits in a jax array, got NoneType",
        ),
        (
            dict(logits_fn=lambda logits, tokens, step: logits[:, 1:]),
            ValueError,
            r"logits_fn 0 .* must have shape \[B, V\]",
        ),
        (dict(logits_fn=MinP), TypeError, "got the class MinP itself"),
        (dict(logits_fn=MinP("x")), TypeError, "MinP: share must be numbers, got 'x'"),
        (
            dict(logits_fn=RepetitionPenalty(None)),
            TypeError,
            "RepetitionPenalty: penalty must be numbers, got None",
        ),
        (dict(logits_fn=[LogitBias("x")]), TypeError, "LogitBias: bias must be numbers, got 'x'"),
        (dict(logits_fn=LogitBias(jnp.zeros(3))), ValueError, r"LogitBias: bias must have shape"),
    ],
)
def test_refusals(kwargs, error, says):
    with pytest.raises(error, match=says):
        generate(**kwargs)


def test_refused_numbers():
    for make, says in (
        (lambda: RepetitionPenalty(0.0), "RepetitionPenalty: penalty must be positive, got 0.0"),
        (lambda: RepetitionPenalty(float("inf")), "RepetitionPenalty: penalty must be finite, got inf"),
        (lambda: MinP(0.0), "MinP: share must be positive, got 0.0"),
        (lambda: MinP(1.5), "MinP: share must be at most 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=says):
            make()


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(temperature=1.0, rng=jax.random.key(0)),
        dict(temperature=1.0, rng=jax.random.key(0), top_k=2),
        dict(temperature=1.0, rng=jax.random.key(0), top_p=0.5),
    ],
    ids=str,
)
def test_no_token_is_written_if_none_is_allowed(how):
    out = generate(logits_fn=LogitBias(jnp.full(V, -jnp.inf)), **how)
    assert np.all(np.asarray(out.tokens) == -1)


def test_numbers_of_numpy_and_jax_are_checked_too():
    for make in (
        lambda: MinP(np.float32(2.0)),
        lambda: MinP(jnp.float32(2.0)),
        lambda: RepetitionPenalty(np.float32(-1)),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    assert LogitBias([0.0, 1.0])(jnp.zeros((1, 2)), None, 0).tolist() == [[0.0, 1.0]]
    with pytest.raises(TypeError, match="LogitBias: bias must be floating"):
        LogitBias([0, 1])
    with pytest.raises(ValueError, match=r"LogitBias: bias must have shape \[B, V\] with B=3"):
        generate(logits_fn=LogitBias(jnp.zeros((2, V))))


@pytest.mark.parametrize("count", [1, 3])
def test_parameters_of_another_number_of_layers_are_refused(count):
    layers = jax.tree.map(lambda leaf: jnp.resize(leaf, (count, *leaf.shape[1:])), PARAMS["params"]["layers"])
    with pytest.raises(
        ValueError, match=rf"params of layers must have shape \[layers, ...\] with layers=2, got \({count},"
    ):
        generate(params={"params": PARAMS["params"] | {"layers": layers}})
