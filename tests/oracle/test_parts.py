"""Parts of larger models, written without their class's defaults, and heads without a size, against transformers."""

import functools
import importlib
import inspect
import json
import logging
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import towers
from golden import make_class_defaults
from transformers import PretrainedConfig

import rope_jax
from rope_jax.interop import class_defaults, part_types
from rope_jax.interop.families import FAMILIES
from rope_jax.interop.parts import OTHER_ROTATIONS, find_part

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@functools.cache
def classes():
    """Every config class of transformers that can be built, by model type."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    found = {}
    for cls in make_class_defaults.config_classes():
        try:
            cls()
        except Exception:  # a class without defaults
            continue
        found.setdefault(cls.model_type, cls)
    return found


def read(values, **options):
    """A rotation, or the refusal's message without the name of the config."""
    try:
        return rope_jax.from_hf_config(values, **options)
    except ValueError as error:
        return str(error).split(")", 1)[-1].split(":", 1)[-1]


def test_a_part_without_its_defaults_is_the_part_with_them():
    """A file as transformers writes it, and the whole config of the part."""
    checked = 0
    for cls in classes().values():
        config = cls()
        for part in ("text", "vision", "audio"):
            inner = getattr(config, f"{part}_config", None)
            if not isinstance(inner, PretrainedConfig) or inner.model_type not in FAMILIES:
                continue
            file = json.loads(config.to_json_string(use_diff=True))
            file.setdefault(f"{part}_config", {})
            model_type = find_part(file, part, None, FAMILIES).model_type
            assert model_type == inner.model_type, (cls.model_type, part)
            full = inner.to_dict() | dict(model_type=inner.model_type)
            ours, whole = read(file, part=part), read(full)
            if isinstance(ours, str) or isinstance(whole, str):
                # A default config that is no model's is refused either way.
                assert isinstance(ours, str) and isinstance(whole, str), (cls.model_type, part, ours, whole)
                continue
            assert ours == whole, (cls.model_type, part)
            checked += 1
    assert checked > 100


def test_every_part_has_the_type_of_its_class():
    for model_type, parts in part_types.PART_TYPES.items():
        if model_type in classes():
            for part, expected in parts.items():
                assert make_class_defaults.part_type(classes()[model_type], part) == expected


def test_sizes_of_classes():
    for model_type, sizes in class_defaults.CLASS_SIZES.items():
        if model_type in classes():
            got, more = make_class_defaults.defaults_of(classes()[model_type], FAMILIES[model_type])
            assert got == sizes and more == class_defaults.CLASS_DEFAULTS.get(model_type, {}), model_type


def test_models_without_a_rotation_have_none():
    names = part_types.WITHOUT_ROTATION
    assert not names & FAMILIES.keys() and len(names) > 250
    for name in names & classes().keys():
        assert not make_class_defaults.has_a_rotation(classes()[name]), name
    towers = {
        inner.model_type
        for cls in classes().values()
        for inner in (getattr(cls(), "vision_config", None), getattr(cls(), "audio_config", None))
        if isinstance(inner, PretrainedConfig)
    }
    unread = {
        name for name in towers if isinstance(said := read({"model_type": name}), str) and "is unknown" in said
    }
    # Tokenizers, timm's towers, and towers of which we know too little.
    assert len(unread) <= 9 and not unread & OTHER_ROTATIONS.keys()


@pytest.mark.parametrize("name", ["gemma4", "kimi_k25", "llama4", "minimax_m3_vl", "pixtral"])
def test_towers_that_a_config_says(name):
    """The rope of a file is the rope that the census compares with the folder's own module."""
    modeling, configuration = (
        importlib.import_module(f"transformers.models.{name}.{kind}_{name}")
        for kind in ("modeling", "configuration")
    )
    (case,) = towers.TOWERS[name](modeling, configuration)
    inner = next(
        cls()
        for cls in vars(configuration).values()
        if inspect.isclass(cls)
        and cls.__name__.endswith("VisionConfig")
        and cls.__module__ == configuration.__name__
    )
    ours = rope_jax.from_hf_config(inner.to_dict() | dict(model_type=inner.model_type)).rope
    frequencies, theirs = ours.frequencies(), case.rope.frequencies()
    np.testing.assert_allclose(frequencies.inv_freq, theirs.inv_freq, rtol=1e-14)
    assert (ours.head_dim, ours.layout, ours.blocks, ours.num_pairs) == (
        case.rope.head_dim,
        case.rope.layout,
        case.rope.blocks,
        case.rope.num_pairs,
    )


def test_head_dims_that_a_file_leaves_out():
    """A head_dim that is missing, and one that is null, where the class allows it; the width is no default."""
    checked, null = 0, 0
    for model_type, family in FAMILIES.items():
        cls = classes().get(model_type)
        if cls is None or family.latent or getattr(family.sections, "order", "chunked") != "chunked":
            continue
        key, width_key = family.keys.get("head_dim", "head_dim"), family.key("hidden_size")
        try:
            config = cls()
            wide = 6 * config.hidden_size
            theirs = getattr(cls(**{width_key: wide}), key, None)
        except Exception:  # sizes that exclude each other, or differ by layer
            continue
        heads = config.num_attention_heads
        values = {"model_type": model_type, width_key: wide, family.key("num_attention_heads"): heads}
        layers = rope_jax.interop.layers
        for given in ({}, {key: None}):
            if given and model_type != "zamba2":  # whose code cannot do with null
                try:
                    theirs = getattr(cls(**{width_key: wide}, **given), key)
                except Exception:  # the class refuses null
                    continue
                null += 1
            elif given:
                continue
            expected = theirs if isinstance(theirs, int) else wide // heads
            hooked = family.read_hook({**values, **given}, True)
            got = layers._head_dims(rope_jax.interop.config.Config(hooked, model_type), family, [None])[0]
            assert got == expected, (model_type, given, got, expected)
            checked += 1
    assert checked > 120 and null > 20
