"""benchmarks/tpu.py: is the compiler's program read rightly, and are its figures shown as what they are?"""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks import tpu
from benchmarks import tpu_compiler as compiler

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


# ------------------------------------------------------------------------------------- reading the program

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p: f32[8,64]) -> f32[8,64] {
  ROOT %inside = f32[8,64]{1,0:T(8,128)} copy(%p), backend_config={"estimated_cycles":"5"}
}

ENTRY %main (x: bf16[64,64], y: bf16[64,64]) -> (bf16[64,64], bf16[64,64]) {
  %x = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[64,64]{1,0:T(8,128)(2,1)S(1)}, bf16[64,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %copy.1 = bf16[64,64]{0,1:T(8,128)(2,1)} copy(%copy-done), backend_config={"estimated_cycles":"100"}
  %fusion = (bf16[64,64]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[8]{0:T(128)}) fusion(%copy.1, %y), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1000"}
  %first = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion), index=0
  %kernel = (bf16[64,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0:T(8,128)(2,1)}) custom-call(%first, %y), custom_call_target="tpu_custom_call", output_to_operand_aliasing={{0}: (0, {})}
  %joined = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} custom-call(%first), custom_call_target="ConcatBitcast"
  ROOT %scatter = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%joined), kind=kCustom, calls=%fused
}
"""
TILES = 64 * 128 * 2  # bytes of bf16[64,64] whose 64 columns fill half of 128 lanes


@pytest.mark.parametrize(
    ("text", "size", "in_hbm"),
    [
        ("bf16[64,64]{1,0:T(8,128)(2,1)}", TILES, True),
        ("bf16[64,64]{1,0:T(8,128)(2,1)S(1)}", TILES, False),
        ("bf16[1,4096,8,64]{1,3,2,0:T(8,128)(2,1)}", 4096 * 8 * 64 * 2, True),  # positions in the lanes: no padding
        ("f32[1,4096,64]{2,1,0:T(8,128)}", 4096 * 128 * 4, True),
        ("f32[4096]{0:T(1024)}", 4096 * 4, True),
        ("f32[]{:T(128)}", 4, True),
        ("pred[3,5]", 15, True),
        ("c64[2,2]{1,0}", 32, True),
        ("u32[]{:S(2)}", 4, False),
    ],
)
def test_an_array_is_as_large_as_its_tiles(text, size, in_hbm):
    assert compiler.arrays(text) == [(size, in_hbm)]


def test_a_program_is_counted_by_hand():
    chip = compiler.CHIPS["v5e"]
    kernel_bytes = 4 * TILES  # two operands, two results, one of them in the place of an operand
    kernel_cycles = round(kernel_bytes / 819e9 * 1.5e9)
    assert compiler.cost(chip, PROGRAM, 12345) == {
        "cycles": 1100 + kernel_cycles,
        "of kernels": kernel_cycles,
        # fetch x; write the copy; read it and y, write f32[8]; the kernel but for the operand on the chip; the last
        "HBM bytes": TILES + TILES + 2 * TILES + 128 * 4 + 3 * TILES + TILES,
        "bytes accessed": 12345,
        "kernels": 1,
        "kernel bytes": kernel_bytes,
        "copies": 1,
        "fusions": 2,
        "without estimate": 1,
    }


@pytest.mark.parametrize("opcode", ["while", "conditional"])
def test_what_runs_an_unknown_number_of_times_is_not_counted(opcode):
    with pytest.raises(ValueError, match="loops or branches"):
        compiler.cost(compiler.CHIPS["v5e"], PROGRAM.replace(" copy-done(", f" {opcode}("), 0)


# Programs for a machine that is not here can be put into the cache that conftest.py sets, but not be loaded from it.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_a_real_program_is_read():
    pytest.importorskip("libtpu")
    chip = compiler.CHIPS["v6e"]
    x = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16)
    size = x.size * 2

    def doubled_by_kernel(x):
        def kernel(source, target):
            target[...] = source[...] * 2

        return pl.pallas_call(kernel, out_shape=x, interpret=False)(x)

    def cost(program, free_layouts=False):
        text = compiler.compiled(chip, program, x, free_layouts=free_layouts, donate=(0,))
        return compiler.cost(chip, *text)

    plain, kernel = cost(lambda x: x * 2), cost(doubled_by_kernel)
    assert plain["HBM bytes"] == plain["bytes accessed"] == 2 * size
    assert plain["cycles"] > compiler.by_bandwidth(chip, 2 * size) > plain["of kernels"] == 0
    assert (kernel["kernels"], kernel["kernel bytes"], kernel["fusions"]) == (1, 2 * size, 0)
    assert kernel["of kernels"] == compiler.by_bandwidth(chip, 2 * size)
    assert plain["without estimate"] == kernel["without estimate"] == 0
    assert cost(jnp.transpose)["cycles"] > 0 == cost(jnp.transpose, free_layouts=True)["cycles"]
    assert 1 < compiler.plain_pass(chip) < 10


# ------------------------------------------------------------------------------------------- what is compiled


def test_the_forms_are_one_rotation(monkeypatch):
    tpu.check(tpu.Heads(2, 1, 16, 16), tokens=8)
    tpu.check(tpu.Heads(2, 1, 16, 8), tokens=8)
    monkeypatch.setattr(tpu, "strided_slices", lambda x, cos, sin: tpu.split_and_concatenate(x, cos, sin))
    with pytest.raises(AssertionError):
        tpu.check(tpu.Heads(2, 1, 16, 16), tokens=8)


def test_every_program_of_a_name_computes_the_same_shapes():
    shapes = {}
    for job in (*tpu.rotation_jobs(), *tpu.projection_jobs(), *tpu.attention_jobs()):
        results = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(job.function, *job.args))
        assert shapes.setdefault(job.program, jax.tree.leaves(results)) == jax.tree.leaves(results), job
    assert set(tpu.SHOWN) < set(shapes)


# ------------------------------------------------------------------------------------------- what is shown


@pytest.fixture
def kept():
    """Two chips; rotation costs a half of the floor more with XLA, and a kernel of a tenth of it without."""

    def cost(cycles, of_kernels=0):
        return {
            "cycles": cycles + of_kernels,
            "of kernels": of_kernels,
            "HBM bytes": 1050,
            "bytes accessed": 3000,
            "kernels": of_kernels // 100,
            "kernel bytes": of_kernels * 10,
            "copies": 0,
            "fusions": 2,
            "without estimate": 0,
        }

    forms = {
        "no rotation": cost(1000),
        "rope_jax.rotate, half": cost(1500),
        "rope_jax.Rope.rotate_all, half": cost(1000, 200),
        "rope_jax.Rope, half": cost(1000, 100),
        "rope_jax.rotate, interleaved": cost(1650),
        "rope_jax.Rope.rotate_all, interleaved": cost(1000, 200),
        "rope_jax.Rope, interleaved": cost(1000, 100),
        "strided slices": {"not measured": "it does not compile"},
    }
    layer = {name: forms[name] for name in forms if "rotate" not in name}
    chip = {
        "bandwidth": 819e9,
        "clock": 1.5e9,
        "plain pass over bandwidth": 2.5,
        "programs": {
            "rotation": {"q and k doubled": cost(1000), **dict(list(forms.items())[1:])},
            **{program: layer if program in ("attention layer", "decode step") else forms for program in tpu.SHOWN},
        },
    }
    return {
        "command": "python -m benchmarks.tpu",
        "jax": "1.2.3",
        "packages": {"libtpu": "4.5.6"},
        "date": "2000-01-01",
        "result": {"bytes of q and k": 1000, "chips": {"v1": chip, "v2": chip}},
    }


def test_the_table_says_what_a_kernel_may_cost_and_that_these_are_no_times(kept, monkeypatch):
    monkeypatch.setattr(tpu, "ASKED", ("v1", "v2"))
    text = tpu.table(json.loads(json.dumps(kept)))
    assert "not times" in text and "On v1 / v2" in text
    both = "1.10 (1.25) / 1.10 (1.25)"
    assert f"| rope_jax.Rope, half | 1.05 / 1.05 | {both} | {both} | {both} | {both} |" in text
    assert "| rope_jax.rotate, half | 1.05 / 1.05 | 1.50 / 1.50 | 1.50 / 1.50 | - | - |" in text
    assert "| strided slices (GPT-J) | - | - | - | - | - |" in text
    assert "cycles over the projection | 1.25 | 1.65 | 1.20 (1.50) | 1.10 (1.25) |" in text
    assert "interleaved over half | 1.05 | 1.10 | 1.00 | 1.00 |" in text
    assert "bytes over those of q and k | 1.1 | 1.05 | 1.05 | 1.05 |" in text


def test_the_whole_table_has_every_form_of_every_program(kept):
    text = tpu.whole_table(kept)
    assert "not times" in text and "jax 1.2.3, libtpu 4.5.6" in text
    assert text.count("| rope_jax.rotate, half | 1.50 | 1,500 |") == 2 * 3
    assert text.count("| strided slices | not measured: it does not compile | -") == 2 * len(
        kept["result"]["chips"]["v1"]["programs"]
    )
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {12}


def test_the_picture_shows_chips_beside_each_other(kept):
    figure = tpu.draw(kept)
    figure.canvas.draw()
    assert "not times" in figure.get_suptitle()
    middle = figure.axes[1]
    widths = [bar.get_width() for bar in middle.patches]
    assert len(widths) == 2 * 7 and np.nanmax(widths) == 1.65
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["v1", "v2"]


def test_without_libtpu_it_says_so_and_keeps_what_was_kept(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("benchmarks.record.publish", lambda *args, **kwargs: pytest.fail("published"))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BENCHMARKS / "tpu.py"), run_name="__main__")
    assert stopped.value.code == "not measured: libtpu is not installed"
