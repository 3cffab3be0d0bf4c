"""Smooth steps: the gradients of operations that have none, for `BPDA`. A handler calls an operation in its place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Handler = Callable[["Soft", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# Where `apply` of a custom function can be replaced. Before torch 2.14 that is below `torch.autograd.Function`, so that
# an `apply` that was kept under another name is replaced too; since then such a one is C++ and stays as it is.
_in_python = isinstance(vars(torch.autograd.Function).get("apply"), classmethod)
Below: Any = torch.autograd.function._SingleLevelFunction if _in_python else torch.autograd.Function
#: Ranks compare every pair of entries.
_MOST_RANKED = 1024
_LEAK = 0.1


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    return applied(_Through, surrogate.to(value.dtype), value.detach())


def applied(cls: Any, *args: Any) -> Any:
    return super(Below, cls).apply(*args)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class Soft:
    """What is differentiated in place of tensors without a gradient.

    replaced: where the names of operations go whose gradient is replaced.
    """

    def __init__(self, replaced: set[str]) -> None:
        self.replaced = replaced
        # By id: a tensor without gradient (a mask, ranks, indices), and a smooth one to differentiate in its place,
        # or how it was chosen. The tensor is kept so that its id stays its own.
        self._soft: dict[int, tuple[Tensor, Any]] = {}

    def tag(self, tensor: Tensor, soft: Any) -> Tensor:
        self._soft[id(tensor)] = tensor, soft
        return tensor

    def tag_of(self, value: Any) -> Any:
        return self._soft[id(value)][1] if id(value) in self._soft else None

    def soft(self, value: Any) -> Tensor | None:
        """Return what stands for a tensor without gradient, if anything does."""
        found = self.tag_of(value)
        return found if isinstance(found, Tensor) else None

    def smooth(self, value: Any) -> Any:
        """Return a tensor as numbers with a gradient, where something stands for it."""
        soft = self.soft(value)
        if soft is not None:
            return with_gradient_of(value.to(soft.dtype), soft)
        if isinstance(value, tuple | list):
            return type(value)([self.smooth(part) for part in value]) if type(value) in (tuple, list) else value
        return value


def name_of(func: Any) -> str:
    if getattr(func, "__name__", "") == "__get__":
        return f"get {getattr(getattr(func, '__self__', None), '__name__', '')}"
    # aten's operators are called as "round.default".
    return getattr(func, "__name__", "").partition(".")[0]


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


def _spread(values: Tensor) -> Tensor:
    """Return how far the entries are from each other, as a number that is never 0."""
    values = values.detach()
    size = values.std() if values.numel() > 1 else values.abs().mean()
    return size.nan_to_num(1.0).clamp_min(1e-6)


def _size(values: Tensor) -> Tensor:
    return values.detach().square().mean().sqrt().nan_to_num(1.0).clamp_min(1e-6)


def _straight(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """Go straight through: rounding."""
    value = func(*args, **kwargs)
    if not _moves(args[0]):
        return value
    mode.replaced.add(name_of(func))
    return with_gradient_of(value, args[0])


def _kept(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """Keep the graph: `detach` and `data`."""
    if mode.tag_of(args[0]) is not None:
        return args[0]
    if not _moves(args[0]):
        return func(*args, **kwargs)
    mode.replaced.add("detach")
    return args[0].clone()


def _no_hook(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    mode.replaced.add("register_hook")
    return RemovableHandle(OrderedDict())


def _left(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    return func(args[0].detach(), *args[1:], **kwargs)


def _stepping(smooth: Callable[[Tensor], Tensor]) -> Handler:
    """A step at 0, with the gradient of a smooth one."""

    def handler(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
        value, x = func(*args, **kwargs), mode.smooth(args[0])
        if not _moves(x):
            return value
        mode.replaced.add(name_of(func))
        return with_gradient_of(value, smooth(x / _size(x)))

    return handler


def _compared(sign: float) -> Handler:
    def handler(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
        value = func(*args, **kwargs)
        a, b = (mode.smooth(arg) for arg in args[:2])
        if not isinstance(value, Tensor) or not (_moves(a) or _moves(b)):
            return value
        gap = a - b
        mode.replaced.add(name_of(func))
        if sign == 0:
            return mode.tag(value, torch.exp(-2 * gap.abs() / _spread(gap)))
        return mode.tag(value, torch.sigmoid(2 * sign * gap / _spread(gap)))

    return handler


def _negated(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    value, soft = func(*args, **kwargs), mode.soft(args[0])
    return value if soft is None else mode.tag(value, 1 - soft)


def _joined(both: bool) -> Handler:
    def handler(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
        value = func(*args, **kwargs)
        softs = [mode.soft(arg) for arg in args[:2]]
        if len(args) < 2 or all(soft is None for soft in softs):
            return value
        a, b = (arg.float() if soft is None else soft for soft, arg in zip(softs, args, strict=False))
        return mode.tag(value, a * b if both else a + b - a * b)

    return handler


def _converted(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """A mask, ranks or rounded numbers become numbers; numbers become integers."""
    value, soft = func(*args, **kwargs), mode.soft(args[0])
    if not isinstance(value, Tensor):
        return value
    if soft is None and _moves(args[0]) and not value.is_floating_point() and not value.is_complex():
        mode.replaced.add(name_of(func))
        return mode.tag(value, args[0])
    if soft is None:
        return value
    return with_gradient_of(value, soft) if value.is_floating_point() else mode.tag(value, soft)


def _reshaped(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    value, soft = func(*args, **kwargs), mode.soft(args[0])
    if soft is None or not isinstance(value, Tensor):
        return value
    return mode.tag(value, func(soft, *args[1:], **kwargs))


def _reckoned(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """Arithmetic with a mask or with ranks."""
    return func(*[mode.smooth(arg) for arg in args], **{name: mode.smooth(arg) for name, arg in kwargs.items()})


def _chosen(mask: int, then: int, other: int) -> Handler:
    """`where` and `masked_fill`: these arguments are the mask and what it chooses between."""

    def handler(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
        value = func(*args, **kwargs)
        soft = mode.soft(args[mask]) if len(args) > 2 else None
        if soft is None or not value.is_floating_point():
            return value
        return with_gradient_of(value, _mix(soft, mode.smooth(args[then]), mode.smooth(args[other]), value))

    return handler


def _mix(soft: Tensor, a: Any, b: Any, value: Tensor) -> Tensor:
    def finite(part: Any) -> Tensor:
        return torch.as_tensor(part, dtype=value.dtype, device=value.device).nan_to_num(0.0, 0.0, 0.0)

    return (soft * finite(a) + (1 - soft) * finite(b)).expand_as(value)


def _dim(args: Any, kwargs: Any, place: int, default: Any) -> Any:
    return kwargs.get("dim", args[place] if len(args) > place else default)


def _order(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """`argsort`, and the ranks that it gives when it is called twice."""
    value = func(*args, **kwargs)
    dim = _dim(args, kwargs, 1, -1)
    tag = mode.tag_of(args[0])
    if isinstance(tag, tuple) and tag[0] == "order":
        _, x, along, downwards = tag
        if x.shape[along] <= _MOST_RANKED:
            mode.replaced.add("argsort")
            x = x.movedim(along, -1)
            gap = (x[..., :, None] - x[..., None, :]) / _spread(x)
            ranks = torch.sigmoid((-4 if downwards else 4) * gap).sum(dim=-1) - 0.5
            mode.tag(value, ranks.movedim(-1, along))
    elif _moves(args[0]):
        mode.tag(value, ("order", args[0], dim, bool(kwargs.get("descending", args[2] if len(args) > 2 else False))))
    return value


def _sorted(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    found = func(*args, **kwargs)
    if _moves(args[0]):
        downwards = bool(kwargs.get("descending", args[2] if len(args) > 2 else False))
        mode.tag(found[1], ("order", args[0], _dim(args, kwargs, 1, -1), downwards))
    return found


def _largest(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """`topk`: which entries are among the largest."""
    found = func(*args, **kwargs)
    if _moves(args[0]) and kwargs.get("largest", args[3] if len(args) > 3 else True):
        least = found[0].detach().amin(dim=_dim(args, kwargs, 2, -1), keepdim=True)
        mode.tag(found[1], ("top", args[0], torch.sigmoid(3 * (args[0] - least) / _spread(args[0]))))
    return found


def _winner(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    value, dim = func(*args, **kwargs), _dim(args, kwargs, 1, None)
    if _moves(args[0]) and dim is not None:
        share = (3 * args[0] / _spread(args[0])).softmax(dim=dim)
        mode.tag(value, ("top", args[0], share.movedim(dim, -1)))
    return value


def _one_hot(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    value, tag = func(*args, **kwargs), mode.tag_of(args[0])
    if not (isinstance(tag, tuple) and tag[0] == "top" and tag[2].shape == value.shape):
        return value
    mode.replaced.add("argmax")
    return mode.tag(value, tag[2])


def _scattered(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """The largest entries, or ones in their places, put among zeros."""
    value = func(*args, **kwargs)
    tag = mode.tag_of(args[2]) if len(args) > 3 else None
    if not (isinstance(tag, tuple) and tag[0] == "top" and tag[2].shape == value.shape and value.is_floating_point()):
        return value
    mode.replaced.add("topk")
    x, soft = tag[1:]
    if not isinstance(args[3], Tensor):
        soft = soft * args[3]
    elif args[3].requires_grad:
        soft = soft * x
    # In place, the user may go on with the tensor that was written to.
    return mode.tag(value, soft) if value is args[0] else with_gradient_of(value, soft)


def _saturating(function: Callable[[Tensor], Tensor], width: float) -> Handler:
    """A sigmoid, with the gradient of one that is as wide as what it is given is spread."""

    def handler(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
        value = func(*args, **kwargs)
        if not _moves(args[0]):
            return value
        wider = _size(args[0]) / width
        if wider <= 1:
            return value
        mode.replaced.add(name_of(func))
        return with_gradient_of(value, function(args[0] / wider))

    return handler


def _softmax(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    value, dim = func(*args, **kwargs), _dim(args, kwargs, 1, None)
    if not _moves(args[0]) or not isinstance(dim, int):
        return value
    wider = _spread(args[0]) / 3
    if wider <= 1:
        return value
    mode.replaced.add(name_of(func))
    smooth = torch.log_softmax if name_of(func) == "log_softmax" else torch.softmax
    return with_gradient_of(value, smooth(args[0] / wider, dim))


def _clamped(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    value = func(*args, **kwargs)
    if not _moves(args[0]) or not bool((value.detach() != args[0].detach()).any()):
        return value
    mode.replaced.add(name_of(func))
    return with_gradient_of(value, value + _LEAK * args[0])


def _middle(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """A median, with a gradient to all entries near to it."""
    found = func(*args, **kwargs)
    dim = _dim(args, kwargs, 1, None)
    if not _moves(args[0]) or not isinstance(dim, int):
        return found
    mode.replaced.add(name_of(func))
    kept = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
    values = found[0] if kept else found[0].unsqueeze(dim)
    near = torch.exp(-2 * ((args[0] - values).detach().abs() / _spread(args[0])))
    smooth = (near / near.sum(dim=dim, keepdim=True) * args[0]).sum(dim=dim, keepdim=kept)
    return type(found)((with_gradient_of(found[0], smooth), found[1]))


def _between(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    """`bucketize`: how many bounds a number exceeds."""
    value = func(*args, **kwargs)
    if not _moves(args[0]) or not isinstance(args[1], Tensor) or args[1].ndim != 1:
        return value
    mode.replaced.add(name_of(func))
    return mode.tag(value, torch.sigmoid(4 * (args[0][..., None] - args[1]) / _spread(args[0])).sum(dim=-1))


def _quotient(mode: Soft, func: Any, args: Any, kwargs: Any) -> Any:
    value = func(*args, **kwargs)
    if not _moves(args[0]) or (name_of(func) == "div" and kwargs.get("rounding_mode") is None):
        return _reckoned(mode, func, args, kwargs)
    mode.replaced.add("floor_divide")
    return with_gradient_of(value, args[0] / args[1])


def _table(words: str, handler: Handler) -> dict[str, Handler]:
    return dict.fromkeys(words.split(), handler)


HANDLERS: dict[str, Handler] = {
    **_table("round floor ceil trunc fix", _straight),
    **_table("detach get_data", _kept),
    "get data": _kept,
    "register_hook": _no_hook,
    **_table("numpy __array__ tolist item", _left),
    **_table("sign sgn", _stepping(torch.tanh)),
    **_table("gt ge greater greater_equal __gt__ __ge__", _compared(1.0)),
    **_table("lt le less less_equal __lt__ __le__", _compared(-1.0)),
    **_table("eq __eq__", _compared(0.0)),
    "heaviside": _stepping(lambda x: torch.sigmoid(2 * x)),
    **_table("logical_not bitwise_not __invert__ invert", _negated),
    **_table("logical_and bitwise_and __and__ and_", _joined(True)),
    **_table("logical_or bitwise_or __or__ or_", _joined(False)),
    **_table("float double half bfloat16 to type type_as _to_copy long int short byte clone contiguous", _converted),
    **_table(
        "view reshape flatten unsqueeze squeeze expand expand_as permute transpose __getitem__ movedim", _reshaped
    ),
    **_table("mul add sub rsub matmul linear sum mean cumsum __mul__ __rmul__ __add__ __radd__", _reckoned),
    **_table("__sub__ __rsub__ true_divide __truediv__ cat stack conv2d einsum bmm", _reckoned),
    **_table("div floor_divide __floordiv__", _quotient),
    "where": _chosen(0, 1, 2),
    "masked_fill": _chosen(1, 2, 0),
    "argsort": _order,
    "sort": _sorted,
    "topk": _largest,
    "argmax": _winner,
    "one_hot": _one_hot,
    **_table("scatter scatter_", _scattered),
    **_table("sigmoid", _saturating(torch.sigmoid, 2.0)),
    **_table("tanh", _saturating(torch.tanh, 1.5)),
    **_table("erf", _saturating(torch.erf, 1.5)),
    **_table("softmax log_softmax", _softmax),
    **_table("clamp clip hardtanh", _clamped),
    **_table("median nanmedian kthvalue", _middle),
    "bucketize": _between,
}
