"""Every test runs with strict dtype promotion: nothing is promoted that the code does not promote itself."""

from pathlib import Path

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compilation makes the first example slow, and CI machines are noisy: no deadline, the same examples each time.
hypothesis.settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("house")
# The workers compile thousands of small programs, most of them alike: they share what they compiled.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of live programs cost gigabytes, and make every garbage collection slow."""
    yield
    jax.clear_caches()
