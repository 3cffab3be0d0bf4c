"""One batch may be all there is: limit, progress and journal work inside it."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from rai_toolbox.robustness import evaluate
from rai_toolbox.robustness._files import UNFINISHED
from rai_toolbox.robustness.attack import _under_way

OPTIONS = {"steps": 4, "restarts": 6, "seed": 3, "batch_size": 64}


class Killed(BaseException):
    """No `except Exception` stops it."""


class Counted:
    """A model that is killed at one of its calls, or ends the time at it."""

    def __init__(self, net, at, then):
        self.net, self.at, self.then, self.calls = net, at, then, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at:
            self.then()
        return self.net(x)


def killed():
    raise Killed


def calls_of(net, data, **options):
    counted = Counted(net, 0, killed)
    whole = evaluate(counted, data, **options)
    return whole, counted.calls


def figures(result):
    return {name: value for name, value in result.to_dict().items() if name not in ("timings", "environment")}


@pytest.mark.parametrize(
    ("norm", "restarts"), [("l2", 6), ("linf", 6), ("l1", 9), ("l0", 6), ("l2", 12), ("linf", 12), ("l1", 12)]
)
def test_a_run_that_was_killed_in_its_only_batch_goes_on_from_its_last_run(
    norm, restarts, small_net, digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(_under_way, "_SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(_under_way, "_WRITING_SHARE", 1e9)
    data = digits[0][:8], digits[1][:8]
    options = OPTIONS | {"norms": norm, "restarts": restarts, "diagnostics": False}
    whole, calls = calls_of(small_net, data, **options)
    for _ in range(2):
        with pytest.raises(Killed):
            evaluate(Counted(small_net, int(0.35 * calls), killed), data, folder=tmp_path, resume=True, **options)
    rest = Counted(small_net, 0, killed)
    found = evaluate(rest, data, folder=tmp_path, resume=True, **options)
    assert figures(found) == figures(whole)
    assert rest.calls < 0.7 * calls
    assert not list((tmp_path / UNFINISHED).glob("*.under-way"))


def test_a_regression_goes_on_inside_its_batch_too(tmp_path, monkeypatch):
    monkeypatch.setattr(_under_way, "_SECONDS_BETWEEN_WRITES", 0.0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).requires_grad_(False)
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    options = OPTIONS | {"task": "regression", "diagnostics": False, "epsilons": [0.1, 0.2, 0.4]}
    whole, calls = calls_of(net, (x, net(x) + 0.1), **options)
    with pytest.raises(Killed):
        evaluate(Counted(net, int(0.7 * calls), killed), (x, net(x) + 0.1), folder=tmp_path, **options)
    rest = Counted(net, 0, killed)
    assert figures(evaluate(rest, (x, net(x) + 0.1), folder=tmp_path, resume=True, **options)) == figures(whole)
    assert rest.calls < 0.6 * calls


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_limit_ends_a_batch_between_two_calls_of_the_model(share, small_net, digits, monkeypatch):
    data = digits[0][:8], digits[1][:8]
    options = OPTIONS | {"diagnostics": False, "epsilons": [0.5, 1.0]}
    whole, calls = calls_of(small_net, data, **options)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    counted = Counted(small_net, int(share * calls), lambda: now.__setitem__(0, 100.0))
    found = evaluate(counted, data, time_limit=50, **options)
    assert not found.complete
    # The last look at what was found: by the solver, and by the evaluation.
    assert counted.calls <= int(share * calls) + 2
    assert (found.distance["l2"] >= whole.distance["l2"] - 1e-6).all()
    if share > 0.1:
        assert np.isfinite(found.distance["l2"]).any()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_limit_ends_a_check_and_the_attacks_that_it_asks_for(share, digits, small_net, monkeypatch):
    data = digits[0][:6], digits[1][:6]

    def rounded(x):  # its gradient is doubted
        return small_net((x * 4).round() / 4 + 0.01 * x)

    options = OPTIONS | {"epsilons": [0.5, 1.0]}
    attacks, before = calls_of(rounded, data, **options | {"diagnostics": False})
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    at = int(before * (1 + share))
    counted = Counted(rounded, at, lambda: now.__setitem__(0, 100.0))
    found = evaluate(counted, data, time_limit=50, **options)
    assert counted.calls <= at + 2
    assert found.unmade
    np.testing.assert_array_equal(found.distance["l2"], attacks.distance["l2"])
    late = [finding.check for finding in found.findings if "time limit" in finding.summary]
    assert late
    assert found.findings[0].verdict != "not run"


def test_what_is_done_of_a_batch_is_told(small_net, digits):
    told = []

    def progress(stage, done, total):
        told.append((stage, done, total))

    vars(progress)["beat"] = progress
    evaluate(small_net, (digits[0][:8], digits[1][:8]), progress=progress, **OPTIONS | {"diagnostics": False})
    searching = [done for stage, done, _ in told if stage.startswith("Searching")]
    assert searching == sorted(searching)
    assert len({round(done, 1) for done in searching}) > 5
