"""The field's notation on the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rai_toolbox import cli
from rai_toolbox.robustness import InputError
from rai_toolbox.robustness.attack._settings import Settings
from rai_toolbox.robustness.command._options import Job, Radii, Threshold


def test_radii_may_be_fractions() -> None:
    assert Radii.parse("8/255,16/255").values == (8 / 255, 16 / 255)
    assert Radii.parse("Linf:8/255").norm == "linf"
    threshold = Threshold.parse("0.6@Linf:8/255")
    assert (threshold.norm, threshold.epsilon) == ("linf", 8 / 255)
    for word in ("8/0", "8/", "a/b"):
        with pytest.raises(InputError, match=r"as in 0\.5,1 or 8/255"):
            Radii.parse(word)


@pytest.mark.parametrize("words", [["linf,l2"], ["Linf", "L2"], ["inf,2"], ["linf", "l2", "L2"]])
def test_norms_have_several_names(words: list[str]) -> None:
    assert Job.make({"norm": words}).norm == ("linf", "l2")


def test_the_library_takes_orders() -> None:
    assert Settings.checked(norms=[2, math.inf, "L1"]).norms == ("l2", "linf", "l1")
    assert Settings.checked(norms=math.inf, epsilons={"Linf": [0.1]}).epsilons == {"linf": (0.1,)}
    with pytest.raises(InputError, match="must be one of l1, l2, linf, l0, got 'l3'"):
        Settings.checked(norms="l3")


def test_an_error_that_nobody_foresaw_is_a_sentence_with_its_traceback_in_a_file(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(cli, "run_job", broken)
    assert cli.main(["evaluate", "--model", "digits", "--data", "digits", "--quiet"]) == 4
    said = capsys.readouterr().err
    assert said.startswith("error: this should not have happened: RuntimeError: a defect of ours; the traceback is in")
    assert said.count("\n") == 1
    path = Path(said.split("'")[-2])
    assert "Traceback" in path.read_text()
    path.unlink()
