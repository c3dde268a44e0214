"""benchmarks/scale.py: what it reads out of a program, and what it makes of that."""

import copy
import json
import math
from pathlib import Path

import jax
import pytest

from benchmarks import scale

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


# As a TPU's compiler writes it, cut short. Forward, three turns of a loop: a gather of 4 shards, that goes on in three
# fusions, and a ring of 2 that sends twice within an inner loop, from 2 to below 7 by 2. Then in a branch, once: a
# scattered sum, a sum among pairs, an exchange.
HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1.clone (input: bf16[16,128]) -> bf16[4,128] {
  %input = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[16,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=45, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[4,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.7, %input), dynamic_slice_sizes={4,128}
}

%begin (shard: f32[2,128]) -> (f32[2,128], f32[8,128]) {
  %shard = f32[2,128]{1,0:T(2,128)} parameter(0)
  %coming = f32[8,128]{1,0:T(8,128)} all-gather(%shard), channel_id=1, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (f32[2,128]{1,0:T(2,128)}, f32[8,128]{1,0:T(8,128)}) custom-call(%shard, %coming)
}

%work (shard: f32[2,128]) -> f32[8,128] {
  %shard = f32[2,128]{1,0:T(2,128)} parameter(0)
  ROOT %here = f32[8,128]{1,0:T(8,128)} all-gather(%shard), channel_id=1, replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%inner (p: (f32[8,128], s32[])) -> (f32[8,128], s32[]) {
  %p = (f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=0
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  %start = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, metadata={op_name="jit(step)/layers/self_attention/ppermute"}
  %done = f32[8,128]{1,0:T(8,128)} collective-permute-done(%start)
  %again = f32[8,128]{1,0:T(8,128)} collective-permute(%done), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, metadata={op_name="jit(step)/layers/self_attention/ppermute"}
  %still = f32[8,128]{1,0:T(8,128)} collective-permute(%x), channel_id=9, source_target_pairs={{0,0},{1,1},{2,2},{3,3}}
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %out = (f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%again, %next)
}

%inner_condition (q: (f32[8,128], s32[])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %q = (f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %lt = pred[]{:T(512)} compare(%j, %seven), direction=LT
}

%outer (p: (f32[2,128], s32[])) -> (f32[2,128], s32[]) {
  %p = (f32[2,128]{1,0:T(2,128)}, /*index=1*/s32[]{:T(128)}) parameter(0)
  %shard = f32[2,128]{1,0:T(2,128)} get-tuple-element(%p), index=0
  %k = s32[]{:T(128)} get-tuple-element(%p), index=1
  %begun = (f32[2,128]{1,0:T(2,128)}, f32[8,128]{1,0:T(8,128)}) fusion(%shard), kind=kCustom, calls=%begin
  %meanwhile = f32[8,128]{1,0:T(8,128)} fusion(%shard), kind=kOutput, calls=%work
  %gathered = f32[8,128]{1,0:T(8,128)} fusion(%shard), kind=kCustom, calls=%work
  %two = s32[]{:T(128)} constant(2)
  %copied = s32[]{:T(128)S(6)} copy(%two)
  %state = (f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%gathered, %copied)
  %ring = (f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) while(%state), condition=%inner_condition, body=%inner
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%k, %one)
  ROOT %out = (f32[2,128]{1,0:T(2,128)}, s32[]{:T(128)}) tuple(%shard, %next)
}

%outer_condition (q: (f32[2,128], s32[])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %q = (f32[2,128]{1,0:T(2,128)}, s32[]{:T(128)}) parameter(0)
  %m = s32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %lt = pred[]{:T(512)} compare(%m, %three), direction=LT
}

%left (g: bf16[16,128]) -> f32[4,128] {
  %g = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %scattered = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %wide = f32[4,128]{1,0:T(8,128)} convert(%scattered)
  %summed = f32[4,128]{1,0:T(8,128)} all-reduce(%wide), channel_id=3, replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %changed = f32[4,128]{1,0:T(8,128)} all-to-all(%summed), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}
}

%right (g: bf16[16,128]) -> f32[4,128] {
  %g = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %nothing = f32[4,128]{1,0:T(8,128)} custom-call(%g), custom_call_target="AllocateBuffer"
}

ENTRY %main (shard: f32[2,128], grads: bf16[16,128], which: s32[]) -> f32[4,128] {
  %shard = f32[2,128]{1,0:T(2,128)} parameter(0)
  %grads = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(1)
  %which = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %state = (f32[2,128]{1,0:T(2,128)}, s32[]{:T(128)}) tuple(%shard, %zero)
  %layers = (f32[2,128]{1,0:T(2,128)}, s32[]{:T(128)}) while(%state), condition=%outer_condition, body=%outer
  ROOT %back = f32[4,128]{1,0:T(8,128)} conditional(%which, %grads, %grads), branch_computations={%left, %right}
}
"""


def test_collectives_are_counted_as_often_as_their_loops_turn():
    shard, whole, grads = 4 * 2 * 128, 4 * 8 * 128, 2 * 16 * 128
    assert scale.collectives(HLO) == {
        "all-gather": {"operands": 3 * shard, "sent": 3 * 3 * shard},
        "reduce-scatter": {"operands": grads, "sent": 3 * grads // 4},
        "all-reduce": {"operands": 4 * 4 * 128, "sent": 4 * 4 * 128},  # twice a half
        "all-to-all": {"operands": 4 * 4 * 128, "sent": 3 * 4 * 4 * 128 // 4},
        "collective-permute": {"operands": 3 * 3 * whole, "sent": 0},  # each to itself
        "ring attention": {"operands": 3 * 3 * 2 * whole, "sent": 3 * 3 * 2 * whole},
    }
    assert scale.collectives(HLO.replace("{%left, %right}", "{%right, %right}")).keys() == {
        "all-gather",
        "collective-permute",
        "ring attention",
    }


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "compare(%m, %three), direction=LT",
            "compare(%m, %three), direction=NE",
            "must count to below a constant",
        ),
        (
            "%zero = s32[]{:T(128)} constant(0)",
            "%zero = s32[]{:T(128)} add(%which, %which)",
            "must count from, by and",
        ),
        (
            "%next = s32[]{:T(128)} add(%k, %one)",
            "%next = s32[]{:T(128)} multiply(%k, %one)",
            "must count by a constant",
        ),
        ("replica_groups=[2,2]<=[4]", "replica_groups={}", "replica_groups must be listed, tiled or of a mesh"),
    ],
)
def test_what_it_cannot_read_is_an_error(old, new, says):
    assert old in HLO
    with pytest.raises(ValueError, match=says):
        scale.collectives(HLO.replace(old, new))


def test_bytes_and_groups():
    assert scale.bytes_of("(bf16[3,5]{1,0:T(8,128)(2,1)}, f32[], /*index=2*/s32[7]{0:T(128)S(1)}, pred[2])") == 64
    for attributes, size in (
        ("channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}", 2),
        ("replica_groups=[2,16]<=[4,8]T(1,0), dimensions={1}", 16),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0', 'axis_1'}, dimensions={0}", 16),
        ("replica_groups=mesh['x'=8,'y'=4], device_ids=[32]<=[32] {'x':(2)4}, dimensions={0}", 4),
    ):
        assert scale.group_size(attributes) == size


def test_what_a_compiler_says_of_too_little_memory():
    for words, want in (
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.5G) "
            "exceeds available HBM (15.75G).",
            [33.5 * 2**30, 15.75 * 2**30],
        ),
        ("Ran out of memory in memory space hbm. Used 1.5T of 95.5G hbm. Exceeded", [1.5 * 2**40, 95.5 * 2**30]),
    ):
        assert scale.needed(words) == want
    assert scale.needed("UNIMPLEMENTED: no such thing") is None


def test_the_cases_are_those_of_the_question():
    ring = [case for case in scale.cases() if case.model == 1 and case.attention == "ring"]
    assert {(case.length, case.chips) for case in ring} == {
        (length, chips) for length in (2**13, 2**17, 2**20) for chips in (1, 4, 16, 64, 256)
    }
    for case in scale.cases():
        assert case.length // case.sequence == 8192 or case.data == 1  # no second row where one does not fit
        assert case.length // case.sequence >= 4096
        for chips in scale.TOPOLOGIES.values():
            sizes = [int(size) for size in chips[case.chips].split("x")]
            assert math.prod(sizes) == max(case.chips, 4)
    assert {case.model for case in scale.cases()} == {1, 8} and scale.MISTRAL["num_kv_heads"] % 8 == 0


@pytest.fixture
def kept():
    """Of three cases: both fit, one fits, none does."""
    program = {
        "state": 2 * scale.GIB,
        "peak": 10 * scale.GIB,
        "collectives": {
            "all-gather": {"operands": 5, "sent": 3 * scale.GIB},
            "all-reduce": {"operands": 7, "sent": 2 * scale.GIB},
            scale.RING: {"operands": 7, "sent": 4 * scale.GIB},
        },
    }
    small = {"does not fit": 20 * scale.GIB, "of": 16 * scale.GIB}
    rows = [
        {
            "length": 2**13,
            "data": 16,
            "sequence": 1,
            "model": 1,
            "attention": "ring",
            "v5e": program,
            "v5p": program,
        },
        {"length": 2**17, "data": 1, "sequence": 4, "model": 1, "attention": "ring", "v5e": small, "v5p": program},
        {
            "length": 2**20,
            "data": 1,
            "sequence": 32,
            "model": 8,
            "attention": "plain",
            "v5e": small,
            "v5p": {"does not compile": "UNIMPLEMENTED: why"},
        },
    ]
    kept = {"command": "python -m benchmarks.scale", "jax": "0", "date": "today", "packages": {"libtpu": "1"}}
    return kept | {"result": {"sizes": {}, "parameters": 7_250_000_000, "cases": copy.deepcopy(rows)}}


def test_the_table(kept):
    text = scale.table(kept)
    assert "| 8k | 16 | 16 x 1 x 1 | ring | 10.0 | 10.0 | 4.0 | 5.0 |" in text
    assert "| 1M | 256 | 1 x 32 x 8 | plain | does not fit: 20.0 | does not compile | - | - |" in text
    assert "7.25 billion" in text and "libtpu 1, jax 0, today" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_whole_table(kept):
    lines = scale.whole_table(kept).splitlines()
    assert lines[2] == "| 8k | 16 | 16 x 1 x 1 | 8,192 | ring | 2.0 | 10.0 | 10.0 | 4.0 | 5.0 |"
    assert lines[3].startswith("| 128k | 4 | 1 x 4 x 1 | 32,768 | ring | 2.0 | does not fit: 20.0 | 10.0 | 4.0 |")
    assert lines[4].startswith(
        "| 1M | 256 | 1 x 32 x 8 | 32,768 | plain | - | does not fit: 20.0 | does not compile |"
    )
    assert (
        "- Compiled, not run: one training step (forward, backward, AdamW) of 7.25 billion parameters" in lines[6]
    )
    assert lines[7] == "- Rows of 1M on 256 chips of v5p do not compile: UNIMPLEMENTED: why"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_the_picture(kept, tmp_path):
    figure = scale.draw(kept)
    figure.savefig(tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    peak, moved = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in peak.lines}
    assert lines["8k tokens in a row, v5e"] == lines["8k tokens in a row, v5p"] == [10.0]
    assert lines["128k tokens in a row, v5e"] == [20.0]  # what it needs, over the line of what there is
    assert list(moved.lines[0].get_ydata()) == [9.0]


def test_what_is_kept_can_be_shown():
    kept = json.loads((BENCHMARKS / "results/scale.json").read_text())
    assert kept["result"]["sizes"] == scale.MISTRAL and len(kept["result"]["cases"]) == len(scale.cases())
    assert len(scale.table(kept).splitlines()) == len(scale.cases()) + 4
    assert (BENCHMARKS / "results/scale.md").read_text() == scale.whole_table(kept) + "\n"
    assert (BENCHMARKS / "results/scale.png").exists()


# -------------------------------------------------------------------------------------------- where libtpu is installed

SMALL = dict(vocab_size=512, num_layers=3, width=256, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=512)


@pytest.mark.full
def test_a_small_model_sends_what_arithmetic_says(no_compilation_cache, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setattr(scale, "TOPOLOGIES", {"v5e": {4: "2x2"}})
    length, ring = 2048, 4
    cases = [scale.Case(length, 4, 1), scale.Case(length, 1, ring), scale.Case(2**20, 1, ring, attention="plain")]
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        result = scale.measure(SMALL, cases)
    attention, mlp, tables = 3 * 2 * 256 * 128 * (4 + 2), 3 * 3 * 256 * 512, 2 * 512 * 256
    kernels = attention + mlp
    assert result["parameters"] == kernels + tables + (2 * 3 + 1) * 256
    data, sequence, plain = (row["v5e"] for row in result["cases"])
    for program in (data, sequence):
        assert 3 * result["parameters"] < program["state"] < 1.02 * 3 * result["parameters"]  # 12 bytes on 4 chips
        # Kernels come together in bfloat16 twice, forward and backward, some of attention's there in two layouts;
        # the tables once or more.
        gathered = program["collectives"]["all-gather"]["sent"]
        assert 2 * 2 * kernels * 3 / 4 < gathered < 2 * (2 * kernels + attention + 3 * tables) * 3 / 4
        # Their gradients go apart once, those of the kernels in bfloat16.
        scattered = program["collectives"]["reduce-scatter"]["sent"]
        assert 2 * kernels * 3 / 4 < scattered < (2 * kernels + 4 * tables) * 3 / 4
    # k, v and the order go around forward, in the block formed again and backward. The gradients of k and v follow in
    # float32, a step behind, the first of them zeros, and go home in bfloat16.
    kv, order = 2 * length // ring * 2 * 128, length // ring
    passed = 3 * (3 * (ring - 1) * (2 * kv + 4 * order) + ring * 4 * kv + 2 * kv)
    assert sequence["collectives"][scale.RING]["sent"] == passed
    assert data["collectives"][scale.RING]["sent"] == 0  # a ring of one
    # Scores of 4 heads, a quarter of the queries and all keys, in float32.
    assert plain["does not fit"] > 4 * 4 * 2**20 * 2**20 / 4 and plain["of"] == 15.75 * 2**30
