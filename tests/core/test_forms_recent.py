"""Recent and learned forms: the score that each paper wants, cached decoding, and gradients.

Gradients are compared with central differences of a float64 model written here.
"""

import forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rope_jax
from rope_jax import Frequencies, Rotation, Standard

RNG = np.random.default_rng(21)
T, N, H = 12, 2, 64
Q, K = RNG.normal(size=(2, T, N, H)).astype(np.float32)
POSITIONS = np.arange(T) + 1000
LADDER = np.array([10_000.0 ** (-2 * i / H) for i in range(H // 2)])


def scores(q, k):
    """``[N, T, S]`` in float64."""
    return np.einsum("tnh,snh->nts", np.float64(q), np.float64(k))


def as_complex(x, layout="half"):
    x, middle = np.float64(x), x.shape[-1] // 2
    return x[..., :middle] + 1j * x[..., middle:] if layout == "half" else x[..., 0::2] + 1j * x[..., 1::2]


# ---------------------------------------------------------------------------------- xPos


def xpos_scores(q, k, at_query, at_key):
    rotate = lambda x, sign, m: rope_jax.rotate(x, forms.xpos(sign, jnp.asarray(m)), layout="interleaved")
    return scores(rotate(q, 1, at_query), rotate(k, -1, at_key))


def test_xpos_scores_decay_with_the_distance():
    zeta = (np.arange(0, H, 2) / H + 0.4) / 1.4
    got = xpos_scores(Q, K, POSITIONS, POSITIONS)
    want = np.zeros((N, T, T))
    for t, s in np.ndindex(T, T):
        factor = zeta ** ((t - s) / 512) * np.exp(1j * (t - s) * LADDER)
        for n in range(N):
            want[n, t, s] = np.sum(
                as_complex(Q, "interleaved")[t, n] * factor * as_complex(K, "interleaved")[s, n].conj()
            ).real
    # Powers zeta^(1000 / 512) of the two sides, rounded to float32, cancel in the product.
    np.testing.assert_allclose(got, want, atol=64 * H * forms.EPS32 * np.abs(want).max())


def test_xpos_decodes_from_cached_keys():
    """Keys stay as stored, in one block and one by one: the scale of a token depends on its own position only."""
    whole = xpos_scores(Q, K, POSITIONS, POSITIONS)
    rotate = lambda sign, x, rows: rope_jax.rotate(
        jnp.asarray(x[rows]), forms.xpos(sign, jnp.asarray(POSITIONS[rows])), layout="interleaved"
    )
    stored = rotate(-1, K, slice(0, 8))
    for t in range(8, T):
        stored = jnp.concatenate([stored, rotate(-1, K, slice(t, t + 1))])
        step = scores(rotate(1, Q, slice(t, t + 1)), stored)
        np.testing.assert_allclose(step[:, 0], whole[:, t, : t + 1], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------- PoPE, RoPE++


def test_pope_scores():
    """``sum_c softplus(q_c) softplus(k_c) cos((s - t) theta_c + delta_c)`` (Gopalakrishnan et al. 2025)."""
    delta = -2 * np.pi * RNG.uniform(size=(N, H))
    inv_freq = Standard()(2 * H).inv_freq
    rotated_q = rope_jax.rotate(forms.magnitudes(Q), rope_jax.rotation(POSITIONS, Frequencies(inv_freq)))
    per_head = np.broadcast_to(inv_freq, (N, 1, H))
    keys = rope_jax.rotation(POSITIONS, Frequencies(per_head, phase=delta))
    got = scores(rotated_q, rope_jax.rotate(forms.magnitudes(K), keys))
    theta = np.array([10_000.0 ** (-c / H) for c in range(H)])
    want = np.zeros((N, T, T))
    for n, t, s in np.ndindex(N, T, T):
        magnitude = np.log1p(np.exp(np.float64(Q[t, n]))) * np.log1p(np.exp(np.float64(K[s, n])))
        want[n, t, s] = np.sum(magnitude * np.cos((s - t) * theta + delta[n]))
    np.testing.assert_allclose(got, want, atol=16 * forms.EPS32 * H)


def test_rope_plus_plus_scores_are_the_imaginary_part():
    """RoPE keeps the real part of ``sum q_m conj(k_n)``; the second kind of queries gives the negated imaginary part."""
    inv_freq = Standard()(H).inv_freq
    rotation = rope_jax.rotation(POSITIONS, Frequencies(inv_freq))
    behind = rope_jax.rotation(POSITIONS, Frequencies(inv_freq, phase=np.full(H // 2, -np.pi / 2)))
    k = rope_jax.rotate(K, rotation)
    real, imaginary = scores(rope_jax.rotate(Q, rotation), k), scores(rope_jax.rotate(Q, behind), k)
    turned = lambda x: as_complex(x) * np.exp(1j * POSITIONS[:, None, None] * LADDER)
    product = np.einsum("tni,sni->nts", turned(Q), turned(K).conj())
    np.testing.assert_allclose(real, product.real, atol=16 * forms.EPS32 * H)
    np.testing.assert_allclose(imaginary, product.imag, atol=16 * forms.EPS32 * H)


# ---------------------------------------------------------------------------------- STRING, ComRoPE


def matrix_exponential(generator):
    """Taylor's series of ``generator / 2^12``, squared 12 times."""
    small, term, total = generator / 2**12, np.eye(len(generator)), np.eye(len(generator))
    for order in range(1, 12):
        term = term @ small / order
        total = total + term
    for _ in range(12):
        total = total @ total
    return total


def test_string_is_the_exponential_of_commuting_generators():
    """``R(r) = exp(sum_a r_a L_a)`` with ``L_a = P S_a P^T``: P goes into the projections of queries and keys."""
    basis, frequencies = forms.STRING_BASIS.astype(np.float64), np.float64(forms.STRING)
    places = RNG.integers(-20, 20, size=(5, 2))
    rotation = rope_jax.rotation(places, Frequencies(frequencies))
    project = lambda x: jnp.asarray(np.float32(np.float64(x[:5]) @ basis))
    got = scores(rope_jax.rotate(project(Q), rotation), rope_jax.rotate(project(K), rotation))
    want = np.zeros((N, 5, 5))
    for t, s in np.ndindex(5, 5):
        angle = (places[t] - places[s]) @ frequencies
        block = np.zeros((H, H))
        for i, a in enumerate(angle):
            block[i + H // 2, i], block[i, i + H // 2] = a, -a
        moved = matrix_exponential(basis @ block @ basis.T)
        for n in range(N):
            want[n, t, s] = np.float64(K[s, n]) @ moved @ np.float64(Q[t, n])
    np.testing.assert_allclose(got, want, atol=64 * H * forms.EPS32)


# ---------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("heads", [6, 12])
def test_a_head_of_mhrope_is_text_rope_on_its_axis(heads):
    """Queries of a group share the frequencies of their key's head."""
    positions = RNG.integers(0, 10**6, size=(T, 3))
    x = RNG.normal(size=(T, heads, 128)).astype(np.float32)
    got = rope_jax.Rope(128, forms.mhrope).rotate(x, rope_jax.rotation(positions, forms.mhrope(128)))
    text = rope_jax.Rope(128, Standard(base=1e6))
    for n in range(heads):
        axis = n * 3 // heads
        want = text.rotate(x[:, n : n + 1], text.rotation(positions[:, axis]))
        np.testing.assert_array_equal(got[:, n : n + 1], want)


# ---------------------------------------------------------------------------------- gradients


def model(angles, x, weights):
    """A loss of x ``[T, N, H]`` rotated by angles ``[T, N, R/2]``, in float64."""
    rotated = as_complex(x) * np.exp(1j * angles)
    return float(
        np.sum(weights[..., : x.shape[-1] // 2] * rotated.real + weights[..., x.shape[-1] // 2 :] * rotated.imag)
    )


def central_differences(loss, at, step=1e-5):
    at = np.float64(at)
    gradient = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        moved = np.zeros(at.shape)
        moved[index] = step
        gradient[index] = (loss(at + moved) - loss(at - moved)) / (2 * step)
    return gradient


COORDINATES = RNG.integers(-9, 9, size=(7, 2)).astype(np.float32)
X, WEIGHTS = RNG.normal(size=(2, 7, 2, 6)).astype(np.float32)  # [T, N, H]
TIMES = np.arange(7.0)
LOG_LADDER = np.log([1.0, 0.1, 0.01])
dense = lambda f: np.einsum("ta,nai->tni", np.float64(COORDINATES), f)

LEARNED = {
    # name: parameter, Rotation of the parameter, float64 angles of the parameter
    "RoPE-Mixed": (
        RNG.normal(size=(2, 2, 3)),
        lambda f: rope_jax.rotation(jnp.int32(COORDINATES), Frequencies(f)),
        dense,
    ),
    "LightGlue, ComRoPE": (
        RNG.normal(size=(2, 3)),
        lambda f: rope_jax.rotation(jnp.asarray(COORDINATES), Frequencies(f)),
        lambda f: dense(np.stack([f, f])),
    ),
    "keypoints": (
        COORDINATES,
        lambda p: rope_jax.rotation(p, Frequencies(forms.LIGHTGLUE[:, :3])),
        lambda p: np.repeat((p @ np.float64(forms.LIGHTGLUE[:, :3]))[:, None], 2, axis=1),
    ),
    "LeRoPE": (
        0.1 * RNG.normal(size=3),
        lambda alpha: rope_jax.rotation(jnp.arange(7), Frequencies(jnp.exp(alpha + jnp.float32(LOG_LADDER)))),
        lambda alpha: np.repeat((TIMES[:, None] * np.exp(LOG_LADDER + alpha))[:, None], 2, axis=1),
    ),
    "PoPE, the phase of a head": (
        RNG.normal(size=(2, 3)),
        lambda d: rope_jax.rotation(
            jnp.arange(7), Frequencies(np.broadcast_to(np.exp(LOG_LADDER), (2, 1, 3)), phase=d)
        ),
        lambda d: TIMES[:, None, None] * np.exp(LOG_LADDER) + d,
    ),
    "Selective RoPE": (
        RNG.normal(size=(7, 2, 3)),
        lambda steps: Rotation(
            jnp.cos(jnp.cumsum(steps, axis=0)), jnp.sin(jnp.cumsum(steps, axis=0)), per_head=True
        ),
        lambda steps: np.cumsum(steps, axis=0),
    ),
}


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("name", LEARNED)
def test_gradients(name, mode):
    parameter, rotation, angles = LEARNED[name]
    loss = lambda p: jnp.sum(WEIGHTS * rope_jax.rotate(jnp.asarray(X), rotation(p)))
    differentiate = {"reverse": jax.grad, "forward": jax.jacfwd}[mode]
    got = np.float64(differentiate(loss)(jnp.float32(parameter)))
    want = central_differences(lambda p: model(angles(p), X, WEIGHTS), np.float32(parameter))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


# ---------------------------------------------------------------------------------- what is no rotation


def test_an_angle_for_each_feature_is_no_rotation():
    """The reason of ``forms.NO_ROTATION``: the two features of a pair have different angles, so lengths change."""
    x, position = np.float64(Q[0, 0]), 7
    half = position * LADDER
    pairs = np.stack([-x[1::2], x[0::2]], axis=-1).reshape(-1)  # features paired by twos
    tiled = x * np.cos(np.tile(half, 2)) + pairs * np.sin(np.tile(half, 2))
    doubled = x * np.cos(np.repeat(half, 2)) + pairs * np.sin(np.repeat(half, 2))
    assert abs(np.linalg.norm(doubled) - np.linalg.norm(x)) < 1e-12
    assert abs(np.linalg.norm(tiled) - np.linalg.norm(x)) > 0.1
