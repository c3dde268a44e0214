"""What the tests of programs share."""

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache


@pytest.fixture(scope="module")
def quick_compilation():
    """Less optimization, where results are compared with each other and nothing is timed in earnest."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def no_compilation_cache():
    """Without the cache: a program for a TPU cannot be loaded from it on a machine without one.

    jax decides once in a process whether it uses the cache, so that decision must be reset.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()
