"""Fail the build when a public name has no page: a name in `__all__` of a module in `public_modules`."""

from __future__ import annotations

import importlib
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)


def check(app: Sphinx, env: BuildEnvironment) -> None:
    documented = set(env.get_domain("py").objects)  # pyright: ignore[reportAttributeAccessIssue]
    shown = [value for name in documented if (value := _resolve(name)) is not None]
    for module_name in app.config.public_modules:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            if name.startswith("__") or f"{module_name}.{name}" in documented:
                continue
            # A name that two modules export has its page under one of them.
            if not any(value is getattr(module, name) for value in shown):
                logger.warning("%s.%s is public and has no page: add it to docs/reference", module_name, name)


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:  # a method: its module is a class
        return None


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("public_modules", [], "env", [list])
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
