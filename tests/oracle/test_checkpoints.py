"""Folders saved by transformers and read by load_hf: the logits and greedy tokens are the same.

Tiny models of every family. All parameters are random, norms and biases too, so that a missing one shows.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rope_jax  # noqa: E402

pytestmark = pytest.mark.oracle
transformers.utils.logging.disable_progress_bar()

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,  # large enough for attention to be far from uniform
    rms_norm_eps=1e-5,
    attn_implementation="eager",
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    original_max_position_embeddings=16,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
# 12 features to a head; 6 rotate in partial rotation.
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0, 1.1, 1.3],
    long_factor=[2.0, 3.0, 5.0],
    partial_rotary_factor=0.5,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=7)

# Each case: the class of the config, and its arguments.
CASES = {
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama 3 rule": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama with every bias": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=20)),
    "llama with yarn": ("Llama", dict(rope_parameters=YARN)),
    "mistral": ("Mistral", dict(sliding_window=5, head_dim=16)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2 with windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=2)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3 with biases": ("Qwen3", dict(head_dim=16, attention_bias=True, rope_parameters=YARN)),
    "phi3": ("Phi3", dict(sliding_window=9)),
    "phi3 short": ("Phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=128)),
    "phi3 long": ("Phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=16)),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=2)),
    "smollm3 with windows": (
        "SmolLM3",
        dict(no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=4, mlp_bias=True),
    ),
    "gemma2": ("Gemma2", dict(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)),
    "gemma3": (
        "Gemma3Text",
        dict(**GEMMA, num_hidden_layers=7),
    ),  # the seventh is like the first, the sixth is full
    "gemma3 with all": (
        "Gemma3Text",
        dict(
            **GEMMA,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=1e5, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=1e3),
            },
            final_logit_softcapping=5.0,
            tie_word_embeddings=False,
        ),
    ),
}
LENGTH = 40  # past every original length and window above, but that of "phi3 short"
DIFFERENCES: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nworst difference of a logit from transformers:")
    for case, difference in DIFFERENCES.items():
        print(f"  {case:24} {difference:.1e}")


def their_model(case):
    name, fields = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | fields))
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "norm" in path:
                weight.add_(torch.empty_like(weight).uniform_(-0.5, 0.5))
            if path.endswith("bias"):
                weight.uniform_(-0.5, 0.5)
            if path == "model.norm.weight":  # of either sign: a tied embedding would repeat the same token
                weight.uniform_(-1.5, 1.5).sub_(1.0 if "Gemma" in name else 0.0)
    return model


def tokens(batch=2, length=LENGTH):
    return np.random.default_rng(0).integers(97, size=(batch, length))


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def length_for(model, length):
    """The length, for a model whose schedule asks for one."""
    asks = isinstance(model.rope, rope_jax.Rope) and hasattr(model.rope.schedule, "context_length")
    return dict(context_length=length) if asks else {}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(case, tmp_path):
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if case == "llama" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (case == "llama")
    model, params, config, *_ = rope_jax.load_hf(tmp_path)
    assert config == json.loads((tmp_path / "config.json").read_text())

    want = their_logits(theirs, tokens())
    got = model.apply(params, jnp.asarray(tokens()), **length_for(model, LENGTH))
    assert want.std() > 0.5
    DIFFERENCES[case] = float(np.abs(got - want).max())
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)

    # transformers begins a Phi-3 anew where it crosses the original length: the prompt stays on one side of it.
    prompt = tokens(batch=3, length=17)
    with torch.no_grad():
        written = theirs.generate(
            torch.tensor(prompt), attention_mask=torch.ones(3, 17), do_sample=False, max_new_tokens=64
        )
    out = rope_jax.generate(
        model, params, prompt, max_new_tokens=64, temperature=0, **length_for(model, prompt.shape[1] + 64)
    )
    assert out.tokens.tolist() == written[:, 17:].tolist()
    assert len(np.unique(out.tokens)) > 8  # it writes more than one word


@pytest.mark.parametrize("case", CASES)
def test_every_part_matters(case, tmp_path):
    """What would a loader get wrong that forgot the rotation of a layer, a window, or any one parameter?"""
    their_model(case).save_pretrained(tmp_path)
    model, params, *_ = rope_jax.load_hf(tmp_path)
    ids = jnp.asarray(tokens())
    right = model.apply(params, ids, **length_for(model, LENGTH))
    ropes = model.rope if isinstance(model.rope, tuple) else (model.rope,) * model.num_layers
    windows = model.window if isinstance(model.window, tuple) else (model.window,) * model.num_layers
    for layer in range(model.num_layers):
        if ropes[layer] is not None:
            forgot = model.clone(rope=(*ropes[:layer], None, *ropes[layer + 1 :]))
            wrong = forgot.apply(params, ids, **length_for(model, LENGTH))
            assert np.abs(wrong - right).max() > 0.1, layer
        if windows[layer] is not None:
            forgot = model.clone(window=(*windows[:layer], None, *windows[layer + 1 :]))
            assert np.abs(forgot.apply(params, ids, **length_for(model, LENGTH)) - right).max() > 0.05, layer
    for field in ("logit_cap", "output_cap", "embedding_scale", "logit_scale"):
        if getattr(model, field) is not None:
            wrong = model.clone(**{field: None}).apply(params, ids, **length_for(model, LENGTH))
            assert np.abs(wrong - right).max() > 0.1, field


def test_bfloat16_stays_bfloat16(tmp_path):
    """Both round at every step, not always at the same one: each is as far from the float32 model as the other."""
    their_model("gemma2").to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = lambda dtype: transformers.Gemma2ForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager"
    )
    loaded = rope_jax.load_hf(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert loaded.model.dtype == loaded.model.param_dtype == jnp.bfloat16
    got = loaded.model.apply(loaded.params, jnp.asarray(tokens()))
    exact = rope_jax.load_hf(tmp_path, dtype=jnp.float32)
    assert exact.model.dtype == jnp.float32 and exact.model.param_dtype == jnp.bfloat16
    fine = exact.model.apply(exact.params, jnp.asarray(tokens()))
    np.testing.assert_allclose(fine, their_logits(theirs(torch.float32), tokens()), atol=1e-4, rtol=0)
    rough = their_logits(theirs(torch.bfloat16), tokens())
    ours, others = np.abs(got - fine), np.abs(rough - fine)
    assert ours.mean() < 1.1 * others.mean() and others.mean() > 1e-3


def test_longrope_turns_by_the_length_that_it_is_given(tmp_path):
    their_model("phi3 long").save_pretrained(tmp_path)
    model, params, *_ = rope_jax.load_hf(tmp_path)
    ids = jnp.asarray(tokens(length=16))
    want = their_logits(their_model("phi3 long"), tokens(length=16))
    np.testing.assert_allclose(model.apply(params, ids, context_length=16), want, atol=1e-4, rtol=0)
    assert np.abs(model.apply(params, ids, context_length=17) - want).max() > 0.1
    with pytest.raises(ValueError, match="LongRope needs a context_length"):
        model.apply(params, ids)
    # A cache counts: its next token is that of the tokens so far, which transformers counts too.
    written = rope_jax.generate(model, params, ids, max_new_tokens=1, temperature=0)
    np.testing.assert_array_equal(written.tokens[:, 0], want[:, -1].argmax(-1))
    other = model.apply(params, ids, context_length=17)
    assert np.any(other[:, -1].argmax(-1) != want[:, -1].argmax(-1))


def test_text_part_of_a_gemma3_that_sees(tmp_path):
    text = dict(
        SIZES | GEMMA,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        vocab_size=97,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, attn_implementation="eager"
    )
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    model, params, *_ = rope_jax.load_hf(tmp_path)
    want = their_logits(theirs, tokens())
    got = model.apply(params, jnp.asarray(tokens()))
    DIFFERENCES["gemma3 that sees"] = float(np.abs(got - want).max())
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
