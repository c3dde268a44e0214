import collections
import functools
import re

import eight_devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from fast import first
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import rope_jax
from rope_jax.attention import blocks
from rope_jax.attention.tiling import Tiling

B, T, N, H = 2, 32, 4, 8
ROPE = rope_jax.Rope(H, rope_jax.Standard(base=100.0))


def test_on_eight_devices():
    eight_devices.run(__file__)


# ------------------------------------------------------------------------------------------------------ the oracle


def inputs(kv_heads=2, dtype=jnp.float32, length=T, seed=0):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    heads = (N, kv_heads, kv_heads, N)
    return [jnp.asarray(rng.normal(size=(B, length, n, H)), dtype) for n in heads]


def exact(q, k, v, dout, allowed, scale=H**-0.5, cap=None):
    """In float64: output and gradients; for each, the same sum of absolute values; and the largest sum for a score."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    together = lambda dx: dx.reshape(*dx.shape[:2], -1, group, H).sum(3)
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
    bounded = np.tanh(scores / cap) if cap else scores
    scores, slope = (cap * bounded, 1 - bounded**2) if cap else (scores, 1.0)
    weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)

    def sums(q, k, v, dout, minus, slope):
        out = np.einsum("bnts,bsnh->btnh", weights, v)
        dweights = np.einsum("btnh,bsnh->bnts", dout, v)
        delta = np.einsum("btnh,btnh->bnt", dout, out)[..., None]
        dscores = scale * slope * weights * (dweights - minus * delta)
        dq = np.einsum("bnts,bsnh->btnh", dscores, k)
        dk = np.einsum("bnts,btnh->bsnh", dscores, q)
        dv = np.einsum("bnts,btnh->bsnh", weights, dout)
        return out, dq, together(dk), together(dv)

    most = scale * np.einsum("btnh,bsnh->bnts", abs(q), abs(k)).max()
    # 1 - tanh^2 is off by 4 eps of 1, however little of it is left.
    loose = slope + 4 / roundings(most) if cap else slope
    return sums(q, k, v, dout, 1, slope), sums(*map(abs, (q, k, v, dout)), -1, loose), most


def roundings(most):
    """How many eps of the sum of its absolute values a result may be off: see :func:`assert_exact`."""
    return 4 * (H + 2) * most + 6 * T + 64


def assert_exact(got, reference, dtype=jnp.float32, say=""):
    """Within what float32 sums in any order may lose, and the roundings to a narrower dtype.

    A score, of H products, is off by (H + 2) eps of its own sum, which moves a weight by as much, relatively, and the
    total again; exp, the total of T weights, the rescaling and the sum of T values lose an eps each for each of their
    terms, and the gradients twice that. bfloat16 rounds the weights or their gradient, the output where the backward
    pass reads it, and the result.
    """
    values, sizes, most = reference
    allowed = roundings(most) * oracles.EPS32
    if dtype == jnp.bfloat16:
        allowed += 3 * oracles.EPS16
    worst = []
    for name, array, value, size in zip(("out", "dq", "dk", "dv"), got, values, sizes, strict=True):
        assert array.dtype == dtype
        off = abs(np.asarray(array, np.float64) - value)
        assert np.all(off <= allowed * size), (name, np.max(off / size), allowed)
        worst.append(f"{name} {off.max():.1e}")
    print(f"\n{say or 'worst'}: {', '.join(worst)}", end="")


def visible(order, causal=True, window=None):
    distance = order[:, None, :, None].astype(int) - order[:, None, None, :]
    return (distance >= 0 if causal else True) & (abs(distance) < (window or 2 * T))


@functools.cache
def on_ring(devices=1, **options):
    """Output and gradients of q, k and v, of arrays that lie in parts on that many devices."""
    mesh = eight_devices.mesh(sequence=devices)

    def both(q, k, v, dout, order):
        ring = functools.partial(
            rope_jax.attention.ring_attention, sequence_index=order, axis_name="sequence", **options
        )
        out, pull = jax.vjp(ring, q, k, v)
        return out, *pull(dout)

    def call(q, k, v, dout, order):
        with jax.set_mesh(mesh):
            return jitted(q, k, v, dout, order)

    jitted = jax.jit(both)
    return call


# ------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize(("length", "devices"), [(2, 1), (8, 2), (48, 3), (64, 8)])
def test_zigzag(length, devices):
    order, slots = (
        rope_jax.attention.zigzag_sequence_index(length, devices),
        rope_jax.attention.zigzag_inverse(length, devices),
    )
    chunk = length // (2 * devices)
    want = [
        token
        for device in range(devices)
        for at in (device, 2 * devices - 1 - device)
        for token in range(at * chunk, (at + 1) * chunk)
    ]
    assert order.tolist() == want and order.dtype == slots.dtype == np.int32
    assert order[slots].tolist() == slots[order].tolist() == list(range(length))
    work = (order + 1).reshape(devices, -1).sum(1)  # a causal token reads those before it, and itself
    assert len(set(work.tolist())) == 1


# ---------------------------------------------------------------------- the rule of attention, with all on one device

OPTIONS = [
    dict(),
    dict(causal=True),
    dict(causal=True, window=5),
    dict(window=5),
    dict(causal=True, scale=0.7, logit_cap=1.5),
    dict(causal=True, window=9, logit_cap=1.5, block_size=32),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_blocks_in_any_order(options):
    """Rows in an order of their own each: blocks in which a row reads nothing, little, or all, and blocks to skip."""
    options = dict(block_size=8) | options
    arrays = inputs()
    backward, zigzag = 1000 - np.arange(T), rope_jax.attention.zigzag_sequence_index(T, 2)
    how = {name: options[key] for key, name in (("scale", "scale"), ("logit_cap", "cap")) if key in options}
    for order in ((backward, zigzag), (backward, np.random.default_rng(1).permutation(T))):
        order = np.stack(order).astype(np.int32)
        got = on_ring(1, **options)(*arrays, order)
        seen = visible(order, options.get("causal", False), options.get("window"))
        assert_exact(got, exact(*arrays, seen, **how))


def test_far_scores_and_a_traced_window():
    q, k, v, dout = inputs()
    q = 40.0 * q  # the maximum moves by more than exp can hold, up and down
    order = np.arange(T, dtype=np.int32)[None]
    assert_exact(on_ring(1, causal=True, block_size=4)(q, k, v, dout, order), exact(q, k, v, dout, visible(order)))
    with jax.set_mesh(eight_devices.mesh(sequence=1)):
        fn = jax.jit(
            lambda window: rope_jax.attention.ring_attention(q, k, v, order, axis_name="sequence", window=window)
        )
        got = [fn(window) for window in (3, 2**31 - 1)]
    for window, out in zip((3, None), got, strict=True):
        (want, *_), (size, *_), most = exact(q, k, v, dout, visible(order, False, window))
        assert np.all(abs(out - want) <= roundings(most) * oracles.EPS32 * size)


def test_refusals():
    q, k, v, _ = inputs()
    order = np.arange(T)[None]
    ring = functools.partial(rope_jax.attention.ring_attention, axis_name="sequence")
    with pytest.raises(
        ValueError, match=r"axis_name must be an axis of the mesh in use \(jax.set_mesh\), \(\), got"
    ):
        ring(q, k, v, order)
    with jax.set_mesh(eight_devices.mesh(sequence=1)):
        for call, error, says in (
            (lambda: ring(q, k[:, :4], v, order), ValueError, r"k must have shape \[B, T, K, H\] with T=32, got"),
            (lambda: ring(q, k, v[..., :4], order), ValueError, r"v must have shape .* H=8, got \(2, 32, 2, 4\)"),
            (
                lambda: ring(q, k, v, order[0]),
                ValueError,
                r"sequence_index must have shape \[B, T\] with .*T=32, got \(32,\)",
            ),
            (
                lambda: ring(q, k, v, order.astype(np.uint32) + np.uint32(2**31 - 3)),
                ValueError,
                "sequence_index must fit",
            ),
            (
                lambda: ring(q, k, v, np.where(order < 3, -(2**31), 2**31 - 1).astype(np.int32)),
                ValueError,
                "sequence_index must fit in int32 and span less than 2.31, got -2147483648 to 2147483647",
            ),
            (lambda: ring(q, k, v, order, scale=np.nan), ValueError, "scale must be finite, got nan"),
            (
                lambda: ring(*(x[:, :0] for x in (q, k, v)), order[:, :0]),
                ValueError,
                "q must have at least one token",
            ),
            (lambda: ring(q, k, v, order * 1.0), TypeError, "sequence_index must be integer, got dtype float32"),
            (lambda: ring(q, k, v.astype(int), order), TypeError, "v must be floating, got dtype int32"),
            (lambda: ring(q[:, :, :3], k, v, order), ValueError, "q must have a multiple of K=2 heads, got N=3"),
            (lambda: ring(q, k, v, order, window=0), ValueError, "window must be at least 1 token, got 0"),
            (lambda: ring(q, k, v, order, logit_cap=-1.0), ValueError, "logit_cap must be positive and finite"),
            (lambda: ring(q, k, v, order, block_size=0), ValueError, "block_size must be at least 1, got 0"),
            (
                lambda: ring(q, k, v, order, axis_name="ring"),
                ValueError,
                r"mesh in use .*\('sequence',\), got 'ring'",
            ),
            (
                lambda: rope_jax.attention.zigzag_sequence_index(12, 4),
                ValueError,
                r"multiple of 2 \* num_devices = 8, got 12",
            ),
            (lambda: rope_jax.attention.zigzag_inverse(12, 0), ValueError, "num_devices must be at least 1, got 0"),
            (
                lambda: rope_jax.attention.zigzag_sequence_index(8.0, 2),
                TypeError,
                "num_tokens must be an integer, got 8.0",
            ),
        ):
            with pytest.raises(error, match=says):
                call()


# ------------------------------------------------------------------------------------------ in the modules, by order

SIZES = dict(vocab_size=13, num_layers=2, width=16, num_heads=N, num_kv_heads=2, head_dim=H, mlp_dim=24)


def moved(params):
    """Far enough from where they start that all of them matter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.2 * jnp.asarray(rng.normal(size=p.shape), p.dtype), nn.unbox(params))


@pytest.mark.parametrize(
    "change",
    [
        dict(rope=ROPE),
        dict(rope=ROPE, window=(9, None)),
        dict(rope=None, position_bias=rope_jax.attention.T5Bias()),
        dict(rope=None, position_embedding=rope_jax.models.Sinusoidal()),
    ],
    ids=["rope", "windows", "t5", "sinusoidal"],
)
def test_a_model_whose_tokens_are_not_in_line(change):
    model = rope_jax.Decoder(**SIZES, **change)
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, 13, (B, T)), jnp.int32)
    params = moved(model.init(jax.random.key(0), tokens))
    apply = jax.jit(model.apply)
    want = apply(params, tokens)
    order = np.stack([rng.permutation(T), rope_jax.attention.zigzag_sequence_index(T, 4)]).astype(np.int32)
    mixed, slots = jnp.take_along_axis(tokens, order, axis=1), np.argsort(order, axis=1)
    got = apply(params, mixed, sequence_index=order)
    got = np.take_along_axis(np.asarray(got), slots[..., None], axis=1)
    allowed = eight_devices.terms_of(model, 1, T) * oracles.EPS32
    np.testing.assert_allclose(got, want, atol=allowed * float(abs(want).max()))
    assert abs(apply(params, mixed) - apply(params, mixed, sequence_index=order)).max() > 0.01


@pytest.mark.parametrize("remat", [False, True])
def test_the_gradient_of_layers_keeps_no_table_of_all_tokens(remat):
    """Not of scores, and not of who may read whom: what the order alone decides is decided block by block."""
    length = 2048
    model = rope_jax.Decoder(**SIZES, rope=ROPE, remat=remat)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    on_ring, order = model.clone(ring_axis="sequence"), rope_jax.attention.zigzag_sequence_index(length, 1)[None]

    def loss(params, tokens):
        return jnp.sum(on_ring.apply(params, tokens, sequence_index=order))

    with jax.set_mesh(eight_devices.mesh(sequence=1)):
        lowered = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32))
    shapes = re.findall(r"tensor<([\dx]+)x\w+>", lowered.as_text())
    largest = max(np.prod([int(size) for size in shape.split("x")], dtype=np.int64) for shape in shapes)
    assert largest < length**2 / 2


def test_refusals_of_the_modules():
    attention = rope_jax.RotaryAttention(num_heads=N, num_kv_heads=2, head_dim=H, rope=ROPE)
    x, order = jnp.ones((B, T, 16)), np.arange(T)[None]
    params = attention.init(jax.random.key(0), x)
    cache = rope_jax.init_cache(batch=B, capacity=T, num_kv_heads=2, head_dim=H)
    ring = attention.clone(ring_axis="sequence")
    mask, segments = jnp.ones((B, T), bool), jnp.ones((B, T), int)
    dropped = dict(deterministic=False, rngs=dict(dropout=jax.random.key(0)))
    axes = rope_jax.Rope(H, rope_jax.Sections(sections=(2, 2), order="strided"))
    for module, how, error, says in (
        (
            ring,
            dict(),
            ValueError,
            r"sequence_index must be given with ring_axis='sequence', as zigzag_sequence_index\(T, n\)\[None\]",
        ),
        (
            ring,
            dict(sequence_index=order),
            ValueError,
            r"axis_name must be an axis of the mesh in use .* got 'sequence'",
        ),
        (
            ring,
            dict(cache=cache),
            ValueError,
            "cache must be left out with ring_axis='sequence': decode with clone",
        ),
        (ring, dict(sequence_index=order, mask=mask), ValueError, "mask must be left out with ring_axis"),
        (
            ring.clone(position_bias=rope_jax.attention.ALiBi()),
            dict(sequence_index=order),
            ValueError,
            "position_bias must be left out",
        ),
        (
            ring.clone(dropout_rate=0.1),
            dict(sequence_index=order) | dropped,
            ValueError,
            "dropout_rate must be left out with",
        ),
        (
            ring,
            dict(sequence_index=order, mutable="intermediates"),
            ValueError,
            "mutable intermediates must be left out with",
        ),
        (
            ring.clone(implementation="cudnn"),
            dict(),
            ValueError,
            "implementation must be None, 'blocks' or 'xla' with ring_axis, got 'cudnn'",
        ),
        (
            attention,
            dict(sequence_index=order, segment_ids=segments),
            ValueError,
            "segment_ids must be left out with sequence_index",
        ),
        (
            attention,
            dict(sequence_index=order, cache=cache),
            ValueError,
            "cache must be left out with sequence_index, got KVCache",
        ),
        (
            attention,
            dict(sequence_index=order[:, 1:]),
            ValueError,
            r"sequence_index must have shape \[B, T\] with .*, got \(1, 31\)",
        ),
        (
            attention,
            dict(sequence_index=order * 1.0),
            TypeError,
            "sequence_index must be integer, got dtype float32",
        ),
        (
            attention.clone(rope=axes),
            dict(sequence_index=order),
            ValueError,
            r"positions must be \[B, T, A=2\] for a rope of 2 axes, got None",
        ),
    ):
        with pytest.raises(error, match=says):
            module.apply(params, x, **how)


# -------------------------------------------------------------------------------------------------- on many devices


def collectives(compiled):
    found = re.findall(
        r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", compiled.as_text()
    )
    return dict(collections.Counter(found))


class EightDevices:
    @pytest.mark.parametrize("devices", first(1, [4, 1, 2, 8]))
    @pytest.mark.parametrize(("kv_heads", "dtype"), [(4, jnp.float32), (2, jnp.float32), (2, jnp.bfloat16)])
    def test_equals_attention_on_one(self, devices, kv_heads, dtype):
        arrays = inputs(kv_heads, dtype)
        reference = exact(*arrays, visible(np.arange(T)[None]))
        if dtype == jnp.float32:  # and rope_jax.attend is as near
            out, pull = jax.vjp(functools.partial(rope_jax.attend, causal=True), *arrays[:3])
            assert_exact((out, *pull(arrays[3])), reference, say="attend")
        for name, order in (
            ("zigzag", rope_jax.attention.zigzag_sequence_index(T, devices)),
            ("contiguous", np.arange(T, dtype=np.int32)),
        ):
            mixed = [x[:, order] for x in arrays]
            got = on_ring(devices, causal=True, block_size=4)(*mixed, order[None])
            got = [x[:, np.argsort(order)] for x in got]
            say = f"{devices} devices, {name}, K={kv_heads}, {jnp.dtype(dtype)}"
            assert_exact(got, reference, dtype, say)

    def test_window_and_cap_and_rows_of_their_own(self):
        options = dict(causal=True, window=7, logit_cap=1.5, block_size=4)
        arrays = inputs()
        rng = np.random.default_rng(2)
        order = np.stack([rng.permutation(T), rope_jax.attention.zigzag_sequence_index(T, 4)]).astype(np.int32)
        assert_exact(on_ring(4, **options)(*arrays, order), exact(*arrays, visible(order, True, 7), cap=1.5))

    @pytest.mark.parametrize(
        ("devices", "window", "zigzag", "contiguous"),
        [(2, None, [5, 5], [3, 7]), (4, None, [9] * 4, [3, 7, 11, 15]), (2, 5, [3, 4], [3, 4])],
    )
    def test_work_is_balanced_by_zigzag(self, devices, window, zigzag, contiguous, monkeypatch):
        """How many blocks each device reads, of two blocks of queries and 2n of keys, counted as the program runs."""
        counts, passes, scores = collections.Counter(), [], Tiling.scores

        def named(name, work):
            def fn(*args, **options):
                passes.append(name)
                return work(*args, **options)

            return fn

        def counted(*args):
            count = lambda device, name=passes[-1]: counts.update([(name, int(device))])
            jax.debug.callback(count, lax.axis_index("sequence"))
            return scores(*args)

        monkeypatch.setattr(blocks, "forward", named("forward", blocks.forward))
        monkeypatch.setattr(blocks, "backward", named("backward", blocks.backward))
        monkeypatch.setattr(Tiling, "scores", counted)
        call = on_ring.__wrapped__(devices, causal=True, window=window)
        for order, want in (
            (rope_jax.attention.zigzag_sequence_index(T, devices), zigzag),
            (np.arange(T), contiguous),
        ):
            counts.clear()
            jax.block_until_ready(call(*inputs(), order[None]))
            jax.effects_barrier()
            for name in ("forward", "backward"):
                assert [counts[name, device] for device in range(devices)] == want

    def test_a_block_that_is_not_read_is_not_touched(self):
        """NaN times a weight of zero is NaN: what must not be read must not be multiplied either."""
        order = np.arange(T, dtype=np.int32)[None]
        call = on_ring(4, causal=True, block_size=4)
        q, k, v, dout = inputs()
        clean = call(q, k, v, dout, order)
        late = (jnp.arange(T) == 20)[:, None, None]
        poison = lambda x: jnp.where(late, jnp.nan, x)
        out, *_ = call(q, poison(k), poison(v), dout, order)
        np.testing.assert_array_equal(out[:, :20], clean[0][:, :20])
        assert np.isnan(out[:, 20:]).all()
        _, dq, dk, dv = call(poison(q), k, v, poison(dout), order)
        others = np.arange(T) // 4 != 20 // 4
        np.testing.assert_array_equal(dq[:, others], clean[1][:, others])
        for got, want in ((dk, clean[2]), (dv, clean[3])):
            np.testing.assert_array_equal(got[:, 24:], want[:, 24:])
            assert np.isnan(got[:, :21]).all()

    def test_memory_falls_with_the_devices_and_only_the_ring_is_sent(self):
        def compiled(devices, length):
            mesh = eight_devices.mesh(sequence=devices)
            along = NamedSharding(mesh, PartitionSpec(None, "sequence"))

            def both(q, k, v, dout, order):
                ring = functools.partial(
                    rope_jax.attention.ring_attention, axis_name="sequence", causal=True, block_size=16
                )
                out, pull = jax.vjp(lambda q, k, v: ring(q, k, v, order), q, k, v)
                return out, *pull(dout)

            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=along) for x in inputs(length=length)]
            order = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=along)
            with jax.set_mesh(mesh):
                return jax.jit(both, out_shardings=along).lower(*shapes, order).compile()

        length = 2048
        sizes = [(1, length), (4, length), (8, length), (8, 2 * length)]
        programs = [compiled(*size) for size in sizes]
        temporary = [program.memory_analysis().temp_size_in_bytes for program in programs]
        print(f"\ntemporary bytes by (devices, T): {dict(zip(sizes, temporary, strict=True))}", end="")
        alone, four, eight, twice = temporary
        assert alone < 4 * length**2  # no table of scores, not even of one head
        assert eight < 0.55 * four  # half of its own share; a block of scores is as large as before
        assert eight < 2 * alone / 8  # beside its keys and their gradients, those that are on their way
        assert abs(twice / four - 1) < 0.01  # the same share of more: nothing depends on all of T
        # Forward k, v and order; backward these and dk, dv in the loop, and dk, dv once to the last and once home.
        assert collectives(programs[-1]) == {"collective-permute": 3 + 5 + 2 + 2}

    def test_inside_a_model_of_ones_own(self):
        """shard_map around all of it: positions travel with the tokens, and rotation needs nothing else."""
        devices, vocabulary, width = 4, 11, 16
        rng = np.random.default_rng(3)
        shapes = dict(
            table=(vocabulary, width), q=(width, N, H), k=(width, 2, H), v=(width, 2, H), out=(N, H, width)
        )
        params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) / 3 for name, shape in shapes.items()}
        text = jnp.asarray(rng.integers(0, vocabulary, (B, T + 1)), jnp.int32)
        order = rope_jax.attention.zigzag_sequence_index(T, devices)

        def loss(params, tokens, labels, positions, attention):
            x = params["table"][tokens]
            q, k, v = (jnp.einsum("btd,dnh->btnh", x, params[name]) for name in "qkv")
            q, k = ROPE(q, k, positions)
            y = jnp.einsum("btnh,nhd->btd", attention(q, k, v, positions), params["out"])
            scores = jax.nn.log_softmax((x + y) @ params["table"].T)
            return -jnp.mean(jnp.take_along_axis(scores, labels[..., None], axis=-1))

        def local(params, tokens, labels, positions):
            ring = functools.partial(rope_jax.attention.ring_attention, axis_name="sequence", causal=True)
            return lax.pmean(loss(params, tokens, labels, positions, ring), "sequence")

        along, whole = PartitionSpec(None, "sequence"), PartitionSpec()
        mesh = eight_devices.mesh(sequence=devices)
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(whole, along, along, along), out_specs=whole)
        got = jax.jit(jax.value_and_grad(mapped))(
            params, text[:, :-1][:, order], text[:, 1:][:, order], order[None]
        )
        plain = lambda q, k, v, _: rope_jax.attend(q, k, v, causal=True)
        want = jax.jit(jax.value_and_grad(loss), static_argnums=4)(
            params, text[:, :-1], text[:, 1:], jnp.arange(T)[None], plain
        )
        terms = B * T + 2 * (vocabulary + width + N * H + 2 * T + width)
        eight_devices.assert_reordered(got, want, terms)

    def test_decoder(self):
        """Tensor parallel by XLA, beside the ring: logical rules for what the ring leaves alone."""
        model = rope_jax.Decoder(**SIZES, rope=ROPE, window=(9, None))
        text = jnp.asarray(np.random.default_rng(4).integers(0, 13, (B, T + 1)), jnp.int32)
        boxed = model.init(jax.random.key(0), text[:, :-1])
        params = moved(boxed)

        def loss(params, tokens, labels, model, **how):
            scores = jax.nn.log_softmax(model.apply(params, tokens, **how))
            return -jnp.mean(jnp.take_along_axis(scores, labels[..., None], axis=-1))

        step = jax.jit(jax.value_and_grad(loss), static_argnames="model")
        want = step(params, text[:, :-1], text[:, 1:], model)

        mesh = eight_devices.mesh(data=2, model=2, sequence=2)
        rules = [("heads", "model"), ("kv_heads", "model"), ("mlp", "model")]
        placed = jax.device_put(params, nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules))
        order = rope_jax.attention.zigzag_sequence_index(T, 2)
        along = NamedSharding(mesh, PartitionSpec("data", "sequence"))
        tokens, labels = (jax.device_put(x[:, order], along) for x in (text[:, :-1], text[:, 1:]))
        ring = model.clone(ring_axis="sequence", remat=True)
        with jax.set_mesh(mesh):
            compiled = step.lower(placed, tokens, labels, ring, sequence_index=order[None]).compile()
            got = compiled(placed, tokens, labels, sequence_index=order[None])
        eight_devices.assert_reordered(got, want, eight_devices.terms_of(model, B, T))
        print(f"\ncollectives of the decoder: {collectives(compiled)}", end="")
        # No device gathers keys or anything else: sums are over heads and MLP, and of gradients over all devices.
        assert set(collectives(compiled)) == {"all-reduce", "collective-permute"}
