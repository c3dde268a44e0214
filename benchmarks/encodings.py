"""Builds the toy decoder with RoPE or another position encoding, for the study of context extension."""

import dataclasses
import functools
import math
from typing import Literal

import jax
import optax

import rope_jax
from configs import toy_lm


@dataclasses.dataclass(frozen=True)
class Config(toy_lm.Config):
    """The toy decoder and its training, with a position encoding.

    ``table_rate`` multiplies the learning rate for the tables of learned and t5, which need larger steps.
    """

    encoding: Literal["rope", "sinusoidal", "learned", "t5", "alibi", "none"] = "rope"
    table_rate: float = 1.0


def build_model(config: Config) -> rope_jax.Decoder:
    model = toy_lm.build_model(config)
    if config.encoding == "rope":
        return model
    fields = {
        # Vaswani et al. 2017, section 3.4: embeddings times sqrt(D), so that the sines do not dominate.
        "sinusoidal": dict(
            position_embedding=rope_jax.models.Sinusoidal(), embedding_scale=math.sqrt(config.width)
        ),
        "learned": dict(position_embedding=rope_jax.models.LearnedPositions(num_positions=config.length)),
        "t5": dict(position_bias=rope_jax.attention.T5Bias()),
        "alibi": dict(position_bias=rope_jax.attention.ALiBi()),
        "none": {},
    }
    return model.clone(rope=None, **fields[config.encoding])


def build_optimizer(config: Config) -> optax.GradientTransformation:
    named_table = lambda path, _: jax.tree_util.DictKey("table") in path  # noqa: E731
    tables = functools.partial(jax.tree_util.tree_map_with_path, named_table)
    faster = optax.masked(optax.scale(config.table_rate), tables)
    return optax.chain(toy_lm.build_optimizer(config), faster)
