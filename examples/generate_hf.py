"""Continues a text with a language model from a local folder of Hugging Face's making.

    python examples/generate_hf.py FOLDER --prompt "The capital of France is"
    python examples/generate_hf.py FOLDER --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
    python examples/generate_hf.py FOLDER --dtype float32 --max-new-tokens 200

FOLDER holds config.json, model.safetensors (or its shards and their index) and tokenizer.json, of a family that
rope_jax.load_hf knows: Llama, Mistral, Qwen 2 and 3, Phi-3, SmolLM3, Gemma 2 and 3. Nothing is downloaded.
Needs the extras train and checkpoints: pip install -e ".[train,checkpoints]".
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal, NoReturn

import jax
import numpy as np
import tokenizers
import tqdm
import tyro

import rope_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Continues a text with the language model in a folder."""

    folder: tyro.conf.Positional[Path]
    """config.json, safetensors and tokenizer.json."""
    prompt: str = "Once upon a time"
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the computation. Default: what the weights are stored in."""
    length: int | None = None
    """Of the context that the frequencies are for, in models that ask (Phi-3). Default: prompt and answer."""


def fail(message) -> NoReturn:
    """One line for what the user can mend, exit status 2."""
    print(f"generate_hf: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def stop_tokens(folder: Path, config: dict) -> set[int]:
    """The tokens that end a text: of generation_config.json, else of config.json."""
    path = folder / "generation_config.json"
    for source in (json.loads(path.read_text()) if path.is_file() else {}, config):
        stop = source.get("eos_token_id")
        if stop is not None:
            return {stop} if isinstance(stop, int) else set(stop)
    return set()


def main(config: Config) -> None:
    if config.temperature == 0 and (config.top_k is not None or config.top_p is not None):
        fail("--top-k and --top-p are for a --temperature above 0, got 0")
    if not (config.folder / "tokenizer.json").is_file():
        fail(f"FOLDER must hold tokenizer.json, got {config.folder} without it")
    try:
        model, params, described = rope_jax.load_hf(config.folder, dtype=config.dtype)
        tokenizer = tokenizers.Tokenizer.from_file(str(config.folder / "tokenizer.json"))
        stop = stop_tokens(config.folder, described)
    except Exception as error:  # tokenizers raises nothing narrower
        fail(error)
    prompt = np.array([tokenizer.encode(config.prompt).ids], np.int32)

    ropes = model.rope if isinstance(model.rope, tuple) else (model.rope,)
    length = config.length
    if length is None and any(rope is not None and hasattr(rope.schedule, "context_length") for rope in ropes):
        length = prompt.shape[1] + config.max_new_tokens

    times: list[float] = []  # when each token was there

    def written(row: int, token: int) -> None:
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
                stop_token={token for token in stop if token < model.vocab_size},  # those that it can write
                on_token=written,
                context_length=length,
            )
    except ValueError as error:
        fail(error)
    tokens = np.asarray(answer.tokens[0]).tolist()
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    print(tokenizer.decode(prompt[0].tolist() + tokens[:end]))

    # Both programs are compiled, and the prompt is read, before the first token is there.
    first, rest = times[0] - start, times[-1] - times[0]
    speed = f", the others at {(len(times) - 1) / rest:,.1f} tokens/s" if len(times) > 1 else ""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"\n{count:,} parameters, computed in {model.dtype}: {len(times)} tokens, "
        f"the first after {first:.1f} s with compiling and the prompt{speed}"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
