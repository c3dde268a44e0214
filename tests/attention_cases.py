"""Attention problems and their float64 solutions: a table of features, shared by the tests of attention.

The solutions are numpy formulas over whole arrays of scores. They share no code with rope_jax.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from position_encodings import alibi_slopes, t5_bucket

from rope_jax.attention import ALiBi, Facts, T5Bias, blocks, paths
from rope_jax.attention.bias import BiasFunction, bias_function
from rope_jax.attention.primitive import attention, attention_with_log
from rope_jax.attention.tiling import BlockSizes

FREE = 2**31 - 1  # sequence index of a free slot of a cache
BUCKETS = dict(num_buckets=6, max_distance=19)
BIAS_SHAPES = {f"bias_{b}{n}{t}": (b, n, t) for b in (0, 1) for n in (0, 1) for t in (0, 1)}  # 0: broadcast


@dataclasses.dataclass
class Problem:
    """q ``[B, N, T, H]``, k and v ``[B, K, S, H]``, facts, and whatever the solution needs in float64."""

    q: Any
    k: Any
    v: Any
    facts: Facts
    dout: Any
    dlog: Any
    allowed: np.ndarray  # [B, N, T, S]
    bias: np.ndarray  # [B, N, T, S]
    buckets: np.ndarray | None = None  # [B, T, S]
    factors: np.ndarray | float = 1.0  # of the weights, by dropout: [B, N, T, S]

    @property
    def differentiable(self):
        """Name and value of each differentiable operand."""
        operands = dict(q=self.q, k=self.k, v=self.v)
        if self.facts.bias is not None:
            operands["bias"] = self.facts.bias
        if self.buckets is not None:
            operands["table"] = self.facts.position_bias.params[0]
        return operands

    def replaced(self, operands):
        """q, k, v and the facts with these operands."""
        facts = self.facts
        if "bias" in operands:
            facts = dataclasses.replace(facts, bias=operands["bias"])
        if "table" in operands:
            facts = dataclasses.replace(
                facts, position_bias=dataclasses.replace(facts.position_bias, params=[operands["table"]])
            )
        return operands["q"], operands["k"], operands["v"], facts


def problem(features: str, *, B=2, N=4, K=2, T=37, S=None, H=8, dtype=jnp.float32, seed=0) -> Problem:
    """A problem with these features, each a name of the branches below."""
    names = set(features.split())
    assert names <= ALL_FEATURES, names - ALL_FEATURES
    S = T if S is None else S
    rng = np.random.default_rng(seed)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(B, n, m, H)), dtype) for n, m in ((N, T), (K, S), (K, S), (N, T)))
    dlog = jnp.asarray(rng.normal(size=(B, N, T)), jnp.float64 if dtype == jnp.float64 else jnp.float32)
    facts: dict[str, Any] = {}
    allowed = np.ones((B, N, T, S), bool)
    queries, keys = np.arange(T)[None], np.arange(S)[None]
    bias, buckets, wide = np.zeros((B, N, T, S)), None, np.float64 if dtype == jnp.float64 else np.float32

    # The places of tokens come first: causality, windows and biases go by them.
    if "reordered" in names:
        queries = np.stack([rng.permutation(T) for _ in range(B)])
        keys = queries if T == S else np.stack([rng.permutation(S) for _ in range(B)])
    if "ragged" in names:  # a cache: rows of unlike lengths, the last T tokens are the queries
        lengths = rng.integers(min(T, S), S + 1, B)
        lengths[0] = min(T, S)
        queries = lengths[:, None] - T + np.arange(T)
        keys = np.where(np.arange(S) < lengths[:, None], np.arange(S), FREE)
    if "ring" in names:  # a cache that wraps around: keys lie rotated, with sink tokens at the start
        lengths = np.array([S + 5 + 3 * b for b in range(B)])
        queries = lengths[:, None] - T + np.arange(T)
        ring, latest = S - 3, lengths[:, None] - 1 - (lengths[:, None] - 1 - np.arange(S)) % (S - 3)
        assert ring > 0
        keys = np.where(np.arange(S) < 3, np.arange(S), latest)
    if {"reordered", "ragged", "ring"} & names:
        facts |= dict(query_index=jnp.asarray(queries, jnp.int32), key_index=jnp.asarray(keys, jnp.int32))
    distance = np.broadcast_to(queries[:, :, None] - keys[:, None, :], (B, T, S))
    bias_distance = distance
    if "ring" in names:
        shifted = keys + np.where(np.arange(S) < 3, (lengths - S)[:, None], 0)
        facts |= dict(bias_key_index=jnp.asarray(shifted, jnp.int32))
        bias_distance = queries[:, :, None] - shifted[:, None, :]

    causal = bool({"causal", "ragged", "ring"} & names)
    if causal:
        facts["causal"] = True
        allowed &= (distance >= 0)[:, None]
    if {"window", "traced_window"} & names:
        near = abs(distance) < 6
        if {"sinks", "ring"} & names:
            facts["num_sink_tokens"] = 3
            near |= (keys < 3)[:, None, :]
        facts |= dict(window=6) if "window" in names else dict(window=jnp.int32(6))
        allowed &= near[:, None]
    if "segments" in names:
        numbers = np.sort(rng.integers(0, 4, (B, T)))
        if "padding" in names:
            numbers = np.where(rng.random((B, T)) < 0.3, -1, numbers)
        facts["segments"] = jnp.asarray(numbers, jnp.int32)
        allowed &= (numbers[:, :, None] == numbers[:, None, :])[:, None]
    elif "padding" in names:
        real = rng.random((B, T)) < 0.6
        facts["segments"] = jnp.asarray(np.where(real, 0, -1), jnp.int32)
        allowed &= (real[:, :, None] == real[:, None, :])[:, None]
    for name, (rows, heads) in dict(mask=(B, N), mask_shared=(1, 1)).items():
        if name in names:  # also queries that may read nothing, at both ends and between
            given = rng.random((rows, heads, T, S)) < 0.6
            given[:, :, [0, T // 2, T - 1]] = False
            facts["mask"] = jnp.asarray(given)
            allowed &= given
    for name, shape in BIAS_SHAPES.items():
        if name in names:
            sizes = [size if given else 1 for size, given in zip((B, N, T), shape, strict=True)]
            facts["bias"] = jnp.asarray(rng.normal(size=(*sizes, S)), wide)
            bias = bias + np.asarray(facts["bias"], np.float64)
    if "t5" in names:
        facts["position_bias"] = t5(jnp.asarray(rng.normal(size=(BUCKETS["num_buckets"], N)), wide), causal)
        bucket_of = np.vectorize(lambda d: t5_bucket(int(d), causal=causal, **BUCKETS))
        buckets = bucket_of(np.clip(bias_distance, -1000, 1000))
    if "alibi" in names:
        facts["position_bias"] = bias_function(ALiBi(), N, causal, (T, S))
        slopes = np.asarray(alibi_slopes(N), np.float64)[:, None, None]
        bias = bias - slopes * abs(bias_distance)[:, None]
    if "scale" in names:
        facts["scale"] = 0.6
    if "cap" in names:
        facts["logit_cap"] = 2.0
    if "dropout" in names:
        facts |= dict(
            dropout_rate=0.3, dropout_key=jax.random.key_data(jax.random.key(7)), dropout_impl="threefry2x32"
        )
    return Problem(q, k, v, Facts(**facts), dout, dlog, allowed, bias, buckets)


ALL_FEATURES = {
    *"causal window traced_window sinks ragged ring reordered segments padding mask mask_shared t5 alibi".split(),
    *"scale cap dropout".split(),
    *BIAS_SHAPES,
}


def t5(table, causal: bool) -> BiasFunction:
    """T5's bias as attention takes it, with the table as its only parameter."""
    module = T5Bias(**BUCKETS)
    bias = lambda params, _, distance, heads, causal: module.apply(
        {"params": {"table": params[0]}}, distance, heads, causal
    )
    return BiasFunction([table], [], bias, table.shape[1], causal)


def solve(p: Problem) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """In float64: the output, the log of the sums, and the gradients along ``dout`` and ``dlog``."""
    q, k, v, dout, dlog = (np.asarray(x, np.float64) for x in (p.q, p.k, p.v, p.dout, p.dlog))
    group = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if p.facts.scale is None else p.facts.scale
    cap = p.facts.logit_cap
    raw = np.einsum("bnth,bnsh->bnts", q, keys) * scale
    bias = p.bias
    if p.buckets is not None:
        table = np.asarray(p.facts.position_bias.params[0], np.float64)
        bias = bias + np.moveaxis(table[p.buckets], -1, 1)
    scores = (raw if cap is None else cap * np.tanh(raw / cap)) + bias
    scores = np.where(p.allowed, scores, -np.inf)
    empty = ~p.allowed.any(-1)
    highest = np.where(empty, 0, scores.max(-1, initial=-np.inf))
    total = np.exp(scores - highest[..., None]).sum(-1)
    log_total = np.where(empty, np.inf, highest + np.log(np.where(empty, 1, total)))
    weights = np.exp(scores - log_total[..., None])
    dropped = weights * p.factors
    out = np.einsum("bnts,bnsh->bnth", dropped, values)
    # d out = sum_s d(weights * factors) v, and d weights = weights (d scores - sum_s weights d scores)
    dweights = np.einsum("bnth,bnsh->bnts", dout, values) * p.factors
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True) + dlog[..., None])
    draw = dscores * scale * (1 if cap is None else 1 - np.tanh(raw / cap) ** 2)
    by_key_head = lambda x: x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)
    gradients = dict(
        q=np.einsum("bnts,bnsh->bnth", draw, keys),
        k=by_key_head(np.einsum("bnts,bnth->bnsh", draw, q)),
        v=by_key_head(np.einsum("bnts,bnth->bnsh", dropped, dout)),
    )
    if p.facts.bias is not None:
        shape = p.facts.bias.shape
        axes = tuple(a for a in range(4) if shape[a] == 1 and dscores.shape[a] != 1)
        gradients["bias"] = dscores.sum(axes, keepdims=True)
    if p.buckets is not None:
        gradients["table"] = np.zeros(table.shape)
        np.add.at(gradients["table"], p.buckets, np.moveaxis(dscores, 1, -1))
    return out, log_total, gradients


def solved_by_library(p: Problem, **options):
    """The same by rope_jax, in one compiled program; the function is new, so that nothing is cached."""

    def both_passes(operands, dout, dlog, facts):
        mine = dataclasses.replace(p, facts=facts)
        results, pull_back = jax.vjp(lambda o: attention_with_log(*mine.replaced(o), **options), operands)
        return *results, pull_back((dout, dlog))[0]

    return jax.jit(both_passes)(p.differentiable, p.dout, p.dlog, p.facts)


def check(p: Problem, **options):
    """Compares outputs, sums and gradients with float64."""
    out, log_total, gradients = solved_by_library(p, **options)
    assert out.dtype == p.q.dtype and log_total.dtype == p.dlog.dtype
    assert_solved(p, out, log_total, gradients)


def bounds(p: Problem, weights_v=3.0):
    """Errors allowed in outputs, in logs of sums, and in gradients as a share of the largest.

    float32: design.md, numeric contract, point 6: about 32 and 168 unit roundoffs. float64: as many of its own.
    Narrow: weights and outputs are rounded once each, to half an ulp, beside values of size ``weights_v``; gradients
    multiply three rounded numbers and the rounded output.
    """
    dtype = p.q.dtype
    if dtype == jnp.float64:
        share = 2.0**-53 / oracles.EPS32
        return 2e-6 * share, 2e-6 * share, 1e-5 * share
    if dtype == jnp.float32:
        return 2e-6, 2e-6, 1e-5
    rounding = {jnp.dtype(jnp.bfloat16): 2.0**-8, jnp.dtype(jnp.float16): 2.0**-11}[jnp.dtype(dtype)]
    return 2 * rounding * weights_v, 2e-6, 5 * rounding


def assert_solved(p: Problem, out, log_total, gradients):
    want_out, want_log, want = solve(p)
    largest_value = float(np.abs(np.asarray(p.v, np.float64)).max())
    at_output, at_log, at_gradient = bounds(p, largest_value)
    empty = np.isinf(want_log)
    assert np.all(np.asarray(out, np.float64)[empty] == 0), "a query without keys gives 0"
    assert np.all(np.asarray(log_total)[empty] == np.inf)
    # Outputs of size 1 to 3 in float32; with dropout they are 1 / 0.7 times as large.
    scale = max(1.0, np.abs(want_out).max() / 2)
    error = np.abs(np.asarray(out, np.float64) - want_out).max()
    assert error <= at_output * scale, f"output: {error:.1e}"
    finite = ~empty
    error = np.abs(np.asarray(log_total, np.float64)[finite] - want_log[finite]).max(initial=0)
    # A log of size 8 has an ulp of 2^-20 of its own.
    assert error <= at_log * max(1.0, np.abs(want_log[finite]).max(initial=0) / 2), f"log: {error:.1e}"
    assert set(gradients) == set(want)
    for name, gradient in gradients.items():
        assert gradient.dtype == p.differentiable[name].dtype and gradient.shape == want[name].shape
        size = np.abs(want[name]).max()
        error = np.abs(np.asarray(gradient, np.float64) - want[name]).max()
        assert error <= at_gradient * size, f"gradient of {name}: {error / size:.1e} of the largest"


def assert_same(got, want, terms=64):
    """Equal but for the order of sums."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        finite = np.isfinite(np.asarray(b))
        np.testing.assert_array_equal(np.isfinite(np.asarray(a)), finite)
        size = np.abs(np.asarray(b)[finite]).max(initial=0)
        error = np.abs(np.asarray(a)[finite] - np.asarray(b)[finite]).max(initial=0)
        assert error <= terms * 2.0**-24 * size, f"{error / size:.1e} of the largest"


def in_blocks(monkeypatch, queries: int, keys: int, most_keys: int | None = None):
    """Has attention on the CPU take blocks of at most this size."""
    monkeypatch.setitem(paths.BLOCKS, "cpu", BlockSizes(queries, keys))
    monkeypatch.setitem(paths.MAX_KEYS, "cpu", keys if most_keys is None else most_keys)


def read_factors(p: Problem, **options) -> np.ndarray:
    """The factors by which dropout multiplies each weight, read through unit vectors as values."""
    B, _, _, H = p.q.shape
    _, K, S, _ = p.k.shape
    program = jax.jit(lambda v: attention(p.q, p.k, v, p.facts, **options))
    columns = []
    for start in range(0, S, H):
        unit = np.zeros((S, H), np.float32)
        for h in range(min(H, S - start)):
            unit[start + h, h] = 1
        columns.append(np.asarray(program(jnp.broadcast_to(jnp.asarray(unit, p.v.dtype), (B, K, S, H)))))
    dropped = np.concatenate(columns, -1)[..., :S]
    undropped = np.asarray(
        blocks.weights(p.q, p.k, dataclasses.replace(p.facts, dropout_rate=0.0, dropout_key=None))
    )
    return np.where(undropped > 0, (dropped > 0) / (1 - p.facts.dropout_rate), 1.0)
