"""benchmarks/attention.py and attention_compiled.py: they time what is equal, and count loops and parts rightly."""

import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import attention, attention_compiled, record, tpu_compiler
from benchmarks.traffic import Program

pytestmark = pytest.mark.usefixtures("quick_compilation")
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def kept(result):
    return {"command": "python -m benchmarks.some", **record.machine(), "result": result}


def test_attention_runs_and_says_what_it_found(monkeypatch):
    monkeypatch.setattr(attention, "MEMORY_LENGTH", 1024)
    monkeypatch.setattr(attention, "LEAST_ROUNDS", 2)
    with jax.numpy_dtype_promotion("standard"):  # for the plain form
        result = attention.measure({"forward": (1, 64), "gradient": (64,)}, 64, (64,), seconds=0.0)
    assert len(result["cases"]) == 2 * 3 + len(attention.FEATURES) + 2 * len(attention.SHARES)
    for case in result["cases"]:
        for name, difference in case.get("difference", {}).items():
            assert difference <= attention.TOLERANCE[case["dtype"]], (case, name)
        assert all(quartile > 0 for each in case[attention.TIME].values() for quartile in each)
    memory = result["temporaries at T=1024, float32"]
    assert memory["forward"][attention.OURS] < memory["forward"][attention.PLAIN]
    shown = attention.table(kept(result))
    assert shown.count("\n| ") - shown.count("\n| ---") == 2 + 5 + 6 + 2 + 3  # rows, and titles but the first
    target = io.BytesIO()
    attention.draw(kept(result)).savefig(target)
    assert target.getvalue().startswith(b"\x89PNG")


def test_what_differs_is_not_timed():
    x = jnp.ones(4)
    forms = {attention.OURS: lambda: x, attention.PLAIN: lambda: x * 1.001}
    with pytest.raises(ArithmeticError, match="rope_jax is off by"):
        attention.largest_difference(forms)
    forms[attention.OURS] = lambda: x * jnp.nan
    with pytest.raises(ArithmeticError, match="off by nan"):
        attention.largest_difference(forms)


def test_the_sizes_are_those_of_the_question():
    assert (attention.HEADS, attention.KV_HEADS, attention.HEAD_DIM) == (8, 2, 128)
    assert attention.LENGTHS["forward"] == (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
    compiled = attention_compiled
    assert (compiled.WIDTH, compiled.HEADS, compiled.KV_HEADS, compiled.HEAD_DIM) == (4096, 32, 8, 128)
    case = attention_compiled.decode_case("layer", 8192, "tpu")
    weights = 2 * 4096 * 128 * (32 + 8 + 8 + 32)
    assert case.least == weights + 2 * 2 * 8 * 8 * 8192 * 128 and case.donate == (2,)


# ------------------------------------------------------------------------------------- reading the program

PROGRAM = """HloModule jit_f, is_scheduled=true

%part (p: f32[4,8,128], i: s32[]) -> f32[1,8,128] {
  %p = f32[4,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %cut = f32[1,8,128]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,8,128}
}

%write (q: f32[4,8,128], u: f32[1,8,128], j: s32[]) -> f32[4,8,128] {
  %q = f32[4,8,128]{2,1,0} parameter(0)
  %u = f32[1,8,128]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %put = f32[4,8,128]{2,1,0} dynamic-update-slice(%q, %u, %j, %j, %j)
}

%body (a: (s32[], f32[4,8,128])) -> (s32[], f32[4,8,128]) {
  %a = (s32[], f32[4,8,128]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%a), index=0
  %x = f32[4,8,128]{2,1,0} get-tuple-element(%a), index=1
  %slice = f32[1,8,128]{2,1,0} fusion(%x, %n), kind=kLoop, calls=%part
  %next = f32[4,8,128]{2,1,0} fusion(%x, %slice, %n), kind=kLoop, calls=%write
  ROOT %t = (s32[], f32[4,8,128]{2,1,0}) tuple(%n, %next)
}

%bound (b: (s32[], f32[4,8,128])) -> pred[] {
  %b = (s32[], f32[4,8,128]{2,1,0}) parameter(0)
  %m = s32[] get-tuple-element(%b), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%m, %five), direction=LT
}

ENTRY %main (x: f32[4,8,128], n: s32[]) -> f32[4,8,128] {
  %x0 = f32[4,8,128]{2,1,0} parameter(0)
  %n0 = s32[] parameter(1)
  %copied = f32[4,8,128]{2,1,0} copy(%x0), backend_config={"estimated_cycles":"100"}
  %start = (s32[], f32[4,8,128]{2,1,0}) tuple(%n0, %copied)
  %loop = (s32[], f32[4,8,128]{2,1,0}) while(%start), condition=%bound, body=%body
  ROOT %end = f32[4,8,128]{2,1,0} get-tuple-element(%loop), index=1
}
"""
ALL, PART, INDEX = 4 * 8 * 128 * 4, 8 * 128 * 4, 4


@pytest.mark.parametrize("dynamic", [False, True])
def test_loops_and_parts_are_counted_by_hand(dynamic):
    text = PROGRAM.replace("%five = s32[] constant(5)", "%five = s32[] add(%m, %m)") if dynamic else PROGRAM
    program, trips = Program(text, dynamic_trips=3), 3 if dynamic else 5
    once = (PART + PART + INDEX) + (PART + PART + INDEX)  # read and write a slice; update it
    condition = 1 + 2 * INDEX + (2 * INDEX if dynamic else 0)  # pred [], and its operands
    assert program.bytes() == 2 * ALL + trips * (once + condition)
    assert program.launches() == 1 + trips * (2 + 1 + dynamic)
    assert program.cycles() == 100
    assert program.moves(ALL) == ["copied"] and program.moves(ALL + 1) == []
    assert program.moves(PART, ["dynamic-slice"]) == ["slice"]


# Programs for a machine that is not here can be put into the cache that conftest.py sets, but not be loaded from it.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_a_real_program_is_counted():
    pytest.importorskip("libtpu")
    x = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16)

    def total(x, n):
        def add(i, y):
            return y + x[i]

        return jax.lax.fori_loop(0, n, add, jnp.zeros(x.shape[1:], x.dtype))

    index = jax.ShapeDtypeStruct((), jnp.int32)
    ready = tpu_compiler.executable(tpu_compiler.CHIPS["v6e"], total, x, index, free_layouts=False)
    moved = Program(ready.as_text(), dynamic_trips=8).bytes()
    assert 1 <= moved / (x.size * 2) < 3.5  # the sum may stay on the chip


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(attention_compiled, "versions", lambda names: dict.fromkeys(names, "not installed"))
    found = attention_compiled.measure_tpu("v5p")
    assert found == {"not compiled": "libtpu not installed"}
    before = {"programs": []}
    assert attention_compiled.section(found, ["libtpu"], before) is before
    assert attention_compiled.section(found, ["libtpu"], {}) is found
    assert "not compiled: libtpu not installed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["attention", "attention_compiled"])
def test_the_written_results_make_a_table(name):
    written = json.loads((RESULTS / f"{name}.json").read_text())
    assert written["command"].startswith(f"python -m benchmarks.{name}")
    table = sys.modules[f"benchmarks.{name}"].table(written)
    assert table.count("\n| ") > 20
    assert (RESULTS / f"{name}.md").read_text() == table + "\n"
