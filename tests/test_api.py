"""The public names and signatures that code written for rai-toolbox 0.2 and 0.3 relies on."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD

import rai_toolbox
from rai_toolbox import functional, optim

TINY = 1.1754943508222875e-38


def published(text: str) -> inspect.Signature:
    """The signature written as a parameter list."""
    names = {"SGD": SGD, "tiny": TINY, "torch": torch, "AdditivePerturbation": _additive()}
    scope: dict[str, Any] = {}
    exec(f"def f({text}): ...", names, scope)
    return inspect.signature(scope["f"])


def _additive() -> type:
    return importlib.import_module("rai_toolbox.perturbations").AdditivePerturbation


def shape(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults in order; annotations may be better."""
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


NORMED = (
    "params, InnerOpt=SGD, *, param_ndim=-1, defaults=None, grad_scale=1.0, grad_bias=0.0, div_by_zero_eps=tiny, "
    "**kwargs"
)
CLAMPED = (
    "params=None, InnerOpt=SGD, *, clamp_min=None, clamp_max=None, defaults=None, param_ndim=None, **inner_opt_kwargs"
)
BALL = "params, *, epsilon, lr=2.0, use_default_lr_schedule=True, param_ndim=-1, div_by_zero_eps=tiny"

OPTIM = {
    "ParamTransformingOptimizer": "params=None, InnerOpt=SGD, *, param_ndim=-1, grad_scale=1.0, grad_bias=0.0, "
    "defaults=None, **inner_opt_kwargs",
    "ChainedParamTransformingOptimizer": "*transforming_optimizers, params=None, InnerOpt=SGD, param_ndim=-1, "
    "grad_scale=1, grad_bias=0, defaults=None, **inner_opt_kwargs",
    "L1NormedGradientOptim": NORMED,
    "L2NormedGradientOptim": NORMED,
    "SignedGradientOptim": "params, InnerOpt=SGD, *, grad_scale=1.0, grad_bias=0.0, defaults=None, param_ndim=None, "
    "**inner_opt_kwargs",
    "L2ProjectedOptim": "params, InnerOpt=SGD, *, epsilon, param_ndim=-1, grad_scale=1.0, grad_bias=0.0, "
    "defaults=None, div_by_zero_eps=tiny, **inner_opt_kwargs",
    "LinfProjectedOptim": "params, InnerOpt=SGD, *, epsilon, param_ndim=None, grad_scale=1.0, grad_bias=0.0, "
    "defaults=None, **inner_opt_kwargs",
    "TopQGradientOptimizer": "params, InnerOpt=SGD, *, q, dq=0.0, param_ndim=-1, defaults=None, "
    "generator=torch.default_generator, **inner_opt_kwargs",
    "L1qNormedGradientOptim": "params, InnerOpt=SGD, *, q, dq=0.0, param_ndim=-1, grad_scale=1.0, grad_bias=0.0, "
    "defaults=None, div_by_zero_eps=tiny, generator=torch.default_generator, **inner_opt_kwargs",
    "ClampedGradientOptimizer": CLAMPED,
    "ClampedParameterOptimizer": CLAMPED,
    "FrankWolfe": "params, *, lr=2.0, lmo_scaling_factor=1.0, use_default_lr_schedule=True, div_by_zero_eps=tiny",
    "L1FrankWolfe": BALL,
    "L2FrankWolfe": BALL,
    "LinfFrankWolfe": BALL,
    "L1qFrankWolfe": "params, *, q, epsilon, dq=0.0, lr=2.0, use_default_lr_schedule=True, param_ndim=-1, "
    "div_by_zero_eps=tiny, generator=torch.default_generator",
}
PERTURBATIONS = {
    "AdditivePerturbation": "data_or_shape, init_fn=None, *, device=None, dtype=None, delta_ndim=None, "
    "**init_fn_kwargs",
    "gradient_ascent": "*, model, data, target, optimizer, steps, perturbation_model=AdditivePerturbation, "
    "targeted=False, use_best=False, criterion=None, reduction_fn=torch.sum, **optim_kwargs",
    "random_restart": "solver, repeats",
    "uniform_like_l1_n_ball_": "x, epsilon=1.0, param_ndim=-1, generator=torch.default_generator",
    "uniform_like_l2_n_ball_": "x, epsilon=1.0, param_ndim=-1, generator=torch.default_generator",
    "uniform_like_linf_n_ball_": "x, epsilon=1.0, param_ndim=None, generator=torch.default_generator",
}
TOP = {
    "to_batch": "p, param_ndim",
    "evaluating": "*modules",
    "freeze": "*items",
    "frozen": "*items",
    "negate": "func",
}


@pytest.mark.parametrize("name", OPTIM)
def test_an_optimizer_has_its_published_signature(name: str) -> None:
    assert shape(inspect.signature(getattr(optim, name))) == shape(published(OPTIM[name]))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_tool_has_its_published_signature(name: str) -> None:
    module = importlib.import_module("rai_toolbox.perturbations")
    signature = inspect.signature(getattr(module, name))
    ours, theirs = shape(signature), shape(published(PERTURBATIONS[name]))
    added = [p for p in ours if p not in theirs]
    assert [p for p in ours if p in theirs] == theirs
    assert all(kind is inspect.Parameter.KEYWORD_ONLY and default is not inspect._empty for _, kind, default in added)
    assert not added or name == "gradient_ascent"  # may have options of its own, keyword-only


@pytest.mark.parametrize("name", TOP)
def test_a_top_level_name_has_its_published_signature(name: str) -> None:
    assert shape(inspect.signature(getattr(rai_toolbox, name))) == shape(published(TOP[name]))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("perturbations", "PerturbationModel"),
        ("perturbations.models", "PerturbationModel"),
        ("perturbations.models", "AdditivePerturbation"),
        ("perturbations.init", "uniform_like_l1_n_ball_"),
        ("perturbations.init", "uniform_like_l2_n_ball_"),
        ("perturbations.init", "uniform_like_linf_n_ball_"),
        ("perturbations.solvers", "gradient_ascent"),
        ("perturbations.solvers", "random_restart"),
    ],
)
def test_a_name_is_where_the_older_documentation_imports_it_from(place: str, name: str) -> None:
    top = importlib.import_module("rai_toolbox.perturbations")
    assert getattr(importlib.import_module(f"rai_toolbox.{place}"), name) is getattr(top, name)


@pytest.mark.parametrize("module", [rai_toolbox, optim, functional], ids=lambda m: m.__name__)
def test_all_lists_sorted_names_that_exist(module: Any) -> None:
    assert sorted(module.__all__) == list(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_published_optimizer_is_exported() -> None:
    assert set(OPTIM) <= set(optim.__all__)


def _public_callables() -> list[tuple[str, Callable[..., Any]]]:
    return [(f"{m.__name__}.{n}", getattr(m, n)) for m in (rai_toolbox, optim, functional) for n in m.__all__]


@pytest.mark.parametrize(
    ("name", "item"), [c for c in _public_callables() if callable(c[1])], ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_public_name_documents_its_parameters_and_has_an_example_that_runs(
    name: str, item: Callable[..., Any]
) -> None:
    doc = inspect.getdoc(item) or ""
    assert ">>> " in doc, f"{name} has no example"
    described = doc.partition("Parameters\n-----")[2]
    for parameter in inspect.signature(item).parameters:
        if parameter not in ("self", "cls"):
            assert parameter in described, f"{name} does not describe `{parameter}`"


def test_importing_the_optimizers_imports_torch_and_nothing_else_that_is_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import rai_toolbox.optim;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'rai_toolbox', 'torch'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_version_is_a_version() -> None:
    assert rai_toolbox.__version__.count(".") >= 1
    assert rai_toolbox.__version__[0].isdigit()


@pytest.mark.parametrize("name", ["mushin", "losses", "augmentations", "datasets", "mushin.workflows"])
def test_modules_of_the_older_package_that_are_not_here_point_to_the_page_on_migration(name):
    with pytest.raises(ImportError, match=r"docs/migration\.md"):
        importlib.import_module(f"rai_toolbox.{name}")
    with pytest.raises(ImportError, match=r"docs/migration\.md"):
        exec("from rai_toolbox import " + name.partition(".")[0])
    assert importlib.import_module("rai_toolbox.perturbations.losses")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rai_toolbox.nothing_of_the_kind")
