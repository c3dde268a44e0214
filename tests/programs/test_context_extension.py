"""benchmarks/context_extension.py at a size that takes seconds, and its report on numbers worked out by hand."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax
from benchmarks import clock
from benchmarks import context_extension as study
from benchmarks import context_extension_report as report

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 123, 6000).astype(np.uint8).tobytes())
    return path


def tiny(text, workdir, **change):
    sizes = dict(seeds=1, length=64, factor=2, num_layers=1, width=16, steps=4, batch=4, tune_steps=2)
    reading = dict(sequences=16, questions=16, generations=1, rounds=2)
    return study.Config(workdir=workdir, data=text, **sizes | reading | change)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A model of random weights that are large enough for every byte to matter."""
    config = tiny(text, tmp_path_factory.mktemp("trained"))
    model = study.encodings.build_model(study.toy_config(config, "rope", 0))

    @jax.jit
    def start():
        params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(1), p.shape), params)

    params = start()
    return config, model, params, study.Study(config).held_out


def test_one_key_and_one_question_are_planted_at_every_distance():
    text = np.full((4000, 33), 97)
    planted = study.plant(text, np.random.default_rng(0))
    assert (text == 97).all(), "the text itself must stay"
    rows = np.arange(len(text))
    question = np.argmax(planted == study.QUESTION, axis=1)
    first = np.argmax(planted >= 128, axis=1)
    assert ((planted != 97).sum(axis=1) == 3).all()
    assert (planted[rows, first] == planted[rows, question + 1]).all() and (first < question).all()
    distances, counts = np.unique(question - first, return_counts=True)
    assert distances.tolist() == list(range(1, 32))
    # 4000 draws of 31 distances: a standard deviation of 11.2 each
    assert abs(counts - 4000 / 31).max() < 5 * math.sqrt(4000 / 31)
    assert set(np.unique(planted[rows, first])) == set(study.KEYS)


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, rows):
    return model.apply(params, rows)


def costs(model, params, rows):
    """Bits of every byte of windows ``[B, T + 1]`` after those before it, in float64."""
    rows = np.asarray(rows)
    logits = np.asarray(forward(model, params, jnp.asarray(rows[:, :-1])), np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_z = top[..., 0] + np.log(np.exp(logits - top).sum(axis=-1))
    return (log_z - np.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]) / math.log(2)


def test_one_long_window_is_read_byte_by_byte(trained):
    config, model, params, held_out = trained
    rows = study.held_out_windows(held_out, config)
    assert rows.shape == (16, 129) and (rows[0] == held_out[:129]).all() and (rows[-1] == held_out[-129:]).all()
    expected = costs(model, params, rows).mean(axis=0).reshape(-1, study.SPAN).mean(axis=1)
    curve = study.read_long(lambda length: model, params, held_out, config)
    assert np.allclose(curve, expected, atol=1e-4) and np.ptp(expected) > 1e-2


def test_each_byte_is_read_by_the_model_of_its_length(trained):
    config, model, params, held_out = trained
    other = model.clone(rope=rope_jax.Rope(model.head_dim, rope_jax.Linear(factor=2.0)))
    short, long = (study.read_long(lambda length, m=m: m, params, held_out, config) for m in (model, other))
    both = study.read_long(lambda length: model if length == 64 else other, params, held_out, config)
    assert np.allclose(both, short[:2] + long[2:], atol=1e-4) and abs(short[1] - long[1]) > 1e-3
    alone = study.read_long(lambda length: model if length == 64 else None, params, held_out, config)
    assert len(alone) == 2 and np.allclose(alone, short[:2], atol=1e-4)


def test_sliding_windows_see_no_more_than_the_training_length(trained):
    config, model, params, held_out = trained
    rows = study.held_out_windows(held_out, config)
    by_start = {start: costs(model, params, rows[:, start : start + 65]).mean(axis=0) for start in (0, 32, 64)}
    expected = np.zeros(128)
    for byte in range(128):  # read in the first window that reaches it: 0 to 64, 32 to 96, 64 to 128
        start = 0 if byte < 64 else 32 * ((byte - 32) // 32)
        expected[byte] = by_start[start][byte - start]
    curve = study.read_sliding(model, params, held_out, config)
    assert np.allclose(curve, expected.reshape(-1, study.SPAN).mean(axis=1), atol=1e-4)
    assert not np.allclose(curve, study.read_long(lambda length: model, params, held_out, config), atol=1e-3)


def test_passkeys_are_counted(trained, monkeypatch):
    config, _, _, held_out = trained
    asked = []

    def knows_those_at(model, params, tokens):
        asked.append(tokens)
        key = tokens[:, -1 - model]  # what stands that many bytes before the question
        return np.where(key >= 128, key, 0)

    monkeypatch.setattr(study, "last_byte", knows_those_at)
    near, far = {"48 in 64": 1.0, "48 in 128": 1.0, "96 in 128": 0.0}, {"48 in 128": 0.0, "96 in 128": 1.0}
    assert study.ask(lambda length: 48, None, held_out, config) == near
    assert study.ask(lambda length: 96 if length == 128 else None, None, held_out, config) == far
    assert study.ask(lambda length: 48 if length == 64 else None, None, held_out, config) == {"48 in 64": 1.0}
    assert all((tokens[:, -1] == study.QUESTION).all() and (tokens >= 128).sum() == 16 for tokens in asked)
    assert [tokens.shape for tokens in asked[:3]] == [(16, 64), (16, 128), (16, 128)]


def test_every_method_is_what_its_name_says():
    config = study.Config()
    divisors = [1.0, 1.5, 2.0, 4.0]

    def inv_freq(method, length):
        return study.extended(method, config, divisors, length)(8).inv_freq

    standard = 10_000.0 ** (-np.arange(4) / 4)
    assert np.allclose(inv_freq("unmodified", 1024), standard)
    assert np.allclose(inv_freq("linear", 128), standard / 8)
    assert np.allclose(inv_freq("ntk", 128), (10_000.0 * 8 ** (8 / 6)) ** (-np.arange(4) / 4))
    for length, stretch in ((64, 1), (128, 1), (512, 4), (1024, 8)):  # YaRN, section 3.3: s = max(1, length / L)
        assert np.allclose(inv_freq("dynamic", length), (10_000.0 * stretch ** (8 / 6)) ** (-np.arange(4) / 4))
        assert np.allclose(inv_freq("longrope", length), standard / (divisors if length > 128 else 1))
    for method, kind in (("yarn", rope_jax.Yarn), ("llama3", rope_jax.Llama3)):
        schedule = study.extended(method, config, divisors, 1024)
        assert isinstance(schedule, kind) and (schedule.factor, schedule.original_length) == (8.0, 128)
        assert schedule.base == 10_000.0
    assert study.extended("longrope", config, divisors, 128)(8).attention_factor == 1.0
    assert math.isclose(
        study.extended("longrope", config, divisors, 1024)(8).attention_factor, math.sqrt(1 + math.log(8, 128))
    )


@pytest.mark.full
def test_the_search_ends_no_worse_than_it_began_and_its_divisors_never_fall(trained):
    config, model, params, held_out = trained
    found = study.search_factors(model, params, held_out, config, seed=0)
    again = study.search_factors(model, params, held_out, config, seed=0)
    begun = study.search_factors(model, params, held_out, dataclasses.replace(config, generations=0), seed=0)
    assert found == again and len(found) == model.head_dim // 2
    assert np.all(np.diff(found) >= 0) and min(found) >= 1 and max(found) <= 4

    tokens = study.toy_lm.windows(
        held_out, np.random.default_rng((0, 2)).integers(0, len(held_out) - 128, 4), 128
    )  # the four windows that the search is judged by

    def cost(divisors):
        schedule = study.extended("longrope", config, list(divisors), 128)
        there = model.clone(rope=rope_jax.Rope(model.head_dim, schedule))
        return costs(there, params, tokens).mean()

    standard = rope_jax.Standard()(32).inv_freq
    started = [study.extended(m, config, [], 128)(32).inv_freq for m in ("linear", "ntk", "yarn")]
    assert math.isclose(cost(begun), min(cost(standard / each) for each in started), abs_tol=1e-4)
    assert cost(found) <= cost(begun) + 1e-4


@pytest.fixture(scope="module")
def few():
    """The whole study with three encodings and two methods, to be run in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "ENCODINGS", ("rope", "learned", "none"))
        patch.setattr(study, "METHODS", ("unmodified", "longrope"))
        patch.setattr(study, "RATES", (1.0, 30.0))
        yield study


@pytest.fixture(scope="module")
def spied(few, text, tmp_path_factory):
    """A whole study, and what it trained and timed: (model, bytes) of every step, (prompt, capacity) of every cache."""
    workdir, steps, caches = tmp_path_factory.mktemp("whole"), [], []
    train_step, cached_step = few.toy_lm.train_step, few.cached_step

    def step(state, tokens, *, model, optimizer):
        steps.append((model, np.asarray(tokens)))
        return train_step(state, tokens, model=model, optimizer=optimizer)

    def cached(model, params, prompt, capacity):
        caches.append((prompt.shape, capacity))
        return cached_step(model, params, prompt, capacity)

    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(few.toy_lm, "train_step", step)
        patch.setattr(few, "cached_step", cached)
        few.main(tiny(text, workdir, seeds=2))
    return workdir, steps, caches


@pytest.fixture(scope="module")
def whole(spied):
    return spied[0]


@pytest.mark.full
def test_every_encoding_is_trained_on_the_same_planted_bytes(few, spied):
    _, steps, _ = spied
    short = [(model, tokens) for model, tokens in steps if tokens.shape == (4, 65)]
    # rope, learned and none with two seeds of four steps each; before learned's, two steps for each of its two rates
    names = ["rope"] * 8 + ["rate"] * 4 + ["learned"] * 8 + ["none"] * 8
    planted = dict.fromkeys(names)
    for name in planted:
        planted[name] = [tokens for (_, tokens), of in zip(short, names, strict=False) if of == name]
    for name in ("rope", "learned", "none"):
        np.testing.assert_array_equal(planted[name], planted["rope"])
    every = np.array([tokens for tokens in planted["rope"] + planted["rate"][:2]])
    assert len(np.unique(every.reshape(len(every), -1), axis=0)) == 10, "other bytes in each step and seed"
    np.testing.assert_array_equal(planted["rate"][:2], planted["rate"][2:])
    assert ((every == few.QUESTION).sum(-1) == 1).all() and ((every >= 128).sum(-1) == 2).all()
    assert [model.position_embedding is not None for model, _ in short[:28]] == [
        n in ("rate", "learned") for n in names
    ]


@pytest.mark.full
def test_the_fine_tuning_is_long_and_of_each_seed(few, text, spied):
    workdir, steps, _ = spied
    planted = [tokens for _, tokens in steps if tokens.shape == (2, 129) and (tokens == few.QUESTION).any()]
    assert len(planted) == 2 * 2 * 2, "of two methods, two seeds, two steps: as many bytes in half the rows"
    np.testing.assert_array_equal(planted[:4], planted[4:])
    assert len(np.unique(np.array(planted[:4]).reshape(4, -1), axis=0)) == 4
    kept = json.loads((workdir / "context_extension.json").read_text())
    seeds = kept["encodings"]["rope"]
    assert seeds[0]["long"] != seeds[1]["long"]
    for seed in (0, 1):  # each seed's own parameters, and its own factors
        assert kept["methods"]["unmodified"]["plain"][seed]["long"] == pytest.approx(seeds[seed]["long"], abs=1e-5)
        assert kept["methods"]["unmodified"]["tuned"][seed]["long"] != seeds[seed]["long"]
    units = few.Study(tiny(text, workdir, seeds=2))
    model = few.encodings.build_model(few.toy_config(units.config, "rope", 1))
    factors = kept["LongRoPE's factors"]
    assert factors[0] != factors[1]

    def build(length):
        schedule = few.extended("longrope", units.config, factors[1], length)
        return model.clone(rope=rope_jax.Rope(model.head_dim, schedule))

    long = few.read_long(build, units.kept("params-rope-1"), units.held_out, units.config)
    assert kept["methods"]["longrope"]["plain"][1]["long"] == pytest.approx(long, abs=1e-5)


@pytest.mark.full
def test_what_is_timed(spied):
    workdir, steps, caches = spied
    # rounds=2: 128 - 3 bytes, one token to compile, two to time; all three encodings, and one of them again
    assert caches == [((1, 125), 128)] * 4
    kept = json.loads((workdir / "context_extension.json").read_text())["speed"]["milliseconds"]
    assert list(kept) == [
        "training step, 4 x 64",
        "training step, 2 x 128",
        "cached token after 125 to 128",
        "pass over 128 without a cache",
    ]
    for job in kept.values():
        assert list(job) == ["rope", "learned", "none", "none again"] and {len(row) for row in job.values()} == {2}
    timed = [(model.rope, model.position_embedding, tokens.shape) for model, tokens in steps[-2 * 4 * 3 :]]
    for job, shape in enumerate([(4, 65), (2, 129)]):
        part = timed[12 * job : 12 * job + 12]
        assert {each[2] for each in part} == {shape}
        assert sum(each[0] is not None for each in part) == sum(each[1] is not None for each in part) == 3


@pytest.mark.full
def test_the_rate_of_a_table_is_the_best_of_those_tried(few, text, whole):
    kept = json.loads((whole / "context_extension.json").read_text())
    tried = kept["rates tried"]["learned"]
    assert set(tried) == {"1.0", "30.0"} and tried["1.0"] != tried["30.0"]
    units = few.Study(tiny(text, whole, seeds=2))
    assert units.rate("learned") == float(min(tried, key=tried.get)) and units.rate("rope") == 1.0
    how = few.toy_config(units.config, "learned", 1, units.rate("learned"))
    again = few.train(few.encodings.build_model(how), units.text, how, few.encodings.build_optimizer(how))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(units.kept("params-learned-1")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.full
def test_the_study_leaves_its_numbers_tables_and_pictures(whole):
    kept = json.loads((whole / "context_extension.json").read_text())
    config, (rope, other), learned = kept["config"], kept["encodings"]["rope"], kept["encodings"]["learned"][0]
    assert len(rope["long"]) == len(rope["sliding"]) == len(learned["sliding"]) == 4
    assert len(learned["long"]) == 2 and set(learned["passkey"]) == {"48 in 64"}
    assert set(rope["passkey"]) == {"48 in 64", "48 in 128", "96 in 128"}
    # up to L, LongRoPE changes nothing
    short, all_of_it = (kept["methods"][m]["plain"][0]["long"] for m in ("longrope", "unmodified"))
    assert short[:2] == pytest.approx(all_of_it[:2], abs=1e-5)
    assert short[2:] != pytest.approx(all_of_it[2:], abs=1e-5)
    table = (whole / "context_extension.md").read_text()
    assert table == report.tables(kept) and "| none again, to compare |" in table
    near = report.said(report.interval([rope["long"][1], other["long"][1]]))
    far = report.said(report.interval([np.mean(each["long"][2:]) for each in (rope, other)]))
    assert f"| RoPE | {near} | {far} |" in table and " - |" in table
    behind = [np.mean(each["long"][2:]) - np.mean(each["sliding"][2:]) for each in (rope, other)]
    assert (
        f" {report.said(report.interval(behind))} |"
        in table.split("as it is")[1].split("unmodified |")[1].splitlines()[0]
    )

    long, sliding, passkeys = report.draw_encodings(kept).axes
    for axes, key in ((long, "long"), (sliding, "sliding")):
        lines = {line.get_label(): line for line in axes.lines}
        mean = np.mean([each[key] for each in (rope, other)], axis=0)
        np.testing.assert_allclose(lines["RoPE"].get_ydata(), mean)
        np.testing.assert_allclose(lines["RoPE"].get_xdata(), [16, 48, 80, 112])
        _, half = report.interval([rope[key][0], other[key][0]])
        band = axes.collections[0].get_paths()[0].vertices
        assert np.isclose(np.ptp(band[np.isclose(band[:, 0], 16), 1]), 2 * half)
        assert any((np.asarray(line.get_xdata()) == config["length"]).all() for line in axes.lines), "where it ends"
    assert len(long.lines) == len(sliding.lines) == 4
    shown = {bar.get_label(): bar for bar in passkeys.containers}
    assert set(shown) == {"RoPE", "none (NoPE)"}, "a learned table has no such window"
    found = [np.mean([each["passkey"][q] for each in (rope, other)]) for q in ("48 in 128", "96 in 128")]
    np.testing.assert_allclose(shown["RoPE"].lines[0].get_ydata(), found)

    figure = report.draw_methods(kept)
    plain, _, tuned, _ = figure.axes
    assert [axes.get_title().split(", ")[-1] for axes in figure.axes] == ["as it is"] * 2 + [
        "after 2 steps at 128"
    ] * 2
    for axes, key in ((plain, "plain"), (tuned, "tuned")):
        lines = {line.get_label(): line for line in axes.lines}
        mean = np.mean([each["long"] for each in kept["methods"]["longrope"][key]], axis=0)
        np.testing.assert_allclose(lines["LongRoPE"].get_ydata(), mean)
        slid = np.mean([each["sliding"] for each in (rope, other)], axis=0)
        np.testing.assert_allclose(lines["unmodified, sliding"].get_ydata(), slid)
    for name in ("encodings", "methods"):
        assert (whole / f"context_extension_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_a_study_that_was_stopped_goes_on_and_ends_alike(few, text, whole, tmp_path, monkeypatch, capsys):
    config = tiny(text, tmp_path, seeds=2)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(few.Study, "factors", stop)
        with pytest.raises(SystemExit) as stopped:
            few.main(config)
        assert stopped.value.code == 130 and "stopped in factors-0; run again to go on" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-*")}
    assert len(before) == 13 and not (tmp_path / "context_extension.json").exists()
    few.main(config)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "nothing is done twice"
    one, other = (json.loads((folder / "context_extension.json").read_text()) for folder in (whole, tmp_path))
    for key in ("encodings", "methods", "LongRoPE's factors", "config"):
        assert one[key] == other[key]


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(steps=0), "--steps must be positive, got 0"),
        (dict(factor=3), "--factor must be a power of two, 2 or more, got 3"),
        (dict(length=100), "--length must be a multiple of 64, got 100"),
        (dict(sequences=20), "--sequences must be a multiple of 16, got 20"),
        (dict(questions=8), "--questions must be a multiple of 16, got 8"),
        (dict(batch=5), "--batch must be a multiple of --factor 2, got 5"),
        (dict(rounds=1), "--rounds must be at least 2 and below --length 64, got 1"),
        (dict(rounds=64), "--rounds must be at least 2 and below --length 64, got 64"),
        (dict(factor=32, batch=32), "--data must hold more than 2049 bytes of training and of held-out text"),
    ],
)
def test_refusals(text, tmp_path, change, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        study.main(tiny(text, tmp_path / "work", **change))
    assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_model_that_cannot_be_is_said_before_any_is_trained(few, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few, "ENCODINGS", ("rope", "sinusoidal"))
    with pytest.raises(SystemExit):
        few.main(tiny(text, tmp_path / "work", width=17))
    assert "width must be even" in capsys.readouterr().err and not (tmp_path / "work").exists()


@pytest.mark.full
def test_another_study_or_a_broken_unit_is_refused(few, text, whole, capsys):
    with pytest.raises(SystemExit):
        few.main(tiny(text, whole, steps=3, seeds=2))
    assert "steps 4 there, 3 here" in capsys.readouterr().err
    unit = whole / "read-rope-0.json"
    kept = unit.read_text()
    unit.write_text(kept[:-9])
    with pytest.raises(SystemExit):
        few.main(tiny(text, whole, seeds=2))
    assert f"{unit} cannot be read" in capsys.readouterr().err
    unit.write_text(kept)
    config = whole / "config.json"
    kept = config.read_text()
    config.write_text(kept[:-9])
    with pytest.raises(SystemExit):
        few.main(tiny(text, whole, seeds=2))
    assert "config.json must describe the run in its folder" in capsys.readouterr().err
    config.write_text(kept)


def test_a_model_that_came_apart_is_said(few, text, tmp_path, capsys):
    units = few.Study(tiny(text, tmp_path))
    with pytest.raises(SystemExit):
        units.keep("read-rope-0", {"long": [1.0, math.nan]})
    assert "read-rope-0 has figures that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "read-rope-0.json").exists()


# ------------------------------------------------------------------------------------------- the report


def test_intervals_over_seeds():
    # mean 2, standard deviation 1, and t(0.975, 2) = 4.302653 by the tables
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and math.isclose(half, 4.302653 / math.sqrt(3), rel_tol=1e-6)
    assert report.interval([1.0, None]) is None
    assert report.said(report.interval([1.5])) == "1.50" and report.said(None) == "-"
    assert report.said((1.234, 0.056)) == "1.23 ± 0.06"


def test_octaves_and_distances():
    config = dict(length=64, factor=4, span=32)
    readings = [{"long": [9, 1, 2, 4, 3, 3, 3, 7], "passkey": {"48 in 64": 1.0, "48 in 256": 0.5}}]
    means = [value and value[0] for value in report.by_octave(readings, "long", config)]
    assert report.octaves(config) == [(32, 64), (64, 128), (128, 256)] and means == [1, 3, 4]
    assert report.by_octave([{"long": [9, 1]}], "long", config)[1:] == [None, None]
    assert report.asked(config) == ["48 in 64", "48 in 256", "96 in 256", "192 in 256"]
    assert report.shares(readings, "48 in 256") == [0.5] and report.shares(readings, "96 in 256") is None
    assert report.share_said([0.5]) == "0.50" and report.share_said([1.0, 1.0, 1.0]) == "1.00"
    assert report.share_said([0.0, 0.25, 0.5]) == "0.25 (0.00 to 0.50)" and report.share_said(None) == "-"


def test_the_tables_of_study_and_report_ask_the_same():
    config = study.Config()
    asked = [f"{distance} in {window}" for window, distance in study.asked(config)]
    assert asked == report.asked(dataclasses.asdict(config))


def test_everything_is_timed_in_its_turn(monkeypatch):
    seconds, order = iter([0.0, 0.5, 1.0, 1.25, 2.0, 2.75, 3.0, 3.125]), []

    class Result:
        def __init__(self, name):
            order.append(name)

        def block_until_ready(self):
            order.append("ready")
            return self

    def now():
        order.append("time")
        return next(seconds)

    monkeypatch.setattr(clock.time, "perf_counter", now)
    calls = {name: functools.partial(Result, name) for name in "ab"}
    assert clock.in_turns(calls, 2) == {"a": [500.0, 125.0], "b": [250.0, 750.0]}
    timed = "".join(f" time {name} ready time" for name in "abba")
    assert " ".join(order) == f"a ready b ready{timed}", "once to compile, then in turns"
    times = {"t5": [2.0, 6.0, 8.0], "none": [1.0, 2.0, 2.0]}
    assert clock.ratios(times, "t5", "none") == [2.5, 3.0, 3.5]
