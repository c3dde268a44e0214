"""Opening GGUF files: what is read from them, and that a broken one is a clear error at once."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import write

from rope_jax.interop.gguf_file import open_gguf
from rope_jax.interop.gguf_rope import read_ropes
from rope_jax.interop.gguf_tokenizer import read_text

VALUES = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
METADATA = {
    ".block_count": 2,
    ".embedding_length": 32,
    ".attention.head_count": 2,
    ".rope.freq_base": 500.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.add_bos_token": False,
}
TENSORS = {"token_embd.weight": VALUES[:, :32], "output_norm.weight": VALUES[0, :32]}


def small(path, **more):
    return write(path, metadata=METADATA | more.pop("metadata", {}), tensors=TENSORS, **more)


def read_everything(source):
    """Everything that a loader reads, without the model."""
    file = open_gguf(source)
    read_ropes(file)
    read_text(file, 6)
    for tensor in file.tensors.values():
        tensor[:]
    return file


def test_metadata_is_plain_python(tmp_path):
    file = open_gguf(small(tmp_path / "a.gguf", metadata={"long": 7, "half": 0.5}))
    assert file.architecture == "llama"
    assert file.metadata["llama.rope.freq_base"] == 500.0 and type(file.metadata["llama.rope.freq_base"]) is float
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<|im_end|>"]
    assert file.metadata["tokenizer.ggml.token_type"] == [1, 1, 1, 3]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is False
    assert (file.metadata["long"], file.metadata["half"]) == (7, 0.5)


def test_every_type_of_number(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    given = dict(uint8=200, int8=-3, uint16=60_000, int16=-5, uint32=2**32 - 1, int32=-7, uint64=2**63, int64=-9)
    for kind, value in given.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float64("float64", 0.1)
    writer.add_array("floats", [0.5, 2.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = dict(open_gguf(tmp_path / "a.gguf").metadata)
    del metadata["general.architecture"]
    assert metadata == given | dict(float64=0.1, floats=[0.5, 2.0])


def test_a_reader_is_as_good_as_its_path(tmp_path):
    path = small(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(path)
    file, same = open_gguf(path), open_gguf(reader)
    assert file.metadata == same.metadata and file.name == same.name
    for name, tensor in file.tensors.items():
        np.testing.assert_array_equal(tensor[:], same.tensors[name][:])
    assert {t.name: tuple(t.shape[::-1].tolist()) for t in reader.tensors} == {
        name: tensor.get_shape() for name, tensor in file.tensors.items()
    }


@pytest.mark.parametrize(
    "type_", [None, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
)
def test_rows_are_dequantized(tmp_path, type_):
    file = open_gguf(write(tmp_path / "a.gguf", tensors={"x": VALUES, "norm": VALUES[0]}, types=type_))
    tensor = file.tensors["x"]
    assert tensor.get_shape() == (6, 512) and tensor.get_dtype() == "F32"
    want = VALUES if type_ is None else gguf.dequantize(gguf.quantize(VALUES, type_), type_)
    np.testing.assert_array_equal(tensor[:], want)
    np.testing.assert_array_equal(tensor[2:5], want[2:5])
    np.testing.assert_array_equal(file.tensors["norm"][:], VALUES[0])
    np.testing.assert_array_equal(file.tensors["norm"][3:7], VALUES[0, 3:7])
    assert tensor[:].dtype == np.float32
    bits = {None: 24, Type.F16: 11, Type.BF16: 8, Type.Q8_0: 7, Type.Q5_0: 4, Type.Q5_1: 4}.get(type_, 3)
    assert np.abs(tensor[:] - VALUES).max() <= np.abs(VALUES).max() * 2.0**-bits


@pytest.mark.parametrize("type_", gguf.GGML_QUANT_SIZES, ids=lambda type_: type_.name)
def test_all_types_of_the_package(tmp_path, type_):
    """Any bytes as blocks: most types can be read by the package, but not written."""
    values, size = gguf.GGML_QUANT_SIZES[type_]
    stored = np.random.default_rng(0).integers(0, 255, (3, 512 // values * size), np.uint8)
    plain = {Type.F32: np.float32, Type.F16: np.float16, Type.F64: np.float64, Type.I8: np.int8}
    plain |= {Type.I16: np.int16, Type.I32: np.int32, Type.I64: np.int64}
    if type_ in plain:
        path = write(tmp_path / "a.gguf", tensors={"x": stored.view(plain[type_])})
    else:
        path = write(tmp_path / "a.gguf", stored={"x": (stored, type_)})
    tensor = open_gguf(path).tensors["x"]
    assert tensor.get_shape() == (3, 512)
    try:
        with np.errstate(all="ignore"):
            want = gguf.dequantize(stored, type_)
    except NotImplementedError:
        with pytest.raises(
            ValueError, match=f"must have a type that the package gguf dequantizes, got {type_.name}"
        ):
            tensor[:]
        return
    np.testing.assert_array_equal(tensor[:], want)
    np.testing.assert_array_equal(tensor[1:2], want[1:2])


def test_rows_are_dequantized_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("rope_jax.interop.gguf_file._MOST_VALUES", 2 * 512)
    tensor = open_gguf(write(tmp_path / "a.gguf", tensors={"x": VALUES}, types=Type.Q8_0)).tensors["x"]
    want = gguf.dequantize(gguf.quantize(VALUES, Type.Q8_0), Type.Q8_0)
    np.testing.assert_array_equal(tensor[:], want)
    np.testing.assert_array_equal(tensor[1:6], want[1:6])


def test_eight_bits_by_hand(tmp_path):
    """Q8_0: blocks of 32 values, each a float16 scale and 32 signed bytes (ggml-common.h, block_q8_0)."""
    path = write(tmp_path / "a.gguf", tensors={"x": VALUES}, types=Type.Q8_0)
    stored = np.frombuffer(path.read_bytes()[-6 * 512 // 32 * 34 :], np.uint8).reshape(6, 16, 34)
    scales, values = stored[..., :2].copy().view(np.float16), stored[..., 2:].view(np.int8)
    want = (scales.astype(np.float32) * values).reshape(6, 512)
    np.testing.assert_array_equal(open_gguf(path).tensors["x"][:], want)


def test_a_vector_may_be_quantized(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", gguf.quantize(VALUES[0], Type.Q8_0), raw_dtype=Type.Q8_0)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    tensor = open_gguf(tmp_path / "a.gguf").tensors["x"]
    want = gguf.dequantize(gguf.quantize(VALUES[0], Type.Q8_0), Type.Q8_0)
    np.testing.assert_array_equal(tensor[:], want)
    np.testing.assert_array_equal(tensor[5:40], want[5:40])


def header(version=3, tensors=0, keys=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def string(text):
    return struct.pack("<Q", len(text)) + text


def info(name=b"x", axes=(32,), type_=0, offset=0, num_axes=None):
    shape = struct.pack(f"<{len(axes)}Q", *axes)
    num_axes = len(axes) if num_axes is None else num_axes
    return string(name) + struct.pack("<I", num_axes) + shape + struct.pack("<IQ", type_, offset)


HUGE = 2**60
BROKEN = {
    "another format": (b"PK\x03\x04" + bytes(60), "must be a GGUF file, which begins with b'GGUF', got b'PK"),
    "three bytes": (b"GGU", "must be a GGUF file"),
    "version 1": (header(version=1), "must have GGUF version 2 or 3, got 1"),
    "version 99": (header(version=99), "must have GGUF version 2 or 3, got 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "must be little-endian, got a big-endian file"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "must hold 16 bytes of the counts"),
    "2^60 keys": (header(keys=HUGE), "the length of a key"),
    "2^60 tensors": (header(tensors=HUGE), "the length of the name of a tensor"),
    "a key of 2^60 bytes": (header(keys=1, body=struct.pack("<Q", HUGE)), "bytes of a key"),
    "a text of 2^60 bytes": (header(keys=1, body=string(b"k") + struct.pack("<IQ", 8, HUGE)), "bytes of k from"),
    "a list of 2^60 numbers": (
        header(keys=1, body=string(b"k") + struct.pack("<IIQ", 9, 0, HUGE)),
        f"must hold {HUGE:,} bytes of k",
    ),
    "a list of 2^60 texts": (
        header(keys=1, body=string(b"k") + struct.pack("<IIQ", 9, 8, HUGE)),
        "bytes of k from",
    ),
    "a list of lists": (header(keys=1, body=string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "must hold an array of"),
    "an unknown type of value": (header(keys=1, body=string(b"k") + struct.pack("<I", 13)), "of a known type in k"),
    "a key that is no text": (header(keys=1, body=string(b"\xff")), "must hold UTF-8 in a key"),
    "a key twice": (header(keys=2, body=2 * (string(b"k") + struct.pack("<IB", 0, 1))), "got 'k' twice"),
    "a tensor twice": (header(tensors=2, body=2 * info() + bytes(300)), "got 'x' twice"),
    "no axis": (header(tensors=1, body=info(axes=()) + bytes(300)), "1 to 4 axes, got 0 for x"),
    "2^32 - 1 axes": (header(tensors=1, body=info(num_axes=2**32 - 1) + bytes(300)), "1 to 4 axes"),
    "2^60 rows": (header(tensors=1, body=info(axes=(32, HUGE)) + bytes(300)), "bytes of tensor x"),
    "2^240 values": (header(tensors=1, body=info(axes=(HUGE,) * 4) + bytes(300)), "bytes of tensor x"),
    "an empty tensor": (header(tensors=1, body=info(axes=(32, 0)) + bytes(300)), "got x of shape (0, 32)"),
    "half a block": (header(tensors=1, body=info(axes=(16,), type_=2) + bytes(300)), "whole blocks of 32 values"),
    "an unknown type": (header(tensors=1, body=info(type_=4) + bytes(300)), "got type 4 for x"),
    "an odd offset": (header(tensors=1, body=info(offset=8) + bytes(300)), "must align tensors to 32 bytes"),
    "an offset of 2^60": (header(tensors=1, body=info(offset=HUGE) + bytes(300)), "bytes of tensor x"),
    "an alignment of 0": (
        header(keys=1, tensors=1, body=string(b"general.alignment") + struct.pack("<II", 4, 0) + info()),
        "must have a power of 2 as general.alignment, got 0",
    ),
    "one of three parts": (
        header(keys=1, body=string(b"split.count") + struct.pack("<IH", 2, 3)),
        "must be a whole model, got one of 3 parts: join them by llama-gguf-split --merge",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        open_gguf(path)
    assert time.process_time() - start < 1
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_places_that_are_no_file(tmp_path):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ValueError, match=r"empty.gguf must be a GGUF file, got an empty file: download it again"):
        open_gguf(tmp_path / "empty.gguf")
    with pytest.raises(ValueError, match=r"path must be a GGUF file, got the folder .*: name the file in it"):
        open_gguf(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must be a local GGUF file .*, got .*none.gguf"):
        open_gguf(str(tmp_path / "none.gguf"))
    with pytest.raises(TypeError, match=r"path must be a path or a gguf.GGUFReader, got int"):
        open_gguf(3)


def test_a_type_that_cannot_be_dequantized(tmp_path):
    path = write(tmp_path / "a.gguf", tensors={"x": np.ones((2, 32), np.int8)})
    tensor = open_gguf(path).tensors["x"]
    with pytest.raises(ValueError, match="x must have a type that the package gguf dequantizes, got I8; quantize"):
        tensor[:]


def test_without_an_architecture(tmp_path):
    (tmp_path / "a.gguf").write_bytes(header())
    with pytest.raises(ValueError, match=r"must have the key 'general.architecture', a name, got None"):
        _ = open_gguf(tmp_path / "a.gguf").architecture


def test_a_file_that_is_cut_anywhere(tmp_path):
    whole = small(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    header = len(whole) - sum(array.nbytes for array in TENSORS.values())
    for length in [*range(1, header), *range(header, len(whole), 31), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.gguf must"):
            read_everything(path)
    path.write_bytes(whole)
    read_everything(path)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_a_file_with_a_broken_byte(tmp_path, mask):
    whole = small(tmp_path / "whole.gguf").read_bytes()
    path, outcomes = tmp_path / "flipped.gguf", {"read": 0, "refused": 0}
    start = time.process_time()
    for place in range(len(whole) - sum(array.nbytes for array in TENSORS.values())):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        try:
            read_everything(path)
            outcomes["read"] += 1
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
    assert time.process_time() - start < 60


def test_without_the_package():
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from rope_jax.interop import from_gguf\n"
        "try: from_gguf('model.gguf')\n"
        "except ImportError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    assert said == "GGUF files need the package gguf: pip install 'rope_jax[gguf]'\n"
