"""Decoders with each encoding beside RoPE: one model however it is fed, and what each encoding is said to do."""

import functools
import itertools

import decoders
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from decoders import ROPE, TOLERANCE, D, L, init, tokens
from fast import first
from jax import export
from position_encodings import CUTS, ENCODINGS, LEFT_AND_RIGHT, B, N, T, distances, in_pieces, reference

import rope_jax
import rope_jax.attention.layer
from rope_jax.generation.loop import run_on_device

WHERE = jnp.arange(T)[None]


class Model:
    """A decoder with an encoding, and its programs: each is compiled once for all tests of this file."""

    def __init__(self, name, **change):
        self.module = decoders.build(**(dict(rope=None) | ENCODINGS[name] | change))
        self.params = model(name).params if change else init(self.module)
        self.full = jax.jit(lambda ids, **kw: self.module.apply(self.params, ids, **kw))
        self.traces = 0
        self.step = jax.jit(self._step)

    def _step(self, ids, mask, cache):
        self.traces += 1
        return self.module.apply(self.params, ids, mask=mask, cache=cache)

    def new_cache(self, capacity=T + 2):
        return self.module.init_cache(batch=B, capacity=capacity)


@functools.cache
def model(name, **change):
    return Model(name, **change)


@pytest.fixture(autouse=True, scope="module")
def forget_models():
    yield
    model.cache_clear()


IDS = np.asarray(tokens(B, T, seed=4))
SINGLE = ["sinusoidal", "learned", "t5", "alibi", "rope+alibi"]
DOUBLE = ["learned+t5", "rope+sinusoidal+alibi"]
FED = [(name, "dense") for name in SINGLE] + [(name, "ragged, window") for name in ["none", *DOUBLE]]


def seen_weights(kept):
    assert jax.tree.structure(kept) == jax.tree.structure(
        {"intermediates": {"layers": {"self_attention": {"weights": (0,)}}}}
    )
    return kept["intermediates"]["layers"]["self_attention"]["weights"][0]


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_model_and_its_weights_are_the_formula(name):
    one = model(name)
    added, bias = reference(name, one.params)
    weights: list = []
    want = decoders.oracle(one.module, one.params, IDS, added=added, bias=bias, weights=weights)
    logits, kept = jax.jit(lambda ids: one.module.apply(one.params, ids, mutable="intermediates"))(IDS)
    np.testing.assert_allclose(logits, want, atol=TOLERANCE)
    np.testing.assert_allclose(one.full(IDS), want, atol=TOLERANCE)
    got = seen_weights(kept)
    assert got.dtype == jnp.float32 and got.shape == (L, B, N, T, T)
    np.testing.assert_allclose(got, np.stack(weights), atol=TOLERANCE)
    if name != "none":  # and what is added matters: it is not the model without
        without = decoders.oracle(one.module.clone(rope=None), one.params, IDS)
        assert np.abs(without - want).max() > 0.01


@pytest.mark.parametrize(("name", "case"), first(3, FED[::-1]))
def test_a_model_is_one_however_it_is_cut(name, case):
    one = model(name, window=3) if "window" in case else model(name)
    mask = LEFT_AND_RIGHT if "ragged" in case else None
    real = np.ones((B, T), bool) if mask is None else mask
    full = one.full(IDS, mask=mask)
    for cuts in CUTS:
        got, cache = in_pieces(one.step, one.new_cache(), IDS, mask, cuts)
        assert cache.num_tokens.tolist() == real.sum(1).tolist()
        np.testing.assert_allclose(got[real], full[real], atol=TOLERANCE)


def beside(part, at, fill=0):
    """``[1, n]`` put at a place in a row of T, the rest filled."""
    ids = np.full((len(part), T), fill, np.int32)
    ids[:, at : at + part.shape[1]] = part
    return ids


@pytest.mark.parametrize("name", DOUBLE)
def test_padding_moves_nothing(name):
    one = model(name, window=3)
    alone = one.full(IDS, mask=np.ones((B, T), bool))[:, :7]
    for start in (0, 3):
        mask = beside(np.ones((B, 7)), start).astype(bool)
        got = one.full(beside(IDS[:, :7], start, fill=-1), mask=mask)  # what is at padding is nobody's token
        np.testing.assert_allclose(got[:, start : start + 7], alone, atol=TOLERANCE)


SEGMENTS = np.array([[1] * 4 + [2] * 6, [5] * 4 + [3] * 3 + [5] * 3])  # an id that comes back is a new segment


@pytest.mark.parametrize(("name", "case"), first(3, FED[::-1]))
def test_packed_is_separate(name, case):
    one = model(name, window=3) if "window" in case else model(name)
    real, mask = np.ones((B, T), bool), None
    if "ragged" in case:  # padding in front of the first two segments
        real[:, [0, 4]], mask = False, real
    got = one.full(IDS, segment_ids=SEGMENTS, mask=mask)
    for row, cuts in enumerate(([0, 4, T], [0, 4, 7, T])):
        for start, stop in itertools.pairwise(cuts):
            start += int(not real[row, start])
            # Causal: what is put behind a part changes nothing in it.
            ids = np.concatenate([beside(IDS[row : row + 1, start:stop], 0)] * B)
            alone = one.full(ids, mask=None if mask is None else np.ones((B, T), bool))[0, : stop - start]
            np.testing.assert_allclose(got[row, start:stop], alone, atol=TOLERANCE)


@pytest.mark.parametrize("name", DOUBLE)
def test_64_decode_steps_compile_once(name):
    one = model(name)
    ids = np.asarray(tokens(B, 64, seed=5))
    got, cache = in_pieces(one.step, one.new_cache(64), ids, None, range(1, 65))
    assert one.traces == 1 and one.step._cache_size() == 1
    # More tokens than the other tests have, for the same tolerance: a softmax averages, it does not add up.
    np.testing.assert_allclose(got, one.full(ids), atol=TOLERANCE)
    over, _ = one.step(ids[:, :1], None, cache)
    assert np.isnan(over).all()


@pytest.mark.parametrize("name", DOUBLE)
def test_greedy_is_the_forward_pass(name):
    one = model(name)
    prompts, count = [[1, 2, 3, 4, 5], [7]], 5

    def by_hand(prompt):
        ids = list(prompt)
        while len(ids) < len(prompt) + count:
            logits = one.full(np.concatenate([beside(np.array([ids]), 0)] * B))
            ids.append(int(np.argmax(logits[0, len(ids) - 1])))
        return ids[len(prompt) :]

    want = [by_hand(prompt) for prompt in prompts]
    before = run_on_device._cache_size()
    for step in (1, -1):  # padded on the right, on the left
        rows = [([*row[::step]] + [0] * (5 - len(row)))[::step] for row in prompts]
        mask = [([1] * len(row) + [0] * (5 - len(row)))[::step] for row in prompts]
        again = decoders.build(**(dict(rope=None) | ENCODINGS[name]))  # an equal model is the same program
        written = rope_jax.generate(
            again, one.params, np.array(rows), mask=np.array(mask), max_new_tokens=count, temperature=0
        )
        assert written.tokens.tolist() == want
    assert run_on_device._cache_size() == before + 1


def test_weights_are_sown_behind_remat_and_over_a_cache():
    one = model("t5")
    apply = lambda module, **kw: jax.jit(lambda: module.apply(one.params, IDS, mutable="intermediates", **kw))()[1]
    want = apply(one.module)
    again = apply(one.module.clone(remat=True))
    np.testing.assert_allclose(seen_weights(again), seen_weights(want), atol=TOLERANCE)
    got = seen_weights(apply(one.module, cache=one.new_cache()))
    assert not np.any(got[..., T:])  # slots that hold nothing
    np.testing.assert_allclose(got[..., :T], seen_weights(want), atol=TOLERANCE)


def test_nothing_is_sown_or_computed_for_it_unasked(monkeypatch):
    one = model("t5")
    program = lambda **kw: str(jax.make_jaxpr(lambda p: one.module.apply(p, IDS, **kw))(one.params))
    plain, asked = program(), program(mutable="intermediates")
    assert (plain.count("= exp "), asked.count("= exp ")) == (0, 1)  # attention is one primitive without weights
    assert program(mutable=["losses"]).count("= exp ") == 0
    assert set(one.module.init(jax.random.key(0), IDS)) == {"params"}

    def never(*_, **__):
        raise AssertionError("weights that nobody asked for")

    monkeypatch.setattr(rope_jax.attention.self_attention, "weights", never)
    assert program() == plain
    with pytest.raises(AssertionError, match="nobody asked"):
        program(mutable="intermediates")


def test_callables_of_ones_own():
    """Any function of the two forms will do; it is given positions or distances, and is not evaluated layer by layer."""
    params = init(decoders.build(rope=None))
    slope = lambda distance, heads, causal: jnp.broadcast_to(
        -0.1 * distance[:, None].astype(jnp.float32), (1, heads, *distance.shape[1:])
    )
    ramp = lambda positions, width: jnp.broadcast_to(
        0.1 * positions[..., None].astype(jnp.float32), (*positions.shape, width)
    )
    got = decoders.build(rope=None, position_bias=slope, position_embedding=ramp).apply(params, IDS)
    added = np.broadcast_to(0.1 * np.arange(T)[:, None], (T, D))
    want = decoders.oracle(decoders.build(rope=None), params, IDS, added=added, bias=-0.1 * distances())
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_positions_are_added_after_the_embeddings_are_scaled():
    one = decoders.build(rope=None, embedding_scale=4.0, **ENCODINGS["sinusoidal"])
    params = init(one)
    want = decoders.oracle(one, params, IDS, added=reference("sinusoidal", params)[0])
    np.testing.assert_allclose(one.apply(params, IDS), want, atol=TOLERANCE)


def test_both_seams_at_once_with_unlike_layers():
    """Positions, a bias, RoPE in one layer of three and a window in another."""
    change = dict(num_layers=3, rope=(None, ROPE, None), window=(None, None, 2))
    one = decoders.build(**change, **ENCODINGS["learned+t5"])
    params = init(one)
    added, bias = reference("learned+t5", params)
    want = decoders.oracle(one, params, IDS, added=added, bias=bias)
    np.testing.assert_allclose(one.apply(params, IDS), want, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["sinusoidal", "learned", "t5", "alibi"])
def test_low_precision_under_strict_promotion(name):
    change = dict(rope=None, dtype=jnp.bfloat16) | ENCODINGS[name]
    one = decoders.build(**change)
    params = init(one)
    want = one.clone(dtype=jnp.float32).apply(params, IDS)
    got, cache = one.apply(params, IDS, cache=one.init_cache(batch=B, capacity=T))
    assert got.dtype == jnp.float32 and cache.key.dtype == jnp.bfloat16
    # 32 roundings of what is as large as the largest logit, as decoders.py counts them.
    np.testing.assert_allclose(got, want, atol=32 * oracles.EPS16 * float(jnp.abs(want).max()))


def test_a_learned_table_that_ends_is_an_error_or_nan_in_its_row():
    one = decoders.build(rope=None, position_embedding=rope_jax.models.LearnedPositions(num_positions=4))
    params = nn.unbox(one.init(jax.random.key(0), IDS[:, :4]))
    for apply in (one.apply, jax.jit(one.apply)):
        with pytest.raises(
            ValueError, match="tokens must be at most T=4, the positions of position_embedding, got T=5"
        ):
            apply(params, IDS[:, :5])
    with pytest.raises(ValueError, match=r"positions must be in \[0, num_positions=4\), got 1 to 4"):
        one.apply(params, IDS[:, :4], jnp.arange(1, 5)[None])
    where = jnp.array([[0, 1, 2, 3], [0, 1, 4, 3]])
    got = jax.jit(lambda where: one.apply(params, IDS[:, :4], where))(where)
    assert np.isnan(got).all(-1).tolist() == [[False] * 4, [True] * 4]  # a weight of 0 times NaN is NaN
    want = one.apply(params, IDS[:1, :4])
    np.testing.assert_allclose(got[:1], want, atol=TOLERANCE)


def test_symbolic_shapes():
    b, t = export.symbolic_shape("b, t")
    one = model("learned+t5")
    call = export.export(one.full)(jax.ShapeDtypeStruct((b, t), jnp.int32)).call
    for shape in ((1, 3), (2, T)):
        ids = IDS[: shape[0], : shape[1]]
        np.testing.assert_allclose(call(ids), one.full(ids), atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------- what each is said to do


@pytest.mark.parametrize("name", ["none", "rope", *SINGLE])
def test_a_shift_of_all_positions(name):
    """Absolute encodings see it, RoPE does not, and what goes by order refuses it."""
    one = model(name)
    plain = one.full(IDS)
    if name in ("none", "t5", "alibi"):
        with pytest.raises(ValueError, match="positions must be left out without rope and position_embedding"):
            one.full(IDS, positions=WHERE + 50)
        return
    moved = one.full(IDS, positions=WHERE + 50)
    if name in ("sinusoidal", "learned"):
        assert np.abs(moved - plain).max() > 0.05
    else:
        np.testing.assert_allclose(moved, plain, atol=2 * TOLERANCE)


@pytest.mark.parametrize("name", ["rope", *(name for name in SINGLE if name not in ("t5", "alibi"))])
def test_a_scramble_of_positions(name):
    one = model(name)
    moved = one.full(IDS, positions=jnp.asarray(np.random.default_rng(0).permutation(T))[None])
    assert np.abs(moved - one.full(IDS)).max() > 0.05


def test_one_table_serves_all_layers():
    seen = []

    def counted(distance, num_heads, causal):
        seen.append((distance.shape, num_heads, causal))
        return jnp.zeros((1, 1, 1, distance.shape[-1]))

    model = decoders.build(num_layers=5, **ENCODINGS["t5"])
    params = init(model)["params"]
    assert params["position_bias"]["table"].shape == (6, N)
    assert params["layers"]["self_attention"]["query"]["kernel"].shape[0] == 5
    assert set(params["layers"]["self_attention"]) == {"query", "key", "value", "out"}
    none = {"params": {name: part for name, part in params.items() if name != "position_bias"}}
    decoders.build(num_layers=5, position_bias=counted).apply(none, tokens())
    assert seen == [((1, 9, 9), N, True)] * 2  # once to check its result, once for the five layers


# --------------------------------------------------------------------------------------------------------- refusals


def decode(ids=IDS, positions=None, **change):
    return lambda: decoders.build(**(dict(rope=None) | change)).init(jax.random.key(0), ids, positions)


@pytest.mark.parametrize(
    ("attempt", "error", "says"),
    [
        (decode(position_bias=lambda distance, *_: distance[:, None]), TypeError, r"position_bias\(distance\) must be floating, got dtype int32"),
        (decode(position_bias=lambda *_: jnp.zeros(T)), ValueError, r"position_bias\(distance\) must have shape .* S=10, got \(10,\)"),
        *[
            (decode(positions=jnp.zeros(shape, int), **ENCODINGS[name]), ValueError, says)
            for name in ("sinusoidal", "learned")
            for shape, says in (
                ((3, T), r"positions must have shape .* with B={1, 2}, T=10, got \(3, 10\)"),
                ((B, 1), r"positions must have shape .* with B={1, 2}, T=10, got \(2, 1\)"),
                ((1, T, 2), r"positions must have shape .* with B={1, 2}, T=10, got \(1, 10, 2\)"),
            )
        ],
        (decode(ids=IDS[:1], positions=jnp.zeros((2, T), int), **ENCODINGS["sinusoidal"]), ValueError, r"positions must have shape .* with B=\{1\}, T=10, got \(2, 10\)"),
        (decode(position_embedding=lambda positions, width: jnp.zeros((1, T, 1))), ValueError, r"D=16, got \(1, 10, 1\)"),
        (decode(position_bias=rope_jax.attention.ALiBi), TypeError, r"position_bias must be a callable of \(distance, num_heads, causal\), like ALiBi\(\), got the class"),
        (decode(position_bias="alibi"), TypeError, r"position_bias must be a callable .* got 'alibi'"),
        (decode(position_bias=rope_jax.models.Sinusoidal()), TypeError, r"position_bias must be .* got Sinusoidal, which takes \(positions, width\)"),
        (decode(position_embedding=rope_jax.attention.ALiBi()), TypeError, r"position_embedding must be .* got ALiBi, which takes \(distance, num_heads, causal\)"),
        (decode(position_bias=lambda *_: None), TypeError, "position_bias must return an array, got NoneType"),
        (decode(position_embedding=lambda *_: None), TypeError, "position_embedding must return an array, got NoneType"),
        (decode(position_embedding=lambda where, width: jnp.zeros((1, T, width), int)), TypeError, r"position_embedding\(positions\) must be floating"),
        (decode(rope=rope_jax.Rope(8, rope_jax.Sections(sections=(2, 2))), **ENCODINGS["sinusoidal"]), ValueError, "position_embedding must be left out with a rope of 2 axes: it reads one position"),
        (decode(width=15, **ENCODINGS["sinusoidal"]), ValueError, "width must be even and at least 2, got 15"),
    ],
)  # fmt: skip
def test_refusals(attempt, error, says):
    with pytest.raises(error, match=says):
        attempt()


def test_64_bit_tokens_are_not_cut_to_32():
    with jax.enable_x64(True):
        one = decoders.build(rope=None)
        params = nn.unbox(one.init(jax.random.key(0), IDS))
        rows = jnp.array([[2**32 + 3, 4], [3, 4]])
        assert np.isnan(one.apply(params, rows)).all((1, 2)).tolist() == [True, False]
        with pytest.raises(ValueError, match="prompt must hold tokens in"):
            rope_jax.generate(one, params, rows, max_new_tokens=2, temperature=0)
        written = jax.jit(lambda ids: rope_jax.generate(one, params, ids, max_new_tokens=2, temperature=0))(rows)
        assert (np.asarray(written.tokens) == -1).all(-1).tolist() == [True, False]


def test_nan_at_padding_reaches_no_gradient():
    mask = jnp.arange(T)[None] < jnp.array([[T], [T - 3]])
    module = decoders.build(rope=None, **ENCODINGS["sinusoidal"])
    ids = jnp.where(mask, IDS, -1)
    loss = lambda params: jnp.where(mask[..., None], module.apply(params, ids, mask=mask), 0.0).sum()
    params = nn.unbox(module.init(jax.random.key(0), IDS))
    grads = jax.tree.leaves(jax.grad(loss)(params))
    assert all(np.isfinite(each).all() for each in grads) and max(abs(each).max() for each in grads) > 0


def test_padding_may_stand_behind_the_end_of_a_learned_table():
    one = decoders.build(rope=None, position_embedding=rope_jax.models.LearnedPositions(num_positions=4))
    params = nn.unbox(one.init(jax.random.key(0), IDS[:, :4]))
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]])
    _, cache = one.apply(params, IDS[:, :4], mask=mask, cache=one.init_cache(batch=2, capacity=6))
    got, _ = one.apply(params, IDS[:, 4:5], mask=jnp.array([[0], [1]]), cache=cache)
    alone = one.apply(params, jnp.stack([IDS[1, 0], IDS[1, 4]])[None])
    np.testing.assert_allclose(got[1, 0], alone[0, 1], atol=TOLERANCE)


def test_writing_past_a_learned_table_is_an_error_or_no_token():
    one = decoders.build(rope=None, position_embedding=rope_jax.models.LearnedPositions(num_positions=4))
    params = nn.unbox(one.init(jax.random.key(0), IDS[:, :4]))
    write = lambda ids, count, **how: rope_jax.generate(
        one, params, ids, max_new_tokens=count, temperature=0, **how
    )
    with pytest.raises(
        ValueError,
        match="max_new_tokens must be at most 2 after a prompt of 3 tokens: position_embedding has 4 positions, got 3",
    ):
        write(IDS[:, :3], 3)
    assert (np.asarray(write(IDS[:, :3], 2).tokens) >= 0).all()  # the last one is written and not read
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match="max_new_tokens must be at most 3 after a prompt of 2"):
        write(IDS[:, :3], 4, mask=mask)
    within = write(IDS[:, :3], 3, mask=mask).tokens
    traced = jax.jit(lambda mask: write(IDS[:, :3], 5, mask=mask))(mask).tokens
    np.testing.assert_array_equal(traced[:, :3], within)
    assert np.asarray(traced)[:, 3:].tolist()[0] == [-1, -1] and int(traced[1, 3]) >= 0 and int(traced[1, 4]) == -1
