"""Decodes greedily with the files that examples/export.py wrote. Neither rope_jax nor flax is needed.

    python examples/run_exported.py runs/export --prompt 72 105
    python examples/run_exported.py runs/export --prompt 72 105 33 --prompt 7 --max-new-tokens 64

Prompts are token ids. Each printed row continues one prompt. -1 stands for logits that are NaN: the model does not
know a token of the row, or the row has outgrown its cache. Install with pip install jax numpy flatbuffers.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


class Model(NamedTuple):
    """The two functions, the parameters by name, and the sizes and cache arrays that about.json lists."""

    prefill: Callable
    decode: Callable
    params: dict
    sizes: list
    cache: dict


def load(folder: Path) -> Model:
    """Reads the four files of an exported model."""
    about = json.loads((folder / "about.json").read_text())
    arguments = about["functions"]["prefill"]["arguments"]

    def function(name):
        exported = export.deserialize(bytearray((folder / about["functions"][name]["file"]).read_bytes()))
        return jax.jit(exported.call, donate_argnums=1)  # donated: the cache is updated in place

    with np.load(folder / about["params"]) as stored:
        # numpy stores bfloat16 as untyped pairs of bytes; the description restores the dtype.
        described = arguments["params"].items()
        params = {name: jnp.asarray(stored[name].view(text.split("[")[0])) for name, text in described}
    return Model(function("prefill"), function("decode"), params, about["sizes"], arguments["cache"])


def zeros(description: str, sizes: dict) -> jax.Array:
    """Zeros of the described dtype and shape, such as float32[2,b,2,s,16]; ``sizes`` maps letters to numbers."""
    dtype, shape = description.rstrip("]").split("[")
    return jnp.zeros([int(sizes.get(size, size)) for size in shape.split(",")], dtype)


def greedy(model: Model, prompts: list[list[int]], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Continues each prompt. Returns the tokens, int32 ``[B, n]``, and the logits they maximize, ``[B, n, V]``."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    longest = max(map(len, prompts))
    needed = {"prompts": len(prompts), "tokens a prompt": longest, "tokens in the cache": longest + max_new_tokens}
    sizes = []
    for exported_size, (name, size) in zip(model.sizes, needed.items(), strict=True):
        sizes.append(exported_size if isinstance(exported_size, int) else size)
        if sizes[-1] < size:
            raise ValueError(f"the model was exported for at most {exported_size} {name}, got {size}")
    batch, width, _ = sizes
    letters = dict(zip(model.sizes, sizes, strict=True))

    tokens, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
    for row, prompt in enumerate(prompts):  # all other rows and columns are padding
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    cache = {name: zeros(description, letters) for name, description in model.cache.items()}

    written, all_logits = [], []
    results = model.prefill(model.params, cache, tokens, mask)
    for i in range(max_new_tokens):
        logits = np.asarray(results["logits"])
        next_token = np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1)).astype(np.int32)
        written.append(next_token[: len(prompts)])
        all_logits.append(logits[: len(prompts)])
        if i + 1 < max_new_tokens:
            results = model.decode(model.params, results["cache"], next_token)
    return np.stack(written, axis=1), np.stack(all_logits, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Continues prompts of token ids, greedily.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, nargs="+", action="append", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()
    try:
        written, _ = greedy(load(args.folder), args.prompt, args.max_new_tokens)
    except (ValueError, OSError, OverflowError) as error:
        parser.error(" ".join(str(error).split()))
    for row in written.tolist():
        print(*row)


if __name__ == "__main__":
    main()
