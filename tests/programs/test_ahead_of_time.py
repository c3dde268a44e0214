"""examples/ahead_of_time.py, and an exported prefill, by the TPU's compiler. Without libtpu these tests are skipped."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import SingleDeviceSharding

import rope_jax
from examples import ahead_of_time
from examples import export as exporting

pytest.importorskip("libtpu")
pytestmark = pytest.mark.usefixtures("no_compilation_cache")
SIZES = dict(vocab_size=512, num_layers=2, width=256, num_heads=4, num_kv_heads=2, mlp_dim=512)
BATCH, LENGTH = 4, 128


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


@pytest.fixture(scope="module")
def script():
    return ahead_of_time


def built(script, data, sequence, model):
    mesh = script.build_mesh(script.chips("v5e:2x2"), data, sequence, model)
    return script.build_model(mesh, sequence > 1, head_dim=128, **SIZES), mesh


def count(model):
    """Parameters, by the formula of the docstring of Decoder."""
    attention = 2 * model.width * model.head_dim * (model.num_heads + model.num_kv_heads)
    layer = attention + 3 * model.width * model.mlp_dim + 2 * model.width
    return 2 * model.vocab_size * model.width + model.num_layers * layer + model.width


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(2, 1, 2), (4, 1, 1), (1, 4, 1)], ids=str)
def test_each_chip_has_its_share_of_a_training_step(script, mesh):
    model, mesh = built(script, *mesh)
    memory = script.memory(script.lower_training(model, mesh, BATCH, LENGTH).compile())
    share = 3 * 4 * count(model) / 4  # float32 parameters and two moments on four chips
    # Beside it tokens, the step's number, and each small array in tiles of its own: less than a fiftieth.
    assert share < memory["arguments"] < 1.02 * share
    assert memory["new results"] <= 4096  # the loss; the state goes out where it came in
    # At least what the backward pass is given, the residual stream of each layer, in bfloat16.
    assert memory["peak"] - memory["arguments"] > model.num_layers * BATCH * LENGTH * model.width * 2 / 4


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(2, 1, 2), (2, 2, 1)], ids=str)
def test_each_chip_has_its_share_of_a_decode_step(script, mesh):
    model, mesh = built(script, *mesh)
    memory = script.memory(script.lower_decoding(model, mesh, BATCH, LENGTH).compile())
    cache = 2 * model.num_layers * BATCH * LENGTH * model.num_kv_heads * model.head_dim * 2
    share = (4 * count(model) + cache) / 4
    assert share < memory["arguments"] < 1.02 * share
    assert memory["new results"] <= 4096  # the tokens; the cache goes out where it came in


@pytest.mark.full
def test_as_a_user_runs_it(script, capsys):
    def said(**change):
        script.main(script.Config(**(SIZES | dict(batch=BATCH, length=LENGTH) | change)))
        return capsys.readouterr().out

    out = said()
    assert out.startswith("v5e:2x2, data=2,sequence=1,model=2: compiled, not run.")
    assert "training step: arguments 5.3, " in out and "decode step: arguments 2.0, " in out
    assert "training step: RESOURCE_EXHAUSTED: Ran out of memory" in said(batch=4096, length=4096)


def test_refusals(script, capsys):
    for change, says in (
        (
            dict(mesh="data=4,sequence=1,model=4"),
            "--mesh must be data=I,sequence=J,model=K with I * J * K = 4 chips, got data",
        ),
        (dict(mesh="2x2"), "--mesh must be data=I,sequence=J,model=K with I * J * K = 4 chips, got 2x2"),
        (dict(topology="v5e:3x1"), "v5e:3x1"),
        (dict(num_kv_heads=3), "num_kv_heads must divide num_heads=4, got 3"),
        (dict(batch=3), "3"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script.main(script.Config(**(SIZES | dict(batch=BATCH, length=LENGTH) | change)))
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and not out and says in err and len(err.splitlines()) == 1


@pytest.mark.full
@pytest.mark.parametrize(("sizes", "kernels"), [("2, 128, 144", 1), ("b, t, s", 0)])
def test_what_was_exported_compiles_for_a_tpu(script, sizes, kernels):
    """With its kernel where the sizes were fixed, in the one layer that is compiled."""
    model = rope_jax.Decoder(**SIZES, head_dim=128, rope=rope_jax.Rope(128, rope_jax.Standard()))
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    step = exporting.steps(model, params, exporting.symbolic(sizes))["prefill"]
    exported = export.export(step.call, platforms=["cpu", "tpu"])(*step.arguments.values())
    where = SingleDeviceSharding(script.chips("v5e:2x2")[0])
    fixed = exporting.steps(model, params, (2, 128, 144))["prefill"].arguments
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tuple(fixed.values()))
    call = export.deserialize(exported.serialize()).call
    hlo = jax.jit(call).lower(*placed).compile().as_text()
    assert hlo.count('custom_call_target="tpu_custom_call"') == kernels
