"""Reads the tensors of a model folder into the parameters of a decoder."""

import contextlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rope_jax.interop.config import one_line, read_json
from rope_jax.models.decoder import Decoder

Tensors = Mapping[str, Any]
"""Slices of safetensors files by tensor name: indexing one reads it."""

IMAGE_TOWER = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> Tensors:
    """Every tensor of a folder by its name, not yet read. The stack keeps the files open.

    Raises:
      ValueError: if a file is missing or broken, or the index does not match the files.
      ImportError: without the package safetensors; the message names the extra.
    """
    try:
        import safetensors  # an optional dependency
    except ImportError:
        raise ImportError(
            "model folders need the package safetensors: pip install 'rope_jax[checkpoints]'"
        ) from None

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files, file_of = ["model.safetensors"], None
    elif index.is_file():
        file_of = read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
            raise ValueError(f"{index} must hold a weight_map from tensors to files")
        files = sorted(set(file_of.values()))
    else:
        raise ValueError(f"folder must hold model.safetensors or {index.name}, got {folder} without them")
    tensors, found = {}, {}
    for file in files:
        if Path(file).name != file or not os.path.isfile(folder / file):
            raise ValueError(one_line(f"{index} must name files that are in the folder, got {file!r}: download it"))
        try:
            opened = stack.enter_context(safetensors.safe_open(folder / file, framework="np"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{folder / file} must be a safetensors file: {error}") from None
        for name in opened.keys():  # noqa: SIM118, not a dictionary
            tensors[name], found[name] = opened.get_slice(name), file
    if file_of is not None and file_of != found:
        name = min(name for name in file_of | found if file_of.get(name) != found.get(name))
        right, wrong = found.get(name, "no file"), file_of.get(name, "no file")
        raise ValueError(one_line(f"{index} must name the file of each tensor: {name} is in {right}, got {wrong}"))
    return tensors


def prefixes(tensors: Tensors) -> tuple[str, str]:
    """The prefix of the names of the layers, and the name of the unembedding."""
    for outer, inner in (("", "model."), ("language_model.", "model."), ("", "model.language_model.")):
        if f"{outer}{inner}embed_tokens.weight" in tensors:
            return outer + inner, f"{outer}lm_head"
    raise ValueError(f"tensors must include model.embed_tokens.weight, got {_shortened(sorted(tensors)) or 'none'}")


def stored_dtype(tensors: Tensors, name: str) -> np.dtype:
    stored = tensors[name].get_dtype()
    if stored not in _DTYPES:
        raise ValueError(f"tensor {name} must be stored as {', '.join(_DTYPES)}, got {stored}")
    return _DTYPES[stored]


def read_params(model: Decoder, names: Mapping[str, str], tensors: Tensors, dtype=None) -> dict:
    """The variables of a model. One parameter at a time is held on the host, with all its layers.

    Args:
      model: the decoder.
      names: the tensor name of each module, without ``.weight``; ``{layer}`` stands for the layer's number.
      tensors: from :func:`open_tensors`.
      dtype: of the parameters; the stored dtype if None.

    Raises:
      ValueError: if a tensor is missing, unexpected, or has another shape or dtype than the model.
    """
    no_rope = model.clone(rope=None)  # a rope has no parameters, and might ask for a context length
    shapes = jax.eval_shape(no_rope.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    shapes = flax.traverse_util.flatten_dict(nn.unbox(shapes), sep="/")
    rows_of, expected = _layout(shapes, names)
    layers = range(model.num_layers)
    expected = {name: expected[tensor] for tensor in expected for name in _tensor_names(tensor, layers)}
    tied = (f"{names['embed']}.weight", f"{names['unembed_kernel']}.weight") if model.tie_embeddings else None
    _check_tensors(tensors, expected, tied)

    params = {}
    for path, (tensor, rows) in rows_of.items():
        layer_names = _tensor_names(tensor, layers)
        dtypes = {name: stored_dtype(tensors, name) for name in layer_names}
        if len(set(dtypes.values())) != 1:
            raise ValueError(f"tensors {tensor} must be stored alike in all layers, got {dtypes}")
        param = np.empty(shapes[path].shape, dtypes[layer_names[0]])
        for layer, name in zip(param if "{layer}" in tensor else param[None], layer_names, strict=True):
            read = tensors[name][rows]
            layer[...] = (read.T if path.endswith("/kernel") else read).reshape(layer.shape)
        params[path] = _narrowed(param, dtype, tensor)
    return {"params": flax.traverse_util.unflatten_dict(params, sep="/")}


def check_dtypes(dtype, param_dtype) -> None:
    """Raises TypeError unless a model can compute in ``dtype`` and keep ``param_dtype``."""
    if dtype is not None and not (_is_dtype(dtype) and jnp.issubdtype(dtype, jnp.floating)):
        raise TypeError(f"dtype must be floating, got {dtype}")
    if param_dtype is None or not (_is_dtype(param_dtype) and jnp.dtype(param_dtype) in _DTYPES.values()):
        raise TypeError(f"param_dtype must be float32, bfloat16 or float16, got {param_dtype}")


def _is_dtype(dtype) -> bool:
    try:
        jnp.dtype(dtype)
    except TypeError:
        return False
    return True


def _narrowed(param: np.ndarray, dtype, name: str) -> jax.Array:
    """The parameter in another dtype; ValueError if that makes a number infinite."""
    if dtype is None or param.dtype == dtype:
        return jnp.asarray(param)
    with np.errstate(over="ignore"):
        narrow = param.astype(dtype)
    if not np.isfinite(narrow).all() and np.isfinite(param).all():
        largest = np.abs(param.astype(np.float32)).max()
        raise ValueError(f"tensors {name} must fit in {jnp.dtype(dtype)}, got numbers up to {largest:.3g}")
    return jnp.asarray(narrow)


class _Rows(NamedTuple):
    """The part of a tensor that holds one parameter."""

    tensor: str
    rows: slice


def _layout(shapes, names: Mapping[str, str]) -> tuple[dict[str, _Rows], dict[str, tuple[int, ...]]]:
    """The rows of each parameter, and the shape of each tensor: ``[rows]`` or ``[rows, columns]``.

    Modules with the same tensor name are its rows, in the order of ``names``.
    """
    rows_of: dict[str, _Rows] = {}
    tensor_shapes: dict[str, tuple[int, ...]] = {}
    for module, name in names.items():
        for kind in ("embedding", "kernel", "bias", "scale"):
            path = f"{module}/{kind}"
            if path not in shapes:
                continue
            shape = shapes[path].shape[1:] if "{layer}" in name else shapes[path].shape
            tensor = name + (".bias" if kind == "bias" else ".weight")
            columns = shape[1:] if kind == "embedding" else ()
            if kind == "kernel":  # torch stores [out, in]
                columns = (math.prod(shape[:2] if module.endswith("/out") else shape[:1]),)
            rows = math.prod(shape) // math.prod(columns)
            start = tensor_shapes.get(tensor, (0,))[0]
            tensor_shapes[tensor] = (start + rows, *columns)
            rows_of[path] = _Rows(tensor, slice(start, start + rows))
    assert rows_of.keys() == shapes.keys()
    return rows_of, tensor_shapes


def _tensor_names(tensor: str, layers: range) -> list[str]:
    return [tensor.format(layer=layer) for layer in layers] if "{layer}" in tensor else [tensor]


def _check_tensors(tensors: Tensors, expected: Mapping[str, tuple[int, ...]], tied: tuple[str, str] | None) -> None:
    """Raises ValueError unless the files hold every expected tensor and no unexpected one."""
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(f"tensors must include {_shortened(missing)}, got files without")
    for name, shape in expected.items():
        if tuple(tensors[name].get_shape()) != shape:
            raise ValueError(f"tensor {name} must have shape {shape}, got {tuple(tensors[name].get_shape())}")
    extra = tensors.keys() - expected.keys()
    if tied is not None:
        embedding, unembedding = tied
        if unembedding in extra and not np.array_equal(tensors[unembedding][:], tensors[embedding][:]):
            raise ValueError(f"tensor {unembedding} must equal {embedding}, because tie_word_embeddings is true")
        extra -= {unembedding}
    unexpected = sorted(name for name in extra if not name.endswith(".rotary_emb.inv_freq"))
    if unexpected:
        raise ValueError(f"tensors must be parameters of the model, got also {_shortened(unexpected)}")


def _shortened(names: list[str]) -> str:
    return one_line(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
