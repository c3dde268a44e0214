"""Reads how a model folder turns text into tokens and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rope_jax.interop.config import read_json


class Text(NamedTuple):
    """The tokenizer, the stop tokens and the chat template of a checkpoint, as :class:`Checkpoint` has them."""

    tokenizer: Any
    stop_tokens: tuple[int, ...]
    chat_template: str | None


def read_text(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Text:
    """The text side of a folder: tokenizer.json, generation_config.json and tokenizer_config.json, if present.

    Args:
      folder: the path.
      config: the contents of config.json.
      vocab_size: of the model. Stop tokens beyond the vocabulary are left out: the model never writes them.

    Raises:
      ValueError: if a file is broken, or a value has the wrong type.
      ImportError: if there is a tokenizer.json and the package tokenizers is missing.
    """
    return Text(_tokenizer(folder), _stop_tokens(folder, config, vocab_size), _chat_template(folder))


def import_tokenizers(extra: str):
    """The package tokenizers.

    Raises:
      ImportError: without the package; the message names the extra.
    """
    try:
        import tokenizers  # an optional dependency
    except ImportError:
        raise ImportError(f"texts need the package tokenizers: pip install 'rope_jax[{extra}]'") from None
    return tokenizers


def _tokenizer(folder: Path):
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizers = import_tokenizers("checkpoints")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} must be a file of the package tokenizers: {error}") from None


def _stop_tokens(folder: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text, from generation_config.json, or else from config.json."""
    sources: list[tuple[str, Mapping[str, Any]]] = [("config.json", config)]
    if (folder / "generation_config.json").is_file():
        sources.insert(0, ("generation_config.json", read_json(folder / "generation_config.json")))
    for file, values in sources:
        stop = values.get("eos_token_id")
        if stop is None:
            continue
        tokens = stop if isinstance(stop, list) else [stop]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in tokens):
            raise ValueError(f"{file}: eos_token_id must be a token or a list of tokens, got {stop!r}")
        return tuple(sorted({token for token in tokens if token < vocab_size}))
    return ()


def _chat_template(folder: Path) -> str | None:
    """The default Jinja template, from chat_template.jinja or tokenizer_config.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{jinja} must be UTF-8: {error}") from None
    file = folder / "tokenizer_config.json"
    template = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(template, list):  # several templates by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{file}: chat_template must be text, got {type(template).__name__}")
    return template
