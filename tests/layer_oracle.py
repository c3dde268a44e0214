"""One attention layer in float64 and numpy, with any mask, and keys and values of x or of another sequence."""

import jax
import numpy as np
import oracles


def attention_layer(module, params, x, allowed, positions, kv=None, kv_positions=None):
    """``y [B, T, D]``; ``allowed`` is bool ``[B, N or 1, T, S]``, and a query without any key gives 0.

    Positions are ``[T]`` or ``[B, T]``, or any numbers if the module has no rope.
    """
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    x = np.asarray(x, np.float64)
    kv = x if kv is None else np.asarray(kv, np.float64)
    kv_positions = positions if kv_positions is None else kv_positions
    q = np.einsum("btd,dnh->btnh", x, p["query"]["kernel"])
    k, v = (np.einsum("bsd,dkh->bskh", kv, p[name]["kernel"]) for name in ("key", "value"))
    if module.rope is not None:
        q, k = (rotated(module, a, at) for a, at in ((q, positions), (k, kv_positions)))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    allowed = np.broadcast_to(allowed, scores.shape)
    exponents = np.where(allowed, np.exp(scores - scores.max()), 0)
    total = exponents.sum(-1, keepdims=True)
    weights = exponents / np.where(total == 0, 1, total)
    return np.einsum("bnts,bsnh,nhd->btd", weights, v, p["out"]["kernel"])


def rotated(module, a, positions):
    """``a [B, T, N, H]`` rotated to numbers ``[T]`` or ``[B, T]``."""
    positions = np.broadcast_to(np.asarray(positions, np.float64), a.shape[:2])
    frequencies = module.rope.frequencies()
    angles = positions[..., None] * np.asarray(frequencies.inv_freq, np.float64)
    return oracles.rotate_features(a, np.cos(angles), np.sin(angles), module.rope.layout)


def prefix_pairs(length: int, prefix) -> np.ndarray:
    """Which key each query reads, bool ``[B, 1, T, S]``: all of its row's prefix, and no later key behind it."""
    t, s = np.mgrid[:length, :length]
    prefix = np.asarray(prefix)[:, None, None]
    return ((s <= t) | ((t < prefix) & (s < prefix)))[:, None]


def assert_gradients(function, oracle, operands, seed=0, rounding=1024 * oracles.EPS32):
    """Compares gradients with central differences of the oracle in float64, along a random direction of each."""
    rng = np.random.default_rng(seed)
    cotangent = rng.normal(size=np.shape(function(*operands)))
    loss = lambda *operands: (function(*operands) * cotangent.astype(np.float32)).sum()
    for i, gradient in enumerate(jax.jit(jax.grad(loss, tuple(range(len(operands)))))(*operands)):
        direction = rng.normal(size=gradient.shape)

        def at(step, i=i, direction=direction):
            moved = [np.asarray(operand, np.float64) for operand in operands]
            moved[i] = moved[i] + step * direction
            return np.vdot(oracle(*moved), cotangent)

        want = (at(1e-5) - at(-1e-5)) / 2e-5
        assert np.isfinite(np.asarray(gradient)).all()
        limit = rounding * np.linalg.norm(direction) * np.linalg.norm(np.asarray(gradient, np.float64))
        assert abs(np.vdot(np.asarray(gradient, np.float64), direction) - want) <= limit
        assert abs(want) > 4 * limit  # the comparison sees something
