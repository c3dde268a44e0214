"""The table of rotary forms in use: how rope_jax writes each form, and an oracle from the form's own formula.

An oracle maps the coordinates of one token (mpmath numbers) to the angle of each pair, in radians, by loops over pairs
and axes. A pair whose factor is no unit complex number gives the factor itself (an ``mpc``). Forms with frequencies
for each head give a list for each head. Pairs of features are written out as index tuples. Oracles use mpmath and
share no code with rope_jax.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mpf

import rope_jax
from rope_jax import Affine, Axial, Frequencies, Linear, NTKAware, Rope, Rotation, Sections, Standard

DIGITS = 50
BOUND = 1.2e-7  # the contract, at every int32 coordinate
EPS32, EPS64 = 2.0**-24, 2.0**-53
INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Written:
    """A form that is more than a :class:`Rope`: its rotation, and what happens to x before the rotation."""

    head_dim: int
    rotation: Callable[[Any], Rotation]
    layout: str = "half"
    prepare: Callable = lambda x: x

    def rotate(self, x, rotation):
        return rope_jax.rotate(self.prepare(x), rotation, layout=self.layout)


@dataclasses.dataclass(frozen=True)
class Form:
    """One row: a form's name, its users, its expression in rope_jax, and its oracle.

    Attributes:
      write: returns the expression; a function, so that an expression that fails is one failing test.
      oracle: the coordinates of a token -> the angle or factor of each pair (of each head).
      pairs: the two features of each pair.
      num_axes: A.
      tokens: fixed tokens, as ``(positions, coordinates)``: what a user passes, and the oracle's coordinates of each
        token (None for a token that is not rotated). By default tokens are sampled near and far.
      reach: the largest coordinate to sample, if the form is not for all int32 coordinates.
      floats: coordinates are float32 numbers below ``reach``.
      heads: N, for forms with frequencies or factors for each head.
      prepare: x as the oracle rotates it, from x as given (numpy float64).
      by_hand: the expression is more than a :class:`Rope`.
      learned: frequencies are float32 parameters: the float path, with its stated error.
      rounding: the error that the float32 arithmetic of the expression adds to cos and sin of size 1.
      prepared_rounding: the error of the prepared x, in units of the largest.
    """

    name: str
    users: str
    write: Callable[[], Any]
    oracle: Callable[[Sequence[mpf]], list]
    pairs: list[tuple[int, int]]
    num_axes: int = 1
    tokens: Callable[[], tuple[Any, list]] | None = None
    reach: int | None = None
    floats: bool = False
    heads: int | None = None
    prepare: Callable = lambda x: x
    by_hand: bool = False
    learned: bool = False
    rounding: float = 0.0
    prepared_rounding: float = 0.0


# ---------------------------------------------------------------------------------- what the oracles are made of


@functools.cache
def ladder(base, features: int) -> list:
    """``base^(-2i/features)`` for each pair i."""
    with mpmath.workdps(DIGITS):
        return [mpf(base) ** (mpf(-2 * i) / features) for i in range(features // 2)]


def half(features: int, first: int = 0) -> list[tuple[int, int]]:
    return [(first + i, first + i + features // 2) for i in range(features // 2)]


def interleaved(features: int, first: int = 0) -> list[tuple[int, int]]:
    return [(first + 2 * i, first + 2 * i + 1) for i in range(features // 2)]


def own(*ladders, read=None):
    """Each axis its own ladder, one after the other; ``read`` names the axis of each ladder."""
    axes = range(len(ladders)) if read is None else read
    return lambda p: [p[axis] * f for axis, freqs in zip(axes, ladders, strict=True) for f in freqs]


def by_turns(*ladders, read=None):
    """Each axis its own ladder, the pairs dealt by turns."""
    axes = range(len(ladders)) if read is None else read
    return lambda p: [
        p[axis] * f for each in zip(*ladders, strict=True) for axis, f in zip(axes, each, strict=True)
    ]


def one_ladder(freqs, axes: Sequence[int]):
    """One ladder; ``axes`` names the axis of each pair."""
    return lambda p: [p[axis] * f for axis, f in zip(axes, freqs, strict=True)]


def strided(sections) -> list[int]:
    """Axes 1 and 2 take every third pair up to three times their section, axis 0 all other pairs."""
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for pair in range(axis, 3 * sections[axis], 3):
            axes[pair] = axis
    return axes


def at(transform, oracle):
    """The oracle at ``transform(p)`` instead of p."""
    return lambda p: oracle(transform(p))


def grid(*sizes: int) -> list[tuple[int, ...]]:
    """The cells of a grid, row by row."""
    return [tuple(int(i) for i in cell) for cell in np.ndindex(*sizes)]


# ---------------------------------------------------------------------------------- oracles evaluated


def sampled(form):
    """Tokens near the origin, around a million and at both ends of int32; or within the reach of the form."""
    rng = np.random.default_rng(3)
    if form.floats:
        coordinates = rng.uniform(-form.reach, form.reach, (16, form.num_axes)).astype(np.float32)
    elif form.reach:
        coordinates = rng.integers(0, form.reach, (16, form.num_axes))
    else:
        draw = lambda low, high, rows: rng.integers(low, high, (rows, form.num_axes), endpoint=True)
        near = [draw(0, 0, 1), draw(0, 40, 5), draw(-40, 40, 4)]
        million = [draw(10**6 - 1000, 10**6 + 1000, 3), draw(-(10**6), 10**6, 2)]
        ends = [draw(INT32.max - 1000, INT32.max, 3), draw(INT32.min, INT32.min + 1000, 2)]
        coordinates = np.concatenate([*near, *million, *ends])
    positions = coordinates if form.floats else coordinates.astype(np.int32)
    return (positions[:, 0] if form.num_axes == 1 else positions), coordinates.tolist()


def tokens(form):
    positions, coordinates = form.tokens() if form.tokens else sampled(form)
    if form.tokens and form.num_axes == 1:
        positions = positions[:, 0]
    return jnp.asarray(positions), coordinates


def expected(form, coordinates):
    """Factors ``[T, (N,) R/2]`` of the oracle, and the sum of ``|position * frequency|`` over the axes."""
    with mpmath.workdps(DIGITS):
        evaluate = lambda p: np.array(form.oracle([mpf(c) for c in p]), object)
        zero = evaluate([0] * form.num_axes)
        is_factor = isinstance(zero.flat[0], mpmath.mpc)
        if not is_factor and not form.tokens:
            units = np.eye(form.num_axes, dtype=int).tolist()
            slopes = np.array([np.abs(np.float64(evaluate(unit) - zero)) for unit in units])
        factors, sizes = [], []
        for token in coordinates:
            if token is None:
                factors.append(np.ones(zero.shape))
                sizes.append(np.zeros(zero.shape))
                continue
            value = evaluate(token)
            to_complex = np.vectorize(lambda v: complex(v if is_factor else mpmath.expj(v)), otypes=[complex])
            factors.append(to_complex(value))
            if is_factor:
                sizes.append(np.full(zero.shape, float(max(map(abs, token)))))
            elif form.tokens:
                sizes.append(np.abs(np.float64(value)))
            else:
                sizes.append(np.abs(np.float64(zero)) + np.tensordot(np.abs(np.float64(token)), slopes, axes=1))
    return np.array(factors), np.array(sizes)


def tolerance(form, factors, sizes):
    """One float32 ulp at 1, the roundings of frequencies, and the roundings of the expression.

    Frequencies are rounded to float64: products, powers, and exponents times ln(base), up to 24 units. On the float
    path, frequencies, products and sums are rounded to float32.
    """
    angle = sizes * ((form.num_axes + 1) * EPS32 if form.learned or form.floats else 24 * EPS64)
    size = np.maximum(1, np.abs(factors))
    return size * (BOUND + angle + form.rounding)


def differences(got, want):
    return np.maximum(np.abs(got.real - want.real), np.abs(got.imag - want.imag))


def rotated(x, factors, pairs):
    """x ``[T, N, H]`` with each pair of features multiplied as a complex number by its factor, in float64."""
    y = np.array(x, np.float64)
    for i, (first, second) in enumerate(pairs):
        factor = factors[..., i] if factors.ndim == 3 else factors[:, None, i]
        y[..., first] = x[..., first] * factor.real - x[..., second] * factor.imag
        y[..., second] = x[..., second] * factor.real + x[..., first] * factor.imag
    return y


def allowed(form, prepared, factors, close):
    """The error of each rotated feature, if each pair's factor has the error ``close``: ``[T, N, H]``.

    Two products and a sum are rounded, and so is x if the form prepares x.
    """
    errors = np.full(prepared.shape, form.prepared_rounding * np.abs(prepared).max())
    close = close + 2 * EPS32 * np.maximum(1, np.abs(factors))
    for i, (first, second) in enumerate(form.pairs):
        bound = close[..., i] if factors.ndim == 3 else close[:, None, i]
        error = bound * (np.abs(prepared[..., first]) + np.abs(prepared[..., second]))
        errors[..., first] += error
        errors[..., second] += error
    return errors


# ---------------------------------------------------------------------------------- schedules written by hand


def ltx_ladder(rotary_dim: int) -> Frequencies:
    return Frequencies(np.pi / 2 * 1e4 ** np.linspace(0, 1, rotary_dim // 2))


def pixel_ladder(rotary_dim: int) -> Frequencies:
    return Frequencies(np.pi * np.linspace(1, 112, rotary_dim // 2))


def log_pixel_ladder(rotary_dim: int) -> Frequencies:
    return Frequencies(np.pi * 2 ** np.linspace(0, np.log2(224) - 1, rotary_dim // 2))


def ltx2_heads(rotary_dim: int) -> Frequencies:
    whole = Axial(sizes=(1364,) * 3, schedule=ltx_ladder, alternating=True)(4092).inv_freq
    return Frequencies(np.pad(whole, ((0, 0), (2, 0))).reshape(3, 32, rotary_dim // 2).swapaxes(0, 1))


def mhrope(rotary_dim: int) -> Frequencies:
    return Frequencies(np.eye(3)[[0, 0, 1, 1, 2, 2], :, None] * Standard(base=1e6)(rotary_dim).inv_freq)


def mochi(rotary_dim: int) -> Frequencies:
    return Frequencies(MOCHI.swapaxes(0, 1))


def mm_rope(rotary_dim: int) -> Frequencies:
    return Frequencies(np.eye(3)[:, (0, 0, 1, 2, 1, 2, 1, 2) * 8] * Standard()(rotary_dim).inv_freq)


# ---------------------------------------------------------------------------------- learned numbers, fixed here

_RNG = np.random.default_rng(15)
MIXED = _RNG.normal(size=(6, 2, 32)).astype(np.float32)  # [N, A, R/2]
MOCHI = _RNG.normal(size=(3, 6, 32)).astype(np.float32)  # [A, N, R/2]
LIGHTGLUE = _RNG.normal(size=(2, 32)).astype(np.float32)
STRING = _RNG.normal(size=(2, 32)).astype(np.float32)
STRING_BASIS = np.linalg.qr(_RNG.normal(size=(64, 64)))[0].astype(np.float32)
COMROPE = np.outer(_RNG.normal(size=2), _RNG.normal(size=32)).astype(
    np.float32
)  # linearly dependent angle matrices
STRETCH = 0.1 * _RNG.normal(size=64)  # LeRoPE's exponents
POPE_PHASE = -2 * np.pi * _RNG.uniform(size=64)
INPUT_STEPS = _RNG.normal(size=(40, 4, 32)).astype(np.float32)  # Selective RoPE: [T, N, R/2]
FOPE_COS, FOPE_SIN = np.eye(24) + 0.1 * _RNG.normal(size=(2, 4, 24, 24))  # [K, inputs, pairs]


def learned_heads(array) -> Callable:
    """An oracle for frequencies ``[N, A, R/2]``."""
    return lambda p: [
        [sum(p[a] * mpf(float(array[n, a, i])) for a in range(len(p))) for i in range(array.shape[2])]
        for n in range(array.shape[0])
    ]


def learned_dense(array) -> Callable:
    """An oracle for frequencies ``[A, R/2]``."""
    return lambda p: learned_heads(array[None])(p)[0]


# ---------------------------------------------------------------------------------- forms that are not only a Rope


def dinov3() -> Rope:
    """Centres of a grid of 3 rows and 4 columns, from -1 to 1; coordinate 1 is one turn of the first pair."""
    own_axes = Axial(sizes=(32, 32), schedule=Standard(base=100.0))
    turn = 2 * np.pi
    return Rope(
        64, Affine(schedule=own_axes, scale=(2 / 3 * turn, 2 / 4 * turn), offset=(-2 / 3 * turn, -3 / 4 * turn))
    )


def dinov3_angles(p, sizes=(3, 4)):
    centres = [2 * (c + mpf(1) / 2) / n - 1 for c, n in zip(p, sizes, strict=True)]
    return [2 * mpmath.pi * centre * f for centre in centres for f in ladder(100, 32)]


def sam2() -> Rope:
    return Rope(64, Axial(sizes=(32, 32)), layout="interleaved")


def pooled(_, cells=(2, 3, 4), kernel=(1, 2, 2)) -> Rotation:
    """FramePack: the mean of cos and sin over blocks of cells."""
    hunyuan = Rope(128, Axial(sizes=(16, 56, 56), schedule=Standard(base=256.0)))
    fine = hunyuan.rotation(rope_jax.grid_positions(*np.multiply(cells, kernel).tolist()))
    blocks = [size for pair in zip(cells, kernel, strict=True) for size in pair]
    return Rotation(
        *(part.reshape(*blocks, -1).mean(axis=(1, 3, 5)).reshape(math.prod(cells), -1) for part in fine)
    )


def pooled_factors(p, kernel=(1, 2, 2)):
    angles = own(ladder(256, 16), ladder(256, 56), ladder(256, 56))
    fine = [angles([c * k + j for c, k, j in zip(p, kernel, cell, strict=True)]) for cell in grid(*kernel)]
    return [sum(mpmath.expj(angle) for angle in each) / len(fine) for each in zip(*fine, strict=True)]


def xpos(sign: int, positions) -> Rotation:
    """The rotation of queries (sign 1) or keys (sign -1), times ``zeta_i^(sign m / 512)``."""
    zeta = (np.arange(0, 64, 2) + 0.4 * 64) / (1.4 * 64)
    scale = jnp.float32(zeta) ** (jnp.float32(positions)[:, None] * jnp.float32(sign / 512))
    return Rotation(*(part * scale for part in rope_jax.rotation(positions, Standard()(64))))


def xpos_factors(sign: int, p):
    factors = []
    for i, f in enumerate(ladder(10_000, 64)):
        zeta = (mpf(2 * i) / 64 + mpf(4) / 10) / (mpf(14) / 10)
        factors.append(zeta ** (sign * p[0] / 512) * mpmath.expj(p[0] * f))
    return factors


def fope(positions) -> Rotation:
    """FoPE: cos and sin of 24 pairs, mixed by a learned matrix of each key/value head; 8 pairs rest."""
    cos, sin = rope_jax.rotation(positions, Frequencies(Standard()(64).inv_freq[:24]))
    mix = lambda part, matrix: jnp.einsum("td,kdp->tkp", part, jnp.float32(matrix), precision="highest")
    rest = ((0, 0), (0, 0), (0, 8))
    cos, sin = jnp.pad(mix(cos, FOPE_COS), rest, constant_values=1.0), jnp.pad(mix(sin, FOPE_SIN), rest)
    return Rotation(cos, sin, per_head=True)


def fope_factors(p):
    angles = [p[0] * f for f in ladder(10_000, 64)[:24]]
    heads = []
    for cos_matrix, sin_matrix in zip(FOPE_COS.tolist(), FOPE_SIN.tolist(), strict=True):
        factors = [mpmath.mpc(1)] * 32
        for i in range(24):
            cos = sum(mpmath.cos(angle) * row[i] for angle, row in zip(angles, cos_matrix, strict=True))
            sin = sum(mpmath.sin(angle) * row[i] for angle, row in zip(angles, sin_matrix, strict=True))
            factors[i] = mpmath.mpc(cos, sin)
        heads.append(factors)
    return heads


def selective(_) -> Rotation:
    """Selective RoPE: the angles of each head are sums of steps that depend on the input."""
    angles = jnp.cumsum(jnp.asarray(INPUT_STEPS), axis=0)
    return Rotation(jnp.cos(angles), jnp.sin(angles), per_head=True)


def selective_angles(p):
    steps = INPUT_STEPS[: int(p[0]) + 1].tolist()
    return [[sum(mpf(step[n][i]) for step in steps) for i in range(32)] for n in range(4)]


def magnitudes(x):
    """PoPE: the magnitude softplus(x) of each feature, as the first member of a pair."""
    return jnp.concatenate([jax.nn.softplus(x), jnp.zeros_like(x)], axis=-1)


def numpy_magnitudes(x):
    return np.concatenate([np.log1p(np.exp(x)), np.zeros_like(x)], axis=-1)


MOCHI_UNIT = 192 / 140**0.5  # 10 rows, 14 columns
LTX_COORDINATES = dict(scale=(2 * 8 / 25 / 20, 2 * 32 / 2048, 2 * 32 / 2048), offset=-1.0)


def ltx_seen(p):
    """t, h, w of a token from -1 to 1: steps of 8 frames at 25 per second and 32 pixels, in 20 seconds and 2,048 pixels."""
    return [2 * p[0] * 8 / mpf(25) / 20 - 1, 2 * p[1] * 32 / mpf(2048) - 1, 2 * p[2] * 32 / mpf(2048) - 1]


def ltx_angles(p):
    ends = [mpmath.pi / 2 * mpf(10_000) ** (mpf(j) / 340) for j in range(341)]
    return [f * seen for f in ends for seen in ltx_seen(p)]


def ltx2_angles(p):
    """The ladder over 4,096 features, cut into 32 heads of 64 pairs; the first two pairs rest."""
    ends = [mpmath.pi / 2 * mpf(10_000) ** (mpf(j) / 681) for j in range(682)]
    flat = [mpf(0)] * 2 + [f * seen for f in ends for seen in ltx_seen(p)]
    return [flat[64 * n : 64 * (n + 1)] for n in range(32)]


def mochi_coordinates(p, sizes=(10, 14)):
    """Centres of cells about the origin, in units in which the picture has the area of 192 by 192."""
    unit = 192 / mpmath.sqrt(sizes[0] * sizes[1])
    return [p[0], *[(c + mpf(1) / 2 - mpf(n) / 2) * unit for c, n in zip(p[1:], sizes, strict=True)]]


def pixel_angles(bands, p, sizes=(14, 20)):
    """Coordinates from -1 to 1, both ends included."""
    return [(2 * c / mpf(n - 1) - 1) * f for c, n in zip(p, sizes, strict=True) for f in bands()]


def linear_bands():
    return [mpmath.pi * (1 + mpf(111) * j / 15) for j in range(16)]


def log_bands():
    return [mpmath.pi * mpf(2) ** ((mpmath.log(224, 2) - 1) * j / 15) for j in range(16)]


def esmfold2() -> Rope:
    return Rope(64, Axial(sizes=(4, 4, 4, 20, 32), schedule=(*[Standard(base=20.0)] * 3, Standard(), None)))


def esmfold2_angles(p):
    places = [p[a] * mpf(20) ** (-mpf(i) / 2) for a in range(3) for i in range(2)]
    return [*places, *[p[3] * mpf(10_000) ** (-mpf(i) / 10) for i in range(10)], *[mpf(0)] * 16]


def llama4_tokens():
    """24 by 24 patches, x and y from 1; the class token comes last and is not rotated."""
    patches = [(y + 1, x + 1) for y in range(24) for x in range(24)]
    return np.array([*patches, (0, 0)]), [*patches, None]


def sam2_keys():
    """Keys of three memories of one grid, and five tokens after them that are not rotated."""
    keys = jnp.concatenate([jnp.tile(rope_jax.grid_positions(3, 4), (3, 1)), jnp.zeros((5, 2), jnp.int32)])
    return keys, [*grid(3, 4), *grid(3, 4), *grid(3, 4), *[None] * 5]


def edgetam_keys():
    """Two memories: three summaries and a grid each; then two tokens."""
    memory = jnp.concatenate([jnp.zeros((3, 2), jnp.int32), rope_jax.grid_positions(3, 4)])
    keys = jnp.concatenate([memory, memory, jnp.zeros((2, 2), jnp.int32)])
    return keys, [*[None] * 3, *grid(3, 4), *[None] * 3, *grid(3, 4), *[None] * 2]


def dinov3_tokens():
    return rope_jax.grid_positions(3, 4), [*[None] * 5, *grid(3, 4)]


def qwen_image_tokens():
    """Text behind a picture on all axes, then the picture of 5 by 6 about the origin."""
    text = [(3 + i,) * 3 for i in range(7)]
    picture = [(0, h, w) for h in range(-3, 2) for w in range(-3, 3)]
    return rope_jax.core.diffusion_positions("qwen_image", 7, (5, 6)), [*text, *picture]


def dinov3_centres():
    """Centres in float32, as training shifts and scales them."""
    centres = [((2 * h + 1) / 3 - 1, (2 * w + 1) / 4 - 1) for h, w in grid(3, 4)]
    return rope_jax.core.patch_centers(3, 4), centres


def fixed(tokens):
    return lambda: (np.array(tokens), tokens)


# ---------------------------------------------------------------------------------- the table

T, H, W = 0, 1, 2  # position axes of a video

FORMS = [
    # One axis.
    Form(
        "text, half", "Llama, Qwen, Mistral, and most models of text",
        lambda: Rope(128, Standard(base=5e5)),
        own(ladder(500_000, 128)), half(128),
    ),
    Form(
        "text, interleaved, a part of the head", "GPT-J, CodeGen, GLM",
        lambda: Rope(256, Standard(), rotary_dim=64, layout="interleaved"),
        own(ladder(10_000, 64)), interleaved(64),
    ),
    Form(
        "values rotated too, interleaved", "RoFormer",
        lambda: Rope(64, Standard(), layout="interleaved"),
        own(ladder(10_000, 64)), interleaved(64),
    ),
    Form(
        "values rotated too, half, a part of the head", "CLVP",
        lambda: Rope(64, Standard(), rotary_dim=32),
        own(ladder(10_000, 32)), half(32),
    ),
    Form(
        "inputs rotated before the projections", "wav2vec2-conformer, seamless",
        lambda: Rope(64, Standard()),
        own(ladder(10_000, 64)), half(64),
    ),
    Form(
        "trailing features", "DeepSeek-V4",
        lambda: Rope(192, Standard(), rotary_dim=64, start=128, layout="interleaved"),
        own(ladder(10_000, 64)), interleaved(64, first=128),
    ),
    Form(
        "first rotated feature inside the head", "rotary-embedding-torch start_index",
        lambda: Rope(64, Standard(), rotary_dim=32, start=16, layout="interleaved"),
        own(ladder(10_000, 32)), interleaved(32, first=16),
    ),
    Form(
        "first rotated feature, half", "ggml n_offs, MaxText",
        lambda: Rope(96, Standard(), rotary_dim=64, start=32),
        own(ladder(10_000, 64)), half(64, first=32),
    ),
    Form(
        "cos and sin from a table", "ONNX RotaryEmbedding, opset 23",
        lambda: Written(64, lambda m: Rotation(*(part[m] for part in Rope(64, Standard()).rotation(jnp.arange(100))))),
        own(ladder(10_000, 64)), half(64), tokens=fixed([(m,) for m in (0, 7, 3, 99, 50)]),
        by_hand=True,
    ),
    # Each axis its own ladder, in equal runs.
    Form(
        "own ladders, half", "Qwen2-VL to Qwen3.5 vision, GLM-Image, and most towers of transformers",
        lambda: Rope(80, Axial(sizes=(40, 40))),
        own(ladder(10_000, 40), ladder(10_000, 40)), half(80), num_axes=2,
    ),
    Form(
        "own ladders, interleaved", "SAM2, SAM3",
        sam2,
        own(ladder(10_000, 32), ladder(10_000, 32)), interleaved(64), num_axes=2,
    ),
    Form(
        "keys tiled, the tail not rotated", "SAM2",
        sam2,
        own(ladder(10_000, 32), ladder(10_000, 32)), interleaved(64), num_axes=2, tokens=sam2_keys,
    ),
    Form(
        "keys in groups, first tokens of a group and the tail not rotated", "EdgeTAM",
        sam2,
        own(ladder(10_000, 32), ladder(10_000, 32)), interleaved(64), num_axes=2, tokens=edgetam_keys,
    ),
    Form(
        "x before y, from 1, class token at 0", "Llama 4 vision",
        lambda: Rope(88, Axial(sizes=(44, 44), axes=(1, 0)), layout="interleaved"),
        own(ladder(10_000, 44), ladder(10_000, 44), read=(1, 0)), interleaved(88), num_axes=2, tokens=llama4_tokens,
    ),
    Form(
        "three axes, the tail of the head not rotated", "MiniMax-M3-VL",
        lambda: Rope(80, Axial(sizes=(26, 26, 26)), rotary_dim=78),
        own(*[ladder(10_000, 26)] * 3), half(78), num_axes=3,
    ),
    Form(
        "three equal runs, interleaved", "Lumina 2",
        lambda: Rope(96, Axial(sizes=(32, 32, 32)), layout="interleaved"),
        own(*[ladder(10_000, 32)] * 3), interleaved(96), num_axes=3,
    ),
    Form(
        "four axes, base 2000", "Flux 2",
        lambda: Rope(128, Axial(sizes=(32, 32, 32, 32), schedule=Standard(base=2000.0)), layout="interleaved"),
        own(*[ladder(2000, 32)] * 4), interleaved(128), num_axes=4,
    ),
    Form(
        "two equal runs, base 256", "HunyuanImage",
        lambda: Rope(128, Axial(sizes=(64, 64), schedule=Standard(base=256.0)), layout="interleaved"),
        own(ladder(256, 64), ladder(256, 64)), interleaved(128), num_axes=2,
    ),
    Form(
        "x before y, base 100", "rope-vit axial",
        lambda: Rope(64, Axial(sizes=(32, 32), schedule=Standard(base=100.0), axes=(1, 0)), layout="interleaved"),
        own(ladder(100, 32), ladder(100, 32), read=(1, 0)), interleaved(64), num_axes=2,
    ),
    Form(
        "a grid stretched to the trained grid", "timm cat with ref_feat_shape (EVA)",
        lambda: Rope(64, Affine(schedule=Axial(sizes=(32, 32)), scale=(16 / 24, 16 / 20)), layout="interleaved"),
        at(lambda p: (p[0] / 24 * 16, p[1] / 20 * 16), own(ladder(10_000, 32), ladder(10_000, 32))),
        interleaved(64), num_axes=2,
    ),
    # Unequal runs.
    Form(
        "(16, 56, 56)", "Flux, FLUX.1 Krea, Chroma, LongCat-Image",
        lambda: Rope(128, Axial(sizes=(16, 56, 56)), layout="interleaved"),
        own(ladder(10_000, 16), ladder(10_000, 56), ladder(10_000, 56)), interleaved(128), num_axes=3,
    ),
    Form(
        "(32, 48, 48)", "Ovis-Image",
        lambda: Rope(128, Axial(sizes=(32, 48, 48)), layout="interleaved"),
        own(ladder(10_000, 32), ladder(10_000, 48), ladder(10_000, 48)), interleaved(128), num_axes=3,
    ),
    Form(
        "(32, 48, 48), base 1000", "Krea 2",
        lambda: Rope(128, Axial(sizes=(32, 48, 48), schedule=Standard(base=1000.0)), layout="interleaved"),
        own(ladder(1000, 32), ladder(1000, 48), ladder(1000, 48)), interleaved(128), num_axes=3,
    ),
    Form(
        "(44, 42, 42)", "Wan, SkyReels, ChronoEdit, Sana-Video",
        lambda: Rope(128, Axial(sizes=(44, 42, 42)), layout="interleaved"),
        own(ladder(10_000, 44), ladder(10_000, 42), ladder(10_000, 42)), interleaved(128), num_axes=3,
    ),
    Form(
        "(16, 56, 56), base 256", "HunyuanVideo",
        lambda: Rope(128, Axial(sizes=(16, 56, 56), schedule=Standard(base=256.0)), layout="interleaved"),
        own(ladder(256, 16), ladder(256, 56), ladder(256, 56)), interleaved(128), num_axes=3,
    ),
    Form(
        "(1/4, 3/8, 3/8), rows and columns resized", "CogVideoX",
        lambda: Rope(
            64,
            Affine(
                schedule=Axial(sizes=(16, 24, 24)),
                scale=(1.0, (29 * 29 / 30 - 1) / 29, 45 / 50),
                offset=(0.0, 1.0, 0.0),
            ),
            layout="interleaved",
        ),
        at(
            # 30 rows from 1 to 29 * 29/30 and 50 columns from 0 to 45 * 49/50, both ends included.
            lambda p: (p[0], 1 + p[1] * (29 * mpf(29) / 30 - 1) / 29, p[2] * (45 * mpf(49) / 50) / 49),
            own(ladder(10_000, 16), ladder(10_000, 24), ladder(10_000, 24)),
        ),
        interleaved(64), num_axes=3,
    ),
    Form(
        "(16, 56, 56) about the origin, text behind", "Qwen-Image",
        lambda: Rope(128, Axial(sizes=(16, 56, 56)), layout="interleaved"),
        own(ladder(10_000, 16), ladder(10_000, 56), ladder(10_000, 56)), interleaved(128),
        num_axes=3, tokens=qwen_image_tokens,
    ),
    Form(
        "(32, 48, 48), base 256", "Z-Image",
        lambda: Rope(128, Axial(sizes=(32, 48, 48), schedule=Standard(base=256.0)), layout="interleaved"),
        own(ladder(256, 32), ladder(256, 48), ladder(256, 48)), interleaved(128), num_axes=3,
    ),
    Form(
        "(64, 32, 32)", "HiDream",
        lambda: Rope(128, Axial(sizes=(64, 32, 32)), layout="interleaved"),
        own(ladder(10_000, 64), ladder(10_000, 32), ladder(10_000, 32)), interleaved(128), num_axes=3,
    ),
    # Another schedule for each axis.
    Form(
        "NTK on one axis, time in frames of 24 per second", "Cosmos",
        lambda: Rope(
            128,
            Affine(
                schedule=Axial(sizes=(44, 42, 42), schedule=(NTKAware(factor=2.0), Standard(), Standard())),
                scale=(24 / 30, 1.0, 1.0),
            ),
        ),
        at(
            lambda p: (p[0] / 30 * 24, p[1], p[2]),
            lambda p: own(
                ladder(10_000 * mpf(2) ** (mpf(44) / 42), 44), ladder(10_000, 42), ladder(10_000, 42)
            )(p),
        ),
        half(128), num_axes=3,
    ),
    Form(
        "a divisor for each axis", "Kandinsky 5",
        lambda: Rope(64, Affine(schedule=Axial(sizes=(16, 24, 24)), scale=(1.0, 1 / 2, 1 / 3)), layout="interleaved"),
        at(
            lambda p: (p[0], p[1] / 2, p[2] / 3),
            own(ladder(10_000, 16), ladder(10_000, 24), ladder(10_000, 24)),
        ),
        interleaved(64), num_axes=3,
    ),
    Form(
        "one ladder, its even pairs for rows and its odd ones for columns, in runs", "Pixtral",
        lambda: Rope(64, Axial(sizes=(32, 32), schedule=(Standard(), Linear(factor=1e4 ** (2 / 64))))),
        own(ladder(10_000, 64)[0::2], ladder(10_000, 64)[1::2]), half(64), num_axes=2,
    ),
    Form(
        "x, y, z and an identity, other pairs at rest", "ESMFold2",
        esmfold2, esmfold2_angles,
        half(64), num_axes=4,
    ),
    Form(
        "x, y, z in ångströms", "ESMFold2",
        esmfold2, esmfold2_angles,
        half(64), num_axes=4, floats=True, reach=200,
    ),
    # Own ladders by turns.
    Form(
        "columns and rows by turns", "Kimi K2.5 vision",
        lambda: Rope(72, Axial(sizes=(36, 36), axes=(1, 0), alternating=True)),
        by_turns(ladder(10_000, 36), ladder(10_000, 36), read=(1, 0)), half(72), num_axes=2,
    ),
    Form(
        "rows and columns by turns, from 1, the whole width as one head", "EfficientLoFTR",
        lambda: Rope(256, Axial(sizes=(128, 128), alternating=True), layout="interleaved"),
        by_turns(ladder(10_000, 128), ladder(10_000, 128)), interleaved(256), num_axes=2,
        tokens=lambda: (rope_jax.grid_positions(5, 6, origin=1), [(i + 1, j + 1) for i, j in grid(5, 6)]),
    ),
    Form(
        "rows and columns by turns", "Lumina-Next",
        lambda: Rope(96, Axial(sizes=(48, 48), alternating=True), layout="interleaved"),
        by_turns(ladder(10_000, 48), ladder(10_000, 48)), interleaved(96), num_axes=2,
    ),
    # One ladder, dealt to the axes.
    Form(
        "M-RoPE in runs, half", "Qwen2-VL, Qwen2.5-VL, PaddleOCR-VL",
        lambda: Rope(128, Sections(sections=(16, 24, 24), schedule=Standard(base=1e6))),
        one_ladder(ladder(1_000_000, 128), [T] * 16 + [H] * 24 + [W] * 24), half(128), num_axes=3,
    ),
    Form(
        "M-RoPE in runs, interleaved, half of the head", "GLM-4.1V, GLM-OCR",
        lambda: Rope(
            128, Sections(sections=(8, 12, 12), schedule=Standard()), rotary_dim=64, layout="interleaved"
        ),
        one_ladder(ladder(10_000, 64), [T] * 8 + [H] * 12 + [W] * 12), interleaved(64), num_axes=3,
    ),
    Form(
        "M-RoPE strided", "Qwen3-VL, Cosmos 3, Ideogram 4",
        lambda: Rope(128, Sections(sections=(24, 20, 20), schedule=Standard(base=5e6), order="strided")),
        one_ladder(ladder(5_000_000, 128), strided((24, 20, 20))), half(128), num_axes=3,
    ),
    Form(
        "M-RoPE alternating", "Ernie 4.5 VL",
        lambda: Rope(
            128,
            Sections(sections=(20, 22, 22), schedule=Standard(base=5e5), order="alternating"),
            layout="interleaved",
        ),
        one_ladder(ladder(500_000, 128), [H, W] * 22 + [T] * 20), interleaved(128), num_axes=3,
    ),
    Form(
        "XD-RoPE: four axes", "HunyuanOCR",
        lambda: Rope(128, Sections(sections=(16, 16, 16, 16))),
        one_ladder(ladder(10_000, 128), [0] * 16 + [1] * 16 + [2] * 16 + [3] * 16), half(128), num_axes=4,
    ),
    # Coordinates that are not integers.
    Form(
        "patch centres times a turn, prefix tokens", "DINOv3, Sapiens2, EoMT",
        lambda: Written(64, lambda p: dinov3().rotation(p).prepend_identity(5)),
        dinov3_angles, half(64), num_axes=2, tokens=dinov3_tokens,
        by_hand=True,
    ),
    Form(
        "patch centres of float32 times a turn", "DINOv3 in training",
        lambda: Rope(
            64, Affine(schedule=Axial(sizes=(32, 32), schedule=Standard(base=100.0)), scale=2 * np.pi)
        ),
        at(lambda p: [2 * mpmath.pi * c for c in p], own(ladder(100, 32), ladder(100, 32))),
        half(64), num_axes=2, floats=True, tokens=dinov3_centres,
    ),
    Form(
        "patch centres times a turn", "DINOv3 at any patch",
        dinov3,
        dinov3_angles, half(64), num_axes=2,
    ),
    Form(
        "a ladder that includes its end, all axes by turns, the first pair at rest", "LTX-Video",
        lambda: Rope(
            2048,
            Affine(schedule=Axial(sizes=(682,) * 3, schedule=ltx_ladder, alternating=True), **LTX_COORDINATES),
            rotary_dim=2046,
            start=2,
            layout="interleaved",
        ),
        ltx_angles, interleaved(2046, first=2), num_axes=3,
    ),
    Form(
        "the same ladder cut into heads", "LTX-2",
        lambda: Rope(128, Affine(schedule=ltx2_heads, **LTX_COORDINATES)),
        ltx2_angles, half(128), num_axes=3, heads=32,
    ),
    Form(
        "pixels: frequencies in equal steps, coordinates from -1 to 1", "lucidrains pixel, timm linear_bands",
        lambda: Rope(
            64,
            Affine(schedule=Axial(sizes=(32, 32), schedule=pixel_ladder), scale=(2 / 13, 2 / 19), offset=-1.0),
            layout="interleaved",
        ),
        functools.partial(pixel_angles, linear_bands), interleaved(64), num_axes=2,
    ),
    Form(
        "pixels: frequencies in equal ratios", "timm in_pixels",
        lambda: Rope(
            64,
            Affine(schedule=Axial(sizes=(32, 32), schedule=log_pixel_ladder), scale=(2 / 13, 2 / 19), offset=-1.0),
            layout="interleaved",
        ),
        functools.partial(pixel_angles, log_bands), interleaved(64), num_axes=2,
    ),
    # Pairs inside blocks.
    Form(
        "half pairs inside two blocks", "Gemma 4 vision",
        lambda: Rope(64, Axial(sizes=(32, 32), schedule=Standard(base=100.0)), blocks=2),
        own(ladder(100, 32), ladder(100, 32)), half(32) + half(32, first=32), num_axes=2,
    ),
    Form(
        "half pairs inside three blocks", "Allegro",
        lambda: Rope(
            96, Affine(schedule=Axial(sizes=(32, 32, 32)), scale=(1 / 2, 1 / 2, 1 / 2)), blocks=3
        ),
        at(lambda p: [c / 2 for c in p], own(*[ladder(10_000, 32)] * 3)),
        half(32) + half(32, first=32) + half(32, first=64), num_axes=3,
    ),
    # Every pair reads all axes; frequencies of each head.
    Form(
        "keypoints, learned projection", "LightGlue",
        lambda: Rope(64, lambda _: Frequencies(jnp.asarray(LIGHTGLUE)), layout="interleaved"),
        learned_dense(LIGHTGLUE), interleaved(64), num_axes=2, floats=True, reach=1, learned=True,
    ),
    Form(
        "three axes, all heads, learned", "Mochi",
        lambda: Rope(64, lambda _: Frequencies(jnp.swapaxes(MOCHI, 0, 1)), layout="interleaved"),
        learned_heads(MOCHI.swapaxes(0, 1)), interleaved(64),
        num_axes=3, heads=6, floats=True, reach=96, learned=True,
    ),
    Form(
        "three axes, all heads, rows and columns from the centre of a fixed area", "Mochi",
        lambda: Rope(
            64,
            Affine(schedule=mochi, scale=(1.0, MOCHI_UNIT, MOCHI_UNIT), offset=(0.0, -4.5 * MOCHI_UNIT, -6.5 * MOCHI_UNIT)),
            layout="interleaved",
        ),
        at(mochi_coordinates, learned_heads(MOCHI.swapaxes(0, 1))), interleaved(64), num_axes=3, heads=6,
    ),
    Form(
        "RoPE-Mixed in training", "rope-vit mixed, timm mixed",
        lambda: Rope(64, lambda _: Frequencies(jnp.asarray(MIXED)), layout="interleaved"),
        learned_heads(MIXED), interleaved(64), num_axes=2, heads=6, reach=100, learned=True,
    ),
    Form(
        "RoPE-Mixed after training", "rope-vit mixed, timm mixed",
        lambda: Rope(64, lambda _: Frequencies(MIXED), layout="interleaved"),
        learned_heads(MIXED), interleaved(64), num_axes=2, heads=6,
    ),
    Form(
        "STRING: a learned basis before the rotation", "STRING (Cayley), robotics",
        lambda: Written(
            64,
            lambda p: rope_jax.rotation(p, Frequencies(STRING)),
            prepare=lambda x: jnp.einsum("tnh,hg->tng", x, jnp.asarray(STRING_BASIS), precision="highest"),
        ),
        learned_dense(STRING), half(64), num_axes=2, prepare=lambda x: x @ np.float64(STRING_BASIS),
        prepared_rounding=64 * EPS32,
        by_hand=True,
    ),
    Form(
        "blocks of 2, linearly dependent angle matrices", "ComRoPE-LD",
        lambda: Rope(64, lambda _: Frequencies(jnp.asarray(COMROPE)), layout="interleaved"),
        learned_dense(COMROPE), interleaved(64), num_axes=2, floats=True, reach=32, learned=True,
    ),
    Form(
        "an axis for each head", "MHRoPE",
        lambda: Rope(128, mhrope),
        lambda p: [[p[n // 2] * f for f in ladder(1_000_000, 128)] for n in range(6)],
        half(128), num_axes=3, heads=6,
    ),
    Form(
        "one ladder dealt within groups of 16 features, 2 : 3 : 3", "MM-RoPE (Lumos-1)",
        lambda: Rope(128, mm_rope),
        one_ladder(ladder(10_000, 128), [T, T, H, W, H, W, H, W] * 8), half(128), num_axes=3,
    ),
    # Learned and recent, one axis.
    Form(
        "media advance by fractions", "V2PE",
        lambda: Rope(128, Affine(schedule=Standard(base=1e6), scale=1 / 256)),
        at(lambda p: (p[0] / 256,), own(ladder(1_000_000, 128))), half(128),
    ),
    Form(
        "frequencies times e^alpha", "LeRoPE, Mistral Large 4",
        lambda: Rope(128, lambda _: Frequencies(Standard()(128).inv_freq * np.exp(STRETCH))),
        lambda p: [p[0] * f * mpmath.exp(mpf(float(a))) for f, a in zip(ladder(10_000, 128), STRETCH, strict=True)],
        half(128),
    ),
    Form(
        "queries of a second kind, a quarter turn behind", "RoPE++",
        lambda: Rope(64, lambda _: Frequencies(Standard()(64).inv_freq, phase=np.full(32, -np.pi / 2))),
        lambda p: [p[0] * f - mpmath.pi / 2 for f in ladder(10_000, 64)], half(64),
    ),
    Form(
        "magnitudes, queries", "PoPE",
        lambda: Written(64, lambda m: rope_jax.rotation(m, Standard()(128)), prepare=magnitudes),
        own(ladder(10_000, 128)), half(128), prepare=numpy_magnitudes, prepared_rounding=4 * EPS32,
        by_hand=True,
    ),
    Form(
        "magnitudes, keys with a learned phase", "PoPE",
        lambda: Written(
            64,
            lambda m: rope_jax.rotation(m, Frequencies(Standard()(128).inv_freq, phase=POPE_PHASE)),
            prepare=magnitudes,
        ),
        lambda p: [p[0] * f + mpf(float(d)) for f, d in zip(ladder(10_000, 128), POPE_PHASE, strict=True)],
        half(128), prepare=numpy_magnitudes, prepared_rounding=4 * EPS32,
        by_hand=True,
    ),
    # Factors that are no unit complex numbers: the rotation is made by hand.
    Form(
        "queries grow", "xPos (LeX), x-transformers",
        lambda: Written(64, functools.partial(xpos, 1), layout="interleaved"),
        functools.partial(xpos_factors, 1), interleaved(64), reach=2000, rounding=16 * EPS32,
        by_hand=True,
    ),
    Form(
        "keys shrink", "xPos (LeX), x-transformers",
        lambda: Written(64, functools.partial(xpos, -1), layout="interleaved"),
        functools.partial(xpos_factors, -1), interleaved(64), reach=2000, rounding=16 * EPS32,
        by_hand=True,
    ),
    Form(
        "cos and sin pooled over cells", "FramePack, Helios",
        lambda: Written(128, pooled, layout="interleaved"),
        pooled_factors, interleaved(128), num_axes=3, tokens=fixed(grid(2, 3, 4)), rounding=4 * EPS32,
        by_hand=True,
    ),
    Form(
        "cos and sin mixed by a matrix of each head", "FoPE (vLLM)",
        lambda: Written(64, fope),
        fope_factors, half(64), heads=4, rounding=48 * EPS32,
        by_hand=True,
    ),
    Form(
        "angles cumulated from the input", "Selective RoPE",
        lambda: Written(64, selective),
        selective_angles, half(64), heads=4, tokens=fixed([(m,) for m in range(40)]), learned=True,
        rounding=40 * 20 * EPS32,
        by_hand=True,
    ),
]  # fmt: skip
NAMES = [f"{form.users.split(',')[0].split(';')[0]}: {form.name}" for form in FORMS]

NO_ROTATION = {
    "V-JEPA 2": "cos and sin are tiled where features are paired by twos: the two members of a pair have two angles, "
    "and lengths are not kept",
    "ERNIE-Image": "angles are doubled pair by pair where features are paired by halves: an angle for each feature",
    "hunyuan_vl of transformers": "sections cut the doubled list of angles, so the two halves of a pair read two axes",
}
NOT_SAYABLE = {
    "LieRE": "exponentials of dense skew matrices that do not commute: no pairs",
    "CoPE": "positions are sums of gates that depend on query and key together",
    "TAPE": "positional features are updated by each layer and are not a rotation of queries and keys",
    "PaTH": "products of Householder reflections along the path from key to query",
    "dual chunk attention": "a pair of query and key chooses among three positions: scores are merged, not features",
    "Self-Extend": "positions are grouped only for far keys, so a score needs two rotations of each query",
}
