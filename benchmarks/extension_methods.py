"""The methods of context extension that the studies compare, as schedules."""

import math
from collections.abc import Sequence

import rope_jax


def extended(
    method: str,
    *,
    base: float,
    factor: float,
    original: int,
    divisors: Sequence[float],
    context_length: int | None = None,
) -> rope_jax.core.Schedule:
    """The schedule of a method, to reach ``factor * original`` after a training at ``original``.

    Dynamic NTK and LongRoPE depend on the context length; None leaves it to the call.
    """
    known = dict(factor=factor, original_length=original, base=base)
    length = {} if context_length is None else dict(context_length=context_length)
    match method:
        case "unmodified":
            return rope_jax.Standard(base=base)
        case "linear":
            return rope_jax.Linear(factor=factor, base=base)
        case "ntk":
            return rope_jax.NTKAware(factor=factor, base=base)
        case "dynamic":  # factor 1: stretched by what the length asks for, s = max(1, length / L)
            return rope_jax.DynamicNTK(**known | {"factor": 1.0}, **length)
        case "yarn":
            return rope_jax.Yarn(**known)
        case "longrope":  # up to L nothing changes
            lists = dict(short_factor=[1.0] * len(divisors), long_factor=divisors)
            wide = dict(attention_factor=1.0, long_attention_factor=longrope_attention_factor(factor, original))
            return rope_jax.LongRope(**known, **lists, **wide, **length)
        case _:
            return rope_jax.Llama3(**known)


def longrope_attention_factor(factor: float, original: int) -> float:
    """Ding et al. 2024, LongRoPE."""
    return math.sqrt(1 + math.log(factor) / math.log(original))
