"""The table of schedules and of their oracles, for the contract tests."""

import dataclasses
from collections.abc import Callable
from typing import Any

import rope_jax
from tests import oracles

PAIRS = 32
SHORT = [1 + 0.05 * i for i in range(PAIRS)]
LONG = [1 + i**1.3 for i in range(PAIRS)]
ROTARY_DIM = 2 * PAIRS


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], Any]
    oracle: Callable[[int], Any]  # rotary_dim -> frequencies and attention factor
    neutral: Any  # the same schedule with factor 1, which must equal Standard
    in_configs: bool = True  # whether Hugging Face configs have a name for it


def _long_rope(length, **change):
    options = dict(short_factor=SHORT, long_factor=LONG, original_length=4096, factor=32.0, base=5e5)
    return rope_jax.LongRope(**(options | change), context_length=length)


ONES = [1.0] * PAIRS
CASES = [
    Case(
        "standard",
        lambda: rope_jax.Standard(base=5e5),
        lambda d: oracles.standard(d, 5e5),
        rope_jax.Standard(base=3e3),
    ),
    Case(
        "linear",
        lambda: rope_jax.Linear(factor=4.0, base=1e4),
        lambda d: oracles.linear(d, 1e4, 4.0),
        rope_jax.Linear(factor=1, base=3e3),
    ),
    Case(
        "ntk",
        lambda: rope_jax.NTKAware(factor=4.0, base=1e4),
        lambda d: oracles.ntk(d, 1e4, 4.0),
        rope_jax.NTKAware(factor=1, base=3e3),
    ),
    Case(
        "dynamic_ntk",
        lambda: rope_jax.DynamicNTK(factor=2.0, original_length=2048, context_length=9000),
        lambda d: oracles.dynamic_ntk(d, 1e4, 2.0, 2048, 9000),
        rope_jax.DynamicNTK(factor=1, original_length=2048, context_length=2048, base=3e3),
    ),
    Case(
        "dynamic_ntk_within",
        lambda: rope_jax.DynamicNTK(factor=2.0, original_length=2048, context_length=100),
        lambda d: oracles.standard(d, 1e4),
        rope_jax.DynamicNTK(factor=8, original_length=2048, context_length=2048, base=3e3),
    ),
    Case(
        "yarn",
        lambda: rope_jax.Yarn(factor=4.0, original_length=32_768, base=1e6),
        lambda d: oracles.yarn(d, 1e6, 4.0, 32_768),
        rope_jax.Yarn(factor=1, original_length=4096, base=3e3),
    ),
    Case(
        "yarn_untruncated",
        lambda: rope_jax.Yarn(
            factor=32.0, original_length=4096, base=1.5e5, beta_fast=24, beta_slow=2, truncate=False
        ),
        lambda d: oracles.yarn(d, 1.5e5, 32.0, 4096, 24, 2, False),
        rope_jax.Yarn(factor=1, original_length=4096, base=3e3, truncate=False),
    ),
    Case(
        "longrope_short",
        lambda: _long_rope(4096),
        lambda d: oracles.longrope(d, 5e5, SHORT, 32.0, 4096),
        _long_rope(1, short_factor=ONES, factor=1, base=3e3),
    ),
    Case(
        "longrope_long",
        lambda: _long_rope(4097),
        lambda d: oracles.longrope(d, 5e5, LONG, 32.0, 4096),
        _long_rope(9999, long_factor=ONES, factor=1, base=3e3),
    ),
    Case(
        "llama3",
        lambda: rope_jax.Llama3(factor=8.0, original_length=8192),
        lambda d: oracles.llama3(d, 5e5, 8.0, 8192, 1.0, 4.0),
        rope_jax.Llama3(factor=1, original_length=8192, base=3e3),
    ),
    Case(
        "proportional",
        lambda: rope_jax.Proportional(proportion=0.25, base=1e6, factor=8.0),
        lambda d: oracles.proportional(d, 1e6, 0.25, 8.0),
        rope_jax.Proportional(proportion=1.0, base=3e3),
    ),
]
IDS = [case.name for case in CASES]
