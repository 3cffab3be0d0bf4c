"""Errors of one model tried on another: where both are lines in the plane, how many transfer is known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rai_toolbox.cli import main
from rai_toolbox.robustness import InputError, compare, evaluate

QUICK: dict[str, Any] = {"steps": 5, "restarts": 1, "diagnostics": False, "epsilons": [0.25, 0.5, 0.75]}


def shifted(by):
    """The classifier whose boundary is at x0 = `by`."""
    return lambda x: x[:, :1] - by


@pytest.mark.parametrize("bounds", [None, (-1.0, 1.0)])
def test_as_many_errors_transfer_as_lie_beyond_both_boundaries(blobs, tmp_path, bounds):
    x, y = blobs
    shifts = {"a": 0.0, "b": 0.3, "c": -0.1}
    results = [
        evaluate(shifted(by), blobs, **QUICK, bounds=bounds, described={"model": name}) for name, by in shifts.items()
    ]
    both = compare(*results, models=[shifted(by) for by in shifts.values()])
    assert len(both.transfer) == 3 * 2 * len([point for point in both.norms["l2"] if point.epsilon])
    for one in both.transfer:
        source, target = shifts[one.source], shifts[one.target]
        right = ((x[:, 0] > source) == (y == 1)) & ((x[:, 0] > target) == (y == 1))
        there = x[:, 0] + np.where(y == 1, -one.epsilon, one.epsilon)
        errs = right & ((there > source) != (y == 1))
        assert abs(one.errors - errs.sum()) <= 1  # one may lie on the boundary
        assert abs(one.transferred - (errs & ((there > target) != (y == 1))).sum()) <= 1
    assert any(0 < one.transferred < one.errors for one in both.transfer)
    both.save(tmp_path)
    rows = (tmp_path / "transfer.csv").read_text().splitlines()
    assert len(rows) == 1 + len(both.transfer)
    assert len(json.loads((tmp_path / "comparison.json").read_text())["transfer"]) == len(both.transfer)
    assert "tried on another" in (tmp_path / "comparison.html").read_text()
    compare(*results).save(tmp_path)
    assert not (tmp_path / "transfer.csv").exists()


def test_what_cannot_be_tried_is_told_in_a_sentence(blobs, tmp_path):
    one, two = (evaluate(shifted(by), blobs, **QUICK, described={"model": f"m{by}"}) for by in (0.0, 0.2))
    with pytest.raises(InputError, match=r"given for 'm0\.2' answers otherwise than in its evaluation, on \d+"):
        compare(one, two, models=[shifted(0.0), shifted(-0.5)])
    with pytest.raises(InputError, match="2 evaluations need 2 models"):
        compare(one, two, models=[shifted(0.0)])
    random = evaluate(shifted(0.1), blobs, **QUICK, draws=6, described={"model": "random"})
    with pytest.raises(InputError, match="'random' is a random model"):
        compare(one, random, models=[shifted(0.0), shifted(0.1)])
    (one.save(tmp_path / "one") / "examples.npz").unlink()
    with pytest.raises(InputError, match="cannot read"):
        compare(tmp_path / "one", two, models=[shifted(0.0), shifted(0.2)])

    def raises(x):
        raise RuntimeError("no such device")

    with pytest.raises(InputError, match=r"the model given for 'm0\.0' raised RuntimeError: no such device"):
        compare(one, two, models=[raises, shifted(0.2)])


def test_the_command_loads_the_models_that_were_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = np.linspace(-1, 1, 30, dtype=np.float32)[:, None]
    np.savez("data.npz", x=x, y=(x[:, 0] > 0).astype(int))
    (tmp_path / "nets.py").write_text(
        "def one():\n    return lambda x: x - 0.1\ndef two():\n    return lambda x: x + 0.1\n"
    )
    words = ["evaluate", "--data", "data.npz", "--no-diagnostics", "--quiet", "--steps", "2", "--epsilons", "0.5"]
    for name in ("one", "two"):
        assert main([*words, "--model", f"nets.py:{name}", "--out", name]) == 0
    assert main(["compare", "one", "two", "--transfer", "--out", "both"]) == 0
    assert "errors of nets.py:one" in capsys.readouterr().out
    assert (tmp_path / "both" / "transfer.csv").exists()
    (tmp_path / "nets.py").unlink()
    assert main(["compare", "one", "two", "--transfer", "--out", "both"]) == 2
    assert "nets.py" in capsys.readouterr().err
    (tmp_path / "two" / "config.toml").unlink()
    assert main(["compare", "two", "one", "--transfer", "--out", "both"]) == 2
    assert "'two' has no config.toml" in capsys.readouterr().err
