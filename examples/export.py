"""Writes a decoder to a folder that runs without rope_jax: its prefill, its decode step and its parameters.

    python examples/export.py                                        # a small model with random weights
    python examples/export.py FOLDER --out runs/llama                # one that rope_jax.load_hf reads
    python examples/export.py FOLDER --sizes "8, 1024, 2048"         # fixed sizes: a TPU's prefill has the kernel
    python examples/run_exported.py runs/export --prompt 72 105      # with jax and numpy alone

The folder holds prefill.bin and decode.bin (of jax.export: StableHLO, one file for all platforms), params.npz, and
about.json, which says what goes in and what comes out. A cache is a dictionary of arrays there, zeros before the
prefill; a row that outgrows it is NaN. jax reads such files for at least six months after the version that wrote
them. Needs the extra train, and checkpoints for a FOLDER: pip install -e ".[train,checkpoints]".
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
    """config.json and safetensors of Hugging Face's making. Default: a small byte model with random weights."""
    out: Path = Path("runs/export")
    """Where the files go."""
    sizes: str = "b, t, s"
    """Batch, padded length of the prompts and capacity of the cache: a letter for one that each call may choose."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the computation. Default: what the weights are stored in."""
    length: int | None = None
    """Of the context that the frequencies are for, in models that ask (Phi-3)."""


SMALL = dict(vocab_size=256, num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=176)


def fail(message) -> NoReturn:
    """One line for what the user can mend, exit status 2."""
    print(f"export: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def build(config: Config) -> tuple[rope_jax.Decoder, dict]:
    if config.folder is not None:
        model, params, _ = rope_jax.load_hf(config.folder, dtype=config.dtype)
        return model, params
    dtype = jnp.dtype(config.dtype or "float32")
    rope = rope_jax.Rope(SMALL["head_dim"], rope_jax.Standard())
    model = rope_jax.Decoder(**SMALL, rope=rope, dtype=dtype, param_dtype=dtype)
    return model, nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


class Step(NamedTuple):
    """A function of arrays and of dictionaries of arrays, and the shapes that it is for."""

    call: jax.stages.Wrapped
    arguments: dict


def named(tree) -> dict:
    """The leaves of a tree by their path: what is left of it where its classes are not known."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unnamed(like, arrays: dict):
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in named(like)])


def shape(dtype, *sizes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def steps(model: rope_jax.Decoder, params, sizes, length: int | None = None) -> dict[str, Step]:
    """Prefill and decode: both give the logits ``[B, V]`` of each row's next token, and the cache from there on."""
    batch, width, capacity = sizes
    empty = jax.eval_shape(lambda: model.init_cache(batch=batch, capacity=capacity))

    def forward(params_by_name, cache, tokens, mask, last):
        variables = unnamed(params, params_by_name)
        how = dict(mask=mask, cache=unnamed(empty, cache), context_length=length)
        hidden, after = model.apply(variables, tokens, **how, method="hidden")
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return {"logits": model.apply(variables, hidden, method="unembed"), "cache": named(after)}

    def prefill(params, cache, tokens, mask):
        last = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return forward(params, cache, tokens, mask, last)

    def decode(params, cache, tokens):
        return forward(params, cache, tokens[:, None], None, jnp.zeros_like(tokens))

    start = {"params": named(jax.eval_shape(lambda: params)), "cache": named(empty)}
    prompts = {"tokens": shape(jnp.int32, batch, width), "mask": shape(jnp.bool, batch, width)}
    return {
        "prefill": Step(jax.jit(prefill), start | prompts),
        "decode": Step(jax.jit(decode), start | {"tokens": shape(jnp.int32, batch)}),
    }


def symbolic(sizes: str) -> tuple:
    """Batch, width and capacity: numbers, and symbols for letters."""
    names = [name.strip() for name in sizes.split(",")]
    letters = [name for name in names if name.isidentifier()]
    fixed = [name for name in names if name.isdecimal() and int(name)]
    if len(names) != 3 or len(set(letters)) + len(fixed) != 3:
        raise ValueError(f"--sizes must be three letters or numbers, as in 'b, t, s', got {sizes!r}")
    return export.symbolic_shape(sizes)


def said(tree):
    """Dtypes and shapes in words, as in float32[2,b,s,2,16]."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]", tree)


def write(folder: Path, model: rope_jax.Decoder, params, sizes: str, platforms, length: int | None = None) -> None:
    """Leaves the four files in the folder."""
    made_for = symbolic(sizes)
    files, functions = {}, {}
    for name, step in steps(model, params, made_for, length).items():
        exported = export.export(step.call, platforms=platforms)(*step.arguments.values())
        files[f"{name}.bin"] = exported.serialize()
        functions[name] = {
            "file": f"{name}.bin",
            "arguments": {argument: said(tree) for argument, tree in step.arguments.items()},  # in this order
            "results": said(jax.tree.unflatten(exported.out_tree, exported.out_avals)),
        }
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in files.items():
        (folder / name).write_bytes(program)
    np.savez(folder / "params.npz", **named(params))
    about = {
        "jax": jax.__version__,
        "platforms": platforms,
        "sizes": [size if isinstance(size, int) else str(size) for size in made_for],
        "params": "params.npz",
        "functions": functions,
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def main(config: Config) -> None:
    try:
        model, params = build(config)
        write(config.out, model, params, config.sizes, config.platforms, config.length)
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    for path in sorted(config.out.iterdir()):
        print(f"{path.stat().st_size:>12,} bytes  {path}")
    prompt = [72, 105]
    how = dict(max_new_tokens=16, temperature=0, context_length=config.length)
    tokens = rope_jax.generate(model, params, np.array([prompt]), **how).tokens[0].tolist()
    print(f"rope_jax goes on with {' '.join(map(str, tokens))}\nas must do, without it:")
    print(f"    python examples/run_exported.py {config.out} --prompt {' '.join(map(str, prompt))}")


if __name__ == "__main__":
    main(tyro.cli(Config))
