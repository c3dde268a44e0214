"""A second reference: what vLLM means by each ``rope_type``, in float64 numpy, from the formulas in its sources.

Each function is named after the rope_type, takes rotary_dim and the keys of a config's rope parameters, and gives
the frequencies and the factor of cos and sin. The file that it follows, in vllm/model_executor/layers/
rotary_embedding, and where vLLM means something else by a name than transformers and rope_jax do, stand beside it.
"""

import math

import numpy as np


def default(dim, *, rope_theta):  # base.py
    return 1.0 / rope_theta ** (np.arange(0, dim, 2) / dim), 1.0


def linear(dim, *, rope_theta, factor):  # linear_scaling_rope.py
    # The positions are divided, not the frequencies: these are the phases of position 1.
    position = 1 / factor
    return position * default(dim, rope_theta=rope_theta)[0], 1.0


def llama3(dim, *, rope_theta, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    # llama3_rope.py. With low_freq_factor = high_freq_factor it makes a step, where Llama3 refuses.
    inv_freq, _ = default(dim, rope_theta=rope_theta)
    wavelength = 2 * np.pi / inv_freq
    share = (original_max_position_embeddings / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = share * inv_freq + (1 - share) * inv_freq / factor
    long = wavelength > original_max_position_embeddings / low_freq_factor
    short = wavelength < original_max_position_embeddings / high_freq_factor
    return np.select([short, long], [inv_freq, inv_freq / factor], blend), 1.0


def _yarn_inv_freq(dim, rope_theta, factor, original_length, beta_fast, beta_slow, truncate):  # common.py
    # i such that original_length / (2 pi theta^(2i/R)) is the number of turns
    ends = [
        dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(rope_theta))
        for turns in (beta_fast, beta_slow)
    ]
    if truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    kept, _ = default(dim, rope_theta=rope_theta)
    return 1 / (factor / kept) * ramp + kept * (1 - ramp)


def _mscale(factor, mscale=1.0):  # common.py, deepseek_scaling_rope.py
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn(
    dim,
    *,
    rope_theta,
    factor,
    original_max_position_embeddings,
    beta_fast=32,
    beta_slow=1,
    truncate=True,
    attn_factor=1.0,
    attention_factor=None,
    mscale=None,
    mscale_all_dim=None,
):
    # yarn_scaling_rope.py. Versions differ. That of v0.25 reads attn_factor, which multiplies what follows from the
    # factor, and drops attention_factor, mscale and mscale_all_dim in silence (vllm issue 48621, pull request
    # 48351). Newer sources read these three as transformers does, and no attn_factor.
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim) if both else _mscale(factor)
    ends = original_max_position_embeddings, beta_fast, beta_slow, truncate
    return _yarn_inv_freq(dim, rope_theta, factor, *ends), attention_factor * attn_factor


def deepseek_yarn(
    dim,
    *,
    rope_theta,
    factor,
    original_max_position_embeddings,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=0.0,
):
    # deepseek_scaling_rope.py: the name that vLLM gives to the yarn of DeepSeek's own code. The quotient is taken
    # even where only one mscale is given; transformers and Yarn then use neither.
    ends = original_max_position_embeddings, beta_fast, beta_slow, True
    inv_freq = _yarn_inv_freq(dim, rope_theta, factor, *ends)
    return inv_freq, _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)


def longrope(
    dim,
    *,
    rope_theta,
    short_factor,
    long_factor,
    original_max_position_embeddings,
    max_position_embeddings,
    max_model_len,
    short_mscale=None,
    long_mscale=None,
):
    # phi3_long_rope_scaled_rope.py. The list is chosen once, by the longest sequence that the engine admits, and
    # not by the length at hand; and either list may have a factor of its own (Phi-3.5-MoE gives the same to both).
    long = max_model_len > original_max_position_embeddings
    mscale = long_mscale if long else short_mscale
    if mscale is None:
        stretch = max(max_position_embeddings / original_max_position_embeddings, 1.0)
        mscale = math.sqrt(1 + math.log(stretch) / math.log(original_max_position_embeddings))
    divisors = np.array(long_factor if long else short_factor)
    return 1 / (divisors * rope_theta ** (np.arange(0, dim, 2) / dim)), mscale


def dynamic(dim, *, rope_theta, factor, max_trained_positions, max_position_embeddings):
    # dynamic_ntk_scaling_rope.py since pull request 41277. The length is that of the engine, max_position_embeddings,
    # for all sequences. Below max_trained_positions its power has no real value (issue 52665); DynamicNTK stops there.
    assert max_position_embeddings >= max_trained_positions
    stretch = factor * max_position_embeddings / max_trained_positions - (factor - 1)
    return default(dim, rope_theta=rope_theta * stretch ** (dim / (dim - 2)))


def dynamic_until_2026(dim, *, rope_theta, factor, max_position_embeddings):
    # The same file before: max_position_embeddings is the trained length, and the length is factor times as long.
    return dynamic(
        dim,
        rope_theta=rope_theta,
        factor=factor,
        max_trained_positions=max_position_embeddings,
        max_position_embeddings=factor * max_position_embeddings,
    )


def dynamic_alpha(dim, *, rope_theta, alpha):
    # dynamic_ntk_alpha_rope.py: Hunyuan's rope_type is "dynamic" too, but depends on no length.
    return default(dim, rope_theta=rope_theta * alpha ** (dim / (dim - 2)))


def ntk(dim, *, rope_theta, factor, mixed_b=None):
    # ntk_scaling_rope.py, after https://kexue.fm/archives/9706, and not what is called NTK-aware elsewhere: the
    # first pair is slowed as well. With mixed_b, pair i turns exp(a (i + 1)^b) times slower, the last factor times.
    if mixed_b is None:
        return default(dim, rope_theta=rope_theta * factor)[0] / factor ** (2 / dim), 1.0
    a = math.log(factor) / (dim / 2) ** mixed_b
    return default(dim, rope_theta=rope_theta)[0] / np.exp(a * np.arange(1, dim // 2 + 1) ** mixed_b), 1.0


def proportional(dim, *, rope_theta, partial_rotary_factor):
    # gemma4_rope.py: the pairs that stand still are padding. It knows no factor.
    turning = int(dim * partial_rotary_factor) // 2
    inv_freq = 1 / rope_theta ** (np.arange(0, 2 * turning, 2) / dim)
    return np.concatenate([inv_freq, np.zeros(dim // 2 - turning)]), 1.0
