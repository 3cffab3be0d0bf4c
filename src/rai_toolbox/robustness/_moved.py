"""The paths that private modules had before the rooms, for code that imports them from there."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_ROOMS = {
    "data": ("_npz", "_rows", "_samples", "_tables"),
    "models": ("_digits", "_exported", "_onnx", "_torchscript"),
    "attack": ("_blackbox", "_grid", "_settings", "_stages"),
    "session": ("_journal", "_team"),
    "checks": ("_checks", "_model_checks", "_search_checks"),
    "report": ("_compare", "_pictures", "_report", "_writing"),
    "run": ("_assembly", "_curves", "_preparation", "_run"),
    "command": ("_config", "_console", "_job"),
}
_PACKAGE = "rai_toolbox.robustness"
_PATHS = {name: f"{_PACKAGE}.{room}.{name}" for room, names in _ROOMS.items() for name in names}


def keep_old_paths() -> None:
    """Let ``import rai_toolbox.robustness._x`` and ``from rai_toolbox.robustness import _x`` find a module."""
    loaded = {name: path for name, path in _PATHS.items() if path in sys.modules}
    sys.modules.update({f"{_PACKAGE}.{name}": sys.modules[path] for name, path in loaded.items()})
    vars(sys.modules[_PACKAGE])["__getattr__"] = _attribute


def _attribute(name: str) -> ModuleType:
    if name in _PATHS:
        return importlib.import_module(_PATHS[name])
    raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
