"""How a step goes: order, what the hooks see, `param_ndim`, closures, in place."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from optimizer_cases import ALL_CASES, Case, Idle
from torch.optim import LBFGS, SGD, Adam

from rai_toolbox import to_batch
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    L1NormedGradientOptim,
    L1ProjectedOptim,
    L1qNormedGradientOptim,
    L2FrankWolfe,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LpNormedGradientOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
)

IDS = [case.name for case in ALL_CASES]


class Recorder(ParamTransformingOptimizer):
    """Writes down what its hooks are given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[tuple[str, tuple[int, ...], Any]] = []
        super().__init__(*args, **kwargs)

    def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
        assert not torch.is_grad_enabled()
        assert param.grad is not None
        assert param.grad.shape == param.shape
        self.seen.append(("pre", tuple(param.shape), param.grad.clone()))

    def _post_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
        assert not torch.is_grad_enabled()
        self.seen.append(("post", tuple(param.shape), None if param.grad is None else param.grad.clone()))


def test_a_step_transforms_gradients_scales_shifts_steps_and_then_transforms_parameters() -> None:
    order: list[str] = []

    class Inner(SGD):
        def step(self, closure: Any = None) -> Any:
            order.append(f"step {self.param_groups[0]['params'][0].grad.item():g}")
            return super().step(closure)

    class Outer(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            order.append(f"pre {param.grad.item():g}")  # type: ignore[union-attr]
            param.grad.neg_()  # type: ignore[union-attr]

        def _post_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            order.append(f"post {param.item():g}")
            param.mul_(10)

    x = torch.tensor([1.0], requires_grad=True)
    x.grad = torch.tensor([2.0])
    assert Outer([x], Inner, lr=1.0, grad_scale=3.0, grad_bias=0.5, param_ndim=None).step() is None
    assert order == ["pre 2", "step -5.5", "post 6.5"]
    assert x.item() == 65.0


def test_the_post_step_transform_runs_for_parameters_without_a_gradient_and_the_other_does_not() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    x.grad = torch.ones(2)
    optim = Recorder([x, y], Idle, param_ndim=None)
    optim.step()
    assert [(when, shape) for when, shape, _ in optim.seen] == [("pre", (1, 2)), ("post", (1, 2)), ("post", (1, 3))]
    far = torch.full((2, 3), 5.0, requires_grad=True)
    L2ProjectedOptim([far], epsilon=1.0).step()
    torch.testing.assert_close(far.detach().norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("param_ndim", "shape"),
    [
        (0, (30, 1)),
        (1, (15, 2)),
        (2, (3, 5, 2)),
        (-1, (3, 5, 2)),
        (3, (1, 3, 5, 2)),
        (None, (1, 3, 5, 2)),
        (-2, (15, 2)),
        (-3, (30, 1)),
    ],
)
def test_the_hooks_see_the_published_shapes(param_ndim: int | None, shape: tuple[int, ...]) -> None:
    x = torch.arange(30.0).view(3, 5, 2).requires_grad_()
    x.grad = -x.detach()
    optim = Recorder([x], Idle, param_ndim=param_ndim)
    optim.step()
    assert [s for _, s, _ in optim.seen] == [shape, shape]
    assert torch.equal(optim.seen[0][2], -x.detach().view(shape))
    batch = to_batch(x, param_ndim)
    assert batch.shape == shape
    assert batch.data_ptr() == x.data_ptr()
    assert batch.grad is not None
    assert batch.grad.data_ptr() == x.grad.data_ptr()


@pytest.mark.parametrize("param_ndim", [3, -3, 17])
def test_a_param_ndim_beyond_the_dimensions_is_a_value_error(param_ndim: int) -> None:
    with pytest.raises(ValueError, match=r"param_ndim.*\[-2, 2\]"):
        ParamTransformingOptimizer([torch.ones(2, 3, requires_grad=True)], param_ndim=param_ndim)


@pytest.mark.parametrize("param_ndim", [1.0, "1", True, (1,)])
def test_a_param_ndim_that_is_no_int_is_a_type_error(param_ndim: Any) -> None:
    with pytest.raises(TypeError, match="param_ndim"):
        ParamTransformingOptimizer([torch.ones(2, 3, requires_grad=True)], param_ndim=param_ndim)


def test_a_0d_parameter_takes_none_or_zero_and_refuses_minus_one() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    x.grad = torch.tensor(-3.0)
    with pytest.raises(ValueError, match="param_ndim"):
        L2NormedGradientOptim([x], lr=1.0)
    for param_ndim in (None, 0):
        L2NormedGradientOptim([x], lr=1.0, param_ndim=param_ndim).step()
        assert x.grad.item() == -1.0
    assert x.item() == 4.0


@pytest.mark.parametrize("case", ALL_CASES, ids=IDS)
def test_the_gradient_stays_the_same_tensor_in_the_same_memory(case: Case) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    grad = x.grad = torch.randn(3, 4)
    memory = grad.data_ptr()
    case.build([x], InnerOpt=SGD).step()
    assert x.grad is grad
    assert grad.data_ptr() == memory


@pytest.mark.parametrize("hook", ["_pre_step_transform_", "_post_step_transform_"])
def test_a_hook_that_replaces_the_gradient_is_an_error_that_names_the_class(hook: str) -> None:
    def replaces(self: Any, param: torch.Tensor, optim_group: Any) -> None:
        param.grad = param.grad * 2  # type: ignore[operator]

    careless = type("Careless", (ParamTransformingOptimizer,), {hook: replaces})
    x = torch.ones(2, 3, requires_grad=True)
    x.grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"Careless.*in place"):
        careless([x], lr=1.0).step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_hook_changes_a_parameter_and_a_gradient_of_any_strides(layout: torch.memory_format) -> None:
    class Marks(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            param.grad[:, 0] = 7.0  # type: ignore[index]

        def _post_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            param[:, -1] = 9.0

    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
    x.grad = torch.zeros(2, 3, 4, 5).contiguous(memory_format=layout)
    Marks([x], Idle, param_ndim=1).step()
    assert (x.grad[..., 0] == 7).all()
    assert (x.grad[..., 1:] == 0).all()
    assert (x[..., -1] == 9).all()
    assert (x[..., :-1] == 0).all()


@pytest.mark.parametrize("case", [c for c in ALL_CASES if "FrankWolfe" not in c.name], ids=lambda c: c.name)
@pytest.mark.parametrize("param_ndim", [None, -1, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_hook_that_calls_super_takes_the_slow_path_to_the_same_bits(
    case: Case, param_ndim: int | None, dtype: torch.dtype
) -> None:
    def pre(self: Any, param: torch.Tensor, optim_group: Any) -> None:
        super(slow, self)._pre_step_transform_(param=param, optim_group=optim_group)

    def post(self: Any, param: torch.Tensor, optim_group: Any) -> None:
        super(slow, self)._post_step_transform_(param=param, optim_group=optim_group)

    slow = type(f"Slow{case.cls.__name__}", (case.cls,), {"_pre_step_transform_": pre, "_post_step_transform_": post})
    results = []
    for cls in (case.cls, slow):
        gen = torch.Generator().manual_seed(0)
        params = [
            torch.randn(shape, generator=gen).to(dtype).requires_grad_() for shape in [(3, 40), (2, 3, 5), (1, 9)]
        ]
        optim = cls(params, SGD, lr=0.25, param_ndim=param_ndim, **case.options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen).to(dtype)
            optim.step()
        results.append([t for p in params for t in (p.detach(), p.grad)])
    for fast, by_hook in zip(*results, strict=True):
        assert torch.equal(fast, by_hook)


def test_a_class_that_overrides_one_hook_keeps_the_other() -> None:
    class Mine(L2ProjectedOptim):
        def _post_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            super()._post_step_transform_(param=param, optim_group=optim_group)
            param.neg_()

    x = torch.zeros(1, 2, requires_grad=True)
    x.grad = torch.tensor([[-6.0, -8.0]])
    Mine([x], lr=5.0, epsilon=0.5).step()
    torch.testing.assert_close(x.detach(), torch.tensor([[-0.3, -0.4]]))


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_hook_set_on_an_instance_is_used(steps_before: int) -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    optim = L2NormedGradientOptim([x], lr=1.0)
    for _ in range(steps_before):
        x.grad = torch.tensor([[6.0, 8.0]])
        optim.step()
    x.data.zero_()
    x.grad = torch.tensor([[6.0, 8.0]])
    optim._pre_step_transform_ = lambda param, optim_group: param.grad.fill_(2.0)  # type: ignore[method-assign]
    optim.step()
    assert x.tolist() == [[-2.0, -2.0]]


@pytest.mark.parametrize("how", ["cast", "reshaped", "cast back"])
@pytest.mark.parametrize("inner", [SGD, Idle, Adam])
@pytest.mark.parametrize(
    "cls", [L2NormedGradientOptim, SignedGradientOptim, functools.partial(L2ProjectedOptim, epsilon=1.0)]
)
def test_a_parameter_may_be_cast_or_given_another_shape_between_steps(cls: Any, inner: Any, how: str) -> None:
    x = torch.ones(3, 4, requires_grad=True)
    optim = cls([x], inner)
    x.grad = torch.randn(3, 4)
    optim.step()
    if inner is Adam:
        optim.state.clear()
    x.grad = None
    if how == "reshaped":
        x.data = torch.ones(2, 5, 3)
    else:
        x.data = x.data.double()
    if how == "cast back":
        x.grad = torch.ones(x.shape, dtype=x.dtype)
        optim.step()
        x.grad = None
        x.data = x.data.float()
        optim.state.clear()
    x.grad = torch.full(x.shape, 3.0, dtype=x.dtype)
    optim.step()
    expected = torch.full(x.shape, 3.0, dtype=x.dtype)
    if cls is SignedGradientOptim:
        expected.fill_(1.0)
    else:
        expected /= expected[0].norm()
    torch.testing.assert_close(x.grad, expected)


def test_options_may_change_between_steps() -> None:
    x = torch.ones(2, 6, requires_grad=True)
    optim = L2ProjectedOptim([x], Idle, epsilon=1.0)
    for epsilon, param_ndim, scale in ((1.0, -1, 1.0), (0.5, -1, 2.0), (0.25, None, 1.0)):
        optim.param_groups[0].update(epsilon=epsilon, param_ndim=param_ndim, grad_scale=scale)
        x.grad = torch.ones(2, 6)
        optim.step()
        rows = (x if param_ndim == -1 else x.reshape(1, -1)).detach()
        torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), epsilon))
        torch.testing.assert_close(x.grad.view(len(rows), -1).norm(dim=1), torch.full((len(rows),), scale))


def test_gradients_come_and_go_between_steps() -> None:
    x, y = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    optim = L2NormedGradientOptim([x, y], lr=1.0)
    for has_x, has_y in ((True, True), (True, False), (False, True), (False, False), (True, True)):
        x.grad = torch.full((2, 3), 5.0) if has_x else None
        y.grad = torch.full((2, 3), 5.0) if has_y else None
        optim.step()
        for p in (x, y):
            if p.grad is not None:
                torch.testing.assert_close(p.grad, torch.full((2, 3), 3**-0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, -1.7, 1e-3, 0.0])
@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_scale_and_bias_are_a_multiplication_and_then_an_addition_bit_for_bit(
    scale: float, bias: float, dtype: torch.dtype
) -> None:
    g = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.zeros(1000, dtype=dtype, requires_grad=True)
    x.grad = g.clone()
    ParamTransformingOptimizer([x], Idle, grad_scale=scale, grad_bias=bias).step()
    assert torch.equal(x.grad, g.clone().mul_(scale).add_(bias))


# Closures.


def test_step_returns_what_the_closure_returned_and_passes_it_by_position_or_keyword() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    optim = L2NormedGradientOptim([x], lr=1.0)

    def closure() -> str:
        optim.zero_grad()
        (x * torch.tensor([3.0, 4.0])).sum().backward()
        return "the loss"

    assert optim.step(closure) == "the loss"
    assert optim.step(closure=closure) == "the loss"
    assert optim.step(None) is None
    torch.testing.assert_close(x.grad, torch.tensor([[0.6, 0.8]]))


def test_a_closure_runs_with_gradients_enabled_also_inside_no_grad() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    optim = L2NormedGradientOptim([x], lr=1.0)

    def closure() -> torch.Tensor:
        loss = (3 * x).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optim.step(closure).item() == 18.0
    torch.testing.assert_close(x.grad, torch.full((1, 2), 0.5**0.5))


def test_an_inner_optimizer_that_evaluates_often_sees_transformed_gradients_every_time() -> None:
    class Twice(SGD):
        seen: list[float]

        def step(self, closure: Any = None) -> Any:
            self.seen = []
            for _ in range(3):
                with torch.enable_grad():
                    loss = closure()
                self.seen.append(self.param_groups[0]["params"][0].grad.norm().item())
            return loss

    x = torch.full((1, 4), 2.0, requires_grad=True)
    optim = L2NormedGradientOptim([x], Twice, lr=1.0, grad_scale=2.0)

    def closure() -> torch.Tensor:
        optim.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    optim.step(closure)
    assert optim.inner_opt.seen == pytest.approx([2.0, 2.0, 2.0])  # type: ignore[attr-defined]


def _minimise(optim: torch.optim.Optimizer, x: torch.Tensor, steps: int) -> float:
    def closure() -> torch.Tensor:
        optim.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optim.step(closure)
    return x.detach().norm().item()


def test_lbfgs_with_a_line_search_converges_on_normalized_gradients() -> None:
    x = torch.tensor([3.0, -2.0], requires_grad=True)
    optim = L2NormedGradientOptim([x], LBFGS, param_ndim=None, line_search_fn="strong_wolfe")
    assert _minimise(optim, x, 10) < 0.05


def test_lbfgs_steps_as_it_would_on_gradients_transformed_by_hand() -> None:
    x, y = torch.tensor([3.0, -2.0], requires_grad=True), torch.tensor([3.0, -2.0], requires_grad=True)
    optim = ClampedGradientOptimizer([x], LBFGS, clamp_max=1.0, max_iter=5)
    bare = LBFGS([y], max_iter=5)

    def closure() -> torch.Tensor:
        optim.zero_grad()
        loss = (x.square() * torch.tensor([1.0, 10.0])).sum()
        loss.backward()
        return loss

    def by_hand() -> torch.Tensor:
        bare.zero_grad()
        loss = (y.square() * torch.tensor([1.0, 10.0])).sum()
        loss.backward()
        y.grad.clamp_(max=1.0)  # type: ignore[union-attr]
        return loss

    for _ in range(4):
        assert optim.step(closure) == bare.step(by_hand)
    assert torch.equal(x, y)


def test_lbfgs_refuses_two_groups() -> None:
    groups = [{"params": [torch.ones(2, requires_grad=True)]} for _ in range(2)]
    with pytest.raises(ValueError, match="per-parameter options"):
        L2NormedGradientOptim(groups, LBFGS, param_ndim=None)


# The order of a norm, as a class attribute.


def test_the_normed_optimizers_share_a_base_that_takes_any_order_as_a_class_attribute() -> None:
    base = LpNormedGradientOptim
    assert issubclass(L1NormedGradientOptim, base)
    assert issubclass(L2NormedGradientOptim, base)

    class L3(base):
        _p = 3

    x = torch.zeros(1, 2, requires_grad=True)
    x.grad = torch.ones(1, 2)
    optim = L3([x], lr=1.0)
    assert optim.p == 3
    optim.step()
    torch.testing.assert_close(x.grad, torch.full((1, 2), 2 ** (-1 / 3)))
    assert L1NormedGradientOptim([x]).p == 1


@pytest.mark.parametrize(("cls", "order"), [(L1ProjectedOptim, 1), (L2ProjectedOptim, 2), (L2FrankWolfe, 2)])
def test_optimizers_that_norm_and_constrain_say_their_order(cls: Any, order: int) -> None:
    assert cls([torch.zeros(1, 2, requires_grad=True)], epsilon=1.0).p == order


@pytest.mark.parametrize("order", [None, "two", True])
def test_a_missing_or_non_numeric_order_is_a_type_error(order: Any) -> None:
    with pytest.raises(TypeError, match=r"_p|`p`"):
        type("Odd", (LpNormedGradientOptim,), {"_p": order})([torch.zeros(1, 2, requires_grad=True)])


def test_an_order_below_one_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LpNormedGradientOptim([torch.zeros(1, 2, requires_grad=True)], p=0.5)


def test_a_wrapper_of_a_wrapper_applies_both() -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    x.grad = torch.tensor([[3.0, 4.0]])
    inner = functools.partial(ClampedGradientOptimizer, clamp_max=0.7)
    optim = L2NormedGradientOptim([x], inner, lr=1.0, grad_scale=1.0)
    optim.step()
    torch.testing.assert_close(x.detach(), torch.tensor([[-0.6, -0.7]]))
    chain = ChainedParamTransformingOptimizer(SignedGradientOptim, params=None, InnerOpt=optim)
    x.grad = torch.tensor([[3.0, 4.0]])
    chain.step()
    torch.testing.assert_close(x.grad, torch.tensor([[0.7, 0.7]]))


def test_the_signs_of_the_largest_entries_are_divided_by_at_least_div_by_zero_eps():
    x = torch.zeros(2, 4, requires_grad=True)
    optim = L1qNormedGradientOptim([x], lr=1.0, q=0.5, div_by_zero_eps=8.0)
    x.grad = torch.tensor([[1.0, -3.0, 2.0, 0.5], [0.0, 0.0, -1.0, 0.0]])
    optim.step()
    assert x.grad.tolist() == [[0.0, -0.125, 0.125, 0.0], [0.0, 0.0, -0.125, 0.0]]


def test_a_parameter_whose_memory_was_laid_out_anew_steps_along_its_own_gradient():
    p = torch.zeros(1024, 256, 4, 4, requires_grad=True)  # larger than a block
    optim = L2NormedGradientOptim([p], lr=1.0, param_ndim=None)
    p.grad = torch.randn(p.shape)
    optim.step()
    p.data = torch.zeros(p.shape).to(memory_format=torch.channels_last)
    p.grad = torch.randn(p.shape)
    optim.step()
    assert torch.equal(p, -p.grad)


@pytest.mark.parametrize("what", ["param", "grad"])
def test_a_hook_that_assigns_data_is_an_error(what: str):
    class Assigns(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            x = param if what == "param" else param.grad
            assert x is not None
            x.data = x.clamp(0, 1)

    x = torch.full((2, 3), -5.0, requires_grad=True)
    x.grad = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"Assigns\._pre_step_transform_ replaced `param"):
        Assigns([x], lr=0.1).step()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch wants a gradient of the same dtype")
def test_a_hook_sees_a_gradient_of_another_dtype():
    class Doubles(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            assert param.grad is not None
            assert (param.dtype, param.grad.dtype) == (torch.bfloat16, torch.float32)
            param.grad.mul_(2)

    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    x.grad_dtype = torch.float32  # type: ignore[attr-defined]
    x.grad = torch.ones(2, 3)
    Doubles([x], lr=1.0).step()
    assert torch.equal(x, torch.full_like(x, -2.0))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_that_was_replaced_on_the_class_of_the_inner_optimizer_is_called(
    monkeypatch: pytest.MonkeyPatch, wrapped: bool
):
    calls = []
    step = SGD.step

    def counted(self: Any, closure: Any = None) -> Any:
        calls.append(self)
        return step(self, closure)

    monkeypatch.setattr(SGD, "step", functools.wraps(step)(counted) if wrapped else counted)
    x = torch.zeros(2, 3, requires_grad=True)
    x.grad = torch.ones(2, 3)
    L2NormedGradientOptim([x], lr=0.1).step()
    assert len(calls) == 1


@pytest.mark.parametrize("case", ALL_CASES, ids=IDS)
def test_the_default_device_has_no_say_in_where_a_step_works(case: Case):
    x = torch.linspace(-1, 1, 80).view(2, 40).requires_grad_()
    optim = case.build([x], lr=0.1)
    x.grad = torch.linspace(2, -3, 80).view(2, 40)
    with torch.device("meta"):
        optim.step()
    assert x.isfinite().all()
    optim.step()


@pytest.mark.parametrize("case", ALL_CASES, ids=IDS)
def test_a_step_in_inference_mode_leaves_nothing_that_later_ones_stumble_on(case: Case):
    x = torch.linspace(-1, 1, 80).view(2, 40).requires_grad_()
    optim = case.build([x], lr=0.1)
    x.grad = torch.linspace(2, -3, 80).view(2, 40)
    with torch.inference_mode():
        optim.step()
    optim.step()
    assert x.isfinite().all()


def test_a_gradient_whose_entries_overlap_is_changed_as_if_they_did_not():
    x = torch.zeros(3, 3, requires_grad=True)
    x.grad = torch.arange(1.0, 6.0).unfold(0, 3, 1)  # each row begins one entry later in one memory
    L2NormedGradientOptim([x], lr=0.1).step()
    torch.testing.assert_close(x.grad.norm(dim=1), torch.ones(3))
