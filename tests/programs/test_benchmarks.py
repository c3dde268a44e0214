"""The benchmarks run, say what they found, and do not time what computes something else; sizes are tiny here."""

import io
import sys

import jax.numpy as jnp
import pytest

from benchmarks import angles, compilation, peers, record, rotate

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = dict(length=6, features=(512, 256), rows=2, warm=1)
JAX_PEERS = ("rope_jax", "split and concatenate", "equinox")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)  # as where it is not installed


def kept(result):
    return {"command": "python -m benchmarks.some", **record.machine(), "packages": {"some": "1"}, "result": result}


def drawn(figure):
    target = io.BytesIO()
    figure.savefig(target)
    return target.getvalue().startswith(b"\x89PNG")


def measured(peers=JAX_PEERS, **case):
    whole = dict(form="rotate", layout="half", head_dim=128, rotary_dim=128, dtype="float32")
    result = rotate.measure([whole | case], peers, rounds=dict.fromkeys(rotate.DOORS, 2), **TINY)
    return result["cases"][0]["found"]


def test_rotate_runs_without_the_peers():
    cases = [case for case in rotate.all_cases() if case["dtype"] == "float32" and case["rotary_dim"] in (128, 32)]
    result = rotate.measure(cases, JAX_PEERS, rounds=dict.fromkeys(rotate.DOORS, 2), **TINY)
    result |= {"instruction set": rotate.instruction_set(), "lengths": {"AVX": []}}
    for case in result["cases"]:
        found = case["found"]
        assert found["equinox"]["not timed"].startswith("not installed"), case
        for name in ("rope_jax", "split and concatenate", "x * 2"):
            assert all(quartile > 0 for key in ("over its limit", "over ours") for quartile in found[name][key])
        assert ("rope_jax, rotation given" in found) == (case["form"] == "from positions")
        assert "x * 2 in torch" not in found
    rows = rotate.table(kept(result)).splitlines()
    assert len(rows) == 2 + len(rotate.DOORS) and all("split and concatenate" in row for row in rows[2:])
    assert rotate.tables(kept(result)).count("- equinox: not installed") == len(cases)
    assert drawn(rotate.draw(kept(result)))


def test_every_form_and_size_is_asked_for_once():
    cases = list(rotate.all_cases())
    assert len({tuple(case.items()) for case in cases}) == len(cases)
    assert {case["form"] for case in cases} == set(rotate.DOORS) == set(rotate.ROUNDS)
    assert {case["head_dim"] for case in cases} == {64, 128, 256}


def test_lengths_on_both_sides_of_mapped_pages(monkeypatch):
    bytes_of_q = [length * 4096 * size for length in rotate.LENGTHS for size in (2, 4)]
    assert min(bytes_of_q) < 2**25 < max(bytes_of_q)
    assert {(case["layout"], case["rotary_dim"]) for case in rotate.length_cases()} == {
        (layout, rotary_dim) for layout in rotate.LAYOUTS for rotary_dim in (64, 128)
    }
    monkeypatch.setattr(rotate, "LENGTHS", (6,))
    cases = [case for case in rotate.length_cases() if case["dtype"] == "float16"]
    plain = "rope_jax", rotate.PLAIN
    done = rotate.measure(cases, plain, rounds=dict.fromkeys(rotate.DOORS, 2), features=(512, 256), warm=1)["cases"]
    rows = rotate.lengths_table({"lengths": {"AVX512": done, "AVX": done}}).splitlines()
    assert rows[0].endswith("| tokens | AVX512 | AVX |") and len(rows) == 2 + len(cases)
    assert all(row.count(" and ") == 2 for row in rows[2:])


def test_the_instruction_set_is_that_of_the_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2 --xla_some=1")
    assert rotate.instruction_set() == "AVX2"


def altered(alter):
    """A peer like ours but for one thing."""

    def build(recipe):
        return alter(recipe, peers.ours(recipe))

    return build


def other_pairs(recipe):
    return peers.ours(recipe._replace(layout="interleaved"))


WRONG = {
    "does nothing": lambda recipe, ours: ours._replace(turn=lambda q, k, _: (q, k)),
    "turns back": lambda recipe, ours: ours._replace(turn=lambda q, k, r: ours.turn(q, k, r.inverse())),
    "is one position on": lambda recipe, ours: ours._replace(rotation=lambda p: ours.rotation(p + 1)),
    "turns other pairs": lambda recipe, ours: other_pairs(recipe),
    "forgets k": lambda recipe, ours: ours._replace(turn=lambda q, k, r: (ours.turn(q, k, r)[0], k)),
    "is not a number": lambda recipe, ours: ours._replace(turn=lambda q, k, r: (q * jnp.nan, k)),
}


@pytest.mark.parametrize("form", ["rotate", "backward"])
@pytest.mark.parametrize("alter", WRONG.values(), ids=WRONG)
def test_a_peer_that_computes_something_else_is_noticed(alter, form, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "wrong", altered(alter))
    found = measured(("rope_jax", "wrong"), form=form, dtype="bfloat16")["wrong"]
    assert found["not timed"].startswith("computes something else") and "milliseconds" not in found
    assert not found["largest difference"] <= found["allowed"]


def test_a_peer_of_another_dtype_or_without_a_door_is_not_timed(monkeypatch):
    def wide(recipe, ours):
        return ours._replace(turn=lambda q, k, r: tuple(x.astype(jnp.float32) for x in ours.turn(q, k, r)))

    monkeypatch.setitem(peers.PEERS, "wide", altered(wide))
    monkeypatch.setitem(peers.PEERS, "shut", altered(lambda recipe, ours: ours._replace(turn="cannot")))
    monkeypatch.setitem(peers.PEERS, "absent", lambda recipe: "too old")
    found = measured(("rope_jax", "wide", "shut", "absent"), dtype="bfloat16")
    said = {name: each.get("not timed") for name, each in found.items()}
    assert said == {
        "rope_jax": None,
        "wide": "returns float32 for bfloat16",
        "shut": "cannot",
        "absent": "too old",
        "x * 2": None,
    }


def test_what_is_allowed_is_what_rounding_costs():
    exact = rotate.allowed("float32", "float32", 0, 1.0)
    assert 2**-24 < exact < 20 * 2**-24
    assert rotate.allowed("float32", "bfloat16", 0, 1.0) == pytest.approx(2 * 2**0.5 * 2**-8, rel=1e-3)
    assert rotate.allowed("bfloat16", "bfloat16", 0, 1.0) == pytest.approx(5 * 2**0.5 * 2**-8, rel=1e-3)


def test_angles_run():
    result = angles.measure({1: 3, 16: 3})
    assert list(result["positions x pairs"]) == ["1 x 64", "16 x 64"]
    rows = angles.table(kept(result)).splitlines()
    assert rows[2].startswith("| 1 x 64 | ") and rows[3].count(" ms |") == 2
    assert drawn(angles.draw(kept(result)))


def test_compilation_runs():
    result = compilation.measure(JAX_PEERS, rounds=2, steps=3)
    assert result["equal ropes"] == 1
    for name in ("rope_jax", "split and concatenate"):
        assert result["found"][name]["decoding"] == 1 and result["found"][name]["operations"] > 20
    assert result["found"]["equinox"]["not measured"].startswith("not installed")
    assert len(compilation.table(kept(result)).splitlines()) == 4
    assert drawn(compilation.draw(kept(result)))


def test_programs_are_counted():
    assert compilation.programs(jnp.sin, [(jnp.ones(n),) for n in (1, 2, 1)]) == 2
    assert compilation.programs(lambda n, x: x * n, [(n, jnp.ones(1)) for n in (1, 2, 1, 3)], static=(0,)) == 3
