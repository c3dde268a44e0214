"""Memory of compiled attention, which grows with T + S, and the blocks that it visits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import in_blocks, problem, t5
from fast import first

import rope_jax
from rope_jax.attention import ALiBi, Facts, blocks
from rope_jax.attention.bias import bias_function
from rope_jax.attention.primitive import attention
from rope_jax.attention.tiling import BlockSizes, Tiling

N, K, H = 4, 2, 64
LENGTHS = 4096, 8192


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def facts(name, length):
    """Facts as shapes alone: nothing here is run."""
    key = dict(dropout_rate=0.1, dropout_key=jax.ShapeDtypeStruct((2,), jnp.uint32), dropout_impl="threefry2x32")
    table = jax.ShapeDtypeStruct((6, N), jnp.float32)
    return {
        "plain": Facts(),
        "causal": Facts(causal=True),
        "window": Facts(causal=True, window=512),
        "traced window": Facts(causal=True, window=int32()),
        "cap": Facts(causal=True, logit_cap=30.0),
        "T5": Facts(causal=True, position_bias=t5(table, True)),
        "ALiBi": Facts(causal=True, position_bias=bias_function(ALiBi(), N, True, (1, 1))),
        "segments": Facts(causal=True, segments=int32(1, length)),
        "padding": Facts(segments=int32(1, length)),
        "dropout": Facts(causal=True, **key),
        "reordered": Facts(causal=True, window=512, query_index=int32(1, length), key_index=int32(1, length)),
        "ragged cache": Facts(causal=True, query_index=int32(1, length), key_index=int32(1, length)),
        "bias of keys": Facts(causal=True, bias=jax.ShapeDtypeStruct((1, N, 1, length), jnp.float32)),
    }[name]


NAMES = ["causal", "T5", "window", "traced window", "cap", "ALiBi", "segments", "padding", "dropout", "reordered"]
NAMES += ["ragged cache", "bias of keys", "plain"]


def temporaries(program, *arguments):
    return jax.jit(program).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def array(heads, length, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, heads, length, H), dtype)


def forward(q, k, v, facts, dout):
    return attention(q, k, v, facts)


def both_passes(q, k, v, facts, dout):
    """Also the gradient of tables and biases."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    leaves, tree = jax.tree.flatten(facts)
    active = [x for x in leaves if floating(x)]

    def out(q, k, v, active):
        rest = iter(active)
        return attention(q, k, v, tree.unflatten([next(rest) if floating(x) else x for x in leaves]))

    y, pull_back = jax.vjp(out, q, k, v, active)
    return y, pull_back(dout)


@pytest.mark.parametrize("program", [forward, both_passes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", first(4, NAMES))
@pytest.mark.parametrize("dtype", first(1, [jnp.bfloat16, jnp.float32]), ids=lambda d: d.__name__)
def test_grows_with_the_length(name, program, dtype):
    """Twice the length takes twice the memory, less a constant; and no pair of all tokens is an array."""
    sizes = []
    for length in LENGTHS:
        q, k = array(N, length, dtype), array(K, length, dtype)
        sizes.append(temporaries(program, q, k, k, facts(name, length), q))
    print(f"\n{name}, {program.__name__}: {sizes[0] / 1e6:.1f} and {sizes[1] / 1e6:.1f} MB", end="")
    assert sizes[1] < 2.3 * sizes[0]
    assert sizes[1] < LENGTHS[1] ** 2  # bytes: of a mask of all pairs
    # Both passes: gradients in float32 and their copies, and tiles of 256 by 256 scores in each head.
    tiles = 16 * N * 256 * 256 * 4
    assert sizes[1] < tiles + (4 if program is forward else 16) * N * LENGTHS[1] * H * 4


@pytest.mark.parametrize("order", first(1, ["reverse over reverse", "forward over reverse", "forward"]))
def test_of_other_derivatives_grows_with_the_length(order):
    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, Facts(causal=True)).astype(jnp.float32) ** 2)

    gradient = lambda q, k, v: jax.grad(loss, (0, 1, 2))(q, k, v)
    length_of_gradient = lambda *qkv: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in gradient(*qkv))
    program = {
        "reverse over reverse": jax.grad(length_of_gradient, (0, 1, 2)),
        "forward over reverse": lambda *qkv: jax.jvp(gradient, qkv, qkv)[1],
        "forward": lambda *qkv: jax.jvp(lambda *x: attention(*x, Facts(causal=True)), qkv, qkv)[1],
    }[order]
    small, large = (
        temporaries(program, array(N, n, jnp.float32), array(K, n, jnp.float32), array(K, n, jnp.float32))
        for n in LENGTHS
    )
    print(f"\n{order}: {small / 1e6:.1f} and {large / 1e6:.1f} MB", end="")
    assert large < 2.3 * small


@pytest.mark.parametrize("kind", first(1, ["padding", "segments", "window", "dropout", "position_bias"]))
def test_a_layer_in_training_grows_with_the_length(kind):
    """No mask of all pairs appears between the arguments of a layer and the blocks."""
    rope = rope_jax.Rope(H, rope_jax.Standard())
    change = dict(
        window=dict(window=512), dropout=dict(dropout_rate=0.1), position_bias=dict(position_bias=ALiBi())
    )
    layer = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=K, head_dim=H, rope=rope, **change.get(kind, {}))
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 2, N * H)))

    def loss(params, x, numbers):
        how = dict(padding=dict(mask=numbers), segments=dict(segment_ids=numbers)).get(kind, {})
        rngs = dict(dropout=jax.random.key(0))
        return layer.apply(params, x, **how, deterministic=kind != "dropout", rngs=rngs).sum()

    small, large = (
        temporaries(jax.grad(loss, (0, 1)), params, jax.ShapeDtypeStruct((1, n, N * H), jnp.float32), int32(1, n))
        for n in LENGTHS
    )
    assert large < 2.3 * small


@pytest.mark.parametrize("tokens", [1, pytest.param(256, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
def test_a_cache_is_not_copied(tokens, dtype):
    """Steps and prompts read a stack block by block: temporaries do not grow with the cache."""

    def step(q, k, v, queries, keys, layer):
        return attention(q, k, v, Facts(causal=True, query_index=queries, key_index=keys), layer=layer)

    def of_length(S):
        stack = jax.ShapeDtypeStruct((3, 2, K, S, H), dtype)
        q = jax.ShapeDtypeStruct((2, N, tokens, H), dtype)
        return temporaries(step, q, stack, stack, int32(2, tokens), int32(2, S), int32())

    small, large = map(of_length, LENGTHS)
    layer = 2 * K * LENGTHS[1] * H * dtype.dtype.itemsize
    assert large - small < layer // 8


# ----------------------------------------------------------------------------------------- blocks that are visited


def visited(p, queries, keys):
    """The range of blocks of keys for each block of queries, and whether a pair of blocks has a visible entry."""
    tiles = Tiling(p.q, p.k, p.v, None, p.facts, BlockSizes(queries, keys), differentiable=False)
    T, S = p.allowed.shape[2:]
    start = lambda i, size, length: min(i * size, length - size)
    seen, ranges = np.zeros((tiles.num_queries, tiles.num_keys), bool), []
    for i in range(tiles.num_queries):
        ranges.append([int(x) for x in tiles._key_range(i)])
        for j in range(tiles.num_keys):
            t, s = start(i, queries, T), start(j, keys, S)
            seen[i, j] = p.allowed[:, :, t : t + queries, s : s + keys].any()
    return ranges, seen


CONTIGUOUS = ["", "causal", "causal window", "window", "traced_window", "causal traced_window", "segments causal"]
CONTIGUOUS += ["segments", "ragged", "ragged window"]


@pytest.mark.parametrize("features", CONTIGUOUS)
@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (10, 16), (5, 3)])
def test_visits_the_visible_blocks_alone(features, queries, keys):
    """From the first block with a visible key to the last: exactly so if tokens lie in order."""
    p = problem(features, T=50 if "ragged" not in features else 20, S=50, B=1 if "segments" in features else 2)
    ranges, seen = visited(p, queries, keys)
    for (first_, end), row in zip(ranges, seen, strict=True):
        (blocks_,) = np.nonzero(row)
        assert (first_, end) == (blocks_[0], blocks_[-1] + 1)


@pytest.mark.parametrize(
    "features", ["reordered causal", "reordered window", "padding", "ring window", "segments padding"]
)
def test_visits_all_visible_blocks(features):
    """Tokens out of order: no visible block is left out."""
    p = problem(features, T=50 if "ring" not in features else 7, S=50)
    ranges, seen = visited(p, 7, 8)
    for (first_, end), row in zip(ranges, seen, strict=True):
        assert not row[:first_].any() and not row[end:].any()


def test_sorted_out_of_order_blocks_are_skipped():
    """Blocks that lie in reverse are skipped as well: the first visible block is not the first."""
    p = problem("causal", T=48)
    index = jnp.arange(48, dtype=jnp.int32)[None, ::-1]
    p = dataclasses.replace(p, facts=dataclasses.replace(p.facts, query_index=index, key_index=index))
    ranges, _ = visited(p, 8, 8)
    assert ranges == [[i, 6] for i in range(6)]


def counted(program, *arguments):
    """How often the blocks of a program are computed: each reads a block of values through ``drop``."""
    count = []
    plain = Tiling.drop

    def drop(self, weights, i, j):
        jax.debug.callback(lambda: count.append(1))
        return plain(self, weights, i, j)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiling, "drop", drop)
        jax.block_until_ready(jax.jit(program)(*arguments))
        jax.effects_barrier()
    return len(count)


def test_blocks_that_run():
    """By a count of the programs that run: skipped blocks cost nothing."""

    def count(features, **sizes):
        p = problem(features, B=1, T=64, **sizes)
        f = functools.partial(blocks.forward, layer=None, sizes=BlockSizes(8, 8))
        return counted(lambda q, k, v, facts: f(q, k, v, facts=facts), p.q, p.k, p.v, p.facts)

    assert count("") == 64 and count("causal") == 36
    assert count("causal window") == count("causal traced_window") == 8 + 7  # 6 tokens: this block and the last
    assert count("window") == 8 + 7 + 7
    p = problem("causal window", B=1, T=64)
    log = jnp.zeros(p.dlog.shape)
    for differentiable in (False, True):  # a loop, or a condition in a scan
        backward = functools.partial(blocks.backward, sizes=BlockSizes(8, 8), differentiable=differentiable)
        run = lambda q, k, v, backward=backward: backward(q, k, v, p.facts, q, log, log, p.dout, None)
        assert counted(run, p.q, p.k, p.v) == 2 * (8 + 7)  # weights, and their gradients


def test_steps_read_the_filled_part_of_a_cache(monkeypatch):
    """A step visits the blocks of the longest row."""
    in_blocks(monkeypatch, 8, 8)
    for length, want in ((1, 1), (8, 1), (9, 2), (30, 4), (64, 8)):
        p = problem("ragged", T=1, S=64)
        of_row = jnp.array([[length - 1], [0]], jnp.int32)
        facts_ = Facts(causal=True, query_index=of_row, key_index=jnp.arange(64, dtype=jnp.int32)[None])
        assert counted(lambda q, facts_, p=p: attention(q, p.k, p.v, facts_), p.q, facts_) == want
