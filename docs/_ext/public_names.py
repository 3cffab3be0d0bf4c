"""Fail the build when a public name, one in `__all__` of a module, has no page or no example on it.

Also lets docstrings write shapes as (*batch, *datum), where reStructuredText would begin an emphasis.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
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
            if module_name in app.config.modules_with_examples and not _has_example(getattr(module, name)):
                logger.warning("%s.%s is public and its docstring has no example", module_name, name)


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:  # a method: its module is a class
        return None


def _has_example(value: Any) -> bool:
    # A dataclass is what a function with an example returns.
    return dataclasses.is_dataclass(value) or "\n>>> " in re.sub("^ +", "", value.__doc__ or "", flags=re.MULTILINE)


def escape_shapes(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [re.sub(r"(?<=[( ])\*(?=(?:batch|datum)\b)", r"\\*", line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("public_modules", [], "env", [list])
    app.add_config_value("modules_with_examples", [], "env", [list])
    app.connect("autodoc-process-docstring", escape_shapes, priority=100)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
