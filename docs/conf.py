"""Settings of the documentation site. `make docs` builds it with warnings as errors."""

import re
import shutil
import urllib.request
from pathlib import Path

from sphinx.util import inspect
from sphinx.util.nodes import make_refnode

import rope_jax

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "rope_jax"
author = "the rope_jax authors"
release = version = rope_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "results/tables"]

# Pages are MyST Markdown. Notebooks keep the outputs that are stored in them.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# The notebooks lie beside docs/, so that the tests and readers of the repository find them.
NOTEBOOKS = HERE / "notebooks"
NOTEBOOKS.mkdir(exist_ok=True)
for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
    copy = NOTEBOOKS / notebook.name
    if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
        shutil.copyfile(notebook, copy)

# Docstrings.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 96
add_module_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# References from docstrings that no page documents are errors; names of other libraries are resolved if their
# inventories can be fetched.
nitpicky = True
OTHERS = "jax|flax|nnx|linen|nn|numpy|np|chex|gguf|transformers|fractions|dataclasses"
nitpick_ignore_regex = [(r"py:.*", rf"({OTHERS}|Slots)(\..*)?")]


def reachable(url: str) -> bool:
    """Whether the inventory of another site can be fetched: a build without network must pass as well."""
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=3) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


SITES = {
    "jax": "https://docs.jax.dev/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
}
intersphinx_mapping = {name: (url, None) for name, url in SITES.items() if reachable(url)}
intersphinx_timeout = 5

# Look.
html_theme = "sphinx_book_theme"
html_title = "rope_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "navbar_persistent": [],
}


# Headings such as "Args, masking:" group the arguments of a long list. napoleon knows headings of letters and
# spaces alone, so that each group passes through napoleon under a number.
GROUP = re.compile(r"^( *)((?:Args|Attributes)(?:, .*)?):$")
napoleon_custom_sections = [(f"Group {i}", "params_style") for i in range(10)]


def number_groups(app, what, name, obj, options, lines):
    """Before napoleon: gives each group of arguments a number. Hides one-line docstrings of properties, where
    napoleon would read text before a colon as a type."""
    app.groups = []
    app.hidden = lines[:] if what == "property" else None
    if app.hidden is not None:
        lines.clear()
    for i, line in enumerate(lines):
        # "n: N." would be an enumerated list.
        line = lines[i] = re.sub(r"^( +\w+: [A-Z])\.$", r"\1", line)
        if group := GROUP.match(line):
            lines[i] = f"{group[1]}Group {len(app.groups)}:"
            app.groups.append(group[2])


def name_groups(app, what, name, obj, options, lines):
    """After napoleon: gives the groups their headings back."""
    if app.hidden is not None:
        lines[:] = app.hidden
    for i, line in enumerate(lines):
        if group := re.match(r":Group (\d+):", line):
            # A name of a field holds no roles, and no colon before a space.
            heading = re.sub(r":func:`(\w+)`", r"\1", app.groups[int(group[1])]).replace(
                ": ", "\\: "
            )
            lines[i] = line.replace(group[0], f":{heading}:")


def shorten_signature(app, what, name, obj, options, signature, returned):
    """Shows the fields of NNX modules, without the fields that Flax adds to every module, without addresses. Hides
    the fields of a plan."""
    if signature is None:
        return None
    if name == "rope_jax.attention.Plan":  # made by `make_plan`; its fields follow
        return "", returned
    if what == "class" and signature == "(*args, **kwargs)":  # of the metaclass of NNX
        full = inspect.signature(obj.__init__, bound_method=True)
        signature = inspect.stringify_signature(full, show_annotation=False)
    signature = re.sub(r", parent=<[^>]*>, name=None", "", signature)
    signature = re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1", signature)
    signature = re.sub(r"<function (?:[^<>]|<locals>)*>", "...", signature)
    return signature.replace("<PjitFunction of ...>", "..."), returned


def resolve_short_name(app, env, node, contnode):
    """Finds a public name by its last parts: docstrings say ``Rope`` and ``KVCache.write``, and
    ``rope_jax.attention.KVCache`` is documented as ``rope_jax.KVCache``."""
    if node.get("refdomain") != "py":
        return None
    storeys = {"rope_jax", "core", "attention", "models", "generation", "interop"}
    parts = node["reftarget"].lstrip(".").split(".")
    while len(parts) > 1 and parts[0] in storeys:
        parts = parts[1:]
    python = env.get_domain("py")
    here = node.get("py:module") or "rope_jax"
    found = [name for name in python.objects if name.split(".")[-len(parts) :] == parts]
    if not found:
        return None
    # A name of the same storey first, then a linen module before an NNX module.
    name = min(
        found,
        key=lambda name: (not name.startswith(f"{here}."), ".nnx." in name, len(name)),
    )
    target = python.objects[name]
    builder, page = app.builder, node.get("refdoc", "")
    return make_refnode(builder, page, target.docname, target.node_id, contnode)


def setup(app):
    app.connect("autodoc-process-docstring", number_groups, priority=400)
    app.connect("autodoc-process-docstring", name_groups, priority=600)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("missing-reference", resolve_short_name)
