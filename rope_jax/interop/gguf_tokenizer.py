"""Makes a tokenizer from the vocabulary in a GGUF file."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rope_jax.interop.gguf_file import GgufFile
from rope_jax.interop.text import Text, import_tokenizers

# The types of tokens, as llama.cpp numbers them.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_PATH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Splitter:
    """The words of a byte-level vocabulary, before merges.

    Attributes:
      patterns: of words, applied one after the other.
      gpt2: whether GPT-2's pattern comes last.
      whole_words: whether a word in the vocabulary stays whole, whatever the merges.
      begins: whether a text begins with the first special token, if the file does not say.
    """

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    whole_words: bool = False
    begins: bool = False


_LLAMA3 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_PATH_TAIL}"
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"|{_PATH_TAIL}"
)
# By tokenizer.ggml.pre (llama.cpp, src/llama-vocab.cpp).
_SPLITTERS = {
    "a.x-4.0 exaone4 gigachat gpt-2 granite-docling jais mellum mpt olmo phi-2 trillion": _Splitter(gpt2=True),
    "codeshell command-r exaone mellum2 minerva-7b refact smollm starcoder": _Splitter(
        patterns=(r"\p{N}",), gpt2=True
    ),
    "falcon-h1 falcon3 lfm2 llama-bpe llama-v3 llama3 midm-2.0 pixtral": _Splitter(
        patterns=(_LLAMA3,), whole_words=True, begins=True
    ),
    "chatglm-bpe dbrx glm4 smaug-bpe": _Splitter(patterns=(_LLAMA3,)),
    "deepseek-r1-qwen grok-2 hunyuan kormo megrez qwen2 solar-open stablelm2": _Splitter(patterns=(_QWEN2,)),
    "qwen35": _Splitter(patterns=(_QWEN35,)),
    "tekken": _Splitter(patterns=(_TEKKEN,), whole_words=True, begins=True),
    "gpt-4o kanana2 llama4": _Splitter(patterns=(_GPT4O,)),
}
# Texts of tokens that end an answer (llama.cpp, src/llama-vocab.cpp).
_STOP_TEXTS = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT>
_<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜>
"""  # noqa: E501, RUF001
_MOST_LETTERS = 2**10  # in a token: the search for its merges takes the square
_BIG = ("tokens", "scores", "token_type", "merges")


def without_vocabulary(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata without the long lists of the vocabulary."""
    return {key: value for key, value in metadata.items() if key not in {f"tokenizer.ggml.{name}" for name in _BIG}}


def read_text(file: GgufFile, vocab_size: int) -> Text:
    """The tokenizer, the stop tokens and the chat template of a file; no tokenizer if it has no vocabulary.

    ``tokenizer.ggml.model`` is ``gpt2``, byte-level BPE with the file's merges, or ``llama``, SentencePiece's BPE:
    the best score merges first, and unknown characters become bytes. Stop tokens are the file's ``eos``, ``eot``
    and ``eom``, and tokens with a text that ends an answer in llama.cpp, such as ``<|im_end|>``.

    Args:
      file: from :func:`open_gguf`.
      vocab_size: of the model.

    Raises:
      ValueError: if the kind of tokenizer or of its words is unknown, or a list or a token is missing or broken.
      ImportError: without the package tokenizers; install ``rope_jax[gguf]``.
    """
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        file.refuse(f"tokenizer.chat_template must be text, got {type(template).__name__}")
    if file.metadata.get("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        return Text(None, (), template)
    vocabulary = _Vocabulary.read(file, vocab_size)
    return Text(vocabulary.tokenizer(), vocabulary.stop_tokens, template)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The keys ``tokenizer.ggml.*`` of a file.

    Attributes:
      file: for messages and further keys.
      tokens: their texts.
      types: of the tokens.
      model: ``gpt2`` or ``llama``.
      stop_tokens: that end a text.
    """

    file: GgufFile
    tokens: Sequence[str]
    types: Sequence[int]
    model: str
    stop_tokens: tuple[int, ...]

    @classmethod
    def read(cls, file: GgufFile, vocab_size: int) -> "_Vocabulary":
        model = file.metadata["tokenizer.ggml.model"]
        if model not in ("gpt2", "llama"):
            file.refuse(f"tokenizer.ggml.model must be 'gpt2' or 'llama', got {model!r}")
        tokens = _list(file, "tokens", str)
        if len(tokens) > vocab_size:
            file.refuse(
                f"tokenizer.ggml.tokens must fit the {vocab_size} rows of token_embd.weight, got {len(tokens)}"
            )
        if len(set(tokens)) != len(tokens):
            twice, _ = collections.Counter(tokens).most_common(1)[0]
            file.refuse(f"tokenizer.ggml.tokens must hold each token once, got {twice!r} twice")
        types = [1] * len(tokens)
        if "tokenizer.ggml.token_type" in file.metadata:
            types = _list(file, "token_type", int, len(tokens))
        ends = [_token(file, name, len(tokens)) for name in ("eos", "eot", "eom")]
        stop_texts = set(_STOP_TEXTS.split())
        texts = [i for i, token in enumerate(tokens) if token in stop_texts]
        # Gemma has </s> as a tag of HTML.
        texts = [i for i in texts if tokens[i] != "</s>" or types[i] == _CONTROL]
        stop = tuple(sorted({end for end in [*ends, *texts] if end is not None}))
        return cls(file=file, tokens=tokens, types=types, model=model, stop_tokens=stop)

    def tokenizer(self):
        """The vocabulary as a ``tokenizers.Tokenizer``."""
        tokenizers = import_tokenizers("gguf")
        try:
            tokenizer = self._byte_level(tokenizers) if self.model == "gpt2" else self._sentencepiece(tokenizers)
        except ValueError:
            raise
        except Exception as error:  # tokenizers raises plain Exception
            self.file.refuse(f"tokenizer.ggml must be a vocabulary: {error}")
        # Special tokens of Phi-3 take the spaces after them; llama.cpp knows the model by its name.
        name = str(self.file.metadata.get("general.name")).lower()
        phi3 = "phi-3" in name or "phi3" in name
        special, defined = [], []
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if not token:
                continue
            rstrip = phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
            if kind in (_CONTROL, _UNKNOWN) or i in self.stop_tokens:
                special.append(tokenizers.AddedToken(token, normalized=False, special=True, rstrip=rstrip))
            elif kind == _USER_DEFINED:
                defined.append(tokenizers.AddedToken(token, normalized=False, rstrip=rstrip))
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(defined)
        begins = self.model == "llama" or self._splitter().begins
        begin = ["bos"] if self._flag("add_bos_token", begins) else []
        end = ["eos"] if self._flag("add_eos_token", False) else []
        if begin or end:
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single=[*begin, "$A", *end],
                pair=[*begin, "$A", *end, *(f"{name}:1" for name in begin), "$B:1", *(f"{name}:1" for name in end)],
                special_tokens=[self._template(name) for name in begin + end],
            )
        return tokenizer

    def _template(self, name: str) -> dict[str, Any]:
        """A token of a template."""
        token = _token(self.file, name, len(self.tokens), required=True)
        assert token is not None
        return {"id": name, "ids": [token], "tokens": [self.tokens[token]]}

    def _byte_level(self, tokenizers):
        splitter = self._splitter()
        merges = _list(self.file, "merges", str)
        pairs = []
        for merge in merges:
            cut = merge.find(" ", 1)
            if cut < 0:
                self.file.refuse(f"tokenizer.ggml.merges must hold pairs, got {merge!r}")
            pairs.append((merge[:cut], merge[cut + 1 :]))
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                {token: i for i, token in enumerate(self.tokens)}, pairs, ignore_merges=splitter.whole_words
            )
        )
        pre = tokenizers.pre_tokenizers
        tokenizer.pre_tokenizer = pre.Sequence(
            [
                *(pre.Split(tokenizers.Regex(pattern), "isolated") for pattern in splitter.patterns),
                pre.ByteLevel(add_prefix_space=False, use_regex=splitter.gpt2),
            ]
        )
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return tokenizer

    def _splitter(self) -> _Splitter:
        name = self.file.metadata.get("tokenizer.ggml.pre")
        for names, splitter in _SPLITTERS.items():
            if name in names.split():
                return splitter
        known = " ".join(sorted(" ".join(_SPLITTERS).split()))
        self.file.refuse(f"tokenizer.ggml.pre must be one of {known}, got {_short(name)}")

    def _sentencepiece(self, tokenizers):
        scores = _list(self.file, "scores", float, len(self.tokens))
        longest = max(map(len, self.tokens), default=0)
        if longest > _MOST_LETTERS:
            self.file.refuse(
                f"tokenizer.ggml.tokens must be of at most {_MOST_LETTERS:,} letters, got one of {longest:,}"
            )
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        unknown = _token(self.file, "unknown", len(self.tokens))
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocabulary,
                _merges(vocabulary, scores),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=_BYTE in self.types,
            )
        )
        prefix = self._flag("add_space_prefix", True)
        normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
        spaces = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer

    def _flag(self, name: str, default: bool) -> bool:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            self.file.refuse(f"tokenizer.ggml.{name} must be true or false, got {value!r}")
        return value


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best score first."""
    pairs = []
    for token, i in vocabulary.items():
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs += [(-scores[i], left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    pairs.sort(key=lambda pair: pair[0])
    return [(left, right) for _, left, right in pairs]


def _list(file: GgufFile, name: str, kind: type, length: int | None = None) -> list:
    """A list of the vocabulary."""
    key = f"tokenizer.ggml.{name}"
    values = file.metadata.get(key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        file.refuse(f"{key} must be a list of {kind.__name__}, got {_short(values)}")
    if kind is float and any(map(math.isnan, values)):
        file.refuse(f"{key} must be numbers, got nan")
    if length is not None and len(values) != length:
        file.refuse(f"{key} must have an entry for each of {length} tokens, got {len(values)}")
    return values


def _short(value) -> str:
    return f"{value!r:.60}"


def _token(file: GgufFile, name: str, num_tokens: int, required: bool = False) -> int | None:
    """The token of a key such as ``tokenizer.ggml.eos_token_id``."""
    key = f"tokenizer.ggml.{name}_token_id"
    token = file.metadata.get(key)
    if token is None and not required:
        return None
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < num_tokens:
        file.refuse(f"{key} must be a token below {num_tokens}, got {token!r}")
    return token
