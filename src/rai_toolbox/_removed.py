"""Modules that the older package had and this one has not: their import says where to read on."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_INSTEAD = {
    "mushin": "training and its workflows are those of Lightning, or of whatever you train with",
    "losses": "rai_toolbox.perturbations.losses has the losses of the solvers; torch.nn.functional has kl_div",
    "augmentations": "torchvision.transforms.v2 has augmentations",
    "datasets": "torchvision.datasets has the data sets",
}


class _Removed(MetaPathFinder):
    """Asked last, for modules that nobody else has found."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == "rai_toolbox" and name in _INSTEAD:
            # No ModuleNotFoundError: ``from rai_toolbox import mushin`` would lose its message.
            raise ImportError(
                f"{fullname} of rai-toolbox 0.2 and 0.3 is not in this package: {_INSTEAD[name]};"
                ' see docs/migration.md, "From rai-toolbox 0.2 and 0.3"',
                name=fullname,
            )
        return None


def tell_of_removed_modules() -> None:
    """Let the import of such a module raise an `ImportError` that points to the page on migration."""
    if not any(type(finder).__name__ == _Removed.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_Removed())
