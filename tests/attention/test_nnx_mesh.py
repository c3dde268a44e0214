"""NNX's bridge around the linen modules, and the NNX layer: without a mesh, and on meshes."""

import eight_devices
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, PartitionSpec

import rope_jax
from rope_jax.core.named import named
from rope_jax.nnx import RotaryAttention, from_linen, to_linen

ROPE = rope_jax.Rope(8, rope_jax.Standard())
SIZES = dict(num_heads=4, num_kv_heads=2, head_dim=8, rope=ROPE)
ATTENTION = rope_jax.RotaryAttention(**SIZES, qk_norm=True, learn_sinks=True)
DECODER = rope_jax.Decoder(
    **SIZES,
    vocab_size=16,
    num_layers=2,
    width=32,
    mlp_dim=64,
    position_embedding=rope_jax.models.LearnedPositions(num_positions=8),
    position_bias=rope_jax.attention.T5Bias(num_buckets=4, max_distance=8),
)
MODULES = {"attention": ATTENTION, "decoder": DECODER}
RULES = dict.fromkeys("embed head_dim vocab layers positions relative_buckets".split())
RULES |= dict.fromkeys("heads kv_heads mlp".split(), "model")
TOLERANCE = 256 * oracles.EPS32


def inputs(name):
    if name == "decoder":
        return jnp.arange(12).reshape(2, 6)
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32)), jnp.float32)


def empty_cache(name):
    if name == "decoder":
        return DECODER.init_cache(batch=2, capacity=6)
    return rope_jax.init_cache(batch=2, capacity=6, num_kv_heads=2, head_dim=8)


def bridge(name):
    return nnx.bridge.ToNNX(MODULES[name], rngs=nnx.Rngs(0)).lazy_init(inputs(name))


def named_variables(module):
    """The parameters of a module, as ``nnx.Variable``, by their paths."""
    return dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))


def check_bridge(name, bridged):
    """The bridged module keeps the names of the parameters, and gives what the linen module gives."""
    module, x = MODULES[name], inputs(name)
    specs = nn.get_partition_spec(module.init(jax.random.key(0), x))["params"]
    names = {path: tuple(v.get_metadata("out_sharding", ())) for path, v in named_variables(bridged).items()}
    assert names == {path: tuple(spec) for path, spec in flatten_dict(specs).items()}
    variables = to_linen(bridged)
    wanted = module.apply(variables, x)
    np.testing.assert_allclose(nnx.jit(lambda module, x: module(x))(bridged, x), wanted, atol=TOLERANCE)
    step, cache = nnx.jit(lambda module, x, cache: module(x, cache=cache)), empty_cache(name)
    for token in range(6):
        y, cache = step(bridged, x[:, token : token + 1], cache)
        np.testing.assert_allclose(y[:, 0], wanted[:, token], atol=TOLERANCE)


@pytest.mark.parametrize("name", MODULES)
def test_the_bridge_without_a_mesh(name):
    bridged = bridge(name)
    check_bridge(name, bridged)
    gradient = nnx.grad(lambda module: jnp.sum(module(inputs(name)) ** 2))(bridged)
    linen = jax.grad(lambda variables: jnp.sum(MODULES[name].apply(variables, inputs(name)) ** 2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        nnx.to_pure_dict(gradient),
        linen(to_linen(bridged))["params"],
    )


def test_flax_still_refuses_other_names_without_a_mesh():
    """If this no longer fails, the metadata that switches placement off can go."""
    dense = nn.Dense(4, kernel_init=nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp")))
    with pytest.raises(ValueError, match="mesh context"):
        nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 3)))


def test_named_parameters_are_values():
    init = named(nn.initializers.ones_init(), ("embed", "mlp"))
    one, other = (init(jax.random.key(0), (2, 3), jnp.float32) for _ in range(2))
    assert isinstance(one, nn.LogicallyPartitioned)
    assert nn.get_partition_spec(one) == PartitionSpec("embed", "mlp")
    assert one.add_axis(0, {nn.PARTITION_NAME: "layers"}).names == ("layers", "embed", "mlp")
    assert one == type(one)(one.value, one.names)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    restored = flax.serialization.from_bytes(one, flax.serialization.to_bytes(other))
    assert type(restored) is type(one)
    np.testing.assert_array_equal(restored.value, one.value)
    assert one.to_nnx_metadata()["out_sharding"] == ("embed", "mlp")
    assert one.names == ("embed", "mlp")  # asking for the metadata leaves the parameter as it was


class EightDevices:
    @pytest.mark.parametrize("rules", [None, "every name", "some names"])
    @pytest.mark.parametrize("name", MODULES)
    def test_the_bridge_on_a_mesh(self, name, rules):
        chosen = {None: {}, "every name": RULES, "some names": {"heads": "model"}}[rules]
        with jax.set_mesh(eight_devices.mesh(data=4, model=2)), nn.logical_axis_rules(tuple(chosen.items())):
            bridged = bridge(name)
            (kernel,) = (v for path, v in named_variables(bridged).items() if path[-2:] == ("out", "kernel"))
            spec = kernel.get_value().sharding.spec
            check_bridge(name, bridged)
        # NNX places a parameter as it is made if each of its names has a rule, or is an axis of the mesh.
        if (name, rules) != ("decoder", "some names"):  # linen's scan over layers places its parameters by any rule
            assert ("model" in spec) == (rules == "every name")

    @pytest.mark.parametrize("rules", [None, "every name", "some names"])
    def test_the_layer_on_a_mesh(self, rules):
        chosen = {None: {}, "every name": RULES, "some names": {"heads": "model"}}[rules]
        fields = SIZES | dict(in_features=32, qk_norm=True, learn_sinks=True)
        plain, x = RotaryAttention(**fields, rngs=nnx.Rngs(0)), inputs("attention")
        with jax.set_mesh(eight_devices.mesh(data=4, model=2)), nnx.logical_axis_rules(tuple(chosen.items())):
            layer = RotaryAttention(**fields, rngs=nnx.Rngs(0))
            optimizer = nnx.Optimizer(layer, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
            specs = [
                v.get_value().sharding.spec
                for v in (layer.out.kernel, optimizer.opt_state[0].trace["out"]["kernel"])
            ]
            layer.init_cache(batch=2, capacity=6)
            run = nnx.jit(lambda layer, x, decode: layer(x, decode=decode), static_argnums=2)
            np.testing.assert_allclose(run(layer, x, False), plain(x), atol=TOLERANCE)
            for token in range(6):
                y = run(layer, x[:, token : token + 1], True)
                np.testing.assert_allclose(y[:, 0], plain(x)[:, token], atol=TOLERANCE)
            gradient = nnx.jit(nnx.grad(lambda layer: jnp.mean(layer(x) ** 2)))(layer)
            nnx.jit(lambda optimizer, layer, gradient: optimizer.update(layer, gradient))(
                optimizer, layer, gradient
            )
        assert [("model" in spec) for spec in specs] == [rules == "every name"] * 2

    @pytest.mark.parametrize("rules", [None, "every name"])
    def test_the_layer_on_a_mesh_of_explicit_axes(self, rules):
        fields = SIZES | dict(in_features=32, qk_norm=True, use_bias=True, learn_sinks=True)
        plain, x = RotaryAttention(**fields, rngs=nnx.Rngs(0)), inputs("attention")
        wanted = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(plain)
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
        with jax.set_mesh(mesh), nnx.logical_axis_rules(tuple((RULES if rules else {}).items())):
            layer = RotaryAttention(**fields, rngs=nnx.Rngs(0))
            assert (jax.typeof(layer.out.kernel[...]).sharding.spec[0] == "model") == (rules is not None)
            rows = jax.device_put(x, PartitionSpec("data"))
            run = nnx.jit(lambda layer, x, decode: layer(x, decode=decode), static_argnums=2)
            np.testing.assert_allclose(run(layer, rows, False), plain(x), atol=TOLERANCE)
            layer.init_cache(batch=2, capacity=6)
            for token in range(6):
                y = run(layer, rows[:, token : token + 1], True)
                np.testing.assert_allclose(y[:, 0], plain(x)[:, token], atol=TOLERANCE)
            gradient = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(rows) ** 2)))(layer)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
            nnx.to_pure_dict(nnx.state(gradient, nnx.Param)),
            nnx.to_pure_dict(nnx.state(wanted, nnx.Param)),
        )

    def test_a_ring(self):
        layer = RotaryAttention(**SIZES, in_features=32, rngs=nnx.Rngs(0))
        ring = RotaryAttention(**SIZES, in_features=32, ring_axis="sequence", rngs=nnx.Rngs(1))
        from_linen(ring, to_linen(layer))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 32)), jnp.float32)
        with jax.set_mesh(eight_devices.mesh(sequence=8)):
            got = nnx.jit(lambda layer, x: layer(x, sequence_index=jnp.arange(16)[None]))(ring, x)
        np.testing.assert_allclose(got, layer(x), atol=TOLERANCE)


def test_on_eight_devices():
    eight_devices.run(__file__)
