"""GGUF files read by transformers and by load_gguf: the logits are the same.

Tiny models with random parameters, norms and biases too, written by the package gguf. transformers 5.24 does not read
the keys ``rope.scaling.*`` of these architectures, so that no case has them.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which transformers asks for

from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf_files import tensors_of, write  # noqa: E402

import rope_jax  # noqa: E402
from rope_jax.interop import load_gguf  # noqa: E402

pytestmark = pytest.mark.oracle
transformers.utils.logging.disable_progress_bar()

HEADS = {".attention.head_count": 4, ".attention.head_count_kv": 2}
WIDE_HEADS = {".attention.key_length": 256, ".attention.value_length": 256}  # what transformers assumes of Gemma
SIZES = HEADS | {
    ".block_count": 4,
    ".context_length": 512,
    ".embedding_length": 64,
    ".feed_forward_length": 96,
    ".attention.layer_norm_rms_epsilon": 1e-5,
    ".rope.freq_base": 500.0,
    ".vocab_size": 97,
}
# Each case: the architecture, its metadata, and the fields of Decoder that have parameters of their own.
CASES = {
    "llama": ("llama", {}, dict(tie_embeddings=False)),
    "llama, tied": ("llama", {}, dict(tie_embeddings=True)),
    "qwen2": ("qwen2", {}, dict(qkv_bias=True)),
    "qwen3": (
        "qwen3",
        {".attention.key_length": 128, ".attention.value_length": 128},  # transformers assumes this size too
        dict(qk_norm=True, head_dim=128),
    ),
    "gemma2": (
        "gemma2",
        WIDE_HEADS | {".attention.sliding_window": 7},
        dict(head_dim=256, tie_embeddings=True, post_norms=True),
    ),
    "gemma3": (
        "gemma3",
        WIDE_HEADS | {".attention.sliding_window": 7, ".block_count": 7},
        dict(head_dim=256, tie_embeddings=True, post_norms=True, qk_norm=True, num_layers=7),
    ),
}
LENGTH = 40
DIFFERENCES: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("\nworst difference of a logit from transformers, of the largest:")
    for case, difference in DIFFERENCES.items():
        print(f"  {case:24} {difference:.1e}")


def random_tensors(fields):
    """The tensors of a decoder, random, norms near 1 and biases near 0."""
    sizes = dict(vocab_size=97, num_layers=4, width=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=96)
    model = rope_jax.Decoder(**(sizes | fields), rope=None)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(0)

    def values(path, leaf):
        kind = path[-1].key
        spread = {"scale": 0.3, "bias": 0.3, "embedding": 1.0}.get(kind, 0.2)
        return (kind == "scale") + spread * rng.normal(size=leaf.shape).astype(np.float32)

    return tensors_of(jax.tree_util.tree_map_with_path(values, flax.linen.unbox(shapes)))


@pytest.mark.parametrize("type_", [None, Type.Q8_0, Type.Q4_1], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case, type_):
    architecture, metadata, fields = CASES[case]
    path = write(tmp_path / "a.gguf", architecture, SIZES | metadata, random_tensors(fields), type_)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.random.default_rng(1).integers(0, 97, (2, LENGTH))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    ours = load_gguf(path)
    got = np.asarray(ours.model.apply(ours.params, jnp.asarray(tokens)))
    DIFFERENCES[f"{case} {type_}"] = np.abs(got - want).max() / np.abs(want).max()
    assert DIFFERENCES[f"{case} {type_}"] < 1e-3
    assert np.abs(want).std() > 0.1  # no model of constants
