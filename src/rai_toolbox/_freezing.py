"""Switch gradients and training mode off for a while, and put every flag back as it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ContextDecorator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef


def _tensors_in(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, nn.Module):
        yield from item.parameters()
    elif isinstance(item, Optimizer):
        for group in item.param_groups:
            yield from group["params"]
    elif isinstance(item, Mapping):
        if "params" not in item:
            raise TypeError(f'a parameter group has the key "params"; got a mapping with the keys {list(item)}')
        yield from _tensors_in(item["params"])
    elif isinstance(item, Iterable) and not isinstance(item, str | bytes):
        for part in item:
            yield from _tensors_in(part)
    else:
        raise TypeError(
            "freeze takes tensors, modules, optimizers, parameter groups, and iterables of tensors; "
            f"got {type(item).__name__}"
        )


def freeze(*items: Any) -> Callable[[], None]:
    """Set `requires_grad` to False on every tensor of `items`; return what restores them.

    Parameters
    ----------
    *items : Tensor, Module, Optimizer, parameter group, or iterable of tensors
        What to freeze. A tensor that occurs twice is handled once.

    Returns
    -------
    Callable[[], None]
        Sets the flag of each tensor to what it was when `freeze` was called. It holds weak references: a tensor that
        nothing else holds is freed.

    Raises
    ------
    TypeError
        An item is none of the above.
    ValueError
        A tensor is a result of a computation that needs its gradient (not a leaf). No flag was changed then.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import freeze
    >>> layer = torch.nn.Linear(2, 1)
    >>> restore = freeze(layer)
    >>> [p.requires_grad for p in layer.parameters()]
    [False, False]
    >>> restore()
    >>> [p.requires_grad for p in layer.parameters()]
    [True, True]
    """
    seen: dict[int, tuple[Tensor, bool]] = {}
    for item in items:
        for tensor in _tensors_in(item):
            if tensor.requires_grad and not tensor.is_leaf:
                raise ValueError(
                    "only leaf tensors can be frozen; this one, of shape "
                    f"{tuple(tensor.shape)}, was computed by {tensor.grad_fn}: pass tensor.detach()"
                )
            seen.setdefault(id(tensor), (tensor, tensor.requires_grad))
    for tensor, flag in seen.values():
        if flag:
            tensor.requires_grad_(False)

    flags = [(TensorWeakRef(tensor), flag) for tensor, flag in seen.values()]

    def restore() -> None:
        for reference, flag in flags:
            tensor = reference()
            if tensor is not None and tensor.requires_grad != flag:
                tensor.requires_grad_(flag)

    return restore


class frozen(ContextDecorator):
    """Context manager and decorator: the tensors of `items` need no gradient inside.

    Parameters
    ----------
    *items : Tensor, Module, Optimizer, parameter group, or iterable of tensors
        As for `freeze`. The flags seen at entry are the ones restored, also after an exception.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import frozen
    >>> weight = torch.ones(2, requires_grad=True)
    >>> with frozen(weight):
    ...     weight.requires_grad
    False
    >>> weight.requires_grad
    True
    """

    def __init__(self, *items: Any) -> None:
        # An iterator such as `module.parameters()` must serve a decorated function's second call too.
        self._items = tuple(tuple(item) if isinstance(item, Iterator) else item for item in items)
        self._restores: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self._restores.append(freeze(*self._items))

    def __exit__(self, *exc_info: object) -> None:
        self._restores.pop()()


class evaluating(ContextDecorator):
    """Context manager and decorator: `modules` are in eval mode inside.

    Every module and submodule gets its own training flag back, so that a layer that was in eval mode inside a
    module in training mode still is.

    Parameters
    ----------
    *modules : Module
        Held by weak references: a module that nothing else holds is freed.

    Raises
    ------
    TypeError
        Something else was given.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import evaluating
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    >>> with evaluating(net):
    ...     net.training, net[1].training
    (False, False)
    >>> net.training, net[1].training
    (True, True)
    """

    def __init__(self, *modules: nn.Module) -> None:
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(f"evaluating takes torch.nn.Module objects; got {type(module).__name__}")
        self._modules = [weakref.ref(module) for module in modules]
        # One entry for each time that the context was entered: a decorated function may call itself.
        self._flags: list[list[tuple[weakref.ref[nn.Module], bool]]] = []

    def __enter__(self) -> None:
        modules = [module for reference in self._modules if (module := reference()) is not None]
        self._flags.append([(weakref.ref(part), part.training) for module in modules for part in module.modules()])
        try:
            for module in modules:
                module.eval()
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def _restore(self) -> None:
        # Not by `train(flag)`, which would set every submodule below too.
        for reference, flag in self._flags.pop():
            if (part := reference()) is not None:
                part.training = flag
