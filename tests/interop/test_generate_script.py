"""examples/generate.py with broken files, hostile chat templates and unfinished characters."""

import json
import runpy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from gguf_files import tensors_of, write
from test_gguf_checkpoint import METADATA, decoder, random_params
from test_gguf_tokenizer import BYTE_LEVEL

import rope_jax

SCRIPT = Path(__file__).parents[2] / "examples/generate.py"
VOCABULARY = len(BYTE_LEVEL["tokenizer.ggml.tokens"])
TENSORS = tensors_of(random_params(decoder(tie_embeddings=True).clone(vocab_size=VOCABULARY)))
MESSAGES = [{"role": "user", "content": "<hé>"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "model.gguf", metadata=METADATA | BYTE_LEVEL, tensors=TENSORS)


@pytest.fixture(scope="module")
def checkpoint(path):
    return rope_jax.interop.load_gguf(path)


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


def render(script, checkpoint, template):
    return script["render"](script["Config"](), checkpoint._replace(chat_template=template), MESSAGES)


LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template, message",
    [
        (LOOP, "no end after 1 s"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth"),
        ("{{ 'a' * 2000000 }}", "more than 1,048,576 letters"),
        ("{% for i in range(90000) %}{{ 'a' * 100 }}{% endfor %}", "more than 1,048,576 letters"),
        ("{{ [1] * 10 ** 15 }}", "MemoryError"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ raise_exception('a' * 5000) }}", "a" * 300),
        ("{{ messages[0].nothing }}", "an empty text"),
        ("{{ ''|attr('__class__') }}", "an empty text"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "access to attribute '__class__'"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_hostile_templates(script, checkpoint, template, message):
    script["render"].__globals__["SECONDS"] = 1 if template == LOOP else 60
    start, tracer = time.process_time(), sys.gettrace()
    with pytest.raises(ValueError, match="the chat template of MODEL must render a user's message, got ") as error:
        render(script, checkpoint, template)
    assert message in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - start < 5 and sys.gettrace() is tracer


def test_json_in_a_template(script, checkpoint):
    """As transformers' filter: no escapes of HTML or Unicode."""
    assert render(script, checkpoint, "{{ messages[0].content | tojson }}") == '"<hé>"'
    assert render(script, checkpoint, "{{ messages[0].content | tojson(ensure_ascii=True) }}") == r'"<h\u00e9>"'
    assert render(script, checkpoint, "{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**32 - 1, 1.0, "x"])
def test_a_beginning_that_is_no_token(script, checkpoint, token):
    broken = checkpoint._replace(config={"tokenizer.ggml.bos_token_id": token})
    with pytest.raises(ValueError, match="MODEL must name the token that begins a text"):
        render(script, broken, "{{ bos_token }}")


def byte_fallback():
    words = ["?", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="?", byte_fallback=True)
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    return tokenizer, lambda data: [257 + b"ab".index(byte) if byte in b"ab" else 1 + byte for byte in data]


def byte_level():
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    # The alphabet of GPT-2: printable bytes are themselves, the others follow in order from 256.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letter = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return tokenizer, lambda data: [tokenizer.token_to_id(letter[byte]) for byte in data]


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", ["é", "東", "👩‍👧", "\ufffd"])
def test_a_stream_that_ends_inside_a_character(script, kind, text):
    tokenizer, tokens_of = kind()
    for length in range(1, len(text.encode()) + 1):
        data = text.encode()[:length]
        stream = script["TextStream"](tokenizer, tokens_of(b"a"))
        parts = [stream.push(token) for token in tokens_of(b"b" + data)]
        whole = data.decode(errors="ignore")
        assert "".join(parts) == "b" + whole.rstrip("\ufffd")
        # A byte-level decoder writes U+FFFD for the whole rest, the other one for each byte.
        count = len(data) - len(whole.encode())
        rest = "\ufffd" * (count if kind is byte_fallback else min(count, 1))
        assert stream.flush() == (whole if text == "\ufffd" else "") + rest
        if kind is byte_level:
            assert tokenizer.decode(tokens_of(b"ab" + data)) == "a" + "".join(parts) + stream.flush()


def test_a_stream_of_any_bytes(script):
    """Bytes that make no character come out as U+FFFD, and whole characters after them are not lost."""
    tokenizer, tokens_of = byte_level()
    rng = np.random.default_rng(0)
    pieces = [*"東é👧a".encode().split(b"\0"), "東".encode(), b"a", b"\xff", b"\xe6", b"\x9d", b"\xf0\x9f", b"\x80"]
    for _ in range(200):
        data = b"ab" + b"".join(pieces[i] for i in rng.integers(0, len(pieces), 8))
        stream = script["TextStream"](tokenizer, tokens_of(data[:1]))
        text = "a" + "".join(stream.push(token) for token in tokens_of(data[1:])) + stream.flush()
        assert text == tokenizer.decode(tokens_of(data)) == data.decode(errors="replace")


def test_the_end_of_a_stream_is_printed(path, checkpoint, run):
    prompt = checkpoint.tokenizer.encode("hello").ids
    tokens = (
        rope_jax.generate(checkpoint.model, checkpoint.params, np.array([prompt]), max_new_tokens=12, temperature=0)
        .tokens[0]
        .tolist()
    )
    text = lambda count: checkpoint.tokenizer.decode(prompt + tokens[:count])
    count = next(i for i in range(1, 13) if text(i).endswith("\ufffd"))
    for options in ((), ("--batch",)):
        status, stdout, stderr = run(path, "--prompt", "hello", "--max-new-tokens", count, *options)
        assert status == 0, stderr
        assert stdout.startswith(text(count) + "\n\n")


def test_wrong_arguments(path, tmp_path, run):
    (tmp_path / "folder").mkdir()
    shutil.copy(path, tmp_path / "folder/some.gguf")
    shutil.copy(path, tmp_path / "UPPER.GGUF")
    (tmp_path / "config.json").write_text(json.dumps({}))
    for arguments, message in (
        ([path, "--prompt"], "--prompt must be followed by a text, got none"),
        ([path, "--prompt", "a\udcff"], r"--prompt must be Unicode text, got 'a\udcff'"),
        ([path, "--seed", 2**70], "--seed must be from -2,147,483,648 to 2,147,483,647, got 1,180,"),
        ([path, "--max-new-tokens", 10**12], "--max-new-tokens must be from 1 to 2,147,483,647, got 1,000,"),
        ([path, "--max-new-tokens", 0], "--max-new-tokens must be from 1 to 2,147,483,647, got 0"),
        ([tmp_path / "folder"], "MODEL must be a .gguf file or a folder with config.json, got"),
        ([tmp_path / "config.json"], "folder must be a folder, got the file"),
        ([tmp_path / "UPPER.GGUF", "--chat"], "MODEL must have a chat template for --chat"),
        (["x" * 5000], "folder must be a local folder that holds config.json, got xxx"),
    ):
        status, stdout, stderr = run(*arguments)
        assert status == 2 and not stdout and stderr.count("\n") == 1
        assert stderr.startswith(f"generate: {message}"), stderr
