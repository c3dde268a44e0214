"""Products for decoding: numbers, derivatives, batches, and what a CPU compiles."""

import contextlib
import functools
import re

import eight_devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rope_jax
from rope_jax.core.projection import MIN_WEIGHTS, dot_general, take_layer

D, F, LAYERS = 192, 176, 3  # large enough for products by parts
assert D * F >= MIN_WEIGHTS
LAST = {
    "rows": ((-1,), (0,)),
    "columns": ((-1,), (1,)),
}  # axes that are summed over, with kernels [D, F] and [F, D]


def operands(rows, kind, dtype, layers=()):
    """x ``[rows, D]`` and kernels ``[..., D, F]`` or ``[..., F, D]``."""
    x, kernel = jax.random.key(0), jax.random.key(1)
    shape = (D, F) if kind == "rows" else (F, D)
    return jax.random.normal(x, (rows, D), dtype), jax.random.normal(kernel, (*layers, *shape), dtype)


def product(x, kernel, kind, form=dot_general, **options):
    (_, kernel_axes) = LAST[kind]
    return form(x, kernel, (((x.ndim - 1,), kernel_axes), ((), ())), **options)


@pytest.mark.parametrize("preferred", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("kind", LAST)
@pytest.mark.parametrize("rows", [1, 5])
def test_products_are_summed_in_float32_and_rounded_once(rows, kind, dtype, preferred):
    x, kernel = operands(rows, kind, dtype)
    got = product(x, kernel, kind, preferred_element_type=preferred)
    wide_x, wide = (np.asarray(each, np.float64) for each in (x, kernel))
    wide = wide if kind == "rows" else wide.T
    assert got.dtype == (preferred or dtype) and got.shape == (rows, F)
    want, largest = wide_x @ wide, np.abs(wide_x) @ np.abs(wide)
    half_ulp = 0 if got.dtype == jnp.float32 else float(jnp.finfo(dtype).eps) / 2
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= half_ulp * np.abs(want) + D * 2.0**-24 * largest)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_kernel_of_a_layer_is_the_kernel(rows, dtype):
    x, stack = operands(rows, "rows", dtype, (LAYERS,))

    @jax.jit
    def of_layer(x, stack, layer):
        kernel = take_layer(stack, layer)
        return kernel, product(x, kernel, "rows", stack=stack, layer=layer)

    for layer in range(LAYERS):
        kernel, got = of_layer(x, stack, jnp.int32(layer))
        np.testing.assert_array_equal(kernel, stack[layer])
        want = product(x, stack[layer], "rows", jax.lax.dot_general)
        np.testing.assert_allclose(*(np.asarray(each, np.float32) for each in (got, want)), rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize("dims", [(D,), (12, 16)], ids=["one axis", "two axes"])
def test_heads_are_summed_over_or_written(dims):
    x = jax.random.normal(jax.random.key(0), (1, 1, *dims), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (*dims, 16, 11), jnp.bfloat16)
    axes = tuple(range(2, x.ndim)), tuple(range(len(dims)))
    got, want = (form(x, kernel, (axes, ((), ()))) for form in (dot_general, jax.lax.dot_general))
    assert got.shape == (1, 1, 16, 11)
    np.testing.assert_allclose(*(np.asarray(each, np.float32) for each in (got, want)), rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LAST)
@pytest.mark.parametrize("rows", [1, 5])
def test_derivatives_are_those_of_the_ordinary_product(rows, kind):
    x, kernel = operands(rows, kind, jnp.bfloat16)

    def all_of(form):
        value = functools.partial(product, kind=kind, form=form)
        out, pull_back = jax.vjp(value, x, kernel)
        tangent = jax.jvp(value, (x, kernel), (x + 1, kernel - 1))[1]
        second = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(value(x, kernel) ** 2))(x) ** 2))(x)
        (transposed,) = jax.linear_transpose(lambda kernel: value(x, kernel), kernel)(out)
        return *pull_back(jnp.ones_like(out)), tangent, second, transposed

    for got, want in zip(all_of(dot_general), all_of(jax.lax.dot_general), strict=True):
        got, want = (np.asarray(each, np.float32) for each in (got, want))
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-2 * np.abs(want).max())


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("kind", LAST)
def test_batches(kind, axes):
    x, kernel = operands(1, kind, jnp.bfloat16)
    xs, kernels = (
        jnp.stack([each, each + 1]) if axis == 0 else each for each, axis in zip((x, kernel), axes, strict=True)
    )
    got, want = (
        jax.vmap(lambda x, kernel, form=form: product(x, kernel, kind, form), axes)(xs, kernels)
        for form in (dot_general, jax.lax.dot_general)
    )
    np.testing.assert_allclose(*(np.asarray(each, np.float32) for each in (got, want)), rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_keep_the_ordinary_product(platform):
    x, kernel = operands(1, "rows", jnp.bfloat16)

    def text(form):
        function = jax.jit(lambda x, kernel: product(x, kernel, "rows", form))
        return function.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    products = [re.findall(r"stablehlo.dot_general.*", text(form)) for form in (dot_general, jax.lax.dot_general)]
    assert len(products[0]) == 1 and products[0] == products[1]
    assert "stablehlo.slice" not in text(dot_general) and "dynamic_slice" not in text(dot_general)


# --------------------------------------------------------------------------------------------- what a CPU compiles

SIZES = dict(num_layers=6, width=192, num_heads=4, num_kv_heads=2, head_dim=48, mlp_dim=384, vocab_size=640)


def compiled_step(dtype, rows, mesh=None, *axis):
    """One step of decoding, compiled for a CPU, and the bytes of the weights. A mesh axis divides the MLP."""
    model = rope_jax.Decoder(**SIZES, rope=rope_jax.Rope(48, rope_jax.Standard()), dtype=dtype, param_dtype=dtype)
    token = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), token))
    cache = jax.eval_shape(lambda: model.init_cache(batch=rows, capacity=32))
    if mesh is not None:
        on_mesh = lambda leaf, *spec: leaf.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        token, cache, params = jax.tree.map(on_mesh, (token, cache, params))
        block = params["params"]["layers"]
        for name, spec in dict(gate=(None, None, *axis), up=(None, None, *axis), down=(None, *axis)).items():
            block[name]["kernel"] = on_mesh(block[name]["kernel"], *spec)
    step = jax.jit(lambda params, token, cache: model.apply(params, token, cache=cache), donate_argnames="cache")
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return step.lower(params, token, cache).compile(), weights


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_holds_no_widened_copy_of_the_weights(rows, dtype):
    """At most the kernels of one layer, in their own dtype."""
    compiled, weights = compiled_step(dtype, rows)
    assert compiled.memory_analysis().temp_size_in_bytes < weights / SIZES["num_layers"] + 100_000
    if dtype == jnp.bfloat16:
        entry = compiled.as_text().split("ENTRY ")[1]
        assert not re.search(r"= f32\[(6,192|6,384|640,192)", entry)  # of a stack, or of the embedding


def test_a_row_is_multiplied_by_the_weights_in_place():
    """Without a copy of the kernels of a layer."""
    compiled, weights = compiled_step(jnp.float32, 1)
    assert compiled.memory_analysis().temp_size_in_bytes < weights / SIZES["num_layers"] / 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_mesh_of_a_single_device_costs_no_memory(dtype):
    want = compiled_step(dtype, 1)[0].memory_analysis().temp_size_in_bytes
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((1,), ("model",), axis_types=(kind,), devices=jax.devices()[:1])
        assert compiled_step(dtype, 1, mesh)[0].memory_analysis().temp_size_in_bytes <= want + 1000, kind


def test_on_eight_devices():
    eight_devices.run(__file__)


class EightDevices:
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize("rows", [1, 4])
    def test_a_divided_step_holds_no_copy_of_all_weights(self, rows, dtype, kind):
        """At most the kernels of one layer, in float32."""
        mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
        compiled, weights = compiled_step(dtype, rows, mesh, "model")
        of_layer = weights / SIZES["num_layers"] * 4 / jnp.dtype(dtype).itemsize
        assert compiled.memory_analysis().temp_size_in_bytes < of_layer + 100_000
