"""What hides a gradient is seen through: the outputs stay, and the gradient points to where they change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rai_toolbox.robustness.attack._bpda import BPDA

WEIGHT = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0, 0.7]])


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, *grads):
        return -grads[0]


class Left(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy().round(1))

    @staticmethod
    def backward(ctx, *grads):
        return torch.zeros_like(grads[0])


def under_no_grad(x):
    with torch.no_grad():
        return 3 * x


def hooked(x):
    y = 1 * x
    y.register_hook(torch.zeros_like)
    return y


def winners(x):
    best = x.topk(3, dim=1)
    mask = torch.zeros_like(x)
    mask.scatter_(1, best.indices, 1.0)
    return mask


def quantized(x):
    return (x * 8).to(torch.int64).float() / 8


HIDING = {
    "round": lambda x: (4 * x).round() / 4,
    "floor": lambda x: (4 * x).floor(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data * 1.0,
    "no_grad": under_no_grad,
    "a backward pass of its own": lambda x: Doubled.apply(x),
    "numpy in a function": lambda x: Left.apply(x),
    "a hook": hooked,
    "sign": lambda x: x.sign(),
    "above": lambda x: (x > 0.1).float(),
    "a mask": lambda x: (x >= 0.1) * 2.0,
    "not below": lambda x: torch.logical_not(x < 0.1).to(x.dtype),
    "where": lambda x: torch.where(x > 0, 1.0, -1.0),
    "heaviside": lambda x: torch.heaviside(x, torch.zeros(())),
    "ranks": lambda x: x.argsort(dim=1).argsort(dim=1).float() / 6,
    "ranks as they are": lambda x: x.argsort(dim=1).argsort(dim=1) / 6,
    "winners": winners,
    "integers": quantized,
    "bucketize": lambda x: torch.bucketize(x, torch.linspace(-1, 1, 5)).float(),
    "a steep sigmoid": lambda x: torch.sigmoid(500 * x),
    "a thermometer": lambda x: (x[:, :, None] > torch.tensor([-0.5, 0.0, 0.5])).float().sum(dim=-1),
    "clamp": lambda x: (50 * x).clamp(0, 1),
    "floor_divide": lambda x: torch.div(x, 0.25, rounding_mode="floor"),
}


@pytest.mark.parametrize("hide", HIDING.values(), ids=HIDING)
def test_what_hides_a_gradient_is_seen_through_and_changes_no_output(hide):
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def model(x):
        return hide(x) @ WEIGHT.T

    through = BPDA(model)
    out = through(x)
    torch.testing.assert_close(out, model(x).detach())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert through.replaced
    assert ((grad * WEIGHT).sum(dim=1) > 0).all()
    assert torch.nn.functional.cosine_similarity(grad, WEIGHT.expand_as(grad), dim=1).median() > 0.6


def test_it_is_seen_through_in_a_graph_of_torch_export_too():
    names = ["round", "detach", "no_grad", "sign", "above", "ranks", "a mask", "where"]

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Buffer(WEIGHT)

        def forward(self, x):
            return torch.stack([HIDING[name](x) @ self.weight.T for name in names])

    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    model = torch.export.export(Hiding(), (x,)).module()
    for number in range(len(names)):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(BPDA(model)(leaf)[number].sum(), leaf)
        assert ((grad * WEIGHT).sum(dim=1) > 0).all(), names[number]


def test_a_plain_model_has_the_gradient_that_it_has(small_net):
    x = torch.rand(5, 1, 8, 8, requires_grad=True)
    through = BPDA(small_net)
    grads = [torch.autograd.grad(model(x).square().sum(), x)[0] for model in (small_net, through)]
    assert torch.equal(*grads) or through.replaced == {"tanh"}


def test_functions_of_autograd_are_as_they_were_afterwards_also_where_the_model_raises():
    x = torch.ones(2, 6, requires_grad=True)
    BPDA(Doubled.apply)(x)

    def raising(x):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        BPDA(raising)(x)
    (grad,) = torch.autograd.grad(Doubled.apply(x).sum(), x)
    assert (grad == -1).all()
