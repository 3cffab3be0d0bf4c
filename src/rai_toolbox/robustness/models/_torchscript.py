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
from typing import Any

import torch
from torch import nn

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._text import one_line
from rai_toolbox.robustness.models._exported import training_mode_refusal

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

    Raises InputError if it cannot be loaded, calls an operator that uses files or processes, or was traced in training
    mode with batch norm.
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
            model = torch.jit.load(path, map_location=device).eval()
            traced_in_training = _uses_statistics_of_the_batch(model)
    except Exception as error:
        raise InputError(
            f"{arg('model')} {str(path)!r} cannot be loaded by torch.jit.load ({_INSTEAD}): {one_line(error)}"
        ) from None
    if traced_in_training:
        raise training_mode_refusal(path, "torch.jit.trace")
    return model


def _uses_statistics_of_the_batch(model: torch.jit.ScriptModule) -> bool:
    """Say whether a batch norm has running statistics and was traced not to use them. A scripted one heeds `eval`."""
    graph: Any = model.inlined_graph  # held: without it, its nodes are no more
    inputs = [list(node.inputs()) for node in graph.findAllNodes("aten::batch_norm")]
    return any(given[5].toIValue() is True and given[3].type().kind() != "NoneType" for given in inputs)


def _spelled_out(source: str) -> str:
    """Return the source with ``getattr(self, "0")`` as ``self._0``: any other `getattr` could hide what it gets."""
    while (simpler := _PART.sub(r"\1._\2", source)) != source:
        source = simpler
    return source
