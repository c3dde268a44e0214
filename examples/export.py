"""Exports a decoder's prefill and decode step to a folder that runs without rope_jax.

    python examples/export.py                                        # a small model with random weights
    python examples/export.py FOLDER --out runs/llama                # a Hugging Face folder
    python examples/export.py FOLDER --sizes "8, 1024, 2048"         # fixed sizes: prefill uses the TPU kernel
    python examples/run_exported.py runs/export --prompt 72 105      # without rope_jax and flax

The folder holds prefill.bin and decode.bin (jax.export: StableHLO, one file for all platforms), params.npz and
about.json, which lists the arguments and results of both functions. The cache is a dictionary of arrays, zeros
before the prefill. If a row outgrows the cache, its logits are NaN. jax reads such files for at least six months
after the version that wrote them. Install with pip install -e ".[export]".
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import export

import rope_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Exports a decoder's prefill and decode step."""

    folder: tyro.conf.Positional[Path | None] = None
    """A Hugging Face folder with config.json and safetensors. Default: a small byte model with random weights."""
    out: Path = Path("runs/export")
    """The folder to write."""
    sizes: str = "b, t, s"
    """Batch, padded prompt length and cache capacity. A number fixes a size; a letter leaves it to each call."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype of the computation. Default: the dtype of the stored weights."""
    context_length: int | None = None
    """The context length of the frequencies, for models whose frequencies depend on it (Phi-3)."""


SMALL = dict(vocab_size=256, num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=176)


def fail(message) -> NoReturn:
    """Ends the program with status 2 and a one-line message for the user."""
    print(f"export: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def build(config: Config) -> tuple[rope_jax.Decoder, dict]:
    if config.folder is not None:
        model, params, *_ = rope_jax.load_hf(config.folder, dtype=config.dtype)
        return model, params
    dtype = jnp.dtype(config.dtype or "float32")
    rope = rope_jax.Rope(SMALL["head_dim"], rope_jax.Standard())
    model = rope_jax.Decoder(**SMALL, rope=rope, dtype=dtype, param_dtype=dtype)
    return model, nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


class Step(NamedTuple):
    """A function to export, and the shapes of its arguments."""

    call: jax.stages.Wrapped
    arguments: dict


def named(tree) -> dict:
    """The leaves of a tree by their paths: a dictionary needs no class of this library."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unnamed(like, arrays: dict):
    """The inverse of `named`: a tree of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in named(like)])


def shape(dtype, *sizes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def steps(model: rope_jax.Decoder, params, sizes, context_length: int | None = None) -> dict[str, Step]:
    """Prefill and decode. Both return the logits ``[B, V]`` of each row's next token, and the new cache."""
    batch, width, capacity = sizes
    empty = jax.eval_shape(lambda: model.init_cache(batch=batch, capacity=capacity))

    def forward(params_by_name, cache, tokens, mask, last):
        variables = unnamed(params, params_by_name)
        options = dict(mask=mask, cache=unnamed(empty, cache), context_length=context_length)
        hidden, new_cache = model.apply(variables, tokens, **options, method="hidden")
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return {"logits": model.apply(variables, hidden, method="unembed"), "cache": named(new_cache)}

    def prefill(params, cache, tokens, mask):
        last = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return forward(params, cache, tokens, mask, last)

    def decode(params, cache, tokens):
        return forward(params, cache, tokens[:, None], None, jnp.zeros_like(tokens))

    common = {"params": named(jax.eval_shape(lambda: params)), "cache": named(empty)}
    prompts = {"tokens": shape(jnp.int32, batch, width), "mask": shape(jnp.bool, batch, width)}
    return {
        "prefill": Step(jax.jit(prefill), common | prompts),
        "decode": Step(jax.jit(decode), common | {"tokens": shape(jnp.int32, batch)}),
    }


def symbolic(sizes: str) -> tuple:
    """Batch, prompt length and capacity, with a symbol for each letter."""
    names = [name.strip() for name in sizes.split(",")]
    letters = [name for name in names if name.isidentifier()]
    fixed = [name for name in names if name.isdecimal() and int(name)]
    if len(names) != 3 or len(set(letters)) + len(fixed) != 3:
        raise ValueError(f"--sizes must be three different letters or numbers, such as 'b, t, s', got {sizes!r}")
    return export.symbolic_shape(sizes)


def described(tree):
    """Dtypes and shapes as text, such as float32[2,b,2,s,16]."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]", tree)


def write(
    folder: Path, model: rope_jax.Decoder, params, sizes: str, platforms, context_length: int | None = None
) -> None:
    """Writes the four files to the folder."""
    symbolic_sizes = symbolic(sizes)
    files, functions = {}, {}
    for name, step in steps(model, params, symbolic_sizes, context_length).items():
        exported = export.export(step.call, platforms=platforms)(*step.arguments.values())
        files[f"{name}.bin"] = exported.serialize()
        functions[name] = {
            "file": f"{name}.bin",
            "arguments": {argument: described(tree) for argument, tree in step.arguments.items()},  # in this order
            "results": described(jax.tree.unflatten(exported.out_tree, exported.out_avals)),
        }
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in files.items():
        (folder / name).write_bytes(program)
    np.savez(folder / "params.npz", **named(params))
    about = {
        "jax": jax.__version__,
        "platforms": platforms,
        "sizes": [size if isinstance(size, int) else str(size) for size in symbolic_sizes],
        "params": "params.npz",
        "functions": functions,
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def main(config: Config) -> None:
    try:
        model, params = build(config)
        write(config.out, model, params, config.sizes, config.platforms, config.context_length)
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    for path in sorted(config.out.iterdir()):
        print(f"{path.stat().st_size:>12,} bytes  {path}")
    prompt = [72, 105]
    options = dict(max_new_tokens=16, temperature=0, context_length=config.context_length)
    tokens = rope_jax.generate(model, params, np.array([prompt]), **options).tokens[0].tolist()
    print(f"rope_jax writes {' '.join(map(str, tokens))}\nThe exported model must write the same tokens:")
    print(f"    python examples/run_exported.py {config.out} --prompt {' '.join(map(str, prompt))}")


if __name__ == "__main__":
    main(tyro.cli(Config))
