"""Compares every rotary module of every folder of transformers with the same rotation here.

python tests/oracle/census.py          prints the table, and fails if it is worse than the committed one
python tests/oracle/census.py FOLDER   prints the rows of a folder
python tests/oracle/census.py --write  writes the committed table, tests/golden/census.json

A module is built from its default config and from perturbed ones, and ours is read from the config alone. The census
compares frequencies, cos and sin at positions near zero, around and beyond the original context length and at
100,000, and queries rotated by the folder's own apply function, in float32 and bfloat16. Modules that a config does
not describe are said by a Rope and positions in towers.py. A folder is counted as reproduced if all its rotary
modules are; a folder whose trigonometry is no rotation is named with the reason.
"""

import copy
import dataclasses
import datetime
import functools
import importlib
import inspect
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import rope_jax
from rope_jax.interop.families import FAMILIES

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.cases import EPS32, frequency_error
from towers import NO_ROTATION, TOWERS

TABLE = Path(__file__).parents[1] / "golden" / "census.json"
EPS16 = 2.0**-8  # unit roundoff
DTYPES = {"float32": (torch.float32, jnp.float32, EPS32), "bfloat16": (torch.bfloat16, jnp.bfloat16, EPS16)}

ORIGINAL, LONGEST = 64, 256  # lengths of the perturbed configs
POSITIONS = {
    "near": range(9),
    "around": [ORIGINAL - 2, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1],
    "beyond": [LONGEST - 1, LONGEST, LONGEST + 1, 3 * LONGEST],
    "far": [0, 1, 99_999, 100_000],
}
PERTURBED = {
    "default": dict(rope_type="default"),
    "default, half": dict(rope_type="default", partial_rotary_factor=0.5),
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=ORIGINAL),
    "yarn, mscale": dict(
        rope_type="yarn",
        factor=40.0,
        original_max_position_embeddings=ORIGINAL,
        mscale=1.0,
        mscale_all_dim=0.707,
        beta_fast=24.0,
    ),
    "longrope": dict(rope_type="longrope", original_max_position_embeddings=ORIGINAL),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        original_max_position_embeddings=ORIGINAL,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    "proportional": dict(rope_type="proportional", partial_rotary_factor=0.5),
}

# The parts of a module whose signature names the whole model.
PARTS = {
    "EvollaRotaryEmbedding": ["evolla"],
    "EvollaSaProtRotaryEmbedding": [""],
    "Qwen2_5OmniRotaryEmbedding": ["qwen2_5_omni_text", "qwen2_5_omni_talker"],
    "Qwen3OmniMoeRotaryEmbedding": ["qwen3_omni_moe_talker_code_predictor", ""],
    "Qwen3OmniMoeThinkerTextRotaryEmbedding": ["qwen3_omni_moe_text"],
    "Qwen3OmniMoeTalkerRotaryEmbedding": ["qwen3_omni_moe_talker_text"],
}


# The config of a module that inherits the signature of another.
START = {"Qwen3OmniMoeTalkerRotaryEmbedding": transformers.Qwen3OmniMoeTalkerTextConfig}


# ---------------------------------------------------------------------------------- modules of transformers


_TRIGONOMETRY = re.compile(r"otary|rope|inv_freq")
_EMBEDDING = re.compile(r"(Rotary|Rope)\w*Embedding$")
_FUNCTION = re.compile(
    r"^ *def (apply_rotary|rotate_half|rotate_quer|rotate_every|rotate_pairwise)\w*\(", re.MULTILINE
)


def modeling_modules():
    """(folder, module) for every modeling file of transformers."""
    root = Path(transformers.__file__).parent / "models"
    for folder in sorted(path.name for path in root.iterdir() if path.is_dir()):
        for file in sorted((root / folder).glob("modeling_*.py")):
            if _TRIGONOMETRY.search(file.read_text()):
                yield folder, importlib.import_module(f"transformers.models.{folder}.{file.stem}")


def classes(module):
    """The classes that a modeling file defines."""
    return [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]


def rotary_classes(module):
    for cls in classes(module):
        if cls.__name__.endswith("RotaryEmbedding"):
            yield cls


def about_rotation(module) -> bool:
    """Whether a modeling file has a rotary module, a function that rotates, or frequencies."""
    text = Path(module.__file__).read_text()
    named = any(_EMBEDDING.search(cls.__name__) for cls in classes(module))
    return named or bool(_FUNCTION.search(text)) or "inv_freq" in text


def borrowing_configs():
    """(folder, config, modeling file of another folder) for folders that have a config alone."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    root = Path(transformers.__file__).parent / "models"
    for folder in sorted(path.name for path in root.iterdir() if path.is_dir()):
        if list((root / folder).glob("modeling_*.py")):
            continue
        for file in sorted((root / folder).glob("configuration_*.py")):
            configuration = importlib.import_module(f"transformers.models.{folder}.{file.stem}")
            for cls in classes(configuration):
                model = MODEL_MAPPING_NAMES.get(getattr(cls, "model_type", None))
                if isinstance(model, str):
                    yield folder, cls(), importlib.import_module(getattr(transformers, model).__module__)


def configs(cls, module, axial=False):
    """Default configs for which the class can be built: its own, or those of the parts of a larger model."""
    annotation = inspect.signature(cls.__init__).parameters.get("config")
    annotation = START.get(cls.__name__, None if annotation is None else annotation.annotation)
    if annotation is inspect.Parameter.empty or annotation is None:
        return
    if isinstance(annotation, str):
        annotation = getattr(module, annotation.split("|")[0].strip(), None)
    if not inspect.isclass(annotation):
        return
    queue, seen = [annotation()], set()
    while queue:
        config = queue.pop(0)
        queue += [getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None]
        if type(config) in seen or (getattr(config, "default_rope_type", "") == "axial") != axial:
            continue
        seen.add(type(config))
        # A part from another folder has a rotary module there; one of this folder may have another than this.
        here = module.__name__.split(".")[2] == type(config).__module__.split(".")[2]
        if not here or config.model_type not in PARTS.get(cls.__name__, [config.model_type]):
            continue
        if not config.model_type:  # a part without a name of its own
            config.model_type = "esm" if "SaProt" in type(config).__name__ else "llama"
        with_rope_parameters(config)
        if not hasattr(config, "rope_parameters"):  # a table by index: see towers.py
            continue
        try:
            cls(repaired(config))
        except Exception:  # it is not for this part
            continue
        yield config


def described():
    """(folder, modeling file, class, config, axial) for every module whose config ``from_hf_config`` reads."""
    for folder, modeling in modeling_modules():
        for cls in rotary_classes(modeling):
            for axial in (True, False):
                for config in configs(cls, modeling, axial):
                    if config.model_type in FAMILIES:
                        yield folder, modeling, cls, config, axial
    for folder, config, modeling in borrowing_configs():
        for cls in rotary_classes(modeling):
            yield folder, modeling, cls, config, False


def with_rope_parameters(config):
    """Gives ESM, whose config has a base alone, its rope parameters."""
    if not getattr(config, "rope_parameters", None) and hasattr(config, "rope_theta"):
        config.rope_parameters = dict(rope_type="default", rope_theta=config.rope_theta)


# The defaults of some configs are those of no model: an odd rotary_dim, or sections that do not add up.
REPAIRED = {
    "glm4_moe": dict(head_dim=128),
    "glm4v_moe_text": dict(head_dim=128),
    "glm4v_text": dict(partial_rotary_factor=0.5),
    "glm_image_text": dict(partial_rotary_factor=0.5),
    "hunyuan_vl_text": dict(mrope_section=[16, 16, 16, 16]),
    "qwen3_omni_moe_text": dict(head_dim=128),
    "qwen3_omni_moe_talker_text": dict(mrope_section=[12, 10, 10]),
    "zaya": dict(sliding_window=512),  # for its sliding layers, of which the default config has none
    # Which layers have attention, in defaults that do not say.
    "bamba": dict(attn_layer_indices=[2, 5]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 16),
    "qwen4_exp_text": dict(partial_rotary_factor=0.25),
    "cohere_compass_text": dict(entries={"full_attention": dict(rope_type="default", rope_theta=1e4)}),
    # Switched off by default.
    "esm": dict(position_embedding_type="rotary"),
    "granitemoehybrid": dict(position_embedding_type="rope", layer_types=["full_attention"] * 32),
    "zamba2": dict(use_mem_rope=True),
}


def entries_of(config):
    """The rope parameters of a config, by label; label None if they are flat."""
    parameters = config.rope_parameters
    nested = any(isinstance(entry, dict) for entry in parameters.values())
    return parameters if nested else {None: parameters}


def repaired(config):
    config = copy.deepcopy(config)
    changes = copy.deepcopy(REPAIRED.get(config.model_type, {}))
    if "entries" in changes:
        config.rope_parameters = changes.pop("entries")
    for key in ("partial_rotary_factor", "mrope_section"):
        if key in changes:
            config.rope_parameters[key] = changes.pop(key)
    for key, value in changes.items():
        setattr(config, key, value)
    # An entry for a type that no layer has is given one.
    labels, types = FAMILIES[config.model_type].label, getattr(config, "layer_types", None)
    for label in entries_of(config) if types else ():
        if label is not None and label not in map(labels, types):
            named = [type for type in FAMILIES[config.model_type].labels if labels(type) == label]
            types = [*types[:-1], *(named or [label])[:1]]
    if types and types != config.layer_types:
        config.layer_types = types
    return config


def perturbed(config, name, num_pairs):
    """The config with another schedule in every layer with a schedule, and with short lengths."""
    config = repaired(config)
    config.max_position_embeddings = LONGEST
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = ORIGINAL
    for label, entry in entries_of(config).items():
        if entry is None:
            continue
        kept = {key: entry[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_section") if key in entry}
        if "original_max_position_embeddings" in PERTURBED[name] and "llama_4_scaling_beta" in entry:
            kept["llama_4_scaling_beta"] = entry["llama_4_scaling_beta"]
        if name == "proportional" and getattr(FAMILIES[config.model_type].sections, "order", None) == "strided":
            pairs = (
                getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) // 2
            )  # all of them now
            kept["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        entry.clear()
        entry.update(kept, **PERTURBED[name])
        if name == "longrope":
            pairs = num_pairs[label]
            entry["short_factor"] = [1 + 0.01 * i for i in range(pairs)]
            entry["long_factor"] = [1 + 0.5 * i for i in range(pairs)]
            if config.model_type == "phimoe":
                entry.update(short_mscale=1.2, long_mscale=1.3)
    return config


# ------------------------------------------------------------------------------------------ the comparison


class Different(Exception):
    """Ours and theirs differ; the message says by how much."""


def halves(x, num_pairs):
    """Their cos or sin ``[..., T, R/2 or R]`` as ``[..., T, R/2]``; both features of a pair must have the same."""
    if x.shape[-1] == num_pairs:
        return x
    for parts in ((x[..., :num_pairs], x[..., num_pairs:]), (x[..., 0::2], x[..., 1::2])):
        if x.shape[-1] == 2 * num_pairs and np.array_equal(*parts):
            return parts[0]
    raise Different("the two features of a pair have different angles")


def their_cos_sin(module, positions, label, dtype=torch.float32):
    """The output of the module: a pair of arrays, or one complex array."""
    x = torch.zeros(1, positions.shape[-1], 8, dtype=dtype)
    arguments = (x, torch.tensor(positions)) + (() if label is None else (label,))
    with torch.no_grad():
        return module(*arguments)


def as_numpy(x):
    return np.asarray(x.float() if isinstance(x, torch.Tensor) else x, np.float64)


def position_ids(rope, values, text_only):
    """The positions ``[(A,) B, T]`` for them and ``[B, T(, A)]`` for us; axes differ, except in text."""
    flat = np.array([list(values)])
    if rope.num_axes == 1:
        return flat, flat
    axes = np.stack([flat if text_only else np.maximum(flat - 2 * axis, 0) for axis in range(rope.num_axes)])
    return axes, np.moveaxis(axes, 0, -1)


@functools.cache
def our_rotation(rope, name, text_only, length):
    """Ours at the named positions, as numpy; many folders have the very same rotation."""
    _, ours_at = position_ids(rope, POSITIONS[name], text_only)
    return tuple(map(as_numpy, rope.rotation(jnp.asarray(ours_at), context_length=length)))


@functools.cache
def our_queries(rope, text_only, length, dtype):
    """Random queries ``[B, T, N, H]`` of that dtype, before and after, as numpy."""
    _, ours_at = position_ids(rope, POSITIONS["near"], text_only)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, len(POSITIONS["near"]), 2, rope.head_dim)), dtype)
    turned = rope.rotate(x, rope.rotation(jnp.asarray(ours_at), context_length=length))
    return as_numpy(x.astype(jnp.float32)), as_numpy(turned.astype(jnp.float32))


def compare_rotation(rope, module, label, model_type):
    """The worst difference of cos and sin, as a share of what is allowed and, but for far positions, as it is."""
    worst = apart = 0.0
    text_only = model_type == "hunyuan_vl_text"  # with pictures theirs is no rotation: see from_hf_config
    for name, values in POSITIONS.items():
        theirs_at, _ = position_ids(rope, values, text_only)
        length = int(theirs_at.max()) + 1 if hasattr(rope.schedule, "context_length") else None
        theirs = their_cos_sin(copy.deepcopy(module), theirs_at, label)
        if not isinstance(theirs, tuple):
            theirs = theirs.real, theirs.imag
        frequencies = rope.frequencies(length)
        # Their float32 product of a frequency and a position: design.md, numeric contract, 6; or what the error of
        # the frequency itself makes of it, where R is no power of two.
        error = max(
            2.0**-23,
            float(np.max(frequency_error(one_axis(rope.schedule), 2 * rope.num_pairs, ladder(frequencies)))),
        )
        allowed = frequencies.attention_factor * (2e-7 + np.maximum(np.array([list(values)]), 1) * error)
        for our_part, their_part in zip(our_rotation(rope, name, text_only, length), theirs, strict=True):
            their_part = halves(as_numpy(their_part), rope.num_pairs)
            if their_part.shape != our_part.shape:
                raise Different(f"cos of {their_part.shape}, ours {our_part.shape}")
            off = np.abs(our_part - their_part)
            worst = max(worst, float(np.max(off / allowed[..., None])))
            apart = apart if name == "far" else max(apart, float(np.max(off)))
    return worst, apart


def ladder(frequencies):
    """The frequency of each pair, ``[R/2]``: of several axes, a pair reads one at most."""
    matrix = np.atleast_2d(frequencies.inv_freq)
    if np.any(np.count_nonzero(matrix, axis=0) > 1):
        raise Different("a pair reads several axes")
    return matrix.sum(axis=0)


def one_axis(schedule):
    """The schedule whose pairs are dealt to the axes."""
    return schedule.schedule if isinstance(schedule, rope_jax.Sections) else schedule


def compare_frequencies(rope, module, label):
    """The worst difference of the frequencies: in ulp of float32, as a share of what float32 allows, and relative."""
    name = "inv_freq" if label is None else f"{label}_inv_freq"
    theirs = as_numpy(getattr(module, name))
    length = 1 if hasattr(rope.schedule, "context_length") else None
    frequencies = rope.frequencies(length)
    ours = np.abs(ladder(frequencies))
    if theirs.shape != ours.shape:
        raise Different(f"{theirs.size} frequencies, ours {ours.size}")
    if type(module).__name__ == "Ernie4_5_VLMoeTextRotaryEmbedding":  # theirs stand in another order
        ours = np.concatenate([ours[:44:2], ours[1:44:2], ours[44:]])
    scaling = getattr(module, "attention_scaling" if label is None else f"{label}_attention_scaling")
    decides_later = type(module).__name__ == "PhimoeRotaryEmbedding"  # in each call
    if not decides_later and abs(scaling - frequencies.attention_factor) > 1e-12 * scaling:
        raise Different(f"attention factor {scaling}, ours {frequencies.attention_factor}")
    off = np.abs(theirs - ours)
    ulp = np.spacing(ours.astype(np.float32)).astype(np.float64)
    allowed = (
        frequency_error(one_axis(rope.schedule), 2 * rope.num_pairs, ours) + 1e-30
    )  # a pair that stands still has none
    return float(np.max(off / ulp)), float(np.max(off / allowed)), float(np.max(off / (ours + 1e-30)))


def apply_function(module, config):
    """The apply function of a module's attention, and whether it returns halves for interleaved pairs."""
    latent = FAMILIES[config.model_type].latent and getattr(config, "rope_interleave", True)
    if latent and hasattr(module, "apply_rotary_pos_emb_interleave"):
        return module.apply_rotary_pos_emb_interleave, True
    for name in ("apply_rotary_pos_emb", "apply_rotary_emb"):
        if hasattr(module, name):
            return getattr(module, name), False
    return None, False


def pair_sizes(x, rope):
    """|x1| + |x2| of the pair of each rotated feature, ``[..., T, N, R]``."""
    first, second = rope.feature_pairs
    sizes = np.zeros_like(x[..., : 2 * rope.num_pairs])
    sizes[..., first] = sizes[..., second] = np.abs(x[..., first]) + np.abs(x[..., second])
    return sizes


def turn(apply, q, cos_sin, rotary_dim):
    """q, rotated by their apply function, whose arguments differ."""
    cos_sin = cos_sin if isinstance(cos_sin, tuple) else (cos_sin,)
    one = next(iter(inspect.signature(apply).parameters)) == "x"
    with torch.no_grad():
        try:
            return apply(q, *cos_sin) if one else apply(q, q, *cos_sin)[0]
        except RuntimeError:  # its attention passes on only what turns
            part = q[..., :rotary_dim]
            turned = apply(part, *cos_sin) if one else apply(part, part, *cos_sin)[0]
            return torch.cat([turned, q[..., rotary_dim:]], dim=-1)


def compare_queries(rope, module, label, modeling, config, name):
    """The worst difference of rotated queries, as a share of the allowed rounding."""
    apply, halves_out = apply_function(modeling, config)
    if apply is None:
        raise Different("no apply function")
    values = np.array([list(POSITIONS["near"])])
    theirs_at, _ = position_ids(rope, values[0], text_only=False)
    length = int(theirs_at.max()) + 1 if hasattr(rope.schedule, "context_length") else None
    dtype, ours_dtype, eps = DTYPES[name]
    text_only = config.model_type == "hunyuan_vl_text"
    theirs_at, _ = position_ids(rope, values[0], text_only)
    x, ours = our_queries(rope, text_only, length, ours_dtype)

    rotary_dim, heads_first = 2 * rope.num_pairs, "llama4" not in modeling.__name__
    q = torch.tensor(x, dtype=dtype)
    q = q.transpose(1, 2) if heads_first else q
    cos_sin = their_cos_sin(copy.deepcopy(module), theirs_at, label, dtype)
    turned = turn(apply, q, cos_sin, rotary_dim)
    if turned.dtype != dtype:
        raise Different(f"queries come out as {turned.dtype}")
    turned = as_numpy(turned.transpose(1, 2) if heads_first else turned)
    if halves_out:
        turned = np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(turned.shape)

    # Of a pair (x1, x2) every rounding counts at most |x1| + |x2| times: see test_transformers.py.
    if not np.array_equal(turned[..., rotary_dim:], ours[..., rotary_dim:]):
        raise Different("features beyond rotary_dim change")
    factor = rope.frequencies(length).attention_factor
    allowed = factor * pair_sizes(x, rope) * (2e-7 + np.maximum(values, 1)[..., None, None] * 2.0**-23 + 4.1 * eps)
    return float(np.max(np.abs(turned - ours)[..., :rotary_dim] / allowed))


def labels_of(config, model_rope):
    """The label of each layer: its key in ``rope_parameters``, or None if these are flat."""
    if None in entries_of(config):
        return [None] * len(model_rope.layers)
    return [FAMILIES[config.model_type].label(type) for type in config.layer_types]


def ropes_by_label(model_rope, config):
    """The rotation of each label; layers of one label must agree, unless the family varies single layers."""
    found = {}
    for layer, label in zip(model_rope.layers, labels_of(config, model_rope), strict=True):
        if layer.rope is not None:
            found.setdefault(label, set()).add(layer.rope)
    own = FAMILIES[config.model_type].layers in ("layer_rope_theta", "rope_scaling_layers")
    if not own and any(len(ropes) > 1 for ropes in found.values()):
        raise Different(f"layers of one label rotate in several ways: {found}")
    return {label: ropes.pop() for label, ropes in found.items() if len(ropes) == 1}


def compare_scales(model_rope, modeling, config):
    """Logit factors and query temperatures, equal exactly or up to float32 rounding."""
    layer = next(layer for layer in model_rope.layers if layer.rope is not None)
    if hasattr(modeling, "yarn_apply_mscale"):
        expected = modeling.yarn_apply_mscale(config.rope_parameters, 1.0)
        if abs(expected - layer.logit_factor) > 1e-12 * expected:
            raise Different(f"logit factor {expected}, ours {layer.logit_factor}")
    if hasattr(modeling, "get_llama_4_attn_scale") and (beta := config.rope_parameters.get("llama_4_scaling_beta")):
        positions = torch.tensor([[0, 1, ORIGINAL, 100_000]])
        original = config.rope_parameters.get("original_max_position_embeddings", ORIGINAL)
        expected = as_numpy(modeling.get_llama_4_attn_scale(positions, beta, original)).ravel()
        if layer.query_temperature is None:
            raise Different("no query temperature")
        np.testing.assert_allclose(layer.query_temperature(jnp.asarray(positions)[0]), expected, rtol=4 * EPS32)


def compare(cls, modeling, config, values):
    """The figures of one module under one config: shares of what is allowed, and the frequencies' ulp.

    Theirs is made from the config object, ours from the values of its file.
    """
    model_type = config.model_type
    model_rope = rope_jax.from_hf_config(values, compat="transformers")
    module = cls(copy.deepcopy(config))
    ropes = ropes_by_label(model_rope, config)
    if not ropes:
        raise Different("no layer rotates")
    compare_scales(model_rope, modeling, config)
    figures = []
    for label, rope in ropes.items():
        if isinstance(rope.schedule, rope_jax.Negated):  # theirs turns forward, and its apply function back
            forward = dataclasses.replace(rope, schedule=rope.schedule.schedule)
        else:
            forward = rope
        ulp, inv_freq, relative = compare_frequencies(forward, module, label)
        rotation, apart = compare_rotation(forward, module, label, model_type)
        figures.append(
            dict(
                ulp=ulp,
                inv_freq=inv_freq,
                rotation=rotation,
                relative=relative,
                apart=apart,
                **{name: compare_queries(rope, module, label, modeling, config, name) for name in DTYPES},
            )
        )
    return {key: max(figure[key] for figure in figures) for key in figures[0]}


# --------------------------------------------------------------------------------------- rows and columns


def compare_axial(cls, modeling, config):
    """As :func:`compare`, at rows and columns ``[T, 2]``."""
    layers = rope_jax.from_hf_config(config.to_dict(), compat="transformers").layers
    rope = next(layer.rope for layer in layers if layer.rope is not None)
    module = cls(copy.deepcopy(config))
    theirs = np.abs(as_numpy(module.inv_freq))
    ours = ladder(rope.frequencies())[: theirs.size]
    if theirs.size * 2 != rope.num_pairs:
        raise Different(f"{theirs.size} frequencies for each axis, ours {rope.num_pairs / 2}")
    off = np.abs(theirs - ours)
    allowed = frequency_error(rope.schedule.schedule, rope.num_pairs, ours)  # of one axis, which has R/2 features
    figures = dict(
        ulp=float(np.max(off / np.spacing(ours.astype(np.float32)))),
        inv_freq=float(np.max(off / allowed)),
        relative=float(np.max(off / ours)),
    )

    positions = np.concatenate([rope_jax.grid_positions(5, 7), [[99, 1], [1023, 2047]]])
    furthest = np.maximum(positions.max(-1), 1)
    turn = rope.rotation(jnp.asarray(positions))
    cos_sin = their_cos_sin(module, positions, None)
    error = max(2.0**-23, float(np.max(allowed)))
    apart = [
        np.abs(as_numpy(part) - halves(as_numpy(theirs), rope.num_pairs))
        for part, theirs in zip(turn, cos_sin, strict=True)
    ]
    figures["rotation"] = float(np.max(apart / (2e-7 + furthest * error)[:, None]))
    figures["apart"] = float(np.max(apart))
    for name, (dtype, ours_dtype, eps) in DTYPES.items():
        x = jnp.asarray(np.random.default_rng(0).normal(size=(len(positions), 2, rope.head_dim)), ours_dtype)
        exact = as_numpy(x.astype(jnp.float32))
        q = torch.tensor(exact, dtype=dtype)
        turned = modeling.apply_rotary_pos_emb_vision(q, q, *their_cos_sin(module, positions, None, dtype))[0]
        if turned.dtype != dtype:
            raise Different(f"queries come out as {turned.dtype}")
        allowed = pair_sizes(exact, rope) * (2e-7 + furthest[:, None, None] * error + 4.1 * eps)
        off = np.abs(as_numpy(turned) - as_numpy(rope.rotate(x, turn).astype(jnp.float32)))
        figures[name] = float(np.max(off / allowed))
    return figures


# ------------------------------------------------------------------------------- modules that no config describes


def ladder_errors(schedule, rotary_dim):
    """What float32 allows the frequencies of a schedule, by pair: ``[R/2]``."""
    if isinstance(schedule, rope_jax.Affine):  # the scale is rounded, and the product
        ours = np.abs(schedule(rotary_dim).inv_freq).sum(axis=0)
        return schedule.scale * ladder_errors(schedule.schedule, rotary_dim) + 2 * EPS32 * ours
    if not isinstance(schedule, rope_jax.Axial):
        return frequency_error(schedule, rotary_dim, schedule(rotary_dim).inv_freq)
    schedules = schedule.schedule
    schedules = schedules if isinstance(schedules, tuple) else (schedules,) * len(schedule.sizes)
    runs = [
        np.zeros(size // 2) if run is None else ladder_errors(run, size)
        for run, size in zip(schedules, schedule.sizes, strict=True)
    ]
    return np.stack(runs, axis=-1).ravel() if schedule.alternating else np.concatenate(runs)


def of_pairs(x, rope):
    """Their cos or sin ``[T, R/2 or R]`` as ``[T, R/2]``; both features of a pair must have the same."""
    if x.shape[-1] == rope.num_pairs:
        return x
    first, second = rope.feature_pairs
    if x.shape[-1] != 2 * rope.num_pairs or not np.array_equal(x[:, first], x[:, second]):
        raise Different("the two features of a pair have different angles")
    return x[:, first]


def compare_tower(case):
    """As :func:`compare`, for a row of towers.py."""
    rope, figures = case.rope, {}
    positions = np.asarray(case.positions)
    angle_error = case.angle_error
    if angle_error is None or case.inv_freq is not None:
        errors = ladder_errors(rope.schedule, 2 * rope.num_pairs)
    if angle_error is None:
        furthest = np.abs(positions) if rope.num_axes == 1 else np.abs(positions).max(axis=-1)
        angle_error = np.maximum(furthest, 1) * max(2.0**-23, float(errors.max()))
    if case.inv_freq is not None:
        ours = np.atleast_2d(rope.frequencies().inv_freq).sum(axis=0)
        if case.inv_freq.shape != ours.shape:
            raise Different(f"{case.inv_freq.size} frequencies, ours {ours.size}")
        off = np.abs(case.inv_freq - ours)
        figures |= dict(
            ulp=float(np.max(off / np.spacing(np.maximum(ours, 1e-30).astype(np.float32)))),
            inv_freq=float(np.max(off / (errors + 1e-30))),
            relative=float(np.max(off / (ours + 1e-30))),
        )
    turn = rope.rotation(jnp.asarray(positions))
    apart = []
    for ours, theirs in zip(turn, case.cos_sin(torch.float32), strict=True):
        theirs = of_pairs(as_numpy(theirs.detach()), rope)
        if theirs.shape != ours.shape:
            raise Different(f"cos of {theirs.shape}, ours {ours.shape}")
        apart.append(np.abs(as_numpy(ours) - theirs))
    figures["rotation"] = float(np.max(apart / (2e-7 + angle_error)[:, None]))
    figures["apart"] = float(np.max(apart))

    turn = turn.prepend_identity(case.prefix)
    angle_error = np.concatenate([np.zeros(case.prefix), angle_error])[:, None, None]
    for name, (dtype, ours_dtype, eps) in DTYPES.items():
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(1, len(angle_error), case.heads, rope.head_dim)), ours_dtype)
        exact = as_numpy(x.astype(jnp.float32))
        with torch.no_grad():
            theirs = as_numpy(case.rotate(torch.tensor(exact, dtype=dtype)))
        ours = as_numpy(rope.rotate(x, turn).astype(jnp.float32))
        if not np.array_equal(theirs[..., 2 * rope.num_pairs :], ours[..., 2 * rope.num_pairs :]):
            raise Different("features beyond rotary_dim change")
        allowed = pair_sizes(exact, rope) * (2e-7 + angle_error + 4.1 * eps)
        off = np.abs(theirs - ours)[..., : 2 * rope.num_pairs]
        figures[name] = float(np.max(off / (allowed + 1e-30)))
    return figures


# ------------------------------------------------------------------------------------------------- the table


def variants(config):
    """(name, contents of the file) for the default config, the perturbed ones, and older and sparser files."""
    model_type = config.model_type
    default = repaired(config)
    full = {**default.to_dict(), "model_type": model_type}
    yield "default config", full
    if model_type == "esm":  # which reads nothing but rope_theta
        return
    model_rope, entries = rope_jax.from_hf_config(full, compat="transformers"), entries_of(default)
    num_pairs = {}
    for layer, label in zip(model_rope.layers, labels_of(default, model_rope), strict=True):
        if layer.rope is not None:
            share = (entries[label] or {}).get("partial_rotary_factor", 1.0)
            whole = (entries[label] or {}).get("rope_type") == "proportional"
            num_pairs[label] = int(layer.rope.head_dim * share) // 2 if whole else layer.rope.num_pairs
    for name in PERTURBED:
        if name == "default, half" and FAMILIES[model_type].sections is not None:
            continue  # whose sections would have to be halved too
        if name == "longrope" and set(num_pairs) != {
            label for label, entry in entries.items() if entry is not None
        }:
            continue
        yield name, {**perturbed(config, name, num_pairs).to_dict(), "model_type": model_type}
    if "hunyuan" in model_type:
        changed = perturbed(config, "dynamic", num_pairs)
        changed.rope_parameters.update(factor=1.0, alpha=1000.0)
        yield "dynamic, alpha", {**changed.to_dict(), "model_type": model_type}
    sparse = {key: value for key, value in full.items() if key not in SAYS_HOW}
    if "hidden_size" in sparse and "head_dim" in full and not FAMILIES[model_type].latent:
        sparse["hidden_size"] *= 2  # so that D/N is not what stood there
    yield "nothing said", sparse
    base = "rotary_emb_base" if "gpt_neox" in model_type else "rope_theta"
    # With one base for each layer type, transformers knows the newer name only: see from_hf_config.
    kind = "rope_type" if FAMILIES[model_type].bases else "type"
    if model_type not in ("modernbert", "modernbert-decoder", "olmo3"):  # other keys, or another meaning
        yield "version 4", sparse | {base: 54_321.0, "rope_scaling": {kind: "linear", "factor": 4.0}}


# The keys of a config about its rotation; without them the family's values are used.
SAYS_HOW = (
    "rope_parameters rope_scaling rope_theta compress_rope_theta partial_rotary_factor rotary_dim rope_interleave "
    "layer_types layers_block_type no_rope_layers layer_rope_theta head_dim per_layer_config"
).split()


def from_file(config_class, values):
    """The config that transformers makes from the contents of a file."""
    config = config_class.from_dict(copy.deepcopy(values))
    config.model_type = values["model_type"]
    with_rope_parameters(config)
    return config


def fits(module, config):
    """Whether a latent head's rotated part takes the frequencies of its own module."""
    sizes = {value.shape[-1] for name, value in module.named_buffers() if name.endswith("inv_freq")}
    return sizes == {config.qk_rope_head_dim // 2}


def examine(cls, modeling, config):
    """The figures of each variant of one part, or the reason for having none."""
    results = {}
    for name, values in variants(config):
        try:
            changed = from_file(type(config), values)
            module = cls(copy.deepcopy(changed))
            label = next((label for label, entry in entries_of(changed).items() if entry is not None), None)
            axes = FAMILIES[config.model_type].sections
            positions = np.zeros((4, 1, 2) if config.model_type == "hunyuan_vl_text" else (3, 1, 2), int)
            their_cos_sin(
                module, positions if axes and axes.order != "rows_columns_alternating" else positions[0], label
            )
        except Exception as error:  # transformers itself has no such variant here
            results[name] = f"refused by transformers: {type(error).__name__}"
            continue
        if FAMILIES[config.model_type].latent and not fits(module, changed):
            results[name] = "refused by transformers: more frequencies than the rotated part has pairs"
            continue
        try:
            results[name] = compare(cls, modeling, changed, values)
        except Different as error:
            results[name] = f"DIFFERENT: {error}"
        except Exception as error:
            # A file that says too little may be refused; what it says may not be read in another way.
            word = "refused by us" if name in ("nothing said", "version 4") else "ERROR"
            results[name] = f"{word}: {type(error).__name__}: {error}"
    return results


def part_of(cls, results, said):
    return dict(module=cls if isinstance(cls, str) else cls.__name__, said=said, results=results)


def or_different(comparison, *arguments):
    """The figures of a comparison, or what differs."""
    try:
        return comparison(*arguments)
    except Different as error:
        return f"DIFFERENT: {error}"


def ropes_in_words(config):
    """The rotation of a default config, in one line."""
    default = repaired(config)
    model_rope = rope_jax.from_hf_config(
        {**default.to_dict(), "model_type": default.model_type}, compat="transformers"
    )
    ropes = ropes_by_label(
        model_rope, from_file(type(config), default.to_dict() | {"model_type": default.model_type})
    )
    if len(set(ropes.values())) == 1:
        return repr(next(iter(ropes.values())))
    return "; ".join(f"{label}: {rope}" for label, rope in ropes.items())


def census(folders=()):
    """The whole table: the results of each part of each folder."""
    table = {}
    for folder, modeling in modeling_modules():
        if (folders and folder not in folders) or not about_rotation(modeling):
            continue
        row = table.setdefault(folder, dict(parts={}, not_covered=[]))
        if folder in NO_ROTATION:
            continue
        covered = set()
        if folder in TOWERS:
            configuration = importlib.import_module(modeling.__name__.replace("modeling_", "configuration_"))
            for case in TOWERS[folder](modeling, configuration):
                name = ", ".join(filter(None, (case.module, case.name)))
                figures = {"tower": or_different(compare_tower, case)}
                row["parts"][name] = part_of(case.module, figures, case.in_words())
                covered.add(case.module)
        for cls in rotary_classes(modeling):
            if cls.__name__ in covered:
                continue
            for config in configs(cls, modeling, axial=True):
                if config.model_type not in FAMILIES:
                    row["not_covered"].append(f"{config.model_type}: not in our table of families")
                    continue
                layers = rope_jax.from_hf_config(config.to_dict(), compat="transformers").layers
                said = repr(next(layer.rope for layer in layers if layer.rope is not None))
                figures = {"axial": or_different(compare_axial, cls, modeling, config)}
                row["parts"][config.model_type] = part_of(cls, figures, said)
                covered.add(cls.__name__)
            for config in configs(cls, modeling):
                if config.model_type not in FAMILIES:
                    row["not_covered"].append(f"{config.model_type}: not in our table of families")
                    continue
                name = config.model_type
                name = f"{name}, {cls.__name__}" if name in row["parts"] else name
                row["parts"][name] = part_of(cls, examine(cls, modeling, config), ropes_in_words(config))
                covered.add(cls.__name__)
        names = [cls.__name__ for cls in classes(modeling) if _EMBEDDING.search(cls.__name__)]
        row["not_covered"] += [f"{name}: not compared" for name in names if name not in covered]
    for folder, config, modeling in borrowing_configs():
        if folders and folder not in folders:
            continue
        for cls in rotary_classes(modeling):
            row = table.setdefault(folder, dict(parts={}, not_covered=[]))
            row["parts"][config.model_type] = part_of(cls, examine(cls, modeling, config), ropes_in_words(config))
    return dict(sorted(table.items()))


# What a folder does beside the rotation that is compared.
REMARKS = {
    "beam": f"beside the rotation, {FAMILIES['beam'].beyond}",
    "hunyuan_vl": "text; with pictures the two features of a pair read different axes, which is no rotation",
    "mistral_large4": "as initialised; a checkpoint multiplies frequencies by exp(alpha), which is learned",
}

SHARES = ("inv_freq", "rotation", "float32", "bfloat16")  # of what is allowed


def status(folder, row):
    """A folder's status in the table, and a note."""
    if folder in NO_ROTATION:
        return "no rotation", NO_ROTATION[folder]
    compared = [figures for part in row["parts"].values() for figures in part["results"].values()]
    wrong = [
        f"{name}, {variant}: {figures}"
        for name, part in row["parts"].items()
        for variant, figures in part["results"].items()
        if (isinstance(figures, str) and not figures.startswith("refused"))
        or (isinstance(figures, dict) and not max(figures.get(key, 0.0) for key in SHARES) <= 1)
    ]
    if wrong:
        return "different", "; ".join(wrong)
    if row["not_covered"] or not any(isinstance(figures, dict) for figures in compared):
        return "not covered", "; ".join(row["not_covered"]) or "no module is compared, and no reason is given"
    return "same", REMARKS.get(folder, "")


def rounded(figure):
    """Two significant digits."""
    return None if figure is None else float(f"{figure:.1e}")


def summary(table):
    """The committed table: status and compared variants of each folder, and the worst figures."""
    rows, schedules = {}, {}
    for folder, row in table.items():
        word, note = status(folder, row)
        parts = {}
        for name, part in row["parts"].items():
            same = {variant: figures for variant, figures in part["results"].items() if isinstance(figures, dict)}
            apart = {
                column: rounded(max((figures[key] for figures in same.values() if key in figures), default=None))
                for column, key in (("inv_freq", "relative"), ("cos_sin", "apart"))
            }
            parts[name] = dict(module=part["module"], said=part["said"], **apart, variants=list(same))
            for variant, figures in same.items():
                worst = schedules.setdefault(variant, dict(parts=0))
                worst["parts"] += 1
                for key in ("ulp", *SHARES):
                    if key in figures:
                        worst[key] = max(worst.get(key, 0.0), round(figures[key], 2))
        rows[folder] = dict(status=word, note=note, parts=parts)
    return dict(
        date=datetime.date.today().isoformat(),
        versions=dict(transformers=transformers.__version__, torch=torch.__version__, jax=jax.__version__),
        worst=schedules,
        folders=rows,
    )


def as_json(result):
    """The committed table, a folder on each line."""
    head = {key: value for key, value in result.items() if key != "folders"}
    rows = [f"{json.dumps(folder)}: {json.dumps(row)}" for folder, row in result["folders"].items()]
    return json.dumps(head, indent=1)[:-2] + ',\n "folders": {\n' + ",\n".join(rows) + "\n}}\n"


def regressions(new, kept):
    """Everything in the committed table that the new table lacks."""
    lost = []
    for folder, row in kept["folders"].items():
        now = new["folders"].get(folder)
        if now is None:
            lost.append(f"{folder}: is gone")
        elif row["status"] == "same" and now["status"] != "same":
            lost.append(f"{folder}: was the same, is {now['status']}: {now['note']}")
        else:
            for part, kept_part in row["parts"].items():
                names = now["parts"].get(part, dict(variants=[]))["variants"]
                if missing := sorted(set(kept_part["variants"]) - set(names)):
                    lost.append(f"{folder}, {part}: no longer compared: {', '.join(missing)}")
    return lost


def show(result):
    print(f"{'folder':24} {'module':60} {'status':11} {'inv_freq':>8} {'cos, sin':>8}  here")
    for folder, row in result["folders"].items():
        if not row["parts"]:
            print(f"{folder:24} {'':60} {row['status']:11} {'':8} {'':8}  {row['note']}")
        modules = [part["module"] for part in row["parts"].values()]
        for name, part in row["parts"].items():
            figures = ["" if part[key] is None else f"{part[key]:.1e}" for key in ("inv_freq", "cos_sin")]
            module = part["module"]
            if modules.count(module) > 1:
                module = name if name.startswith(module) else f"{module}, {name}"
            print(f"{folder:24} {module:60} {row['status']:11} {figures[0]:>8} {figures[1]:>8}  {part['said']}")
        if row["parts"] and row["note"]:
            print(f"{folder:24} {row['note']}")
    words = [row["status"] for row in result["folders"].values()]
    print(
        f"\n{words.count('same')} of {len(words)} folders the same, {words.count('no rotation')} no rotation, "
        f"{words.count('different')} different, {words.count('not covered')} not covered"
    )
    print(
        "inv_freq: worst relative difference; cos, sin: worst difference, without positions of 99,999 and 100,000"
    )
    print("worst figures, as shares of what is allowed (ulp: of float32, of the frequencies):")
    for name, worst in result["worst"].items():
        print(f"  {name:16}", ", ".join(f"{key} {figure}" for key, figure in worst.items()))


def main():
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    folders = [argument for argument in sys.argv[1:] if argument != "--write"]
    result = summary(census(folders))
    show(result)
    if "--write" in sys.argv:
        TABLE.write_text(as_json(result))
    elif not folders:
        lost = regressions(result, json.loads(TABLE.read_text()))
        if lost:
            sys.exit("\n".join(["worse than the committed table:", *lost]))


if __name__ == "__main__":
    main()
