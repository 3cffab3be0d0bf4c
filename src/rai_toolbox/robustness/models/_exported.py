"""Reading a `torch.export` archive as data.

`torch.export.load` unpickles parts of the archive without ``weights_only``, parses strings of it with sympy,
which evaluates them, and turns names of it into Python source. An archive that came from `torch.export.save`
of a plain model needs none of that, so this file inspects an archive first, and
anything else is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._files import check_unpacked_size
from rai_toolbox.robustness._text import one_line
from rai_toolbox.robustness.models._fixed_batch import FixedBatch

_TARGET = re.compile(
    # All of aten computes, but for what maps a file.
    r"torch\.ops\.aten\.(?!from_file\b|save\b)_?[a-z]\w*(\.\w+)?"
    r"|torch\.ops\.(prim|prims|quantized|quantized_decomposed)\.[a-z]\w*(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|flex_attention|invoke_subgraph"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast|autograd_function_apply)(\.\w+)?"
    r"|torch\.sym_\w+|math\.[a-z]\w*"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|lt|le|gt|ge|eq|ne|and_|or_|not_|xor)"
)
_NAME = re.compile(r"[\w.]*")
# Arithmetic of symbols and of sympy's (capitalized) functions: no quotes, no dots after a name, no dunder.
_SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)")
_EXPRESSION = re.compile(r"(?!.*__)(?!.*\b[a-z_]\w*\s*\()(?!.*[A-Za-z_)]\s*\.)[\w\s+\-*/%(),.<>=!&|~]*")


class _Exported(nn.Module):
    """Calls an exported program, whose own `eval` and `train` raise."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        # In a tuple it is no submodule, so that eval() does not reach it.
        self._program = (program,)

    def forward(self, x: torch.Tensor) -> Any:
        return self._program[0](x)


def load_exported(path: Path, device: torch.device) -> nn.Module:
    """Return the model of a .pt2 file written by `torch.export.save`.

    Raises InputError if it is no such file, holds more than a model's graph and tensors, or was exported in training
    mode with batch norm.
    """
    _refuse_code(path)
    try:
        with warnings.catch_warnings(), _quiet(logging.getLogger("torch._export.serde.serialize")):
            # Of torch 2.6 to 2.9: on constants that it finds or makes, and on memory that it does not write to.
            warnings.simplefilter("ignore", UserWarning)
            program = torch.export.load(path)
            if device != torch.device("cpu"):
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
            module = _module_of(program)
        size = _fixed_size(program)
    except Exception as error:
        raise InputError(
            f"{arg('model')} {str(path)!r} cannot be loaded by torch.export.load: {one_line(error)}"
        ) from None
    if _uses_statistics_of_the_batch(program):
        raise training_mode_refusal(path, "torch.export.export")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    model = _Exported(module)
    return model if size is None else FixedBatch(model, size)


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Hold back its warnings: on names of sizes that a decomposed program does not use."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def training_mode_refusal(path: Path, export: str) -> InputError:
    """Return the error for a model file that was made by a call of `export` in training mode."""
    return InputError(
        f"{arg('model')} {str(path)!r} was exported in training mode: its batch norm takes mean and variance of the"
        f" samples at hand, not the stored ones; call model.eval() before {export}"
    )


def _uses_statistics_of_the_batch(program: torch.export.ExportedProgram) -> bool:
    """Say whether a normalization has running statistics and does not use them. (Without, eval mode is the same.)"""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            schema = getattr(node.target, "_schema", None)
            if node.op != "call_function" or schema is None:
                continue
            given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
            if given.get("running_mean") is not None and (given.get("training") or given.get("use_input_stats")):
                return True
    return False


def _fixed_size(program: torch.export.ExportedProgram) -> int | None:
    """Return the one batch size that a program takes, None if it takes any: an export is of one unless told."""
    names = program.graph_signature.user_inputs
    found = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(found) != 1 or not isinstance(found[0], torch.Tensor) or found[0].ndim < 1:
        return None
    size = found[0].shape[0]
    return size if type(size) is int and size > 0 else None


def _module_of(program: torch.export.ExportedProgram) -> nn.Module:
    # Its guards are source text; a wrong shape is told by the operators. torch below 2.9 has none.
    guards = "check_guards" in inspect.signature(program.module).parameters
    return program.module(check_guards=False) if guards else program.module()


def _refuse_code(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            check_unpacked_size(archive, path)
            # By entry, not by name: of two entries of one name, another reader may take the other.
            for entry in archive.infolist():
                name = entry.filename
                if name.endswith(".json"):
                    _check_json(path, name, json.loads(archive.read(entry)))
                elif name.endswith(".pt"):
                    _check_tensors(path, name, archive.read(entry))
                elif name.endswith((".so", ".py", ".pyc", ".pkl", ".cpp")) or "aotinductor" in name:
                    raise _refusal(path, f"{name!r}, which is code")
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{arg('model')} {str(path)!r} is not an archive of torch.export.save: {one_line(error)}"
        ) from None


def _check_tensors(path: Path, name: str, content: bytes) -> None:
    if content:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:
            raise _refusal(path, f"a pickle, {name!r}") from None


def _check_json(path: Path, name: str, content: Any) -> None:
    for key, value in _pairs(content):
        if key == "use_pickle" and value:
            raise _refusal(path, f"pickled tensors in {name!r}")
        if not isinstance(value, str):
            continue
        if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", value):
            raise _refusal(path, f"the object {value!r} in {name!r}")
        # Other targets are names of the archive's own parameters and buffers.
        if key == "target" and value.startswith(("torch", "_operator", "math", "#")) and not _TARGET.fullmatch(value):
            raise _refusal(path, f"a call of {value!r}")
        if key == "expr_str" and not _EXPRESSION.fullmatch(_SYMBOL.sub("s", value)):
            raise _refusal(path, f"the expression {value[:60]!r}")
        if key in ("name", "as_name", "graph_name") and not _NAME.fullmatch(value):
            raise _refusal(path, f"the name {value[:60]!r}")


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _pairs(value)
    elif isinstance(content, list):
        for value in content:
            yield from _pairs(value)


def _refusal(path: Path, what: str) -> InputError:
    return InputError(
        f"{arg('model')} {str(path)!r} holds {what}: a model file may hold a graph and tensors only, because reading"
        " more could run code;"
        f" give the model as a function, {arg('model', 'file.py:function')}"
    )
