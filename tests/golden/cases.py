"""Cases to compare with transformers: our schedule, their config and the tolerance."""

import numpy as np

import rope_jax

EPS32 = 2.0**-24  # unit roundoff of float32


def _case(name, schedule, rotary_dim, rope_type, seq_len=None, **parameters):
    """A case for LlamaConfig: ``max_position_embeddings`` goes to the config, the rest to its rope_parameters."""
    config = dict(hidden_size=4 * rotary_dim, num_attention_heads=4, head_dim=rotary_dim)
    if "max_position_embeddings" in parameters:
        config["max_position_embeddings"] = parameters.pop("max_position_embeddings")
    config["rope_parameters"] = dict(rope_type=rope_type, **parameters)
    return dict(
        name=name, schedule=schedule, rotary_dim=rotary_dim, config=("LlamaConfig", config), seq_len=seq_len
    )


def _dynamic(seq_len):
    ours = ("DynamicNTK", dict(factor=2.0, original_length=2048, context_length=seq_len))
    theirs = dict(factor=2.0, rope_theta=1e4, max_position_embeddings=2048)
    return _case(f"dynamic_{seq_len}", ours, 64, "dynamic", seq_len, **theirs)


def _yarn(name, rotary_dim=64, base=1e6, factor=4.0, original_length=32_768, **options):
    ours = ("Yarn", dict(base=base, factor=factor, original_length=original_length, **options))
    theirs = dict(rope_theta=base, factor=factor, original_max_position_embeddings=original_length, **options)
    longer = int(factor * original_length)
    return _case(name, ours, rotary_dim, "yarn", max_position_embeddings=longer, **theirs)


def _longrope(name, seq_len, **options):
    # As in Phi-3: part of the head rotates, and the factor is the ratio of two fields of the config.
    short, long = [1 + 0.05 * i for i in range(16)], [1 + i**1.3 for i in range(16)]
    divisors = dict(short_factor=short, long_factor=long)
    config = dict(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5, **divisors, **options
        ),
    )
    ours = ("LongRope", dict(original_length=4096, factor=32.0, context_length=seq_len, **divisors, **options))
    return dict(name=name, schedule=ours, rotary_dim=32, config=("Phi3Config", config), seq_len=seq_len)


def _llama3(name, factor, low, high):
    ours = ("Llama3", dict(factor=factor, original_length=8192, low_freq_factor=low, high_freq_factor=high))
    theirs = dict(factor=factor, original_max_position_embeddings=8192, low_freq_factor=low, high_freq_factor=high)
    return _case(name, ours, 64, "llama3", rope_theta=5e5, max_position_embeddings=131_072, **theirs)


def _proportional(name, proportion, factor):
    ours = ("Proportional", dict(proportion=proportion, factor=factor, base=1e6))
    theirs = dict(partial_rotary_factor=proportion, factor=factor, rope_theta=1e6)
    return _case(name, ours, 64, "proportional", **theirs)


CASES = [
    _case("default", ("Standard", dict(base=1e4)), 64, "default", rope_theta=1e4),
    _case("default_5e5", ("Standard", dict(base=5e5)), 64, "default", rope_theta=5e5),
    _case("default_48", ("Standard", dict(base=1e4)), 48, "default", rope_theta=1e4),
    _case("linear", ("Linear", dict(factor=3.0, base=1e4)), 64, "linear", factor=3.0, rope_theta=1e4),
    *map(_dynamic, [100, 2048, 2049, 9000, 100_001]),
    _yarn("yarn"),
    _yarn("yarn_deepseek", base=1e4, factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.707),
    _yarn("yarn_mscale_alone", mscale=0.5),
    _yarn("yarn_attention_factor", attention_factor=1.25),
    _yarn("yarn_untruncated", base=1.5e5, factor=32.0, original_length=4096, beta_fast=24.0, truncate=False),
    # Both ends of the ramp at pair 22.5; the upper end behind the last pair, at the bound of R - 1.
    _yarn("yarn_step", base=1e4, original_length=4096, beta_fast=1.0, beta_slow=1.0, truncate=False),
    _yarn("yarn_bounded", base=50.0, beta_fast=4096.0),
    _longrope("longrope_short", 4096),
    _longrope("longrope_long", 4097),
    _longrope("longrope_attention_factor", 4097, attention_factor=1.5),
    _llama3("llama3", 8.0, 1.0, 4.0),
    _llama3("llama3_wide", 32.0, 0.5, 16.0),
    _proportional("proportional", 0.25, 1.0),
    _proportional("proportional_factor", 0.3, 8.0),  # 9.6 pairs: 9 rotate
]
NAMES = [case["name"] for case in CASES]


def schedule(case):
    """Our schedule of a case."""
    name, fields = case["schedule"]
    return getattr(rope_jax, name)(**fields)


def config(case):
    """Their config of a case, made afresh since transformers writes into the given dictionaries."""
    import copy

    import transformers

    name, fields = case["config"]
    return getattr(transformers, name)(**copy.deepcopy(fields))


def ask_transformers(case):
    """``inv_freq`` as float32 numpy and the attention factor, computed by transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    made = config(case)
    rope_type = made.rope_parameters["rope_type"]
    if rope_type == "default":
        inv_freq, attention_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(made)
    else:
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](made, seq_len=case["seq_len"])
    return inv_freq.numpy(), attention_factor


def frequency_error(schedule, rotary_dim, inv_freq):
    """The error bound of float32 arithmetic in transformers against float64 ``inv_freq``, by pair, in radians.

    For every schedule: the power has an error of one ulp, 2 EPS32. Its inverse, the factor and the product, or the
    base of the dynamic schedule, add 3 roundings. If R is not a power of two, the exponent 2i/R is rounded, and the
    power multiplies this error by ln(base).

    A blend f (w + (1 - w) / factor) has an error of f times the error of w, however small the result is. For YaRN w
    is (i - low) / (high - low): four roundings, and the rounding of low times low / (high - low) < 2. For llama3 w is
    (turns - low) / (high - low): turns, at most high, after six roundings, and so 6 high / (high - low) <= 8. Two
    differences and the sum follow: 12 EPS32 covers both.
    """
    exponent = 0.0 if rotary_dim & (rotary_dim - 1) == 0 else np.log(schedule.base)
    blends = isinstance(schedule, rope_jax.Yarn | rope_jax.Llama3)
    blend = 12 * rope_jax.core.geometric(rotary_dim, schedule.base) if blends else 0.0
    return EPS32 * ((5 + exponent) * inv_freq + blend)


def check(case, inv_freq, attention_factor):
    """Asserts that our schedule agrees with transformers."""
    ours = schedule(case)(case["rotary_dim"])
    theirs = np.asarray(inv_freq, np.float64)
    assert theirs.shape == ours.inv_freq.shape, (theirs.shape, ours.inv_freq.shape)
    off = np.abs(theirs - ours.inv_freq) > frequency_error(schedule(case), case["rotary_dim"], ours.inv_freq)
    assert not off.any(), f"pairs {np.flatnonzero(off)}: {ours.inv_freq[off]}, transformers has {theirs[off]}"
    # Python floats on both sides; only the order of a sum or a quotient may differ.
    np.testing.assert_allclose(ours.attention_factor, attention_factor, rtol=1e-12)
