"""configs/toy_lm.py, run as a user runs it, at a size that takes seconds."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import rope_jax
from configs import toy_lm

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs/toy_lm.py"
SMALL = [
    "--num-layers",
    "1",
    "--width",
    "16",
    "--num-heads",
    "4",
    "--num-kv-heads",
    "2",
    "--head-dim",
    "8",
    "--mlp-dim",
    "16",
    "--length",
    "16",
    "--batch",
    "4",
    "--warmup",
    "2",
    "--sample-bytes",
    "4",
    "--eval-every",
    "10",
    "--checkpoint-every",
    "4",
]


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture(scope="module")
def toy():
    return toy_lm


def command(*args):
    return [sys.executable, str(SCRIPT), *SMALL, *map(str, args)]


# A quick compilation serves: runs are compared with each other only.
QUICK = "--xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the script to its end. All runs share what they compile."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs"))}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def run(*args, devices=1):
        flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
        env = os.environ | cache | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        return subprocess.run(command(*args), capture_output=True, text=True, env=env)

    return run


def started(*args, **pipes):
    """The script, running. It compiles for itself, so that there is time to interrupt it."""
    flags = f"{QUICK} --xla_force_host_platform_device_count=1"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(command(*args), env=env, **pipes)


def losses(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(run, text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    done = run("--data", text, "--steps", 60, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.mark.full
def test_learns_and_leaves_its_files(uninterrupted):
    workdir, out = uninterrupted
    rows = losses(workdir)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert 7.5 < rows[0]["train"] < 8.5  # a byte, before anything was learned
    assert rows[-1]["held_out"] < 5 and "held_out" in rows[9]  # the text has 28 letters and repeats itself
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    sample = (workdir / "sample.txt").read_text()
    assert sample.startswith("def ") and sample in out
    assert f"{rows[-1]['held_out']:.3f} bits per byte held out" in out


@pytest.mark.full
def test_killed_and_started_again_it_reaches_the_same_loss(run, text, tmp_path, uninterrupted):
    args = ("--data", text, "--steps", 60, "--workdir", tmp_path)
    process = started(*args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 13) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it must be killed before it ends"
    again = run(*args)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == losses(uninterrupted[0])  # to the last bit
    assert (tmp_path / "sample.txt").read_text() == (uninterrupted[0] / "sample.txt").read_text()


@pytest.mark.full
def test_ctrl_c_saves_and_the_run_goes_on(run, text, tmp_path, uninterrupted):
    args = ("--data", text, "--steps", 60, "--workdir", tmp_path, "--checkpoint-every", 1000)
    process = started(*args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT and "saved; run again to resume" in err
    stopped = len(losses(tmp_path))
    assert 1 <= stopped < 60
    again = run(*args)
    assert again.returncode == 0 and f"step {stopped}\n" in again.stdout
    assert losses(tmp_path) == losses(uninterrupted[0])


@pytest.mark.full
def test_eight_devices_on_a_mesh_give_the_same_losses(run, text, tmp_path, uninterrupted):
    done = run("--data", text, "--steps", 60, "--workdir", tmp_path, "--mesh", "data=2,model=4", devices=8)
    assert done.returncode == 0, done.stderr
    mine, theirs = ([row["train"] for row in losses(path)] for path in (tmp_path, uninterrupted[0]))
    np.testing.assert_allclose(mine[:5], theirs[:5], rtol=1e-4)  # sums in another order, then sixty steps of it
    np.testing.assert_allclose(mine, theirs, rtol=2e-2)


@pytest.mark.full
def test_the_mesh_really_shards():
    code = (
        "import jax\n"
        "from configs import toy_lm as toy\n"
        "config = toy.Config(mesh='data=2,model=4')\n"
        "state = toy.initial_state(toy.build_model(config), toy.build_optimizer(config), toy.build_mesh(config), config)\n"
        "layers = state['params']['params']['layers']\n"
        "print(layers['self_attention']['query']['kernel'].sharding.spec, layers['down']['kernel'].sharding.spec,\n"
        "      layers['self_attention']['key']['kernel'].sharding.spec)\n"
        "moments = [x for x in jax.tree.leaves(state['optimizer']) if x.shape == layers['down']['kernel'].shape]\n"
        "print(len(moments), *{str(x.sharding.spec) for x in moments})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=8"},
    )
    assert done.returncode == 0, done.stderr
    params, moments = done.stdout.replace("PartitionSpec", "P").splitlines()
    assert params == "P(None, None, 'model', None) P(None, 'model', None) P(None, None, None, None)"
    assert moments == "2 P(None, 'model', None)"


@pytest.mark.parametrize(
    "flags",
    [
        "--base 500000 --layout interleaved",
        *(
            pytest.param(flags, marks=pytest.mark.full)
            for flags in (
                "--schedule yarn factor=4 original_length=8",
                "--schedule dynamicntk factor=2 original_length=8 context_length=16",
                "--encoding sinusoidal",
                "--encoding learned --sample-bytes 100",
                "--encoding t5",
                "--encoding alibi",
                "--encoding none",
                "--schedule longrope short_factor=[1,1,1,1] long_factor=[1,2,3,4] original_length=8 factor=2 context_length=16",
            )
        ),
    ],
)
def test_command_line(toy, text, tmp_path, flags, capsys):
    import tyro

    args = [*SMALL, "--data", str(text), "--steps", "2", "--workdir", str(tmp_path), *flags.split()]
    toy.main(tyro.cli(toy.Config, args=args))
    assert "bits per byte held out" in capsys.readouterr().out


@pytest.mark.full
def test_a_table_learns_at_its_own_rate_and_nothing_else_does(toy):
    def steps(encoding):
        """What two steps change, at each rate of the table, from one start."""
        config = toy.Config(encoding=encoding, num_layers=1, width=16, length=16, batch=4, warmup=1)
        model, tokens = toy.build_model(config), jax.random.randint(jax.random.key(0), (4, 17), 0, 256)
        start = toy.initial_state(model, toy.build_optimizer(config), toy.build_mesh(config), config)
        before = jax.tree.map(np.asarray, start["params"])
        for rate in (10.0, 1.0):
            state = jax.tree.map(jax.numpy.copy, start)
            optimizer = toy.build_optimizer(dataclasses.replace(config, table_rate=rate))
            for _ in range(2):  # in the first the rate is 0
                state, _ = toy.train_step(state, tokens, model=model, optimizer=optimizer)
            yield jax.tree.map(lambda new, old: np.asarray(new) - old, state["params"], before)

    for encoding in ("t5", "learned", "alibi"):
        fast, slow = map(jax.tree_util.tree_leaves_with_path, steps(encoding))
        tables = 0
        for (path, a), (_, b) in zip(fast, slow, strict=True):
            is_table = "'table'" in jax.tree_util.keystr(path)
            tables += is_table
            np.testing.assert_allclose(a, b * (10 if is_table else 1), rtol=1e-3, atol=1e-7)
            assert np.abs(b).max() > 0
        assert tables == (encoding != "alibi")


def test_each_encoding_has_its_place_in_the_decoder(toy):
    def model(encoding):
        return toy.build_model(toy.Config(encoding=encoding, width=64))

    rope = rope_jax.Rope(32, rope_jax.Standard())
    plain = model("rope").clone(rope=None)
    assert model("rope").rope == rope and model("none") == plain
    assert model("sinusoidal") == plain.clone(position_embedding=rope_jax.models.Sinusoidal(), embedding_scale=8.0)
    assert model("learned") == plain.clone(position_embedding=rope_jax.models.LearnedPositions(num_positions=128))
    assert model("t5") == plain.clone(position_bias=rope_jax.attention.T5Bias())
    assert model("alibi") == plain.clone(position_bias=rope_jax.attention.ALiBi())


@pytest.mark.full
def test_a_learned_table_writes_no_further_than_it_reaches(toy, text, tmp_path, monkeypatch):
    import tyro

    asked, generate = [], rope_jax.generate
    monkeypatch.setattr(
        rope_jax, "generate", lambda *a, **kw: asked.append(kw["max_new_tokens"]) or generate(*a, **kw)
    )
    args = [*SMALL, "--data", str(text), "--steps", "1", "--workdir", str(tmp_path), "--encoding", "learned"]
    toy.main(tyro.cli(toy.Config, args=[*args, "--sample-bytes", "100"]))
    assert asked == [12]  # after "def ", in the 16 positions of the table


def refused(toy, capsys, *args):
    import tyro

    with pytest.raises(SystemExit) as error:
        toy.main(tyro.cli(toy.Config, args=[*SMALL, *map(str, args)]))
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2
    assert message.startswith("toy_lm: ") and len(message.splitlines()) == 1, message
    return message


class TestBadInput:
    def test_of_every_kind(self, toy, text, tmp_path, capsys):
        empty = tmp_path / "empty"
        empty.mkdir()
        blank = tmp_path / "blank.txt"
        blank.write_text("")
        tiny = tmp_path / "tiny.txt"
        tiny.write_text("short")
        workdir = tmp_path / "work"
        for args, says in (
            (("--data", tmp_path / "missing"), "--data must be a file or a folder, got"),
            (("--data", empty), "needs 17 bytes of training text, got 0 in 0 file(s)"),
            (("--data", blank), "needs 17 bytes of training text, got 0"),
            (("--data", tiny), "--length 16 needs 17 bytes of training text, got 4"),
            (("--data", text, "--length", 400), "--length 400 needs 401 bytes of held-out text, got 270"),
            (("--schedule", "yarm"), "--schedule must be one of standard, linear"),
            (("--schedule", "yarn", "factor=4"), "original_length"),
            (("--schedule", "yarn", "factor"), "expected name=value pairs"),
            (("--schedule", "linear", "factor=0.5"), "Linear: factor must be at least 1"),
            (("--head-dim", 7), "rotary_dim must be even"),
            (("--num-kv-heads", 3), "num_kv_heads must divide num_heads=4, got 3"),
            (("--mesh", "data=64"), "--mesh data=64 needs 64 devices, got 1"),
            (("--mesh", "rows=2"), "--mesh axes must be data and model"),
            (("--mesh", "2x4"), "--mesh must look like data=2,model=4, got 2x4"),
            (("--steps", 0), "--steps must be positive, got 0"),
            (("--temperature", -1), "--temperature must be 0 or more, got -1.0"),
            (("--learning-rate", -1), "--learning-rate must be positive, got -1.0"),
            (("--encoding", "t5", "--base", 5), "--base belongs to --encoding rope, got --encoding t5"),
            (("--encoding", "none", "--layout", "interleaved"), "--layout belongs to --encoding rope"),
            (("--encoding", "alibi", "--schedule", "ntkaware", "factor=2"), "--schedule belongs to"),
            (("--prompt", "\udcff"), "--prompt must be text"),
            (("--seed", 10**20), "too large"),
            (("--encoding", "learned", "--prompt", 16 * "a"), "--prompt must be shorter than the 16 positions"),
            (("--prompt", ""), "--prompt must be positive, got ''"),
        ):
            if "--data" not in args:
                args = ("--data", text, *args)
            assert says in refused(toy, capsys, "--steps", 2, "--workdir", workdir, *args)
            assert not workdir.exists()
        assert "--workdir" in refused(toy, capsys, "--data", text, "--steps", 2, "--workdir", tiny)
        assert tiny.read_text() == "short"

    @pytest.mark.full
    def test_a_checkpoint_of_another_run_is_not_touched(self, toy, text, tmp_path, capsys):
        import tyro

        args = ["--data", str(text), "--steps", "4", "--workdir", str(tmp_path / "w")]
        toy.main(tyro.cli(toy.Config, args=[*SMALL, *args]))
        before = {path: path.read_bytes() for path in sorted((tmp_path / "w").rglob("*")) if path.is_file()}
        capsys.readouterr()
        says = refused(toy, capsys, *args, "--base", 5.0)
        assert "holds a different run: base 10000.0 there, 5.0 here. Choose another --workdir" in says
        other = tmp_path / "other.txt"
        other.write_text(text.read_text().replace("fox", "cat"))
        assert "corpus" in refused(toy, capsys, *args, "--data", other)
        after = {path: path.read_bytes() for path in sorted((tmp_path / "w").rglob("*")) if path.is_file()}
        assert before == after

        metrics = tmp_path / "w" / "metrics.jsonl"
        kept = metrics.read_text()
        metrics.write_text('{"loss": 3}')
        assert "must hold one JSON object with a step per line" in refused(toy, capsys, *args)
        metrics.write_text(kept)
        for path in (tmp_path / "w" / "checkpoints").rglob("*"):
            if path.is_file():
                path.write_bytes(b"junk")
        assert "cannot be read" in refused(toy, capsys, *args)
        alien = tmp_path / "alien" / "config.json"
        alien.parent.mkdir()
        alien.write_text('{"model_type": "llama"}')
        assert "holds a different run: model_type llama there" in refused(
            toy, capsys, *args, "--workdir", alien.parent
        )
        assert alien.read_text() == '{"model_type": "llama"}'
        (tmp_path / "w" / "config.json").write_text("{")
        assert "config.json must describe the run in its folder" in refused(toy, capsys, *args)
