"""Names of user code: `file.py:function` and `package.module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._text import did_you_mean, one_line


def names_function(spec: str) -> bool:
    """Say whether `spec` has the form ``file.py:function`` or ``package.module:function``."""
    module, colon, name = spec.rpartition(":")
    # C:\model.pt is a file, and so is anything with a slash but no .py before the colon.
    return bool(colon and name.isidentifier() and (module.endswith(".py") or _is_dotted(module)))


def import_named(spec: str, what: str) -> Any:
    """Return the object that ``file.py:name`` or ``package.module:name`` names.

    spec: where to find it.
    what: the beginning of the error: ``arg("model")``.

    Raises InputError if there is no such file or name, or importing it raises.
    """
    source, _, name = spec.rpartition(":")
    module = _import_file(Path(source), what) if source.endswith(".py") else _import_module(source, what)
    try:
        return getattr(module, name)
    except AttributeError:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{what}: {source!r} has no function {name!r}{did_you_mean(name, public)}") from None


def call_named(spec: str, what: str) -> Any:
    """Call the named function without arguments and return its result; return any other object as it is."""
    made = import_named(spec, what)
    if isinstance(made, type) or (callable(made) and hasattr(made, "__code__")):
        return guarded(made, f"{what}: {spec}() raised")
    return made


def guarded(function: Callable[[], Any], message: str) -> Any:
    """Call user code; what it raises becomes one line that quotes it.

    `SystemExit` too: a script that ends itself must not end the evaluation, least of all as if all were well.
    """
    try:
        return function()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{message} {one_line(error)}") from error


def _is_dotted(module: str) -> bool:
    return bool(module) and all(part.isidentifier() for part in module.split("."))


def _import_file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise InputError(f"{what}: there is no file {str(path)!r}")
    # Found again under this name by pickle and by dataclasses; the path keeps two files of one name apart.
    name = f"_rai_toolbox_user_{path.stem}_{abs(hash(str(path.resolve())))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{what}: {str(path)!r} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        # As if it were run as a script: also for what its functions import when they are called.
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"{what}: importing {str(path)!r} raised {one_line(error)}{_advice(error)}") from error
    return module


def _import_module(name: str, what: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(f"{what}: there is no module {name!r} in {os.getcwd()!r} or among the installed") from None
        raise InputError(f"{what}: importing {name!r} raised {one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: importing {name!r} raised {one_line(error)}{_advice(error)}") from error


def _advice(error: BaseException) -> str:
    if not isinstance(error, SystemExit):
        return ""
    return "; put what runs as a script under if __name__ == '__main__'"
