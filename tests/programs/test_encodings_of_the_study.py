"""benchmarks/encodings.py: what each encoding is in the decoder, and the rate at which its table learns."""

import dataclasses

import jax
import numpy as np
import pytest

import rope_jax
from benchmarks import encodings
from configs import toy_lm

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


def changes_of_two_steps(encoding):
    """What two steps change, at each rate of the table, from one start."""
    config = encodings.Config(encoding=encoding, num_layers=1, width=16, length=16, batch=4, warmup=1)
    model, tokens = encodings.build_model(config), jax.random.randint(jax.random.key(0), (4, 17), 0, 256)
    start = toy_lm.initial_state(model, encodings.build_optimizer(config), config)
    before = jax.tree.map(np.asarray, start["params"])
    for rate in (10.0, 1.0):
        state = jax.tree.map(jax.numpy.copy, start)
        optimizer = encodings.build_optimizer(dataclasses.replace(config, table_rate=rate))
        for _ in range(2):  # in the first the rate is 0
            state, loss = toy_lm.train_step(state, tokens, model=model, optimizer=optimizer)
            assert np.isfinite(loss)
        yield jax.tree.map(lambda new, old: np.asarray(new) - old, state["params"], before)


@pytest.mark.full
@pytest.mark.parametrize("encoding", ["rope", "sinusoidal", "learned", "t5", "alibi", "none"])
def test_a_table_learns_at_its_own_rate_and_nothing_else_does(encoding):
    fast, slow = map(jax.tree_util.tree_leaves_with_path, changes_of_two_steps(encoding))
    tables = 0
    for (path, a), (_, b) in zip(fast, slow, strict=True):
        is_table = "'table'" in jax.tree_util.keystr(path)
        tables += is_table
        np.testing.assert_allclose(a, b * (10 if is_table else 1), rtol=1e-3, atol=1e-7)
        assert np.abs(b).max() > 0
    assert tables == (encoding in ("learned", "t5"))


def test_each_encoding_has_its_place_in_the_decoder():
    def model(encoding):
        return encodings.build_model(encodings.Config(encoding=encoding, width=64))

    rope = rope_jax.Rope(32, rope_jax.Standard())
    plain = model("rope").clone(rope=None)
    assert model("rope").rope == rope and model("none") == plain
    assert model("sinusoidal") == plain.clone(position_embedding=rope_jax.models.Sinusoidal(), embedding_scale=8.0)
    assert model("learned") == plain.clone(position_embedding=rope_jax.models.LearnedPositions(num_positions=128))
    assert model("t5") == plain.clone(position_bias=rope_jax.attention.T5Bias())
    assert model("alibi") == plain.clone(position_bias=rope_jax.attention.ALiBi())
