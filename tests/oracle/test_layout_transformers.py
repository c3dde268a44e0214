"""convert_layout against transformers: its converters of weights, and its attentions of either layout."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import oracles  # noqa: E402
from transformers.core_model_loading import PermuteForRope  # noqa: E402
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor  # noqa: E402
from transformers.models.cohere import modeling_cohere as cohere  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402

import rope_jax  # noqa: E402

pytestmark = pytest.mark.oracle

N, K, H, D = 4, 2, 8, 32
HEADS = dict(num_attention_heads=N, num_key_value_heads=K, hidden_size=D, head_dim=H)


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("shape", [(N * H, D), (N * H,)], ids=["weight", "bias"])
def test_the_converter_of_checkpoints(shape):
    weight, config = numbers(*shape), transformers.LlamaConfig(**HEADS)
    for to, inverse in (("half", False), ("interleaved", True)):
        permute = PermuteForRope(inverse=inverse)
        (theirs,) = permute.convert({"wq": torch.tensor(weight)}, ["wq"], ["q_proj"], config).values()
        ours = rope_jax.convert_layout(weight, to, head_dim=H, axis=0)
        np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize(("name", "heads"), [("attn_q", N), ("attn_k", K)])
def test_the_reader_of_gguf(name, heads):
    weight = numbers(heads * H, D)
    theirs = LlamaTensorProcessor(config=HEADS).process(weight, f"blk.0.{name}.weight").weights
    np.testing.assert_array_equal(rope_jax.convert_layout(weight, "half", head_dim=H, axis=0), theirs)


# ------------------------------------------------------------------------------------- attentions of either layout


def random_state(module):
    """Weights, biases and norms in float64, none of them zero or one; of a size that gives scores of about 1."""
    torch.manual_seed(0)
    state = {name: torch.randn_like(w, dtype=torch.float64) for name, w in module.state_dict().items()}
    return {name: w / w.shape[-1] ** 0.5 if w.ndim == 2 else w for name, w in state.items()}


def converted(state, to, options):
    """The state with the entries named in ``options`` in layout ``to``."""
    state = dict(state)
    for name, option in options.items():
        state[name] = torch.tensor(rope_jax.convert_layout(state[name].numpy(), to, axis=0, **option))
    return state


@torch.no_grad()
def attend(attention, rotary, state):
    """``[T, D]``, at positions far enough apart for the rotation to matter."""
    attention = attention.double()
    attention.load_state_dict(state)
    torch.manual_seed(1)
    x = torch.randn(1, 6, D, dtype=torch.float64)
    cos_sin = rotary(x, torch.tensor([[0, 1, 2, 30, 31, 700]]))
    return attention(x, position_embeddings=cos_sin, attention_mask=None)[0][0].numpy()


def assert_alike(one, two):
    # Both take their softmax in float32, and Cohere turns q and k in it: five roundings of scores that are sums
    # of products up to 10, of which the softmax makes as large a relative error.
    np.testing.assert_allclose(one, two, rtol=0, atol=50 * oracles.EPS32 * np.abs(two).max())


def test_the_interleaved_attention_of_cohere_is_that_of_a_llama():
    config = dict(**HEADS, attention_bias=True, attn_implementation="eager", use_qk_norm=False)
    theirs = cohere.CohereAttention(transformers.CohereConfig(**config), 0)
    config = transformers.LlamaConfig(**config)
    half, rotary = llama.LlamaAttention(config, 0), llama.LlamaRotaryEmbedding(config)
    state = random_state(theirs)
    want = attend(theirs, cohere.CohereRotaryEmbedding(config), state)

    both = ["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"]
    assert_alike(attend(half, rotary, converted(state, "half", {name: dict(head_dim=H) for name in both})), want)
    for left_out in both:
        rest = {name: dict(head_dim=H) for name in both if name != left_out}
        assert np.abs(attend(half, rotary, converted(state, "half", rest)) - want).max() > 0.1, left_out


def test_the_latent_attention_of_deepseek_v3_in_either_layout():
    nope, rope, rank = 6, 8, 10

    def layer(interleave):
        config = transformers.DeepseekV3Config(
            hidden_size=D,
            num_attention_heads=N,
            num_key_value_heads=N,
            q_lora_rank=12,
            kv_lora_rank=rank,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=6,
            rope_interleave=interleave,
            attn_implementation="eager",
        )
        return deepseek.DeepseekV3Attention(config, 0), deepseek.DeepseekV3RotaryEmbedding(config)

    state = random_state(layer(True)[0])
    both = {
        "q_b_proj.weight": dict(head_dim=nope + rope, start=nope),
        "kv_a_proj_with_mqa.weight": dict(head_dim=rank + rope, start=rank),
    }
    for source, to in (("interleaved", "half"), ("half", "interleaved")):
        want = attend(*layer(source == "interleaved"), state)
        new = layer(to == "interleaved")
        assert_alike(attend(*new, converted(state, to, both)), want)
        for left_out in both:
            rest = {name: option for name, option in both.items() if name != left_out}
            assert np.abs(attend(*new, converted(state, to, rest)) - want).max() > 0.1, left_out
