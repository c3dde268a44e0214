"""Converting weights between layouts: every form of a weight, the scores, and refused arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rope_jax

LAYOUTS = ["half", "interleaved"]
H, R, N, K, D = 8, 6, 4, 2, 10


RNG = np.random.default_rng(1)


def whole(*shape):
    """Small integers, whose sums of products are exact in float32."""
    return RNG.integers(-9, 10, shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Form:
    """A weight that holds heads: its shape, and the arguments of convert_layout."""

    name: str
    shape: tuple[int, ...]
    options: dict

    def numbers(self):
        """Entries that all differ, none of them small."""
        return np.arange(7, 7 + np.prod(self.shape), dtype=np.int32).reshape(self.shape)


FORMS = [
    Form("flax_query", (D, N, H), dict(head_dim=H)),
    Form("flax_key", (D, K, H), dict(head_dim=H)),
    Form("flax_flat", (D, N * H), dict(head_dim=H)),
    Form("flax_stacked_layers", (3, D, K, H), dict(head_dim=H)),
    Form("torch_query", (N * H, D), dict(head_dim=H, axis=0)),
    Form("torch_key", (K * H, D), dict(head_dim=H, axis=-2)),
    Form("bias", (N, H), dict(head_dim=H)),
    Form("bias_flat", (N * H,), dict(head_dim=H)),
    Form("norm_scale", (H,), dict(head_dim=H)),
    Form("partial", (D, N, H), dict(head_dim=H, rotary_dim=R)),
    Form("partial_torch", (N * H, D), dict(head_dim=H, rotary_dim=R, axis=0)),
    Form("partial_odd_head", (D, N, 7), dict(head_dim=7, rotary_dim=4)),
    Form("latent_query", (N * (3 + R), D), dict(head_dim=3 + R, start=3, axis=0)),
    Form("latent_key", (5 + R, D), dict(head_dim=5 + R, start=5, axis=0)),
    Form("fused_key_of_gpt_neox", (N * 3 * H, D), dict(head_dim=3 * H, start=H, rotary_dim=R, axis=0)),
    Form("one_pair", (N, H), dict(head_dim=H, rotary_dim=2)),
]


def convert_all(weights, to):
    return {form.name: rope_jax.convert_layout(weights[form.name], to, **form.options) for form in FORMS}


@functools.cache
def compiled(to):
    """Every form, converted in one compiled program; and its cotangent, pulled back in another."""
    weights = {form.name: form.numbers() for form in FORMS}
    cotangents = {name: weight.astype(np.float32) for name, weight in weights.items()}
    convert = functools.partial(convert_all, to=to)
    pull_back = lambda cotangents: jax.vjp(convert, jax.tree.map(jnp.zeros_like, cotangents))[1](cotangents)[0]
    return jax.jit(convert)(weights), jax.jit(pull_back)(cotangents)


every_form = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])


def other(layout):
    return "half" if layout == "interleaved" else "interleaved"


def moved(weight, to, head_dim, rotary_dim=None, start=0, axis=-1):
    """The reference: moves one feature of one head at a time, by the places of pair i in each layout."""
    rotary_dim = head_dim - start if rotary_dim is None else rotary_dim
    places = {
        "half": [(i, i + rotary_dim // 2) for i in range(rotary_dim // 2)],
        "interleaved": [(2 * i, 2 * i + 1) for i in range(rotary_dim // 2)],
    }
    old, new = np.moveaxis(weight, axis, 0), np.moveaxis(weight.copy(), axis, 0)
    for head in range(0, len(old), head_dim):
        for old_pair, new_pair in zip(places[other(to)], places[to], strict=True):
            for old_place, new_place in zip(old_pair, new_pair, strict=True):
                new[head + start + new_place] = old[head + start + old_place]
    return np.moveaxis(new, 0, axis)


@every_form
@pytest.mark.parametrize("to", LAYOUTS)
class TestEveryForm:
    def test_each_feature_goes_where_the_other_layout_has_it(self, form, to):
        weight = form.numbers()
        want = moved(weight, to, **form.options)
        assert np.array_equal(want, weight) == (form.name == "one_pair")  # one pair lies alike in both
        got = rope_jax.convert_layout(weight, to, **form.options)
        assert type(got) is np.ndarray and got.dtype == weight.dtype and not np.shares_memory(got, weight)
        np.testing.assert_array_equal(got, want)

        eager = rope_jax.convert_layout(jnp.asarray(weight), to, **form.options)
        for got in (eager, compiled(to)[0][form.name]):
            assert isinstance(got, jax.Array) and got.dtype == weight.dtype
            np.testing.assert_array_equal(got, want)

    def test_there_and_back(self, form, to):
        weight = form.numbers()
        there = rope_jax.convert_layout(weight, to, **form.options)
        back = rope_jax.convert_layout(there, other(to), **form.options)
        np.testing.assert_array_equal(back, weight)

    def test_backward_is_the_inverse(self, form, to):
        cotangent = form.numbers().astype(np.float32)
        np.testing.assert_array_equal(compiled(to)[1][form.name], moved(cotangent, other(to), **form.options))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, np.int8, np.bool_])
def test_any_dtype_is_kept_bit_for_bit(dtype):
    width = np.dtype(dtype).itemsize
    bits = np.random.default_rng(0).integers(0, 2 if dtype is np.bool_ else 256, (64, N * H, width), np.uint8)
    weight = bits.view(dtype)[..., 0]  # NaNs of every payload, infinities, subnormals, zeros of both signs
    got = rope_jax.convert_layout(weight, "half", head_dim=H, rotary_dim=R)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[..., None].view(np.uint8), moved(bits, "half", H, R, axis=1))
    # XLA changes the payload of NaNs; everything else must stay.
    with np.errstate(invalid="ignore"):
        bits[weight != weight] = 0
    got = np.asarray(rope_jax.convert_layout(jnp.asarray(weight), "half", head_dim=H, rotary_dim=R))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[..., None].view(np.uint8), moved(bits, "half", H, R, axis=1))


# -------------------------------------------------------------------------------------------------- the scores

POSITIONS = jnp.array([0, 1, 5, 1000, 123_457])
T = POSITIONS.size
X = whole(T, D)


def scores(weights, layout):
    """Scores ``[N, T, S]`` in float32 of a layer with biases, QK-norm, GQA and partial rotation; rotated q and k.

    Projections and mean squares are sums of integers below 2^24, hence exact in any order. The rest, up to the
    scores, is done feature by feature.
    """
    rotation = rope_jax.rotation(POSITIONS, rope_jax.Standard()(R))
    rotated = []
    for name in ("query", "key"):
        features = np.einsum("td,dnh->tnh", X, weights[name]) + weights[name + "_bias"]
        assert np.all(np.sum(features**2, axis=-1) < 2**24) and np.all(features == np.round(features))
        size = np.sqrt(np.mean(features**2, axis=-1, keepdims=True), dtype=np.float32)
        features = jnp.asarray(features / size * weights[name + "_norm"])
        rotated.append(rope_jax.rotate(features, rotation, layout=layout))
    q, k = map(np.asarray, rotated)
    return np.einsum("tnh,snh->nts", q, k.repeat(N // K, axis=1)), q, k


def layer():
    """The weights of a layer before the rotation."""
    scales = (RNG.uniform(0.5, 1.5, H).astype(np.float32) for _ in range(2))
    heads = dict(query=whole(D, N, H), key=whole(D, K, H), query_bias=whole(N, H), key_bias=whole(K, H))
    return heads | dict(zip(["query_norm", "key_norm"], scales, strict=True))


@pytest.mark.parametrize("to", LAYOUTS)
def test_scores_equal_the_scores_of_the_other_layout(to):
    weights = layer()
    convert = lambda w: rope_jax.convert_layout(w, to, head_dim=H, rotary_dim=R)
    converted = {name: convert(weight) for name, weight in weights.items()}
    want, *want_qk = scores(weights, other(to))
    got, *got_qk = scores(converted, to)
    # Each layout has its own compiled program: three roundings of a pair on either side.
    largest = [np.abs(features).max() * np.sqrt(2) for features in want_qk]
    for got_features, want_features, size in zip(got_qk, want_qk, largest, strict=True):
        np.testing.assert_allclose(
            got_features, moved(want_features, to, H, R), rtol=0, atol=6 * oracles.EPS32 * size
        )
    # H products of features with that error, added in another order: H - 1 roundings on either side.
    products = np.einsum("tnh,snh->nts", *(np.abs(f).repeat(N // f.shape[1], axis=1) for f in want_qk))
    far = 2 * (H - 1) * products + 2 * 6 * H * largest[0] * largest[1]
    assert np.all(np.abs(got - want) <= oracles.EPS32 * far)

    # Every weight counts: if one weight or the layout is left as it was, the scores differ.
    for name, weight in weights.items():
        assert np.abs(scores(converted | {name: weight}, to)[0] - want).max() > 0.1, name
    assert np.abs(scores(weights, to)[0] - want).max() > 0.1
    # Features that are not rotated stay in place.
    np.testing.assert_array_equal(converted["query"][..., R:], weights["query"][..., R:])


@pytest.mark.parametrize("to", LAYOUTS)
def test_scores_of_latent_attention(to):
    nope, rank = 3, 5  # each head is [nope | rope]; the keys' rotary part, common to all heads, follows the latent
    q_b, kv_a, kv_b = whole(N * (nope + R), D), whole(rank + R, D), whole(N * nope, rank)
    rotation = rope_jax.rotation(POSITIONS, rope_jax.Standard()(R))

    def scores(q_b, kv_a, layout):
        q = (X @ q_b.T).reshape(T, N, nope + R)
        latent, k_rope = np.split(X @ kv_a.T, [rank], axis=-1)
        k_nope = (latent @ kv_b.T).reshape(T, N, nope)
        rotate = lambda x: np.asarray(rope_jax.rotate(jnp.asarray(x), rotation, layout=layout))
        q_rope, k_rope = rotate(q[..., nope:]), rotate(k_rope[:, None])[:, 0]
        products = np.einsum("tnh,sh->ntsh", q_rope, k_rope)
        return np.einsum("tnh,snh->nts", q[..., :nope], k_nope) + products.sum(-1), np.abs(products).sum(-1)

    want, products = scores(q_b, kv_a, other(to))
    new_q_b = rope_jax.convert_layout(q_b, to, head_dim=nope + R, start=nope, axis=0)
    new_kv_a = rope_jax.convert_layout(kv_a, to, head_dim=rank + R, start=rank, axis=0)
    got, _ = scores(new_q_b, new_kv_a, to)
    # The rotary products in another order, R - 1 roundings on either side; then one sum on either.
    assert np.all(np.abs(got - want) <= oracles.EPS32 * (2 * (R - 1) * products + 2 * np.abs(want)))
    for wrong in (scores(q_b, new_kv_a, to), scores(new_q_b, kv_a, to)):
        assert np.abs(wrong[0] - want).max() > 1
    np.testing.assert_array_equal(new_kv_a[:rank], kv_a[:rank])


def test_lora_converts_the_factor_with_heads():
    rank = 3
    weight, a, b = whole(N * H, D), whole(rank, D), whole(N * H, rank)
    convert = lambda w: rope_jax.convert_layout(w, "half", head_dim=H, axis=0)
    np.testing.assert_array_equal(convert(weight) + convert(b) @ a, convert(weight + b @ a))


@pytest.mark.parametrize(
    ("shape", "spec", "axis"),
    [((D, N, H), P(None, "model", None), -1), ((N * H, D), P("model", None), 0), ((D, N * H), P(None, "model"), 1)],
)
def test_sharded_heads_stay_on_their_devices(shape, spec, axis):
    mesh = AbstractMesh((2,), ("model",), axis_types=(AxisType.Explicit,))
    weight = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    got = jax.eval_shape(lambda w: rope_jax.convert_layout(w, "half", head_dim=H, axis=axis), weight)
    assert got.sharding.spec == spec


# ------------------------------------------------------------------------------------------------ the refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weight=[1.0, 2.0]), TypeError, "weight must be a numpy or jax array, got list"),
        (dict(to="neox"), ValueError, r"to must be one of \('half', 'interleaved'\), got 'neox'"),
        (dict(head_dim=8.0), TypeError, r"head_dim must be an integer, got 8\.0"),
        (dict(head_dim=None), TypeError, "head_dim must be an integer, got None"),
        (dict(rotary_dim=0.5 * H), TypeError, r"rotary_dim must be an integer, got 4\.0"),
        (dict(start=1.0), TypeError, r"start must be an integer, got 1\.0"),
        (dict(axis=(0, 1)), TypeError, r"axis must be an integer, got \(0, 1\)"),
        (dict(start=8), ValueError, "start must be from 0 to below head_dim=8, got 8"),
        (dict(start=-2), ValueError, "start must be from 0 to below head_dim=8, got -2"),
        (dict(head_dim=0), ValueError, "start must be from 0 to below head_dim=0, got 0"),
        (dict(rotary_dim=5), ValueError, "rotary_dim must be even, from 2 to head_dim - start = 8, got 5"),
        (dict(rotary_dim=0), ValueError, "rotary_dim must be even, from 2 to .* got 0"),
        (dict(rotary_dim=10), ValueError, "rotary_dim must be even, from 2 to head_dim - start = 8, got 10"),
        (dict(rotary_dim=6, start=4), ValueError, "from 2 to head_dim - start = 4, got 6"),
        (dict(start=3), ValueError, "rotary_dim must be even, from 2 to head_dim - start = 5, got 5"),
        (dict(axis=3), ValueError, r"axis must be one of the 3 axes of weight \(10, 4, 8\), got 3"),
        (dict(axis=-4), ValueError, "axis must be one of the 3 axes of weight .* got -4"),
        (dict(weight=np.float32(1)), TypeError, "weight must be a numpy or jax array, got float32"),
        (dict(weight=jnp.ones(())), ValueError, r"axis must be one of the 0 axes of weight \(\), got -1"),
        (dict(axis=0), ValueError, r"multiple of head_dim=8 features along axis 0, got \(10, 4, 8\)"),
        (dict(head_dim=16), ValueError, r"weight must have a multiple of head_dim=16 .* axis 2, got \(10, 4, 8\)"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(weight=np.ones((D, N, H)), to="half", head_dim=H) | change
    with pytest.raises(error, match=message):
        rope_jax.convert_layout(**arguments)
