"""Contracts of public functions: they hold whatever the switch of chex says."""

import chex
import jax
import jax.numpy as jnp
import pytest

import rope_jax
from rope_jax._checks import check_axes


@pytest.fixture(params=[False, True], ids=["chex on", "chex off"])
def switch(request):
    if request.param:
        chex.disable_asserts()
    yield
    chex.enable_asserts()


@pytest.mark.parametrize(
    ("shape", "axes", "sizes", "fits"),
    [
        ((2, 3), "B T", {}, True),
        ((2, 3), "B T", dict(T=3), True),
        ((2, 3), "B T", dict(T=4), False),
        ((2, 3), "B T H", {}, False),
        ((2, 3, 4), "B T", {}, False),
        ((2, 3), "... T", dict(T=3), True),
        ((3,), "... T", dict(T=3), True),
        ((), "... T", {}, False),
        ((3,), "... N H", {}, False),
        ((2, 3, 4), "... T H", dict(T=3, H=5), False),
        ((1, 3), "B T", dict(B={1, 5}), True),
        ((5, 3), "B T", dict(B={1, 5}), True),
        ((2, 3), "B T", dict(B={1, 5}), False),
        ((0, 3), "B T", dict(B=0), True),
    ],
)
def test_axes(switch, shape, axes, sizes, fits):
    if fits:
        check_axes("x", jnp.zeros(shape), axes, **sizes)
    else:
        with pytest.raises(ValueError, match=r"x must have shape \["):
            check_axes("x", jnp.zeros(shape), axes, **sizes)


def test_public_functions(switch):
    q, k = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8))
    rope = rope_jax.Rope(8, rope_jax.Standard())
    with pytest.raises(ValueError, match=r"got \(1, 1\)"):
        rope(q, k, jnp.zeros((1, 1), int))
    with pytest.raises(ValueError, match=r"v must have shape \[B, S, K, H\] with B=2, S=5, K=2, H=8"):
        rope_jax.attend(q, k, k[:, :4])
    with pytest.raises(ValueError, match=r"mask must have shape \[B, N, T, S\]"):
        rope_jax.attend(q, k, k, mask=jnp.ones((2, 5, 5), bool))
    layer = rope_jax.RotaryAttention(num_heads=2, head_dim=8, rope=rope)
    with pytest.raises(ValueError, match=r"mask must have shape"):
        layer.init(jax.random.key(0), jnp.ones((2, 5, 16)), mask=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, D\]"):
        layer.init(jax.random.key(0), jnp.ones((5, 16)))
