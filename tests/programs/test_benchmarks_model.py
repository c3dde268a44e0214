"""benchmarks/overhead.py, benchmarks/llama.py and benchmarks/decode.py at sizes that take seconds: what they check, keep, say and draw."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode, overhead
from configs import toy_lm

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = dict(num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, batch=2, length=12)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


@pytest.fixture(scope="module")
def llama():
    return importlib.import_module("benchmarks.llama")  # here, since it imports torch if torch is installed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 123, 3000).astype(np.uint8).tobytes())
    return toy_lm.Config(data=path, **TINY)


def numbers(quartiles):
    low, middle, high = quartiles
    assert 0 < low <= middle <= high and math.isfinite(high)


@pytest.mark.full
def test_overhead(config):
    result = overhead.measure(config, rounds=3, batches=(1, 2), written=3)
    assert list(result) == ["training step, 2 x 12", "decoded token, rows: 1", "decoded token, rows: 2"]
    for row in result.values():
        assert list(row) == ["milliseconds", "rope over none", "none again over none"]
        for quartiles in row.values():
            numbers(quartiles)
    kept = json.loads(json.dumps({"result": result}))
    lines = overhead.table(kept).splitlines()
    assert len(lines) == 2 + 3 and {line.count("|") for line in lines} == {5}
    assert f"| {result['training step, 2 x 12']['rope over none'][1]:.3f} (" in lines[2]
    (axes,) = overhead.draw(kept).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert drawn["with RoPE"] == [row["rope over none"][1] for row in result.values()]
    assert drawn["bar: 1.03"] == [overhead.BAR] * 2


def test_overhead_is_counted_by_token_and_in_the_same_round():
    times = {"rope": [3.0, 8.0, 10.0], "none": [2.0, 4.0, 8.0], "none again": [2.0, 4.0, 4.0]}
    assert overhead.summary(times, 2) == {
        "milliseconds": [1.5, 2.0, 3.0],
        "rope over none": [1.375, 1.5, 1.75],
        "none again over none": [0.75, 1.0, 1.0],
    }


def test_what_is_decoded_is_decoded_again_from_the_same_place(config):
    model = toy_lm.build_model(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    call = overhead.decoding(model, params, tokens, 4)
    first, second = call(), call()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(jnp.stack(first, 1), jax.jit(model.apply)(params, tokens)[:, 4:], atol=1e-5)


@pytest.mark.full
def test_models_that_differ_by_more_than_the_turn_are_not_timed(config):
    model = toy_lm.build_model(config)
    tokens = jnp.zeros((1, 70), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    overhead.check(model, model.clone(rope=None), params, tokens)
    with pytest.raises(AssertionError):
        overhead.check(model, model.clone(rope=None, norm_epsilon=0.1), params, tokens)


@pytest.mark.full
def test_llama_without_torch(llama, monkeypatch):
    monkeypatch.setattr(llama, "torch", None)
    result = llama.measure({"tiny": TINY | {"rounds": 3}}, batches=(1, 2), written=3)
    jobs = result["shapes"]["tiny"]["jobs"]
    assert list(jobs) == ["training step, 2 x 12", "decoded token, rows: 1", "decoded token, rows: 2"]
    absent = "not measured: torch or transformers is not installed"
    for row in jobs.values():
        numbers(row["milliseconds"]["rope_jax"])
        assert row["milliseconds"]["torch"] == row["milliseconds"]["torch.compile"] == absent
        assert row["ours over theirs"] == row["differences"] == {}
    kept = json.loads(json.dumps({"result": result}))
    lines = llama.table(kept).splitlines()
    assert len(lines) == 2 + 3 and {line.count("|") for line in lines} == {7}
    assert all(f"| {absent} | {absent} | - | - |" in line for line in lines[2:])
    (axes,) = llama.draw(kept).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"tiny: {job}" for job in jobs]


def test_llama_with_somebody_who_agrees_and_one_who_does_not(llama, monkeypatch):
    """The place of torch is taken by calls that need none."""

    class Torch:
        class compiler:
            reset = staticmethod(lambda: None)

    monkeypatch.setattr(llama, "torch", Torch)
    ours = lambda: np.array([1.0, -2.0])
    theirs = lambda compiled: lambda: np.array([1.0, -2.0 + 1e-3 * compiled])
    row = llama.compare(ours, theirs, allowed=1e-4, rounds=3, count=2)
    assert list(row["ours over theirs"]) == ["torch"]
    numbers(row["milliseconds"]["torch"])
    assert (
        row["milliseconds"]["torch.compile"]
        == "not timed: it differs by 5.0e-04 of the largest, 1.0e-04 is allowed"
    )
    kept = {"result": {"shapes": {"tiny": {"jobs": {"job": row}}}}}
    middle = row["ours over theirs"]["torch"][1]
    assert f"| {middle:.2f} (" in llama.table(kept) and "| - |" in llama.table(kept)
    (axes,) = llama.draw(kept).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert drawn["over torch"] == [middle] and np.isnan(drawn["over torch.compile"]).all()

    def broken(compiled):
        raise RuntimeError("no\n compiler")

    row = llama.compare(ours, lambda compiled: broken(compiled) if compiled else ours, allowed=1e-4, rounds=3)
    assert row["milliseconds"]["torch.compile"] == "not measured: no compiler"
    with pytest.raises(RuntimeError):
        llama.compare(ours, broken, allowed=1e-4, rounds=3)


def test_the_shapes_are_the_toy_lm_and_a_larger_one(llama):
    toy = toy_lm.Config()
    told = dataclasses.asdict(toy)
    assert all(told[name] == value for name, value in llama.SHAPES["toy LM"].items() if name != "rounds")
    assert llama.SHAPES["width 512"]["mlp_dim"] == 1408 and llama.SHAPES["width 512"]["length"] == 256


ROOT = Path(__file__).parents[2]


def test_two_checkouts_decode_in_turns():
    fields = {
        name: TINY[name] for name in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    }
    times = decode.compare(ROOT, ROOT, fields, "float32", 2, 10, rounds=3)
    assert list(times) == ["before", "now"]
    assert all(len(each) == 3 and min(each) > 0 for each in times.values())


def test_a_folder_without_the_library(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkout of this repository, got"):
        decode.compare(tmp_path, ROOT, {}, "float32", 1, 4)


def test_the_table_of_decoding():
    case = {
        "model": "8 layers, float32",
        "B": 1,
        "S": 8192,
        "milliseconds (medians)": {"before": 29.24, "now": 16.83},
        "now over before (quartiles)": [0.552, 0.568, 0.612],
    }
    row = decode.table([case]).splitlines()[2]
    assert row == "| 8 layers, float32 | 1 | 8,192 | 29.2 ms | 16.8 ms | 0.57 (0.55 to 0.61) |"
    kept = json.loads((ROOT / "benchmarks/results/decode.json").read_text())["result"]["cases"]
    assert (ROOT / "benchmarks/results/decode.md").read_text() == decode.table(kept) + "\n"
