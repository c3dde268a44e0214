"""Checks the arguments of the analyses, and reads schedules as host frequencies."""

import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_integer, host_array, shown
from rope_jax.core.frequencies import Frequencies, FrequencyChoice, call_schedule, check_schedule


def host_of(frequencies, rotary_dim: int | None = None, *, one_axis: bool = True) -> Frequencies:
    """Host frequencies of one position axis; of several only if ``one_axis`` is False; the same in all heads."""
    if isinstance(frequencies, Frequencies | FrequencyChoice):
        if rotary_dim is not None:
            raise ValueError(
                f"rotary_dim must be left out beside Frequencies, which have R/2 = {frequencies.num_pairs} pairs, "
                f"got {shown(rotary_dim)}"
            )
    elif rotary_dim is not None:
        check_schedule(frequencies, "frequencies")
        frequencies = call_schedule(frequencies, checked_count("rotary_dim", rotary_dim), argument="frequencies")
    if isinstance(frequencies, Frequencies) and frequencies.on_host:
        if frequencies.num_heads is not None or (one_axis and frequencies.inv_freq.ndim > 1):
            axes = "[R/2]" if one_axis else "[R/2] or [A, R/2]"
            raise ValueError(f"inv_freq must be {axes}, got shape {frequencies.inv_freq.shape}")
        return frequencies
    if isinstance(frequencies, Frequencies):
        got = "Frequencies of a jax array; build Frequencies from numpy.asarray(array)"
    elif isinstance(frequencies, FrequencyChoice):
        got = "FrequencyChoice; pass one of its options"
    else:
        got = f"{type(frequencies).__name__}; pass rotary_dim= beside a schedule, or wrap numbers as Frequencies"
    raise TypeError(f"frequencies must be host Frequencies, got {got}")


def checked_distances(distances, argument: str = "distances") -> np.ndarray:
    """``distances`` as int64 or float64."""
    distances = host_array(argument, distances)
    if distances.dtype.kind not in "iuf":
        raise TypeError(f"{argument} must be integers or floats, got dtype {distances.dtype}")
    if distances.dtype.kind == "f":
        distances = distances.astype(np.float64)
    if distances.dtype.kind != "i" and not np.all(np.abs(distances) < 2**63):  # False for nan too
        raise ValueError(f"{argument} must be finite and below 2^63, got {distances.min()} to {distances.max()}")
    return distances if distances.dtype == np.float64 else distances.astype(np.int64)


def checked_features(argument: str, x, head_dim: int) -> np.ndarray:
    x = host_array(argument, x)
    if not (x.dtype.kind in "iu" or jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(f"{argument} must be real numbers, got dtype {x.dtype}")
    if x.shape != (head_dim,):
        raise ValueError(f"{argument} must have shape [H] with H={head_dim}, got {x.shape}")
    return x.astype(np.float64)


def checked_count(argument: str, value) -> int:
    """An integer from 1 to ``2^63 - 1``."""
    count = check_integer(argument, value, 1)
    if count >= 2**63:
        raise ValueError(f"{argument} must be below 2^63, got {shown(count)}")
    return count
