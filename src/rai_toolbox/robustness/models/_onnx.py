"""Reading an ONNX file, where a converter to torch modules is installed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._text import one_line

__all__ = ["load_onnx"]


def load_onnx(path: Path, device: torch.device) -> nn.Module:
    """Return the model of an ONNX file, converted by the package onnx2pytorch.

    Raises
    ------
    InputError
        If the converter cannot be imported, or cannot convert the model.
    """
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        from onnx2pytorch import ConvertModel  # pyright: ignore[reportMissingImports]
    except Exception as error:  # a torchvision that was built for another torch raises more than ImportError
        raise InputError(
            f"{arg('model')} {str(path)!r}: ONNX files are not supported without onnx2pytorch and a torchvision built"
            f" for this torch ({one_line(error)}): install them, write the model with torch.export.save (.pt2), or"
            " give the function that builds it"
        ) from None
    try:
        model = ConvertModel(onnx.load(path))
    except Exception as error:
        raise InputError(
            f"{arg('model')} {str(path)!r} cannot be converted by onnx2pytorch: {one_line(error)}"
        ) from None
    return model.requires_grad_(False).to(device).eval()
