"""The scripts of configs/, as modules: how does a test get at their functions?"""

import importlib.util
import sys
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name):
    """The script of this name, run anew as a module, which is registered: dataclasses look there for it."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
