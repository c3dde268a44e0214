"""Loads a language model from a Hugging Face model folder."""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rope_jax.interop.config import one_line, read_json
from rope_jax.interop.decoders import read_decoder
from rope_jax.interop.text import read_text
from rope_jax.interop.weights import (
    IMAGE_TOWER,
    check_dtypes,
    open_tensors,
    prefixes,
    read_params,
    stored_dtype,
)
from rope_jax.models.decoder import Decoder


class Checkpoint(NamedTuple):
    """A language model from a file: the result of :func:`load_hf` and :func:`load_gguf`.

    Attributes:
      model: the decoder that the config describes.
      params: its variables.
      config: the contents of config.json, or the metadata of a GGUF file.
      tokenizer: a ``tokenizers.Tokenizer``; None without one.
      stop_tokens: the tokens that end a text, for ``generate(stop_token=...)``; empty without any.
      chat_template: the Jinja template of a chat, as transformers renders it; None without one.
    """

    model: Decoder
    params: dict
    config: dict
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    chat_template: str | None

    def __repr__(self) -> str:
        """The model and its size; the parameters alone would print for minutes."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"Checkpoint({self.model.num_layers} layers, {count:,} parameters, stop_tokens={self.stop_tokens})"


def load_hf(folder, *, dtype=None, param_dtype=None) -> Checkpoint:
    """A Hugging Face language model from a local folder, as a :class:`Decoder`.

    Example:
      >>> import json, pathlib, tempfile, jax.numpy as jnp, numpy as np, rope_jax, safetensors.numpy
      >>> folder = pathlib.Path(tempfile.mkdtemp())  # a small Llama; use the folder of a downloaded model
      >>> config = dict(model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=4, num_hidden_layers=1,
      ...               num_attention_heads=2, tie_word_embeddings=True, max_position_embeddings=64)
      >>> _ = (folder / "config.json").write_text(json.dumps(config))
      >>> layer = {"mlp.gate_proj": (4, 8), "mlp.up_proj": (4, 8), "mlp.down_proj": (8, 4),
      ...          "input_layernorm": (8,), "post_attention_layernorm": (8,)}
      >>> layer |= {f"self_attn.{name}_proj": (8, 8) for name in "qkvo"}
      >>> shapes = {f"layers.0.{name}": shape for name, shape in layer.items()}
      >>> shapes |= {"embed_tokens": (9, 8), "norm": (8,)}
      >>> tensors = {f"model.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
      >>> safetensors.numpy.save_file(tensors, folder / "model.safetensors")
      >>> model, params, *_ = rope_jax.load_hf(folder)
      >>> rope_jax.generate(model, params, jnp.array([[1, 2]]), max_new_tokens=3, temperature=0).tokens.shape
      (1, 3)

    Model types: llama, mistral, qwen2, qwen3, phi3, smollm3, gemma2, gemma3_text, and the text part of gemma3.
    The rotation of each layer is the rotation of :func:`from_hf_config`. Nothing is unpickled, executed or
    downloaded.

    Reads ``config.json`` and ``model.safetensors``, or the shards in ``model.safetensors.index.json``. The text
    side is ``tokenizer.json``, the ``eos_token_id`` of ``generation_config.json`` or ``config.json``, and the
    template in ``chat_template.jinja`` or ``tokenizer_config.json``. Every config key is read, known to be inert
    (dropout, token ids, provenance), or refused. Every tensor must be a parameter and every parameter a tensor,
    with three exceptions:

    - a stored unembedding of tied embeddings, which must equal the embedding;
    - ``rotary_emb.inv_freq`` of old files, which repeats the config;
    - the image tower of gemma3, which is ignored.

    Beside the loaded parameters, one parameter at a time is held on the host, with all its layers.

    Args:
      folder: the path.
      dtype: of the computation; if None, ``param_dtype``, or else the dtype of the stored embedding.
      param_dtype: of the parameters: float32, bfloat16 or float16; if None, each keeps its stored dtype. Pass it if
        ``dtype`` is narrower than the stored weights: otherwise the weights are cast at every call.

    Returns:
      :class:`Checkpoint`: model, params, config, tokenizer, stop_tokens, chat_template.

    Raises:
      ValueError: if a file, a tensor or a key is missing or unknown, a tensor has another shape than the config
        says or is not float32, float16 or bfloat16, or a key asks for something that :class:`Decoder` does not
        have. The message names it.
      TypeError: if ``dtype`` is not floating, or ``param_dtype`` not one of these.
      ImportError: without the packages safetensors and tokenizers; install ``rope_jax[checkpoints]``.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {type(folder).__name__}")
    folder = Path(folder)
    file = folder / "config.json"
    if os.path.isfile(folder):
        raise ValueError(
            f"folder must be a folder, got the file {folder}: name its folder; load_gguf reads GGUF files"
        )
    if not os.path.isfile(file):  # false for a path that is too long
        hint = "" if os.path.isdir(folder) else ", and nothing is downloaded"
        raise ValueError(
            one_line(f"folder must be a local folder that holds {file.name}, got {folder} without it{hint}")
        )
    config = read_json(file)
    check_dtypes(dtype, jnp.float32 if param_dtype is None else param_dtype)
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        if config.get("model_type") == "gemma3":
            tensors = {name: tensor for name, tensor in tensors.items() if not IMAGE_TOWER.match(name)}
        trunk, head = prefixes(tensors)
        stored = stored_dtype(tensors, f"{trunk}embed_tokens.weight")
        stored = stored if param_dtype is None else jnp.dtype(param_dtype)
        model, names = read_decoder(config, stored, dtype)
        names = {module: name.format(trunk=trunk, head=head, layer="{layer}") for module, name in names.items()}
        text = read_text(folder, config, model.vocab_size)  # first: the weights take longer
        params = read_params(model, names, tensors, param_dtype)
    return Checkpoint(model, params, config, *text)
