"""Derivatives of attention, of first and second order, in every mode, beside derivatives of a plain formula.

The formula is jax.numpy in float64. Its own first derivatives are tested against numpy's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Problem, assert_solved, in_blocks, problem, read_factors, solve
from fast import first

from rope_jax.attention import T5Bias
from rope_jax.attention.bias import bias_function
from rope_jax.attention.primitive import attention, attention_with_log

SMALL = dict(B=1, N=2, K=1, T=7, H=2)
# Each with what a derivative goes through: caps, biases, tables, masks of all kinds.
FEATURES = [
    "causal cap t5",
    "traced_window bias_101",
    "segments padding causal scale",
    "mask alibi bias_010",
    "reordered causal window cap",
    "ring window t5",
    "dropout causal",
    "t5 bias_111 cap mask",
]


def plain(p: Problem, operands, factors=1.0):
    """The output and the log of the sums by a formula over whole arrays; queries without keys give 0."""
    q, k, v, facts = p.replaced(operands)
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    scores = jnp.einsum("bnth,bnsh->bnts", q, k) * (q.shape[-1] ** -0.5 if facts.scale is None else facts.scale)
    if facts.logit_cap is not None:
        scores = facts.logit_cap * jnp.tanh(scores / facts.logit_cap)
    bias = jnp.asarray(p.bias, q.dtype)
    if facts.bias is not None:  # the constant holds it already
        bias = bias + facts.bias - jax.lax.stop_gradient(facts.bias)
    if p.buckets is not None:
        bias = bias + jnp.moveaxis(facts.position_bias.params[0][p.buckets], -1, 1)
    allowed = jnp.asarray(p.allowed)
    empty = ~allowed.any(-1)
    scores = jnp.where(allowed, scores + bias, -jnp.inf)
    scores = jnp.where(empty[..., None], 0.0, scores)
    log_total = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(empty[..., None], 0.0, jnp.exp(scores - log_total[..., None])) * factors
    return jnp.einsum("bnts,bnsh->bnth", weights, v), log_total


def scalar(results, cotangents):
    """A function of both results that is not linear, so that second derivatives have all terms."""
    out, log_total = results
    finite = jnp.where(jnp.isfinite(log_total), log_total, 0)
    return jnp.sum(jnp.sin(out) * cotangents[0]) + jnp.sum(finite**2 * cotangents[1])


@functools.cache
def functions(features: str, is_wide: bool, **sizes):
    """The scalar by rope_jax and by the formula, and operands in both dtypes."""
    dtype = jnp.float64 if is_wide else jnp.float32
    p = problem(features, dtype=dtype, **(SMALL | sizes))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), p.differentiable)
    empty = ~p.allowed.any(-1)
    dlog = np.where(empty, 0, np.asarray(p.dlog))
    mine = lambda operands: scalar(attention_with_log(*p.replaced(operands)), (p.dout, jnp.asarray(dlog, dtype)))
    theirs = lambda operands: scalar(plain(p, operands), (np.asarray(p.dout, np.float64), np.float64(dlog)))
    return p, mine, theirs, wide


def assert_close(got, want, share, least_size=0.0):
    """Each array within a share of the largest entry of its own reference, or of ``least_size``."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        size = max(np.abs(b).max(), least_size)
        assert size > 0 or np.abs(a).max() == 0, path
        error = np.abs(np.asarray(a, np.float64) - np.asarray(b)).max()
        assert error <= share * size, f"{jax.tree_util.keystr(path)}: {error / max(size, 1e-300):.1e}"


def share(dtype, order):
    """Each derivative adds sums of as many terms again, of numbers of size 1 to 10: 1e-5 for gradients, in float32."""
    return 1e-5 * 4 ** (order - 1) * (1 if dtype == jnp.float32 else 2.0**-29)


def of_both(monkeypatch, features, dtype, transform, order, **sizes):
    """Compares a transformation of both functions."""
    in_blocks(monkeypatch, 3, 4)
    with jax.enable_x64(True):
        # The table of T5 is float32 in any case.
        _, mine, theirs, wide = functions(features, dtype == jnp.float64 and "t5" not in features, **sizes)
        dtype = jnp.float64 if dtype == jnp.float64 and "t5" not in features else jnp.float32
        narrow = jax.tree.map(lambda x: jnp.asarray(x, dtype), wide)
        got, want = jax.jit(transform(mine))(narrow), jax.jit(transform(theirs))(wide)
        size = size_of_terms(theirs, wide, order) if getattr(want, "ndim", None) == 0 else 0.0
        assert_close(got, want, share(dtype, order), size)


def directions(operands, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), operands)


def along(f):
    """The derivative along a direction of all operands, in forward mode."""
    return lambda operands: jax.jvp(f, (operands,), (directions(operands),))[1]


def size_of_terms(f, operands, order):
    """The sum of the sizes of the terms of a derivative along directions: the derivative itself may cancel to little."""
    for _ in range(order - 1):
        f = along(f)
    terms = jax.tree.map(jnp.multiply, jax.jit(jax.grad(f))(operands), directions(operands))
    return sum(float(jnp.abs(term).sum()) for term in jax.tree.leaves(terms))


def reverse_over_reverse(f):
    def of_gradient(operands):
        other = directions(operands)
        return sum(
            jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (jax.grad(f)(operands), other)), strict=True)
        )

    return jax.grad(of_gradient)


TRANSFORMS = {
    "gradient": (jax.grad, 1),
    "along a direction": (along, 1),
    "reverse over reverse": (reverse_over_reverse, 2),
    "forward over reverse": (lambda f: along(jax.grad(f)), 2),
    "reverse over forward": (lambda f: jax.grad(along(f)), 2),
    "forward over forward": (lambda f: along(along(f)), 2),
}
MOST = [f for f in FEATURES if "dropout" not in f]  # dropout has a test of its own


@pytest.mark.parametrize("features", first(2, MOST))
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives(monkeypatch, features, name):
    of_both(monkeypatch, features, jnp.float32, *TRANSFORMS[name])


@pytest.mark.full
@pytest.mark.parametrize("features", MOST)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_in_float64(monkeypatch, features, name):
    of_both(monkeypatch, features, jnp.float64, *TRANSFORMS[name])


@pytest.mark.parametrize("name", first(1, ["reverse over reverse", "forward over reverse", "forward over forward"]))
def test_third_derivatives(monkeypatch, name):
    transform, _ = TRANSFORMS[name]
    of_both(monkeypatch, "causal cap bias_101", jnp.float64, lambda f: along(transform(f)), 3)


def test_hessian_and_jacobians(monkeypatch):
    only_q = lambda transform: (
        lambda f: lambda operands: transform(lambda q: f(operands | dict(q=q)))(operands["q"])
    )
    for transform, order in ((jax.hessian, 2), (jax.jacfwd, 1), (jax.jacrev, 1)):
        of_both(monkeypatch, "causal window bias_111", jnp.float64, only_q(transform), order, T=4)


def test_the_formula_and_finite_differences(monkeypatch):
    """The formula has the first derivatives of numpy's, and the second derivative of rope_jax is a difference."""
    in_blocks(monkeypatch, 3, 4)
    with jax.enable_x64(True):
        p, mine, _, wide = functions("causal cap bias_111", True)
        (out, log_total), pull_back = jax.vjp(lambda operands: plain(p, operands), wide)
        assert_solved(p, out, log_total, pull_back((p.dout, p.dlog))[0])
        direction, step = directions(wide), 1e-5
        gradient = jax.jit(jax.grad(mine))
        moved = lambda s: jax.tree.map(lambda x, d: x + s * d, wide, direction)
        ahead, behind = gradient(moved(step)), gradient(moved(-step))
        want = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
        got = jax.jit(lambda x: jax.jvp(jax.grad(mine), (x,), (direction,))[1])(wide)
        assert_close(got, want, 1e-8)  # the square of the step, times a third derivative of size 100


@pytest.mark.parametrize("which", [("out",), ("log",)])
def test_each_result_alone(monkeypatch, which):
    """A gradient of the output alone, and of the log of the sums alone, which is the mean of the keys."""
    in_blocks(monkeypatch, 10, 16)
    p = problem("causal cap t5")
    zero = dict(dlog=0 * p.dlog) if which == ("out",) else dict(dout=0 * p.dout)
    _, _, want = solve(dataclasses.replace(p, **zero))
    cotangent, i = (p.dout, 0) if which == ("out",) else (p.dlog, 1)
    mine = lambda operands: jnp.vdot(attention_with_log(*p.replaced(operands))[i], cotangent)
    got = jax.jit(jax.grad(mine))(p.differentiable)
    if which == ("log",):
        assert not np.any(got.pop("v")) and not np.any(want.pop("v"))
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("only", ["q", "k", "v", "bias", "table"])
def test_one_operand_alone(monkeypatch, only):
    in_blocks(monkeypatch, 10, 16)
    p = problem("causal cap t5 bias_010")
    _, _, want = solve(dataclasses.replace(p, dlog=0 * p.dlog))
    of = lambda x: attention(*p.replaced(p.differentiable | {only: x}))
    x = p.differentiable[only]
    got = jax.jit(lambda x: jax.vjp(of, x)[1](p.dout)[0])(x)
    assert_close(got, want[only], 1e-5)
    direction = directions(x)
    forward = jax.jit(lambda x: jax.jvp(of, (x,), (direction,))[1])(x)
    np.testing.assert_allclose(np.vdot(forward, p.dout), np.vdot(want[only], direction), rtol=1e-4)


@pytest.mark.parametrize("features", first(1, ["causal cap t5", "mask", "segments bias_111", "dropout"]))
def test_checkpoint_and_linearize(monkeypatch, features):
    in_blocks(monkeypatch, 10, 16)
    p = problem(features)
    of = lambda operands: attention_with_log(*p.replaced(operands))

    def gradient(function):
        return jax.jit(lambda operands: jax.vjp(function, operands)[1]((p.dout, p.dlog))[0])(p.differentiable)

    want = gradient(of)
    for policy in (None, jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.everything_saveable):
        assert_close(gradient(jax.checkpoint(of, policy=policy)), want, 1e-6)
    direction = directions(p.differentiable)
    out, linear = jax.linearize(of, p.differentiable)
    of_tangent, of_jvp = linear(direction), jax.jvp(of, (p.differentiable,), (direction,))
    np.testing.assert_allclose(out[0], of_jvp[0][0], atol=1e-6)
    finite = np.isfinite(np.asarray(out[1]))
    for got, same in zip(of_tangent, of_jvp[1], strict=True):
        got, same = (x[finite] for x in (got, same))
        np.testing.assert_allclose(got, same, atol=1e-5 * np.abs(same).max())
    transposed = jax.linear_transpose(linear, p.differentiable)((p.dout, p.dlog))[0]
    assert_close(transposed, want, 1e-6)


def test_dropout_has_one_mask_in_all_derivatives(monkeypatch):
    """With the entries that the output shows, all derivatives are those of the formula."""
    in_blocks(monkeypatch, 3, 4)
    p = problem("dropout causal cap", **SMALL)
    factors = read_factors(p)
    cotangents = (p.dout, p.dlog)
    mine = lambda operands: scalar(attention_with_log(*p.replaced(operands)), cotangents)
    wide = lambda x: np.asarray(x, np.float64)
    for transform, order in TRANSFORMS.values():
        got = jax.jit(transform(mine))(p.differentiable)
        with jax.enable_x64(True):
            theirs = lambda operands: scalar(plain(p, operands, factors), tuple(map(wide, cotangents)))
            operands = jax.tree.map(wide, p.differentiable)
            # The direction is drawn in float64, and rounded in float32: an error of 2^-24.
            want = jax.jit(transform(theirs))(operands)
        assert_close(got, want, share(jnp.float32, order))


@pytest.mark.parametrize("order", [1, 2])
def test_queries_without_keys_have_finite_derivatives(monkeypatch, order):
    in_blocks(monkeypatch, 3, 4)
    p = problem("mask t5 cap", **SMALL)
    p = dataclasses.replace(p, facts=dataclasses.replace(p.facts, mask=p.facts.mask.at[:, :, 2:6].set(False)))
    loss = lambda operands: jnp.sum(jnp.sin(attention(*p.replaced(operands))) * p.dout)
    derivative = jax.grad(loss) if order == 1 else reverse_over_reverse(loss)
    got = jax.jit(derivative)(p.differentiable)
    for name, x in got.items():
        assert np.all(np.isfinite(x)), name
    assert not np.any(np.asarray(got["q"])[:, :, 2:6])


def test_without_leaks(monkeypatch):
    in_blocks(monkeypatch, 3, 4)
    with jax.checking_leaks():
        for features in ("causal cap t5", "traced_window bias_111", "dropout mask"):
            p = problem(features, **SMALL)
            loss = lambda operands, p=p: jnp.sum(attention(*p.replaced(operands)) ** 2)
            jax.jit(jax.grad(loss))(p.differentiable)
            jax.jvp(jax.grad(loss), (p.differentiable,), (p.differentiable,))


def test_integers_beside_a_table_have_no_derivative(monkeypatch):
    """A bias as a Partial over a table and a number: gradients and tangents are those of the table."""
    in_blocks(monkeypatch, 3, 4)
    p = problem("causal", **SMALL)
    table = jnp.asarray(np.random.default_rng(3).normal(size=(8, p.q.shape[1])), jnp.float32)

    def look_up(table, most, distance, num_heads, causal):
        return jnp.moveaxis(table[jnp.clip(distance, 0, most - 1)], -1, 1)

    def out(table, q, form):
        sizes = p.q.shape[2], p.k.shape[2]
        bias = form(table)
        function = bias_function(bias, p.q.shape[1], True, sizes)
        return attention(q, p.k, p.v, dataclasses.replace(p.facts, position_bias=function))

    beside = lambda table: jax.tree_util.Partial(look_up, table, jnp.int32(8))
    without = lambda table: jax.tree_util.Partial(lambda table, *rest: look_up(table, 8, *rest), table)
    for form in (beside, without):
        program = lambda table, q, form=form: out(table, q, form)
        pulled = jax.vjp(program, table, p.q)[1](p.dout)
        pushed = jax.jvp(program, (table, p.q), (jnp.ones_like(table), p.q))[1]
        if form is beside:
            got = pulled, pushed
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves((pulled, pushed)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_flax_table(monkeypatch):
    """The gradient of the table through the module that holds it, as a layer takes it."""
    in_blocks(monkeypatch, 10, 16)
    p = problem("causal t5")
    _, _, want = solve(dataclasses.replace(p, dlog=0 * p.dlog))
    module = T5Bias(num_buckets=6, max_distance=19)

    def out(table):
        function = bias_function(module.bind({"params": {"table": table}}), 4, True, (37, 37))
        return attention(p.q, p.k, p.v, dataclasses.replace(p.facts, position_bias=function))

    got = jax.jit(lambda table: jax.vjp(out, table)[1](p.dout)[0])(p.facts.position_bias.params[0])
    assert_close(got, want["table"], 1e-5)
