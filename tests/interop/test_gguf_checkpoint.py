"""GGUF files: which decoder and parameters are loaded, and which files are refused."""

import dataclasses
import tracemalloc

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import fuse, tensors_of, write

import rope_jax
from rope_jax.interop import from_gguf, load_gguf

SIZES = dict(vocab_size=13, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=64)
METADATA = {
    ".block_count": 2,
    ".context_length": 64,
    ".embedding_length": 32,
    ".feed_forward_length": 64,
    ".attention.head_count": 4,
    ".attention.head_count_kv": 2,
    ".attention.key_length": 16,
    ".attention.value_length": 16,
    ".attention.layer_norm_rms_epsilon": 2.0**-20,
    ".rope.freq_base": 500.0,
    "general.name": "Small",
}
HALF = rope_jax.Rope(16, rope_jax.Standard(base=500.0))
NEIGHBOURS = dataclasses.replace(HALF, layout="interleaved")
TOKENS = jnp.arange(9)[None]


def random_params(model):
    """Parameters of the right shapes, all different, without compiling the initialisation."""
    shapes = nn.unbox(jax.eval_shape(model.clone(rope=None).init, jax.random.key(0), TOKENS))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def decoder(rope=NEIGHBOURS, **fields):
    return rope_jax.Decoder(**SIZES, rope=rope, norm_epsilon=2.0**-20, **fields)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


GEMMA = dict(activation=nn.gelu, post_norms=True, embedding_scale=32.0**0.5, logit_scale=0.25, tie_embeddings=True)
LOCAL = dataclasses.replace(HALF, schedule=rope_jax.Standard())
CASES = {
    "llama": ("llama", {}, dict(tie_embeddings=True)),
    "llama with an unembedding": ("llama", {}, dict(tie_embeddings=False)),
    "llama with every bias": ("llama", {}, dict(qkv_bias=True, out_bias=True, mlp_bias=True)),
    "mistral": ("llama", {".attention.sliding_window": 4}, dict(window=4)),
    "qwen2": ("qwen2", {}, dict(rope=HALF, qkv_bias=True)),
    "qwen3": ("qwen3", {}, dict(rope=HALF, qk_norm=True, tie_embeddings=True)),
    "phi3": ("phi3", {".attention.sliding_window": 4}, dict(rope=HALF, window=4, fused=True)),
    "phi3 apart": ("phi3", {}, dict(rope=HALF)),
    "smollm3": (
        "smollm3",
        {".block_count": 4},
        dict(rope=(NEIGHBOURS, NEIGHBOURS, NEIGHBOURS, None), tie_embeddings=True, num_layers=4),
    ),
    "gemma2": (
        "gemma2",
        {".attn_logit_softcapping": 20.0, ".final_logit_softcapping": 10.0, ".attention.sliding_window": 5},
        dict(rope=HALF, window=(5, None), logit_cap=20.0, output_cap=10.0, **GEMMA),
    ),
    "gemma2 by default": (
        "gemma2",
        {},
        dict(rope=HALF, window=(4096, None), logit_cap=50.0, output_cap=30.0, **GEMMA),
    ),
    "gemma3": (
        "gemma3",
        {".attention.sliding_window": 5, ".attention.sliding_window_pattern": 2},
        dict(rope=(LOCAL, HALF), window=(5, None), qk_norm=True, **GEMMA),
    ),
    "gemma3 of one kind": ("gemma3", {}, dict(rope=HALF, qk_norm=True, **GEMMA)),
}


@pytest.mark.parametrize("name", CASES)
def test_model_and_parameters(tmp_path, name):
    architecture, metadata, fields = CASES[name]
    fused, fields = fields.get("fused", False), {key: v for key, v in fields.items() if key != "fused"}
    model = decoder().clone(**fields)
    params = random_params(model)
    tensors = tensors_of(params)
    path = write(tmp_path / "a.gguf", architecture, METADATA | metadata, fuse(tensors) if fused else tensors)
    loaded = load_gguf(path)
    assert loaded.model == model
    assert_same(loaded.params, params)
    assert loaded.config["general.name"] == "Small" and loaded.config["general.architecture"] == architecture
    assert (loaded.tokenizer, loaded.stop_tokens, loaded.chat_template) == (None, (), None)
    ropes = [layer.rope for layer in from_gguf(path).layers]
    assert ropes == list(model.rope if isinstance(model.rope, tuple) else [model.rope] * model.num_layers)


def test_gemma_27b_divides_scores_by_the_width_per_head(tmp_path):
    model = decoder(HALF, **GEMMA, logit_cap=50.0, output_cap=30.0).clone(
        num_layers=46, num_heads=1, num_kv_heads=1
    )
    metadata = METADATA | {".block_count": 46, ".attention.head_count": 1, ".attention.head_count_kv": 1}
    tensors = tensors_of(random_params(model))
    loaded = load_gguf(write(tmp_path / "a.gguf", "gemma2", metadata, tensors))
    assert loaded.model.logit_scale == 32**-0.5


@pytest.mark.parametrize(
    "type_", [None, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
)
def test_quantized_weights(tmp_path, type_):
    model = decoder(tie_embeddings=False)
    tensors = tensors_of(random_params(model))
    loaded = load_gguf(write(tmp_path / "a.gguf", "llama", METADATA, tensors, type_))
    for name, got in tensors_of(loaded.params).items():
        want = tensors[name]
        if type_ is not None and want.ndim == 2:
            want = gguf.dequantize(gguf.quantize(want, type_), type_)
            assert (type_ in (Type.F16, Type.BF16)) or not np.array_equal(want, tensors[name])
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_types_may_differ(tmp_path):
    """As in real files: each tensor has a type of its own, and layers differ."""
    model = decoder(tie_embeddings=True)
    tensors = tensors_of(random_params(model))
    types = {"token_embd.weight": Type.Q8_0, "blk.0.attn_q.weight": Type.Q4_0, "blk.1.attn_q.weight": Type.Q5_1}
    loaded = load_gguf(write(tmp_path / "a.gguf", "llama", METADATA, tensors, types))
    for name, got in tensors_of(loaded.params).items():
        type_ = types.get(name, Type.F32)
        np.testing.assert_array_equal(got, gguf.dequantize(gguf.quantize(tensors[name], type_), type_))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16, "float16"])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_dtypes(tmp_path, param_dtype, dtype):
    params = random_params(decoder())
    path = write(tmp_path / "a.gguf", "llama", METADATA, tensors_of(params))
    loaded = load_gguf(path, dtype=dtype, param_dtype=param_dtype)
    assert loaded.model.param_dtype == jnp.dtype(param_dtype)
    assert loaded.model.dtype == jnp.dtype(param_dtype if dtype is None else dtype)
    assert_same(loaded.params, jax.tree.map(lambda leaf: leaf.astype(param_dtype), params))


def test_an_open_reader(tmp_path):
    params = random_params(decoder())
    path = write(tmp_path / "a.gguf", "llama", METADATA, tensors_of(params))
    assert_same(load_gguf(gguf.GGUFReader(path)).params, params)


def test_the_loaded_model_computes(tmp_path):
    """Rows of queries and keys permuted as llama.cpp's converter does, and pairs of neighbours: the same logits."""
    model = decoder(HALF, tie_embeddings=True)
    params = random_params(model)
    want = model.apply(params, TOKENS)
    tensors = tensors_of(params)
    for i in range(2):
        for name, heads in (("attn_q", 4), ("attn_k", 2)):  # the order of rows in convert_hf_to_gguf.py
            rows = tensors[f"blk.{i}.{name}.weight"].reshape(heads, 2, 8, 32)
            tensors[f"blk.{i}.{name}.weight"] = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(-1, 32))
    loaded = load_gguf(write(tmp_path / "a.gguf", "llama", METADATA, tensors))
    np.testing.assert_allclose(loaded.model.apply(loaded.params, TOKENS), want, atol=1e-5 * np.abs(want).max())


def test_the_recipe_is_the_models(tmp_path):
    divisors = np.linspace(1, 4, 8).astype(np.float32)
    tensors = tensors_of(random_params(decoder())) | {"rope_freqs.weight": divisors}
    path = write(tmp_path / "a.gguf", "llama", METADATA, tensors)
    assert load_gguf(path).model.rope == from_gguf(path).rope
    np.testing.assert_allclose(
        load_gguf(path).model.rope.frequencies().inv_freq, 500.0 ** (-np.arange(8) / 8) / divisors, rtol=1e-12
    )


def test_the_text_side_comes_along(tmp_path):
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*"abcdefgh", "ab", "<|im_end|>"],
        "tokenizer.ggml.token_type": [1] * 9 + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.chat_template": "{{ messages }}",
    }
    loaded = load_gguf(write(tmp_path / "a.gguf", "llama", METADATA | vocabulary, TENSORS))
    assert loaded.tokenizer.encode("abc<|im_end|>").ids == [8, 2, 9]
    assert (loaded.stop_tokens, loaded.chat_template) == ((7, 9), "{{ messages }}")
    assert not any(isinstance(value, list) for value in loaded.config.values())
    assert loaded.config["tokenizer.ggml.pre"] == "smollm"


def test_one_parameter_at_a_time_is_on_the_host(tmp_path):
    model = decoder(tie_embeddings=True).clone(width=1024, mlp_dim=2048, vocab_size=64)
    metadata = METADATA | {".embedding_length": 1024, ".feed_forward_length": 2048}
    params = random_params(model)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    path = write(tmp_path / "a.gguf", "llama", metadata, tensors_of(params), Type.Q8_0)
    del params
    load_gguf(path)  # imports
    tracemalloc.start()
    loaded = load_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params)) == sum(sizes)
    in_file = max(sizes) * 34 // 128  # Q8_0: 34 bytes for 32 numbers
    assert peak < sum(sizes) + 2 * max(sizes) + in_file  # the numbers as floats, and times their scales


TENSORS = tensors_of(random_params(decoder(tie_embeddings=True)))


def without(name):
    return {key: array for key, array in TENSORS.items() if key != name}


REFUSED = {
    "another architecture": (dict(architecture="qwen2moe"), "architecture must be one of llama, qwen2, qwen3, phi3, smollm3, gemma2, gemma3, got 'qwen2moe'"),
    "a missing tensor": (dict(tensors=without("blk.1.ffn_up.weight")), "tensors must include blk.1.ffn_up.weight"),
    "no embedding": (dict(tensors=without("token_embd.weight")), "tensors must include token_embd.weight"),
    "an unexpected tensor": (dict(tensors=TENSORS | {"blk.0.extra.weight": TENSORS["output_norm.weight"]}), "got also blk.0.extra.weight"),
    "an expert": (dict(metadata={".expert_count": 8}), "expert_count must be 0, got 8"),
    "another shape": (dict(tensors=TENSORS | {"blk.0.ffn_up.weight": np.ones((64, 64), np.float32)}), "tensor blk.0.ffn_up.weight must have shape (64, 32), got (64, 64)"),
    "an unread key": (dict(metadata={".attention.value_residual": 1}), "unknown key 'attention.value_residual' = 1"),
    "an unread rope": (dict(metadata={".rope.freq_bas": 1.0}), "unknown key 'rope.freq_bas'"),
    "not causal": (dict(metadata={".attention.causal": False}), "attention.causal must be True, got False"),
    "wide values": (dict(metadata={".attention.value_length": 8}), "attention.value_length must be attention.key_length = 16, got 8"),
    "another vocabulary": (dict(metadata={".vocab_size": 14}), "vocab_size must be the rows of token_embd.weight, 13, got 14"),
    "heads that differ": (dict(metadata={".attention.head_count": [4, 2]}), "attention.head_count must be the same number above 0 in all layers, got [4, 2]"),
    "a negative epsilon": (dict(metadata={".attention.layer_norm_rms_epsilon": -1.0}), "attention.layer_norm_rms_epsilon must be above 0, got -1.0"),
    "a text for a size": (dict(metadata={".embedding_length": "big"}), "embedding_length must be an integer of at least 1, got 'big'"),
    "a type without a dequantizer": (dict(tensors=TENSORS | {"blk.0.ffn_up.weight": np.ones((64, 32), np.int8)}), "blk.0.ffn_up.weight must have a type that the package gguf dequantizes, got I8"),
    "a window for Qwen": (dict(architecture="qwen2", metadata={".attention.sliding_window": 4}), "unknown key 'attention.sliding_window'"),
    "layers that slide without a window": (dict(architecture="gemma3", metadata={".attention.sliding_window_pattern": [True, False]}), "attention.sliding_window must be above 0 if layers slide, got none"),
    "heads that are no groups": (dict(metadata={".attention.head_count_kv": 3}), "num_kv_heads"),
    "a window of text": (dict(metadata={".attention.sliding_window": "big"}), "attention.sliding_window must be an integer"),
    "a chat template of numbers": (dict(metadata={"tokenizer.chat_template": 3}), "tokenizer.chat_template must be text, got int"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    given, message = REFUSED[name]
    metadata = METADATA | given.get("metadata", {})
    path = write(tmp_path / "a.gguf", given.get("architecture", "llama"), metadata, given.get("tensors", TENSORS))
    with pytest.raises(ValueError) as error:
        load_gguf(path)
    said = str(error.value)
    assert message in said and "a.gguf" in said and "\n" not in said


@pytest.mark.parametrize("key", [key for key in METADATA if key.startswith(".") and "rope" not in key])
def test_missing_keys(tmp_path, key):
    metadata = {name: value for name, value in METADATA.items() if name != key}
    path = write(tmp_path / "a.gguf", "llama", metadata, TENSORS)
    messages = {
        ".attention.value_length": None,  # the length of keys
        ".attention.key_length": r"attention.value_length must be attention.key_length = 8, got 16",
        ".attention.head_count_kv": r"tensor blk.0.attn_k.weight must have shape \(64, 32\), got \(32, 32\)",
    }
    message = messages.get(key, rf"must have the key '{key[1:]}'")
    if message is None:
        assert load_gguf(path).model.head_dim == 16
    else:
        with pytest.raises(ValueError, match=message):
            load_gguf(path)


def test_a_model_with_a_broken_byte(tmp_path):
    whole = write(tmp_path / "whole.gguf", "llama", METADATA, TENSORS).read_bytes()
    header = len(whole) - sum(array.nbytes for array in TENSORS.values())
    path, refused = tmp_path / "flipped.gguf", 0
    places = range(0, header, 19)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            load_gguf(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert len(places) > 60 and refused > len(places) // 2


def test_dtypes_that_are_none(tmp_path):
    path = write(tmp_path / "a.gguf", "llama", METADATA, TENSORS)
    with pytest.raises(TypeError, match="param_dtype must be float32, bfloat16 or float16, got"):
        load_gguf(path, param_dtype=jnp.int8)
    with pytest.raises(TypeError, match="dtype must be floating"):
        load_gguf(path, dtype=jnp.int32)
    with pytest.raises(FileNotFoundError, match=r"none.gguf"):
        load_gguf(tmp_path / "none.gguf")
