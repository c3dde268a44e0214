"""Builds normalised coordinates of patch centres, and varies the coordinates in training."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_axes, check_choice, check_dtype, check_real, checked_key, device_array
from rope_jax.core.grids import check_sizes

Normalize = Literal["own", "longer", "shorter", "area"]


def patch_centers(*sizes: int, normalize: Normalize = "own") -> jax.Array:
    """Coordinates of the centres of a grid's patches, divided by the size of the picture.

    On axis a of n patches the centre of patch i is ``(2 i + 1) / L - s``:

    ==========  =================  ===========  ==========================================================
    normalize   L                  s            used by
    ==========  =================  ===========  ==========================================================
    own         n                  1            DINOv3 (Siméoni et al. 2025, section 3.2): from -1 to 1
    longer      max(sizes)         1            DINOv3, ``normalize_coords="max"``
    shorter     min(sizes)         1            DINOv3, ``normalize_coords="min"``
    area        prod(sizes)^(1/A)  n / L        Mochi: times 96 for its area of 192 x 192
    ==========  =================  ===========  ==========================================================

    DINOv3 rotates by the coordinate times 2π, and leaves class and register tokens unrotated
    (``Rotation.prepend_identity``).

    Args:
      *sizes: the number of patches along each of the A axes, at least 1.
      normalize: the length L that divides the coordinates.

    Returns:
      float32 ``[T, A]`` with ``T = prod(sizes)``, in half lengths L.

    Raises:
      TypeError: if a size is not an integer.
      ValueError: if no size is given, a size is below 1, or ``normalize`` is unknown.

    Example:
      >>> import rope_jax
      >>> rope_jax.core.patch_centers(1, 4).tolist()
      [[0.0, -0.75], [0.0, -0.25], [0.0, 0.25], [0.0, 0.75]]
    """
    lengths = np.array(check_sizes(sizes), np.float64)
    check_choice("normalize", normalize, get_args(Normalize))
    divisor = {
        "own": lengths,
        "longer": lengths.max(),
        "shorter": lengths.min(),
        "area": np.prod(lengths) ** (1 / len(lengths)),
    }[normalize]
    shift = lengths / divisor if normalize == "area" else 1.0
    centers = (2 * np.indices(sizes).reshape(len(sizes), -1).T + 1) / divisor - shift
    return jnp.asarray(centers, jnp.float32)


def augment_centers(key, centers, *, shift=0.0, jitter=1.0, rescale=1.0) -> jax.Array:
    """Shifts and scales the coordinates at random in training (Siméoni et al. 2025, DINOv3, section 3.2).

    ``(centers + u) * v * w``, with the same draws for all tokens: ``u[a]`` is uniform in [-shift, shift], ``v[a]``
    log-uniform in [1/jitter, jitter], and ``w``, common to the A axes, log-uniform in [1/rescale, rescale].

    Args:
      key: a key of ``jax.random``. Use ``jax.vmap`` over keys for a draw for each row of a batch.
      centers: float ``[..., T, A]``, from :func:`patch_centers`.
      shift: at least 0, in the unit of ``centers``.
      jitter: at least 1.
      rescale: at least 1. The released models use 2.

    Returns:
      ``[..., T, A]`` in the dtype of ``centers``.

    Raises:
      TypeError: if ``key`` is not a key, ``centers`` is not floating, or a range is not a real number.
      ValueError: if the axes T and A are missing, or a range is below its least value.

    Example:
      >>> import jax, rope_jax
      >>> centers = rope_jax.core.patch_centers(2, 2)
      >>> rope_jax.core.augment_centers(jax.random.key(0), centers, rescale=2.0).shape
      (4, 2)
    """
    key, centers = checked_key("key", key), device_array("centers", centers)
    check_axes("key", key, "")
    check_axes("centers", centers, "... T A")
    check_dtype("centers", centers, jnp.floating, "floating")
    for argument, value, least in (("shift", shift, 0), ("jitter", jitter, 1), ("rescale", rescale, 1)):
        number = check_real(argument, value)
        if number is None:
            raise TypeError(f"{argument} must be a real number, got None")
        if isinstance(number, float) and number < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")
    # Each range has its own key, so that its draw does not depend on the other ranges.
    shift_key, jitter_key, rescale_key = jax.random.split(key, 3)
    axes, dtype = centers.shape[-1:], centers.dtype
    centers += jnp.asarray(shift, dtype) * jax.random.uniform(shift_key, axes, dtype, -1, 1)
    for limit, factor_key, shape in ((jitter, jitter_key, axes), (rescale, rescale_key, ())):
        log_limit = jnp.log(jnp.asarray(limit, dtype))
        centers *= jnp.exp(log_limit * jax.random.uniform(factor_key, shape, dtype, -1, 1))
    return centers
