"""benchmarks/real_models.py with a folder that takes seconds: what it checks, keeps, says and draws."""

import importlib
import json

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = dict(num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24)


@pytest.fixture(scope="module")
def real_models():
    return importlib.import_module("benchmarks.real_models")  # here, since it imports torch if torch is installed


@pytest.fixture(scope="module")
def folder(real_models, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    real_models.llama.write_folder(path, TINY)
    return path


def test_without_torch_and_llama_cpp(real_models, folder, monkeypatch):
    monkeypatch.setattr(real_models.llama, "torch", None)
    monkeypatch.setattr(real_models, "peaks", lambda path, dtype, names: dict.fromkeys(names, 7))
    jobs = (real_models.Job(1, 8, 3, 3), real_models.Job(2, 8, 3, 3), real_models.Job(1, 12, 0, 3))
    result = real_models.measure(folder, jobs=jobs)
    names = ["decoded token, rows: 1", "decoded token, rows: 2", "prefill, tokens: 12"]
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        each = result["dtypes"][dtype]
        assert list(each["jobs"]) == names and each["peak"] == {"rope_jax": 7}
        assert each["weights"] == size * (256 * 16 + 16 + 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24 + 2 * 16))
        for name, row in each["jobs"].items():
            absent = "not measured: torch or transformers is not installed"
            assert row["milliseconds"]["transformers"] == row["milliseconds"]["torch.compile"] == absent
            assert "a GGUF file" in row["milliseconds"]["llama.cpp"] and row["ours over theirs"] == {}
            assert ("over the limit" in row) == name.startswith("decoded")
    kept = json.loads(json.dumps({"result": result}))
    lines = real_models.table(kept).splitlines()
    assert len(lines) == 2 + 6 and {line.count("|") for line in lines} == {10}
    (axes,) = real_models.draw(kept).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(real_models.jobs_of(kept))
    about = dict(command="c", device="d", processor="p", python="3", jax="j", date="d", packages={"torch": "1"})
    assert "| float32 | 0 | 7 | - | - | - |" in real_models.whole_table(about | kept)


def test_a_contender_that_differs_is_not_timed(real_models, folder, monkeypatch):
    monkeypatch.setattr(real_models.llama, "torch", None)
    ours = real_models.Ours(folder, "float32")
    job = real_models.Job(1, 8, 2, 3)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 10), np.int32)

    class Other:
        def __init__(self, error):
            self.error = error

        def decoding(self, tokens, prompt):
            call = ours.decoding(tokens, prompt)
            return lambda: [np.asarray(logits) + self.error for logits in call()]

    row = real_models.compare(ours, {"same": Other(0.0), "unlike": Other(9.0)}, job, tokens, allowed=1e-3)
    assert list(row["ours over theirs"]) == ["same"] and row["differences"]["unlike"] > 1e-3
    assert row["milliseconds"]["unlike"].startswith("not timed: it differs")
    assert row["limit"][1] > 0 and row["over the limit"][1] > 0


def test_memory_at_the_peak(real_models, folder):
    found = real_models.peaks(folder, "float32", [real_models.OURS])
    assert list(found) == ["rope_jax"] and 0 <= found["rope_jax"] < 4096
