"""Runs what examples/export.py wrote, with jax and numpy alone: the model's own code is not there.

    python examples/run_exported.py runs/export --prompt 72 105
    python examples/run_exported.py runs/export --prompt 72 105 33 --prompt 7 --max-new-tokens 64

Prompts are token ids; each row of output is what greedy decoding writes after one of them. -1 is no token: the
row's logits are NaN, as after a token that the model does not have.
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
    """The two functions, the parameters by name, and what about.json says of the sizes and of the cache."""

    prefill: Callable
    decode: Callable
    params: dict
    sizes: list
    cache: dict


def load(folder: Path) -> Model:
    about = json.loads((folder / "about.json").read_text())
    arguments = about["functions"]["prefill"]["arguments"]

    def function(name):
        exported = export.deserialize(bytearray((folder / about["functions"][name]["file"]).read_bytes()))
        return jax.jit(exported.call, donate_argnums=1)  # the cache is written in its own place

    with np.load(folder / about["params"]) as stored:
        # numpy knows bfloat16 as two bytes of no type.
        params = {
            name: jnp.asarray(stored[name].view(said.split("[")[0])) for name, said in arguments["params"].items()
        }
    return Model(function("prefill"), function("decode"), params, about["sizes"], arguments["cache"])


def zeros(said: str, sizes: dict) -> jax.Array:
    """Of a dtype and shape in words, as in float32[2,b,s,2,16]."""
    dtype, shape = said.rstrip("]").split("[")
    return jnp.zeros([int(sizes.get(size, size)) for size in shape.split(",")], dtype)


def greedy(model: Model, prompts: list[list[int]], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """What is written after each prompt, int32 ``[B, n]``, and the logits that it was chosen by, ``[B, n, V]``."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    longest = max(map(len, prompts))
    needed = {"prompts": len(prompts), "tokens a prompt": longest, "tokens in the cache": longest + max_new_tokens}
    sizes = []
    for made_for, (name, size) in zip(model.sizes, needed.items(), strict=True):
        sizes.append(made_for if isinstance(made_for, int) else size)
        if sizes[-1] < size:
            raise ValueError(f"it was exported for {made_for} {name}, got {size}")
    batch, width, _ = sizes
    letters = dict(zip(model.sizes, sizes, strict=True))

    tokens, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
    for row, prompt in enumerate(prompts):  # what rows and columns are left is padding
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    cache = {name: zeros(said, letters) for name, said in model.cache.items()}

    written, chosen_by = [], []
    after = model.prefill(model.params, cache, tokens, mask)
    for i in range(max_new_tokens):
        logits = np.asarray(after["logits"])
        next_token = np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1)).astype(np.int32)
        written.append(next_token[: len(prompts)])
        chosen_by.append(logits[: len(prompts)])
        if i + 1 < max_new_tokens:
            after = model.decode(model.params, after["cache"], next_token)
    return np.stack(written, axis=1), np.stack(chosen_by, axis=1)


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
