"""A model with the same outputs whose backward pass sees through what hides a gradient: rounding, thresholds, signs,
ranks, detached parts, and backward passes of the model's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rai_toolbox.perturbations._resuming import SolveEnded
from rai_toolbox.robustness.attack._smooth_steps import HANDLERS, Below, Soft, applied, name_of, with_gradient_of

Function = Callable[[Tensor], Tensor]

_patching = threading.RLock()


class BPDA:
    """The model, with other gradients (backward pass differentiable approximation).

    It returns what the model returns. Its gradient goes straight through rounding, `detach` and `no_grad`; of a
    threshold, a sign, a rank or the choice of the largest entries it is that of a smooth step as wide as the entries
    are spread; steep sigmoids are as wide. A custom `torch.autograd.Function` is differentiated through its forward
    pass, but from torch 2.14 on not where its `apply` was kept under another name before. Models of `torch.export` are
    seen through alike; TorchScript is not.

    model: from inputs to outputs.
    replaced: the names of the operations whose gradient has been replaced so far.

    References
    ----------
    Athalye, A., Carlini, N. and Wagner, D. (2018). Obfuscated gradients give a false sense of security. ICML.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.robustness.attack._bpda import BPDA
    >>> model = BPDA(lambda x: x.round())
    >>> x = torch.tensor([0.2, 0.8], requires_grad=True)
    >>> model(x).sum().backward()
    >>> x.grad, model.replaced
    (tensor([1., 1.]), {'round'})
    """

    def __init__(self, model: Function) -> None:
        self._model = model
        self.replaced: set[str] = set()

    def replaces(self, x: Tensor) -> list[str]:
        """Return the names of what is replaced at some inputs; none where the model does not work this way."""
        try:
            with torch.enable_grad():
                x = x.detach().clone().requires_grad_()
                # Of the input alone: the parameters are the user's, and so is their gradient.
                torch.autograd.grad(self(x).sum(), x)
        except SolveEnded:
            raise
        except Exception:  # the user's model, in a way that it was not made for
            return []
        return sorted(self.replaced)

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._model(x)
        with _forward_passes_alone(self.replaced), _Replacing(self.replaced):
            return self._model(x)


@contextmanager
def _forward_passes_alone(replaced: set[str]) -> Iterator[None]:
    """Differentiate custom functions of this thread through their forward passes."""
    mine = threading.get_ident()

    def apply(cls: Any, *args: Any) -> Any:
        moving = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        if threading.get_ident() != mine or not moving:
            return applied(cls, *args)
        try:
            with torch.enable_grad():
                own_context = cls.setup_context is torch.autograd.Function.setup_context
                out = cls.forward(_Context(args), *args) if own_context else cls.forward(*args)
        except Exception:  # its forward pass needs a context that this is not
            return applied(cls, *args)
        if isinstance(out, Tensor) and not out.requires_grad and out.is_floating_point():
            # It left torch on the way.
            if out.shape != moving[0].shape:
                return applied(cls, *args)
            out = with_gradient_of(out, moving[0])
        replaced.add(cls.__name__)
        return out

    with _patching:
        before = Below.__dict__.get("apply")
        Below.apply = classmethod(apply)
        try:
            yield
        finally:
            if before is None:
                del Below.apply
            else:
                Below.apply = before


class _Context:
    """What the forward pass of a custom function is given to keep things in."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)

    def _nothing(self, *args: Any) -> None: ...

    save_for_backward = mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_forward = _nothing


class _Replacing(TorchFunctionMode):
    """While it is on, the operations of `HANDLERS` get another gradient."""

    def __init__(self, replaced: set[str]) -> None:
        super().__init__()
        self._soft = Soft(replaced)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name == "_set_grad_enabled":
            if not args[0]:
                self._soft.replaced.add("no_grad")
            return None
        handler = HANDLERS.get(name)
        return func(*args, **kwargs) if handler is None or not args else handler(self._soft, func, args, kwargs)
