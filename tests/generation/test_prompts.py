import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import build, init

import rope_jax
from rope_jax.generation.loop import run_on_device


def test_each_row_is_its_prompt_and_padding():
    prompts = [[5, 6, 7], np.array([8], np.uint8), (1, 2)]
    tokens, mask = rope_jax.generation.pad_prompts(prompts, buckets=4)
    assert tokens.dtype == jnp.int32 and mask.dtype == bool
    for prompt, row, real in zip(prompts, tokens, mask, strict=True):
        assert real.tolist() == [t < len(prompt) for t in range(4)]
        assert row[: len(prompt)].tolist() == list(prompt) and not row[len(prompt) :].any()


@pytest.mark.parametrize(
    ("buckets", "widths"),
    [
        (2, {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 9: 16}),
        (3, {3: 3, 4: 6, 7: 12}),
        ((9, 2, 5), {1: 2, 2: 2, 3: 5, 5: 5, 6: 9, 9: 9}),
    ],
)
def test_the_width_is_the_smallest_bucket_that_holds_the_longest(buckets, widths):
    for longest, width in widths.items():
        assert rope_jax.generation.pad_prompts([[0], [0] * longest], buckets=buckets)[0].shape == (2, width)


def test_many_lengths_compile_one_program_for_each_bucket(caplog):
    model = build(num_layers=1)
    params = init(model)

    def write(length):
        prompt, mask = rope_jax.generation.pad_prompts([[3] * length, [1]], buckets=(8, 16))
        rope_jax.generate(model, params, prompt, mask=mask, max_new_tokens=2, temperature=0)

    run_on_device.clear_cache()
    with jax.log_compiles():
        write(8)
        write(16)
        assert caplog.text.count("Compiling jit(run_on_device)") == run_on_device._cache_size() == 2
        caplog.clear()
        for length in range(1, 17):
            write(length)
    assert "Compiling" not in caplog.text  # no program at all, however small


@pytest.mark.parametrize(
    ("prompts", "buckets", "error", "says"),
    [
        ([], 16, ValueError, "prompts must hold at least one prompt, got none"),
        ([b"ab", b""], 16, ValueError, r"prompts must hold at least one token each, got none in prompts\[1\]"),
        ([[1], []], 16, ValueError, r"prompts must hold at least one token each, got none in prompts\[1\]"),
        ([[1], [[2]]], 16, ValueError, r"prompts\[1\] must have shape \[T\], got \(1, 1\)"),
        ([[1], [2.0]], 16, TypeError, r"prompts\[1\] must be integer, got dtype float64"),
        ([[1], [2**40]], 16, ValueError, "prompts must fit in int32"),
        ([np.array([2**64 - 1], np.uint64)], 16, ValueError, "prompts must fit in int32"),
        ([[1] * 9], (4, 8), ValueError, r"buckets must hold the longest prompt, T=9, got \(4, 8\)"),
        ([[1]], (), ValueError, r"buckets must hold the longest prompt, T=1, got \(\)"),
        ([[1]], 0, ValueError, "buckets must be at least 1, got 0"),
        ([[1]], (0, 8), ValueError, "buckets must be at least 1, got 0"),
        ([[1]], 1.5, TypeError, "buckets must be an integer, got 1.5"),
    ],
)
def test_refusals(prompts, buckets, error, says):
    with pytest.raises(error, match=says):
        rope_jax.generation.pad_prompts(prompts, buckets=buckets)
