"""Other people's files: Hugging Face configs and checkpoints, GGUF files, and weight layouts."""

from rope_jax.interop.layout import convert_layout
from rope_jax.interop.model_rope import LayerRope, ModelRope, QueryTemperature
from rope_jax.interop.read import from_hf_config
from rope_jax.interop.write import to_hf_config
from rope_jax.interop.checkpoint import Checkpoint, load_hf
from rope_jax.interop.gguf_rope import from_gguf
from rope_jax.interop.gguf_checkpoint import load_gguf

__all__ = [
    "Checkpoint",
    "LayerRope",
    "ModelRope",
    "QueryTemperature",
    "convert_layout",
    "from_gguf",
    "from_hf_config",
    "load_gguf",
    "load_hf",
    "to_hf_config",
]
