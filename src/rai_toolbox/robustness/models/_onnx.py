"""Read an ONNX file with a converter to torch modules, where one is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rai_toolbox._extras import install_command
from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._text import one_line
from rai_toolbox.robustness.models._fixed_batch import FixedBatch

_PACKAGES = "onnx", "onnx2pytorch"
_INSTEAD = "or write the model with torch.export.save (.pt2), or give the function that builds it"


def load_onnx(path: Path, device: torch.device) -> nn.Module:
    """Return the model of an ONNX file, converted by the package onnx2pytorch.

    Raises InputError if the converter cannot be imported, or cannot convert the model.
    """
    begin = f"{arg('model')} {str(path)!r}: ONNX files are not supported without"
    try:
        onnx, converter = (importlib.import_module(name) for name in _PACKAGES)
    except Exception as error:  # a torchvision that was built for another torch raises more than ImportError
        if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
            raise InputError(f"{begin} onnx2pytorch and onnx: {install_command('onnx')}, {_INSTEAD}") from None
        raise InputError(
            f"{begin} what onnx2pytorch itself imports: it is installed, but importing it raised {one_line(error)};"
            f" mostly torchvision is missing or built for another torch: install the one that belongs to torch"
            f" {torch.__version__}, {_INSTEAD}"
        ) from None
    try:
        graph = onnx.load(path)
        model = converter.ConvertModel(graph)
    except Exception as error:
        raise InputError(
            f"{arg('model')} {str(path)!r} cannot be converted by onnx2pytorch: {one_line(error)}"
        ) from None
    model = model.requires_grad_(False).eval()
    return _of_any_batch(model, _input_shape(graph)).to(device)


def _input_shape(graph: Any) -> list[int]:
    """Return the shape of the one input, 0 where a dimension is free; nothing where there is not one input."""
    try:
        constants = {weights.name for weights in graph.graph.initializer}
        (data,) = (one for one in graph.graph.input if one.name not in constants)
        return [dim.dim_value for dim in data.type.tensor_type.shape.dim]
    except (AttributeError, ValueError):
        return []


def _of_any_batch(model: nn.Module, shape: list[int]) -> nn.Module:
    """Return a model that takes any batch: itself, if it does although its file names one size."""
    if len(shape) < 2 or not all(shape):
        return model
    fixed = FixedBatch(model, shape[0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = torch.rand(2 * shape[0] + 1, *shape[1:])
        try:
            any_size = torch.allclose(model(x), fixed(x), rtol=1e-3, atol=1e-5)
        except Exception:
            any_size = False
    return model if any_size else fixed
