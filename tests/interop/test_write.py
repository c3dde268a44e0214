"""Writing configs: what is written is read again, or refused."""

import dataclasses
import json

import pytest
from released import RELEASED
from schedules import CASES, IDS, ROTARY_DIM

import rope_jax
from rope_jax import DynamicNTK, NTKAware, Proportional, Rope, Standard
from rope_jax.interop.model_rope import LayerRope, ModelRope
from rope_jax.interop.write import to_hf_config


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_schedule_is_written_and_read_again(case):
    schedule = case.build()
    if not case.in_configs:
        with pytest.raises(ValueError, match="schedule must be one of"):
            to_hf_config(ModelRope("gpt_neox", (LayerRope(Rope(ROTARY_DIM, schedule)),)))
        return
    if hasattr(schedule, "context_length"):  # a config has none
        schedule = dataclasses.replace(schedule, context_length=None)
    for rope in (Rope(ROTARY_DIM, schedule), Rope(2 * ROTARY_DIM, schedule, rotary_dim=ROTARY_DIM)):
        if isinstance(schedule, Proportional) and rope.rotary_dim is not None:
            continue  # proportional frequencies are as wide as the head
        family = "hunyuan_v1_dense" if isinstance(schedule, NTKAware) else "gpt_neox"
        model_rope = ModelRope(family, (LayerRope(rope),) * 3)
        assert rope_jax.from_hf_config(json.loads(json.dumps(to_hf_config(model_rope)))) == model_rope


def test_phi3_keeps_its_original_length_at_the_top():
    config, _ = RELEASED["Phi-3 mini 128k"]
    written = to_hf_config(rope_jax.from_hf_config(config))
    # transformers' default at the top would count before the rope parameters.
    assert written["original_max_position_embeddings"] == 4096


def test_a_rotation_that_the_family_cannot_express_is_refused():
    def two_layers(rope, model_type="llama", **fields):
        return ModelRope(model_type, (LayerRope(rope, **fields),) * 2)

    for bad in [
        two_layers(Rope(64, Standard(), layout="interleaved")),
        two_layers(Rope(64, DynamicNTK(factor=2.0, original_length=4096, context_length=8192))),
        two_layers(Rope(64, Standard()), logit_factor=2.0),
        two_layers(Rope(64, rope_jax.Sections(sections=(32, 0)))),
        two_layers(Rope(64, rope_jax.Axial(sizes=(32, 32)))),
        two_layers(None),
    ]:
        with pytest.raises(ValueError, match="a config of 'llama' cannot express"):
            to_hf_config(bad)
    with pytest.raises(ValueError, match="schedule must be one of"):
        to_hf_config(two_layers(Rope(64, lambda rotary_dim: Standard()(rotary_dim))))
    with pytest.raises(ValueError, match="model_type 'lama' is unknown"):
        to_hf_config(two_layers(Rope(64, Standard()), "lama"))


def test_every_proportion_is_written_so_that_it_is_read_again():
    for head_dim in range(2, 258, 2):
        for rotary_dim in range(2, head_dim + 1, 2):
            layer = LayerRope(Rope(head_dim, Standard(), rotary_dim=rotary_dim))
            share = to_hf_config(ModelRope("gpt_neox", (layer,)))["rope_parameters"]
            assert int(head_dim * share["partial_rotary_factor"]) == rotary_dim
