"""Load the model that `--model`, `--weights` and `--preprocess` name."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._files import check_unpacked_size
from rai_toolbox.robustness._imports import call_named, guarded, import_named, names_function
from rai_toolbox.robustness._text import one_line
from rai_toolbox.robustness.models._digits import digits_model
from rai_toolbox.robustness.models._exported import load_exported
from rai_toolbox.robustness.models._maite import held_module
from rai_toolbox.robustness.models._onnx import load_onnx
from rai_toolbox.robustness.models._torchscript import is_torchscript, load_torchscript

_FORMS = (
    "give file.py:function or package.module:function that returns an nn.Module, a .pt2 file of torch.export.save,"
    " a TorchScript file, or digits"
)


class Evaluated(nn.Module):
    """The model as the evaluation calls it: preprocessing inside, a checked output, and a count of the
    samples that went through.

    model: from a batch of inputs to logits, (N, classes), (N, 1) or (N,); or to predicted values, (N, outputs) or (N,).
    preprocess: applied to the inputs first, so that epsilon is in the units of the data.
    output: which part of what the model returns are the logits; see `logits_of`.
    """

    def __init__(
        self,
        model: Callable[[torch.Tensor], Any],
        preprocess: Callable[[torch.Tensor], torch.Tensor] | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__()
        self.output = output
        self.model = model
        self.preprocess = preprocess
        self.forwards = 0
        #: Whether the model gets inputs that ask for no gradient: one that leaves torch can take no other.
        self.detached = False
        #: Called before each call of the model.
        self.called: Callable[[], None] | None = None
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        #: The dtype of the model, and of its inputs.
        self.dtype = floating[0].dtype if floating else torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += len(x)
        if self.called is not None:
            self.called()
        # A copy, not a leaf: a model may work in place on its input.
        x = x.detach().clone() if self.detached else x.clone()
        inputs = x if self.preprocess is None else self.preprocess(x)
        output = logits_of(self.model(inputs), self.output)
        if output.ndim == 1 and len(output) == len(x):
            output = output[:, None]
        if output.ndim != 2 or len(output) != len(x) or output.shape[1] == 0:
            raise InputError(
                f"the model's output has shape {tuple(output.shape)} for a batch of {len(x)} inputs of shape"
                f" {tuple(x.shape[1:])}; expected ({len(x)}, classes)"
            )
        if not output.is_floating_point():
            raise InputError(
                f"the model's output has dtype {output.dtype}, expected floating-point logits, before any argmax"
            )
        return output

    def outputs_for(self, x: torch.Tensor) -> int:
        """Return how many outputs the model has, tried on a batch.

        Raises InputError if the model raises, or its output cannot be used.
        """
        with torch.no_grad():
            channels_last = x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)
            order = "; images have their channels first here: x.transpose(0, 3, 1, 2)" if channels_last else ""
            message = f"the model cannot take a batch of shape {tuple(x.shape)} and dtype {x.dtype}{order}: it raised"
            return guarded(lambda: self(x), message).shape[1]


def load_model(
    spec: str, *, weights: str | None = None, device: torch.device | str = "cpu", seed: int = 0
) -> nn.Module | Callable[[torch.Tensor], Any]:
    """Return the model that `spec` names, on `device`, in eval mode.

    Parameters
    ----------
    spec : str
        ``"digits"``; ``file.py:function`` or ``package.module:function`` that returns an `nn.Module`; a .pt2 file of
        `torch.export.save`; a TorchScript file, which torch deprecates in favor of `torch.export`; an ONNX file, where
        onnx2pytorch is installed.
    weights : str, optional
        A .safetensors file, or a state dict of `torch.save`, to load into the model of the function.
    device : torch.device or str
        Where it goes.
    seed : int
        Which of the built-in models; also the random state that a function which makes weights finds.

    Raises
    ------
    InputError
        If there is no such model, or it cannot be used.
    """
    device = torch.device(device)
    if spec == "digits":
        model: Any = digits_model(seed)
    elif names_function(spec):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = call_named(spec, arg("model"))
        if not callable(model):
            raise InputError(f"{arg('model')} {spec} returned {type(model).__name__}, expected an nn.Module")
    else:
        if weights is not None:
            raise InputError(
                f"{arg('weights')} goes with a function that builds the model: {arg('model', 'file.py:function')}"
            )
        return _load_file(spec, device)
    if weights is not None:
        _load_weights(model, weights)
    module = held_module(model)
    if isinstance(module, nn.Module):
        # In place: a MAITE model goes on holding it.
        module.requires_grad_(False).to(device).eval()
    return model


def logits_of(output: Any, part: str | None = None) -> torch.Tensor:
    """Return the logits in what a model returned: a tensor, or the part of that name or number.

    Without a name, ``logits`` is looked for, as the outputs of transformers have it.
    """
    name = "logits" if part is None else part
    if isinstance(output, torch.Tensor) and part is None:
        return output
    if isinstance(output, Mapping):
        found, parts = output.get(name), list(output)
    elif isinstance(output, tuple | list) and not hasattr(output, name):
        numbered = name.lstrip("-").isdigit() and -len(output) <= int(name) < len(output)
        found, parts = output[int(name)] if numbered else None, list(map(str, range(len(output))))
    else:
        found = getattr(output, name, None)
        parts = [key for key, value in getattr(output, "__dict__", {}).items() if isinstance(value, torch.Tensor)]
    if isinstance(found, torch.Tensor):
        return found
    which = f"; its parts are {', '.join(map(str, parts[:8]))}" if parts else ""
    if part is None:
        raise InputError(
            f"the model returned {type(output).__name__}, expected a tensor of logits{which}: name the part,"
            f" {arg('output', 'PART')}, or wrap the model in a function that picks the logits"
        )
    raise InputError(
        f"{arg('output')} {part!r}: what the model returned, {type(output).__name__}, has no such tensor{which}"
    )


# Means and deviations of the channels of the training images, in [0, 1], as torchvision's and timm's models have them.
_KNOWN_STATISTICS = {
    "imagenet": "normalize:0.485,0.456,0.406/0.229,0.224,0.225",
    "cifar10": "normalize:0.4914,0.4822,0.4465/0.2470,0.2435,0.2616",
}

# A resized image may leave [0, 1] by a little.
_OUTSIDE = 0.5


def load_preprocess(spec: str, device: torch.device | str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the preprocessing that `spec` names: ``normalize:MEAN/STD``, one number each or one per
    channel, ``imagenet`` or ``cifar10`` for those of a data set, or a function of a batch.
    """
    known = spec if spec in _KNOWN_STATISTICS else None
    spec = _KNOWN_STATISTICS.get(spec, spec)
    if spec.startswith("normalize:"):
        try:
            mean, std = (
                torch.tensor([float(word) for word in part.split(",")])
                for part in spec.removeprefix("normalize:").split("/")
            )
        except ValueError:
            raise InputError(
                f"{arg('preprocess')} {spec!r}: expected normalize:MEAN/STD, as in normalize:0.5,0.5,0.5/0.25,0.25,0.25"
            ) from None
        if not bool((std > 0).all()) or len(mean) not in (1, len(std)):
            raise InputError(f"{arg('preprocess')} {spec!r}: expected as many positive deviations as means")
        return Normalize(mean, std, known).to(device)
    if not names_function(spec):
        raise InputError(
            f"{arg('preprocess')} {spec!r}: expected normalize:MEAN/STD, imagenet, cifar10,"
            " or file.py:function of a batch"
        )
    function = import_named(spec, arg("preprocess"))
    if isinstance(function, type):
        function = guarded(function, f"{arg('preprocess')}: {spec}() raised")
    if not callable(function):
        raise InputError(f"{arg('preprocess')} {spec} is {type(function).__name__}, expected a function of a batch")
    return function.to(device).eval() if isinstance(function, nn.Module) else function  # pyright: ignore[reportReturnType]


class Normalize(nn.Module):
    """Subtracts a mean and divides by a deviation, one number each or one per channel.

    known: the data set whose statistics these are, of images in [0, 1].
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, known: str | None = None) -> None:
        super().__init__()
        self.known = known
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def check_range(self, low: float, high: float) -> None:
        """Raise InputError if data from `low` to `high` are not those that the known statistics are of."""
        if self.known is not None and (low < -_OUTSIDE or high > 1 + _OUTSIDE):
            raise InputError(
                f"{arg('preprocess')} {self.known!r} is for images in [0, 1], the data lie in [{low:g}, {high:g}]:"
                " scale them to [0, 1], or give normalize:MEAN/STD in their units; leave it out if they are normalized"
            )

    def range_of(self, low: float, high: float) -> tuple[float, float]:
        """Return between what the data lie afterwards, if they lie between `low` and `high`."""
        ends = (torch.tensor([[low], [high]]) - self.get_buffer("mean").cpu()) / self.get_buffer("std").cpu()
        return float(ends.min()), float(ends.max())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        if len(std) not in (1, x.shape[1]):
            raise InputError(
                f"{arg('preprocess')} has {len(std)} channels, the data have {x.shape[1]}: samples of shape"
                f" {tuple(x.shape[1:])}, channels first; give one number, or one per channel"
            )
        return (x - mean.to(x.dtype).view(shape)) / std.to(x.dtype).view(shape)


def _load_file(spec: str, device: torch.device) -> nn.Module:
    path = Path(spec)
    if "\0" in spec or not path.is_file():
        raise InputError(f"{arg('model')}: there is no file {spec!r}; {_FORMS}")
    if path.suffix == ".pt2":
        return load_exported(path, device)
    if path.suffix == ".onnx":
        return load_onnx(path, device)
    if path.suffix == ".safetensors":
        raise InputError(
            f"{arg('model')} {spec!r} holds tensors only; give the function that builds the model too:"
            f" {arg('model', 'file.py:function')} {arg('weights', spec)}"
        )
    kind = _archive_kind(path)
    if kind == "torchscript":
        return load_torchscript(path, device)
    if path.suffix == ".py":
        raise InputError(f"{arg('model')} {spec!r}: name the function in it, as in {spec}:make_model")
    if kind == "torch" or path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"):
        raise InputError(_about_pickle(path))
    raise InputError(f"{arg('model')} {spec!r} has an unknown file type; {_FORMS}")


def _about_pickle(path: Path) -> str:
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except Exception:
        return (
            f"{arg('model')} {str(path)!r} is a pickle, which could run any code when read, so it is not; save"
            f" model.state_dict() and give {arg('model', 'file.py:function')} {arg('weights', 'FILE')}, or use"
            " torch.export.save"
        )
    return (
        f"{arg('model')} {str(path)!r} is a state dict; give the function that builds the model too:"
        f" {arg('model', 'file.py:function')} {arg('weights', str(path))}"
    )


def _archive_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            check_unpacked_size(archive, path)
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "other"
    if is_torchscript(names):
        return "torchscript"
    return "torch" if any(name.endswith("data.pkl") for name in names) else "other"


def _load_weights(model: Any, weights: str) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{arg('weights')} needs an nn.Module to load into, the function returned {type(model).__name__}"
        )
    path = Path(weights)
    if "\0" in weights or not path.is_file():
        raise InputError(f"{arg('weights')}: there is no file {weights!r}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                f"{arg('weights')}: reading .safetensors needs safetensors: pip install safetensors"
            ) from None
        state: Any = guarded(lambda: load_file(weights), f"{arg('weights')} {weights!r} cannot be read:")
    elif _archive_kind(path) == "torchscript":
        raise InputError(
            f"{arg('weights')} {weights!r} is a TorchScript file, a whole model: give it as {arg('model', weights)}"
        )
    else:
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception:
            raise InputError(
                f"{arg('weights')} {weights!r} is not a state dict of tensors only; a pickle could run code when"
                " read, so it is not:"
                " save it with torch.save(model.state_dict(), file)"
            ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # what training frameworks write
    try:
        model.load_state_dict(_without_prefix(state, set(model.state_dict())))
    except Exception as error:
        raise InputError(f"{arg('weights')} {weights!r} does not fit the model: {one_line(error)}") from None


def _without_prefix(state: Any, wanted: set[str]) -> Any:
    """Return the entries of a wrapped model (DataParallel's ``module.``, Lightning's ``model.``) by the model's own
    names, where exactly one prefix gives all of these and no other; else the state as it is.
    """
    if not isinstance(state, dict) or not wanted or not all(isinstance(name, str) for name in state):
        return state
    last = max(wanted, key=len)
    prefixes = [name.removesuffix(last) for name in state if name.endswith("." + last)]
    bare = [{n.removeprefix(p): value for n, value in state.items() if n.startswith(p)} for p in prefixes]
    fitting = [entries for entries in bare if set(entries) == wanted]
    return fitting[0] if len(fitting) == 1 and set(state) != wanted else state
