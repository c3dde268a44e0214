"""The libraries to compare with: how each rotates queries and keys through its own public functions.

A peer is called through its own public function, with its own arrays and order of axes. If a peer is not installed
or has no such function, a sentence stands in its place. jax peers are jitted and torch peers run without gradients,
as in use. All preparation happens outside the timed call.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rope_jax

os.environ["KERAS_BACKEND"] = "jax"  # read when keras is first imported, and other peers import it too


class Recipe(NamedTuple):
    """What every peer is asked for: ``length`` is one more than the largest position."""

    layout: str
    base: float
    head_dim: int
    rotary_dim: int
    length: int
    dtype: str


class Peer(NamedTuple):
    """The doors of one peer; a sentence where it has none.

    Attributes:
      family: whose arrays, and who runs it: ``"jax"``, ``"torch"`` or ``"torch.compile"``.
      rotation: ``positions [B, T]`` to what ``turn`` takes, made once for all layers.
      turn: ``(q, k, rotation)`` to q and k, turned.
      place: ``(q, k, positions)`` to the same, with the angles.
      decode: the same for one token in each row, every row at its own position.
      arithmetic: the dtype in which the products are formed.
      heads_first: whether q is a view ``[B, N, T, H]`` of an array ``[B, T, N, H]``, as after a projection.
    """

    family: str
    rotation: Callable
    turn: Callable | str
    place: Callable | str
    decode: Callable | str
    arithmetic: str = "float32"
    heads_first: bool = False


# ------------------------------------------------------------------------------------------- the doors

EVERY_CALL = "computes cos and sin in every call"
WHOLE_HALVES = "turns whole heads by halves only"


def nothing(positions) -> None:
    """The rotation of a peer that keeps its own table."""


def whole_halves(recipe: Recipe) -> bool:
    return recipe.layout == "half" and recipe.rotary_dim == recipe.head_dim


def ours(recipe: Recipe) -> Peer:
    schedule = rope_jax.Standard(base=recipe.base)
    rope = rope_jax.Rope(recipe.head_dim, schedule, rotary_dim=recipe.rotary_dim, layout=recipe.layout)

    def turn(q, k, rotation):
        return rope.rotate(q, rotation), rope.rotate(k, rotation)

    return Peer("jax", rope.rotation, turn, rope, rope)


def split_and_concatenate(recipe: Recipe) -> Peer:
    """The formula as it is usually written in jax.numpy."""
    size = recipe.rotary_dim

    def rotation(positions):
        inv_freq = recipe.base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
        angles = positions[..., None, None].astype(jnp.float32) * inv_freq
        return jnp.cos(angles), jnp.sin(angles)

    def half(x, cos, sin):
        first, second, rest = jnp.split(x.astype(jnp.float32), [size // 2, size], axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1).astype(x.dtype)

    def interleaved(x, cos, sin):
        first, second = (x[..., i:size:2].astype(jnp.float32) for i in (0, 1))
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
        return jnp.concatenate([turned.reshape(*x.shape[:-1], size), x[..., size:]], -1)

    formula = {"half": half, "interleaved": interleaved}[recipe.layout]

    def turn(q, k, rotation):
        return formula(q, *rotation), formula(k, *rotation)

    def place(q, k, positions):
        return turn(q, k, rotation(positions))

    return Peer("jax", rotation, turn, place, place)


def equinox(recipe: Recipe) -> Peer | str:
    import equinox as eqx

    if not whole_halves(recipe):
        return WHOLE_HALVES
    rope = eqx.nn.RotaryPositionalEmbedding(recipe.head_dim, theta=recipe.base)
    heads = jax.vmap(jax.vmap(rope, in_axes=1, out_axes=1))  # rope turns [T, H]
    no_positions = "takes no positions"  # its table from 0 on is a constant of the program
    return Peer("jax", nothing, lambda q, k, _: (heads(q), heads(k)), no_positions, no_positions)


def flax(recipe: Recipe) -> Peer | str:
    from flax import nnx, version

    if not hasattr(nnx, "RoPE"):
        return f"flax {version.__version__} has no nnx.RoPE"
    if not whole_halves(recipe):
        return WHOLE_HALVES
    rope = nnx.RoPE(theta=recipe.base, embedding_size=recipe.head_dim, max_seq_len=recipe.length)
    heads = jax.vmap(rope, in_axes=-2, out_axes=-2)

    def place(q, k, positions):
        at = jax.vmap(lambda x: rope(x, positions[0]), in_axes=-2, out_axes=-2)
        return at(q), at(k)

    return Peer("jax", nothing, lambda q, k, _: (heads(q), heads(k)), place, "one row of positions for all")


def keras_hub(recipe: Recipe) -> Peer | str:
    import keras_hub as library

    if not whole_halves(recipe):
        return WHOLE_HALVES
    layer = library.layers.RotaryEmbedding(max_wavelength=recipe.base, dtype=recipe.dtype)

    def place(q, k, positions):
        return layer(q, positions=positions), layer(k, positions=positions)

    return Peer("jax", nothing, EVERY_CALL, place, place, arithmetic=recipe.dtype)


def gemma(recipe: Recipe) -> Peer | str:
    from gemma.gm.math import apply_rope

    if not whole_halves(recipe):
        return WHOLE_HALVES
    turn = functools.partial(apply_rope, base_frequency=recipe.base)

    def place(q, k, positions):
        return turn(q, positions), turn(k, positions)

    return Peer("jax", nothing, EVERY_CALL, place, place)


def rotary_embedding_torch(recipe: Recipe) -> Peer | str:
    from rotary_embedding_torch import RotaryEmbedding

    if recipe.layout != "interleaved":
        return "turns interleaved pairs only"
    rope = RotaryEmbedding(recipe.rotary_dim, theta=recipe.base)

    def place(q, k, _):  # the positions from 0 on are its own
        return rope.rotate_queries_or_keys(q), rope.rotate_queries_or_keys(k)

    return Peer("torch", nothing, EVERY_CALL, place, "one offset for all rows", heads_first=True)


def transformers(recipe: Recipe, *, family: str) -> Peer:
    """Llama's function; that of GPT-NeoX turns a part of each head, that of GLM interleaved pairs."""
    import torch
    from transformers import AutoConfig

    whole = recipe.rotary_dim == recipe.head_dim
    model, name = ("llama", "Llama") if whole else ("gpt_neox", "GPTNeoX")
    if recipe.layout == "interleaved":
        model, name = "glm", "Glm"
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    share = recipe.rotary_dim / recipe.head_dim
    config = AutoConfig.for_model(
        model,
        hidden_size=recipe.head_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=recipe.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.base, "partial_rotary_factor": share},
    )
    embedding = getattr(module, f"{name}RotaryEmbedding")(config=config)
    rotation = functools.partial(embedding, torch.empty(0, dtype=getattr(torch, recipe.dtype)))

    def turn(q, k, rotation):
        return module.apply_rotary_pos_emb(q, k, *rotation)

    def place(q, k, positions):
        return turn(q, k, embedding(q, positions))

    return Peer(family, rotation, turn, place, place, arithmetic=recipe.dtype, heads_first=True)


OURS = "rope_jax"
PEERS: dict[str, Callable[[Recipe], Peer | str]] = {
    OURS: ours,
    "split and concatenate": split_and_concatenate,
    "equinox": equinox,
    "flax": flax,
    "keras-hub": keras_hub,
    "gemma": gemma,
    "rotary-embedding-torch": rotary_embedding_torch,
    "transformers": functools.partial(transformers, family="torch"),
    "transformers compiled": functools.partial(transformers, family="torch.compile"),
}
PACKAGES = ("equinox", "flax", "keras-hub", "gemma", "rotary-embedding-torch", "torch", "transformers")


def peer(name: str, recipe: Recipe) -> Peer | str:
    """The doors of a peer, or why there are none."""
    try:
        return PEERS[name](recipe)
    except ImportError as error:
        return f"not installed: {error}"


# ------------------------------------------------------------------------------------------- the calls


def forward(family: str, function: Callable, *arguments) -> Callable:
    """``function(*arguments)`` as the family runs it, ready to be called."""
    if family == "jax":
        return functools.partial(jax.jit(function), *arguments)
    import torch

    function = compiled(function) if family == "torch.compile" else function
    return functools.partial(torch.no_grad()(function), *arguments)


def backward(family: str, function: Callable, q, k, *rest) -> Callable:
    """Pulls a cotangent back through ``function(q, k, *rest)``: q and k serve as one, the function is linear."""
    if family == "jax":
        outputs, pull = jax.vjp(jax.jit(lambda q, k: function(q, k, *rest)), q, k)
        cotangents = tuple(x.astype(y.dtype) for x, y in zip((q, k), outputs, strict=True))
        return functools.partial(jax.jit(lambda pull, cotangents: pull(cotangents)), pull, cotangents)
    import torch

    function = compiled(function) if family == "torch.compile" else function
    inputs = [x.detach().requires_grad_() for x in (q, k)]
    outputs = function(*inputs, *rest)
    return lambda: torch.autograd.grad(outputs, inputs, grad_outputs=(q, k), retain_graph=True)


def compiled(function: Callable) -> Callable:
    """Anew, so that no shape seen before makes torch compile for all shapes at once."""
    import torch

    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def own(family: str, x: np.ndarray, dtype: str, heads_first: bool = False):
    """``x`` in the arrays of a family."""
    if family == "jax":
        return jnp.asarray(x).astype(dtype)
    import torch

    x = torch.from_numpy(x).to(getattr(torch, dtype))
    return x.transpose(1, 2) if heads_first else x


def read(family: str, x, heads_first: bool = False) -> tuple[np.ndarray, str]:
    """float32 ``[B, T, N, H]`` of what a peer returned, and the name of its dtype."""
    if family == "jax":
        return np.asarray(x.astype(jnp.float32)), x.dtype.name
    dtype = str(x.dtype).removeprefix("torch.")
    x = x.detach().float()
    return (x.transpose(1, 2) if heads_first else x).numpy(), dtype
