"""Config files: TOML, or YAML where PyYAML is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rai_toolbox.robustness._errors import InputError

_LARGEST = 2**20


def read_config(path: Path) -> dict[str, Any]:
    """Return the entries of a .toml, .yaml or .yml file.

    Raises InputError if there is none or it cannot be read.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"--config: cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _LARGEST:
        raise InputError(f"--config: {str(path)!r} has {len(content)} bytes, which is too long for a config file")
    parse = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml}.get(path.suffix.lower())
    if parse is None:
        raise InputError(f"--config: {str(path)!r} must be a .toml or a .yaml file")
    try:
        entries = parse(content.decode("utf-8"))
    except InputError:
        raise
    except Exception as error:  # RecursionError and others beside the parsers' own
        raise InputError(f"--config: {str(path)!r} cannot be parsed: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise InputError(f'--config: {str(path)!r} must hold entries such as model = "digits"')
    return entries


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise InputError("--config: reading YAML needs PyYAML: pip install pyyaml, or write TOML") from None
    return yaml.safe_load(text)


def to_toml(entries: Mapping[str, Any]) -> str:
    """Return flat entries as TOML."""
    return "".join(f"{name} = {_value(value)}\n" for name, value in entries.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL and for pairs of surrogates.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return repr(value)
