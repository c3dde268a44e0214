"""The text side of a model folder: tokenizer, stop tokens, chat template."""

import json

import pytest
import tokenizers

from rope_jax.interop.text import read_text


def write(folder, **files):
    for name, value in files.items():
        name, _, ending = name.rpartition("_")
        (folder / f"{name}.{ending}").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def stop_tokens(folder, config=None, vocab_size=100):
    return read_text(folder, config or {}, vocab_size).stop_tokens


def test_a_folder_without_text(tmp_path):
    assert read_text(tmp_path, {}, 100) == (None, (), None)


def test_the_tokenizer(tmp_path):
    model = tokenizers.models.WordLevel({"?": 0, "one": 1, "two": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_text(tmp_path, {}, 3).tokenizer.encode("two one").ids == [2, 1]
    write(tmp_path, tokenizer_json="{}")
    with pytest.raises(ValueError, match="tokenizer.json must be a file of the package tokenizers"):
        read_text(tmp_path, {}, 3)


def test_stop_tokens(tmp_path):
    assert stop_tokens(tmp_path, {"eos_token_id": 7}) == (7,)
    assert stop_tokens(tmp_path, {"eos_token_id": [9, 7, 9]}) == (7, 9)
    # The model never writes a token beyond its vocabulary.
    assert stop_tokens(tmp_path, {"eos_token_id": [7, 100]}) == (7,)
    write(tmp_path, generation_config_json={"eos_token_id": [3, 4]})
    assert stop_tokens(tmp_path, {"eos_token_id": 7}) == (3, 4)
    write(tmp_path, generation_config_json={"eos_token_id": None})
    assert stop_tokens(tmp_path, {"eos_token_id": 7}) == (7,)
    # Token 0 stops as any other does.
    assert stop_tokens(tmp_path, {"eos_token_id": 0}) == (0,)
    for wrong in ("</s>", [1, "2"], True, -1, 2.0, {}):
        with pytest.raises(ValueError, match="config.json: eos_token_id must be a token or a list of tokens, got"):
            stop_tokens(tmp_path, {"eos_token_id": wrong})
    write(tmp_path, generation_config_json={"eos_token_id": "x"})
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id must be"):
        stop_tokens(tmp_path, {"eos_token_id": 7})


def test_the_chat_template(tmp_path):
    template = lambda: read_text(tmp_path, {}, 100).chat_template
    write(tmp_path, tokenizer_config_json={"chat_template": "{{ one }}"})
    assert template() == "{{ one }}"
    named = [{"name": "tools", "template": "{{ two }}"}, {"name": "default", "template": "{{ three }}"}]
    write(tmp_path, tokenizer_config_json={"chat_template": named})
    assert template() == "{{ three }}"
    write(tmp_path, tokenizer_config_json={"chat_template": 5})
    with pytest.raises(ValueError, match="tokenizer_config.json: chat_template must be text, got int"):
        template()
    write(tmp_path, chat_template_jinja="{{ four }}")
    assert template() == "{{ four }}"
