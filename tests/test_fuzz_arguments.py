"""Wrong arguments of the public functions: one line that names the argument, or a result that a table allows."""

import itertools

import fuzz
import fuzz_analysis
import fuzz_calls
import fuzz_models
import fuzz_parts
import pytest
from fuzz_harmless import harmless

CALLS = fuzz_calls.CALLS | fuzz_models.CALLS | fuzz_analysis.CALLS | fuzz_parts.CALLS
# They compile hundreds of programs. Their traced forms make the same checks.
SLOW = {"RotaryAttention", "Decoder", "generate", "beam_search", "speculative_decode"}

HUGE = {2**31, 2**64, 10**400}  # these sizes would take terabytes, or years
SIZE = {
    "capacity",
    "batch",
    "num_kv_heads",
    "head_dim",
    "num_layers",
    "max_new_tokens",
    "beams",
    "num_samples",
    "vocab_size",
    "width",
    "mlp_dim",
    "num_heads",
    "draft_tokens",
    "in_features",
    "kv_features",
    "num_axes",
    "num_features",
    "*num_text_tokens",
    "*kv_length",
    "*sizes",
    "*size",
    "num_prefix_tokens",
    "*height",
    "*width",
    "buckets",
    "rotary_dim",
    "*rotary_dim",
    "*num_heads",
    "*num_tokens",
    "*num_devices",
    "num_buckets",
    "num_positions",
    ("aliases", "*context_length"),
    ("plot.score_map", "*span"),
}


def is_too_large(name, argument, value):
    return (argument in SIZE or (name, argument) in SIZE) and isinstance(value, int) and value in HUGE


# Warnings are errors here. NNX reads the fields of a module before the module can check them, and wants its own
# context for stored weights.
@pytest.mark.filterwarnings("ignore:Python iterable type:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name in SLOW)) for name in CALLS])
def test_a_wrong_argument_is_named_or_known_to_be_harmless(name):
    function, arguments, called = CALLS[name]
    found = [] if not isinstance(fuzz.outcome(function, arguments, set()), Exception) else ["the call itself"]
    for argument, wrong in itertools.product(arguments, fuzz.WRONG):
        value = fuzz.WRONG[wrong]()
        if is_too_large(name, argument, value):
            continue
        words = {argument.lstrip("*"), called.get(argument, argument)}
        try:
            got = fuzz.outcome(function, {**arguments, argument: value}, words)
        except AssertionError as error:
            found.append(f"{name}({argument}={wrong}): {error}")
            continue
        is_refused = isinstance(got, Exception)
        if is_refused and wrong in harmless(name, argument):
            found.append(f"{name}({argument}={wrong}) is listed as harmless, but refused: {got}")
        if not is_refused and wrong not in harmless(name, argument):
            found.append(f"{name}({argument}={wrong}) is accepted in silence")
    assert not found, "\n".join(["", *found])
