"""Replaces results by NaN under a condition that is known only at run time."""

import jax
import jax.numpy as jnp


def nan_where(wrong, values) -> jax.Array:
    """``values``, but NaN where ``wrong``: bool, of as many axes."""
    # A NaN that is a constant would stop every program under jax_debug_nans. The square root of -0 is -0, and
    # adding it changes nothing.
    return values + jnp.sqrt(-wrong.astype(values.dtype))
