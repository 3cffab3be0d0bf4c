"""Models without a gradient are evaluated by queries: within a budget, as an upper bound, and marked as one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rai_toolbox.robustness import InputError, evaluate

WEIGHT = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
TRUTH = WEIGHT[:, 1] - WEIGHT[:, 0]
ORDER = {"l2": 2, "linf": 1, "l1": np.inf}  # the dual norm


def in_numpy(x):
    return torch.from_numpy(x.numpy() @ WEIGHT)


def under_no_grad(x):
    with torch.no_grad():
        return x @ torch.from_numpy(WEIGHT)


def points():
    x = np.random.default_rng(1).normal(size=(24, 6)).astype(np.float32)
    return x, (x @ WEIGHT).argmax(axis=1)


@pytest.mark.parametrize("model", [in_numpy, under_no_grad])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_the_nearest_error_of_a_linear_model_is_found_nearly_and_the_budget_is_kept(model, norm):
    x, y = points()
    exact = np.abs(x @ TRUTH) / np.linalg.norm(TRUTH, ORDER[norm])
    result = evaluate(model, (x, y), norms=norm, epsilons=[float(np.median(exact))], queries=1500)
    distance = result.distance[norm]
    assert (distance >= exact * (1 - 1e-4)).all()
    assert np.median(distance / exact) < 1.05
    assert result.curves[norm].forwards_per_sample <= 1500
    assert result.settings["gradient"] is False
    found = {finding.check: finding for finding in result.findings}
    assert found["zero-gradients"].verdict == "warning"
    assert "1500 queries" in found["zero-gradients"].summary
    assert "1500 queries" in result.evidence[0].meaning
    assert result.unmade == ()
    assert result.trusted


def test_trees_are_evaluated(digits):
    tree = pytest.importorskip("sklearn.tree")
    x, y = digits
    flat = x.reshape(len(x), -1)
    trees = tree.DecisionTreeClassifier(random_state=0).fit(flat[200:], y[200:])

    def model(x):
        return torch.from_numpy(trees.predict_proba(x.flatten(1).numpy()).astype(np.float32))

    result = evaluate(model, (x[:8], y[:8]), norms="linf", epsilons=[0.2], queries=200, diagnostics=False)
    assert result.curves["linf"].points[1].value < result.curves["linf"].points[0].value


def test_a_model_of_values_needs_a_gradient():
    x, _ = points()
    with pytest.raises(InputError, match="without a gradient only classifiers"):
        evaluate(under_no_grad, (x, x[:, :2]), task="regression")
