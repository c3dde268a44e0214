"""From logits to text: sampling, generation, speculative decoding, beam search."""

from rope_jax.generation.prompts import pad_prompts
from rope_jax.generation.sample import sample
from rope_jax.generation.logits import LogitBias, MinP, RepetitionPenalty
from rope_jax.generation.loop import Generation
from rope_jax.generation.generate import generate
from rope_jax.generation.speculative import SpeculativeOutput, speculative_decode
from rope_jax.generation.beam import Beams, beam_search

__all__ = [
    "Beams",
    "Generation",
    "LogitBias",
    "MinP",
    "RepetitionPenalty",
    "SpeculativeOutput",
    "beam_search",
    "generate",
    "pad_prompts",
    "sample",
    "speculative_decode",
]
