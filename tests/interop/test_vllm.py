"""Schedules against vLLM, with the settings of released checkpoints."""

import dataclasses
import math

import numpy as np
import oracles_vllm
import pytest

import rope_jax

# Of Phi-3.5-vision-instruct, rounded to two decimals.
PHI_LONG = [1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62, 3.23, 3.23, 4.79, 7.4, 7.7, 9.09, 12.2, 17.67, 24.46, 28.57, 30.42, 30.84, 32.59, 32.93, 42.32, 44.96, 50.34, 50.45, 57.55, 57.93, 58.21, 60.14, 62.61, 62.62, 62.71, 63.14, 63.14, 63.77, 63.93, 63.96, 63.97, 64.03, 64.07, 64.08, 64.12, 64.41, 64.48, 64.51, 64.53, 64.84]  # fmt: skip
PHI_SHORT = [1.08, 1.1, 1.13, 1.28, 1.31, 1.45, 1.45, 1.95, 2.03, 2.43, 2.57, 2.95, 3.73, 3.87, 4.19, 4.44, 4.64, 4.98, 5.16, 5.28, 5.76, 5.89, 5.89, 5.97, 6.09, 6.28, 6.77, 6.89, 7.11, 7.13, 7.18, 7.29, 7.34, 7.56, 7.62, 7.7, 7.88, 7.88, 7.88, 7.94, 7.95, 7.98, 8.2, 8.44, 8.47, 8.59, 8.81, 9.0]  # fmt: skip
PHI = dict(short_factor=PHI_SHORT, long_factor=PHI_LONG)
LONGEST = dict(original=4096, max_position_embeddings=131_072)


def theirs(rope_type, rotary_dim, original=None, **parameters):
    """vLLM's answer; ``original`` stands for a key of 32 letters."""
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    return getattr(oracles_vllm, rope_type)(rotary_dim, **parameters)


def assert_equal(ours, theirs):
    inv_freq, attention_factor = theirs
    # float64 on both sides: a few dozen roundings, of which a power of the base enlarges one twentyfold.
    np.testing.assert_allclose(ours.inv_freq, inv_freq, rtol=1e-12)
    assert math.isclose(ours.attention_factor, attention_factor, rel_tol=1e-12)


def long_rope(length):
    return rope_jax.LongRope(**PHI, original_length=4096, factor=32.0, context_length=length)


CHECKPOINTS = {  # rotary_dim, our schedule, their rope_type, their parameters
    "Llama-2-7b": (128, rope_jax.Standard(base=1e4), "default", dict(rope_theta=1e4)),
    "Mistral-7B-v0.3": (128, rope_jax.Standard(base=1e6), "default", dict(rope_theta=1e6)),
    # A quarter of heads of 96 turns: the exponents are over the 24.
    "gpt-neox-20b": (24, rope_jax.Standard(base=1e4), "default", dict(rope_theta=1e4)),
    "vicuna-7b-v1.5-16k": (128, rope_jax.Linear(factor=4.0), "linear", dict(rope_theta=1e4, factor=4.0)),
    "gemma-3-4b": (256, rope_jax.Linear(factor=8.0, base=1e6), "linear", dict(rope_theta=1e6, factor=8.0)),
    "Llama-3.1-8B": (
        128,
        rope_jax.Llama3(factor=8.0, original_length=8192),
        "llama3",
        dict(rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original=8192),
    ),
    "Llama-3.2-1B": (
        64,
        rope_jax.Llama3(factor=32.0, original_length=8192),
        "llama3",
        dict(rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original=8192),
    ),
    "Qwen2.5-7B, 128k": (
        128,
        rope_jax.Yarn(base=1e6, factor=4.0, original_length=32_768),
        "yarn",
        dict(rope_theta=1e6, factor=4.0, original=32_768),
    ),
    "gpt-oss-20b": (
        64,
        rope_jax.Yarn(base=1.5e5, factor=32.0, original_length=4096, truncate=False),
        "yarn",
        dict(rope_theta=150_000, factor=32.0, original=4096, beta_fast=32.0, beta_slow=1.0, truncate=False),
    ),
    "Olmo-3-32B": (
        128,
        rope_jax.Yarn(base=5e5, factor=8.0, original_length=8192, attention_factor=1.2079441541679836),
        "yarn",
        dict(rope_theta=5e5, factor=8.0, original=8192, attention_factor=1.2079441541679836),
    ),
    "Ministral-3": (
        128,
        rope_jax.Yarn(base=1e6, factor=16.0, original_length=16_384, mscale=1.0, mscale_all_dim=1.0),
        "yarn",
        dict(rope_theta=1e6, factor=16.0, original=16_384, mscale=1.0, mscale_all_dim=1.0),
    ),
    "DeepSeek-V2-Lite": (
        64,
        rope_jax.Yarn(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
        "deepseek_yarn",
        dict(rope_theta=1e4, factor=40, original=4096, mscale=0.707, mscale_all_dim=0.707),
    ),
    "DeepSeek-V3": (
        64,
        rope_jax.Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
        "deepseek_yarn",
        dict(rope_theta=1e4, factor=40, original=4096, mscale=1.0, mscale_all_dim=1.0),
    ),
    # Both ends at one turn: the ramp is what rounding leaves of it.
    "Kimi-K2": (
        64,
        rope_jax.Yarn(base=5e4, factor=32.0, original_length=4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
        "deepseek_yarn",
        dict(rope_theta=5e4, factor=32.0, original=4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    "Phi-3.5-vision": (
        96,
        long_rope(4097),
        "longrope",
        dict(rope_theta=1e4, **PHI, **LONGEST, max_model_len=131_072),
    ),
    "Phi-3.5-vision, 4k": (
        96,
        long_rope(4096),
        "longrope",
        dict(rope_theta=1e4, **PHI, **LONGEST, max_model_len=4096),
    ),
    "Hunyuan-A13B": (128, rope_jax.NTKAware(factor=1000.0), "dynamic_alpha", dict(rope_theta=1e4, alpha=1000.0)),
    "nomic-embed-text-v1.5, 8k": (
        64,
        rope_jax.DynamicNTK(base=1e3, factor=2.0, original_length=2048, context_length=8192),
        "dynamic",
        dict(rope_theta=1e3, factor=2.0, max_trained_positions=2048, max_position_embeddings=8192),
    ),
    "nomic-embed-text-v1.5, 2k": (
        64,
        rope_jax.DynamicNTK(base=1e3, factor=2.0, original_length=2048, context_length=2048),
        "dynamic",
        dict(rope_theta=1e3, factor=2.0, max_trained_positions=2048, max_position_embeddings=2048),
    ),
    "gemma-4, global layers": (
        512,
        rope_jax.Proportional(proportion=0.25, base=1e6),
        "proportional",
        dict(rope_theta=1e6, partial_rotary_factor=0.25),
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name):
    rotary_dim, schedule, rope_type, parameters = CHECKPOINTS[name]
    assert_equal(schedule(rotary_dim), theirs(rope_type, rotary_dim, **parameters))


# ---------------------------------------------------------- keys with another meaning in vLLM


def test_attn_factor_multiplies():
    """Our attention_factor, like that of transformers, replaces."""
    want = theirs("yarn", 128, rope_theta=1e6, factor=4.0, original=32_768, attn_factor=0.75)
    yarn = rope_jax.Yarn(base=1e6, factor=4.0, original_length=32_768)
    assert_equal(dataclasses.replace(yarn, attention_factor=0.75 * yarn(128).attention_factor)(128), want)
    assert dataclasses.replace(yarn, attention_factor=0.75)(128).attention_factor != want[1]


@pytest.mark.parametrize(
    ("mscales", "want"),
    [
        (dict(), 0.1 * math.log(40) + 1),
        (dict(mscale=0.707), 0.0707 * math.log(40) + 1),
        (dict(mscale_all_dim=0.5), (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
    ],
    ids=str,
)
def test_one_mscale_alone_counts(mscales, want):
    """In DeepSeek and vLLM. transformers and Yarn use the quotient if both are given, else neither."""
    _, attention_factor = answer = theirs("deepseek_yarn", 64, rope_theta=1e4, factor=40, original=4096, **mscales)
    assert math.isclose(attention_factor, want, rel_tol=1e-12)
    yarn = rope_jax.Yarn(factor=40.0, original_length=4096)
    assert_equal(dataclasses.replace(yarn, attention_factor=want)(64), answer)
    assert dataclasses.replace(yarn, **mscales)(64) == yarn(64)
    assert (yarn(64).attention_factor == attention_factor) == (not mscales)


def test_the_list_of_longrope_is_chosen_by_the_engine():
    """vLLM chooses by the longest length it admits; we choose by the given length, for each row."""
    one_engine = theirs("longrope", 96, rope_theta=1e4, **PHI, **LONGEST, max_model_len=131_072)
    assert_equal(long_rope(131_072)(96), one_engine)
    assert not np.allclose(long_rope(100)(96).inv_freq, one_engine[0])


def test_either_list_of_longrope_may_have_its_factor():
    """As in Phi-3.5-MoE, where both factors are equal, so that one attention_factor expresses them."""
    mscale = 1.243163121016122
    for max_model_len in (4096, 131_072):
        longest = dict(LONGEST, max_model_len=max_model_len, short_mscale=mscale, long_mscale=mscale)
        schedule = dataclasses.replace(long_rope(max_model_len), attention_factor=mscale)
        assert_equal(schedule(96), theirs("longrope", 96, rope_theta=1e4, **PHI, **longest))


def test_dynamic_had_a_constant_length():
    """Until pull request 41277 vLLM always took factor times the trained length: InternLM2, at any length."""
    want = theirs("dynamic_until_2026", 128, rope_theta=1e6, factor=2.0, max_position_embeddings=32_768)
    dynamic = rope_jax.DynamicNTK(base=1e6, factor=2.0, original_length=32_768)
    assert_equal(dynamic(128, context_length=2 * 32_768), want)
    assert not np.allclose(dynamic(128, context_length=32_768).inv_freq, want[0])


@pytest.mark.parametrize("mixed_b", [None, 0.625])
def test_ntk_slows_the_first_pair_too(mixed_b):
    """Unlike NTKAware, whose first pair keeps its speed. LongRope can express both forms by its divisors."""
    factor, dim = 8.0, 128
    inv_freq, _ = answer = theirs("ntk", dim, rope_theta=1e4, factor=factor, mixed_b=mixed_b)
    ladder = rope_jax.core.geometric(dim, 1e4)
    slower = ladder / inv_freq
    assert slower[0] > 1.01 and math.isclose(slower[-1], factor, rel_tol=1e-12)
    ntk_aware = rope_jax.NTKAware(factor=factor)(dim).inv_freq
    assert ntk_aware[0] == 1.0 and math.isclose(ladder[-1] / ntk_aware[-1], factor, rel_tol=1e-12)

    place = np.arange(1, dim // 2 + 1) / (dim // 2)  # of a pair: 1 is the last
    divisors = factor ** (place if mixed_b is None else place**mixed_b)
    schedule = rope_jax.LongRope(
        short_factor=divisors, long_factor=divisors, original_length=2048, factor=1.0, attention_factor=1.0
    )
    assert_equal(schedule(dim, context_length=1), answer)
