"""What the tests of programs share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Less optimization, where results are compared with each other and nothing is timed in earnest."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
