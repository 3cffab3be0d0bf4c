"""How to install what a message of this package asks for: one of the extras of `pyproject.toml`."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """Return the command that installs the package with an extra; it is installed from a clone, as the README says.

    Examples
    --------
    >>> from rai_toolbox._extras import install_command
    >>> install_command("cli")
    "in a clone of this project, pip install '.[cli]'"
    """
    return f"in a clone of this project, pip install '.[{extra}]'"
