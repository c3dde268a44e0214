"""benchmarks/real_context.py on a small decoder of random weights, and its report on the committed numbers."""

import json
import math
from pathlib import Path

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax
from benchmarks import real_context as study
from benchmarks import real_context_report as report

pytestmark = pytest.mark.usefixtures("quick_compilation")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LENGTHS = (64, 128)
NATS = 1e-4  # float32 in another order of sums, and logits of size 3


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


def encode(text):
    """A token for each character."""
    return [ord(letter) % decoders.V for letter in text]


@pytest.fixture(scope="module")
def tiny():
    model = decoders.build(rope=rope_jax.Rope(8, rope_jax.Standard(base=100.0)))
    tokens = np.random.default_rng(3).integers(0, decoders.V, LENGTHS[-1] + 1).astype(np.int32)
    return model, decoders.init(model), tokens


def logits(model, params, tokens, **arguments):
    """Of a full forward pass without a cache, in float64 ``[T, V]``."""
    return np.asarray(model.apply(params, jnp.asarray(tokens)[None], **arguments)[0], np.float64)


def losses(model, params, tokens, **arguments):
    """Of each token of ``[T + 1]`` after the tokens before it, float64 ``[T]``."""
    found = logits(model, params, tokens[:-1], **arguments)
    return np.log(np.exp(found).sum(-1)) - found[np.arange(len(found)), tokens[1:]]


# ------------------------------------------------------------------------------------------------ the text


def test_each_passkey_stands_at_its_depth():
    text = np.arange(4001) + 1000  # no token of a sentence
    tokens, ours, passkeys = study.plant(text, encode, 4000, places=8)
    assert tokens.shape == ours.shape == (4001,) and len({each.name for each in passkeys}) == 8
    expected = np.ones(4001, bool)
    for i, each in enumerate(passkeys):
        line = f"{each.name}: {each.digits}."
        sentence = encode(f"\n\n{line} {line} {line}\n\n")
        end = each.start + len(sentence)
        assert tokens[each.start : end].tolist() == sentence and end == (i + 1) * 500
        assert len(each.digits) == 5 and each.digits.isdigit()
        expected[each.start : end] = False
    assert (ours == expected).all()
    assert (tokens[ours] == text[: ours.sum()]).all(), "the text goes on after a sentence"


def test_questions_at_every_twentieth_of_a_length():
    _, _, passkeys = study.plant(np.arange(32_769), encode, 32_768, study.PLACES)
    for length in study.LENGTHS:
        depths = [each.start / length for each in study.asked(passkeys, length)]
        # A sentence ends where its part ends, and a part has 409 of 409.6 tokens.
        np.testing.assert_allclose(depths, np.arange(1, 20) / 20, atol=0.007)


def test_the_text_is_the_documentation_of_the_language():
    text = study.documentation()
    assert len(text) > 300_000
    assert 'The "assert" statement' in text[:100]


# --------------------------------------------------------------------------------------------- the reading


@pytest.mark.parametrize("schedule", ["unmodified", "yarn"])
def test_losses_by_position_are_those_of_a_full_forward_pass(tiny, schedule):
    model, params, text = tiny
    model = study.with_schedule(model, study.schedule_of(schedule, 100.0, ()))
    found, cache = study.read_on(model, params, text, model.init_cache(batch=1, capacity=128), 0, 128, chunk=32)
    np.testing.assert_allclose(found, losses(model, params, text), atol=NATS)
    assert cache.num_tokens.tolist() == [128]


def test_dynamic_schedules_follow_the_cache(tiny):
    model, params, text = tiny
    # Up to the training length nothing changes: ORIGINAL is far beyond this text.
    model = study.with_schedule(model, study.schedule_of("dynamic", 100.0, ()))
    empty = model.init_cache(batch=1, capacity=128)
    found, _ = study.read_on(model, params, text, empty, 0, 128, chunk=64)
    plain = study.with_schedule(model, rope_jax.Standard(base=100.0))
    np.testing.assert_allclose(found, losses(plain, params, text), atol=NATS)
    # Beyond it, the first chunk is read at its own length.
    long = study.with_schedule(model, rope_jax.DynamicNTK(factor=1.0, original_length=8, base=100.0))
    found, _ = study.read_on(long, params, text, long.init_cache(batch=1, capacity=128), 0, 128, chunk=64)
    first = losses(long, params, text[:65], context_length=64)
    np.testing.assert_allclose(found[:64], first, atol=NATS)
    assert np.abs(first - losses(plain, params, text[:65])).max() > 0.01


def test_a_passkey_counts_if_greedy_decoding_finds_it(tiny):
    model, params, text = tiny
    text, _, passkeys = study.plant(text, encode, 128, places=2)
    _, cache = study.read_on(model, params, text, model.init_cache(batch=1, capacity=160), 0, 128, chunk=64)
    for _ in range(2):  # the second time from the same cache
        found, cache = study.ask_all(model, params, cache, passkeys, encode, 128)
        (passkey,) = study.asked(passkeys, 128)
        ((depth, share, loss),) = found
        assert depth == passkey.start / 128
        key = encode(passkey.digits)
        last = logits(model, params, [*text[:128], *encode(f"\n\n{passkey.name}: "), *key])[-6:-1]
        assert share == pytest.approx(np.mean(last.argmax(-1) == key))
        expected = np.log(np.exp(last).sum(-1)) - last[np.arange(5), key]
        assert loss == pytest.approx(expected.mean(), abs=NATS)


@pytest.mark.parametrize("schedule", ["yarn", "dynamic"])
def test_a_pass_goes_on_from_its_file(tiny, tmp_path, schedule):
    model, params, text = tiny
    model = study.with_schedule(model, study.schedule_of(schedule, 100.0, ()))
    whole, _ = study.read_on(model, params, text, model.init_cache(batch=1, capacity=128), 0, 128, chunk=32)
    _, cache = study.read_on(model, params, text, model.init_cache(batch=1, capacity=70), 0, 64, chunk=32)
    study.save_state(tmp_path / "state.npz", cache)
    cache = study.restore_state(tmp_path / "state.npz", model.init_cache(batch=1, capacity=128))
    rest, cache = study.read_on(model, params, text, cache, 64, 128, chunk=32)
    np.testing.assert_allclose(rest, whole[64:], atol=1e-5)
    assert cache.num_tokens.tolist() == [128] and not cache.overflowed.any()


def test_sliding_caches_read_a_window(tiny):
    model, params, text = tiny
    rows = np.stack([text[:41], text[50:91]])
    slid = np.asarray(study.read_sliding(model, params, rows, capacity=16, num_sink_tokens=0))
    sinks = np.asarray(study.read_sliding(model, params, rows, capacity=16, num_sink_tokens=2))
    for row, without, with_sinks in zip(rows, slid, sinks, strict=True):
        np.testing.assert_allclose(without, losses(model.clone(window=16), params, row), atol=NATS)
        np.testing.assert_allclose(with_sinks[:16], without[:16], atol=NATS)
        assert np.abs(with_sinks[16:] - without[16:]).max() > 0.01


def test_a_frozen_pair_is_a_schedule_with_frequency_zero(tiny):
    model, params, text = tiny
    standard = rope_jax.Standard(base=100.0)(8).inv_freq
    frozen = rope_jax.Frequencies([standard[0], 0.0, *standard[2:]])
    options = (rope_jax.Frequencies(standard), frozen)
    for index, option in enumerate(options):
        found = study.read_option(model, options, params, text, index)
        expected = losses(study.with_schedule(model, lambda rotary_dim, f=option: f), params, text)
        np.testing.assert_allclose(found, expected, atol=NATS)


def test_the_search_never_ends_behind_its_start():
    standard = rope_jax.Standard(base=1e5)(64).inv_freq
    target = np.linspace(1, 3, 32)
    found = study.search_divisors(
        lambda inv_freq: float(np.mean((standard / inv_freq - target) ** 2)), 64, 1e5, generations=6
    )
    divisors = np.array(found["divisors"])
    assert found["tried"] == 3 + 6 * 3 and set(found["start"]) == {"linear", "ntk", "yarn"}
    assert found["cost"] < min(found["start"].values())
    assert found["cost"] == pytest.approx(np.mean((divisors - target) ** 2))
    assert (np.diff(divisors) >= 0).all() and divisors.min() >= 1 and divisors.max() <= 8


def test_spread_positions_reach_the_longest_length(tiny):
    model, params, text = tiny
    positions = study.spread_positions(128)
    assert positions.size == 128 and positions[0] == 0 and positions[-1] == study.LENGTHS[-1] - 1
    assert (np.diff(positions) > 0).all() and (np.diff(positions) == 1).sum() == 124
    small = jnp.asarray(positions % 500)
    inv_freq = jnp.asarray(rope_jax.Standard(base=100.0)(8).inv_freq, jnp.float32)
    found = float(study.spread_cost(model, params, text, small, inv_freq, 1.0))
    expected = losses(model, params, text, positions=small[None]).mean()
    assert found == pytest.approx(expected, abs=1e-3)  # float32 angles
    assert abs(float(study.spread_cost(model, params, text, small, inv_freq, 1.5)) - found) > 1e-3


def test_every_method_is_what_its_name_says():
    divisors = [1.0] * 16 + [4.0] * 16
    standard = 1e5 ** (-np.arange(32) / 32)

    def inv_freq(name, *length):
        return study.schedule_of(name, 1e5, divisors)(64, *length).inv_freq

    np.testing.assert_allclose(inv_freq("unmodified"), standard)
    np.testing.assert_allclose(inv_freq("linear"), standard / 4)
    np.testing.assert_allclose(inv_freq("ntk"), (1e5 * 4 ** (64 / 62)) ** (-np.arange(32) / 32))
    for length, stretch in ((8192, 1), (16_384, 2), (32_768, 4)):
        np.testing.assert_allclose(
            inv_freq("dynamic", length), (1e5 * stretch ** (64 / 62)) ** (-np.arange(32) / 32)
        )
        np.testing.assert_allclose(inv_freq("longrope", length), standard / (1 if length == 8192 else divisors))
    for name, kind in (("yarn", rope_jax.Yarn), ("llama3", rope_jax.Llama3)):
        schedule = study.schedule_of(name, 1e5, ())
        assert isinstance(schedule, kind)
        assert (schedule.factor, schedule.original_length, schedule.base) == (4.0, 8192, 1e5)


def test_repeated_passages_are_counted():
    tokens = np.concatenate([np.arange(30), np.arange(10, 30), np.arange(100, 115)])
    # From token 30 on, five passages of 16 tokens stand at 10 to 14 too; the last token fills no part.
    assert study.repeated(tokens, 16) == [0.0, 2 / 16, 3 / 16, 0.0]


def test_bins_leave_planted_tokens_out():
    loss, ours = np.array([1.0, 3.0, 100.0, 5.0]), np.array([True, True, False, True])
    assert study.bins(loss, ours, 2) == [2.0, 5.0]


@pytest.mark.full
def test_every_unit_runs_and_a_second_run_repeats_none(tiny, tmp_path, monkeypatch):
    model, params, _ = tiny
    model = study.with_schedule(model, rope_jax.Standard())
    sizes = dict(ORIGINAL=512, LENGTHS=(512, 1024, 2048), CHUNK=256, BIN=64, PLACES=8, QUESTIONS=3, PAIR_TOKENS=64)
    for name, value in (sizes | dict(WINDOW=16, SINKS=2, ROWS=2, GENERATIONS=1)).items():
        monkeypatch.setattr(study, name, value)
    loads = []
    monkeypatch.setattr(study, "load", lambda path: loads.append(path) or study.Weights(model, params, encode))
    config = study.Config(path=Path("tiny.gguf"), workdir=tmp_path / "work", results=tmp_path)
    study.main(config)
    whole = json.loads((tmp_path / "real_context.json").read_text())
    assert whole["command"] == "python -m benchmarks.real_context tiny.gguf" and whole["text"]["base"] == 1e4
    for name in study.SCHEDULES:
        each = whole["schedules"][name]
        assert len(each["loss"]) == 2048 // 64 and list(each["passkeys"]) == ["512", "1024", "2048"]
        assert len(each["passkeys"]["2048"]) == 3
    assert whole["schedules"]["dynamic"]["loss"][:8] == pytest.approx(whole["schedules"]["unmodified"]["loss"][:8])
    assert list(whole["fresh"]) == ["256", "768", "1280", "1792"]
    assert whole["fresh"]["256"] == pytest.approx(whole["schedules"]["unmodified"]["loss"][4:8], abs=NATS)
    assert list(whole["cures"]["one"]) == ["2", "3"]  # wavelengths of 628 and 6283
    assert not [line for line in report.tables(whole).splitlines() if "| - " in line and "fresh" not in line]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    study.main(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()} == before
    assert len(loads) == 1, "a finished study needs no weights"


# ---------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def kept():
    return json.loads((RESULTS / "real_context.json").read_text())


def test_the_committed_tables_are_those_of_the_committed_numbers(kept):
    assert (RESULTS / "real_context.md").read_text() == report.tables(kept)


def test_perplexity_of_a_span():
    loss = [0.0, math.log(2.0), math.log(8.0), 0.0]
    assert report.perplexity(loss, 512, 1536, 512) == pytest.approx(4.0)
    assert report.perplexity(loss, 1024, 4096, 512) is None and report.perplexity(None, 0, 512, 512) is None


def test_passkeys_count_only_if_whole():
    assert report.exact([[0.1, 1.0, 0.0], [0.2, 5 / 6, 0.1], [0.3, 1.0, 0.2], [0.4, 0.0, 9.0]]) == 0.5
    assert report.exact(None) is None


def test_unfinished_units_are_left_open(kept):
    part = kept | {"schedules": kept["schedules"] | {"linear": None}, "fresh": None, "divisors": None}
    lines = report.tables(part).splitlines()
    assert "| position interpolation | - | - | - | - | - | - |" in lines
    assert "| unmodified, fresh windows | - | - | - | - | - | - |" in lines


@pytest.mark.parametrize("draw", [report.draw_schedules, report.draw_frequencies, report.draw_sliding])
def test_every_picture_says_what_its_axes_are(kept, draw):
    figure = draw(kept)
    assert figure._suptitle is not None and figure._suptitle.get_text()
    labelled = [axes for axes in figure.axes if axes.get_xlabel() or axes.get_ylabel()]
    assert labelled and all("(" in axes.get_xlabel() for axes in labelled if axes.get_xlabel())
