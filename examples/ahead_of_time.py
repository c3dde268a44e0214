"""Compiles a training step and a decode step for TPU chips ahead of time, and prints the memory of each chip.

    python examples/ahead_of_time.py                                          # one v5e host: four chips
    python examples/ahead_of_time.py --topology v5p:2x2x2 --mesh data=4,sequence=1,model=2
    python examples/ahead_of_time.py --mesh data=1,sequence=4,model=1 --batch 1 --length 65536

The TPU compiler (libtpu) runs on any Linux machine. No TPU is needed, and nothing is run on one. A topology is a
generation and its grid of chips, in whole hosts of four: v5e:4x4, v5p:2x2x4. The mesh has three axes. The batch is
divided over data; the tokens of a row over sequence (ring attention); heads, MLP and vocabulary over model.
Parameters and optimizer state are divided over all three. Install with pip install -e ".[train,tpu]".
"""

import dataclasses
import math
import os
import re
import sys
from typing import NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import rope_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles a small Llama-shaped decoder for a TPU topology and prints the memory of each chip."""

    topology: str = "v5e:2x2"
    mesh: str = "data=2,sequence=1,model=2"

    vocab_size: int = 32_000
    num_layers: int = 4
    width: int = 1024
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 128
    mlp_dim: int = 2816
    batch: int = 8
    length: int = 1024
    """Tokens in a training sequence; also the capacity of the cache."""


RULES = (
    ("batch", "data"),
    ("kv_length", "sequence"),
    ("embed", ("data", "sequence")),
    ("vocab", "model"),
    ("heads", "model"),
    ("kv_heads", "model"),
    ("mlp", "model"),
)
MIB = 2**20


def fail(message) -> NoReturn:
    """Ends the program with status 2 and a one-line message for the user."""
    print(f"ahead_of_time: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def chips(topology: str):
    """The devices of a topology, which this machine need not have."""
    # Without these, libtpu asks the network for the machine type and refuses a second process.
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, "tpu").devices


def build_mesh(devices, data: int, sequence: int, model: int) -> Mesh:
    devices = np.array(devices).reshape(data, sequence, model)
    return Mesh(devices, ("data", "sequence", "model"), axis_types=(AxisType.Auto,) * 3)


def build_model(mesh: Mesh, ring: bool, **sizes) -> rope_jax.Decoder:
    rope = rope_jax.Rope(sizes["head_dim"], rope_jax.Standard(base=500_000.0))
    return rope_jax.Decoder(
        **sizes,
        rope=rope,
        tie_embeddings=False,
        remat=True,
        dtype=jnp.bfloat16,
        ring_axis="sequence" if ring else None,
        activation_sharding=NamedSharding(mesh, PartitionSpec("data", "sequence")),
    )


def variables(model: rope_jax.Decoder):
    """The shapes of the model's parameters, with their logical axis names."""
    unsharded = model.clone(ring_axis=None, activation_sharding=None)  # parameters depend on neither
    return jax.eval_shape(lambda: unsharded.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


def with_sharding(tree, shardings):
    """The shapes and dtypes of a tree, each with its sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def lower_training(model: rope_jax.Decoder, mesh: Mesh, batch: int, length: int) -> jax.stages.Lowered:
    """Lowers one step of AdamW. The state is donated and keeps its sharding."""
    optimizer = optax.adamw(1e-3)
    # The zigzag order gives every chip of a ring the same share of the causal attention.
    sequence_index = (
        None
        if model.ring_axis is None
        else rope_jax.attention.zigzag_sequence_index(length, mesh.shape["sequence"])[None]
    )

    def step(state, tokens, labels):
        def loss(params):
            logits = model.apply(params, tokens, sequence_index=sequence_index)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}, value

    params = variables(model)
    boxed = {"params": params, "optimizer": jax.eval_shape(optimizer.init, params)}
    state_sharding = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    divided, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", "sequence"), ()))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=divided)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, replicated))
        return jitted.lower(with_sharding(nn.unbox(boxed), state_sharding), tokens, tokens)


def lower_decoding(model: rope_jax.Decoder, mesh: Mesh, batch: int, capacity: int) -> jax.stages.Lowered:
    """Lowers one greedy decode step. The cache is donated and keeps its sharding."""
    rows = NamedSharding(mesh, PartitionSpec("data"))
    model = model.clone(ring_axis=None, activation_sharding=rows)
    boxed = variables(model)
    params_sharding = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    cache = jax.eval_shape(lambda: model.init_cache(batch=batch, capacity=capacity))
    cache_sharding = nn.logical_to_mesh_sharding(rope_jax.attention.cache_partition_spec(cache), mesh, RULES)

    def step(params, cache, tokens):
        logits, cache = model.apply(params, tokens[:, None], cache=cache)
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), cache

    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(rows, cache_sharding))
    params = with_sharding(nn.unbox(boxed), params_sharding)
    return jitted.lower(params, with_sharding(cache, cache_sharding), tokens)


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on one chip: arguments, results that do not reuse a donated argument, and the peak."""
    analysis = compiled.memory_analysis()
    return {
        "arguments": analysis.argument_size_in_bytes,
        "new results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "peak": analysis.peak_memory_in_bytes,
    }


def main(config: Config) -> None:
    jax.config.update("jax_platforms", "cpu")  # leaves a TPU of this machine alone
    # A program for a TPU cannot be loaded from the cache on a machine without one.
    jax.config.update("jax_enable_compilation_cache", False)
    names = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    try:
        devices = chips(config.topology)
        axes = re.fullmatch(r"data=(\d+),sequence=(\d+),model=(\d+)", config.mesh)
        sizes = [int(size) for size in axes.groups()] if axes else [0]
        if math.prod(sizes) != (count := len(devices)):
            fail(f"--mesh must be data=I,sequence=J,model=K with I * J * K = {count} chips, got {config.mesh}")
        mesh = build_mesh(devices, *sizes)
        model = build_model(mesh, mesh.shape["sequence"] > 1, **{name: getattr(config, name) for name in names})
        lowered = {
            "training step": lower_training(model, mesh, config.batch, config.length),
            "decode step": lower_decoding(model, mesh, config.batch, config.length),
        }
    except (ValueError, TypeError, ImportError, jax.errors.JaxRuntimeError) as error:
        fail(error)
    print(f"{config.topology}, {config.mesh}: compiled, not run. Memory of each chip in MiB:")
    for name, step in lowered.items():
        try:
            parts = [f"{part} {size / MIB:,.1f}" for part, size in memory(step.compile()).items()]
            print(f"  {name}: {', '.join(parts)}")
        except jax.errors.JaxRuntimeError as error:  # the program does not fit; the message says by how much
            print(f"  {name}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(tyro.cli(Config))
