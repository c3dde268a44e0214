"""Attention divided among eight devices, by XLA and inside shard_map: equal to one device, and nothing is gathered."""

import dataclasses

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_same, in_blocks, problem, solve, solved_by_library
from fast import first
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rope_jax.attention.primitive import attention, attention_with_log

P = PartitionSpec


def test_on_eight_devices():
    eight_devices.run(__file__)


SHARDED = [
    "causal window cap",
    "segments padding",
    "t5 causal",
    "bias_111",
    "mask",
    "alibi ragged",
    "dropout causal",
]
# Batch, heads, length of queries.
DIVIDED = [P("data", "model"), P("data", None), P(None, "model"), P(("data", "model"), None)]


class EightDevices:
    @staticmethod
    def placed(p, mesh, spec):
        """Operands, cotangents and facts of a problem, each along its batch and its heads."""

        def place(x, spec):
            spec = [axis if size > 1 else None for axis, size in zip(spec, x.shape, strict=False)]
            return jax.device_put(x, NamedSharding(mesh, P(*spec)))

        operands = {
            name: place(x, P(None, spec[1]) if name == "table" else spec) for name, x in p.differentiable.items()
        }
        fields = {}
        for name in ("segments", "query_index", "key_index", "mask"):
            if (value := getattr(p.facts, name)) is not None:
                fields[name] = place(value, spec if name == "mask" else spec[:1])
        return operands, place(p.dout, spec), place(p.dlog, spec), dataclasses.replace(p.facts, **fields)

    @pytest.mark.parametrize("features", first(3, SHARDED))
    @pytest.mark.parametrize("spec", first(1, [*DIVIDED]), ids=str)
    @pytest.mark.parametrize("kind", first(1, [AxisType.Auto, AxisType.Explicit]), ids=str)
    def test_divided_by_xla(self, monkeypatch, features, spec, kind):
        """The same numbers, and no operand is gathered."""
        in_blocks(monkeypatch, 10, 16)
        p = problem(features, B=8, N=8, K=4, T=20)
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)

        def both_passes(operands, dout, dlog, facts):
            mine = dataclasses.replace(p, facts=facts)
            results, pull_back = jax.vjp(lambda o: attention_with_log(*mine.replaced(o)), operands)
            return *results, pull_back((dout, dlog))[0]

        with jax.set_mesh(mesh):
            arguments = self.placed(p, mesh, spec)
            program = jax.jit(both_passes).lower(*arguments).compile()
            out, log_total, gradients = program(*arguments)
        assert_same(
            (out, log_total, gradients), jax.jit(both_passes)(p.differentiable, p.dout, p.dlog, p.facts), 256
        )
        if "dropout" not in features:  # the random bits are those of the whole
            assert " all-gather" not in program.as_text() and " all-to-all" not in program.as_text()
            assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)

    @pytest.mark.parametrize("features", first(2, SHARDED[:-1]))
    @pytest.mark.parametrize("check_vma", [True, False])
    def test_inside_shard_map(self, monkeypatch, features, check_vma):
        in_blocks(monkeypatch, 10, 16)
        p = problem(features, B=8, N=8, K=4, T=20)
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        rows, by_heads = P("data"), P("data", None if "t5" in features or "alibi" in features else "model")

        def spec_of(path, x):
            name = jax.tree_util.keystr(path)
            if "table" in name or "params" in name or x.shape[0] == 1:
                return P()
            return by_heads if x.ndim >= 3 else rows

        arguments = p.differentiable, p.dout, p.dlog, p.facts
        specs = jax.tree_util.tree_map_with_path(spec_of, arguments)

        def both_passes(operands, dout, dlog, facts):
            mine = dataclasses.replace(p, facts=facts)
            results, pull_back = jax.vjp(lambda o: attention_with_log(*mine.replaced(o)), operands)
            gradients = pull_back((dout, dlog))[0]
            if not check_vma and "table" in gradients:  # otherwise jax sums over the mesh by itself
                gradients["table"] = lax.psum(gradients["table"], "data")
            return *results, gradients

        sharded = jax.shard_map(
            both_passes,
            mesh=mesh,
            in_specs=specs,
            out_specs=(by_heads, by_heads, specs[0]),
            check_vma=check_vma,
        )
        got = jax.jit(sharded)(*arguments)
        want = solved_by_library(p)
        assert_same(got, want, terms=256)

    def test_a_step_from_a_divided_cache(self, monkeypatch):
        """Rows and heads of a stack lie on their devices, and stay there."""
        in_blocks(monkeypatch, 4, 16)
        p = problem("ragged", B=8, N=8, K=4, T=1, S=64)
        mesh = eight_devices.mesh(data=2, model=4)
        of = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
        stack = lambda x: of(jnp.stack([x, -x, 2 * x]), None, "data", "model")
        index = of(p.facts.query_index, "data"), of(p.facts.key_index, "data")

        def step(q, k, v, queries, keys, layer):
            return attention(
                q, k, v, dataclasses.replace(p.facts, query_index=queries, key_index=keys), layer=layer
            )

        arguments = of(p.q, "data", "model"), stack(p.k), stack(p.v), *index, jnp.int32(0)
        program = jax.jit(step).lower(*arguments).compile()
        want, _, _ = solve(p)
        assert np.abs(program(*arguments) - want).max() <= 2e-6
        assert " all-gather" not in program.as_text() and " all-to-all" not in program.as_text()
