"""examples/export.py and examples/run_exported.py: a decoder out of the process, and its tokens in one without rope_jax."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import TOLERANCE, V, build, init
from jax import export as jax_export

import rope_jax
from examples import export, run_exported

ROOT = Path(__file__).parents[2]
MODEL = build()
PARAMS = init(MODEL)
PLATFORMS = ["cpu", "cuda", "tpu"]
# Several sizes for one pair of files, and rows of unlike length.
PROMPTS = [[[5]], [[1, 2, 3, 4, 5], [7], [3, 3, 9]], [[11, 0], [4, 4, 4, 4, 4, 4, 4, 4, 4]]]
NEW = 16

# rope_jax and flax cannot be imported here; what is asked for comes as JSON and goes as npz.
ELSEWHERE = """
import json, sys
sys.modules["rope_jax"] = sys.modules["flax"] = None
import numpy, pathlib
from examples import run_exported
model = run_exported.load(pathlib.Path(sys.argv[1]))
written = [run_exported.greedy(model, prompts, int(sys.argv[2])) for prompts in json.load(sys.stdin)]
assert sys.modules["rope_jax"] is sys.modules["flax"] is None
assert not [name for name in sys.modules if name.startswith(("rope_jax.", "flax."))]
numpy.savez(sys.argv[3], *[array for pair in written for array in pair])
"""


def elsewhere(folder, target, batches, new=NEW):
    """Tokens and logits of each batch of prompts, from a process that has the folder and no rope_jax."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, folder, str(new), target]
    subprocess.run(command, input=json.dumps(batches), text=True, check=True, cwd=ROOT, env=environment)
    with np.load(target) as arrays:
        flat = [arrays[f"arr_{i}"] for i in range(2 * len(batches))]
    return list(zip(flat[::2], flat[1::2], strict=True))


@pytest.fixture(scope="module")
def exporting():
    return export


@pytest.fixture(scope="module")
def running():
    return run_exported


@pytest.fixture(scope="module")
def folder(exporting, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported")
    exporting.write(path, MODEL, PARAMS, "b, t, s", PLATFORMS)
    return path


def padded(prompts):
    width = max(map(len, prompts))
    tokens = jnp.array([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    return tokens, jnp.array([[i < len(prompt) for i in range(width)] for prompt in prompts])


def generated(model, params, prompts, new=NEW):
    tokens, mask = padded(prompts)
    return rope_jax.generate(model, params, tokens, mask=mask, max_new_tokens=new, temperature=0).tokens


def plain_logits(prompts, written):
    """By the plain forward pass over all that was written: the logits that each token was chosen by."""
    tokens, _ = padded([prompt + row[:-1] for prompt, row in zip(prompts, written.tolist(), strict=True)])
    logits = jax.jit(MODEL.apply)(PARAMS, tokens)
    first = np.array([[len(prompt) - 1] for prompt in prompts])
    return np.take_along_axis(np.asarray(logits), (first + np.arange(NEW))[..., None], axis=1)


def test_a_process_without_rope_jax_writes_the_same_tokens(folder, tmp_path):
    for prompts, (written, logits) in zip(PROMPTS, elsewhere(folder, tmp_path / "out.npz", PROMPTS), strict=True):
        np.testing.assert_array_equal(written, generated(MODEL, PARAMS, prompts))
        want = plain_logits(prompts, written)
        print("worst difference from the plain forward pass:", np.abs(logits - want).max())
        np.testing.assert_allclose(logits, want, atol=TOLERANCE, rtol=0)


# XLA of jax 0.10.0 fuses the operations of an exported program in another way: a rounding or two.
assert_same = np.testing.assert_array_equal
if jax.__version_info__ < (0, 10, 2):
    assert_same = functools.partial(np.testing.assert_allclose, rtol=2**-21, atol=2**-21)


def test_logits_and_cache_are_those_of_the_model_bit_for_bit(folder, running):
    """XLA compiles the same operations for the same sizes, whether it was told them before or after the export."""
    model = running.load(folder)
    forward = jax.jit(MODEL.apply)
    for prompts in PROMPTS:
        tokens, mask = padded(prompts)
        sizes = {"b": len(prompts), "s": 24}
        zeros = {name: running.zeros(said, sizes) for name, said in model.cache.items()}
        got = model.prefill(model.params, zeros, tokens, mask)
        cache = MODEL.init_cache(batch=len(prompts), capacity=24)
        logits, cache = forward(PARAMS, tokens, mask=mask, cache=cache)
        last = jnp.sum(mask, axis=1) - 1
        assert_same(got["logits"], logits[jnp.arange(len(prompts)), last])
        for _ in range(2):
            for name, array in got["cache"].items():
                assert_same(array, getattr(cache, name))
            got = model.decode(model.params, got["cache"], last)
            logits, cache = forward(PARAMS, last[:, None], cache=cache)
            assert_same(got["logits"], logits[:, 0])


def test_a_row_that_outgrows_a_capacity_only_known_at_run_time_is_nan(folder, running):
    model = running.load(folder)
    cache = {name: running.zeros(said, {"b": 2, "s": 4}) for name, said in model.cache.items()}
    tokens, mask = padded([[1, 2, 3, 4, 5], [7, 8]])
    after = model.prefill(model.params, cache, tokens, mask)
    for nan in (False, False, False, True):  # the second row has room for two more
        assert np.isnan(after["logits"]).all(axis=1).tolist() == [True, nan]
        assert np.isnan(after["logits"]).any(axis=1).tolist() == [True, nan]
        after = model.decode(model.params, after["cache"], jnp.array([1, 1], jnp.int32))
    written, _ = running.greedy(model, [[1, V], [2, 3]], 3)
    assert (
        written[0].tolist() == [-1, -1, -1]
        and written[1].tolist() == generated(MODEL, PARAMS, [[2, 3]], 3)[0].tolist()
    )


def test_the_json_says_what_goes_in_and_comes_out(folder):
    about = json.loads((folder / "about.json").read_text())
    assert about["platforms"] == PLATFORMS and about["sizes"] == ["b", "t", "s"]
    for name in ("prefill", "decode"):
        said = about["functions"][name]
        exported = jax_export.deserialize(bytearray((folder / said["file"]).read_bytes()))
        assert exported.platforms == tuple(PLATFORMS)
        arguments, _ = jax.tree.unflatten(exported.in_tree, [str(aval) for aval in exported.in_avals])
        assert list(arguments) == list(said["arguments"].values())
        assert jax.tree.unflatten(exported.out_tree, [str(aval) for aval in exported.out_avals]) == said["results"]
    arguments = about["functions"]["prefill"]["arguments"]
    assert list(arguments) == ["params", "cache", "tokens", "mask"]
    assert arguments["cache"]["key"] == "float32[2,b,2,s,8]" and arguments["mask"] == "bool[b,t]"


def test_fixed_sizes_and_bfloat16(exporting, running, tmp_path):
    """Fewer and shorter prompts than it was made for: padding fills the rest."""
    model = build(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    exporting.write(tmp_path, model, params, "3, 8, 24", PLATFORMS)
    loaded = running.load(tmp_path)
    for name, leaf in exporting.named(params).items():
        np.testing.assert_array_equal(loaded.params[name], leaf)
        assert loaded.params[name].dtype == leaf.dtype
    prompts = [[1, 2, 3, 4, 5], [7]]
    written, _ = running.greedy(loaded, prompts, NEW)
    # The same sizes here, so that bfloat16 rounds the same sums.
    tokens, mask = padded([*prompts, [0] * 8])
    want = rope_jax.generate(model, params, tokens, mask=mask, max_new_tokens=NEW, temperature=0).tokens[:2]
    np.testing.assert_array_equal(written, want)
    for prompts, new, says in (
        ([[1]] * 4, 1, "the model was exported for at most 3 prompts, got 4"),
        ([[1] * 9], 1, "the model was exported for at most 8 tokens a prompt, got 9"),
        ([[1] * 8], 17, "the model was exported for at most 24 tokens in the cache, got 25"),
        ([[1]], 0, "max_new_tokens must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=says):
            running.greedy(loaded, prompts, new)


@pytest.mark.parametrize(("sizes", "kernels"), [("2, 128, 144", 1), ("b, t, s", 0)])
def test_a_tpu_has_its_kernel_where_sizes_are_fixed(exporting, running, tmp_path, sizes, kernels):
    """It is lowered here, without a TPU, and the same file runs on this processor. No decode step has the kernel."""
    rope = rope_jax.Rope(128, rope_jax.Standard())
    model = build(num_heads=2, num_kv_heads=1, head_dim=128, rope=rope)
    params = init(model)
    exporting.write(tmp_path, model, params, sizes, PLATFORMS)
    for name, count in (("prefill", kernels), ("decode", 0)):
        program = jax_export.deserialize(bytearray((tmp_path / f"{name}.bin").read_bytes())).mlir_module()
        assert program.count("stablehlo.custom_call @tpu_custom_call") == count
    prompts = [[3] * 128, [1, 2]]
    written, _ = running.greedy(running.load(tmp_path), prompts, NEW)
    np.testing.assert_array_equal(written, generated(model, params, prompts))


def said_by(module, capsys, *args):
    """Exit status, and what it printed."""
    import tyro

    status = 0
    try:
        if module is export:
            module.main(tyro.cli(module.Config, args=list(map(str, args))))
        else:
            sys.argv[1:] = map(str, args)
            module.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_as_a_user_runs_them(exporting, running, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_exported"])
    status, out, _ = said_by(exporting, capsys, "--out", tmp_path)
    promised = out.split("rope_jax writes ")[1].splitlines()[0]
    assert status == 0 and len(promised.split()) == 16 and "about.json" in out
    args = out.split("run_exported.py ")[1].split()
    assert said_by(running, capsys, *args) == (0, promised + "\n", "")
    status, out, err = said_by(running, capsys, tmp_path, "--prompt", 10**12)
    assert (status, out) == (2, "") and "10" in err.splitlines()[-1]
    status, out, err = said_by(running, capsys, tmp_path / "none", "--prompt", 1)
    assert (status, out) == (2, "") and "about.json" in err.splitlines()[-1]


def test_refusals(exporting, tmp_path, capsys):
    for args, says in (
        (("--sizes", "b, t"), "--sizes must be three different letters or numbers, such as 'b, t, s', got 'b, t'"),
        (("--sizes", "b, b, s"), "--sizes must be three different letters or numbers"),
        (("--sizes", "b, 0, s"), "--sizes must be three different letters or numbers"),
        (("--sizes", "b, 2*t, s"), "--sizes must be three different letters or numbers"),
        (("--context-length", 9), "context_length must be left out: Standard does not depend on it"),
        ((tmp_path / "none",), "config.json"),
    ):
        status, out, err = said_by(exporting, capsys, *args, "--out", tmp_path / "out")
        assert status == 2 and not out and says in err and len(err.splitlines()) == 1
        assert not (tmp_path / "out").exists()
