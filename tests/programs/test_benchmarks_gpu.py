"""benchmarks/gpu.py on a processor, at sizes that take seconds: all of it but the card."""

import copy
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax
from benchmarks import gpu, gpu_compiler

pytestmark = pytest.mark.usefixtures("quick_compilation")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {"B": 2, "T": 24, "N": 4, "K": 2, "H": 32}


@pytest.fixture(scope="module")
def kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        result = gpu.measure(jax.devices("cpu")[0], SIZES, rounds=3, repeats=2, layer_repeats=1)
    return {"command": "python -m benchmarks.gpu", "device": "a processor, 2 CPU cores", "result": result}


def copied(kept):
    return json.loads(json.dumps(copy.deepcopy(kept)))


def test_every_form_is_checked_and_timed(kept):
    forms = {f"{name}{kind}" for name in gpu.TURNS for kind in ("", " donated")}
    for part in ("rotating", "tiny"):
        for direction in gpu.DIRECTIONS:
            rows = kept["result"][part][direction]
            assert rows.keys() == forms | gpu.PEERS.keys()
            for name in forms:
                assert 0 <= rows[name]["worst error, roundings"] <= 1.1
                for key in (gpu.TIME, gpu.SHARE, gpu.AGAINST):
                    low, middle, high = rows[name][key]
                    assert 0 < low <= middle <= high
            assert rows[gpu.COPY][gpu.SHARE] == rows[gpu.OURS][gpu.AGAINST] == [1, 1, 1]
            assert rows[gpu.OURS]["worst error, roundings"] > 0.5  # the pair's length is not overstated
            assert {rows[name]["not timed"].split(":")[0] for name in gpu.PEERS} == {"not installed"}
    assert kept["result"]["bytes"] == 2 * sum(2 * 24 * heads * 32 * 2 for heads in (4, 2))
    for direction in ("forward", "gradient"):
        layer = kept["result"]["attention"][direction]
        assert layer["milliseconds (quartiles)"].keys() == {"with rope", "without"}
        assert all(ratio > 0 for ratio in layer["with over without"])


def test_the_sizes_are_those_of_the_question():
    assert gpu.SIZES == {"B": 4, "T": 4096, "N": 32, "K": 8, "H": 128} and gpu.BAR == 0.9


def arrays_of_two():
    """q and k that bfloat16 holds exactly, and a rotation."""
    rng = np.random.default_rng(0)
    q, k = (np.array(rng.normal(size=(1, 8, heads, 16)), jnp.bfloat16).astype(np.float32) for heads in (2, 1))
    return [q, k], rope_jax.rotation(jnp.arange(1, 9)[None], rope_jax.Standard()(16))


@pytest.mark.parametrize("wrong", ["the other way", "NaN", "in bfloat16"])
def test_a_form_that_is_not_equal_is_refused(monkeypatch, wrong):
    def low(x, rotation):
        return gpu.split_and_concatenate(x.astype(jnp.float32), [part * (1 + 2.0**-7) for part in rotation]).astype(
            x.dtype
        )

    turn = {
        "the other way": lambda x, rotation: rope_jax.rotate(x, rotation.inverse()),
        "NaN": lambda x, rotation: x * jnp.nan,
        "in bfloat16": low,
    }[wrong]
    monkeypatch.setattr(gpu, "TURNS", {gpu.OURS: (turn, rope_jax.rotate)})
    arrays, rotation = arrays_of_two()
    for direction in gpu.DIRECTIONS:
        form = gpu.jax_forms(jax.devices("cpu")[0], rotation, direction)[gpu.OURS]
        with pytest.raises(ArithmeticError, match=r"off by (\d|nan).* roundings, where its arithmetic allows 1.1"):
            gpu.checked(form, arrays, rotation, direction)


def test_a_peer_that_fails_takes_no_others_figures_away(monkeypatch):
    def raising(error):
        def start(q, k):
            raise error

        return start, rope_jax.rotate, 1.1

    def unturned(q, k):
        return gpu.window(lambda q, k: (jnp.asarray(q), jnp.asarray(k)), (q, k))

    peers = {
        gpu.LIGER: raising(RuntimeError("no kernel image\nand much more")),
        "flash-attn": raising(AssertionError()),
        "TransformerEngine": (unturned, rope_jax.rotate, 1.1),
    }
    monkeypatch.setattr(gpu, "torch_forms", lambda *_: peers)
    monkeypatch.setattr(gpu, "TURNS", {name: gpu.TURNS[name] for name in (gpu.COPY, gpu.OURS)})
    rows = gpu.rotating(jax.devices("cpu")[0], SIZES, rounds=2, repeats=1)["forward"]
    reasons = [rows[name]["not timed"] for name in peers]
    assert reasons[:2] == ["no kernel image", "AssertionError"] and reasons[2].startswith("off by ")
    assert gpu.TIME in rows[gpu.OURS]

    # Nothing of ours is passed over in silence.
    monkeypatch.setattr(gpu, "torch_forms", lambda *_: {"ours": raising(RuntimeError("no kernel image"))})
    with pytest.raises(RuntimeError, match="no kernel image"):
        gpu.rotating(jax.devices("cpu")[0], SIZES, rounds=2, repeats=1)


@pytest.mark.parametrize("chained", [False, True])
def test_a_window_waits_once_and_feeds_on_only_what_it_must(chained):
    waited = []
    run = gpu.window(lambda n: (n + 1,), (0,), wait=waited.append, chained=chained)
    assert run(5) == ((5,) if chained else (1,))
    assert run(2) == ((7,) if chained else (1,))
    assert len(waited) == 2


def test_donated_arrays_are_given_away(monkeypatch):
    given: list = []

    def window(step, arrays, window=gpu.window, **options):
        given[:] = arrays
        return window(step, arrays, **options)

    monkeypatch.setattr(gpu, "window", window)
    arrays, rotation = arrays_of_two()
    for direction in gpu.DIRECTIONS:
        for name, (start, *_) in gpu.jax_forms(jax.devices("cpu")[0], rotation, direction).items():
            start(*arrays)()
            assert {x.is_deleted() for x in given} == {name.endswith(" donated")}


def test_the_table_says_who_meets_the_bars(kept):
    kept = copied(kept)
    rotating = kept["result"]["rotating"]
    for direction, share in zip(gpu.DIRECTIONS, (0.97, 0.5), strict=True):
        for name, row in rotating[direction].items():
            if name.startswith(gpu.OURS):
                row[gpu.SHARE] = [share] * 3
    rotating["forward"][gpu.OURS][gpu.TIME] = [1.0, 10.0, 100.0]
    kept["result"]["tiny"]["forward"][gpu.OURS][gpu.TIME] = [1.0, 2.0, 3.0]
    rotating["forward"][gpu.LIGER] = copied(rotating["forward"][gpu.COPY]) | {gpu.AGAINST: [1, 1.125, 2]}
    lines = gpu.table(kept).splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {gpu.OURS} |"))
    assert row.startswith(f"| rope_jax | {kept['result']['bytes'] / 10 / 1e3:.0f} | 0.97 | 10 (2) |")
    (row,) = (line for line in lines if line.startswith(f"| {gpu.LIGER} |"))
    assert row.endswith("| - | - | - |")
    (bar,) = (line for line in lines if line.startswith("- Bar: 0.90"))
    met, missed = bar.split("; not by ")
    assert met.count("(forward)") == missed.count("(backward)") == 4 and "(backward)" not in met
    assert any(line.endswith("It is 1.12 forward.") for line in lines)
    assert lines[-1].startswith("- Not timed: ") and "flash-attn (not installed: " in lines[-1]
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1


def test_the_picture_shows_each_form_that_was_timed(kept, tmp_path):
    figure = gpu.draw(kept)
    figure.savefig(tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    for axes, direction in zip(figure.axes, gpu.DIRECTIONS, strict=True):
        rows = kept["result"]["rotating"][direction]
        want = [row[gpu.SHARE][1] for row in rows.values() if gpu.SHARE in row]
        assert [bar.get_width() for bar in axes.patches] == want
        assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > max(want)


def test_without_a_gpu_it_says_so(tmp_path):
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "not measured: no GPU; the backend found is cpu" in ran.stdout.splitlines()[-2:]
    (result,) = (tmp_path / "benchmarks/results").iterdir()  # and no picture
    kept = json.loads(result.read_text())
    assert kept["result"] == {"not measured": "no GPU; the backend found is cpu"}
    assert gpu.table(kept) == (
        "Rotation on a GPU is not measured: no GPU; the backend found is cpu. "
        "`python -m benchmarks.gpu` measures it where there is one."
    )


def test_with_a_gpu_it_measures(monkeypatch):
    card, published = types.SimpleNamespace(platform="gpu"), []
    monkeypatch.setattr(gpu, "measure", lambda device: {"measured on": device})
    monkeypatch.setattr(gpu, "publish", lambda *args, **options: published.append((args, options)))
    gpu.main(card)
    ((script, result, table, draw), options) = published[0]
    assert script == gpu.__file__ and result == {"measured on": card} and (table, draw) == (gpu.table, gpu.draw)
    assert "liger-kernel" in options["packages"]


def test_what_is_kept_can_be_shown():
    kept = json.loads((BENCHMARKS / "results/gpu.json").read_text())
    assert "benchmarks.gpu" in kept["command"] and gpu.table(kept)
    assert (BENCHMARKS / "results/gpu.png").exists() == ("not measured" not in kept["result"])


# ------------------------------------------------------------------------------------------- where torch is installed


def stand_ins(torch):
    """The kernels need a card: in their places, what their documentation says they do, with the axes it says."""

    def turn(x, cos, sin):  # of the last axis; cos and sin broadcast, [..., R/2]
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = cos.float(), sin.float()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        (batch, _, length, dim) = q.shape
        assert k.shape[::2] == (batch, length) and cos.shape == sin.shape == (1, length, dim)
        assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()
        cos, sin = (part[:, None, :, : dim // 2] for part in (cos, sin))
        return turn(q, cos, sin), turn(k, cos, sin)

    def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False):
        assert cos.shape == sin.shape == (x.shape[1], x.shape[3] // 2) and cos.dtype == x.dtype
        return turn(x, cos[:, None], sin[:, None])

    def apply_rotary_pos_emb(t, freqs, tensor_format="sbhd", interleaved=False, fused=False):
        assert fused and tensor_format == "bshd" and freqs.shape == (t.shape[1], 1, 1, t.shape[3])
        freqs = freqs.transpose(0, 1)[..., : t.shape[3] // 2]
        return turn(t, freqs.cos(), freqs.sin())

    return {
        "liger_kernel.transformers.rope": liger_rotary_pos_emb,
        "flash_attn.layers.rotary": apply_rotary_emb,
        "transformer_engine.pytorch.attention.rope": apply_rotary_pos_emb,
    }


def test_every_peer_agrees_and_is_timed(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers.models.llama.modeling_llama")  # before it could meet the stand-ins
    for where, function in stand_ins(torch).items():
        parts = where.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[where], function.__name__, function)
    # What is compiled is not ours to test, and takes a C++ compiler here.
    monkeypatch.setattr(torch, "compile", lambda turn, **_: turn)
    result = gpu.measure(jax.devices("cpu")[0], SIZES, rounds=2, repeats=2, layer_repeats=1)
    for direction in gpu.DIRECTIONS:
        for name in gpu.PEERS:
            row = result["rotating"][direction][name]
            assert row[gpu.TIME][0] > 0, row
            assert 0.5 < row["worst error, roundings"] < 3
    lines = gpu.table({"command": "", "result": result}).splitlines()
    assert lines[-1] == "- Not timed: none." and not any("not measured" in line for line in lines)


def test_a_torch_that_finds_no_gpu_is_recorded(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    card = types.SimpleNamespace(platform="gpu")
    assert gpu.torch_forms(card, None, None, "forward") == dict.fromkeys(gpu.PEERS, "this torch finds no GPU")


def test_an_installation_that_is_broken_is_recorded(monkeypatch):
    pytest.importorskip("torch")

    def broken(where):
        raise OSError(f"{where} needs a driver")

    monkeypatch.setattr(gpu.pkgutil, "resolve_name", broken)
    _, rotation = arrays_of_two()
    forms = gpu.torch_forms(
        jax.devices("cpu")[0], jax.tree.map(np.array, rotation), np.zeros((8, 8), np.float32), "forward"
    )
    assert (
        forms[gpu.LIGER] == "cannot be imported: liger_kernel.transformers.rope:liger_rotary_pos_emb needs a driver"
    )


HLO = """HloModule jit_f

%fused (p: bf16[8,64]) -> bf16[8,64] {
  ROOT %inside = bf16[8,64]{1,0} negate(%p)
}

ENTRY %main (x: bf16[8,64], cos: f32[8,32]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %cos = f32[8,32]{1,0} parameter(1)
  %view = bf16[512]{0} bitcast(%x)
  %first = bf16[8,64]{1,0} fusion(%x, %cos), kind=kLoop, calls=%fused
  ROOT %second = bf16[8,64]{1,0} fusion(%first, %first), kind=kLoop, calls=%fused
}
"""
PTX = """
  ld.param.b64 %rd1, [f_param_0];
  ld.global.nc.v4.b16 {%rs1, %rs2, %rs3, %rs4}, [%rd1];
  ld.global.nc.L1::evict_last.b32 %r1, [%rd2];
  ld.global.b16 %rs5, [%rd1+8];
  ld.global.b16 %rs6, [%rd1+10];
  st.global.v2.b32 [%rd3], {%r1, %r2};
"""


def test_kernels_bytes_and_widths_are_read_from_the_compiled_program():
    assert gpu_compiler.kernel_bytes(HLO) == [1024 + 1024 + 1024, 1024 + 1024]
    assert gpu_compiler.accesses(PTX, "ld") == {"L1::evict_last.b32": 1, "b16": 2, "v4.b16": 1}
    assert gpu_compiler.accesses(PTX, "st") == {"v2.b32": 1}


def test_every_layout_width_and_dtype_is_compiled_in_every_direction():
    cases = [tuple(case.values()) for case, *_ in gpu_compiler.programs()]
    assert len(set(cases)) == len(cases) == 5 * 2 * 3 + 2
    for case, program, shapes, least in gpu_compiler.programs():
        results = jax.tree.leaves(jax.eval_shape(program, *shapes))
        assert [x.shape for x in results] == [x.shape for x in shapes[: len(results)]], case
        assert least == sum(x.size * x.dtype.itemsize for x in (*shapes, *results)), case


def test_figures_of_before_are_kept_where_nothing_compiles(monkeypatch, tmp_path, capsys):
    target = tmp_path / "gpu.json"
    target.write_text(json.dumps({"result": {}}))
    monkeypatch.setattr(gpu_compiler, "WHEELS", ("no-such-wheel",))
    gpu.add_compiled(target, {"compiled": {"date": "then"}})
    assert capsys.readouterr().out == "not compiled: no-such-wheel not installed\n"
    assert json.loads(target.read_text()) == {"result": {}, "compiled": {"date": "then"}}


def test_new_figures_stand_beside_the_result_and_are_no_times(monkeypatch, tmp_path, capsys):
    figures = {"kernels": 1, "bytes": 20, "loads": {"b16": 2}, "stores": {}, "over the least": 1.0}
    program = {"layout": "half", "rotated": "8 of 8", "dtype": "float32", "program": "forward", **figures}
    monkeypatch.setattr(gpu_compiler, "measure", lambda: [program])
    target = tmp_path / "gpu.json"
    target.write_text(json.dumps({"result": {"some": 1}}))
    gpu.add_compiled(target, {})
    assert "| half | 8 of 8 | float32 | forward | 1 | 1.000 | 2 b16 |  |" in capsys.readouterr().out
    kept = json.loads(target.read_text())
    assert kept["result"] == {"some": 1} and kept["compiled"]["programs"] == [program]
    assert kept["compiled"]["packages"].keys() == {"jax", *gpu_compiler.WHEELS}


def test_the_committed_figures_have_no_narrow_access_of_whole_heads_forward():
    programs = json.loads((BENCHMARKS / "results/gpu.json").read_text())["compiled"]["programs"]
    for each in programs:
        whole = each["rotated"] in ("128 of 128", "64 of 64")
        if whole and each["program"] in ("forward", "between"):
            assert all(width.startswith("v") for width in (*each["loads"], *each["stores"])), each
