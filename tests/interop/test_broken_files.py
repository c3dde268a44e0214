"""Broken files of other kinds than a cut: one clear line at once, however long or odd the value in the file."""

import json
import sys
import time

import numpy as np
import pytest
from gguf_files import tensors_of, write
from test_checkpoint import LLAMA, PARAMS, save
from test_checkpoint import tensors_of as tensors_of_folder
from test_gguf_checkpoint import METADATA, decoder, random_params
from test_gguf_tokenizer import BYTE_LEVEL

import rope_jax
from rope_jax.interop import from_gguf, load_gguf

VOCABULARY = len(BYTE_LEVEL["tokenizer.ggml.tokens"])
TENSORS = tensors_of(random_params(decoder(tie_embeddings=True).clone(vocab_size=VOCABULARY)))
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", *(f"t{i}" for i in range(VOCABULARY - 1))],
    "tokenizer.ggml.token_type": [2] + [1] * (VOCABULARY - 1),
    "tokenizer.ggml.scores": [0.0] * VOCABULARY,
    "tokenizer.ggml.bos_token_id": 0,
}
DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
LONG = "x" * 100_000


def small(path, metadata=None, tensors=None):
    return write(
        path / "a.gguf", metadata=METADATA | BYTE_LEVEL | (metadata or {}), tensors=TENSORS | (tensors or {})
    )


def refused(call, *arguments, kind=ValueError, **options):
    """The message of the error, which comes at once, on one short line."""
    start = time.process_time()
    with pytest.raises(kind) as error:
        call(*arguments, **options)
    assert time.process_time() - start < 2
    message = str(error.value)
    assert len(message) < 1300 and message.isprintable()
    return message


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({".block_count": [4] * 100_000}, "block_count must be an integer of at least 1, got [4, 4"),
        ({".rope.freq_base": LONG}, "rope.freq_base must be a number, got 'xxx"),
        ({".rope.freq_base": 1e-30}, "inv_freq must be finite numbers below 2^64, got [1"),  # numpy breaks lines
        ({".rope.scaling.type": LONG}, "rope.scaling.type must be one of"),
        ({".nothing": [1] * 100_000}, "unknown key 'nothing' = [1, 1"),
        ({".nothing\n" + LONG: 1}, "unknown key 'nothing\\nxxx"),
        ({"tokenizer.ggml.model": LONG}, "tokenizer.ggml.model must be 'gpt2' or 'llama', got 'xxx"),
        ({"tokenizer.ggml.pre": LONG}, "got 'xxx"),
        ({"tokenizer.ggml.merges": [LONG]}, "tokenizer.ggml.merges must hold pairs, got 'xxx"),
        ({"tokenizer.ggml.merges": ["a\n b"]}, "Token `a ` out of vocabulary"),
        ({"tokenizer.ggml.eos_token_id": LONG}, f"must be a token below {VOCABULARY}, got 'xxx"),
        (
            SENTENCEPIECE | {"tokenizer.ggml.scores": [float("nan")] * VOCABULARY},
            "tokenizer.ggml.scores must be numbers, got nan",
        ),
        (
            SENTENCEPIECE | {"tokenizer.ggml.tokens": [*SENTENCEPIECE["tokenizer.ggml.tokens"][:-1], 30 * LONG]},
            "tokenizer.ggml.tokens must be of at most 1,024 letters, got one of 3,000,000",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_odd_values(tmp_path, metadata, message):
    assert message in refused(load_gguf, small(tmp_path, metadata))


def test_odd_names(tmp_path):
    for name in ("od\nd", LONG[:60_000]):
        tensors = {name: np.ones(3, np.float32)}
        message = refused(load_gguf, small(tmp_path, tensors=tensors))
        assert "tensors must be parameters of the model, got also" in message
        path = write(tmp_path / "b.gguf", name, METADATA, {})
        assert "architecture must be one of llama, " in refused(load_gguf, path)
        assert "is not in the table of from_gguf" in refused(from_gguf, path)


def test_a_sentencepiece_vocabulary_may_have_long_tokens(tmp_path):
    tokens = [*SENTENCEPIECE["tokenizer.ggml.tokens"][:-1], "▁" * 1024]
    loaded = load_gguf(small(tmp_path, SENTENCEPIECE | {"tokenizer.ggml.tokens": tokens}))
    assert loaded.tokenizer.id_to_token(VOCABULARY - 1) == "▁" * 1024


def test_deep_json(tmp_path):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        folder = save(tmp_path / name)
        (folder / name).write_text(DEEP)
        assert f"{name} must be JSON: maximum recursion depth" in refused(rope_jax.load_hf, folder)
    assert "config.json must be JSON" in refused(rope_jax.from_hf_config, tmp_path / "config.json")


def test_a_template_that_is_no_text(tmp_path):
    folder = save(tmp_path / "a")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert f"{folder / 'chat_template.jinja'} must be UTF-8: " in refused(rope_jax.load_hf, folder)


def test_a_model_type_that_is_no_name():
    for wrong in (float("nan"), 5, ["llama"]):
        message = refused(rope_jax.from_hf_config, LLAMA | {"model_type": wrong})
        assert message == f"config: model_type must be a name, got {wrong!r}"


def test_places_of_the_other_kind(tmp_path):
    folder, path = save(tmp_path / "folder"), small(tmp_path)
    assert "name its folder; load_gguf reads GGUF files" in refused(rope_jax.load_hf, path)
    assert refused(rope_jax.from_hf_config, path).endswith(f"got {path}: from_gguf reads GGUF files")
    assert refused(load_gguf, folder).endswith(f"got the folder {folder}: load_hf reads it")
    assert refused(load_gguf, tmp_path).endswith(f"got the folder {tmp_path}: name the file in it")
    text = json.dumps(LLAMA | {"_": LONG})  # of a config, where its path belongs
    assert "config must be a local file or folder" in refused(rope_jax.from_hf_config, text, kind=FileNotFoundError)
    assert "path must be a local GGUF file" in refused(load_gguf, text, kind=FileNotFoundError)
    assert "folder must be a local folder that holds config.json" in refused(rope_jax.load_hf, text)
    for wrong in (None, 3):
        message = f"folder must be a path, got {type(wrong).__name__}"
        assert refused(rope_jax.load_hf, wrong, kind=TypeError) == message


@pytest.mark.parametrize("wrong", ["junk", "int8", 7])
def test_dtypes_that_are_none(tmp_path, wrong):
    for load, place in ((rope_jax.load_hf, save(tmp_path / "folder")), (load_gguf, small(tmp_path))):
        assert refused(load, place, dtype=wrong, kind=TypeError) == f"dtype must be floating, got {wrong}"
        message = f"param_dtype must be float32, bfloat16 or float16, got {wrong}"
        assert refused(load, place, param_dtype=wrong, kind=TypeError) == message


def test_an_index_that_lies(tmp_path):
    folder = save(tmp_path / "a", shards=2)
    index = folder / "model.safetensors.index.json"
    honest = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(honest.items()))
    for lie, message in (
        ({name: LONG}, "must name files that are in the folder, got 'xxx"),
        ({"nothing": shard}, f"nothing is in no file, got {shard}"),
    ):
        index.write_text(json.dumps({"weight_map": honest | lie}))
        assert message in refused(rope_jax.load_hf, folder)
    index.write_text(json.dumps({"weight_map": {key: file for key, file in honest.items() if key != name}}))
    assert f"{name} is in {shard}, got no file" in refused(rope_jax.load_hf, folder)
    index.write_text(json.dumps({"weight_map": honest}))
    (folder / shard).unlink()
    assert f"must name files that are in the folder, got {shard!r}: download it" in refused(
        rope_jax.load_hf, folder
    )
    index.write_text(json.dumps({"weight_map": {}}))
    assert refused(rope_jax.load_hf, folder) == "tensors must include model.embed_tokens.weight, got none"


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "float64", "bool"])
def test_dtypes_that_no_parameter_has(tmp_path, dtype):
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        tensors = tensors_of_folder(PARAMS)
        folder = save(tmp_path / name, tensors=tensors | {name: tensors[name].astype(dtype)})
        message = refused(rope_jax.load_hf, folder)
        assert message.startswith(f"tensor {name} must be stored as F32, F16, BF16, got ")


def test_without_safetensors(tmp_path, monkeypatch):
    folder = save(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = refused(rope_jax.load_hf, folder, kind=ImportError)
    assert message == "model folders need the package safetensors: pip install 'rope_jax[checkpoints]'"
