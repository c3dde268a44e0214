"""Small GGUF files for tests, written by the package gguf."""

import flax
import gguf
import jax
import numpy as np

# The tensor name of each module of a decoder, in llama.cpp.
NAMES = {
    "embed": "token_embd",
    "layers/attention_norm": "blk.{}.attn_norm",
    "layers/self_attention/query": "blk.{}.attn_q",
    "layers/self_attention/key": "blk.{}.attn_k",
    "layers/self_attention/value": "blk.{}.attn_v",
    "layers/self_attention/query_norm": "blk.{}.attn_q_norm",
    "layers/self_attention/key_norm": "blk.{}.attn_k_norm",
    "layers/self_attention/out": "blk.{}.attn_output",
    "layers/post_attention_norm": "blk.{}.post_attention_norm",
    "layers/mlp_norm": "blk.{}.ffn_norm",
    "layers/gate": "blk.{}.ffn_gate",
    "layers/up": "blk.{}.ffn_up",
    "layers/down": "blk.{}.ffn_down",
    "layers/post_mlp_norm": "blk.{}.post_ffw_norm",
    "final_norm": "output_norm",
    "unembed_kernel": "output",
}


def write(path, architecture="llama", metadata=None, tensors=None, types=None, stored=None):
    """A GGUF file; its path.

    Args:
      path: of the file.
      architecture: its name; None leaves the key out.
      metadata: values by key, where ``.x`` is ``{architecture}.x``. An integer is uint32, a float float32.
      tensors: arrays by name.
      types: the quantized type of each tensor, or of all; None for the type of the array.
      stored: bytes and their type by name, for types that the package gguf cannot write.
    """
    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        writer.kv_data[0].clear()
    for key, value in (metadata or {}).items():
        key = f"{architecture}{key}" if key.startswith(".") else key
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, array in (tensors or {}).items():
        type_ = types.get(name) if isinstance(types, dict) else types
        if type_ is None or array.ndim < 2:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, type_), raw_dtype=type_)
    for name, (array, type_) in (stored or {}).items():
        writer.add_tensor(name, array, raw_dtype=type_)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def tensors_of(params):
    """The tensors of a decoder's variables, as a file of llama.cpp holds them: ``[out, in]``, heads side by side."""
    tensors = {}
    for path, value in flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, params["params"]), sep="/").items():
        module, kind = path.rsplit("/", 1)
        name = NAMES[module] + (".bias" if kind == "bias" else ".weight")
        for i, x in enumerate(value if module.startswith("layers") else value[None]):
            if kind == "kernel":
                x = x.reshape(-1, x.shape[-1]) if module.endswith("/out") else x.reshape(x.shape[0], -1)
                x = x.T
            tensors[name.format(i)] = np.ascontiguousarray(x if x.ndim == 2 and kind != "bias" else x.ravel())
    return tensors


def fuse(tensors):
    """Phi-3's form: queries, keys and values in one tensor, and both parts of the gate in another."""
    fused = dict(tensors)
    for i in range(sum(name.endswith("attn_q.weight") for name in tensors)):
        take = lambda name, i=i: fused.pop(f"blk.{i}.{name}.weight")
        fused[f"blk.{i}.attn_qkv.weight"] = np.concatenate([take("attn_q"), take("attn_k"), take("attn_v")])
        fused[f"blk.{i}.ffn_up.weight"] = np.concatenate([take("ffn_gate"), take("ffn_up")])
    return fused
