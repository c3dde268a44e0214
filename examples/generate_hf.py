"""Continues a text with a language model from a local Hugging Face folder.

    python examples/generate_hf.py FOLDER --prompt "The capital of France is"
    python examples/generate_hf.py FOLDER --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
    python examples/generate_hf.py FOLDER --dtype float32 --max-new-tokens 200

FOLDER must hold config.json, tokenizer.json and model.safetensors (or shards and their index). rope_jax.load_hf
reads these families: Llama, Mistral, Qwen 2 and 3, Phi-3, SmolLM3, Gemma 2 and 3. Nothing is downloaded.
Install with pip install -e ".[train,checkpoints]".
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal, NoReturn

import jax
import numpy as np
import tqdm
import tyro

import rope_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Continues a text with the language model in a folder."""

    folder: tyro.conf.Positional[Path]
    """A Hugging Face folder with config.json, safetensors and tokenizer.json."""
    prompt: str = "Once upon a time"
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 decodes greedily."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of the computation. Default: the dtype of the stored weights."""
    context_length: int | None = None
    """The context length of the frequencies, for models whose frequencies depend on it (Phi-3). Default: the tokens
    of prompt and answer together."""


def fail(message) -> NoReturn:
    """Ends the program with status 2 and a one-line message for the user."""
    print(f"generate_hf: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def main(config: Config) -> None:
    if config.temperature == 0 and (config.top_k is not None or config.top_p is not None):
        fail("--top-k and --top-p need a --temperature above 0, got 0")
    if not (config.folder / "tokenizer.json").is_file():
        fail(f"FOLDER must hold tokenizer.json, got {config.folder} without one")
    try:
        model, params, _, tokenizer, stop, _ = rope_jax.load_hf(config.folder, dtype=config.dtype)
    except (ValueError, TypeError) as error:
        fail(error)
    prompt = np.array([tokenizer.encode(config.prompt).ids], np.int32)

    context_length = config.context_length
    if context_length is None and model.needs_context_length:
        context_length = prompt.shape[1] + config.max_new_tokens

    times: list[float] = []  # seconds at which each token arrived

    def on_token(row: int, token: int) -> None:
        times.append(time.perf_counter())
        bar.update()

    start = time.perf_counter()
    try:
        with tqdm.tqdm(total=config.max_new_tokens, unit=" tokens", leave=False, disable=None) as bar:
            answer = rope_jax.generate(
                model,
                params,
                prompt,
                max_new_tokens=config.max_new_tokens,
                rng=jax.random.key(config.seed),
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                stop_token=stop,
                on_token=on_token,
                context_length=context_length,
            )
    except ValueError as error:
        fail(error)
    tokens = np.asarray(answer.tokens[0]).tolist()
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    print(tokenizer.decode(prompt[0].tolist() + tokens[:end]))

    # The first token waits for both compilations and for the prompt.
    first, rest = times[0] - start, times[-1] - times[0]
    speed = f", the others at {(len(times) - 1) / rest:,.1f} tokens/s" if len(times) > 1 else ""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"\n{count:,} parameters, computed in {model.dtype}: {len(times)} tokens, "
        f"the first after {first:.1f} s with compiling and the prompt{speed}"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
