"""What `param_ndim` means, and the views and blocks that follow from it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# A block is what one thread works on: it bounds every temporary, and on a CPU it stays in the cache between the pass
# that measures and the pass that changes (4 MB of float32; 1 MiB of L2 a core and a shared L3 of 32 were measured).
BLOCK_NUMEL = 2**20


def datum_ndim(ndim: int, param_ndim: int | None) -> int:
    """Return how many trailing dimensions of an `ndim`-dimensional tensor make one datum.

    Parameters
    ----------
    ndim : int
        The number of dimensions of the tensor.
    param_ndim : int or None
        None: all of them. A negative number: `ndim + param_ndim`. Otherwise the number itself.

    Returns
    -------
    int
        Between 0 and `ndim`.

    Raises
    ------
    TypeError
        `param_ndim` is neither an int nor None.
    ValueError
        `abs(param_ndim) > ndim`.

    Examples
    --------
    >>> from rai_toolbox.functional import datum_ndim
    >>> [datum_ndim(3, k) for k in (None, -1, 0, 1)]
    [3, 2, 0, 1]
    """
    if param_ndim is None:
        return ndim
    if not is_integer(param_ndim):
        raise TypeError(f"`param_ndim` must be an int or None, got {param_ndim!r}")
    if abs(param_ndim) > ndim:
        raise ValueError(
            f"`param_ndim` is {param_ndim}, but the tensor has {ndim} dimension{'s' * (ndim != 1)}: "
            f"`param_ndim` must be None or lie in [{-ndim}, {ndim}]"
        )
    return int(ndim + param_ndim if param_ndim < 0 else param_ndim)


def is_number(value: object) -> bool:
    """Return whether `value` is a real number, of Python or of numpy; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """Return whether `value` is a whole number, of Python or of numpy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def batch_shape(shape: Sequence[int], k: int) -> tuple[int, ...]:
    """The shape of `(N, d0, ...)` for a tensor of shape `shape` whose datum is its last `k` dimensions."""
    if k == 0:
        return (math.prod(shape), 1)
    return (math.prod(shape[: len(shape) - k]), *shape[len(shape) - k :])


def to_batch(p: Tensor, param_ndim: int | None) -> Tensor:
    """View a tensor as a batch of the data that a transform acts on.

    Parameters
    ----------
    p : Tensor, shape (...)
        Any dtype. If `p.grad` is a tensor, the result's `grad` is a view of it.
    param_ndim : int or None
        The trailing `param_ndim` dimensions are one datum, all the leading ones are batch. None: the whole tensor is
        one datum. A negative number counts from `p.ndim`. 0: every entry is a datum.

    Returns
    -------
    Tensor, shape (N, d0, ...)
        Shares memory with `p` and takes no part in autograd.

    Raises
    ------
    TypeError, ValueError
        See `rai_toolbox.functional.datum_ndim`.
    ValueError
        The leading dimensions cannot be viewed as one (a channels-last tensor with `param_ndim=1`, say).

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import to_batch
    >>> x = torch.ones(3, 5, 2)
    >>> for k in (0, 1, 2, -1, 3, None):
    ...     print(k, tuple(to_batch(x, k).shape))
    0 (30, 1)
    1 (15, 2)
    2 (3, 5, 2)
    -1 (3, 5, 2)
    3 (1, 3, 5, 2)
    None (1, 3, 5, 2)
    """
    shape = batch_shape(p.shape, datum_ndim(p.ndim, param_ndim))
    grad = p.grad if p.is_leaf else None
    try:
        batch = p.detach().view(shape)
        batch_grad = None if grad is None else grad.detach().view(shape)
    except RuntimeError as error:
        raise ValueError(
            f"a tensor of shape {tuple(p.shape)} and strides {p.stride()} has no view of shape {shape} "
            f"(`param_ndim={param_ndim}`); make it, and its gradient, contiguous first"
        ) from error
    if batch_grad is not None and batch_grad.dtype != batch.dtype:
        batch.grad_dtype = None  # any
    batch.grad = batch_grad
    return batch


def as_rows(x: Tensor, k: int) -> Tensor | None:
    """View `x` as a matrix with one datum (its last `k` dimensions) per row, or None if no such view exists.

    Rows follow the order of the batch. The order of the entries *within* a row is that of the memory: reductions and
    selections do not see it, so a whole channels-last tensor is one dense row.
    """
    batch = x.ndim - k
    if k == 1 and batch == 1:
        return x
    if not x.is_contiguous():
        inner = sorted(range(batch, x.ndim), key=lambda d: (-x.stride(d), d))
        x = x.permute(*range(batch), *inner)
    try:
        return x.view(math.prod(x.shape[:batch]), math.prod(x.shape[batch:]))
    except RuntimeError:
        return None


def block_indices(shape: Sequence[int], k: int, numel: int = BLOCK_NUMEL) -> Iterator[tuple[int | slice, ...]]:
    """How to cut a tensor between data into blocks of at most `numel` entries: `x[index]` for every index.

    The whole tensor is (). A block that is one datum may be larger: no datum is cut.
    """
    total = math.prod(shape)
    if len(shape) == k or total <= numel:
        yield ()
        return
    step = numel * shape[0] // total
    for start in range(0, shape[0], step or 1):
        if step:
            yield (slice(start, min(start + step, shape[0])),)
        else:
            yield from ((start, *index) for index in block_indices(shape[1:], k, numel))


def blocks(x: Tensor, k: int, numel: int = BLOCK_NUMEL) -> Iterator[Tensor]:
    """Cut `x` between data into views of at most `numel` entries; see `block_indices`."""
    return (x[index] if index else x for index in block_indices(x.shape, k, numel))


def write_through(x: Tensor) -> Tensor:
    """Give `x` memory of its own if several entries may share an address, so that it can be changed in place."""
    reach, shared = 0, False
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        shared = shared or (size > 1 and stride <= reach)
        reach += (size - 1) * stride
    if shared and x.numel():
        with torch.no_grad():
            x.set_(x.clone(memory_format=torch.contiguous_format))  # pyright: ignore[reportCallIssue, reportArgumentType]
    return x
