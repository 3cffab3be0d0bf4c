"""The nearest point of ball ∩ box as a formula, from which entries lie where: what its gradient is taken of."""

from __future__ import annotations

import torch
from torch import Tensor


def closed_form(
    y: Tensor, least: Tensor, most: Tensor, epsilon: Tensor, nearest: Tensor, has_inside: Tensor, p: int
) -> Tensor:
    """The nearest point to rows outside of the ball, to be differentiated where it is `nearest`.

    Entries at a bound follow that bound. The free ones share what the others leave of the radius: y less one number
    for L1, y times one number for L2.

    y, least, most, shape (N, D): entries turned to be ≥ 0 where the box lets them, and the interval that they may lie
        in; see `folded`.
    epsilon, shape (N, 1)
    nearest, shape (N, D): the result, turned likewise. No gradient passes through it.
    has_inside, shape (N, D): where zero lies between the bounds and at neither: there an entry can cross zero.
    p: 1 or 2.
    """
    room = most > least
    free = (nearest > least) & (nearest < most)
    if p == 2:  # an entry that can cross zero is proportional to y there
        free = free | ((nearest == 0) & has_inside)
    else:  # one that has the whole sum leaves the others rounding errors
        whole = (nearest >= epsilon) & (epsilon > 0)
        free = free & (whole | ~whole.any(1, keepdim=True))
    # from a radius of zero, the entries grow that are the first to
    growing = y > 0 if p == 2 else y == torch.where(room, y, -torch.inf).amax(1, keepdim=True)
    free = free | ((epsilon == 0) & room & growing)
    # infinite entries share as if they had grown at the same pace; nothing is left for the others of their row
    infinite = free & y.isinf()
    zero = torch.zeros_like(y)
    moving = torch.where(free & y.isfinite(), y, zero)
    moving = torch.where(infinite.any(1, keepdim=True), infinite.to(y.dtype), moving)
    # the sum of what is below the largest, for that of large entries may leave the range
    largest = moving.detach().amax(1, keepdim=True)
    below = torch.where(free, moving - largest, zero)
    # an entry without room is at both of its bounds; it pushes against one
    with torch.no_grad():
        taken = (below - torch.where(free, nearest, zero)).sum(1, keepdim=True) / free.sum(1, keepdim=True)
        pushes_up = y > 0 if p == 2 else y - largest - taken > most
    held = torch.where(free, zero, torch.where((nearest >= most) & (room | pushes_up), most, least))
    if p == 2:
        return torch.where(free, _normalized(moving) * _rest_of_norm(held, epsilon), held)
    excess = below.sum(1, keepdim=True) + held.sum(1, keepdim=True) - epsilon
    return torch.where(free, below - excess / free.sum(1, keepdim=True).clamp_min(1), held)


def _rest_of_norm(held: Tensor, epsilon: Tensor) -> Tensor:
    """√(epsilon² - ‖held‖²); without a gradient where nothing is left, for there the root has none."""
    one = torch.ones_like(epsilon)
    share = 1 - (held / torch.where(epsilon > 0, epsilon, one)).square().sum(1, keepdim=True)
    left = share > 0
    return torch.where(left, torch.where(left, share, one).sqrt() * epsilon, torch.zeros_like(epsilon))


def _normalized(x: Tensor) -> Tensor:
    """x/‖x‖₂, and zero for zero."""
    largest = x.detach().abs().amax(1, keepdim=True)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    squares = x.square().sum(1, keepdim=True)
    return x / torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()
