"""Opens a GGUF file: its metadata as a dictionary, and its tensors by name, not yet read."""

import contextlib
import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rope_jax.interop.config import one_line

_SCALARS = {  # struct's codes of the value types
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)  # version 1 stored lengths in 32 bits
_MOST_AXES = 4
_MOST_VALUES = 2**22  # dequantized at once; the package gguf takes several times their memory


@dataclasses.dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor of a file; indexing by a slice of rows dequantizes these rows, as :func:`weights.read_params` asks.

    Attributes:
      name: in the file, for messages.
      quantization: the number of the type in ggml's list.
      shape: row-major, ``[rows]`` or ``[rows, columns]``; GGUF stores it in reverse.
      data: the stored bytes, uint8.
      dtype: of the rows that indexing returns.
    """

    name: str
    quantization: int
    shape: tuple[int, ...]
    data: np.ndarray
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        """The name of ``dtype`` in safetensors."""
        return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(self.dtype.name, self.dtype.name)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows of the tensor.

        Raises:
          ValueError: if the package gguf cannot dequantize the type.
        """
        if len(self.shape) == 1:  # blocks of a vector may straddle the ends of a slice
            return self._dequantized(self.data[None]).reshape(-1)[rows]
        stored = self.data.reshape(self.shape[0], -1)[rows]
        values = np.empty((len(stored), *self.shape[1:]), self.dtype)
        step = max(_MOST_VALUES // math.prod(self.shape[1:]), 1)
        for start in range(0, len(stored), step):
            part = values[start : start + step]
            part[...] = self._dequantized(stored[start : start + step]).reshape(part.shape)
        return values

    def _dequantized(self, stored: np.ndarray) -> np.ndarray:
        """The values of stored rows ``[rows, bytes]``."""
        gguf = import_gguf()
        type_ = gguf.GGMLQuantizationType(self.quantization)
        try:
            with np.errstate(all="ignore"):  # broken blocks may overflow
                wide = gguf.dequantize(np.array(stored), type_)
                values = wide.astype(self.dtype, copy=False)
        except NotImplementedError:
            raise ValueError(
                f"{self.name} must have a type that the package gguf dequantizes, got {type_.name}; quantize the "
                "model to another type"
            ) from None
        if self.dtype.itemsize < 4 and not np.isfinite(values).all() and np.isfinite(wide).all():
            raise ValueError(f"{self.name} must fit in {self.dtype}, got numbers up to {np.abs(wide).max():.3g}")
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """An open file.

    Attributes:
      name: the path, for messages.
      metadata: the value of each key.
      tensors: by name.
    """

    name: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{self.name} must have the key 'general.architecture', a name, got {name!r:.60}")
        return name

    def refuse(self, message: str) -> NoReturn:
        """Raises ValueError with the name of this file."""
        raise ValueError(one_line(f"{self.name}: {message}"))


def import_gguf():
    """The package gguf.

    Raises:
      ImportError: without the package; the message names the extra.
    """
    try:
        import gguf  # an optional dependency
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install 'rope_jax[gguf]'") from None
    return gguf


def open_gguf(source) -> GgufFile:
    """Reads the header of a GGUF file, versions 2 and 3, little-endian (ggml, docs/gguf.md).

    The header is read here, not by ``gguf.GGUFReader``: this class trusts each count in the file, and so a broken
    count of 2^60 elements would keep it busy for years. The tensors stay on disk until they are indexed.

    Args:
      source: a path, or an open ``gguf.GGUFReader``.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is broken, big-endian, one of several parts, or has a tensor of an unknown type.
      TypeError: if ``source`` is neither a path nor a reader.
      ImportError: without the package gguf.
    """
    gguf = import_gguf()
    if isinstance(source, gguf.GGUFReader):
        name, data = getattr(source.data, "filename", None) or "GGUF file", source.data
    elif isinstance(source, str | os.PathLike):
        name = path = Path(source)
        if os.path.isdir(path):
            advice = "load_hf reads it" if (path / "config.json").is_file() else "name the file in it"
            raise ValueError(f"path must be a GGUF file, got the folder {path}: {advice}")
        if not os.path.isfile(path):  # false for a path that is too long
            raise FileNotFoundError(one_line(f"path must be a local GGUF file (nothing is downloaded), got {path}"))
        if not path.stat().st_size:
            raise ValueError(f"{path} must be a GGUF file, got an empty file: download it again")
        data = np.memmap(path, np.uint8, mode="r")
    else:
        raise TypeError(f"path must be a path or a gguf.GGUFReader, got {type(source).__name__}")
    return _parse(_Cursor(str(name), np.asarray(data)), gguf)


class _Cursor:
    """Reads numbers and strings one after the other, never past the end."""

    def __init__(self, name: str, data: np.ndarray):
        self.name, self.data, self.view, self.offset = name, data, data.data, 0

    def take(self, size: int, what: str) -> int:
        """Skips ``size`` bytes and returns where they begin; ValueError if the file ends first."""
        start, self.offset = self.offset, self.offset + size
        if self.offset > len(self.view):
            self.refuse(
                f"must hold {size:,} bytes of {what} from byte {start:,}, got a file of {len(self.view):,} bytes: "
                "download it again"
            )
        return start

    def numbers(self, code: str, count: int, what: str) -> tuple:
        size = struct.calcsize(f"<{code}") * count
        return struct.unpack_from(f"<{count}{code}", self.view, self.take(size, what))

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, 1, what)[0]

    def string(self, what: str) -> str:
        size = self.number("Q", f"the length of {what}")
        start = self.take(size, what)
        try:
            return str(self.view[start : self.offset], "utf-8")
        except UnicodeDecodeError:
            self.refuse(f"must hold UTF-8 in {what}, got bytes {bytes(self.view[start : start + 16])!r}")

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            of, count = self.number("I", what), self.number("Q", what)
            if of in _SCALARS:
                return list(self.numbers(_SCALARS[of], self._count(count, _SCALARS[of], what), what))
            if of == _STRING:
                return [self.string(what) for _ in range(self._count(count, "Q", what))]
            self.refuse(f"must hold an array of numbers, booleans or strings in {what}, got type {of}")
        self.refuse(f"must hold a value of a known type in {what}, got type {kind}")

    def _count(self, count: int, code: str, what: str) -> int:
        """A count that the rest of the file can hold."""
        start = self.offset
        self.take(count * struct.calcsize(f"<{code}"), what)
        self.offset = start
        return count

    def refuse(self, message: str) -> NoReturn:
        raise ValueError(one_line(f"{self.name} {message}"))


def _parse(cursor: _Cursor, gguf) -> GgufFile:
    magic = bytes(cursor.view[:4])
    if magic != b"GGUF":
        cursor.refuse(f"must be a GGUF file, which begins with b'GGUF', got {magic!r}")
    cursor.offset = 4
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0:
        cursor.refuse("must be little-endian, got a big-endian file: convert the model again, without --bigendian")
    if version not in _VERSIONS:
        cursor.refuse(f"must have GGUF version {' or '.join(map(str, _VERSIONS))}, got {version}")
    num_tensors, num_keys = cursor.numbers("Q", 2, "the counts")

    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a key")
        if key in metadata:
            cursor.refuse(f"must have each key once, got {key!r} twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of {key}"), key)
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        cursor.refuse(f"must be a whole model, got one of {parts} parts: join them by llama-gguf-split --merge")

    infos: dict[str, tuple] = {}
    for _ in range(num_tensors):
        name = cursor.string("the name of a tensor")
        if name in infos:
            cursor.refuse(f"must have each tensor once, got {name!r} twice")
        num_axes = cursor.number("I", name)
        if not 1 <= num_axes <= _MOST_AXES:
            cursor.refuse(f"must have tensors of 1 to {_MOST_AXES} axes, got {num_axes} for {name}")
        shape = cursor.numbers("Q", num_axes, name)[::-1]
        infos[name] = shape, cursor.number("I", name), cursor.number("Q", name)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        cursor.refuse(f"must have a power of 2 as general.alignment, got {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {name: _tensor(cursor, gguf, name, start, alignment, *info) for name, info in infos.items()}
    return GgufFile(cursor.name, metadata, tensors)


def _tensor(
    cursor: _Cursor, gguf, name: str, start: int, alignment: int, shape: tuple, kind: int, offset: int
) -> GgufTensor:
    block = None
    with contextlib.suppress(ValueError):
        block = gguf.GGML_QUANT_SIZES.get(gguf.GGMLQuantizationType(kind))
    if block is None:
        cursor.refuse(f"must have tensors of types that the package gguf knows, got type {kind} for {name}")
    values, size = block
    if not all(shape) or shape[-1] % values:
        type_ = gguf.GGMLQuantizationType(kind).name
        cursor.refuse(f"must have rows of whole blocks of {values} values ({type_}), got {name} of shape {shape}")
    if offset % alignment:
        cursor.refuse(f"must align tensors to {alignment} bytes, got {name} at byte {offset}")
    cursor.offset = start + offset
    first = cursor.take(math.prod(shape) // values * size, f"tensor {name}")
    return GgufTensor(name, kind, shape, cursor.data[first : cursor.offset])
