"""The zigzag order of tokens, which divides causal attention evenly among devices."""

import numpy as np

from rope_jax._checks import check_integer


def zigzag_sequence_index(num_tokens: int, num_devices: int) -> np.ndarray:
    """The sequence index of the token in each slot, so that causal attention is equal work for every device.

    The row is cut into ``2n`` chunks for n devices. Device i holds chunks ``i`` and ``2n-1-i``: an early chunk,
    whose queries read few keys, and a late chunk, whose queries read many (Grattafiori et al. 2024, Llama 3,
    section 3.3.2). Index the T axis of tokens, labels and any other input with the result, and shard it over the
    devices. Pass the result itself as ``positions`` and ``sequence_index``; rotation and attention need nothing
    else.

    Args:
      num_tokens: T, a multiple of ``2n``.
      num_devices: n, the devices that share a row.

    Returns:
      int32 ``[T]``, on the host; :func:`zigzag_inverse` is its inverse.

    Raises:
      TypeError: if an argument is not an integer.
      ValueError: if an argument is below 1, or ``num_tokens`` is not a multiple of ``2n``.

    Example:
      >>> import rope_jax
      >>> rope_jax.attention.zigzag_sequence_index(8, 2).tolist()  # device 0 | device 1
      [0, 1, 6, 7, 2, 3, 4, 5]
    """
    num_tokens = check_integer("num_tokens", num_tokens, 1)
    num_devices = check_integer("num_devices", num_devices, 1)
    if num_tokens % (2 * num_devices):
        raise ValueError(f"num_tokens must be a multiple of 2 * num_devices = {2 * num_devices}, got {num_tokens}")
    chunks = np.arange(num_tokens, dtype=np.int32).reshape(2 * num_devices, -1)
    early, late = chunks[:num_devices], chunks[num_devices:]
    return np.stack([early, late[::-1]], axis=1).ravel()


def zigzag_inverse(num_tokens: int, num_devices: int) -> np.ndarray:
    """The slot of each token in :func:`zigzag_sequence_index`: restores the order of the text in an output.

    Args:
      num_tokens: T, a multiple of ``2n``.
      num_devices: n, the devices that share a row.

    Returns:
      int32 ``[T]``, on the host.

    Raises:
      TypeError: as :func:`zigzag_sequence_index`.
      ValueError: as :func:`zigzag_sequence_index`.

    Example:
      >>> import numpy as np, rope_jax
      >>> text = np.array(list("ringring"))
      >>> "".join(text[rope_jax.attention.zigzag_sequence_index(8, 2)][rope_jax.attention.zigzag_inverse(8, 2)])
      'ringring'
    """
    return np.argsort(zigzag_sequence_index(num_tokens, num_devices)).astype(np.int32)
