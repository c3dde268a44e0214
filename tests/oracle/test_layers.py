"""Which layers rotate, by running the models and recording the calls of their apply function."""

import importlib
import inspect
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rope_jax  # noqa: E402
from rope_jax.interop.families import FAMILIES  # noqa: E402

pytestmark = pytest.mark.oracle

SMALL = dict(
    num_hidden_layers=8,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    shared_intermediate_size=32,
    vocab_size=97,
    pad_token_id=0,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    index_topk=4,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_n_groups=1,
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
PLAIN = dict(rope_type="default", rope_theta=1e4)
SECTIONS = dict(PLAIN, mrope_section=[4, 2, 2])
ALTERNATE = ["linear_attention", "full_attention"] * 4

# folder, and a word on the changes: changes of its text config
CASES = {
    "afmoe": {},
    "bailing_hybrid": {},
    "bamba": dict(attn_layer_indices=[2, 5]),
    "beam": {},
    "cohere2": {},
    "cohere2_moe": {},
    "cohere_compass": dict(
        layer_types=["sliding_attention", "full_attention"] * 4,
        rope_parameters={"sliding_attention": SECTIONS, "full_attention": None},
    ),
    "dory": dict(n_input_layers=2, n_output_layers=2),
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {},
    "falcon, alibi": dict(alibi=True),
    "flint": {},
    "granite_swa": dict(layer_rope_theta=[0, 1e4, 1e4, 5e5] * 2),
    "granitemoe_swa": dict(layer_rope_theta=[0, 1e4] * 4),
    "granitemoehybrid": dict(layer_types=ALTERNATE, position_embedding_type="rope"),
    "granitemoehybrid, none": dict(layer_types=ALTERNATE),
    "kolibri1": {},
    "lara_mini": {},
    "lfm2": dict(layer_types=["conv", "full_attention"] * 4),
    "lfm3": {},
    "llama4": {},
    "minimax": {},
    "mistral_large4": {},
    "muse_glimmer": {},
    "muse_spark": {},
    "olmo_hybrid": {},
    "qwen3_5": dict(rope_parameters=dict(PLAIN, partial_rotary_factor=0.5, mrope_section=[2, 1, 1])),
    "qwen3_next": {},
    "recurrent_gemma": {},
    "smollm3": {},
    "smollm3, given": dict(no_rope_layers=[0, 1, 1, 1, 1, 0, 0, 1]),
}


def small_model(folder, changes):
    """A model of that folder with eight small layers, its config, and its modeling file."""
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    for name, cls in vars(modeling).items():
        config_class = getattr(cls, "config_class", None)
        if name.endswith("PreTrainedModel") or not name.endswith("Model") or config_class is None:
            continue
        family = FAMILIES.get(config_class.model_type)
        axial = family is not None and family.sections is not None and family.sections.order == "rows_columns"
        if family is not None and not axial and cls.__module__ == modeling.__name__:
            fields = set(inspect.signature(config_class.__init__).parameters)
            config = config_class(**{key: value for key, value in SMALL.items() if key in fields} | changes)
            config._attn_implementation = "eager"
            return cls(config).eval(), config, modeling
    raise LookupError(folder)


@pytest.mark.parametrize("case", CASES)
def test_the_same_layers_rotate(case, monkeypatch):
    model, config, modeling = small_model(case.split(",")[0], CASES[case])
    seen = set()

    def watched(apply):
        def call(*arguments, **options):
            seen.add(sys._getframe(1).f_locals["self"].layer_idx)
            return apply(*arguments, **options)

        return call

    for name in [name for name in vars(modeling) if name.startswith("apply_rotary")]:
        monkeypatch.setattr(modeling, name, watched(getattr(modeling, name)))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 7)[None])
    compat = "transformers" if FAMILIES[config.model_type].beyond else None
    model_rope = rope_jax.from_hf_config({**config.to_dict(), "model_type": config.model_type}, compat=compat)
    assert {i for i, layer in enumerate(model_rope.layers) if layer.rope is not None} == seen
    assert len(model_rope.layers) == 8
    # Equal layers are one object.
    assert len({id(layer) for layer in model_rope.layers}) == len(set(model_rope.layers))
    assert rope_jax.from_hf_config(rope_jax.interop.to_hf_config(model_rope), compat=compat) == model_rope
