"""Reading a TorchScript archive as data.

TorchScript is a language of its own, without files, processes and imports, but for a few operators: a model in it
could save a tensor under any name, map a file into memory or call another process. Its source lies in the archive
as text, so that it is inspected before any of it is compiled; loading alone can run parts of it.

torch deprecates TorchScript and still reads such files; `torch.export` replaces it.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._text import one_line

# Compiled source spells every operator out: a word of these is one that is called, or a user's function of that name.
_REACHES_OUT = re.compile(r"\b(save|from_file|rpc_\w+|dist_\w+|_?c10d\w*|symm_mem|debugprims)\b")
_INSTEAD = "torch deprecates TorchScript: export the model by torch.export.export, and save it by torch.export.save"
# How the compiler writes a part whose name is a number, as those of nn.Sequential are.
_PART = re.compile(r'getattr\(([\w.]+), "(\w+)"\)')


def is_torchscript(names: list[str]) -> bool:
    """Say whether an archive with members of these names is one of `torch.jit.save`."""
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def load_torchscript(path: Path, device: torch.device) -> nn.Module:
    """Return the model of a TorchScript file.

    Raises InputError if it cannot be loaded, or calls an operator that uses files or processes.
    """
    if not hasattr(torch, "jit") or not hasattr(torch.jit, "load"):
        raise InputError(
            f"{arg('model')} {str(path)!r}: torch {torch.__version__} reads no TorchScript files; {_INSTEAD}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            # By entry, not by name: of two entries of one name, another reader may take the other.
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".py")]
            sources = [archive.read(entry).decode("utf-8") for entry in entries]
    except Exception as error:
        raise InputError(
            f"{arg('model')} {str(path)!r} is not an archive of torch.jit.save: {one_line(error)}"
        ) from None
    for source in sources:
        if found := _REACHES_OUT.search(source) or re.search(r"\bgetattr\b", _spelled_out(source)):
            raise InputError(
                f"{arg('model')} {str(path)!r} calls {found[0]!r}: a model file must not use files or"
                f" processes; give the model as a function, {arg('model', 'file.py:function')}"
            )
    try:
        with warnings.catch_warnings():
            # The docs say that TorchScript is deprecated. torch warns of it, in one category or the other.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(path, map_location=device).eval()
    except Exception as error:
        raise InputError(
            f"{arg('model')} {str(path)!r} cannot be loaded by torch.jit.load ({_INSTEAD}): {one_line(error)}"
        ) from None


def _spelled_out(source: str) -> str:
    """Return the source with ``getattr(self, "0")`` as ``self._0``: any other `getattr` could hide what it gets."""
    while (simpler := _PART.sub(r"\1._\2", source)) != source:
        source = simpler
    return source
