"""Points around data, one row of a matrix each, as the solvers work on them: a kernel each, or operators of torch.

Shapes: points and data (N, D), radii (N, 1) in float64, bounds None or broadcastable to the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.kernels import _hashing, _machine, _portable, _rows
from rai_toolbox.kernels._factors import NormFactor
from rai_toolbox.kernels._operators import operator, run

# How many steps of a search rows that are done stay at most, where looking for them would wait for the device.
_LOOK_EVERY = 8

# How many entries are worked on together on a CPU: what lies between, in float64, is many times as large as they are.
_BLOCK = 2**18

# For the nearest point of a ball and a box: Newton's steps at most, where they end, the range of radii, and, in L1, of
# how many radii an entry may be for its digits to do, and how many of the steps need no bracket.
_NEWTON_STEPS, _NEAR_ENOUGH, _SAFE, _FEW_RADII, _FREE_STEPS = 30, 1e-5, 1e12, 32.0, 3

_ORDERS = {"l1": 1, "l2": 2, "linf": -1, "l0": 0}
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_time_to_look(step: int, x: Tensor, every: int = 1) -> bool:
    """Whether to look now for rows that are done: `every` so many steps where that is free, more seldom elsewhere."""
    return step % every == 0 if _machine.can_branch_on_values(x) else step % _LOOK_EVERY == _LOOK_EVERY - 1


def blocks(x: Tensor) -> Iterator[slice]:
    """Rows to work on together: all, but a few at a time of a large matrix on a CPU."""
    several = max(1, _BLOCK // max(1, x.shape[1])) if _machine.is_on_cpu(x) else len(x)
    for begin in range(0, len(x), max(1, several)):
        yield slice(begin, begin + several)


def is_one_block(x: Tensor) -> bool:
    """Whether all rows of a matrix are worked on together."""
    return x.numel() <= _BLOCK or len(x) < 2 or not _machine.is_on_cpu(x)


def by_blocks(work: Callable[[slice], Tensor], x: Tensor) -> Tensor:
    """What `work` returns of the rows of a matrix, one block after the other."""
    if is_one_block(x):
        return work(slice(None))
    parts = list(blocks(x))
    first = work(parts[0])
    result = first.new_empty(len(x), *first.shape[1:])
    result[parts[0]] = first
    del first
    for part in parts[1:]:
        result[part] = work(part)
    return result


def distances(points: Tensor, data: Tensor, norm: str) -> Tensor:
    """The norm of each row of `points - data`, in float64, where the difference of stored values is exact."""
    if points.numel() and _machine.all_have_kernels([points, data]):
        return _row_distances(points, data, _ORDERS[norm])
    if is_one_block(points):
        return _distances(points, data, norm)
    return by_blocks(lambda part: _distances(points[part], data[part], norm), points)


def land(delta: Tensor, data: Tensor, epsilon: Tensor, lower: Tensor | None, upper: Tensor | None, norm: str) -> Tensor:
    """The stored point for a projected perturbation: inside ball and box as the stored values say it."""
    bounds = [b for b in (lower, upper) if b is not None]
    if (
        delta.numel()
        and delta.dtype == torch.float32
        and _machine.all_have_kernels([data])
        and delta.device == data.device
        and delta.is_contiguous()
        and all(b.dtype == data.dtype for b in bounds)
        and len(bounds) != 1
    ):
        return _land_rows(delta, data, epsilon, lower, upper, _ORDERS[norm])
    if is_one_block(data):
        return _land(delta, data, epsilon, lower, upper, norm)
    return by_blocks(
        lambda part: _land(delta[part], data[part], epsilon[part], _of(lower, part), _of(upper, part), norm), data
    )


def _of(bound: Tensor | None, part: slice) -> Tensor | None:
    return bound[part] if bound is not None and len(bound) > 1 else bound


def usable_gradients(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients without NaN, in float32 or wider; and which rows are zero."""
    if grad.numel() and _machine.all_have_kernels([grad]):
        result, dead = _usable_gradients(grad, None, None, 0)
        return result, dead.view(torch.bool)
    return _usable(grad)[:2]


def _usable(grad: Tensor) -> tuple[Tensor, Tensor, bool]:
    """As `usable_gradients`; and whether no row is known to be zero."""
    grad = grad.float() if grad.element_size() == 2 else grad
    largest = torch.linalg.vector_norm(grad, ord=torch.inf, dim=1)
    ends = _machine.seen(lambda: [float(end) for end in largest.aminmax()] if len(largest) else [1.0, 1.0], grad)
    if ends is None or not ends[1] < torch.inf:
        grad = grad.nan_to_num(nan=0.0)
        largest = torch.linalg.vector_norm(grad, ord=torch.inf, dim=1)
    return grad, largest == 0, ends is not None and 0 < ends[0] <= ends[1] < torch.inf


def directions(grad: Tensor, keys: Tensor, rows: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """As `usable_gradients`, but a row of zeros becomes a random direction: of the key of that row, and the stream."""
    if grad.numel() and _machine.all_have_kernels([grad]):
        result, dead = _usable_gradients(grad, keys, rows, _hashing.draw_of(stream))
        return result, dead.view(torch.bool)
    grad, dead, none_is_zero = _usable(grad)
    if none_is_zero:
        return grad, dead
    random = _hashing.normals(keys[rows], _hashing.draw_of(stream), grad.shape[1]).to(grad.dtype)
    return torch.where(dead[:, None], random, grad), dead


def uniforms(keys: Tensor, rows: Tensor, stream: int, length: int) -> Tensor:
    """Random numbers of rows in [0, 1), float64, shape (len(rows), length); `stream` numbers the draw."""
    return _random(keys, rows, stream, length, True)


def normals(keys: Tensor, rows: Tensor, stream: int, length: int) -> Tensor:
    """As `uniforms`, near enough to a standard normal for a random direction."""
    return _random(keys, rows, stream, length, False)


def _random(keys: Tensor, rows: Tensor, stream: int, length: int, uniform: bool) -> Tensor:
    if rows.numel() and length and _machine.has_kernels(keys.new_empty(0, dtype=torch.float32)):
        return _random_rows(keys, rows, _hashing.draw_of(stream), length, uniform)
    return by_blocks(
        lambda part: _hashed(keys, rows[part], _hashing.draw_of(stream), length, uniform),
        rows[:, None].expand(-1, length),
    )


def _hashed(keys: Tensor, rows: Tensor, draw: int, length: int, uniform: bool) -> Tensor:
    return (_hashing.uniforms if uniform else _hashing.normals)(keys[rows], draw, length)


def signs_of_largest(x: Tensor, counts: Tensor) -> Tensor:
    """± 1/k on the k = `counts` (int64, ≥ 1) entries of each row that are largest; zero for a row of zeros."""
    if x.numel() and _machine.all_have_kernels([x]):
        signs = x.clone()
        torch.ops.rai_toolbox.keep_largest_([signs], [x.shape[1]], [1], True, False, 1.0, None, counts)
        return signs
    return _portable.signs_of_largest(x, counts)


def unit_l2(x: Tensor) -> Tensor:
    """x / ‖x‖₂ of each row, zero for zero, right over the range of the dtype."""
    if x.numel() and _machine.all_have_kernels([x]):
        unit = x.clone()
        _rows.scale_by_norm_([unit], [x.shape[1]], NormFactor("normalize", 2, 0.0))
        return unit
    x = x / x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def scaled_into_ball(delta: Tensor, radius: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor | None:
    """clip(t δ, low, high), t ≤ 1, with the norm `radius` in L2 or less: the nearest point of ball ∩ box.

    Up to `_NEAR_ENOUGH` of the square of the radius; never beyond it but for rounding. None where looking at values is
    not free, and out of the range in which squares are safe.

    low ≤ 0 ≤ high. Of t², the squared norm is a concave function made of lines: Newton's steps from below come to the
    root from below.
    """
    if not _machine.can_branch_on_values(delta) or not delta.numel():
        return None
    size = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    if not bool(((size < _SAFE) & (radius > 1 / _SAFE) & (radius < _SAFE)).all()):
        return None
    t = (radius / size).clamp_max_(1.0)
    if low is None or high is None:
        return delta * t
    square = radius.square()
    near = _NEAR_ENOUGH * square
    for _ in range(_NEWTON_STEPS):
        scaled = delta * t
        clipped = scaled.clamp(low, high)
        squares = clipped.square()
        left = square - squares.sum(dim=1, keepdim=True)
        there = left <= near
        if bool((there | (t >= 1)).all()):
            return clipped
        free = squares.masked_fill_(clipped != scaled, 0.0).sum(dim=1, keepdim=True).clamp_min_(1 / _SAFE**2)
        growth = left.div_(free).masked_fill_(there, 0.0)  # a row that is there stays: others do not move its last bit
        t = (t * growth.add_(1.0).sqrt_()).clamp_max_(1.0)
    return None


def shrunk_into_ball(delta: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """clip(sign(δ) max(|δ| - θ, 0), low, high), θ ≥ 0, with the L1 norm `radius` or less: the nearest of ball ∩ box.

    Up to `_NEAR_ENOUGH` of the radius; never beyond it but for rounding. Second, the numbers of the rows for which
    single precision might not do, or which hold NaN: what is returned for them is of no use. None where looking at
    values is not free.

    low ≤ 0 ≤ high. The norm falls in θ along lines: Newton's steps, after a few also half of the bracket where they
    leave it.
    """
    if not _machine.can_branch_on_values(delta) or not delta.numel():
        return None
    size, room = delta.abs(), torch.where(delta > 0, high, low).abs_()
    top = size.amax(dim=1, keepdim=True)
    sane = (top <= _FEW_RADII * radius) & (radius.clamp(1 / _SAFE, _SAFE) == radius)
    rest = torch.empty(0, dtype=torch.int64, device=delta.device)
    if not bool(sane.all()):
        rest = (~sane[:, 0]).nonzero()[:, 0]
        size[rest] = room[rest] = 0.0  # at once done
    near, aim = radius * (_NEAR_ENOUGH / 2), radius * (1 - _NEAR_ENOUGH / 2)
    theta = bottom = torch.full_like(top, torch.finfo(top.dtype).tiny)  # not 0: entries that are 0 are not free
    work, left, done = torch.empty_like(size), torch.empty_like(size), sane
    for step in range(_NEWTON_STEPS):
        torch.sub(size, theta, out=work)
        torch.minimum(torch.clamp_min(work, 0, out=left), room, out=left)
        excess = left.sum(dim=1, keepdim=True).sub_(aim)
        done = (excess if step == 0 else excess.abs()) <= near
        if bool(done.all()):
            break
        if step == 0:
            near = near.masked_fill(done, torch.inf)  # what is inside stays
        free = torch.eq(left, work, out=work).sum(dim=1, keepdim=True)
        if step < _FREE_STEPS:
            # a row that is done stays: others do not move its last bit
            theta = excess.div_(free.clamp_min_(1)).masked_fill_(done, 0.0).add_(theta).clamp_(bottom, top)
            continue
        above = excess > 0
        bottom, top = torch.where(above, theta, bottom), torch.where(above, top, theta)
        new = excess.div_(free).add_(theta)
        new = torch.where((new > bottom) & (new < top), new, torch.lerp(bottom, top, 0.5))
        theta = torch.where(done, theta, new)
    else:
        torch.minimum(size.sub_(torch.where(done, theta, top)).relu_(), room, out=left)
    return left.copysign_(delta), rest


def put_rows_(into: Sequence[Tensor], rows: Tensor, mask: Tensor, values: Sequence[Tensor]) -> None:
    """Put row i of the values in the place of row `rows[i]`, no two alike, where the mask is true."""
    if rows.numel() and _machine.all_have_kernels([into[0], values[0]]):
        _put_rows_(
            [v.detach() for v in into], rows, mask, [v.detach().to(t.dtype) for v, t in zip(values, into, strict=True)]
        )
        return
    if _machine.can_branch_on_values(mask):
        chosen = mask.nonzero()[:, 0]  # mostly few, or none
        if len(chosen):
            places = rows[chosen]
            for t, v in zip(into, values, strict=True):
                t[places] = v[chosen].to(t.dtype)
        return
    for t, v in zip(into, values, strict=True):
        t[rows] = torch.where(mask.view(-1, *(1,) * (v.ndim - 1)), v, t[rows])


def _per_row(x: Tensor) -> tuple[int, int, int]:
    """Programs, warps, and how many entries a program reads at a time."""
    n, length = len(x), x.numel() // len(x)
    warps = 1 if length <= 256 else 4 if length <= 2**14 else 8
    return n, warps, 64 * warps


def _fake_distances(points: Tensor, data: Tensor, order: int) -> Tensor:
    return points.new_empty(len(points), dtype=torch.float64)


@operator("row_distances(Tensor points, Tensor data, int order) -> Tensor", _fake_distances)
def _row_distances(points: Tensor, data: Tensor, order: int) -> Tensor:
    result = _fake_distances(points, data, order)
    programs, warps, block = _per_row(points)
    done = run(
        "row_distances", programs, warps, points.device, points.shape[1], points, data, result,
        T=points.dtype, BLOCK=block, P=order,
    )  # fmt: skip
    return result if done else _distances(points, data, _name(order))


def _name(order: int) -> str:
    return next(norm for norm, value in _ORDERS.items() if value == order)


def _distances(points: Tensor, data: Tensor, norm: str) -> Tensor:
    # an infinite entry that stays is at distance zero
    delta = torch.where(points == data, 0.0, points.double() - data.double())
    if not delta.shape[1]:
        return delta.new_zeros(len(delta))
    if norm == "l1":
        return delta.abs().sum(dim=1)
    if norm == "l2":
        return torch.linalg.vector_norm(delta, dim=1)
    if norm == "linf":
        return delta.abs().amax(dim=1)
    return (delta != 0).sum(dim=1).double()


def _fake_landed(delta: Tensor, data: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(data, memory_format=torch.contiguous_format)


@operator(
    "land_rows(Tensor delta, Tensor data, Tensor epsilon, Tensor? lower, Tensor? upper, int order) -> Tensor",
    _fake_landed,
)
def _land_rows(
    delta: Tensor, data: Tensor, epsilon: Tensor, lower: Tensor | None, upper: Tensor | None, order: int
) -> Tensor:
    result = _fake_landed(delta, data)
    programs, warps, block = _per_row(data)
    lows, highs = (data if b is None else b.expand(data.shape) for b in (lower, upper))
    done = run(
        "land_rows", programs, warps, data.device, data.shape[1], delta, data, epsilon.contiguous(),
        lows, *lows.stride(), highs, *highs.stride(), result,
        T=data.dtype, BLOCK=block, P=order, BOUNDED=lower is not None,
    )  # fmt: skip
    return result if done else _land(delta, data, epsilon, lower, upper, _name(order))


def _land(
    delta: Tensor, data: Tensor, epsilon: Tensor, lower: Tensor | None, upper: Tensor | None, norm: str
) -> Tensor:
    base = data.double()
    if norm == "linf":
        delta = delta.double().clamp(-epsilon, epsilon)
    elif norm != "l0":
        size = torch.linalg.vector_norm(delta, ord=_ORDERS[norm], dim=1, keepdim=True, dtype=torch.float64)
        outside = size > epsilon
        if not _machine.seen(lambda: not bool(outside.any()), outside):
            delta = delta * torch.where(outside, epsilon / size * (1 - 1e-15), 1.0)
    wish = base + delta
    # Rounded, but never further from the data than the wish is.
    x = wish.to(data.dtype)
    beyond = (x - base).abs() > (wish - base).abs()
    x = torch.where(beyond, torch.nextafter(x, data), x)
    if norm == "linf" and data.dtype == torch.float64:
        # The sum above was itself rounded.
        x = torch.where((x - base).abs() > epsilon, torch.nextafter(x, base), x)
    return x if lower is None and upper is None else x.clamp(lower, upper)


def _fake_usable(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape, dtype=torch.float32), grad.new_empty(len(grad), dtype=torch.int8)


@operator("usable_gradients(Tensor grad, Tensor? keys, Tensor? rows, int draw) -> (Tensor, Tensor)", _fake_usable)
def _usable_gradients(grad: Tensor, keys: Tensor | None, rows: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
    result, dead = _fake_usable(grad)
    programs, warps, block = _per_row(grad)
    done = run(
        "usable_gradients", programs, warps, grad.device, grad.shape[1], grad,
        dead if keys is None else keys, dead if rows is None else rows, draw, result, dead,
        T=grad.dtype, BLOCK=block, DRAW=keys is not None,
    )  # fmt: skip
    if not done:
        result = grad.float().nan_to_num(nan=0.0)
        is_dead = result.abs().amax(dim=1) == 0
        if keys is not None and rows is not None:
            random = _hashing.normals(keys[rows], draw, grad.shape[1]).float()
            result = torch.where(is_dead[:, None], random, result)
        dead.copy_(is_dead)
    return result, dead


@operator("put_rows_(Tensor(a!)[] into, Tensor rows, Tensor mask, Tensor[] values) -> ()", lambda *args: None)
def _put_rows_(into: list[Tensor], rows: Tensor, mask: Tensor, values: list[Tensor]) -> None:
    for t, v in zip(into, values, strict=True):
        programs, warps, block = _per_row(v)
        kind = _SAME_SIZE[t.element_size()]
        done = run(
            "put_rows", programs, warps, t.device, v.numel() // programs, t.view(kind), rows, mask.view(torch.int8),
            v.contiguous().view(kind), T=kind, BLOCK=block,
        )  # fmt: skip
        if not done:
            t[rows] = torch.where(mask.view(-1, *(1,) * (v.ndim - 1)), v, t[rows])


def _fake_random(keys: Tensor, rows: Tensor, draw: int, length: int, uniform: bool) -> Tensor:
    return keys.new_empty((len(rows), length), dtype=torch.float64)


@operator("random_rows(Tensor keys, Tensor rows, int draw, int length, bool uniform) -> Tensor", _fake_random)
def _random_rows(keys: Tensor, rows: Tensor, draw: int, length: int, uniform: bool) -> Tensor:
    result = _fake_random(keys, rows, draw, length, uniform)
    programs, warps, block = _per_row(result)
    done = run(
        "random_rows", programs, warps, keys.device, length, keys, rows, draw, result,
        T=torch.float64, BLOCK=block, UNIFORM=uniform,
    )  # fmt: skip
    return result if done else _hashed(keys, rows, draw, length, uniform)
