"""The names of each public package for docs/_templates/autosummary/package.rst, read from the package's ``__all__``."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.pycode import ModuleAnalyzer

PACKAGES = tuple(
    f"delfast{name}"
    for name in ("", ".localization", ".compaction", ".unlearning", ".evaluation", ".optim", ".jobs", ".ledger")
)


def names(package: str) -> dict[str, Any]:
    """Return the public names of a package by kind.

    ``functions``, ``classes``: those that are described with this package. ``elsewhere``: those that ``delfast``
    itself has, where they are described. ``data``: each documented constant, by the module that documents it.
    """
    module = importlib.import_module(package)
    values = {name: getattr(module, name) for name in module.__all__ if not name.startswith("__")}
    objects = [name for name, value in values.items() if getattr(value, "__module__", "").startswith("delfast")]
    top = () if package == "delfast" else importlib.import_module("delfast").__all__
    rest = [name for name, value in values.items() if name not in objects and not isinstance(value, ModuleType)]
    own = [name for name in objects if name not in top]
    return {
        "functions": [name for name in own if not isinstance(values[name], type)],
        "classes": [name for name in own if isinstance(values[name], type)],
        "elsewhere": [name for name in objects if name in top],
        "data": [found for name in rest if name not in top for found in _documented(name)],
    }


def _documented(name: str) -> list[str]:
    """Return the qualified name of a constant in the module that documents it."""
    modules = [
        name
        for name, module in sorted(sys.modules.items())
        if name.startswith("delfast.") and str(getattr(module, "__file__", "")).endswith(".py")
    ]
    return [f"{m}.{name}" for m in modules if ("", name) in ModuleAnalyzer.for_module(m).find_attr_docs()][:1]


def provide(app: Sphinx, config: Config) -> None:
    """Give the templates of autosummary the names of each package as ``public``."""
    config.autosummary_context["public"] = {package: names(package) for package in PACKAGES}


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the event."""
    app.connect("config-inited", provide)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
