"""Writes part_types.py and class_defaults.py of rope_jax/interop: what transformers' config classes fill in. Needs torch and transformers.

python tests/golden/make_class_defaults.py

A part of a larger model, such as ``text_config``, is written without the values that equal its class's defaults.
"""

import importlib
import inspect
import itertools
import logging
import re
import textwrap
import warnings
from pathlib import Path

PARTS = ("text_config", "vision_config", "audio_config")


def config_classes():
    """Every config class of transformers."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    for file in sorted(root.glob("*/configuration_*.py")):
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for thing in vars(module).values():
            config = inspect.isclass(thing) and issubclass(thing, transformers.PretrainedConfig)
            if config and thing.__module__ == module.__name__ and thing.model_type:
                yield thing


def part_type(cls, part):
    """The model type of a part whose file names none; None if the class needs a name."""
    for given in ({part: {}}, {}):
        try:
            found = getattr(cls(**given), part)
        except Exception:
            continue
        if found is not None and found.model_type:
            return found.model_type
    return None


SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


def defaults_of(cls, family):
    """The four sizes of a class, and what else its family cannot do without."""
    config = cls()
    values = config.to_dict()

    def value(key):
        return values[key] if key in values else getattr(config, key, None)

    more = {"original_max_position_embeddings": value("original_max_position_embeddings")}
    if family.latent or "head_dim" in family.keys:
        more[family.key("head_dim")] = value(family.key("head_dim"))
    if family.explicit or (family.nested and not family.bases):
        more["rope_parameters"] = value("rope_parameters")
    if (family.nested or family.layers in ("sliding", "sliding_if_any")) and family.full_every is None:
        more["layer_types"] = value("layer_types")
    return tuple(value(family.key(key)) for key in SIZES), {k: v for k, v in more.items() if v is not None}


def has_a_rotation(cls):
    """Whether the code of a class's folder speaks of a rotation."""
    root = Path(inspect.getfile(cls)).parent
    files = list(root.glob("modeling_*.py"))
    word = re.compile(r"[Rr]otary|\b[Rr]ope|_rope|RoPE|freqs_c|rotate_half")
    return not files or any(word.search(file.read_text()) for file in files)


def shown(key, value):
    """A value as Python; a periodic list as a period."""
    if key != "layer_types":
        return repr(value)
    periods = (p for p in range(1, len(value) // 2 + 1) if (value[:p] * len(value))[: len(value)] == value)
    period = next(periods, len(value))
    times = -(-len(value) // period)
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(value[:period])]
    text = ", ".join(f"*[{kind!r}] * {n}" if n > 1 else repr(kind) for kind, n in runs)
    text = f"[{text}] * {times}" if times > 1 else f"[{text}]"
    return f"({text})[:{len(value)}]" if len(value) % period else text


def lines(table):
    """The entries of a table, sorted; dictionaries with their periodic lists shortened."""

    def entry(value):
        if not isinstance(value, dict):
            return repr(value)
        return "{" + ", ".join(f"{key!r}: {shown(key, inner)}" for key, inner in value.items()) + "}"

    text = " ".join(f"{name!r}: {entry(value)}," for name, value in sorted(table.items())).replace("'", '"')
    return "\n".join(f"    {line}" for line in textwrap.wrap(text, 112, break_on_hyphens=False))


def main():
    import transformers

    from rope_jax.interop.families import FAMILIES

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    whole, sizes, more, without = {}, {}, {}, set()
    for cls in config_classes():
        parts = {part: part_type(cls, part) for part in PARTS if part in cls.sub_configs}
        parts = {part: kind for part, kind in parts.items() if kind is not None}
        if parts and cls.model_type not in whole:
            whole[cls.model_type] = parts
        alone = cls.model_type not in FAMILIES and not cls.sub_configs and cls.model_type != "timm_wrapper"
        if alone and not has_a_rotation(cls):  # timm has towers that rotate
            without.add(cls.model_type)
        if cls.model_type in FAMILIES and cls.model_type not in sizes:
            sizes[cls.model_type], more[cls.model_type] = defaults_of(cls, FAMILIES[cls.model_type])
    source = f"Written by tests/golden/make_class_defaults.py, from transformers {transformers.__version__}."
    part_types = f'''"""Names the class of each part of a model, and the models without a rotation.

{source}
"""

# fmt: off
# From the model type of a whole model to the types of its parts.
PART_TYPES: dict[str, dict[str, str]] = {{
{lines(whole)}
}}

_WITHOUT = """
{chr(10).join(textwrap.wrap(" ".join(sorted(without)), 112, break_on_hyphens=False))}
"""
# Model types whose code has no rotation.
WITHOUT_ROTATION = frozenset(_WITHOUT.split())
'''
    class_defaults = f'''"""The defaults of config classes, which a part's file leaves out.

{source}
"""

from typing import Any

# fmt: off
# {", ".join(SIZES)}.
CLASS_SIZES: dict[str, tuple[int | None, ...]] = {{
{lines({name: values for name, values in sizes.items() if any(values)})}
}}

# More of them, where a family cannot do without.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {{
{lines({name: values for name, values in more.items() if values})}
}}
'''
    folder = Path(__file__).parents[2] / "rope_jax" / "interop"
    (folder / "part_types.py").write_text(part_types)
    (folder / "class_defaults.py").write_text(class_defaults)


if __name__ == "__main__":
    main()
