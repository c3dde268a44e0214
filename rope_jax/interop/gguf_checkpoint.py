"""Loads a language model from a GGUF file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rope_jax.interop.checkpoint import Checkpoint
from rope_jax.interop.config import Config
from rope_jax.interop.decoders import read_decoder
from rope_jax.interop.gguf_architectures import find_architecture, sliding_layers
from rope_jax.interop.gguf_file import GgufFile, open_gguf
from rope_jax.interop.gguf_rope import head_sizes, metadata_of, read_ropes
from rope_jax.interop.gguf_tokenizer import read_text, without_vocabulary
from rope_jax.interop.layers import FULL, SLIDING
from rope_jax.interop.weights import check_dtypes, read_params
from rope_jax.models.decoder import Decoder


def load_gguf(path, *, dtype=None, param_dtype=jnp.float32) -> Checkpoint:
    """A language model from a GGUF file, as a :class:`Decoder`.

    Example:
      >>> import pathlib, tempfile, gguf, jax.numpy as jnp, numpy as np, rope_jax
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.gguf"  # a small Llama; use a downloaded file
      >>> writer = gguf.GGUFWriter(path, "llama")
      >>> sizes = dict(block_count=1, context_length=64, embedding_length=8, feed_forward_length=4)
      >>> for name, number in sizes.items():
      ...     writer.add_uint32(f"llama.{name}", number)
      >>> writer.add_head_count(2), writer.add_layer_norm_rms_eps(1e-5)
      (None, None)
      >>> shapes = {"token_embd": (9, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
      ...           "blk.0.ffn_gate": (4, 8), "blk.0.ffn_up": (4, 8), "blk.0.ffn_down": (8, 4)}
      >>> shapes |= {f"blk.0.attn_{name}": (8, 8) for name in ("q", "k", "v", "output")}
      >>> for name, shape in shapes.items():
      ...     writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
      >>> for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
      ...     getattr(writer, step)()
      >>> model, params, *_ = rope_jax.interop.load_gguf(path)
      >>> rope_jax.generate(model, params, jnp.array([[1, 2]]), max_new_tokens=3, temperature=0).tokens.shape
      (1, 3)

    Architectures: llama (also of Mistral and SmolLM2 models), qwen2, qwen3, phi3, smollm3, gemma2 and gemma3. The
    rotation of each layer is the rotation of :func:`from_gguf`: no row of a weight is moved. Nothing is downloaded
    or executed.

    All quantized types that the package gguf dequantizes are read, into ``param_dtype``. Every key of the
    architecture is read, known to be inert, or refused. Every tensor must be a parameter and every parameter a
    tensor. Without ``output.weight`` the embeddings are tied. Beside the loaded parameters, one parameter at a time
    is held on the host, with all its layers.

    The tokenizer is the file's own vocabulary: byte-level BPE (``tokenizer.ggml.model`` is ``gpt2``) with its
    merges, or SentencePiece's BPE (``llama``). Stop tokens end a text or an answer in llama.cpp.

    Args:
      path: of the file, or an open ``gguf.GGUFReader``.
      dtype: of the computation; if None, ``param_dtype``.
      param_dtype: of the parameters: float32, bfloat16 or float16.

    Returns:
      :class:`Checkpoint`; ``config`` is the metadata without the lists of the vocabulary.

    Raises:
      ValueError: if the file is broken or one of several parts, a tensor or a key is missing or unknown, a tensor
        has another shape than the metadata says, or a key asks for something that :class:`Decoder` or the tokenizer
        does not have. The message names it.
      FileNotFoundError: if there is no such file.
      TypeError: if a dtype is not one of these, or ``path`` is neither a path nor a reader.
      ImportError: without the packages gguf and tokenizers; install ``rope_jax[gguf]``.
    """
    check_dtypes(dtype, param_dtype)
    file = open_gguf(path)
    if file.architecture not in _FAMILIES:
        file.refuse(f"architecture must be one of {', '.join(_FAMILIES)}, got {file.architecture!r}")
    stored = jnp.dtype(param_dtype)
    tensors = {
        name: dataclasses.replace(tensor, dtype=stored)
        for name, tensor in file.tensors.items()
        if name not in _ROPE_TENSORS
    }
    try:
        model = _model(file, stored, dtype)
        text = read_text(file, model.vocab_size)
        params = read_params(model, _names(file), tensors)
    except ValueError as error:  # of readers that know no file
        if file.name in str(error):
            raise
        file.refuse(str(error))
    return Checkpoint(model, params, without_vocabulary(file.metadata), *text)


_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_TENSORS = {
    "embed": "token_embd",
    "layers/attention_norm": "blk.{layer}.attn_norm",
    "layers/self_attention/query": "blk.{layer}.attn_q",
    "layers/self_attention/key": "blk.{layer}.attn_k",
    "layers/self_attention/value": "blk.{layer}.attn_v",
    "layers/self_attention/query_norm": "blk.{layer}.attn_q_norm",
    "layers/self_attention/key_norm": "blk.{layer}.attn_k_norm",
    "layers/self_attention/out": "blk.{layer}.attn_output",
    "layers/post_attention_norm": "blk.{layer}.post_attention_norm",
    "layers/mlp_norm": "blk.{layer}.ffn_norm",
    "layers/gate": "blk.{layer}.ffn_gate",
    "layers/up": "blk.{layer}.ffn_up",
    "layers/down": "blk.{layer}.ffn_down",
    "layers/post_mlp_norm": "blk.{layer}.post_ffw_norm",
    "final_norm": "output_norm",
    "unembed_kernel": "output",
}
# Phi-3's: queries, keys and values are rows of one tensor, and so are the two parts of the gate.
_FUSED_QKV = {f"layers/self_attention/{name}": "blk.{layer}.attn_qkv" for name in ("query", "key", "value")}
_FUSED_GATE = {"layers/gate": "blk.{layer}.ffn_up", "layers/up": "blk.{layer}.ffn_up"}


def _names(file: GgufFile) -> dict[str, str]:
    """The tensor name of each module of the decoder."""
    names = dict(_TENSORS)
    if "blk.0.attn_qkv.weight" in file.tensors:
        names |= _FUSED_QKV
    if file.architecture == "phi3" and "blk.0.ffn_gate.weight" not in file.tensors:
        names |= _FUSED_GATE
    return names


def _model(file: GgufFile, stored: np.dtype, dtype) -> Decoder:
    config = metadata_of(file)
    values = _hf_config(file, config)
    model_rope = read_ropes(file)
    config.refuse_unread(_CONSTANTS, inert=_is_inert)
    model, _ = read_decoder(values, stored, dtype)
    ropes = tuple(layer.rope for layer in model_rope.layers)
    # llama.cpp's converters add Gemma's offset to the stored scales.
    changes: dict[str, Any] = dict(rope=ropes[0] if len(set(ropes)) == 1 else ropes, norm_unit_offset=False)
    if file.architecture == "llama":
        for field, tensor in (("qkv_bias", "attn_q"), ("out_bias", "attn_output"), ("mlp_bias", "ffn_gate")):
            changes[field] = f"blk.0.{tensor}.bias" in file.tensors
    return model.clone(**changes)


# Keys that would change the computation at any other value.
_CONSTANTS: dict[str, tuple] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
}


def _is_inert(key: str) -> bool:
    """Whether a key has been read by :func:`read_ropes`, or does not change a forward pass."""
    return key.startswith("rope") or key in ("context_length", "tensor_data_layout")


def _hf_config(file: GgufFile, config: Config) -> dict[str, Any]:
    """The metadata in the keys of a Hugging Face config, as :func:`read_decoder` reads them; without rotation."""
    head_dim, queries, keys = head_sizes(config)
    for key, numbers in (("attention.head_count", queries), ("attention.head_count_kv", keys)):
        if len(set(numbers)) != 1 or not numbers[0]:
            config.refuse(f"{key} must be the same number above 0 in all layers, got {numbers}")
    if (value := config.get("attention.value_length", head_dim)) != head_dim:
        config.refuse(f"attention.value_length must be attention.key_length = {head_dim}, got {value}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        file.refuse(f"tensors must include token_embd.weight, got {len(file.tensors)} without it")
    if (rows := config.get("vocab_size", embedding.shape[0])) != embedding.shape[0]:
        config.refuse(f"vocab_size must be the rows of token_embd.weight, {embedding.shape[0]}, got {rows}")

    def integer(key: str) -> int:
        return config.integer(key, config.need(key))

    epsilon = config.number("attention.layer_norm_rms_epsilon")
    if epsilon <= 0:
        config.refuse(f"attention.layer_norm_rms_epsilon must be above 0, got {epsilon}")
    return dict(
        vocab_size=embedding.shape[0],
        hidden_size=integer("embedding_length"),
        num_hidden_layers=len(queries),
        num_attention_heads=queries[0],
        num_key_value_heads=keys[0],
        head_dim=head_dim,
        intermediate_size=integer("feed_forward_length"),
        rms_norm_eps=epsilon,
        tie_word_embeddings="output.weight" not in file.tensors,
        max_position_embeddings=integer("context_length"),
    ) | _FAMILIES[file.architecture](file, config, head_dim)


def _window(config: Config, default: int | None = None) -> int | None:
    """The sliding window; None if there is none."""
    key = "attention.sliding_window"
    window = config.get(key, default)
    return config.integer(key, window) if window else None


def _llama(file: GgufFile, config: Config, head_dim: int) -> dict[str, Any]:
    window = _window(config)
    return dict(model_type="llama") if window is None else dict(model_type="mistral", sliding_window=window)


def _phi3(file: GgufFile, config: Config, head_dim: int) -> dict[str, Any]:
    return dict(model_type="phi3", sliding_window=_window(config))


def _gemma(
    file: GgufFile, config: Config, head_dim: int, model_type: str, layers_of_27b: int, window: int | None
) -> dict[str, Any]:
    heads, count = head_sizes(config)[1][0], len(head_sizes(config)[1])
    width = config.integer("embedding_length", config.need("embedding_length"))
    slides = sliding_layers(config, find_architecture(file.architecture, file.name), count)
    window = _window(config, window)
    if any(slides) and window is None:
        config.refuse("attention.sliding_window must be above 0 if layers slide, got none")
    return dict(
        model_type=model_type,
        # Of the models of 27B, llama.cpp divides scores by sqrt(D/N).
        query_pre_attn_scalar=width // heads if count == layers_of_27b else head_dim,
        sliding_window=window,
        layer_types=[SLIDING if slide else FULL for slide in slides],
    )


def _gemma2(file: GgufFile, config: Config, head_dim: int) -> dict[str, Any]:
    return _gemma(file, config, head_dim, "gemma2", 46, 4096) | dict(
        attn_logit_softcapping=config.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=config.number("final_logit_softcapping", 30.0),
    )


def _gemma3(file: GgufFile, config: Config, head_dim: int) -> dict[str, Any]:
    return _gemma(file, config, head_dim, "gemma3_text", 62, None) | dict(
        final_logit_softcapping=config.number("final_logit_softcapping", None)
    )


def _only(model_type: str) -> Callable[[GgufFile, Config, int], dict[str, Any]]:
    return lambda file, config, head_dim: dict(model_type=model_type)


# By architecture: the differences of a config from Llama's.
_FAMILIES: Mapping[str, Callable[[GgufFile, Config, int], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _only("qwen2"),
    "qwen3": _only("qwen3"),
    "phi3": _phi3,
    "smollm3": _only("smollm3"),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
