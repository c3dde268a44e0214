"""A whole network: embeddings, blocks, the decoder."""

from rope_jax.models.embedding import LearnedPositions, PositionEmbedding, Sinusoidal
from rope_jax.models.decoder import Decoder

__all__ = [
    "Decoder",
    "LearnedPositions",
    "PositionEmbedding",
    "Sinusoidal",
]
