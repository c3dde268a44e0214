"""Tokenizers of GGUF files: words, merges, special tokens, and texts that come back as they were."""

import itertools

import numpy as np
import pytest
import tokenizers
from gguf_files import write

from rope_jax.interop.gguf_file import open_gguf
from rope_jax.interop.gguf_tokenizer import read_text, without_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "Ġ Ġ", "Ċ Ċ", "â Ģ", "a b"]
WORDS = ["he", "ll", "hell", "hello", "Ġhello", "12", "ĠĠ", "ĊĊ", "âĢ", "ab"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<tool>"]
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ALPHABET + WORDS + SPECIAL,
    "tokenizer.ggml.token_type": [NORMAL] * (len(ALPHABET) + len(WORDS)) + [CONTROL, CONTROL, USER_DEFINED],
    "tokenizer.ggml.merges": MERGES,
}
ID = {token: i for i, token in enumerate(BYTE_LEVEL["tokenizer.ggml.tokens"])}
TEXTS = [
    "hello, world! It's 12345 o'clock.",
    "def f(x):\n\treturn x ** 2  # comment\n\n\n    if a != b:\r\n        pass\n",
    "你好，世界！ 日本語 한국어 Привет ",
    "🙂👩‍👩‍👧 🇫🇷 é é \u00a0x\u3000y\u200b",
    "   leading,     runs      of  spaces\t\t \n \n  \n",
    "<|im_start|>user\nhello<|im_end|> <tool> <|im_end|><|im_end|>",
    "\x00\x07 <0x0A> <unk>",
    " ",
    "\n",
]


def text_of(tmp_path, metadata=BYTE_LEVEL, vocab_size=1000, **more):
    more = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return read_text(open_gguf(write(tmp_path / "a.gguf", metadata=metadata | more)), vocab_size)


def tokenizer_of(tmp_path, metadata=BYTE_LEVEL, **more):
    return text_of(tmp_path, metadata, **more).tokenizer


def assert_round_trips(tokenizer, texts=TEXTS):
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokens, skip_special_tokens=False) == text


# Words of "I'Ll don't 12345  x\n\n y!!\n", by hand from the patterns in src/llama-vocab.cpp of llama.cpp.
SPLIT = {
    "gpt-2": ["I", "'", "Ll", " don", "'t", " 12345", " ", " x", "\n\n", " y", "!!", "\n"],
    "smollm": ["I", "'", "Ll", " don", "'t", " ", "1", "2", "3", "4", "5", " ", " x", "\n\n", " y", "!!", "\n"],
    "llama-bpe": ["I", "'Ll", " don", "'t", " ", "123", "45", " ", " x", "\n\n", " y", "!!\n"],
    "qwen2": ["I", "'Ll", " don", "'t", " ", "1", "2", "3", "4", "5", " ", " x", "\n\n", " y", "!!\n"],
    "dbrx": ["I", "'Ll", " don", "'t", " ", "123", "45", " ", " x", "\n\n", " y", "!!\n"],
    "qwen35": ["I", "'Ll", " don", "'t", " ", "1", "2", "3", "4", "5", " ", " x", "\n\n", " y", "!!\n"],
    "tekken": ["I", "'Ll", " don", "'t", " ", "1", "2", "3", "4", "5", " ", " x", "\n\n", " y", "!!\n"],
    "gpt-4o": ["I'Ll", " don't", " ", "123", "45", " ", " x", "\n\n", " y", "!!\n"],
}


@pytest.mark.parametrize("name", SPLIT)
def test_words(tmp_path, name):
    tokenizer = tokenizer_of(tmp_path, pre=name, bos_token_id=0)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("I'Ll don't 12345  x\n\n y!!\n")]
    assert words == [word.replace(" ", "Ġ").replace("\n", "Ċ") for word in SPLIT[name]]
    assert_round_trips(tokenizer)


def test_capital_letters_begin_words(tmp_path):
    words = {}
    for name in ("tekken", "gpt-4o", "llama-bpe"):
        tokenizer = tokenizer_of(tmp_path, pre=name, bos_token_id=0)
        words[name] = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("camelCaseHTTPServer a/b//\n")]
    assert words["tekken"] == words["gpt-4o"] == ["camel", "Case", "HTTPServer", "Ġa", "/b", "//Ċ"]
    assert words["llama-bpe"] == ["camelCaseHTTPServer", "Ġa", "/b", "//Ċ"]


def test_marks_stay_in_words_of_qwen35(tmp_path):
    word = "e\u0301t"  # a letter, a combining accent, a letter
    parts = {
        name: len(tokenizer_of(tmp_path, pre=name).pre_tokenizer.pre_tokenize_str(word))
        for name in ("qwen2", "qwen35")
    }
    assert parts == {"qwen2": 2, "qwen35": 1}


def test_merges_come_in_the_order_of_the_file(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.encode("hello hello 12 ab").tokens == ["hello", "Ġhello", "Ġ", "1", "2", "Ġ", "ab"]
    assert tokenizer_of(tmp_path, pre="gpt-2").encode("hello 12").tokens == ["hello", "Ġ", "12"]
    merges = ["l l", "l o", "e ll", "h e"]  # "he" comes too late
    tokens = [*ALPHABET, "ll", "lo", "ell", "he"]
    tokenizer = tokenizer_of(tmp_path, merges=merges, tokens=tokens, token_type=[NORMAL] * len(tokens))
    assert tokenizer.encode("hello").tokens == ["h", "ell", "o"]


def test_a_word_of_the_vocabulary_may_stay_whole(tmp_path):
    """Llama 3 has words that no merges reach."""
    tokens = [*ALPHABET, "word"]
    changes = dict(tokens=tokens, token_type=[NORMAL] * len(tokens), merges=["a b"][:0] or ["a b"])
    changes |= dict(tokens=[*tokens, "ab"], token_type=[NORMAL] * (len(tokens) + 1))
    assert tokenizer_of(tmp_path, **changes).encode("word").tokens == list("word")
    whole = tokenizer_of(tmp_path, **changes, pre="llama-bpe", add_bos_token=False)
    assert whole.encode("word").tokens == ["word"]


def test_special_tokens_in_a_text(tmp_path):
    text = text_of(tmp_path, eos_token_id=ID["<|im_end|>"])
    tokenizer = text.tokenizer
    tokens = tokenizer.encode("<|im_start|>hello<|im_end|><tool>")
    assert tokens.tokens == ["<|im_start|>", "hello", "<|im_end|>", "<tool>"]
    assert tokens.ids == [ID[token] for token in tokens.tokens]
    assert tokenizer.decode(tokens.ids) == "hello<tool>"  # control tokens are skipped, defined ones are text
    assert tokenizer.get_vocab_size() == len(ID)


def test_first_and_last_tokens(tmp_path):
    begin, end = ID["<|im_start|>"], ID["<|im_end|>"]
    ids = dict(bos_token_id=begin, eos_token_id=end)
    hello = ID["hello"]

    def encoded(**more):
        return tokenizer_of(tmp_path, **ids, **more).encode("hello").ids

    assert encoded() == [hello]
    assert encoded(add_bos_token=True) == [begin, hello]
    assert encoded(add_bos_token=True, add_eos_token=True) == [begin, hello, end]
    assert encoded(pre="llama-bpe") == [begin, hello]  # by default
    assert encoded(pre="llama-bpe", add_bos_token=False) == [hello]
    both = tokenizer_of(tmp_path, **ids, add_bos_token=True, add_eos_token=True)
    assert both.encode("hello", "hello").ids == [begin, hello, end] * 2
    assert both.encode("hello", add_special_tokens=False).ids == [hello]


def test_stop_tokens(tmp_path):
    end = ID["<|im_end|>"]
    assert text_of(tmp_path).stop_tokens == (end,)  # by its text
    assert text_of(tmp_path, eos_token_id=3, eot_token_id=2, eom_token_id=1).stop_tokens == (1, 2, 3, end)
    assert text_of(tmp_path, eos_token_id=end).stop_tokens == (end,)
    tokens = [*BYTE_LEVEL["tokenizer.ggml.tokens"][:-3], "<end_of_turn>", "</s>", "<|endoftext|>"]
    kinds = [NORMAL] * (len(tokens) - 3) + [CONTROL, USER_DEFINED, NORMAL]
    text = text_of(tmp_path, tokens=tokens, token_type=kinds)
    assert text.stop_tokens == (len(tokens) - 3, len(tokens) - 1)  # </s> is a tag of HTML
    assert text.tokenizer.decode([len(tokens) - 1, ID["he"]]) == "he"  # a stop token is special


def test_the_chat_template(tmp_path):
    path = write(tmp_path / "a.gguf", metadata=BYTE_LEVEL | {"tokenizer.chat_template": "{{ x }}"})
    assert read_text(open_gguf(path), 1000).chat_template == "{{ x }}"
    path = write(tmp_path / "b.gguf", metadata={"tokenizer.chat_template": "{{ x }}"})
    assert read_text(open_gguf(path), 1000) == (None, (), "{{ x }}")
    assert set(without_vocabulary(BYTE_LEVEL)) == {"tokenizer.ggml.model", "tokenizer.ggml.pre"}


# ---------------------------------------------------------------------------------------------- SentencePiece

LETTERS = "abc▁"


def sentencepiece(pieces, **more):
    """A vocabulary with bytes; the pieces score in their order."""
    special = ["<unk>", "<s>", "</s>", "<start>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = special + bytes_ + list(pieces)
    keys = dict(
        model="llama",
        pre="default",
        tokens=tokens,
        scores=[0.0] * (len(special) + 256) + [-float(i) for i in range(len(pieces))],
        token_type=[UNKNOWN, CONTROL, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items()}


def merged(text, scores):
    """SentencePiece's rule: merge the neighbours that make the best token, the first of equals; llm_tokenizer_spm."""
    symbols = list(text)
    while True:
        pairs = [(scores.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(itertools.pairwise(symbols))]
        if not pairs or max(pairs)[0] == -np.inf:
            return symbols
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def splits(token, pieces):
    return sum(token[:cut] in pieces and token[cut:] in pieces for cut in range(1, len(token)))


def test_the_best_score_merges_first(tmp_path):
    """If a token has one pair of halves. Otherwise tokenizers ranks the pairs of one token, and llama.cpp does not."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        pieces = set(LETTERS)
        while len(pieces) < 25:
            new = "".join(rng.choice(sorted(pieces), 2))
            if all(splits(token, pieces | {new}) <= 1 for token in pieces | {new}):
                pieces.add(new)
        pieces = rng.permutation(sorted(pieces)).tolist()
        scores = {piece: -float(i) for piece, i in zip(pieces, rng.permutation(len(pieces)), strict=True)}
        metadata = sentencepiece(pieces, scores=[0.0] * 260 + [scores[piece] for piece in pieces])
        tokenizer = tokenizer_of(tmp_path, metadata, add_space_prefix=False, add_bos_token=False)
        for _ in range(50):
            text = "".join(rng.choice(list("abc "), 14))
            assert tokenizer.encode(text).tokens == merged(text.replace(" ", "▁"), scores)


PIECES = ["▁hello", "hello", "hell", "he", "ll", "▁", "h", "e", "l", "o", "▁▁"]


def test_other_characters_become_bytes(tmp_path):
    tokenizer = tokenizer_of(tmp_path, sentencepiece(PIECES), add_space_prefix=False)
    assert tokenizer.encode("hello é").tokens == ["<s>", "hello", "▁", "<0xC3>", "<0xA9>"]
    assert_round_trips(tokenizer, [text for text in TEXTS if "<unk>" not in text])
    assert tokenizer.encode("<unk>x", add_special_tokens=False).tokens == ["<unk>", "<0x78>"]


def test_a_text_begins_with_a_space(tmp_path):
    metadata = sentencepiece(PIECES)
    tokenizer = tokenizer_of(tmp_path, metadata)
    assert tokenizer.encode("hello hello").tokens == ["<s>", "▁hello", "▁hello"]
    assert tokenizer.encode("<start>hello").tokens == ["<s>", "<start>", "▁hello"]
    assert tokenizer.encode("").tokens == ["<s>"]
    plain = tokenizer_of(tmp_path, metadata, add_space_prefix=False, add_bos_token=False)
    assert plain.encode("hello hello").tokens == ["hello", "▁hello"]
    assert_round_trips(tokenizer, [text for text in TEXTS if "<" not in text])


def test_defined_tokens_keep_their_spaces(tmp_path):
    """Gemma's runs of spaces and newlines are stored as they are, not with ▁."""
    metadata = sentencepiece([*PIECES, "   ", "\n\n"])
    metadata["tokenizer.ggml.token_type"][-2:] = [USER_DEFINED] * 2
    tokenizer = tokenizer_of(tmp_path, metadata, add_space_prefix=False, add_bos_token=False)
    assert tokenizer.encode("he    ll\n\n\nhe").tokens == ["he", "   ", "▁", "ll", "\n\n", "<0x0A>", "he"]
    assert_round_trips(tokenizer, [text for text in TEXTS if "<unk>" not in text])


def test_special_tokens_of_phi3_take_the_spaces_after_them(tmp_path):
    metadata = sentencepiece(PIECES) | {"general.name": "Phi-3 Mini", "tokenizer.ggml.add_space_prefix": False}
    tokenizer = tokenizer_of(tmp_path, metadata)
    hello = metadata["tokenizer.ggml.tokens"].index("hello")
    assert tokenizer.encode("<start> \nhello").ids == [1, 3, hello]
    assert tokenizer.encode("<s> hello").tokens == ["<s>", "<s>", "▁hello"]
    metadata["general.name"] = "Llama"
    assert tokenizer_of(tmp_path, metadata).encode("<start> hello").tokens == ["<s>", "<start>", "▁hello"]


REFUSED = {
    "another kind": (dict(model="bert"), "tokenizer.ggml.model must be 'gpt2' or 'llama', got 'bert'"),
    "unknown words": (dict(pre="porridge"), "tokenizer.ggml.pre must be one of a.x-4.0 "),
    "unknown words, its name": (dict(pre="porridge"), "got 'porridge'"),
    "the default of old files": (dict(pre="default"), "got 'default'"),
    "tokens of numbers": (dict(tokens=[1, 2]), "tokenizer.ggml.tokens must be a list of str, got [1, 2]"),
    "tokens that are no list": (dict(tokens="a"), "tokenizer.ggml.tokens must be a list of str, got 'a'"),
    "too few types": (dict(token_type=[1]), "tokenizer.ggml.token_type must have an entry for each of 269 tokens, got 1"),
    "types of text": (dict(token_type=["a"]), "tokenizer.ggml.token_type must be a list of int"),
    "a merge of one": (dict(merges=["ab"]), "tokenizer.ggml.merges must hold pairs, got 'ab'"),
    "a merge of others": (dict(merges=["xx yy"]), "tokenizer.ggml must be a vocabulary"),
    "a token twice": (dict(tokens=["a", "a"], token_type=[1, 1]), "must hold each token once, got 'a' twice"),
    "a stop beyond": (dict(eos_token_id=5000), "tokenizer.ggml.eos_token_id must be a token below 269, got 5000"),
    "no first token": (dict(add_bos_token=True), "tokenizer.ggml.bos_token_id must be a token below 269, got None"),
    "a flag of text": (dict(add_bos_token="yes"), "tokenizer.ggml.add_bos_token must be true or false, got 'yes'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        text_of(tmp_path, **changes)
    assert message in str(error.value) and "a.gguf" in str(error.value) and "\n" not in str(error.value)


def test_refused_of_sentencepiece(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.ggml.scores must have an entry for each of 271 tokens, got 1"):
        text_of(tmp_path, sentencepiece(PIECES), scores=[1.0])
    with pytest.raises(ValueError, match="must fit the 100 rows of token_embd.weight, got 271"):
        text_of(tmp_path, sentencepiece(PIECES), vocab_size=100)
