"""Every test runs with strict dtype promotion: nothing is promoted that the code does not promote itself."""

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compilation makes the first example slow, and CI machines are noisy: no deadline, the same examples each time.
hypothesis.settings.register_profile("house", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("house")
