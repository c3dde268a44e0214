"""Frequencies, cos and sin, rotated q and k, and a whole Llama against torch and transformers.

Their cos and sin come from a float32 product of a float32 frequency and a position. Each tolerance follows from
their arithmetic, from the frequency on; ours is exact to 1.2e-7.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import oracles  # noqa: E402
from golden import cases  # noqa: E402
from transformers.models.gpt_neox import modeling_gpt_neox as neox  # noqa: E402
from transformers.models.gptj import modeling_gptj as gptj  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402

import rope_jax  # noqa: E402

pytestmark = pytest.mark.oracle

DTYPES = {
    "float32": (jnp.float32, torch.float32, oracles.EPS32),
    "bfloat16": (jnp.bfloat16, torch.bfloat16, oracles.EPS16),
}


def to_numpy(x):
    return np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x.astype(jnp.float32), np.float64)


def turn_tolerance(positions, frequencies, their_inv_freq):
    """How far their cos and sin may be from the exact ones and ours, ``[..., T, R/2]``.

    Their phase is off by the position times the error of their frequency, and by the rounding of the
    product. Cosine, and its product with the attention factor, are rounded; 1.2e-7 is ours.
    """
    ours = frequencies.inv_freq
    phase = np.abs(to_numpy(their_inv_freq) - ours) + oracles.EPS32 * ours
    return frequencies.attention_factor * (1.2e-7 + 3 * oracles.EPS32 + np.asarray(positions)[..., None] * phase)


def assert_turned_alike(ours, theirs, x, turn, layout, eps):
    """Ours and theirs ``[B, T, N, H]``, both made from x, where cos and sin are off by up to turn ``[B, T, R/2]``.

    Of a pair (x1, x2), an error of cos and sin counts |x1| + |x2| times, and so do four roundings: cos and
    sin, the products and the sum on their side, the result on ours. What does not turn is equal.
    """
    pairs = turn.shape[-1]
    allowed = np.zeros(x.shape)
    first = slice(0, pairs) if layout == "half" else slice(0, 2 * pairs, 2)
    second = slice(pairs, 2 * pairs) if layout == "half" else slice(1, 2 * pairs, 2)
    size = np.abs(x[..., first]) + np.abs(x[..., second])
    allowed[..., first] = allowed[..., second] = size * (turn[:, :, None, :] + 4.1 * eps)
    assert np.all(np.abs(to_numpy(ours) - to_numpy(theirs)) <= allowed)


# ------------------------------------------------------------------------------- frequencies, cos and sin


@pytest.mark.parametrize("case", cases.CASES, ids=cases.NAMES)
def test_frequencies(case):
    cases.check(case, *cases.ask_transformers(case))


@pytest.mark.parametrize("positions", [range(9), [*range(9), 4095, 4096, 4097, 100_000]], ids=["near", "far"])
@pytest.mark.parametrize(
    "name", ["default", "linear", "dynamic_9000", "yarn", "longrope_short", "llama3", "proportional"]
)
def test_cos_and_sin(name, positions):
    case = cases.CASES[cases.NAMES.index(name)]
    module = llama.LlamaRotaryEmbedding(cases.config(case))
    positions = np.array([positions])
    with torch.no_grad():
        theirs = module(torch.zeros(1), torch.tensor(positions))

    rope = rope_jax.Rope(case["rotary_dim"], cases.schedule(case))
    # Their module takes the length from the positions; ours is told.
    length = int(positions.max()) + 1 if hasattr(rope.schedule, "context_length") else None
    frequencies = rope.frequencies(length)
    # Within a module the base of the dynamic schedule is float32 throughout, hence more than in `cases`.
    np.testing.assert_allclose(to_numpy(module.inv_freq), frequencies.inv_freq, rtol=1e-6)
    assert module.attention_scaling == pytest.approx(frequencies.attention_factor, rel=1e-12)

    allowed = turn_tolerance(positions, frequencies, module.inv_freq)
    for part, their_part in zip(rope.rotation(jnp.asarray(positions), context_length=length), theirs, strict=True):
        both_halves = np.concatenate([to_numpy(part)] * 2, axis=-1)
        assert np.all(np.abs(both_halves - to_numpy(their_part)) <= np.concatenate([allowed] * 2, axis=-1))


# --------------------------------------------------------------------------------------------- q and k

HEAD_DIM = 64
POSITIONS = np.stack([np.arange(12), 500 + 7 * np.arange(12)])  # [B, T]


def queries_and_keys(dtype):
    """The same q ``[B, T, N, H]`` and k ``[B, T, K, H]`` as float64 numpy, jax and torch."""
    rng = np.random.default_rng(0)
    in_jax = [jnp.asarray(rng.normal(size=(*POSITIONS.shape, heads, HEAD_DIM)), dtype) for heads in (4, 2)]
    in_numpy = [to_numpy(x) for x in in_jax]
    return in_numpy, in_jax, [torch.tensor(x) for x in in_numpy]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["llama", "llama_yarn", "gpt_neox"])
def test_half_layout(model, dtype):
    ours, theirs, eps = DTYPES[dtype]
    if model == "gpt_neox":
        config = transformers.GPTNeoXConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, rotary_pct=0.25)
        module, apply = neox.GPTNeoXRotaryEmbedding(config), neox.apply_rotary_pos_emb
        rope = rope_jax.Rope(HEAD_DIM, rope_jax.Standard(), rotary_dim=HEAD_DIM // 4)
    else:
        case = cases.CASES[cases.NAMES.index("default" if model == "llama" else "yarn")]
        module, apply = llama.LlamaRotaryEmbedding(cases.config(case)), llama.apply_rotary_pos_emb
        rope = rope_jax.Rope(HEAD_DIM, cases.schedule(case))

    numpy_qk, jax_qk, torch_qk = queries_and_keys(ours)
    q, k = (x.to(theirs).transpose(1, 2) for x in torch_qk)  # [B, N, T, H]
    with torch.no_grad():
        expected = [x.transpose(1, 2) for x in apply(q, k, *module(q, torch.tensor(POSITIONS)))]

    turn = turn_tolerance(POSITIONS, rope.frequencies(), module.inv_freq)
    for x, y, z in zip(numpy_qk, rope(*jax_qk, jnp.asarray(POSITIONS)), expected, strict=True):
        assert y.dtype == ours and z.dtype == theirs
        assert_turned_alike(y, z, x, turn, "half", eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [16, HEAD_DIM])
def test_interleaved_layout_of_gptj(rotary_dim, dtype):
    ours, theirs, eps = DTYPES[dtype]
    rope = rope_jax.Rope(HEAD_DIM, rope_jax.Standard(), rotary_dim=rotary_dim, layout="interleaved")
    table = gptj.create_sinusoidal_positions(int(POSITIONS.max()) + 1, rotary_dim)
    sin, cos = table[POSITIONS].to(theirs).chunk(2, dim=-1)
    their_inv_freq = 1.0 / (10000 ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64) / rotary_dim))  # as there

    turn = turn_tolerance(POSITIONS, rope.frequencies(), their_inv_freq)
    numpy_qk, jax_qk, torch_qk = queries_and_keys(ours)
    for x, y, z in zip(numpy_qk, rope(*jax_qk, jnp.asarray(POSITIONS)), torch_qk, strict=True):
        z = z.to(theirs)
        z = torch.cat([gptj.apply_rotary_pos_emb(z[..., :rotary_dim], sin, cos), z[..., rotary_dim:]], dim=-1)
        assert y.dtype == ours and z.dtype == theirs
        assert_turned_alike(y, z, x, turn, "interleaved", eps)


# -------------------------------------------------------------------------------------------- a whole model


def decoder_params(model, num_layers, head_dim):
    """The weights of a LlamaForCausalLM as parameters of :class:`rope_jax.Decoder`."""
    weights = {name: np.asarray(w.detach()) for name, w in model.state_dict().items()}

    def stacked(name, *shape):
        """``[layers, *shape]``; torch keeps a kernel ``[out, in]``."""
        return np.stack([weights[f"model.layers.{i}.{name}.weight"].T.reshape(shape) for i in range(num_layers)])

    def to_heads(name):
        return {"kernel": stacked(f"self_attn.{name}_proj", width, -1, head_dim)}

    width = weights["model.norm.weight"].size
    layers = {
        "attention_norm": {"scale": stacked("input_layernorm", width)},
        "mlp_norm": {"scale": stacked("post_attention_layernorm", width)},
        "self_attention": {
            "query": to_heads("q"),
            "key": to_heads("k"),
            "value": to_heads("v"),
            "out": {"kernel": stacked("self_attn.o_proj", -1, head_dim, width)},
        },
        "gate": {"kernel": stacked("mlp.gate_proj", width, -1)},
        "up": {"kernel": stacked("mlp.up_proj", width, -1)},
        "down": {"kernel": stacked("mlp.down_proj", -1, width)},
    }
    params = {
        "embed": {"embedding": weights["model.embed_tokens.weight"]},
        "layers": layers,
        "final_norm": {"scale": weights["model.norm.weight"]},
        "unembed_kernel": {"kernel": weights["lm_head.weight"].T},
    }
    return {"params": jax.tree.map(jnp.asarray, params)}


def test_logits_of_a_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,  # large enough for attention to be far from uniform
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=1024,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=1e4,
            factor=8.0,
            original_max_position_embeddings=64,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        attn_implementation="eager",
    )
    their_model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms start at one, where it would not show that they were left out
        for name, weight in their_model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    schedule = rope_jax.Llama3(factor=8.0, original_length=64, base=1e4)
    model = rope_jax.Decoder(
        vocab_size=97,
        num_layers=2,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
        tie_embeddings=False,
        norm_epsilon=1e-5,
        rope=rope_jax.Rope(16, schedule),
    )
    params = decoder_params(their_model, num_layers=2, head_dim=16)

    tokens = np.random.default_rng(0).integers(97, size=(2, 40))
    with torch.no_grad():
        theirs = their_model(torch.tensor(tokens)).logits.numpy()
    ours = model.apply(params, jnp.asarray(tokens))
    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    # The rotation matters here: without it the logits are others.
    without = model.clone(rope=None).apply(params, jnp.asarray(tokens))
    assert np.abs(without - theirs).max() > 0.1
